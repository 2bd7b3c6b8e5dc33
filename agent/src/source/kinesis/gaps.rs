//! ● What is to be done about what is not in a Kinesis stream: read on, look in the archive, or give it up.
//!
//! Pure: what was read, and the time, are arguments.
//!
//! # Invariants
//! - A gap is missing only when the stream has been read beyond the moment by which its writer had what is missing accepted. Until
//!   then it may only have come later.
//! - The archive is asked every [`LOOK_EVERY`] at most, and given the patience that was asked for before a gap is given up.

use std::time::{Duration, Instant, SystemTime};

use super::Until;
use crate::cloud::kinesis::StartAt;
use crate::flow::changelog::Gap;
use crate::names::history::History;
use crate::pg::PgLsn;

/// Between two looks whether the archive has what is missing.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How much earlier than the last applied commit the stream is read: clocks differ, and records wait to be put.
const EARLIER: Duration = Duration::from_secs(60);

/// A gap that holds everything up.
#[derive(Clone, Copy, Debug)]
struct Stalled {
    from: PgLsn,
    since: Instant,
    looked: Option<Instant>,
}

impl Stalled {
    fn for_as_long_as(&self, time: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= time
    }

    fn looked_lately(&self, now: Instant) -> bool {
        let since = |looked| now.saturating_duration_since(looked);
        self.looked.is_some_and(|looked| since(looked) < LOOK_EVERY)
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GapVerdict {
    ReadOn,
    /// The tip was reached, and nothing before it is missing for sure.
    Tip,
    /// Everything was applied, and what comes now is of a later slot of the same source.
    BegunAnew(History),
    /// The archive is asked for this.
    Look {
        gap: Gap,
        /// It does not come any more; otherwise its writer has not finished it for long.
        is_missing: bool,
        /// Nobody has looked for it yet.
        is_new: bool,
    },
}

/// What is known of what holds a stream up.
#[derive(Debug)]
pub(super) struct Gaps {
    until: Until,
    /// How long the archive may take until it has what is missing.
    patience: Duration,
    has_archive: bool,
    stalled: Option<Stalled>,
    /// The history of a later slot of our source, and by when its first record had arrived.
    successor: Option<(History, Instant)>,
}

impl Gaps {
    pub(super) fn new(until: Until, patience: Duration, has_archive: bool) -> Self {
        Self {
            until,
            patience,
            has_archive,
            stalled: None,
            successor: None,
        }
    }

    /// A record of another history had arrived by then.
    pub(super) fn saw(&mut self, ours: History, other: History, arrived_by: Instant) {
        if other.system_identifier == ours.system_identifier && other.began > ours.began {
            self.successor.get_or_insert((other, arrived_by));
        }
    }

    /// Everything has been read that was in the stream at `at`.
    pub(super) fn read_up_to(&mut self, at: Instant, gap: Option<Gap>, now: Instant) -> GapVerdict {
        if let Until::Tip(tip) = self.until
            && at >= tip
            && gap.is_none_or(|gap| gap.accepted_by.is_none())
        {
            return GapVerdict::Tip;
        }
        let Some(gap) = gap else {
            self.stalled = None;
            return match self.successor {
                Some((successor, arrived_by))
                    if self.until == Until::Stopped && at >= arrived_by =>
                {
                    GapVerdict::BegunAnew(successor)
                }
                _ => GapVerdict::ReadOn,
            };
        };
        let stalled = self.stalled_at(gap, now);
        let is_missing = gap.accepted_by.is_some_and(|accepted| at >= accepted);
        // A writer that died, or has been refused for a while, may not have finished it. Somebody sends it again.
        let is_overdue = stalled.for_as_long_as(self.patience.max(LOOK_EVERY), now);
        if stalled.looked_lately(now) || !is_missing && !is_overdue {
            return GapVerdict::ReadOn;
        }
        GapVerdict::Look {
            gap,
            is_missing,
            is_new: stalled.looked.is_none(),
        }
    }

    /// Whether the archive is to be asked for a gap, since nothing else can be read before it is filled.
    pub(super) fn is_to_be_looked_for(&mut self, gap: Gap, now: Instant) -> bool {
        !self.stalled_at(gap, now).looked_lately(now)
    }

    /// It was asked.
    pub(super) fn looked(&mut self, now: Instant) {
        if let Some(stalled) = &mut self.stalled {
            stalled.looked = Some(now);
        }
    }

    /// Whether the archive may have later on what it does not have now.
    pub(super) fn may_wait(&self, now: Instant) -> bool {
        let is_over = |stalled: &Stalled| stalled.for_as_long_as(self.patience, now);
        self.has_archive && !self.stalled.as_ref().is_some_and(is_over)
    }

    /// Since when this gap holds everything up.
    fn stalled_at(&mut self, gap: Gap, now: Instant) -> Stalled {
        match self.stalled {
            Some(stalled) if stalled.from == gap.from => stalled,
            _ => *self.stalled.insert(Stalled {
                from: gap.from,
                since: now,
                looked: None,
            }),
        }
    }
}

/// Where the stream is read from, given when what was applied last committed.
pub(super) fn start_at(commit_time: Option<SystemTime>, now: SystemTime) -> StartAt {
    match commit_time.and_then(|commit_time| commit_time.checked_sub(EARLIER)) {
        // The source's clock may be ahead, and Kinesis takes no time in the future.
        Some(at) => StartAt::Timestamp(at.min(now - EARLIER)),
        None => StartAt::TrimHorizon,
    }
}

/// Whether a reading that began there, at `since`, has met everything that a stream still has that keeps records for so long.
pub(super) fn reaches_back(from: StartAt, since: SystemTime, retention: Duration) -> bool {
    match from {
        StartAt::TrimHorizon => true,
        StartAt::Timestamp(from) => since
            .duration_since(from)
            .is_ok_and(|before| before >= retention),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// So many seconds after something.
    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    fn gap(from: u64, accepted_by: Option<Instant>) -> Gap {
        Gap {
            from: PgLsn::from(from),
            to: PgLsn::from(from + 100),
            accepted_by,
        }
    }

    fn look(gap: Gap, is_missing: bool, is_new: bool) -> GapVerdict {
        GapVerdict::Look {
            gap,
            is_missing,
            is_new,
        }
    }

    fn history(system_identifier: u64, began: i64) -> History {
        History {
            system_identifier,
            began,
        }
    }

    #[test]
    fn the_tip_is_reached_once_all_is_read_and_nothing_is_missing_for_sure() {
        let start = Instant::now();
        let (unfinished, missing) = (gap(1, None), gap(1, Some(start)));
        // (read up to, the gap) where the tip is 10.
        let cases = [
            ((9, None), GapVerdict::ReadOn),
            ((10, None), GapVerdict::Tip),
            ((9, Some(unfinished)), GapVerdict::ReadOn),
            ((10, Some(unfinished)), GapVerdict::Tip),
            ((9, Some(missing)), look(missing, true, true)),
            ((10, Some(missing)), look(missing, true, true)),
        ];
        for ((read, gap), expected) in cases {
            let mut gaps = Gaps::new(Until::Tip(at(start, 10)), PATIENCE, true);
            let verdict = gaps.read_up_to(at(start, read), gap, at(start, 20));
            assert_eq!(verdict, expected, "{read} {gap:?}");
        }
    }

    #[test]
    fn a_gap_is_looked_for_once_it_is_missing_or_was_not_finished_for_long() {
        let start = Instant::now();
        let coming = gap(1, Some(at(start, 30)));
        let mut gaps = Gaps::new(Until::Stopped, PATIENCE, true);
        let mut read = |read, gap, now| gaps.read_up_to(at(start, read), Some(gap), at(start, now));
        // It may only have come later.
        assert_eq!(read(0, coming, 0), GapVerdict::ReadOn);
        assert_eq!(read(29, coming, 29), GapVerdict::ReadOn);
        assert_eq!(read(30, coming, 31), look(coming, true, true));
        // Another one, which a writer is at.
        let unfinished = gap(200, None);
        assert_eq!(read(40, unfinished, 40), GapVerdict::ReadOn);
        assert_eq!(read(99, unfinished, 99), GapVerdict::ReadOn);
        assert_eq!(read(100, unfinished, 100), look(unfinished, false, true));
        // Where nobody is patient, it is still given a moment.
        let mut gaps = Gaps::new(Until::Stopped, Duration::ZERO, true);
        let mut read = |now| gaps.read_up_to(start, Some(unfinished), at(start, now));
        assert_eq!(read(0), GapVerdict::ReadOn);
        assert_eq!(read(4), GapVerdict::ReadOn);
        assert_eq!(read(5), look(unfinished, false, true));
    }

    #[test]
    fn the_archive_is_asked_now_and_then_until_patience_is_over() {
        let start = Instant::now();
        let missing = gap(1, Some(start));
        let mut gaps = Gaps::new(Until::Stopped, PATIENCE, true);
        let verdict = gaps.read_up_to(start, Some(missing), start);
        assert_eq!(verdict, look(missing, true, true));
        gaps.looked(start);
        for (now, looks) in [(1, false), (4, false), (5, true), (6, true)] {
            let expected = match looks {
                true => look(missing, true, false),
                false => GapVerdict::ReadOn,
            };
            let now = at(start, now);
            assert_eq!(gaps.read_up_to(start, Some(missing), now), expected);
            assert_eq!(gaps.is_to_be_looked_for(missing, now), looks);
        }
        assert!(gaps.may_wait(at(start, 59)));
        assert!(!gaps.may_wait(at(start, 60)));
        // What was filled in part holds everything up anew.
        let rest = gap(50, Some(start));
        let verdict = gaps.read_up_to(start, Some(rest), at(start, 61));
        assert_eq!(verdict, look(rest, true, true));
        assert!(gaps.may_wait(at(start, 61)));
        // Once nothing is missing, the same gap would be another one.
        assert_eq!(gaps.read_up_to(start, None, start), GapVerdict::ReadOn);
        let verdict = gaps.read_up_to(start, Some(rest), at(start, 200));
        assert_eq!(verdict, look(rest, true, true));
    }

    #[test]
    fn without_an_archive_nothing_is_waited_for() {
        let start = Instant::now();
        let mut gaps = Gaps::new(Until::Stopped, PATIENCE, false);
        let missing = gap(1, Some(start));
        let verdict = gaps.read_up_to(start, Some(missing), start);
        assert_eq!(verdict, look(missing, true, true));
        assert!(!gaps.may_wait(start));
    }

    #[test]
    fn a_stream_begun_anew_is_noticed_once_everything_before_was_read() {
        let start = Instant::now();
        let ours = history(1, 100);
        let cases = [
            // (what came, read up to, the gap) and whether it is that.
            ((history(1, 200), 10, None), true),
            ((history(1, 200), 9, None), false),
            ((history(1, 50), 10, None), false),
            ((history(2, 200), 10, None), false),
            ((history(1, 200), 10, Some(gap(1, None))), false),
        ];
        for ((other, read, gap), expected) in cases {
            let mut gaps = Gaps::new(Until::Stopped, PATIENCE, true);
            gaps.saw(ours, other, at(start, 10));
            // The first of them counts.
            gaps.saw(ours, history(1, 300), at(start, 99));
            let verdict = gaps.read_up_to(at(start, read), gap, at(start, 20));
            let is_it = matches!(verdict, GapVerdict::BegunAnew(found) if found == other);
            assert_eq!(is_it, expected, "{other} {read} {gap:?}");
        }
        // Whoever empties the stream takes what there is.
        let mut gaps = Gaps::new(Until::Tip(at(start, 20)), PATIENCE, true);
        gaps.saw(ours, history(1, 200), start);
        let verdict = gaps.read_up_to(at(start, 10), None, start);
        assert_eq!(verdict, GapVerdict::ReadOn);
    }

    #[test]
    fn a_reading_begins_a_minute_back_and_never_in_the_future() {
        let seconds = |n| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let cases = [
            (None, StartAt::TrimHorizon),
            (Some(500), StartAt::Timestamp(seconds(440))),
            // The source's clock is ahead.
            (Some(5_000), StartAt::Timestamp(seconds(940))),
        ];
        for (committed, expected) in cases {
            assert_eq!(start_at(committed.map(seconds), seconds(1_000)), expected);
        }
        let hour = Duration::from_secs(3_600);
        let from = |n| StartAt::Timestamp(seconds(n));
        assert!(reaches_back(StartAt::TrimHorizon, seconds(0), hour));
        assert!(reaches_back(from(400), seconds(4_000), hour));
        assert!(!reaches_back(from(401), seconds(4_000), hour));
        assert!(!reaches_back(from(5_000), seconds(4_000), hour));
    }
}
