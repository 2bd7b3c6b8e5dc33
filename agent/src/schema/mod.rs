//! The agent's own tables in the databases.

pub mod listing;
pub mod prepared;
pub mod refused;
