//! Goal: one `run` at a time sends a stream, and no batch claims a stretch of which it has only the end, whoever moves the slot.
//! Method: a second `run` while the first one reads a backlog in windows, when nobody holds the slot; the session that keeps
//! others away is ended by the server; the slot is moved between the look at it and its use, on both ways of reading.

use std::collections::BTreeSet;

use dr_agent::cloud::kinesis::Kinesis;
use dr_agent::flow::changelog::Part;
use dr_agent_tests::agent::Agent;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::KinesisProxy;
use dr_agent_tests::records;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

/// More than `limits.catch_up_bytes` of WAL, in small transactions.
const BACKLOG: &str = "DO $$ BEGIN FOR i IN 1..1500 LOOP
        INSERT INTO t VALUES (i, repeat(md5(i::text), 8)); COMMIT; END LOOP; END $$";

async fn route(site: &Site, purpose: &str) -> (Kinesalite, KinesisProxy, Route) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let mut route = Route::new(database, proxy.port(), None);
    route.sender.configure("limits.catch_up_bytes", "\"64KiB\"");
    (kinesalite, proxy, route)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sender_is_kept_away_while_the_first_reads_the_backlog_in_windows() {
    let site = Site::own().await;
    let (_kinesalite, proxy, mut route) = route(&site, "second").await;
    // Too little for the backlog: what is not put holds the reading up in the middle of a window.
    route.sender.configure("limits.queue_bytes", "\"64KiB\"");
    route.sender.configure("limits.batch_changes", "50");
    let (running, applying) = route.start().await;
    running.stop().await;
    let source = route.database.source().await;
    source.run(BACKLOG).await;
    proxy.hold_puts(true);
    let mut first = route.run(&[]);
    first.wait_for_log(&["far behind"]).await;
    let free = route.slot("NOT active");
    assert!(source.holds(&free).await);
    let elsewhere = Agent::new(route.sender.config().clone());
    let second = elsewhere.start_with(&route.with(&[]));
    second
        .wait_for_log(&["source: another agent works on stream"])
        .await;
    // It did not get in because the first one had the slot after all.
    assert!(source.holds(&free).await);
    assert!(!first.log().contains("the backlog is read"));
    first.kill();
    proxy.hold_puts(false);
    second.wait_for_streaming(&route.database.name).await;
    route.database.expect_equal().await;
    second.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_has_lost_the_right_to_the_stream_begins_anew() {
    let site = Site::shared().await;
    let (_kinesalite, _proxy, route) = route(&site, "right").await;
    let (running, applying) = route.start().await;
    let source = route.database.source().await;
    let ended = source
        .number(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database d ON d.oid = database
              WHERE locktype = 'advisory' AND d.datname = current_database()",
        )
        .await;
    assert_eq!(ended, 1);
    running
        .wait_for_log(&["lost that holds the right to the stream"])
        .await;
    running.wait_for_streaming(&route.database.name).await;
    source.run(BACKLOG).await;
    route.database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_batch_claims_what_a_slot_that_was_moved_has_let_go() {
    // Nobody else writes between two records of which the slot takes the first.
    let site = Site::own().await;
    let (kinesalite, _proxy, route) = route(&site, "moved").await;
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    running.stop().await;
    let source = route.database.source().await;
    let kinesis = Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap();
    // Much is left behind the slot's new place, and little: windows, and the walsender.
    for (behind, reader) in [(BACKLOG, "far behind"), ("SELECT 1", "streaming")] {
        source
            .run("INSERT INTO t VALUES (0, 'let go'); DELETE FROM t")
            .await;
        let here = source.value("SELECT pg_current_wal_lsn()").await.unwrap();
        source.run(behind).await;
        let before = source
            .value(&route.slot("confirmed_flush_lsn"))
            .await
            .unwrap();
        let earlier: BTreeSet<u64> = writers(&records::parts(&kinesis).await);
        let mut running = route.run(&[("DR_AGENT_FAILPOINT", "source:before-slot=stop")]);
        running.wait_until_stopped().await;
        let stream = route.database.stream();
        source
            .run(&format!(
                "SELECT pg_replication_slot_advance('{stream}', '{here}')"
            ))
            .await;
        running.resume();
        running
            .wait_for_log(&["stands at", &here, "beyond", &before, "will retry"])
            .await;
        running.wait_for_log(&[reader]).await;
        // From where the slot is.
        source
            .run("INSERT INTO t VALUES (-1, 'sent'); DELETE FROM t WHERE id < 0")
            .await;
        route.wait_sent().await;
        running.kill();
        let (before, here): (u64, u64) = (lsn(&before), lsn(&here));
        let mut claims = records::parts(&kinesis).await;
        claims.retain(|part| !earlier.contains(&part.writer));
        assert!(claims.iter().any(|part| part.previous_end_lsn >= here));
        for part in claims {
            let begins_before = part.previous_end_lsn >= before && part.previous_end_lsn < here;
            assert!(!begins_before, "{reader}: {part:?}");
        }
    }
}

fn writers(parts: &[Part]) -> BTreeSet<u64> {
    parts.iter().map(|part| part.writer).collect()
}

fn lsn(text: &str) -> u64 {
    text.parse::<dr_agent::pg::PgLsn>().unwrap().into()
}
