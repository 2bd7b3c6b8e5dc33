//! The pipeline of one database: the one owner of its state.
//!
//! ```text
//! select().await ─▶ Action ─▶ apply(action) ─▶ maybe ship the next batch
//!      ▲ transactions from the source task · outcomes from the sink task · reports from the monitor
//! ```
//!
//! `select` awaits, `apply` does not (`streaming.rs`): only one thing happens at a time, and no two things
//! can interleave. The price is that multi-step work is written as state.
//!
//! A *session* is one run from `setup::prepare` to the first error. There is no repair inside a session:
//! whatever fails, the next one starts from the progress row, exactly as after `kill -9`. So there is one
//! recovery path and it runs all the time.
//!
//! # Invariants
//! - The source task is sent what the ledger says is durable, nothing else.
//! - A definite error stops this pipeline and no other; the process goes on as long as one runs.

mod apply;
mod error;
mod streaming;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::archive::{Layout, Log, LogSettings, SpoolLimits};
use crate::backoff::{self, Decision};
use crate::batch::Spacing;
use crate::changelog::Author;
use crate::config::{Archive, Config};
use crate::error::{Class, Classify, chain};
use crate::lag::{Lag, Micros, pg_micros};
use crate::ledger::{BatchNumber, Ledger};
use crate::metrics::{ArchiveMetrics, DatabaseMetrics};
use crate::monitor;
use crate::setup::{self, Prepared};
use crate::sink::replica::{
    IN_FLIGHT_MAX, ReplicaSink, SegmentLimits, SinkError, SinkSettings, Synced,
};
use crate::snapshot::{CopyObserver, CopyPhase, ProgressDisplay};
use crate::source::{self, IntakeLimits, SourcePosition, SourceSettings};
use crate::spill::{self, SpillSpace};
use crate::status::{State, StatusCell};
use crate::stream::StreamName;
use apply::{Deferred, apply_batches};
use error::SessionError;
use streaming::{Archiving, Owned, Streaming};

/// Transactions between the source task and here. Their bytes are bounded by `limits.queue_bytes`; this
/// only bounds how many tiny ones.
const QUEUE_TRANSACTIONS: usize = 16_384;

/// How often lag is judged without news.
const TICK: Duration = Duration::from_millis(250);

/// A session that lasted this long was no failed attempt; the next error starts at the shortest pause.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

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
        self.metrics.term.set(as_f64(prepared.term.unsigned_abs()));
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
        if outcome.is_ok() {
            streaming.finish_archive().await;
        }
        streaming.stop().await;
        let mut lag = streaming.owned.lag;
        // What waited is dropped and will be received again.
        lag.queued(None);
        self.lag = lag;
        outcome
    }

    /// The change log of one session, with what an earlier one left in the spool.
    fn log(&self, archive: &Archive, prepared: &Prepared) -> Result<Log, SessionError> {
        let system_identifier = prepared
            .system_identifier
            .parse()
            .map_err(|_| SessionError::SystemIdentifier(prepared.system_identifier.clone()))?;
        let settings = LogSettings {
            author: Author {
                stream: self.stream.to_string(),
                system_identifier,
                term: prepared.term,
                writer: rand::random(),
            },
            url: archive.url.clone(),
            encryption: archive.encryption.clone(),
            layout: Layout::new(&self.stream, system_identifier),
            directory: archive.spool_directory.join(self.stream.as_str()),
            limits: SpoolLimits {
                bytes: archive.spool_bytes,
                segment_bytes: archive.segment_bytes,
            },
            // The other half of the time is for the upload.
            age_max: self.config.objectives.rpo / 2,
            required: archive.required,
            retry_max: self.config.limits.retry_max,
        };
        Ok(Log::open(settings)?)
    }

    /// Opens both sides and starts the tasks of one session.
    async fn start(&self, prepared: &Prepared) -> Result<Streaming<'_>, SessionError> {
        let limits = &self.config.limits;
        let directory = spill::directory_of(&limits.spill_directory, &self.stream);
        let space = SpillSpace::open(directory, limits.spill_bytes)?;
        let source = self.config.source.conninfo.with_dbname(&self.database);
        let replica = self.config.replica.conninfo.with_dbname(&self.database);
        let (sink, batches) = ReplicaSink::connect(
            &replica,
            SinkSettings {
                stream: self.stream.clone(),
                term: prepared.term,
                // Several are in memory at a time (read, folded, on their way), as rows, not as messages.
                segment: SegmentLimits {
                    bytes: limits.batch_bytes,
                    changes: (limits.batch_changes / 4).max(1),
                },
                lanes: self.config.replica.lanes,
                spread_changes: limits.spread_changes,
            },
            Synced {
                tables: prepared.synced.iter().cloned().collect(),
                as_of: prepared.as_of,
            },
        )
        .await?;
        let mut ledger = Ledger::resume(1, BatchNumber(prepared.batch), prepared.end_lsn);
        let mut tasks = JoinSet::new();
        let (batches, archive) = match &self.config.archive {
            None => (batches, None),
            Some(archive) => {
                let log = self.log(archive, prepared)?;
                let position = log
                    .waiting_from()
                    .map_or(prepared.end_lsn, |waiting| waiting.min(prepared.end_lsn));
                if archive.required {
                    ledger = ledger.with_archive(position);
                }
                let (uploaded, uploaded_seen) = watch::channel(position);
                let (to_spool, spooled) = mpsc::channel(IN_FLIGHT_MAX);
                let metrics = ArchiveMetrics::new(&self.database);
                let (spooling, uploading) = log.tasks(spooled, batches, uploaded, metrics);
                tasks.spawn(async move { spooling.await.err().map(SessionError::Spool) });
                let archiving = Archiving {
                    uploaded: uploaded_seen,
                    required: archive.required,
                    upload: AbortOnDropHandle::new(tokio::spawn(uploading)),
                };
                (to_spool, Some(archiving))
            }
        };
        let (flush, flush_seen) = watch::channel(ledger.flush_lsn());
        let (position, position_seen) = watch::channel(SourcePosition::default());
        let (received, transactions) = mpsc::channel(QUEUE_TRANSACTIONS);
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let (reports, reports_seen) = mpsc::channel(4);
        let settings = SourceSettings {
            conninfo: source.clone(),
            stream: self.stream.clone(),
            start: prepared.end_lsn,
            binary: self.binary && prepared.binary,
            limits: IntakeLimits {
                queue_bytes: limits.queue_bytes,
                transaction_bytes: limits.transaction_bytes,
            },
            catch_up_bytes: limits.catch_up_bytes,
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
        let spacing = Spacing::new(sink.round_trip(), IN_FLIGHT_MAX);
        tasks.spawn(apply_batches(sink, outcomes, deferred));
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
            batches: Some(batches),
            flush,
            archive,
            owned: Owned::new(&self.config, ledger, spacing, self.lag.clone()),
        })
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

#[allow(
    clippy::cast_precision_loss,
    reason = "a metric; exact below 2^52, that is 4 PiB"
)]
fn as_f64(number: u64) -> f64 {
    number as f64
}
