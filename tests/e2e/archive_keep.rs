//! Goal: the archive keeps what was promised and no more, whether the source, memory or a disk is short.
//! Method: base backups every few seconds, so that the agent itself tidies up; a large table under a limit on memory; a disk that
//! is too small; a source that is gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use dr_agent::cloud::store::{Encryption, Store};
use dr_agent::pg::PgLsn;
use dr_agent_tests::archive::{
    Moment, TABLES, agent_at, archive, bases, expect_state, files_below, first_base, protected,
    restore, work,
};
use dr_agent_tests::disk::SmallDisk;
use dr_agent_tests::faults::FaultyProxy;
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::PATIENCE;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_itself_lets_old_bases_go_and_every_moment_within_the_retention_stays() {
    const RETENTION: Duration = Duration::from_secs(8);
    let site = Site::shared().await;
    let database = site.database("kept").await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    // It lets moto be as atomic as S3 is.
    let proxy = FaultyProxy::start(moto.port()).await;
    let spool = archive().with_file_name("spool");
    let mut agent = agent_at(&database, "s3://archive/prod", &spool);
    agent.configure("archive.base_every", "\"3s\"");
    agent.configure("archive.retention", &format!("\"{RETENTION:?}\""));
    agent.surround(&moto::environment(&format!(
        "http://127.0.0.1:{}",
        proxy.port()
    )));
    let url = "s3://archive/prod".parse().unwrap();
    let store = Store::open_with(&url, &Encryption::Default, &moto.settings()).await;
    let store = store.unwrap();
    let sealed = async || -> BTreeSet<String> {
        let listed = store.list("", None).await.unwrap().into_iter();
        let names = listed.map(|object| object.name);
        names
            .filter(|name| name.ends_with("/manifest.json"))
            .collect()
    };

    let source = database.source().await;
    source.run(TABLES).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    let mut ever = sealed().await;
    let mut moments = Vec::new();
    // Until two of them have gone, and the retention has passed since the first moment.
    let clock = std::time::Instant::now();
    let mut round = 0;
    loop {
        // Without the last of six, a TRUNCATE: a base backup gives in to whoever wants a table for itself.
        for moment in work(&source, 4, round).await {
            moments.push((clock.elapsed(), moment));
        }
        round += 6;
        let now = sealed().await;
        ever.extend(now.iter().cloned());
        assert!(
            clock.elapsed() < 5 * PATIENCE,
            "of {ever:?} there are {now:?}"
        );
        if ever.len() >= now.len() + 2 && clock.elapsed() > 2 * RETENTION {
            break;
        }
    }
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
    let kept = sealed().await;
    let oldest = ever.first().unwrap();
    assert!(
        !kept.contains(oldest),
        "{oldest} of {ever:?} is still there"
    );
    let stopped = clock.elapsed();
    let oldest = bases(&agent).await.into_iter().min().unwrap();
    let position = |moment: &Moment| moment.lsn.parse::<PgLsn>().unwrap();
    for (_, moment) in moments.iter().filter(|(at, _)| *at + RETENTION > stopped) {
        assert!(position(moment) >= oldest, "{} {oldest}", moment.lsn);
    }
    moments.retain(|(_, moment)| position(moment) >= oldest);
    assert!(moments.len() >= 4, "{}", moments.len());
    let step = moments.len().div_ceil(5);
    for (i, (_, moment)) in moments.iter().enumerate().step_by(step) {
        let name = format!("promised_{i}");
        restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
}

fn bytes_below(directory: &Path) -> u64 {
    // A temporary file may be gone by now.
    let size = |path: &std::path::PathBuf| fs::metadata(path).map_or(0, |status| status.len());
    files_below(directory).iter().map(size).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_backup_of_a_large_table_takes_little_memory_and_no_disk() {
    const MEMORY_MAX: u64 = 128 << 20;
    const DISK_MAX: u64 = 1 << 20;
    let site = Site::own().await;
    let database = site.database("large").await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let spool = archive().with_file_name("spool");
    let mut agent = agent_at(&database, "s3://archive/prod", &spool);
    let scratch = directory_for("scratch");
    let scratch_path = scratch.display().to_string();
    let endpoint = format!("http://127.0.0.1:{}", moto.port());
    let mut environment = moto::environment(&endpoint).to_vec();
    environment.push(("TMPDIR", &scratch_path));
    agent.surround(&environment);
    let source = database.source().await;
    source.run(TABLES).await;
    source
        .run("CREATE TABLE big (id int PRIMARY KEY, v text)")
        .await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    running.stop().await;
    // The same 16 MiB again and again, further apart than zstd looks.
    source
        .run(
            "CREATE TEMPORARY TABLE pool AS
               SELECT g, (SELECT string_agg(md5(g::text || i::text), '') FROM generate_series(1, 32) AS i) AS v
                 FROM generate_series(1, 16384) AS g;
             INSERT INTO big SELECT n * 16384 + g, v FROM generate_series(0, 18) AS n, pool ORDER BY n, g",
        )
        .await;
    let size = source.number("SELECT pg_table_size('big')").await;
    assert!(size > 300 << 20, "{size}");
    let mut taking = agent.spawn(&["backup", "--json"], &[]);
    let (mut memory, mut disk) = (0, 0);
    let status = loop {
        memory = memory.max(taking.peak_if_alive().unwrap_or(0));
        disk = disk.max(bytes_below(&scratch));
        if let Some(status) = taking.exit_status() {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(status.code(), Some(0), "{}", taking.log());
    let said: serde_json::Value = serde_json::from_str(&taking.stdout()).unwrap();
    let raw = said[0]["base"]["raw_bytes"].as_u64().unwrap();
    let stored = said[0]["base"]["bytes"].as_u64().unwrap();
    assert!(raw > 300 << 20 && stored > 100 << 20, "{said}");
    assert!(memory > 0 && memory < MEMORY_MAX, "{} MiB", memory >> 20);
    assert!(disk > 0 && disk < DISK_MAX, "{disk} bytes in TMPDIR");
    assert_eq!(bytes_below(&scratch), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_backup_that_fills_the_disk_gives_the_room_back() {
    let Some(disk) = SmallDisk::mount("24m") else {
        return;
    };
    let site = Site::shared().await;
    let database = site.database("filled").await;
    let directory = disk.path().join("objects");
    let spool = archive().with_file_name("spool");
    let agent = agent_at(
        &database,
        &format!("file://{}", directory.display()),
        &spool,
    );
    let source = database.source().await;
    source.run(TABLES).await;
    source
        .run("CREATE TABLE big (id int PRIMARY KEY, v text)")
        .await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    running.stop().await;
    let before = files_below(&directory);
    source
        .run(
            "INSERT INTO big SELECT g, (SELECT string_agg(md5(g::text || i::text), '') FROM generate_series(1, 32) AS i)
               FROM generate_series(1, 60000) AS g",
        )
        .await;
    let full = agent.command(&["backup"]).await;
    full.expect_code(1)
        .expect_words(&["No space left"])
        .expect_words(&["make room"]);
    assert_eq!(files_below(&directory), before);
    // So whoever tidies up, or makes room, is all that it takes.
    agent.command(&["backup", "--prune"]).await.expect_code(0);
    disk.grow("200m");
    agent.command(&["backup"]).await.expect_code(0);
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["2 base backups", "sound"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_archive_is_looked_into_and_tidied_up_without_a_source() {
    let site = Site::own().await;
    let (database, directory, mut agent, running) = protected(&site, "orphan").await;
    let other = site.database("orphan").await;
    other.source().await.run(TABLES).await;
    // Of the same slot, as under `databases = ["*"]`.
    agent.configure(
        "source.databases",
        &format!("[\"{}\", \"{}\"]", database.name, other.name),
    );
    running.stop().await;
    let running = agent.start();
    running.wait_for_streaming(&other.name).await;
    first_base(&running, &other).await;
    work(&database.source().await, 6, 0).await;
    database.expect_equal().await;
    running.stop().await;
    site.source.stop_immediately().await;
    let before = files_below(&directory);
    let slot = database.stream().to_string();
    let slot = slot.strip_suffix(&format!("_{}", database.name)).unwrap();
    let streams =
        [database.name.as_str(), other.name.as_str()].map(|name| format!("{slot}_{name}"));
    for databases in [
        format!("[\"{}\", \"{}\"]", database.name, other.name),
        "[\"*\"]".to_owned(),
    ] {
        agent.configure("source.databases", &databases);
        let verified = agent.command(&["backup", "--verify", "--json"]).await;
        let listed = agent.command(&["backup", "--list", "--json"]).await;
        let pruned = agent
            .command(&["backup", "--prune", "--dry-run", "--json"])
            .await;
        for outcome in [&verified, &listed, &pruned] {
            outcome.expect_code(0);
            let said = outcome.json();
            let of: Vec<&str> = said
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one["stream"].as_str().unwrap())
                .collect();
            assert_eq!(
                BTreeSet::from_iter(of),
                streams.iter().map(String::as_str).collect(),
                "{said}"
            );
        }
        for one in listed.json().as_array().unwrap() {
            assert_eq!(one["bases"].as_array().unwrap().len(), 1, "{one}");
        }
        for one in verified.json().as_array().unwrap() {
            assert_eq!(one["flaws"].as_array().unwrap().len(), 0, "{one}");
        }
    }
    let only = ["backup", "--list", "--database", &other.name];
    agent
        .command(&only)
        .await
        .expect_code(0)
        .expect_words(&[&other.name, "restorable up to"]);
    assert_eq!(files_below(&directory), before);
    // Whoever only looks makes no archive where there is none.
    let nowhere = directory.with_file_name("nowhere");
    agent.configure("archive.url", &format!("\"file://{}\"", nowhere.display()));
    let target = database.replica_server().url("postgres");
    let planned = ["restore", "--plan", "--target", &target];
    let planned = [&planned[..], &["--database", &database.name]].concat();
    for command in [&planned[..], &["backup", "--list"]] {
        agent
            .command(command)
            .await
            .expect_code(1)
            .expect_words(&["nowhere", "No such file or directory"]);
        assert!(!nowhere.exists());
    }
    agent.configure(
        "archive.url",
        &format!("\"file://{}\"", directory.display()),
    );
    // What needs the source says so, soon, and leaves nothing.
    let taken = agent
        .command(&["backup", "--database", &database.name])
        .await;
    taken.expect_code(1).expect_words(&[&database.name]);
    assert_eq!(files_below(&directory), before);
}
