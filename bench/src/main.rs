//! Measurements of the real `dr-agent` binary on real, throw-away servers.
//!
//! ```text
//! compare     the same work done by dr-agent, a subscription, pgcopydb, and what no reader can beat
//! report      tables, plots and a verdict of what compare has measured
//! sustained   how many transactions per second it follows with a lag under a second
//! large       how much memory a transaction of two million rows takes
//! durable     what the archive and a Kinesis stream cost: throughput beside the initial copy, bytes, lag
//! ddl         what writing commands down, and looking what has changed, costs the source
//! promote     how long it takes from `promote` to writable
//! ```
//!
//! Text for people goes to standard error while it measures; one JSON object goes to standard
//! output at the end (`compare` writes a file after every round instead, for `report`). What is
//! measured, how, and what it does not say: `bench/README.md`.
//!
//! # Invariants
//! - Every number comes from this run; nothing is assumed or carried over.
//! - After `compare`, `sustained` and `large` source and replica are compared in full: a fast wrong answer is an
//!   error, not a result. After `promote` the old agent must have been fenced.
//!
//! # What it does not do
//! It does not judge: there is no threshold that would make it fail for being slow.

mod compare;
mod ddl;
mod durable;
mod large;
mod load;
mod machine;
mod plot;
mod promote;
mod report;
mod results;
mod sample;
mod servers;
mod sustained;
mod usage;
mod verdict;

use std::io::Write as _;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde_json::json;

/// Measures dr-agent on throw-away servers of this machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Run the servers with fsync = off. Quicker; says less about a real disk.
    #[arg(long, global = true)]
    no_fsync: bool,
    #[command(subcommand)]
    measurement: Measurement,
}

#[derive(Subcommand)]
enum Measurement {
    /// Beside PostgreSQL's own subscription, pgcopydb and the limits of the source.
    #[command(args_override_self = true)]
    Compare(Box<compare::Options>),
    /// Tables, plots and verdict of what `compare` has measured.
    Report(report::Options),
    /// Steps up the rate of pgbench until the lag's 99th percentile reaches a second.
    Sustained(sustained::Options),
    /// Peak memory while one transaction of many rows passes through.
    Large(large::Options),
    /// Throughput of base backup and restore beside the initial copy; bytes and lag through a Kinesis stream.
    Durable(durable::Options),
    /// Milliseconds that a command of the source takes longer, and that a look at all of its objects takes.
    Ddl(ddl::Options),
    /// Seconds from the start of `promote` to the first write of an ordinary session.
    Promote(promote::Options),
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let fsync = !arguments.no_fsync;
    let (name, result) = match arguments.measurement {
        Measurement::Compare(options) => return compare::measure(&options, fsync).await,
        Measurement::Report(options) => return report::write(&options),
        Measurement::Sustained(options) => {
            ("sustained", sustained::measure(&options, fsync).await?)
        }
        Measurement::Large(options) => ("large", large::measure(&options, fsync).await?),
        Measurement::Durable(options) => ("durable", durable::measure(&options, fsync).await?),
        Measurement::Ddl(options) => ("ddl", ddl::measure(&options, fsync).await?),
        Measurement::Promote(options) => ("promote", promote::measure(&options, fsync).await?),
    };
    let report = json!({
        "measurement": name,
        "machine": machine::facts(fsync),
        "result": result,
    });
    writeln!(std::io::stdout(), "{report:#}")?;
    Ok(())
}
