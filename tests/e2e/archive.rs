//! Goal: any moment of the source can be restored from the archive, or the error says what is missing.
//! Method: an archive in a directory; a session that notes its own state, position and time after every commit is the
//! control copy; restores to those moments are compared with it. The agent is killed at every edge of durability;
//! the archive is damaged, taken away and given back.

use std::fs;
use std::time::Duration;

use dr_agent::pg::PgLsn;
use dr_agent_tests::archive::{
    TABLES, agent, agent_at, archive, bases, bring_back, expect_state, first_base, note, protected,
    restore, restore_again, segments, take_away, wait_archived, work,
};
use dr_agent_tests::moto::{self, Moto, SECRET};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_moment_of_a_workload_can_be_restored() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "moments").await;
    let source = database.source().await;
    let mut moments = work(&source, 24, 0).await;
    // Another base, from which later moments begin.
    agent.command(&["backup"]).await.expect_code(0);
    moments.extend(work(&source, 24, 1000).await);
    // Proves that the log reaches the last moment.
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
    assert!(segments(&archive).len() > 3);
    for (i, moment) in moments.iter().enumerate().step_by(5) {
        let by_lsn = format!("by_lsn_{i}");
        restore(&database, &agent, &by_lsn, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &by_lsn, moment).await;
    }
    for (i, moment) in moments.iter().enumerate().skip(3).step_by(17) {
        let by_time = format!("by_time_{i}");
        let restored = restore(
            &database,
            &agent,
            &by_time,
            &["--to-time", &moment.time, "--json"],
        )
        .await;
        restored.expect_code(0);
        expect_state(&database, &by_time, moment).await;
        let report = restored.json();
        assert!(
            report["commit_time"].as_str().unwrap() <= moment.time.as_str(),
            "{report}"
        );
        assert!(
            report["left_out_commit_time"].as_str().unwrap() > moment.time.as_str(),
            "{report}"
        );
    }
    // Values given out later must not repeat.
    let restored = database.replica_server().client("by_lsn_45").await;
    restored
        .run("INSERT INTO entry (account, v) VALUES (1, 'new')")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_killed_while_archiving_leaves_no_gap() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "killed").await;
    running.stop().await;
    let source = database.source().await;
    let mut moments = Vec::new();
    for (i, point) in [
        "archive:spooled",
        "archive:uploaded",
        "apply:before-commit",
        "apply:after-commit",
    ]
    .into_iter()
    .enumerate()
    {
        let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", point)]);
        moments.extend(work(&source, 4, 100 * i as u32).await);
        armed.wait_for_exit(PATIENCE).await;
    }
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    moments.extend(work(&source, 6, 7).await);
    database.expect_equal().await;
    running.kill();
    running.wait_for_exit(PATIENCE).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    assert!(segments(&archive).len() > 4);
    for (i, moment) in moments.iter().enumerate().skip(1).step_by(6) {
        let name = format!("after_{i}");
        restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_archive_is_an_error_that_names_the_object() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "broken").await;
    let source = database.source().await;
    let before = note(&source).await;
    wait_archived(&database, &archive).await;
    let known = segments(&archive).len();
    work(&source, 6, 0).await;
    wait_archived(&database, &archive).await;
    // The first one behind that moment, however many heartbeats made segments before it; more follow.
    let victim = segments(&archive)[known].clone();
    work(&source, 6, 10).await;
    wait_archived(&database, &archive).await;
    running.stop().await;
    let name = victim.file_name().unwrap().to_str().unwrap().to_owned();
    let good = fs::read(&victim).unwrap();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let damages = [
        flipped(good.len() / 2),
        flipped(good.len() - 2),
        good[..good.len() / 2].to_vec(),
        Vec::new(),
    ];
    for (i, damage) in damages.into_iter().enumerate() {
        fs::write(&victim, damage).unwrap();
        let outcome = restore(&database, &agent, &format!("try_{i}"), &[]).await;
        outcome.expect_code(1).expect_words(&[&name]);
    }
    fs::remove_file(&victim).unwrap();
    restore(&database, &agent, "missing", &[])
        .await
        .expect_code(1)
        .expect_words(&["is missing", "goes on at"]);
    // The list of objects tells so, before hours of loading.
    let target = database.replica_server().client("missing").await;
    assert!(target.holds("SELECT to_regclass('account') IS NULL").await);
    // Up to the gap everything is there.
    restore(&database, &agent, "until", &["--to-lsn", &before.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "until", &before).await;
    fs::write(&victim, &good).unwrap();
    restore(&database, &agent, "whole", &[])
        .await
        .expect_code(0);
    // A moment that nothing proves to have been reached.
    restore(
        &database,
        &agent,
        "future",
        &["--to-time", "2200-01-01T00:00:00Z"],
    )
    .await
    .expect_code(1)
    .expect_words(&["the change log ends at"]);
    restore(
        &database,
        &agent,
        "past",
        &["--to-time", "2001-01-01T00:00:00Z"],
    )
    .await
    .expect_code(1)
    .expect_words(&["no base backup leads to"]);
    restore_again(&database, &agent, "whole", &[])
        .await
        .expect_code(1)
        .expect_words(&["not empty", "account"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slot_waits_for_a_required_archive_and_for_no_other() {
    let site = Site::own().await;
    for required in [true, false] {
        let database = site.database("required").await;
        let archive = archive();
        let mut agent = agent(&database, &archive);
        agent.configure("archive.required", &required.to_string());
        database.source().await.run(TABLES).await;
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        first_base(&running, &database).await;
        take_away(&archive);
        let source = database.source().await;
        let confirmed = format!(
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{}'",
            database.stream()
        );
        let moments = work(&source, 12, 0).await;
        running.wait_for_log(&["the archive do", "segment"]).await;
        database.expect_equal().await;
        let last = &moments.last().unwrap().lsn;
        let passed = format!("SELECT ({confirmed}) >= '{last}'");
        if required {
            // Longer than the source is told anything.
            tokio::time::sleep(Duration::from_secs(6)).await;
            assert!(!source.holds(&passed).await);
        } else {
            wait_until("the slot to move on", PATIENCE, || source.holds(&passed)).await;
        }
        bring_back(&archive);
        wait_until("the slot to move on", PATIENCE, || source.holds(&passed)).await;
        source.run("INSERT INTO bag VALUES ('later')").await;
        database.expect_equal().await;
        running.stop().await;
        let name = format!("restored_{required}");
        restore(&database, &agent, &name, &["--to-lsn", last])
            .await
            .expect_code(0);
        expect_state(&database, &name, moments.last().unwrap()).await;
    }
}

/// Waits until the source has nothing any more of what is written by now.
async fn wait_until_forgotten(database: &Database) {
    let source = database.source().await;
    let here = source.value("SELECT pg_current_wal_lsn()").await.unwrap();
    let forgotten = format!(
        "SELECT confirmed_flush_lsn >= '{here}' FROM pg_replication_slots WHERE slot_name = '{}'",
        database.stream()
    );
    wait_until("the slot to move on", PATIENCE, || source.holds(&forgotten)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_read_and_the_replica_goes_on_while_a_required_archive_is_away() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "windows").await;
    running.stop().await;
    agent.configure("archive.required", "true");
    agent.configure("limits.catch_up_bytes", "\"256KiB\"");
    let source = database.source().await;
    source
        .run("INSERT INTO bag SELECT repeat(md5(g::text), 10) FROM generate_series(1, 5000) AS g")
        .await;
    take_away(&archive);
    let running = agent.start();
    running.wait_for_log(&["far behind"]).await;
    running.wait_for_log(&["the backlog is read"]).await;
    source.run("INSERT INTO bag VALUES ('live')").await;
    database.expect_equal().await;
    bring_back(&archive);
    wait_until_forgotten(&database).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_spool_leaves_a_gap_that_is_said_aloud() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "full").await;
    running.stop().await;
    agent.configure("archive.spool_bytes", "\"64KiB\"");
    take_away(&archive);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let source = database.source().await;
    source
        .run("INSERT INTO bag SELECT repeat(md5(g::text), 10) FROM generate_series(1, 2000) AS g")
        .await;
    running
        .wait_for_log(&["the change log stands still", "archive.spool_bytes"])
        .await;
    // Replication does not care.
    database.expect_equal().await;
    wait_until_forgotten(&database).await;
    bring_back(&archive);
    running.wait_for_log(&["the change log has a gap"]).await;
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_archive_gaps_total", &labels, |gaps| gaps >= 1.0)
        .await;
    // A base backup behind it is taken without being asked for.
    running
        .wait_for_log(&["taking a base backup", "gap behind the newest"])
        .await;
    wait_until("it to be there", PATIENCE, || async {
        bases(&agent).await.len() == 2
    })
    .await;
    let newest = bases(&agent).await.into_iter().max().unwrap();
    let behind_the_gap = PgLsn::from(u64::from(newest) - 1).to_string();
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    let later = note(&source).await;
    source.run("INSERT INTO bag VALUES ('latest')").await;
    database.expect_equal().await;
    running.stop().await;
    restore(&database, &agent, "across", &["--to-lsn", &behind_the_gap])
        .await
        .expect_code(1)
        .expect_words(&["is missing", "goes on at"]);
    restore(&database, &agent, "behind", &["--to-lsn", &later.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "behind", &later).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_goes_on_where_it_was_killed_and_takes_single_tables() {
    let site = Site::shared().await;
    let (database, _, mut agent, running) = protected(&site, "again").await;
    let source = database.source().await;
    let before = note(&source).await;
    let moments = work(&source, 30, 0).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    let last = moments.last().unwrap();
    // Many small batches, so that it dies between two.
    agent.configure("limits.batch_changes", "5");
    let admin = database.replica_server().client("postgres").await;
    admin
        .run("CREATE DATABASE resumed_restore TEMPLATE template0")
        .await;
    let url = database.replica_server().url("resumed_restore");
    let arguments = ["restore", "--target", &url, "--to-lsn", &last.lsn];
    for (spread, point) in [
        ("10000", "apply:after-commit"),
        ("10000", "apply:before-commit"),
        ("1", "apply:all-prepared"),
        ("1", "apply:lane-0-committed"),
    ] {
        agent.configure("limits.spread_changes", spread);
        let killed = agent
            .command_with(&arguments, &[("DR_AGENT_FAILPOINT", point)])
            .await;
        assert_eq!(killed.code, None, "{point}: {}", killed.text());
    }
    // It cannot go back, and not to other tables.
    let back = ["restore", "--target", &url, "--to-time", &before.time];
    agent
        .command(&back)
        .await
        .expect_code(1)
        .expect_words(&["the target already is at"]);
    let other = [&arguments[..], &["--table", "public.account"]].concat();
    agent
        .command(&other)
        .await
        .expect_code(1)
        .expect_words(&["was of other tables"]);
    let plan = agent
        .command(&[&arguments[..], &["--plan", "--json"]].concat())
        .await;
    assert!(plan.expect_code(0).json()["log_segments"].as_u64().unwrap() > 0);
    agent.command(&arguments).await.expect_code(0);
    expect_state(&database, "resumed_restore", last).await;
    restore(
        &database,
        &agent,
        "one",
        &["--to-lsn", &last.lsn, "--table", "public.account"],
    )
    .await
    .expect_code(0);
    let one = database.replica_server().client("one").await;
    let accounts = "SELECT md5(string_agg(a::text, ',' ORDER BY id)) FROM account AS a";
    assert_eq!(one.number("SELECT count(*) FROM entry").await, 0);
    let all = database.replica_server().client("resumed_restore").await;
    assert_eq!(one.value(accounts).await, all.value(accounts).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_on_s3_gives_the_same() {
    let site = Site::shared().await;
    let database = site.database("bucket").await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let endpoint = format!("http://127.0.0.1:{}", moto.port());
    let environment = moto::environment(&endpoint);
    let agent = agent_at(
        &database,
        "s3://archive/prod",
        &archive().with_file_name("spool"),
    );
    let source = database.source().await;
    source.run(TABLES).await;
    let running = agent.start_with(&environment);
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    agent
        .command_with(&["backup"], &environment)
        .await
        .expect_code(0);
    let moments = work(&source, 18, 0).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.expect_quiet_log();
    assert!(!running.log().contains(SECRET));
    running.stop().await;
    let verified = agent
        .command_with(&["backup", "--verify"], &environment)
        .await;
    verified.expect_code(0).expect_words(&["sound"]);
    let last = moments.last().unwrap();
    let admin = database.replica_server().client("postgres").await;
    admin
        .run("CREATE DATABASE from_s3 TEMPLATE template0")
        .await;
    let url = database.replica_server().url("from_s3");
    let arguments = ["restore", "--target", &url, "--to-time", &last.time];
    agent
        .command_with(&arguments, &environment)
        .await
        .expect_code(0);
    expect_state(&database, "from_s3", last).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_table_brings_a_base_backup_and_verify_names_what_is_damaged() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "added").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE added (id int PRIMARY KEY); INSERT INTO added SELECT generate_series(1, 10)")
        .await;
    // It is looked for twice a minute on the source, and then for a base backup that has it.
    let deadline = 3 * PATIENCE;
    wait_until("a base backup with the new table", deadline, || async {
        let log = running.log();
        let since = log.split("tables that the newest one does not have").nth(1);
        since.is_some_and(|since| since.contains("base backup taken"))
    })
    .await;
    source.run("INSERT INTO added VALUES (11)").await;
    let moment = note(&source).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    restore(&database, &agent, "with_it", &["--to-lsn", &moment.lsn])
        .await
        .expect_code(0);
    let restored = database.replica_server().client("with_it").await;
    assert_eq!(restored.number("SELECT count(*) FROM added").await, 11);
    assert!(bases(&agent).await.len() >= 2);
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    let victim = segments(&archive).pop().unwrap();
    let mut bytes = fs::read(&victim).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&victim, bytes).unwrap();
    let name = victim.file_name().unwrap().to_str().unwrap();
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(1)
        .expect_words(&[name]);
    let pruned = agent.command(&["backup", "--prune", "--dry-run"]).await;
    pruned.expect_code(0).expect_words(&["0 base backups"]);
}
