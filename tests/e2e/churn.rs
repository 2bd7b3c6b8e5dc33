//! Goal: ordinary DDL on the source stops nothing: what is dropped while the agent looks at the catalogs fails no look.
//! Method: clients create and drop tables with all that belongs to them, without a pause, while the database is copied, streamed
//! and checked.

use std::time::{Duration, Instant};

use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use tokio_util::sync::CancellationToken;

/// As long as the database is streamed under it; the sequences are looked at fifty times a second.
const STREAMED: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_come_and_go_fail_no_look_at_the_catalogs() {
    let site = Site::shared().await;
    let database = site.database("churn").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE t (id serial PRIMARY KEY, v text); INSERT INTO t (v) VALUES ('a');
             CREATE SCHEMA passing",
        )
        .await;
    let done = CancellationToken::new();
    let clients: Vec<_> = (0..2)
        .map(|client| {
            let (database, done) = (database.clone(), done.clone());
            tokio::spawn(async move {
                let source = database.source().await;
                let mut rounds = 0_u64;
                while !done.is_cancelled() {
                    let name = format!("p{client}_{rounds}");
                    for sql in [
                        format!(
                            "CREATE TYPE passing.c_{name} AS ENUM ('a');
                             CREATE TABLE passing.{name} (id serial PRIMARY KEY, c passing.c_{name}, n int CHECK (n > 0),
                                 other bigint GENERATED ALWAYS AS IDENTITY, EXCLUDE USING btree (other WITH =));
                             CREATE TABLE passing.f_{name} (id int PRIMARY KEY REFERENCES passing.{name}, s serial);
                             CREATE UNIQUE INDEX ON passing.{name} ((n + 1)) WHERE n > 5;
                             INSERT INTO passing.{name} (c) VALUES ('a')"
                        ),
                        format!("DROP TABLE passing.{name}, passing.f_{name}; DROP TYPE passing.c_{name}"),
                    ] {
                        // A lock timeout of ours is not what this is about.
                        source.run(&sql).await;
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let config = database
        .config()
        .set_text("source.sequences", "20ms")
        .set("source.exclude", "[\"passing.*\"]");
    let agent = dr_agent_tests::agent::Agent::new(config);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let started = Instant::now();
    while started.elapsed() < STREAMED {
        source.run("INSERT INTO t (v) VALUES ('b')").await;
        let checked = agent.command(&["check"]).await;
        let text = checked.text();
        assert!(
            !text.contains("XX000") && !text.contains("panicked"),
            "{text}"
        );
    }
    // Somebody has a sequence locked for good.
    source.run("BEGIN; DROP TABLE t CASCADE").await;
    let other = database.source().await;
    other
        .run("CREATE TABLE passing.u (id serial PRIMARY KEY); INSERT INTO passing.u DEFAULT VALUES")
        .await;
    let noted =
        "SELECT EXISTS (SELECT FROM dr_agent.sequence_state WHERE sequence_name = 'u_id_seq')";
    wait_until(
        "a position to be noted beside a locked one",
        PATIENCE,
        || other.holds(noted),
    )
    .await;
    source.run("ROLLBACK; DROP TABLE passing.u").await;
    done.cancel();
    for client in clients {
        assert!(client.await.unwrap() > 20, "too slow to prove anything");
    }
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}
