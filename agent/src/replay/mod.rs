//! Transactions of a change log into a database, through the replica sink, until there are no more.
//!
//! A pipeline without a slot, a lag and a clock: what a batch holds and when it is durable is the same. `restore` builds a
//! database with it, and a promotion empties the Kinesis stream with it.

pub mod drain;
pub mod restore;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::config::Config;
use crate::error::{Class, Classify};
use crate::flow::batch::{Batch, IN_FLIGHT_MAX, Queue};
use crate::flow::ledger::BatchNumber;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::schema::listing::Copied;
use crate::sink::replica::{Outcome, ReplicaSink, SinkError, SinkSettings, SliceLimits, Synced};
use crate::source::Received;
use crate::time::Micros;

/// Why transactions could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The database does not take them.
    #[error("apply the change log")]
    Sink(#[from] SinkError),
    /// A bug.
    #[error("a task of the replay ended without saying why")]
    TaskLost,
}

impl Classify for ReplayError {
    fn class(&self) -> Class {
        match self {
            Self::Sink(error) => error.class(),
            Self::TaskLost => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Sink(error) => error.hint(),
            Self::TaskLost => None,
        }
    }
}

/// How far the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The end of the last transaction that is in it.
    pub end_lsn: PgLsn,
    /// When that committed on the source; none where that is not known.
    pub commit_time: Option<Micros>,
    /// Number of the last batch.
    pub batch: BatchNumber,
    /// Transactions replayed by this run.
    pub transactions: u64,
}

/// Where the transactions go.
pub struct Target<'a> {
    /// The database.
    pub conninfo: &'a ConnInfo,
    /// Whose progress row is kept in it.
    pub stream: &'a StreamName,
    /// The term of that row.
    pub term: i64,
    /// The tables it has, and what is there of them already.
    pub tables: HashMap<TableName, Copied>,
    /// The stream that the transactions are of.
    pub listed_by: &'a StreamName,
    /// A change of another table before this position is ignored; one behind it is an error.
    pub as_of: PgLsn,
    /// Other tables whose changes are ignored wherever they are.
    pub left_out: HashSet<TableName>,
    /// Settings of the sessions, see [`SinkSettings::session`].
    pub session: &'static [(&'static str, &'static str)],
}

/// The sessions by which transactions go into the target.
pub struct Sessions {
    sink: ReplicaSink,
    batches: mpsc::Sender<Arc<Batch>>,
}

impl Sessions {
    /// Opens them.
    ///
    /// # Errors
    /// [`ReplayError`]
    pub async fn connect(config: &Config, target: Target<'_>) -> Result<Self, ReplayError> {
        let limits = &config.limits;
        let settings = SinkSettings {
            stream: target.stream.clone(),
            term: target.term,
            segment: SliceLimits {
                bytes: limits.batch_bytes,
                changes: (limits.batch_changes / 4).max(1),
            },
            lanes: config.replica.lanes,
            spread_changes: limits.spread_changes,
            distance: None,
            session: target.session,
        };
        let synced = Synced {
            tables: target.tables,
            listed_by: target.listed_by.clone(),
            as_of: target.as_of,
            beside: None,
            left_out: target.left_out,
            sends_generated: true,
            domains: None,
        };
        let (sink, batches) = ReplicaSink::connect(target.conninfo, settings, synced).await?;
        Ok(Self { sink, batches })
    }
}

/// Applies transactions until there are no more; `progress` is told after every batch.
///
/// # Errors
/// [`ReplayError`]
pub async fn apply(
    config: &Config,
    sessions: Sessions,
    from: Reached,
    mut transactions: mpsc::Receiver<Received>,
    mut progress: impl FnMut(&Reached),
) -> Result<Reached, ReplayError> {
    let limits = &config.limits;
    let Sessions { mut sink, batches } = sessions;
    let (outcomes, mut outcomes_seen) = mpsc::channel::<Outcome>(IN_FLIGHT_MAX);
    let sinking = tokio::spawn(async move {
        while let Some(outcome) = sink.next().await {
            let failed = outcome.result.is_err();
            if outcomes.send(outcome).await.is_err() || failed {
                return;
            }
        }
    });
    let mut state = State {
        queue: Queue::new(limits.batch_bytes, limits.batch_changes),
        permits: VecDeque::new(),
        last: (from.batch, from.end_lsn),
        in_flight: 0,
        ended: false,
        reached: from,
    };
    let mut batches = Some(batches);
    loop {
        while let Some(batch) = state.next_batch() {
            let sent = batches
                .as_ref()
                .map(|batches| batches.try_send(Arc::new(batch)));
            match sent {
                Some(Ok(())) => {}
                // The sink has failed; its last outcome says why.
                Some(Err(TrySendError::Closed(_))) => break,
                // There is room for as many as may be in flight.
                Some(Err(TrySendError::Full(_))) | None => return Err(ReplayError::TaskLost),
            }
        }
        if state.is_done() {
            batches = None;
        }
        tokio::select! {
            biased;
            outcome = outcomes_seen.recv() => match outcome {
                Some(outcome) => {
                    state.durable(outcome)?;
                    progress(&state.reached);
                }
                None if state.is_done() => break,
                None => return Err(ReplayError::TaskLost),
            },
            received = transactions.recv(), if !state.ended => match received {
                Some(received) => {
                    state.queue.push(received.transaction);
                    state.permits.push_back(received.permit);
                }
                None => state.ended = true,
            },
        }
    }
    drop(batches);
    // It has handed out its last outcome.
    let _ = sinking.await;
    Ok(state.reached)
}

struct State {
    queue: Queue,
    /// Shares of `limits.queue_bytes`, one per transaction that waits or is in flight.
    permits: VecDeque<OwnedSemaphorePermit>,
    last: (BatchNumber, PgLsn),
    in_flight: usize,
    ended: bool,
    reached: Reached,
}

impl State {
    /// The next batch: a full one at once, any other when nothing is in flight.
    fn next_batch(&mut self) -> Option<Batch> {
        let now = match self.in_flight {
            0 => true,
            n => n < IN_FLIGHT_MAX && self.queue.is_full(),
        };
        if !now {
            return None;
        }
        let batch = self.queue.take(self.last.0.next(), self.last.1)?;
        self.last = (batch.number, batch.end_lsn());
        self.in_flight += 1;
        Some(batch)
    }

    fn is_done(&self) -> bool {
        self.ended && self.queue.is_empty() && self.in_flight == 0
    }

    fn durable(&mut self, outcome: Outcome) -> Result<(), ReplayError> {
        let batch = outcome.batch;
        outcome.result?;
        self.in_flight -= 1;
        self.permits.drain(..batch.transactions.len());
        self.reached = Reached {
            end_lsn: batch.end_lsn(),
            commit_time: Some(batch.commit_time()),
            batch: batch.number,
            transactions: self.reached.transactions + batch.transactions.len() as u64,
        };
        Ok(())
    }
}
