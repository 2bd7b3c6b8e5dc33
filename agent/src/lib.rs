//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.

pub mod backoff;
pub mod batch;
pub mod catalog;
pub mod cmd;
pub mod config;
pub mod error;
pub mod failpoint;
pub mod lag;
pub mod ledger;
pub mod net;
pub mod pg;
pub mod sink;
pub mod spill;
pub mod setup;
pub mod snapshot;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
pub mod txn;
