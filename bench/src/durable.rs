//! What is durable outside of a database: the archive beside the initial copy, and a Kinesis stream.
//!
//! *Archive*: rounds of an initial copy, a base backup of the same tables into a directory, TPC-B traffic, and a restore of
//! base and log into an empty database; one after the other on the same servers, so that the ratios are of one run.
//! *Stream*: TPC-B at a fixed rate and as fast as it goes, through route `kinesis` and a stand-in (kinesalite); the lag is
//! sampled as in `sustained`, and bytes are the agents' own counters.
//!
//! A stand-in on the same machine answers in a few milliseconds and knows no throttling: Kinesis itself adds its own latency to the
//! lag, and nothing to the bytes.

use std::time::Duration;

use anyhow::{Error, Result, ensure};
use clap::Args;
use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::wait_until;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use crate::load;
use crate::servers;
use crate::sustained::{PROBE_TABLE, sample_probe, sample_reported, write_probe};

#[derive(Args)]
pub(crate) struct Options {
    /// Rounds of copy, backup and restore.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Scale of the pgbench database: 100 000 accounts each.
    #[arg(long, default_value_t = 20)]
    scale: u32,
    /// Transactions per second of the traffic.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    /// Seconds of it.
    #[arg(long, default_value_t = 20)]
    seconds: u32,
    /// Clients of pgbench.
    #[arg(long, default_value_t = 8)]
    clients: u32,
    /// Shards of the stream.
    #[arg(long, default_value_t = 2)]
    shards: u32,
}

pub(crate) async fn measure(options: &Options, fsync: bool) -> Result<Value> {
    let site = servers::site(fsync).await;
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        let round = archive(options, &site).await?;
        eprintln!("round {number}: {round}");
        rounds.push(round);
    }
    let stream = stream(options, &site).await?;
    eprintln!("stream: {stream:#}");
    Ok(json!({ "scale": options.scale, "archive": rounds, "stream": stream }))
}

async fn archive(options: &Options, site: &Site) -> Result<Value> {
    let database = site.database("durable").await;
    load::initialise(&site.source, &database.name, options.scale).await?;
    let home = directory_for("archive");
    let config = servers::as_shipped(database.config())
        .set_text("archive.url", &format!("file://{}/objects", home.display()))
        .set_text(
            "archive.spool_directory",
            &format!("{}/spool", home.display()),
        )
        // Not while something is measured.
        .set_text("archive.base_every", "1000d")
        .set_text("objectives.rpo", "2s");
    let agent = Agent::new(config);
    let begun = Instant::now();
    let mut running = agent.start();
    servers::wait_for_streaming(&mut running, &database.name)
        .await
        .map_err(Error::msg)?;
    let copy = begun.elapsed();
    // The first one is due at once.
    running.wait_for_log(&["base backup taken"]).await;
    let begun = Instant::now();
    agent.command(&["backup"]).await.expect_code(0);
    let backup = begun.elapsed();

    let load = load::start(
        &site.source,
        &database.name,
        options.clients,
        0,
        options.seconds,
    )?;
    let achieved = load::finish(load).await?;
    servers::catch_up(&database).await;
    let labels = [("database", database.name.as_str())];
    wait_until(
        "the log to be in the archive",
        servers::CATCH_UP_MAX,
        || async {
            running
                .metrics()
                .await
                .value("dr_agent_archive_spool_bytes", &labels)
                < Some(64.0 * 1024.0)
        },
    )
    .await;
    running.stop().await;
    let name = format!("restored_{}", database.name);
    let admin = database.replica_server().client("postgres").await;
    admin
        .run(&format!("CREATE DATABASE {name} TEMPLATE template0"))
        .await;
    let url = database.replica_server().url(&name);
    let begun = Instant::now();
    let restored = agent
        .command(&["restore", "--target", &url, "--json"])
        .await;
    let restore = begun.elapsed();
    restored.expect_code(0);
    servers::expect_equal(
        &database.source().await,
        &database.replica_server().client(&name).await,
    )
    .await;
    let transactions = restored.json()["transactions"].clone();
    admin.run(&format!("DROP DATABASE {name}")).await;
    let seconds = |time: Duration| (time.as_secs_f64() * 100.0).round() / 100.0;
    Ok(json!({
        "initial_copy_seconds": seconds(copy),
        "base_backup_seconds": seconds(backup),
        "base_backup_per_copy": backup.as_secs_f64() / copy.as_secs_f64(),
        "restore_seconds": seconds(restore),
        "restored_transactions": transactions,
        "restore_per_copy": restore.as_secs_f64() / copy.as_secs_f64(),
        "source_tps": achieved.tps,
    }))
}

async fn stream(options: &Options, site: &Site) -> Result<Value> {
    let database = site.database("stream").await;
    load::initialise(&site.source, &database.name, options.scale).await?;
    database.source().await.run(PROBE_TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, options.shards).await;
    let route = Route::with_configuration(database.clone(), kinesalite.port(), || {
        servers::as_shipped(database.config())
    });
    let mut running = route.run(&[]);
    servers::wait_for_streaming(&mut running, &database.name)
        .await
        .map_err(Error::msg)?;
    let mut applying = route.apply(&[]);
    servers::wait_for_streaming(&mut applying, &database.name)
        .await
        .map_err(Error::msg)?;
    let mut steps = Vec::new();
    for rate in [options.rate, 0] {
        steps.push(step(options, rate, site, &database, &running, &applying).await?);
        servers::catch_up(&database).await;
    }
    servers::expect_equal(&database.source().await, &database.replica().await).await;
    let peaks = [&running, &applying].map(Running::peak_resident_bytes);
    running.stop().await;
    applying.stop().await;
    Ok(json!({
        "steps": steps,
        "run_peak_resident_bytes": peaks[0],
        "apply_peak_resident_bytes": peaks[1],
        "compared_equal": true,
    }))
}

async fn step(
    options: &Options,
    rate: u32,
    site: &Site,
    database: &Database,
    running: &Running,
    applying: &Running,
) -> Result<Value> {
    let before = Bytes::of(running, database).await;
    let load = load::start(
        &site.source,
        &database.name,
        options.clients,
        rate,
        options.seconds,
    )?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(options.seconds.into());
    let writer = tokio::spawn(write_probe(database.clone(), end));
    sleep_until(begun + Duration::from_secs(2)).await;
    let (reported, probed) = tokio::join!(
        sample_reported(applying, &database.name, end),
        sample_probe(database, end),
    );
    writer.await?;
    let achieved = load::finish(load).await?;
    servers::catch_up(database).await;
    let caught_up = begun.elapsed().as_secs_f64();
    let after = Bytes::of(running, database).await;
    let received = after.received - before.received;
    ensure!(received > 0.0, "nothing was received");
    Ok(json!({
        "asked_tps": rate,
        "source_tps": achieved.tps,
        "seconds_until_applied": caught_up,
        "lag_reported_seconds": reported.to_json(),
        "lag_probed_seconds": probed.to_json(),
        "received_bytes": received,
        "raw_bytes": after.raw - before.raw,
        "stored_bytes": after.stored - before.stored,
        "stored_per_received": (after.stored - before.stored) / received,
        "records": after.records - before.records,
    }))
}

/// Counters of the sending agent.
struct Bytes {
    received: f64,
    raw: f64,
    stored: f64,
    records: f64,
}

impl Bytes {
    async fn of(running: &Running, database: &Database) -> Self {
        let metrics = running.metrics().await;
        let value = |name: &str, label: (&str, &str)| {
            let labels = [("database", database.name.as_str()), label];
            metrics.value(name, &labels).unwrap_or(0.0)
        };
        Self {
            received: value("dr_agent_bytes_total", ("direction", "received")),
            raw: value("dr_agent_stream_bytes_total", ("form", "raw")),
            stored: value("dr_agent_stream_bytes_total", ("form", "stored")),
            records: value("dr_agent_stream_records_total", ("direction", "put")),
        }
    }
}
