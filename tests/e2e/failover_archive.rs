//! Goal: a source that failed over to its own standby (17 and later) leaves nothing in the archive that never happened there, and
//! nothing of what happens later is missing in it.
//! Method: the replica is away and the standby behind, while the archive takes a transaction that only the old primary had; then the
//! standby takes over, the agent goes on, and what the archive restores is compared with the new primary.

use dr_agent_tests::archive::{agent_at, archive, first_base, position, restore, wait_archived_at};
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::site::Site;
use dr_agent_tests::standby::standby_of;
use dr_agent_tests::wait::{PATIENCE, wait_until};

async fn synced(standby: &PgServer, stream: &str, here: &str) {
    let client = standby.client("postgres").await;
    let synced = format!(
        "SELECT coalesce(bool_and(synced AND NOT temporary), false) AND pg_last_wal_replay_lsn() >= '{here}'
           FROM pg_replication_slots WHERE slot_name = '{stream}'"
    );
    wait_until("the standby to be in step", PATIENCE, || {
        client.holds(&synced)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_had_more_than_the_standby_begins_another_history() {
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    if site.source.major() < 17 {
        return;
    }
    let database = site.database("failover").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let standby = standby_of(&site.source, "standby_1").await;
    let source = database.source().await;
    let archive = archive();
    let url = format!("file://{}", archive.display());
    let mut agent = agent_at(&database, &url, &archive.with_file_name("spool"));
    let (one, other) = (site.source.port(), standby.port());
    agent.configure(
        "source.url",
        &format!(
            "\"postgres://postgres@127.0.0.1:{one},127.0.0.1:{other}/postgres?target_session_attrs=read-write\""
        ),
    );
    agent.configure("limits.retry_max", "\"1s\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    source.run("INSERT INTO t VALUES (1, 'before')").await;
    database.expect_equal().await;
    // A slot that does not move never gets in step for the first time.
    let stream = database.stream();
    synced(&standby, stream.as_str(), "0/0").await;
    // Nothing is applied any more that the standby does not get.
    site.replica.stop().await;
    let here = position(&source).await;
    synced(&standby, stream.as_str(), &here).await;
    standby.stop().await;
    source
        .run("INSERT INTO t SELECT n, 'only the old primary' FROM generate_series(100, 199) n")
        .await;
    wait_archived_at(&source, &archive).await;
    running.stop().await;
    site.source.stop_immediately().await;
    standby.start_again().await;
    let promoted = standby.client("postgres").await;
    assert!(promoted.holds("SELECT pg_promote()").await);
    site.replica.start_again().await;

    let primary = standby.client(&database.name).await;
    primary.run("INSERT INTO t VALUES (2, 'after')").await;
    let running = agent.start();
    running.wait_for_log(&["failed over to its standby"]).await;
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    primary.run("INSERT INTO t VALUES (3, 'later')").await;
    let replica = database.replica().await;
    const ALL: &str = "SELECT count(*) = 3 AND bool_and(id < 4) FROM t";
    wait_until("the new primary's rows", PATIENCE, || replica.holds(ALL)).await;
    wait_archived_at(&primary, &archive).await;
    running.stop().await;

    restore(&database, &agent, "failed_over", &[])
        .await
        .expect_code(0);
    let restored = site.replica.client("failed_over").await;
    assert!(restored.holds(ALL).await);
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);

    // Both sides remember it alike.
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;
    agent.command(&["check"]).await.expect_code(0);
}
