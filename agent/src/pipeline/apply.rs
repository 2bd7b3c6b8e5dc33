//! The sink task of one session: batches in, outcomes out, in order.
//!
//! Between batches it adds the constraints of the initial copy that had to wait for the stream. It owns
//! the session with the replica; the pipeline hears of it only through outcomes.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::SessionError;
use crate::copy;
use crate::names::stream::StreamName;
use crate::observe::status::StatusCell;
use crate::pg::{self, ConnInfo, PgLsn};
use crate::sink::replica::{Beside, ReplicaSink, SinkError};
use crate::sink::{Outcome, Sink as _};

/// The sink task: batches in, outcomes out, in order.
pub(super) async fn apply_batches(
    mut sink: ReplicaSink,
    outcomes: mpsc::Sender<Outcome<SessionError>>,
    mut deferred: DeferredStatements,
) -> Option<SessionError> {
    loop {
        deferred.look_beside();
        // A constraint locks two tables; a batch that holds one and wants the other would be a deadlock.
        sink.one_by_one(deferred.is_due());
        let outcome = sink.next().await?;
        let end_lsn = outcome.batch.end_lsn();
        let failed = outcome.result.is_err();
        if outcomes.send(outcome.handed_on()).await.is_err() || failed {
            return None;
        }
        if let Err(error) = deferred.passed(end_lsn).await {
            return Some(error);
        }
    }
}

/// What the replica refuses is tried again this soon at first, and this late at last: each time locks tables and reads them.
const AGAIN: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(3600)];

/// Constraints of the initial copy that hold only once the stream has passed its newest snapshot.
pub(super) struct DeferredStatements {
    pub(super) replica: ConnInfo,
    pub(super) stream: StreamName,
    pub(super) after: Option<PgLsn>,
    /// Tables that join the stream may have brought more.
    pub(super) beside: Beside,
    pub(super) joined: Option<PgLsn>,
    /// Shows what the replica refuses.
    pub(super) status: StatusCell,
    /// When that is tried again, and how long it was waited for.
    pub(super) again: Option<(Instant, Duration)>,
}

impl DeferredStatements {
    /// Whether some may be added behind the next batch.
    fn is_due(&self) -> bool {
        let later = self.again.is_some_and(|(at, _)| Instant::now() < at);
        self.after.is_some() && !later
    }

    /// Takes in what came with tables that have joined the stream.
    fn look_beside(&mut self) {
        let newest = self.beside.newest();
        if newest > self.joined {
            self.joined = newest;
            self.again = None;
            self.after = self.after.max(newest);
        }
    }

    /// Adds what is due. It locks tables: nothing may be in flight, and later batches wait.
    pub(super) async fn passed(&mut self, end_lsn: PgLsn) -> Result<(), SessionError> {
        if self.after.is_none_or(|after| end_lsn < after) {
            return Ok(());
        }
        if self.again.is_some_and(|(at, _)| Instant::now() < at) {
            return Ok(());
        }
        let session = crate::sink::replica::session(&self.stream);
        let mut client = pg::connect(&self.replica, &session)
            .await
            .map_err(SinkError::from)?;
        let ran = copy::run_deferred(&mut client, &self.stream, copy::Moment::Streaming)
            .await
            .map_err(SessionError::Deferred)?;
        self.again = (!ran.refused.is_empty()).then(|| {
            let [first, last] = AGAIN;
            let pause = self.again.map_or(first, |(_, pause)| (pause * 2).min(last));
            (Instant::now() + pause, pause)
        });
        if ran.waiting == 0 && ran.refused.is_empty() {
            self.after = None;
        }
        self.status.update(|status| {
            status.missing_constraints = ran.refused.into_iter().collect();
        });
        Ok(())
    }
}
