//! Goal: `status` says at a glance whether the RPO is met, and silence is not health.
//! Method: asks with the agent running, dead, and the replica promoted; with an archive that is whole, has a gap, is away.

use std::fs;

use dr_agent::pg::PgLsn;
use dr_agent_tests::agent::{Agent, Outcome};
use dr_agent_tests::archive::{note, protected, segments, span, take_away, work};
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for};

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

    let outcome = verdict(&agent, 0).await;
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
    let outcome = verdict(&agent, 1).await;
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

/// What `status` says once it exits so.
async fn verdict(agent: &Agent, code: i32) -> Outcome {
    wait_for("the verdict", PATIENCE, || async {
        let outcome = agent.command(&["status", "--json"]).await;
        if outcome.code == Some(code) {
            Ok(outcome)
        } else {
            Err(outcome.stdout)
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_archive_is_shown_as_a_restore_would_find_it() {
    let site = Site::shared().await;
    let (database, archive, agent, mut running) = protected(&site, "status").await;
    let of_the_archive = async || {
        let outcome = agent.command(&["status", "--json"]).await;
        outcome.json()["databases"][0]["archive"].clone()
    };
    let source = database.source().await;
    let passed = |lsn: String| {
        let of_the_archive = &of_the_archive;
        wait_for("the log to reach the store", PATIENCE, move || {
            let lsn = lsn.clone();
            async move {
                let shown = of_the_archive().await;
                let end: PgLsn = shown["log_end_lsn"].as_str().unwrap().parse().unwrap();
                if end >= lsn.parse().unwrap() {
                    Ok(shown)
                } else {
                    Err(shown.to_string())
                }
            }
        })
    };
    let moments = work(&source, 6, 0).await;
    let shown = passed(moments[5].lsn.clone()).await;
    assert_eq!(shown["gaps"], serde_json::json!([]));
    assert_eq!(shown["error"], serde_json::Value::Null);
    assert!(
        shown["spool_bytes"].is_u64() && shown["log_written_at"].is_string(),
        "{shown}"
    );
    let listed = agent.command(&["backup", "--list", "--json"]).await.json();
    let newest = &listed[0]["bases"].as_array().unwrap().last().unwrap()["base"];
    assert_eq!(
        (&shown["base_lsn"], &shown["base_as_of"]),
        (&newest["lsn"], &newest["as_of"])
    );
    let text = agent.command(&["status"]).await;
    text.expect_words(&["newest base backup as of"])
        .expect_words(&["the log reaches", "s ago"])
        .expect_words(&["wait in the spool"]);

    // A segment is gone: restore would stop there.
    let all = segments(&archive);
    let victim = all[all.len() - 1].clone();
    passed(note_and_commit(&source).await).await;
    running.kill();
    fs::remove_file(&victim).unwrap();
    let gaps = of_the_archive().await["gaps"].clone();
    let span = span(&victim);
    assert_eq!(gaps.as_array().unwrap().len(), 1, "{gaps}");
    let lsn = |key: &str| gaps[0][key].as_str().unwrap().parse::<PgLsn>().unwrap();
    // The one before may reach into it: a batch that comes to the log twice is written from its beginning.
    assert!(
        lsn("from_lsn") >= span.start && lsn("from_lsn") < span.end,
        "{gaps}"
    );
    assert_eq!(lsn("to_lsn"), span.end);
    agent
        .command(&["status"])
        .await
        .expect_words(&["GAP", gaps[0]["from_lsn"].as_str().unwrap()]);

    // What the store does not take waits in the spool; and without a store nothing is claimed of it.
    take_away(&archive);
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO bag VALUES ('waits')").await;
    running.wait_for_log(&["the archive do", "segment"]).await;
    let shown = of_the_archive().await;
    assert!(shown["spool_bytes"].as_u64().unwrap() > 0, "{shown}");
    assert!(shown["error"].is_string(), "{shown}");
    for unknown in ["bases", "base_lsn", "log_end_lsn", "gaps"] {
        assert_eq!(shown[unknown], serde_json::Value::Null, "{unknown}");
    }
    agent
        .command(&["status"])
        .await
        .expect_words(&["DOES NOT ANSWER"]);
    // It only looks.
    running.kill();
    fs::remove_file(&archive).unwrap();
    of_the_archive().await;
    assert!(!archive.exists(), "status has made a directory");
}

/// Commits something; returns where.
async fn note_and_commit(source: &Client) -> String {
    source.run("INSERT INTO bag VALUES ('more')").await;
    note(source).await.lsn
}
