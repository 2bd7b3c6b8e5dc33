//! ● How far the replica trails the source, and whether that still meets the RPO.
//!
//! Pure: every instant is an argument, in microseconds since 2000-01-01 UTC, PostgreSQL's own
//! epoch. Commit times are by the source's clock, everything else by the agent's time, which never goes back; a commit time
//! is turned into the agent's time when it arrives ([`SourceClock`]), so a clock that is set later changes no age.
//!
//! # What lag means here
//! The seconds of committed work that would be lost if the source vanished now. It is the largest of:
//! the delay with which the newest applied transaction arrived; the age of the oldest transaction
//! received and not yet applied; and, since a heartbeat is committed at a known interval, the time by
//! which the next one is overdue. The last makes a dead link or a dead source visible: without news the
//! lag grows.

use std::time::Duration;

use crate::time::Micros;
use crate::time::clock::SourceClock;

/// What is known about one stream's lag.
#[derive(Clone, Debug)]
pub struct Lag {
    heartbeat_every: Micros,
    rpo: Micros,
    source: SourceClock,
    /// Up to which commit the replica was when this began, by the source's clock.
    resumed: Option<Micros>,
    /// When the newest applied transaction was committed and the delay with which it was applied.
    applied: Option<(Micros, Micros)>,
    received: Option<Micros>,
    queued_oldest: Option<Micros>,
}

/// The verdict at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LagVerdict {
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
        let mut lag = Self {
            heartbeat_every: 0,
            rpo: 0,
            source: SourceClock::default(),
            resumed: None,
            applied: None,
            received: None,
            queued_oldest: None,
        };
        lag.go_by(heartbeat_every, rpo);
        lag
    }

    /// Judges by other values of the configuration from now on.
    pub fn go_by(&mut self, heartbeat_every: Duration, rpo: Duration) {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        (self.heartbeat_every, self.rpo) = (micros(heartbeat_every), micros(rpo));
    }

    /// The source's clock is this far ahead of the agent's time.
    pub fn measured(&mut self, ahead: Micros) {
        self.source.measured(ahead);
    }

    /// What the progress row says at start: the replica holds everything up to this commit. It counts until something is
    /// applied.
    pub fn resume(&mut self, commit_time: Micros) {
        self.resumed = Some(commit_time);
    }

    /// A transaction committed at `commit_time` has arrived.
    pub fn received(&mut self, commit_time: Micros, now: Micros) {
        self.source.arrived(commit_time, now);
        self.received = Some(self.source.here(commit_time));
    }

    /// The commit time of the oldest transaction that waits, or none.
    pub fn queued(&mut self, oldest_commit_time: Option<Micros>) {
        self.queued_oldest = oldest_commit_time.map(|at| self.source.here(at));
    }

    /// A batch whose last transaction committed at `commit_time` is durable on the replica.
    pub fn applied(&mut self, commit_time: Micros, now: Micros) {
        self.source.arrived(commit_time, now);
        let committed = self.source.here(commit_time);
        self.applied = Some((committed, now - committed));
    }

    /// Judges at `now`.
    pub fn verdict(&self, now: Micros) -> LagVerdict {
        // Before the next heartbeat is due nothing is overdue; no clock can make an age negative.
        let overdue = |committed: Micros| (now - committed - self.heartbeat_every).max(0);
        let queued = self.queued_oldest.map_or(0, |oldest| (now - oldest).max(0));
        let resumed = self.resumed.map(|commit_time| {
            let committed = self.source.here(commit_time);
            // Where the clock is not known yet it is not taken for news.
            (committed.min(now), 0)
        });
        let lag = self
            .applied
            .or(resumed)
            .map(|(committed, delay)| delay.max(queued).max(overdue(committed)));
        LagVerdict {
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
    use crate::time::{pg_micros, system_time};

    const SECOND: Micros = 1_000_000;

    fn lag() -> Lag {
        Lag::new(Duration::from_secs(1), Duration::from_secs(30))
    }

    #[test]
    fn an_idle_source_with_heartbeats_has_the_lag_of_its_last_heartbeat() {
        let mut lag = lag();
        lag.received(100 * SECOND, 100 * SECOND);
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
    fn a_clock_ten_minutes_off_on_either_side_changes_no_age() {
        for ahead in [-600, 0, 600] {
            let source = |second: i64| (second + ahead) * SECOND;
            let mut lag = lag();
            lag.measured(ahead * SECOND);
            lag.applied(source(100), 101 * SECOND);
            assert_eq!(lag.verdict(102 * SECOND).lag_seconds, Some(1.0));
            assert_eq!(lag.verdict(141 * SECOND).lag_seconds, Some(40.0));
            assert!(lag.verdict(141 * SECOND).breached);
            // Set meanwhile: what was known keeps its age.
            lag.measured((ahead - 600) * SECOND);
            assert_eq!(lag.verdict(141 * SECOND).lag_seconds, Some(40.0));
        }
    }

    #[test]
    fn a_source_that_is_ahead_and_cannot_be_asked_shows_it_by_what_arrives() {
        let mut lag = lag();
        lag.received(700 * SECOND, 100 * SECOND);
        lag.applied(700 * SECOND, 100 * SECOND + 50_000);
        assert_eq!(lag.verdict(100 * SECOND + 100_000).lag_seconds, Some(0.05));
        assert!(lag.verdict(140 * SECOND).breached);
    }

    #[test]
    fn a_start_goes_by_the_progress_row_until_something_is_applied() {
        let mut lag = lag();
        lag.resume(700 * SECOND);
        lag.measured(600 * SECOND);
        assert_eq!(lag.verdict(150 * SECOND).lag_seconds, Some(49.0));
        lag.applied(750 * SECOND, 150 * SECOND);
        assert_eq!(lag.verdict(150 * SECOND).lag_seconds, Some(0.0));
    }

    #[test]
    fn times_convert_both_ways() {
        let now = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(system_time(pg_micros(now)), now);
    }
}
