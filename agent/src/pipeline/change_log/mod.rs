//! The change log of one database, for as long as its pipeline lives: across sessions, also while there is none.
//!
//! ```text
//! session ─batch─▶ [spool_first] ─batch─▶ sink
//!                      └─offer─▶ Log ◀─offer─ [reader] ◀─ a copy of the slot
//! ```
//! A session offers each batch before its sink gets it. Where that is not enough, because the sink does not keep up or there is
//! no session (a copy, a replica that is away), the source is read apart, until a session is at the front again. How far the
//! slot may move, and who reads, is decided in `hold` ●; `keeping` is the task that finds out and carries it out.
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

mod error;
mod hold;
mod keeping;
mod reader;
mod spooled;
mod stored;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::error::SessionError;
use crate::archive::log::{LogHandle, Origin};
use crate::config::{Archive, Config};
use crate::error::Class;
use crate::flow::batch::Batch;
use crate::names::history::History;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::time::wall_clock;
use hold::Hold;
use keeping::Keeping;

/// A session that begins waits so long for a log that is about to be opened.
const OPEN_WITHIN: Duration = Duration::from_secs(5);

/// What a session sees of the log.
#[derive(Clone, Debug, Default)]
struct LogState {
    open: Option<LogHandle>,
    /// Why it is not open.
    error: Option<(Class, String)>,
}

/// The log, for the sessions of a pipeline.
#[derive(Debug)]
pub(super) struct ChangeLog {
    state: watch::Receiver<LogState>,
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
        let (state, state_seen) = watch::channel(LogState::default());
        let (hold, hold_seen) = watch::channel(Hold::default());
        let (look, end) = (Arc::new(Notify::new()), CancellationToken::new());
        let sessions = Arc::new(());
        let metrics = ArchiveMetrics::new(database);
        metrics.starts(wall_clock());
        let keeping = Keeping {
            config: Arc::clone(config),
            archive: archive.clone(),
            database: database.to_owned(),
            stream: config.stream(database),
            metrics,
            broken,
            state,
            hold,
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
            task: AbortOnDropHandle::new(tokio::spawn(keeping::run(Arc::new(keeping)))),
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
    state: watch::Receiver<LogState>,
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
