//! Every later start of a stream: what changed on the source meanwhile is taken in.
//!
//! # Invariants
//! - A table whose changes were not published for a while, or that is another one than was copied, is copied again, and is set
//!   back before it is listed again.
//! - A table that cannot be published, because nobody has settled its key or this role does not own
//!   it, stays out and is reported; it does not stop the protection of all the others. (At the
//!   first start it does: then a person is looking.)
//!
//! # What it does not do
//! It never begins again from nothing: a publication that was dropped or a table that is missing on
//! the replica is for a person to settle.

use std::collections::{BTreeMap, BTreeSet};

use super::error::{SetupError, Side};
use super::replica;
use super::table_sync::{Missed, Row};
use super::{Setup, slot, source_side, table_sync};
use crate::catalog::{Table, TableName};
use crate::pg::replication::ReplicationConnection;

impl Setup<'_> {
    pub(super) async fn resume(
        &mut self,
        walsender: &mut ReplicationConnection,
        another: Option<&TableName>,
    ) -> Result<(), SetupError> {
        self.source.found.require_unaltered(&self.source.stream)?;
        self.source.leave_out_what_cannot_be_published();
        let rows = table_sync::rows(&self.replica, &self.source.stream).await?;
        let that = |is: fn(&Row) -> bool| -> BTreeSet<TableName> {
            let rows = rows.iter().filter(|row| is(row));
            rows.map(|row| row.table.clone()).collect()
        };
        let ready = that(|row| row.ready);
        let mut missed = self.source.found.missed(&self.source.wanted, &rows);
        if let Some(another) = another.filter(|table| ready.contains(*table)) {
            missed.entry(another.clone()).or_insert(Missed::Changes);
        }
        self.require_tables(&ready, &missed).await?;
        if !missed.is_empty() {
            self.source.warnings.push(format!(
                "tables that were not in the publication for a while, or are others under the same name, are copied again: {}",
                source_side::names(missed.keys())
            ));
            table_sync::reset(&mut self.replica, &self.source.stream, &missed).await?;
        }
        self.source.publish(false).await?;
        slot::make_the_list_known(&self.source, walsender).await?;
        self.forget_unfinished().await?;
        self.copy_the_rest(walsender, &ready, &missed).await
    }

    /// A table that was dropped, or left out, before its copy was finished.
    pub(super) async fn forget_unfinished(&self) -> Result<(), SetupError> {
        let rows = table_sync::rows(&self.replica, &self.source.stream).await?;
        let published = &self.source.wanted.published;
        let unfinished: Vec<TableName> = rows
            .iter()
            .filter(|row| !row.ready && !published.iter().any(|table| table.name == row.table))
            .map(|row| row.table.clone())
            .collect();
        table_sync::forget(&self.replica, &self.source.stream, &unfinished)
            .await
            .map_err(SetupError::sql(Side::Replica, "forget unfinished tables"))
    }

    async fn require_tables(
        &self,
        ready: &BTreeSet<TableName>,
        missed: &BTreeMap<TableName, Missed>,
    ) -> Result<(), SetupError> {
        let present = replica::tables(&self.replica).await?;
        let missing: Vec<TableName> = self
            .source
            .wanted
            .published
            .iter()
            .map(|table| &table.name)
            .filter(|name| ready.contains(*name) && !missed.contains_key(*name))
            .filter(|name| !present.contains(*name))
            .cloned()
            .collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(SetupError::ReplicaTableMissing(missing))
        }
    }

    /// Copies what is published and not ready, at the snapshot of a temporary slot.
    async fn copy_the_rest(
        &mut self,
        walsender: &mut ReplicationConnection,
        ready: &BTreeSet<TableName>,
        missed: &BTreeMap<TableName, Missed>,
    ) -> Result<(), SetupError> {
        let rest: Vec<Table> = self
            .source
            .wanted
            .published
            .iter()
            .filter(|table| !ready.contains(&table.name) || missed.contains_key(&table.name))
            .cloned()
            .collect();
        if rest.is_empty() {
            return Ok(());
        }
        self.copy_tables(walsender, rest, ready.is_empty()).await
    }

    /// Copies tables at the snapshot of a temporary slot.
    pub(super) async fn copy_tables(
        &mut self,
        walsender: &mut ReplicationConnection,
        tables: Vec<Table>,
        whole_schema: bool,
    ) -> Result<(), SetupError> {
        let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
        table_sync::add(&self.replica, &self.source.stream, &names)
            .await
            .map_err(SetupError::sql(Side::Replica, "record new tables"))?;
        let snapshot = slot::snapshot(&self.source, walsender).await?;
        self.copy(tables, &snapshot, whole_schema).await
    }
}
