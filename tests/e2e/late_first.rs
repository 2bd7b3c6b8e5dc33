//! Goal: a table that comes while the first copy runs is replicated like any other, also for a role that is no superuser, whom
//! `init` has let act for the owners; and where it would not be, `check` says so before.
//! Method: `init` by a superuser; an agent that stands still in the middle of its first copy; a table created meanwhile by an owner.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_the_time_of_the_first_copy_is_replicated_without_a_restart() {
    let site = Site::own().await;
    if site.replica.major() < 15 {
        return;
    }
    let database = site.database("first").await;
    let source = database.source().await;
    source
        .run(
            "CREATE ROLE first_app LOGIN; CREATE SCHEMA shop AUTHORIZATION first_app;
             CREATE TABLE shop.base (id int PRIMARY KEY); ALTER TABLE shop.base OWNER TO first_app; INSERT INTO shop.base VALUES (1);
             CREATE TABLE public.boss (id int PRIMARY KEY)",
        )
        .await;
    let as_agent = |url: String| url.replace("postgres@", "dr@");
    let config = database
        .config()
        .set_text("source.url", &as_agent(site.source.url("postgres")))
        .set_text("replica.url", &as_agent(site.replica.url("postgres")));
    let agent = Agent::new(config);
    let (source_url, replica_url) = (site.source.url("postgres"), site.replica.url("postgres"));
    let urls = ["--source-url", &source_url, "--replica-url", &replica_url];
    let init = [&["init"][..], &urls].concat();
    agent.command(&init).await.expect_code(0);
    assert!(
        source
            .holds("SELECT pg_has_role('dr', 'first_app', 'USAGE')")
            .await,
        "init lets the agent act for the owners"
    );
    // For a superuser it cannot act: what such a one creates later is not published.
    let checked = agent.command(&["check"]).await;
    checked.expect_code(0);
    // Lines are folded.
    let text = checked.text();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let warning = "warning owner_right the role does not act for the owners of 1 table: public.boss; tables that they create \
                   later will not be published";
    assert!(text.contains(warning), "{text}");

    let running = agent.start_with(&[("DR_AGENT_FAILPOINT", "copy:rows-written=stop")]);
    running.wait_until_stopped().await;
    let owner = Client::connect(
        &site
            .source
            .url(&database.name)
            .replace("postgres@", "first_app@"),
    )
    .await;
    owner
        .run(
            "CREATE TABLE shop.during (id serial PRIMARY KEY, base int REFERENCES shop.base); INSERT INTO shop.during (base) VALUES (1), (NULL)",
        )
        .await;
    running.resume();
    running.wait_for_streaming(&database.name).await;
    let replica = database.replica().await;
    wait_until("the table to be replicated", PATIENCE, || {
        replica.holds(
            "SELECT EXISTS (SELECT FROM dr_agent.table_sync WHERE table_name = 'during' AND state = 'ready')",
        )
    })
    .await;
    owner
        .run("INSERT INTO shop.during (base) VALUES (1); UPDATE shop.during SET base = NULL WHERE id = 1")
        .await;
    database.expect_equal().await;
    let log = running.log();
    assert!(!log.contains("starting again"), "{log}");
    running.stop().await;
}
