//! The task that keeps the change log: finds out where the source and the log stand, and does what `hold` says.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::LogState;
use super::error::KeepError;
use super::hold::{self, Attempts, Hold, LeadsOn, Standing};
use super::reader::{LogReader, LogReaderError};
use super::stored::in_store;
use crate::archive::log::{Layout, Log, LogChain, LogHandle, Span};
use crate::backoff::{self, Decision};
use crate::config::{Archive, Config};
use crate::error::chain;
use crate::failpoint;
use crate::names::stream::StreamName;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::setup::{self, Logged};

/// How often it is looked whether the log moves on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A spool that did not take anything is tried again after that, if the store has taken nothing meanwhile.
const STUCK_FOR: Duration = Duration::from_secs(30);

/// Before what has panicked is begun anew.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(5);

pub(super) struct Keeping {
    pub(super) config: Arc<Config>,
    pub(super) archive: Archive,
    pub(super) database: String,
    pub(super) stream: StreamName,
    pub(super) metrics: ArchiveMetrics,
    pub(super) broken: watch::Sender<Option<PgLsn>>,
    pub(super) state: watch::Sender<LogState>,
    pub(super) hold: watch::Sender<Hold>,
    pub(super) look: Arc<Notify>,
    pub(super) end: CancellationToken,
    /// One for the log and one for each session there is.
    pub(super) sessions: Weak<()>,
}

/// Keeps it until told to end, whatever happens.
pub(super) async fn run(keeping: Arc<Keeping>) {
    loop {
        let keep = Arc::clone(&keeping);
        let task = AbortOnDropHandle::new(tokio::spawn(async move { keep.run().await }));
        if task.await.is_ok() {
            return;
        }
        // Nobody else would notice: the sessions would go on, and the slot would keep WAL for a log that nobody writes.
        tracing::error!(
            database = keeping.database,
            "the task that keeps the change log has ended, by an error of dr-agent's own that is logged above; it is started again"
        );
        keeping.state.send_replace(LogState::default());
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
        let mut attempts = Attempts::new(Instant::now().into_std());
        while !self.end.is_cancelled() {
            let position = open.as_ref().map(|log| log.handle().reach().position);
            let keeping = self.keep(&mut open, &mut leftovers, attempts.given_up);
            let error = match Box::pin(keeping).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let moved_on = open.as_ref().map(|log| log.handle().reach().position) > position;
            attempts.failed(moved_on, Instant::now().into_std());
            if open.take_if(|log| log.is_lost()).is_some() {
                tracing::error!(
                    database = self.database,
                    "a task of the change log has ended, for the reason above; the spool is opened anew"
                );
                self.state.send_replace(LogState::default());
            }
            self.failed(&error, attempts.count, open.is_some()).await;
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
                let required = self.archive.required;
                self.hold
                    .send_modify(|hold| *hold = hold.without_a_log(required));
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
        given_up: bool,
    ) -> Result<(), KeepError> {
        let found = self.find().await?;
        if open
            .as_ref()
            .is_some_and(|log| log.handle().history() != found.history)
            && let Some(other) = open.take()
        {
            self.state.send_replace(LogState::default());
            let history = other.handle().history();
            other.finish(Duration::ZERO).await;
            self.upload_leftover(history, leftovers);
        }
        failpoint::hit("log:found");
        // Whatever becomes of it, it is this one that the slot waits for.
        self.hold.send_modify(|hold| *hold = hold.of(found.history));
        let log = match open {
            Some(log) => log,
            none => none.insert(self.begin(&found).await?),
        };
        let handle = log.handle().clone();
        self.state.send_replace(LogState {
            open: Some(handle.clone()),
            error: None,
        });
        tokio::select! {
            kept = self.keep_going(&handle, found) => kept,
            () = self.let_go(&handle, given_up) => Err(LogReaderError::Ended.into()),
        }
    }

    /// Lets the slot move as the log moves on.
    async fn let_go(&self, log: &LogHandle, given_up: bool) {
        let (mut reach, mut uploaded) = (log.watch(), log.uploaded());
        loop {
            let now = *reach.borrow_and_update();
            let standing = Standing {
                position: now.position,
                uploaded: *uploaded.borrow_and_update(),
                stuck: now.stuck,
                given_up,
            };
            self.hold.send_if_modified(|hold| {
                let next = hold.by(standing, self.archive.required);
                std::mem::replace(hold, next) != next
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
        let leads_to = LogChain::from(found.confirmed, &stored).end;
        let ends = stored.iter().map(|span| span.end).max();
        let start = hold::begins_at(found.confirmed, leads_to, ends);
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
            let apart = LogReader {
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
        let stored = LogChain::from(position, &stored).end;
        // One is the log's own.
        let by_another = found.is_read && self.sessions.strong_count() < 2;
        match hold::leads_on(position, found.confirmed, stored, by_another) {
            LeadsOn::Itself => Ok(()),
            LeadsOn::Elsewhere => Err(KeepError::Elsewhere),
            LeadsOn::Behind(stored) => {
                let going_on = log.go_on_at(found.confirmed, stored).await;
                going_on.map_err(|_| LogReaderError::Ended.into())
            }
        }
    }

    async fn in_store(&self, layout: Layout, from: PgLsn, wal_end: PgLsn) -> Vec<Span> {
        in_store(&self.archive, &self.database, layout, from, wal_end).await
    }

    /// Waits until the log has not moved on for too long; false once told to end.
    async fn wait_until_it_stalls(&self, log: &LogHandle) -> bool {
        let limit = hold::stalls_after(
            self.config.objectives.rpo,
            self.config.source.heartbeat_every,
        );
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
            if hold::is_to_be_read_apart(was_stuck, reach.ahead, still, limit) {
                return true;
            }
        }
    }

    /// How long a session must be at the front before it is relied on.
    pub(super) fn lead(&self) -> Duration {
        hold::lead(self.config.source.heartbeat_every)
    }
}
