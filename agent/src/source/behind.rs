//! Whether a stream has fallen so far behind that another way of reading is worth it.
//!
//! # What it does not do
//! It asks nothing while the stream is on time: how late it is, the stream itself tells.

use std::time::Duration;

use tokio::time::Instant;

use super::positions::Positions;
use super::{SlotUse, SourceSettings};
use crate::error::chain;
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session};

/// Before this, the backlog cannot be worth it.
const LATE: Duration = Duration::from_secs(10);

/// A walsender that has just taken over is given this long to show how it does.
const REST: Duration = Duration::from_secs(20);

/// The same after the other way did not work: what was in the way then is likely to be still there.
const LONG_REST: Duration = Duration::from_secs(600);

/// Looks at the distance now and then.
pub(super) struct Behind {
    conninfo: ConnInfo,
    session: Session,
    slot: String,
    catch_up_bytes: u64,
    /// Windows are of the stream's own slot.
    has_windows: bool,
    not_before: Instant,
}

impl Behind {
    pub(super) fn new(settings: &SourceSettings) -> Self {
        let session = Session::new(settings.stream.application_name("distance"))
            .set("statement_timeout", "15s");
        Self {
            conninfo: settings.conninfo.clone(),
            session,
            slot: settings.stream.to_string(),
            catch_up_bytes: settings.catch_up_bytes,
            has_windows: settings.slot == SlotUse::Own,
            not_before: Instant::now(),
        }
    }

    /// A walsender takes over, because the backlog is read or because that `failed`.
    pub(super) fn rest(&mut self, failed: bool) {
        self.not_before = Instant::now() + if failed { LONG_REST } else { REST };
    }

    /// Whether a stream that is `late` and has come to `received` would do better in windows. Changing over makes the
    /// source decode once more from where the slot begins.
    ///
    /// A source that has no session left for the question is no reason to end a stream that works.
    pub(super) async fn is_far(&mut self, late: Duration, received: PgLsn) -> bool {
        if !self.has_windows || late < LATE || Instant::now() < self.not_before {
            return false;
        }
        match self.positions().await {
            Ok(found) => {
                found.is_some_and(|slot| slot.is_far_behind(received, self.catch_up_bytes))
            }
            Err(error) => {
                tracing::warn!(
                    slot = self.slot, error = %chain(&error),
                    "cannot ask the source how large the backlog is; the walsender goes on"
                );
                self.rest(true);
                false
            }
        }
    }

    async fn positions(&self) -> Result<Option<Positions>, PgError> {
        let client = pg::connect(&self.conninfo, &self.session).await?;
        Positions::of(&client, &self.slot).await
    }
}
