//! Goal: what stands still never looks well, and what is waited for is said.
//! Method: stops one database, then all, and looks at every answer as time goes on; holds a slot's creation and the apply with
//! other people's transactions; sets the clock of a progress row. The objective is an hour where the verdict must not need it.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::compare::expect_equal_when_caught_up;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

async fn lag_grows(running: &Running, database: &str) {
    let labels = [("database", database)];
    let metrics = running.metrics().await;
    let before = metrics.value("dr_agent_lag_seconds", &labels).unwrap();
    running
        .wait_for_metric("dr_agent_lag_seconds", &labels, |value| {
            value > before + 1.0
        })
        .await;
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 1.0)
        .await;
}

/// The source keeps more and more for it, and that can be seen.
async fn retained_grows(running: &Running, database: &Database) {
    let labels = [("database", database.name.as_str())];
    let name = "dr_agent_slot_retained_bytes";
    let before = running
        .wait_for_metric(name, &labels, |value| value >= 0.0)
        .await;
    let source = database.source().await;
    source
        .run("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 2000000))")
        .await;
    running
        .wait_for_metric(name, &labels, |value| value > before + 1e6)
        .await;
    running
        .wait_for_metric("dr_agent_lag_bytes", &labels, |value| value > 1e6)
        .await;
}

#[tokio::test]
async fn a_database_that_stopped_looks_worse_every_second_until_it_is_mended() {
    let site = Site::shared().await;
    let (good, bad) = (site.database("good").await, site.database("bad").await);
    for database in [&good, &bad] {
        database.source().await.run(TABLE).await;
    }
    let config = good
        .config()
        .databases(&[&good.name, &bad.name])
        .set_text("objectives.rpo", "1h")
        .set_text("replica.set_aside", "never");
    let stream = config.stream(&bad.name);
    let agent = Agent::new(config);
    let mut running = agent.start();
    running.wait_for_streaming(&good.name).await;
    running.wait_for_streaming(&bad.name).await;
    for side in ["source", "replica"] {
        let offset = |value: f64| value.abs() < 0.5;
        running
            .wait_for_metric("dr_agent_clock_offset_seconds", &[("side", side)], offset)
            .await;
    }
    let readyz = async || running.get("/readyz").await.unwrap();
    wait_until("everything to be ready", PATIENCE, || async {
        readyz().await.status == 200
    })
    .await;

    let source = bad.source().await;
    source
        .run("ALTER TABLE t ADD COLUMN more int; INSERT INTO t VALUES (1, 'x', 1)")
        .await;
    running.wait_for_state(&bad.name, "stopped").await;
    lag_grows(&running, &bad.name).await;
    retained_grows(&running, &bad).await;
    let answer = readyz().await;
    assert_eq!(answer.status, 503);
    assert!(
        answer.body.contains(&bad.name) && !answer.body.contains(&good.name),
        "{}",
        answer.body
    );
    let page = running.get("/").await.unwrap().body;
    assert!(page.contains("BREACHED"), "{page}");
    let outcome = agent.command(&["status", "--json"]).await;
    outcome.expect_code(1);
    let status = outcome.json();
    let shown = status["databases"].as_array().unwrap();
    let verdict =
        |name: &str| shown.iter().find(|one| one["database"] == name).unwrap()["rpo"].clone();
    assert_eq!(
        (verdict(&good.name), verdict(&bad.name)),
        ("met".into(), "breached".into())
    );

    // The last one stops as well: somebody still says so.
    good.source()
        .await
        .run("ALTER TABLE t ADD COLUMN more int; INSERT INTO t VALUES (1, 'x', 1)")
        .await;
    running.wait_for_state(&good.name, "stopped").await;
    lag_grows(&running, &good.name).await;
    lag_grows(&running, &bad.name).await;
    assert_eq!(running.get("/healthz").await.unwrap().status, 200);
    agent.command(&["status"]).await.expect_code(1);
    assert!(running.exit_status().is_none());

    // Mended, it goes on by itself.
    bad.writable_replica()
        .await
        .run("ALTER TABLE t ADD COLUMN more int")
        .await;
    running.wait_for_streaming(&bad.name).await;
    let labels = [("database", bad.name.as_str())];
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 0.0)
        .await;
    expect_equal_when_caught_up(&source, &bad.replica().await, &stream).await;
    running.stop().await;
}

#[tokio::test]
async fn what_the_source_keeps_is_known_while_the_replica_is_away() {
    let site = Site::own().await;
    let database = site.database("away").await;
    database.source().await.run(TABLE).await;
    let (agent, running) = database.replicate().await;
    site.replica.pause();
    retained_grows(&running, &database).await;
    lag_grows_beyond(&running, &database.name, 2.0).await;
    // Nobody has told a new agent how far the replica is.
    drop(running);
    let running = agent.start();
    retained_grows(&running, &database).await;
    site.replica.resume();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}

async fn lag_grows_beyond(running: &Running, database: &str, seconds: f64) {
    let labels = [("database", database)];
    running
        .wait_for_metric("dr_agent_lag_seconds", &labels, |value| value > seconds)
        .await;
}

#[tokio::test]
async fn whoever_is_waited_for_is_named_with_database_and_transaction() {
    let options = ServerOptions::source();
    let site = Site::with(options, ServerOptions::replica()).await;
    let database = site.database("waits").await;
    database.source().await.run(TABLE).await;
    // In another database of the server, and nobody's session any more.
    let elsewhere = site.source.client("postgres").await;
    elsewhere
        .run("CREATE TABLE other (id int); BEGIN; INSERT INTO other VALUES (1); PREPARE TRANSACTION 'the forgotten one'")
        .await;
    let agent = database.agent();
    let running = agent.start();
    running
        .wait_for_log(&[
            "waits on the source",
            "'the forgotten one'",
            "database postgres",
        ])
        .await;
    let status = agent.command(&["status", "--json"]).await;
    let shown = &status.expect_code(1).json()["databases"][0]["waits_for"];
    assert!(
        shown
            .as_str()
            .unwrap_or_default()
            .contains("the forgotten one"),
        "{}",
        status.stdout
    );
    let check = agent.command(&["check"]).await;
    check.expect_words(&["is being created", "waits"]);
    assert!(!check.text().contains("left over"), "{}", check.text());
    // An open one, next.
    elsewhere.run("ROLLBACK PREPARED 'the forgotten one'").await;
    running.wait_for_streaming(&database.name).await;

    // On the replica, by a session that holds a row.
    let holder = database.writable_replica().await;
    database
        .source()
        .await
        .run("INSERT INTO t VALUES (1, 'x')")
        .await;
    database.wait_caught_up().await;
    holder
        .run("BEGIN; UPDATE t SET v = 'held' WHERE id = 1")
        .await;
    let pid = holder.value("SELECT pg_backend_pid()").await.unwrap();
    database
        .source()
        .await
        .run("UPDATE t SET v = 'y' WHERE id = 1")
        .await;
    running
        .wait_for_log(&[
            "waits on the replica",
            &format!("pid {pid}"),
            "idle in transaction",
        ])
        .await;
    holder.run("ROLLBACK").await;
    database.expect_equal().await;
    wait_until("nothing to be waited for", PATIENCE, || async {
        running.status().await["databases"][0]["waits_for"].is_null()
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn a_clock_that_is_behind_makes_no_loss_smaller() {
    let site = Site::shared().await;
    let database = site.database("clocks").await;
    database.source().await.run(TABLE).await;
    let (mut agent, mut running) = database.replicate().await;
    // What the agent measures is known on the replica.
    let replica = database.writable_replica().await;
    let told = "SELECT count(*) = 1 AND max(abs(replica_ahead)) < 0.5 FROM dr_agent.clock";
    wait_until("the clocks to be told", PATIENCE, || async {
        replica.holds(told).await
    })
    .await;
    running.kill();
    agent.configure("objectives.rpo", "\"1s\"");
    agent.configure("source.url", "\"postgres://nobody@127.0.0.1:1/x\"");
    // As a replica has it whose clock is ten minutes behind the source's.
    replica
        .run(
            "UPDATE dr_agent.progress SET commit_time = commit_time + interval '10 minutes';
             UPDATE dr_agent.clock SET replica_ahead = -600",
        )
        .await;
    wait_until("the verdict to be bad", PATIENCE, || async {
        agent.command(&["status"]).await.code == Some(1)
    })
    .await;
    let planned = agent
        .command(&["promote", "--failover", "--plan", "--json"])
        .await
        .json();
    assert!(planned["rpo_seconds"].as_f64().unwrap() > 1.0, "{planned}");
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    let report = outcome.expect_code(0).json();
    assert_eq!(report["rpo_met"], false, "{report}");
    assert!(report["rpo_seconds"].as_f64().unwrap() < 300.0, "{report}");
    outcome.expect_words(&["the replica's clock was 600.0 s behind"]);
}
