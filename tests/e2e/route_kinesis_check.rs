//! Goal: under route `kinesis`, `check` names what is wrong with the stream and which command a missing right stops, and
//! `check` and `status` are of use on either side where the other cannot be reached.
//! Method: a stream of a stand-in with one fault after the other, through a proxy that refuses; then both sides, each with a URL
//! behind which nobody listens.

use std::fs;
use std::time::Instant;

use dr_agent::cloud::kinesis::{Event, Kinesis, StartAt};
use dr_agent_tests::agent::{Agent, AgentConfig, Outcome};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Fault, KinesisProxy};
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_for};
use serde_json::json;
use tokio::sync::mpsc;

const STREAM: &str = "dr-agent";

/// Where nobody listens.
const NOWHERE: &str = "postgres://nobody@127.0.0.1:1/postgres";

const DENIED: Fault = Fault::Refuse(400, "AccessDeniedException");

fn config(database: &Database) -> AgentConfig {
    database
        .config()
        .databases(&[&database.name])
        .set_text("route.kind", "kinesis")
        .set_text("route.stream", STREAM)
}

/// Severity, side, code, and message and hint together.
fn findings(outcome: &Outcome) -> Vec<[String; 4]> {
    let report = outcome.json();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let finding = |finding: &serde_json::Value| {
        [
            text(&finding["severity"]),
            text(&finding["side"]),
            text(&finding["code"]),
            format!("{} {}", text(&finding["message"]), text(&finding["hint"])),
        ]
    };
    let all = report["findings"].as_array().unwrap();
    all.iter().map(finding).collect()
}

/// There is such a finding, with all these words.
#[track_caller]
fn expect(outcome: &Outcome, severity: &str, side: &str, code: &str, words: &[&str]) {
    let found = findings(outcome);
    let fits = |one: &[String; 4]| {
        one[0] == severity
            && one[1] == side
            && one[2] == code
            && words.iter().all(|word| one[3].contains(word))
    };
    assert!(
        found.iter().any(fits),
        "no {severity} {side} {code} with {words:?} in {found:#?}"
    );
}

#[track_caller]
fn expect_none(outcome: &Outcome, codes: &[&str]) {
    let found = findings(outcome);
    let shown = |one: &&[String; 4]| codes.contains(&one[2].as_str());
    let shown: Vec<_> = found.iter().filter(shown).collect();
    assert!(shown.is_empty(), "{shown:#?}");
}

/// Records that the stream has.
async fn records(kinesis: &Kinesis) -> usize {
    let (events, mut seen) = mpsc::channel(8);
    let (now, reading) = (Instant::now(), kinesis.clone());
    let reading =
        tokio::spawn(async move { reading.read(StartAt::TrimHorizon, events, &|_| {}).await });
    let mut count = 0;
    while let Some(event) = seen.recv().await {
        match event {
            Event::Records(more) => count += more.data.len(),
            Event::ReadUpTo(at) if at >= now => break,
            Event::ReadUpTo(_) => {}
        }
    }
    reading.abort();
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_finding_about_the_stream_appears_and_disappears() {
    let site = Site::shared().await;
    let (one, other) = (site.database("one").await, site.database("other").await);
    let moto = Moto::start().await;
    let proxy = KinesisProxy::start(moto.port()).await;
    let endpoint = format!("http://127.0.0.1:{}", proxy.port());
    let environment = moto::environment(&endpoint);
    let mut agent = Agent::new(config(&one).databases(&[&one.name, &other.name]));
    let agent_at = &environment;
    let check = async |agent: &Agent| agent.command_with(&["check", "--json"], agent_at).await;

    let outcome = check(&agent).await;
    outcome.expect_code(1);
    expect(
        &outcome,
        "error",
        "agent",
        "kinesis_stream",
        &["no such stream", "create the stream"],
    );
    expect_none(
        &outcome,
        &["kinesis_write", "kinesis_read", "kinesis_retention"],
    );

    streams::create(moto.port(), STREAM, 2).await;
    let outcome = check(&agent).await;
    outcome.expect_code(0);
    expect(&outcome, "ok", "agent", "kinesis_stream", &["active"]);
    expect(
        &outcome,
        "warning",
        "agent",
        "kinesis_retention",
        &["24 h", "copied again", "hours 72"],
    );
    expect(
        &outcome,
        "ok",
        "agent",
        "kinesis_shards",
        &["2 databases share them"],
    );
    expect(
        &outcome,
        "note",
        "agent",
        "kinesis_encryption",
        &["kms:GenerateDataKey", "kms:Decrypt"],
    );
    expect(&outcome, "ok", "agent", "kinesis_write", &["PutRecords"]);
    expect(&outcome, "ok", "agent", "kinesis_read", &[]);

    agent.configure("source.databases", &format!("[\"{}\"]", one.name));
    streams::keep(moto.port(), STREAM, 168).await;
    streams::encrypt(moto.port(), STREAM, "alias/dr").await;
    let outcome = check(&agent).await;
    outcome.expect_code(0);
    expect(&outcome, "ok", "agent", "kinesis_retention", &["168 h"]);
    expect(
        &outcome,
        "ok",
        "agent",
        "kinesis_shards",
        &["2 open shards take 2 MB/s"],
    );
    expect(&outcome, "ok", "agent", "kinesis_encryption", &["SSE-KMS"]);
    agent
        .command_with(&["check"], &environment)
        .await
        .expect_code(0)
        .expect_words(&["ok", "kinesis_stream", STREAM, "active"]);

    // Both servers can be reached: one of the commands is enough for that not to be an error.
    proxy.spoil("PutRecords", DENIED);
    let outcome = check(&agent).await;
    outcome.expect_code(0);
    expect(
        &outcome,
        "warning",
        "agent",
        "kinesis_write",
        &["dr-agent run", "kinesis:PutRecords"],
    );
    expect(&outcome, "ok", "agent", "kinesis_read", &[]);
    for operation in [
        "PutRecords",
        "ListShards",
        "GetShardIterator",
        "DescribeStreamSummary",
    ] {
        proxy.spoil(operation, DENIED);
    }
    let outcome = check(&agent).await;
    outcome.expect_code(1);
    expect(
        &outcome,
        "warning",
        "agent",
        "kinesis_stream",
        &["kinesis:DescribeStreamSummary"],
    );
    expect(
        &outcome,
        "error",
        "agent",
        "kinesis_write",
        &["kinesis:PutRecords"],
    );
    expect(
        &outcome,
        "error",
        "agent",
        "kinesis_read",
        &["kinesis:ListShards"],
    );
    expect(
        &outcome,
        "error",
        "agent",
        "kinesis_read",
        &["kinesis:GetShardIterator"],
    );
    proxy.spoil("GetRecords", Fault::Refuse(400, "KMSAccessDeniedException"));
    let outcome = check(&agent).await;
    expect(
        &outcome,
        "warning",
        "agent",
        "kinesis_read",
        &["apply and promote", "kms:Decrypt"],
    );
    assert_eq!(proxy.unused(), 0);

    // What is no Kinesis may answer for each record, or take what it must not.
    for (said, severity, words) in [
        (
            json!({"ErrorCode": "InvalidArgumentException", "ErrorMessage": "x"}),
            "ok",
            "is allowed",
        ),
        (
            json!({"ErrorCode": "AccessDeniedException", "ErrorMessage": "x"}),
            "warning",
            "kinesis:PutRecords",
        ),
        (
            json!({"SequenceNumber": "1", "ShardId": "shardId-000000000000"}),
            "warning",
            "was taken",
        ),
    ] {
        let answer = json!({"FailedRecordCount": 0, "Records": [said]});
        proxy.spoil("PutRecords", Fault::Answer(answer));
        let outcome = check(&agent).await;
        outcome.expect_code(0);
        expect(&outcome, severity, "agent", "kinesis_write", &[words]);
    }

    // Beside the source nothing reads, and beside the replica nothing puts.
    for (url, put, get) in [
        ("replica.url", "error", "note"),
        ("source.url", "note", "error"),
    ] {
        let side = Agent::new(config(&one).set_text(url, NOWHERE));
        proxy.spoil("PutRecords", DENIED);
        expect(
            &check(&side).await,
            put,
            "agent",
            "kinesis_write",
            &["kinesis:PutRecords"],
        );
        proxy.spoil("GetRecords", DENIED);
        expect(
            &check(&side).await,
            get,
            "agent",
            "kinesis_read",
            &["kinesis:GetRecords"],
        );
    }

    let kinesis = Kinesis::open_with(STREAM, &moto.settings()).await.unwrap();
    assert_eq!(records(&kinesis).await, 0, "check has put something");
    assert!(proxy.calls("PutRecords").len() > 5);
    assert!(!outcome.text().contains(moto::SECRET));
    drop(moto);
    let outcome = check(&agent).await;
    outcome.expect_code(1);
    expect(
        &outcome,
        "error",
        "agent",
        "kinesis_stream",
        &["cannot be reached", "AWS_ENDPOINT_URL"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_is_checked_where_it_does_not_see_the_other() {
    let site = Site::shared().await;
    let database = site.database("sides").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let endpoint = format!("http://127.0.0.1:{}", kinesalite.port());
    let environment = moto::environment(&endpoint);
    let check = async |agent: &Agent| agent.command_with(&["check", "--json"], &environment).await;
    let on_site = Agent::new(config(&database).set_text("replica.url", NOWHERE));
    let far = config(&database).set_text("source.url", NOWHERE);
    let beside = Agent::new(far.clone());
    let both = Agent::new(config(&database));
    let neither = Agent::new(far.clone().set_text("replica.url", NOWHERE));

    let outcome = check(&on_site).await;
    outcome.expect_code(0);
    expect(
        &outcome,
        "note",
        "replica",
        "connect",
        &["dr-agent run goes on without", "promote"],
    );
    expect(
        &outcome,
        "note",
        "both",
        "not_compared",
        &["the replica cannot be reached"],
    );
    expect(
        &outcome,
        "note",
        "replica",
        "first_copy",
        &["must reach the source"],
    );
    expect(
        &outcome,
        "ok",
        "source",
        "slot",
        &["dr-agent run creates it"],
    );
    expect(
        &outcome,
        "ok",
        "source",
        "max_replication_slots",
        &["while databases are copied from here"],
    );
    let outcome = check(&beside).await;
    outcome.expect_code(1);
    expect(
        &outcome,
        "note",
        "source",
        "connect",
        &["dr-agent run needs it"],
    );
    expect(&outcome, "error", "replica", "first_copy", &["[archive]"]);
    expect(
        &outcome,
        "ok",
        "replica",
        "database",
        &["dr-agent apply creates it"],
    );
    let outcome = check(&neither).await;
    outcome.expect_code(1);
    expect(&outcome, "error", "source", "connect", &[]);
    expect(&outcome, "error", "replica", "connect", &[]);
    let direct = database.config().set_text("replica.url", NOWHERE);
    let outcome = Agent::new(direct).command(&["check", "--json"]).await;
    outcome.expect_code(1);
    expect(&outcome, "error", "replica", "connect", &[]);
    expect_none(&outcome, &["not_compared", "first_copy", "kinesis_stream"]);

    // Beside the replica the archive is only read.
    let archive = directory_for("archive").join("objects");
    let reader = Agent::new(far.set_text("archive.url", &format!("file://{}", archive.display())));
    let outcome = check(&reader).await;
    outcome.expect_code(0);
    expect(
        &outcome,
        "warning",
        "agent",
        "archive_store",
        &["is not there"],
    );
    fs::create_dir_all(&archive).unwrap();
    let outcome = check(&reader).await;
    outcome.expect_code(0);
    expect(
        &outcome,
        "ok",
        "agent",
        "archive_store",
        &["read and listed"],
    );
    expect(
        &outcome,
        "note",
        "replica",
        "first_copy",
        &["newest base backup"],
    );
    expect_none(&outcome, &["spool_directory", "spool_room"]);
    assert_eq!(fs::read_dir(&archive).unwrap().count(), 0);

    let running = on_site.start_with(&environment);
    running.wait_for_streaming(&database.name).await;
    let applying = both.spawn(&["apply"], &environment);
    applying.wait_for_streaming(&database.name).await;
    expect(
        &check(&on_site).await,
        "ok",
        "source",
        "slot",
        &["is being sent from"],
    );
    // The slot is ahead of the replica, as it should be.
    applying.stop().await;
    for id in 0..3 {
        source.run(&format!("INSERT INTO t VALUES ({id})")).await;
    }
    for agent in [&both, &beside] {
        let outcome = check(agent).await;
        outcome.expect_code(0);
        expect_none(&outcome, &["first_copy", "slot_recreated", "slot_occupied"]);
    }
    running.stop().await;
    let outcome = check(&on_site).await;
    outcome.expect_code(0);
    expect(
        &outcome,
        "note",
        "source",
        "slot_inactive",
        &["in the stream"],
    );
    database.drop_slot().await;
    for agent in [&on_site, &both] {
        let outcome = check(agent).await;
        outcome.expect_code(1);
        expect(
            &outcome,
            "error",
            "source",
            "slot_missing",
            &["dr_agent.sending", "nobody needs", "dr-agent apply"],
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_told_on_either_side_and_silence_is_not_health() {
    let site = Site::shared().await;
    let database = site.database("status").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let endpoint = format!("http://127.0.0.1:{}", kinesalite.port());
    let environment = moto::environment(&endpoint);
    let on_site = Agent::new(config(&database).set_text("replica.url", NOWHERE));
    let mut beside = Agent::new(config(&database));
    let running = on_site.start_with(&environment);
    running.wait_for_streaming(&database.name).await;
    let applying = beside.spawn(&["apply"], &environment);
    applying.wait_for_streaming(&database.name).await;
    // It has its copy and needs the source no more.
    applying.stop().await;
    beside.configure("source.url", &format!("\"{NOWHERE}\""));
    let applying = beside.spawn(&["apply"], &environment);
    applying.wait_for_streaming(&database.name).await;
    let status = async |agent: &Agent, code: i32| {
        wait_for("the verdict", PATIENCE, || async {
            let outcome = agent
                .command_with(&["status", "--json"], &environment)
                .await;
            match outcome.code == Some(code) {
                true => Ok(outcome.json()),
                false => Err(outcome.text()),
            }
        })
        .await
    };

    let said = status(&on_site, 0).await;
    assert_eq!(
        (&said["within_rpo"], &said["replica"]["answers"]),
        (&true.into(), &false.into())
    );
    let shown = &said["databases"][0];
    assert_eq!(
        (&shown["leg"], &shown["rpo"]),
        (&"send".into(), &"met".into())
    );
    assert_eq!(shown["kinesis"]["stream"], STREAM);
    assert_eq!(shown["kinesis"]["active"], true);
    assert_eq!(shown["kinesis"]["retention_hours"], 24);
    on_site
        .command_with(&["status"], &environment)
        .await
        .expect_code(0)
        .expect_words(&["met as far as the Kinesis stream", "beside the replica"])
        .expect_words(&["replica", "out of reach from here"])
        .expect_words(&["stream dr-agent is active", "1 open shard", "24 h"]);
    let said = status(&beside, 0).await;
    assert_eq!(said["databases"][0]["leg"], "apply");
    assert!(said["databases"][0]["end_lsn"].is_string());
    for (process, leg, words) in [
        (&running, "send", "Sends into the Kinesis stream"),
        (&applying, "apply", "Applies the Kinesis stream"),
    ] {
        assert_eq!(process.status().await["databases"][0]["leg"], leg);
        let page = process.get("/").await.unwrap().body;
        assert!(page.contains(words), "{page}");
    }

    // Where both can be seen, what is sent and not applied is not on the replica.
    applying.stop().await;
    let mut seeing = on_site.config().clone().set_text("objectives.rpo", "2s");
    seeing = seeing.set_text("replica.url", &site.replica.url("postgres"));
    seeing = seeing.set_text("http.listen", &format!("127.0.0.1:{}", on_site.http_port()));
    let said = status(&Agent::new(seeing), 1).await;
    assert_eq!(said["databases"][0]["leg"], "send");
    assert_eq!(said["databases"][0]["rpo"], "breached");

    // Without its agent nobody on the site knows anything, and the database is still named.
    running.stop().await;
    let said = status(&on_site, 1).await;
    assert_eq!(said["databases"][0]["database"], database.name.as_str());
    assert_eq!(said["databases"][0]["rpo"], "unknown");
    drop(kinesalite);
    let said = status(&on_site, 1).await;
    let kinesis = &said["databases"][0]["kinesis"];
    assert!(
        kinesis["active"].is_null() && kinesis["error"].is_string(),
        "{kinesis}"
    );
}
