//! The source's look at what its objects are: every few seconds where something was defined, and at all of them every now and then.
//!
//! It tells the replica ([`crate::schema::fingerprint`]), and writes down as commands what no event trigger has written down: on a
//! server that lets nobody create event triggers that is everything.
//!
//! # Invariants
//! - Beside the heartbeat, in a session of its own that waits for no lock; at most one at a time.
//! - The source is at it for one part of the time in so many, whatever its size.
//!
//! # What it does not do
//! It does not compare: the replica does ([`crate::ddl`]).

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::coverage;
use crate::error::chain;
use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, Session};
use crate::schema::fingerprint;

/// What changes without a trace of its own (a role that is renamed) is found with the next whole look.
const WHOLLY_EVERY: Duration = Duration::from_secs(600);

/// Old commands are deleted without anything being defined; then the replica may not compare before the next look.
const AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// The source is at it for one part of the time in so many.
const RESTS: u32 = 20;

/// Of 5,000 tables of 50 columns a whole look takes 8 seconds.
const STATEMENT_TIMEOUT: &str = "300s";

/// The looks of one database.
#[derive(Debug, Default)]
pub(super) struct Looks {
    running: JoinSet<(Result<Option<i32>, PgError>, Duration)>,
    /// When the last one began, and how often something had been defined by then.
    last: Option<(Instant, i64)>,
    wholly: Option<Instant>,
    rests_until: Option<Instant>,
    refused: bool,
}

impl Looks {
    /// Takes what has ended, and looks again where it is time to.
    pub(super) async fn tick(
        &mut self,
        client: &Client,
        (conninfo, stream): (&ConnInfo, &StreamName),
    ) -> Result<(), PgError> {
        self.join(stream);
        let now = Instant::now();
        if !self.running.is_empty() || self.rests_until.is_some_and(|until| until > now) {
            return Ok(());
        }
        let changes: i64 = client.query_typed_one(coverage::CHANGES, &[]).await?.get(0);
        let is_fresh = |(at, then): (Instant, i64)| then == changes && now - at < AT_LEAST_EVERY;
        if self.last.is_some_and(is_fresh) {
            return Ok(());
        }
        self.last = Some((now, changes));
        let wholly = self.wholly.is_none_or(|at| now - at >= WHOLLY_EVERY);
        if wholly {
            self.wholly = Some(now);
        }
        let session = Session::new(stream.application_name("look"))
            .set("statement_timeout", STATEMENT_TIMEOUT)
            .set("lock_timeout", "200ms")
            .set("synchronous_commit", "local");
        let conninfo = conninfo.clone();
        self.running.spawn(async move {
            let looked = async {
                let client = pg::connect(&conninfo, &session).await?;
                fingerprint::look(&client, wholly).await
            };
            (looked.await, now.elapsed())
        });
        Ok(())
    }

    fn join(&mut self, stream: &StreamName) {
        while let Some(ended) = self.running.try_join_next() {
            let (looked, took) = match ended {
                Ok(ended) => ended,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
            self.rests_until = Some(Instant::now() + took * RESTS);
            match looked {
                Ok(Some(0)) => self.refused = false,
                Ok(Some(objects)) => {
                    self.refused = false;
                    tracing::info!(
                        %stream, objects,
                        "these have changed without an event trigger that told of it; they are as they are now on the replica, too, in a moment"
                    );
                }
                // Somebody else is looking, or it had to wait: once more.
                Ok(None) => self.last = None,
                Err(error) => {
                    (self.last, self.wholly) = (None, None);
                    if !std::mem::replace(&mut self.refused, true) {
                        tracing::warn!(%stream, error = %chain(&error), "it could not be looked what the source's objects are; it is tried again");
                    }
                }
            }
        }
    }
}
