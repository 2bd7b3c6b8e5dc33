//! Goal: promise 6: a transaction of two million rows passes with the agent below 256 MiB resident.
//! Method: one INSERT and one UPDATE of that size; the kernel tells the agent's peak.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dr_agent_tests::compare::{expect_same_content, wait_caught_up_within};
use dr_agent_tests::site::Site;

const ROWS: u32 = 2_000_000;
const RESIDENT_BYTES_MAX: u64 = 256 * 1024 * 1024;

#[tokio::test]
async fn a_transaction_of_two_million_rows_needs_less_than_256_mib() {
    let site = Site::own().await;
    let database = site.database("large").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE narrow (id int PRIMARY KEY, n int)")
        .await;
    let (agent, running) = database.replicate().await;
    let replica = database.replica().await;
    source
        .run(&format!(
            "INSERT INTO narrow SELECT g, g FROM generate_series(1, {ROWS}) AS g"
        ))
        .await;
    let started = Instant::now();
    wait_caught_up_within(
        Duration::from_secs(240),
        &source,
        &replica,
        &database.stream(),
    )
    .await;
    let peak = running.peak_resident_bytes();
    eprintln!(
        "{ROWS} rows in one transaction: {:.1} s after its commit, peak {} MiB",
        started.elapsed().as_secs_f64(),
        peak / 1024 / 1024
    );
    assert_eq!(
        replica.number("SELECT count(*) FROM narrow").await,
        i64::from(ROWS)
    );
    expect_same_content(&source, &replica).await;
    assert!(peak < RESIDENT_BYTES_MAX, "peak {} MiB", peak / 1024 / 1024);
    // Its spill file is gone.
    let spilled = files_below(&agent.directory().join("spill"));
    assert!(spilled.is_empty(), "spill files remain: {spilled:?}");
    running.expect_quiet_log();
    running.stop().await;
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
