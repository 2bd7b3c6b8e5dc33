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
//! - In memory are pages of [`PAGES_BYTES`] at most, however many shards there are: a shard asks for one once there is room
//!   for what it may bring. What was given out counts until it is dropped.
//!
//! # What it does not do
//! It keeps no checkpoint, and it sorts nothing over shards.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::SendError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use super::list::now;
use super::progress::{Page, ShardsProgress, Slowest};
use super::shard::ShardReader;
use super::{Kinesis, KinesisError};

/// Reports on their way: a few for each shard of a stream of usual size.
const REPORTS: usize = 64;

/// Bytes of records in memory, in the channel of events and on the way there: three full pages, as many as a reader takes in
/// the time of a request, or the tips of some 25 shards at a time. An answer takes more than twice as much while it is decoded.
const PAGES_BYTES: usize = 32 << 20;

/// How often it is said how late the reader is, also when nothing comes.
const LATE_EVERY: Duration = Duration::from_secs(1);

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

/// Records of one shard, in its order; never empty.
#[derive(Debug)]
pub struct Records {
    /// The records.
    pub data: Vec<Bytes>,
    /// All of them had arrived in the stream by this time on this machine's clock: whatever Kinesis had accepted before one of
    /// them was sent has been delivered once the reader has come so far ([`Event::ReadUpTo`]).
    pub arrived_by: Instant,
    /// Given back once they are dropped.
    pub(super) _room: OwnedSemaphorePermit,
}

/// What a reader delivers.
#[derive(Debug)]
pub enum Event {
    /// Records of one shard.
    Records(Records),
    /// Every shard of the stream, closed ones and children included, has been read up to this time on this machine's
    /// clock: what the stream had accepted before it has been delivered in an earlier event. Never goes back.
    ReadUpTo(Instant),
}

/// What happened since the last report, and how late the reader is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// How far the shard that is furthest behind trails its tip: not an increment.
    pub behind: Duration,
    /// Records read.
    pub records: u64,
    /// Bytes of their data.
    pub bytes: u64,
    /// Reads refused because there were too many.
    pub throttled: u64,
}

/// What tasks say to the reader.
pub(super) enum ReadReport {
    /// A complete list, asked for at this time.
    Listed { sent: Instant, shards: Vec<String> },
    /// The records of this page are in the channel of events.
    Page { shard: String, page: Page },
    /// There is nothing left in this shard.
    Ended { shard: String },
    /// A read was refused because there were too many.
    Throttled,
}

struct ShardReading {
    kinesis: Kinesis,
    from: StartAt,
    events: mpsc::Sender<Event>,
    reports: mpsc::Sender<ReadReport>,
    slowest: watch::Sender<Slowest>,
    /// A list is asked for when it is told.
    list: Arc<Notify>,
    progress: ShardsProgress,
    /// The shards of the last list, also those that have ended; `None` before the first.
    known: Option<HashSet<String>>,
    /// How far it has come, where that has not been said yet.
    news: Option<Instant>,
    told: Option<Instant>,
    room: Arc<Semaphore>,
    /// Its drop ends all.
    tasks: JoinSet<Result<(), KinesisError>>,
}

/// A place in the channel of events. It is waited for once, and not asked for anew whenever something else happens: others
/// would always be before it.
type ReadPlace = Pin<Box<dyn Future<Output = Result<OwnedPermit<Event>, SendError<()>>> + Send>>;

impl Kinesis {
    /// Reads all shards into `events`, until its receiver is dropped.
    ///
    /// What passes by itself is tried again without end. `on` hears of what happens.
    ///
    /// # Errors
    /// What somebody has to mend: no stream, no right.
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
        let mut reading = ShardReading {
            kinesis: self.clone(),
            from,
            events: events.clone(),
            reports,
            slowest: watch::Sender::new(Slowest::default()),
            list,
            progress: ShardsProgress::new(now()),
            known: None,
            news: None,
            told: None,
            room: Arc::new(Semaphore::new(PAGES_BYTES)),
            tasks,
        };
        let mut late = tokio::time::interval(LATE_EVERY);
        let mut place: Option<ReadPlace> = None;
        loop {
            if reading.has_news() && place.is_none() {
                place = Some(Box::pin(events.clone().reserve_owned()));
            }
            tokio::select! {
                () = events.closed() => return Ok(()),
                // Never `None`: the list has a task for as long as this runs.
                Some(ended) = reading.tasks.join_next() => outcome(ended)?,
                Some(report) = reported.recv() => on(reading.take(report)),
                _ = late.tick() => on(reading.stats()),
                given = given(&mut place), if place.is_some() => {
                    place = None;
                    match given {
                        Ok(given) => reading.tell(given),
                        Err(_) => return Ok(()),
                    }
                }
            }
        }
    }
}

impl ShardReading {
    fn stats(&self) -> ReadStats {
        ReadStats {
            behind: self.progress.behind(now()),
            ..ReadStats::default()
        }
    }

    /// Keeps count; returns what happened.
    fn take(&mut self, report: ReadReport) -> ReadStats {
        let mut stats = ReadStats::default();
        match report {
            ReadReport::Listed { sent, shards } => {
                self.begin(shards);
                self.progress.listed(sent);
            }
            ReadReport::Page { shard, page } => {
                self.progress.page(&shard, &page);
                stats.records = page.records as u64;
                stats.bytes = page.bytes;
            }
            ReadReport::Ended { shard } => {
                self.progress.ended(&shard);
                self.list.notify_one();
                tracing::debug!(
                    stream = self.kinesis.stream(),
                    shard,
                    "shard read to its end"
                );
            }
            ReadReport::Throttled => stats.throttled = 1,
        }
        let slowest = self.progress.slowest();
        self.slowest.send_if_modified(|before| {
            let changed = *before != slowest;
            *before = slowest;
            changed
        });
        stats.behind = self.progress.behind(now());
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
            self.progress.add(shard, now());
            let reader = ShardReader {
                kinesis: self.kinesis.clone(),
                shard: shard.clone(),
                start,
                events: self.events.clone(),
                reports: self.reports.clone(),
                slowest: self.slowest.subscribe(),
                room: Arc::clone(&self.room),
            };
            self.tasks.spawn(Box::pin(reader.run()));
        }
        self.known = Some(shards.into_iter().collect());
    }

    /// Whether it is time to say how far it has come.
    fn has_news(&mut self) -> bool {
        let lately = self.told.is_some_and(|told| now() < told + TELL_EVERY);
        if !lately && let Some(up_to) = self.progress.read_up_to() {
            self.news = Some(up_to);
        }
        self.news.is_some()
    }

    /// Says how far it has come.
    fn tell(&mut self, place: OwnedPermit<Event>) {
        if let Some(up_to) = self.news.take() {
            self.told = Some(now());
            place.send(Event::ReadUpTo(up_to));
        }
    }
}

async fn given(place: &mut Option<ReadPlace>) -> Result<OwnedPermit<Event>, SendError<()>> {
    match place {
        Some(place) => place.await,
        None => std::future::pending().await,
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
