//! Goal: what route `kinesis` costs stays what it is said to be: a fraction of the walsender's bytes goes into the stream, and
//! memory stays within the limits, however much waits and however large a transaction is.
//! Method: TPC-B by pgbench, held against the agents' own counters; limits far below the data, and the processes' peaks.

use std::process::Command;

use dr_agent_tests::agent::Running;
use dr_agent_tests::binaries::Binaries;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

async fn route(site: &Site, purpose: &str) -> (Kinesalite, Route) {
    let database = site.database(purpose).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let route = Route::new(database, kinesalite.port(), None);
    (kinesalite, route)
}

/// The same, with limits that the data is far above.
async fn tight_route(site: &Site, purpose: &str) -> (Kinesalite, Route) {
    let (kinesalite, mut route) = route(site, purpose).await;
    for side in [&mut route.sender, &mut route.applier] {
        side.configure("limits.queue_bytes", "\"4MiB\"");
        side.configure("limits.transaction_bytes", "\"1MiB\"");
        side.configure("limits.batch_bytes", "\"1MiB\"");
    }
    (kinesalite, route)
}

fn pgbench(url: &str, arguments: &[&str]) {
    let mut command = Command::new(Binaries::of_source().program("pgbench"));
    let output = command.args(arguments).arg(url).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Bytes that came from the walsender, and what they were in the stream.
async fn bytes(running: &Running, database: &str) -> (f64, f64) {
    let metrics = running.metrics().await;
    let value = |name, label, value| {
        let labels = [("database", database), (label, value)];
        metrics.value(name, &labels).unwrap_or_default()
    };
    let received = value("dr_agent_bytes_total", "direction", "received");
    (
        received,
        value("dr_agent_stream_bytes_total", "form", "stored"),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tpc_b_takes_a_quarter_of_the_walsenders_bytes() {
    let site = Site::own().await;
    let (_kinesalite, route) = route(&site, "tpcb").await;
    let database = &route.database;
    let url = database.source_url();
    pgbench(&url, &["--initialize", "--scale=2", "--quiet"]);
    // It has no key.
    let source = database.source().await;
    source
        .run("ALTER TABLE pgbench_history REPLICA IDENTITY FULL")
        .await;
    let (running, applying) = route.start().await;
    let before = bytes(&running, &database.name).await;
    tokio::task::spawn_blocking(move || {
        pgbench(&url, &["--no-vacuum", "--client=4", "--transactions=1500"]);
    })
    .await
    .unwrap();
    route.wait_sent().await;
    let after = bytes(&running, &database.name).await;
    let (received, stored) = (after.0 - before.0, after.1 - before.1);
    assert!(received > 1e6, "{received}");
    let share = stored / received;
    eprintln!("{stored} of {received} bytes: {share:.3}");
    assert!(share <= 0.25, "{share:.3}");
    database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}

fn expect_little(what: &str, process: &Running, most: u64) {
    let peak = process.peak_resident_bytes();
    eprintln!("{what}: {} MiB", peak >> 20);
    assert!(peak < most, "{what}: {} MiB", peak >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction_goes_through_in_bounded_memory() {
    let site = Site::own().await;
    let (_kinesalite, route) = tight_route(&site, "large").await;
    let source = route.database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let (running, applying) = route.start().await;
    // 200 MiB of changes.
    source
        .run(
            "INSERT INTO t SELECT g, repeat(md5(g::text), 64) FROM generate_series(1, 100000) AS g",
        )
        .await;
    route.database.expect_equal().await;
    expect_little("run", &running, 100 << 20);
    expect_little("apply", &applying, 130 << 20);
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_not_been_applied_waits_in_the_stream_and_not_in_memory() {
    let site = Site::own().await;
    let (_kinesalite, route) = tight_route(&site, "waits").await;
    let source = route.database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let (running, applying) = route.start().await;
    // Nothing is applied meanwhile.
    let replica = route.database.writable_replica().await;
    replica.run("BEGIN; LOCK TABLE t IN SHARE MODE").await;
    for n in 0..400 {
        source
            .run(&format!(
                "INSERT INTO t SELECT {n} * 1000 + g, repeat(md5(g::text), 64) FROM generate_series(1, 250) AS g"
            ))
            .await;
    }
    route.wait_sent().await;
    // As far as it gets.
    wait_until("apply to stand still", PATIENCE, || async {
        replica
            .holds("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")
            .await
    })
    .await;
    replica.run("COMMIT").await;
    route.database.expect_equal().await;
    expect_little("run", &running, 100 << 20);
    expect_little("apply", &applying, 130 << 20);
    running.stop().await;
    applying.stop().await;
}
