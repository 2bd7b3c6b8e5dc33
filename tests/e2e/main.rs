//! The end-to-end tests, one binary: the real agent against real PostgreSQL servers.
//!
//! Each module's header says its goal and its method. How to run them: `dr_agent_tests`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "these are tests: a panic is how they fail"
)]

mod harness;
