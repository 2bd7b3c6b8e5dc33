//! Tables that come late are copied beside the stream, never in its way; those that cannot be are set aside and tried again.
//!
//! ```text
//! look: publish, mend ▶ a copy of the slot, read from here on ▶ snapshot L ▶ rows as of L ▶ their changes from L on
//!                                                                   ▶ close to the stream? it pauses at F ▶ up to Q >= F ▶ join
//! ```
//! The snapshot waits for every transaction that is open on the source; the stream does not. What changes meanwhile is read a
//! second time, from a copy of the slot, and of it only what concerns these tables is applied, with a progress row of its
//! own. Once that is close, the stream ships nothing for a moment, and from `Q` on brings their changes itself.
//!
//! # Invariants
//! - The stream pauses for [`PAUSE_MAX`] at most, and only while what is missing is less than [`CLOSE_BYTES`].
//! - Whatever fails here fails no session: the tables stay set aside, with the reason, and are tried again.
//! - The copy of the slot holds WAL on the source no longer than a snapshot may take to come.
//!
//! # What it does not do
//! It takes no table away from the stream: one that is listed anew ends the session, and the next one sets it back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::error::SessionError;
use crate::batch::{IN_FLIGHT_MAX, Queue};
use crate::catalog::{Table, TableName};
use crate::config::Config;
use crate::error::{Class, Classify, chain};
use crate::ledger::{BatchNumber, FlushLsn, Ledger};
use crate::listed::{Copied, Listed};
use crate::metrics::DatabaseMetrics;
use crate::pg::{ConnInfo, PgLsn};
use crate::setup::{self, Aside, export};
use crate::sink::replica::{Beside, Outcome, ReplicaSink, SegmentLimits, SinkSettings, Synced};
use crate::snapshot::{self, CopyJob};
use crate::source::{self, IntakeLimits, Received, SlotUse, SourcePosition, SourceSettings};
use crate::spill::{self, SpillSpace};
use crate::status::StatusCell;
use crate::stream::StreamName;

/// How often it is looked without being told that there is something new, and how soon what failed is tried again at first.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What fails again and again is tried this often.
const AGAIN_MAX: Duration = Duration::from_secs(600);

/// How long the first attempt may wait for open transactions; each further one may wait twice as long, up to an hour: meanwhile
/// the copy of the slot holds WAL.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(60);

/// Less than that is caught up with in a moment.
const CLOSE_BYTES: u64 = 4 << 20;

/// The stream does not wait longer.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What the stream is asked.
#[derive(Debug)]
pub(super) enum Ask {
    /// Ship nothing more for now, and say up to where everything was.
    Pause(oneshot::Sender<PgLsn>),
    /// Go on.
    GoOn,
}

/// The task of one session.
pub(super) struct Late {
    pub(super) config: Arc<Config>,
    pub(super) database: String,
    pub(super) stream: StreamName,
    pub(super) term: i64,
    /// Whether the source may send generated columns.
    pub(super) sends_generated: bool,
    pub(super) beside: Beside,
    pub(super) asks: mpsc::Sender<Ask>,
    /// Told when there is something new.
    pub(super) wake: Arc<Notify>,
    /// Up to where the stream has shipped.
    pub(super) shipped: watch::Receiver<PgLsn>,
    pub(super) metrics: DatabaseMetrics,
    pub(super) status: StatusCell,
}

/// What is known of a table that could not be copied.
#[derive(Clone, Debug)]
struct Failed {
    reason: String,
    attempts: u32,
    again_at: Instant,
}

type Tasks = JoinSet<Result<(), SessionError>>;

/// One copy of the slot that is read, and the transactions that come of it.
struct Reading {
    transactions: mpsc::Receiver<Received>,
    ledger: Ledger,
    flush: watch::Sender<FlushLsn>,
}

impl Late {
    /// Looks and copies for as long as the session lasts.
    pub(super) async fn run(self) -> Option<SessionError> {
        let mut failed: BTreeMap<TableName, Failed> = BTreeMap::new();
        let mut said = Vec::new();
        loop {
            if let Err(error) = self.look(&mut failed, &mut said).await {
                if error.class() == Class::Fenced {
                    return Some(error);
                }
                tracing::warn!(database = %self.database, error = %chain(&error), "no look at late tables");
            }
            let soon = failed.values().map(|one| one.again_at).min();
            let until = soon.map_or(LOOK_EVERY, |at| {
                at.saturating_duration_since(Instant::now()).min(LOOK_EVERY)
            });
            let _ = timeout(until.max(Duration::from_secs(1)), self.wake.notified()).await;
        }
    }

    async fn look(
        &self,
        failed: &mut BTreeMap<TableName, Failed>,
        said: &mut Vec<String>,
    ) -> Result<(), SessionError> {
        let found = setup::look(&self.config, &self.database, &CancellationToken::new()).await?;
        for warning in &found.warnings {
            if !said.contains(warning) {
                tracing::warn!(database = %self.database, "{warning}");
            }
        }
        *said = found.warnings;
        failed.retain(|table, _| found.tables.iter().any(|one| one.name == *table));
        let is_due = |table: &&Table| {
            let one = failed.get(&table.name);
            one.is_none_or(|one| one.again_at <= Instant::now())
        };
        let due: Vec<Table> = found.tables.iter().filter(is_due).cloned().collect();
        self.tell(&found.tables, failed).await?;
        if due.is_empty() {
            return Ok(());
        }
        let mut done: Vec<TableName> = Vec::new();
        // Together; and where that fails for good, one by one, so that one table costs no other.
        let together = self.attempt(&due, &found.listed, failed, &mut done).await;
        if due.len() > 1 && together.is_err_and(|class| class == Class::Definite) {
            for table in &due {
                let one = std::slice::from_ref(table);
                let _ = self.attempt(one, &found.listed, failed, &mut done).await;
            }
        }
        let mut rest = found.tables;
        rest.retain(|table| !done.contains(&table.name));
        self.tell(&rest, failed).await
    }

    /// Copies tables, and notes what became of it.
    async fn attempt(
        &self,
        tables: &[Table],
        listed: &Listed,
        failed: &mut BTreeMap<TableName, Failed>,
        done: &mut Vec<TableName>,
    ) -> Result<(), Class> {
        let before = tables.iter().filter_map(|table| failed.get(&table.name));
        let attempts = before.map(|one| one.attempts).max().unwrap_or(0) + 1;
        let mut tasks = Tasks::new();
        let outcome = Box::pin(self.round(tables, listed, attempts, &mut tasks)).await;
        tasks.shutdown().await;
        if matches!(outcome, Err(SessionError::LateWaits(_))) {
            let ended = setup::end_late_sessions(&self.source(), &self.stream).await;
            if let Err(error) = ended {
                tracing::debug!(error = %chain(&error), "a session on the source waits on");
            }
        }
        let Err(error) = outcome else {
            for table in tables {
                failed.remove(&table.name);
                done.push(table.name.clone());
                tracing::info!(database = %self.database, table = %table.name, "copied beside the stream, and replicated from now on");
            }
            return Ok(());
        };
        let reason = chain(&error);
        let pause = LOOK_EVERY
            .saturating_mul(1 << (attempts - 1).min(10))
            .min(AGAIN_MAX);
        for table in tables {
            tracing::warn!(
                database = %self.database, table = %table.name, error = reason, hint = error.hint(), again_in = ?pause,
                "set aside: it is not protected; the rest goes on"
            );
            failed.insert(
                table.name.clone(),
                Failed {
                    reason: reason.clone(),
                    attempts,
                    again_at: Instant::now() + pause,
                },
            );
        }
        Err(error.class())
    }

    /// Shows what is set aside, here and on the replica.
    async fn tell(
        &self,
        tables: &[Table],
        failed: &BTreeMap<TableName, Failed>,
    ) -> Result<(), SessionError> {
        let aside: Vec<Aside> = tables
            .iter()
            .map(|table| Aside {
                table: table.name.clone(),
                reason: failed
                    .get(&table.name)
                    .map_or_else(|| "is being copied".to_owned(), |one| one.reason.clone()),
            })
            .collect();
        self.metrics.tables_set_aside(aside.len() as u64);
        self.status.update(|status| {
            let shown = aside.iter();
            status.set_aside = shown
                .map(|one| (one.table.to_string(), one.reason.clone()))
                .collect();
        });
        setup::note_aside(&self.replica(), &self.stream, &aside).await?;
        Ok(())
    }

    fn source(&self) -> ConnInfo {
        self.config.source.conninfo.with_dbname(&self.database)
    }

    fn replica(&self) -> ConnInfo {
        self.config.replica.conninfo.with_dbname(&self.database)
    }

    async fn round(
        &self,
        tables: &[Table],
        listed: &Listed,
        attempts: u32,
        tasks: &mut Tasks,
    ) -> Result<(), SessionError> {
        let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
        let (source, replica) = (self.source(), self.replica());
        // A backend that waits for a snapshot notices late that nobody listens.
        setup::end_late_sessions(&source, &self.stream).await?;
        setup::set_back_to_pending(&replica, &self.stream, &names).await?;
        let reading = self.read(tasks).await?;
        let mut exporter = export::session(&source, self.stream.application_name("late"))
            .await
            .map_err(SessionError::LateSnapshot)?;
        let within = SNAPSHOT_WITHIN * (1 << (attempts - 1).min(6));
        let exporting = export::snapshot(&mut exporter, &self.stream);
        let exported = or_ended(tasks, timeout(within, exporting)).await?;
        let exported = exported
            .map_err(|_| SessionError::LateWaits(within))?
            .map_err(SessionError::LateSnapshot)?;
        let snapshot_lsn = exported.consistent_point;
        let job = CopyJob {
            source: &source,
            replica: &replica,
            stream: &self.stream,
            tables: tables.to_vec(),
            listed,
            snapshot: exported.snapshot_name.as_deref().unwrap_or_default(),
            snapshot_lsn,
            settings: &self.config.copy,
            whole_schema: false,
            beside: true,
        };
        let never = CancellationToken::new();
        or_ended(tasks, snapshot::copy(job, &(), &never))
            .await?
            .map_err(SessionError::LateCopy)?;
        drop(exporter);
        let copied = |table: &TableName, lsn| Copied {
            snapshot_lsn: Some(lsn),
            listed_as: listed.get(table).cloned(),
        };
        let synced = names
            .iter()
            .map(|table| (table.clone(), copied(table, snapshot_lsn)));
        let end_lsn = self.catch_up(reading, synced.collect(), tasks).await;
        if let Ok(end_lsn) = &end_lsn {
            let positions = (snapshot_lsn, *end_lsn);
            setup::joined(&replica, &self.stream, self.term, &names, positions).await?;
            for table in &names {
                self.beside.join(table.clone(), copied(table, *end_lsn));
            }
        }
        // Whatever became of it.
        let _ = self.asks.send(Ask::GoOn).await;
        end_lsn.map(|_| ())
    }

    /// Begins to read a copy of the slot; returns once it is there, so that nothing behind a snapshot that is taken afterwards
    /// is missed.
    async fn read(&self, tasks: &mut Tasks) -> Result<Reading, SessionError> {
        let limits = &self.config.limits;
        let start = PgLsn::from(0);
        let ledger = Ledger::resume(1, BatchNumber(0), start);
        let (flush, flush_seen) = watch::channel(ledger.flush_lsn());
        let (received, transactions) = mpsc::channel(super::QUEUE_TRANSACTIONS);
        let (position, mut position_seen) = watch::channel(SourcePosition::default());
        let settings = SourceSettings {
            conninfo: self.source(),
            stream: self.stream.clone(),
            slot: SlotUse::Late,
            start,
            // Nobody has looked at the types of these tables yet.
            binary: false,
            limits: IntakeLimits {
                queue_bytes: limits.queue_bytes,
                transaction_bytes: limits.transaction_bytes,
            },
            catch_up_bytes: limits.catch_up_bytes,
        };
        let own = spill::directory_of(&limits.spill_directory, &self.stream);
        let space = SpillSpace::open(own.with_extension("late"), limits.spill_bytes)?;
        tasks.spawn(async move {
            let reading = source::run(settings, space, received, flush_seen, position);
            Ok(Box::pin(reading).await?)
        });
        let begun = position_seen.wait_for(|position| position.wal_end.is_some());
        or_ended(tasks, begun)
            .await?
            .map_err(|_| SessionError::TaskLost)?;
        Ok(Reading {
            transactions,
            ledger,
            flush,
        })
    }

    /// Applies what comes until the stream waits and is not ahead; returns up to where that is.
    async fn catch_up(
        &self,
        mut reading: Reading,
        tables: std::collections::HashMap<TableName, Copied>,
        tasks: &mut Tasks,
    ) -> Result<PgLsn, SessionError> {
        let (batches, mut outcomes) = self.sink(tables, tasks).await?;
        let limits = &self.config.limits;
        let mut queue = Queue::new(limits.batch_bytes, limits.batch_changes);
        let mut permits = Vec::new();
        let mut paused: Option<(PgLsn, Instant)> = None;
        loop {
            let received = match paused {
                Some((_, at)) if at.elapsed() > PAUSE_MAX => {
                    let _ = self.asks.send(Ask::GoOn).await;
                    paused = None;
                    continue;
                }
                Some((_, at)) => {
                    let left = PAUSE_MAX.saturating_sub(at.elapsed());
                    match timeout(left, or_ended(tasks, reading.transactions.recv())).await {
                        Ok(received) => received?,
                        Err(_) => continue,
                    }
                }
                None => or_ended(tasks, reading.transactions.recv()).await?,
            };
            let received = received.ok_or(SessionError::TaskLost)?;
            queue.push(received.transaction);
            permits.push(received.permit);
            while let Ok(received) = reading.transactions.try_recv() {
                queue.push(received.transaction);
                permits.push(received.permit);
            }
            let mut end_lsn = reading.ledger.last().1;
            while let Some(batch) = {
                let (last, end) = reading.ledger.last();
                queue.take(last.next(), end)
            } {
                end_lsn = batch.end_lsn();
                reading.ledger.ship(batch.number, batch.previous, end_lsn);
                let number = batch.number;
                batches
                    .send(Arc::new(batch))
                    .await
                    .map_err(|_| SessionError::TaskLost)?;
                let outcome: Option<Outcome> = or_ended(tasks, outcomes.recv()).await?;
                outcome.ok_or(SessionError::TaskLost)?.result?;
                if let Some(flush) = reading.ledger.durable(0, number) {
                    reading.flush.send_replace(flush);
                }
            }
            permits.clear();
            if let Some((shipped, _)) = paused
                && end_lsn >= shipped
            {
                return Ok(end_lsn);
            }
            let shipped = *self.shipped.borrow();
            let is_close = u64::from(shipped).saturating_sub(u64::from(end_lsn)) < CLOSE_BYTES;
            if paused.is_none() && is_close {
                let shipped = self.pause().await?;
                if end_lsn >= shipped {
                    return Ok(end_lsn);
                }
                paused = Some((shipped, Instant::now()));
            }
        }
    }

    /// Has the stream wait; says up to where it has shipped.
    async fn pause(&self) -> Result<PgLsn, SessionError> {
        let (answer, answered) = oneshot::channel();
        let asked = self.asks.send(Ask::Pause(answer)).await;
        asked.map_err(|_| SessionError::TaskLost)?;
        answered.await.map_err(|_| SessionError::TaskLost)
    }

    async fn sink(
        &self,
        tables: std::collections::HashMap<TableName, Copied>,
        tasks: &mut Tasks,
    ) -> Result<
        (
            mpsc::Sender<Arc<crate::batch::Batch>>,
            mpsc::Receiver<Outcome>,
        ),
        SessionError,
    > {
        let replica = self.replica();
        setup::catch_up_from_nothing(&replica, &self.stream, self.term).await?;
        let limits = &self.config.limits;
        let (mut sink, batches) = ReplicaSink::connect(
            &replica,
            SinkSettings {
                stream: self.stream.late(),
                term: self.term,
                segment: SegmentLimits {
                    bytes: limits.batch_bytes,
                    changes: (limits.batch_changes / 4).max(1),
                },
                lanes: 1,
                spread_changes: u64::MAX,
                session: &[],
                distance: None,
            },
            Synced {
                tables,
                listed_by: self.stream.clone(),
                as_of: PgLsn::from(u64::MAX),
                beside: None,
                left_out: std::collections::HashSet::new(),
                sends_generated: self.sends_generated,
                // Copied a moment ago; the stream compares once the table has joined it.
                domains: None,
            },
        )
        .await?;
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        tasks.spawn(async move {
            while let Some(outcome) = sink.next().await {
                let failed = outcome.result.is_err();
                if outcomes.send(outcome).await.is_err() || failed {
                    break;
                }
            }
            // Its last outcome says what was wrong; who waits for another one will not wait in vain.
            sleep(PAUSE_MAX).await;
            Ok(())
        });
        Ok((batches, outcomes_seen))
    }
}

/// What is waited for, unless a task ends first.
async fn or_ended<T>(
    tasks: &mut Tasks,
    waiting: impl Future<Output = T>,
) -> Result<T, SessionError> {
    tokio::pin!(waiting);
    tokio::select! {
        biased;
        done = &mut waiting => Ok(done),
        Some(ended) = tasks.join_next() => {
            ended.unwrap_or(Ok(()))?;
            Err(SessionError::TaskLost)
        }
    }
}
