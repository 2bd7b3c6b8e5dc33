//! ● What of the archive may be deleted.
//!
//! ```text
//!           cutoff = now - retention
//!    base ┄ base ─── │ ─── base ─── base       ┄ goes   ─ stays
//!  ┄┄┄┄┄┄┄┄┄ log ─────────────────────────
//! ```
//! To restore to a moment, a base from before it and the whole log from that base on are needed. So the newest base
//! that is older than the retention stays for as long as it is the newest such base.
//!
//! # Invariants
//! - Every moment within the retention that could be restored still can be.
//! - The last base is never deleted, nor a piece of the log that ends after the oldest base that stays, nor one that is
//!   younger than the retention: who reads a Kinesis stream needs it without a base.
//! - Without a base nothing is deleted.
//! - A whole history goes when nothing has been written of it for as long as the retention, and a later one has a base that
//!   is older than that: then no moment within the retention needs it.
//!
//! - Two clocks have to agree, this machine's and the store's, before anything goes ([`agreed`]).
//!
//! # What it does not do
//! It does not look whether the log is whole.

use std::time::Duration;

use jiff::Timestamp;

use crate::pg::PgLsn;

/// A leftover is deleted when a base that was begun after it is older than this: then whoever wrote
/// it has long been dead.
pub const LEFTOVER_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A base that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetentionBase {
    /// Its LSN.
    pub lsn: PgLsn,
    /// When the rows were like this.
    pub as_of: Timestamp,
}

/// A piece of the change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionSegment {
    /// The object's name.
    pub name: String,
    /// Where it begins.
    pub start: PgLsn,
    /// Where it ends.
    pub end: PgLsn,
    /// Its size.
    pub bytes: u64,
}

/// What the archive has.
#[derive(Clone, Copy, Debug)]
pub struct Holdings<'a> {
    /// Bases, in any order.
    pub bases: &'a [RetentionBase],
    /// LSNs of bases that nobody can restore from: they go with their neighbours.
    pub unusable: &'a [PgLsn],
    /// LSNs of what backups that were killed, or are being taken, have left.
    pub leftovers: &'a [PgLsn],
    /// The change log, in any order.
    pub log: &'a [RetentionSegment],
}

/// Two clocks may differ so much: nothing is kept for so short a time that it would matter.
const CLOCKS_APART: Duration = Duration::from_secs(600);

/// The time by which to delete, of what this machine's clock and the store's say: the earlier. Where the store says none, one
/// clock is all there is.
///
/// # Errors
/// What the store says, where they contradict each other: one of them is wrong, and nobody knows which.
pub fn agreed(here: Timestamp, store: Option<Timestamp>) -> Result<Timestamp, Timestamp> {
    match store {
        Some(there) if here.duration_since(there).unsigned_abs() > CLOCKS_APART => Err(there),
        Some(there) => Ok(here.min(there)),
        None => Ok(here),
    }
}

/// What may go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// LSNs of bases, oldest first.
    pub bases: Vec<PgLsn>,
    /// LSNs of leftovers, oldest first.
    pub leftovers: Vec<PgLsn>,
    /// Names of pieces of the log, oldest first.
    pub log: Vec<String>,
}

/// Decides.
pub fn expired(holdings: Holdings<'_>, now: Timestamp, retention: Duration) -> Expired {
    let mut bases = holdings.bases.to_vec();
    bases.sort_by_key(|base| base.lsn);
    // A clock that went back must not make an older base look newer: the order is that of the LSNs.
    let newest_old = bases
        .iter()
        .rposition(|base| is_older(base.as_of, now, retention));
    let going = newest_old.unwrap_or(0);
    let mut gone: Vec<PgLsn> = bases[..going].iter().map(|base| base.lsn).collect();
    let kept = newest_old.map(|newest_old| bases[newest_old].lsn);
    let before = |lsn: &&PgLsn| kept.is_some_and(|kept| **lsn < kept);
    gone.extend(holdings.unusable.iter().filter(before));
    gone.sort();
    // What lies before a base that is older than the retention is older, too. Before younger bases there may be log that no
    // base needs and a reader of a Kinesis stream does: it stays as long as any other.
    let mut log: Vec<&RetentionSegment> = holdings
        .log
        .iter()
        .filter(|segment| kept.is_some_and(|kept| segment.end <= kept))
        .collect();
    log.sort_by_key(|segment| (segment.start, segment.end));
    let abandoned = bases
        .iter()
        .rfind(|base| is_older(base.as_of, now, LEFTOVER_AFTER));
    let mut leftovers: Vec<PgLsn> = holdings.leftovers.to_vec();
    leftovers.retain(|lsn| abandoned.is_some_and(|base| *lsn < base.lsn));
    leftovers.sort();
    Expired {
        bases: gone,
        leftovers,
        log: log
            .into_iter()
            .map(|segment| segment.name.clone())
            .collect(),
    }
}

/// A history, as far as going as a whole is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// When something of it was written last; none where that is not known.
    pub written_at: Option<Timestamp>,
    /// The moment of its oldest base.
    pub first_base: Option<Timestamp>,
}

/// Which histories may go, of all of a stream in the order in which they began.
pub fn ended(all: &[Life], now: Timestamp, retention: Duration) -> Vec<bool> {
    let old = |at: Option<Timestamp>| at.is_some_and(|at| is_older(at, now, retention));
    let may_go = |(i, life): (usize, &Life)| {
        old(life.written_at) && all[i + 1..].iter().any(|later| old(later.first_base))
    };
    all.iter().enumerate().map(may_go).collect()
}

fn is_older(at: Timestamp, now: Timestamp, age: Duration) -> bool {
    // A time in the future is not old.
    Duration::try_from(now.duration_since(at)).is_ok_and(|since| since > age)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3600;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_second(1_767_225_600 + seconds as i64).unwrap()
    }

    fn base(lsn: u64, seconds: u64) -> RetentionBase {
        RetentionBase {
            lsn: PgLsn::from(lsn),
            as_of: at(seconds),
        }
    }

    fn segment(start: u64, end: u64) -> RetentionSegment {
        RetentionSegment {
            name: format!("{start}-{end}"),
            start: PgLsn::from(start),
            end: PgLsn::from(end),
            bytes: 1,
        }
    }

    #[test]
    fn a_history_goes_once_it_has_ended_and_a_later_one_covers_the_retention() {
        let (day, retention) = (24 * HOUR, Duration::from_secs(14 * 24 * HOUR));
        let life = |written: u64, base: Option<u64>| Life {
            written_at: Some(at(written * day)),
            first_base: base.map(|day_of| at(day_of * day)),
        };
        let now = at(40 * day);
        let judge = |all: &[Life]| ended(all, now, retention);
        assert_eq!(
            judge(&[life(10, Some(0)), life(40, Some(11))]),
            [true, false]
        );
        // Moments within the retention, before the later one's first base.
        assert_eq!(
            judge(&[life(10, Some(0)), life(40, Some(27))]),
            [false, false]
        );
        assert_eq!(judge(&[life(10, Some(0)), life(40, None)]), [false, false]);
        // Two that live beside one another.
        assert_eq!(
            judge(&[life(39, Some(0)), life(40, Some(11))]),
            [false, false]
        );
        // The last is never given up.
        assert_eq!(judge(&[life(10, Some(0))]), [false]);
        let unknown = Life {
            written_at: None,
            ..life(0, Some(0))
        };
        assert_eq!(judge(&[unknown, life(40, Some(11))]), [false, false]);
    }

    #[test]
    fn a_base_that_cannot_be_used_keeps_nobody_and_goes_with_its_neighbours() {
        let bases = [base(10, 0), base(30, 20)];
        let unusable = [PgLsn::from(20), PgLsn::from(40)];
        let holdings = Holdings {
            bases: &bases,
            unusable: &unusable,
            leftovers: &[],
            log: &[],
        };
        let gone = expired(holdings, at(100), Duration::from_secs(30));
        assert_eq!(gone.bases, [PgLsn::from(10), PgLsn::from(20)]);
        let gone = expired(holdings, at(35), Duration::from_secs(30));
        assert_eq!(gone.bases, []);
    }

    #[test]
    fn the_newest_base_older_than_the_retention_stays_with_its_log() {
        let bases = [base(10, 0), base(20, 10), base(30, 20), base(40, 30)];
        let log = [
            segment(5, 15),
            segment(15, 20),
            segment(15, 25),
            segment(25, 50),
        ];
        let holdings = Holdings {
            bases: &bases,
            unusable: &[],
            leftovers: &[],
            log: &log,
        };
        let gone = expired(holdings, at(45), Duration::from_secs(30));
        assert_eq!(gone.bases, [PgLsn::from(10)]);
        assert_eq!(gone.log, ["5-15", "15-20"]);
        let all_old = expired(holdings, at(1_000_000), Duration::from_secs(30));
        assert_eq!(all_old.bases.len(), 3);
        let none_old = expired(holdings, at(30), Duration::from_secs(3600));
        assert_eq!(none_old.bases, []);
        assert_eq!(none_old.log, Vec::<String>::new());
        // The log that was there before the first base, too.
        let young = Holdings {
            bases: &bases[2..],
            ..holdings
        };
        let gone = expired(young, at(30), Duration::from_secs(3600));
        assert_eq!(gone, Expired::default());
        let without = Holdings {
            bases: &[],
            ..holdings
        };
        assert_eq!(
            expired(without, at(1_000_000), Duration::ZERO),
            Expired::default()
        );
    }

    #[test]
    fn a_leftover_goes_when_a_later_base_is_a_day_old() {
        let bases = [base(10, 0), base(30, 2 * HOUR)];
        let leftovers = [PgLsn::from(20), PgLsn::from(40)];
        let holdings = Holdings {
            bases: &bases,
            unusable: &[],
            leftovers: &leftovers,
            log: &[],
        };
        let month = Duration::from_secs(30 * 24 * HOUR);
        let gone = |hours: u64| expired(holdings, at(hours * HOUR), month).leftovers;
        assert_eq!(gone(25), []);
        assert_eq!(gone(27), [PgLsn::from(20)]);
        assert_eq!(gone(24 * 30), [PgLsn::from(20)]);
    }

    #[test]
    fn nothing_is_deleted_by_a_clock_that_the_store_contradicts() {
        let day = 24 * HOUR;
        let apart = CLOCKS_APART.as_secs();
        let judge = |here: u64, there: u64| agreed(at(here), Some(at(there)));
        assert_eq!(judge(50 * day, 30 * day), Err(at(30 * day)));
        assert_eq!(judge(30 * day, 50 * day), Err(at(50 * day)));
        assert_eq!(judge(day, day + apart + 1), Err(at(day + apart + 1)));
        assert_eq!(judge(day + 9, day), Ok(at(day)));
        assert_eq!(judge(day, day + apart), Ok(at(day)));
        assert_eq!(agreed(at(day), None), Ok(at(day)));
    }

    proptest! {
        /// A month in which bases are taken, some fail, the log is written, and somebody tidies up now and then.
        /// One LSN is one second.
        #[test]
        fn every_moment_within_the_retention_can_be_restored_throughout_a_month(
            base_every in 2u64..60, retention in 1u64..400, segment_minutes in 5u64..300,
            fails in proptest::collection::vec(any::<bool>(), 400),
            tidies in proptest::collection::vec(any::<bool>(), 31 * 24),
        ) {
            let retention_seconds = retention * HOUR;
            let (mut bases, mut leftovers, mut log) = (vec![], vec![], vec![]);
            let mut first = None;
            for hour in 0..31 * 24u64 {
                let now = hour * HOUR;
                if hour % base_every == 0 {
                    if fails[(hour / base_every) as usize] && first.is_some() {
                        leftovers.push(PgLsn::from(now));
                    } else {
                        bases.push(base(now, now));
                        first.get_or_insert(now);
                    }
                }
                while let Some(start) = Some(log.last().map_or(0, |s: &RetentionSegment| u64::from(s.end)))
                    .filter(|start| start + segment_minutes * 60 <= now)
                {
                    log.push(segment(start, start + segment_minutes * 60));
                }
                if tidies[hour as usize] {
                    let holdings = Holdings { bases: &bases, unusable: &[], leftovers: &leftovers, log: &log };
                    let gone = expired(holdings, at(now), Duration::from_secs(retention_seconds));
                    bases.retain(|base| !gone.bases.contains(&base.lsn));
                    leftovers.retain(|lsn| !gone.leftovers.contains(lsn));
                    log.retain(|segment| !gone.log.contains(&segment.name));
                }
                let Some(first) = first else { continue };
                prop_assert!(!bases.is_empty());
                // The oldest moment that was promised, and one in the middle.
                let oldest = now.saturating_sub(retention_seconds).max(first);
                for moment in [oldest, u64::midpoint(oldest, now)] {
                    let from = bases.iter().rfind(|base| base.as_of <= at(moment));
                    prop_assert!(from.is_some(), "no base for {moment} at {now}");
                    let mut reached = u64::from(from.unwrap().lsn);
                    for segment in &log {
                        if u64::from(segment.start) <= reached {
                            reached = reached.max(u64::from(segment.end));
                        }
                    }
                    let end = log.last().map_or(0, |segment| u64::from(segment.end));
                    prop_assert!(reached >= end, "the log breaks off at {reached} of {end}");
                }
                // Nothing is kept for ever: one base before the cutoff at most, right after tidying.
                if tidies[hour as usize] {
                    let old = bases.iter().filter(|base| u64::from(base.lsn) + retention_seconds < now);
                    prop_assert!(old.count() <= 1);
                }
            }
        }
    }
}
