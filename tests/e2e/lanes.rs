//! Goal: promises 1, 2, 4 and 7 with several lanes: a batch spread over prepared transactions is on the replica as a
//! whole or not at all, whoever dies at whatever moment.
//! Method: fail points kill or stop the agent between any two of its steps; the replica is killed, promoted, or
//! met by the next agent there, and compared in full.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// Every moment between the first prepared lane and the acknowledgement to the source, in order, and whether
/// the batch is decided then. The last two may be passed for a heartbeat before the batch.
const MOMENTS: [(&str, Option<bool>); 9] = [
    ("apply:lane-prepared@1", Some(false)),
    ("apply:lane-prepared@2", Some(false)),
    ("apply:lane-prepared@3", Some(false)),
    ("apply:all-prepared", Some(false)),
    ("apply:lane-0-committed", Some(true)),
    ("apply:lane-committed@1", Some(true)),
    ("apply:last-lane-committed", Some(true)),
    ("pipeline:before-acknowledge", None),
    ("source:acknowledged", None),
];

const TABLES: &str = "
    CREATE TABLE wide (id int PRIMARY KEY, v text);
    CREATE TABLE pair (a int, b text, v text, PRIMARY KEY (a, b));
    CREATE TABLE bag (v text);
    ALTER TABLE bag REPLICA IDENTITY FULL;
    INSERT INTO wide SELECT g, 'copied' FROM generate_series(1, 1000) AS g;
    INSERT INTO pair SELECT g, 'b' || g, 'copied' FROM generate_series(1, 1000) AS g";

/// One transaction large enough for every lane to have a share.
const BATCH: &str = "
    BEGIN;
    UPDATE wide SET v = 'updated' WHERE id <= 500;
    DELETE FROM wide WHERE id > 900;
    INSERT INTO wide SELECT g, 'inserted' FROM generate_series(2000, 2500) AS g;
    UPDATE pair SET v = 'updated' WHERE a % 2 = 0;
    INSERT INTO bag SELECT 'x' || g FROM generate_series(1, 100) AS g;
    COMMIT";

/// What the batch changes; two values are possible and nothing in between.
const STATE: &str = "
    SELECT (SELECT count(*) FROM wide), (SELECT count(*) FROM wide WHERE v <> 'copied'),
           (SELECT count(*) FROM pair WHERE v <> 'copied'), (SELECT count(*) FROM bag)";

fn four_lanes(database: &Database) -> Agent {
    let mut agent = database.agent();
    agent.configure("replica.lanes", "4");
    agent.configure("limits.spread_changes", "100");
    agent
}

/// Brings an agent to its fail point in the middle of the batch.
async fn bring_to(
    database: &Database,
    agent: &Agent,
    point: &str,
) -> (Client, dr_agent_tests::agent::Running) {
    let source = database.source().await;
    source.run(TABLES).await;
    // Copied before the fail point is armed: what it counts are the lanes of the one batch.
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    running.stop().await;
    source.run(BATCH).await;
    let armed = agent.start_with(&[("DR_AGENT_FAILPOINT", point)]);
    (source, armed)
}

async fn prepared(database: &Database) -> i64 {
    let replica = database.replica().await;
    let count = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()";
    replica.number(count).await
}

async fn expect_settled(database: &Database) {
    database.expect_equal().await;
    assert_eq!(
        prepared(database).await,
        0,
        "a prepared transaction was left behind"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_between_any_two_steps_leaves_a_whole_batch_or_none() {
    let site = Site::own().await;
    for (point, _) in MOMENTS {
        let database = site.database("lanes").await;
        let agent = four_lanes(&database);
        let (_, mut armed) = bring_to(&database, &agent, point).await;
        let status = armed.wait_for_exit(PATIENCE).await;
        assert_eq!(status.code(), None, "{point} was not passed");
        let again = agent.start();
        again.wait_for_streaming(&database.name).await;
        expect_settled(&database).await;
        again.expect_quiet_log();
        again.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_killed_between_any_two_steps_has_a_whole_batch_or_none() {
    for (point, decided) in MOMENTS {
        let site = Site::own().await;
        let database = site.database("lanes").await;
        let agent = four_lanes(&database);
        let point = format!("{point}=stop");
        let (source, armed) = bring_to(&database, &agent, &point).await;
        armed.wait_until_stopped().await;
        let before = source.rows(STATE).await;
        site.replica.kill();
        site.replica.start_again().await;
        // What crash recovery shows is decided, or it is not there; its other lanes may still be locked.
        if decided == Some(false) {
            let replica = database.replica().await;
            assert_ne!(
                replica.rows(STATE).await,
                before,
                "{point}: half a batch can be read"
            );
            assert_eq!(replica.number("SELECT count(*) FROM bag").await, 0);
        }
        armed.resume();
        // What it says of itself may be of before; the other lanes' share of a batch that is decided comes by its next session.
        wait_until("what was prepared to be decided", PATIENCE, || async {
            prepared(&database).await == 0
        })
        .await;
        expect_settled(&database).await;
        armed.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_between_any_two_steps_finds_a_whole_batch_or_none() {
    for (point, decided) in MOMENTS {
        let site = Site::own().await;
        let database = site.database("lanes").await;
        let agent = four_lanes(&database);
        let point = format!("{point}=stop");
        let (source, mut armed) = bring_to(&database, &agent, &point).await;
        armed.wait_until_stopped().await;
        agent
            .command(&["promote", "--failover"])
            .await
            .expect_code(0);
        let replica = database.replica().await;
        let applied = replica.rows(STATE).await == source.rows(STATE).await;
        let untouched = replica.holds(
            "SELECT (SELECT count(*) FROM wide WHERE v <> 'copied') = 0 AND (SELECT count(*) FROM bag) = 0
                    AND (SELECT count(*) FROM wide) = 1000",
        )
        .await;
        assert!(applied != untouched, "{point}: half a batch was promoted");
        if let Some(decided) = decided {
            assert_eq!(applied, decided, "{point}");
        }
        assert_eq!(prepared(&database).await, 0, "{point}");
        let promoted = replica.rows(STATE).await;
        armed.resume();
        armed.expect_exit(3).await;
        assert_eq!(
            replica.rows(STATE).await,
            promoted,
            "{point}: a fenced agent changed the replica"
        );
        assert_eq!(
            prepared(&database).await,
            0,
            "{point}: a fenced agent prepared"
        );
    }
}

/// Rows exchange their unique values: in one batch, in batches in flight, and while other tables are spread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unique_values_handed_from_row_to_row_arrive() {
    let site = Site::own().await;
    let database = site.database("handed").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE seat (id int PRIMARY KEY, holder int UNIQUE DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE strict (id int PRIMARY KEY, code text UNIQUE);
             CREATE TABLE free (id int PRIMARY KEY, v int);
             CREATE TABLE span (id int PRIMARY KEY, during int4range, EXCLUDE USING gist (during WITH &&));
             INSERT INTO seat SELECT g, g FROM generate_series(0, 199) AS g;
             INSERT INTO strict SELECT g, 'c' || g FROM generate_series(0, 199) AS g;
             INSERT INTO free SELECT g, 0 FROM generate_series(0, 999) AS g;
             INSERT INTO span SELECT g, int4range(g * 10, g * 10 + 5) FROM generate_series(0, 99) AS g",
        )
        .await;
    let mut agent = four_lanes(&database);
    agent.configure("limits.spread_changes", "2");
    // Batches of a few transactions, several of them in flight.
    agent.configure("limits.batch_changes", "700");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    for round in 0..12 {
        source
            .run(&format!(
                "BEGIN;
                 UPDATE seat SET holder = (holder + 1 + {round}) % 200;
                 UPDATE free SET v = v + 1 WHERE id % 3 = {round} % 3;
                 COMMIT;
                 UPDATE strict SET code = 'gone' WHERE id = {round};
                 UPDATE strict SET code = 'c{round}' WHERE id = 199 - {round};
                 UPDATE strict SET code = 'x{round}' WHERE id = {round};
                 UPDATE span SET during = int4range(5000 + {round}, 5001 + {round}) WHERE id = {round};
                 INSERT INTO span VALUES (1000 + {round}, int4range({round} * 10, {round} * 10 + 3));
                 DELETE FROM free WHERE id = {round};
                 INSERT INTO free VALUES ({round}, -1)"
            ))
            .await;
    }
    expect_settled(&database).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_spread_batches_total", &labels, |count| {
            count > 0.0
        })
        .await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_prepared_transactions_one_lane_applies_everything_and_says_so() {
    let replica = ServerOptions::replica().set("max_prepared_transactions", "0");
    let site = Site::with(ServerOptions::source(), replica).await;
    let database = site.database("one_lane").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let agent = four_lanes(&database);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running
        .wait_for_log(&["max_prepared_transactions", "lanes=1"])
        .await;
    source.run(BATCH).await;
    expect_settled(&database).await;
    let labels = [("database", database.name.as_str())];
    let metrics = running.metrics().await;
    assert_eq!(
        metrics
            .value("dr_agent_spread_batches_total", &labels)
            .unwrap_or(0.0),
        0.0
    );
    running.stop().await;
    let checked = agent.command(&["check"]).await;
    checked.expect_words(&["max_prepared_transactions", "1 of 4 lanes"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_others_use_up_the_prepared_transactions_one_lane_takes_over() {
    let replica = ServerOptions::replica().set("max_prepared_transactions", "4");
    let site = Site::with(ServerOptions::source(), replica).await;
    let database = site.database("crowded").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let agent = four_lanes(&database);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let other = site.replica.client("postgres").await;
    other.run("BEGIN").await;
    other.run("SELECT txid_current()").await;
    other.run("PREPARE TRANSACTION 'somebody else''s'").await;
    source.run(BATCH).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    other.run("ROLLBACK PREPARED 'somebody else''s'").await;
    source.run("UPDATE wide SET v = 'again'").await;
    expect_settled(&database).await;
    running.stop().await;
}

/// A lane that waits for another one would wait for ever: the batch is given up and takes one lane.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_lanes_wait_for_one_another_takes_one_lane() {
    let site = Site::own().await;
    let database = site.database("entangled").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let agent = four_lanes(&database);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    // Something only the replica has: every row inserts the same key elsewhere.
    let replica = database.writable_replica().await;
    replica
        .run(
            "CREATE TABLE tangle (id int PRIMARY KEY, n int);
             CREATE FUNCTION entangle() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO public.tangle VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET n = public.tangle.n + 1;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER entangle BEFORE UPDATE ON wide FOR EACH ROW EXECUTE FUNCTION entangle();
             ALTER TABLE wide ENABLE ALWAYS TRIGGER entangle",
        )
        .await;
    source.run("UPDATE wide SET v = 'tangled'").await;
    wait_until("the batch to arrive after all", PATIENCE, || {
        replica.holds("SELECT count(*) = 1000 FROM wide WHERE v = 'tangled'")
    })
    .await;
    assert_eq!(replica.number("SELECT n FROM tangle").await, 1000);
    assert_eq!(prepared(&database).await, 0);
    running.expect_quiet_log();
    running.stop().await;
}
