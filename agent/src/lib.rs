//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.

pub mod catalog;
pub mod cmd;
pub mod config;
pub mod error;
pub mod failpoint;
pub mod pg;
pub mod promote;
pub mod stream;
