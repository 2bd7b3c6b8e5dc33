//! Reads one Kinesis stream, and hands over what is complete; see the page above for what holds.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::gaps::{self, GapVerdict, Gaps};
use super::{StreamSettings, Tip, Until};
use crate::archive::log::Layout;
use crate::cloud::kinesis::{Event, Kinesis, KinesisError, Records, StartAt, Wanted};
use crate::failpoint;
use crate::flow::batch::IN_FLIGHT_MAX;
use crate::flow::changelog::{
    self, Gap, Gather, Gathered, Part, UnpackError, Unpacker, VERSION, Worth, history_of,
};
use crate::flow::spill::{SpillError, SpillSpace};
use crate::observe::metrics::StreamMetrics;
use crate::pg::PgLsn;
use crate::source::from_archive::{Filled, FromArchive};
use crate::source::overflow::{Held, Overflow};
use crate::source::{LogIntake, Received, SourceError, SourcePosition};
use crate::time::{pg_micros, wall_clock};

/// Events of the reader that wait; each holds one page of a shard at most.
const EVENTS: usize = 4;

/// A stream that gives no sign of life for so long cannot be drained now.
const STANDSTILL: Duration = Duration::from_secs(30);

/// Between two looks whether a large transaction has given its room back.
const ROOM_EVERY: Duration = Duration::from_millis(250);

/// What may wait for others in memory, as a part of `limits.queue_bytes`, one in so many; the queue has the rest.
const WAITING: u64 = 4;

/// What comes after a reading of the stream has ended.
#[derive(Debug)]
enum NextRead {
    /// Nobody wants more, or the tip was reached, with this gap before what is left.
    End(Option<Gap>),
    /// The stream is read from its oldest record on.
    FromTheBeginning,
}

pub(super) struct Receiving {
    settings: StreamSettings,
    until: Until,
    gather: Gather<Held>,
    shelf: Overflow,
    intake: LogIntake,
    queue: mpsc::Sender<Received>,
    archive: FromArchive,
    kinesis: Kinesis,
    metrics: StreamMetrics,
    gaps: Gaps,
    /// Where this reading of the stream began, and when it did.
    from: StartAt,
    since: SystemTime,
    /// Something was read that ends where the reading was to lead on from, or before, or that did lead on.
    joined: bool,
    /// What was ignored that should not be there, as far as it has been said.
    warned: HashSet<&'static str>,
}

/// Whether there is more to read.
type Flow = ControlFlow<NextRead>;

const ON: Flow = ControlFlow::Continue(());

/// Nobody wants more.
const UNWANTED: Flow = ControlFlow::Break(NextRead::End(None));

impl Receiving {
    /// Opens the stream.
    pub(super) async fn open(
        settings: StreamSettings,
        until: Until,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
        metrics: StreamMetrics,
    ) -> Result<Self, SourceError> {
        let kinesis = Kinesis::open(&settings.kinesis_stream).await?;
        let mut limits = settings.limits;
        let waiting = limits.queue_bytes / WAITING;
        limits.queue_bytes -= waiting;
        let layout = Layout::new(&settings.stream, settings.history);
        let (applied_at, commit_time) = (settings.applied_at, settings.commit_time);
        let applied_by = applied_at.map(|at| at.max(commit_time.unwrap_or(at)));
        Ok(Self {
            gather: Gather::new(
                settings.stream.as_str(),
                settings.history,
                settings.term,
                settings.start,
                IN_FLIGHT_MAX,
            ),
            shelf: Overflow::new(&space, waiting),
            intake: LogIntake::telling(limits, settings.start, space, queue.clone(), position)
                .committed_by(applied_by.map(pg_micros)),
            queue,
            archive: FromArchive::new(settings.archive.clone(), layout),
            kinesis,
            gaps: Gaps::new(until, settings.patience, settings.archive.is_some()),
            settings,
            until,
            metrics,
            from: StartAt::TrimHorizon,
            since: wall_clock(),
            joined: false,
            warned: HashSet::new(),
        })
    }

    /// Reads until there is an end to it; says how the tip was reached.
    pub(super) async fn run(mut self) -> Result<Tip, SourceError> {
        let mut from = gaps::start_at(self.settings.commit_time, wall_clock());
        loop {
            match self.read(from).await? {
                NextRead::End(gap) => {
                    return Ok(Tip {
                        gap,
                        joined: self.joined,
                        position: self.gather.position(),
                        unfinished: self.gather.is_waiting(),
                    });
                }
                NextRead::FromTheBeginning => from = StartAt::TrimHorizon,
            }
        }
    }

    /// Reads the stream from there.
    async fn read(&mut self, from: StartAt) -> Result<NextRead, SourceError> {
        (self.from, self.since) = (from, wall_clock());
        let (events, mut events_seen) = mpsc::channel(EVENTS);
        let (kinesis, metrics) = (self.kinesis.clone(), self.metrics.clone());
        let (until, wanted) = (self.until, self.wanted());
        let mut reading = AbortOnDropHandle::new(tokio::spawn(async move {
            match until {
                // Other databases may follow the same stream in this process, for as long as it runs.
                Until::Stopped => {
                    let on = Arc::new(move |stats| metrics.reading(stats));
                    kinesis.follow(from, events, wanted, on).await
                }
                Until::Tip(_) => {
                    let on = |stats| metrics.reading(stats);
                    kinesis.read(from, events, &on).await
                }
            }
        }));
        let queue = self.queue.clone();
        loop {
            let draining = self.until != Until::Stopped;
            let event = tokio::select! {
                biased;
                () = queue.closed() => return Ok(NextRead::End(None)),
                event = events_seen.recv() => event,
                () = tokio::time::sleep(STANDSTILL), if draining => {
                    return Err(SourceError::Silent {
                        stream: self.settings.kinesis_stream.clone(),
                    });
                }
            };
            let flow = match event {
                Some(Event::Records(records)) => self.records(records).await?,
                Some(Event::ReadUpTo(at)) => self.read_up_to(at).await?,
                None => return Err(ended((&mut reading).await)),
            };
            self.metrics.waiting(self.shelf.bytes());
            if let ControlFlow::Break(next) = flow {
                return Ok(next);
            }
        }
    }

    /// Leaves out the records of other databases; what is unreadable is everybody's.
    fn wanted(&self) -> Wanted {
        let (stream, metrics) = (self.settings.stream.clone(), self.metrics.clone());
        Arc::new(move |record| {
            let part = changelog::decode(record.clone());
            let is_ours = part.map_or(true, |part| part.stream == stream.as_str());
            if !is_ours {
                metrics.ignored("other_stream");
            }
            is_ours
        })
    }

    /// Takes records, and hands over what is complete with them.
    async fn records(&mut self, records: Records) -> Result<Flow, SourceError> {
        for record in records.data {
            let Some(part) = self.needed(record, records.arrived_by)? else {
                continue;
            };
            if let Some(next) = self.keep(&part, records.arrived_by).await?.break_value() {
                return Ok(ControlFlow::Break(next));
            }
        }
        Ok(ON)
    }

    /// The part that a record holds, if it is good for anything.
    fn needed(&mut self, record: Bytes, arrived_by: Instant) -> Result<Option<Part>, SourceError> {
        let Ok(part) = changelog::decode(record) else {
            // If it was one of ours, the gap it leaves is noticed.
            self.ignore("unreadable", "is no change-log record");
            return Ok(None);
        };
        let worth = self.gather.worth(&part);
        if matches!(worth, Worth::Needed | Worth::Known) {
            self.joined |= PgLsn::from(part.end_lsn) <= self.settings.start;
        }
        match worth {
            Worth::Needed => {}
            Worth::Known => {
                if PgLsn::from(part.end_lsn) <= self.gather.position() {
                    let (end_lsn, commit_time) = (part.end_lsn.into(), part.commit_time);
                    self.intake.comes_again(end_lsn, commit_time)?;
                }
                self.metrics.ignored("known");
                return Ok(None);
            }
            Worth::OtherStream => {
                self.metrics.ignored("other_stream");
                return Ok(None);
            }
            Worth::OtherHistory => {
                let (ours, other) = (self.settings.history, history_of(&part));
                self.gaps.saw(ours, other, arrived_by);
                self.ignore(
                    "other_history",
                    "comes from another source under the same stream name, or from a slot before this one",
                );
                return Ok(None);
            }
            Worth::OlderTerm => {
                self.ignore("older_term", "was written at an older term: an agent from before the last promotion still runs");
                return Ok(None);
            }
        }
        if part.version == 0 || part.version > VERSION {
            let version = part.version;
            return Err(UnpackError::Version { version }.into());
        }
        self.intake.known_up_to(part.end_lsn.into());
        Ok(Some(part))
    }

    /// Puts a part to the others, and hands over what is complete with it.
    async fn keep(&mut self, part: &Part, arrived_by: Instant) -> Result<Flow, SourceError> {
        let kept = loop {
            let shelf = &mut self.shelf;
            match tokio::task::block_in_place(|| shelf.put(part)) {
                Ok(kept) => break kept,
                Err(SpillError::Full { limit }) => {
                    if let Some(next) = self.make_room(limit).await?.break_value() {
                        return Ok(ControlFlow::Break(next));
                    }
                    if self.gather.worth(part) != Worth::Needed {
                        return Ok(ON);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.gather
            .keep(part, arrived_by, kept)
            .map_err(|reason| SourceError::Contradiction {
                batch: part.batch,
                reason: reason.to_owned(),
            })?;
        self.hand_over_what_is_complete().await
    }

    fn ignore(&mut self, reason: &'static str, what: &str) {
        self.metrics.ignored(reason);
        if self.warned.insert(reason) {
            tracing::warn!(
                stream = %self.settings.stream, kinesis_stream = self.settings.kinesis_stream,
                "a record of the Kinesis stream {what}; such records are ignored and counted"
            );
        }
    }

    async fn hand_over_what_is_complete(&mut self) -> Result<Flow, SourceError> {
        while let Some(batch) = self.gather.next_batch() {
            if !self.hand_over(batch).await? {
                return Ok(UNWANTED);
            }
        }
        Ok(ON)
    }

    /// Hands a batch over; false once nobody wants more.
    async fn hand_over(&mut self, batch: Gathered<Held>) -> Result<bool, SourceError> {
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
    async fn read_up_to(&mut self, at: Instant) -> Result<Flow, SourceError> {
        let gap = self.gather.gap();
        match self.gaps.read_up_to(at, gap, Instant::now()) {
            GapVerdict::ReadOn => Ok(ON),
            GapVerdict::Tip => self.end(gap).await,
            GapVerdict::BegunAnew(successor) => Err(SourceError::BegunAnew {
                stream: self.settings.stream.clone(),
                ours: self.settings.history,
                successor,
            }),
            GapVerdict::Look {
                gap,
                is_missing,
                is_new,
            } => self.look(gap, is_missing, is_new).await,
        }
    }

    /// Asks the archive for what is missing, or not finished; where it has nothing, that may be the end.
    async fn look(
        &mut self,
        gap: Gap,
        is_missing: bool,
        is_new: bool,
    ) -> Result<Flow, SourceError> {
        if is_new {
            let what = match is_missing {
                true => "is missing in the Kinesis stream",
                false => "is not finished by its writer",
            };
            let then = match self.archive.is_there() {
                true => ": looking for it in the archive",
                false => "",
            };
            tracing::warn!(
                stream = %self.settings.stream, from = %gap.from, to = %gap.to,
                "a stretch {what}{then}"
            );
        }
        let filled = self.fill(gap).await?;
        if filled != Filled::Nothing {
            return self.go_on(filled).await;
        }
        if !is_missing || self.gaps.may_wait(Instant::now()) {
            return Ok(ON);
        }
        if !self.is_from_the_beginning().await {
            // The clocks may differ more than was allowed for.
            return Ok(ControlFlow::Break(NextRead::FromTheBeginning));
        }
        Err(SourceError::Gap {
            gap,
            stream: self.settings.kinesis_stream.clone(),
            archive: match self.archive.is_there() {
                false => "no archive is configured".to_owned(),
                true => "the archive does not have them".to_owned(),
            },
        })
    }

    /// The tip has been read, and nothing is missing for sure.
    async fn end(&mut self, gap: Option<Gap>) -> Result<Flow, SourceError> {
        if let Some(gap) = gap {
            // The writer died with something on its way; the archive may have got it.
            let filled = self.fill(gap).await?;
            if filled != Filled::Nothing {
                return self.go_on(filled).await;
            }
        }
        if self.joined || self.is_from_the_beginning().await {
            return Ok(ControlFlow::Break(NextRead::End(gap)));
        }
        tracing::warn!(
            stream = %self.settings.stream, position = %self.gather.position(),
            "nothing that was read of the Kinesis stream leads on from the replica: the source's clock may be ahead; reading the \
             stream from its oldest record on"
        );
        Ok(ControlFlow::Break(NextRead::FromTheBeginning))
    }

    /// Waits for room on the shelf; nothing is read meanwhile. What was complete is gone: all that helps is what is missing,
    /// from the archive, or a large transaction that arrives at the replica.
    async fn make_room(&mut self, limit: u64) -> Result<Flow, SourceError> {
        let queue = self.queue.clone();
        loop {
            if self.shelf.others_have_room() {
                return Ok(tokio::select! {
                    () = queue.closed() => UNWANTED,
                    () = tokio::time::sleep(ROOM_EVERY) => ON,
                });
            }
            let Some(gap) = self.gather.gap() else {
                return Err(SourceError::TooMuchWaits { limit });
            };
            if self.gaps.is_to_be_looked_for(gap, Instant::now()) {
                let filled = self.fill(gap).await?;
                if filled != Filled::Nothing {
                    return self.go_on(filled).await;
                }
            }
            if !self.gaps.may_wait(Instant::now()) {
                return Err(SourceError::TooMuchWaits { limit });
            }
            tokio::select! {
                () = queue.closed() => return Ok(UNWANTED),
                () = tokio::time::sleep(gaps::LOOK_EVERY) => {}
            }
        }
    }

    /// Takes from the archive what it has of a gap.
    async fn fill(&mut self, gap: Gap) -> Result<Filled, SourceError> {
        let filled = self
            .archive
            .fill(gap, &mut self.gather, &mut self.intake)
            .await?;
        self.gaps.looked(Instant::now());
        if filled == Filled::Some {
            tracing::info!(
                stream = %self.settings.stream, from = %gap.from, to = %self.gather.position(),
                "filled from the archive"
            );
        }
        Ok(filled)
    }

    /// After the archive has given something.
    async fn go_on(&mut self, filled: Filled) -> Result<Flow, SourceError> {
        if filled == Filled::Unwanted {
            return Ok(UNWANTED);
        }
        self.hand_over_what_is_complete().await
    }

    /// Whether the stream has nothing that lies before where its reading began.
    async fn is_from_the_beginning(&self) -> bool {
        if self.from == StartAt::TrimHorizon {
            return true;
        }
        // Who may not ask reads it once more.
        let Ok(stream) = self.kinesis.describe().await else {
            return false;
        };
        gaps::reaches_back(self.from, self.since, stream.retention)
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
