//! What a restore tells at its end, kept from the run that knew it to the one that ends.
//!
//! Kept in `dr_agent.restore` of the target: a restore may be killed and started again many times, and what the base backup
//! was loaded without is known to one of these runs alone.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::log::Committed;
use crate::copy::{CopyObserver, CopyPhase};
use crate::names::TableName;
use crate::pg::PgLsn;

/// As it is stored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ClosingNotes {
    /// The tables that were asked for, in name order; all if empty.
    pub(super) asked: Vec<TableName>,
    /// What is not in the target, in words.
    pub(super) left_out: Vec<String>,
    /// Materialized views to be filled at the end, and in no order.
    pub(super) views: Vec<TableName>,
    /// The last transaction so far that changed a table: its id, commit record and time.
    last_change: Option<(u32, u64, i64)>,
}

impl ClosingNotes {
    /// Nothing yet, of a restore of these tables.
    pub(super) fn of(asked: Vec<TableName>) -> Self {
        Self {
            asked,
            ..Self::default()
        }
    }

    /// The last transaction so far that changed a table.
    pub(super) fn last_change(&self) -> Option<Committed> {
        let (xid, commit_lsn, commit_time) = self.last_change?;
        Some(Committed {
            xid,
            commit_lsn: PgLsn::from(commit_lsn),
            commit_time,
        })
    }

    /// Notes one that this run has seen, or none.
    pub(super) fn note_change(&mut self, seen: Option<Committed>) {
        if let Some(seen) = seen
            && self
                .last_change()
                .is_none_or(|known| known.commit_lsn < seen.commit_lsn)
        {
            self.last_change = Some((seen.xid, seen.commit_lsn.into(), seen.commit_time));
        }
    }
}

/// Gathers what a load leaves out, and hands everything on.
pub(super) struct Gathering<'a> {
    inner: &'a dyn CopyObserver,
    left_out: Mutex<Vec<String>>,
}

impl<'a> Gathering<'a> {
    pub(super) fn new(inner: &'a dyn CopyObserver) -> Self {
        Self {
            inner,
            left_out: Mutex::default(),
        }
    }

    pub(super) fn into_left_out(self) -> Vec<String> {
        let left_out = self.left_out.into_inner();
        left_out.unwrap_or_else(PoisonError::into_inner)
    }
}

impl CopyObserver for Gathering<'_> {
    fn tables(&self, total: usize, done: usize) {
        self.inner.tables(total, done);
    }

    fn planned(&self, bytes: u64) {
        self.inner.planned(bytes);
    }

    fn copied(&self, rows: u64, bytes: u64) {
        self.inner.copied(rows, bytes);
    }

    fn table_ready(&self, table: &TableName, rows: u64) {
        self.inner.table_ready(table, rows);
    }

    fn phase(&self, phase: CopyPhase) {
        self.inner.phase(phase);
    }

    fn left_out(&self, what: &str) {
        let left_out = self.left_out.lock();
        left_out
            .unwrap_or_else(PoisonError::into_inner)
            .push(what.to_owned());
        self.inner.left_out(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    #[test]
    fn the_last_change_never_goes_back_and_survives() {
        let at = |xid: u32| Committed {
            xid,
            commit_lsn: lsn(u64::from(xid) * 10),
            commit_time: 5,
        };
        let mut kept = ClosingNotes::default();
        for seen in [Some(at(2)), None, Some(at(1))] {
            kept.note_change(seen);
        }
        let json = serde_json::to_string(&kept).unwrap();
        let kept: ClosingNotes = serde_json::from_str(&json).unwrap();
        assert_eq!(kept.last_change(), Some(at(2)));
    }
}
