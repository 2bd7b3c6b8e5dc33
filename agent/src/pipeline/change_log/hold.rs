//! ● How far the slot may move for the change log, and who reads the source for it.
//!
//! Pure: what is known of the log, of the source and of the store is an argument, and so is the time.
//!
//! # Invariants
//! - The slot moves no further than what the log has, or with a required archive the store. Only a log that is not required
//!   lets go, and only where it takes nothing, or could not be read for long.
//! - Of a history of which nothing is known yet, the slot does not move at all.
//! - A gap is left only where neither the source nor the store has what is missing, and no other agent's spool may have it.

use std::time::{Duration, Instant};

use crate::names::history::History;
use crate::pg::PgLsn;

/// After that long without a reading that works, WAL is not kept for the log any more, and it gets a gap: the source's disk
/// is worth more.
const LET_GO_AFTER: Duration = Duration::from_secs(600);

/// How far the slot may be moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hold {
    /// None while nothing is known.
    pub(super) history: Option<History>,
    /// None where nothing holds it.
    pub(super) up_to: Option<PgLsn>,
}

/// How a log stands that is open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// What is in the spool.
    pub(super) position: PgLsn,
    /// What is in the store.
    pub(super) uploaded: PgLsn,
    /// The spool takes nothing now.
    pub(super) stuck: bool,
    /// Nothing could be read for it for too long.
    pub(super) given_up: bool,
}

impl Hold {
    /// The source is in this history: whatever becomes of its log, it is this one that the slot waits for.
    pub(super) fn of(self, history: History) -> Self {
        if self.history == Some(history) {
            return self;
        }
        Self {
            history: Some(history),
            up_to: Some(PgLsn::from(0)),
        }
    }

    /// There is a log, and it stands like this.
    pub(super) fn by(self, log: Standing, required: bool) -> Self {
        let lets_go = log.stuck || log.given_up;
        let up_to = match required {
            true => Some(log.uploaded),
            false => (!lets_go).then_some(log.position),
        };
        Self { up_to, ..self }
    }

    /// The log cannot be opened, and a person was told.
    pub(super) fn without_a_log(self, required: bool) -> Self {
        let up_to = self.up_to.filter(|_| required);
        Self { up_to, ..self }
    }
}

/// Attempts to keep the log that have failed since it moved on last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempts {
    pub(super) count: u32,
    /// They go on for so long that the log lets go.
    pub(super) given_up: bool,
    since: Instant,
}

impl Attempts {
    /// None yet.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            count: 0,
            given_up: false,
            since: now,
        }
    }

    /// Another one; the log may have moved on before it failed.
    pub(super) fn failed(&mut self, moved_on: bool, now: Instant) {
        if moved_on {
            *self = Self::new(now);
        }
        self.count += 1;
        self.given_up = now.saturating_duration_since(self.since) >= LET_GO_AFTER;
    }
}

/// Where a log begins of which nothing is left in the spool: behind what the store has of it. That is what leads on from where
/// the source stands, or what ends before that: then what lies between is a gap that has to be told.
pub(super) fn begins_at(confirmed: PgLsn, leads_to: PgLsn, ends: Option<PgLsn>) -> PgLsn {
    ends.filter(|end| *end < confirmed).unwrap_or(leads_to)
}

/// What leads from where a log ends to what the source still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeadsOn {
    /// It ends where the source can be read, or behind.
    Itself,
    /// Perhaps another agent's spool: no gap is left for it.
    Elsewhere,
    /// Nothing but what the store has, up to here; a gap is what that leaves.
    Behind(PgLsn),
}

/// What leads from `position` to `confirmed`, before which the source has nothing any more. The store leads on up to `stored`;
/// another agent may be reading the slot.
pub(super) fn leads_on(
    position: PgLsn,
    confirmed: PgLsn,
    stored: PgLsn,
    read_by_another: bool,
) -> LeadsOn {
    if position >= confirmed {
        LeadsOn::Itself
    } else if stored < confirmed && read_by_another {
        LeadsOn::Elsewhere
    } else {
        LeadsOn::Behind(stored)
    }
}

/// Whether the source is to be read for the log alone: sessions bring it something that it cannot join, or nothing for too long.
/// A spool that was stuck may have left out what they brought.
pub(super) fn is_to_be_read_apart(
    was_stuck: bool,
    ahead: bool,
    still: Duration,
    limit: Duration,
) -> bool {
    was_stuck || ahead || still >= limit
}

/// How long the log may stand still. A quiet source has a heartbeat.
pub(super) fn stalls_after(rpo: Duration, heartbeat_every: Duration) -> Duration {
    let heartbeats = 2 * heartbeat_every + Duration::from_secs(1);
    (rpo / 4).max(heartbeats)
}

/// How long a session must be at the front before it is relied on.
pub(super) fn lead(heartbeat_every: Duration) -> Duration {
    Duration::from_secs(3).max(2 * heartbeat_every)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn lsn(n: u64) -> PgLsn {
        PgLsn::from(n)
    }

    fn history(began: i64) -> History {
        History {
            system_identifier: 1,
            began,
        }
    }

    #[test]
    fn the_slot_moves_as_far_as_spool_or_store_have_the_log() {
        // (required, stuck, given up) and how far, where the spool has 50 and the store 20.
        let cases = [
            ((false, false, false), Some(50)),
            ((false, true, false), None),
            ((false, false, true), None),
            ((false, true, true), None),
            ((true, false, false), Some(20)),
            ((true, true, false), Some(20)),
            ((true, false, true), Some(20)),
            ((true, true, true), Some(20)),
        ];
        let hold = Hold::default().of(history(1));
        for ((required, stuck, given_up), up_to) in cases {
            let standing = Standing {
                position: lsn(50),
                uploaded: lsn(20),
                stuck,
                given_up,
            };
            let now = hold.by(standing, required);
            assert_eq!(now.up_to, up_to.map(lsn), "{required} {stuck} {given_up}");
            assert_eq!(now.history, hold.history);
        }
    }

    #[test]
    fn without_a_log_the_slot_stays_unless_the_log_is_not_required() {
        assert_eq!(Hold::default().up_to, None);
        let begun = Hold::default().of(history(1));
        assert_eq!(begun.up_to, Some(lsn(0)));
        let known = Hold {
            up_to: Some(lsn(20)),
            ..begun
        };
        // (what is known, required) and how far without a log.
        let cases = [
            (Hold::default(), true, None),
            (Hold::default(), false, None),
            (begun, true, Some(0)),
            (begun, false, None),
            (known, true, Some(20)),
            (known, false, None),
        ];
        for (hold, required, up_to) in cases {
            let now = hold.without_a_log(required);
            assert_eq!(now.up_to, up_to.map(lsn), "{hold:?} {required}");
            assert_eq!(now.history, hold.history);
        }
        // The same history is known already; of another one nothing is.
        assert_eq!(known.of(history(1)), known);
        assert_eq!(known.of(history(2)).up_to, Some(lsn(0)));
    }

    #[test]
    fn ten_minutes_without_progress_and_it_is_given_up() {
        let start = super::super::super::now_instant();
        let mut attempts = Attempts::new(start);
        // (seconds, whether it moved on) and the attempt, whether it is given up.
        let cases = [
            ((0, false), (1, false)),
            ((599, false), (2, false)),
            ((600, false), (3, true)),
            ((900, false), (4, true)),
            ((901, true), (1, false)),
            ((1_500, false), (2, false)),
            ((1_501, false), (3, true)),
        ];
        for ((at, moved_on), expected) in cases {
            attempts.failed(moved_on, start + at * SECOND);
            assert_eq!((attempts.count, attempts.given_up), expected, "{at}");
        }
    }

    #[test]
    fn a_new_log_begins_behind_what_the_store_has() {
        // (confirmed, leads to, ends) and where.
        let cases = [
            // The store has nothing.
            ((100, 100, None), 100),
            // It has what leads on from there, or more.
            ((100, 100, Some(100)), 100),
            ((100, 150, Some(150)), 150),
            // It has something behind that does not lead on.
            ((100, 100, Some(180)), 100),
            ((100, 150, Some(180)), 150),
            // It ends before: the gap is to be told.
            ((100, 100, Some(60)), 60),
        ];
        for ((confirmed, leads_to, ends), start) in cases {
            let begins = begins_at(lsn(confirmed), lsn(leads_to), ends.map(lsn));
            assert_eq!(begins, lsn(start), "{confirmed} {leads_to} {ends:?}");
        }
    }

    #[test]
    fn a_gap_is_left_only_where_nobody_has_what_is_missing() {
        // (position, confirmed, stored, read by another)
        let cases = [
            ((100, 100, 0, true), LeadsOn::Itself),
            ((120, 100, 120, false), LeadsOn::Itself),
            // The store has all of it, whoever reads.
            ((80, 100, 100, true), LeadsOn::Behind(lsn(100))),
            ((80, 100, 130, false), LeadsOn::Behind(lsn(130))),
            // It has some of it, or nothing.
            ((80, 100, 90, true), LeadsOn::Elsewhere),
            ((80, 100, 80, true), LeadsOn::Elsewhere),
            ((80, 100, 90, false), LeadsOn::Behind(lsn(90))),
            ((80, 100, 80, false), LeadsOn::Behind(lsn(80))),
        ];
        for ((position, confirmed, stored, by_another), expected) in cases {
            let found = leads_on(lsn(position), lsn(confirmed), lsn(stored), by_another);
            assert_eq!(
                found, expected,
                "{position} {confirmed} {stored} {by_another}"
            );
        }
    }

    #[test]
    fn the_source_is_read_apart_where_sessions_do_not_bring_what_comes_next() {
        let limit = stalls_after(30 * SECOND, SECOND);
        assert_eq!(limit, Duration::from_millis(7_500));
        // A heartbeat that is rare says more than the RPO.
        assert_eq!(stalls_after(4 * SECOND, 10 * SECOND), 21 * SECOND);
        let cases = [
            ((false, false, Duration::ZERO), false),
            ((false, false, limit - SECOND), false),
            ((false, false, limit), true),
            ((true, false, Duration::ZERO), true),
            ((false, true, Duration::ZERO), true),
        ];
        for ((was_stuck, ahead, still), expected) in cases {
            let found = is_to_be_read_apart(was_stuck, ahead, still, limit);
            assert_eq!(found, expected, "{was_stuck} {ahead} {still:?}");
        }
        assert_eq!((lead(SECOND), lead(5 * SECOND)), (3 * SECOND, 10 * SECOND));
    }
}
