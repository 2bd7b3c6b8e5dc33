//! Goal: what heals by itself needs nobody to restart the agent, and what needs a person is looked at again when told to.
//! Method: each refusal of a moment is made and taken back while one agent runs; SIGHUP and SIGTERM at the worst time.

use std::time::Duration;

use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

#[tokio::test]
async fn what_heals_by_itself_is_tried_again_until_it_has() {
    let site = Site::own().await;
    let database = site.database("moment").await;
    let name = database.name.clone();
    for server in [&site.source, &site.replica] {
        server
            .run("postgres", "CREATE ROLE agent SUPERUSER LOGIN")
            .await;
    }
    let source = database.source().await;
    source.run(TABLE).await;
    let agent_at = |url: String| format!("\"{}\"", url.replace("postgres@", "agent@"));
    let mut agent = database.agent();
    agent.configure("source.url", &agent_at(site.source.url("postgres")));
    agent.configure("replica.url", &agent_at(site.replica.url("postgres")));
    agent.configure("replica.set_aside", "\"never\"");
    let running = agent.start();
    running.wait_for_streaming(&name).await;

    // Each: on the source and on the replica; what is done, how it is said, and how it is taken back.
    let allow = |yes| format!("ALTER DATABASE \"{name}\" ALLOW_CONNECTIONS {yes}");
    let refusals = [
        (
            "ALTER ROLE agent NOLOGIN".to_owned(),
            "28000",
            "ALTER ROLE agent LOGIN".to_owned(),
        ),
        (allow(false), "55000", allow(true)),
    ];
    for server in [&site.source, &site.replica] {
        for (refuse, sqlstate, heal) in &refusals {
            let admin = server.client("postgres").await;
            admin.run(refuse).await;
            admin
                .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'agent' AND datname <> 'postgres'")
                .await;
            running.wait_for_state(&name, "retrying").await;
            running.wait_for_log(&["will retry", sqlstate]).await;
            admin.run(heal).await;
            running.wait_for_streaming(&name).await;
        }
    }
    assert!(!running.log().contains(" ERROR "), "{}", running.log());
    source.run("INSERT INTO t VALUES (1000, 'after')").await;
    database.expect_equal().await;

    // One that needs a person is looked at when told to, long before the next look would be; nothing kills it.
    let replica = database.writable_replica().await;
    replica.run("ALTER TABLE t RENAME COLUMN v TO w").await;
    source.run("INSERT INTO t VALUES (1001, 'refused')").await;
    running.wait_for_state(&name, "stopped").await;
    replica.run("ALTER TABLE t RENAME COLUMN w TO v").await;
    running.hang_up();
    running.wait_for_log(&["SIGHUP"]).await;
    running.wait_for_streaming(&name).await;
    running.hang_up();
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn a_stop_that_cannot_drain_says_so_and_one_that_is_definite_leaves_nothing_prepared() {
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    let database = site.database("ends").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let mut agent = database.agent();
    agent.configure("limits.shutdown_grace", "\"1s\"");
    agent.configure("limits.spread_changes", "100");
    agent.configure("replica.lanes", "4");
    agent.configure("replica.set_aside", "\"never\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO t VALUES (2000, 'refused')").await;
    database.expect_equal().await;

    // Row 3333 is refused on one lane; the others have prepared theirs.
    let replica = database.writable_replica().await;
    replica
        .run("CREATE UNIQUE INDEX refuses ON t (v) WHERE v = 'refused'")
        .await;
    source
        .run("INSERT INTO t SELECT g, CASE g WHEN 3333 THEN 'refused' ELSE 'v' END FROM generate_series(2001, 4000) AS g")
        .await;
    running.wait_for_state(&database.name, "stopped").await;
    wait_until("nothing to be prepared", PATIENCE, || async {
        replica
            .holds("SELECT count(*) = 0 FROM pg_prepared_xacts")
            .await
    })
    .await;
    replica.run("DROP INDEX refuses").await;
    running.hang_up();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;

    drop(replica);
    let mut running = running;
    site.replica.pause();
    source.run("INSERT INTO t VALUES (9000, 'frozen')").await;
    let received = [("database", database.name.as_str()), ("stage", "queued")];
    running
        .wait_for_metric("dr_agent_stage_lag_seconds", &received, |lag| lag > 0.2)
        .await;
    running.ask_to_stop();
    running.expect_exit(1).await;
    assert!(
        running.log().contains("shutdown_grace"),
        "{}",
        running.log()
    );
    assert!(!running.log().contains("without saying why"));
    site.replica.resume();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn an_empty_maintenance_database_is_not_guarded_and_one_with_tables_is() {
    let site = Site::own().await;
    let config = dr_agent_tests::agent::AgentConfig::new(
        &site.source.url("postgres"),
        &site.replica.url("postgres"),
    );
    let agent = dr_agent_tests::agent::Agent::new(config.set("source.databases", "[\"*\"]"));
    let running = agent.start();
    running.wait_for_streaming("postgres").await;
    // What the manual says to start over with.
    let replica = site.replica.client("postgres").await;
    replica.run("CREATE DATABASE leftover").await;
    replica.run("DROP DATABASE leftover").await;
    running.stop().await;
    site.source
        .run("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let running = agent.start();
    running.wait_for_streaming("postgres").await;
    wait_for("the guard", Duration::from_secs(20), || async {
        let refused = site.replica.client("postgres").await;
        match refused.try_run("CREATE TABLE mine (id int)").await {
            Err(error) if error.starts_with("25006") => Ok(()),
            outcome => Err(format!("{outcome:?}")),
        }
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn a_replica_that_is_busy_for_longer_than_its_silence_may_last_is_waited_for() {
    let site = Site::shared().await;
    let database = site.database("busy").await;
    let source = database.source().await;
    source
        .run(
            "CREATE FUNCTION slow(s int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_catalog.pg_sleep($1) IS NOT NULL';
             CREATE TABLE waits (id int PRIMARY KEY, s int CHECK (slow(s))); CREATE TABLE large (id int PRIMARY KEY, v text)",
        )
        .await;
    let mut agent = database.agent();
    let url = format!(
        "{}?tcp_user_timeout=1000",
        database.replica_server().url("postgres")
    );
    agent.configure("replica.url", &format!("\"{url}\""));
    agent.configure("replica.lanes", "1");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    // What lies behind it fills every buffer on the way.
    source.run("INSERT INTO waits VALUES (1, 4)").await;
    source
        .run("INSERT INTO large SELECT g, repeat(md5(g::text), 1000) FROM generate_series(1, 800) AS g")
        .await;
    database.expect_equal().await;
    assert!(!running.log().contains("will retry"), "{}", running.log());
    running.stop().await;
}
