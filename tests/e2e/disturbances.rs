//! Goal: what heals by itself is retried, shows in the metrics, and costs no data.
//! Method: one test per disturbance (restarts, crashes, network, full disk, no free slot, a second agent) while
//! transactions go on; nobody starts the agent again, and everything is equal in the end.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::disk::SmallDisk;
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

async fn replicated(site: &Site, purpose: &str) -> (Database, Agent, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let (agent, running) = database.replicate().await;
    (database, agent, running)
}

/// One more transaction; `n` is any number not used before.
async fn write(database: &Database, n: u32) {
    let sql =
        format!("INSERT INTO t VALUES ({n}000, 'streamed'); UPDATE t SET v = '{n}' WHERE id <= 50");
    database.source().await.run(&sql).await;
}

async fn wait_for_transient_errors(running: &Running, database: &Database, more_than: f64) -> f64 {
    let labels = [("database", database.name.as_str()), ("class", "transient")];
    running
        .wait_for_metric("dr_agent_errors_total", &labels, |value| value > more_than)
        .await
}

async fn expect_healed(running: &Running, database: &Database) {
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
}

#[tokio::test]
async fn a_source_that_restarts_or_crashes_is_awaited() {
    let site = Site::own().await;
    let (database, _agent, running) = replicated(&site, "source").await;
    let mut errors = 0.0;
    for n in 1..=3 {
        write(&database, n).await;
        match n {
            1 => site.source.stop().await,
            2 => site.source.stop_immediately().await,
            _ => site.source.kill(),
        }
        errors = wait_for_transient_errors(&running, &database, errors).await;
        site.source.start_again().await;
        write(&database, n + 10).await;
        expect_healed(&running, &database).await;
    }
    running.stop().await;
}

#[tokio::test]
async fn a_replica_that_restarts_or_crashes_is_awaited() {
    let site = Site::own().await;
    let (database, _agent, running) = replicated(&site, "replica").await;
    let mut errors = 0.0;
    for n in 1..=3 {
        write(&database, n).await;
        match n {
            1 => site.replica.stop().await,
            2 => site.replica.stop_immediately().await,
            _ => site.replica.kill(),
        }
        write(&database, n + 10).await;
        errors = wait_for_transient_errors(&running, &database, errors).await;
        site.replica.start_again().await;
        expect_healed(&running, &database).await;
    }
    running.stop().await;
}

/// As PostgreSQL leaves it when a DROP DATABASE dies behind its first step: nobody can enter it, and only a DROP ends it.
#[tokio::test]
async fn what_an_interrupted_drop_of_the_database_has_left_is_in_nobodys_way() {
    let site = Site::shared().await;
    for command in [&["run"][..], &["init"]] {
        let database = site.database("half_dropped").await;
        database.source().await.run(TABLE).await;
        let name = &database.name;
        let half_dropped = format!(
            "CREATE DATABASE {name}; UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{name}'"
        );
        for statement in half_dropped.split("; ") {
            site.replica.run("postgres", statement).await;
        }
        let agent = database.agent();
        if command == ["init"] {
            agent.command(command).await.expect_code(0);
        }
        let running = agent.start();
        expect_healed(&running, &database).await;
        running.stop().await;
    }
}

#[tokio::test]
async fn both_servers_may_be_away_when_the_agent_starts() {
    let site = Site::own().await;
    let (database, agent, running) = replicated(&site, "later").await;
    running.stop().await;
    write(&database, 1).await;
    site.source.stop().await;
    site.replica.stop().await;
    let running = agent.start();
    running.wait_for_log(&["connect"]).await;
    site.replica.start_again().await;
    site.source.start_again().await;
    expect_healed(&running, &database).await;
    running.stop().await;
}

#[tokio::test]
async fn a_network_that_is_cut_or_swallows_everything_is_survived() {
    let site = Site::shared().await;
    let database = site.database("network").await;
    database.source().await.run(TABLE).await;
    let to_source = Proxy::start(site.source.port()).await;
    let to_replica = Proxy::start(site.replica.port()).await;
    let mut agent = database.agent();
    let source_url = site.source.url_through(to_source.port(), "postgres");
    let replica_url = site.replica.url_through(to_replica.port(), "postgres");
    agent.configure("source.url", &format!("\"{source_url}\""));
    agent.configure("replica.url", &format!("\"{replica_url}\""));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;

    let mut errors = 0.0;
    for (n, proxy) in [
        (1, &to_source),
        (2, &to_replica),
        (3, &to_source),
        (4, &to_replica),
    ] {
        proxy.cut();
        write(&database, n).await;
        errors = wait_for_transient_errors(&running, &database, errors).await;
        proxy.heal();
        write(&database, n + 10).await;
        expect_healed(&running, &database).await;
    }
    // A silent network shows as lag; when it heals, nothing has to be started.
    let labels = [("database", database.name.as_str())];
    for (n, proxy) in [(5, &to_source), (6, &to_replica)] {
        proxy.black_hole();
        write(&database, n).await;
        running
            .wait_for_metric("dr_agent_lag_seconds", &labels, |lag| lag > 1.5)
            .await;
        proxy.heal();
        expect_healed(&running, &database).await;
    }
    // The distance to AWS.
    to_replica.delay(std::time::Duration::from_millis(40));
    write(&database, 7).await;
    expect_healed(&running, &database).await;
    running.stop().await;
}

#[tokio::test]
async fn a_second_agent_waits_until_the_first_is_gone() {
    let site = Site::shared().await;
    let (database, _agent, mut first) = replicated(&site, "second").await;
    let other = Agent::new(database.config());
    let second = other.start();
    second.wait_for_log(&["in use"]).await;
    write(&database, 1).await;
    database.expect_equal().await;
    first.expect_quiet_log();
    first.kill();
    write(&database, 2).await;
    expect_healed(&second, &database).await;
    second.stop().await;
}

#[tokio::test]
async fn no_free_slot_is_said_and_awaited() {
    // One is for good, and one for the snapshot at which it begins.
    let options = ServerOptions::source().set("max_replication_slots", "2");
    let site = Site::with(options, ServerOptions::replica()).await;
    let database = site.database("slots").await;
    let source = database.source().await;
    source.run(TABLE).await;
    source
        .run("SELECT pg_create_physical_replication_slot('taken')")
        .await;
    let agent = database.agent();
    let mut running = agent.start();
    running.wait_for_log(&["replication slots"]).await;
    source.run("SELECT pg_drop_replication_slot('taken')").await;
    if running.exit_status().is_some() {
        // It may have judged that a person is needed.
        running = agent.start();
    }
    expect_healed(&running, &database).await;
    running.stop().await;
}

#[tokio::test]
async fn a_full_disk_of_the_replica_is_awaited() {
    let Some(disk) = SmallDisk::mount("24m") else {
        return;
    };
    let site = Site::own().await;
    let (database, _agent, running) = replicated(&site, "disk").await;
    let replica = database.writable_replica().await;
    replica
        .run(&format!(
            "CREATE TABLESPACE small LOCATION '{}'",
            disk.path().display()
        ))
        .await;
    replica.run("ALTER TABLE t SET TABLESPACE small").await;
    // More than fits, in several transactions.
    let source = database.source().await;
    for n in 1..=4 {
        source
            .run(&format!("INSERT INTO t SELECT g, repeat(md5(g::text), 30) FROM generate_series({n}00000, {n}08000) AS g"))
            .await;
    }
    running.wait_for_log(&["disk"]).await;
    wait_for_transient_errors(&running, &database, 0.0).await;
    let before = replica.number("SELECT count(*) FROM t").await;
    disk.grow("400m");
    expect_healed(&running, &database).await;
    assert!(replica.number("SELECT count(*) FROM t").await > before);
    wait_until("the tablespace to be in use", PATIENCE, || {
        replica.holds("SELECT pg_tablespace_size('small') > 24 * 1024 * 1024")
    })
    .await;
    running.stop().await;
}
