//! The backlog: where the source and a slot stand, and whether it is worth reading what lies between in windows.
//!
//! # What it does not do
//! It asks nothing while the stream is on time: how late it is, the stream itself tells.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::{SlotUse, SourceSettings};
use crate::error::chain;
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session, slot};

/// Before this, the backlog cannot be worth it.
const LATE: Duration = Duration::from_secs(10);

/// A walsender that has just taken over is given this long to show how it does.
const REST: Duration = Duration::from_secs(20);

/// The same after the other way did not work: what was in the way then is likely to be still there.
const LONG_REST: Duration = Duration::from_secs(600);

/// Looks at the distance now and then.
pub(super) struct BacklogWatch {
    conninfo: ConnInfo,
    session: Session,
    slot: String,
    catch_up_bytes: u64,
    /// Windows are of the stream's own slot.
    has_windows: bool,
    not_before: Instant,
}

impl BacklogWatch {
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

/// From where decoding begins (`restart_lsn`) to the end of a window. With a transaction that has been running
/// for longer, the walsender does better: it reads that WAL once, and streams.
const REACH_MAX: u64 = 1 << 30;

/// The part of `limits.catch_up_bytes` in the first window, one in so many; the replica waits for it. Each
/// further one is up to twice as large, because each makes the source read again the WAL since the beginning of the
/// oldest transaction that was running.
const FIRST: u64 = 8;

/// Bytes of WAL in the first window.
pub(super) fn first_size(worth: u64) -> u64 {
    (worth / FIRST).max(1)
}

/// Where the source and a slot stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Positions {
    /// The end of the WAL on the source's disk.
    pub(super) written: PgLsn,
    /// What the slot was last moved to.
    pub(super) confirmed: PgLsn,
    /// Where decoding begins.
    pub(super) restart: PgLsn,
    /// Whether a session is using the slot.
    pub(super) active: bool,
}

impl Positions {
    /// None where this way cannot be gone: without the slot, or on a physical standby.
    pub(super) async fn of(client: &Client, slot: &str) -> Result<Option<Self>, PgError> {
        const WRITTEN: &str = "
            SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery()
                        THEN pg_catalog.pg_current_wal_flush_lsn() END";
        let state = slot::slot_state(client, slot).await?;
        let written: Option<PgLsn> = client.query_one(WRITTEN, &[]).await?.get(0);
        Ok(state.and_then(|state| {
            Some(Self {
                written: written?,
                confirmed: state.confirmed_flush_lsn?,
                restart: state.restart_lsn?,
                active: state.active,
            })
        }))
    }

    pub(super) fn behind(&self, received: PgLsn) -> u64 {
        u64::from(self.written).saturating_sub(u64::from(received))
    }

    /// Whether windows are worth it for a backlog that begins at `received`: it has more than `worth` bytes of WAL, and a
    /// first window is possible.
    pub(super) fn is_far_behind(&self, received: PgLsn, worth: u64) -> bool {
        self.window(received, first_size(worth), worth).is_some()
    }

    /// Where a window of `size` ends after `received`; none where the walsender should go on, because no more
    /// than `nearly` is left or a transaction has been running for too long.
    pub(super) fn window(&self, received: PgLsn, size: u64, nearly: u64) -> Option<PgLsn> {
        // What the slot was moved to may be beyond the last transaction that concerned us.
        let begin = u64::from(received.max(self.confirmed));
        let written = u64::from(self.written);
        if written.saturating_sub(begin) <= nearly {
            return None;
        }
        let end = written.min(begin + size);
        let reach = end.saturating_sub(u64::from(self.restart));
        (reach <= REACH_MAX).then_some(PgLsn::from(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn positions(restart: u64, confirmed: u64, written: u64) -> Positions {
        Positions {
            written: PgLsn::from(written * MIB),
            confirmed: PgLsn::from(confirmed * MIB),
            restart: PgLsn::from(restart * MIB),
            active: false,
        }
    }

    fn window(positions: Positions, received: u64, size: u64) -> Option<u64> {
        let received = PgLsn::from(received * MIB);
        let end = positions.window(received, size * MIB, 8 * MIB);
        end.map(|end| u64::from(end) / MIB)
    }

    #[test]
    fn windows_end_where_the_wal_does_and_little_is_left_to_the_walsender() {
        assert_eq!(window(positions(100, 100, 400), 100, 64), Some(164));
        assert_eq!(window(positions(100, 100, 150), 100, 64), Some(150));
        assert_eq!(window(positions(100, 100, 109), 100, 64), Some(109));
        assert_eq!(window(positions(100, 100, 108), 100, 64), None);
        // A position that is told by a server behind the one before.
        assert_eq!(window(positions(100, 100, 90), 100, 64), None);
    }

    #[test]
    fn a_window_begins_behind_what_did_not_concern_us() {
        assert_eq!(window(positions(100, 200, 400), 110, 64), Some(264));
        assert_eq!(window(positions(100, 100, 400), 300, 64), Some(364));
    }

    #[test]
    fn a_backlog_behind_a_transaction_that_runs_for_long_is_left_to_the_walsender() {
        let far = |restart, written| {
            let slot = positions(restart, 2000, written);
            slot.is_far_behind(PgLsn::from(2000 * MIB), 64 * MIB)
        };
        assert!(far(2000, 2065));
        assert!(!far(2000, 2064));
        assert!(far(984, 9000));
        assert!(!far(983, 9000));
    }

    #[test]
    fn no_window_reaches_further_than_the_source_shall_keep_in_a_file() {
        assert_eq!(window(positions(0, 1000, 4000), 1000, 24), Some(1024));
        assert_eq!(window(positions(0, 1000, 4000), 1000, 25), None);
    }
}
