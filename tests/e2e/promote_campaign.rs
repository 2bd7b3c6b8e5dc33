//! Goal: promises 1 and 8 at the promotion: whatever dies, and whenever, what is opened equals the source as of one commit, and no
//! sequence gives a value again.
//! Method: rounds with a seed each. A random workload; source, agent, replica and the promotion itself are killed at random moments or
//! named points; the promotion is repeated until it ends. PostgreSQL recovers a base backup of the source to the LSN that the
//! report names, and every table is compared. `DR_AGENT_CAMPAIGN_ROUNDS` says how many rounds, `DR_AGENT_TEST_SEED` the first seed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use dr_agent_tests::agent::Agent;
use dr_agent_tests::backup::Backup;
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::sleep;

/// Where a promotion dies, beside random moments.
const POINTS: [&str; 9] = [
    "promote:fenced",
    "promote:quiet",
    "promote:settled",
    "promote:drained",
    "promote:loss_stated",
    "promote:sequences",
    "promote:finished",
    "promote:opened",
    "promote:hooks_run",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_a_promotion_opens_the_source_as_of_one_commit() {
    let rounds = std::env::var("DR_AGENT_CAMPAIGN_ROUNDS");
    let rounds: u64 = rounds.map_or(2, |text| text.parse().expect("a number of rounds"));
    let first = seed();
    for round in 0..rounds {
        let seed = first.wrapping_add(round);
        eprintln!("round {round}: DR_AGENT_TEST_SEED={seed}");
        Box::pin(one_round(seed)).await;
    }
}

/// Takes values of a sequence until the source is gone or it is told to stop.
fn take_values(client: Client, over: Arc<AtomicBool>) -> Arc<AtomicI64> {
    let given = Arc::new(AtomicI64::new(0));
    let highest = Arc::clone(&given);
    tokio::spawn(async move {
        while !over.load(Ordering::Relaxed) {
            // A value counts as given when somebody has seen it.
            let Ok(rows) = client
                .try_rows("SELECT nextval('given') FROM generate_series(1, 50)")
                .await
            else {
                return;
            };
            let last = rows.last().and_then(|row| row[0].as_ref()?.parse().ok());
            highest.fetch_max(last.unwrap_or(0), Ordering::Relaxed);
        }
    });
    given
}

/// Kills promotions at random moments and at named points.
async fn attempts(rng: &mut StdRng, site: &Site, agent: &Agent) {
    for _ in 0..rng.random_range(0..3) {
        if rng.random_bool(0.5) {
            let point = POINTS[rng.random_range(0..POINTS.len())];
            eprintln!("  promotion to die at {point}");
            let armed = [("DR_AGENT_FAILPOINT", point)];
            agent.command_with(&["promote", "--failover"], &armed).await;
        } else {
            let mut promoting = agent.spawn(&["promote", "--failover"], &[]);
            let moment = rng.random_range(0..700);
            sleep(Duration::from_millis(moment)).await;
            let replica_as_well = rng.random_bool(0.3);
            eprintln!(
                "  promotion killed after {moment} ms, the replica as well: {replica_as_well}"
            );
            if replica_as_well {
                site.replica.kill();
            }
            promoting.kill();
            if replica_as_well {
                site.replica.start_again().await;
            }
        }
    }
}

async fn one_round(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let source = ServerOptions::source().set("wal_keep_size", "2GB");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("campaign").await;
    let source = database.source().await;
    Workload::create_tables(&source).await;
    source.run("CREATE SEQUENCE given").await;
    let backup = Backup::take(&site.source).await;
    let mut agent = database.agent();
    agent.configure("limits.batch_changes", "200");
    agent.configure("replica.lanes", ["1", "4"][rng.random_range(0..2)]);
    agent.configure("limits.spread_changes", "2");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;

    let workload = Workload::start(&database.source_url(), seed, 4);
    let over = Arc::new(AtomicBool::new(false));
    let given = take_values(database.source().await, Arc::clone(&over));
    let enough = rng.random_range(50..600);
    let replica = database.replica().await;
    wait_until(
        "a random number of transactions to arrive",
        5 * PATIENCE,
        || async { replica.number("SELECT count(*) FROM ledger").await >= enough },
    )
    .await;
    if rng.random_bool(0.4) {
        eprintln!("  the replica crashes");
        site.replica.kill();
        site.replica.start_again().await;
    }
    let agent_dies = rng.random_bool(0.6);
    if agent_dies {
        eprintln!("  the agent dies");
        running.kill();
    }
    sleep(Duration::from_millis(rng.random_range(0..400))).await;
    // What a source gives out after it was asked, because nobody stops it, is beyond every promise.
    over.store(true, Ordering::Relaxed);
    let mut workload = Some(workload);
    if rng.random_bool(0.5) {
        eprintln!("  the source dies");
        workload.take().unwrap().stop().await;
        site.source.kill();
    }
    attempts(&mut rng, &site, &agent).await;
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    let highest = given.load(Ordering::Relaxed);
    if !agent_dies {
        running.expect_exit(3).await;
    }
    if let Some(workload) = workload {
        workload.stop().await;
    }

    let replica = database.replica().await;
    let end_lsn = replica.value("SELECT end_lsn FROM dr_agent.progress").await;
    let end_lsn = end_lsn.expect("it has a progress row");
    assert_eq!(outcome.json()["databases"][0]["end_lsn"], end_lsn.as_str());
    // Recovery stops before the record behind the LSN: there has to be one, and a crash may have come right behind the last commit.
    if !site.source.is_running() {
        site.source.start_again().await;
    }
    let restored = backup.restore_to(&end_lsn).await;
    let then = restored.client(&database.name).await;
    expect_same_content(&then, &replica).await;
    assert!(replica.holds(BALANCED).await);
    let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'dr\\_agent:%'";
    assert_eq!(replica.number(prepared).await, 0);
    let next = replica.number("SELECT nextval('given')").await;
    assert!(next > highest, "{next} comes again: {highest} was given");
    replica
        .run(
            "INSERT INTO ledger (session) SELECT -1 FROM generate_series(1, 100);
             INSERT INTO parent (name) SELECT 'after' FROM generate_series(1, 100)",
        )
        .await;
}
