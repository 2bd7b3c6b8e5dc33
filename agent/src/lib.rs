//! dr-agent keeps a pilot-light replica of an on-premises PostgreSQL and promotes it on the bad day.
//!
//! ```text
//! source ──WAL──▶ pg::replication ▶ pg::pgoutput ▶ Assembler ─transaction─▶ [queue_bytes] ─▶ pipeline
//!    ▲                                                                                        │ batch
//!    └──────── standby status (FlushLsn) ◀── ledger ◀── outcome ◀── sink::replica: statements ◀┘
//! ```
//!
//! Start reading at [`pipeline`], then [`flow`]: `transaction`, `batch`, `net` and `ledger` are pure and hold
//! what must be right. [`setup`] and [`copy`] bring a database to where streaming can start,
//! [`promote`] ends it.

pub mod archive;
pub mod backoff;
pub mod catalog;
pub mod check;
pub mod cli;
pub mod cloud;
pub mod cmd;
pub mod config;
pub mod copy;
pub mod ddl;
pub mod error;
pub mod failpoint;
pub mod flow;
pub mod names;
pub mod observe;
pub mod pg;
pub mod pipeline;
mod private;
pub mod promote;
pub mod replay;
pub mod schema;
pub mod setup;
pub mod shape;
pub mod sink;
pub mod source;
pub mod time;
pub mod watch;

/// The version, as in `dr_agent_build_info`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
