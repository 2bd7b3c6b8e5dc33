//! ● How far a server's clock is ahead of the agent's time, and how sure that is.
//!
//! Pure. A server is asked what time it has; it answered somewhere between the question and the answer, so the offset is known
//! to half a round trip. Of several answers the quickest says most, until one contradicts it: then a clock was set.
//!
//! # What it does not do
//! It asks nobody: see [`crate::watch`].

use crate::time::Micros;

/// How far a clock is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// Negative where it is behind.
    pub ahead: Micros,
    /// It is this much more or less at most.
    pub error: Micros,
}

impl Offset {
    /// From one answer: asked and answered by the agent's time, in between `said` by the server's clock.
    pub fn of(asked: Micros, said: Micros, answered: Micros) -> Self {
        let error = (answered - asked).max(0) / 2;
        Self {
            ahead: said - (asked + error),
            error,
        }
    }

    fn contradicts(self, other: Self) -> bool {
        (self.ahead - other.ahead).abs() > self.error + other.error
    }

    /// The best that is known once `newer` was measured. Clocks drift, so what was known slowly becomes less sure.
    #[must_use]
    pub fn then(self, newer: Self) -> Self {
        const DRIFT: Micros = 200;
        let aged = Self {
            error: self.error + DRIFT,
            ..self
        };
        if aged.contradicts(newer) || newer.error <= aged.error {
            newer
        } else {
            aged
        }
    }

    /// Whether the clocks differ by more than `limit` in any case.
    pub fn is_beyond(self, limit: Micros) -> bool {
        self.ahead.abs() - self.error > limit
    }
}

/// How far the source's clock is ahead, for the ages of its commits: as it was measured, and at least as far as what arrived
/// from it shows. Nothing arrives before it was committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceClock {
    ahead: Micros,
    measured: Option<Micros>,
    /// The largest that was shown since.
    shown: Option<Micros>,
    since: Micros,
}

/// Without a measurement, a clock that was set back is believed after this.
const SHOWN_FOR: Micros = 600_000_000;

impl SourceClock {
    /// The source was asked.
    pub fn measured(&mut self, ahead: Micros) {
        if self.measured.replace(ahead) != Some(ahead) {
            self.ahead = ahead;
        }
    }

    /// Something has arrived at `now` that was committed at `commit_time` by the source's clock.
    pub fn arrived(&mut self, commit_time: Micros, now: Micros) {
        let shown = commit_time - now;
        self.ahead = self.ahead.max(shown);
        if self.measured.is_some() {
            return;
        }
        let most = self.shown.map_or(shown, |before| before.max(shown));
        self.shown = Some(most);
        if now - self.since > SHOWN_FOR {
            self.ahead = most.max(0);
            (self.shown, self.since) = (None, now);
        }
    }

    /// A moment of the source's clock as the agent's time.
    pub fn here(&self, at: Micros) -> Micros {
        at.saturating_sub(self.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Micros = 1_000_000;

    #[test]
    fn an_offset_is_known_to_half_a_round_trip() {
        let offset = Offset::of(100 * SECOND, 700 * SECOND, 102 * SECOND);
        assert_eq!((offset.ahead, offset.error), (599 * SECOND, SECOND));
        assert!(offset.is_beyond(597 * SECOND) && !offset.is_beyond(598 * SECOND));
        assert!(Offset::of(0, -600 * SECOND, 0).is_beyond(SECOND));
    }

    #[test]
    fn the_quickest_answer_counts_until_one_contradicts_it() {
        let quick = Offset {
            ahead: SECOND,
            error: 1_000,
        };
        let slow = Offset {
            ahead: SECOND + 40_000,
            error: 50_000,
        };
        assert_eq!(quick.then(slow).ahead, quick.ahead);
        assert_eq!(slow.then(quick), quick);
        let set = Offset {
            ahead: -600 * SECOND,
            error: 50_000,
        };
        assert_eq!(quick.then(set), set);
        // A slow answer is better than one of long ago.
        let mut known = quick;
        for _ in 0..300 {
            known = known.then(slow);
        }
        assert_eq!(known.ahead, slow.ahead);
    }

    #[test]
    fn what_arrives_before_it_was_committed_shows_a_clock_that_is_ahead() {
        let mut clock = SourceClock::default();
        clock.arrived(700 * SECOND, 100 * SECOND);
        assert_eq!(clock.here(700 * SECOND), 100 * SECOND);
        clock.arrived(701 * SECOND, 102 * SECOND);
        assert_eq!(clock.here(701 * SECOND), 101 * SECOND);
        clock.measured(0);
        assert_eq!(clock.here(701 * SECOND), 701 * SECOND);
        clock.measured(-600 * SECOND);
        assert_eq!(clock.here(100 * SECOND), 700 * SECOND);
    }

    #[test]
    fn without_a_measurement_a_clock_that_was_set_back_is_believed_in_the_end() {
        let mut clock = SourceClock::default();
        clock.arrived(700 * SECOND, 100 * SECOND);
        for second in 101..1400 {
            clock.arrived(second * SECOND, second * SECOND);
        }
        assert_eq!(clock.here(1400 * SECOND), 1400 * SECOND);
    }
}
