//! Puts records: several calls at once, and of a call that failed in part only what failed once more.
//!
//! ```text
//! records ▶ calls::pack ▶ at most CALLS_MAX at once ▶ PutRecords ─accepted─▶ done
//!                                    ▲                    │ refused records, after a pause
//!                                    └────────────────────┘
//! ```
//!
//! # Invariants
//! - `put` returns `Ok` only when Kinesis has accepted every record.
//! - A record that was accepted is not sent again, unless the answer that said so was lost.
//! - A call whose connection has died is given up soon: it is given as much time as calls of its size have taken, and some more
//!   (`pace`).
//! - No task outlives `put`: dropping it ends everything, with any part of the records put.
//!
//! # What it does not do
//! It keeps no order, neither over calls nor over records of one call: Kinesis keeps none either.

use aws_sdk_kinesis::error::{BuildError, SdkError};
use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, PutRecordsResultEntry};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use super::calls::{Record, pack};
use super::retries::Retries;
use super::{Kinesis, KinesisError, KinesisOperation, Refusal};
use crate::cloud::aws::within;

/// Calls under way at the same time for one `put`.
const CALLS_MAX: usize = 4;

/// What happened since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutStats {
    /// Calls of PutRecords, successful or not.
    pub requests: u64,
    /// Records that have to be sent again.
    pub retried: u64,
    /// Records refused because their shard takes no more at this time.
    pub throttled: u64,
}

/// Of one call: what Kinesis did not take, and why.
struct Rest {
    records: Vec<Record>,
    error: KinesisError,
    /// So many were refused because there were too many.
    throttled: u64,
    /// It took some.
    in_part: bool,
}

impl Kinesis {
    /// Puts the records; returns once every one of them has been accepted.
    ///
    /// Whatever passes by itself is tried again with growing pauses, without end: the caller bounds it by dropping the
    /// future. `on` hears of increments as they happen.
    ///
    /// # Errors
    /// What somebody has to mend: no stream, no right, a record that is too large. Any part of the records may have been
    /// put then.
    pub async fn put(
        &self,
        records: Vec<Record>,
        on: &(dyn Fn(PutStats) + Send + Sync),
    ) -> Result<(), KinesisError> {
        let calls = pack(records).map_err(|reason| KinesisError::Record {
            stream: self.stream().to_owned(),
            reason,
        })?;
        let mut calls = calls.into_iter();
        let mut putting = FuturesUnordered::new();
        loop {
            let room = CALLS_MAX - putting.len();
            // Each is boxed: a request is large.
            putting.extend(
                calls
                    .by_ref()
                    .take(room)
                    .map(|call| Box::pin(self.put_call(call, on))),
            );
            match putting.next().await {
                Some(put) => put?,
                None => return Ok(()),
            }
        }
    }

    async fn put_call(
        &self,
        mut records: Vec<Record>,
        on: &(dyn Fn(PutStats) + Send + Sync),
    ) -> Result<(), KinesisError> {
        let mut streak = Retries::default();
        loop {
            let Err(rest) = self.put_once(records).await else {
                on(PutStats {
                    requests: 1,
                    ..PutStats::default()
                });
                return Ok(());
            };
            records = rest.records;
            let ends = !rest.error.passes();
            on(PutStats {
                requests: 1,
                retried: if ends { 0 } else { records.len() as u64 },
                throttled: rest.throttled,
            });
            if rest.in_part {
                streak.end();
            }
            streak.failed(rest.error, None).await?;
        }
    }

    /// One call, without a second attempt.
    async fn put_once(&self, records: Vec<Record>) -> Result<(), Rest> {
        let entries: Result<Vec<_>, _> = records.iter().map(entry).collect();
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                let error = KinesisError::Record {
                    stream: self.stream().to_owned(),
                    reason: error.to_string(),
                };
                return Err(Rest::all(records, error));
            }
        };
        let bytes: usize = records.iter().map(Record::bytes).sum();
        let bytes = bytes as u64;
        let _permit = self.putting.acquire().await.expect("it is never closed");
        let pace = self.pace.now();
        let deadline = aws_sdk_kinesis::config::Builder::new()
            .timeout_config(within(self.pace.deadline(pace, bytes)));
        let sent = Instant::now();
        let request = self
            .client
            .put_records()
            .stream_name(self.stream())
            .set_records(Some(entries))
            .customize()
            .config_override(deadline);
        match Box::pin(request.send()).await {
            Ok(answer) => {
                self.pace.answered(bytes, sent.elapsed());
                self.rest(records, &answer.records)
            }
            Err(error) => {
                if matches!(error, SdkError::TimeoutError(_)) {
                    self.pace.silent(pace);
                }
                let error = self.refused(KinesisOperation::PutRecords, &error);
                Err(Rest::all(records, error))
            }
        }
    }

    /// What the answer does not say was accepted.
    fn rest(&self, records: Vec<Record>, answers: &[PutRecordsResultEntry]) -> Result<(), Rest> {
        let sent = records.len();
        let mut reason: Option<KinesisError> = None;
        let mut throttled = 0;
        let mut refused = Vec::new();
        for (at, record) in records.into_iter().enumerate() {
            let error = match answers.get(at) {
                Some(answer) if answer.sequence_number.is_some() => continue,
                Some(answer) => self.refused_record(
                    answer.error_code().unwrap_or("InternalFailure"),
                    answer.error_message().unwrap_or("no message"),
                ),
                None => self.incomplete(KinesisOperation::PutRecords),
            };
            throttled += u64::from(error.refusal() == Some(Refusal::Throttled));
            // Of several reasons the one that somebody has to mend.
            if reason.is_none() || !error.passes() {
                reason = Some(error);
            }
            refused.push(record);
        }
        match reason {
            None => Ok(()),
            Some(error) => Err(Rest {
                in_part: refused.len() < sent,
                records: refused,
                error,
                throttled,
            }),
        }
    }
}

impl Rest {
    /// None was taken.
    fn all(records: Vec<Record>, error: KinesisError) -> Self {
        let throttled = error.refusal() == Some(Refusal::Throttled);
        Self {
            throttled: if throttled { records.len() as u64 } else { 0 },
            records,
            error,
            in_part: false,
        }
    }
}

fn entry(record: &Record) -> Result<PutRecordsRequestEntry, BuildError> {
    PutRecordsRequestEntry::builder()
        .partition_key(&record.partition_key)
        .data(Blob::new(record.data.as_ref()))
        .build()
}
