//! Goal: a table that comes late, or cannot be had, costs itself and nothing else: the stream goes on, a promotion goes on and says so.
//! Method: under a running agent tables are created with what they need, while transactions are open, while they are written to, and
//! some that cannot be created on the replica; the lag, the status and the promotion are looked at, and every table compared.

use std::time::Duration;

use dr_agent_tests::client::Client;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};
use tokio_util::sync::CancellationToken;

const ASIDE: &str = "dr_agent_tables_set_aside";

async fn marks(database: &Database, source: &Client, mark: i64) {
    source
        .run(&format!("INSERT INTO base VALUES ({mark})"))
        .await;
    let replica = database.replica().await;
    let there = format!("SELECT EXISTS (SELECT FROM base WHERE id = {mark})");
    wait_until("the stream to go on", Duration::from_secs(10), || {
        replica.holds(&there)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_tables_are_copied_beside_the_stream_with_what_they_need() {
    let site = Site::own().await;
    let database = site.database("late").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE base (id bigint PRIMARY KEY); INSERT INTO base VALUES (0)")
        .await;
    let (agent, running) = database.replicate().await;
    let name = database.name.clone();

    // A transaction that is open on the source, in another database even, holds up snapshots and nothing else.
    let open = site.source.client("postgres").await;
    open.run("BEGIN; SELECT pg_current_xact_id()").await;
    source
        .run(
            "CREATE SCHEMA app; CREATE TYPE app.color AS ENUM ('red', 'blue'); CREATE DOMAIN app.small AS int CHECK (VALUE < 1000);
             CREATE FUNCTION app.twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
             CREATE TABLE app.scratch (id serial PRIMARY KEY, c app.color, d app.small DEFAULT 5, t int DEFAULT app.twice(4));
             INSERT INTO app.scratch (c) SELECT 'red' FROM generate_series(1, 100);
             CREATE TABLE app.part (id int PRIMARY KEY, base bigint REFERENCES base) PARTITION BY RANGE (id);
             CREATE TABLE app.part_1 PARTITION OF app.part FOR VALUES FROM (0) TO (1000);
             INSERT INTO app.part VALUES (1, 0), (2, NULL)",
        )
        .await;
    running
        .wait_for_metric(ASIDE, &[("database", &name)], |value| value > 1.5)
        .await;
    for mark in 1..4 {
        marks(&database, &source, mark).await;
    }
    let status = agent.command(&["status"]).await;
    assert!(status.text().contains("app.scratch"), "{}", status.text());

    // While it is written to without a pause, and after it has waited.
    let done = CancellationToken::new();
    let writer = {
        let (database, done) = (database.clone(), done.clone());
        tokio::spawn(async move {
            let source = database.source().await;
            let mut n = 0;
            while !done.is_cancelled() {
                n += 1;
                source
                    .run(&format!(
                        "INSERT INTO app.scratch (c) VALUES ('blue'); UPDATE app.scratch SET d = d + 1 WHERE id = 1 + {n} % 100;
                         DELETE FROM app.scratch WHERE id = 100 + {n} / 2; INSERT INTO app.part VALUES (10 + {n} % 900, 0) ON CONFLICT DO NOTHING"
                    ))
                    .await;
            }
        })
    };
    open.run("COMMIT").await;
    running
        .wait_for_metric(ASIDE, &[("database", &name)], |value| value < 0.5)
        .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    done.cancel();
    writer.await.unwrap();
    database.expect_equal().await;
    let foreign_keys = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'app.part'::regclass";
    let replica = database.replica().await;
    wait_until("the foreign key", PATIENCE, || async {
        replica.number(foreign_keys).await == 1
    })
    .await;
    let log = running.log();
    let ended = |line: &&str| line.contains("starting again");
    assert_eq!(log.lines().find(ended), None, "a session was ended for it");

    // One that cannot be had.
    database
        .writable_replica()
        .await
        .run("CREATE VIEW public.taken AS SELECT 1 AS one")
        .await;
    source
        .run(
            "CREATE TABLE taken (id int PRIMARY KEY); INSERT INTO taken VALUES (1);
             CREATE TABLE fine (id int PRIMARY KEY); INSERT INTO fine VALUES (1)",
        )
        .await;
    running
        .wait_for_log(&["public.taken", "set aside", "the rest goes on"])
        .await;
    let replica = database.replica().await;
    wait_until("the other table", PATIENCE, || async {
        replica.try_run("SELECT id FROM fine").await.is_ok()
            && replica.number("SELECT count(*) FROM fine").await == 1
    })
    .await;
    marks(&database, &source, 9).await;
    running.stop().await;
    let promoted = agent.command(&["promote", "--failover"]).await;
    let text = promoted.text();
    promoted.expect_code(0);
    assert!(text.contains("public.taken"), "{text}");
}
