//! A change log as the source: messages that somebody has read become transactions in the queue.
//!
//! The same intake as behind a slot, and the same limits; but nobody is told how far we are.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::intake::{Intake, Nothing, Taken};
use super::{IntakeLimits, Received, SourceError, SourcePosition};
use crate::pg::PgLsn;
use crate::spill::SpillSpace;

/// Takes the messages of a change log.
pub struct LogIntake(Intake);

impl LogIntake {
    /// Begins behind the transaction that ends at `start`.
    pub fn new(
        limits: IntakeLimits,
        start: PgLsn,
        space: SpillSpace,
        queue: mpsc::Sender<Received>,
    ) -> Self {
        let (position, _) = watch::channel(SourcePosition::default());
        Self(Intake::of_log(limits, start, space, queue, position))
    }

    /// The end of the last transaction that was handed over.
    pub fn end_lsn(&self) -> PgLsn {
        self.0.end_lsn()
    }

    /// Takes one message; waits while the queue is full. False once nobody wants transactions any more.
    ///
    /// # Errors
    /// [`SourceError`]
    pub async fn take(&mut self, message: Bytes) -> Result<bool, SourceError> {
        Ok(self.0.take(message, &mut Nothing).await? != Taken::Unwanted)
    }
}
