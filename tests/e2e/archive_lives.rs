//! Goal: what the archive promises holds over the life of a stream: one that is started over, an agent that dies without its spool
//! or with a damaged one, a sink that refuses for good, and a site that is lost at any moment.
//! Method: each is brought about, and restores are compared with what the source remembers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dr_agent::pg::PgLsn;
use dr_agent_tests::agent::Agent;
use dr_agent_tests::archive::{
    Moment, agent_at, archive, bases, bring_back, expect_state, files_below, first_base, note,
    protected, restore, span, take_away, wait_archived, work,
};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// As an operator starts a stream over: everything goes but the archive.
async fn forget(database: &Database) {
    database.drop_slot().await;
    let replica = database.replica_server().client("postgres").await;
    replica
        .run(&format!("DROP DATABASE {} WITH (FORCE)", database.name))
        .await;
}

async fn expect_restored(database: &Database, agent: &Agent, name: &str, moment: &Moment) {
    for (by, value) in [("time", &moment.time), ("lsn", &moment.lsn)] {
        let target = format!("{name}_{by}");
        let option = format!("--to-{by}");
        restore(database, agent, &target, &[&option, value])
            .await
            .expect_code(0);
        expect_state(database, &target, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_past_of_a_stream_that_was_started_over_stays_until_its_time_is_up() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "lives").await;
    let source = database.source().await;
    let earlier = work(&source, 6, 0).await;
    // What comes later shows that nothing comes before.
    source.run("INSERT INTO bag VALUES ('behind')").await;
    wait_archived(&database, &archive).await;
    running.stop().await;
    forget(&database).await;
    // Nobody sees this: it is in neither life's log, and in the base backup of the second.
    source.run("INSERT INTO bag VALUES ('between')").await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let two = || async {
        let listed = agent.command(&["backup", "--list", "--json"]).await.json();
        let histories = listed.as_array().unwrap().iter();
        let with_base =
            histories.filter(|history| !history["bases"].as_array().unwrap().is_empty());
        with_base
            .map(|history| history["history"].clone().to_string())
            .collect::<BTreeSet<_>>()
            .len()
            == 2
    };
    wait_until("each life to have a base backup", PATIENCE, two).await;
    let later = work(&source, 6, 300).await;
    source.run("INSERT INTO bag VALUES ('behind')").await;
    let now = note(&source).await;
    wait_archived(&database, &archive).await;
    running.expect_quiet_log();
    running.stop().await;
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    expect_restored(
        &database,
        &agent,
        "earlier_of_lives",
        earlier.last().unwrap(),
    )
    .await;
    expect_restored(&database, &agent, "later_of_lives", later.last().unwrap()).await;
    // Without a moment, today's is meant.
    restore(&database, &agent, "today_of_lives", &[])
        .await
        .expect_code(0);
    expect_state(&database, "today_of_lives", &now).await;

    // The first life ended long ago, as far as the retention is concerned; of the second, what its base backup needs stays.
    agent.configure("archive.retention", "\"1ms\"");
    let before = files_below(&archive).len();
    let announced = agent.command(&["backup", "--prune", "--dry-run"]).await;
    announced.expect_code(0);
    assert_eq!(files_below(&archive).len(), before);
    agent.command(&["backup", "--prune"]).await.expect_code(0);
    assert!(files_below(&archive).len() < before);
    restore(
        &database,
        &agent,
        "before_lives",
        &["--to-lsn", &earlier.last().unwrap().lsn],
    )
    .await
    .expect_code(1)
    .expect_words(&["no base backup"]);
    restore(&database, &agent, "today_of_lives_still", &[])
        .await
        .expect_code(0);
    expect_state(&database, "today_of_lives_still", &now).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_required_archive_lacks_nothing_although_the_spool_is_lost_with_what_it_held() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "spoolless").await;
    running.stop().await;
    agent.configure("archive.required", "true");
    let source = database.source().await;
    let mut moments = Vec::new();
    for round in 0..2 {
        let mut running = agent.start();
        running.wait_for_streaming(&database.name).await;
        take_away(&archive);
        moments.extend(work(&source, 6, 100 * round).await);
        // It is on the replica and in the spool, and nowhere else.
        database.expect_equal().await;
        running.kill();
        bring_back(&archive);
        let spool = archive.with_file_name("spool");
        let waiting = files_below(&spool).into_iter();
        let bytes: u64 = waiting.map(|file| fs::metadata(file).unwrap().len()).sum();
        // The second time, what was lost may still have to be read again first.
        assert!(bytes > 0 || round > 0, "nothing was in the spool");
        fs::remove_dir_all(spool).unwrap();
    }
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    moments.extend(work(&source, 3, 300).await);
    wait_archived(&database, &archive).await;
    running.stop().await;
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    for (i, moment) in moments.iter().enumerate().step_by(3) {
        let name = format!("lacks_nothing_{i}");
        restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_refuses_for_good_does_not_end_the_log() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "refused").await;
    running.stop().await;
    agent.configure("replica.set_aside", "\"never\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let (source, replica) = (database.source().await, database.writable_replica().await);
    replica.run("ALTER TABLE bag RENAME TO mislaid").await;
    let moments = work(&source, 6, 0).await;
    running.wait_for_state(&database.name, "stopped").await;
    running
        .wait_for_log(&["the change log goes on into the archive"])
        .await;
    let last = work(&source, 6, 100).await.pop().unwrap();
    wait_archived(&database, &archive).await;
    restore(&database, &agent, "refused_log", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "refused_log", &last).await;
    assert!(moments.len() < 100);
    running.stop().await;
    replica.run("ALTER TABLE mislaid RENAME TO bag").await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}

/// Flips a bit of the largest segment in a spool.
fn damage(spool: &Path) {
    let size = |file: &PathBuf| fs::metadata(file).unwrap().len();
    let files = segments_in(spool);
    let victim = files.iter().max_by_key(|file| size(file));
    let victim = victim.expect("something waits in the spool");
    let mut bytes = fs::read(victim).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(victim, bytes).unwrap();
}

/// The complete ones.
fn segments_in(spool: &Path) -> Vec<PathBuf> {
    let mut files = files_below(spool);
    files.retain(|file| file.extension().is_some_and(|ending| ending == "log"));
    files
}

async fn wait_spooled(spool: &Path, moment: &Moment) {
    let lsn: PgLsn = moment.lsn.parse().unwrap();
    wait_until("the spool to have it in a segment", PATIENCE, || async {
        segments_in(spool).iter().any(|file| span(file).end >= lsn)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_in_the_spool_comes_from_the_source_again_while_that_has_it() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "healed").await;
    running.stop().await;
    // Then the source has it for certain.
    agent.configure("archive.required", "true");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let source = database.source().await;
    take_away(&archive);
    let moments = work(&source, 12, 0).await;
    let spool = archive.with_file_name("spool");
    wait_spooled(&spool, &moments[11]).await;
    running.kill();
    bring_back(&archive);
    damage(&spool);
    // What is missing is known before anything is cut off.
    let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", "archive:missing-marked")]);
    armed.wait_for_exit(PATIENCE).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let last = work(&source, 3, 100).await.pop().unwrap();
    wait_archived(&database, &archive).await;
    running.stop().await;
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    for (i, moment) in [&moments[0], &moments[6], &moments[11], &last]
        .into_iter()
        .enumerate()
    {
        let name = format!("mended_{i}");
        restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_in_the_spool_and_nowhere_else_is_a_gap_that_is_said_aloud() {
    let site = Site::shared().await;
    let (database, archive, agent, mut running) = protected(&site, "holed").await;
    let source = database.source().await;
    take_away(&archive);
    let lost = work(&source, 12, 0).await.pop().unwrap();
    let spool = archive.with_file_name("spool");
    wait_spooled(&spool, &lost).await;
    let forgotten = format!(
        "SELECT confirmed_flush_lsn >= '{}' FROM pg_replication_slots WHERE slot_name = '{}'",
        lost.lsn,
        database.stream()
    );
    wait_until("the source to forget it", PATIENCE, || {
        source.holds(&forgotten)
    })
    .await;
    running.kill();
    bring_back(&archive);
    damage(&spool);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.wait_for_log(&["the change log has a gap"]).await;
    // Behind what is missing, a base backup of its own.
    let another = || async {
        work(&source, 1, 200).await;
        bases(&agent).await.len() == 2
    };
    wait_until("the next base backup", PATIENCE, another).await;
    let last = work(&source, 3, 300).await.pop().unwrap();
    wait_archived(&database, &archive).await;
    running.stop().await;
    restore(&database, &agent, "last_of_holed", &["--to-lsn", &last.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "last_of_holed", &last).await;
    restore(&database, &agent, "lost_of_holed", &["--to-lsn", &lost.lsn])
        .await
        .expect_code(1)
        .expect_words(&["missing"]);
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(1)
        .expect_words(&["is missing"]);
}

/// An error of ours in the log must not end it in silence, nor hold the slot for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_of_the_log_that_panics_is_begun_anew_and_lacks_nothing() {
    let site = Site::shared().await;
    for (i, place) in ["log:found", "archive:spooled@3", "archive:uploaded@2"]
        .into_iter()
        .enumerate()
    {
        let (database, archive, agent, running) = protected(&site, &format!("panics{i}")).await;
        running.stop().await;
        let running = agent.start_with(&[("DR_AGENT_FAILPOINT", &format!("{place}=panic"))]);
        running.wait_for_streaming(&database.name).await;
        let source = database.source().await;
        let mut moments = Vec::new();
        // The task itself, or one of the log.
        let said = |log: String| {
            log.contains("it is started again") || log.contains("the spool is opened anew")
        };
        while !said(running.log()) {
            assert!(moments.len() < 1000, "nothing panicked");
            moments.extend(work(&source, 2, moments.len() as u32).await);
        }
        moments.extend(work(&source, 2, 500).await);
        wait_archived(&database, &archive).await;
        running.stop().await;
        let last = moments.last().unwrap();
        for (name, moment) in [("first", &moments[0]), ("last", last)] {
            let name = format!("unpanicked{i}_{name}");
            restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
                .await
                .expect_code(0);
            expect_state(&database, &name, moment).await;
        }
    }
}

/// Copies what is there while somebody writes: a temporary file may be gone meanwhile.
fn copy_objects(archive: &Path, copy: &Path) {
    for file in files_below(archive) {
        let to = copy.join(file.strip_prefix(archive).unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        match fs::copy(&file, &to) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            copied => drop(copied.unwrap()),
        }
    }
}

/// The site's end, at moments nobody chose: what committed more than an RPO before is in the archive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_committed_an_rpo_ago_is_in_the_archive_at_any_moment() {
    const RPO: f64 = 5.0;
    let site = Site::shared().await;
    let database = site.database("rpo").await;
    let archive = archive();
    let url = format!("file://{}", archive.display());
    let mut agent = agent_at(&database, &url, &archive.with_file_name("spool"));
    agent.configure("objectives.rpo", &format!("\"{RPO}s\""));
    agent.configure("archive.segment_bytes", "\"64MiB\"");
    let source = database.source().await;
    source
        .run("CREATE TABLE tick (id bigserial PRIMARY KEY, at timestamptz DEFAULT clock_timestamp())")
        .await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    let ticking = tokio::spawn(async move {
        loop {
            source.run("INSERT INTO tick DEFAULT VALUES").await;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    let reader = database.source().await;
    let mut promised_at_last = 0;
    for round in 0..4 {
        tokio::time::sleep(std::time::Duration::from_millis(2_100 + 700 * round)).await;
        // As the store is then: whatever the agent would do next never happens.
        let lost_at = reader.value("SELECT clock_timestamp()").await.unwrap();
        let copy = directory_for("lost").join("objects");
        copy_objects(&archive, &copy);
        let url = format!("file://{}", copy.display());
        let there = agent_at(&database, &url, &copy.with_file_name("spool"));
        let name = format!("lost_{round}");
        restore(&database, &there, &name, &[]).await.expect_code(0);
        let restored = database.replica_server().client(&name).await;
        let promised = format!(
            "SELECT coalesce(max(id), 0) FROM tick WHERE at <= timestamptz '{lost_at}' - interval '{RPO} s'"
        );
        promised_at_last = reader.number(&promised).await;
        let there = restored
            .number("SELECT coalesce(max(id), 0) FROM tick")
            .await;
        assert!(there >= promised_at_last, "{there} {promised_at_last}");
    }
    assert!(promised_at_last > 0);
    ticking.abort();
    running.stop().await;
}
