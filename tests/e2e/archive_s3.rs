//! Goal: an archive on S3 becomes what it would have become, whatever the network and a busy service do meanwhile; and nothing is left
//! there of what came to nothing.
//! Method: the whole commands against moto; in between a proxy that spoils chosen requests and another one that is the network.
//! What is there in the end is read back, restored, and compared with what the source remembers.

use std::path::Path;
use std::time::{Duration, Instant};

use dr_agent::archive::log::Spool;
use dr_agent::cloud::store::{Encryption, Store};
use dr_agent::pg::PgLsn;
use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::archive::{
    TABLES, agent_at, archive, expect_state, files_below, first_base, position, restore, work,
};
use dr_agent_tests::client::Client;
use dr_agent_tests::faults::{Fault, FaultyProxy};
use dr_agent_tests::moto::{self, Moto, SECRET};
use dr_agent_tests::proxy::{Line, Proxy};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const BUCKET: &str = "archive";

/// A table of 40 MiB that compress to more than two parts of an upload.
const BIG: &str = "
    CREATE TABLE big (id int PRIMARY KEY, v text);
    INSERT INTO big SELECT g, (SELECT string_agg(md5(g::text || i::text), '') FROM generate_series(1, 32) AS i)
      FROM generate_series(1, 40000) AS g";

/// What [`BIG`] holds, as a digest.
const BIG_STATE: &str = "SELECT md5(string_agg(md5(id || v), '' ORDER BY id)) FROM big";

/// A refusal that the SDK does not repeat by itself.
const STALE: Fault = Fault::Answer(400, "ExpiredToken");

/// A bucket, and the way there.
struct Bucket {
    moto: Moto,
    faults: FaultyProxy,
    network: Proxy,
}

impl Bucket {
    async fn new() -> Self {
        let moto = Moto::start().await;
        moto.create_bucket(BUCKET).await;
        let faults = FaultyProxy::start(moto.port()).await;
        let network = Proxy::start(faults.port()).await;
        Self {
            moto,
            faults,
            network,
        }
    }

    /// An agent with its archive there; each has a spool of its own.
    fn agent(&self, database: &Database) -> Agent {
        self.agent_with(database, &archive().with_file_name("spool"))
    }

    fn agent_with(&self, database: &Database, spool: &Path) -> Agent {
        let mut agent = agent_at(database, &format!("s3://{BUCKET}/prod"), spool);
        let endpoint = format!("http://127.0.0.1:{}", self.network.port());
        agent.surround(&moto::environment(&endpoint));
        agent
    }

    /// All objects.
    async fn names(&self) -> Vec<String> {
        let url = format!("s3://{BUCKET}/prod").parse().unwrap();
        let store = Store::open_with(&url, &Encryption::Default, &self.moto.settings()).await;
        let listed = store.unwrap().list("", None).await.unwrap();
        listed.into_iter().map(|object| object.name).collect()
    }

    /// Objects of base backups.
    async fn of_bases(&self) -> Vec<String> {
        let mut names = self.names().await;
        names.retain(|name| name.contains("/base/"));
        names
    }

    async fn expect_no_open_uploads(&self) {
        wait_until("every upload to have ended", PATIENCE, || async {
            self.moto.open_uploads(BUCKET).await == 0
        })
        .await;
    }
}

async fn counted(running: &Running, database: &Database, name: &str) -> f64 {
    let labels = [("database", database.name.as_str())];
    let value = running.metrics().await.value(name, &labels);
    value.unwrap_or_else(|| panic!("there is no {name}"))
}

/// Waits until the archive's log reaches what is committed by now.
async fn wait_uploaded(running: &Running, database: &Database, source: &Client) {
    let here = position(source).await;
    let here = u64::from(here.parse::<PgLsn>().unwrap()) as f64;
    let labels = [("database", database.name.as_str()), ("sink", "archive")];
    running
        .wait_for_metric("dr_agent_sink_flush_lsn", &labels, |lsn| lsn >= here)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn base_backups_and_restores_go_on_through_a_broken_network_and_a_busy_service() {
    let site = Site::shared().await;
    let database = site.database("spoilt").await;
    let bucket = Bucket::new().await;
    let mut agent = bucket.agent(&database);
    agent.configure("archive.encryption", "\"sse-s3\"");
    let source = database.source().await;
    source.run(TABLES).await;
    source.run(BIG).await;

    let faults = &bucket.faults;
    faults.spoil("pre-data.sql.zst?", Fault::Answer(503, "SlowDown"));
    faults.spoil("roles.sql.zst?", Fault::LoseAnswer);
    faults.spoil(
        "sequences.sql.zst?",
        Fault::Answer(409, "ConditionalRequestConflict"),
    );
    faults.spoil("00001.copy.zst?uploads", Fault::Cut);
    faults.spoil("partNumber=1&", Fault::Slow(8 << 20));
    // The rows are read again.
    faults.spoil("partNumber=2&", STALE);
    faults.spoil("partNumber=3&", Fault::LoseAnswer);
    // Completed, and the answer lost.
    faults.spoil("00001.copy.zst?uploadId", Fault::LoseAnswer);
    faults.spoil(
        "00001.copy.zst?uploadId",
        Fault::Answer(404, "NoSuchUpload"),
    );
    faults.spoil("manifest.json?x-id=PutObject", STALE);
    faults.spoil("manifest.json?x-id=PutObject", Fault::LoseAnswer);
    faults.spoil("/log/", Fault::Cut);
    faults.spoil("/log/", Fault::LoseAnswer);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    let moments = work(&source, 6, 0).await;
    wait_uploaded(&running, &database, &source).await;
    assert_eq!(faults.unused(), 0);
    for (name, at_least) in [
        ("dr_agent_archive_retries_total", 2.0),
        ("dr_agent_archive_throttled_total", 1.0),
        ("dr_agent_archive_base_bytes", 16e6),
        ("dr_agent_archive_base_progress", 1.0),
        ("dr_agent_archive_base_seconds", 1.0),
    ] {
        let value = counted(&running, &database, name).await;
        assert!(value >= at_least, "{name} is {value}");
    }
    for name in [
        "dr_agent_archive_failed_bases_total",
        "dr_agent_archive_gaps_total",
    ] {
        assert_eq!(counted(&running, &database, name).await, 0.0, "{name}");
    }
    running.expect_quiet_log();

    // By hand; and an upload that somebody else has aborted.
    faults.spoil(
        "00001.copy.zst?uploadId",
        Fault::Answer(404, "NoSuchUpload"),
    );
    faults.spoil("load.sql?", STALE);
    let taken = agent.command(&["backup"]).await;
    taken
        .expect_code(0)
        .expect_words(&["will retry", "00001.copy.zst"])
        .expect_words(&["will retry", "load.sql"]);
    running.stop().await;
    assert_eq!(faults.unused(), 0);
    bucket.expect_no_open_uploads().await;
    faults.spoil("00001.copy.zst?x-id=GetObject", Fault::BreakAfter(5 << 20));
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["2 base backups", "sound"]);

    for (line, fault) in [
        (
            "manifest.json?x-id=GetObject",
            Fault::Answer(503, "SlowDown"),
        ),
        ("schema.dump?x-id=GetObject", Fault::Cut),
        ("00001.copy.zst?x-id=GetObject", Fault::BreakAfter(1 << 20)),
        ("00001.copy.zst?x-id=GetObject", Fault::Slow(20 << 20)),
        ("/log/", Fault::BreakAfter(7)),
    ] {
        faults.spoil(line, fault);
    }
    let last = moments.last().unwrap();
    restore(
        &database,
        &agent,
        "after_spoiling",
        &["--to-lsn", &last.lsn],
    )
    .await
    .expect_code(0);
    assert_eq!(faults.unused(), 0);
    expect_state(&database, "after_spoiling", last).await;
    let restored = database.replica_server().client("after_spoiling").await;
    assert_eq!(
        restored.value(BIG_STATE).await,
        source.value(BIG_STATE).await
    );

    let heads = faults.heads();
    let begins = |head: &&String| {
        let begun = head.starts_with("post ") && head.contains("?uploads");
        let put = head.starts_with("put ") && !head.contains("partnumber=");
        begun || put
    };
    let begun: Vec<&String> = heads.iter().filter(begins).collect();
    assert!(begun.len() > 20, "{}", begun.len());
    for head in begun {
        let encrypted = "\r\nx-amz-server-side-encryption: aes256\r\n";
        assert!(head.contains(encrypted), "{head}");
    }
    assert!(heads.iter().all(|head| !head.contains(SECRET)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_may_be_away_at_the_start_and_in_between() {
    let site = Site::shared().await;
    let database = site.database("away").await;
    let bucket = Bucket::new().await;
    let agent = bucket.agent(&database);
    let source = database.source().await;
    source.run(TABLES).await;

    bucket.network.cut();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    // An alert on its age works from the start.
    let last = "dr_agent_archive_last_segment_timestamp_seconds";
    let now = source
        .number("SELECT extract(epoch FROM now())::bigint")
        .await as f64;
    let age = now - counted(&running, &database, last).await;
    assert!((-1.0..60.0).contains(&age), "{age} seconds");
    let early = work(&source, 6, 0).await;
    database.expect_equal().await;
    let labels = [("database", database.name.as_str())];
    let retries = "dr_agent_archive_retries_total";
    running
        .wait_for_metric(retries, &labels, |retries| retries >= 1.0)
        .await;
    assert!(counted(&running, &database, "dr_agent_archive_spool_bytes").await > 0.0);
    bucket.network.heal();
    first_base(&running, &database).await;
    wait_uploaded(&running, &database, &source).await;

    let mut moments = work(&source, 6, 100).await;
    bucket.network.cut();
    let so_far = counted(&running, &database, retries).await;
    let mut round = 200;
    // It is five attempts of the SDK.
    while counted(&running, &database, retries).await < so_far + 1.0 {
        moments.extend(work(&source, 2, round).await);
        round += 2;
    }
    bucket.network.heal();
    moments.extend(work(&source, 6, round).await);
    wait_uploaded(&running, &database, &source).await;
    // Known across a restart, whether anything is uploaded by then or not.
    let uploaded_at = counted(&running, &database, last).await;
    assert_eq!(
        counted(&running, &database, "dr_agent_archive_gaps_total").await,
        0.0
    );
    running.stop().await;
    bucket.network.cut();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running
        .wait_for_metric(last, &labels, |at| {
            (uploaded_at..uploaded_at + 30.0).contains(&at)
        })
        .await;
    bucket.network.heal();
    source.run("INSERT INTO bag VALUES ('later')").await;
    wait_uploaded(&running, &database, &source).await;
    running.stop().await;

    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    bucket.expect_no_open_uploads().await;
    for (i, moment) in moments.iter().enumerate().step_by(moments.len() / 3) {
        let name = format!("after_away_{i}");
        restore(&database, &agent, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
    // Before the first base backup there is log, and nothing that it leads on from.
    restore(&database, &agent, "too_early", &["--to-lsn", &early[0].lsn])
        .await
        .expect_code(1)
        .expect_words(&["no base backup leads to"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_backup_that_comes_to_nothing_leaves_nothing() {
    let site = Site::shared().await;
    let database = site.database("nothing").await;
    let bucket = Bucket::new().await;
    let agent = bucket.agent(&database);
    let source = database.source().await;
    source.run(TABLES).await;
    source.run(BIG).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    running.stop().await;
    let before = bucket.of_bases().await;
    assert!(before.len() > 5, "{before:?}");

    // Refused for good, while the large table is on its way.
    bucket.faults.spoil("partNumber=1&", Fault::Slow(4 << 20));
    bucket
        .faults
        .spoil("partNumber=2&", Fault::Answer(400, "InvalidRequest"));
    let refused = agent.command(&["backup", "--json"]).await;
    refused
        .expect_code(1)
        .expect_words(&["not accepted", "00001.copy.zst"])
        .expect_words(&["words of AWS"]);
    let said = refused.json();
    let error = said[0]["error"].as_str().unwrap();
    assert!(error.contains("not accepted"), "{said}");
    assert_eq!(bucket.faults.unused(), 0);
    assert_eq!(bucket.of_bases().await, before);
    assert_eq!(bucket.moto.open_uploads(BUCKET).await, 0);

    // Told to stop, by either signal: soon, and as thoroughly.
    for name in ["TERM", "INT"] {
        bucket.network.stretch(Line {
            delay: Duration::ZERO,
            bytes_per_second: Some(2 << 20),
        });
        let mut taking = agent.spawn(&["backup"], &[]);
        wait_until("an upload to be under way", PATIENCE, || async {
            bucket.moto.open_uploads(BUCKET).await > 0
        })
        .await;
        assert!(bucket.of_bases().await.len() > before.len());
        let told_at = Instant::now();
        dr_agent_tests::rundir::signal(name, &[taking.pid()]);
        taking.expect_exit(1).await;
        let took = told_at.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?} after SIG{name}");
        bucket.network.heal();
        assert_eq!(bucket.of_bases().await, before, "after SIG{name}");
        assert_eq!(bucket.moto.open_uploads(BUCKET).await, 0);
        let log = taking.log();
        assert!(log.contains("the backup was stopped"), "{log}");
    }
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["1 base backups", "sound"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_agents_at_once_in_one_place_overwrite_nothing() {
    let site = Site::shared().await;
    let database = site.database("twice").await;
    let bucket = Bucket::new().await;
    bucket.moto.keep_versions(BUCKET).await;
    let spool = archive().with_file_name("spool");
    let (one, other) = (
        bucket.agent_with(&database, &spool),
        bucket.agent(&database),
    );
    let source = database.source().await;
    source.run(TABLES).await;
    let mut first = one.start();
    first.wait_for_streaming(&database.name).await;
    first_base(&first, &database).await;
    let second = other.start();
    let labels = [("database", database.name.as_str())];
    let segments = "dr_agent_archive_segments_total";
    second.wait_for_log(&["is in use", "will retry"]).await;
    let mut moments = work(&source, 12, 0).await;
    let (taken, also) = tokio::join!(one.command(&["backup"]), other.command(&["backup"]));
    // At the same position one of them gives way.
    assert!(taken.code == Some(0) || also.code == Some(0));
    for outcome in [&taken, &also] {
        if outcome.code != Some(0) {
            outcome.expect_code(1).expect_words(&["is there already"]);
        }
    }
    // What the first one has in its spool is no gap, and no base backup is taken for it.
    for word in ["has a gap", "taking a base backup"] {
        assert!(!second.log().contains(word), "{word}");
    }
    // The other one takes over, and what the first one has not uploaded is on its disk and nowhere else.
    let busy = Fault::Answer(503, "SlowDown");
    bucket.faults.spoil_every("PUT /", Some(busy));
    source.run("INSERT INTO bag VALUES ('kept')").await;
    wait_until("the spool to have a segment", PATIENCE, || async {
        let mut files = files_below(&spool).into_iter();
        files.any(|file| file.extension().is_some_and(|ending| ending == "log"))
    })
    .await;
    first.kill();
    bucket.faults.spoil_every("PUT /", None);
    second.wait_for_streaming(&database.name).await;
    moments.extend(work(&source, 6, 12).await);
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    wait_uploaded(&second, &database, &source).await;
    second
        .wait_for_metric(segments, &labels, |segments| segments > 3.0)
        .await;
    // It brings it when it is started again.
    assert!(Spool::waiting(&spool).is_some_and(|bytes| bytes > 0));
    let again = one.start();
    again
        .wait_for_metric(segments, &labels, |segments| segments >= 1.0)
        .await;
    wait_until("the spool to be empty", PATIENCE, || async {
        Spool::waiting(&spool) == Some(0)
    })
    .await;
    again.stop().await;
    second.stop().await;
    assert_eq!(bucket.moto.written_twice(BUCKET).await, [""; 0]);
    other
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    for (i, moment) in moments.iter().enumerate().step_by(moments.len() / 3) {
        let name = format!("of_both_{i}");
        restore(&database, &other, &name, &["--to-lsn", &moment.lsn])
            .await
            .expect_code(0);
        expect_state(&database, &name, moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_overwrites_is_found_by_check_and_so_are_uploads_that_nobody_ends() {
    let site = Site::shared().await;
    let database = site.database("careless").await;
    let bucket = Bucket::new().await;
    let agent = bucket.agent(&database);
    let check = async || agent.command(&["check"]).await;
    let left = async |expected: usize| assert_eq!(bucket.names().await.len(), expected);

    let note = ["note", "archive_uploads", "no lifecycle rule"];
    let rule = |status: &str, prefix: &str| {
        format!(
            "<Rule><ID>a</ID><Status>{status}</Status><Filter><Prefix>{prefix}</Prefix></Filter>\
             <AbortIncompleteMultipartUpload><DaysAfterInitiation>1</DaysAfterInitiation>\
             </AbortIncompleteMultipartUpload></Rule>"
        )
    };
    check().await.expect_code(0).expect_words(&note);
    for (rule, ends) in [
        (rule("Disabled", ""), false),
        (rule("Enabled", "elsewhere/"), false),
        (rule("Enabled", "prod/"), true),
        (rule("Enabled", ""), true),
    ] {
        bucket.moto.lifecycle(BUCKET, &rule).await;
        let outcome = check().await;
        outcome.expect_code(0);
        assert_eq!(!outcome.text().contains(note[1]), ends, "{rule}");
    }
    // Who may not ask is told nothing.
    bucket.moto.lifecycle(BUCKET, &rule("Disabled", "")).await;
    bucket
        .faults
        .spoil("?lifecycle", Fault::Answer(403, "AccessDenied"));
    let outcome = check().await;
    outcome.expect_code(0);
    assert!(!outcome.text().contains("archive_uploads"));
    assert_eq!(bucket.faults.unused(), 0);
    left(0).await;
    assert_eq!(bucket.moto.open_uploads(BUCKET).await, 0);

    let deaf = Fault::Forget("if-none-match");
    // The second write, and the completion of an upload.
    for faults in [
        &[("/check/", Fault::Slow(1 << 20)), ("/check/", deaf)][..],
        &[("?uploadId", deaf)],
    ] {
        for (line, fault) in faults {
            bucket.faults.spoil(line, *fault);
        }
        let outcome = check().await;
        outcome
            .expect_code(1)
            .expect_words(&["error", "archive_store", "was overwritten"])
            .expect_words(&["If-None-Match"]);
        assert_eq!(bucket.faults.unused(), 0);
        left(0).await;
    }
    assert_eq!(bucket.moto.open_uploads(BUCKET).await, 0);
    // The right to abort is tried as well.
    bucket
        .faults
        .spoil("AbortMultipartUpload", Fault::Answer(403, "AccessDenied"));
    let outcome = check().await;
    outcome
        .expect_code(1)
        .expect_words(&["archive_store", "write"])
        .expect_words(&["denied: AccessDenied"])
        .expect_words(&["s3:AbortMultipartUpload"]);
    assert_eq!(bucket.faults.unused(), 0);
}
