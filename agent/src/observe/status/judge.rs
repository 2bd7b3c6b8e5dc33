//! ● What a pipeline has written down, and what the two servers said, as an answer at one moment.
//!
//! Pure. The table at the bottom says for every state what is answered at once and in an hour.
//!
//! # Invariants
//! - What the source said is believed for [`FRESH`]; older numbers are unknown, not true.
//! - Where a pipeline does not know how far the replica is, the slot does: it is never ahead of it.

use super::{DatabaseStatus, State, Written};
use crate::pg::PgLsn;
use crate::time::{Micros, system_time};
use crate::watch::{Facts, Wal};

/// Longer than the source may take to answer, and than the pause between two looks.
pub(super) const FRESH: Micros = 30_000_000;

/// What was seen on the replica is believed longer: it is looked at less often.
const COVERAGE_FRESH: Micros = 90_000_000;

/// Lag by stage, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stages {
    /// By which the last received transaction trails.
    pub received: Option<f64>,
    /// Age of the oldest transaction received and not yet applied.
    pub queued: f64,
    /// The lag itself.
    pub applied: Option<f64>,
}

pub(super) fn judge(written: &Written, facts: &Facts, now: Micros) -> DatabaseStatus {
    let mut status = written.status.clone();
    let verdict = written.lag.verdict(now);
    let standing = matches!(
        status.state,
        State::Stopped | State::Fenced | State::Promoted
    );
    status.lag_seconds = verdict.lag_seconds;
    status.rpo_breached = verdict.breached || standing || written.needs_a_person;
    status.stages = Stages {
        received: verdict.received_seconds,
        queued: verdict.queued_seconds,
        applied: verdict.lag_seconds,
    };
    let since = system_time(written.since);
    status.since = Some(humantime::format_rfc3339_seconds(since).to_string());
    let wal = facts.wal.as_ref().filter(|wal| now - wal.at <= FRESH);
    let slot = wal.and_then(|wal| wal.slots.get(&status.stream));
    status.slot_retained_bytes = slot.and_then(|slot| slot.retained);
    status.source_disk_full_seconds = wal.and_then(|wal| wal.disk_full_seconds);
    let applied = written
        .applied
        .or_else(|| slot.and_then(|slot| slot.confirmed));
    status.lag_bytes = end_of_wal(written, wal)
        .zip(applied)
        .map(|(end, applied)| u64::from(end).saturating_sub(u64::from(applied)));
    status.waits_for = facts.waits_for(&status.stream, now);
    let seen = written.coverage.as_ref();
    let seen = seen.filter(|(at, _)| now - at <= COVERAGE_FRESH);
    status.coverage = seen.map(|(_, coverage)| coverage.clone());
    status
}

/// The end of the source's WAL: as it says itself, or as the stream told a moment ago.
fn end_of_wal(written: &Written, wal: Option<&Wal>) -> Option<PgLsn> {
    let told = written
        .told
        .filter(|_| written.status.state == State::Streaming);
    wal.map(|wal| wal.written).max(told)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::observe::lag::Lag;
    use crate::observe::status::Leg;
    use crate::watch::WatchedSlot;
    use crate::watch::coverage::Coverage;

    const SECOND: Micros = 1_000_000;
    const HOUR: Micros = 3600 * SECOND;

    fn written(state: State, applied: bool) -> Written {
        let mut lag = Lag::new(Duration::from_secs(1), Duration::from_secs(30));
        if applied {
            lag.applied(0, 0);
        }
        Written {
            status: DatabaseStatus {
                stream: "dr_agent_app".to_owned(),
                state,
                leg: Leg::Whole,
                ..DatabaseStatus::default()
            },
            since: 0,
            needs_a_person: false,
            lag,
            told: Some(PgLsn::from(900)),
            applied: applied.then(|| PgLsn::from(500)),
            coverage: Some((0, Coverage::default())),
        }
    }

    fn facts(at: Micros) -> Facts {
        let slot = WatchedSlot {
            retained: Some(400),
            confirmed: Some(PgLsn::from(450)),
        };
        let mut facts = Facts::default();
        facts.wal = Some(Wal {
            at,
            written: PgLsn::from(1000),
            slots: [("dr_agent_app".to_owned(), slot)].into(),
            disk_full_seconds: Some(7200.0),
        });
        facts
    }

    /// State; whether anything was ever applied; breached after a second, and in an hour; lag after a second, and in an hour.
    /// "Dead" is a pipeline whose task has ended by a bug: it is shown as stopped, and so is a database that vanished.
    type Row = (State, bool, bool, bool, Option<f64>, Option<f64>);

    const TABLE: [Row; 14] = [
        (State::Initializing, false, true, true, None, None),
        (
            State::Initializing,
            true,
            false,
            true,
            Some(0.0),
            Some(3599.0),
        ),
        (State::Copying, false, true, true, None, None),
        (State::Copying, true, false, true, Some(0.0), Some(3599.0)),
        (State::Streaming, false, true, true, None, None),
        // No heartbeat came for an hour: the monitor, the link or the source is dead.
        (State::Streaming, true, false, true, Some(0.0), Some(3599.0)),
        (State::Retrying, false, true, true, None, None),
        (State::Retrying, true, false, true, Some(0.0), Some(3599.0)),
        (State::Stopped, false, true, true, None, None),
        (State::Stopped, true, true, true, Some(0.0), Some(3599.0)),
        (State::Fenced, false, true, true, None, None),
        (State::Fenced, true, true, true, Some(0.0), Some(3599.0)),
        (State::Promoted, false, true, true, None, None),
        (State::Promoted, true, true, true, Some(0.0), Some(3599.0)),
    ];

    #[test]
    fn in_every_state_the_answer_gets_worse_with_time() {
        for (state, applied, breached, later, lag, lag_later) in TABLE {
            let written = written(state, applied);
            let answer = |at| judge(&written, &facts(at), at);
            let (now, then) = (answer(SECOND), answer(HOUR));
            let seen = (
                now.rpo_breached,
                then.rpo_breached,
                now.lag_seconds,
                then.lag_seconds,
            );
            assert_eq!(seen, (breached, later, lag, lag_later), "{state:?}");
            assert_eq!(then.stages.applied, lag_later, "{state:?}");
        }
        for state in State::ALL {
            assert_eq!(TABLE.iter().filter(|row| row.0 == state).count(), 2);
        }
    }

    #[test]
    fn what_is_protected_is_not_known_for_ever() {
        for state in State::ALL {
            let written = written(state, true);
            let known = |at| judge(&written, &facts(at), at).coverage.is_some();
            assert!(known(SECOND) && !known(HOUR), "{state:?}");
        }
    }

    #[test]
    fn what_needs_a_person_is_breached_until_it_streams_again() {
        for state in State::ALL {
            let mut written = written(state, true);
            written.needs_a_person = true;
            assert!(judge(&written, &facts(0), 0).rpo_breached, "{state:?}");
        }
    }

    #[test]
    fn what_the_source_keeps_is_known_in_every_state_while_it_answers() {
        for state in State::ALL {
            for applied in [false, true] {
                let written = written(state, applied);
                let answer = judge(&written, &facts(HOUR), HOUR);
                assert_eq!(answer.slot_retained_bytes, Some(400), "{state:?}");
                assert_eq!(answer.source_disk_full_seconds, Some(7200.0), "{state:?}");
                // Without a progress row by the slot, which is never ahead.
                let behind = if applied { 500 } else { 550 };
                assert_eq!(answer.lag_bytes, Some(behind), "{state:?}");
                // And not as it was once it answers no more.
                let late = judge(&written, &facts(0), HOUR);
                assert_eq!(late.slot_retained_bytes, None, "{state:?}");
                assert_eq!(late.source_disk_full_seconds, None, "{state:?}");
                let told = (state == State::Streaming && applied).then_some(400);
                assert_eq!(late.lag_bytes, told, "{state:?}");
            }
        }
    }
}
