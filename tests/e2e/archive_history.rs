//! Goal: any moment of a database that many sessions write to can be restored; and a transaction larger than the memory that a
//! restore may have.
//! Method: a random workload is stopped at the door of its commits at random moments, and its tables are digested; restores to
//! these moments, by position and by time, must have the same digests. The kernel tells a restore's peak.
//!
//! Restores go to the replica's server: with `DR_AGENT_PG_BIN_REPLICA` these tests, and those of the modules beside this
//! one, restore into another version.

use std::collections::BTreeMap;

use dr_agent_tests::agent::{Agent, Outcome};
use dr_agent_tests::archive::{agent, archive, first_base, restore, segments};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::{begin, digests, expect_same_content};
use dr_agent_tests::rundir::signal;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const MOMENTS: usize = 20;

/// What a restore with small limits may have in memory, whatever it restores.
const RESIDENT_BYTES_MAX: u64 = 128 << 20;

/// The source between two commits, with other transactions under way.
struct Moment {
    lsn: String,
    time: String,
    digests: BTreeMap<String, String>,
}

/// Every transaction of the workload writes to `ledger` before it commits, so whoever locks it stands between commits.
async fn between_commits(source: &Client) -> Moment {
    // The workload gives way, not we: it may wait for us while we wait for it.
    source.run("SET deadlock_timeout = '1min'").await;
    begin(source).await;
    source
        .run("LOCK TABLE public.ledger IN EXCLUSIVE MODE")
        .await;
    let row = source
        .rows("SELECT pg_current_wal_insert_lsn(), clock_timestamp() AT TIME ZONE 'UTC'")
        .await
        .remove(0);
    let digests = digests(source).await;
    source.run("COMMIT").await;
    Moment {
        lsn: row[0].clone().unwrap(),
        time: format!("{}Z", row[1].clone().unwrap().replace(' ', "T")),
        digests,
    }
}

/// The workload truncates tables; a base backup that meets that begins again.
async fn back_up(agent: &Agent) -> Outcome {
    for _ in 0..20 {
        let outcome = agent.command(&["backup"]).await;
        if outcome.code == Some(0) {
            return outcome;
        }
        eprintln!("{}", outcome.text());
    }
    panic!("twenty base backups in a row were disturbed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_random_moments_of_a_random_workload_can_be_restored() {
    let site = Site::own().await;
    let database = site.database("history").await;
    let (archive, source) = (archive(), database.source().await);
    Workload::create_tables(&source).await;
    let agent = agent(&database, &archive);
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let workload = Workload::start(&database.source_url(), seed, 3);
    let mut moments = Vec::new();
    for number in 0..MOMENTS {
        let until = workload.committed() + random.random_range(1..60);
        wait_until("more transactions", PATIENCE, || async {
            workload.committed() >= until
        })
        .await;
        moments.push(between_commits(&source).await);
        if number == MOMENTS / 3 {
            running.kill();
            running = agent.start();
            running.wait_for_streaming(&database.name).await;
        } else if number == MOMENTS / 2 {
            back_up(&agent).await;
        }
    }
    // What was under way at the last one comes, too.
    let until = workload.committed() + 20;
    wait_until("more transactions", PATIENCE, || async {
        workload.committed() >= until
    })
    .await;
    workload.stop().await;
    database.expect_equal().await;
    running.stop().await;
    assert!(segments(&archive).len() > 3);
    for (number, moment) in moments.iter().enumerate() {
        let name = format!("random_{number}");
        let to = match number % 2 {
            0 => ["--to-lsn", &moment.lsn],
            _ => ["--to-time", &moment.time],
        };
        restore(&database, &agent, &name, &to).await.expect_code(0);
        let restored = database.replica_server().client(&name).await;
        assert!(restored.holds(BALANCED).await, "{name}");
        begin(&restored).await;
        let found = digests(&restored).await;
        assert_eq!(found, moment.digests, "{name} of seed {seed}: {to:?}");
        drop(restored);
        let admin = database.replica_server().client("postgres").await;
        wait_until("the session to be gone", PATIENCE, || async {
            admin
                .try_run(&format!("DROP DATABASE {name}"))
                .await
                .is_ok()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_larger_than_the_queue_is_restored_in_bounded_memory() {
    let site = Site::own().await;
    let database = site.database("large").await;
    let (archive, source) = (archive(), database.source().await);
    source
        .run("CREATE TABLE wide (id int PRIMARY KEY, v text)")
        .await;
    let mut agent = agent(&database, &archive);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    // 50 MiB of rows, and half of them once more.
    source
        .run(
            "BEGIN;
             INSERT INTO wide SELECT g, (SELECT string_agg(md5(g::text || h), '') FROM generate_series(1, 16) AS h)
               FROM generate_series(1, 100000) AS g;
             UPDATE wide SET v = v || 'x' WHERE id % 2 = 0;
             COMMIT",
        )
        .await;
    assert!(
        source
            .holds("SELECT sum(length(v)) > 50 * 1024 * 1024 * 0.95 FROM wide")
            .await
    );
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
    // So small that holding the transaction, or half of it, shows.
    for (limit, bytes) in [
        ("limits.queue_bytes", "8MiB"),
        ("limits.transaction_bytes", "2MiB"),
        ("limits.batch_bytes", "2MiB"),
    ] {
        agent.configure(limit, &format!("\"{bytes}\""));
    }
    let server = database.replica_server();
    server.create_database("large_restored").await;
    let url = server.url("large_restored");
    // Stands still before it ends, so that its peak can be read.
    let mut restoring = agent.spawn(
        &["restore", "--target", &url],
        &[("DR_AGENT_FAILPOINT", "restore:replayed=stop")],
    );
    restoring.wait_until_stopped().await;
    let peak = restoring.peak_resident_bytes();
    signal("CONT", &[restoring.pid()]);
    restoring.expect_exit(0).await;
    eprintln!("restored with a peak of {} MiB", peak >> 20);
    expect_same_content(&source, &server.client("large_restored").await).await;
    assert!(peak < RESIDENT_BYTES_MAX, "peak {} MiB", peak >> 20);
}
