//! Goal: SIGHUP takes over what can be taken over, names what needs a restart, and nothing in the file ends the process.
//! Method: one agent, whose file is changed, broken and mended while it runs.

use std::fs;

use dr_agent_tests::site::Site;

#[tokio::test]
async fn a_changed_file_is_taken_over_and_a_broken_one_is_not() {
    let site = Site::shared().await;
    let database = site.database("reload").await;
    let name = database.name.as_str();
    let source = database.source().await;
    source
        .run("CREATE TABLE keyless (v text); CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let mut agent = database.agent();
    agent.configure("objectives.rpo", "\"1h\"");
    let running = agent.start();

    // A decision that a database is stopped for is taken in the file.
    running.wait_for_state(name, "stopped").await;
    agent.configure("source.keyless", "\"full\"");
    running.hang_up();
    running.wait_for_log(&["reloaded", "source.keyless"]).await;
    running.wait_for_streaming(name).await;
    source.run("INSERT INTO keyless VALUES ('a'), ('a')").await;
    database.expect_equal().await;

    // Values that sessions go by: those that stream begin anew with them.
    let breached = [("database", name)];
    agent.configure("objectives.rpo", "\"1us\"");
    agent.configure("replica.lanes", "2");
    agent.configure("limits.batch_changes", "7");
    agent.configure("limits.spill_directory", "\"/nowhere\"");
    running.hang_up();
    let needs = running.wait_for_log(&["needs a restart"]).await;
    assert!(needs.contains("limits.spill_directory"), "{needs}");
    running
        .wait_for_log(&[
            "reloaded",
            "replica.lanes, objectives.rpo, limits.batch_changes",
        ])
        .await;
    running
        .wait_for_log(&["starting again", "configuration was changed"])
        .await;
    running
        .wait_for_metric("dr_agent_objective_rpo_seconds", &[], |value| value < 1.0)
        .await;
    running
        .wait_for_metric("dr_agent_rpo_breached", &breached, |value| value == 1.0)
        .await;
    running.wait_for_streaming(name).await;
    source
        .run("INSERT INTO t SELECT generate_series(1, 100)")
        .await;
    database.expect_equal().await;

    // Broken, it is said, and everything goes on.
    let sound = fs::read_to_string(agent.config_path()).unwrap();
    fs::write(agent.config_path(), "[source\nurl = 7\n").unwrap();
    running.hang_up();
    running.wait_for_log(&["cannot be used"]).await;
    fs::remove_file(agent.config_path()).unwrap();
    running.hang_up();
    running.wait_for_log(&["cannot be read"]).await;
    source.run("INSERT INTO t VALUES (1000)").await;
    database.expect_equal().await;

    // Mended, it is taken over again.
    fs::write(agent.config_path(), sound).unwrap();
    agent.configure("objectives.rpo", "\"2h\"");
    running.hang_up();
    running
        .wait_for_metric("dr_agent_rpo_breached", &breached, |value| value == 0.0)
        .await;
    let objectives = &running.status().await["objectives"];
    assert_eq!(objectives["rpo_seconds"], 7200.0);
    running.wait_for_streaming(name).await;
    source.run("INSERT INTO t VALUES (1001)").await;
    database.expect_equal().await;
    running.stop().await;
}
