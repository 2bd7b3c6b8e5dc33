//! Goal: what is decoded first from a new slot is decoded by the tables as they were, whatever was altered while the slot was
//! being created.
//! Method: holds the slot's creation at each of its stages with transactions of the source, alters tables in between, and lets
//! transactions that began before the slot was consistent commit after it. Decoding such a slot from its beginning is where
//! PostgreSQL forgets the alterations (up to 18 at least): it fails, or decodes rows by columns the table no longer has.

use dr_agent_tests::agent::Running;
use dr_agent_tests::client::Client;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// A session in a transaction that has an id, and the id.
async fn begun(database: &Database) -> (Client, String) {
    let client = database.source().await;
    client.run("BEGIN").await;
    let xid = client
        .value("SELECT txid_current() % (1::bigint << 32)")
        .await;
    (client, xid.unwrap())
}

/// Waits until a slot that is being created waits for this transaction.
async fn wait_for_creation_to_wait_for(source: &Client, xid: &str) {
    let waits = format!(
        "SELECT EXISTS (SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid)
             WHERE backend_type = 'walsender' AND NOT granted AND transactionid = '{xid}')"
    );
    wait_until("the slot's creation to wait", PATIENCE, || async {
        source.holds(&waits).await
    })
    .await;
}

/// Alters tables while `start` creates the slot, at the moment that matters.
async fn alter_while_created(database: &Database, start: impl FnOnce() -> Running) -> Running {
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE emptied (id int PRIMARY KEY, v text); INSERT INTO emptied VALUES (1, 'before');
             CREATE TABLE widened (id int PRIMARY KEY, v text); INSERT INTO widened VALUES (1, 'before')",
        )
        .await;
    // The slot waits for whoever is running when it begins …
    let (first, first_xid) = begun(database).await;
    let running = start();
    wait_for_creation_to_wait_for(&source, &first_xid).await;
    // … and does not take notice of what is committed until then. A transaction that is older than the alterations keeps
    // it from asking pg_xact later on.
    let (second, second_xid) = begun(database).await;
    source.run("TRUNCATE emptied").await;
    source.run("ALTER TABLE widened ADD COLUMN more int").await;
    first.run("COMMIT").await;
    wait_for_creation_to_wait_for(&source, &second_xid).await;
    // Decoded by the catalog as the slot knows it now.
    let (third, _) = begun(database).await;
    third.run("INSERT INTO emptied VALUES (2, 'during')").await;
    let (fourth, _) = begun(database).await;
    fourth
        .run("INSERT INTO widened VALUES (2, 'during', 2)")
        .await;
    second.run("COMMIT").await;
    let consistent = format!(
        "SELECT count(confirmed_flush_lsn) = 1 FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    );
    wait_until("the slot to be consistent", PATIENCE, || async {
        source.holds(&consistent).await
    })
    .await;
    fourth.run("COMMIT").await;
    third.run("COMMIT").await;
    running
}

async fn write_more(database: &Database) {
    let source = database.source().await;
    source
        .run("INSERT INTO emptied VALUES (3, 'after'); INSERT INTO widened VALUES (3, 'after', 3)")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_altered_while_the_slot_is_created_are_decoded_as_they_are() {
    let site = Site::own().await;
    let database = site.database("created").await;
    let agent = database.agent();
    let running = alter_while_created(&database, || agent.start()).await;
    running.wait_for_streaming(&database.name).await;
    write_more(&database).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_under_route_kinesis() {
    let site = Site::own().await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let route = Route::new(site.database("created").await, kinesalite.port(), None);
    let database = &route.database;
    let running = alter_while_created(database, || route.run(&[])).await;
    let applying = route.apply(&[]);
    applying.wait_for_streaming(&database.name).await;
    write_more(database).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}
