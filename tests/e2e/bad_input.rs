//! Goal: whatever is wrong gets an error of its own that says what to do, and costs no data.
//! Method: one test per row of "what bad input gets" that needs a person; each breaks one thing, looks for the words,
//! repairs it, and compares everything once the agent has caught up.

use dr_agent_tests::agent::{Agent, Outcome, Running};
use dr_agent_tests::backup::Backup;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};

use crate::misfit::strict;
use crate::set_aside::back;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

/// Waits until the pipeline of the database has stopped, saying all these words on one line of the log. The process goes on
/// serving its metrics.
pub(crate) async fn expect_stopped(running: &mut Running, database: &str, words: &[&str]) {
    running.wait_for_log(words).await;
    running.wait_for_state(database, "stopped").await;
}

/// Starts anew, as an operator does after the repair, and compares everything.
async fn expect_recovery(agent: &Agent, database: &Database, mut broken: Running) {
    broken.kill();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

async fn replicated(site: &Site, purpose: &str) -> (Database, Agent, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let (agent, running) = database.replicate().await;
    (database, agent, running)
}

/// Where one table is to stop the database.
async fn replicated_strictly(site: &Site, purpose: &str) -> (Database, Agent, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let (agent, running) = strict(&database).await;
    (database, agent, running)
}

fn expect_usage_error(outcome: &Outcome, words: &[&str]) {
    outcome.expect_code(2).expect_words(words);
}

#[tokio::test]
async fn an_unknown_key_a_bad_url_and_a_missing_file_are_usage_errors_that_name_them() {
    let site = Site::shared().await;
    let database = site.database("usage").await;
    let mut agent = database.agent();
    agent.configure("objectives.rop", "\"1s\"");
    for command in ["run", "check", "status"] {
        expect_usage_error(&agent.command(&[command]).await, &["rop"]);
    }
    let mut agent = database.agent();
    agent.configure("source.url", "\"mysql://root@localhost/x\"");
    expect_usage_error(&agent.command(&["run"]).await, &["source.url"]);
    let mut agent = database.agent();
    agent.configure("limits.batch_bytes", "\"much\"");
    expect_usage_error(&agent.command(&["run"]).await, &["limits.batch_bytes"]);
    let agent = database.agent();
    expect_usage_error(&agent.command(&["walk"]).await, &["walk"]);
    std::fs::remove_file(agent.config_path()).unwrap();
    expect_usage_error(&agent.command(&["run"]).await, &["dr-agent.toml"]);
}

#[tokio::test]
async fn a_wrong_password_is_named_and_not_shown() {
    let options = ServerOptions::source()
        .hba("host all guarded 127.0.0.1/32 scram-sha-256")
        .hba("host replication guarded 127.0.0.1/32 scram-sha-256");
    let site = Site::with(options, ServerOptions::replica()).await;
    site.source
        .run(
            "postgres",
            "CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'right-one'",
        )
        .await;
    let database = site.database("password").await;
    database.source().await.run(TABLE).await;
    let mut agent = database.agent();
    let file = agent.directory().join("password");
    write_secret(&file, "wrong-one");
    let url = site.source.url("postgres").replace("postgres@", "guarded@");
    agent.configure("source.url", &format!("\"{url}\""));
    agent.configure("source.password_file", &format!("\"{}\"", file.display()));
    let running = agent.start();
    // Somebody may be changing it: it is tried again, and read again.
    running.wait_for_state(&database.name, "retrying").await;
    running
        .wait_for_log(&["will retry", "28P01", "password"])
        .await;
    assert!(!running.log().contains("wrong-one"));
    let outcome = agent.command(&["check"]).await;
    outcome.expect_code(1).expect_words(&["password"]);
    write_secret(&file, "right-one");
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}

fn write_secret(file: &std::path::Path, secret: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(file, secret).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn a_missing_right_is_named() {
    let site = Site::own().await;
    let database = site.database("right").await;
    let source = database.source().await;
    source.run(TABLE).await;
    source.run("CREATE ROLE weak LOGIN").await;
    let mut agent = database.agent();
    let url = site.source.url("postgres").replace("postgres@", "weak@");
    agent.configure("source.url", &format!("\"{url}\""));
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["weak"]).await;
    source.run("ALTER ROLE weak SUPERUSER").await;
    expect_recovery(&agent, &database, running).await;
}

#[tokio::test]
async fn a_wal_level_below_logical_is_named_and_nothing_is_left_behind() {
    let options = ServerOptions::source().set("wal_level", "replica");
    let site = Site::with(options, ServerOptions::replica()).await;
    let database = site.database("wal_level").await;
    database.source().await.run(TABLE).await;
    let agent = database.agent();
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["wal_level"]).await;
    site.source.set("wal_level", "logical");
    site.source.restart().await;
    expect_recovery(&agent, &database, running).await;
}

#[tokio::test]
async fn a_keyless_table_stops_before_anything_is_published() {
    let site = Site::shared().await;
    let database = site.database("keyless").await;
    let source = database.source().await;
    source.run(TABLE).await;
    source
        .run("CREATE TABLE log (message text); INSERT INTO log VALUES ('a'), ('a')")
        .await;
    let mut agent = database.agent();
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["public.log"]).await;
    // Promise 8: the source's own statements do not fail because of us.
    source.run("UPDATE log SET message = 'b' WHERE ctid = '(0,1)'; DELETE FROM log WHERE message = 'a'").await;
    source.run("INSERT INTO log VALUES ('c'), ('c')").await;
    agent.configure("source.keyless", "\"full\"");
    expect_recovery(&agent, &database, running).await;
    source
        .run("UPDATE log SET message = 'd' WHERE ctid = (SELECT max(ctid) FROM log)")
        .await;
    let running = agent.start();
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn excluded_keyless_tables_are_left_alone_and_counted() {
    let site = Site::shared().await;
    let database = site.database("excluded").await;
    let source = database.source().await;
    source.run(TABLE).await;
    source
        .run("CREATE TABLE log (message text); INSERT INTO log VALUES ('a')")
        .await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"exclude\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source
        .run("UPDATE log SET message = 'b'; INSERT INTO t VALUES (1000, 'streamed')")
        .await;
    database.wait_caught_up().await;
    let replica = database.replica().await;
    dr_agent_tests::compare::expect_same_content_without(&source, &replica, &["public.log"]).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric(
            "dr_agent_unprotected_objects",
            &[labels[0], ("kind", "keyless_table")],
            |value| value == 1.0,
        )
        .await;
    running.stop().await;
}

#[tokio::test]
async fn a_table_that_is_missing_on_the_replica_is_named_and_its_name_stays_free() {
    let site = Site::shared().await;
    let (database, agent, running) = replicated(&site, "dropped").await;
    let replica = database.writable_replica().await;
    replica.run("ALTER TABLE t RENAME TO t_away").await;
    database.source().await.run("INSERT INTO t SELECT g, 'streamed' FROM generate_series(1000, 1100) AS g; DELETE FROM t WHERE id < 10").await;
    // It is copied anew, which the other one's index is in the way of.
    running
        .wait_for_log(&["public.t", "again_in=30s", "t_pkey", "set aside"])
        .await;
    running.wait_for_streaming(&database.name).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_tables_set_aside", &labels, |aside| aside > 0.5)
        .await;
    let status = agent.command(&["status"]).await;
    assert!(status.text().contains("public.t"), "{}", status.text());
    // What the copy had begun is not in the way of putting it back.
    replica.run("ALTER TABLE t_away RENAME TO t").await;
    back(&running, &database).await;
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn other_columns_on_the_replica_are_named() {
    let site = Site::shared().await;
    let (database, agent, mut running) = replicated_strictly(&site, "columns").await;
    let source = database.source().await;
    let replica = database.writable_replica().await;
    replica.run("ALTER TABLE t RENAME v TO w").await;
    source
        .run("UPDATE t SET v = 'streamed' WHERE id < 50")
        .await;
    expect_stopped(&mut running, &database.name, &["public.t"]).await;
    replica.run("ALTER TABLE t RENAME w TO v").await;
    expect_recovery(&agent, &database, running).await;

    // DDL does not travel: a column added on the source waits for the same on the replica.
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source
        .run("ALTER TABLE t ADD more int DEFAULT 5; INSERT INTO t VALUES (2000, 'v', 6)")
        .await;
    expect_stopped(&mut running, &database.name, &["public.t", "more"]).await;
    replica.run("ALTER TABLE t ADD more int DEFAULT 5").await;
    expect_recovery(&agent, &database, running).await;
}

#[tokio::test]
async fn a_row_that_the_replica_does_not_have_is_an_error_and_not_skipped() {
    let site = Site::shared().await;
    let (database, agent, mut running) = replicated_strictly(&site, "diverged").await;
    let replica = database.writable_replica().await;
    replica.run("DELETE FROM t WHERE id = 7").await;
    database
        .source()
        .await
        .run("UPDATE t SET v = 'streamed' WHERE id IN (6, 7, 8)")
        .await;
    expect_stopped(&mut running, &database.name, &["public.t"]).await;
    assert_eq!(
        replica
            .number("SELECT count(*) FROM t WHERE v = 'streamed'")
            .await,
        0,
        "half a transaction"
    );
    replica.run("INSERT INTO t VALUES (7, 'copied')").await;
    expect_recovery(&agent, &database, running).await;
}

#[tokio::test]
async fn a_slot_that_was_dropped_or_recreated_is_never_used_silently() {
    let site = Site::shared().await;
    let (database, agent, running) = replicated(&site, "slot").await;
    running.stop().await;
    let source = database.source().await;
    let replica = database.replica().await;
    let before = replica.rows("SELECT * FROM dr_agent.progress").await;
    let stream = database.stream();
    database.drop_slot().await;
    source
        .run("INSERT INTO t VALUES (1000, 'in the gap')")
        .await;
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["slot", "gone"]).await;
    running.kill();

    source
        .run(&format!(
            "SELECT pg_create_logical_replication_slot('{stream}', 'pgoutput')"
        ))
        .await;
    source
        .run("INSERT INTO t VALUES (1001, 'after the gap')")
        .await;
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["recreated"]).await;
    running.kill();
    assert_eq!(
        replica.rows("SELECT * FROM dr_agent.progress").await,
        before,
        "it went on over the gap"
    );
    assert_eq!(
        replica
            .number("SELECT count(*) FROM t WHERE id >= 1000")
            .await,
        0
    );
    agent
        .command(&["check"])
        .await
        .expect_code(1)
        .expect_words(&["slot"]);
}

#[tokio::test]
async fn a_source_restored_from_a_backup_or_replaced_by_another_is_noticed() {
    let source = ServerOptions::source().set("wal_keep_size", "256MB");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("restored").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let backup = Backup::take(&site.source).await;
    let mut agent = database.agent();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let early = source
        .value("SELECT pg_current_wal_flush_lsn()")
        .await
        .unwrap();
    source
        .run("INSERT INTO t SELECT g FROM generate_series(1000, 3000) AS g")
        .await;
    database.expect_equal().await;
    running.stop().await;
    let replica = database.replica().await;
    let before = replica.rows("SELECT * FROM dr_agent.progress").await;

    // The same cluster, some minutes younger.
    let restored = backup.restore_to(&early).await;
    agent.configure("source.url", &format!("\"{}\"", restored.url("postgres")));
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["back in time"]).await;
    running.kill();

    // It writes on, until its WAL is longer than what the replica has seen.
    let young = restored.client(&database.name).await;
    let applied = replica
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();
    while !young
        .holds(&format!("SELECT pg_current_wal_flush_lsn() > '{applied}'"))
        .await
    {
        young.run("SELECT pg_switch_wal(); INSERT INTO t VALUES (-1, 'another history'); DELETE FROM t WHERE id = -1").await;
    }
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["timeline"]).await;
    running.kill();

    // Another cluster altogether, with a database of that name.
    let stranger = ServerOptions::source().of_another_cluster().start().await;
    stranger.create_database(&database.name).await;
    stranger.run(&database.name, TABLE).await;
    agent.configure("source.url", &format!("\"{}\"", stranger.url("postgres")));
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["system identifier"]).await;
    running.kill();
    assert_eq!(
        replica.rows("SELECT * FROM dr_agent.progress").await,
        before
    );

    // The right one again.
    agent.configure(
        "source.url",
        &format!("\"{}\"", site.source.url("postgres")),
    );
    source.run("UPDATE t SET v = 'the true history'").await;
    expect_recovery(&agent, &database, running).await;
}

#[tokio::test]
async fn a_replica_that_holds_something_else_is_left_alone() {
    let site = Site::shared().await;
    let database = site.database("occupied").await;
    database.source().await.run(TABLE).await;
    site.replica.create_database(&database.name).await;
    let replica = database.replica().await;
    replica
        .run("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'precious')")
        .await;
    let mut running = database.agent().start();
    expect_stopped(&mut running, &database.name, &["not empty"]).await;
    assert_eq!(
        replica
            .number("SELECT count(*) FROM t WHERE v = 'precious'")
            .await,
        1
    );
}

#[tokio::test]
async fn a_pg_dump_that_cannot_be_found_is_named() {
    let site = Site::shared().await;
    let database = site.database("pg_dump").await;
    database.source().await.run(TABLE).await;
    let mut agent = database.agent();
    let bin = agent.config().clone();
    agent.configure("copy.pg_bin", "\"/nonexistent\"");
    let mut running = agent.start();
    expect_stopped(&mut running, &database.name, &["pg_dump"]).await;
    drop(running);
    let agent = Agent::new(bin);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}
