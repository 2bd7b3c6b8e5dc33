//! Goal: under route `kinesis` the replica equals the source as of one commit, whatever dies, comes twice, or comes late.
//! Method: `run` beside the source and `apply` beside the replica, each a process of its own, with a stream of a stand-in
//! between them; both are killed at every edge of durability, the replica is away, shards split and merge under load, and what
//! the stream does not have any more comes out of the archive.

use std::path::PathBuf;

use dr_agent::cloud::kinesis::{Kinesis, Record};
use dr_agent_tests::agent::{Running, line_with};
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Fault, KinesisProxy};
use dr_agent_tests::moto::{Moto, SECRET};
use dr_agent_tests::records::everything;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{Workload, seed};
use rand::seq::SliceRandom as _;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

async fn write(database: &Database, n: u32) {
    let sql =
        format!("INSERT INTO t VALUES ({n}000, 'streamed'); UPDATE t SET v = '{n}' WHERE id <= 50");
    database.source().await.run(&sql).await;
}

/// A stream of its own on a stand-in of its own, and a route through it.
async fn through_kinesalite(database: Database, archive: Option<PathBuf>) -> (Kinesalite, Route) {
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 3).await;
    let route = Route::new(database, kinesalite.port(), archive);
    (kinesalite, route)
}

async fn replicated(site: &Site, purpose: &str) -> (Kinesalite, Route, Running, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let (kinesalite, route) = through_kinesalite(database, None).await;
    let (running, applying) = route.start().await;
    (kinesalite, route, running, applying)
}

fn archive() -> PathBuf {
    directory_for("archive").join("objects")
}

/// Where nobody listens.
const NOWHERE: &str = "\"postgres://nobody@127.0.0.1:1/postgres\"";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_workload_arrives_through_either_stand_in() {
    let site = Site::shared().await;
    let (moto, kinesalite) = (Moto::start().await, Kinesalite::start().await);
    for (purpose, port) in [("moto", moto.port()), ("kinesalite", kinesalite.port())] {
        streams::create(port, STREAM, 3).await;
        let database = site.database(purpose).await;
        Workload::create_tables(&database.source().await).await;
        let route = Route::new(database, port, None);
        let (running, applying) = route.start().await;
        let database = &route.database;
        let workload = Workload::start(&database.source_url(), seed(), 3);
        wait_until("enough transactions", PATIENCE, || async {
            workload.committed() > 300
        })
        .await;
        workload.stop().await;
        database.expect_equal().await;
        applying.expect_quiet_log();
        running.expect_quiet_log();
        let metrics = applying.metrics().await;
        let labels = [("database", database.name.as_str()), ("direction", "read")];
        assert!(metrics.value("dr_agent_stream_records_total", &labels) > Some(0.0));
        assert!(!running.log().contains(SECRET) && !applying.log().contains(SECRET));
        running.stop().await;
        applying.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_are_killed_at_every_edge_of_durability() {
    let site = Site::shared().await;
    let database = site.database("edges").await;
    database.source().await.run(TABLE).await;
    let (_kinesalite, mut route) = through_kinesalite(database, Some(archive())).await;
    route.sender.configure("archive.required", "true");
    let (running, applying) = route.start().await;
    running.stop().await;
    applying.stop().await;
    let database = &route.database;
    for (n, point) in [
        "pipeline:before-ship",
        "archive:spooled",
        "archive:uploaded",
        "kinesis:before-put",
        "kinesis:put",
        "pipeline:before-acknowledge",
        "source:acknowledged",
    ]
    .into_iter()
    .enumerate()
    {
        let mut armed = route.run(&[("DR_AGENT_FAILPOINT", point)]);
        write(database, n as u32).await;
        armed.expect_death_by_signal().await;
    }
    let running = route.run(&[]);
    for (n, point) in [
        "apply:handed-over",
        "apply:before-commit",
        "apply:after-commit",
        "pipeline:before-ship",
        "pipeline:before-acknowledge",
    ]
    .into_iter()
    .enumerate()
    {
        let mut armed = route.apply(&[("DR_AGENT_FAILPOINT", point)]);
        write(database, n as u32 + 50).await;
        armed.expect_death_by_signal().await;
    }
    let applying = route.apply(&[]);
    write(database, 99).await;
    database.expect_equal().await;
    // What was sent twice was recognized.
    let labels = [("database", database.name.as_str()), ("reason", "known")];
    let known = applying
        .metrics()
        .await
        .value("dr_agent_stream_ignored_records_total", &labels);
    assert!(known > Some(0.0), "{known:?}");
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_split_and_merge_under_load() {
    let site = Site::shared().await;
    let database = site.database("reshard").await;
    Workload::create_tables(&database.source().await).await;
    let (kinesalite, route) = through_kinesalite(database, None).await;
    let (running, applying) = route.start().await;
    let database = &route.database;
    let workload = Workload::start(&database.source_url(), seed(), 3);
    let port = kinesalite.port();
    for round in 0..2 {
        let open = streams::open_shards(port, STREAM).await;
        streams::split(port, STREAM, &open[round]).await;
        let open = streams::open_shards(port, STREAM).await;
        streams::merge(port, STREAM, &open[1], &open[2]).await;
        let so_far = workload.committed();
        wait_until("more transactions", PATIENCE, || async {
            workload.committed() > so_far + 100
        })
        .await;
    }
    workload.stop().await;
    database.expect_equal().await;
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_fail_in_part_or_whole_or_twice_cost_nothing() {
    let site = Site::shared().await;
    let database = site.database("faults").await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let route = Route::new(database, proxy.port(), None);
    let (running, applying) = route.start().await;
    let database = &route.database;
    let source = database.source().await;
    const THROTTLED: &str = "ProvisionedThroughputExceededException";
    for (n, (operation, fault)) in [
        (
            "PutRecords",
            Fault::RefuseRecords(|n| n % 2 == 0, THROTTLED),
        ),
        ("PutRecords", Fault::Refuse(400, THROTTLED)),
        ("PutRecords", Fault::Refuse(500, "InternalFailure")),
        ("PutRecords", Fault::Cut),
        ("PutRecords", Fault::LoseAnswer),
        ("GetRecords", Fault::Refuse(400, THROTTLED)),
        ("GetRecords", Fault::Refuse(400, "ExpiredIteratorException")),
        ("GetRecords", Fault::LoseAnswer),
        ("GetRecords", Fault::Cut),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.spoil(operation, fault);
        // Several records, so that a part of a call can fail.
        let sql = format!(
            "INSERT INTO t SELECT {n} * 100000 + g, md5(random()::text) || md5(random()::text) || md5(random()::text) || md5(random()::text)
               FROM generate_series(1000, 21000) AS g"
        );
        source.run(&sql).await;
        wait_until("the fault to be met", PATIENCE, || async {
            proxy.unused() == 0
        })
        .await;
    }
    database.expect_equal().await;
    let name = database.name.as_str();
    let metrics = running.metrics().await;
    for counter in [
        "dr_agent_stream_retried_records_total",
        "dr_agent_stream_throttled_total",
    ] {
        assert!(
            metrics.value(counter, &[("database", name)]) > Some(0.0),
            "{counter}"
        );
    }
    let ignored = [("database", name), ("reason", "known")];
    let known = applying
        .metrics()
        .await
        .value("dr_agent_stream_ignored_records_total", &ignored);
    assert!(known > Some(0.0), "{known:?}");
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_may_come_in_any_order_and_twice() {
    const SHUFFLED: &str = "shuffled";
    let site = Site::shared().await;
    let database = site.database("shuffled").await;
    Workload::create_tables(&database.source().await).await;
    let (kinesalite, mut route) = through_kinesalite(database, None).await;
    // Many records.
    route.sender.configure("limits.batch_changes", "10");
    let port = kinesalite.port();
    streams::create(port, SHUFFLED, 2).await;
    let (running, applying) = route.start().await;
    applying.stop().await;
    let workload = Workload::start(&route.database.source_url(), seed(), 3);
    wait_until("enough transactions", PATIENCE, || async {
        workload.committed() > 200
    })
    .await;
    workload.stop().await;
    route.wait_sent().await;
    running.stop().await;

    let settings = kinesalite.settings();
    let from = Kinesis::open_with(STREAM, &settings).await.unwrap();
    let to = Kinesis::open_with(SHUFFLED, &settings).await.unwrap();
    let mut records = everything(&from).await;
    assert!(records.len() > 20, "{}", records.len());
    let again = records.len() / 3;
    records.extend_from_within(..again);
    records.shuffle(&mut rand::rng());
    let records = records.into_iter().enumerate().map(|(n, data)| Record {
        partition_key: n.to_string(),
        data,
    });
    // One call after the other: what comes early comes much too early.
    for chunk in records.collect::<Vec<_>>().chunks(10) {
        to.put(chunk.to_vec(), &|_| {}).await.unwrap();
    }
    route
        .applier
        .configure("route.stream", &format!("\"{SHUFFLED}\""));
    let applying = route.apply(&[]);
    let (source, replica) = (
        route.database.source().await,
        route.database.replica().await,
    );
    // What was confirmed is the end of a batch: the last.
    let sql = format!(
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'",
        route.database.stream()
    );
    let end = source.value(&sql).await.unwrap();
    wait_until("everything to be applied", PATIENCE, || async {
        let sql = format!("SELECT end_lsn >= '{end}' FROM dr_agent.progress");
        replica.value(&sql).await.as_deref() == Some("t")
    })
    .await;
    expect_same_content(&source, &replica).await;
    applying.expect_quiet_log();
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_replica_is_away_the_source_keeps_nothing_for_it() {
    let site = Site::own().await;
    let (_kinesalite, route, running, applying) = replicated(&site, "away").await;
    let database = &route.database;
    let source = database.source().await;
    site.replica.stop_immediately().await;
    // As much as two quiet hours would bring.
    for n in 1..=8 {
        source
            .run(&format!(
                "INSERT INTO t SELECT {n} * 100000 + g, repeat(md5(g::text), 10) FROM generate_series(1, 20000) AS g;
                 UPDATE t SET v = v || '{n}' WHERE id % 3 = 0"
            ))
            .await;
    }
    route.wait_sent().await;
    let stream = database.stream();
    wait_until("the source to let go of its WAL", PATIENCE, || async {
        // Writes down which transactions run, without which a slot does not move.
        source.run("CHECKPOINT").await;
        let sql = format!(
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) < 16 * 1024 * 1024
               FROM pg_replication_slots WHERE slot_name = '{stream}'"
        );
        source.value(&sql).await.as_deref() == Some("t")
    })
    .await;
    site.replica.start_again().await;
    applying.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_that_do_not_see_one_another_copy_out_of_the_archive() {
    let site = Site::shared().await;
    let database = site.database("apart").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let (_kinesalite, mut route) = through_kinesalite(database, Some(archive())).await;
    route.applier.configure("source.url", NOWHERE);
    route.sender.configure("replica.url", NOWHERE);
    let half = route.sender.command(&["init"]).await;
    half.expect_code(0)
        .expect_words(&["replica cannot be reached", "left out"]);
    // Nothing to copy from yet.
    let mut applying = route.apply(&[]);
    applying
        .wait_for_log(&["nothing to copy", "no base backup yet"])
        .await;
    applying.kill();
    let running = route.run(&[]);
    running.wait_for_log(&["base backup", "taken"]).await;
    write(&route.database, 1).await;
    // A load that is killed is begun anew.
    let mut armed = route.apply(&[("DR_AGENT_FAILPOINT", "restore:data-loaded")]);
    armed.expect_death_by_signal().await;
    write(&route.database, 2).await;
    let applying = route.apply(&[]);
    applying.wait_for_log(&["interrupted", "begins anew"]).await;
    applying.wait_for_streaming(&route.database.name).await;
    write(&route.database, 3).await;
    route.database.expect_equal().await;
    // Its first rows are only on the source.
    source
        .run("CREATE TABLE later (id int PRIMARY KEY); INSERT INTO later VALUES (1)")
        .await;
    wait_until("the new table to be sent", PATIENCE, || async {
        source
            .run("INSERT INTO later SELECT coalesce(max(id), 0) + 1 FROM later")
            .await;
        let log = applying.log();
        line_with(&log, &["public.later", "set aside", "cannot be reached"]).is_some()
    })
    .await;
    // It is not in the way.
    write(&route.database, 4).await;
    let replica = route.database.replica().await;
    wait_until("the rest to go on", PATIENCE, || {
        replica.holds("SELECT EXISTS (SELECT FROM t WHERE id = 4000)")
    })
    .await;
    assert!(
        replica
            .holds("SELECT EXISTS (SELECT FROM dr_agent.set_aside WHERE table_name = 'later')")
            .await
    );
    applying.stop().await;
    // Where the source can be reached, it is copied.
    route.applier.configure(
        "source.url",
        &format!("\"{}\"", site.source.url("postgres")),
    );
    let applying = route.apply(&[]);
    applying
        .wait_for_log(&["public.later", "copied beside the stream"])
        .await;
    route.database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_has_not_any_more_comes_out_of_the_archive_or_is_named() {
    let site = Site::shared().await;
    let database = site.database("gone").await;
    database.source().await.run(TABLE).await;
    let (kinesalite, route) = through_kinesalite(database, Some(archive())).await;
    let (running, applying) = route.start().await;
    applying.stop().await;
    for n in 1..=3 {
        write(&route.database, n).await;
    }
    route.wait_sent().await;
    running.stop().await;
    // Retention has passed: the stream is empty.
    let port = kinesalite.port();
    streams::delete(port, STREAM).await;
    streams::create(port, STREAM, 2).await;
    let running = route.run(&[]);
    write(&route.database, 4).await;
    let applying = route.apply(&[]);
    applying.wait_for_log(&["filled from the archive"]).await;
    route.database.expect_equal().await;
    applying.stop().await;
    // Without an archive that has it, the stretch is named.
    write(&route.database, 5).await;
    route.wait_sent().await;
    running.stop().await;
    streams::delete(port, STREAM).await;
    streams::create(port, STREAM, 2).await;
    let poor = Route::new(route.database.clone(), port, None);
    let running = poor.run(&[]);
    write(&poor.database, 6).await;
    let mut applying = poor.apply(&[]);
    applying.expect_stopped(&route.database.name).await;
    let position = poor
        .database
        .replica()
        .await
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();
    let log = applying.log();
    let words = ["not in the Kinesis stream", position.as_str(), "no archive"];
    assert!(line_with(&log, &words).is_some(), "{words:?}\n{log}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_drains_the_stream_first() {
    let site = Site::own().await;
    let (_kinesalite, route, mut running, applying) = replicated(&site, "drained").await;
    let database = &route.database;
    applying.pause();
    for n in 1..=5 {
        write(database, n).await;
    }
    route.wait_sent().await;
    let rows = database
        .source()
        .await
        .value("SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM t")
        .await;
    site.source.kill();
    running.kill();
    // Killed once that is stored, it goes on behind it: what was applied is in the report all the same.
    let arguments = ["promote", "--failover", "--json"];
    let armed = route.with(&[("DR_AGENT_FAILPOINT", "promote:drained")]);
    let killed = route.applier.command_with(&arguments, &armed).await;
    assert_eq!(killed.code, None, "{}", killed.text());
    let promoted = route
        .applier
        .command_with(&arguments, &route.with(&[]))
        .await;
    promoted.expect_code(0);
    let report = promoted.json();
    let steps = report["databases"][0]["steps"].to_string();
    assert!(
        steps.contains("of the Kinesis stream were applied"),
        "{steps}"
    );
    let replica = database.replica().await;
    let there = replica
        .value("SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM t")
        .await;
    assert_eq!(there, rows);
    // Who applied before is fenced.
    let mut applying = applying;
    applying.resume();
    applying.expect_exit(3).await;
    let mut again = route.apply(&[]);
    again.expect_exit(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_whose_stream_is_away_says_how_to_go_on_without_it() {
    let site = Site::own().await;
    let (kinesalite, route, running, applying) = replicated(&site, "undrained").await;
    write(&route.database, 1).await;
    route.database.wait_caught_up().await;
    applying.stop().await;
    running.stop().await;
    drop(kinesalite);
    let refused = route
        .applier
        .command_with(&["promote", "--failover"], &route.with(&[]))
        .await;
    refused
        .expect_code(4)
        .expect_words(&["refused", "--skip-drain"]);
    let term = "SELECT term FROM dr_agent.progress";
    assert_eq!(route.database.replica().await.number(term).await, 1);
    let opened = route
        .applier
        .command_with(
            &["promote", "--failover", "--skip-drain", "--json"],
            &route.with(&[]),
        )
        .await;
    opened.expect_code(0);
    let accepted = opened.json()["accepted"].to_string();
    assert!(accepted.contains("left out (--skip-drain)"), "{accepted}");
    assert_eq!(opened.json()["overrides"][0], "--skip-drain");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_lost_is_not_created_anew_in_silence() {
    let site = Site::shared().await;
    let (_kinesalite, route, running, applying) = replicated(&site, "slotless").await;
    running.stop().await;
    applying.stop().await;
    let stream = route.database.stream();
    let source = route.database.source().await;
    route.database.drop_slot().await;
    let mut running = route.run(&[]);
    running.expect_stopped(&route.database.name).await;
    running
        .wait_for_log(&["is gone, by which the stream was sent since"])
        .await;
    // Once a person has decided, it is begun anew, and nobody waits for a slot that is no more.
    source
        .run(&format!(
            "DELETE FROM dr_agent.sending WHERE stream = '{stream}'"
        ))
        .await;
    let mut applying = route.apply(&[]);
    let running = route.run(&[]);
    write(&route.database, 7).await;
    applying.expect_stopped(&route.database.name).await;
    applying
        .wait_for_log(&["was started over on the source", "DROP DATABASE"])
        .await;
    let replica = route.database.replica_server().client("postgres").await;
    replica
        .run(&format!(
            "DROP DATABASE {} WITH (FORCE)",
            route.database.name
        ))
        .await;
    let applying = route.apply(&[]);
    applying.wait_for_streaming(&route.database.name).await;
    write(&route.database, 8).await;
    route.database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn databases_share_a_stream_and_apply_refuses_route_direct() {
    let site = Site::shared().await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let mut both = Vec::new();
    for purpose in ["first", "second"] {
        let database = site.database(purpose).await;
        database.source().await.run(TABLE).await;
        let route = Route::new(database, kinesalite.port(), None);
        let started = route.start().await;
        both.push((route, started));
    }
    for (n, (route, _)) in both.iter().enumerate() {
        write(&route.database, n as u32).await;
    }
    for (route, (running, applying)) in both {
        route.database.expect_equal().await;
        applying.expect_quiet_log();
        running.stop().await;
        applying.stop().await;
    }
    let direct = site.database("direct").await.agent();
    let refused = direct.command(&["apply"]).await;
    refused
        .expect_code(2)
        .expect_words(&["route.kind", "direct"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_route_can_be_changed_and_changed_back() {
    let site = Site::shared().await;
    let database = site.database("changed").await;
    database.source().await.run(TABLE).await;
    let (direct, running) = database.replicate().await;
    write(&database, 1).await;
    running.stop().await;
    let (_kinesalite, route) = through_kinesalite(database.clone(), None).await;
    let (running, applying) = route.start().await;
    write(&database, 2).await;
    database.expect_equal().await;
    applying.stop().await;
    write(&database, 3).await;
    route.wait_sent().await;
    running.stop().await;
    // Not while the stream has what the replica has not.
    let mut early = direct.start();
    early.expect_stopped(&database.name).await;
    let applying = route.apply(&[]);
    let sql = format!(
        "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    );
    let confirmed = database.source().await.value(&sql).await.unwrap();
    let replica = database.replica().await;
    wait_until("everything to be applied", PATIENCE, || async {
        let sql = format!("SELECT end_lsn >= '{confirmed}' FROM dr_agent.progress");
        replica.value(&sql).await.as_deref() == Some("t")
    })
    .await;
    applying.stop().await;
    let running = direct.start();
    running.wait_for_streaming(&database.name).await;
    write(&database, 4).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_later_and_never_changes_is_copied_all_the_same() {
    let site = Site::shared().await;
    let (_kinesalite, route, running, applying) = replicated(&site, "still").await;
    let source = route.database.source().await;
    // All of it is there before it is published: none of it is in the stream.
    source
        .run("CREATE TABLE still (id int PRIMARY KEY); INSERT INTO still SELECT generate_series(1, 100)")
        .await;
    applying
        .wait_for_log(&["public.still", "copied beside the stream"])
        .await;
    write(&route.database, 2).await;
    source.run("INSERT INTO still VALUES (101)").await;
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    let log = applying.log();
    assert_eq!(
        line_with(&log, &["starting again"]),
        None,
        "the stream went on"
    );
    applying.stop().await;
    // It may die at any step of that.
    let points = ["late:copied", "late:catching-up", "late:joined"];
    for (n, point) in points.into_iter().enumerate() {
        let mut armed = route.apply(&[("DR_AGENT_FAILPOINT", point)]);
        armed.wait_for_streaming(&route.database.name).await;
        source
            .run(&format!(
                "CREATE TABLE late_{n} (id int PRIMARY KEY, v int); INSERT INTO late_{n} SELECT g, 0 FROM generate_series(1, 500) g"
            ))
            .await;
        let written = async {
            for id in 1000.. {
                source
                    .run(&format!(
                        "INSERT INTO late_{n} VALUES ({id}); UPDATE late_{n} SET v = {id} WHERE id = {id} - 1003; DELETE FROM late_{n} WHERE id = {id} - 5"
                    ))
                    .await;
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = armed.expect_death_by_signal() => {}
            () = written => {}
        }
    }
    let applying = route.apply(&[]);
    let replica = route.database.replica().await;
    wait_until("the tables to join", PATIENCE, || {
        replica.holds("SELECT count(*) = 3 FROM dr_agent.table_sync WHERE table_name LIKE 'late%' AND state = 'ready'")
    })
    .await;
    route.database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}
