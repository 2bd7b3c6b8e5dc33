//! What happens to late tables between their snapshot and the moment when they join the stream.
//!
//! ```text
//! a copy of the slot ─▶ waiting ─(what the stream has shipped)─▶ queue ─▶ a sink for these tables alone
//! ```
//! The copy brings the same transactions as the stream, so that both are at one position whenever they have had the same last one.
//!
//! # Invariants
//! - Nothing is applied that the stream has not shipped: the tables are never of a later moment than the others.
//! - The stream pauses for [`PAUSE_MAX`] at most, and only while what is missing is less than [`CLOSE_BYTES`].
//! - What waits here is within `limits.queue_bytes`; the rest waits on the source.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Ask, Late, Tasks, or_ended};
use crate::failpoint;
use crate::flow::batch::{Batch, IN_FLIGHT_MAX};
use crate::flow::ledger::{BatchNumber, FlushLsn};
use crate::flow::shipment::Shipment;
use crate::flow::spill::{self, SpillSpace};
use crate::names::TableName;
use crate::pg::PgLsn;
use crate::pipeline::error::SessionError;
use crate::schema::listing::Copied;
use crate::sink::replica::{Events, ReplicaSink, SinkSettings, Synced};
use crate::sink::{self, Outcome};
use crate::source::{
    self, IntakeLimits, MadeOf, Received, SlotUse, SourcePosition, SourceSettings,
};

/// Less than that is caught up with in a moment.
const CLOSE_BYTES: u64 = 4 << 20;

/// The stream does not wait longer.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One copy of the slot that is read, and the transactions that come of it.
pub(super) struct LateReading {
    transactions: mpsc::Receiver<Received>,
    /// Those that the stream has not shipped yet.
    waiting: VecDeque<Received>,
    /// The end of the last one that came.
    seen: PgLsn,
    shipment: Shipment<OwnedSemaphorePermit>,
    flush: watch::Sender<FlushLsn>,
}

impl LateReading {
    fn take(&mut self, received: Received) {
        self.seen = received.transaction.end_lsn;
        self.waiting.push_back(received);
    }

    /// Lets those go that end at `bound` or before.
    fn up_to(&mut self, bound: PgLsn) {
        let ends = |received: &Received| received.transaction.end_lsn;
        while self.waiting.front().is_some_and(|next| ends(next) <= bound)
            && let Some(next) = self.waiting.pop_front()
        {
            self.shipment.receive(next);
        }
    }
}

/// Where transactions go.
struct LateSink {
    batches: mpsc::Sender<Arc<Batch>>,
    outcomes: mpsc::Receiver<Outcome<SessionError>>,
}

impl Late {
    /// Begins to read a copy of the slot; returns once it is there, so that nothing behind a snapshot that is taken afterwards
    /// is missed.
    pub(super) async fn read(&self, tasks: &mut Tasks) -> Result<LateReading, SessionError> {
        let limits = &self.config.limits;
        let start = PgLsn::from(0);
        let (bytes, changes) = (limits.batch_bytes, limits.batch_changes);
        let shipment = Shipment::resume(BatchNumber(0), start, bytes, changes);
        let (flush, flush_seen) = watch::channel(shipment.flush_lsn());
        let (received, transactions) = source::queue();
        let (position, mut position_seen) = watch::channel(SourcePosition::default());
        let settings = SourceSettings {
            conninfo: self.source(),
            stream: self.stream.clone(),
            slot: SlotUse::Late,
            start,
            // Nobody has looked at the types of these tables yet.
            binary: false,
            limits: IntakeLimits::of(limits),
            catch_up_bytes: limits.catch_up_bytes,
            types: MadeOf::default(),
        };
        let directory = spill::directory_of(&limits.spill_directory, &self.stream.late());
        let space = SpillSpace::open(directory, limits.spill_bytes)?;
        tasks.spawn(async move {
            let reading = source::run(settings, space, received, flush_seen, position);
            Ok(Box::pin(reading).await?)
        });
        let begun = position_seen.wait_for(|position| position.wal_end.is_some());
        or_ended(tasks, begun)
            .await?
            .map_err(|_| SessionError::TaskLost)?;
        Ok(LateReading {
            transactions,
            waiting: VecDeque::new(),
            seen: start,
            shipment,
            flush,
        })
    }

    /// Applies what comes until the stream waits and the tables are where it is; returns that position. They hold everything up
    /// to `snapshot` already.
    pub(super) async fn catch_up(
        &self,
        mut reading: LateReading,
        tables: HashMap<TableName, Copied>,
        snapshot: PgLsn,
        tasks: &mut Tasks,
    ) -> Result<PgLsn, SessionError> {
        let mut sink = self.sink(tables, tasks).await?;
        let mut shipped_seen = self.shipped.clone();
        let mut paused: Option<(PgLsn, Instant)> = None;
        loop {
            let shipped = *shipped_seen.borrow_and_update();
            let bound = paused.map_or(shipped, |(at, _)| at);
            reading.up_to(bound);
            sink.apply(&mut reading, tasks).await?;
            let missing = u64::from(bound).saturating_sub(u64::from(reading.seen));
            match paused {
                Some((at, _)) if missing == 0 => return Ok(at),
                Some((_, since)) if since.elapsed() >= PAUSE_MAX => {
                    let _ = self.asks.send(Ask::GoOn).await;
                    paused = None;
                    // It is to get ahead before it is asked again.
                    sleep(PAUSE_MAX).await;
                    continue;
                }
                None if bound >= snapshot && missing < CLOSE_BYTES => {
                    paused = Some((self.pause().await?, Instant::now()));
                    failpoint::hit("late:paused");
                    continue;
                }
                _ => {}
            }
            let until = paused.map(|(_, since)| since + PAUSE_MAX);
            tokio::select! {
                biased;
                received = or_ended(tasks, reading.transactions.recv()) => {
                    reading.take(received?.ok_or(SessionError::TaskLost)?);
                    while let Ok(received) = reading.transactions.try_recv() {
                        reading.take(received);
                    }
                }
                changed = shipped_seen.changed() => changed.map_err(|_| SessionError::TaskLost)?,
                () = at(until) => {}
            }
        }
    }

    /// Has the stream wait; says up to where everything is applied.
    async fn pause(&self) -> Result<PgLsn, SessionError> {
        let (answer, answered) = oneshot::channel();
        let asked = self.asks.send(Ask::Pause(answer)).await;
        asked.map_err(|_| SessionError::TaskLost)?;
        answered.await.map_err(|_| SessionError::TaskLost)
    }

    async fn sink(
        &self,
        tables: HashMap<TableName, Copied>,
        tasks: &mut Tasks,
    ) -> Result<LateSink, SessionError> {
        let replica = self.replica();
        let (sink, batches) = ReplicaSink::connect(
            &replica,
            SinkSettings {
                lanes: 1,
                spread_changes: u64::MAX,
                events: Events::OfItsTables,
                ..SinkSettings::of(&self.config, self.stream.late(), self.term)
            },
            Synced {
                tables,
                listed_by: self.stream.clone(),
                as_of: PgLsn::from(u64::MAX),
                beside: None,
                left_out: HashSet::new(),
                sends_generated: self.sends_generated,
            },
        )
        .await?;
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        tasks.spawn(async move {
            sink::hand_on(sink, outcomes).await;
            // Its last outcome says what was wrong; who waits for another one will not wait in vain.
            sleep(PAUSE_MAX).await;
            Ok(())
        });
        Ok(LateSink {
            batches,
            outcomes: outcomes_seen,
        })
    }
}

impl LateSink {
    /// Applies what may go, and lets the copy of the slot move on.
    async fn apply(
        &mut self,
        reading: &mut LateReading,
        tasks: &mut Tasks,
    ) -> Result<(), SessionError> {
        while let Some(batch) = reading.shipment.ship() {
            let number = batch.number;
            let sent = self.batches.send(Arc::new(batch)).await;
            sent.map_err(|_| SessionError::TaskLost)?;
            let outcome = or_ended(tasks, self.outcomes.recv()).await?;
            outcome.ok_or(SessionError::TaskLost)?.result?;
            if let Some(flush) = reading.shipment.durable(number) {
                reading.flush.send_replace(flush);
            }
            failpoint::hit("late:catching-up");
        }
        Ok(())
    }
}

/// Ends at that time; without one, never.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
