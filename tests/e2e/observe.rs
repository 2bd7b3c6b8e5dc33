//! Goal: the agent shows what it does, and says nothing that is nobody's business.
//! Method: reads `/metrics`, `/status`, `/healthz` and `/readyz` in good and bad times, and searches its
//! log for passwords and row values.

use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// The contract's metrics that have a meaning while replicating on route `direct`.
const METRICS: &[&str] = &[
    "dr_agent_build_info",
    "dr_agent_objective_rpo_seconds",
    "dr_agent_objective_rto_seconds",
    "dr_agent_state",
    "dr_agent_lag_seconds",
    "dr_agent_lag_bytes",
    "dr_agent_rpo_breached",
    "dr_agent_stage_lag_seconds",
    "dr_agent_transactions_total",
    "dr_agent_changes_total",
    "dr_agent_net_changes_total",
    "dr_agent_batches_total",
    "dr_agent_batch_apply_seconds",
    "dr_agent_slow_path_total",
    "dr_agent_bytes_total",
    "dr_agent_slot_retained_bytes",
    "dr_agent_term",
    "dr_agent_errors_total",
    "dr_agent_copy_rows_total",
    "dr_agent_copy_bytes_total",
    "dr_agent_copy_tables",
    "dr_agent_unprotected_objects",
    "dr_agent_sink_flush_lsn",
];

#[tokio::test]
async fn every_metric_of_the_contract_is_there_and_counts() {
    let site = Site::shared().await;
    let database = site.database("metrics").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g FROM generate_series(1, 100) AS g").await;
    let (_agent, running) = database.replicate().await;
    let labels = [("database", database.name.as_str())];
    let before = running.metrics().await;
    source
        .run("INSERT INTO t SELECT g FROM generate_series(101, 150) AS g")
        .await;
    source.run("UPDATE t SET v = 'x' WHERE id <= 20").await;
    source.run("DELETE FROM t WHERE id > 140; TRUNCATE t").await;
    database.expect_equal().await;
    // Counters are advanced after the batch is durable, which is what we have just seen.
    running
        .wait_for_metric(
            "dr_agent_changes_total",
            &[labels[0], ("kind", "truncate")],
            |value| value >= 1.0,
        )
        .await;
    let after = running.metrics().await;
    let missing: Vec<_> = METRICS.iter().filter(|name| !after.has(name)).collect();
    assert!(missing.is_empty(), "not on /metrics: {missing:?}");
    let grew = |kind: &str| {
        let labels = [labels[0], ("kind", kind)];
        after.sum("dr_agent_changes_total", &labels) - before.sum("dr_agent_changes_total", &labels)
    };
    assert!(grew("insert") >= 50.0 && grew("update") >= 20.0 && grew("delete") >= 10.0);
    // The table's, and what the table and the eight tables of the agent's are listed as; the heartbeat's row may be counted as well.
    let copied = after.sum("dr_agent_copy_rows_total", &labels);
    assert!((109.0..=110.0).contains(&copied), "{copied} rows copied");
    assert_eq!(after.value("dr_agent_term", &labels), Some(1.0));
    assert_eq!(after.value("dr_agent_rpo_breached", &labels), Some(0.0));
    assert_eq!(
        after.value("dr_agent_objective_rpo_seconds", &[]),
        Some(30.0)
    );
    assert_eq!(after.sum("dr_agent_state", &labels), 1.0);
    let lag = after.value("dr_agent_lag_seconds", &labels).unwrap();
    assert!((0.0..10.0).contains(&lag), "lag {lag}");
    let stages = after.label_values("dr_agent_stage_lag_seconds", "stage");
    for stage in ["received", "queued", "applied"] {
        assert!(stages.iter().any(|found| found == stage), "{stages:?}");
    }
    let healthy = running.get("/healthz").await.unwrap();
    assert_eq!(healthy.status, 200);
    assert_eq!(running.get("/readyz").await.unwrap().status, 200);
    assert_eq!(running.get("/nothing").await.unwrap().status, 404);

    let status = running.status().await;
    let shown = &status["databases"][0];
    assert_eq!(shown["database"], database.name.as_str());
    assert_eq!(shown["stream"], database.stream().as_str());
    assert_eq!(shown["state"], "streaming");
    assert_eq!(shown["term"], 1);
    assert_eq!(shown["rpo_breached"], false);
    assert!(
        shown["lag_seconds"].is_number() && shown["end_lsn"].is_string(),
        "{shown}"
    );
    assert!(shown["error"].is_null(), "{shown}");
    running.stop().await;
}

#[tokio::test]
async fn an_rpo_that_is_not_met_shows_while_the_replica_does_not_answer() {
    let site = Site::own().await;
    let database = site.database("breach").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut agent = database.agent();
    agent.configure("objectives.rpo", "\"2s\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 0.0)
        .await;
    wait_until("the verdict to be good", PATIENCE, || async {
        agent.command(&["status"]).await.code == Some(0)
    })
    .await;

    site.replica.pause();
    source.run("INSERT INTO t VALUES (1)").await;
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 1.0)
        .await;
    running
        .wait_for_metric("dr_agent_lag_seconds", &labels, |value| value > 2.0)
        .await;
    let answer = running.get("/readyz").await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert_eq!(running.get("/healthz").await.unwrap().status, 200);

    site.replica.resume();
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 0.0)
        .await;
    wait_until("the agent to be ready again", PATIENCE, || async {
        running
            .get("/readyz")
            .await
            .is_ok_and(|answer| answer.status == 200)
    })
    .await;
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn neither_passwords_nor_row_values_are_ever_logged() {
    const PASSWORD: &str = "correct-horse-9";
    const ROW: &str = "the-patients-name";
    let guarded = |options: ServerOptions| {
        options
            .hba("host all secret 127.0.0.1/32 scram-sha-256")
            .hba("host replication secret 127.0.0.1/32 scram-sha-256")
    };
    let site = Site::with(
        guarded(ServerOptions::source()),
        guarded(ServerOptions::replica()),
    )
    .await;
    for server in [&site.source, &site.replica] {
        server
            .run(
                "postgres",
                &format!("CREATE ROLE secret SUPERUSER REPLICATION LOGIN PASSWORD '{PASSWORD}'"),
            )
            .await;
    }
    let database = site.database("secrets").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE)")
        .await;
    let mut agent = database.agent();
    let file = agent.directory().join("password");
    std::fs::write(&file, PASSWORD).unwrap();
    restrict(&file);
    for (side, server) in [("source", &site.source), ("replica", &site.replica)] {
        let url = server
            .url("postgres")
            .replace("postgres://postgres@", "postgres://secret@");
        agent.configure(&format!("{side}.url"), &format!("\"{url}\""));
        agent.configure(
            &format!("{side}.password_file"),
            &format!("\"{}\"", file.display()),
        );
    }
    agent.configure("replica.set_aside", "\"never\"");
    let running = agent.start_with(&[("RUST_LOG", "trace")]);
    running.wait_for_streaming(&database.name).await;
    source
        .run(&format!("INSERT INTO t VALUES (1, '{ROW}')"))
        .await;
    database.expect_equal().await;

    // An error whose DETAIL quotes the row: the value is taken on the replica.
    let replica = database.writable_replica().await;
    replica
        .run(&format!("INSERT INTO t VALUES (2, '{ROW}-2')"))
        .await;
    source
        .run(&format!("INSERT INTO t VALUES (3, '{ROW}-2')"))
        .await;
    running.wait_for_log(&["unique constraint"]).await;
    replica.run("DELETE FROM t WHERE id = 2").await;
    drop(running);
    let mut running = agent.start_with(&[("RUST_LOG", "trace")]);
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    agent.command(&["check"]).await;
    running.kill();

    for entry in std::fs::read_dir(agent.directory()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path != file {
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            assert!(!text.contains(PASSWORD), "a password in {}", path.display());
            assert!(!text.contains(ROW), "a row value in {}", path.display());
        }
    }
}

fn restrict(file: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}
