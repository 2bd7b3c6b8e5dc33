//! ● Which life of which source an LSN belongs to.
//!
//! Pure. A *history* is what one slot follows, from where it was created: one order of transactions, one meaning of every LSN.
//! A source that was restored or failed over may give an LSN out a second time; whoever sets the replica up anew then begins
//! another history, and what was written of the one before (in the archive, in a Kinesis stream) is never mixed with it.
//!
//! A source that is set back with its slot, by a snapshot of its storage, says nothing of it: the same history then has two lives.
//! Time does not go back with it, and by that it is found out ([`WentBack`]).
//!
//! # Invariants
//! - Two histories of one source differ in when they began, by the source's clock.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;

use crate::error::remedy;
use crate::pg::PgLsn;
use crate::time::{Micros, pg_micros, system_time};

/// As far as the clock of a healthy server may be set back.
const CLOCK_STEP_MAX: Micros = 60_000_000;

/// A transaction came that lies before others and committed long after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a transaction that ends at {end_lsn} committed at {}, although what lies behind it did at {}: the source went back in time",
    humantime::format_rfc3339_seconds(system_time(*.commit_time)), humantime::format_rfc3339_seconds(system_time(*.newest))
)]
pub struct WentBack {
    /// Where it ends, or its batch.
    pub end_lsn: PgLsn,
    /// When it committed.
    pub commit_time: Micros,
    /// The last commit time that was known, of what lies behind it.
    pub newest: Micros,
}

impl WentBack {
    /// What a person does about it.
    pub fn hint() -> String {
        format!(
            "the source, with its slot, was set back by a snapshot of its storage, and went on from there; the replica and the \
             archive may hold the only copy of what came after it, and `dr-agent promote` keeps it. To go on with what the \
             source has now, also if only a clock was wrong; the archive keeps both histories. {}",
            remedy::start_over_with(Some(remedy::SLOT_AND_NOTE), "start the agents")
        )
    }
}

/// Whether what comes a second time, before what is known, is what came the first time. `newest`: by when everything known had
/// committed; the commit time of the last transaction is not enough, where that came to the source from another node and bears its
/// time.
///
/// # Errors
/// [`WentBack`]
pub fn comes_again(
    end_lsn: PgLsn,
    commit_time: Micros,
    newest: Option<Micros>,
) -> Result<(), WentBack> {
    match newest {
        Some(newest) if commit_time > newest + CLOCK_STEP_MAX => Err(WentBack {
            end_lsn,
            commit_time,
            newest,
        }),
        _ => Ok(()),
    }
}

/// How [`History`] writes a time: sortable, without what a file system or a URL would mind.
const BEGAN: &str = "%Y%m%dT%H%M%S.%6fZ";

/// What one slot follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct History {
    /// The source's (`pg_control_system()`).
    pub system_identifier: u64,
    /// When its slot was created, by the source's clock.
    pub began: Micros,
}

/// As in names: `7312345678901234567-20261126T143000.123456Z`.
impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let began = Timestamp::try_from(system_time(self.began)).map_err(|_| fmt::Error)?;
        write!(f, "{}-{}", self.system_identifier, began.strftime(BEGAN))
    }
}

/// It is not what [`History`] writes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a system identifier and a time")]
pub struct NoHistory;

impl FromStr for History {
    type Err = NoHistory;

    fn from_str(text: &str) -> Result<Self, NoHistory> {
        let (system_identifier, began) = text.split_once('-').ok_or(NoHistory)?;
        let parsed = jiff::fmt::strtime::parse(BEGAN, began)
            .and_then(|time| time.to_datetime())
            .and_then(|time| time.to_zoned(jiff::tz::TimeZone::UTC));
        let history = Self {
            system_identifier: system_identifier.parse().map_err(|_| NoHistory)?,
            began: pg_micros(parsed.map_err(|_| NoHistory)?.timestamp().into()),
        };
        // One name, one history.
        match history.to_string() == text {
            true => Ok(history),
            false => Err(NoHistory),
        }
    }
}

/// What tells one source from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// `pg_control`'s system identifier, made by `initdb`.
    pub system_identifier: u64,
    /// Raised by every promotion and point-in-time recovery of the source.
    pub timeline: i32,
}

impl Cluster {
    /// Whether `found` is the same cluster on a later timeline.
    pub fn is_promoted(&self, found: &Self) -> bool {
        self.system_identifier == found.system_identifier && self.timeline < found.timeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_sort_by_time() {
        let names: Vec<String> = [0, 123_456, 850_000_000_000_000]
            .into_iter()
            .map(|began| {
                let history = History {
                    system_identifier: 7_312_345_678_901_234_567,
                    began,
                };
                let name = history.to_string();
                assert_eq!(name.parse(), Ok(history));
                name
            })
            .collect();
        assert_eq!(names[1], "7312345678901234567-20000101T000000.123456Z");
        assert!(names.is_sorted(), "{names:?}");
        for wrong in [
            "",
            "7",
            "7-",
            "7312345678901234567",
            "7-20000101T000000.12345Z",
            "07-20000101T000000.123456Z",
            "x-20000101T000000.123456Z",
        ] {
            assert_eq!(wrong.parse::<History>(), Err(NoHistory), "{wrong}");
        }
    }
}
