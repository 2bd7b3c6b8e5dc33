//! Goal: promise 4: after a promotion no older agent changes the replica; it exits with code 3.
//! Method: promotes while the agent runs, is frozen in the middle of a batch, or is down; then compares the
//! replica before and after the agent had its chance.

use dr_agent_tests::client::{Client, Row};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 10) AS g";

/// Everything an agent could change.
async fn state_of(replica: &Client) -> Vec<Row> {
    replica
        .rows(
            "SELECT stream, term, batch, end_lsn, applied_at, (SELECT beat FROM dr_agent.heartbeat),
                    (SELECT count(*) FROM t), (SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM t)
             FROM dr_agent.progress",
        )
        .await
}

async fn expect_fenced(
    database: &Database,
    replica: &Client,
    running: &mut dr_agent_tests::agent::Running,
) {
    let before = state_of(replica).await;
    running.expect_exit(3).await;
    assert_eq!(
        state_of(replica).await,
        before,
        "a fenced agent changed {}",
        database.name
    );
}

#[tokio::test]
async fn an_agent_that_runs_during_the_promotion_or_comes_back_after_it_changes_nothing() {
    let site = Site::shared().await;
    let database = site.database("fencing").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let (agent, mut running) = database.replicate().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let replica = database.replica().await;
    // Something to apply, for an agent that would.
    source
        .run("INSERT INTO t VALUES (100, 'too late'); DELETE FROM t WHERE id = 1")
        .await;
    expect_fenced(&database, &replica, &mut running).await;
    // The application writes here now.
    replica
        .run("INSERT INTO t VALUES (7000, 'new primary'); UPDATE t SET v = 'changed' WHERE id = 2")
        .await;
    for _ in 0..2 {
        let mut again = agent.start();
        expect_fenced(&database, &replica, &mut again).await;
    }
    let guard = agent.command(&["run"]).await;
    guard.expect_code(3).expect_words(&["promoted"]);
    assert_eq!(replica.number("SELECT count(*) FROM t").await, 11);
}

#[tokio::test]
async fn an_agent_frozen_in_the_middle_of_a_batch_cannot_finish_it_after_the_promotion() {
    frozen(1).await;
}

#[tokio::test]
async fn nor_can_one_frozen_with_four_lanes() {
    frozen(4).await;
}

async fn frozen(lanes: u16) {
    let site = Site::own().await;
    let database = site.database("frozen").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let mut agent = database.agent();
    agent.configure("replica.lanes", &lanes.to_string());
    agent.configure("limits.spread_changes", "2");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;

    // The batch hangs on a lock, after it has taken its progress row.
    let holder = database.writable_replica().await;
    holder.run("BEGIN").await;
    holder.run("LOCK TABLE t IN ACCESS EXCLUSIVE MODE").await;
    source
        .run("INSERT INTO t SELECT g, 'late' FROM generate_series(1000, 21000) AS g")
        .await;
    let observer = site.replica.client("postgres").await;
    wait_until("the batch to hang on the lock", PATIENCE, || {
        observer.holds(
            "SELECT count(*) > 0 FROM pg_stat_activity
              WHERE application_name LIKE 'dr_agent:apply:%' AND wait_event_type = 'Lock'",
        )
    })
    .await;
    running.pause();

    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    holder.run("ROLLBACK").await;
    let replica = database.replica().await;
    assert_eq!(
        replica.number("SELECT count(*) FROM t").await,
        10,
        "the batch was half done"
    );
    running.resume();
    expect_fenced(&database, &replica, &mut running).await;
    assert_eq!(replica.number("SELECT count(*) FROM t").await, 10);
}

#[tokio::test]
async fn an_agent_that_sleeps_through_the_promotion_is_fenced_when_it_wakes_up() {
    let site = Site::own().await;
    let database = site.database("asleep").await;
    let source = database.source().await;
    source.run(TABLE).await;
    let (agent, mut running) = database.replicate().await;
    database.wait_caught_up().await;
    running.pause();
    source
        .run("INSERT INTO t SELECT g, 'late' FROM generate_series(1000, 5000) AS g")
        .await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let replica = database.replica().await;
    replica
        .run("INSERT INTO t VALUES (1000, 'new primary')")
        .await;
    running.resume();
    expect_fenced(&database, &replica, &mut running).await;
    assert_eq!(replica.number("SELECT count(*) FROM t").await, 11);
}
