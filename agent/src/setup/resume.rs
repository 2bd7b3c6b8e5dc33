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
use std::time::Duration;

use futures_util::future;
use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::replica;
use super::set_back::{self, Missed};
use super::{Setup, aside, slot, source_side, under_way};
use crate::catalog::Table;
use crate::catalog::routing;
use crate::config::SetAside;
use crate::copy::export;
use crate::error::chain;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::leftover;
use crate::pg::replication::ReplicationConnection;
use crate::schema::table_sync::TableSync;
use crate::schema::{progress, table_sync};

/// Tables that are larger together are copied beside the stream.
const AT_ONCE_BYTES: i64 = 32 << 20;

/// A snapshot that takes longer waits for open transactions.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(2);

/// The size of tables, without indexes.
async fn bytes_of(client: &Client, tables: &[&TableName]) -> Result<i64, SetupError> {
    const SQL: &str = "
        SELECT coalesce(sum(pg_table_size(c.oid)), 0)::bigint
          FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
          JOIN pg_namespace n ON n.nspname = s
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t";
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .iter()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip();
    let row = client.query_one(SQL, &[&schemas, &names]).await;
    row.map(|row| row.get(0))
        .map_err(|error| SetupError::sql(Side::Source, "read the size of tables")(error.into()))
}

/// Whether an earlier session has caught up with tables beside the stream and was not done.
pub(super) async fn catches_up(client: &Client, stream: &StreamName) -> Result<bool, SetupError> {
    let late = progress::read(client, &stream.late()).await;
    late.map(|late| late.is_some()).map_err(SetupError::sql(
        Side::Replica,
        "look what was caught up with beside the stream",
    ))
}

impl Setup<'_> {
    pub(super) async fn resume(
        &mut self,
        walsender: &mut ReplicationConnection,
        another: Option<&TableName>,
    ) -> Result<(), SetupError> {
        self.source.found.require_unaltered(&self.source.stream)?;
        self.source.leave_out_what_cannot_be_published();
        let (rows, present, late, under_way) = future::join4(
            replica::synced_tables(&self.replica, &self.source.stream),
            replica::tables(&self.replica),
            catches_up(&self.replica, &self.source.stream),
            under_way::any(&self.source.client, &self.replica),
        )
        .await;
        let (rows, present, late, under_way) = (rows?, present?, late?, under_way?);
        let that = |is: fn(&TableSync) -> bool| -> BTreeSet<TableName> {
            let rows = rows.iter().filter(|row| is(row));
            rows.map(|row| row.table.clone()).collect()
        };
        let ready = that(|row| row.ready);
        if late {
            // What was being caught up with beside the stream is half-way between two moments.
            let unfinished = rows.iter().filter(|row| row.held && !row.ready);
            let unfinished = unfinished.map(|row| (row.table.clone(), Missed::Changes));
            set_back::reset(
                &mut self.replica,
                &self.source.stream,
                &unfinished.collect(),
            )
            .await?;
        }
        let mut missed = match under_way {
            // What is another table by now the stream will say.
            true => BTreeMap::new(),
            false => self.source.found.missed(&self.source.wanted, &rows),
        };
        if let Some(another) = another.filter(|table| ready.contains(*table)) {
            missed.entry(another.clone()).or_insert(Missed::Changes);
        }
        self.miss_together(&ready, &mut missed).await?;
        self.require_tables(&ready, &missed, &present)?;
        if rows.iter().any(|row| row.ready && !row.noted) {
            table_sync::adopt(&self.replica, &self.source.stream)
                .await
                .map_err(SetupError::sql(
                    Side::Replica,
                    "note which tables were copied",
                ))?;
        }
        if !missed.is_empty() {
            self.source.warnings.push(format!(
                "tables that were not in the publication for a while, or are others under the same name on either side, are copied again: {}",
                source_side::names(missed.keys())
            ));
            set_back::reset(&mut self.replica, &self.source.stream, &missed).await?;
        }
        self.source.publish(false).await?;
        slot::make_the_list_known(&self.source, walsender).await?;
        if !missed.is_empty() || rows.iter().any(|row| !row.ready) {
            self.forget_unfinished().await?;
        }
        let there = |table: &TableName| {
            !under_way || missed.contains_key(table) || rows.iter().any(|row| row.table == *table)
        };
        self.copy_the_rest(walsender, &ready, &missed, there).await
    }

    /// Partitions whose rows cannot be told from one another on the replica are copied again together.
    pub(super) async fn miss_together(
        &self,
        ready: &BTreeSet<TableName>,
        missed: &mut BTreeMap<TableName, Missed>,
    ) -> Result<(), SetupError> {
        let published = self.source.wanted.published.iter();
        let (source, names) = (&self.source.client, published.map(|table| &table.name));
        let tops = routing::tops(source, names).await.map_err(|error| {
            SetupError::sql(Side::Source, "read the partitioned tables")(error.into())
        })?;
        let again: Vec<TableName> = routing::copied_together(&tops, |table| {
            !ready.contains(table) || missed.contains_key(table)
        })
        .filter(|table| ready.contains(*table))
        .cloned()
        .collect();
        for table in again {
            missed.entry(table).or_insert(Missed::Changes);
        }
        Ok(())
    }

    /// A table that was dropped, or left out, before its copy was finished.
    pub(super) async fn forget_unfinished(&self) -> Result<(), SetupError> {
        let rows = replica::synced_tables(&self.replica, &self.source.stream).await?;
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

    fn require_tables(
        &self,
        ready: &BTreeSet<TableName>,
        missed: &BTreeMap<TableName, Missed>,
        present: &BTreeSet<TableName>,
    ) -> Result<(), SetupError> {
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
        there: impl Fn(&TableName) -> bool,
    ) -> Result<(), SetupError> {
        let rest: Vec<Table> = self
            .source
            .wanted
            .published
            .iter()
            .filter(|table| !ready.contains(&table.name) || missed.contains_key(&table.name))
            .filter(|table| there(&table.name))
            .cloned()
            .collect();
        if rest.is_empty() {
            return Ok(());
        }
        if ready.is_empty() || self.source.config.replica.set_aside == SetAside::Never {
            return self.copy_tables(walsender, rest, ready.is_empty()).await;
        }
        // What takes no time is done before the stream begins; the rest beside it, and what something is wrong with.
        let aside = aside::noted(&self.replica, &self.source.stream).await?;
        let mut rest = rest;
        rest.retain(|table| !aside.iter().any(|one| one.table == table.name));
        if rest.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.copy_at_once(rest).await {
            tracing::info!(
                database = self.database, reason = %chain(&error),
                "tables that are to be copied are copied beside the stream"
            );
        }
        Ok(())
    }

    /// Copies tables that are small, if a snapshot of them is to be had at once.
    async fn copy_at_once(&self, tables: Vec<Table>) -> Result<(), SetupError> {
        let names: Vec<&TableName> = tables.iter().map(|table| &table.name).collect();
        let bytes = bytes_of(&self.source.client, &names).await?;
        if bytes > AT_ONCE_BYTES {
            return Err(SetupError::Stopped);
        }
        let name = self.source.stream.application_name("late");
        let mut exporter = export::session(&self.source.info, name.clone())
            .await
            .map_err(SetupError::sql(
                Side::Source,
                "open a replication connection",
            ))?;
        let exporting = slot::snapshot(&self.source, &mut exporter);
        let Ok(snapshot) = tokio::time::timeout(SNAPSHOT_WITHIN, exporting).await else {
            // It would wait on, and hold WAL, until it noticed that nobody listens.
            leftover::end_sessions(&self.source.client, &name)
                .await
                .map_err(SetupError::sql(Side::Source, "end a session that waits"))?;
            return Err(SetupError::Stopped);
        };
        let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
        table_sync::add(&self.replica, &self.source.stream, &names)
            .await
            .map_err(SetupError::sql(Side::Replica, "record new tables"))?;
        self.copy(tables, &snapshot?, false).await
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
