//! Goal: a source whose storage was set back to a snapshot, slot and all, and which wrote on from there, is never taken for the one
//! that the replica and the log were made of: its LSNs mean something else now.
//! Method: a data directory that is copied while the server is down and brought back later, with WAL beyond what was applied; and
//! a record of such a source in a Kinesis stream.

use std::path::Path;
use std::process::Command;

use dr_agent::cloud::kinesis::{Kinesis, Record};
use dr_agent::flow::changelog::Part;
use dr_agent::time::system_time;
use dr_agent_tests::agent::line_with;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::records;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use prost::Message as _;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

const BEAT: &str = "SELECT beat FROM dr_agent.heartbeat";

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_was_set_back_with_its_slot_is_not_streamed_from() {
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    let database = site.database("set_back").await;
    database.source().await.run(TABLE).await;
    let agent = database.agent();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;

    // As a storage system takes a snapshot: what the server was doing is cut off.
    site.source.stop_immediately().await;
    let snapshot = directory_for("snapshot").join("data");
    copy(site.source.data_directory(), &snapshot);
    site.source.start_again().await;
    let source = database.source().await;
    let then: i64 = source.value(BEAT).await.unwrap().parse().unwrap();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source
        .run("INSERT INTO t SELECT g, 'first life' FROM generate_series(1, 100) AS g")
        .await;
    database.expect_equal().await;
    let replica = database.replica().await;
    let beats = format!("SELECT beat > {then} + 1 FROM dr_agent.heartbeat");
    wait_until("heartbeats after the snapshot", PATIENCE, || {
        replica.holds(&beats)
    })
    .await;
    running.stop().await;
    let applied = replica
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();

    // Brought back, it writes more than it had.
    site.source.stop_immediately().await;
    std::fs::remove_dir_all(site.source.data_directory()).unwrap();
    copy(&snapshot, site.source.data_directory());
    site.source.start_again().await;
    let source = database.source().await;
    let longer = format!("SELECT pg_current_wal_flush_lsn() > '{applied}'");
    while !source.holds(&longer).await {
        source
            .run("INSERT INTO t SELECT g, 'second life' FROM generate_series(1, 100) AS g ON CONFLICT DO NOTHING; DELETE FROM t")
            .await;
    }
    source
        .run("INSERT INTO t VALUES (1, 'second life'), (101, 'second life')")
        .await;
    let mut running = agent.start();
    running.expect_stopped(&database.name).await;
    let log = running.log();
    assert!(line_with(&log, &["heartbeats", "the source went back in time"]).is_some());
    let replica = database.replica().await;
    let rows = replica.value("SELECT count(*) FROM t WHERE v = 'first life'");
    assert_eq!(rows.await.as_deref(), Some("100"));
    let rows = replica.value("SELECT count(*) FROM t WHERE v <> 'first life'");
    assert_eq!(rows.await.as_deref(), Some("0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_lies_before_others_and_committed_long_after_them_stops_apply() {
    let site = Site::shared().await;
    let database = site.database("second_life").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let route = Route::new(database, kinesalite.port(), None);
    let (running, applying) = route.start().await;
    source.run("INSERT INTO t VALUES (1, 'first life')").await;
    route.database.expect_equal().await;
    running.stop().await;
    // A copy that has just been taken does not say by when everything in it had committed.
    applying.stop().await;
    let mut applying = route.apply(&[]);
    let kinesis = Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap();
    let parts = records::parts(&kinesis).await;
    let newest = parts.iter().map(|part| part.commit_time).max().unwrap();
    let first = parts.iter().min_by_key(|part| part.end_lsn).unwrap();
    let put = async |commit_time| {
        let again = Part {
            // Of version 1 nothing says whether it is damaged.
            version: 1,
            commit_time,
            ..first.clone()
        };
        let record = Record {
            partition_key: "again".to_owned(),
            data: again.encode_to_vec().into(),
        };
        kinesis.put(vec![record], &|_| {}).await.unwrap();
    };
    // Once more, and from a clock that was set back a little since: that happens.
    put(first.commit_time).await;
    put(newest + 1_000_000).await;
    put(newest + 600_000_000).await;
    applying.expect_stopped(&route.database.name).await;
    let log = applying.log();
    let committed = humantime::format_rfc3339_seconds(system_time(newest + 600_000_000));
    let words = [
        &*format!("committed at {committed}"),
        "the source went back in time",
        "snapshot",
    ];
    assert!(line_with(&log, &words).is_some(), "{log}");
}
