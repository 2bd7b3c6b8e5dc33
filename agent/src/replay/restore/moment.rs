//! ● The moment to restore to, and which transactions lie before it.
//!
//! Pure. A transaction is judged by its Begin, which names where and when it commits: so nothing of one that lies
//! behind the moment is ever applied.

use std::fmt;

use crate::pg::PgLsn;
use crate::pg::pgoutput::Begin;
use crate::time::{Micros, system_time};

/// Where to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreMoment {
    /// After everything the archive has.
    End,
    /// Before the first transaction that committed later than this on the source's clock, as
    /// `recovery_target_time` does.
    Time(Micros),
    /// Before the first transaction whose commit record is at or behind this position.
    Lsn(PgLsn),
}

impl RestoreMoment {
    /// Whether the transaction that begins so lies before the moment.
    pub fn includes(self, begin: &Begin) -> bool {
        match self {
            Self::End => true,
            Self::Time(time) => begin.commit_time <= time,
            Self::Lsn(lsn) => begin.final_lsn < lsn,
        }
    }

    /// Whether a base backup as of this position and time may be used for it.
    pub fn is_at_or_after(self, lsn: PgLsn, time: Micros) -> bool {
        match self {
            Self::End => true,
            Self::Time(moment) => time <= moment,
            Self::Lsn(moment) => lsn <= moment,
        }
    }
}

impl fmt::Display for RestoreMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("the end of the archive"),
            Self::Time(time) => humantime::format_rfc3339_micros(system_time(*time)).fmt(f),
            Self::Lsn(lsn) => lsn.fmt(f),
        }
    }
}
