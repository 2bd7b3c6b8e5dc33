//! ● When to read again: at once while caught up, in bulk while behind.
//!
//! Pure. The walsender issues one `send` per message, and a reader that wakes for each costs both sides
//! about twice the work. So while behind, data is left to gather for a few milliseconds between two
//! reads.
//!
//! Whether we are behind is read off the stream itself: a commit message carries the time of the commit, and
//! its envelope the time it was sent, both by the source's clock. (How much a read brings tells nothing: an
//! eager reader finds a message or two each time, because it keeps up with the `send`s, and not because there
//! is no more.) A pause is a small part of that lateness, so it adds nothing that would be noticed.
//!
//! A busy source is read in bulk also while caught up: at some thousand small transactions a second, waking for each
//! message took a tenth of the processor that the source was using, and five milliseconds are nobody's loss.
//!
//! # Invariants
//! - No pause while transactions are sent within [`CAUGHT_UP`] of their commit and more than [`BUSY`] apart;
//!   what is received is always handed on before a pause.
//! - A pause is at most a tenth of the lateness, or [`PAUSE_BUSY`], and ends before the socket is full: a walsender that
//!   finds it so stops decoding.
//! - No pause on a Unix socket, where every small message takes most of a kilobyte of some 200 kB: it is full
//!   within a millisecond. Measured, pauses made a backlog there twice as slow.

use std::time::Duration;

use crate::time::Micros;

/// Up to this lateness every read is made at once. Above what a slow disk takes to flush a commit.
const CAUGHT_UP: Duration = Duration::from_millis(20);

/// Transactions that are sent less than this apart, on average, come from a busy source.
const BUSY: Duration = Duration::from_millis(1);

/// Between two reads of a busy source that we keep up with.
const PAUSE_BUSY: Duration = Duration::from_millis(5);

/// Weight of the newest interval in the average, as one in so many.
const SMOOTHING: i64 = 16;

/// The part of the lateness that a pause may take: one in so many.
const SHARE: u32 = 10;

/// The longest pause. Twice as long was slower again: a busy walsender fills the receive buffer within it, and
/// then it waits for us.
const PAUSE_MAX: Duration = Duration::from_millis(5);

/// When so much gathers in a pause, a longer one saves nothing any more and may fill the buffer.
const PLENTY_BYTES: u64 = 64 * 1024;

/// Shorter ones are not worth a timer, whose grain is a millisecond.
const PAUSE_MIN: Duration = Duration::from_millis(1);

/// Decides how long to let data gather.
#[derive(Debug)]
pub(super) struct Pace {
    /// Whether the connection is a Unix socket.
    local: bool,
    /// What is useful at the present rate, found by trying.
    useful: Duration,
    late: Duration,
    /// When the last transaction was sent, and the average interval between them, in microseconds.
    sent_at: Option<Micros>,
    apart: Micros,
    /// Bytes since the last pause.
    gathered: u64,
}

impl Pace {
    /// For a connection over a Unix socket (`local`) or a network.
    pub(super) fn new(local: bool) -> Self {
        Self {
            local,
            useful: PAUSE_MAX,
            late: Duration::ZERO,
            sent_at: None,
            apart: Micros::MAX / SMOOTHING,
            gathered: 0,
        }
    }

    /// Notes what was received.
    pub(super) fn received(&mut self, bytes: u64) {
        self.gathered += bytes;
    }

    /// Notes when a transaction committed and when the source sent its commit message.
    pub(super) fn committed(&mut self, commit_time: Micros, sent_at: Micros) {
        // A clock that was set back shows nothing late; that costs speed and no more.
        let late = sent_at.saturating_sub(commit_time).max(0).unsigned_abs();
        self.late = Duration::from_micros(late);
        if let Some(before) = self.sent_at.replace(sent_at) {
            // A second without any begins anew at once; a clock that was set back says nothing.
            let apart = sent_at.saturating_sub(before).clamp(0, 1_000_000);
            let average = self.apart.min(1_000_000);
            self.apart = average + (apart - average) / SMOOTHING;
        }
    }

    fn is_busy(&self) -> bool {
        u128::from(self.apart.unsigned_abs()) < BUSY.as_micros()
    }

    /// How late transactions are sent.
    pub(super) fn late(&self) -> Duration {
        self.late
    }

    /// How long to wait now that everything received is handed on. `drained` says that nothing more
    /// had arrived when the last read was made.
    pub(super) fn pause(&mut self, drained: bool) -> Option<Duration> {
        if self.local || (self.late < CAUGHT_UP && !self.is_busy()) {
            self.gathered = 0;
            return None;
        }
        if !drained {
            return None;
        }
        if self.late < CAUGHT_UP {
            self.gathered = 0;
            return Some(PAUSE_BUSY);
        }
        self.useful = if self.gathered >= PLENTY_BYTES {
            self.useful / 2
        } else {
            (self.useful * 2).clamp(PAUSE_MIN, PAUSE_MAX)
        };
        self.gathered = 0;
        let pause = self.useful.min(self.late / SHARE);
        (pause >= PAUSE_MIN).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Micros = 1000;

    fn late_by(local: bool, late: Micros) -> Pace {
        let mut pace = Pace::new(local);
        pace.committed(77, 77 + late);
        pace
    }

    #[test]
    fn a_reader_that_is_caught_up_never_pauses() {
        assert_eq!(Pace::new(false).pause(true), None);
        assert_eq!(late_by(false, 19 * MS).pause(true), None);
        // The source's clock was set back in between.
        assert_eq!(late_by(false, -3_600_000 * MS).pause(true), None);
        // Neither does it pause for the lateness of a backlog it has worked off.
        let mut pace = late_by(false, 60_000 * MS);
        assert!(pace.pause(true).is_some());
        pace.committed(0, MS);
        assert_eq!(pace.pause(true), None);
    }

    #[test]
    fn a_busy_source_is_read_in_bulk_and_a_quiet_one_at_once() {
        let mut pace = Pace::new(false);
        let mut now = 0;
        let mut every = |pace: &mut Pace, apart: Micros, times: u32| {
            for _ in 0..times {
                now += apart;
                pace.committed(now - MS, now);
            }
            pace.pause(true)
        };
        // A burst is not yet a busy source.
        assert_eq!(every(&mut pace, MS / 2, 10), None);
        assert_eq!(every(&mut pace, MS / 2, 200), Some(PAUSE_BUSY));
        assert_eq!(every(&mut pace, 1_000 * MS, 1), None);
        assert_eq!(every(&mut pace, 2 * MS, 500), None);
        let mut local = Pace::new(true);
        assert_eq!(every(&mut local, MS / 2, 200), None);
    }

    #[test]
    fn a_pause_is_a_small_part_of_the_lateness() {
        let pause = |local, late| late_by(local, late).pause(true).map(|p| p.as_millis());
        assert_eq!(pause(false, 20 * MS), Some(2));
        assert_eq!(pause(false, 50 * MS), Some(5));
        assert_eq!(pause(false, 3_600_000 * MS), Some(5));
        assert_eq!(pause(true, 3_600_000 * MS), None);
    }

    #[test]
    fn more_that_has_arrived_is_read_first() {
        let mut pace = late_by(false, 1000 * MS);
        assert_eq!(pace.pause(false), None);
        assert_eq!(pace.pause(true), Some(PAUSE_MAX));
    }

    #[test]
    fn pauses_shrink_until_no_more_gathers_than_helps_and_grow_again() {
        let mut pace = late_by(false, 1000 * MS);
        // 100 bytes a microsecond: a walsender that reads large rows.
        let mut pauses = Vec::new();
        let mut last = PAUSE_MAX;
        for _ in 0..8 {
            pace.received(u64::try_from(last.as_micros()).unwrap() * 100);
            last = pace.pause(true).unwrap_or_default();
            pauses.push(last);
        }
        let gathered = |pause: &Duration| pause.as_micros() * 100;
        assert!(
            pauses[4..]
                .iter()
                .all(|pause| gathered(pause) <= 2 * 64 * 1024 + 100_000),
            "{pauses:?}"
        );
        for _ in 0..8 {
            pace.received(1000);
            last = pace.pause(true).unwrap_or_default();
        }
        assert_eq!(last, PAUSE_MAX);
    }
}
