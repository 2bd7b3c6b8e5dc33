//! Goal: transactions that the source streams while they run arrive as what was committed, whatever goes on
//! beside and inside them, and the source writes none of them to its disk a second time.
//! Method: a source that streams from 64 kB on, an agent that spills from 256 kB on; sessions whose
//! statements are interleaved by hand; then every table is compared by full content.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLES: &str = "CREATE TABLE large (id int PRIMARY KEY, v text);
    CREATE TABLE small (id int PRIMARY KEY, v text)";

/// Rows of one statement below: some 200 kB of changes, which the source streams at once.
const ROWS: i64 = 2000;

struct Scene {
    _site: Site,
    database: Database,
    source: Client,
    replica: Client,
    agent: Agent,
    running: Running,
}

impl Scene {
    async fn set(purpose: &str, work_mem: &str) -> Self {
        let options = ServerOptions::source().set("logical_decoding_work_mem", work_mem);
        let site = Site::with(options, ServerOptions::replica()).await;
        let database = site.database(purpose).await;
        let source = database.source().await;
        source.run(TABLES).await;
        let agent = Agent::new(
            database
                .config()
                .set("limits.transaction_bytes", "\"256KiB\""),
        );
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        Self {
            _site: site,
            replica: database.replica().await,
            database,
            source,
            agent,
            running,
        }
    }

    /// Waits until the walsender has streamed this many blocks.
    async fn wait_for_blocks(&self, blocks: i64) {
        let sql = "SELECT coalesce(sum(stream_count), 0) FROM pg_stat_replication_slots";
        wait_until("streamed blocks", PATIENCE, || async {
            self.source.number(sql).await >= blocks
        })
        .await;
    }

    async fn wait_for_spill_files(&self, files: usize) {
        wait_until("spill files", PATIENCE, || async {
            self.spill_files() == files
        })
        .await;
    }

    fn spill_files(&self) -> usize {
        let stream = self.database.stream();
        let directory = self.agent.directory().join("spill").join(stream.as_str());
        std::fs::read_dir(directory).map_or(0, Iterator::count)
    }

    async fn inserts_applied(&self) -> f64 {
        let metrics = self.running.metrics().await;
        metrics.sum("dr_agent_changes_total", &[("kind", "insert")])
    }

    /// Everything committed is there, and nothing is left on the agent's disk.
    async fn expect_equal(&self) {
        self.database.expect_equal().await;
        self.wait_for_spill_files(0).await;
        self.running.expect_quiet_log();
    }

    /// The source has streamed, and has written nothing to its own disk.
    async fn expect_streamed(&self) {
        let sql =
            "SELECT sum(stream_txns) > 0 AND sum(spill_txns) = 0 FROM pg_stat_replication_slots";
        wait_until("streamed and not spilled", PATIENCE, || async {
            self.source.holds(sql).await
        })
        .await;
    }
}

fn insert(table: &str, from: i64) -> String {
    let to = from + ROWS - 1;
    format!("INSERT INTO {table} SELECT g, 'row ' || g FROM generate_series({from}, {to}) AS g")
}

#[tokio::test]
async fn small_transactions_pass_a_large_one_that_is_still_running() {
    let scene = Scene::set("beside", "64kB").await;
    let large = scene.database.source().await;
    large.run("BEGIN").await;
    for round in 0..10 {
        large.run(&insert("large", round * ROWS)).await;
        let small = format!("INSERT INTO small VALUES ({round}, 'small')");
        scene.source.run(&small).await;
    }
    scene.database.wait_caught_up().await;
    scene.wait_for_spill_files(1).await;
    let counts = "SELECT (SELECT count(*) FROM small) = 10 AND (SELECT count(*) FROM large) = 0";
    assert!(scene.replica.holds(counts).await);
    large
        .run("UPDATE large SET v = v || '!' WHERE id % 3 = 0")
        .await;
    large.run("COMMIT").await;
    scene.expect_equal().await;
    scene.expect_streamed().await;
    // One that the source streams and that is small here never sees the disk.
    let few = format!(
        "INSERT INTO large SELECT -g, 'few' FROM generate_series(1, {}) AS g",
        ROWS / 2
    );
    scene.source.run(&few).await;
    scene.expect_equal().await;
    scene.running.stop().await;
}

#[tokio::test]
async fn a_large_transaction_that_is_rolled_back_leaves_nothing() {
    let scene = Scene::set("rolled_back", "64kB").await;
    let large = scene.database.source().await;
    large.run("BEGIN").await;
    for round in 0..5 {
        large.run(&insert("large", round * ROWS)).await;
    }
    scene.wait_for_spill_files(1).await;
    large.run("ROLLBACK").await;
    // Its file goes with the abort, and not only with the next transaction.
    scene.wait_for_spill_files(0).await;
    scene
        .source
        .run("INSERT INTO small VALUES (1, 'after')")
        .await;
    scene.expect_equal().await;
    scene.expect_streamed().await;
    assert!(scene.replica.holds("SELECT count(*) = 0 FROM large").await);
    scene.running.stop().await;
}

#[tokio::test]
async fn savepoints_inside_a_large_transaction_are_rolled_back_and_released() {
    let scene = Scene::set("savepoints", "64kB").await;
    scene.source.run(&insert("large", -ROWS)).await;
    // Counted once it is durable, a little later than it can be seen.
    wait_until("the rows before to be counted", PATIENCE, || async {
        scene.inserts_applied().await >= ROWS as f64
    })
    .await;
    let before = scene.inserts_applied().await;
    let large = scene.database.source().await;
    large.run("BEGIN").await;
    large.run(&insert("large", 0)).await;
    large.run("SAVEPOINT a").await;
    large.run(&insert("large", ROWS)).await;
    large.run("SAVEPOINT b").await;
    large.run("DELETE FROM large WHERE id < 0").await;
    large.run(&insert("large", 2 * ROWS)).await;
    large.run("RELEASE b").await;
    large.run(&insert("large", 3 * ROWS)).await;
    scene.wait_for_spill_files(1).await;
    large.run("ROLLBACK TO a").await;
    large.run(&insert("large", 4 * ROWS)).await;
    large.run("SAVEPOINT c").await;
    large.run(&insert("large", 5 * ROWS)).await;
    large.run("UPDATE large SET v = 'c' WHERE id % 2 = 0").await;
    large.run("RELEASE c").await;
    // Many small ones, as loops with exception handlers make them.
    large
        .run(
            "DO $$ BEGIN FOR i IN 1..300 LOOP
                 BEGIN
                     INSERT INTO small SELECT i * 100 + g, repeat('x', 50) FROM generate_series(1, 20) AS g;
                     IF i % 2 = 0 THEN RAISE EXCEPTION 'odd'; END IF;
                 EXCEPTION WHEN raise_exception THEN NULL; END;
             END LOOP; END $$",
        )
        .await;
    large.run("COMMIT").await;
    scene.expect_equal().await;
    scene.expect_streamed().await;
    // Counted is what has survived (and heartbeats, of which there are few).
    let survived = (3 * ROWS + 150 * 20) as f64;
    let counted = scene.inserts_applied().await - before;
    assert!((survived..survived + 500.0).contains(&counted), "{counted}");
    scene.running.stop().await;
}

#[tokio::test]
async fn tables_are_altered_and_truncated_inside_a_large_transaction() {
    let scene = Scene::set("altered", "64kB").await;
    scene.source.run(&insert("small", 0)).await;
    scene.database.wait_caught_up().await;
    // As the manual has it: the replica first.
    let replica = scene.database.writable_replica().await;
    const ALTER: &str = "CREATE DOMAIN exact AS numeric(8,3); ALTER TABLE large ADD COLUMN note text, ADD COLUMN part exact";
    replica.run(ALTER).await;
    let large = scene.database.source().await;
    large.run("BEGIN").await;
    large.run(&insert("large", 0)).await;
    // What the domain is made of cannot be seen before it is committed.
    large.run(ALTER).await;
    large
        .run("UPDATE large SET note = 'n' || id, part = id / 7.0")
        .await;
    scene.wait_for_blocks(3).await;
    // Meanwhile another session works with other tables, and needs its own descriptions.
    scene.source.run("UPDATE small SET v = 'changed'").await;
    large.run("SAVEPOINT a").await;
    large.run("TRUNCATE large").await;
    large.run("ROLLBACK TO a").await;
    large.run(&insert("large", ROWS)).await;
    large.run("TRUNCATE small").await;
    large.run(&insert("small", ROWS)).await;
    large.run("COMMIT").await;
    // The description that came inside holds for what follows.
    scene
        .source
        .run("UPDATE large SET note = 'after' WHERE id < 10")
        .await;
    scene.expect_equal().await;
    let kept = "SELECT count(*) = 4000 AND count(note) = 2000 FROM large";
    assert!(scene.replica.holds(kept).await);
    // What a rolled back transaction said of the table is forgotten.
    large.run("BEGIN; ALTER TABLE large DROP COLUMN note").await;
    large.run(&insert("large", 3 * ROWS)).await;
    large.run("ROLLBACK").await;
    scene
        .source
        .run("UPDATE large SET note = 'still there' WHERE id < 5")
        .await;
    scene.expect_equal().await;
    scene.running.stop().await;
}

#[tokio::test]
async fn two_large_transactions_at_once_keep_apart() {
    let scene = Scene::set("two", "64kB").await;
    let (one, other) = (scene.database.source().await, scene.database.source().await);
    one.run("BEGIN").await;
    other.run("BEGIN").await;
    for round in 0..6 {
        one.run(&insert("large", round * ROWS)).await;
        other.run(&insert("small", round * ROWS)).await;
        let row = 1_000_000 + round;
        let between = format!("INSERT INTO large VALUES ({row}, 'between')");
        scene.source.run(&between).await;
    }
    scene.wait_for_spill_files(2).await;
    other
        .run("SAVEPOINT a; DELETE FROM small; ROLLBACK TO a")
        .await;
    other.run("COMMIT").await;
    one.run("UPDATE small SET v = 'seen by the first' WHERE id % 5 = 0")
        .await;
    scene.database.wait_caught_up().await;
    let small = "SELECT count(*) = 12000 AND count(*) FILTER (WHERE v LIKE 'seen%') = 0 FROM small";
    assert!(scene.replica.holds(small).await);
    scene.wait_for_spill_files(1).await;
    one.run("COMMIT").await;
    scene.expect_equal().await;
    scene.expect_streamed().await;
    scene.running.stop().await;
}

#[tokio::test]
async fn an_agent_killed_with_a_stream_open_begins_it_anew() {
    let mut scene = Scene::set("killed", "64kB").await;
    let large = scene.database.source().await;
    large.run("BEGIN").await;
    large.run(&insert("large", 0)).await;
    large.run("SAVEPOINT a").await;
    large.run(&insert("large", ROWS)).await;
    scene.wait_for_spill_files(1).await;
    scene.running.kill();
    large.run("ROLLBACK TO a").await;
    scene
        .source
        .run("INSERT INTO small VALUES (1, 'while it was dead')")
        .await;
    scene.running = scene.agent.start();
    scene.running.wait_for_streaming(&scene.database.name).await;
    large.run(&insert("large", 2 * ROWS)).await;
    scene.wait_for_spill_files(1).await;
    large.run("COMMIT").await;
    scene.expect_equal().await;
    let rows = scene.replica.number("SELECT count(*) FROM large").await;
    assert_eq!(rows, 2 * ROWS);
    scene.running.stop().await;
}

/// PostgreSQL 15.18 (and by report 17 and 18) streams part of what was rolled back here and never says so.
#[tokio::test]
async fn rows_of_a_savepoint_are_left_out_also_where_the_source_forgets_to_say_so() {
    let scene = Scene::set("forgotten", "16MB").await;
    let large = scene.database.source().await;
    let wide = |from: i64| {
        let to = from + 1499;
        format!(
            "INSERT INTO large SELECT g, repeat(md5(g::text), 500) FROM generate_series({from}, {to}) AS g"
        )
    };
    scene
        .source
        .run("ALTER TABLE large ALTER COLUMN v SET STORAGE EXTERNAL")
        .await;
    // In one message: the walsender is behind when the savepoint is rolled back.
    let statements = [
        "BEGIN".to_owned(),
        wide(0),
        "SAVEPOINT a".to_owned(),
        wide(10_000),
        "ROLLBACK TO a".to_owned(),
        wide(20_000),
        "COMMIT".to_owned(),
    ];
    large.run(&statements.join("; ")).await;
    scene.expect_equal().await;
    let rows = scene.replica.number("SELECT count(*) FROM large").await;
    assert_eq!(rows, 3000);
    // Whether it forgot depends on its version, and on how far it had come when the savepoint was rolled back.
    let forgot = scene.running.log().contains("rolled back without telling");
    eprintln!("the source forgot to tell of a rolled back savepoint: {forgot}");
    scene.running.stop().await;
}
