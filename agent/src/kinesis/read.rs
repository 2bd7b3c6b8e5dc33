//! Reads all shards of the stream at the same time, and says how far it has come.
//!
//! ```text
//! list ─Listed─▶ ┌──────┐ ◀─Page, Ended, Throttled─ shard, shard, …
//!                │ read │ ──slowest──▶ (a shard far ahead waits)
//!                └──────┘
//!                    └─ReadUpTo─▶ events ◀─Records─ shard, shard, …
//! ```
//!
//! # Invariants
//! - An event [`Event::ReadUpTo`] is sent behind the records it speaks of, which are in the channel before their page
//!   is reported.
//! - A shard that appears in a later list is read from its beginning: it did not exist when the reader began.
//! - A full channel stops reading; a dropped receiver, a dropped future or an error ends all tasks.
//! - In memory are the channel's events and a page of 10 MB at most for each shard.
//!
//! # What it does not do
//! It keeps no checkpoint, and it sorts nothing over shards.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use super::list::now;
use super::progress::{Page, Progress, Slowest};
use super::shard::ShardReader;
use super::{Kinesis, KinesisError};

/// Reports on their way: a few for each shard of a stream of usual size.
const REPORTS: usize = 64;

/// Between two events that say how far the reader has come.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// At the oldest record that the stream still has.
    TrimHorizon,
    /// At the first record that arrived at this time or later, by the clock of Kinesis. Not in the future.
    Timestamp(SystemTime),
}

/// What a reader delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Records of one shard, in its order; never empty.
    Records(Vec<Bytes>),
    /// Every shard of the stream, closed ones and children included, has been read up to this time on this machine's
    /// clock: what the stream had accepted before it has been delivered in an earlier event. Never goes back.
    ReadUpTo(Instant),
}

/// What happened since the last report, and how late the reader is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// The largest MillisBehindLatest over all shards: not an increment.
    pub behind: Duration,
    /// Records read.
    pub records: u64,
    /// Bytes of their data.
    pub bytes: u64,
    /// Reads refused because there were too many.
    pub throttled: u64,
}

/// What tasks say to the reader.
pub(super) enum Report {
    /// A complete list, asked for at this time.
    Listed { sent: Instant, shards: Vec<String> },
    /// The records of this page are in the channel of events.
    Page { shard: String, page: Page },
    /// There is nothing left in this shard.
    Ended { shard: String },
    /// A read was refused because there were too many.
    Throttled,
}

struct Reading {
    kinesis: Kinesis,
    from: StartAt,
    events: mpsc::Sender<Event>,
    reports: mpsc::Sender<Report>,
    slowest: watch::Sender<Slowest>,
    /// A list is asked for when it is told.
    list: Arc<Notify>,
    progress: Progress,
    /// The shards of the last list, also those that have ended; `None` before the first.
    known: Option<HashSet<String>>,
    told: Option<Instant>,
    /// Its drop ends all.
    tasks: JoinSet<Result<(), KinesisError>>,
}

impl Kinesis {
    /// Reads all shards into `events`, until its receiver is dropped.
    ///
    /// What is transient is tried again without end. `on` hears of what happens.
    ///
    /// # Errors
    /// What needs a person: no stream, no right.
    pub async fn read(
        &self,
        from: StartAt,
        events: mpsc::Sender<Event>,
        on: &(dyn Fn(ReadStats) + Send + Sync),
    ) -> Result<(), KinesisError> {
        let (reports, mut reported) = mpsc::channel(REPORTS);
        let list = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        let listing = self
            .clone()
            .keep_listing(reports.clone(), Arc::clone(&list));
        tasks.spawn(listing);
        let mut reading = Reading {
            kinesis: self.clone(),
            from,
            events: events.clone(),
            reports,
            slowest: watch::Sender::new(Slowest::default()),
            list,
            progress: Progress::default(),
            known: None,
            told: None,
            tasks,
        };
        loop {
            tokio::select! {
                () = events.closed() => return Ok(()),
                // Never `None`: the list has a task for as long as this runs.
                Some(ended) = reading.tasks.join_next() => outcome(ended)?,
                Some(report) = reported.recv() => {
                    on(reading.take(report));
                    if !reading.tell().await {
                        return Ok(());
                    }
                }
            }
        }
    }
}

impl Reading {
    /// Keeps count; returns what happened.
    fn take(&mut self, report: Report) -> ReadStats {
        let mut stats = ReadStats::default();
        match report {
            Report::Listed { sent, shards } => {
                self.begin(shards);
                self.progress.listed(sent);
            }
            Report::Page { shard, page } => {
                self.progress.page(&shard, &page);
                stats.records = page.records as u64;
                stats.bytes = page.bytes;
            }
            Report::Ended { shard } => {
                self.progress.ended(&shard);
                self.list.notify_one();
                tracing::debug!(
                    stream = self.kinesis.stream(),
                    shard,
                    "shard read to its end"
                );
            }
            Report::Throttled => stats.throttled = 1,
        }
        let slowest = self.progress.slowest();
        self.slowest.send_if_modified(|before| {
            let changed = *before != slowest;
            *before = slowest;
            changed
        });
        stats.behind = self.progress.behind();
        stats
    }

    /// Reads what is new in a list.
    fn begin(&mut self, shards: Vec<String>) {
        let start = match self.known {
            None => self.from,
            Some(_) => StartAt::TrimHorizon,
        };
        let known = self.known.take().unwrap_or_default();
        for shard in shards.iter().filter(|shard| !known.contains(*shard)) {
            tracing::debug!(stream = self.kinesis.stream(), shard, "shard found");
            self.progress.add(shard);
            let reader = ShardReader {
                kinesis: self.kinesis.clone(),
                shard: shard.clone(),
                start,
                events: self.events.clone(),
                reports: self.reports.clone(),
                slowest: self.slowest.subscribe(),
            };
            self.tasks.spawn(Box::pin(reader.run()));
        }
        self.known = Some(shards.into_iter().collect());
    }

    /// Says how far it has come, if there is news; `false` when nobody listens.
    async fn tell(&mut self) -> bool {
        let now = now();
        if self.told.is_some_and(|told| now < told + TELL_EVERY) {
            return true;
        }
        let Some(up_to) = self.progress.read_up_to() else {
            return true;
        };
        self.told = Some(now);
        self.events.send(Event::ReadUpTo(up_to)).await.is_ok()
    }
}

/// A task that ends has read all there is, or nobody listens.
fn outcome(ended: Result<Result<(), KinesisError>, JoinError>) -> Result<(), KinesisError> {
    match ended {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and this with it.
            Err(_) => Ok(()),
        },
    }
}
