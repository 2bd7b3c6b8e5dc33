//! Looks at the replica for what is protected, and writes it down: for the page, the status and the metrics.
//!
//! It reads what the source told in-band and what is here, so it says the same as `dr-agent status` and a promotion do.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::error::SessionError;
use crate::error::chain;
use crate::names::stream::StreamName;
use crate::observe::status::StatusCell;
use crate::pg::{self, ConnInfo, PgError, Session};
use crate::time;
use crate::watch::coverage;

/// How often it is looked without being told.
const LOOK_EVERY: Duration = Duration::from_secs(20);

/// What was seen longer ago is not known any more.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// The replica is at it for one part of the time in so many, however much there is.
const LOOK_RESTS: u32 = 20;

/// The task of one session.
pub(super) struct Cover {
    pub(super) replica: ConnInfo,
    pub(super) stream: StreamName,
    pub(super) status: StatusCell,
    /// Told when a table was set aside, or came back.
    pub(super) changed: Arc<Notify>,
}

impl Cover {
    /// Looks for as long as the session lasts. What it does not get to know is not known after a while.
    pub(super) async fn run(self) -> Option<SessionError> {
        loop {
            let began = Instant::now();
            match self.look().await {
                Ok(coverage) => self.status.covered(coverage, time::now()),
                Err(error) => {
                    tracing::debug!(stream = %self.stream, error = %chain(&error), "no look at what is protected");
                }
            }
            let rests = (began.elapsed() * LOOK_RESTS).clamp(LOOK_EVERY, LOOK_AT_LEAST_EVERY);
            let _ = timeout(rests, self.changed.notified()).await;
            // Several tables come or go together.
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn look(&self) -> Result<coverage::Coverage, PgError> {
        let session = Session::new(self.stream.application_name("cover"));
        let client = pg::connect(&self.replica, &session).await?;
        coverage::of(&client, &self.stream).await
    }
}
