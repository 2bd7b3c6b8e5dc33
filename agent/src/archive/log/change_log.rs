//! Writes the change log of one history: batches into the spool, segments into the store.
//!
//! ```text
//! whoever reads the source ─offer─▶ Writer ─▶ spool        LogHandle: offers, and how far the log has come
//!                                     └─complete segment─▶ Uploading ─▶ store
//! ```
//! Usually the pipeline offers each batch before its sink gets it. Where the sink does not keep up, the log is read apart
//! from it, and both offer: what is in the log already is passed over, whoever brings it.
//!
//! # Invariants
//! - A batch that was taken is in the spool, on disk, when the offer is answered.
//! - The log has no gap that was not left on purpose ([`LogHandle::go_on_at`]), said aloud and counted.
//! - Without `archive.required` the log never holds up whoever offers: what the spool cannot take is left out. With it, the
//!   offer waits until there is room.
//! - What is complete goes to the store by a task of its own ([`super::uploading`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::idle::{Due, is_idle};
use super::spool::{Appended, OpenedSpool};
use super::uploading::{Item, Uploading, send_waiting};
use super::{Layout, Span, Spool, SpoolError, SpoolLimits};
use crate::cloud::store::{Encryption, StoreUrl};
use crate::error::{Classify as _, chain};
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::changelog::Author;
use crate::names::history::History;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;

/// Offers on their way.
const OFFERS: usize = 8;

/// How the change log of one history is written.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// Who writes.
    pub author: Author,
    /// Where the store is.
    pub url: StoreUrl,
    /// How it keeps objects.
    pub encryption: Encryption,
    /// Names in it.
    pub layout: Layout,
    /// The spool's directory, of this history alone.
    pub directory: PathBuf,
    /// The spool's limits.
    pub limits: SpoolLimits,
    /// A segment is complete at this age of the users' first change in it; without one at [`super::idle_age`].
    pub age_max: Duration,
    /// `archive.required`
    pub required: bool,
    /// Longest pause between two attempts to reach the store.
    pub retry_max: Duration,
    /// Whoever reads the source only for the log has nothing to do once the pipeline has been at its front for so long.
    pub lead: Duration,
}

/// Who offers a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The pipeline, on the way to its sink.
    Pipeline,
    /// Whoever reads the source only for the log.
    Apart,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenBatch {
    /// It is in the log.
    Yes,
    /// It begins behind where the log ends.
    Ahead,
    /// The spool could not take it, and the archive is not required.
    LeftOut,
}

/// How far the log has come.
#[derive(Clone, Copy, Debug)]
pub struct LogReach {
    /// The end of its last transaction.
    pub position: PgLsn,
    /// When that moved last.
    pub moved_at: Instant,
    /// Since when, and until when, the pipeline offers what is new; none while it does not.
    front: Option<(Instant, Instant)>,
    /// Something was offered behind where the log ends.
    pub ahead: bool,
    /// The spool does not take anything now.
    pub stuck: bool,
}

impl LogReach {
    /// Whether the pipeline has been at the front for a while since `began`, so that nobody else need read for the log.
    pub fn pipeline_leads(&self, began: Instant, now: Instant, lead: Duration) -> bool {
        self.front
            .is_some_and(|(since, last)| now - last < lead && now - since.max(began) >= lead)
    }

    /// The pipeline has offered what is new.
    fn at_the_front(&mut self, now: Instant, lead: Duration) {
        let since = self.front.filter(|(_, last)| now - *last < lead);
        self.front = Some((since.map_or(now, |(since, _)| since), now));
    }
}

/// The log, for whoever offers batches.
#[derive(Clone, Debug)]
pub struct LogHandle {
    history: History,
    requests: mpsc::Sender<Request>,
    reach: watch::Receiver<LogReach>,
    uploaded: watch::Receiver<PgLsn>,
}

/// Nobody writes the log any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the change log has ended")]
pub struct Closed;

impl LogHandle {
    /// What its LSNs are of.
    pub fn history(&self) -> History {
        self.history
    }

    /// How far the log has come.
    pub fn reach(&self) -> LogReach {
        *self.reach.borrow()
    }

    /// The same, and further as it goes.
    pub fn watch(&self) -> watch::Receiver<LogReach> {
        self.reach.clone()
    }

    /// How far the store has it.
    pub fn uploaded(&self) -> watch::Receiver<PgLsn> {
        self.uploaded.clone()
    }

    /// Offers a batch; answered once it is in the spool, or will not be.
    ///
    /// # Errors
    /// [`Closed`]
    pub async fn offer(
        &self,
        batch: &Arc<Batch>,
        origin: Origin,
    ) -> Result<Result<TakenBatch, SpoolError>, Closed> {
        let batch = Arc::clone(batch);
        self.ask(|answer| Request::Offer {
            batch,
            origin,
            answer,
        })
        .await
    }

    /// What lies before `position` cannot be had any more: the log goes on there. The store has it up to `stored`; the rest is a
    /// gap.
    ///
    /// # Errors
    /// [`Closed`]
    pub async fn go_on_at(&self, position: PgLsn, stored: PgLsn) -> Result<(), Closed> {
        self.ask(|answer| Request::GoOnAt {
            position,
            stored,
            answer,
        })
        .await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Closed> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| Closed)?;
        answered.await.map_err(|_| Closed)
    }
}

#[derive(Debug)]
enum Request {
    Offer {
        batch: Arc<Batch>,
        origin: Origin,
        answer: oneshot::Sender<Result<TakenBatch, SpoolError>>,
    },
    GoOnAt {
        position: PgLsn,
        stored: PgLsn,
        answer: oneshot::Sender<()>,
    },
}

/// The change log of one history, and its two tasks.
#[derive(Debug)]
pub struct Log {
    handle: LogHandle,
    writing: AbortOnDropHandle<()>,
    uploading: AbortOnDropHandle<()>,
    /// Told to end.
    end: oneshot::Sender<()>,
}

impl Log {
    /// Opens the spool, with what an earlier run left in it, and starts writing. A log of which nothing is known begins at
    /// `start`. `broken` is told where a base backup must be taken from, if the log has a gap.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn start(
        settings: LogSettings,
        start: PgLsn,
        metrics: ArchiveMetrics,
        broken: watch::Sender<Option<PgLsn>>,
    ) -> Result<Self, SpoolError> {
        let OpenedSpool {
            spool,
            waiting,
            taken,
        } = open(&settings, start)?;
        let first = waiting.first().map(|segment| segment.span.start);
        let first = first.map_or(spool.position(), |first| first.min(spool.position()));
        let (uploaded, uploaded_seen) = watch::channel(first);
        // As many as the spool has room for.
        let (complete, segments) = mpsc::unbounded_channel();
        send_waiting(&complete, waiting, spool.position());
        let (requests, requested) = mpsc::channel(OFFERS);
        let (end, told_to_end) = oneshot::channel();
        let (reach, reach_seen) = watch::channel(LogReach {
            position: spool.position(),
            moved_at: Instant::now(),
            front: None,
            ahead: false,
            stuck: false,
        });
        let handle = LogHandle {
            history: settings.author.history,
            requests,
            reach: reach_seen,
            uploaded: uploaded_seen.clone(),
        };
        metrics.spool(spool.used());
        if let Some(taken) = &taken {
            metrics.has_segment(taken.span.end, taken.at);
        }
        let writer = Writer {
            settings: settings.clone(),
            spool,
            complete,
            metrics: metrics.clone(),
            broken,
            reach,
            uploaded: uploaded_seen,
            due: Due::default(),
        };
        let uploading = Uploading {
            settings,
            uploaded,
            stored: Vec::new(),
            metrics,
            taken,
            parked: Vec::new(),
        };
        Ok(Self {
            handle,
            writing: AbortOnDropHandle::new(tokio::spawn(writer.run(requested, told_to_end))),
            uploading: AbortOnDropHandle::new(tokio::spawn(uploading.run(segments))),
            end,
        })
    }

    /// For whoever offers batches.
    pub fn handle(&self) -> &LogHandle {
        &self.handle
    }

    /// Whether a task of it is gone that nobody told to end: nothing comes of it any more.
    pub fn is_lost(&self) -> bool {
        self.writing.is_finished() || self.uploading.is_finished()
    }

    /// Ends it: what is in the spool goes to the store, as far as that is possible within `grace`. What is not, stays in the
    /// spool; says whether it all went.
    pub async fn finish(self, grace: Duration) -> bool {
        let Self {
            mut writing,
            mut uploading,
            end,
            ..
        } = self;
        let deadline = Instant::now() + grace;
        // One that has ended already needs no telling.
        let _ = end.send(());
        let both = async {
            let _ = (&mut writing).await;
            let _ = (&mut uploading).await;
        };
        let done = tokio::time::timeout_at(deadline, both).await.is_ok();
        // The first may have ended in time and the second not; none may be waited for twice.
        for task in [writing, uploading] {
            if !task.is_finished() {
                task.abort();
                // It was told to end; how it did is of no interest.
                let _ = task.await;
            }
        }
        done
    }
}

/// Brings what an earlier history of the stream has left in its spool to the store; then the directory goes.
///
/// # Errors
/// [`SpoolError`]
pub async fn upload_leftover(
    settings: LogSettings,
    metrics: ArchiveMetrics,
) -> Result<(), SpoolError> {
    let OpenedSpool {
        spool,
        waiting,
        taken,
    } = open(&settings, PgLsn::from(0))?;
    let directory = settings.directory.clone();
    let (complete, segments) = mpsc::unbounded_channel();
    send_waiting(&complete, waiting, spool.position());
    drop(complete);
    let (uploaded, _) = watch::channel(PgLsn::from(0));
    let uploading = Uploading {
        settings,
        uploaded,
        stored: Vec::new(),
        metrics,
        taken,
        parked: Vec::new(),
    };
    uploading.run(segments).await;
    drop(spool);
    Spool::forget(&directory)
}

/// All that waits is read and checked, which takes its time where the store was away for long.
fn open(settings: &LogSettings, start: PgLsn) -> Result<OpenedSpool, SpoolError> {
    tokio::task::block_in_place(|| Spool::open(&settings.directory, settings.limits, start))
}

/// Batches into the spool.
struct Writer {
    settings: LogSettings,
    spool: Spool,
    complete: mpsc::UnboundedSender<Item>,
    metrics: ArchiveMetrics,
    broken: watch::Sender<Option<PgLsn>>,
    reach: watch::Sender<LogReach>,
    uploaded: watch::Receiver<PgLsn>,
    /// When the segment that is being written is old enough.
    due: Due,
}

impl Writer {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>, mut end: oneshot::Receiver<()>) {
        loop {
            let (growing, due) = self.due();
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due), if growing => self.complete(),
                Ok(()) = self.uploaded.changed() => self.metrics.spool(self.spool.used()),
                request = requests.recv() => {
                    let Some(request) = request else { break };
                    self.answer(request).await;
                }
                _ = &mut end => break,
            }
        }
        self.complete();
    }

    async fn answer(&mut self, request: Request) {
        // Whoever asked may be gone; the log has what it has.
        match request {
            Request::Offer {
                batch,
                origin,
                answer,
            } => {
                let taken = self.take(&batch, origin).await;
                failpoint::hit("archive:spooled");
                let _ = answer.send(taken);
            }
            Request::GoOnAt {
                position,
                stored,
                answer,
            } => {
                self.go_on_at(position, stored);
                let _ = answer.send(());
            }
        }
    }

    /// Whether a segment has begun, and when it is old enough.
    fn due(&self) -> (bool, Instant) {
        (
            self.due.at().is_some(),
            self.due.at().unwrap_or_else(Instant::now),
        )
    }

    async fn take(&mut self, batch: &Batch, origin: Origin) -> Result<TakenBatch, SpoolError> {
        let mut said = false;
        loop {
            let appended =
                tokio::task::block_in_place(|| self.spool.append(&self.settings.author, batch));
            let error = match appended {
                Ok(appended) => return Ok(self.appended(appended, batch, origin)),
                // The transaction cannot be applied either, or must not be.
                Err(error @ (SpoolError::Because(_) | SpoolError::WentBack(_))) => {
                    return Err(error);
                }
                Err(error) => error,
            };
            // What has been begun makes room once the store has it.
            self.complete();
            let was_stuck = self.reach.borrow().stuck;
            self.reach.send_modify(|reach| reach.stuck = true);
            if !was_stuck && !said {
                self.say(&error);
            }
            if !self.settings.required {
                return Ok(TakenBatch::LeftOut);
            }
            said = true;
            self.wait_for_room().await;
        }
    }

    fn appended(&mut self, appended: Appended, batch: &Batch, origin: Origin) -> TakenBatch {
        let now = Instant::now();
        let (position, lead) = (self.spool.position(), self.settings.lead);
        self.reach.send_modify(|reach| {
            if appended == Appended::Now {
                reach.position = position;
                reach.moved_at = now;
                reach.stuck = false;
                reach.ahead = false;
            }
            reach.ahead |= appended == Appended::Ahead;
            let is_new = batch.end_lsn() >= position && appended != Appended::Ahead;
            if origin == Origin::Pipeline && is_new {
                reach.at_the_front(now, lead);
            }
        });
        match appended {
            Appended::Ahead => return TakenBatch::Ahead,
            Appended::Known => return TakenBatch::Yes,
            Appended::Now => {}
        }
        self.due.took(now, is_idle(batch), self.settings.age_max);
        if self.spool.is_full() {
            self.complete();
        }
        self.metrics.spool(self.spool.used());
        TakenBatch::Yes
    }

    /// Waits until the store has taken something, or for a disk that may have healed.
    async fn wait_for_room(&mut self) {
        let pause = self.settings.retry_max.min(Duration::from_secs(5));
        // Either way it is tried again.
        let _ = tokio::time::timeout(pause, self.uploaded.changed()).await;
        self.metrics.spool(self.spool.used());
    }

    fn say(&self, error: &SpoolError) {
        let stream = &self.settings.author.stream;
        let (error_text, hint) = (chain(error), error.hint());
        if self.settings.required {
            tracing::error!(
                stream, error = %error_text, hint,
                "the change log stands still, and replication waits for it"
            );
        } else {
            tracing::error!(
                stream, error = %error_text, hint,
                "the change log stands still: replication goes on, the archive does not"
            );
        }
    }

    fn go_on_at(&mut self, position: PgLsn, stored: PgLsn) {
        if position <= self.spool.position() {
            return;
        }
        self.complete();
        let gap = Span {
            start: self.spool.position().max(stored),
            end: self
                .spool
                .resumes_at()
                .map_or(position, |here| here.min(position)),
        };
        if let Err(error) = self.spool.go_on_at(position) {
            self.say(&error);
        }
        let _ = self.complete.send(Item::GoOnAt(position));
        if gap.start < gap.end {
            tracing::error!(
                stream = self.settings.author.stream, from = %gap.start, to = %gap.end,
                "the change log has a gap: neither the source nor the archive has that; only a base backup taken from now on \
                 leads across it"
            );
            self.metrics.gaps.increment(1);
            self.broken.send_replace(Some(position));
        }
        self.reach.send_modify(|reach| {
            reach.position = position;
            reach.moved_at = Instant::now();
        });
    }

    /// Hands the segment that is being written to the upload.
    fn complete(&mut self) {
        self.due = Due::default();
        match self.spool.close() {
            // Without an upload it waits in the spool.
            Ok(segment) => segment
                .into_iter()
                .for_each(|segment| drop(self.complete.send(Item::Segment(segment)))),
            // The next start finds it.
            Err(error) => self.say(&error),
        }
    }
}
