//! Goal: promises 1, 2, 3 and 7 under route `kinesis`: nothing lost, nothing doubled, nothing confirmed too early, whichever side
//! dies and whatever Kinesis and the network do to single calls.
//! Method: random concurrent transactions while `run` and `apply` are killed in turn at random moments and random calls fail in
//! part, as a whole or after the fact; calls that are held or refused for ever while the slot is watched; a batch of which the
//! stream has some parts and not all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dr_agent::cloud::kinesis::Kinesis;
use dr_agent_tests::agent::{Running, line_with};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Fault, KinesisProxy};
use dr_agent_tests::records;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// How often one side or the other is killed.
const KILLS: u32 = 8;

const THROTTLED: &str = "ProvisionedThroughputExceededException";

async fn route(site: &Site, purpose: &str, shards: u32) -> (Kinesalite, Arc<KinesisProxy>, Route) {
    let database = site.database(purpose).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, shards).await;
    let proxy = Arc::new(KinesisProxy::start(kinesalite.port()).await);
    let route = Route::new(database, proxy.port(), None);
    (kinesalite, proxy, route)
}

async fn kinesis(kinesalite: &Kinesalite) -> Kinesis {
    Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap()
}

/// Spoils a call now and then.
fn a_bad_day(proxy: &Arc<KinesisProxy>, seed: u64, over: &Arc<AtomicBool>) {
    let (proxy, over) = (Arc::clone(proxy), Arc::clone(over));
    tokio::spawn(async move {
        let mut rng = StdRng::seed_from_u64(seed);
        while !over.load(Ordering::Relaxed) {
            let (operation, fault) = match rng.random_range(0..8) {
                0 | 1 => (
                    "PutRecords",
                    Fault::RefuseRecords(|n| n % 2 == 0, THROTTLED),
                ),
                2 => ("PutRecords", Fault::LoseAnswer),
                3 => ("PutRecords", Fault::Cut),
                4 => ("PutRecords", Fault::Refuse(500, "InternalFailure")),
                5 => ("GetRecords", Fault::LoseAnswer),
                6 => ("GetRecords", Fault::Cut),
                _ => ("GetRecords", Fault::Refuse(400, "ExpiredIteratorException")),
            };
            proxy.spoil(operation, fault);
            tokio::time::sleep(Duration::from_millis(rng.random_range(50..400))).await;
        }
        proxy.heal();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_whichever_side_is_killed_while_calls_fail() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let site = Site::own().await;
    let (kinesalite, proxy, mut route) = route(&site, "oracle", 3).await;
    let source = route.database.source().await;
    Workload::create_tables(&source).await;
    // Small limits: many batches, and transactions that continue in spill files.
    for side in [&mut route.sender, &mut route.applier] {
        side.configure("limits.batch_changes", "300");
        side.configure("replica.lanes", "4");
        side.configure("limits.spread_changes", "2");
        side.configure("limits.transaction_bytes", "\"64KiB\"");
        side.configure("limits.queue_bytes", "\"1MiB\"");
        side.configure("limits.catch_up_bytes", "\"64KiB\"");
    }
    let (mut running, mut applying) = route.start().await;
    let over = Arc::new(AtomicBool::new(false));
    a_bad_day(&proxy, seed, &over);
    let workload = Workload::start(&route.database.source_url(), seed, 4);
    workload.wait_for_committed(50).await;
    for kill in 0..KILLS {
        // Between the start of the process and well into streaming. Twice of each side it certainly streams first.
        let side = match kill % 2 {
            0 => &mut running,
            _ => &mut applying,
        };
        if kill % 4 < 2 {
            side.wait_for_streaming(&route.database.name).await;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(10..1200))).await;
        side.kill_alive();
        *side = match kill % 2 {
            0 => route.run(&[]),
            _ => route.apply(&[]),
        };
    }
    workload.wait_for_committed(300).await;
    let tally = workload.stop().await;
    eprintln!("{tally:?} with {KILLS} kills");
    // A tenth is rolled back on purpose.
    assert!(tally.rolled_back > tally.committed / 20, "{tally:?}");
    over.store(true, Ordering::Relaxed);
    route.database.expect_equal().await;
    let replica = route.database.replica().await;
    let count = "SELECT count(*) FROM ledger";
    let committed = i64::try_from(tally.committed).unwrap();
    assert_eq!(source.number(count).await, committed);
    assert_eq!(replica.number(count).await, committed);
    assert!(replica.holds(BALANCED).await);
    let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'dr\\_agent:%'";
    assert_eq!(replica.number(prepared).await, 0);
    let labels = [("database", route.database.name.as_str())];
    let spread = applying.metrics().await;
    let spread = spread.value("dr_agent_spread_batches_total", &labels);
    assert!(spread > Some(0.0), "{spread:?}");
    // Promise 3: the slot is never ahead of what the stream has in whole batches.
    let confirmed = route.slot("confirmed_flush_lsn");
    let confirmed = source.value(&confirmed).await.unwrap();
    let confirmed: u64 = confirmed.parse::<dr_agent::pg::PgLsn>().unwrap().into();
    let parts = records::parts(&kinesis(&kinesalite).await).await;
    let whole = records::batches(&parts);
    let accepted = parts.iter().filter(|part| {
        let (there, total) = &whole[&(part.writer, part.batch)];
        *total == Some(there.len() as u32)
    });
    let accepted = accepted.map(|part| part.end_lsn).max().unwrap();
    assert!(confirmed <= accepted, "{confirmed} {accepted}");
    applying.expect_quiet_log();
    running.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

/// Writes what Kinesis does not take, and waits until the source has been told more than once how far everything is durable.
async fn nothing_is_confirmed_that_was_not_accepted(
    purpose: &str,
    sql: &str,
    spoil: impl FnOnce(&KinesisProxy),
) {
    let site = Site::shared().await;
    let (_kinesalite, proxy, route) = route(&site, purpose, 2).await;
    let source = route.database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let (mut running, applying) = route.start().await;
    route.database.wait_caught_up().await;
    spoil(&proxy);
    let calls = proxy.calls("PutRecords").len();
    source.run(sql).await;
    let written = source.value("SELECT pg_current_wal_lsn()").await.unwrap();
    let at = source.value("SELECT clock_timestamp()").await.unwrap();
    let told = format!(
        "SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name LIKE 'dr\\_agent:stream:%'
            AND application_name LIKE '%{}%' AND reply_time > '{at}'::timestamptz + interval '6 s'",
        route.database.name
    );
    wait_until("the slot to be told twice", PATIENCE, || async {
        source.holds(&told).await
    })
    .await;
    // It was tried.
    assert!(proxy.calls("PutRecords").len() > calls);
    let early = route.slot(&format!("confirmed_flush_lsn < '{written}'"));
    assert!(source.holds(&early).await);
    let nothing = "SELECT count(*) FROM t";
    assert_eq!(route.database.replica().await.number(nothing).await, 0);
    running.kill_alive();
    assert!(source.holds(&early).await);
    proxy.hold_puts(false);
    proxy.heal();
    let running = route.run(&[]);
    route.database.expect_equal().await;
    assert!(source.number(nothing).await > 0);
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_while_its_call_is_on_its_way() {
    let sql = "INSERT INTO t VALUES (1, 'on its way')";
    nothing_is_confirmed_that_was_not_accepted("underway", sql, |proxy| proxy.hold_puts(true))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_while_one_of_its_records_is_refused() {
    // Several records, of which the first of every call is refused, and so for ever.
    let sql = "INSERT INTO t SELECT g, (SELECT string_agg(md5(random()::text || g || i), '') FROM generate_series(1, 3000) AS i)
                 FROM generate_series(1, 60) AS g";
    nothing_is_confirmed_that_was_not_accepted("refused", sql, |proxy| {
        proxy.spoil_every(
            "PutRecords",
            Some(Fault::RefuseRecords(|n| n == 0, THROTTLED)),
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_batch_in_the_stream_is_never_applied_and_holds_nothing_up() {
    let site = Site::own().await;
    let (kinesalite, _proxy, route) = route(&site, "half", 2).await;
    let source = route.database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v bytea)")
        .await;
    let (running, applying) = route.start().await;
    running.stop().await;
    let mut armed = route.run(&[("DR_AGENT_FAILPOINT", "kinesis:part-put")]);
    armed.wait_for_streaming(&route.database.name).await;
    // More than is put at a time, and it does not compress.
    source
        .run(
            "INSERT INTO t SELECT g, (SELECT string_agg(decode(md5(random()::text || g || i), 'hex'), '')
                                        FROM generate_series(1, 4096) AS i)
               FROM generate_series(1, 240) AS g",
        )
        .await;
    armed.expect_death_by_signal().await;
    let kinesis = kinesis(&kinesalite).await;
    let half = |batches: &std::collections::BTreeMap<_, (Vec<u32>, Option<u32>)>| {
        let half = batches
            .values()
            .filter(|(there, total)| *total != Some(there.len() as u32));
        half.map(|(there, _)| there.len()).collect::<Vec<usize>>()
    };
    // What was on its way when the agent died may still arrive.
    let mut there = Vec::new();
    loop {
        let now = half(&records::batches(&records::parts(&kinesis).await));
        if now == there {
            break;
        }
        there = now;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(there.len() == 1 && there[0] >= 2, "{there:?}");
    wait_for_waiting(&applying, &route).await;
    let count = "SELECT count(*) FROM t";
    let replica = route.database.replica().await;
    assert_eq!(replica.number(count).await, 0);
    // Who reads it for the first time makes no more of it.
    let mut applying = applying;
    applying.kill_alive();
    let applying = route.apply(&[]);
    wait_for_waiting(&applying, &route).await;
    assert_eq!(replica.number(count).await, 0);
    let running = route.run(&[]);
    route.database.expect_equal().await;
    assert_eq!(replica.number(count).await, 240);
    assert_eq!(
        half(&records::batches(&records::parts(&kinesis).await)),
        there
    );
    // Its room was given back.
    let labels = [("database", route.database.name.as_str())];
    applying
        .wait_for_metric("dr_agent_stream_waiting_bytes", &labels, |bytes| {
            bytes == 0.0
        })
        .await;
    applying.expect_quiet_log();
    assert!(line_with(&applying.log(), &["missing"]).is_none());
    running.stop().await;
    applying.stop().await;
}

async fn wait_for_waiting(applying: &Running, route: &Route) {
    let labels = [("database", route.database.name.as_str())];
    applying
        .wait_for_metric("dr_agent_stream_waiting_bytes", &labels, |bytes| {
            bytes > 1e6
        })
        .await;
}
