//! Goal: what AWS refuses for a while stops nothing for good: rights, keys, streams and credentials heal as networks do.
//! Method: each side of route `kinesis` with a stream that refuses every call of one operation until the agent shows why, and an
//! archive whose bucket does; then it lets it through, and what was committed meanwhile arrives. (Every call with every refusal:
//! `cloud/tests.rs`.)

use dr_agent::pg::PgLsn;
use dr_agent_tests::archive::{agent_at, archive, position};
use dr_agent_tests::faults::{Fault as Refused, FaultyProxy};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Fault, KinesisProxy};
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_shown_and_tried_again_until_it_heals() {
    let site = Site::shared().await;
    let database = site.database("refusal").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(kinesalite.port()).await;
    let mut route = Route::new(database, proxy.port(), None);
    for agent in [&mut route.sender, &mut route.applier] {
        agent.configure("limits.retry_max", "\"500ms\"");
    }
    let (running, applying) = route.start().await;
    let name = route.database.name.as_str();
    for (n, (operation, fault, words)) in [
        (
            "PutRecords",
            Fault::Refuse(400, "AccessDeniedException"),
            "kinesis:PutRecords",
        ),
        (
            "PutRecords",
            Fault::RefuseRecords(|_| true, "KMSDisabledException"),
            "kms:GenerateDataKey",
        ),
        (
            "PutRecords",
            Fault::Refuse(400, "ResourceNotFoundException"),
            "create the stream",
        ),
        (
            "PutRecords",
            Fault::Refuse(400, "UnrecognizedClientException"),
            "AWS_ACCESS_KEY_ID",
        ),
        (
            "PutRecords",
            Fault::Refuse(403, "OfNextYear"),
            "words of AWS",
        ),
        (
            "GetRecords",
            Fault::Refuse(400, "KMSAccessDeniedException"),
            "kms:Decrypt",
        ),
        (
            "GetRecords",
            Fault::Refuse(400, "AccessDeniedException"),
            "kinesis:GetRecords",
        ),
        (
            "ListShards",
            Fault::Refuse(400, "AccessDeniedException"),
            "kinesis:ListShards",
        ),
        (
            "GetShardIterator",
            Fault::Refuse(403, "InvalidClientTokenId"),
            "AWS_ACCESS_KEY_ID",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.spoil_every(operation, Some(fault));
        let side = match operation {
            "PutRecords" => &running,
            _ => &applying,
        };
        if operation == "GetShardIterator" {
            // A reader has one already.
            proxy.spoil("GetRecords", Fault::Refuse(400, "ExpiredIteratorException"));
        }
        source.run(&format!("INSERT INTO t VALUES ({n})")).await;
        wait_until("the refusal to be shown", PATIENCE, || async {
            let shown = &side.status().await["databases"][0];
            shown["state"] == "retrying" && shown["hint"].to_string().contains(words)
        })
        .await;
        proxy.spoil_every(operation, None);
        side.wait_for_streaming(name).await;
        route.database.expect_equal().await;
    }
    running.stop().await;
    applying.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_is_refused_counts_it_says_it_and_goes_on_by_itself() {
    let site = Site::shared().await;
    let database = site.database("refused_archive").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let bucket = FaultyProxy::start(moto.port()).await;
    let spool = archive().with_file_name("spool");
    let mut agent = agent_at(&database, "s3://archive/prod", &spool);
    let endpoint = format!("http://127.0.0.1:{}", bucket.port());
    agent.surround(&moto::environment(&endpoint));
    agent.configure("limits.retry_max", "\"500ms\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let name = database.name.as_str();
    let retries = "dr_agent_archive_retries_total";
    for (n, (fault, words)) in [
        (Refused::Answer(403, "AccessDenied"), "s3:PutObject"),
        (Refused::Answer(400, "KMS.DisabledException"), "kms:Decrypt"),
        (
            Refused::Answer(403, "InvalidAccessKeyId"),
            "AWS_ACCESS_KEY_ID",
        ),
        (Refused::Answer(404, "NoSuchBucket"), "create the bucket"),
        (Refused::Page("ETag: \"5f4d\"\r\n"), "portal"),
    ]
    .into_iter()
    .enumerate()
    {
        let counted = async || {
            let metrics = running.metrics().await;
            metrics.value(retries, &[("database", name)]).unwrap_or(0.0)
        };
        let before = counted().await;
        bucket.spoil_every("PUT /archive/prod/", Some(fault));
        source.run(&format!("INSERT INTO t VALUES ({n})")).await;
        running
            .wait_for_log(&["the archive did not take a segment", words])
            .await;
        wait_until("another attempt", PATIENCE, || async {
            counted().await >= before + 2.0
        })
        .await;
        // The replica does not wait for it.
        database.expect_equal().await;
        let here: PgLsn = position(&source).await.parse().unwrap();
        let here = u64::from(here) as f64;
        bucket.spoil_every("PUT /archive/prod/", None);
        let labels = [("database", name), ("sink", "archive")];
        running
            .wait_for_metric("dr_agent_sink_flush_lsn", &labels, |lsn| lsn >= here)
            .await;
    }
    running.stop().await;
}
