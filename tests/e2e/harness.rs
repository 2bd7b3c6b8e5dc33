//! Goal: the harness itself can be trusted: servers really crash and freeze, differences are seen.
//! Method: uses it without any agent.

use std::time::Duration;

use dr_agent_tests::backup::Backup;
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::{differences, expect_same_content};
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};

#[tokio::test]
async fn a_server_is_gone_after_a_kill_and_recovers_what_was_committed() {
    let server = ServerOptions::source().start().await;
    let client = server.client("postgres").await;
    client.run("CREATE TABLE kept (id int)").await;
    client.run("INSERT INTO kept VALUES (1)").await;
    server.kill();
    assert!(client.try_run("SELECT 1").await.is_err());
    assert!(Client::try_connect(&server.url("postgres")).await.is_err());
    server.start_again().await;
    let client = server.client("postgres").await;
    assert_eq!(client.number("SELECT count(*) FROM kept").await, 1);
    server.restart().await;
}

#[tokio::test]
async fn a_frozen_server_answers_nobody_until_it_is_thawed() {
    let server = ServerOptions::replica().start().await;
    let client = server.client("postgres").await;
    server.pause();
    let asked = tokio::time::timeout(Duration::from_millis(300), client.try_run("SELECT 1")).await;
    assert!(asked.is_err(), "an answer from a frozen server");
    server.resume();
    let again = server.client("postgres").await;
    assert!(again.holds("SELECT true").await);
}

#[tokio::test]
async fn differences_between_databases_are_seen() {
    let site = Site::shared().await;
    let database = site.database("differences").await;
    site.replica.create_database(&database.name).await;
    let (source, replica) = (database.source().await, database.replica().await);
    let schema = "CREATE TABLE \"Größe\" (id int, \"Wert\" float8, PRIMARY KEY (id)); CREATE TABLE bag (a text);
        CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES;
        INSERT INTO \"Größe\" VALUES (1, 'NaN'), (2, NULL); INSERT INTO bag VALUES ('x'), ('x'), ('y')";
    source.run(schema).await;
    replica.run(schema).await;
    expect_same_content(&source, &replica).await;
    // As many rows, other duplicates: no count sees that.
    replica
        .run("UPDATE bag SET a = 'y' WHERE ctid = (SELECT min(ctid) FROM bag)")
        .await;
    let text = differences(&source, &replica, &[]).await;
    assert!(
        text.contains("public.bag: 3 rows on the source, 3 on the replica"),
        "{text}"
    );
    assert!(text.contains("source only, 2 times: (x)"), "{text}");
    assert!(!text.contains("Größe"), "{text}");
    replica
        .run("DROP TABLE nothing; CREATE TABLE more (a int)")
        .await;
    let text = differences(&source, &replica, &["public.bag"]).await;
    assert!(
        text.contains("public.nothing is on the source only"),
        "{text}"
    );
    assert!(
        text.contains("public.more is on the replica only"),
        "{text}"
    );
    assert!(!text.contains("bag"), "{text}");
}

#[tokio::test]
async fn a_cut_network_breaks_sessions_through_the_proxy_only() {
    let site = Site::shared().await;
    let proxy = Proxy::start(site.source.port()).await;
    let far = Client::connect(&site.source.url_through(proxy.port(), "postgres")).await;
    let near = Client::connect(&site.source.socket_url("postgres")).await;
    assert!(far.holds("SELECT true").await);
    proxy.cut();
    wait_until("the session to break", PATIENCE, || async {
        far.try_run("SELECT 1").await.is_err()
    })
    .await;
    assert!(near.holds("SELECT true").await);
}

#[tokio::test]
async fn a_restored_backup_is_the_source_as_of_one_commit() {
    let options = ServerOptions::source().set("wal_keep_size", "512MB");
    let source = options.start().await;
    let client = source.client("postgres").await;
    Workload::create_tables(&client).await;
    let backup = Backup::take(&source).await;
    let workload = Workload::start(&source.url("postgres"), seed(), 3);
    wait_until("300 transactions", PATIENCE, || async {
        workload.committed() >= 300
    })
    .await;
    let lsn = client
        .value("SELECT pg_current_wal_flush_lsn()")
        .await
        .unwrap();
    let before = client.number("SELECT count(*) FROM ledger").await;
    let tally = workload.stop().await;
    assert_eq!(
        client.number("SELECT count(*) FROM ledger").await,
        tally.committed as i64
    );
    assert!(client.holds(BALANCED).await);
    assert_eq!(
        client
            .number("SELECT count(*) FROM pg_prepared_xacts")
            .await,
        0
    );
    let restored = backup.restore_to(&lsn).await;
    let then = restored.client("postgres").await;
    let rows = then.number("SELECT count(*) FROM ledger").await;
    assert!(rows >= 250 && rows <= before, "{rows} of {before}");
    assert!(then.holds(BALANCED).await);
    assert!(tally.rolled_back > 0);
}
