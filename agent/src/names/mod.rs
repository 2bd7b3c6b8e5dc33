//! ● What streams, histories and tables are called.

pub mod history;
pub mod object;
pub mod stream;
mod table;

pub use table::TableName;
