//! A change log as the source: messages that somebody has read become transactions in the queue.
//!
//! The same intake as behind a slot, and the same limits; but nobody is told how far we are.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::intake::{Intake, Nothing, TakenIn};
use super::{IntakeLimits, Received, SourceError, SourcePosition};
use crate::flow::spill::SpillSpace;
use crate::names::history::comes_again;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{self, Message, MessageKind};
use crate::time::Micros;

/// Takes the messages of a change log, in which a transaction may come more than once.
pub struct LogIntake {
    intake: Intake,
    /// The transaction has been handed over before.
    skipping: bool,
    /// By when everything had committed that was handed over; none where nobody looks.
    newest: Option<Micros>,
}

impl LogIntake {
    /// Begins behind the transaction that ends at `start`.
    pub fn new(
        limits: IntakeLimits,
        start: PgLsn,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
    ) -> Self {
        let (position, _) = watch::channel(SourcePosition::default());
        Self::telling(limits, start, space, queue, position)
    }

    /// The same; tells of its position.
    pub(super) fn telling(
        limits: IntakeLimits,
        start: PgLsn,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
    ) -> Self {
        Self {
            intake: Intake::of_log(limits, start, space, queue, position),
            skipping: false,
            newest: None,
        }
    }

    /// Everything that ends where this begins, or before, had committed by then: what comes of it once more must have as well.
    #[must_use]
    pub fn committed_by(mut self, time: Option<Micros>) -> Self {
        self.newest = time;
        self
    }

    /// What comes once more is what was handed over.
    ///
    /// # Errors
    /// [`SourceError::WentBack`]
    pub(super) fn comes_again(
        &self,
        end_lsn: PgLsn,
        commit_time: Micros,
    ) -> Result<(), SourceError> {
        Ok(comes_again(end_lsn, commit_time, self.newest)?)
    }

    /// The end of the last transaction that was handed over.
    pub fn end_lsn(&self) -> PgLsn {
        self.intake.end_lsn()
    }

    /// Drops a transaction without an end: whoever brings the next messages brings it again.
    pub fn restart(&mut self) {
        self.intake.restart();
        self.skipping = false;
    }

    /// Notes how far the log is known to reach.
    pub(super) fn known_up_to(&mut self, lsn: PgLsn) {
        self.intake.at(lsn);
        self.intake.tell();
    }

    /// Takes one message; waits while the queue is full. False once nobody wants transactions any more.
    ///
    /// # Errors
    /// [`SourceError`]
    pub async fn take(&mut self, message: Bytes) -> Result<bool, SourceError> {
        match pgoutput::kind(&message) {
            Some(MessageKind::Begin) => {
                if let Message::Begin(begin) = pgoutput::decode(&message, false)? {
                    self.skipping = begin.final_lsn < self.intake.end_lsn();
                    match self.skipping {
                        true => self.comes_again(begin.final_lsn, begin.commit_time)?,
                        false => {
                            self.newest = self.newest.map(|at| at.max(begin.commit_time));
                        }
                    }
                }
            }
            // A description is needed by later transactions of the same batch.
            Some(MessageKind::Relation) => {
                return Ok(self.intake.take(message, &mut Nothing).await? != TakenIn::Unwanted);
            }
            _ => {}
        }
        if self.skipping {
            return Ok(true);
        }
        Ok(self.intake.take(message, &mut Nothing).await? != TakenIn::Unwanted)
    }
}
