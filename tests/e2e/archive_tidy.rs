//! Goal: what retention lets go is exactly what was said beforehand, what it keeps can be restored, and whoever is killed
//! while restoring or tidying up can do it again.
//! Method: base backups of different ages, by writing their manifests anew; the real command on copies of one archive, killed at
//! its fail points; restores compared with what the source remembers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dr_agent::archive::base;
use dr_agent::cloud::store::{Encryption, Store, StoreUrl};
use dr_agent_tests::agent::Agent;
use dr_agent_tests::archive::{Moment, expect_state, files_below, protected, restore, work};
use dr_agent_tests::site::{Database, Site};

/// Days since each base backup.
const AGES: [u64; 6] = [40, 30, 20, 10, 3, 1];

/// `archive.retention` is 14 days: to restore the oldest of them, the base backup of 20 days ago is needed.
const OLDEST_KEPT: usize = 2;

/// Transactions between two base backups.
const ROUNDS: u32 = 5;

/// An archive of a month: what the source was like after every transaction, in order.
struct Month {
    database: Database,
    archive: PathBuf,
    agent: Agent,
    moments: Vec<Moment>,
}

impl Month {
    async fn new(site: &Site) -> Self {
        let (database, archive, agent, running) = protected(site, "month").await;
        let source = database.source().await;
        let mut moments = Vec::new();
        // The first one is there.
        for (number, _) in AGES.iter().enumerate() {
            if number > 0 {
                agent.command(&["backup"]).await.expect_code(0);
            }
            moments.extend(work(&source, ROUNDS, 20 * number as u32).await);
        }
        source.run("INSERT INTO bag VALUES ('later')").await;
        database.expect_equal().await;
        running.stop().await;
        let url = StoreUrl::Directory(archive.clone());
        let store = Store::open(&url, &Encryption::Default).await.unwrap();
        let mut manifests = files(&archive);
        manifests.retain(|path| path.ends_with("manifest.json"));
        assert_eq!(manifests.len(), AGES.len());
        for (manifest, days) in manifests.iter().zip(AGES) {
            let base = manifest.strip_suffix("manifest.json").unwrap();
            let mut manifest = base::manifest(&store, base).await.unwrap();
            let age = Duration::from_secs(days * 24 * 3600);
            manifest.as_of -= age;
            manifest.started_at -= age;
            manifest.finished_at -= age;
            let path = archive.join(base).join("manifest.json");
            fs::write(&path, manifest.to_json().unwrap()).unwrap();
            // By the store's clock as well.
            let file = fs::File::options().append(true).open(path).unwrap();
            file.set_modified(manifest.finished_at.into()).unwrap();
        }
        Self {
            database,
            archive,
            agent,
            moments,
        }
    }

    /// Lets the agent have a copy of the archive.
    fn copy(&mut self, name: &str) -> PathBuf {
        let copy = self.archive.with_file_name(name);
        let mut command = Command::new("cp");
        let status = command.arg("-a").args([&self.archive, &copy]).status();
        assert!(status.unwrap().success());
        let url = format!("\"file://{}\"", copy.display());
        self.agent.configure("archive.url", &url);
        copy
    }

    /// All that was promised is there, and nothing that went is mistaken for something else.
    async fn expect_promises(&self, name: &str) {
        let first = OLDEST_KEPT * ROUNDS as usize;
        for (i, moment) in self.moments.iter().enumerate().skip(first).step_by(4) {
            let target = format!("{name}_{i}");
            restore(
                &self.database,
                &self.agent,
                &target,
                &["--to-lsn", &moment.lsn],
            )
            .await
            .expect_code(0);
            expect_state(&self.database, &target, moment).await;
        }
    }
}

/// The names of all objects of an archive in a directory.
fn files(archive: &Path) -> Vec<String> {
    let name = |path: PathBuf| path.strip_prefix(archive).unwrap().display().to_string();
    files_below(archive).into_iter().map(name).collect()
}

/// What a prune deletes or would delete, as objects of the archive.
fn named(report: &serde_json::Value, all: &[String]) -> BTreeSet<String> {
    let deleted = &report[0]["deleted"];
    let list = |key: &str| -> Vec<String> {
        let names = deleted[key].as_array().unwrap().iter();
        names
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };
    let prefixes = [list("bases"), list("leftovers")].concat();
    let below = |name: &&String| {
        prefixes
            .iter()
            .any(|prefix| name.starts_with(prefix.as_str()))
    };
    let mut objects: BTreeSet<String> = all.iter().filter(below).cloned().collect();
    assert_eq!(deleted["objects"].as_u64().unwrap(), objects.len() as u64);
    objects.extend(list("log"));
    objects
}

fn gone(before: &[String], archive: &Path) -> BTreeSet<String> {
    let now = files(archive);
    before
        .iter()
        .filter(|name| !now.contains(name))
        .cloned()
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_month_is_tidied_up_as_announced_and_killed_in_the_middle_again() {
    let site = Site::shared().await;
    let mut month = Month::new(&site).await;
    let before = files(&month.archive);

    // As announced, and all at once.
    let at_once = month.copy("at_once");
    let announced = month
        .agent
        .command(&["backup", "--prune", "--dry-run", "--json"])
        .await;
    announced.expect_code(0);
    assert_eq!(files(&at_once), before, "a dry run has deleted something");
    let expected = named(&announced.json(), &before);
    let bases = announced.json()[0]["deleted"]["bases"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(bases, OLDEST_KEPT, "{}", announced.stdout);
    assert!(
        expected.iter().any(|name| name.contains("/log/")),
        "{expected:?}"
    );
    let text = month
        .agent
        .command(&["backup", "--prune", "--dry-run"])
        .await;
    for name in expected.iter().filter(|name| name.contains("/log/")) {
        text.expect_words(&[name]);
    }
    let pruned = month.agent.command(&["backup", "--prune", "--json"]).await;
    pruned.expect_code(0);
    assert_eq!(gone(&before, &at_once), expected);
    assert_eq!(named(&pruned.json(), &before), expected);
    month.expect_promises("at_once").await;
    let again = month.agent.command(&["backup", "--prune", "--json"]).await;
    assert_eq!(named(&again.json(), &before), BTreeSet::new());
    // What went is an error, not another moment.
    let past = &month.moments[0];
    restore(
        &month.database,
        &month.agent,
        "past_of_tidy",
        &["--to-lsn", &past.lsn],
    )
    .await
    .expect_code(1)
    .expect_words(&["no base backup leads to", &past.lsn]);

    // Killed wherever that is possible.
    let in_pieces = month.copy("in_pieces");
    for (point, name) in [
        ("prune:manifest-deleted", "first"),
        ("prune:object-deleted@3", "second"),
        ("prune:segment-deleted", "third"),
    ] {
        let killed = month
            .agent
            .command_with(&["backup", "--prune"], &[("DR_AGENT_FAILPOINT", point)])
            .await;
        assert_eq!(killed.code, None, "{point}: {}", killed.text());
        assert!(gone(&before, &in_pieces).is_subset(&expected), "{point}");
        month.expect_promises(name).await;
        month
            .agent
            .command(&["backup", "--verify"])
            .await
            .expect_code(0)
            .expect_words(&["sound"]);
    }
    month
        .agent
        .command(&["backup", "--prune"])
        .await
        .expect_code(0);
    assert_eq!(gone(&before, &in_pieces), expected);
    month.expect_promises("in_pieces").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_restore_is_ended_by_the_same_command() {
    let site = Site::shared().await;
    let (database, _, agent, running) = protected(&site, "half").await;
    let source = database.source().await;
    let moment = work(&source, 6, 0).await.pop().unwrap();
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    let admin = database.replica_server().client("postgres").await;
    let create = "CREATE DATABASE \"half_loaded\" TEMPLATE template0";
    let url = database.replica_server().url("half_loaded");
    let arguments = ["restore", "--target", &url, "--to-lsn", &moment.lsn];
    for point in [
        "restore:data-loaded",
        "restore:data-loaded@3",
        "restore:base-loaded",
        "restore:replayed",
        "restore:views-filled",
    ] {
        admin.run(create).await;
        let killed = agent
            .command_with(&arguments, &[("DR_AGENT_FAILPOINT", point)])
            .await;
        assert_eq!(killed.code, None, "{point}: {}", killed.text());
        agent.command(&arguments).await.expect_code(0);
        expect_state(&database, "half_loaded", &moment).await;
        admin.run("DROP DATABASE half_loaded").await;
    }
    // Nobody is told to drop a replica.
    let url = database.replica_server().url(&database.name);
    let replica = agent.command(&["restore", "--target", &url]).await;
    replica.expect_code(1).expect_words(&["not empty"]);
    assert!(
        !replica.text().contains("DROP DATABASE"),
        "{}",
        replica.text()
    );
}
