//! Goal: `check` names everything that stands in the way at once, each with what to do, and touches nothing.
//! Method: a source with many faults, then none; findings are compared by their stable codes.

use std::collections::BTreeSet;

use dr_agent_tests::agent::Outcome;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;

fn codes(outcome: &Outcome, severity: &str) -> BTreeSet<String> {
    outcome.json()["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] == severity)
        .map(|finding| finding["code"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn every_fault_is_reported_at_once_with_a_hint_each() {
    let source = ServerOptions::source().set("wal_level", "replica");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("faults").await;
    database
        .source()
        .await
        .run(
            "CREATE TABLE keyless (a int); CREATE TABLE fine (id int PRIMARY KEY);
             CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
             CREATE MATERIALIZED VIEW seen AS SELECT * FROM fine; SELECT lo_create(0)",
        )
        .await;
    let agent = database.agent();
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(1);
    let errors = codes(&outcome, "error");
    for code in ["wal_level", "keyless_table"] {
        assert!(
            errors.contains(code),
            "{code} is not among the errors {errors:?}"
        );
    }
    let report = outcome.json();
    let findings = report["findings"].as_array().unwrap();
    for finding in findings
        .iter()
        .filter(|finding| finding["severity"] == "error")
    {
        assert!(
            finding["hint"].is_string(),
            "an error without a hint: {finding}"
        );
    }
    for code in ["unlogged_table", "materialized_view", "large_object"] {
        assert!(
            findings.iter().any(|finding| finding["code"] == code),
            "{code} is not reported"
        );
    }
    assert_eq!(
        report["errors"].as_u64().unwrap(),
        findings.iter().filter(|f| f["severity"] == "error").count() as u64
    );

    let text = agent.command(&["check"]).await;
    text.expect_code(1)
        .expect_words(&["wal_level"])
        .expect_words(&["public.keyless"]);
    let source = database.source().await;
    assert!(
        source
            .holds("SELECT to_regnamespace('dr_agent') IS NULL")
            .await,
        "check has made something"
    );
    assert_eq!(
        source.number("SELECT count(*) FROM pg_publication").await,
        0
    );
    assert_eq!(
        source
            .number("SELECT count(*) FROM pg_replication_slots")
            .await,
        0
    );
}

#[tokio::test]
async fn a_pair_without_faults_is_found_right_before_and_while_it_replicates() {
    let site = Site::shared().await;
    let database = site.database("faultless").await;
    database
        .source()
        .await
        .run("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let agent = database.agent();
    agent.command(&["check"]).await.expect_code(0);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(0);
    assert_eq!(outcome.json()["errors"], 0);

    // Differences that grew on the replica.
    let replica = database.writable_replica().await;
    replica
        .run("ALTER TABLE t ADD extra int; CREATE UNIQUE INDEX ON t (extra)")
        .await;
    let outcome = agent.command(&["check", "--json"]).await;
    let all: BTreeSet<_> = ["error", "warning", "note"]
        .iter()
        .flat_map(|severity| codes(&outcome, severity))
        .collect();
    assert!(
        all.contains("column_extra") && all.contains("unique_extra"),
        "{all:?}"
    );
    running.stop().await;
}

#[tokio::test]
async fn missing_rights_are_named() {
    let site = Site::shared().await;
    let database = site.database("rights").await;
    let role = format!("weak_{}", database.name);
    let source = database.source().await;
    source
        .run(&format!(
            "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE {role} LOGIN"
        ))
        .await;
    let mut agent = database.agent();
    let url = site
        .source
        .url("postgres")
        .replace("postgres://postgres@", &format!("postgres://{role}@"));
    agent.configure("source.url", &format!("\"{url}\""));
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(1);
    let errors = codes(&outcome, "error");
    assert!(errors.contains("role_replication"), "{errors:?}");
    source.run(&format!("DROP ROLE {role}")).await;
}
