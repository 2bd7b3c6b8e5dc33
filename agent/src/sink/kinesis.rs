//! The Kinesis sink: batches into the records of a Kinesis stream.
//!
//! ```text
//! batch ─▶ Packing ─Part, Part, …─▶ Record, Record, … ─▶ PutRecords over all shards ─▶ outcome
//! ```
//! A batch is durable once the stream has accepted every part of it; readers put parts back in order
//! ([`crate::flow::changelog::Gather`]), so neither shards nor retries have to keep one.
//!
//! # Invariants
//! - An outcome is given once every record of its batch was accepted, in the order of batches.
//! - At most [`IN_FLIGHT_MAX`] batches are on their way: a reader concludes from it what must be in the stream.
//! - Of a batch at most 12 MiB are in memory as records, however large it is.
//!
//! # What it does not do
//! What passes by itself is retried in [`crate::cloud::kinesis`], for ever; what somebody has to mend ends the session.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use futures_util::{StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Applied, Outcome, Sink};
use crate::cloud::kinesis::{Kinesis, KinesisError, Record};
use crate::error::{Class, Classify};
use crate::failpoint;
use crate::flow::batch::{Batch, IN_FLIGHT_MAX};
use crate::flow::changelog::{Author, Compression, Packing, Part};
use crate::flow::spill::SpillError;
use crate::observe::metrics::StreamMetrics;

/// Bytes of a part before compression. What does not compress at all still fits into a record of 1 MiB, with what
/// zstd and the part's other fields add.
const PART_BYTES: usize = 1_000_000;

/// Records are put when so many bytes of them are there.
const CHUNK_BYTES: usize = 4 << 20;

/// Chunks of one batch on their way.
const CHUNKS: usize = 2;

/// Why batches could not be put.
#[derive(Debug, thiserror::Error)]
pub enum KinesisSinkError {
    /// The stream does not take them.
    #[error(transparent)]
    Kinesis(#[from] KinesisError),
    /// A large transaction could not be read back from disk.
    #[error("read a large transaction back")]
    Spill(#[from] SpillError),
}

impl Classify for KinesisSinkError {
    fn class(&self) -> Class {
        match self {
            Self::Kinesis(error) => error.class(),
            Self::Spill(error) => error.class(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Kinesis(error) => error.hint(),
            Self::Spill(error) => error.hint(),
        }
    }
}

/// Puts batches into a stream.
pub struct KinesisSink {
    putting: Arc<Putting>,
    batches: mpsc::Receiver<Arc<Batch>>,
    /// There are no more batches.
    is_at_the_end: bool,
    in_flight: FuturesOrdered<BoxFuture<'static, Outcome<KinesisSinkError>>>,
}

impl KinesisSink {
    /// Writes what is sent to the channel, as `author`.
    pub fn new(
        kinesis: Kinesis,
        author: Author,
        metrics: StreamMetrics,
    ) -> (Self, mpsc::Sender<Arc<Batch>>) {
        let (batches, to_be_put) = mpsc::channel(IN_FLIGHT_MAX);
        let putting = Putting {
            kinesis,
            author,
            metrics,
        };
        let sink = Self {
            putting: Arc::new(putting),
            batches: to_be_put,
            is_at_the_end: false,
            in_flight: FuturesOrdered::new(),
        };
        (sink, batches)
    }
}

impl Sink for KinesisSink {
    type Error = KinesisSinkError;

    async fn next(&mut self) -> Option<Outcome<KinesisSinkError>> {
        loop {
            let room = self.in_flight.len() < IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                Some(outcome) = self.in_flight.next() => {
                    if outcome.result.is_ok() {
                        self.putting.metrics.flushed(outcome.batch.end_lsn());
                    }
                    return Some(outcome);
                }
                batch = self.batches.recv(), if room && !self.is_at_the_end => match batch {
                    Some(batch) => {
                        let putting = Arc::clone(&self.putting).put(batch);
                        self.in_flight.push_back(Box::pin(putting));
                    }
                    None => self.is_at_the_end = true,
                },
                else => return None,
            }
        }
    }
}

/// What every batch is put with.
struct Putting {
    kinesis: Kinesis,
    author: Author,
    metrics: StreamMetrics,
}

impl Putting {
    async fn put(self: Arc<Self>, batch: Arc<Batch>) -> Outcome<KinesisSinkError> {
        let started = Instant::now();
        let result = self.put_all(&batch).await;
        Outcome {
            result: result.map(|()| Applied::default()),
            took: started.elapsed(),
            batch,
        }
    }

    async fn put_all(self: Arc<Self>, batch: &Batch) -> Result<(), KinesisSinkError> {
        failpoint::hit("kinesis:before-put");
        let mut packing = Packing::new(
            &self.author,
            batch,
            batch.previous,
            PART_BYTES,
            Compression::Zstd,
        );
        let mut putting: FuturesUnordered<BoxFuture<'static, Result<(), KinesisError>>> =
            FuturesUnordered::new();
        loop {
            let chunk = tokio::task::block_in_place(|| chunk(&mut packing))?;
            if chunk.is_empty() {
                break;
            }
            if putting.len() >= CHUNKS {
                putting.try_next().await?;
                // Some parts are in the stream, and this one is not.
                failpoint::hit("kinesis:part-put");
            }
            putting.push(Box::pin(Arc::clone(&self).put_chunk(chunk)));
        }
        while putting.try_next().await?.is_some() {}
        drop(putting);
        failpoint::hit("kinesis:put");
        Ok(())
    }

    async fn put_chunk(self: Arc<Self>, chunk: Vec<(u64, Record)>) -> Result<(), KinesisError> {
        let sizes: Vec<(u64, u64)> = chunk
            .iter()
            .map(|(raw, record)| (*raw, record.data.len() as u64))
            .collect();
        let records = chunk.into_iter().map(|(_, record)| record).collect();
        self.kinesis
            .put(records, &|stats| self.metrics.putting(stats))
            .await?;
        for (raw, stored) in sizes {
            self.metrics.put(raw, stored);
        }
        Ok(())
    }
}

/// The next records of a batch, each with its bytes before compression.
fn chunk(packing: &mut Packing<'_>) -> Result<Vec<(u64, Record)>, SpillError> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    while bytes < CHUNK_BYTES
        && let Some(part) = packing.next_part()?
    {
        let record = record(&part);
        bytes += record.data.len();
        chunk.push((part.raw_bytes, record));
    }
    Ok(chunk)
}

/// Keys that differ spread over all shards.
fn record(part: &Part) -> Record {
    Record {
        partition_key: format!("{:016x}.{}.{}", part.writer, part.batch, part.part),
        data: Bytes::from(part.encode_to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::kinesis::RECORD_BYTES_MAX;

    #[test]
    fn what_does_not_compress_still_fits_into_a_record() {
        let raw: Vec<u8> = std::iter::repeat_with(rand::random)
            .take(PART_BYTES)
            .collect();
        let messages = zstd::bulk::compress(&raw, 3).unwrap();
        assert!(messages.len() >= raw.len());
        let part = Part {
            version: u32::MAX,
            stream: "x".repeat(63),
            system_identifier: u64::MAX,
            began: i64::MAX,
            header_crc32c: u32::MAX,
            term: i64::MAX,
            writer: u64::MAX,
            batch: i64::MAX,
            previous_end_lsn: u64::MAX,
            end_lsn: u64::MAX,
            commit_time: i64::MAX,
            part: u32::MAX,
            parts: u32::MAX,
            compression: 2,
            raw_bytes: u64::MAX,
            crc32c: u32::MAX,
            messages: messages.into(),
        };
        let record = record(&part);
        assert!(record.data.len() + record.partition_key.len() <= RECORD_BYTES_MAX);
    }
}
