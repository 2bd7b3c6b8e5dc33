//! Tables that are copied beside the stream, and from where on the stream brings their changes.
//!
//! Whoever copies them says so here; the relations of the sink ask. Until then, changes of a table that is on no list are left out:
//! they come with its copy.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::names::TableName;
use crate::pg::PgLsn;
use crate::schema::listing::Copied;

/// Shared by the sink and whoever copies.
#[derive(Clone, Debug, Default)]
pub struct Beside(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<KnownTables>,
    /// A table has come of which changes are left out.
    news: Notify,
}

#[derive(Debug, Default)]
struct KnownTables {
    tables: HashMap<TableName, Copied>,
    /// Those that have not joined, and of which the stream has brought changes.
    left_out: BTreeSet<TableName>,
}

impl Beside {
    fn lock(&self) -> MutexGuard<'_, KnownTables> {
        let known = &self.0.known;
        known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From its snapshot on the stream brings the changes of this table. Nothing behind that snapshot may have been folded yet.
    pub fn join(&self, table: TableName, copied: Copied) {
        let mut known = self.lock();
        known.left_out.remove(&table);
        known.tables.insert(table, copied);
    }

    /// The stream knows better by now: the table has another name, is gone, or is to be copied again.
    pub(super) fn part(&self, table: &TableName) {
        self.lock().tables.remove(table);
    }

    /// Changes of a table come that has not joined.
    pub(super) fn leave_out(&self, table: &TableName) {
        let mut known = self.lock();
        if !known.left_out.contains(table) {
            known.left_out.insert(table.clone());
            self.0.news.notify_one();
        }
    }

    /// The tables of which changes were left out.
    pub fn left_out(&self) -> BTreeSet<TableName> {
        self.lock().left_out.clone()
    }

    /// These are gone from the source: what was left out of them concerns nobody.
    pub fn forget(&self, tables: impl IntoIterator<Item = TableName>) {
        let mut known = self.lock();
        for table in tables {
            known.left_out.remove(&table);
        }
    }

    /// Ends once there is another one of them.
    pub async fn news(&self) {
        self.0.news.notified().await;
    }

    /// What has been copied of a table.
    pub(super) fn get(&self, table: &TableName) -> Option<Copied> {
        self.lock().tables.get(table).cloned()
    }

    /// Those that have joined.
    pub fn tables(&self) -> BTreeSet<TableName> {
        self.lock().tables.keys().cloned().collect()
    }

    /// The newest snapshot of them.
    pub fn newest(&self) -> Option<PgLsn> {
        let known = self.lock();
        known
            .tables
            .values()
            .filter_map(|copied| copied.snapshot_lsn)
            .max()
    }
}
