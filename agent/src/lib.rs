//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.

pub mod catalog;
pub mod check;
pub mod cmd;
pub mod config;
pub mod coverage;
pub mod error;
pub mod pg;
pub mod stream;
