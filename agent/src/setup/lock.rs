//! The right to work on a stream: an advisory lock on the server that is written to, held by a session until it ends.
//!
//! On the replica while it is set up and while a Kinesis stream is applied to it; on the source while its changes are sent into
//! one. A slot alone does not give that right: while a backlog is read in windows nobody streams from it.
//!
//! # Invariants
//! - Who holds the right for longer looks after its session ([`Right::lost`]): a server that has ended it gives the right to another.
//!
//! # What it does not do
//! It does not fence: an agent that has lost the right may go on for a moment. That costs work, and no data: every way of reading
//! a slot looks whether somebody has moved it ([`crate::source`]), and every apply transaction compares progress and term.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::{SetupError, Side};
use crate::names::stream::StreamName;
use crate::pg::PgError;

/// How long a session that has ended may take to let go of its locks.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// How often a session is looked after. Often enough for whatever forgets idle connections on the way.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A session that has not been heard of for so long is ended by its server.
const SILENT_MAX: Duration = Duration::from_secs(60);

/// Far above what a busy server needs for a statement that does nothing.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Holds the right to work on this stream until the session ends.
pub(super) async fn take(
    client: &Client,
    side: Side,
    stream: &StreamName,
) -> Result<(), SetupError> {
    const SQL: &str = "SELECT pg_try_advisory_lock(hashtextextended('dr_agent:' || $1::text, 0))";
    let deadline = Instant::now() + LOCK_WITHIN;
    loop {
        let row = client
            .query_typed_one(SQL, &[(&stream.as_str(), Type::TEXT)])
            .await
            .map_err(|error| SetupError::sql(side, "lock the stream")(error.into()))?;
        if row.get(0) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(SetupError::Busy {
                side,
                stream: stream.to_string(),
            });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A session that holds the right to work on a stream.
#[derive(Debug)]
pub(super) struct Right {
    side: Side,
    client: Client,
}

impl Right {
    /// What this session has taken.
    pub(super) async fn held_by(client: Client, side: Side) -> Result<Self, SetupError> {
        // As a walsender does: an agent whose machine is gone keeps nobody away for hours.
        let timeout = format!("SET idle_session_timeout = '{}s'", SILENT_MAX.as_secs());
        client
            .batch_execute(&timeout)
            .await
            .map_err(|error| SetupError::sql(side, "hold the right to the stream")(error.into()))?;
        Ok(Self { side, client })
    }

    /// Ends once the session does not answer any more.
    pub(super) async fn lost(&self) -> SetupError {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let asking = self.client.simple_query("");
            let source = match tokio::time::timeout(ANSWER_WITHIN, asking).await {
                Ok(Ok(_)) => continue,
                Ok(Err(error)) => error.into(),
                Err(_) => PgError::Timeout {
                    doing: "look after it",
                    after: ANSWER_WITHIN,
                },
            };
            return SetupError::RightLost {
                side: self.side,
                source,
            };
        }
    }
}
