//! What the source is told: how far everything is durable, and that we live.
//!
//! While a walsender streams, it takes a standby status update and moves the slot itself. While the slot is
//! read through SQL ([`super::catch_up`]), nobody streams from it, and a function moves it.
//!
//! # Invariants
//! - The source is told a [`FlushLsn`] and nothing else.
//! - It hears from us at least every [`EVERY`], also while nothing is read because the queue is full: a
//!   slow replica must not look like a dead agent (`wal_sender_timeout`), nor hold on to WAL it needs no more.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_postgres::Client;

use super::SourceError;
use super::intake::Meanwhile;
use crate::failpoint;
use crate::flow::ledger::FlushLsn;
use crate::names::stream::StreamName;
use crate::pg::replication::StatusSender;
use crate::pg::{PgError, PgLsn, slot};

/// Well below the smallest sensible `wal_sender_timeout` (its default is 60 s).
const EVERY: Duration = Duration::from_secs(5);

/// Between two updates, at least: each wakes a process there, and a busy replica has news a thousand times a second.
const PAUSE: Duration = Duration::from_millis(100);

/// Tells the source.
pub(super) struct Feedback {
    flush: watch::Receiver<FlushLsn>,
    listener: Listener,
    /// What the source was told last; before that, what it knows by itself.
    told: PgLsn,
    told_at: Instant,
}

/// Who is told.
pub(super) enum Listener {
    /// The one that streams.
    Walsender(StatusSender),
    /// The slot itself.
    Slot(HeldSlot),
}

/// A slot that nobody streams from, moved through an ordinary session.
pub(super) struct HeldSlot {
    client: Client,
    name: StreamName,
    /// As far as it has been moved.
    at: PgLsn,
}

impl HeldSlot {
    /// The slot of this name, which is confirmed up to `at`.
    pub(super) fn new(client: Client, name: StreamName, at: PgLsn) -> Self {
        Self { client, name, at }
    }

    async fn advance(&mut self, flush: PgLsn) -> Result<(), PgError> {
        if flush > self.at {
            slot::advance(&self.client, self.name.as_str(), flush).await?;
            self.at = flush;
        }
        Ok(())
    }
}

impl Meanwhile for Feedback {
    /// Keeps the source informed for as long as `waiting` takes.
    async fn during<T: Send>(
        &mut self,
        waiting: impl Future<Output = T> + Send,
    ) -> Result<T, SourceError> {
        tokio::pin!(waiting);
        let mut due = ticks();
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return Ok(done),
                _ = due.tick() => self.send().await?,
            }
        }
    }
}

impl Feedback {
    pub(super) fn new(flush: watch::Receiver<FlushLsn>, listener: Listener) -> Self {
        let told = flush.borrow().lsn();
        Self {
            flush,
            listener,
            told,
            told_at: Instant::now(),
        }
    }

    /// Waits until more has become durable and the source has not been told for a moment; false once nobody will say so
    /// any more. Cancel-safe.
    pub(super) async fn due(&mut self) -> bool {
        tokio::time::sleep_until(self.told_at + PAUSE).await;
        self.flush.changed().await.is_ok()
    }

    /// Tells how far everything is durable now.
    pub(super) async fn send(&mut self) -> Result<(), SourceError> {
        let flush = self.flush.borrow_and_update().lsn();
        match &mut self.listener {
            Listener::Walsender(status) => status.send(flush, flush, flush, false).await?,
            Listener::Slot(slot) => slot.advance(flush).await?,
        }
        if flush > self.told {
            failpoint::hit("source:acknowledged");
        }
        self.told = flush;
        self.told_at = Instant::now();
        Ok(())
    }

    /// Waits until everything up to `position` is durable, but no longer than `within`, and tells the source; false once
    /// nobody will say so any more.
    pub(super) async fn until(
        &mut self,
        position: PgLsn,
        within: Duration,
    ) -> Result<bool, SourceError> {
        let mut flush = self.flush.clone();
        let somebody_says = async move {
            let durable = flush.wait_for(|flush| flush.lsn() >= position);
            let waited = tokio::time::timeout(within, durable).await;
            waited.map_or(true, |durable| durable.is_ok())
        };
        if !self.during(somebody_says).await? {
            return Ok(false);
        }
        self.send().await?;
        Ok(true)
    }

    /// Ends the conversation.
    pub(super) async fn finish(self) {
        match self.listener {
            Listener::Walsender(status) => status.finish().await,
            // The session ends with its client.
            Listener::Slot(_) => {}
        }
    }
}

/// Due every [`EVERY`], for the first time after that long.
pub(super) fn ticks() -> Interval {
    let mut due = tokio::time::interval(EVERY);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    due.reset();
    due
}
