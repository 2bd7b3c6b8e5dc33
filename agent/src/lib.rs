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

pub mod archive;
pub mod aws;
pub mod backoff;
pub mod backup;
pub mod batch;
pub mod catalog;
pub mod changelog;
pub mod changes;
pub mod check;
pub mod cli;
pub mod clock;
pub mod cmd;
pub mod computed;
pub mod config;
pub mod coverage;
pub mod drain;
pub mod error;
pub mod failpoint;
pub mod history;
pub mod http;
pub mod kinesis;
pub mod lag;
pub mod ledger;
pub mod listed;
pub mod metrics;
pub mod monitor;
pub mod net;
pub mod pg;
pub mod pipeline;
pub mod plan;
pub mod prepared;
mod private;
pub mod promote;
pub mod refused;
pub mod remedy;
pub mod replay;
pub mod restore;
pub mod routing;
pub(crate) mod sequence_look;
pub mod setup;
pub mod sink;
pub mod snapshot;
pub mod source;
pub mod spill;
pub mod status;
pub mod store;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
pub mod time;
pub mod txn;
pub mod watch;

/// The version, as in `dr_agent_build_info`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
