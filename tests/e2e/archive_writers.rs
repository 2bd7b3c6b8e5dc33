//! Goal: several writers in one archive never disturb each other's history, whatever they have in common; and objects that
//! were copied to where they do not belong are an error that names them, or do no harm.
//! Method: agents of two databases, of two clusters, and of one source on two machines write into one directory; every object is
//! held against what it was; segments are copied under other names, and restores compared with what the source remembers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dr_agent::archive::log::Span;
use dr_agent::names::history::History;
use dr_agent::pg::PgLsn;
use dr_agent_tests::agent::Agent;
use dr_agent_tests::archive::{
    Moment, TABLES, agent_at, archive, bring_back, expect_state, files_below, first_base,
    protected, restore, restore_again, segments, span, take_away, wait_archived, work,
};
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::PATIENCE;

/// Every file below a directory, and what it holds.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    files_below(directory).into_iter().map(read).collect()
}

/// What was there before is there now, and the same.
#[track_caller]
fn expect_kept(before: &BTreeMap<PathBuf, Vec<u8>>, archive: &Path) {
    let now = contents(archive);
    for (path, bytes) in before {
        assert!(
            now.get(path) == Some(bytes),
            "{} is another",
            path.display()
        );
    }
}

/// Restores to some of the moments and to the end, and compares.
async fn expect_history(database: &Database, agent: &Agent, name: &str, moments: &[Moment]) {
    for (i, moment) in moments.iter().enumerate().step_by(4) {
        let target = format!("{name}_{i}");
        restore(database, agent, &target, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(database, &target, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_databases_share_an_archive_and_not_their_histories() {
    let site = Site::shared().await;
    let (one, archive, first, running) = protected(&site, "shared").await;
    let other = site.database("shared").await;
    other.source().await.run(TABLES).await;
    let url = format!("file://{}", archive.display());
    let second = agent_at(&other, &url, &archive.with_file_name("spool"));
    let also_running = second.start();
    also_running.wait_for_streaming(&other.name).await;
    first_base(&also_running, &other).await;
    let (here, there) = (one.source().await, other.source().await);
    let (ours, theirs) = tokio::join!(work(&here, 12, 0), work(&there, 12, 500));
    for (database, source) in [(&one, &here), (&other, &there)] {
        source.run("INSERT INTO bag VALUES ('later')").await;
        database.expect_equal().await;
    }
    running.stop().await;
    also_running.stop().await;
    expect_history(&one, &first, "of_one", &ours).await;
    expect_history(&other, &second, "of_other", &theirs).await;
    for agent in [&first, &second] {
        agent
            .command(&["backup", "--verify"])
            .await
            .expect_code(0)
            .expect_words(&["sound"]);
    }

    // A segment of the other database that seems to lead further. The tables have the same names.
    let of = |database: &Database| -> Vec<PathBuf> {
        let below = archive.join(database.stream().as_str());
        segments(&below)
    };
    let end = span(of(&one).last().unwrap()).end;
    let also_running = second.start();
    also_running.wait_for_streaming(&other.name).await;
    there.run("UPDATE account SET balance = 0").await;
    other.expect_equal().await;
    also_running.stop().await;
    let crossing = of(&other)
        .into_iter()
        .find(|path| span(path).start <= end && span(path).end > end)
        .unwrap();
    // Right behind the last of its own: a stretch that intact segments cover would not be missed.
    let name = format!(
        "{}.zst",
        Span {
            start: end,
            ..span(&crossing)
        }
        .name()
    );
    fs::copy(&crossing, of(&one)[0].with_file_name(&name)).unwrap();
    let stream = other.stream();
    let words = [name.as_str(), stream.as_str()];
    restore(&one, &first, "with_a_stranger", &[])
        .await
        .expect_code(1)
        .expect_words(&words);
    let verified = first.command(&["backup", "--verify"]).await;
    verified.expect_code(1).expect_words(&words);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_with_the_same_names_share_an_archive_and_not_their_histories() {
    let here = Site::own().await;
    let there = Site::with(
        ServerOptions::source().of_another_cluster(),
        ServerOptions::replica(),
    )
    .await;
    let one = here.database("twin").await;
    let other = there.twin_of(&one).await;
    assert_eq!(one.stream(), other.stream());
    let archive = archive();
    let url = format!("file://{}", archive.display());
    let first = agent_at(&one, &url, &archive.with_file_name("spool"));
    let second = agent_at(&other, &url, &archive.with_file_name("elsewhere"));
    // The first is down when the second comes, as after `pg_upgrade`; in between it comes back.
    let mut histories = Vec::new();
    for (round, (database, agent)) in [(&one, &first), (&other, &second), (&one, &first)]
        .into_iter()
        .enumerate()
    {
        let source = database.source().await;
        if round < 2 {
            source.run(TABLES).await;
        }
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        first_base(&running, database).await;
        agent.command(&["backup"]).await.expect_code(0);
        histories.push(work(&source, 8, 300 * round as u32).await);
        source.run("INSERT INTO bag VALUES ('later')").await;
        database.expect_equal().await;
        running.expect_quiet_log();
        running.stop().await;
        agent
            .command(&["backup", "--verify"])
            .await
            .expect_code(0)
            .expect_words(&["sound"]);
    }
    let [earlier, later] = <[_; 2]>::try_from(histories_below(&archive)).unwrap();
    // Before the second one came, the first is meant, whoever asks.
    for (i, moment) in histories[0].iter().enumerate().step_by(3) {
        let target = format!("twin_0_{i}");
        restore(&other, &second, &target, &["--to-time", &moment.time])
            .await
            .expect_code(0);
        expect_state(&other, &target, moment).await;
    }
    // From then on both go on, and nobody guesses: neither by time nor by position.
    for (round, named) in [(1, &later), (2, &earlier)] {
        let moment = histories[round].last().unwrap();
        for (by, value) in [("--to-time", &moment.time), ("--to-lsn", &moment.lsn)] {
            let target = format!("twin_{round}{}", by.replace('-', "_"));
            let outcome = restore(&one, &first, &target, &[by, value]).await;
            // The second has not come as far as the first.
            if round == 1 || outcome.code != Some(0) {
                outcome.expect_code(1).expect_words(&["--history"]);
                outcome.expect_words(&[&earlier, &later]);
                let asked = [by, value, "--history", named];
                restore_again(&one, &first, &target, &asked)
                    .await
                    .expect_code(0);
            }
            expect_state(&one, &target, moment).await;
        }
    }
    let outcome = restore(&one, &first, "twin_end", &[]).await;
    outcome.expect_code(1).expect_words(&["--history"]);
}

/// The histories of the one stream in an archive, in the order in which they began.
fn histories_below(archive: &Path) -> Vec<String> {
    let folders = fs::read_dir(archive).unwrap().flatten();
    let below = folders.flat_map(|folder| fs::read_dir(folder.path()).unwrap().flatten());
    let mut names: Vec<String> = below
        .map(|folder| folder.file_name().into_string().unwrap())
        .collect();
    names.sort_by_key(|name| name.parse::<History>().unwrap().began);
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_moved_without_its_spool_overwrites_nothing() {
    let site = Site::shared().await;
    let (database, archive, here, running) = protected(&site, "moved").await;
    let url = format!("file://{}", archive.display());
    let there = agent_at(&database, &url, &archive.with_file_name("elsewhere"));
    running.stop().await;
    let source = database.source().await;
    let mut moments = Vec::new();
    let mut kept = BTreeMap::new();
    // Each dies with something in its spool that the store has already, or nobody has, or the replica has and the store not.
    for (round, agent) in [&here, &there, &here, &there].into_iter().enumerate() {
        for point in ["archive:uploaded", "archive:spooled", "apply:after-commit"] {
            // The store must not have what the replica has: not from before either, and then a file stands where it was.
            let is_away = point == "apply:after-commit";
            if is_away {
                let mut running = agent.start();
                running.wait_for_streaming(&database.name).await;
                database.expect_equal().await;
                running.kill();
                take_away(&archive);
            }
            let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", point)]);
            moments.extend(work(&source, 3, 50 * round as u32).await);
            armed.wait_for_exit(PATIENCE).await;
            if is_away {
                bring_back(&archive);
            }
            expect_kept(&kept, &archive);
            kept = contents(&archive);
        }
    }
    for agent in [&here, &there] {
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        moments.extend(work(&source, 6, 7).await);
        source.run("INSERT INTO bag VALUES ('later')").await;
        database.expect_equal().await;
        wait_archived(&database, &archive).await;
        // It cannot know that what is missing lies in the other one's spool, and says so.
        running.stop().await;
        expect_kept(&kept, &archive);
        kept = contents(&archive);
    }
    // Now that both spools have been emptied, nothing is missing.
    here.command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    expect_history(&database, &here, "after_the_move", &moments).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_under_another_name_does_no_harm() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "copied").await;
    let source = database.source().await;
    let mut lasts = Vec::new();
    for seed in 0..4 {
        lasts.extend(work(&source, 6, seed * 10).await.pop());
        wait_archived(&database, &archive).await;
    }
    running.stop().await;
    // In the midst of the work, however many heartbeats made segments before and behind it.
    let all = segments(&archive);
    let midst: PgLsn = lasts[1].lsn.parse().unwrap();
    let middle = all.iter().position(|path| span(path).end >= midst).unwrap();
    let last = lasts.pop().unwrap();
    let (one, two, three) = (
        span(&all[middle - 1]),
        span(&all[middle]),
        span(&all[middle + 1]),
    );
    let (first, second) = (
        fs::read(&all[middle - 1]).unwrap(),
        fs::read(&all[middle]).unwrap(),
    );
    let between = PgLsn::from(u64::from(two.start) + 1);
    let before = PgLsn::from(u64::from(one.start) - 1);
    let of = |start: PgLsn, end: PgLsn| Span { start, end };
    for (i, (span, bytes)) in [
        // Too long at its beginning, at its end, at both, and as the two it stands for.
        (of(one.start, two.end), second.clone()),
        (of(two.start, three.end), second.clone()),
        (of(one.start, three.end), second.clone()),
        (of(one.start, two.end), [&first[..], &second[..]].concat()),
        // Twice: with a beginning between two transactions, with an end there.
        (of(before, one.end), first.clone()),
        (of(between, two.end), second.clone()),
        (of(two.start, between), second.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        let path = all[middle].with_file_name(format!("{}.zst", span.name()));
        fs::write(&path, bytes).unwrap();
        let target = format!("under_{i}");
        let outcome = restore(&database, &agent, &target, &["--to-lsn", &last.lsn]).await;
        // What its name promises and it does not have, the others do.
        outcome.expect_code(0);
        expect_state(&database, &target, &last).await;
        fs::remove_file(&path).unwrap();
    }
}
