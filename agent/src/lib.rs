//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.
//!
//! ```text
//! source ──WAL──▶ pg::replication ▶ pg::pgoutput ▶ txn::Assembler ─transaction─▶ [queue_bytes] ─▶ pipeline
//!    ▲                                                                                             │ batch
//!    └──────── standby status (FlushLsn) ◀── ledger ◀── outcome ◀── sink::replica: net ▶ statements ◀┘
//! ```
//!
//! Start reading at [`pipeline`], then [`txn`], [`batch`], [`net`], [`ledger`]: those are pure and hold
//! what must be right. [`setup`] and [`snapshot`] bring a database to where streaming can start,
//! [`promote`] ends it.

pub mod pipeline;
pub mod source;
pub mod txn;
pub mod batch;
pub mod net;
pub mod ledger;
pub mod sink;
pub mod spill;
pub mod monitor;
pub mod setup;
pub mod snapshot;
pub mod promote;
pub mod check;
pub mod coverage;
pub mod catalog;
pub mod pg;
pub mod stream;
pub mod config;
pub mod error;
pub mod backoff;
pub mod lag;
pub mod changes;
pub mod metrics;
pub mod status;
pub mod http;
pub mod cli;
pub mod cmd;
pub mod failpoint;
#[cfg(test)]
pub(crate) mod testing;

/// The version, as in `dr_agent_build_info`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
