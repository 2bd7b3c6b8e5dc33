//! The pipeline of one database: the one owner of its state.
//!
//! ```text
//! select().await ─▶ Action ─▶ apply(action) ─▶ maybe ship the next batch
//!      ▲ transactions from the source task · outcomes from the sink task · reports from the monitor
//! ```
//!
//! `select` awaits, `apply` does not: only one thing happens at a time, and a test can drive the
//! pipeline with made-up actions. The price is that multi-step work is written as state.
//!
//! A *session* is one run from `setup::prepare` to the first error. There is no repair inside a session:
//! whatever fails, the next one starts from the progress row, exactly as after `kill -9`. So there is one
//! recovery path and it runs all the time.
//!
//! # Invariants
//! - The source task is sent what the ledger says is durable, nothing else.
//! - A definite error stops this pipeline and no other; the process goes on as long as one runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::{self, Decision};
use crate::batch::{Batch, Queue};
use crate::changes::{ChangeCounts, KINDS};
use crate::config::Config;
use crate::coverage;
use crate::error::{Class, Classify, chain};
use crate::failpoint;
use crate::lag::{Lag, Micros, pg_micros, system_time};
use crate::ledger::{BatchNumber, FlushLsn, Ledger};
use crate::metrics::DatabaseMetrics;
use crate::monitor::{self, Report, WalReport};
use crate::pg::{self, ConnInfo, PgError, PgLsn};
use crate::setup::{self, Prepared, SetupError};
use crate::sink::replica::{Applied, ReplicaSink, SinkError, SinkSettings, Synced};
use crate::snapshot::{self, CopyError, CopyObserver, CopyPhase, ProgressDisplay};
use crate::source::{self, Received, SourceError, SourcePosition, SourceSettings};
use crate::spill::{self, SpillError, SpillSpace};
use crate::status::{State, StatusCell};
use crate::stream::StreamName;

/// Batches on their way to the replica. One: the next is gathering meanwhile.
const IN_FLIGHT_MAX: usize = 1;

/// Transactions between the source task and here. Their bytes are bounded by `limits.queue_bytes`; this
/// only bounds how many tiny ones.
const QUEUE_TRANSACTIONS: usize = 16_384;

/// How often lag is judged without news.
const TICK: Duration = Duration::from_millis(250);

/// A session that lasted this long was no failed attempt; the next error starts at the shortest pause.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// The only sink of this version.
const REPLICA: usize = 0;

/// How a pipeline ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to stop and has drained.
    Stopped,
    /// An error needs a person.
    Failed,
    /// The replica was promoted.
    Fenced,
}

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("prepare")]
    Setup(#[from] SetupError),
    #[error("stream")]
    Source(#[from] SourceError),
    #[error("apply")]
    Sink(#[from] SinkError),
    #[error("watch the source")]
    Monitor(#[source] PgError),
    #[error("open the spill directory")]
    Spill(#[from] SpillError),
    #[error("finish the initial copy")]
    Deferred(#[source] CopyError),
    #[error("a new table is to be copied")]
    NewTable,
    #[error("a task of the pipeline ended without saying why")]
    TaskLost,
}

impl Classify for SessionError {
    fn class(&self) -> Class {
        match self {
            Self::Setup(error) => error.class(),
            Self::Source(error) => error.class(),
            Self::Sink(error) => error.class(),
            Self::Monitor(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Deferred(error) => error.class(),
            Self::NewTable | Self::TaskLost => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Sink(error) => error.hint(),
            Self::Monitor(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::Deferred(error) => error.hint(),
            Self::NewTable | Self::TaskLost => None,
        }
    }
}

impl SessionError {
    /// Not a failure: starting again is how the pipeline takes in what is new.
    fn is_expected(&self) -> bool {
        matches!(
            self,
            Self::NewTable
                | Self::Sink(SinkError::TableNotCopied { .. } | SinkError::BinaryForm { .. })
        )
    }
}

/// One database's pipeline.
pub struct Pipeline {
    config: Arc<Config>,
    database: String,
    stream: StreamName,
    metrics: DatabaseMetrics,
    status: StatusCell,
    stop: CancellationToken,
    /// Values may come in binary form until one came that does not travel.
    binary: bool,
    /// Outlives sessions: while one is being restored, the lag goes on growing from where it was.
    lag: Lag,
}

impl Pipeline {
    /// A pipeline that has not started.
    pub fn new(
        config: Arc<Config>,
        database: &str,
        status: StatusCell,
        stop: CancellationToken,
    ) -> Self {
        let stream = config.stream(database);
        let metrics = DatabaseMetrics::new(database);
        let lag = Lag::new(config.source.heartbeat_every, config.objectives.rpo);
        let database = database.to_owned();
        Self {
            config,
            database,
            stream,
            metrics,
            status,
            stop,
            binary: true,
            lag,
        }
    }

    /// Replicates until told to stop, or until an error needs a person.
    pub async fn run(mut self) -> End {
        let mut attempt = 0;
        loop {
            let started = now_instant();
            let error = match self.session().await {
                Ok(()) => {
                    self.enter(State::Stopped);
                    return End::Stopped;
                }
                Err(error) => error,
            };
            if self.stop.is_cancelled() {
                tracing::info!(database = %self.database, reason = %chain(&error), "stopped");
                self.enter(State::Stopped);
                return End::Stopped;
            }
            if matches!(error, SessionError::Sink(SinkError::BinaryForm { .. })) {
                self.binary = false;
            }
            if error.is_expected() {
                tracing::info!(database = %self.database, reason = %chain(&error), "starting again");
                continue;
            }
            if started.elapsed() > HEALTHY_AFTER {
                attempt = 0;
            }
            attempt += 1;
            if let Some(end) = self.failed(&error, attempt).await {
                return end;
            }
        }
    }

    /// Shows the error and waits if it is to be tried again.
    async fn failed(&self, error: &SessionError, attempt: u32) -> Option<End> {
        let class = error.class();
        let hint = error.hint();
        self.metrics.errors(class).increment(1);
        self.status.update(|status| {
            status.error = Some(chain(error));
            status.hint.clone_from(&hint);
        });
        let text = chain(error);
        let hint = hint.as_deref();
        let retry_max = self.config.limits.retry_max;
        match backoff::decide(class, attempt, retry_max, rand::random()) {
            Decision::Retry(pause) => {
                self.enter(State::Retrying);
                tracing::warn!(
                    database = %self.database, attempt, ?pause, error = %text, hint, "will retry"
                );
                let stopped = tokio::time::timeout(pause, self.stop.cancelled());
                if self.watching(stopped).await.is_ok() {
                    self.enter(State::Stopped);
                    return Some(End::Stopped);
                }
                None
            }
            Decision::Stop if class == Class::Fenced => {
                self.enter(State::Fenced);
                tracing::error!(database = %self.database, error = %text, hint, "fenced");
                Some(End::Fenced)
            }
            Decision::Stop => {
                self.enter(State::Stopped);
                tracing::error!(database = %self.database, error = %text, hint, "stopped");
                Some(End::Failed)
            }
        }
    }

    fn enter(&self, state: State) {
        self.metrics.state(state);
        self.status.update(|status| status.state = state);
    }

    /// Keeps the verdict on the lag up to date for as long as `waiting` takes.
    async fn watching<T>(&self, waiting: impl Future<Output = T>) -> T {
        tokio::pin!(waiting);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return done,
                _ = tick.tick() => self.judge(&self.lag),
            }
        }
    }

    /// Shows what the lag is now.
    fn judge(&self, lag: &Lag) {
        let verdict = lag.verdict(now_micros());
        self.metrics
            .lag_seconds
            .set(verdict.lag_seconds.unwrap_or(-1.0));
        self.metrics
            .rpo_breached
            .set(if verdict.breached { 1.0 } else { 0.0 });
        if let Some(received) = verdict.received_seconds {
            self.metrics.stage_lag("received", received);
        }
        self.metrics.stage_lag("queued", verdict.queued_seconds);
        if let Some(applied) = verdict.lag_seconds {
            self.metrics.stage_lag("applied", applied);
        }
        self.status.update(|status| {
            status.lag_seconds = verdict.lag_seconds;
            status.rpo_breached = verdict.breached;
        });
    }

    /// From preparing to the first error; `Ok` once told to stop and drained.
    async fn session(&mut self) -> Result<(), SessionError> {
        self.enter(State::Initializing);
        let observer = Observer {
            metrics: &self.metrics,
            status: &self.status,
        };
        let display = ProgressDisplay::new(&self.database, &observer);
        let preparing = setup::prepare(&self.config, &self.database, &display, &self.stop);
        let stopped_or_prepared = self.stop.run_until_cancelled(preparing);
        let Some(prepared) = self.watching(stopped_or_prepared).await else {
            return Ok(());
        };
        let prepared = prepared?;
        drop(display);
        for warning in &prepared.warnings {
            tracing::warn!(database = %self.database, "{warning}");
        }
        let mut streaming = self.start(&prepared).await?;
        self.metrics.term.set(precise(prepared.term));
        self.status.update(|status| {
            status.term = prepared.term;
            status.error = None;
            status.hint = None;
        });
        self.enter(State::Streaming);
        tracing::info!(
            database = %self.database, stream = %self.stream, from = %prepared.end_lsn,
            term = prepared.term, "streaming"
        );
        let outcome = streaming.run().await;
        streaming.tasks.shutdown().await;
        let mut lag = streaming.owned.lag;
        // What waited is dropped and will be received again.
        lag.queued(None);
        self.lag = lag;
        outcome
    }

    /// Opens both sides and starts the tasks of one session.
    async fn start(&self, prepared: &Prepared) -> Result<Streaming<'_>, SessionError> {
        let limits = &self.config.limits;
        let directory = spill::directory_of(&limits.spill_directory, &self.stream);
        let space = SpillSpace::open(directory, limits.spill_bytes)?;
        let source = self.config.source.conninfo.with_dbname(&self.database);
        let replica = self.config.replica.conninfo.with_dbname(&self.database);
        let sink = ReplicaSink::connect(
            &replica,
            SinkSettings {
                stream: self.stream.clone(),
                term: prepared.term,
                segment_bytes: limits.batch_bytes,
            },
            Synced {
                tables: prepared.synced.iter().cloned().collect(),
                as_of: prepared.as_of,
            },
        )
        .await?;
        let ledger = Ledger::resume(1, BatchNumber(prepared.batch), prepared.end_lsn);
        let (flush, flush_seen) = watch::channel(ledger.flush_lsn());
        let (position, position_seen) = watch::channel(SourcePosition::default());
        let (received, transactions) = mpsc::channel(QUEUE_TRANSACTIONS);
        let (batches, batches_to_apply) = mpsc::channel(IN_FLIGHT_MAX);
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let (reports, reports_seen) = mpsc::channel(4);
        let mut tasks = JoinSet::new();
        let settings = SourceSettings {
            conninfo: source.clone(),
            stream: self.stream.clone(),
            start: prepared.end_lsn,
            binary: self.binary && prepared.binary,
            queue_bytes: limits.queue_bytes,
            transaction_bytes: limits.transaction_bytes,
        };
        tasks.spawn(async move {
            source::run(settings, space, received, flush_seen, position)
                .await
                .err()
                .map(SessionError::Source)
        });
        let newest_snapshot = prepared
            .synced
            .iter()
            .filter_map(|(_, snapshot)| *snapshot)
            .max();
        let mut deferred = Deferred {
            replica,
            stream: self.stream.clone(),
            after: newest_snapshot,
        };
        deferred.passed(prepared.end_lsn).await?;
        tasks.spawn(apply_batches(sink, batches_to_apply, outcomes, deferred));
        let (config, stream) = (Arc::clone(&self.config), self.stream.clone());
        tasks.spawn(async move {
            monitor::run(&config, &source, &stream, reports)
                .await
                .err()
                .map(SessionError::Monitor)
        });
        Ok(Streaming {
            pipeline: self,
            tasks,
            transactions,
            outcomes: outcomes_seen,
            reports: reports_seen,
            position: position_seen,
            batches,
            flush,
            owned: Owned::new(&self.config, ledger, self.lag.clone()),
        })
    }
}

/// The sink task: batches in, outcomes out, in order.
async fn apply_batches(
    mut sink: ReplicaSink,
    mut batches: mpsc::Receiver<Batch>,
    outcomes: mpsc::Sender<Outcome>,
    mut deferred: Deferred,
) -> Option<SessionError> {
    while let Some(batch) = batches.recv().await {
        let started = now_instant();
        let end_lsn = batch.end_lsn();
        let result = sink.apply(&batch).await;
        let failed = result.is_err();
        let outcome = Outcome {
            batch,
            result,
            took: started.elapsed(),
        };
        if outcomes.send(outcome).await.is_err() || failed {
            return None;
        }
        if let Err(error) = deferred.passed(end_lsn).await {
            return Some(error);
        }
    }
    None
}

/// Constraints of the initial copy that hold only once the stream has passed its newest snapshot.
struct Deferred {
    replica: ConnInfo,
    stream: StreamName,
    after: Option<PgLsn>,
}

impl Deferred {
    /// Adds what is due; between batches, since it locks tables.
    async fn passed(&mut self, end_lsn: PgLsn) -> Result<(), SessionError> {
        if self.after.is_none_or(|after| end_lsn < after) {
            return Ok(());
        }
        let session = crate::sink::replica::session(&self.stream);
        let mut client = pg::connect(&self.replica, &session)
            .await
            .map_err(SinkError::from)?;
        let waiting = snapshot::run_deferred(&mut client, &self.stream)
            .await
            .map_err(SessionError::Deferred)?;
        if waiting == 0 {
            self.after = None;
        }
        Ok(())
    }
}

/// What the sink task says of a batch.
#[derive(Debug)]
struct Outcome {
    batch: Batch,
    result: Result<Applied, SinkError>,
    took: Duration,
}

/// What can happen to a pipeline that streams.
#[derive(Debug)]
enum Action {
    Received(Received),
    Outcome(Outcome),
    Report(Report),
    Tick,
    Stop,
    GraceOver,
    TaskEnded(Option<SessionError>),
}

/// Channels and tasks of one session, around the state that is owned here.
struct Streaming<'p> {
    pipeline: &'p Pipeline,
    tasks: JoinSet<Option<SessionError>>,
    transactions: mpsc::Receiver<Received>,
    outcomes: mpsc::Receiver<Outcome>,
    reports: mpsc::Receiver<Report>,
    position: watch::Receiver<SourcePosition>,
    batches: mpsc::Sender<Batch>,
    flush: watch::Sender<FlushLsn>,
    owned: Owned,
}

/// The state proper.
#[derive(Debug)]
struct Owned {
    ledger: Ledger,
    queue: Queue,
    /// The queue's shares of `limits.queue_bytes`, one per waiting or shipped transaction.
    permits: VecDeque<OwnedSemaphorePermit>,
    shipped_oldest: Option<Micros>,
    lag: Lag,
    wal: Option<WalReport>,
    unpublished_at_start: Option<u64>,
    phase: Phase,
    bytes_counted: u64,
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
    fn new(config: &Config, ledger: Ledger, lag: Lag) -> Self {
        let limits = &config.limits;
        Self {
            ledger,
            queue: Queue::new(limits.batch_bytes, limits.batch_changes),
            permits: VecDeque::new(),
            shipped_oldest: None,
            lag,
            wal: None,
            unpublished_at_start: None,
            phase: Phase::Running,
            bytes_counted: 0,
        }
    }

    fn is_drained(&self) -> bool {
        self.queue.is_empty() && self.ledger.in_flight() == 0
    }

    /// The next batch, if the replica is free for one.
    fn next_batch(&mut self) -> Option<Batch> {
        if self.ledger.in_flight() >= IN_FLIGHT_MAX {
            return None;
        }
        let (last, end_lsn) = self.ledger.last();
        self.shipped_oldest = self.queue.oldest_commit_time();
        let batch = self.queue.take(last.next(), end_lsn)?;
        self.ledger
            .ship(batch.number, batch.previous, batch.end_lsn());
        Some(batch)
    }
}

impl Streaming<'_> {
    async fn run(&mut self) -> Result<(), SessionError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let action = self.select(&mut tick).await;
            self.apply(action)?;
            if let Some(batch) = self.owned.next_batch() {
                failpoint::hit("pipeline:before-ship");
                // The sink task takes one at a time and is free, or `next_batch` had given none.
                if self.batches.try_send(batch).is_err() {
                    return Err(SessionError::TaskLost);
                }
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
            Some(report) = self.reports.recv() => Action::Report(report),
            // 5. More work; not while draining.
            Some(received) = self.transactions.recv(), if running => Action::Received(received),
        }
    }

    fn apply(&mut self, action: Action) -> Result<(), SessionError> {
        let owned = &mut self.owned;
        match action {
            Action::Received(received) => {
                owned.lag.received(received.transaction.commit_time);
                owned.queue.push(received.transaction);
                owned.permits.push_back(received.permit);
                // Take what else has arrived: it belongs into the same batch.
                while let Ok(received) = self.transactions.try_recv() {
                    owned.lag.received(received.transaction.commit_time);
                    owned.queue.push(received.transaction);
                    owned.permits.push_back(received.permit);
                }
                Ok(())
            }
            Action::Outcome(outcome) => self.durable(outcome),
            Action::Report(Report::Wal(wal)) => {
                owned.wal = Some(wal);
                Ok(())
            }
            Action::Report(Report::Coverage(unprotected)) => self.cover(&unprotected),
            Action::Tick => Ok(()),
            Action::Stop => {
                let grace = self.pipeline.config.limits.shutdown_grace;
                owned.phase = Phase::Draining {
                    deadline: now_instant() + grace,
                };
                Ok(())
            }
            // What was not applied is sent again after the next start.
            Action::GraceOver | Action::TaskEnded(None) => Err(SessionError::TaskLost),
            Action::TaskEnded(Some(error)) => Err(error),
        }
    }

    fn durable(&mut self, outcome: Outcome) -> Result<(), SessionError> {
        let Outcome {
            batch,
            result,
            took,
        } = outcome;
        let applied = result?;
        let owned = &mut self.owned;
        if let Some(flush) = owned.ledger.durable(REPLICA, batch.number) {
            failpoint::hit("pipeline:before-acknowledge");
            self.flush.send_replace(flush);
        }
        owned.shipped_oldest = None;
        owned.permits.drain(..batch.transactions.len());
        owned.lag.applied(batch.commit_time(), now_micros());
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

    fn cover(&mut self, unprotected: &[coverage::Unprotected]) -> Result<(), SessionError> {
        for found in unprotected {
            self.pipeline.metrics.unprotected(found.kind, found.count);
        }
        self.pipeline.status.update(|status| {
            status.unprotected = unprotected
                .iter()
                .map(|found| (found.kind, found.count))
                .collect();
        });
        let unpublished = unprotected
            .iter()
            .find(|found| found.kind == coverage::UNPUBLISHED_TABLE)
            .map_or(0, |found| found.count);
        let before = *self.owned.unpublished_at_start.get_or_insert(unpublished);
        if unpublished > before {
            return Err(SessionError::NewTable);
        }
        Ok(())
    }

    /// Invariant maintenance after every action: what the outside sees is what is.
    fn observe(&mut self) {
        let owned = &mut self.owned;
        owned.lag.queued(
            owned
                .shipped_oldest
                .or_else(|| owned.queue.oldest_commit_time()),
        );
        self.pipeline.judge(&owned.lag);
        let position = *self.position.borrow();
        let metrics = &self.pipeline.metrics;
        metrics
            .bytes_received
            .increment(position.bytes - owned.bytes_counted);
        owned.bytes_counted = position.bytes;
        let flush = owned.ledger.flush_lsn().lsn();
        metrics.replica_flush_lsn.set(lsn_number(flush));
        let written = owned.wal.map(|wal| wal.written).max(position.wal_end);
        let behind = written.map(|written| u64::from(written).saturating_sub(u64::from(flush)));
        if let Some(behind) = behind {
            metrics.lag_bytes.set(precise_u64(behind));
        }
        let retained = owned.wal.and_then(|wal| wal.retained);
        if let Some(retained) = retained {
            metrics.slot_retained_bytes.set(precise_u64(retained));
        }
        let disk_full = owned.wal.and_then(|wal| wal.disk_full_seconds);
        if let Some(seconds) = disk_full {
            metrics.source_disk_full(seconds);
        }
        self.pipeline.status.update(|status| {
            status.lag_bytes = behind;
            status.slot_retained_bytes = retained;
            status.source_disk_full_seconds = disk_full;
        });
    }
}

/// Shows the initial copy in metrics and status.
struct Observer<'p> {
    metrics: &'p DatabaseMetrics,
    status: &'p StatusCell,
}

impl CopyObserver for Observer<'_> {
    fn tables(&self, total: usize, done: usize) {
        self.metrics.copy_tables(total, done);
    }

    fn planned(&self, _: u64) {}

    fn copied(&self, rows: u64, bytes: u64) {
        self.metrics.copy_rows.increment(rows);
        self.metrics.copy_bytes.increment(bytes);
    }

    fn table_ready(&self, _: &crate::catalog::TableName, _: u64) {}

    fn phase(&self, _: CopyPhase) {
        self.metrics.state(State::Copying);
        self.status.update(|status| status.state = State::Copying);
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the edge: everything below takes the time as an argument"
)]
fn now_micros() -> Micros {
    pg_micros(SystemTime::now())
}

#[allow(
    clippy::disallowed_methods,
    reason = "the edge: everything below takes the time as an argument"
)]
fn now_instant() -> Instant {
    Instant::now()
}

fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_micros(at).to_string()
}

fn lsn_number(lsn: PgLsn) -> f64 {
    precise_u64(u64::from(lsn))
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a metric; exact below 2^52, that is 4 PiB"
)]
fn precise_u64(number: u64) -> f64 {
    number as f64
}

#[allow(clippy::cast_precision_loss, reason = "a metric; terms are small")]
fn precise(number: i64) -> f64 {
    number as f64
}
