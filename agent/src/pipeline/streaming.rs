//! One session's loop: `select` awaits an action, `apply` carries it out without waiting.
//!
//! # Invariants
//! - All state of the session is in [`Owned`], and only this loop changes it.
//! - A batch's outcome is taken before the end of a task, so that what was committed is known as such.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::change_log::SessionLog;
use super::error::SessionError;
use super::late::Ask;
use super::{Leg, Pipeline, TICK, as_f64, now_instant};
use crate::config::Config;
use crate::failpoint;
use crate::flow::batch::{Batch, Queue, Ship, Spacing};
use crate::flow::counts::{ChangeCounts, KINDS};
use crate::flow::ledger::{FlushLsn, Ledger};
use crate::observe::lag::Lag;
use crate::observe::reader::Reader;
use crate::pg::PgLsn;
use crate::sink::replica::Outcome;
use crate::source::{Received, SourcePosition};
use crate::time;
use crate::time::{Micros, system_time};
use crate::watch::coverage::{self, Unprotected};

/// The sink that takes batches: the replica, or the Kinesis stream.
const SINK: usize = 0;

/// What can happen to a pipeline that streams.
#[derive(Debug)]
enum Action {
    Received(Received),
    Outcome(Outcome),
    Covered(Vec<Unprotected>),
    /// The change log lets the slot move up to here, or anywhere.
    Held(Option<PgLsn>),
    /// By the task that copies late tables.
    Asked(Ask),
    Tick,
    /// The next batch has waited long enough.
    Due,
    Stop,
    GraceOver,
    TaskEnded(Option<SessionError>),
}

/// What there is between the stream and the task that copies late tables.
pub(super) struct LateSide {
    pub(super) asked: mpsc::Receiver<Ask>,
    /// Up to where the stream has shipped.
    pub(super) shipped: watch::Sender<PgLsn>,
    /// Tells it that there is something new.
    pub(super) wake: Arc<Notify>,
}

/// Channels and tasks of one session, around the state that is owned here.
pub(super) struct Streaming<'p> {
    pub(super) pipeline: &'p Pipeline,
    pub(super) leg: Leg,
    pub(super) late: Option<LateSide>,
    pub(super) tasks: JoinSet<Option<SessionError>>,
    pub(super) transactions: mpsc::Receiver<Received>,
    pub(super) outcomes: mpsc::Receiver<Outcome>,
    pub(super) reports: mpsc::Receiver<Vec<Unprotected>>,
    pub(super) position: watch::Receiver<SourcePosition>,
    pub(super) batches: mpsc::Sender<Arc<Batch>>,
    pub(super) flush: watch::Sender<FlushLsn>,
    /// How far the change log lets the slot move.
    pub(super) held: Option<SessionLog>,
    pub(super) owned: Owned,
}

/// The state proper.
#[derive(Debug)]
pub(super) struct Owned {
    ledger: Ledger,
    queue: Queue,
    /// The queue's shares of `limits.queue_bytes`, one per waiting or shipped transaction.
    permits: VecDeque<OwnedSemaphorePermit>,
    /// Commit time of the first transaction of each batch in flight.
    shipped_oldest: VecDeque<Micros>,
    spacing: Spacing,
    shipped_at: Instant,
    /// When the next batch is due that is not full and waits behind others.
    due: Option<Instant>,
    pub(super) lag: Lag,
    /// Tables that could not be published when the session began.
    left_out: u64,
    /// Nothing is shipped while a late table joins.
    paused: bool,
    /// Waits for what was shipped before.
    pausing: Option<oneshot::Sender<PgLsn>>,
    phase: Phase,
    bytes_counted: u64,
    /// As last shown.
    reader: Option<Reader>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Nothing more is taken in; what has been received is still applied.
    Draining {
        deadline: Instant,
    },
}

impl Owned {
    pub(super) fn new(
        config: &Config,
        ledger: Ledger,
        spacing: Spacing,
        lag: Lag,
        left_out: u64,
    ) -> Self {
        let limits = &config.limits;
        Self {
            ledger,
            queue: Queue::new(limits.batch_bytes, limits.batch_changes),
            permits: VecDeque::new(),
            shipped_oldest: VecDeque::new(),
            spacing,
            shipped_at: now_instant(),
            due: None,
            lag,
            left_out,
            paused: false,
            pausing: None,
            phase: Phase::Running,
            bytes_counted: 0,
            reader: None,
        }
    }

    fn is_drained(&self) -> bool {
        self.queue.is_empty() && self.ledger.in_flight() == 0
    }

    /// Nothing is on its way any more: everything up to here is applied.
    fn answer_pause(&mut self) {
        if self.ledger.in_flight() == 0
            && let Some(answer) = self.pausing.take()
        {
            // Nobody listens any more: the session ends anyway.
            let _ = answer.send(self.ledger.last().1);
        }
    }

    /// The next batch, if it is time for one.
    fn next_batch(&mut self, now: Instant) -> Option<Batch> {
        self.due = None;
        if self.queue.is_empty() || self.paused && self.phase == Phase::Running {
            return None;
        }
        let since = now.saturating_duration_since(self.shipped_at);
        match self
            .spacing
            .judge(self.ledger.in_flight(), self.queue.is_full(), since)
        {
            Ship::Now => {}
            Ship::In(wait) => {
                self.due = Some(now + wait);
                return None;
            }
            Ship::AfterAnAnswer => return None,
        }
        let oldest = self.queue.oldest_commit_time()?;
        let (last, end_lsn) = self.ledger.last();
        let batch = self.queue.take(last.next(), end_lsn)?;
        self.shipped_oldest.push_back(oldest);
        self.shipped_at = now;
        self.ledger
            .ship(batch.number, batch.previous, batch.end_lsn());
        Some(batch)
    }
}

impl Streaming<'_> {
    pub(super) async fn run(&mut self) -> Result<(), SessionError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let action = self.select(&mut tick).await;
            self.apply(action)?;
            while let Some(batch) = self.owned.next_batch(now_instant()) {
                failpoint::hit("pipeline:before-ship");
                // There is room for as many as may be in flight, or `next_batch` had given none.
                if self.batches.try_send(Arc::new(batch)).is_err() {
                    return Err(SessionError::TaskLost);
                }
            }
            self.owned.answer_pause();
            if let Some(late) = &self.late {
                late.shipped.send_replace(self.owned.ledger.last().1);
            }
            self.observe();
            if self.owned.phase != Phase::Running && self.owned.is_drained() {
                return Ok(());
            }
        }
    }

    /// Waits for the next action. Every branch may be dropped at any point without loss: channel
    /// receives and timers are cancel-safe.
    async fn select(&mut self, tick: &mut tokio::time::Interval) -> Action {
        let running = self.owned.phase == Phase::Running;
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
            _ = tick.tick() => match self.owned.phase {
                Phase::Draining { deadline } if now_instant() >= deadline => Action::GraceOver,
                _ => Action::Tick,
            },
            () = at(self.owned.due) => Action::Due,
            Some(unprotected) = self.reports.recv() => Action::Covered(unprotected),
            position = held(self.held.as_mut()) => Action::Held(position),
            ask = asked(self.late.as_mut()) => Action::Asked(ask),
            // 5. More work; not while draining.
            Some(received) = self.transactions.recv(), if running => Action::Received(received),
        }
    }

    fn apply(&mut self, action: Action) -> Result<(), SessionError> {
        let owned = &mut self.owned;
        match action {
            Action::Received(received) => {
                let now = time::now();
                owned.lag.received(received.transaction.commit_time, now);
                owned.queue.push(received.transaction);
                owned.permits.push_back(received.permit);
                // Take what else has arrived: it belongs into the same batch.
                while let Ok(received) = self.transactions.try_recv() {
                    owned.lag.received(received.transaction.commit_time, now);
                    owned.queue.push(received.transaction);
                    owned.permits.push_back(received.permit);
                }
                Ok(())
            }
            Action::Outcome(outcome) => self.durable(outcome),
            Action::Covered(unprotected) => self.cover(&unprotected),
            Action::Held(position) => {
                if let Some(flush) = owned.ledger.hold(position) {
                    failpoint::hit("pipeline:before-acknowledge");
                    self.flush.send_replace(flush);
                }
                Ok(())
            }
            Action::Asked(Ask::Pause(answer)) => {
                owned.paused = true;
                owned.pausing = Some(answer);
                Ok(())
            }
            Action::Asked(Ask::GoOn) => {
                owned.paused = false;
                owned.pausing = None;
                Ok(())
            }
            Action::Tick | Action::Due => Ok(()),
            Action::Stop => {
                let grace = self.pipeline.config.limits.shutdown_grace;
                owned.phase = Phase::Draining {
                    deadline: now_instant() + grace,
                };
                Ok(())
            }
            // What was not applied is sent again after the next start.
            Action::GraceOver => Err(SessionError::NotDrained {
                transactions: owned.permits.len(),
                grace: self.pipeline.config.limits.shutdown_grace,
            }),
            Action::TaskEnded(None) => Err(SessionError::TaskLost),
            Action::TaskEnded(Some(error)) => Err(error),
        }
    }

    /// Ends every task, and waits for it: the next session works with the same files.
    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }

    fn durable(&mut self, outcome: Outcome) -> Result<(), SessionError> {
        let Outcome {
            batch,
            result,
            took,
        } = outcome;
        let applied = result?;
        let owned = &mut self.owned;
        if let Some(flush) = owned.ledger.durable(SINK, batch.number) {
            failpoint::hit("pipeline:before-acknowledge");
            self.flush.send_replace(flush);
        }
        owned.shipped_oldest.pop_front();
        owned.permits.drain(..batch.transactions.len());
        owned.lag.applied(batch.commit_time(), time::now());
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
        Ok(())
    }

    fn cover(&mut self, unprotected: &[Unprotected]) -> Result<(), SessionError> {
        for found in unprotected {
            self.pipeline.metrics.unprotected(found.kind, found.count);
        }
        self.pipeline.status.update(|status| {
            status.unprotected = unprotected
                .iter()
                .map(|found| (found.kind, found.count))
                .collect();
        });
        let count = |kind: &str| {
            let found = unprotected.iter().find(|found| found.kind == kind);
            found.map_or(0, |found| found.count)
        };
        let new = count(coverage::UNPUBLISHED_TABLE) > self.owned.left_out
            || count(coverage::UNIDENTIFIED_TABLE) > 0;
        let relisted = count(coverage::RELISTED_TABLE) > 0;
        match &self.late {
            Some(late) if !relisted => {
                if new || count(coverage::UNPUBLISHED_TABLE) > 0 {
                    late.wake.notify_one();
                }
                Ok(())
            }
            _ if new || relisted => Err(SessionError::NewTable),
            _ => Ok(()),
        }
    }

    /// Invariant maintenance after every action: what the outside sees is what is.
    fn observe(&mut self) {
        let owned = &mut self.owned;
        owned.lag.queued(
            owned
                .shipped_oldest
                .front()
                .copied()
                .or_else(|| owned.queue.oldest_commit_time()),
        );
        let position = *self.position.borrow();
        let metrics = &self.pipeline.metrics;
        metrics
            .bytes_received
            .increment(position.bytes - owned.bytes_counted);
        owned.bytes_counted = position.bytes;
        if owned.reader.replace(position.reader) != Some(position.reader) {
            metrics.reader(position.reader);
        }
        let sunk = owned.ledger.sunk();
        if self.leg != Leg::Send {
            metrics.replica_flush_lsn.set(lsn_number(sunk));
        }
        let status = &self.pipeline.status;
        if let Some(ahead) = status.source_ahead() {
            owned.lag.measured(ahead);
        }
        status.progress(&owned.lag, position.wal_end, Some(sunk));
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
async fn asked(late: Option<&mut LateSide>) -> Ask {
    if let Some(late) = late
        && let Some(ask) = late.asked.recv().await
    {
        return ask;
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

fn lsn_number(lsn: PgLsn) -> f64 {
    as_f64(u64::from(lsn))
}
