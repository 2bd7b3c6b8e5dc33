//! Goal: replication over a link between two sites: it keeps to its share of it, and distance breaks nothing.
//! Method: a bandwidth limit, told by the lower bound it sets on time; many sessions that wait for their share at once, some of
//! them given up, time and again; a proxy that delays every byte while batches, large ones on lanes among them, are in flight
//! and the link breaks.

use std::time::{Duration, Instant};

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::compare;
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for};
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

/// Databases that share one bandwidth, and starts of an agent for them. `DR_AGENT_TEST_STARTS=50` for a soak.
const SHARING: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_databases_share_one_bandwidth_start_after_start() {
    let starts = std::env::var("DR_AGENT_TEST_STARTS").map_or(1, |starts| starts.parse().unwrap());
    let site = Site::own().await;
    for start in 0..starts {
        let names: Vec<String> = (0..SHARING).map(|n| format!("share_{start}_{n}")).collect();
        for name in &names {
            site.source.create_database(name).await;
            let fill = "CREATE TABLE t (id int PRIMARY KEY, v text);
                        INSERT INTO t SELECT g, repeat(md5(g::text), 16) FROM generate_series(1, 150) AS g";
            site.source.run(name, fill).await;
        }
        let listed: Vec<&str> = names.iter().map(String::as_str).collect();
        let config = AgentConfig::new(&site.source.url("postgres"), &site.replica.url("postgres"));
        let config = config.databases(&listed).slot(&format!("s{start}"));
        let agent = Agent::new(config.clone().set("replica.bandwidth", "\"1MiB\""));
        // Stopped while some still copy, and wait for their turn at that; the next start has the rest.
        let running = agent.start();
        running.wait_for_streaming(&names[3]).await;
        running.stop().await;
        let running = agent.start();
        for name in &names {
            running.wait_for_streaming(name).await;
        }
        for name in &names {
            let more =
                "INSERT INTO t SELECT g, repeat('x', 200) FROM generate_series(201, 400) AS g";
            site.source.run(name, more).await;
        }
        for name in &names {
            let (source, replica) =
                tokio::join!(site.source.client(name), site.replica.client(name));
            compare::expect_equal_when_caught_up(&source, &replica, &config.stream(name)).await;
        }
        running.stop().await;
        eprintln!("start {start} of {starts}");
        for name in &names {
            let postgres = site.source.client("postgres").await;
            let drop = format!("SELECT pg_drop_replication_slot('{}')", config.stream(name));
            // A walsender notices in its own time that nobody listens any more.
            wait_for("the slot to be dropped", PATIENCE, || {
                postgres.try_run(&drop)
            })
            .await;
            for server in [&site.source, &site.replica] {
                let drop = format!("DROP DATABASE {name} WITH (FORCE)");
                server.run("postgres", &drop).await;
            }
        }
    }
}

/// A session begins anew at every disturbance, and nothing is replicated meanwhile: over a distance only round trips count.
const ROUNDS_MAX: u64 = 12;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_begins_within_twelve_round_trips() {
    let site = Site::own().await;
    let database = site.database("rounds").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY REFERENCES t);
             CREATE ROLE app; ALTER TABLE t OWNER TO app",
        )
        .await;
    let far = Proxy::start(site.replica.port()).await;
    let mut agent = database.agent();
    let through = site.replica.url_through(far.port(), "postgres");
    agent.configure("replica.url", &format!("\"{through}\""));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    running.stop().await;
    far.delay(Duration::from_millis(100));
    // The session that watches the replica asks meanwhile, on its own: what it asks can only add to the count.
    let mut least = u64::MAX;
    for _ in 0..4 {
        let before = far.rounds();
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        least = least.min(far.rounds() - before);
        running.stop().await;
        if least <= ROUNDS_MAX {
            break;
        }
    }
    eprintln!("{least} round trips");
    assert!(least <= ROUNDS_MAX, "{least} round trips");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO t VALUES (1, 'one')").await;
    database.expect_equal().await;
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
