//! Goal: a slot that its server gives up while an agent runs is a definite stop, with the right reason, in every place that is
//! looked at, and with no advice that loses the replica.
//! Method: the agent stands still, or its replica is away, while the source does what makes it invalidate the slot.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)";

/// Every second segment is a checkpoint, until the slot is lost.
async fn wait_until_lost(source: &Client, database: &Database) {
    let lost = format!(
        "SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    );
    wait_until("the slot to be lost", PATIENCE, || async {
        source.run("SELECT pg_switch_wal()").await;
        source
            .run("CREATE TABLE IF NOT EXISTS filler (x int); DROP TABLE filler")
            .await;
        source.run("CHECKPOINT").await;
        source.holds(&lost).await
    })
    .await;
}

/// It stopped, everybody says so and why, and what they advise begins with the condition.
async fn expect_stop(agent: &Agent, running: &mut Running, name: &str, reason: &str) {
    running.wait_for_state(name, "stopped").await;
    let database = &running.status().await["databases"][0];
    let (error, hint) = (database["error"].to_string(), database["hint"].to_string());
    // From 17 on the server says why.
    let says = ["lost", "invalidated"]
        .iter()
        .any(|word| error.contains(word));
    assert!(error.contains("slot") && says, "{error}");
    assert!(hint.contains(reason), "{hint}");
    let condition = hint.find("Only while the source is in use and sound");
    assert!(condition.unwrap() < hint.find("DROP DATABASE").unwrap());
    assert_eq!(database["rpo_breached"], true);
    let metrics = running.metrics().await;
    let labels = [("database", name), ("state", "stopped")];
    assert_eq!(metrics.value("dr_agent_state", &labels), Some(1.0));
    let breached = metrics.value("dr_agent_rpo_breached", &labels[..1]);
    assert_eq!(breached, Some(1.0));
    let page = running.get("/").await.unwrap();
    assert!(page.body.contains("stopped"), "{}", page.body);
    assert_eq!(running.get("/readyz").await.unwrap().status, 503);
    assert!(running.exit_status().is_none());
    // As the commands say it.
    agent.command(&["status"]).await.expect_code(1);
    let checked = agent.command(&["check"]).await;
    checked.expect_code(1).expect_words(&["slot", reason]);
    // What the replica has can be opened.
    let planned = agent.command(&["promote", "--failover", "--plan"]).await;
    planned.expect_code(0);
}

#[tokio::test]
async fn a_slot_lost_under_a_running_agent_is_a_definite_stop() {
    let source = ServerOptions::source()
        .set("max_slot_wal_keep_size", "1MB")
        .set("min_wal_size", "32MB")
        .set("max_wal_size", "32MB");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("outrun").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let (agent, mut running) = database.replicate().await;
    database.expect_equal().await;
    running.pause();
    wait_until_lost(&source, &database).await;
    running.resume();
    let reason = "max_slot_wal_keep_size";
    expect_stop(&agent, &mut running, &database.name, reason).await;

    // Looked at again, and after a restart, it is the same.
    running.hang_up();
    wait_until("the next look", PATIENCE, || async {
        running.log().matches(" stopped database").count() == 2
    })
    .await;
    expect_stop(&agent, &mut running, &database.name, reason).await;
    running.kill();
    let mut running = agent.start();
    expect_stop(&agent, &mut running, &database.name, reason).await;
    running.stop().await;
}

/// From 18 on a slot that nobody reads is given up as well: here while the replica is away.
#[tokio::test]
async fn a_slot_that_was_idle_for_too_long_is_a_definite_stop() {
    let site = Site::own().await;
    if site.source.major() < 18 {
        return;
    }
    let database = site.database("idle").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let (agent, mut running) = database.replicate().await;
    database.expect_equal().await;
    site.replica.stop().await;
    source.run("INSERT INTO t VALUES (2)").await;
    running.wait_for_state(&database.name, "retrying").await;
    source
        .run("ALTER SYSTEM SET idle_replication_slot_timeout = '1s'")
        .await;
    source.run("SELECT pg_reload_conf()").await;
    wait_until_lost(&source, &database).await;
    site.replica.start_again().await;
    let reason = "idle_replication_slot_timeout";
    expect_stop(&agent, &mut running, &database.name, reason).await;
    running.stop().await;
}
