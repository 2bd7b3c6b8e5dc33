//! The sink task of one session: batches in, outcomes out, in order.
//!
//! Between batches it adds the constraints of the initial copy that had to wait for the stream. It owns
//! the session with the replica; the pipeline hears of it only through outcomes.

use tokio::sync::mpsc;

use super::error::SessionError;
use crate::pg::{self, ConnInfo, PgLsn};
use crate::sink::replica::{Beside, Outcome, ReplicaSink, SinkError};
use crate::snapshot;
use crate::stream::StreamName;

/// The sink task: batches in, outcomes out, in order.
pub(super) async fn apply_batches(
    mut sink: ReplicaSink,
    outcomes: mpsc::Sender<Outcome>,
    mut deferred: Deferred,
) -> Option<SessionError> {
    loop {
        deferred.look_beside();
        // A constraint locks two tables; a batch that holds one and wants the other would be a deadlock.
        sink.one_by_one(deferred.is_waiting());
        let outcome = sink.next().await?;
        let end_lsn = outcome.batch.end_lsn();
        let failed = outcome.result.is_err();
        if outcomes.send(outcome).await.is_err() || failed {
            return None;
        }
        if let Err(error) = deferred.passed(end_lsn).await {
            return Some(error);
        }
    }
}

/// Constraints of the initial copy that hold only once the stream has passed its newest snapshot.
pub(super) struct Deferred {
    pub(super) replica: ConnInfo,
    pub(super) stream: StreamName,
    pub(super) after: Option<PgLsn>,
    /// Tables that join the stream may have brought more.
    pub(super) beside: Beside,
    pub(super) joined: Option<PgLsn>,
}

impl Deferred {
    /// Whether there may be some.
    fn is_waiting(&self) -> bool {
        self.after.is_some()
    }

    /// Takes in what came with tables that have joined the stream.
    fn look_beside(&mut self) {
        let newest = self.beside.newest();
        if newest > self.joined {
            self.joined = newest;
            self.after = self.after.max(newest);
        }
    }

    /// Adds what is due. It locks tables: nothing may be in flight, and later batches wait.
    pub(super) async fn passed(&mut self, end_lsn: PgLsn) -> Result<(), SessionError> {
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
