//! Goal: a large late table does not hold the stream up.
//! Method: rows are written every 20 ms and looked for on the replica every 5 ms, before and while 400 MB are copied beside the
//! stream. Measured when asked for; prints what it finds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::wait_until;
use tokio_util::sync::CancellationToken;

/// When each row was committed, and when it was seen on the replica.
type Times = Arc<Mutex<BTreeMap<i64, Instant>>>;

async fn write(database: Database, times: Times, done: CancellationToken) {
    let source = database.source().await;
    let mut id = 0;
    while !done.is_cancelled() {
        id += 1;
        source
            .run(&format!("INSERT INTO probe VALUES ({id})"))
            .await;
        times.lock().unwrap().insert(id, Instant::now());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn look(database: Database, times: Times, done: CancellationToken) {
    let replica = database.replica().await;
    let mut seen = 0;
    while !done.is_cancelled() {
        let newest = replica
            .number("SELECT coalesce(max(id), 0) FROM probe")
            .await;
        let now = Instant::now();
        let new = (seen + 1..=newest).map(|id| (id, now));
        times.lock().unwrap().extend(new);
        seen = newest;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Lags of the rows that were written between two moments, in milliseconds, sorted.
fn lags(written: &Times, seen: &Times, from: Instant, to: Instant) -> Vec<u128> {
    let (written, seen) = (written.lock().unwrap(), seen.lock().unwrap());
    let within = written.iter().filter(|(_, at)| (from..to).contains(*at));
    let lag =
        |(id, at): (&i64, &Instant)| Some(seen.get(id)?.saturating_duration_since(*at).as_millis());
    let mut lags: Vec<u128> = within.filter_map(lag).collect();
    lags.sort_unstable();
    lags
}

#[allow(clippy::print_stdout, reason = "it is asked for its numbers")]
fn show(what: &str, lags: &[u128]) {
    let at = |percent: usize| lags[(lags.len() - 1) * percent / 100];
    println!(
        "{what}: {} rows, lag p50 {} ms, p99 {} ms, max {} ms",
        lags.len(),
        at(50),
        at(99),
        at(100)
    );
}

#[ignore = "measures, for a minute or two"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_table_of_400_mb_does_not_hold_the_stream_up() {
    let site = Site::own().await;
    let database = site.database("late_large").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE probe (id bigint PRIMARY KEY)")
        .await;
    let (_agent, running) = database.replicate().await;
    let (written, seen, done) = (Times::default(), Times::default(), CancellationToken::new());
    let tasks = [
        tokio::spawn(write(database.clone(), Arc::clone(&written), done.clone())),
        tokio::spawn(look(database.clone(), Arc::clone(&seen), done.clone())),
    ];
    let quiet = Instant::now();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = Instant::now();
    source
        .run(
            "CREATE TABLE large (id int PRIMARY KEY, v text, w int);
             INSERT INTO large SELECT g, repeat(md5(g::text), 32), g FROM generate_series(1, 400000) g; CREATE INDEX ON large (w)",
        )
        .await;
    let filled = Instant::now();
    // While it is copied it is written to.
    let replica = database.replica().await;
    wait_until("the table to join", Duration::from_secs(300), || async {
        source
            .run("UPDATE large SET w = w + 1 WHERE id <= 50")
            .await;
        replica
            .holds("SELECT EXISTS (SELECT FROM dr_agent.table_sync WHERE table_name = 'large' AND state = 'ready')")
            .await
    })
    .await;
    let joined = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    done.cancel();
    for task in tasks {
        task.await.unwrap();
    }
    show("before", &lags(&written, &seen, quiet, before));
    show("while it is filled", &lags(&written, &seen, before, filled));
    show("while it is copied", &lags(&written, &seen, filled, joined));
    database.expect_equal().await;
    running.stop().await;
}
