//! Goal: a table of which some changes were not published, or that is another one under a name that is known, is copied again; and
//! no restore goes on over what is missing.
//! Method: while the agent is away, and while it runs, tables are taken out of the publication and put back, dropped and
//! created, and renamed into one another's place; with either route, and under a restore.

use dr_agent_tests::agent::Running;
use dr_agent_tests::archive::{expect_state, files_below, note, protected, restore, wait_archived};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::differences;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE other (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT g, 't' FROM generate_series(1, 100) AS g;
    INSERT INTO other SELECT g, 'other' FROM generate_series(1, 50) AS g";

/// Something happens to the table that is not published, and nothing afterwards.
async fn list_anew(database: &Database, table: &str, change: &str) {
    let (stream, source) = (database.stream(), database.source().await);
    for sql in [
        &format!("ALTER PUBLICATION {stream} DROP TABLE ONLY {table}"),
        change,
        &format!("ALTER PUBLICATION {stream} ADD TABLE ONLY {table}"),
    ] {
        source.run(sql).await;
    }
}

const CHANGE: &str = "DELETE FROM t WHERE id <= 10; INSERT INTO t VALUES (1000 + random() * 1000000, 'not published')";

async fn swap(source: &Client) {
    source
        .run(
            "BEGIN; ALTER TABLE t RENAME TO away; ALTER TABLE other RENAME TO t; ALTER TABLE away RENAME TO other; COMMIT",
        )
        .await;
    source
        .run("UPDATE t SET v = 'it was the other one' WHERE id <= 5")
        .await;
}

/// Whoever sees it first, the monitor or the sink.
async fn copied_again(running: &Running, database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    // Of two that were swapped, each is seen by itself.
    for table in ["t", "other"] {
        let rows = format!("SELECT md5(string_agg(x::text, ',' ORDER BY id)) FROM {table} AS x");
        wait_until("the table to be copied again", PATIENCE, || async {
            // It may not be there for a moment.
            let there = replica.try_rows(&rows).await;
            let there = there.ok().and_then(|rows| rows.first()?.first()?.clone());
            there == source.value(&rows).await
        })
        .await;
    }
    running.wait_for_streaming(&database.name).await;
    // Each of the two may be seen, and copied, after the other one has come, and be away meanwhile.
    wait_until("both sides to be equal", PATIENCE, || async {
        differences(&source, &replica, &[]).await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_another_one_is_copied_again() {
    let site = Site::shared().await;
    let database = site.database("another").await;
    database.source().await.run(TABLES).await;
    let (agent, running) = database.replicate().await;
    // Nothing says so but the oid of what changes.
    swap(&database.source().await).await;
    copied_again(&running, &database).await;
    running.stop().await;

    list_anew(&database, "t", CHANGE).await;
    let running = agent.start();
    running
        .wait_for_log(&["not in the publication for a while", "public.t"])
        .await;
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;

    // It goes by what is in the stream, too: the agent sees only later that the list is another one.
    list_anew(&database, "t", CHANGE).await;
    let note = dr_agent::schema::listing::note(&database.stream());
    database.source().await.run(&note).await;
    copied_again(&running, &database).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_kinesis_a_marker_or_another_oid_has_it_copied_again() {
    let site = Site::shared().await;
    let database = site.database("another_kinesis").await;
    database.source().await.run(TABLES).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let route = Route::new(database, kinesalite.port(), None);
    let (running, applying) = route.start().await;
    let database = &route.database;
    database.expect_equal().await;

    // None of its changes comes afterwards: the marker alone tells.
    running.stop().await;
    list_anew(database, "t", CHANGE).await;
    let running = route.run(&[]);
    copied_again(&applying, database).await;
    applying.stop().await;

    let applying = route.apply(&[]);
    applying.wait_for_streaming(&database.name).await;
    let source = database.source().await;
    source
        .run("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'not published yet')")
        .await;
    // `run` lists it once it has seen it.
    copied_again(&applying, database).await;
    applying.stop().await;

    let applying = route.apply(&[]);
    applying.wait_for_streaming(&database.name).await;
    swap(&source).await;
    copied_again(&applying, database).await;
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_restore_goes_on_over_changes_that_are_in_no_log() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "relisted").await;
    let source = database.source().await;
    let bases = || {
        let files = files_below(&archive).into_iter();
        files.filter(|file| file.ends_with("manifest.json")).count()
    };
    let is = |count: usize| async move { bases() == count };
    source.run("INSERT INTO bag VALUES ('published')").await;
    let before = note(&source).await;
    wait_archived(&database, &archive).await;
    running.stop().await;

    list_anew(&database, "bag", "INSERT INTO bag VALUES ('not published')").await;
    let running = agent.start();
    running
        .wait_for_log(&["taking a base backup", "listed anew"])
        .await;
    wait_until("the next base backup", PATIENCE, || is(2)).await;
    let after = note(&source).await;
    wait_archived(&database, &archive).await;
    running.stop().await;

    for (name, moment) in [("relisted_before", &before), ("relisted_after", &after)] {
        restore(&database, &agent, name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, name, moment).await;
    }
    // Without the base backup that has it, nothing leads there.
    let newest = files_below(&archive)
        .into_iter()
        .filter(|file| file.ends_with("manifest.json"))
        .max()
        .unwrap();
    std::fs::remove_file(newest).unwrap();
    restore(
        &database,
        &agent,
        "relisted_none",
        &["--to-lsn", &after.lsn],
    )
    .await
    .expect_code(1)
    .expect_words(&["public.bag", "listed anew"])
    .expect_words(&["behind the next base backup"]);
    restore(
        &database,
        &agent,
        "relisted_part",
        &["--to-lsn", &after.lsn, "--table", "public.account"],
    )
    .await
    .expect_code(0);
}
