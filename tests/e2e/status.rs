//! Goal: `status` says at a glance whether the RPO is met, and silence is not health.
//! Method: asks with the agent running, dead, and the replica promoted.

use dr_agent_tests::site::Site;

#[tokio::test]
async fn the_verdict_follows_the_agent_and_the_promotion() {
    let site = Site::shared().await;
    let database = site.database("status").await;
    database
        .source()
        .await
        .run("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let mut agent = database.agent();
    agent.configure("objectives.rpo", "\"3s\"");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |value| value == 0.0)
        .await;

    let outcome = agent.command(&["status", "--json"]).await;
    outcome.expect_code(0);
    let status = outcome.json();
    assert_eq!(status["within_rpo"], true);
    let shown = &status["databases"][0];
    assert_eq!(shown["database"], database.name.as_str());
    assert_eq!(shown["state"], "streaming");
    assert_eq!(shown["rpo"], "met");
    assert!(shown["lag_seconds"].as_f64().unwrap() < 3.0, "{shown}");
    agent
        .command(&["status"])
        .await
        .expect_code(0)
        .expect_words(&[&database.name]);

    running.kill();
    // Without an agent the lag grows past the RPO, and nobody measures it.
    let outcome =
        dr_agent_tests::wait::wait_for("a bad verdict", dr_agent_tests::wait::PATIENCE, || async {
            let outcome = agent.command(&["status", "--json"]).await;
            if outcome.code == Some(1) {
                Ok(outcome)
            } else {
                Err(outcome.stdout)
            }
        })
        .await;
    let status = outcome.json();
    assert_eq!(status["within_rpo"], false);
    assert_eq!(status["agent"]["answers"], false);
    assert_eq!(status["databases"][0]["state"], "no_agent");

    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let status = agent.command(&["status", "--json"]).await.json();
    assert_eq!(status["databases"][0]["state"], "promoted");
}
