//! Goal: what is put into a stream is read, once at least and in a shard's order, through whatever a network and a busy
//! Kinesis do to single requests and an operator to shards; and a reader never says it is further than it is.
//! Method: the same tests on two independent stand-ins (moto and kinesalite) where both can; a proxy in front of them
//! refuses, cuts and loses chosen requests, and records all.

use std::collections::HashMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::{BufMut as _, Bytes, BytesMut};
use dr_agent::cloud::kinesis::{
    Event, Kinesis, KinesisError, PutStats, RECORD_BYTES_MAX, ReadStats, Record, Refusal, StartAt,
};
use dr_agent::error::{Class, Classify as _, chain};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::kinesis_faults::{Call, Fault, KinesisProxy};
use dr_agent_tests::moto::{Moto, SECRET, settings};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_for, wait_until};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const STREAM: &str = "changes";
const THROTTLED: &str = "ProvisionedThroughputExceededException";

/// Only held for its `Drop`.
#[allow(dead_code, reason = "the servers end with the value")]
enum StandIn {
    Moto(Moto),
    Kinesalite(Kinesalite),
}

/// Runs a test on both, each with the stream of so many shards.
async fn on_both(shards: u32, test: impl AsyncFn(u16)) {
    for stand_in in [
        StandIn::Kinesalite(Kinesalite::start().await),
        StandIn::Moto(Moto::start().await),
    ] {
        let port = match &stand_in {
            StandIn::Moto(server) => server.port(),
            StandIn::Kinesalite(server) => server.port(),
        };
        streams::create(port, STREAM, shards).await;
        test(port).await;
    }
}

/// A stream, and what spoils requests on the way to it.
async fn spoilt(shards: u32) -> (Kinesalite, KinesisProxy, Kinesis) {
    let server = Kinesalite::start().await;
    streams::create(server.port(), STREAM, shards).await;
    let proxy = KinesisProxy::start(server.port()).await;
    let kinesis = at(proxy.port()).await;
    (server, proxy, kinesis)
}

async fn at(port: u16) -> Kinesis {
    Kinesis::open_with(STREAM, &settings(port)).await.unwrap()
}

/// A record with a number that no other has, and so many bytes more.
fn record(number: u64, more: usize) -> Record {
    let mut data = BytesMut::with_capacity(8 + more);
    data.put_u64(number);
    data.resize(8 + more, 0);
    rand::rngs::SmallRng::seed_from_u64(number).fill_bytes(&mut data[8..]);
    Record {
        partition_key: format!("key {number}"),
        data: data.freeze(),
    }
}

fn records(numbers: std::ops::Range<u64>) -> Vec<Record> {
    numbers.map(|number| record(number, 20)).collect()
}

/// Puts and returns what happened.
async fn put(kinesis: &Kinesis, records: &[Record]) -> Result<PutStats, KinesisError> {
    let sum = Mutex::new(PutStats::default());
    let on = |more: PutStats| {
        let mut sum = sum.lock().unwrap();
        sum.requests += more.requests;
        sum.retried += more.retried;
        sum.throttled += more.throttled;
    };
    kinesis.put(records.to_vec(), &on).await?;
    Ok(*sum.lock().unwrap())
}

/// How often each record is there.
fn count<'a>(records: impl IntoIterator<Item = &'a Bytes>) -> HashMap<Bytes, usize> {
    let mut counts = HashMap::new();
    for record in records {
        *counts.entry(record.clone()).or_default() += 1;
    }
    counts
}

fn count_put(records: &[Record]) -> HashMap<Bytes, usize> {
    count(records.iter().map(|record| &record.data))
}

#[derive(Default)]
struct Seen {
    records: Vec<Bytes>,
    /// How far the reader said it was, and how many records had come by then.
    marks: Vec<(Instant, usize)>,
    stats: ReadStats,
    latest: Duration,
}

/// Reads until it is dropped.
struct Reader {
    seen: Arc<Mutex<Seen>>,
    reading: JoinHandle<Result<(), KinesisError>>,
}

impl Reader {
    fn start(kinesis: &Kinesis, from: StartAt) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (events, mut receiver) = mpsc::channel(4);
        let (kinesis, stats, noted) = (kinesis.clone(), Arc::clone(&seen), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Some(event) = receiver.recv().await {
                let mut seen = noted.lock().unwrap();
                match event {
                    Event::Records(records) => {
                        assert!(!records.data.is_empty());
                        seen.records.extend(records.data);
                    }
                    Event::ReadUpTo(at) => {
                        let before = seen.records.len();
                        seen.marks.push((at, before));
                    }
                }
            }
        });
        let reading = tokio::spawn(async move {
            let on = |more: ReadStats| {
                let mut seen = stats.lock().unwrap();
                seen.stats.behind = more.behind;
                seen.latest = seen.latest.max(more.behind);
                seen.stats.records += more.records;
                seen.stats.bytes += more.bytes;
                seen.stats.throttled += more.throttled;
            };
            kinesis.read(from, events, &on).await
        });
        Self { seen, reading }
    }

    /// Waits until the reader says that it has read all that was put before now; returns it.
    async fn all(&self) -> Vec<Bytes> {
        self.all_until(Instant::now()).await
    }

    async fn all_until(&self, put: Instant) -> Vec<Bytes> {
        wait_for("the reader to come so far", PATIENCE, || async {
            assert!(!self.reading.is_finished(), "it has given up");
            let seen = self.seen.lock().unwrap();
            match seen.marks.last() {
                Some((mark, before)) if *mark >= put => Ok(seen.records[..*before].to_vec()),
                _ => Err(format!("{} records", seen.records.len())),
            }
        })
        .await
    }

    fn stats(&self) -> ReadStats {
        self.seen.lock().unwrap().stats
    }

    /// How late it has been at most since it came to the tip.
    fn latest(&self) -> Duration {
        self.seen.lock().unwrap().latest
    }

    /// Whatever was accepted before a mark was delivered before it; marks never go back.
    fn is_honest(&self, accepted: &[(Instant, Bytes)]) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.marks.is_sorted_by(|a, b| a.0 < b.0));
        let mut first = HashMap::new();
        for (at, data) in seen.records.iter().enumerate() {
            first.entry(data).or_insert(at);
        }
        for (mark, before) in &seen.marks {
            for (at, data) in accepted.iter().filter(|(at, _)| at < mark) {
                let came = first.get(data);
                assert!(
                    came.is_some_and(|came| came < before),
                    "a record accepted {:?} before the mark came as {came:?}, behind {before}",
                    *mark - *at
                );
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_is_put_is_read() {
    on_both(3, async |port| {
        let kinesis = at(port).await;
        let before = Reader::start(&kinesis, StartAt::TrimHorizon);
        let mut random = rand::rngs::SmallRng::seed_from_u64(7);
        let mut all: Vec<Record> = (0..3000)
            .map(|number| record(number, random.random_range(0..2000)))
            .collect();
        for number in 3000..3006 {
            let mut largest = record(number, 0);
            let room = RECORD_BYTES_MAX - largest.partition_key.len() - 8;
            largest.data = record(number, room).data;
            all.push(largest);
        }
        all.push(Record {
            partition_key: "ä".repeat(256),
            data: Bytes::new(),
        });
        let (first, second) = all.split_at(1000);
        let (a, b) = tokio::join!(put(&kinesis, first), put(&kinesis, second));
        let (a, b) = (a.unwrap(), b.unwrap());
        // Two calls for a thousand small ones, and as few as 500 records allow for the others.
        assert_eq!((a.requests, a.retried, a.throttled), (2, 0, 0));
        assert_eq!((b.retried, b.throttled), (0, 0));
        assert!(before.all().await.len() >= all.len());
        assert_eq!(count(&before.all().await), count_put(&all));
        let stats = before.stats();
        let bytes: usize = all.iter().map(|record| record.data.len()).sum();
        assert_eq!(
            (stats.records, stats.bytes),
            (all.len() as u64, bytes as u64)
        );
        let after = Reader::start(&kinesis, StartAt::TrimHorizon);
        assert_eq!(count(&after.all().await), count_put(&all));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_one_shard_come_in_the_order_of_their_puts() {
    on_both(2, async |port| {
        let kinesis = at(port).await;
        let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
        let all: Vec<Record> = records(0..60)
            .into_iter()
            .map(|record| Record {
                partition_key: "one".to_owned(),
                ..record
            })
            .collect();
        for record in &all {
            put(&kinesis, std::slice::from_ref(record)).await.unwrap();
        }
        let expected: Vec<Bytes> = all.into_iter().map(|record| record.data).collect();
        assert_eq!(reader.all().await, expected);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_describes_itself() {
    on_both(3, async |port| {
        let said = at(port).await.describe().await.unwrap();
        assert_eq!(said.open_shards, 3);
        assert_eq!(said.retention, Duration::from_secs(24 * 3600));
        assert!(said.active && !said.encrypted, "{said:?}");
    })
    .await;
}

fn records_of(call: &Call) -> Vec<String> {
    let records = call.body["Records"].as_array().unwrap();
    let data = |record: &serde_json::Value| record["Data"].as_str().unwrap().to_owned();
    records.iter().map(data).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_keep_to_the_limits_and_so_does_their_number() {
    let (_server, proxy, kinesis) = spoilt(2).await;
    let mut all = records(0..4000);
    all.extend((4000..4012).map(|number| record(number, RECORD_BYTES_MAX - 100)));
    proxy.hold_puts(true);
    let whole = put(&kinesis, &all);
    let release = async {
        wait_until("calls to be under way", PATIENCE, || async {
            proxy.calls("PutRecords").len() >= 4
        })
        .await;
        proxy.hold_puts(false);
    };
    let (stats, ()) = tokio::join!(whole, release);
    let calls = proxy.calls("PutRecords");
    assert_eq!(stats.unwrap().requests, calls.len() as u64);
    for call in &calls {
        let records = records_of(call);
        let keys = call.body["Records"].as_array().unwrap().iter();
        let keys: usize = keys
            .map(|record| record["PartitionKey"].as_str().unwrap().len())
            .sum();
        // What is sent is in base 64.
        let bytes: usize = records.iter().map(|data| data.len() / 4 * 3).sum();
        assert!(
            !records.is_empty() && records.len() <= 500,
            "{}",
            records.len()
        );
        assert!(keys + bytes <= (5 << 20) + 2 * records.len(), "{bytes}");
        assert_eq!(call.body["StreamName"], STREAM);
        assert!(!call.head.contains(SECRET));
    }
    assert!(calls.len() <= 12, "{} calls", calls.len());
    assert_eq!(calls.iter().map(|call| call.at_once).max(), Some(4));

    // Several at the same time share another bound.
    proxy.hold_puts(true);
    let all = records(5000..7000);
    let four = async {
        tokio::join!(
            put(&kinesis, &all),
            put(&kinesis, &all),
            put(&kinesis, &all),
            put(&kinesis, &all)
        )
    };
    let before = calls.len();
    let release = async {
        wait_until("calls to be under way", PATIENCE, || async {
            proxy.calls("PutRecords").len() >= before + 8
        })
        .await;
        proxy.hold_puts(false);
    };
    let _ = tokio::join!(four, release);
    let calls = &proxy.calls("PutRecords")[before..];
    assert_eq!(calls.len(), 16);
    assert_eq!(calls.iter().map(|call| call.at_once).max(), Some(8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_call_that_failed_in_part_only_that_part_is_sent_again() {
    on_both(3, async |port| {
        let proxy = KinesisProxy::start(port).await;
        let kinesis = at(proxy.port()).await;
        proxy.spoil(
            "PutRecords",
            Fault::RefuseRecords(|at| at % 3 == 0, THROTTLED),
        );
        proxy.spoil(
            "PutRecords",
            Fault::RefuseRecords(|at| at < 5, "InternalFailure"),
        );
        proxy.spoil("PutRecords", Fault::RefuseRecords(|_| true, THROTTLED));
        let all = records(0..100);
        let stats = put(&kinesis, &all).await.unwrap();
        let expected = PutStats {
            requests: 4,
            retried: 34 + 5 + 5,
            throttled: 34 + 5,
        };
        assert_eq!(stats, expected);
        assert_eq!(proxy.unused(), 0);
        let calls: Vec<Vec<String>> = proxy.calls("PutRecords").iter().map(records_of).collect();
        let thirds: Vec<String> = calls[0].iter().step_by(3).cloned().collect();
        assert_eq!(calls[1], thirds);
        assert_eq!(calls[2], thirds[..5]);
        assert_eq!(calls[3], thirds[..5]);
        let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
        assert_eq!(count(&reader.all().await), count_put(&all));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_service_and_a_broken_network_lose_nothing() {
    on_both(3, async |port| {
        let proxy = KinesisProxy::start(port).await;
        let kinesis = at(proxy.port()).await;
        for fault in [
            Fault::Refuse(400, THROTTLED),
            Fault::Refuse(500, "InternalFailure"),
            Fault::Refuse(503, "ServiceUnavailable"),
            Fault::Cut,
        ] {
            for operation in ["PutRecords", "GetRecords", "GetShardIterator", "ListShards"] {
                proxy.spoil(operation, fault.clone());
            }
        }
        for operation in ["GetRecords", "GetShardIterator", "ListShards"] {
            proxy.spoil(operation, Fault::LoseAnswer);
        }
        let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
        let all = records(0..1200);
        let stats = put(&kinesis, &all).await.unwrap();
        // Three calls and four faults, of which one was throttling.
        assert_eq!(stats.requests, 7);
        assert!([200, 500].contains(&stats.throttled), "{stats:?}");
        assert_eq!(count(&reader.all().await), count_put(&all));
        assert_eq!(proxy.unused(), 0);
        assert!(reader.stats().throttled >= 1);

        // Kinesis has the records, and nobody knows: they are put again.
        proxy.spoil("PutRecords", Fault::LoseAnswer);
        let twice = records(2000..2010);
        let stats = put(&kinesis, &twice).await.unwrap();
        assert_eq!((stats.requests, stats.retried), (2, 10));
        let seen = count(&reader.all().await);
        for record in &twice {
            assert_eq!(seen[&record.data], 2);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_forgotten_holds_the_largest_call_for_some_seconds() {
    let (_server, proxy, kinesis) = spoilt(2).await;
    let large: Vec<Record> = (0..5)
        .map(|number| record(number, RECORD_BYTES_MAX - 100))
        .collect();
    // How fast the line is shows by itself.
    let mut slowest = Duration::ZERO;
    for _ in 0..8 {
        let started = Instant::now();
        put(&kinesis, &large).await.unwrap();
        slowest = slowest.max(started.elapsed());
    }
    proxy.spoil("PutRecords", Fault::Hang);
    let started = Instant::now();
    let stats = put(&kinesis, &large).await.unwrap();
    assert_eq!((stats.requests, stats.retried), (2, 5));
    let took = started.elapsed();
    let most = Duration::from_secs(10) + 6 * slowest;
    assert!(took < most, "{took:?} of {most:?}");
    // Neither does it hold a reader at the tip.
    let reader = Reader::start(&kinesis, StartAt::Timestamp(SystemTime::now()));
    reader.all().await;
    proxy.spoil("GetRecords", Fault::Hang);
    proxy.spoil("GetRecords", Fault::Hang);
    wait_until("both shards to be silent", PATIENCE, || async {
        proxy.unused() == 0
    })
    .await;
    let started = Instant::now();
    reader.all().await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    // It was said meanwhile how late the reader was.
    assert!(reader.latest() > Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_never_says_it_is_further_than_it_is() {
    // kinesalite says of each page of ten thousand records that nothing is behind it.
    let server = Kinesalite::start().await;
    streams::create(server.port(), STREAM, 1).await;
    let kinesis = at(server.port()).await;
    let mut accepted = Vec::new();
    for part in 0..5 {
        let some: Vec<Record> = (part * 5000..(part + 1) * 5000)
            .map(|number| record(number, 0))
            .collect();
        put(&kinesis, &some).await.unwrap();
        let now = Instant::now();
        accepted.extend(some.into_iter().map(|record| (now, record.data)));
    }
    // Older than the second that a reader leaves to be sure.
    let put = Instant::now();
    wait_until("the records to be old", PATIENCE, || async {
        put.elapsed() > Duration::from_secs(2)
    })
    .await;
    let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
    assert_eq!(reader.all().await.len(), accepted.len());
    reader.is_honest(&accepted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_split_and_merged_while_records_are_put_and_read() {
    on_both(2, async |port| {
        let kinesis = at(port).await;
        let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
        let resharded = Arc::new(AtomicBool::new(false));
        let writing = tokio::spawn({
            let (kinesis, resharded) = (kinesis.clone(), Arc::clone(&resharded));
            async move {
                let mut accepted = Vec::new();
                let mut after = 0;
                for part in 0.. {
                    let some = records(part * 50..(part + 1) * 50);
                    put(&kinesis, &some).await.unwrap();
                    let now = Instant::now();
                    accepted.extend(some.into_iter().map(|record| (now, record.data)));
                    after += u32::from(resharded.load(Ordering::Relaxed));
                    if after == 5 {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                accepted
            }
        });
        // Each change happens while records come.
        let some_more = async || {
            let before = reader.stats().records;
            wait_until("records to come", PATIENCE, || async {
                reader.stats().records > before + 100
            })
            .await;
        };
        some_more().await;
        let open = streams::open_shards(port, STREAM).await;
        streams::split(port, STREAM, &open[0]).await;
        some_more().await;
        let open = streams::open_shards(port, STREAM).await;
        assert_eq!(open.len(), 3);
        streams::merge(port, STREAM, &open[1], &open[2]).await;
        some_more().await;
        let open = streams::open_shards(port, STREAM).await;
        assert_eq!(open.len(), 2);
        streams::split(port, STREAM, &open[1]).await;
        some_more().await;
        resharded.store(true, Ordering::Relaxed);
        let accepted = writing.await.unwrap();
        let seen = count(&reader.all().await);
        for (_, data) in &accepted {
            assert!(seen.contains_key(data));
        }
        assert_eq!(seen.len(), accepted.len());
        reader.is_honest(&accepted);
        // From the beginning, through closed shards and their children.
        let second = Reader::start(&kinesis, StartAt::TrimHorizon);
        assert_eq!(count(&second.all().await).len(), accepted.len());
        second.is_honest(&accepted);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_begins_at_a_time() {
    on_both(3, async |port| {
        let kinesis = at(port).await;
        put(&kinesis, &records(0..500)).await.unwrap();
        let put_at = Instant::now();
        // Arrival is told in milliseconds.
        let later = || async { put_at.elapsed() > Duration::from_millis(50) };
        wait_until("the clock to go on", PATIENCE, later).await;
        let from = SystemTime::now();
        wait_until("the clock to go on", PATIENCE, || async {
            put_at.elapsed() > Duration::from_millis(100)
        })
        .await;
        // Of three shards, one at least has nothing from then on.
        let one = records(500..501);
        put(&kinesis, &one).await.unwrap();
        let reader = Reader::start(&kinesis, StartAt::Timestamp(from));
        assert_eq!(count(&reader.all().await), count_put(&one));
        let more = records(501..600);
        put(&kinesis, &more).await.unwrap();
        assert_eq!(count(&reader.all().await), count_put(&[one, more].concat()));
        let nothing = Reader::start(&kinesis, StartAt::Timestamp(SystemTime::now()));
        assert_eq!(nothing.all().await, Vec::<Bytes>::new());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_iterator_is_replaced_by_one_behind_the_last_record() {
    let (_server, proxy, kinesis) = spoilt(1).await;
    // Before anything is delivered: from where the reader begins.
    proxy.spoil("GetRecords", Fault::Refuse(400, "ExpiredIteratorException"));
    let first = records(0..10);
    put(&kinesis, &first).await.unwrap();
    let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
    assert_eq!(count(&reader.all().await), count_put(&first));
    proxy.spoil("GetRecords", Fault::Refuse(400, "ExpiredIteratorException"));
    let second = records(10..20);
    put(&kinesis, &second).await.unwrap();
    assert_eq!(
        count(&reader.all().await),
        count_put(&[first, second].concat())
    );
    assert_eq!(proxy.unused(), 0);
    let kinds: Vec<_> = proxy
        .calls("GetShardIterator")
        .iter()
        .map(|call| call.body["ShardIteratorType"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        kinds,
        ["TRIM_HORIZON", "TRIM_HORIZON", "AFTER_SEQUENCE_NUMBER"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_shards_has_pages() {
    let (server, proxy, kinesis) = spoilt(3).await;
    let shards = streams::shards(server.port(), STREAM).await;
    let shard = |at: usize| {
        json!({
            "ShardId": shards[at].id,
            "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": "1"},
            "SequenceNumberRange": {"StartingSequenceNumber": "0"},
        })
    };
    let pages = [
        json!({"Shards": [shard(0)], "NextToken": "more"}),
        json!({"Shards": [shard(1), shard(2)]}),
    ];
    // So that no other list is asked for: it would have all shards on one page.
    for page in pages.iter().cycle().take(200) {
        proxy.spoil("ListShards", Fault::Answer(page.clone()));
    }
    let all = records(0..300);
    put(&kinesis, &all).await.unwrap();
    let reader = Reader::start(&kinesis, StartAt::TrimHorizon);
    assert_eq!(count(&reader.all().await), count_put(&all));
    let calls = proxy.calls("ListShards");
    assert!(proxy.unused() > 0 && calls.len() >= 2);
    assert_eq!(calls[0].body, json!({"StreamName": STREAM}));
    assert_eq!(calls[1].body, json!({"NextToken": "more"}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_channel_stops_reading_and_a_dropped_one_ends_it() {
    let (_server, proxy, kinesis) = spoilt(3).await;
    let (events, mut receiver) = mpsc::channel(1);
    let reading = tokio::spawn({
        let kinesis = kinesis.clone();
        async move { kinesis.read(StartAt::TrimHorizon, events, &|_| ()).await }
    });
    // Nobody takes events: all that was put waits in the stream, but for the channel and a page of each shard.
    put(&kinesis, &records(0..300)).await.unwrap();
    let mut seen = 0;
    while seen < 300 {
        if let Some(Event::Records(records)) = receiver.recv().await {
            seen += records.data.len();
        }
    }
    drop(receiver);
    reading.await.unwrap().unwrap();

    // A dropped future takes all tasks along: each has a sender.
    let (events, mut receiver) = mpsc::channel(1);
    let reading = tokio::spawn({
        let kinesis = kinesis.clone();
        async move { kinesis.read(StartAt::TrimHorizon, events, &|_| ()).await }
    });
    assert!(receiver.recv().await.is_some());
    reading.abort();
    let end = async { while receiver.recv().await.is_some() {} };
    tokio::time::timeout(PATIENCE, end).await.unwrap();

    // And so does the end of a put that would never succeed.
    for _ in 0..100 {
        proxy.spoil("PutRecords", Fault::Refuse(400, THROTTLED));
    }
    let one = records(400..401);
    tokio::select! {
        done = put(&kinesis, &one) => panic!("{done:?}"),
        () = wait_until("three attempts", PATIENCE, || async { proxy.unused() < 97 }) => {}
    }
}

/// Whether an error is one that somebody has to mend, names the stream and the permission, and holds no secret.
fn denied(error: &KinesisError, permission: &str) {
    let text = format!("{} {error:?}", chain(error));
    assert_eq!(error.class(), Class::Transient, "{text}");
    assert_eq!(error.refusal(), Some(Refusal::Denied), "{text}");
    assert!(text.contains("stream changes"), "{text}");
    assert!(
        text.contains("access denied") && text.contains("as planned"),
        "{text}"
    );
    assert!(!text.contains(SECRET), "{text}");
    let hint = error.hint().unwrap();
    assert!(hint.contains(permission), "{hint}");
}

async fn read_once(kinesis: &Kinesis) -> KinesisError {
    let (events, _receiver) = mpsc::channel(8);
    let read = kinesis.read(StartAt::TrimHorizon, events, &|_| ());
    let ended = tokio::time::timeout(PATIENCE, read).await;
    ended.expect("it gives up").unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_names_the_stream_and_the_permission() {
    let (_server, proxy, kinesis) = spoilt(2).await;
    let refuse = |operation| {
        proxy.spoil(operation, Fault::Refuse(400, "AccessDeniedException"));
    };
    refuse("DescribeStreamSummary");
    denied(
        &kinesis.describe().await.unwrap_err(),
        "kinesis:DescribeStreamSummary",
    );
    let all = records(0..5);
    refuse("PutRecords");
    denied(
        &put(&kinesis, &all).await.unwrap_err(),
        "kinesis:PutRecords",
    );
    for (operation, permission) in [
        ("ListShards", "kinesis:ListShards"),
        ("GetShardIterator", "kinesis:GetShardIterator"),
        ("GetRecords", "kinesis:GetRecords"),
    ] {
        refuse(operation);
        denied(&read_once(&kinesis).await, permission);
    }
    // One record is enough.
    proxy.spoil(
        "PutRecords",
        Fault::RefuseRecords(|at| at == 3, "KMSAccessDeniedException"),
    );
    let error = put(&kinesis, &all).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::Kms), "{error}");
    assert!(error.hint().unwrap().contains("kms:GenerateDataKey"));
    // What no stream takes is not sent.
    let sent = proxy.calls("PutRecords").len();
    let error = put(&kinesis, &[record(1, 10), record(2, RECORD_BYTES_MAX)]).await;
    let error = error.unwrap_err();
    assert!(matches!(error, KinesisError::Record { .. }), "{error}");
    assert_eq!(proxy.calls("PutRecords").len(), sent);
    assert_eq!(proxy.unused(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_says_so_without_secrets() {
    on_both(1, async |port| {
        let nowhere = Kinesis::open_with("nowhere", &settings(port))
            .await
            .unwrap();
        assert_eq!(nowhere.stream(), "nowhere");
        let described = nowhere.describe().await.unwrap_err();
        let put_there = put(&nowhere, &records(0..3)).await.unwrap_err();
        for error in [described, put_there, read_once(&nowhere).await] {
            let text = format!("{error} {error:?} {nowhere:?}");
            assert_eq!(error.refusal(), Some(Refusal::NoStream), "{text}");
            assert_eq!(error.class(), Class::Transient);
            assert!(text.contains("nowhere") && !text.contains(SECRET), "{text}");
        }
        assert_eq!(format!("{nowhere:?}"), r#"Kinesis("nowhere")"#);
    })
    .await;
    let server = Kinesalite::start().await;
    let kinesis = at(server.port()).await;
    drop(server);
    let error = kinesis.describe().await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::Unavailable), "{error}");
    assert_eq!(error.class(), Class::Transient);
    assert!(!format!("{error} {error:?}").contains(SECRET));
}

/// The environment belongs to the process, so another one reads it: this test binary, told to run the
/// test below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoint_region_and_credentials_come_from_the_environment() {
    let server = Kinesalite::start().await;
    streams::create(server.port(), STREAM, 1).await;
    let proxy = KinesisProxy::start(server.port()).await;
    let endpoint = format!("http://localhost:{}", proxy.port());
    let run = |variables: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "kinesis::in_the_environment_of_another_test"])
            .args(["--ignored", "--nocapture"])
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_CONFIG_FILE", "/nonexistent")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
            .envs(variables.iter().copied());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let credentials = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
    ];
    for endpoint_variable in ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KINESIS"] {
        let before = proxy.calls("PutRecords").len();
        let mut variables = credentials.to_vec();
        variables.push((endpoint_variable, &endpoint));
        let (fine, text) = run(&variables);
        assert!(fine && text.contains("put the record"), "{text}");
        assert_eq!(proxy.calls("PutRecords").len(), before + 1);
    }
    let variables = [
        &credentials[..],
        &[("AWS_ENDPOINT_URL", &endpoint), ("AWS_REGION", "eu-west-3")],
    ];
    let (fine, text) = run(&variables.concat());
    assert!(fine, "{text}");
    let calls = proxy.calls("PutRecords");
    let last = &calls.last().unwrap().head;
    assert!(last.contains("/eu-west-3/kinesis/"), "{last}");
    let (_, text) = run(&[("AWS_ENDPOINT_URL", &endpoint)]);
    assert!(text.contains("no valid credentials"), "{text}");
    let (_, text) = run(&credentials);
    assert!(
        text.contains("AWS_REGION") && text.contains(STREAM),
        "{text}"
    );
    assert!(!text.contains(SECRET), "{text}");
}

#[tokio::test]
#[ignore = "started by the test above, in an environment of its choice"]
async fn in_the_environment_of_another_test() {
    let work = async {
        let kinesis = Kinesis::open(STREAM).await?;
        kinesis.put(records(0..1), &|_| ()).await
    };
    match tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .unwrap()
    {
        Ok(()) => eprintln!("put the record"),
        Err(error) => panic!("{}; {}", chain(&error), error.hint().unwrap_or_default()),
    }
}
