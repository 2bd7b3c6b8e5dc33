//! Goal: a promotion under route `kinesis` opens the replica as of one commit with what the stream holds, or says before it
//! fences why it cannot; killed in the middle of the drain and repeated, it ends in the same place.
//! Method: `apply` is stopped while `run` goes on, so that the stream has what the replica has not; `promote` is killed at
//! every step of a batch, met by locks, clocks and tables that are in the way, and put to sleep.

use std::fs;
use std::path::Path;

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::backup::Backup;
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Fault, KinesisProxy};
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use futures_util::StreamExt as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

const PROMOTE: [&str; 3] = ["promote", "--failover", "--json"];

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

/// Waits until the stream has what the source has committed by now.
async fn wait_sent(source: &Client, slot: &str) {
    let here = source.value("SELECT pg_current_wal_lsn()").await.unwrap();
    wait_until("the slot to be confirmed", PATIENCE, || async {
        let sql = format!(
            "SELECT confirmed_flush_lsn >= '{here}' FROM pg_replication_slots WHERE slot_name = '{slot}'"
        );
        source.holds(&sql).await
    })
    .await;
}

/// Both sides replicate `TABLE` through a stream of one shard.
async fn replicated(site: &Site, purpose: &str) -> (Kinesalite, Route, Running, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let route = Route::new(database, kinesalite.port(), None);
    let (running, applying) = route.start().await;
    (kinesalite, route, running, applying)
}

/// What `apply` was stopped before.
async fn write(database: &Database, changes: &str) {
    let source = database.source().await;
    source.run(changes).await;
    wait_sent(&source, database.stream().as_str()).await;
}

async fn promote(route: &Route, more: &[&str]) -> dr_agent_tests::agent::Outcome {
    let arguments = [&PROMOTE[..], more].concat();
    let environment = route.with(&[]);
    route.applier.command_with(&arguments, &environment).await
}

/// Nothing of a promotion has happened.
async fn expect_untouched(database: &Database) {
    let replica = database.replica().await;
    let found = replica
        .rows("SELECT term, (SELECT count(*) FROM dr_agent.promotion) FROM dr_agent.progress")
        .await;
    assert_eq!(found, [[Some("1".to_owned()), Some("0".to_owned())]]);
}

/// Every moment of the drain at which it is killed, and whether the batch is decided then. What is not said may concern a
/// heartbeat before the batch.
const MOMENTS: [(&str, Option<bool>); 9] = [
    ("apply:handed-over", None),
    ("apply:before-commit", None),
    ("apply:after-commit", None),
    ("apply:lane-prepared@1", Some(false)),
    ("apply:lane-prepared@3", Some(false)),
    ("apply:all-prepared", Some(false)),
    ("apply:lane-0-committed", Some(true)),
    ("apply:lane-committed@1", Some(true)),
    ("apply:last-lane-committed", Some(true)),
];

const WIDE: &str = "
    CREATE TABLE wide (id int PRIMARY KEY, v text);
    CREATE TABLE pair (a int, b text, v text, PRIMARY KEY (a, b));
    CREATE TABLE mark (lsn pg_lsn PRIMARY KEY);
    INSERT INTO wide SELECT g, 'copied' FROM generate_series(1, 1000) AS g;
    INSERT INTO pair SELECT g, 'b' || g, 'copied' FROM generate_series(1, 1000) AS g";

/// One transaction large enough for every lane to have a share, and for that to be worth it where a busy machine answers late. It says of itself where it ends, as nearly as it can.
const BATCH: &str = "
    BEGIN;
    UPDATE wide SET v = 'updated' WHERE id <= 500;
    DELETE FROM wide WHERE id > 900;
    INSERT INTO wide SELECT g, 'inserted' FROM generate_series(2000, 16000) AS g;
    UPDATE pair SET v = 'updated' WHERE a % 2 = 0;
    INSERT INTO mark SELECT pg_current_wal_insert_lsn();
    COMMIT";

/// Whether the batch is there as a whole; `None` is half of it.
async fn has_batch(replica: &Client) -> Option<bool> {
    let state = replica
        .rows(
            "SELECT (SELECT count(*) FROM wide), (SELECT count(*) FROM wide WHERE v <> 'copied'),
                    (SELECT count(*) FROM pair WHERE v <> 'copied'), (SELECT count(*) FROM mark)",
        )
        .await;
    let state: Vec<String> = state.into_iter().flatten().flatten().collect();
    match state.join(" ").as_str() {
        "14901 14501 500 1" => Some(true),
        "1000 0 0 0" => Some(false),
        _ => None,
    }
}

async fn prepared(replica: &Client) -> i64 {
    let count = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()";
    replica.number(count).await
}

/// Databases that each have a stream of their own with the batch in it, which the replica has not.
struct Undrained {
    _kinesalite: Kinesalite,
    route: Route,
    databases: Vec<Database>,
}

async fn undrained(site: &Site, count: usize) -> Undrained {
    let kinesalite = Kinesalite::start().await;
    let mut databases = Vec::new();
    for _ in 0..count {
        let database = site.database("drain").await;
        database.source().await.run(WIDE).await;
        streams::create(kinesalite.port(), &format!("dr-{}", database.name), 1).await;
        databases.push(database);
    }
    let mut route = Route::new(databases[0].clone(), kinesalite.port(), None);
    let names: Vec<&str> = databases.iter().map(|d| d.name.as_str()).collect();
    let list = json!(names).to_string();
    for side in [&mut route.sender, &mut route.applier] {
        side.configure("source.databases", &list);
        side.configure("route.stream", "\"dr-{database}\"");
        side.configure("replica.lanes", "4");
        side.configure("limits.spread_changes", "100");
    }
    let (mut running, applying) = (route.run(&[]), route.apply(&[]));
    for name in names {
        applying.wait_for_streaming(name).await;
    }
    applying.stop().await;
    for database in &databases {
        let source = database.source().await;
        source.run(BATCH).await;
        let slot = route.sender.config().stream(&database.name);
        wait_sent(&source, slot.as_str()).await;
    }
    running.kill();
    Undrained {
        _kinesalite: kinesalite,
        route,
        databases,
    }
}

/// Kills a promotion at every moment, and repeats it with these arguments.
async fn killed_and_repeated(more: &[&str], check: impl AsyncFn(Option<bool>, &str, &Client)) {
    let site = Site::own().await;
    let undrained = undrained(&site, MOMENTS.len()).await;
    let promotions = MOMENTS.iter().zip(&undrained.databases);
    let promotions = promotions.map(|((point, decided), database)| {
        let (route, check) = (&undrained.route, &check);
        async move {
            let config = route.applier.config().clone();
            let agent = Agent::new(config.databases(&[&database.name]));
            let armed = route.with(&[("DR_AGENT_FAILPOINT", point)]);
            let killed = agent.command_with(&PROMOTE, &armed).await;
            assert_eq!(killed.code, None, "died at {point}: {}", killed.text());
            let replica = database.replica().await;
            if matches!(*point, "apply:all-prepared" | "apply:lane-0-committed") {
                assert!(prepared(&replica).await > 0, "{point}: nothing is prepared");
            }
            let arguments = [&PROMOTE[..], more].concat();
            let repeated = agent.command_with(&arguments, &route.with(&[])).await;
            assert_eq!(repeated.code, Some(0), "{point}: {}", repeated.text());
            let report = repeated.json();
            assert_eq!(report["outcome"], "promoted", "{point}");
            assert_eq!(prepared(&replica).await, 0, "{point}: left prepared");
            let progress = "SELECT term, end_lsn, batch FROM dr_agent.progress";
            let progress: Vec<_> = replica.rows(progress).await.concat().into_iter().flatten().collect();
            let stated = &report["databases"][0];
            let stated = ["term", "end_lsn", "batch"].map(|field| match &stated[field] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            });
            assert_eq!(progress, stated, "{point}: the report says something else");
            assert_eq!(progress[0], "2", "{point}: the term was raised once");
            check(*decided, point, &replica).await;
            // No row is locked by what was left behind.
            let primary = database.replica().await;
            primary
                .run("SET lock_timeout = '1s'; UPDATE wide SET v = 'open'; UPDATE pair SET v = 'open'; DELETE FROM mark")
                .await;
        }
    });
    futures_util::stream::iter(promotions)
        .buffer_unordered(3)
        .collect::<Vec<()>>()
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_killed_in_the_middle_of_the_drain_has_the_whole_batch_once_it_is_repeated() {
    killed_and_repeated(&[], async |_, point, replica| {
        assert_eq!(has_batch(replica).await, Some(true), "{point}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_middle_of_the_drain_and_repeated_without_it_the_batch_is_whole_or_not_there()
{
    killed_and_repeated(&["--skip-drain"], async |decided, point, replica| {
        let there = has_batch(replica).await;
        assert!(there.is_some(), "{point}: half a batch was opened");
        if decided.is_some() {
            assert_eq!(there, decided, "{point}");
        }
        // The progress row says what the data say.
        if there == Some(true) {
            let behind = "SELECT end_lsn > (SELECT lsn FROM mark) FROM dr_agent.progress";
            assert!(replica.holds(behind).await, "{point}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_promoted_while_the_source_goes_on_equals_it_as_of_one_commit() {
    let seed = seed();
    let enough = StdRng::seed_from_u64(seed).random_range(100..800);
    let source = ServerOptions::source().set("wal_keep_size", "2GB");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("going_on").await;
    let source = database.source().await;
    Workload::create_tables(&source).await;
    let backup = Backup::take(&site.source).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let mut route = Route::new(database, kinesalite.port(), None);
    for side in [&mut route.sender, &mut route.applier] {
        side.configure("limits.batch_changes", "200");
        side.configure("replica.lanes", "4");
        side.configure("limits.spread_changes", "2");
    }
    let (running, mut applying) = route.start().await;
    let replica = route.database.replica().await;
    let workload = Workload::start(&route.database.source_url(), seed, 4);
    wait_until(
        "a random number of transactions to arrive",
        5 * PATIENCE,
        || async { replica.number("SELECT count(*) FROM ledger").await >= enough },
    )
    .await;
    let slot = route.database.stream();
    let durable =
        format!("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let durable = source.value(&durable).await.unwrap();
    let promoted = promote(&route, &[]).await;
    promoted.expect_code(0);
    let end_lsn = promoted.json()["databases"][0]["end_lsn"]
        .as_str()
        .unwrap()
        .to_owned();
    applying.expect_exit(3).await;
    // What the source still does goes into the stream, and no further.
    let so_far = workload.committed();
    workload.wait_for_committed(so_far + 200).await;
    workload.stop().await;
    wait_sent(&source, slot.as_str()).await;
    route.apply(&[]).expect_exit(3).await;

    let found = replica.value("SELECT end_lsn FROM dr_agent.progress").await;
    assert_eq!(found.as_ref(), Some(&end_lsn));
    let behind = format!("SELECT '{end_lsn}'::pg_lsn >= '{durable}'::pg_lsn");
    assert!(source.holds(&behind).await, "{end_lsn} is before {durable}");
    let restored = backup.restore_to(&end_lsn).await;
    let then = restored.client(&route.database.name).await;
    expect_same_content(&then, &replica).await;
    assert!(replica.holds(BALANCED).await);
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_table_whose_changes_are_left_out_is_named_also_when_the_drain_is_killed_behind_them()
{
    let site = Site::shared().await;
    let (_kinesalite, mut route, running, applying) = replicated(&site, "uncopied").await;
    applying.stop().await;
    running.stop().await;
    let source = route.database.source().await;
    source
        .run("CREATE TABLE first (id int PRIMARY KEY); CREATE TABLE second (id int PRIMARY KEY)")
        .await;
    // A start publishes them.
    let mut running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    source.run("INSERT INTO first VALUES (1)").await;
    source.run("INSERT INTO second VALUES (1)").await;
    for id in 1000..1080 {
        source
            .run(&format!("INSERT INTO t VALUES ({id}, 'streamed')"))
            .await;
    }
    wait_sent(&source, route.database.stream().as_str()).await;
    running.kill();
    // Each transaction is a batch: it dies far behind the only changes of the two.
    route.applier.configure("limits.batch_changes", "1");
    let armed = route.with(&[("DR_AGENT_FAILPOINT", "apply:after-commit@50")]);
    let killed = route.applier.command_with(&PROMOTE, &armed).await;
    assert_eq!(killed.code, None, "{}", killed.text());
    let replica = route.database.replica().await;
    let t = "SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM t";
    assert_ne!(replica.value(t).await, source.value(t).await);

    let promoted = promote(&route, &[]).await;
    promoted.expect_code(0);
    let warnings = promoted.json()["databases"][0]["warnings"].to_string();
    for table in ["public.first", "public.second"] {
        assert!(warnings.contains(table), "{warnings}");
    }
    assert_eq!(replica.value(t).await, source.value(t).await);
}

/// The next iterator leads behind the last record, as one AT_TIMESTAMP does where that time is too late.
fn too_late(request: &mut Value) {
    request["ShardIteratorType"] = json!("LATEST");
    if let Some(request) = request.as_object_mut() {
        request.remove("Timestamp");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_in_which_nothing_leads_on_from_the_replica_is_read_from_its_beginning() {
    let site = Site::shared().await;
    let database = site.database("clocks").await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let route = Route::new(database, proxy.port(), None);
    let (mut running, applying) = route.start().await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    running.kill();
    // The first looks whether the stream can be read, the second drains.
    proxy.spoil("GetShardIterator", Fault::Rewrite(too_late));
    proxy.spoil("GetShardIterator", Fault::Rewrite(too_late));
    let promoted = promote(&route, &[]).await;
    promoted.expect_code(0);
    assert_eq!(proxy.unused(), 0, "the iterators were not asked for");
    let replica = route.database.replica().await;
    let there = replica
        .number("SELECT count(*) FROM t WHERE v = 'streamed'")
        .await;
    assert_eq!(there, 100, "{}", promoted.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_drained_is_refused_before_anybody_is_fenced() {
    let site = Site::shared().await;
    let (_kinesalite, mut route, running, applying) = replicated(&site, "undrainable").await;
    const NOT_A_DIRECTORY: &str = "/dev/null";
    let spill = route
        .applier
        .directory()
        .join("spill")
        .display()
        .to_string();
    let nowhere = [("TMPDIR", NOT_A_DIRECTORY)];
    let no_region = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    for (stream, directory, environment, words) in [
        (STREAM, spill.as_str(), &no_region.to_vec(), "AWS_REGION"),
        (
            "elsewhere",
            spill.as_str(),
            &route.with(&[]),
            "no such stream",
        ),
        (STREAM, NOT_A_DIRECTORY, &route.with(&nowhere), "TMPDIR"),
    ] {
        let mut config = route.applier.config().clone();
        config = config.set_text("route.stream", stream);
        let agent = Agent::new(config.set_text("limits.spill_directory", directory));
        for plan in [&["--plan"][..], &[]] {
            let arguments = [&["promote", "--failover"], plan].concat();
            let refused = agent.command_with(&arguments, environment).await;
            refused
                .expect_code(4)
                .expect_words(&["refused", words, "--skip-drain"]);
        }
        expect_untouched(&route.database).await;
    }
    // Who applies has not noticed.
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    applying.stop().await;
    running.stop().await;
    // A directory of its own will do, and nothing stays there.
    let temporary = directory_for("temporary");
    let text = temporary.display().to_string();
    route
        .applier
        .configure("limits.spill_directory", &format!("\"{NOT_A_DIRECTORY}\""));
    route
        .applier
        .configure("limits.transaction_bytes", "\"64KiB\"");
    write_alone(&route).await;
    let environment = route.with(&[("TMPDIR", &text)]);
    let planned = [&PROMOTE[..], &["--plan"]].concat();
    let planned = route.applier.command_with(&planned, &environment).await;
    planned
        .expect_code(0)
        .expect_words(&["Kinesis stream", &text]);
    expect_untouched(&route.database).await;
    let promoted = route.applier.command_with(&PROMOTE, &environment).await;
    promoted.expect_code(0);
    let large = "SELECT count(*) FROM t WHERE length(v) = 3200";
    assert_eq!(route.database.replica().await.number(large).await, 1000);
    assert_eq!(entries(&temporary), Vec::<String>::new());
}

/// One transaction that goes into a spill file, while nobody applies.
async fn write_alone(route: &Route) {
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    write(
        &route.database,
        "INSERT INTO t SELECT g, repeat(md5(g::text), 100) FROM generate_series(1001, 2000) AS g",
    )
    .await;
    running.stop().await;
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whether_tables_are_of_one_moment_is_judged_once_the_stream_is_drained() {
    let site = Site::shared().await;
    let (_kinesalite, route, running, applying) = replicated(&site, "moments").await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    // As if the table had been copied later than what is applied: here, and where the stream never leads.
    let source = route.database.source().await;
    let within = source.value("SELECT pg_current_wal_lsn()").await.unwrap();
    write(&route.database, "UPDATE t SET v = 'more'").await;
    running.stop().await;
    let replica = route.database.writable_replica().await;
    let copied_at = async |lsn: &str| {
        let sql = format!(
            "UPDATE dr_agent.table_sync SET snapshot_lsn = '{lsn}' WHERE table_name = 'heartbeat'"
        );
        replica.run(&sql).await;
    };
    copied_at("FFFF/0").await;
    // What is left out is not waited for.
    let refused = promote(&route, &["--skip-drain"]).await;
    refused.expect_code(4).expect_words(&["different moments"]);
    expect_untouched(&route.database).await;
    let planned = promote(&route, &["--plan"]).await;
    planned.expect_code(0).expect_words(&["different moments"]);
    let stopped = promote(&route, &[]).await;
    stopped
        .expect_code(1)
        .expect_words(&["different moments"])
        .expect_words(&["--accept-incomplete"]);
    let state = replica.value("SELECT state FROM dr_agent.promotion").await;
    assert_eq!(state.as_deref(), Some("settled"));
    let skipped = promote(&route, &["--skip-drain"]).await;
    skipped.expect_code(1).expect_words(&["different moments"]);
    copied_at(&within).await;
    let promoted = promote(&route, &[]).await;
    promoted.expect_code(0);
    assert_eq!(promoted.json()["accepted"], json!([]));
    let there = "SELECT count(*) FROM t WHERE v = 'more'";
    assert_eq!(replica.number(there).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_waits_for_a_lock_of_somebody_else_says_so_instead_of_waiting_on() {
    let site = Site::shared().await;
    let (_kinesalite, route, mut running, applying) = replicated(&site, "locked").await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'before'").await;
    write(
        &route.database,
        "TRUNCATE t; INSERT INTO t VALUES (1, 'after')",
    )
    .await;
    running.kill();
    let reader = route.database.replica().await;
    reader.run("BEGIN; SELECT count(*) FROM t").await;
    let stopped = promote(&route, &[]).await;
    stopped.expect_code(1).expect_words(&["lock"]);
    // The report says how far it came all the same.
    let replica = route.database.replica().await;
    let end_lsn = replica.value("SELECT end_lsn FROM dr_agent.progress").await;
    let stated = stopped.json()["databases"][0]["end_lsn"].clone();
    assert_eq!(stated.as_str(), end_lsn.as_deref());
    reader.run("ROLLBACK").await;
    promote(&route, &[]).await.expect_code(0);
    assert_eq!(
        replica.value("SELECT v FROM t").await.as_deref(),
        Some("after")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_of_the_replica_that_is_away_does_not_hold_up_the_drain() {
    let site = Site::own().await;
    let (_kinesalite, route, mut running, applying) = replicated(&site, "standby").await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    running.kill();
    let admin = site.replica.client("postgres").await;
    admin.run("SET synchronous_commit = local").await;
    admin
        .run("ALTER SYSTEM SET synchronous_standby_names = 'away'")
        .await;
    admin.run("SELECT pg_reload_conf()").await;
    wait_until("commits to wait for the standby", PATIENCE, || {
        admin.holds("SELECT current_setting('synchronous_standby_names') = 'away'")
    })
    .await;
    let mut promoting = route.applier.spawn(&PROMOTE, &route.with(&[]));
    let replica = route.database.replica().await;
    wait_until("all but the opening", PATIENCE, || {
        replica.holds("SELECT EXISTS (SELECT 1 FROM dr_agent.promotion WHERE state = 'finished')")
    })
    .await;
    // The users would wait for it: so the promotion does, before it says that they can write.
    admin
        .run("ALTER SYSTEM RESET synchronous_standby_names")
        .await;
    admin.run("SELECT pg_reload_conf()").await;
    promoting.expect_exit(0).await;
    let there = "SELECT count(*) FROM t WHERE v = 'streamed'";
    assert_eq!(replica.number(there).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_sleeps_in_the_drain_changes_nothing_once_another_has_opened_the_replica()
{
    let site = Site::own().await;
    let (_kinesalite, route, mut running, applying) = replicated(&site, "asleep").await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    running.kill();
    let stopping = route.with(&[("DR_AGENT_FAILPOINT", "drain:settled=stop")]);
    let mut asleep = route.applier.spawn(&PROMOTE, &stopping);
    asleep.wait_until_stopped().await;
    // As its hint says, its session is ended.
    let replica = route.database.writable_replica().await;
    replica
        .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'dr_agent:promote:%'")
        .await;
    let promoted = promote(&route, &["--skip-drain"]).await;
    promoted.expect_code(0);
    let report = promoted.json();
    assert_eq!(report["overrides"], json!(["--skip-drain"]));
    assert!(
        report["accepted"][0]
            .as_str()
            .unwrap()
            .contains("was left out")
    );
    replica.run("UPDATE t SET v = 'new primary'").await;
    let progress = "SELECT term, batch, end_lsn FROM dr_agent.progress";
    let before = replica.rows(progress).await;
    asleep.resume();
    asleep.expect_exit(1).await;
    assert_eq!(replica.rows(progress).await, before);
    let there = "SELECT count(*) FROM t WHERE v = 'new primary'";
    assert_eq!(replica.number(there).await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrived_in_part_is_not_applied_and_the_report_says_so() {
    const THROTTLED: &str = "ProvisionedThroughputExceededException";
    let site = Site::shared().await;
    let database = site.database("in_part").await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let mut route = Route::new(database, proxy.port(), None);
    // No heartbeat takes the place of what is meant.
    route.sender.configure("source.heartbeat", "\"1h\"");
    route.sender.configure("source.sequences", "\"1h\"");
    let (mut running, applying) = route.start().await;
    applying.stop().await;
    // Of one batch only the first part; nothing more comes through.
    proxy.spoil("PutRecords", Fault::RefuseRecords(|n| n > 0, THROTTLED));
    for _ in 0..100 {
        proxy.spoil("PutRecords", Fault::Refuse(400, THROTTLED));
    }
    let source = route.database.source().await;
    source
        .run("INSERT INTO t SELECT g, (SELECT string_agg(md5(random()::text || g || i), '') FROM generate_series(1, 32) AS i) FROM generate_series(1001, 4000) AS g")
        .await;
    wait_until("the rest to be refused", PATIENCE, || async {
        proxy.unused() < 100
    })
    .await;
    running.kill();
    let promoted = promote(&route, &[]).await;
    promoted.expect_code(0);
    let warnings = promoted.json()["databases"][0]["warnings"].to_string();
    assert!(
        warnings.contains("other parts had not arrived"),
        "{warnings}"
    );
    let replica = route.database.replica().await;
    assert_eq!(replica.number("SELECT count(*) FROM t").await, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_whose_copy_nobody_waits_for_are_left_out_and_named() {
    let site = Site::shared().await;
    let (_kinesalite, route, mut running, applying) = replicated(&site, "unready").await;
    applying.stop().await;
    write(&route.database, "UPDATE t SET v = 'streamed'").await;
    running.kill();
    // What a copy that was killed leaves behind.
    let replica = route.database.writable_replica().await;
    replica
        .run("UPDATE dr_agent.table_sync SET state = 'copying', snapshot_lsn = NULL WHERE table_name = 't'")
        .await;
    promote(&route, &[]).await.expect_code(4);
    let promoted = promote(&route, &["--accept-incomplete"]).await;
    promoted.expect_code(0);
    let report = promoted.json();
    assert_eq!(report["overrides"], json!(["--accept-incomplete"]));
    let warnings = report["databases"][0]["warnings"].to_string();
    assert!(warnings.contains("not complete of public.t"), "{warnings}");
    let changed = "SELECT count(*) FROM t WHERE v <> 'copied'";
    assert_eq!(replica.number(changed).await, 0);
}
