//! Goal: promises 1, 2, 3 and 7: nothing lost, nothing doubled, whenever the agent dies.
//! Method: random concurrent transactions on the source while the agent is killed with SIGKILL at random
//! moments, the initial copy included; afterwards every table is equal and the ledger counts agree.

use std::time::Duration;

use dr_agent_tests::site::Site;
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// How often the agent is killed.
const KILLS: u32 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_when_the_agent_is_killed_at_random_moments() {
    oracle(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_with_four_lanes_either() {
    oracle(4).await;
}

async fn oracle(lanes: u16) {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let site = Site::own().await;
    let database = site.database("oracle").await;
    let source = database.source().await;
    Workload::create_tables(&source).await;
    let mut agent = database.agent();
    // Small limits: many batches, and transactions that continue in spill files.
    agent.configure("limits.batch_changes", "300");
    agent.configure("replica.lanes", &lanes.to_string());
    agent.configure("limits.spread_changes", "2");
    agent.configure("limits.transaction_bytes", "\"64KiB\"");
    agent.configure("limits.queue_bytes", "\"1MiB\"");
    // Every start with several lanes has a backlog that is read in windows, unless the agent died too early.
    if lanes > 1 {
        agent.configure("limits.catch_up_bytes", "\"32KiB\"");
    }

    let workload = Workload::start(&database.source_url(), seed, 4);
    workload.wait_for_committed(50).await;
    let mut running = agent.start();
    for kill in 0..KILLS {
        // The random moment: between the start of the process and well into streaming. Twice it
        // certainly streams first, however slow the machine.
        if kill % 3 == 2 {
            running.wait_for_streaming(&database.name).await;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(10..2500))).await;
        running.kill();
        running = agent.start();
    }
    workload.wait_for_committed(500).await;
    let tally = workload.stop().await;
    eprintln!("{tally:?} with {KILLS} kills");
    // A tenth is rolled back on purpose.
    assert!(tally.rolled_back > tally.committed / 20, "{tally:?}");

    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    let replica = database.replica().await;
    let count = "SELECT count(*) FROM ledger";
    assert_eq!(
        source.number(count).await,
        i64::try_from(tally.committed).unwrap()
    );
    assert_eq!(
        replica.number(count).await,
        i64::try_from(tally.committed).unwrap()
    );
    assert!(replica.holds(BALANCED).await);
    // Promise 3: the slot is never ahead of what is durable here.
    let confirmed = source
        .value(&format!(
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'",
            database.stream()
        ))
        .await
        .unwrap();
    let durable = format!("SELECT end_lsn >= '{confirmed}' FROM dr_agent.progress");
    assert!(
        replica.holds(&durable).await,
        "the slot confirmed {confirmed}"
    );
    let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'dr\\_agent:%'";
    assert_eq!(replica.number(prepared).await, 0);
    let labels = [("database", database.name.as_str())];
    let metrics = running.metrics().await;
    let spread = metrics.value("dr_agent_spread_batches_total", &labels);
    assert_eq!(spread.unwrap_or(0.0) > 0.0, lanes > 1, "{spread:?}");
    running.expect_quiet_log();
    running.stop().await;
}
