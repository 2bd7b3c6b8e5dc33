//! Goal: `init` does the privileged part once and can be repeated; `--plan` only says what it would do.
//! Method: looks for what appears on both servers, then lets `run` go on from there.

use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;

#[tokio::test]
async fn a_plan_prints_sql_and_init_does_it_once() {
    let site = Site::shared().await;
    let database = site.database("init").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await;
    let agent = database.agent();
    let plan = agent.command(&["init", "--plan"]).await;
    plan.expect_code(0).expect_words(&["create", "publication"]);
    assert!(
        source
            .holds("SELECT to_regnamespace('dr_agent') IS NULL")
            .await,
        "a plan touches nothing"
    );
    assert!(
        Client::try_connect(&site.replica.url(&database.name))
            .await
            .is_err()
    );

    agent.command(&["init"]).await.expect_code(0);
    agent.command(&["init"]).await.expect_code(0);
    let published = format!(
        "SELECT count(*) FROM pg_publication_tables WHERE pubname = '{}'",
        database.stream()
    );
    assert_eq!(
        source.number(&published).await,
        9,
        "the table, the heartbeat, the sequences, what is listed, the coverage, the clock, the commands, the fingerprint and its time"
    );
    assert_eq!(
        source
            .number("SELECT count(*) FROM pg_publication WHERE puballtables")
            .await,
        0
    );
    let slots = format!(
        "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    );
    assert_eq!(
        source.number(&slots).await,
        0,
        "init creates no slot: nothing would consume it"
    );
    assert!(
        database
            .replica()
            .await
            .holds("SELECT to_regclass('dr_agent.progress') IS NOT NULL")
            .await
    );

    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO t VALUES (2)").await;
    database.expect_equal().await;
    running.stop().await;
}
