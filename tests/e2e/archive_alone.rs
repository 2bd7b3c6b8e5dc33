//! Goal: the change log goes on whatever becomes of the sink; were the site lost then, what committed more than an RPO ago is in
//! the archive.
//! Method: the replica is stopped, holds a batch up, or is being copied; the Kinesis stream takes nothing. What is written meanwhile
//! has to reach the archive, a restore is made from there, and the sink has everything in the end.

use std::time::Duration;

use dr_agent_tests::agent::Running;
use dr_agent_tests::archive::{
    TABLES, agent, archive, expect_state, first_base, position, protected, restore, wait_archived,
    work,
};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::KinesisProxy;
use dr_agent_tests::proxy::{Line, Proxy};
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

async fn wait_until_breached(running: &Running, database: &Database) {
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_rpo_breached", &labels, |breached| breached > 0.0)
        .await;
}

/// Whether the replica has what the source had at `position`, without waiting for it.
async fn has_applied(database: &Database, position: &str) -> bool {
    let replica = database.replica().await;
    let has = format!("SELECT end_lsn >= '{position}' FROM dr_agent.progress");
    replica.holds(&has).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_on_while_the_replica_is_away() {
    let site = Site::own().await;
    let (database, archive, agent, running) = protected(&site, "alone").await;
    let source = database.source().await;
    work(&source, 3, 0).await;
    // Each time one session's log is the next one's.
    for round in 0..3 {
        site.replica.stop_immediately().await;
        let moments = work(&source, 12, 10 + round).await;
        let last = moments.last().unwrap();
        wait_archived(&database, &archive).await;
        // The lag is the replica's, whatever the archive has.
        wait_until_breached(&running, &database).await;
        site.replica.start_again().await;
        running.wait_for_streaming(&database.name).await;
        // Nothing was acknowledged for the replica.
        database.expect_equal().await;
        let name = format!("logged_alone_{round}");
        restore(&database, &agent, &name, &["--to-lsn", &last.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, last).await;
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_on_while_a_lock_holds_the_replica_up() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "held").await;
    let source = database.source().await;
    let holder = database.writable_replica().await;
    holder
        .run("BEGIN; LOCK TABLE bag IN ACCESS EXCLUSIVE MODE")
        .await;
    source.run("INSERT INTO bag VALUES ('held up')").await;
    let held = position(&source).await;
    wait_until_breached(&running, &database).await;
    let moments = work(&source, 12, 0).await;
    wait_archived(&database, &archive).await;
    assert!(
        !has_applied(&database, &held).await,
        "the replica was held up; otherwise this shows nothing"
    );
    // As from anywhere else, now that the site could be lost.
    let last = moments.last().unwrap();
    restore(&database, &agent, "held_up", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "held_up", last).await;
    holder.run("COMMIT").await;
    database.expect_equal().await;
    // Then nobody reads it twice any more.
    running.wait_for_log(&["read the change log apart"]).await;
    let moments = work(&source, 6, 30).await;
    wait_archived(&database, &archive).await;
    let last = moments.last().unwrap();
    restore(&database, &agent, "let_go", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "let_go", last).await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_goes_on_while_the_stream_takes_nothing() {
    let site = Site::shared().await;
    let database = site.database("dammed").await;
    let archive = archive();
    database.source().await.run(TABLES).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let route = Route::new(database, proxy.port(), Some(archive.clone()));
    let (running, applying) = route.start().await;
    let database = &route.database;
    first_base(&running, database).await;
    proxy.hold_puts(true);
    let source = database.source().await;
    source.run("INSERT INTO bag VALUES ('held up')").await;
    let held = position(&source).await;
    wait_until_breached(&running, database).await;
    let moments = work(&source, 12, 0).await;
    wait_archived(database, &archive).await;
    assert!(!has_applied(database, &held).await);
    let last = moments.last().unwrap();
    restore(database, &route.sender, "dammed", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(database, "dammed", last).await;
    proxy.hold_puts(false);
    database.expect_equal().await;
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_and_a_base_backup_are_there_before_the_first_copy_is() {
    let site = Site::shared().await;
    let database = site.database("copying").await;
    let source = database.source().await;
    source.run(TABLES).await;
    source
        .run("INSERT INTO bag SELECT md5(g::text) FROM generate_series(1, 200000) AS g")
        .await;
    let archive = archive();
    let mut agent = agent(&database, &archive);
    agent.configure("copy.jobs", "1");
    // A thin line to the replica: a minute for the rows.
    let line = Proxy::start(site.replica.port()).await;
    line.stretch(Line {
        delay: Duration::ZERO,
        bytes_per_second: Some(100_000),
    });
    let far = site.replica.url_through(line.port(), "postgres");
    agent.configure("replica.url", &format!("\"{far}\""));
    let running = agent.start();
    first_base(&running, &database).await;
    running.wait_for_state(&database.name, "copying").await;
    // No TRUNCATE, which the copy keeps waiting.
    let moments = work(&source, 5, 0).await;
    wait_archived(&database, &archive).await;
    running.wait_for_state(&database.name, "copying").await;
    let last = moments.last().unwrap();
    restore(&database, &agent, "before_copy", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "before_copy", last).await;
    line.heal();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    let slots = format!(
        "SELECT count(*) FROM pg_replication_slots WHERE database = '{}'",
        database.name
    );
    wait_until("the copies of the slot to be gone", PATIENCE, || async {
        source.number(&slots).await == 1
    })
    .await;
    running.stop().await;
}
