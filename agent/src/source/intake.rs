//! From pgoutput messages to the queue, whichever way they came.
//!
//! # Invariants
//! - Received and not yet applied transactions hold at most `limits.queue_bytes`: who brings messages waits
//!   here until there is room.
//! - Of transactions without an end, `limits.transaction_bytes` are in memory; the rest is in spill files.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, watch};

use super::types::{self, Types};
use super::{Received, SourceError, SourcePosition, SourceSettings, subtransactions};
use crate::config::Limits;
use crate::flow::spill::{SpillSpace, Spills};
use crate::flow::transaction::{Assembler, Complete, Ended};
use crate::pg::{ConnInfo, PgLsn, Session};
use crate::time::Micros;

/// The questions asked in passing take milliseconds; a source that needs longer is in trouble.
const STATEMENT_TIMEOUT: &str = "60s";

/// What a message led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TakenIn {
    /// Part of a transaction.
    Part,
    /// A transaction that committed at this time is in the queue.
    Transaction(Micros),
    /// Nobody wants transactions any more.
    Unwanted,
}

/// What is done for as long as the intake waits.
pub(super) trait Meanwhile: Send {
    /// Waits.
    fn during<T: Send>(
        &mut self,
        waiting: impl Future<Output = T> + Send,
    ) -> impl Future<Output = Result<T, SourceError>> + Send;
}

/// Nothing: nobody expects to hear of us.
pub(super) struct Nothing;

impl Meanwhile for Nothing {
    async fn during<T: Send>(
        &mut self,
        waiting: impl Future<Output = T> + Send,
    ) -> Result<T, SourceError> {
        Ok(waiting.await)
    }
}

/// What the intake may hold.
#[derive(Clone, Copy, Debug)]
pub struct IntakeLimits {
    /// `limits.queue_bytes`
    pub queue_bytes: u64,
    /// `limits.transaction_bytes`
    pub transaction_bytes: u64,
}

impl IntakeLimits {
    /// As they are configured.
    pub fn of(limits: &Limits) -> Self {
        Self {
            queue_bytes: limits.queue_bytes,
            transaction_bytes: limits.transaction_bytes,
        }
    }
}

/// Who answers the questions that a walsender cannot answer while it streams.
struct Ordinary {
    conninfo: ConnInfo,
    session: Session,
}

/// Puts messages together and hands transactions over.
pub(super) struct Intake {
    assembler: Assembler,
    spills: Spills,
    transaction_bytes: u64,
    /// None where messages come as if nothing had been streamed: then there is nothing to ask.
    ordinary: Option<Ordinary>,
    types: Types,
    budget: Arc<Semaphore>,
    budget_bytes: u64,
    queue: mpsc::Sender<Received>,
    /// As far as we have come; told once per read, because telling costs more than a message does.
    pub(super) here: SourcePosition,
    position: watch::Sender<SourcePosition>,
}

impl Intake {
    pub(super) fn new(
        settings: &SourceSettings,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
    ) -> Self {
        let session = Session::new(settings.stream.application_name("questions"))
            .set("statement_timeout", STATEMENT_TIMEOUT);
        let ordinary = Ordinary {
            conninfo: settings.conninfo.clone(),
            session,
        };
        let mut intake = Self::of_log(settings.limits, settings.start, space, queue, position);
        intake.ordinary = Some(ordinary);
        intake.types = Types::new(Arc::clone(&settings.types));
        intake
    }

    /// For messages of a change log.
    pub(super) fn of_log(
        limits: IntakeLimits,
        start: PgLsn,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
    ) -> Self {
        let budget = usize::try_from(limits.queue_bytes)
            .unwrap_or(usize::MAX)
            .min(Semaphore::MAX_PERMITS)
            .min(u32::MAX as usize);
        Self {
            assembler: Assembler::new(start),
            spills: Spills::new(space),
            transaction_bytes: limits.transaction_bytes,
            ordinary: None,
            types: Types::default(),
            budget: Arc::new(Semaphore::new(budget)),
            budget_bytes: budget as u64,
            queue,
            here: SourcePosition::default(),
            position,
        }
    }

    /// The end of the last transaction that was handed over.
    pub(super) fn end_lsn(&self) -> PgLsn {
        self.assembler.end_lsn()
    }

    /// Whether a transaction without an end has grown beyond what is kept in memory.
    pub(super) fn is_spilling(&self) -> bool {
        !self.spills.is_empty()
    }

    /// Drops transactions without an end: whoever brings the next messages begins at
    /// [`Intake::end_lsn`] and brings them again.
    pub(super) fn restart(&mut self) {
        self.assembler.restart();
        self.types.restart();
        self.spills.clear();
    }

    /// Notes where the source's WAL ends, as far as has been told.
    pub(super) fn at(&mut self, wal_end: PgLsn) {
        self.here.wal_end = self.here.wal_end.max(Some(wal_end));
    }

    /// Tells of the position.
    pub(super) fn tell(&self) {
        self.position.send_replace(self.here);
    }

    /// Takes one message; waits while the queue is full.
    pub(super) async fn take(
        &mut self,
        data: Bytes,
        meanwhile: &mut impl Meanwhile,
    ) -> Result<TakenIn, SourceError> {
        self.here.bytes += data.len() as u64;
        self.tell_types(&data, meanwhile).await?;
        match self.assembler.push(data)? {
            None => {
                self.relieve()?;
                Ok(TakenIn::Part)
            }
            Some(Ended::Committed(complete)) => self.hand_over(*complete, meanwhile).await,
            Some(Ended::Aborted { xid }) => {
                self.spills.discard(xid);
                self.types.take_unseen(xid);
                Ok(TakenIn::Part)
            }
        }
    }

    /// Before a relation is described: what its types are made of.
    async fn tell_types(
        &mut self,
        data: &Bytes,
        meanwhile: &mut impl Meanwhile,
    ) -> Result<(), SourceError> {
        let Some(ordinary) = &self.ordinary else {
            return Ok(());
        };
        let wanted = self.assembler.unknown_types(data)?;
        let is_unknown = |oid: &u32| self.types.get(*oid).is_none();
        let asked: Vec<u32> = wanted.iter().copied().filter(is_unknown).collect();
        if !asked.is_empty() {
            let committed = self.assembler.whole();
            let Ordinary { conninfo, session } = ordinary;
            let asking = Box::pin(types::ask(conninfo, session, &asked, committed));
            let found = meanwhile.during(asking).await??;
            self.types.know(found);
        }
        for oid in wanted {
            let made_of = self.types.get(oid).cloned();
            if made_of.is_none() {
                self.types.not_seen(self.assembler.block(), oid);
            }
            self.assembler
                .tell_made_of(oid, made_of.unwrap_or_default());
        }
        Ok(())
    }

    /// A transaction that has ended may have created types that could not be seen before.
    async fn expect_types_seen(
        &mut self,
        xid: u32,
        meanwhile: &mut impl Meanwhile,
    ) -> Result<(), SourceError> {
        let unseen = self.types.take_unseen(xid);
        let Some(ordinary) = self.ordinary.as_ref().filter(|_| !unseen.is_empty()) else {
            return Ok(());
        };
        let Ordinary { conninfo, session } = ordinary;
        let asking = Box::pin(types::ask(conninfo, session, &unseen, Some(xid)));
        match meanwhile.during(asking).await??.is_empty() {
            true => Ok(()),
            false => Err(SourceError::NewType),
        }
    }

    /// Moves changes to disk until what is in memory is within the limit.
    fn relieve(&mut self) -> Result<(), SourceError> {
        while self.assembler.pending_bytes() > self.transaction_bytes {
            let Some(xid) = self.assembler.largest_open() else {
                break;
            };
            let pending = self.assembler.take_pending(xid);
            tokio::task::block_in_place(|| self.spills.append(xid, &pending))?;
        }
        Ok(())
    }

    /// Drops what was rolled back and what the walsender has not told of as such.
    async fn settle(
        &mut self,
        complete: &mut Complete,
        meanwhile: &mut impl Meanwhile,
    ) -> Result<(), SourceError> {
        let subtransactions: Vec<u32> = complete.subtransactions().collect();
        let Some(ordinary) = self
            .ordinary
            .as_ref()
            .filter(|_| !subtransactions.is_empty())
        else {
            return Ok(());
        };
        let asking = Box::pin(subtransactions::rolled_back(
            &ordinary.conninfo,
            &ordinary.session,
            &subtransactions,
            complete.end_lsn(),
        ));
        let rolled_back = meanwhile.during(asking).await??;
        if !rolled_back.is_empty() {
            tracing::info!(
                xid = complete.xid(),
                subtransactions = rolled_back.len(),
                "left out what the source has rolled back without telling"
            );
        }
        for subxid in rolled_back {
            complete.abort(subxid);
        }
        Ok(())
    }

    async fn hand_over(
        &mut self,
        mut complete: Complete,
        meanwhile: &mut impl Meanwhile,
    ) -> Result<TakenIn, SourceError> {
        self.settle(&mut complete, meanwhile).await?;
        self.expect_types_seen(complete.xid(), meanwhile).await?;
        let (mut transaction, aborted) = complete.into_transaction();
        let xid = transaction.xid;
        if self.spills.holds(xid) {
            let spills = &mut self.spills;
            transaction.spilled = tokio::task::block_in_place(|| spills.finish(xid, aborted))?;
        }
        let commit_time = transaction.commit_time;
        // A single transaction above the whole budget takes all of it.
        let bytes = transaction.bytes.clamp(1, self.budget_bytes);
        let bytes = u32::try_from(bytes).expect("the budget fits");
        let budget = Arc::clone(&self.budget);
        let permit = match Arc::clone(&budget).try_acquire_many_owned(bytes) {
            Ok(permit) => permit,
            Err(_) => {
                // We may stand here for long: let it be seen how far we are.
                self.tell();
                meanwhile
                    .during(budget.acquire_many_owned(bytes))
                    .await?
                    .expect("the semaphore is never closed")
            }
        };
        let received = Received {
            transaction,
            permit,
        };
        let wanted = match self.queue.try_send(received) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(received)) => {
                self.tell();
                meanwhile.during(self.queue.send(received)).await?.is_ok()
            }
        };
        Ok(match wanted {
            true => TakenIn::Transaction(commit_time),
            false => TakenIn::Unwanted,
        })
    }
}
