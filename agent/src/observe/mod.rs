//! What is seen from outside: lag, status, metrics, the page.

pub mod http;
pub mod lag;
pub mod metrics;
pub mod reader;
pub mod status;
