//! Goal: an agent may die at every step of a late table; afterwards every table is equal, nothing is doubled, and nothing is left
//! behind on either server or on the agent's disk.
//! Method: while all tables are written to, a table is created for each fail point, and the agent dies there. Between two deaths
//! both servers are looked at, and at the end everything is compared. Every other table has no key, so that a doubled row shows.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Where an agent dies.
const POINTS: [&str; 9] = [
    // First, because the next start copies what is small before it streams.
    "copy:rows-written",
    "late:slot-copied",
    "late:snapshot",
    "late:copied",
    "late:catching-up",
    "late:paused",
    "late:caught-up",
    "late:joined",
    "late:join",
];

/// Where the tables are about to be, or have just become, part of the stream.
const JOINING: [&str; 3] = ["late:caught-up", "late:joined", "late:join"];

/// Writes to the first `tables` tables until it is told that it is done.
fn write(
    database: &Database,
    tables: &Arc<AtomicUsize>,
    done: &CancellationToken,
) -> JoinHandle<()> {
    let (database, tables, done) = (database.clone(), Arc::clone(tables), done.clone());
    tokio::spawn(async move {
        let source = database.source().await;
        let mut n = 0;
        while !done.is_cancelled() {
            n += 1;
            let of = |table: usize| {
                format!(
                    "INSERT INTO t{table} VALUES ({n}, 'new'); UPDATE t{table} SET body = 'changed {n}' WHERE n = {n} - 7;
                     DELETE FROM t{table} WHERE n = {n} - 11 OR n = -{n};"
                )
            };
            let all: String = (0..tables.load(Ordering::Relaxed)).map(of).collect();
            source
                .run(&format!("INSERT INTO base VALUES ({n}); {all}"))
                .await;
        }
    })
}

async fn create(source: &Client, table: usize) {
    let key = match table % 2 {
        0 => ", PRIMARY KEY (n)",
        _ => "",
    };
    source
        .run(&format!(
            "BEGIN; CREATE TABLE t{table} (n int, body text{key});
             INSERT INTO t{table} SELECT -i, repeat('x', 100) FROM generate_series(1, 3000) i; COMMIT"
        ))
        .await;
}

/// What an agent that died has left on the source goes by itself.
async fn expect_no_slots_but_ours(source: &Client) {
    wait_until("temporary slots to go", PATIENCE, || {
        source.holds("SELECT count(*) = 1 FROM pg_replication_slots")
    })
    .await;
}

fn files_below(directory: &std::path::Path) -> usize {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| match path.is_dir() {
            true => files_below(&path),
            false => 1,
        })
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_table_survives_a_kill_at_every_step() {
    let site = Site::own().await;
    let database = site.database("late_kills").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE base (id bigint PRIMARY KEY)")
        .await;
    let agent = Agent::new(database.config().set("source.keyless", "\"full\""));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;

    let (tables, done) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
    let writer = write(&database, &tables, &done);
    for (table, point) in POINTS.into_iter().enumerate() {
        let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", point)]);
        armed.wait_for_streaming(&database.name).await;
        create(&source, table).await;
        tables.store(table + 1, Ordering::Relaxed);
        armed.expect_death_by_signal().await;
        if JOINING.contains(&point) {
            // The source may be lost in that moment, too.
            let plan = agent.command(&["promote", "--failover", "--plan"]).await;
            plan.expect_code(0);
        }
        expect_no_slots_but_ours(&source).await;
    }

    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.replica().await;
    let all_ready = format!(
        "SELECT count(*) = {} FROM dr_agent.table_sync WHERE state = 'ready' AND table_schema = 'public'",
        POINTS.len() + 1
    );
    wait_until("every table to join", PATIENCE, || {
        replica.holds(&all_ready)
    })
    .await;
    done.cancel();
    writer.await.unwrap();
    database.expect_equal().await;
    expect_no_slots_but_ours(&source).await;
    wait_until("nothing to be set aside", PATIENCE, || {
        replica.holds("SELECT NOT EXISTS (SELECT FROM dr_agent.set_aside)")
    })
    .await;
    let streams = "SELECT count(*) FROM dr_agent.progress";
    assert_eq!(replica.number(streams).await, 1, "one stream, none beside");
    let log = running.log();
    running.stop().await;
    assert_eq!(files_below(&agent.directory().join("spill")), 0, "{log}");
}
