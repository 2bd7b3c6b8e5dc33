//! The change log of one database, for as long as its pipeline lives: across sessions, also while there is none.
//!
//! ```text
//! session ─batch─▶ [spool_first] ─batch─▶ sink
//!                      └─offer─▶ Log ◀─offer─ [apart] ◀─ a copy of the slot
//! ```
//! A session offers each batch before its sink gets it. Where that is not enough, because the sink does not keep up or there is
//! no session (a copy, a replica that is away), the source is read apart, until a session is at the front again.
//!
//! # Invariants
//! - One log at a time, of the history that the source is in. What an earlier one has left in the spool goes to the store
//!   under its own name.
//! - The slot is not moved past what is in the spool or, where the archive is required, in the store. A spool that takes
//!   nothing any more lets it go, and so does a log that cannot be read for long, unless the archive is required.
//! - While another agent reads the slot, what is missing here may be in that one's spool: no gap is left for it.
//! - The log moves on within a quarter of the RPO, or it is read apart; another half is what a segment may grow old.
//!
//! # What it does not do
//! It moves no slot: the pipeline does, as far as this lets it.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::error::SessionError;
use super::log_reader::{self, LogReaderError};
use crate::archive::base::{BackupError, Bases};
use crate::archive::log::{
    self, ArchiveError, Chain, Layout, Log, LogHandle, LogSettings, Origin, Span, SpoolError,
    SpoolLimits, Way, upload_leftover,
};
use crate::backoff::{self, Decision};
use crate::cloud::store::Store;
use crate::config::{Archive, Config};
use crate::error::{Class, Classify as _, chain};
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::changelog::Author;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::setup::{self, Logged, SetupError};

/// How often it is looked whether the log moves on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A session that begins waits so long for a log that is about to be opened.
const OPEN_WITHIN: Duration = Duration::from_secs(5);

/// After that long without a reading that works, WAL is not kept for the log any more, and it gets a gap: the source's disk
/// is worth more.
const LET_GO_AFTER: Duration = Duration::from_secs(600);

/// How long the store may take to say what it has of the log.
const STORE_WITHIN: Duration = Duration::from_secs(10);

/// A spool that did not take anything is tried again after that, if the store has taken nothing meanwhile.
const STUCK_FOR: Duration = Duration::from_secs(30);

/// Before what has panicked is begun anew.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(5);

/// What the source may write between two questions, in bytes.
const WRITTEN_MEANWHILE: u64 = 1 << 30;

/// Segments that are read before they are believed; more at a time are another agent's work of hours.
const READ_FIRST: usize = 8;

/// What a session sees of the log.
#[derive(Clone, Debug, Default)]
struct State {
    open: Option<LogHandle>,
    /// Why it is not open.
    error: Option<(Class, String)>,
}

/// Leaves out the segments that lead on from a position by their names alone.
async fn believed(bases: &Bases, from: PgLsn, spans: Vec<Span>) -> Result<Vec<Span>, BackupError> {
    let mut left = spans.clone();
    let mut way = Way::new(from, spans);
    for _ in 0..READ_FIRST {
        let Some(span) = way.pop() else { break };
        match log::verify(&bases.store, &bases.layout, span).await {
            Ok(()) => {}
            Err(ArchiveError::Store(error)) if !error.is_of_one_object() => {
                return Err(error.into());
            }
            Err(error) => {
                tracing::warn!(
                    segment = span.name(), error = %chain(&error),
                    "a segment in the archive does not hold what its name says"
                );
                left.retain(|other| *other != span);
                way.give_up(span, from);
            }
        }
    }
    Ok(left)
}

/// How far the slot may be moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Hold {
    /// None while nothing is known.
    history: Option<History>,
    /// None where nothing holds it.
    up_to: Option<PgLsn>,
}

/// The log, for the sessions of a pipeline.
#[derive(Debug)]
pub(super) struct ChangeLog {
    state: watch::Receiver<State>,
    hold: watch::Receiver<Hold>,
    required: bool,
    look: Arc<Notify>,
    end: CancellationToken,
    sessions: Arc<()>,
    task: AbortOnDropHandle<()>,
}

impl ChangeLog {
    /// Starts it. `broken` is told where a base backup must be taken from.
    pub(super) fn start(
        config: &Arc<Config>,
        archive: &Archive,
        database: &str,
        broken: watch::Sender<Option<PgLsn>>,
    ) -> Self {
        let (state, state_seen) = watch::channel(State::default());
        let (hold, hold_seen) = watch::channel(Hold::default());
        let (look, end) = (Arc::new(Notify::new()), CancellationToken::new());
        let sessions = Arc::new(());
        let metrics = ArchiveMetrics::new(database);
        metrics.starts(super::now());
        let keeping = Keeping {
            config: Arc::clone(config),
            archive: archive.clone(),
            database: database.to_owned(),
            stream: config.stream(database),
            metrics,
            broken,
            state,
            hold,
            let_go: AtomicBool::new(false),
            look: Arc::clone(&look),
            end: end.clone(),
            sessions: Arc::downgrade(&sessions),
        };
        Self {
            state: state_seen,
            hold: hold_seen,
            required: archive.required,
            look,
            end,
            sessions,
            task: AbortOnDropHandle::new(tokio::spawn(run(Arc::new(keeping)))),
        }
    }

    /// For one session, of this history.
    pub(super) fn of(&self, history: History) -> SessionLog {
        // The slot may have been created a moment ago.
        self.look.notify_one();
        SessionLog {
            state: self.state.clone(),
            hold: self.hold.clone(),
            held: None,
            required: self.required,
            history,
            _open: Arc::clone(&self.sessions),
        }
    }

    /// Ends it; what is in the spool goes to the store as far as there is time.
    pub(super) async fn finish(self) {
        self.end.cancel();
        // It was told to end; how it did is of no interest.
        let _ = self.task.await;
    }
}

/// The log, for one session.
#[derive(Clone, Debug)]
pub(super) struct SessionLog {
    state: watch::Receiver<State>,
    hold: watch::Receiver<Hold>,
    /// As told last.
    held: Option<Hold>,
    required: bool,
    history: History,
    /// Tells that there is a session.
    _open: Arc<()>,
}

impl SessionLog {
    /// How far the slot may be moved, none for anywhere, once that has changed. Cancel-safe.
    pub(super) async fn hold(&mut self) -> Option<PgLsn> {
        let (history, held) = (self.history, self.held);
        let concerns = |hold: &Hold| hold.history == Some(history) && held != Some(*hold);
        let now = self.hold.wait_for(concerns).await.map(|hold| *hold);
        match now {
            Ok(hold) => {
                self.held = Some(hold);
                hold.up_to
            }
            // Nobody says so any more.
            Err(_) => std::future::pending().await,
        }
    }

    /// The log, once it is open.
    async fn open(&mut self) -> Result<LogHandle, SessionError> {
        let history = self.history;
        let found = self.state.wait_for(|state| {
            let open = state
                .open
                .as_ref()
                .is_some_and(|log| log.history() == history);
            open || state.error.is_some()
        });
        let state = found.await.map_err(|_| SessionError::TaskLost)?;
        match (&state.open, &state.error) {
            (Some(log), _) if log.history() == history => Ok(log.clone()),
            (_, Some((class, text))) => Err(SessionError::Log {
                class: *class,
                text: text.clone(),
            }),
            _ => Err(SessionError::TaskLost),
        }
    }

    /// The log, if it is open now.
    fn now(&self) -> Option<LogHandle> {
        let state = self.state.borrow();
        let log = state.open.as_ref();
        log.filter(|log| log.history() == self.history).cloned()
    }
}

/// Batches to the log, and then to the sink.
pub(super) async fn spool_first(
    mut log: SessionLog,
    mut batches: mpsc::Receiver<Arc<Batch>>,
    onward: mpsc::Sender<Arc<Batch>>,
) -> Result<(), SessionError> {
    if !log.required {
        // Without it the first batches would have to be read once more, apart. Nothing depends on that.
        let _ = tokio::time::timeout(OPEN_WITHIN, log.open()).await;
    }
    while let Some(batch) = batches.recv().await {
        let open = match log.required {
            true => Some(log.open().await?),
            false => log.now(),
        };
        if let Some(open) = open {
            match open.offer(&batch, Origin::Pipeline).await {
                // Nothing that was left out, or is read apart, keeps the sink waiting: the slot waits for a required archive.
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(closed) if log.required => {
                    tracing::debug!(%closed, "offering again");
                    return Err(SessionError::TaskLost);
                }
                Err(_) => {}
            }
        }
        if onward.send(batch).await.is_err() {
            // The sink is gone, and says why.
            break;
        }
    }
    Ok(())
}

/// Why no log is written.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("look where the change log can be read")]
    Look(#[from] SetupError),
    #[error("open the spool")]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    LogReader(#[from] LogReaderError),
    #[error(
        "another agent reads the slot, and what is missing in this one's change log may be in its spool"
    )]
    Elsewhere,
}

impl KeepError {
    fn class(&self) -> Class {
        match self {
            Self::Look(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::LogReader(error) => error.class(),
            Self::Elsewhere => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Look(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::LogReader(error) => error.hint(),
            Self::Elsewhere => None,
        }
    }

    /// The pipeline says so itself, or it is how every database begins.
    fn is_said_elsewhere(&self) -> bool {
        match self {
            Self::Look(SetupError::NotSent { .. })
            | Self::LogReader(LogReaderError::Ended)
            | Self::Elsewhere => true,
            Self::Look(error) => error.class() == Class::Transient,
            Self::Spool(_) | Self::LogReader(_) => false,
        }
    }
}

struct Keeping {
    config: Arc<Config>,
    archive: Archive,
    database: String,
    stream: StreamName,
    metrics: ArchiveMetrics,
    broken: watch::Sender<Option<PgLsn>>,
    state: watch::Sender<State>,
    hold: watch::Sender<Hold>,
    /// Nothing could be read for too long.
    let_go: AtomicBool,
    look: Arc<Notify>,
    end: CancellationToken,
    /// One for the log and one for each session there is.
    sessions: Weak<()>,
}

/// Keeps it until told to end, whatever happens.
async fn run(keeping: Arc<Keeping>) {
    loop {
        let keep = Arc::clone(&keeping);
        let task = AbortOnDropHandle::new(tokio::spawn(async move { keep.run().await }));
        if task.await.is_ok() {
            return;
        }
        // Nobody else would notice: the sessions would go on, and the slot would keep WAL for a log that nobody writes.
        tracing::error!(
            database = keeping.database,
            "the task that keeps the change log has ended, by an error of dr-agent's own that is above; it is begun anew"
        );
        keeping.state.send_replace(State::default());
        tokio::time::sleep(keeping.config.limits.retry_max.min(PAUSE_AFTER_PANIC)).await;
    }
}

impl Keeping {
    async fn run(&self) {
        let mut leftovers = JoinSet::new();
        // What waits for the store need not wait for the source.
        let mut open = self.latest_in_spool();
        for history in self.in_spool() {
            if open
                .as_ref()
                .is_none_or(|log| log.handle().history() != history)
            {
                self.upload_leftover(history, &mut leftovers);
            }
        }
        let (mut attempt, mut began) = (0, Instant::now());
        while !self.end.is_cancelled() {
            let position = open.as_ref().map(|log| log.handle().reach().position);
            let error = match Box::pin(self.keep(&mut open, &mut leftovers)).await {
                Ok(()) => break,
                Err(error) => error,
            };
            if open.as_ref().map(|log| log.handle().reach().position) > position {
                (attempt, began) = (0, Instant::now());
            }
            if open.take_if(|log| log.is_lost()).is_some() {
                tracing::error!(
                    database = self.database,
                    "a task of the change log has ended, for the reason above; the spool is opened anew"
                );
                self.state.send_replace(State::default());
            }
            attempt += 1;
            self.let_go
                .store(began.elapsed() >= LET_GO_AFTER, Ordering::Relaxed);
            self.failed(&error, attempt, open.is_some()).await;
        }
        if let Some(log) = open
            && !log.finish(self.config.limits.shutdown_grace).await
        {
            tracing::warn!(
                database = self.database,
                "the archive did not take the end of the change log in time; it stays in the spool"
            );
        }
    }

    /// Says so, and waits.
    async fn failed(&self, error: &KeepError, attempt: u32, is_open: bool) {
        let (text, hint) = (chain(error), error.hint());
        let retry_max = self.config.limits.retry_max;
        let pause = match backoff::decide(error.class(), attempt, retry_max, rand::random()) {
            Decision::Retry(pause) => pause,
            // Whatever a person does about it is seen soon.
            Decision::Stop => retry_max,
        };
        if error.is_said_elsewhere() {
            tracing::debug!(database = self.database, error = %text, ?pause, "no change log now");
        } else {
            tracing::warn!(
                database = self.database, error = %text, hint, ?pause,
                "the change log stands still; will retry"
            );
            if !is_open {
                let error = Some((error.class(), text));
                self.state.send_modify(|state| state.error = error);
                if !self.archive.required {
                    self.hold.send_modify(|hold| hold.up_to = None);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.look.notified() => {}
            () = self.end.cancelled() => {}
        }
    }

    /// Keeps the log of the history that the source is in, until told to end.
    async fn keep(
        &self,
        open: &mut Option<Log>,
        leftovers: &mut JoinSet<()>,
    ) -> Result<(), KeepError> {
        let found = self.find().await?;
        if open
            .as_ref()
            .is_some_and(|log| log.handle().history() != found.history)
            && let Some(other) = open.take()
        {
            self.state.send_replace(State::default());
            let history = other.handle().history();
            other.finish(Duration::ZERO).await;
            self.upload_leftover(history, leftovers);
        }
        failpoint::hit("log:found");
        // Whatever becomes of it, it is this one that the slot waits for.
        let history = Some(found.history);
        self.hold.send_modify(|hold| {
            if hold.history != history {
                *hold = Hold {
                    history,
                    up_to: Some(PgLsn::from(0)),
                };
            }
        });
        let log = match open {
            Some(log) => log,
            none => none.insert(self.begin(&found).await?),
        };
        let handle = log.handle().clone();
        self.state.send_replace(State {
            open: Some(handle.clone()),
            error: None,
        });
        tokio::select! {
            kept = self.keep_going(&handle, found) => kept,
            () = self.let_go(&handle) => Err(LogReaderError::Ended.into()),
        }
    }

    /// Lets the slot move as the log moves on.
    async fn let_go(&self, log: &LogHandle) {
        let (mut reach, mut uploaded) = (log.watch(), log.uploaded());
        loop {
            let now = *reach.borrow_and_update();
            let up_to = match self.archive.required {
                true => Some(*uploaded.borrow_and_update()),
                false => {
                    (!now.stuck && !self.let_go.load(Ordering::Relaxed)).then_some(now.position)
                }
            };
            self.hold.send_if_modified(|hold| {
                let is_new = hold.up_to != up_to;
                hold.up_to = up_to;
                is_new
            });
            let moved = tokio::select! {
                moved = reach.changed() => moved,
                moved = uploaded.changed() => moved,
            };
            if moved.is_err() {
                return;
            }
        }
    }

    /// The log of a history that nothing is left of here: it goes on behind what the store has.
    async fn begin(&self, found: &Logged) -> Result<Log, KeepError> {
        let layout = Layout::new(&self.stream, found.history);
        let stored = self.in_store(layout, found.confirmed, found.wal_end).await;
        let leads_to = Chain::from(found.confirmed, &stored).end;
        let ends = stored.iter().map(|span| span.end).max();
        let start = ends
            .filter(|end| *end < found.confirmed)
            .unwrap_or(leads_to);
        Ok(self.open(found.history, found.term, start)?)
    }

    async fn keep_going(&self, handle: &LogHandle, found: Logged) -> Result<(), KeepError> {
        // What is missing, is missing: it is said now and not when it is looked for.
        self.expect_to_lead_on(handle, &found).await?;
        while self.wait_until_it_stalls(handle).await {
            let found = self.find().await?;
            if found.history != handle.history() {
                // Begins anew with that one.
                return Err(LogReaderError::Ended.into());
            }
            self.expect_to_lead_on(handle, &found).await?;
            let apart = log_reader::LogReader {
                config: &self.config,
                database: &self.database,
                stream: &self.stream,
                log: handle,
                found: &found,
                lead: self.lead(),
                end: &self.end,
            };
            Box::pin(apart.read()).await?;
        }
        Ok(())
    }

    async fn find(&self) -> Result<Logged, KeepError> {
        Ok(setup::logged(&self.config, &self.database, &self.end).await?)
    }

    /// Leaves a gap where the source has less than the log wants, and the store does not have it either.
    async fn expect_to_lead_on(&self, log: &LogHandle, found: &Logged) -> Result<(), KeepError> {
        let position = log.reach().position;
        if position >= found.confirmed {
            return Ok(());
        }
        let layout = Layout::new(&self.stream, found.history);
        let stored = self.in_store(layout, position, found.wal_end).await;
        let leads_to = Chain::from(position, &stored).end;
        if leads_to < found.confirmed && found.is_read && self.sessions.strong_count() < 2 {
            return Err(KeepError::Elsewhere);
        }
        let going_on = log.go_on_at(found.confirmed, leads_to).await;
        going_on.map_err(|_| LogReaderError::Ended.into())
    }

    /// What the store has of the log: another agent, with a spool of its own, may have brought it there. Where it does not
    /// answer nobody knows, and it is taken for missing. The log goes on behind what leads on from `from`: that is believed once
    /// it was read, and of a name that promises what the source has not written yet nothing is.
    async fn in_store(&self, layout: Layout, from: PgLsn, wal_end: PgLsn) -> Vec<Span> {
        let written = u64::from(wal_end).saturating_add(WRITTEN_MEANWHILE);
        let asking = async {
            let (url, encryption) = (&self.archive.url, &self.archive.encryption);
            let store = Store::as_it_is(url, encryption).await?;
            let bases = Bases { store, layout };
            let log = bases.log(PgLsn::from(0)).await?;
            let spans = log.into_iter().map(|(span, _)| span);
            let spans = spans
                .filter(|span| u64::from(span.end) <= written)
                .collect();
            believed(&bases, from, spans).await
        };
        match tokio::time::timeout(STORE_WITHIN, asking).await {
            Ok(Ok(spans)) => spans,
            Ok(Err(error)) => {
                tracing::warn!(
                    database = self.database, error = %chain(&error), hint = error.hint(),
                    "the archive does not say what it has of the change log"
                );
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Waits until the log has not moved on for too long; false once told to end.
    async fn wait_until_it_stalls(&self, log: &LogHandle) -> bool {
        let limit = self.stalls_after();
        let mut uploaded = log.uploaded();
        uploaded.mark_unchanged();
        loop {
            let pause = async {
                let reach = log.reach();
                if reach.stuck {
                    // Until there is room, reading would be in vain.
                    let _ = tokio::time::timeout(STUCK_FOR, uploaded.changed()).await;
                } else {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                reach.stuck
            };
            let was_stuck = tokio::select! {
                was_stuck = pause => was_stuck,
                () = self.end.cancelled() => return false,
            };
            let reach = log.reach();
            let still = Instant::now().saturating_duration_since(reach.moved_at);
            if was_stuck || reach.ahead || still >= limit {
                return true;
            }
        }
    }

    /// How long the log may stand still. A quiet source has a heartbeat.
    fn stalls_after(&self) -> Duration {
        let heartbeats = 2 * self.config.source.heartbeat_every + Duration::from_secs(1);
        (self.config.objectives.rpo / 4).max(heartbeats)
    }

    /// How long a session must be at the front before it is relied on.
    fn lead(&self) -> Duration {
        Duration::from_secs(3).max(2 * self.config.source.heartbeat_every)
    }

    fn directory(&self) -> std::path::PathBuf {
        self.archive.spool_directory.join(self.stream.as_str())
    }

    fn open(&self, history: History, term: i64, start: PgLsn) -> Result<Log, SpoolError> {
        let settings = self.settings(history, term);
        Log::start(settings, start, self.metrics.clone(), self.broken.clone())
    }

    fn settings(&self, history: History, term: i64) -> LogSettings {
        LogSettings {
            author: Author {
                stream: self.stream.to_string(),
                history,
                term,
                writer: rand::random(),
            },
            url: self.archive.url.clone(),
            encryption: self.archive.encryption.clone(),
            layout: Layout::new(&self.stream, history),
            directory: self.directory().join(history.to_string()),
            limits: SpoolLimits {
                bytes: self.archive.spool_bytes,
                segment_bytes: self.archive.segment_bytes,
            },
            // A quarter of the time is for noticing that nothing comes, another one for the upload.
            age_max: self.config.objectives.rpo / 2,
            required: self.archive.required,
            retry_max: self.config.limits.retry_max,
            lead: self.lead(),
        }
    }

    /// The histories that have something in the spool, in the order in which they began.
    fn in_spool(&self) -> Vec<History> {
        let Ok(entries) = fs::read_dir(self.directory()) else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut histories: Vec<History> = names.filter_map(|name| name.parse().ok()).collect();
        histories.sort_by_key(|history| history.began);
        histories
    }

    /// The log that was written last, if anything is left of it.
    fn latest_in_spool(&self) -> Option<Log> {
        let history = self.in_spool().pop()?;
        // Its position is what is left in the spool. What is wrong with it is said when the source is there.
        let log = self.open(history, 0, PgLsn::from(0)).ok()?;
        (log.handle().reach().position > PgLsn::from(0)).then_some(log)
    }

    /// What an earlier history has left in the spool goes to the store, under its own name.
    fn upload_leftover(&self, history: History, tasks: &mut JoinSet<()>) {
        let (settings, metrics) = (self.settings(history, 0), self.metrics.clone());
        let database = self.database.clone();
        tasks.spawn(async move {
            if let Err(error) = upload_leftover(settings, metrics).await {
                tracing::warn!(
                    database, %history, error = %chain(&error), hint = error.hint(),
                    "what an earlier slot's change log has left in the spool stays there"
                );
            }
        });
    }
}
