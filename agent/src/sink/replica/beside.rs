//! Tables that are copied beside the stream, and from where on the stream brings their changes.
//!
//! Whoever copies them says so here; the relations of the sink ask. Until then, changes of a table that is on no list are left out:
//! they come with its copy.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::catalog::TableName;
use crate::listed::Copied;
use crate::pg::PgLsn;

/// Shared by the sink and whoever copies.
#[derive(Clone, Debug, Default)]
pub struct Beside(Arc<Mutex<HashMap<TableName, Copied>>>);

impl Beside {
    fn lock(&self) -> MutexGuard<'_, HashMap<TableName, Copied>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From its snapshot on the stream brings the changes of this table. Nothing behind that snapshot may have been folded yet.
    pub fn join(&self, table: TableName, copied: Copied) {
        self.lock().insert(table, copied);
    }

    /// What has been copied of a table.
    pub(super) fn get(&self, table: &TableName) -> Option<Copied> {
        self.lock().get(table).cloned()
    }

    /// The newest snapshot of them.
    pub fn newest(&self) -> Option<PgLsn> {
        let tables = self.lock();
        tables
            .values()
            .filter_map(|copied| copied.snapshot_lsn)
            .max()
    }
}
