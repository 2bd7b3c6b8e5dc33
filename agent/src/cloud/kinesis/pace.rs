//! ● How long a call may take: so much as calls of its size have taken. Pure: times are arguments.
//!
//! A connection that a firewall has forgotten shows by its silence alone, and a large call on a slow line is silent for as long.
//! What tells them apart is how fast calls have been up to now.
//!
//! # Invariants
//! - A deadline is never longer than what a line of half a megabit needs for all calls that may be under way.
//! - Every silence makes the next deadline longer, up to that: a line that has become slow is not given up for ever.
//!
//! # What it does not do
//! It does not say whether a call that took too long has arrived.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Kinesis answers within milliseconds, on a line across the world and with a lost packet within two seconds. Records wait for
/// that, and several connections may be forgotten at a time; the same records twice are the smaller evil.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A call may be slower than calls have been, so many times.
const SLACK: u64 = 4;

/// What is assumed of a new line, in bytes per second for each call.
const UNKNOWN: u64 = 1 << 20;

/// What a smaller call takes says more about the way than about the line.
const MEASURED_FROM: u64 = 128 << 10;

/// What calls have come to, in bytes per second for each.
#[derive(Debug)]
pub(super) struct CallPace {
    pace: AtomicU64,
    slowest: u64,
}

impl CallPace {
    /// Nothing is known yet. `slowest`: what each call has of the slowest line, in bytes per second.
    pub(super) fn new(slowest: u64) -> Self {
        Self {
            pace: AtomicU64::new(UNKNOWN),
            slowest: slowest.max(1),
        }
    }

    /// How fast calls are at the moment.
    pub(super) fn now(&self) -> u64 {
        self.pace.load(Ordering::Relaxed)
    }

    /// How long a call of so many bytes may take, if calls are as fast as `pace`.
    pub(super) fn deadline(&self, pace: u64, bytes: u64) -> Duration {
        let least = (pace / SLACK).max(self.slowest);
        ANSWER_WITHIN + Duration::from_millis(bytes * 1000 / least)
    }

    /// A call of so many bytes took so long.
    pub(super) fn answered(&self, bytes: u64, took: Duration) {
        if bytes < MEASURED_FROM {
            return;
        }
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
        let measured = bytes * 1000 / millis;
        let before = self.now();
        self.pace
            .store((3 * before + measured) / 4, Ordering::Relaxed);
    }

    /// A call got no answer within the deadline that `pace` gave it. Of several with the same one, one counts.
    pub(super) fn silent(&self, pace: u64) {
        let floor = self.slowest * SLACK;
        self.pace
            .fetch_min((pace / 2).max(floor), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SLOWEST: u64 = 8 << 10;

    fn deadline(pace: &CallPace, bytes: u64) -> u64 {
        pace.deadline(pace.now(), bytes).as_secs()
    }

    #[test]
    fn the_largest_call_on_a_forgotten_connection_leaves_time_for_another_within_half_a_minute() {
        let pace = CallPace::new(SLOWEST);
        // Not even measured yet.
        assert_eq!(deadline(&pace, 5 * MIB), 25);
        for _ in 0..20 {
            pace.answered(5 * MIB, Duration::from_secs(1));
        }
        let first = deadline(&pace, 5 * MIB);
        assert_eq!(first, 9);
        // Four connections at once.
        let before = pace.now();
        (0..4).for_each(|_| pace.silent(before));
        let second = deadline(&pace, 5 * MIB);
        assert_eq!(second, 13);
        assert!(first + second < 30);
        // What is small waits no longer for it.
        assert_eq!(deadline(&pace, 10 << 10), 5);
    }

    #[test]
    fn a_line_that_has_become_slow_is_given_its_time_in_the_end() {
        let pace = CallPace::new(SLOWEST);
        (0..20).for_each(|_| pace.answered(MIB, Duration::from_millis(10)));
        let mut deadlines = Vec::new();
        for _ in 0..20 {
            deadlines.push(deadline(&pace, 5 * MIB));
            pace.silent(pace.now());
        }
        assert!(deadlines.is_sorted());
        assert_eq!(deadlines.last(), Some(&(5 + 5 * MIB / SLOWEST)));
        // It is slow, and not silent.
        pace.answered(5 * MIB, Duration::from_secs(600));
        assert_eq!(deadline(&pace, 5 * MIB), 5 + 5 * MIB / SLOWEST);
        // And fast again.
        (0..20).for_each(|_| pace.answered(5 * MIB, Duration::from_secs(1)));
        assert!(deadline(&pace, 5 * MIB) < 10);
    }

    #[test]
    fn small_calls_say_nothing_of_the_line() {
        let pace = CallPace::new(SLOWEST);
        let before = pace.now();
        pace.answered(1000, Duration::from_secs(3));
        assert_eq!(pace.now(), before);
    }
}
