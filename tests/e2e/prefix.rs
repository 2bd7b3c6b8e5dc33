//! Goal: promise 1: a promoted replica equals the source as of one commit LSN, the one in its progress row.
//! Method: promotes at a random moment of a random workload; a base backup of the source is recovered by
//! PostgreSQL itself to that LSN and compared with the replica, table by table, by full content.

use dr_agent_tests::backup::Backup;
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_equals_the_source_as_of_one_commit() {
    prefix(true, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_with_four_lanes_equals_the_source_as_of_one_commit() {
    prefix(true, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_promoted_under_a_running_agent_equals_the_source_as_of_one_commit() {
    prefix(false, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_promoted_under_a_running_agent_with_four_lanes_does_as_well() {
    prefix(false, 4).await;
}

async fn prefix(agent_dies_first: bool, lanes: u16) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let source = ServerOptions::source().set("wal_keep_size", "2GB");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("prefix").await;
    let source = database.source().await;
    Workload::create_tables(&source).await;
    let backup = Backup::take(&site.source).await;
    let mut agent = database.agent();
    agent.configure("limits.batch_changes", "200");
    agent.configure("replica.lanes", &lanes.to_string());
    agent.configure("limits.spread_changes", "2");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.replica().await;

    let workload = Workload::start(&database.source_url(), seed, 4);
    let enough = rng.random_range(100..1500);
    wait_until(
        "a random number of transactions to arrive",
        5 * PATIENCE,
        || async { replica.number("SELECT count(*) FROM ledger").await >= enough },
    )
    .await;
    if agent_dies_first {
        running.kill();
    }
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    if !agent_dies_first {
        running.expect_exit(3).await;
    }
    let tally = workload.stop().await;

    let end_lsn = replica
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();
    assert_eq!(outcome.json()["databases"][0]["end_lsn"], end_lsn.as_str());
    let restored = backup.restore_to(&end_lsn).await;
    let then = restored.client(&database.name).await;
    expect_same_content(&then, &replica).await;
    assert!(replica.holds(BALANCED).await);
    let applied = replica.number("SELECT count(*) FROM ledger").await;
    let committed = i64::try_from(tally.committed).unwrap();
    assert!(
        applied >= enough && applied <= committed,
        "{applied} of {committed}"
    );

    // It is a primary now: the application goes on, and no sequence gives a value twice.
    let primary = database.replica().await;
    primary
        .run(
            "INSERT INTO ledger (session) SELECT -1 FROM generate_series(1, 100);
             INSERT INTO parent (name) SELECT 'after' FROM generate_series(1, 100);
             INSERT INTO child (parent) SELECT id FROM parent WHERE name = 'after'",
        )
        .await;
}
