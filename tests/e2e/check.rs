//! Goal: `check` names everything that stands in the way at once, each with what to do, and touches nothing.
//! Method: a source with many faults, then none; an archive that lacks one thing after the other; findings are compared by
//! their stable codes.

use std::collections::BTreeSet;
use std::fs;

use dr_agent::cloud::store::{Encryption, Store};
use dr_agent_tests::agent::{Agent, Outcome};
use dr_agent_tests::faults::{Fault, FaultyProxy};
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;

fn codes(outcome: &Outcome, severity: &str) -> BTreeSet<String> {
    outcome.json()["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] == severity)
        .map(|finding| finding["code"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn every_fault_is_reported_at_once_with_a_hint_each() {
    let source = ServerOptions::source().set("wal_level", "replica");
    let site = Site::with(source, ServerOptions::replica()).await;
    let database = site.database("faults").await;
    database
        .source()
        .await
        .run(
            "CREATE TABLE keyless (a int); CREATE TABLE fine (id int PRIMARY KEY);
             CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
             CREATE MATERIALIZED VIEW seen AS SELECT * FROM fine; SELECT lo_create(0)",
        )
        .await;
    let agent = database.agent();
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(1);
    let errors = codes(&outcome, "error");
    for code in ["wal_level", "keyless_table"] {
        assert!(
            errors.contains(code),
            "{code} is not among the errors {errors:?}"
        );
    }
    let report = outcome.json();
    let findings = report["findings"].as_array().unwrap();
    for finding in findings
        .iter()
        .filter(|finding| finding["severity"] == "error")
    {
        assert!(
            finding["hint"].is_string(),
            "an error without a hint: {finding}"
        );
    }
    for code in ["unlogged_table", "materialized_view", "large_object"] {
        assert!(
            findings.iter().any(|finding| finding["code"] == code),
            "{code} is not reported"
        );
    }
    assert_eq!(
        report["errors"].as_u64().unwrap(),
        findings.iter().filter(|f| f["severity"] == "error").count() as u64
    );

    let text = agent.command(&["check"]).await;
    text.expect_code(1)
        .expect_words(&["wal_level"])
        .expect_words(&["public.keyless"]);
    let source = database.source().await;
    assert!(
        source
            .holds("SELECT to_regnamespace('dr_agent') IS NULL")
            .await,
        "check has made something"
    );
    assert_eq!(
        source.number("SELECT count(*) FROM pg_publication").await,
        0
    );
    assert_eq!(
        source
            .number("SELECT count(*) FROM pg_replication_slots")
            .await,
        0
    );
}

#[tokio::test]
async fn a_pair_without_faults_is_found_right_before_and_while_it_replicates() {
    let site = Site::shared().await;
    let database = site.database("faultless").await;
    database
        .source()
        .await
        .run("CREATE TABLE t (id int PRIMARY KEY)")
        .await;
    let agent = database.agent();
    agent.command(&["check"]).await.expect_code(0);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(0);
    assert_eq!(outcome.json()["errors"], 0);

    // Differences that grew on the replica.
    let replica = database.writable_replica().await;
    replica
        .run("ALTER TABLE t ADD extra int; CREATE UNIQUE INDEX ON t (extra)")
        .await;
    let outcome = agent.command(&["check", "--json"]).await;
    let all: BTreeSet<_> = ["error", "warning", "note"]
        .iter()
        .flat_map(|severity| codes(&outcome, severity))
        .collect();
    assert!(
        all.contains("column_extra") && all.contains("unique_extra"),
        "{all:?}"
    );
    running.stop().await;
}

#[tokio::test]
async fn missing_rights_are_named() {
    let site = Site::shared().await;
    let database = site.database("rights").await;
    let role = format!("weak_{}", database.name);
    let source = database.source().await;
    source
        .run(&format!(
            "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE {role} LOGIN"
        ))
        .await;
    let mut agent = database.agent();
    let url = site
        .source
        .url("postgres")
        .replace("postgres://postgres@", &format!("postgres://{role}@"));
    agent.configure("source.url", &format!("\"{url}\""));
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(1);
    let errors = codes(&outcome, "error");
    assert!(errors.contains("role_replication"), "{errors:?}");
    source.run(&format!("DROP ROLE {role}")).await;
}

/// The findings about the archive: severity, code, message and hint.
fn of_the_archive(outcome: &Outcome) -> Vec<[String; 4]> {
    let codes = [
        "archive_store",
        "spool_directory",
        "spool_room",
        "segment_bytes",
        "segment_age",
    ];
    let report = outcome.json();
    let findings = report["findings"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    findings
        .filter(|finding| codes.contains(&finding["code"].as_str().unwrap()))
        .map(|finding| ["severity", "code", "message", "hint"].map(|key| text(&finding[key])))
        .collect()
}

/// The finding of this severity and code whose message and hint together have all these words.
#[track_caller]
fn expect_finding(outcome: &Outcome, severity: &str, code: &str, words: &[&str]) {
    let found = of_the_archive(outcome);
    let fits = |finding: &&[String; 4]| {
        let text = format!("{} {}", finding[2], finding[3]);
        finding[0] == severity && finding[1] == code && words.iter().all(|word| text.contains(word))
    };
    assert!(
        found.iter().any(|finding| fits(&finding)),
        "no {severity} {code} with {words:?} in {found:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_in_a_directory_is_tried_and_left_as_it_was() {
    let site = Site::shared().await;
    let database = site.database("checked").await;
    let directory = directory_for("archive");
    let (archive, spool) = (directory.join("objects"), directory.join("spool"));
    let mut agent = Agent::new(
        database
            .config()
            .set_text("archive.url", &format!("file://{}", archive.display()))
            .set_text("archive.spool_directory", &spool.display().to_string())
            .set_text("archive.spool_bytes", "128MiB"),
    );
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(0);
    expect_finding(
        &outcome,
        "note",
        "archive_store",
        &["will be created", "not mounted"],
    );
    expect_finding(&outcome, "ok", "spool_directory", &["will be created"]);
    assert!(
        !archive.exists() && !spool.exists(),
        "check has made something"
    );

    fs::create_dir(&archive).unwrap();
    fs::create_dir(&spool).unwrap();
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(0);
    expect_finding(
        &outcome,
        "ok",
        "archive_store",
        &["written, read, listed and deleted"],
    );
    expect_finding(&outcome, "ok", "spool_directory", &["is writable"]);
    assert_eq!(of_the_archive(&outcome).len(), 2, "{}", outcome.stdout);
    assert_eq!(fs::read_dir(&archive).unwrap().count(), 0);
    agent
        .command(&["check"])
        .await
        .expect_code(0)
        .expect_words(&["ok", "archive_store", &archive.display().to_string()]);

    // Larger than any disk, and smaller than two segments.
    agent.configure("archive.spool_bytes", "\"900PiB\"");
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(0);
    expect_finding(
        &outcome,
        "warning",
        "spool_room",
        &["900.0 PiB for 1 database", "has a gap"],
    );
    agent.configure("archive.spool_bytes", "\"100MiB\"");
    let outcome = agent.command(&["check", "--json"]).await;
    expect_finding(
        &outcome,
        "warning",
        "segment_bytes",
        &["100.0 MiB", "64.0 MiB"],
    );

    // Files where directories must be: neither can be written to, not even by root.
    for path in [&archive, &spool] {
        fs::remove_dir(path).unwrap();
        fs::write(path, "").unwrap();
    }
    let outcome = agent.command(&["check", "--json"]).await;
    outcome.expect_code(1);
    expect_finding(&outcome, "error", "archive_store", &["write", "directory"]);
    expect_finding(
        &outcome,
        "error",
        "spool_directory",
        &["not writable", "archive.spool_directory"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_right_that_the_bucket_lacks_is_named_at_once() {
    let site = Site::shared().await;
    let database = site.database("checked").await;
    let moto = Moto::start().await;
    let proxy = FaultyProxy::start(moto.port()).await;
    let spool = directory_for("spool").display().to_string();
    let agent = Agent::new(
        database
            .config()
            .set_text("archive.url", "s3://archive/prod")
            .set_text("archive.encryption", "sse-kms")
            .set_text("archive.kms_key", "alias/archive")
            .set_text("archive.spool_directory", &spool)
            .set_text("archive.spool_bytes", "128MiB"),
    );
    let endpoint = format!("http://127.0.0.1:{}", proxy.port());
    let environment = moto::environment(&endpoint);
    let check = async || agent.command_with(&["check", "--json"], &environment).await;

    let outcome = check().await;
    outcome.expect_code(1);
    expect_finding(
        &outcome,
        "error",
        "archive_store",
        &["no such bucket", "create the bucket"],
    );
    assert_eq!(of_the_archive(&outcome).len(), 2, "{}", outcome.stdout);

    moto.create_bucket("archive").await;
    let outcome = check().await;
    outcome.expect_code(0);
    expect_finding(
        &outcome,
        "ok",
        "archive_store",
        &["SSE-KMS", "alias/archive"],
    );
    let lines = [
        "PUT /archive/prod/check/",
        "GET /archive/prod/check/",
        "GET /archive/?",
        "DELETE /archive/prod/check/",
    ];
    for line in lines {
        proxy.spoil(line, Fault::Answer(403, "AccessDenied"));
    }
    let outcome = check().await;
    outcome.expect_code(1);
    for right in [
        "s3:PutObject",
        "s3:GetObject",
        "s3:ListBucket",
        "s3:DeleteObject",
    ] {
        expect_finding(
            &outcome,
            "error",
            "archive_store",
            &["access denied", right],
        );
    }
    proxy.spoil(lines[0], Fault::Answer(400, "KMS.DisabledException"));
    let outcome = check().await;
    outcome.expect_code(1);
    expect_finding(
        &outcome,
        "error",
        "archive_store",
        &["KMS key", "kms:GenerateDataKey"],
    );
    assert_eq!(proxy.unused(), 0);
    let url = "s3://archive".parse().unwrap();
    let store = Store::open_with(&url, &Encryption::Default, &moto.settings()).await;
    assert_eq!(store.unwrap().list("", None).await.unwrap(), []);

    let text = outcome.text();
    assert!(!text.contains(moto::SECRET), "{text}");
    drop(moto);
    let outcome = check().await;
    outcome.expect_code(1);
    expect_finding(
        &outcome,
        "error",
        "archive_store",
        &["cannot be reached", "AWS_ENDPOINT_URL"],
    );
}
