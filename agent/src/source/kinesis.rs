//! A Kinesis stream as the source: records become transactions in the queue.
//!
//! ```text
//! shards ─Records─▶ Gather (order, duplicates) ─batch─▶ Unpacker ─messages─▶ LogIntake ─transaction─▶ pipeline
//!                      │  └─ what waits: Shelf
//!                      └─ a gap ─▶ the archive's change log ─▶ LogIntake
//! ```
//!
//! # Invariants
//! - A batch is handed over once all of its parts are there and nothing before it is missing: transactions come in commit order,
//!   each once.
//! - A gap is filled or it is an error that names it. It counts as one only when every shard has been read beyond
//!   the time it was noticed, and its writer cannot have it on its way any more.
//! - That nothing is left before the tip is believed only of a stream that was seen to lead on from the position, or was read
//!   from its oldest record on: where a reading begins is a guess by two clocks.
//!
//! # What it does not do
//! It keeps no place in the stream: the replica's progress row says where to begin, and a look a little further back costs only
//! reading. Nobody is told how far it is.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::shelf::{Kept, Shelf};
use super::{IntakeLimits, LogIntake, Received, SourceError, SourcePosition};
use crate::archive::{ArchiveError, Chain, Layout, SegmentReader, Span};
use crate::batch::IN_FLIGHT_MAX;
use crate::changelog::{self, Gap, Gather, Gathered, UnpackError, Unpacker, VERSION, Worth};
use crate::failpoint;
use crate::history::History;
use crate::kinesis::{Event, Kinesis, KinesisError, StartAt};
use crate::metrics::StreamMetrics;
use crate::pg::PgLsn;
use crate::spill::{SpillError, SpillSpace};
use crate::store::{Encryption, Store, StoreUrl};
use crate::stream::StreamName;

/// Events of the reader that wait; each holds one page of a shard at most.
const EVENTS: usize = 4;

/// How much earlier than the last applied commit the stream is read: clocks differ, and records wait to be put.
const EARLIER: Duration = Duration::from_secs(60);

/// A stream that gives no sign of life for so long cannot be drained now.
const STANDSTILL: Duration = Duration::from_secs(30);

/// How long a batch may be on its way while later ones are there, before the archive is asked for it.
const ON_ITS_WAY: Duration = Duration::from_secs(30);

/// Between two looks whether the archive has what is missing.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What is received.
#[derive(Clone, Debug)]
pub struct StreamSettings {
    /// The Kinesis stream.
    pub kinesis_stream: String,
    /// The stream in it.
    pub stream: StreamName,
    /// What its LSNs are of.
    pub history: History,
    /// What was written at a lower term is ignored.
    pub term: i64,
    /// Where to begin: the end of the last applied transaction.
    pub start: PgLsn,
    /// When that committed on the source, where it is known.
    pub commit_time: Option<SystemTime>,
    /// What may be held at a time.
    pub limits: IntakeLimits,
    /// Where what waits is put beyond that.
    pub spill_directory: PathBuf,
    /// How much of it.
    pub spill_bytes: u64,
    /// Where a gap may be filled from.
    pub archive: Option<(StoreUrl, Encryption)>,
    /// How long the archive may take until it has what is missing.
    pub patience: Duration,
}

/// How long is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// For ever.
    Stopped,
    /// Until everything has been read that was in the stream at this time.
    Tip(Instant),
}

/// How a reading came to the tip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tip {
    /// What keeps the rest of the stream from being applied, if there is something.
    pub gap: Option<Gap>,
    /// Whether anything was read that leads on from where the reading was to begin.
    pub joined: bool,
    /// Where everything that was handed over ends.
    pub position: PgLsn,
    /// Whether parts of a batch behind that wait for others.
    pub unfinished: bool,
}

/// What comes after a reading of the stream has ended.
enum Next {
    /// Nobody wants more, or the tip was reached, with this gap before what is left.
    End(Option<Gap>),
    /// The stream is read from its oldest record on.
    FromTheBeginning,
}

/// Receives until an error, or until nobody wants transactions any more, or the tip was reached; then says how.
///
/// # Errors
/// [`SourceError`]
pub async fn receive(
    settings: StreamSettings,
    until: Until,
    space: SpillSpace,
    queue: mpsc::Sender<Received>,
    position: watch::Sender<SourcePosition>,
    metrics: StreamMetrics,
) -> Result<Tip, SourceError> {
    let kinesis = Kinesis::open(&settings.kinesis_stream).await?;
    let limits = settings.limits;
    let mut receiving = Receiving {
        gather: Gather::new(
            settings.stream.as_str(),
            settings.history,
            settings.term,
            settings.start,
            IN_FLIGHT_MAX,
        ),
        shelf: Shelf::new(
            settings.spill_directory.clone(),
            limits.queue_bytes,
            settings.spill_bytes,
        ),
        intake: LogIntake::telling(limits, settings.start, space, queue.clone(), position),
        queue,
        layout: Layout::new(&settings.stream, settings.history),
        settings,
        until,
        metrics,
        store: None,
        stalled: None,
        from_the_beginning: false,
        joined: false,
        warned: false,
    };
    let mut from = receiving.start_at();
    loop {
        match receiving.read(&kinesis, from).await? {
            Next::End(gap) => {
                return Ok(Tip {
                    gap,
                    joined: receiving.joined,
                    position: receiving.gather.position(),
                    unfinished: receiving.gather.is_waiting(),
                });
            }
            Next::FromTheBeginning => from = StartAt::TrimHorizon,
        }
    }
}

struct Receiving {
    settings: StreamSettings,
    until: Until,
    gather: Gather<Kept>,
    shelf: Shelf,
    intake: LogIntake,
    queue: mpsc::Sender<Received>,
    layout: Layout,
    metrics: StreamMetrics,
    store: Option<Store>,
    stalled: Option<Stalled>,
    from_the_beginning: bool,
    /// Something was read that ends where the reading was to lead on from, or before, or that did lead on.
    joined: bool,
    /// That something was ignored that should not be there has been said.
    warned: bool,
}

/// A gap that holds everything up.
#[derive(Clone, Copy, Debug)]
struct Stalled {
    from: PgLsn,
    since: Instant,
    looked: Option<Instant>,
}

impl Receiving {
    fn start_at(&self) -> StartAt {
        let known = self.settings.commit_time;
        match known.and_then(|commit_time| commit_time.checked_sub(EARLIER)) {
            // The source's clock may be ahead, and Kinesis takes no time in the future.
            Some(at) => StartAt::Timestamp(at.min(wall_clock() - EARLIER)),
            None => StartAt::TrimHorizon,
        }
    }

    /// Reads the stream from there.
    async fn read(&mut self, kinesis: &Kinesis, from: StartAt) -> Result<Next, SourceError> {
        self.from_the_beginning = from == StartAt::TrimHorizon;
        let (events, mut events_seen) = mpsc::channel(EVENTS);
        let (kinesis, metrics) = (kinesis.clone(), self.metrics.clone());
        let mut reading = AbortOnDropHandle::new(tokio::spawn(async move {
            kinesis
                .read(from, events, &|stats| metrics.reading(stats))
                .await
        }));
        let queue = self.queue.clone();
        loop {
            let draining = self.until != Until::Stopped;
            let event = tokio::select! {
                biased;
                () = queue.closed() => return Ok(Next::End(None)),
                event = events_seen.recv() => event,
                () = tokio::time::sleep(STANDSTILL), if draining => {
                    return Err(SourceError::Silent {
                        stream: self.settings.kinesis_stream.clone(),
                    });
                }
            };
            let next = match event {
                Some(Event::Records(records)) => self.records(records).await?,
                Some(Event::ReadUpTo(at)) => self.read_up_to(at).await?,
                None => return Err(ended((&mut reading).await)),
            };
            if let Some(next) = next {
                return Ok(next);
            }
        }
    }

    /// Takes records, and hands over what is complete with them.
    async fn records(&mut self, records: Vec<Bytes>) -> Result<Option<Next>, SourceError> {
        for record in records {
            self.record(record)?;
        }
        while let Some(batch) = self.gather.next_batch() {
            if !self.hand_over(batch).await? {
                return Ok(Some(Next::End(None)));
            }
        }
        self.metrics.waiting(self.shelf.bytes());
        Ok(None)
    }

    fn record(&mut self, record: Bytes) -> Result<(), SourceError> {
        let Ok(part) = changelog::decode(record) else {
            // If it was one of ours, the gap it leaves is noticed.
            self.ignore("unreadable", "is no change-log record");
            return Ok(());
        };
        let worth = self.gather.worth(&part);
        if matches!(worth, Worth::Needed | Worth::Known) {
            self.joined |= PgLsn::from(part.end_lsn) <= self.settings.start;
        }
        match worth {
            Worth::Needed => {}
            Worth::Known => {
                self.metrics.ignored("known");
                return Ok(());
            }
            Worth::OtherStream => {
                self.metrics.ignored("other_stream");
                return Ok(());
            }
            Worth::OtherHistory => {
                self.ignore(
                    "other_history",
                    "comes from another source under the same stream name, or from a slot before this one",
                );
                return Ok(());
            }
            Worth::OlderTerm => {
                self.ignore("older_term", "was written at an older term: an agent from before the last promotion still runs");
                return Ok(());
            }
        }
        if part.version == 0 || part.version > VERSION {
            let version = part.version;
            return Err(UnpackError::Version { version }.into());
        }
        self.intake.known_up_to(part.end_lsn.into());
        let shelf = &mut self.shelf;
        let kept = tokio::task::block_in_place(|| shelf.put(&part)).map_err(too_much)?;
        self.gather
            .keep(&part, kept)
            .map_err(|reason| SourceError::Contradiction {
                batch: part.batch,
                reason: reason.to_owned(),
            })
    }

    fn ignore(&mut self, reason: &'static str, what: &str) {
        self.metrics.ignored(reason);
        if !self.warned {
            self.warned = true;
            tracing::warn!(
                stream = %self.settings.stream, kinesis_stream = self.settings.kinesis_stream,
                "a record of the Kinesis stream {what}; such records are ignored and counted"
            );
        }
    }

    /// Hands a batch over; false once nobody wants more.
    async fn hand_over(&mut self, batch: Gathered<Kept>) -> Result<bool, SourceError> {
        let mut unpacker = Unpacker::default();
        for kept in batch.parts {
            let part = tokio::task::block_in_place(|| kept.take())?;
            let mut messages = Vec::new();
            tokio::task::block_in_place(|| unpacker.push(&part, |message| messages.push(message)))?;
            for message in messages {
                if !self.intake.take(message).await? {
                    return Ok(false);
                }
            }
        }
        self.joined = true;
        failpoint::hit("apply:handed-over");
        if self.intake.end_lsn() != batch.end_lsn {
            return Err(SourceError::Contradiction {
                batch: batch.number,
                reason: format!(
                    "it ends at {} instead of {}",
                    self.intake.end_lsn(),
                    batch.end_lsn
                ),
            });
        }
        Ok(true)
    }

    /// Everything has been read that was in the stream at `at`.
    async fn read_up_to(&mut self, at: Instant) -> Result<Option<Next>, SourceError> {
        let gap = self.gather.gap();
        if let Until::Tip(tip) = self.until
            && at >= tip
        {
            return match gap {
                Some(gap) if gap.accepted => {
                    let since = tip;
                    let stalled = Stalled {
                        from: gap.from,
                        since,
                        looked: None,
                    };
                    self.missing(gap, stalled).await
                }
                // The writer died with something on its way; the archive may have got it.
                Some(gap) if self.fill(gap).await? => self.records(Vec::new()).await,
                gap => Ok(Some(self.at_the_tip(gap))),
            };
        }
        let Some(gap) = gap else {
            self.stalled = None;
            return Ok(None);
        };
        let stalled = match self.stalled {
            Some(stalled) if stalled.from == gap.from => stalled,
            _ => *self.stalled.insert(Stalled {
                from: gap.from,
                since: clock(),
                looked: None,
            }),
        };
        let looked_lately = stalled
            .looked
            .is_some_and(|looked| looked.elapsed() < LOOK_EVERY);
        if at < stalled.since || looked_lately {
            return Ok(None);
        }
        if gap.accepted {
            return self.missing(gap, stalled).await;
        }
        if stalled.since.elapsed() < ON_ITS_WAY {
            return Ok(None);
        }
        // Its writer died, or has been refused for a while. What it has not finished somebody sends again.
        if self.fill(gap).await? {
            return self.records(Vec::new()).await;
        }
        if stalled.looked.is_none() {
            tracing::warn!(
                stream = %self.settings.stream, from = %gap.from, to = %gap.to,
                "waits for a stretch that its writer has not finished"
            );
        }
        self.stalled = Some(Stalled {
            looked: Some(clock()),
            ..stalled
        });
        Ok(None)
    }

    /// There is no more to hand over in what was read up to the tip.
    fn at_the_tip(&self, gap: Option<Gap>) -> Next {
        if self.joined || self.from_the_beginning {
            return Next::End(gap);
        }
        tracing::warn!(
            stream = %self.settings.stream, position = %self.gather.position(),
            "nothing that was read of the Kinesis stream leads on from the replica: the source's clock may be ahead; reading the \
             stream from its oldest record on"
        );
        Next::FromTheBeginning
    }

    /// A stretch is not in what was read of the stream.
    async fn missing(&mut self, gap: Gap, stalled: Stalled) -> Result<Option<Next>, SourceError> {
        if stalled.looked.is_none() {
            tracing::warn!(
                stream = %self.settings.stream, from = %gap.from, to = %gap.to,
                "a stretch is missing in the Kinesis stream: looking for it in the archive"
            );
        }
        if self.fill(gap).await? {
            tracing::info!(
                stream = %self.settings.stream, from = %gap.from, to = %self.gather.position(),
                "filled from the archive"
            );
            return self.records(Vec::new()).await;
        }
        self.stalled = Some(Stalled {
            looked: Some(clock()),
            ..stalled
        });
        if !self.from_the_beginning {
            // The clocks may differ more than was allowed for.
            return Ok(Some(Next::FromTheBeginning));
        }
        if self.settings.archive.is_some() && stalled.since.elapsed() < self.settings.patience {
            return Ok(None);
        }
        Err(SourceError::Gap {
            gap,
            stream: self.settings.kinesis_stream.clone(),
            archive: match (&self.settings.archive, self.gather.position()) {
                (None, _) => "no archive is configured".to_owned(),
                (Some(_), position) if position == gap.from => {
                    "the archive does not have them".to_owned()
                }
                (Some(_), position) => format!("the archive has them only up to {position}"),
            },
        })
    }

    /// Takes from the archive what it has of a gap; whether anything.
    async fn fill(&mut self, gap: Gap) -> Result<bool, SourceError> {
        let Some((url, encryption)) = self.settings.archive.clone() else {
            return Ok(false);
        };
        let store = match &self.store {
            Some(store) => store.clone(),
            None => {
                let store = Store::open(&url, &encryption)
                    .await
                    .map_err(ArchiveError::from)?;
                self.store.insert(store).clone()
            }
        };
        let objects = store
            .list(&self.layout.log(), None)
            .await
            .map_err(ArchiveError::from)?;
        let spans: Vec<Span> = objects
            .iter()
            .filter_map(|object| self.layout.parse_segment(&object.name))
            .collect();
        let chain = Chain::from(gap.from, &spans);
        for span in &chain.spans {
            if self.gather.position() >= gap.to {
                break;
            }
            let mut segment = SegmentReader::open(&store, &self.layout, *span).await?;
            while let Some(messages) = segment.next_messages().await? {
                for message in messages {
                    if !self.intake.take(message).await? {
                        return Ok(true);
                    }
                }
            }
            self.gather.advance(span.end);
        }
        Ok(!chain.spans.is_empty())
    }
}

/// Why a reader ended by itself.
fn ended(joined: Result<Result<(), KinesisError>, tokio::task::JoinError>) -> SourceError {
    match joined {
        Ok(Err(error)) => error.into(),
        // Only for want of a receiver, which is here.
        Ok(Ok(())) | Err(_) => SourceError::Ended,
    }
}

fn too_much(error: SpillError) -> SourceError {
    match error {
        SpillError::Full { limit } => SourceError::TooMuchWaits { limit },
        error => error.into(),
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the edge: since when something is missing"
)]
fn clock() -> Instant {
    Instant::now()
}

#[allow(
    clippy::disallowed_methods,
    reason = "the edge: where to begin reading the stream"
)]
fn wall_clock() -> SystemTime {
    SystemTime::now()
}
