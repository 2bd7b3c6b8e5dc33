//! Goal: promise 6 at the promotion: what is wrong with one database costs that database, and hooks run once for what is open.
//! Method: databases that nobody may enter, that break every session, whose copy is not complete, or that are somebody else's,
//! beside one that is well; each is mended in turn, and the same command is run again. Two promotions at once.

use std::path::Path;

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use serde_json::Value;

/// Notes at `trace` what hooks are told, a line each time.
fn hook(agent: &mut Agent, trace: &Path, first: &str) {
    let script = format!(
        "{first} echo $DR_AGENT_DATABASES not $DR_AGENT_DATABASES_NOT_OPEN >> {}",
        trace.display()
    );
    let hook = format!(
        "[{{ name = \"tell\", command = [\"sh\", \"-c\", \"{script}\"], timeout = \"10s\" }}]"
    );
    agent.configure("promote.hook", &hook);
}

async fn promote(agent: &Agent, code: i32) -> Value {
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(code);
    outcome.json()
}

fn states(report: &Value) -> Vec<(&str, &str)> {
    let databases = report["databases"].as_array().unwrap().iter();
    databases
        .map(|one| {
            (
                one["database"].as_str().unwrap(),
                one["state"].as_str().unwrap(),
            )
        })
        .collect()
}

#[tokio::test]
async fn a_database_that_cannot_be_opened_costs_none_of_the_others() {
    // As RDS keeps everybody out of its own.
    let replica = ServerOptions::replica().hba("host rdsadmin all 127.0.0.1/32 reject");
    let site = Site::with(ServerOptions::source(), replica).await;
    let names = ["breaks", "closed", "half", "well"];
    for name in names {
        site.source.create_database(name).await;
        site.source
            .run(name, "CREATE TABLE t (id serial PRIMARY KEY)")
            .await;
    }
    site.replica.create_database("rdsadmin").await;
    site.replica.create_database("other").await;
    // What the URL names is in trouble, too.
    let config = AgentConfig::new(&site.source.url("postgres"), &site.replica.url("breaks"));
    let mut agent = Agent::new(config.set("source.databases", "[\"*\"]"));
    let trace = agent.directory().join("trace");
    hook(&mut agent, &trace, "");
    let told = || std::fs::read_to_string(&trace).unwrap_or_default();
    // Its database is made by the agent, which connects to it first.
    site.replica.create_database("breaks").await;
    let mut running = agent.start();
    for name in names {
        running.wait_for_streaming(name).await;
    }
    running.wait_for_streaming("postgres").await;
    running.kill();
    let admin = site.replica.client("postgres").await;
    admin.run("SET default_transaction_read_only = off").await;
    admin
        .run("ALTER DATABASE breaks SET session_preload_libraries = 'not_there'")
        .await;
    admin
        .run("ALTER DATABASE closed ALLOW_CONNECTIONS false")
        .await;
    let half = site.replica.client("half").await;
    half.run("SET default_transaction_read_only = off").await;
    half.run("UPDATE dr_agent.table_sync SET state = 'copying' WHERE table_name = 't'")
        .await;

    let planned = agent
        .command(&["promote", "--failover", "--plan", "--json"])
        .await;
    planned.expect_code(4);
    let said = planned.json().to_string();
    assert!(
        said.contains("not_there")
            && said.contains("ALLOW_CONNECTIONS")
            && said.contains("public.t"),
        "{said}"
    );

    let report = promote(&agent, 1).await;
    assert_eq!(
        states(&report),
        [
            ("breaks", "unreachable"),
            ("closed", "unreachable"),
            ("half", "standby"),
            ("postgres", "done"),
            ("well", "done")
        ]
    );
    assert_eq!(report["outcome"], "failed");
    assert!(
        report["refusals"].to_string().contains("public.t"),
        "{report}"
    );
    assert!(
        report["warnings"]
            .to_string()
            .contains("NOT OPEN: breaks, closed, half"),
        "{report}"
    );
    let well = site.replica.client("well").await;
    well.run("INSERT INTO t DEFAULT VALUES").await;
    let first = "postgres,well not breaks,closed,half\n";
    assert_eq!(told(), first);
    // Nothing more opens: nobody is told again.
    promote(&agent, 1).await;
    assert_eq!(told(), first);

    admin
        .run("ALTER DATABASE closed ALLOW_CONNECTIONS true")
        .await;
    half.run("UPDATE dr_agent.table_sync SET state = 'ready'")
        .await;
    let report = promote(&agent, 1).await;
    assert_eq!(states(&report)[0], ("breaks", "unreachable"));
    assert!(
        states(&report)[1..]
            .iter()
            .all(|(_, state)| *state == "done"),
        "{report}"
    );
    let second = format!("{first}closed,half,postgres,well not breaks\n");
    assert_eq!(told(), second);

    admin
        .run("ALTER DATABASE breaks RESET session_preload_libraries")
        .await;
    let report = promote(&agent, 0).await;
    assert_eq!(report["outcome"], "promoted");
    let third = format!("{second}breaks,closed,half,postgres,well not\n");
    assert_eq!(told(), third);
    assert_eq!(
        promote(&agent, 0).await,
        report,
        "a repeat prints the same report"
    );
    assert_eq!(told(), third);
    for name in names {
        let client = site.replica.client(name).await;
        client.run("INSERT INTO t DEFAULT VALUES").await;
    }
}

#[tokio::test]
async fn two_promotions_at_once_run_the_hooks_once() {
    let site = Site::shared().await;
    let database = site.database("twice").await;
    database
        .source()
        .await
        .run("CREATE TABLE t (id serial PRIMARY KEY)")
        .await;
    let (mut agent, mut running) = database.replicate().await;
    running.kill();
    let trace = agent.directory().join("trace");
    hook(&mut agent, &trace, "sleep 1;");
    let (one, other) = tokio::join!(promote(&agent, 0), promote(&agent, 0));
    assert_eq!(one, other);
    let told = std::fs::read_to_string(&trace).unwrap();
    assert_eq!(told, format!("{} not\n", database.name));
}
