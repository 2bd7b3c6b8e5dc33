//! One session's loop: `select` awaits an action, the owner says what is to be done about it, and that is done without waiting.
//!
//! # Invariants
//! - All state of the session is in [`Owner`], and only this loop tells it what has happened.
//! - A batch's outcome is taken before the end of a task, so that what was committed is known as such.
//!
//! # What it does not do
//! It decides nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::change_log::SessionLog;
use super::error::SessionError;
use super::late::Ask;
use super::owner::{Action, Now, Owner, Step};
use super::{Leg, Pipeline, TICK, as_f64, now_instant};
use crate::ddl;
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::counts::{ChangeCounts, KINDS};
use crate::flow::ledger::FlushLsn;
use crate::observe::reader::Reader;
use crate::pg::PgLsn;
use crate::sink::{Applied, Outcome};
use crate::source::{Received, SourcePosition};
use crate::time;
use crate::time::system_time;
use crate::watch::coverage::Unprotected;

/// What there is between the stream and the task that copies late tables.
pub(super) struct LateSide {
    pub(super) asked: mpsc::Receiver<Ask>,
    /// Who waits for what was shipped before.
    pub(super) pausing: Option<oneshot::Sender<PgLsn>>,
    /// Up to where the stream has shipped.
    pub(super) shipped: watch::Sender<PgLsn>,
    /// Tells it that there is something new.
    pub(super) wake: Arc<Notify>,
}

/// What was shown last of the source's position.
#[derive(Debug, Default)]
pub(super) struct Shown {
    bytes: u64,
    reader: Option<Reader>,
}

/// Channels and tasks of one session, around its owner.
pub(super) struct Streaming<'p> {
    pub(super) pipeline: &'p Pipeline,
    pub(super) leg: Leg,
    pub(super) late: Option<LateSide>,
    pub(super) tasks: JoinSet<Option<SessionError>>,
    pub(super) transactions: mpsc::Receiver<Received>,
    /// Received and not yet told to the owner.
    pub(super) arrived: Vec<Received>,
    pub(super) outcomes: mpsc::Receiver<Outcome<SessionError>>,
    pub(super) reports: mpsc::Receiver<Vec<Unprotected>>,
    pub(super) position: watch::Receiver<SourcePosition>,
    pub(super) batches: mpsc::Sender<Arc<Batch>>,
    pub(super) flush: watch::Sender<FlushLsn>,
    /// How far the change log lets the slot move.
    pub(super) held: Option<SessionLog>,
    pub(super) shown: Shown,
    pub(super) owner: Owner<OwnedSemaphorePermit>,
}

impl Streaming<'_> {
    pub(super) async fn run(&mut self) -> Result<(), SessionError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let action = self.select(&mut tick).await;
            let now = Now {
                instant: now_instant(),
                time: time::now(),
            };
            let mut end = None;
            for step in self.owner.apply(action, now) {
                match step {
                    Step::End(ended) => end = Some(ended),
                    step => self.carry_out(step)?,
                }
            }
            self.show();
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Ends every task, and waits for it: the next session works with the same files.
    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }

    /// Waits for the next action. Every branch may be dropped at any point without loss: channel
    /// receives and timers are cancel-safe.
    async fn select(&mut self, tick: &mut tokio::time::Interval) -> Action<OwnedSemaphorePermit> {
        let running = self.owner.is_running();
        let all = self.transactions.max_capacity();
        tokio::select! {
            biased;
            // 1. Being told to stop comes before everything else, once.
            () = self.pipeline.stop.cancelled(), if running => Action::Stop,
            // 2. What is durable: it frees memory here and WAL on the source.
            Some(outcome) = self.outcomes.recv() => Action::Outcome(outcome),
            // 3. A task that ended takes the session with it. After the outcomes, so that a committed
            //    batch is known as such.
            Some(ended) = self.tasks.join_next() => Action::TaskEnded(ended.unwrap_or(None)),
            // 4. Time, so that a flood of transactions cannot hide the lag it causes.
            _ = tick.tick() => Action::Tick,
            () = at(self.owner.due()) => Action::Tick,
            Some(unprotected) = self.reports.recv() => Action::Covered(unprotected),
            position = held(self.held.as_mut()) => Action::Held(position),
            action = asked(self.late.as_mut()) => action,
            // 5. More work; not while draining. What has arrived together belongs into the same batch.
            1.. = self.transactions.recv_many(&mut self.arrived, all), if running => {
                Action::Received(std::mem::take(&mut self.arrived))
            }
        }
    }

    fn carry_out(&mut self, step: Step) -> Result<(), SessionError> {
        match step {
            Step::Acknowledge(flush) => {
                failpoint::hit("pipeline:before-acknowledge");
                self.flush.send_replace(flush);
            }
            Step::Count {
                batch,
                applied,
                took,
            } => self.count(&batch, applied, took),
            Step::Show(unprotected) => self.show_unprotected(&unprotected),
            Step::WakeLate => {
                if let Some(late) = &self.late {
                    late.wake.notify_one();
                }
            }
            Step::Ship(batch) => {
                failpoint::hit("pipeline:before-ship");
                match self.batches.try_send(Arc::new(batch)) {
                    // Where the sink is gone, its last outcome or the end of its task says why.
                    Ok(()) | Err(TrySendError::Closed(_)) => {}
                    // There is room for as many as may be in flight.
                    Err(TrySendError::Full(_)) => return Err(SessionError::TaskLost),
                }
            }
            Step::Paused(position) => {
                if let Some(waiting) = self.late.as_mut().and_then(|late| late.pausing.take()) {
                    // Nobody listens any more: the session ends anyway.
                    let _ = waiting.send(position);
                }
            }
            Step::End(ended) => ended?,
        }
        Ok(())
    }

    fn count(&self, batch: &Batch, applied: Applied, took: Duration) {
        let metrics = &self.pipeline.metrics;
        metrics.batches.increment(1);
        metrics.batch_apply_seconds.record(took.as_secs_f64());
        metrics
            .transactions
            .increment(batch.transactions.len() as u64);
        metrics.net_changes.increment(applied.net_changes);
        if applied.slow_path {
            metrics.slow_path.increment(1);
        }
        if applied.spread {
            metrics.spread_batches.increment(1);
        }
        for (outcome, count) in applied.commands.each().filter(|(_, count)| *count > 0) {
            metrics.ddl(outcome.as_str()).increment(count);
            if matches!(outcome, ddl::Outcome::Waits | ddl::Outcome::Copy) {
                self.pipeline.aside.changed.notify_one();
            }
        }
        let mut counts = ChangeCounts::default();
        for transaction in &batch.transactions {
            counts.add(&transaction.counts);
        }
        for (kind, count) in KINDS.into_iter().zip(counts.0) {
            if count > 0 {
                metrics.changes(kind).increment(count);
            }
        }
        self.pipeline.status.update(|status| {
            status.batch = batch.number.0;
            status.end_lsn = Some(batch.end_lsn().to_string());
            status.commit_time = Some(rfc3339(system_time(batch.commit_time())));
        });
    }

    fn show_unprotected(&self, unprotected: &[Unprotected]) {
        for found in unprotected {
            self.pipeline.metrics.unprotected(found.kind, found.count);
        }
        self.pipeline.status.update(|status| {
            status.unprotected = unprotected
                .iter()
                .map(|found| (found.kind, found.count))
                .collect();
        });
    }

    /// After every action: what the outside sees is what is.
    fn show(&mut self) {
        if let Some(late) = &self.late {
            late.shipped.send_replace(self.owner.shipped());
        }
        let position = *self.position.borrow();
        let metrics = &self.pipeline.metrics;
        metrics
            .bytes_received
            .increment(position.bytes - self.shown.bytes);
        self.shown.bytes = position.bytes;
        if self.shown.reader.replace(position.reader) != Some(position.reader) {
            metrics.reader(position.reader);
        }
        let sunk = self.owner.sunk();
        if self.leg != Leg::Send {
            metrics.replica_flush_lsn.set(as_f64(u64::from(sunk)));
        }
        let status = &self.pipeline.status;
        if let Some(ahead) = status.source_ahead() {
            self.owner.lag.measured(ahead);
        }
        status.progress(&self.owner.lag, position.wal_end, Some(sunk));
    }
}

/// How far the change log lets the slot move, once that has changed. Cancel-safe.
async fn held(log: Option<&mut SessionLog>) -> Option<PgLsn> {
    match log {
        Some(log) => log.hold().await,
        None => std::future::pending().await,
    }
}

/// What the task that copies late tables asks. Cancel-safe.
async fn asked(late: Option<&mut LateSide>) -> Action<OwnedSemaphorePermit> {
    if let Some(late) = late
        && let Some(ask) = late.asked.recv().await
    {
        // Who asked before does not listen any more.
        return match ask {
            Ask::Pause(answer) => {
                late.pausing = Some(answer);
                Action::Pause
            }
            Ask::GoOn => {
                late.pausing = None;
                Action::GoOn
            }
        };
    }
    std::future::pending().await
}

/// Ends at that time; without one, never.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

fn rfc3339(at: std::time::SystemTime) -> String {
    humantime::format_rfc3339_micros(at).to_string()
}
