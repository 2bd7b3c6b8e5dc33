//! Goal: a large backlog is read in windows through SQL, and no promise is lost at either switch.
//! Method: a low `limits.catch_up_bytes`; the agent is killed at every step of the way; the replica is held
//! still to look at the slots meanwhile; every table is compared by full content.

use std::time::Duration;

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLES: &str = "
    CREATE TABLE small (id int PRIMARY KEY, v text);
    CREATE TABLE large (id int PRIMARY KEY, v text);
    CREATE TABLE bag (v text);
    ALTER TABLE bag REPLICA IDENTITY FULL";

const NEW_COLUMN: &str = "ALTER TABLE small ADD COLUMN w int";

/// Some 8 MiB of WAL: many small transactions, a large one that goes to a spill file with a part rolled back,
/// and a table described anew in between.
const BACKLOG: [&str; 4] = [
    "DO $$ BEGIN FOR i IN 1..4000 LOOP
        INSERT INTO small VALUES (i, repeat(md5(i::text), 8));
        UPDATE small SET v = 'hot ' || i WHERE id = i / 2;
        COMMIT; END LOOP; END $$",
    "BEGIN; INSERT INTO large SELECT g, repeat(md5(g::text), 8) FROM generate_series(1, 6000) AS g;
        SAVEPOINT s; DELETE FROM large; INSERT INTO bag SELECT g FROM generate_series(1, 500) AS g; ROLLBACK TO s;
        UPDATE large SET v = NULL WHERE id % 3 = 0; COMMIT",
    NEW_COLUMN,
    "DO $$ BEGIN FOR i IN 1..2000 LOOP
        DELETE FROM small WHERE id = i * 2; INSERT INTO bag VALUES (i % 7);
        COMMIT; END LOOP; END $$",
];

const FAR: &[&str] = &["far behind"];
const READ: &[&str] = &["the backlog is read"];

fn agent(database: &Database, catch_up_bytes: &str) -> Agent {
    Agent::new(
        database
            .config()
            .set_text("limits.catch_up_bytes", catch_up_bytes)
            .set_text("limits.transaction_bytes", "256KiB")
            .set_text("limits.queue_bytes", "1MiB")
            .set("limits.batch_changes", "500"),
    )
}

/// Copies everything, stops, and lets the backlog grow.
async fn fall_behind(database: &Database, agent: &Agent, backlog: &[&str]) -> Client {
    let source = database.source().await;
    source.run(TABLES).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    running.expect_quiet_log();
    running.stop().await;
    for part in backlog {
        source.run(part).await;
    }
    // What the backlog does to the shape of tables, a person does on the replica.
    if backlog.contains(&NEW_COLUMN) {
        database.writable_replica().await.run(NEW_COLUMN).await;
    }
    source
}

async fn wait_for_reader(running: &Running, database: &Database, reader: &str) {
    let labels = [("database", database.name.as_str()), ("reader", reader)];
    running
        .wait_for_metric("dr_agent_source_reader", &labels, |value| value == 1.0)
        .await;
}

fn slot_column(database: &Database, column: &str) -> String {
    format!(
        "SELECT {column} FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_read_in_windows_and_the_slot_follows_what_is_durable() {
    let site = Site::own().await;
    let database = site.database("windows").await;
    let agent = agent(&database, "1MiB");
    let source = fall_behind(&database, &agent, &BACKLOG).await;
    let replica = database.writable_replica().await;
    // Nothing is applied: what is read waits.
    replica.run("BEGIN; LOCK TABLE small IN SHARE MODE").await;
    let running = agent.start();
    running.wait_for_log(FAR).await;
    wait_for_reader(&running, &database, "catch_up").await;
    let copies = "SELECT count(*) FROM pg_replication_slots WHERE temporary";
    assert_eq!(source.number(copies).await, 1);
    // Longer than the source is told something at the latest: it is told what is durable, not what is read.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let confirmed = source
        .value(&slot_column(&database, "confirmed_flush_lsn"))
        .await
        .unwrap();
    let durable = format!("SELECT end_lsn >= '{confirmed}' FROM dr_agent.progress");
    assert!(replica.holds(&durable).await, "{confirmed}");
    let unread = slot_column(
        &database,
        "pg_current_wal_lsn() - confirmed_flush_lsn > 1000000",
    );
    assert!(source.holds(&unread).await);
    replica.run("COMMIT").await;
    running.wait_for_log(READ).await;
    wait_for_reader(&running, &database, "eager").await;
    wait_until("the copy of the slot to be gone", PATIENCE, || async {
        source.number(copies).await == 0
    })
    .await;
    database.expect_equal().await;
    // The walsender goes on where the windows ended.
    source.run("INSERT INTO large VALUES (0, 'after')").await;
    database.expect_equal().await;
    let held = slot_column(&database, "restart_lsn IS NOT NULL AND active");
    assert!(source.holds(&held).await);
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_while_catching_up_loses_and_doubles_nothing() {
    let site = Site::own().await;
    for (number, point) in [
        "source:window-taken@1",
        "source:window-taken@3",
        "pipeline:before-ship@4",
        "source:acknowledged",
        "source:caught-up",
    ]
    .into_iter()
    .enumerate()
    {
        let database = site.database(&format!("dies_{number}")).await;
        let agent = agent(&database, "1MiB");
        let source = fall_behind(&database, &agent, &BACKLOG).await;
        let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", point)]);
        armed.expect_death_by_signal().await;
        assert!(armed.log().contains(FAR[0]), "{point}: {}", armed.log());
        let confirmed = source
            .value(&slot_column(&database, "confirmed_flush_lsn"))
            .await
            .unwrap();
        let replica = database.replica().await;
        let durable = format!("SELECT end_lsn >= '{confirmed}' FROM dr_agent.progress");
        assert!(replica.holds(&durable).await, "{point}: {confirmed}");
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        database.expect_equal().await;
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_falls_far_behind_changes_to_windows_and_back() {
    let site = Site::own().await;
    let database = site.database("falls").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let mut agent = agent(&database, "1MiB");
    agent.configure("limits.batch_bytes", "\"256KiB\"");
    agent.configure("replica.bandwidth", "\"1MiB\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    assert!(!running.log().contains(FAR[0]));
    for part in 0..4 {
        let rows = format!(
            "DO $$ BEGIN FOR i IN 1..20000 LOOP
                INSERT INTO small VALUES ({part} * 20000 + i, repeat(md5(i::text), 12));
                IF i % 10 = 0 THEN COMMIT; END IF; END LOOP; END $$"
        );
        source.run(&rows).await;
    }
    running.wait_for_log(FAR).await;
    running.wait_for_log(READ).await;
    database.expect_equal().await;
    wait_for_reader(&running, &database, "eager").await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_without_a_free_slot_is_read_by_the_walsender() {
    let options = ServerOptions::source().set("max_replication_slots", "8");
    let site = Site::with(options, ServerOptions::replica()).await;
    let database = site.database("no_slot").await;
    let agent = agent(&database, "1MiB");
    let source = fall_behind(&database, &agent, &BACKLOG).await;
    let used = source
        .number("SELECT count(*) FROM pg_replication_slots")
        .await;
    for number in used..8 {
        source
            .run(&format!(
                "SELECT pg_create_physical_replication_slot('taken_{number}')"
            ))
            .await;
    }
    let running = agent.start();
    running
        .wait_for_log(&["cannot be read in windows", "all replication slots"])
        .await;
    database.expect_equal().await;
    assert!(!running.log().contains(READ[0]));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_is_not_taken_in_time_lets_go_of_its_snapshot_and_nothing_is_lost() {
    let site = Site::own().await;
    let database = site.database("late").await;
    let agent = agent(&database, "32MiB");
    let backlog = [
        // In the first window more than the queue takes …
        "DO $$ BEGIN FOR i IN 1..4000 LOOP INSERT INTO small VALUES (i, repeat(md5(i::text), 8)); COMMIT;
            END LOOP; END $$",
        // … and more than the sockets on the way hold: stored compressed, so that it is little WAL.
        "DO $$ BEGIN FOR i IN 1..30 LOOP INSERT INTO bag VALUES (repeat(i::text, 1000000)); COMMIT; END LOOP; END $$",
        "INSERT INTO large SELECT g, repeat(md5(g::text), 30) FROM generate_series(1, 40000) AS g",
    ];
    let source = fall_behind(&database, &agent, &backlog).await;
    let replica = database.writable_replica().await;
    // Nothing is applied: the queue is full soon, and the rest of the window waits on the source.
    replica.run("BEGIN; LOCK TABLE small IN SHARE MODE").await;
    let running = agent.start();
    running.wait_for_log(FAR).await;
    let snapshots = "SELECT count(*) FROM pg_stat_activity
         WHERE application_name LIKE 'dr\\_agent:backlog:%' AND state = 'active' AND backend_xmin IS NOT NULL
           AND query_start < now() - interval '2 s'";
    wait_until("a window that waits", PATIENCE, || async {
        source.number(snapshots).await == 1
    })
    .await;
    wait_until("the snapshot to be let go", 2 * PATIENCE, || async {
        source.number(snapshots).await == 0
    })
    .await;
    replica.run("COMMIT").await;
    running
        .wait_for_log(&["cannot be read in windows", "no answer within 60s"])
        .await;
    database.expect_equal().await;
    running.stop().await;
}
