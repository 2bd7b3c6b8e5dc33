//! Goal: a source that fails over to its own standby (17 and later) is followed where nothing can be missing, and refused where the
//! replica has what that standby lacks.
//! Method: a real standby with synchronised slots; the primary is killed, the standby promoted.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::site::Site;
use dr_agent_tests::standby::standby_of;
use dr_agent_tests::wait::{PATIENCE, wait_until};

const STANDBY: &str = "standby_1";

/// A URL that leads to whichever of the two takes writes.
fn either(one: &PgServer, other: &PgServer) -> String {
    let (one, other) = (one.port(), other.port());
    format!(
        "postgres://postgres@127.0.0.1:{one},127.0.0.1:{other}/postgres?target_session_attrs=read-write"
    )
}

async fn promote(standby: &PgServer) -> Client {
    let client = standby.client("postgres").await;
    assert!(client.holds("SELECT pg_promote()").await);
    client
}

async fn synced(standby: &PgServer, stream: &str) {
    let client = standby.client("postgres").await;
    let synced = format!(
        "SELECT coalesce(bool_and(synced AND NOT temporary), false) FROM pg_replication_slots WHERE slot_name = '{stream}'"
    );
    wait_until("the slot to be in step on the standby", PATIENCE, || {
        client.holds(&synced)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_failover_of_the_source_is_followed_and_a_lossy_one_refused() {
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    if site.source.major() < 17 {
        return;
    }
    let database = site.database("failover").await;
    database
        .source()
        .await
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let standby = standby_of(&site.source, STANDBY).await;
    let url = either(&site.source, &standby);
    let agent = Agent::new(database.config().set_text("source.url", &url));
    let stream = database.stream().to_string();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    synced(&standby, &stream).await;
    database
        .source()
        .await
        .run("INSERT INTO t VALUES (1, 'before')")
        .await;
    database.expect_equal().await;
    let replica = database.replica().await;
    // Everything that was applied is on the standby, and its slot is not behind what was confirmed.
    let applied = replica
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();
    let there = format!("SELECT pg_last_wal_replay_lsn() >= '{applied}'");
    let watching = standby.client("postgres").await;
    wait_until("the standby to have it", PATIENCE, || {
        watching.holds(&there)
    })
    .await;
    running.stop().await;

    site.source.stop_immediately().await;
    promote(&standby).await;
    let primary = standby.client(&database.name).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    primary.run("INSERT INTO t VALUES (2, 'after')").await;
    wait_until("the new primary's rows", PATIENCE, || {
        replica.holds("SELECT count(*) = 2 FROM t")
    })
    .await;
    assert!(running.log().contains("failed over to its standby"));
    running.stop().await;
    agent.command(&["check"]).await.expect_code(0);

    // And now one that loses what the replica has: the old primary, brought back as the standby's clone, is left behind.
    let second = standby_of(&standby, "standby_2").await;
    let url = either(&standby, &second);
    let agent = Agent::new(database.config().set_text("source.url", &url));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    synced(&second, &stream).await;
    second.stop().await;
    let primary = standby.client(&database.name).await;
    primary
        .run("INSERT INTO t VALUES (3, 'only the replica has it')")
        .await;
    wait_until("the replica to be ahead of the standby", PATIENCE, || {
        replica.holds("SELECT count(*) = 3 FROM t")
    })
    .await;
    running.stop().await;
    standby.stop_immediately().await;
    second.start_again().await;
    promote(&second).await;
    let running = agent.start();
    running.wait_for_log(&["stopped", "hint"]).await;
    let log = running.log();
    running.stop().await;
    // Whether its WAL has reached the replica's position again decides which of the two is said.
    let said = [
        "it has transactions that the source lost",
        "the source went back in time",
    ];
    assert!(said.iter().any(|text| log.contains(text)), "{log}");
    assert!(log.contains("dr-agent promote"), "{log}");
    assert!(replica.holds("SELECT count(*) = 3 FROM t").await);
}
