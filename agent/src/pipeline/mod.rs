//! The pipeline of one database: the one owner of its state.
//!
//! ```text
//! select().await ─▶ Action ─▶ apply(action) ─▶ maybe ship the next batch
//!      ▲ transactions from the source task · outcomes from the sink task · reports from the monitor
//! ```
//!
//! `select` awaits (`streaming`), `apply` does not (`owner` ●): only one thing happens at a time, and no two things
//! can interleave. The price is that multi-step work is written as state.
//!
//! Under route `direct` one process carries changes all the way; under route `kinesis` one puts them into the stream and
//! another, beside the replica, applies them. [`Leg`] says which part of the way this process is; the loop is the same.
//!
//! A *session* is one run from `setup::prepare` to the first error. There is no repair inside a session:
//! whatever fails, the next one starts from the progress row, exactly as after `kill -9`. So there is one
//! recovery path and it runs all the time.
//!
//! The change log for the archive is kept beside all that (`change_log`): it outlives sessions.
//!
//! # Invariants
//! - The source task is sent what the ledger says is durable, nothing else.
//! - An error that is one table's costs that table (`trouble`, `set_aside`): it is set aside on the replica, and the next session
//!   goes on without it.
//! - Any other definite error stops this pipeline and no other. It stays, so that it is seen to have stopped, and looks every few
//!   minutes, and whenever it is told to ([`Wake`]), whether the error was mended.
//! - While it is stopped, nothing of it is prepared on the replica.

mod apply;
mod change_log;
mod cover;
mod error;
mod late;
mod owner;
mod passwords;
pub mod schedule;
mod set_aside;
mod start;
mod streaming;
mod trouble;
mod waiting;
mod wake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backoff::{self, Decision};
use crate::config::Config;
use crate::copy::{CopyObserver, CopyPhase, ProgressDisplay};
use crate::error::{Class, Classify, chain};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::observe::metrics::DatabaseMetrics;
pub use crate::observe::status::Leg;
use crate::observe::status::{State, StatusCell};
use crate::pg::PgLsn;
use crate::setup::{self, Ready, SetupError};
use crate::sink::replica::SinkError;
use crate::time;
use crate::time::pg_micros;
use change_log::ChangeLog;
use error::SessionError;
use set_aside::TablesAside;
use trouble::TableCost;
pub use wake::{Wake, Waker};

/// How long a start may take to end that was told to stop.
const TAKE_BACK_WITHIN: Duration = Duration::from_secs(5);

/// How often lag is judged without news.
const TICK: Duration = Duration::from_millis(250);

/// How often it is looked whether an error that needs a person was mended: in so many times `limits.retry_max`.
const LOOK_AGAIN: u32 = 10;

/// How long a pipeline that stops may take to settle what it has prepared.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// A session that lasted this long was no failed attempt; the next error starts at the shortest pause.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// How a pipeline ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to stop and has drained, or stood stopped by an error that needs a person.
    Stopped,
    /// It was told to stop, and what it had received was not applied in time.
    NotDrained,
    /// The configuration was changed: it is to be begun anew with the one in use.
    Reconfigured,
    /// The replica was promoted.
    Fenced,
}

/// One database's pipeline.
pub struct Pipeline {
    config: Arc<Config>,
    /// What is in use, which may be another one meanwhile.
    in_use: watch::Receiver<Arc<Config>>,
    leg: Leg,
    database: String,
    stream: StreamName,
    metrics: DatabaseMetrics,
    status: StatusCell,
    stop: CancellationToken,
    /// Says that somebody wants the next attempt now.
    wake: Wake,
    /// Told where a base backup must be taken from, where the change log has a gap.
    broken: watch::Sender<Option<PgLsn>>,
    change_log: Option<ChangeLog>,
    /// Values may come in binary form until one came that does not travel.
    binary: bool,
    /// A table that the stream has and the replica has not, or has of another.
    uncopied: Option<TableName>,
    aside: TablesAside,
}

impl Pipeline {
    /// A pipeline that has not started.
    pub fn new(
        in_use: watch::Receiver<Arc<Config>>,
        leg: Leg,
        database: &str,
        status: StatusCell,
        stop: CancellationToken,
        wake: Wake,
        broken: watch::Sender<Option<PgLsn>>,
    ) -> Self {
        let config = Arc::clone(&in_use.borrow());
        let stream = config.stream(database);
        let metrics = DatabaseMetrics::new(database);
        let database = database.to_owned();
        let aside = TablesAside::new(&config, &database, &metrics, &status);
        Self {
            aside,
            config,
            in_use,
            leg,
            database,
            stream,
            metrics,
            status,
            stop,
            wake,
            broken,
            change_log: None,
            binary: true,
            uncopied: None,
        }
    }

    /// Replicates until told to stop, or until an error needs a person.
    pub async fn run(mut self) -> End {
        let (source, objectives) = (&self.config.source, &self.config.objectives);
        self.status.go_by(source.heartbeat_every, objectives.rpo);
        if let Some(archive) = self
            .config
            .archive
            .as_ref()
            .filter(|_| self.leg != Leg::Apply)
        {
            let broken = self.broken.clone();
            let log = ChangeLog::start(&self.config, archive, &self.database, broken);
            self.change_log = Some(log);
        }
        let end = Box::pin(self.sessions()).await;
        if let Some(log) = self.change_log.take() {
            log.finish().await;
        }
        end
    }

    /// One session after the other.
    async fn sessions(&mut self) -> End {
        let mut attempt = 0;
        while !self.is_outdated() {
            let started = now_instant();
            let error = match self.session().await {
                Ok(()) => {
                    self.enter(State::Stopped);
                    return End::Stopped;
                }
                Err(error) => error,
            };
            if self.stop.is_cancelled() {
                return self.stopped_by(&error);
            }
            match &error {
                // The source can be asked for text. What a change log holds stays as it was written.
                SessionError::Sink(SinkError::BinaryForm { .. })
                    if self.binary && self.leg == Leg::Whole =>
                {
                    self.binary = false;
                    tracing::info!(database = %self.database, reason = %chain(&error), "starting again, as text");
                    continue;
                }
                _ => {}
            }
            if let Some(table) = error.uncopied() {
                self.uncopied = Some(table.clone());
            }
            if error.is_expected() {
                tracing::info!(database = %self.database, reason = %chain(&error), "starting again");
                continue;
            }
            let Some(error) = self.cost_tables(error).await else {
                continue;
            };
            if started.elapsed() > HEALTHY_AFTER {
                attempt = 0;
            }
            attempt += 1;
            if let Some(end) = self.failed(&error, attempt).await {
                return end;
            }
        }
        End::Reconfigured
    }

    /// Whether the configuration in use is another one by now.
    fn is_outdated(&self) -> bool {
        !Arc::ptr_eq(&self.config, &self.in_use.borrow())
    }

    /// Ends once it is.
    async fn outdated(&self) -> SessionError {
        let mut in_use = self.in_use.clone();
        let another = in_use.wait_for(|config| !Arc::ptr_eq(config, &self.config));
        // Where nobody reads the file any more it stays as it is.
        let never = another.await.is_err();
        if never {
            std::future::pending::<()>().await;
        }
        SessionError::Reconfigured
    }

    /// One table's trouble costs that table: it is set aside, and the rest goes on. Returns an error that costs the database.
    async fn cost_tables(&self, error: SessionError) -> Option<SessionError> {
        if !self.copies_beside() {
            return Some(error);
        }
        let Some(cost) = TableCost::of(&error) else {
            return Some(error);
        };
        match self.aside.tables_of(&cost, &error).await {
            Ok(true) => None,
            Ok(false) => Some(error),
            Err(other) => {
                tracing::warn!(database = %self.database, error = %chain(&error), "the table is not set aside yet");
                Some(other.into())
            }
        }
    }

    /// How a session ended that was told to.
    fn stopped_by(&self, error: &SessionError) -> End {
        self.enter(State::Stopped);
        if let SessionError::NotDrained { .. } = error {
            tracing::warn!(database = %self.database, reason = %error, hint = error.hint(), "stopped");
            return End::NotDrained;
        }
        tracing::info!(database = %self.database, reason = %chain(error), "stopped");
        End::Stopped
    }

    /// Shows the error and waits if it is to be tried again.
    async fn failed(&self, error: &SessionError, attempt: u32) -> Option<End> {
        if self.copies_beside() {
            // Also while no session lasts, for whoever looks.
            let recalled = tokio::time::timeout(SETTLE_WITHIN, self.aside.recall()).await;
            tracing::debug!(database = %self.database, ?recalled, "what was set aside before");
        }
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
                self.pause(pause).await
            }
            Decision::Stop if class == Class::Fenced => {
                self.status.end(State::Fenced, time::now());
                tracing::error!(database = %self.database, error = %text, hint, "fenced");
                Some(End::Fenced)
            }
            Decision::Stop => {
                self.status.end(State::Stopped, time::now());
                let look_again = retry_max.saturating_mul(LOOK_AGAIN);
                tracing::error!(database = %self.database, error = %text, hint, ?look_again, "stopped");
                if self.change_log.is_some() && error.is_the_sinks() {
                    tracing::warn!(
                        database = %self.database,
                        "the change log goes on into the archive meanwhile"
                    );
                }
                self.leave_nothing_prepared().await;
                // Somebody may mend it, and the process has to say until then that nobody has.
                self.pause(look_again).await
            }
        }
    }

    /// Waits before the next attempt, unless somebody wants it now; the end where nobody wants one any more.
    async fn pause(&self, length: Duration) -> Option<End> {
        let mut wake = self.wake.clone();
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                self.enter(State::Stopped);
                Some(End::Stopped)
            }
            () = wake.wanted() => None,
            () = tokio::time::sleep(length) => None,
        }
    }

    /// Lanes that were prepared when the session ended would keep the database from being dropped, which a hint may ask for.
    async fn leave_nothing_prepared(&self) {
        if self.leg == Leg::Send {
            return;
        }
        let settling = setup::settle_prepared(&self.config, &self.database);
        let settled = tokio::time::timeout(SETTLE_WITHIN, Box::pin(settling)).await;
        if !matches!(settled, Ok(Ok(()))) {
            tracing::debug!(database = %self.database, "what was prepared is left to the next start");
        }
    }

    fn enter(&self, state: State) {
        self.status.enter(state, time::now());
    }

    /// From preparing to the first error; `Ok` once told to stop and drained.
    async fn session(&mut self) -> Result<(), SessionError> {
        self.enter(State::Initializing);
        let observer = Observer {
            metrics: &self.metrics,
            status: &self.status,
        };
        let display = ProgressDisplay::new(&self.database, &observer);
        let mut preparing = Box::pin(self.prepare(&display));
        let stopped_or_prepared = async {
            match self.stop.run_until_cancelled(&mut preparing).await {
                Some(prepared) => Some(prepared),
                // A first start that is not to go on takes back what it has written.
                None => tokio::time::timeout(TAKE_BACK_WITHIN, preparing).await.ok(),
            }
        };
        let Some(prepared) = stopped_or_prepared.await else {
            return Ok(());
        };
        if self.stop.is_cancelled() {
            return Ok(());
        }
        let prepared = prepared?;
        drop(display);
        self.uncopied = None;
        for warning in &prepared.warnings {
            tracing::warn!(database = %self.database, "{warning}");
        }
        if let Some(commit_time) = prepared.commit_time {
            let mut lag = self.status.lag();
            lag.resume(pg_micros(commit_time));
            self.status.progress(&lag, None, Some(prepared.end_lsn));
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
            term = prepared.term, leg = ?self.leg, "streaming"
        );
        let outcome = tokio::select! {
            biased;
            outcome = streaming.run() => outcome,
            lost = prepared.right_lost() => Err(lost.into()),
            outdated = self.outdated() => Err(outdated),
        };
        streaming.stop().await;
        let mut lag = streaming.owner.lag;
        // What waited is dropped and will be received again.
        lag.queued(None);
        self.status.progress(&lag, None, None);
        outcome
    }

    async fn prepare(&self, observer: &dyn CopyObserver) -> Result<Ready, SetupError> {
        let (config, database, stop) = (&self.config, &self.database, &self.stop);
        let uncopied = self.uncopied.as_ref();
        match self.leg {
            Leg::Whole => setup::prepare(config, database, uncopied, observer, stop).await,
            Leg::Send => setup::prepare_sending(config, database, stop).await,
            Leg::Apply => {
                setup::prepare_receiving(config, database, uncopied, observer, stop).await
            }
        }
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

    fn table_ready(&self, _: &crate::names::TableName, _: u64) {}

    fn phase(&self, _: CopyPhase) {
        self.status.enter(State::Copying, time::now());
    }
}

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
