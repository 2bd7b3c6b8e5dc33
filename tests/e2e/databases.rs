//! Goal: several databases of one server, each its own pipeline; one that fails does not stop the others.
//! Method: `databases = ["*"]` over three databases, one of which has a table that cannot be replicated.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::agent::AgentConfig;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test]
async fn a_database_that_fails_does_not_stop_the_others() {
    let site = Site::own().await;
    for (name, schema) in [
        ("good", "CREATE TABLE t (id int PRIMARY KEY)"),
        ("bad", "CREATE TABLE keyless (id int)"),
        ("Güt-2", "CREATE TABLE \"T\" (id int PRIMARY KEY)"),
    ] {
        site.source.create_database(name).await;
        site.source.run(name, schema).await;
    }
    let config = AgentConfig::new(&site.source.url("postgres"), &site.replica.url("postgres"));
    let agent = Agent::new(config.clone().set("source.databases", "[\"*\"]"));
    let mut running = agent.start();
    for name in ["good", "Güt-2"] {
        running.wait_for_streaming(name).await;
    }
    running.wait_for_state("bad", "stopped").await;
    running.wait_for_log(&["keyless", "bad"]).await;
    let status = running.status().await;
    let databases: Vec<_> = status["databases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|database| database["database"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(databases, ["Güt-2", "bad", "good", "postgres"]);
    let bad = &status["databases"][1];
    assert!(bad["error"].is_string() && bad["hint"].is_string(), "{bad}");
    // What stopped is not published: the source's own statements work.
    site.source
        .run(
            "bad",
            "INSERT INTO keyless VALUES (1); UPDATE keyless SET id = 2",
        )
        .await;

    for (name, table) in [("good", "t"), ("Güt-2", "\"T\"")] {
        site.source
            .run(
                name,
                &format!("INSERT INTO {table} SELECT g FROM generate_series(1, 1000) AS g"),
            )
            .await;
        let (source, replica) = (
            site.source.client(name).await,
            site.replica.client(name).await,
        );
        dr_agent_tests::compare::expect_equal_when_caught_up(
            &source,
            &replica,
            &config.stream(name),
        )
        .await;
    }
    let metrics = running.metrics().await;
    for name in ["good", "Güt-2", "bad"] {
        let states = metrics.sum("dr_agent_state", &[("database", name)]);
        assert_eq!(states, 1.0, "dr_agent_state of {name} is one-hot");
    }

    // It drains and ends as asked. Once the table has a key, the next start takes it along.
    running.ask_to_stop();
    running.expect_exit(0).await;
    site.source
        .run("bad", "ALTER TABLE keyless ADD PRIMARY KEY (id)")
        .await;
    let running = agent.start();
    running.wait_for_streaming("bad").await;
    let (source, replica) = (
        site.source.client("bad").await,
        site.replica.client("bad").await,
    );
    dr_agent_tests::compare::expect_equal_when_caught_up(&source, &replica, &config.stream("bad"))
        .await;

    // Each is promoted with its own loss, all with one command.
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    assert_eq!(outcome.json()["databases"].as_array().unwrap().len(), 4);
    let mut running = running;
    running.expect_exit(3).await;
    for (name, table) in [("good", "t"), ("Güt-2", "\"T\""), ("bad", "keyless")] {
        let client = site.replica.client(name).await;
        client
            .run(&format!("INSERT INTO {table} VALUES (99999)"))
            .await;
    }
    wait_until("no session of ours to remain", PATIENCE, || async {
        let client = site.replica.client("postgres").await;
        client.holds("SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE 'dr_agent:%'").await
    })
    .await;
}
