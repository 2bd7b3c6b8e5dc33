//! Transactions of a change log into a database, through the replica sink, until there are no more.
//!
//! A pipeline without a slot, a lag and a clock: what a batch holds and when it is durable is the same. `restore` builds a
//! database with it, and a promotion empties the Kinesis stream with it.

pub mod drain;
pub mod restore;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::config::Config;
use crate::error::{Class, Classify};
use crate::flow::batch::{Batch, IN_FLIGHT_MAX, Ship, Spacing};
use crate::flow::ledger::BatchNumber;
use crate::flow::shipment::Shipment;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::schema::listing::Copied;
use crate::sink::replica::{ReplicaSink, SinkError, SinkSettings, Synced};
use crate::sink::{self, Outcome};
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
pub struct ReplayTarget<'a> {
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
pub struct ReplaySessions {
    sink: ReplicaSink,
    batches: mpsc::Sender<Arc<Batch>>,
}

impl ReplaySessions {
    /// Opens them.
    ///
    /// # Errors
    /// [`ReplayError`]
    pub async fn connect(config: &Config, target: ReplayTarget<'_>) -> Result<Self, ReplayError> {
        let settings = SinkSettings {
            session: target.session,
            ..SinkSettings::of(config, target.stream.clone(), target.term)
        };
        let synced = Synced {
            tables: target.tables,
            listed_by: target.listed_by.clone(),
            as_of: target.as_of,
            beside: None,
            left_out: target.left_out,
            sends_generated: true,
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
    sessions: ReplaySessions,
    from: Reached,
    mut transactions: mpsc::Receiver<Received>,
    mut progress: impl FnMut(&Reached),
) -> Result<Reached, ReplayError> {
    let limits = &config.limits;
    let ReplaySessions { sink, batches } = sessions;
    let (outcomes, mut outcomes_seen) = mpsc::channel::<Outcome<ReplayError>>(IN_FLIGHT_MAX);
    let sinking = tokio::spawn(sink::hand_on(sink, outcomes));
    let (bytes, changes) = (limits.batch_bytes, limits.batch_changes);
    let mut state = Applying {
        shipment: Shipment::resume(from.batch, from.end_lsn, bytes, changes),
        // A full batch goes at once, any other when nothing is in flight.
        spacing: Spacing::new(Duration::ZERO, IN_FLIGHT_MAX),
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
                Some(received) => state.shipment.receive(received),
                None => state.ended = true,
            },
        }
    }
    drop(batches);
    // It has handed out its last outcome.
    let _ = sinking.await;
    Ok(state.reached)
}

struct Applying<P> {
    shipment: Shipment<P>,
    spacing: Spacing,
    ended: bool,
    reached: Reached,
}

impl<P> Applying<P> {
    fn next_batch(&mut self) -> Option<Batch> {
        match self.shipment.judge(&self.spacing, Duration::ZERO)? {
            Ship::Now => self.shipment.ship(),
            Ship::In(_) | Ship::AfterAnAnswer => None,
        }
    }

    fn is_done(&self) -> bool {
        self.ended && self.shipment.is_settled()
    }

    fn durable(&mut self, outcome: Outcome<ReplayError>) -> Result<(), ReplayError> {
        outcome.result?;
        let batch = outcome.batch;
        // There is no slot to be told of it.
        let _ = self.shipment.durable(batch.number);
        self.reached = Reached {
            end_lsn: batch.end_lsn(),
            commit_time: Some(batch.commit_time()),
            batch: batch.number,
            transactions: self.reached.transactions + batch.transactions.len() as u64,
        };
        Ok(())
    }
}
