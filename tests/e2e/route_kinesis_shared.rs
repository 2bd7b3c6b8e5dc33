//! Goal: a Kinesis stream for many databases costs one reader, and none of them waits for another or loses anything to it.
//! Method: one `run` and one `apply` for three databases on a stream of two shards, behind a proxy that counts reads; one replica that
//! holds its changes up, while the others go on.

use std::collections::HashSet;
use std::time::Duration;

use dr_agent_tests::agent::Agent;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::KinesisProxy;
use dr_agent_tests::moto::environment;
use dr_agent_tests::route::STREAM;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

async fn write(database: &Database, from: u32, to: u32) {
    let sql = format!(
        "INSERT INTO t SELECT g, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 8) WHERE g > 0)
           FROM generate_series({from}, {to}) AS g"
    );
    database.source().await.run(&sql).await;
}

/// Waits until both sides hold the same: one agent serves all, so the streams have names of its own.
async fn expect_equal(database: &Database) {
    let digest = "SELECT count(*) || md5(string_agg(id || v, ',' ORDER BY id)) FROM t";
    let (source, replica) = (database.source().await, database.replica().await);
    let expected = source.value(digest).await;
    wait_until("the replica to be equal", PATIENCE, || async {
        replica.value(digest).await == expected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_reader_serves_all_databases_and_a_slow_one_holds_up_nobody() {
    let site = Site::own().await;
    let mut databases = Vec::new();
    for purpose in ["one", "two", "three"] {
        let database = site.database(purpose).await;
        database.source().await.run(TABLE).await;
        databases.push(database);
    }
    let names: Vec<&str> = databases.iter().map(|it| it.name.as_str()).collect();
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let endpoint = format!("http://127.0.0.1:{}", proxy.port());
    let agent = || {
        let config = databases[0].config().databases(&names);
        let config = config.set_text("route.kind", "kinesis");
        let mut agent = Agent::new(config.set_text("route.stream", STREAM));
        agent.surround(&environment(&endpoint));
        agent
    };
    let (sender, applier) = (agent(), agent());
    let running = sender.start();
    for name in &names {
        running.wait_for_streaming(name).await;
    }
    let applying = applier.spawn(&["apply"], &[]);
    for name in &names {
        applying.wait_for_streaming(name).await;
    }
    // Reads of both shards in a second, once the others have joined: four of each.
    let reads = async || {
        let before = proxy.calls("GetRecords").len();
        tokio::time::sleep(Duration::from_secs(1)).await;
        proxy.calls("GetRecords").len() - before
    };
    wait_until("one reader", PATIENCE, || async { reads().await <= 10 }).await;
    for (n, database) in (0_u32..).zip(&databases) {
        write(database, 1 + n, 2000).await;
    }
    for database in &databases {
        expect_equal(database).await;
    }
    let iterators: HashSet<String> = proxy
        .calls("GetShardIterator")
        .iter()
        .map(|call| call.body["ShardId"].to_string())
        .collect();
    assert_eq!(iterators.len(), 2);
    // One replica does not take its changes; the others have more than it is given room for.
    let held = databases[0].writable_replica().await;
    held.run("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        .await;
    for database in &databases {
        for round in 0..8 {
            write(database, 10_000 + round * 4000, 13_999 + round * 4000).await;
        }
    }
    for database in &databases[1..] {
        expect_equal(database).await;
    }
    held.run("COMMIT").await;
    expect_equal(&databases[0]).await;
    // A database that comes anew joins the others.
    applying.stop().await;
    let applying = applier.spawn(&["apply"], &[]);
    for database in &databases {
        write(database, 100_000, 101_000).await;
        expect_equal(database).await;
    }
    wait_until("one reader again", PATIENCE, || async {
        reads().await <= 10
    })
    .await;
    applying.expect_quiet_log();
    applying.stop().await;
    running.stop().await;
}
