//! What the connections of a copy share: the parts that are left, the tables' counts, and the observer.
//!
//! Used wherever rows travel in parallel: the initial copy, taking a base backup, loading one. Holds no
//! connection and moves no row.
//!
//! # Invariants
//! - Every part is taken once, in the order given.
//! - A table is announced once, with the last of its parts.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use super::plan::{Estimate, TablePart};
use super::progress::CopyObserver;
use crate::names::TableName;

/// The work of one copy.
pub(crate) struct CopyWork<'a> {
    tables: Vec<&'a TableName>,
    observer: &'a dyn CopyObserver,
    tables_total: usize,
    state: Mutex<WorkState>,
}

struct WorkState {
    queue: VecDeque<TakenWork>,
    sums: Vec<Sums>,
    tables_done: usize,
    estimate: Estimate,
}

/// A part that a connection works on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakenWork {
    /// Its place in the order given, from 0.
    pub(crate) number: usize,
    /// The part.
    pub(crate) part: TablePart,
    /// The table has no other.
    pub(crate) is_whole: bool,
}

/// What a table's parts came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    parts: usize,
    parts_done: usize,
    /// Rows.
    pub(crate) rows: u64,
    /// Bytes of the COPY streams.
    pub(crate) bytes: u64,
}

impl<'a> CopyWork<'a> {
    /// All of it; `parts` name tables by their place in `tables`. `tables_total` includes tables that
    /// hold their rows already.
    pub(crate) fn new(
        tables: Vec<&'a TableName>,
        parts: &[TablePart],
        tables_total: usize,
        observer: &'a dyn CopyObserver,
    ) -> Self {
        let mut sums = vec![Sums::default(); tables.len()];
        for part in parts {
            sums[part.table].parts += 1;
        }
        let planned = parts.iter().map(|part| part.bytes).sum();
        let tables_done = tables_total - tables.len();
        observer.planned(planned);
        observer.tables(tables_total, tables_done);
        let queue = parts.iter().enumerate().map(|(number, part)| TakenWork {
            number,
            part: *part,
            is_whole: sums[part.table].parts == 1,
        });
        let state = WorkState {
            queue: queue.collect(),
            sums,
            tables_done,
            estimate: Estimate::new(planned),
        };
        Self {
            tables,
            observer,
            tables_total,
            state: Mutex::new(state),
        }
    }

    /// Who is told.
    pub(crate) fn observer(&self) -> &'a dyn CopyObserver {
        self.observer
    }

    /// Places of the tables that have several parts.
    pub(crate) fn split_tables(&self) -> Vec<usize> {
        let sums = &self.state().sums;
        (0..sums.len()).filter(|&at| sums[at].parts > 1).collect()
    }

    fn state(&self) -> MutexGuard<'_, WorkState> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// The next part.
    pub(crate) fn take(&self) -> Option<TakenWork> {
        self.state().queue.pop_front()
    }

    /// Counts a finished part; returns the table's sums when it was the last one.
    pub(crate) fn finish(&self, part: &TablePart, rows: u64, bytes: u64) -> Option<Sums> {
        let mut state = self.state();
        let planned = state.estimate.finished(part.bytes, bytes);
        let sums = &mut state.sums[part.table];
        sums.parts_done += 1;
        sums.rows += rows;
        sums.bytes += bytes;
        let sums = *sums;
        drop(state);
        self.observer.planned(planned);
        (sums.parts_done == sums.parts).then_some(sums)
    }

    /// Tells that all rows of a table are where they belong.
    pub(crate) fn announce(&self, table: usize, rows: u64) {
        let mut state = self.state();
        state.tables_done += 1;
        let done = state.tables_done;
        drop(state);
        self.observer.table_ready(self.tables[table], rows);
        self.observer.tables(self.tables_total, done);
    }
}
