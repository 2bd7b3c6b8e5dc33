//! Goal: replication over a link between two sites: it keeps to its share of it, and distance breaks nothing.
//! Method: a bandwidth limit, told by the lower bound it sets on time; a proxy that delays every byte while
//! batches, large ones on lanes among them, are in flight and the link breaks.

use std::time::{Duration, Instant};

use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::site::Site;
use dr_agent_tests::workload::{BALANCED, Workload, seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_to_the_replica_stays_within_the_bandwidth() {
    let site = Site::shared().await;
    let database = site.database("bandwidth").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let mut agent = database.agent();
    agent.configure("replica.bandwidth", "\"1MiB\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    let started = Instant::now();
    // Some 3 MiB of values, which travel as they are.
    source
        .run("INSERT INTO t SELECT g, repeat(md5(g::text), 32) FROM generate_series(1, 3000) AS g")
        .await;
    database.wait_caught_up().await;
    let took = started.elapsed();
    assert!(took > Duration::from_secs(2), "3 MiB within {took:?}");
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_in_flight_over_a_long_line_survive_its_breaking() {
    let seed = seed();
    let site = Site::own().await;
    let database = site.database("far").await;
    let source = database.source().await;
    Workload::create_tables(&source).await;
    let far = Proxy::start(site.replica.port()).await;
    let mut agent = database.agent();
    let through = site.replica.url_through(far.port(), "postgres");
    agent.configure("replica.url", &format!("\"{through}\""));
    agent.configure("limits.batch_changes", "500");
    agent.configure("limits.spread_changes", "50");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    far.delay(Duration::from_millis(40));
    let workload = Workload::start(&database.source_url(), seed, 3);
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        far.cut();
        far.heal();
        far.delay(Duration::from_millis(40));
    }
    let tally = workload.stop().await;
    far.heal();
    database.expect_equal().await;
    let replica = database.replica().await;
    assert!(replica.holds(BALANCED).await);
    let applied = replica.number("SELECT count(*) FROM ledger").await;
    assert_eq!(applied, i64::try_from(tally.committed).unwrap());
    running.stop().await;
}
