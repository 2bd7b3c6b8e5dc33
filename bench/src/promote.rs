//! How long it takes from `promote` to writable.
//!
//! Each round: fresh servers, pgbench traffic, an agent that is streaming; the source is killed with
//! every process of it, and `dr-agent promote --failover` is started. From that moment on a fresh, ordinary session tries to
//! write on the replica every few milliseconds; the first success is the end. The old agent goes on
//! running, which is the harder case: it has to be fenced.

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use dr_agent_tests::client::Client;
use dr_agent_tests::server::PgServer;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::load;
use crate::sample::Samples;
use crate::servers;

/// Pause between two attempts to write; the resolution of the result.
const TRY_EVERY: Duration = Duration::from_millis(5);

/// A promotion that takes longer has failed.
const WRITABLE_MAX: Duration = Duration::from_secs(120);

#[derive(Args)]
pub(crate) struct Options {
    /// Promotions to measure.
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Scale of the pgbench database.
    #[arg(long, default_value_t = 5)]
    scale: u32,
    /// Transactions per second of the traffic before the source dies.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// Seconds of traffic.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

struct Round {
    writable: f64,
    command: f64,
    report: Value,
}

pub(crate) async fn measure(options: &Options, fsync: bool) -> Result<Value> {
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let round = run_round(options, fsync).await?;
        eprintln!(
            "round {number}: writable after {:.3} s, command ended after {:.3} s, report says rto {} rpo {}",
            round.writable, round.command, round.report["rto_seconds"], round.report["rpo_seconds"]
        );
        rounds.push(round);
    }
    let writable: Samples = rounds.iter().map(|round| round.writable).collect();
    let command: Samples = rounds.iter().map(|round| round.command).collect();
    eprintln!(
        "from promote to writable: median {:.3} s, largest {:.3} s of {} rounds",
        writable.percentile(50.0).unwrap_or(f64::NAN),
        writable.max().unwrap_or(f64::NAN),
        writable.len()
    );
    Ok(json!({
        "writable_seconds": writable.to_json(),
        "command_seconds": command.to_json(),
        "rate": options.rate,
        "scale": options.scale,
        "reports": rounds.into_iter().map(|round| round.report).collect::<Vec<_>>(),
    }))
}

async fn run_round(options: &Options, fsync: bool) -> Result<Round> {
    let site = servers::site(fsync).await;
    let database = site.database("bench").await;
    load::initialise(&site.source, &database.name, options.scale).await?;
    database
        .source()
        .await
        .run("CREATE TABLE bench_write (at timestamptz PRIMARY KEY)")
        .await;
    let agent = servers::agent(&database);
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let load = load::start(&site.source, &database.name, 4, options.rate, 3600)?;
    sleep(Duration::from_secs(options.seconds.into())).await;
    site.source.kill();
    // It cannot have ended well, and what it achieved is not the question here.
    drop(load);

    let started = Instant::now();
    let mut promotion = agent.spawn(&["promote", "--failover", "--json"], &[]);
    let writable = until_writable(&site.replica, &database.name, started).await?;
    let status = promotion.wait_for_exit(WRITABLE_MAX).await;
    let command = started.elapsed().as_secs_f64();
    ensure!(
        status.success(),
        "promote ended with {status}: {}",
        promotion.log()
    );
    let report = serde_json::from_str(&promotion.stdout())?;
    // Fenced; anything else would be a result not worth having.
    running.expect_exit(3).await;
    Ok(Round {
        writable,
        command,
        report,
    })
}

async fn until_writable(replica: &PgServer, database: &str, started: Instant) -> Result<f64> {
    let url = replica.url(database);
    let mut last = String::from("nothing tried");
    while started.elapsed() < WRITABLE_MAX {
        // A new session each time: the guard is a default that sessions take when they start.
        match timeout(WRITABLE_MAX, Client::try_connect(&url)).await? {
            Ok(client) => match client
                .try_run("INSERT INTO bench_write VALUES (clock_timestamp())")
                .await
            {
                Ok(()) => return Ok(started.elapsed().as_secs_f64()),
                Err(error) => last = error,
            },
            Err(error) => last = error,
        }
        sleep(TRY_EVERY).await;
    }
    anyhow::bail!("the replica is not writable after {WRITABLE_MAX:?}: {last}")
}
