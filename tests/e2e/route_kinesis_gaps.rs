//! Goal: what a Kinesis stream lacks holds `apply` up for as long as it must and no longer, is taken from the archive where that
//! has it, and is named where nobody has it; nothing behind it is applied meanwhile, and what waits stays within its limits.
//! Method: streams whose first records are gone, batches that are held on their way while later ones pass, an archive that has
//! what is missing later or not at all, records of an older term.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use dr_agent::cloud::kinesis::{Kinesis, Record};
use dr_agent::flow::changelog::Part;
use dr_agent_tests::agent::{Running, line_with};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::KinesisProxy;
use dr_agent_tests::records;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use prost::Message as _;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text)";

/// A stand-in, what spoils requests on the way to it, and a route through both.
async fn route(
    site: &Site,
    purpose: &str,
    archive: Option<PathBuf>,
) -> (Kinesalite, KinesisProxy, Route) {
    let database = site.database(purpose).await;
    database.source().await.run(TABLE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let route = Route::new(database, proxy.port(), archive);
    (kinesalite, proxy, route)
}

fn archive() -> PathBuf {
    directory_for("archive").join("objects")
}

async fn insert(route: &Route, id: u32) {
    let sql = format!("INSERT INTO t VALUES ({id}, 'streamed')");
    route.database.source().await.run(&sql).await;
}

/// Copies, stops applying, sends something that the stream loses, and begins to send anew. What is sent from here on waits for
/// what the stream has lost.
async fn with_a_gap(
    site: &Site,
    purpose: &str,
    archive: Option<PathBuf>,
) -> (Kinesalite, KinesisProxy, Route) {
    let (kinesalite, proxy, route) = route(site, purpose, archive).await;
    let (running, applying) = route.start().await;
    applying.stop().await;
    insert(&route, 1).await;
    route.wait_sent().await;
    running.stop().await;
    streams::delete(kinesalite.port(), STREAM).await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    (kinesalite, proxy, route)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_filled_long_before_the_tip_is_read() {
    let site = Site::shared().await;
    let (_kinesalite, proxy, route) = with_a_gap(&site, "early", Some(archive())).await;
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    // Seconds of batches, and of pages.
    for id in 10..50 {
        insert(&route, id).await;
        route.wait_sent().await;
    }
    proxy.cut_pages(2);
    let before = proxy.given();
    proxy.hold_reading_after(Some(before + 30));
    let applying = route.apply(&[]);
    applying.wait_for_log(&["filled from the archive"]).await;
    let replica = route.database.replica().await;
    wait_until("what could be read to be applied", PATIENCE, || async {
        replica.number("SELECT count(*) FROM t WHERE id > 1").await > 0
    })
    .await;
    let given = proxy.given() - before;
    assert!(given <= 31, "{given}");
    assert!(replica.number("SELECT count(*) FROM t").await < 41);
    proxy.hold_reading_after(None);
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_larger_than_what_may_wait_does_not_wait_for_the_tip_either() {
    let site = Site::shared().await;
    let (kinesalite, _proxy, mut route) = with_a_gap(&site, "waits", Some(archive())).await;
    // Many batches, however slow the machine is.
    route.sender.configure("limits.batch_bytes", "\"256KiB\"");
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    let source = route.database.source().await;
    for id in 10..50 {
        source
            .run(&format!(
                "INSERT INTO t SELECT {id}, string_agg(md5(random()::text || i), '') FROM generate_series(1, 4096) AS i"
            ))
            .await;
    }
    route.wait_sent().await;
    let kinesis = Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap();
    let bytes: usize = records::everything(&kinesis)
        .await
        .iter()
        .map(Bytes::len)
        .sum();
    assert!(bytes > 2 << 20, "{bytes}");
    // The stand-in says of every page that it leads to the tip: the gap shows once all of it has been read.
    route.applier.configure("limits.queue_bytes", "\"1MiB\"");
    route.applier.configure("limits.spill_bytes", "\"1MiB\"");
    let applying = route.apply(&[]);
    applying.wait_for_log(&["filled from the archive"]).await;
    route.database.expect_equal().await;
    let labels = [("database", route.database.name.as_str())];
    applying
        .wait_for_metric("dr_agent_stream_waiting_bytes", &labels, |bytes| {
            bytes == 0.0
        })
        .await;
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

/// Takes the change log out of the archive, and gives where it is then.
fn hide_log(archive: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut hidden = Vec::new();
    let mut below = vec![archive.to_owned()];
    while let Some(directory) = below.pop() {
        for entry in fs::read_dir(&directory).unwrap().flatten() {
            let path = entry.path();
            if !path.is_dir() {
                continue;
            }
            if path.file_name().unwrap() == "log" {
                let elsewhere = archive.with_file_name("hidden");
                fs::rename(&path, &elsewhere).unwrap();
                hidden.push((elsewhere, path));
            } else {
                below.push(path);
            }
        }
    }
    assert_eq!(hidden.len(), 1, "{hidden:?}");
    hidden
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_is_late_is_waited_for_before_the_stream_is_read_again() {
    let site = Site::shared().await;
    let archive = archive();
    let (_kinesalite, proxy, route) = with_a_gap(&site, "late", Some(archive.clone())).await;
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    insert(&route, 10).await;
    route.wait_sent().await;
    running.stop().await;
    let hidden = hide_log(&archive);
    let applying = route.apply(&[]);
    applying
        .wait_for_log(&["is missing in the Kinesis stream", "looking for it"])
        .await;
    for (elsewhere, path) in hidden {
        fs::rename(elsewhere, path).unwrap();
    }
    applying.wait_for_log(&["filled from the archive"]).await;
    let iterators = proxy.calls("GetShardIterator");
    let kinds: Vec<_> = iterators
        .iter()
        .map(|call| call.body["ShardIteratorType"].as_str().unwrap())
        .collect();
    assert!(
        kinds.contains(&"AT_TIMESTAMP") && !kinds.contains(&"TRIM_HORIZON"),
        "{kinds:?}"
    );
    let (source, replica) = (
        route.database.source().await,
        route.database.replica().await,
    );
    let count = "SELECT count(*) FROM t";
    let all = source.number(count).await;
    wait_until("everything to be applied", PATIENCE, || async {
        replica.number(count).await == all
    })
    .await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_is_named_from_where_to_where_and_not_looked_for_twice_before_the_horizon()
{
    let site = Site::shared().await;
    let (_kinesalite, proxy, route) = with_a_gap(&site, "named", None).await;
    let confirmed = route.slot("confirmed_flush_lsn");
    let to = route
        .database
        .source()
        .await
        .value(&confirmed)
        .await
        .unwrap();
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    insert(&route, 10).await;
    route.wait_sent().await;
    running.stop().await;
    let replica = route.database.writable_replica().await;
    let from = replica
        .value("SELECT end_lsn FROM dr_agent.progress")
        .await
        .unwrap();
    let named = format!("the changes from {from} to ");
    // Clocks may differ more than was allowed for: before it gives up, it reads everything.
    let mut applying = route.apply(&[]);
    applying.expect_stopped(&route.database.name).await;
    let log = applying.log();
    let line = line_with(&log, &[&named, "no archive is configured"]).expect("it is named");
    let end = line
        .split(&named)
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap();
    assert!(lsn(end) >= lsn(&to), "{end} {to}");
    let begun = |kind: &str| {
        let calls = proxy.calls("GetShardIterator");
        let of_kind = calls
            .iter()
            .filter(|call| call.body["ShardIteratorType"] == kind);
        of_kind.count()
    };
    let read_again = begun("TRIM_HORIZON");
    assert!(read_again > 0);
    // There is nothing before what lies two days back.
    replica
        .run("UPDATE dr_agent.progress SET commit_time = commit_time - interval '2 days'")
        .await;
    let mut applying = route.apply(&[]);
    applying.expect_stopped(&route.database.name).await;
    assert!(line_with(&applying.log(), &[&named]).is_some());
    assert!(begun("AT_TIMESTAMP") > 0);
    assert_eq!(begun("TRIM_HORIZON"), read_again);
}

fn lsn(text: &str) -> u64 {
    text.parse::<dr_agent::pg::PgLsn>().unwrap().into()
}

/// Begins to send, rows in batches of their own, of which the third does not arrive; returns once all others have that may be
/// on their way with it.
async fn with_a_batch_on_its_way(
    kinesalite: &Kinesalite,
    proxy: &KinesisProxy,
    route: &Route,
) -> Running {
    let kinesis = Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap();
    let earlier: BTreeSet<u64> = records::parts(&kinesis)
        .await
        .iter()
        .map(|part| part.writer)
        .collect();
    proxy.hold_batch(3);
    let running = route.run(&[]);
    let later_ones = wait_until("later batches to be there", PATIENCE, || async {
        let mut parts = records::parts(&kinesis).await;
        parts.retain(|part| !earlier.contains(&part.writer));
        assert!(parts.iter().all(|part| part.batch != 3));
        parts.iter().any(|part| part.batch == 6)
    });
    let rows = async {
        for id in 1.. {
            insert(route, id).await;
        }
    };
    tokio::select! {
        () = later_ones => {}
        () = rows => {}
    }
    running
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_behind_a_batch_that_is_late_is_applied_before_it() {
    let site = Site::shared().await;
    let (kinesalite, proxy, route) = route(&site, "held", None).await;
    let running = route.run(&[]);
    running.wait_for_streaming(&route.database.name).await;
    running.stop().await;
    let applying = route.apply(&[]);
    applying.wait_for_streaming(&route.database.name).await;
    let running = with_a_batch_on_its_way(&kinesalite, &proxy, &route).await;
    let labels = [("database", route.database.name.as_str())];
    applying
        .wait_for_metric("dr_agent_stream_waiting_bytes", &labels, |bytes| {
            bytes > 0.0
        })
        .await;
    let (source, replica) = (
        route.database.source().await,
        route.database.replica().await,
    );
    // Neither is the slot told of what is behind it.
    let applied = "SELECT end_lsn FROM dr_agent.progress";
    let applied = replica.value(applied).await.unwrap();
    let confirmed = source
        .value(&route.slot("confirmed_flush_lsn"))
        .await
        .unwrap();
    assert!(lsn(&confirmed) <= lsn(&applied), "{confirmed} {applied}");
    let count = "SELECT count(*) FROM t";
    assert!(replica.number(count).await < source.number(count).await);
    proxy.hold_puts(false);
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    running.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_late_for_too_long_comes_out_of_the_archive() {
    let site = Site::shared().await;
    let (kinesalite, proxy, route) = route(&site, "overdue", Some(archive())).await;
    let (running, applying) = route.start().await;
    running.stop().await;
    let running = with_a_batch_on_its_way(&kinesalite, &proxy, &route).await;
    applying
        .wait_for_log(&[
            "is not finished by its writer",
            "looking for it in the archive",
        ])
        .await;
    applying.wait_for_log(&["filled from the archive"]).await;
    // It is still not there.
    let (source, replica) = (
        route.database.source().await,
        route.database.replica().await,
    );
    let confirmed = source
        .value(&route.slot("confirmed_flush_lsn"))
        .await
        .unwrap();
    let beyond = format!("SELECT end_lsn > '{confirmed}' FROM dr_agent.progress");
    wait_until(
        "more to be applied than the stream has",
        PATIENCE,
        || async { replica.holds(&beyond).await },
    )
    .await;
    proxy.hold_puts(false);
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_an_older_term_of_somebody_else_or_damaged_are_ignored_and_said_once_each() {
    let site = Site::shared().await;
    let (kinesalite, _proxy, route) = route(&site, "older", None).await;
    let (running, applying) = route.start().await;
    insert(&route, 1).await;
    route.database.expect_equal().await;
    running.stop().await;
    let kinesis = Kinesis::open_with(STREAM, &kinesalite.settings())
        .await
        .unwrap();
    // What comes next, as the agent of an older term would write it, another source's, and one whose end is damaged.
    let last = records::parts(&kinesis)
        .await
        .into_iter()
        .max_by_key(|part| part.end_lsn);
    let next = Part {
        previous_end_lsn: last.as_ref().unwrap().end_lsn,
        end_lsn: last.as_ref().unwrap().end_lsn + 1000,
        writer: 1,
        batch: 1,
        ..last.unwrap()
    };
    // Of version 1 nothing says whether it is damaged.
    let wrong = [
        Part {
            version: 1,
            term: 0,
            ..next.clone()
        },
        Part {
            version: 1,
            system_identifier: 1,
            ..next.clone()
        },
        next,
    ];
    let records: Vec<Record> = wrong
        .iter()
        .cycle()
        .take(6)
        .enumerate()
        .map(|(n, part)| Record {
            partition_key: n.to_string(),
            data: part.encode_to_vec().into(),
        })
        .collect();
    kinesis.put(records, &|_| {}).await.unwrap();
    for (reason, said) in [
        ("older_term", "an agent from before the last promotion"),
        ("other_history", "comes from another source"),
        ("unreadable", "is no change-log record"),
    ] {
        let labels = [
            ("database", route.database.name.as_str()),
            ("reason", reason),
        ];
        applying
            .wait_for_metric("dr_agent_stream_ignored_records_total", &labels, |n| {
                n == 2.0
            })
            .await;
        assert_eq!(applying.log().matches(said).count(), 1, "{reason}");
    }
    // The stream goes on without them.
    let running = route.run(&[]);
    insert(&route, 2).await;
    route.database.expect_equal().await;
    applying.expect_quiet_log();
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_table_that_was_dropped_do_not_ask_for_the_source_again_and_again() {
    let site = Site::shared().await;
    let (_kinesalite, _proxy, mut route) = route(&site, "dropped", None).await;
    let (running, applying) = route.start().await;
    route.database.wait_caught_up().await;
    applying.stop().await;
    let source = route.database.source().await;
    source.run("CREATE TABLE gone (id int PRIMARY KEY)").await;
    let published = format!(
        "SELECT count(*) = 1 FROM pg_publication_tables WHERE pubname = '{}' AND tablename = 'gone'",
        route.database.stream()
    );
    wait_until("the new table to be published", PATIENCE, || async {
        source.holds(&published).await
    })
    .await;
    source.run("INSERT INTO gone VALUES (1)").await;
    route.wait_sent().await;
    source.run("DROP TABLE gone").await;
    insert(&route, 1).await;
    route.wait_sent().await;
    // The source says that there is no such table any more.
    let applying = route.apply(&[]);
    let replica = route.database.replica().await;
    wait_until("what came later to be applied", PATIENCE, || async {
        replica.number("SELECT count(*) FROM t").await == 1
    })
    .await;
    applying.stop().await;
    // What is left out of it is in nobody's way, and nothing to be said once it is passed.
    let nowhere = "\"postgres://nobody@127.0.0.1:1/postgres\"";
    route.applier.configure("source.url", nowhere);
    let applying = route.apply(&[]);
    insert(&route, 2).await;
    wait_until("what came later to be applied", PATIENCE, || async {
        replica.number("SELECT count(*) FROM t").await == 2
    })
    .await;
    let log = applying.log();
    assert_eq!(line_with(&log, &["gone"]), None, "{log}");
    running.stop().await;
    applying.stop().await;
}
