//! What is in a Kinesis stream: every record of it, and the parts of batches that they are.
//!
//! # What it does not do
//! It judges nothing: a test says what must be there.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;
use dr_agent::cloud::kinesis::{Event, Kinesis, StartAt};
use dr_agent::flow::changelog::Part;
use prost::Message as _;
use tokio::sync::mpsc;

/// Reads everything that a stream has.
pub async fn everything(kinesis: &Kinesis) -> Vec<Bytes> {
    let (events, mut seen) = mpsc::channel(8);
    let now = Instant::now();
    let reading = kinesis.clone();
    let reading =
        tokio::spawn(async move { reading.read(StartAt::TrimHorizon, events, &|_| {}).await });
    let mut records = Vec::new();
    while let Some(event) = seen.recv().await {
        match event {
            Event::Records(more) => records.extend(more.data),
            Event::ReadUpTo(at) if at >= now => break,
            Event::ReadUpTo(_) => {}
        }
    }
    drop(seen);
    reading.abort();
    records
}

/// The same, decoded.
pub async fn parts(kinesis: &Kinesis) -> Vec<Part> {
    let decode = |record| Part::decode(record).expect("nobody else writes into the stream");
    everything(kinesis).await.into_iter().map(decode).collect()
}

/// Of every batch, by writer and number: which of its parts are there, and how many it has, where that is known.
pub fn batches(parts: &[Part]) -> BTreeMap<(u64, i64), (Vec<u32>, Option<u32>)> {
    let mut batches: BTreeMap<(u64, i64), (Vec<u32>, Option<u32>)> = BTreeMap::new();
    for part in parts {
        let (there, total) = batches.entry((part.writer, part.batch)).or_default();
        there.push(part.part);
        if part.parts != 0 {
            *total = Some(part.parts);
        }
    }
    for (there, _) in batches.values_mut() {
        there.sort_unstable();
        there.dedup();
    }
    batches
}
