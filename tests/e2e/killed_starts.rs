//! Goal: promise 8 for a start: killed again and again, sooner than it takes, it gets on, and harms nobody.
//! Method: `run` is killed with SIGKILL at a fixed pace, half as long as a first start takes here; what was done stays done
//! (slot, schema, tables copied), nothing is left over, and left alone it is there. One is killed at the worst moment, between
//! slot and progress row.

use std::time::{Duration, Instant};

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// Far more than it needs: every step is shorter than the pace, but the machine may be busy.
const ROUNDS_MAX: usize = 60;

async fn create_tables(database: &Database) {
    let source = database.source().await;
    source
        .run(
            "DO $$ BEGIN FOR n IN 1..40 LOOP
                 EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY, v text)', n);
                 EXECUTE format('INSERT INTO t%s SELECT g, ''v'' || g FROM generate_series(1, 300) g', n);
             END LOOP; END $$",
        )
        .await;
}

/// Starts it and kills it after `pace`.
async fn start_and_kill(agent: &Agent, pace: Duration) {
    let mut running = agent.start();
    tokio::time::sleep(pace).await;
    running.kill_alive();
}

/// How many tables hold their rows, and of how many the ledger knows that they are not there yet.
async fn copied(database: &Database) -> (i64, i64) {
    const SQL: &str = "SELECT count(*) FILTER (WHERE state IN ('copied', 'ready'))::text,
                              count(*) FILTER (WHERE state <> 'ready')::text FROM dr_agent.table_sync";
    let Ok(replica) = Client::try_connect(&database.replica_url()).await else {
        return (0, 0);
    };
    let Ok(rows) = replica.try_rows(SQL).await else {
        return (0, 0);
    };
    let number = |at: usize| rows[0][at].as_deref().unwrap().parse().unwrap();
    (number(0), number(1))
}

/// Nothing of an agent is on the source but its slot.
async fn expect_nothing_left_over(site: &Site) {
    let source = site.source.client("postgres").await;
    wait_until("temporary slots to be gone", PATIENCE, || async {
        source
            .holds("SELECT count(*) = 0 FROM pg_replication_slots WHERE temporary")
            .await
    })
    .await;
    let replica = site.replica.client("postgres").await;
    assert!(
        replica
            .holds("SELECT count(*) = 0 FROM pg_prepared_xacts")
            .await
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_is_killed_sooner_than_it_takes_gets_there() {
    let site = Site::own().await;
    let measured = site.database("measured").await;
    create_tables(&measured).await;
    let began = Instant::now();
    let (_agent, running) = measured.replicate().await;
    let pace = (began.elapsed() / 2).max(Duration::from_millis(300));
    running.stop().await;

    let database = site.database("killed").await;
    create_tables(&database).await;
    let agent = database.agent();
    let (mut before, mut rounds) = (0, 0);
    loop {
        start_and_kill(&agent, pace).await;
        let (held, left) = copied(&database).await;
        assert!(held >= before, "{before} tables were copied, now {held}");
        if held > 0 && left == 0 {
            break;
        }
        (before, rounds) = (held, rounds + 1);
        assert!(rounds < ROUNDS_MAX, "{held} tables after {rounds} rounds");
    }

    // A start without a copy gets on as well.
    let (source, replica) = (database.source().await, database.replica().await);
    let applied = "SELECT max(id) FROM t1";
    for id in 1001..ROUNDS_MAX + 1001 {
        source
            .run(&format!("INSERT INTO t1 VALUES ({id}, 'while killed')"))
            .await;
        start_and_kill(&agent, pace).await;
        if replica.number(applied).await > 1000 {
            break;
        }
    }
    assert!(replica.number(applied).await > 1000);

    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    expect_nothing_left_over(&site).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_killed_between_slot_and_progress_goes_on_with_its_slot() {
    let site = Site::own().await;
    let database = site.database("slotted").await;
    create_tables(&database).await;
    let agent = database.agent();
    let mut running = agent.start_with(&[("DR_AGENT_FAILPOINT", "setup:slot-created")]);
    running.expect_death_by_signal().await;
    let source = database.source().await;
    let history = "SELECT began || ' ' || since FROM dr_agent.sending";
    let begun = source.value(history).await;
    assert!(begun.is_some());

    // What happens before the next start is in its copy, and comes from the slot as well.
    source
        .run(
            "CREATE TABLE late (id int PRIMARY KEY); INSERT INTO late VALUES (1);
             INSERT INTO t1 VALUES (1000, 'x'); ALTER TABLE t1 ADD COLUMN w int DEFAULT 7;
             UPDATE t1 SET w = id; TRUNCATE t2; INSERT INTO t2 VALUES (1, 'again'); DROP TABLE t3",
        )
        .await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO t1 VALUES (1001, 'y', 8)").await;
    database.expect_equal().await;
    assert_eq!(source.value(history).await, begun);
    running.expect_quiet_log();
    running.stop().await;

    // Without its publication it would not decode: begun anew.
    let other = site.database("unpublished").await;
    create_tables(&other).await;
    let agent = other.agent();
    let mut running = agent.start_with(&[("DR_AGENT_FAILPOINT", "setup:slot-created")]);
    running.expect_death_by_signal().await;
    let source = other.source().await;
    let begun = source.value(history).await;
    source
        .run(&format!(
            "DROP PUBLICATION \"{}\"; INSERT INTO t1 VALUES (1000, 'x')",
            other.stream()
        ))
        .await;
    let running = agent.start();
    running.wait_for_streaming(&other.name).await;
    other.expect_equal().await;
    assert_ne!(source.value(history).await, begun);
    running.stop().await;
    expect_nothing_left_over(&site).await;
}
