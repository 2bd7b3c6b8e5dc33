//! One shard from where the reader begins to its end.
//!
//! A task of `read`, one for each shard. It keeps to the limits of a shard, waits for shards that are far behind, and
//! begins again behind the last record when its iterator has expired.
//!
//! # Invariants
//! - Records of a page are in the channel of events before the page is reported.
//! - What comes after a failure begins at the page that failed: nothing is left out, and nothing repeated.
//!
//! # What it does not do
//! It retries what is transient for ever. A shard that is gone because its records were too old is said aloud, and is
//! no error: what it held is lost, whoever would be told.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_sdk_kinesis::operation::get_records::GetRecordsOutput;
use aws_sdk_kinesis::primitives::DateTime;
use aws_sdk_kinesis::types::{Record, ShardIteratorType};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::progress::{PAGE_RECORDS, Page, Slowest, room_for_page};
use super::read::{Event, ReadReport, Records, StartAt};
use super::retries::Retries;
use super::{Kinesis, KinesisError, KinesisOperation, Refusal};
use crate::cloud::aws::within;
use crate::time::wall_clock;

/// For a page that brings nothing. Kinesis answers within milliseconds, and a connection that a firewall has forgotten shows
/// only by its silence.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// For what a page may bring, which base 64 makes a third larger: two megabits.
const SLOWEST_BYTES_PER_SECOND: u64 = 256 * 1024;

/// Nobody listens any more.
struct NobodyListens;

/// The reader of one shard.
pub(super) struct ShardReader {
    pub(super) kinesis: Kinesis,
    pub(super) shard: String,
    pub(super) start: StartAt,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) reports: mpsc::Sender<ReadReport>,
    pub(super) slowest: watch::Receiver<Slowest>,
    /// Bytes that pages may have in memory, those of all shards together.
    pub(super) room: Arc<Semaphore>,
}

/// Where it is.
#[derive(Default)]
struct ShardPlace {
    /// The sequence number of the last record that was delivered.
    last: Option<String>,
    /// `None` before the first, and when it has expired.
    iterator: Option<String>,
    /// A time before which everything has been delivered.
    position: Option<Instant>,
    /// When the last page was asked for, if it led to the tip.
    at_tip: Option<tokio::time::Instant>,
}

/// What the reader sees of time around a request.
#[derive(Clone, Copy)]
struct RequestTimes {
    sent: tokio::time::Instant,
    sent_at: SystemTime,
    received: tokio::time::Instant,
}

impl ShardReader {
    /// Reads until the shard ends, nobody listens, or something needs a person.
    pub(super) async fn run(mut self) -> Result<(), KinesisError> {
        let mut place = ShardPlace::default();
        let mut streak = Retries::default();
        loop {
            let position = place.position;
            // The reader and its place for comparison end together.
            let turn = self.slowest.wait_for(|slowest| slowest.lets(position));
            if turn.await.is_err() {
                return Ok(());
            }
            let bytes = room_for_page(place.at_tip.map(|at_tip| at_tip.elapsed()));
            let room = self.room(bytes).await;
            let sent = tokio::time::Instant::now();
            let sent_at = wall_clock();
            match self.page(&mut place, bytes).await {
                Ok(answer) => {
                    streak.end();
                    let asked = RequestTimes {
                        sent,
                        sent_at,
                        received: tokio::time::Instant::now(),
                    };
                    let after = match self.deliver(answer, room, asked, &mut place).await {
                        Ok(Some(after)) => after,
                        Ok(None) | Err(NobodyListens) => return Ok(()),
                    };
                    tokio::time::sleep_until(sent + after).await;
                }
                Err(error) => {
                    drop(room);
                    if self.failed(error, &mut place, &mut streak).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Room for so much.
    async fn room(&self, bytes: u64) -> OwnedSemaphorePermit {
        let bytes = u32::try_from(bytes).expect("a page is smaller than 4 GiB");
        let room = Arc::clone(&self.room).acquire_many_owned(bytes);
        room.await.expect("it is never closed")
    }

    /// The next page, which may bring so much.
    async fn page(
        &self,
        place: &mut ShardPlace,
        bytes: u64,
    ) -> Result<GetRecordsOutput, KinesisError> {
        let iterator = match &place.iterator {
            Some(iterator) => iterator.clone(),
            None => {
                let iterator = self.iterator(place.last.as_deref()).await?;
                place.iterator.insert(iterator).clone()
            }
        };
        let deadline = ANSWER_WITHIN + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        let deadline = aws_sdk_kinesis::config::Builder::new().timeout_config(within(deadline));
        let request = self
            .kinesis
            .client
            .get_records()
            .shard_iterator(iterator)
            .limit(PAGE_RECORDS)
            .customize()
            .config_override(deadline);
        let answer = Box::pin(request.send())
            .await
            .map_err(|error| self.kinesis.refused(KinesisOperation::GetRecords, &error))?;
        // Without an iterator a shard is at its end: nobody but Kinesis may say so.
        match answer.millis_behind_latest {
            Some(_) => Ok(answer),
            None => Err(self.kinesis.incomplete(KinesisOperation::GetRecords)),
        }
    }

    /// A place behind the last record, or where the reader begins.
    async fn iterator(&self, last: Option<&str>) -> Result<String, KinesisError> {
        let request = self
            .kinesis
            .client
            .get_shard_iterator()
            .stream_name(self.kinesis.stream())
            .shard_id(&self.shard);
        let request = match (last, self.start) {
            (Some(last), _) => request
                .shard_iterator_type(ShardIteratorType::AfterSequenceNumber)
                .starting_sequence_number(last),
            (None, StartAt::TrimHorizon) => {
                request.shard_iterator_type(ShardIteratorType::TrimHorizon)
            }
            (None, StartAt::Timestamp(from)) => request
                .shard_iterator_type(ShardIteratorType::AtTimestamp)
                .timestamp(DateTime::from(from)),
        };
        let operation = KinesisOperation::GetShardIterator;
        let answer = Box::pin(request.send())
            .await
            .map_err(|error| self.kinesis.refused(operation, &error))?;
        answer
            .shard_iterator
            .ok_or_else(|| self.kinesis.incomplete(operation))
    }

    /// Gives a page to whoever listens; returns how long after its request the next may be, `None` at the end of the
    /// shard.
    async fn deliver(
        &self,
        answer: GetRecordsOutput,
        mut room: OwnedSemaphorePermit,
        asked: RequestTimes,
        place: &mut ShardPlace,
    ) -> Result<Option<Duration>, NobodyListens> {
        let bytes = answer
            .records
            .iter()
            .map(|record| record.data.as_ref().len() as u64);
        let page = Page {
            sent: asked.sent.into_std(),
            sent_at: asked.sent_at,
            received: asked.received.into_std(),
            behind: millis(answer.millis_behind_latest),
            records: answer.records.len(),
            bytes: bytes.sum(),
            last_arrival: answer.records.last().and_then(arrival),
        };
        // What it has not brought others may.
        let brought = usize::try_from(page.bytes).unwrap_or(usize::MAX);
        drop(room.split(room.num_permits().saturating_sub(brought)));
        if let Some(last) = answer.records.last() {
            let last = last.sequence_number.clone();
            let records = Records {
                data: answer.records.into_iter().map(data).collect(),
                arrived_by: page.arrived_by(),
                _room: room,
            };
            self.events
                .send(Event::Records(records))
                .await
                .map_err(|_| NobodyListens)?;
            place.last = Some(last);
        }
        place.at_tip = page.is_tip().then_some(asked.sent);
        place.position = place.position.max(page.position());
        place.iterator = answer.next_shard_iterator;
        let shard = self.shard.clone();
        self.report(ReadReport::Page { shard, page }).await?;
        if place.iterator.is_some() {
            return Ok(Some(page.next_after()));
        }
        let shard = self.shard.clone();
        self.report(ReadReport::Ended { shard }).await?;
        Ok(None)
    }

    async fn report(&self, report: ReadReport) -> Result<(), NobodyListens> {
        self.reports.send(report).await.map_err(|_| NobodyListens)
    }

    /// Waits for another attempt; `true` when there is nothing left to read.
    async fn failed(
        &self,
        error: KinesisError,
        place: &mut ShardPlace,
        streak: &mut Retries,
    ) -> Result<bool, KinesisError> {
        match error.refusal() {
            Some(Refusal::Expired) => {
                place.iterator = None;
                streak.failed(error, Some(&self.shard)).await?;
            }
            Some(Refusal::NoStream) => {
                // Or is it the shard? The list knows.
                match self.kinesis.list_shards().await {
                    Ok(shards) if !shards.contains(&self.shard) => {
                        tracing::warn!(
                            stream = self.kinesis.stream(),
                            shard = self.shard,
                            "a shard was removed before its end was read: its records were kept too short a time"
                        );
                        let shard = self.shard.clone();
                        let _ = self.report(ReadReport::Ended { shard }).await;
                        return Ok(true);
                    }
                    Ok(_) => return Err(error),
                    Err(error) => streak.failed(error, Some(&self.shard)).await?,
                }
            }
            refusal => {
                if refusal == Some(Refusal::Throttled) {
                    // It is counted; if nobody counts, nobody reads.
                    let _ = self.report(ReadReport::Throttled).await;
                }
                streak.failed(error, Some(&self.shard)).await?;
            }
        }
        Ok(false)
    }
}

fn millis(behind: Option<i64>) -> Duration {
    let behind = behind.and_then(|behind| u64::try_from(behind).ok());
    Duration::from_millis(behind.unwrap_or_default())
}

fn arrival(record: &Record) -> Option<SystemTime> {
    let arrival = record.approximate_arrival_timestamp?;
    SystemTime::try_from(arrival).ok()
}

fn data(record: Record) -> Bytes {
    Bytes::from(record.data.into_inner())
}
