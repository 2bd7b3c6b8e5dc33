//! Goal: what would keep `run` from working is found by `check`, also where every single part looks right.
//! Method: one pair of servers, one obstacle after the other, each put there and taken away again; `check` before, with and after.

use dr_agent_tests::agent::{Agent, AgentConfig, Outcome};
use dr_agent_tests::site::Site;

/// The errors, by code and message.
fn errors(outcome: &Outcome) -> Vec<String> {
    let report = outcome.json();
    let findings = report["findings"].as_array().unwrap().iter();
    let errors = findings.filter(|finding| finding["severity"] == "error");
    errors
        .map(|finding| {
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            format!("{} {} {}", text("code"), text("message"), text("hint"))
        })
        .collect()
}

#[tokio::test]
async fn what_keeps_a_start_from_working_is_found_before() {
    let site = Site::own().await;
    let database = site.database("startable").await;
    let name = &database.name;
    database
        .source()
        .await
        .run("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    site.source
        .run("postgres", "CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
        .await;
    site.replica
        .run(
            "postgres",
            "CREATE ROLE limited LOGIN SUPERUSER; CREATE ROLE other",
        )
        .await;
    site.replica.create_database(name).await;
    let (of_source, of_replica) = (site.source.url("postgres"), site.replica.url("postgres"));
    let config = |replica: &str, database: &str| {
        AgentConfig::new(&of_source, replica)
            .databases(&[database])
            .slot("startable")
    };
    let plain = config(&of_replica, name);
    let limited = config(&of_replica.replace("postgres@", "limited@"), name);
    let ascii = config(&of_replica, "ascii");
    let nothing = "SELECT 1";
    let cases = [
        (
            &limited,
            "ALTER ROLE limited CONNECTION LIMIT 3",
            "ALTER ROLE limited CONNECTION LIMIT -1",
            "connections",
        ),
        (
            &plain,
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "DROP FUNCTION f()",
            "not empty",
        ),
        (
            &plain,
            "CREATE SCHEMA dr_agent CREATE TABLE sending (stream text); INSERT INTO dr_agent.sending VALUES ('x')",
            "DROP SCHEMA dr_agent CASCADE",
            "is itself a source",
        ),
        (
            &plain,
            "CREATE SCHEMA dr_agent
               CREATE TABLE stream (stream text, system_identifier text DEFAULT '7', timeline int DEFAULT 1,
                                    began timestamptz DEFAULT now(), tables_as_of pg_lsn);
             INSERT INTO dr_agent.stream VALUES ('x')",
            "DROP SCHEMA dr_agent CASCADE",
            "is the replica of",
        ),
        (&ascii, nothing, nothing, "SQL_ASCII"),
    ];
    for (config, obstacle, away, words) in cases {
        let agent = Agent::new(config.clone());
        let command = ["check", "--json"];
        if obstacle != nothing {
            let outcome = agent.command(&command).await;
            assert_eq!(errors(&outcome), [""; 0], "before {words}");
        }
        site.replica.run(name, obstacle).await;
        let outcome = agent.command(&command).await;
        outcome.expect_code(1);
        let found = errors(&outcome);
        assert!(
            found.iter().any(|error| error.contains(words)),
            "{words}: {found:?}"
        );
        site.replica.run(name, away).await;
    }
    Agent::new(plain).command(&["check"]).await.expect_code(0);
}
