//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.

pub mod catalog;
pub mod cmd;
pub mod config;
pub mod error;
pub mod pg;
pub mod setup;
pub mod snapshot;
pub mod stream;
