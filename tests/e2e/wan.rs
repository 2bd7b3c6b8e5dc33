//! Goal: replication over a link between two sites: it keeps to its share of it, and distance breaks nothing.
//! Method: a bandwidth limit, told by the lower bound it sets on time; many sessions that wait for their share at once, some of
//! them given up, time and again; a proxy that delays every byte while batches, large ones on lanes among them, are in flight
//! and the link breaks.

use std::time::{Duration, Instant};

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::compare;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
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
    // The session that watches the replica asks meanwhile, on its own, and nobody waits for it.
    far.do_not_count("dr_agent:watch");
    // What is applied between the start and the look at it, which a loaded machine delays, can only add to the count.
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

/// The same beside the replica, where the source is not asked.
const ROUNDS_OF_APPLY_MAX: u64 = 14;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_begins_within_fourteen_round_trips() {
    let site = Site::own().await;
    let database = site.database("rounds_apply").await;
    let fill = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'one')";
    database.source().await.run(fill).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let mut route = Route::new(database, kinesalite.port(), None);
    let (running, applying) = route.start().await;
    applying.stop().await;
    let far = Proxy::start(site.replica.port()).await;
    far.delay(Duration::from_millis(100));
    far.do_not_count("dr_agent:watch");
    let through = site.replica.url_through(far.port(), "postgres");
    let through = format!("\"{through}\"");
    route.applier.configure("replica.url", &through);
    let applying = route.apply(&[]);
    applying.wait_for_streaming(&route.database.name).await;
    let rounds = far.rounds();
    eprintln!("{rounds} round trips");
    assert!(rounds <= ROUNDS_OF_APPLY_MAX, "{rounds} round trips");
    route.database.expect_equal().await;
    applying.stop().await;
    running.stop().await;
}

/// Tables with two indexes and a foreign key each. `DR_AGENT_TEST_TABLES=300` to measure.
const TABLES: usize = 40;

/// What a copy of this schema may take, one round trip after the other: some for each table's rows, on four sessions; none for
/// a statement of the schema.
fn rounds_of_a_copy(tables: usize) -> u64 {
    120 + 2 * tables as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_statement_of_the_schema_waits_for_the_one_before() {
    let tables = std::env::var("DR_AGENT_TEST_TABLES").map_or(TABLES, |n| n.parse().unwrap());
    let site = Site::own().await;
    let database = site.database("schema").await;
    let source = database.source().await;
    let each = (0..tables).map(|n| {
        let before = n.saturating_sub(1);
        format!(
            "CREATE TABLE t{n} (id int PRIMARY KEY, v text, w int REFERENCES t{before});
             CREATE INDEX ON t{n} (v); CREATE INDEX ON t{n} (w);
             COMMENT ON INDEX t{n}_v_idx IS 'of v';
             INSERT INTO t{n} VALUES (1, 'one', 1);"
        )
    });
    source.run(&each.collect::<String>()).await;
    let far = Proxy::start(site.replica.port()).await;
    far.delay(Duration::from_millis(40));
    far.do_not_count("dr_agent:watch");
    let mut agent = database.agent();
    let through = site.replica.url_through(far.port(), "postgres");
    agent.configure("replica.url", &format!("\"{through}\""));
    let started = Instant::now();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let (rounds, took) = (far.rounds(), started.elapsed());
    eprintln!("{tables} tables: {rounds} round trips, {took:?}");
    far.heal();
    database.expect_equal().await;
    let there = "SELECT (SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND connamespace = 'public'::regnamespace AND convalidated)
                      + (SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
                          WHERE c.relnamespace = 'public'::regnamespace AND i.indisvalid)
                      + (SELECT count(*) FROM pg_description WHERE description = 'of v')";
    let built = database.replica().await.number(there).await;
    assert_eq!(built, i64::try_from(5 * tables).unwrap());
    running.stop().await;
    assert!(rounds <= rounds_of_a_copy(tables), "{rounds} round trips");
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
