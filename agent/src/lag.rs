//! How far the replica trails the source, and whether that still meets the RPO.
//!
//! Pure: every instant is an argument, in microseconds since 2000-01-01 UTC, PostgreSQL's own
//! epoch, on the source's clock as far as this host agrees with it (`check` measures the skew).
//!
//! # What lag means here
//! The seconds of committed work that would be lost if the source vanished now. It is the largest of:
//! the delay with which the newest applied transaction arrived; the age of the oldest transaction
//! received and not yet applied; and, since a heartbeat is committed at a known interval, the time by
//! which the next one is overdue. The last makes a dead link or a dead source visible: without news the
//! lag grows.

use std::time::Duration;

/// Microseconds since 2000-01-01 UTC.
pub type Micros = i64;

const UNIX_TO_PG_EPOCH_SECONDS: i64 = 946_684_800;

/// Turns a wall-clock time into PostgreSQL's epoch.
pub fn pg_micros(now: std::time::SystemTime) -> Micros {
    let since_unix = now
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_unix.as_micros()).unwrap_or(i64::MAX) - UNIX_TO_PG_EPOCH_SECONDS * 1_000_000
}

/// Turns PostgreSQL's epoch into the wall clock.
pub fn system_time(at: Micros) -> std::time::SystemTime {
    let since_unix = at.saturating_add(UNIX_TO_PG_EPOCH_SECONDS * 1_000_000);
    std::time::UNIX_EPOCH + Duration::from_micros(u64::try_from(since_unix).unwrap_or(0))
}

/// What is known about one stream's lag.
#[derive(Clone, Debug)]
pub struct Lag {
    heartbeat_every: Micros,
    rpo: Micros,
    /// Commit time of the newest applied transaction and the delay with which it was applied.
    applied: Option<(Micros, Micros)>,
    received: Option<Micros>,
    queued_oldest: Option<Micros>,
}

/// The verdict at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Seconds of work that would be lost now; `None` before the first transaction was applied.
    pub lag_seconds: Option<f64>,
    /// Whether that is more than the RPO allows. Unknown counts as breached: nothing is protected yet.
    pub breached: bool,
    /// Seconds by which the last received transaction trails.
    pub received_seconds: Option<f64>,
    /// Age of the oldest transaction received and not yet applied, in seconds; 0 without one.
    pub queued_seconds: f64,
}

impl Lag {
    /// Starts without knowledge.
    pub fn new(heartbeat_every: Duration, rpo: Duration) -> Self {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        Self {
            heartbeat_every: micros(heartbeat_every),
            rpo: micros(rpo),
            applied: None,
            received: None,
            queued_oldest: None,
        }
    }

    /// What the progress row says at start: the replica holds everything up to this commit.
    pub fn resume(&mut self, commit_time: Micros) {
        self.applied = Some((commit_time, 0));
    }

    /// A transaction committed at `commit_time` has arrived.
    pub fn received(&mut self, commit_time: Micros) {
        self.received = Some(commit_time);
    }

    /// The oldest transaction that waits, or none.
    pub fn queued(&mut self, oldest_commit_time: Option<Micros>) {
        self.queued_oldest = oldest_commit_time;
    }

    /// A batch whose last transaction committed at `commit_time` is durable on the replica.
    pub fn applied(&mut self, commit_time: Micros, now: Micros) {
        self.applied = Some((commit_time, (now - commit_time).max(0)));
    }

    /// Commit time of the newest applied transaction.
    pub fn applied_commit_time(&self) -> Option<Micros> {
        self.applied.map(|(commit_time, _)| commit_time)
    }

    /// Judges at `now`.
    pub fn verdict(&self, now: Micros) -> Verdict {
        let overdue = |commit_time: Micros| (now - commit_time - self.heartbeat_every).max(0);
        let queued = self.queued_oldest.map_or(0, |oldest| (now - oldest).max(0));
        let lag = self
            .applied
            .map(|(commit_time, delay)| delay.max(queued).max(overdue(commit_time)));
        Verdict {
            lag_seconds: lag.map(seconds),
            breached: lag.is_none_or(|lag| lag > self.rpo),
            received_seconds: self.received.map(|at| seconds(overdue(at))),
            queued_seconds: seconds(queued),
        }
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a lag of 2^52 microseconds is 142 years"
)]
fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Micros = 1_000_000;

    fn lag() -> Lag {
        Lag::new(Duration::from_secs(1), Duration::from_secs(30))
    }

    #[test]
    fn an_idle_source_with_heartbeats_has_the_lag_of_its_last_heartbeat() {
        let mut lag = lag();
        lag.received(100 * SECOND);
        lag.applied(100 * SECOND, 100 * SECOND + 40_000);
        let verdict = lag.verdict(100 * SECOND + 900_000);
        assert_eq!(verdict.lag_seconds, Some(0.04));
        assert!(!verdict.breached);
    }

    #[test]
    fn silence_makes_the_lag_grow_until_the_rpo_is_breached() {
        let mut lag = lag();
        lag.applied(100 * SECOND, 100 * SECOND);
        assert_eq!(lag.verdict(111 * SECOND).lag_seconds, Some(10.0));
        assert!(!lag.verdict(131 * SECOND).breached);
        assert!(lag.verdict(132 * SECOND).breached);
    }

    #[test]
    fn what_waits_in_the_queue_counts() {
        let mut lag = lag();
        lag.applied(100 * SECOND, 100 * SECOND);
        lag.queued(Some(100 * SECOND + 200_000));
        let verdict = lag.verdict(101 * SECOND);
        assert_eq!(verdict.lag_seconds, Some(0.8));
        assert_eq!(verdict.queued_seconds, 0.8);
    }

    #[test]
    fn before_anything_is_applied_the_rpo_is_not_met() {
        assert!(lag().verdict(5 * SECOND).breached);
    }

    #[test]
    fn times_convert_both_ways() {
        let now = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(system_time(pg_micros(now)), now);
    }
}
