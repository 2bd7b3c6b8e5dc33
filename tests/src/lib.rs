//! Harness of the end-to-end tests: real PostgreSQL servers, the real `dr-agent` binary.
//!
//! ```text
//! Site ── PgServer (source) ◀── Client        compare: every table, by full content
//!      └─ PgServer (replica) ◀─ Client        workload: random concurrent transactions
//! Proxy: the network between them             wait: the only way time passes
//! Agent ── Running: commands, run, signals, /metrics, /status
//! Moto: a stand-in for S3 and Kinesis         faults: spoils chosen requests on the way to S3
//! Kinesalite: another for Kinesis             kinesis_faults: the same on the way to Kinesis
//! Route: both sides of route `kinesis`         streams: as an operator makes and changes them
//! records: what is in a Kinesis stream
//! archive: a past that is remembered, and restores that are compared with it
//! disk: a file system that is soon full
//! ```
//!
//! # Invariants
//! - Nothing outlives a run: servers and agents end with their values, everything else with the
//!   run's directory ([`rundir`]).
//! - Tests wait on conditions with a deadline; nothing sleeps blindly.
//! - Harness functions panic: a test that cannot set up its servers has failed.
//!
//! Run with `cargo build -p dr-agent && cargo test -p dr-agent-tests -- --test-threads=3`: each
//! test has its servers busy, and more than about one test per core only adds waiting.

pub mod agent;
pub mod archive;
pub mod backup;
pub mod binaries;
pub mod client;
pub mod compare;
pub mod disk;
pub mod faults;
pub mod http;
pub mod kinesalite;
pub mod kinesis_faults;
pub mod moto;
pub mod pooler;
pub mod proxy;
pub mod records;
pub mod route;
pub mod rundir;
pub mod server;
pub mod site;
pub mod standby;
pub mod streams;
pub mod wait;
pub mod workload;
