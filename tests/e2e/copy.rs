//! Goal: the initial copy loses and doubles nothing, whatever changes or dies meanwhile, and keeps what it has.
//! Method: kills it between tables, writes during it, adds tables and partitions after it; compares all rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dr_agent_tests::client::Client;
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test]
async fn a_copy_killed_between_tables_keeps_the_finished_ones() {
    let site = Site::shared().await;
    let database = site.database("resume").await;
    let source = database.source().await;
    for n in 0..12 {
        source
            .run(&format!("CREATE TABLE t{n:02} (id int PRIMARY KEY, v text); INSERT INTO t{n:02} SELECT g, md5(g::text) FROM generate_series(1, 40000) AS g"))
            .await;
    }
    let mut agent = database.agent();
    agent.configure("copy.jobs", "1");
    // A thin line to the replica, so that there is time to kill between two tables.
    let line = Proxy::start(site.replica.port()).await;
    line.delay(Duration::from_millis(20));
    let far = site.replica.url_through(line.port(), "postgres");
    agent.configure("replica.url", &format!("\"{far}\""));
    let mut running = agent.start();
    let finished = "SELECT table_name, snapshot_lsn, rows FROM dr_agent.table_sync
                     WHERE table_schema = 'public' AND state IN ('copied', 'ready') ORDER BY 1";
    wait_until("three tables to be copied", PATIENCE, || async {
        // The database appears while we look.
        let Ok(replica) = Client::try_connect(&site.replica.url(&database.name)).await else {
            return false;
        };
        replica
            .try_rows(finished)
            .await
            .is_ok_and(|rows| rows.len() >= 3)
    })
    .await;
    running.kill();
    let replica = database.replica().await;
    let kept = replica.rows(finished).await;
    assert!(
        kept.len() < 12,
        "the copy was over before it was killed; the test needs larger tables"
    );
    assert!(
        kept.iter().all(|row| row[2].as_deref() == Some("40000")),
        "{kept:?}"
    );
    // Changes of finished and unfinished tables alike, while nobody looks.
    for n in 0..12 {
        source
            .run(&format!("UPDATE t{n:02} SET v = 'changed' WHERE id % 100 = 0; DELETE FROM t{n:02} WHERE id % 100 = 1; INSERT INTO t{n:02} VALUES (-{n}, 'new')"))
            .await;
    }
    line.heal();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    let after = replica.rows(finished).await;
    assert_eq!(after.len(), 12);
    let unready = "SELECT count(*) FROM dr_agent.table_sync WHERE state <> 'ready'";
    assert_eq!(replica.number(unready).await, 0);
    assert!(
        kept.iter().all(|row| after.contains(row)),
        "copied again: {kept:?}\n{after:?}"
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_during_the_copy_of_a_split_table_are_neither_lost_nor_doubled() {
    let site = Site::shared().await;
    let database = site.database("split").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE big (id int PRIMARY KEY, n int, v text);
             INSERT INTO big SELECT g, 0, md5(g::text) FROM generate_series(1, 150000) AS g;
             CREATE TABLE bag (n int, v text); ALTER TABLE bag REPLICA IDENTITY FULL;
             INSERT INTO bag SELECT g % 10, 'x' FROM generate_series(1, 500) AS g",
        )
        .await;
    let over = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn(write_until(Arc::clone(&over), database.clone()));
    let mut agent = database.agent();
    agent.configure("copy.split_bytes", "\"1MiB\"");
    agent.configure("copy.jobs", "3");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    over.store(true, Ordering::Relaxed);
    let transactions = writing.await.unwrap();
    assert!(
        transactions > 10,
        "only {transactions} transactions during the copy"
    );
    database.expect_equal().await;
    let metrics = running.metrics().await;
    let labels = [("database", database.name.as_str())];
    assert!(metrics.sum("dr_agent_copy_rows_total", &labels) >= 150_000.0);
    assert!(metrics.sum("dr_agent_copy_bytes_total", &labels) > 5_000_000.0);
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_while_it_creates_the_database_leaves_nothing_in_the_way() {
    let site = Site::own().await;
    let database = site.database("database").await;
    let table = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)";
    database.source().await.run(table).await;
    let agent = database.agent();
    // Whoever creates a database waits for this, and has looked already whether there is one of that name.
    let holder = site.replica.client("postgres").await;
    holder
        .run("BEGIN; LOCK TABLE pg_database IN SHARE MODE")
        .await;
    let creating = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CREATE DATABASE%'";
    let watcher = site.replica.client("postgres").await;
    let mut first = agent.start();
    wait_until("the first to create it", PATIENCE, || async {
        watcher.number(creating).await == 1
    })
    .await;
    first.kill();
    let second = agent.start();
    wait_until("the second to create it as well", PATIENCE, || async {
        watcher.number(creating).await == 2
    })
    .await;
    holder.run("COMMIT").await;
    second.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    second.expect_quiet_log();
    second.stop().await;
}

async fn write_until(over: Arc<AtomicBool>, database: Database) -> u32 {
    let source = database.source().await;
    let mut done = 0;
    while !over.load(Ordering::Relaxed) {
        let n = done % 1000;
        source
            .run(&format!(
                "UPDATE big SET n = n + 1 WHERE id % 1000 = {n};
                 DELETE FROM big WHERE id = {n} * 140; INSERT INTO big VALUES ({done} + 1000000, 1, 'new');
                 UPDATE big SET id = id + 2000000 WHERE id = {n} * 150 + 1;
                 UPDATE bag SET v = v || 'y' WHERE ctid = (SELECT min(ctid) FROM bag WHERE n = {n} % 10);
                 INSERT INTO bag VALUES ({n} % 10, 'x'); DELETE FROM bag WHERE ctid = (SELECT max(ctid) FROM bag WHERE n = 3)"
            ))
            .await;
        done += 1;
    }
    done
}

#[tokio::test]
async fn tables_and_partitions_made_later_are_copied_and_followed() {
    let site = Site::shared().await;
    let database = site.database("later").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE t (id int PRIMARY KEY);
             CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE p_1 PARTITION OF p FOR VALUES FROM (0) TO (100);
             INSERT INTO p SELECT g, 'copied' FROM generate_series(1, 50) AS g",
        )
        .await;
    let (_agent, running) = database.replicate().await;
    source
        .run(
            "CREATE TABLE late (id int PRIMARY KEY, v text);
             INSERT INTO late SELECT g, 'before' FROM generate_series(1, 1000) AS g;
             CREATE TABLE p_2 PARTITION OF p FOR VALUES FROM (100) TO (200);
             INSERT INTO p SELECT g, 'new partition' FROM generate_series(90, 150) AS g",
        )
        .await;
    source.run("UPDATE p SET id = id + 100 WHERE id BETWEEN 80 AND 95; UPDATE late SET v = 'changed' WHERE id < 10").await;
    // Nobody starts the agent again: it finds them by itself.
    let replica = database.replica().await;
    wait_until("the new tables to be copied", PATIENCE, || {
        replica.holds(
            "SELECT count(*) = 2 FROM dr_agent.table_sync
              WHERE table_name IN ('late', 'p_2') AND state = 'ready'",
        )
    })
    .await;
    source
        .run("INSERT INTO late VALUES (5000, 'followed'); DELETE FROM p WHERE id % 2 = 0; TRUNCATE p_1")
        .await;
    database.expect_equal().await;
    running.stop().await;
}
