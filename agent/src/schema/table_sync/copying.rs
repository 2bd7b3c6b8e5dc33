//! The steps of one copy in `dr_agent.table_sync`, from `pending` to `ready`.
//!
//! # Invariants
//! - Each compares the table's snapshot: an agent whose tables were taken over by a later copy of the same stream changes nothing more.

use std::collections::HashSet;

use tokio_postgres::GenericClient;
use tokio_postgres::types::{ToSql, Type};

use super::{HAS_THE_NAME, TABLE};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};
use crate::schema::listing::{Listed, ListedAs};

/// The steps of one copy of a stream's tables, at one snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Copy<'a> {
    /// Whose tables.
    pub stream: &'a StreamName,
    /// Changes committed before it are in the copy.
    pub snapshot_lsn: PgLsn,
}

/// Whether the row was the copy's own, and the step is taken.
pub type IsOurs = bool;

impl Copy<'_> {
    /// Enters all tables as `pending` at this copy's snapshot, except those that hold their rows from an earlier one; where
    /// everything is copied (`whole_schema`), forgets unfinished ones that are not in the copy any more. Returns all tables of the
    /// stream that hold their rows.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn begin(
        self,
        replica: &(impl GenericClient + Sync),
        tables: &[TableName],
        listed: &Listed,
        whole_schema: bool,
    ) -> Result<HashSet<TableName>, PgError> {
        let enter = format!(
            "INSERT INTO {TABLE} AS t
                   (stream, table_schema, table_name, state, snapshot_lsn, listed_as)
            SELECT $1, s, n, 'pending', $5, l FROM unnest($2::text[], $3::text[], $4::text[]) AS wanted (s, n, l)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE
               SET state = 'pending', snapshot_lsn = excluded.snapshot_lsn, listed_as = excluded.listed_as,
                   rows = 0, bytes = 0, updated_at = now()
             WHERE t.state NOT IN ('copied', 'ready')"
        );
        // Then all tables that are not ready are in this copy; others have left the source.
        let forget = format!(
            "DELETE FROM {TABLE} AS t
             WHERE stream = $1 AND state <> 'ready'
               AND NOT EXISTS (SELECT 1 FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
                                WHERE s = t.table_schema AND n = t.table_name)"
        );
        let held = format!(
            "SELECT table_schema, table_name FROM {TABLE} WHERE stream = $1 AND state IN ('copied', 'ready')"
        );
        let stream = self.stream.as_str();
        let (schemas, names) = TableName::arrays(tables);
        let listed_as: Vec<Option<&str>> = tables
            .iter()
            .map(|table| listed.get(table).map(ListedAs::as_str))
            .collect();
        let lsn = self.snapshot_lsn;
        replica
            .execute(&enter, &[&stream, &schemas, &names, &listed_as, &lsn])
            .await?;
        if whole_schema {
            replica
                .execute(&forget, &[&stream, &schemas, &names])
                .await?;
        }
        let rows = replica.query(&held, &[&stream]).await?;
        Ok(rows.iter().map(TableName::of).collect())
    }

    /// Notes that this copy has created these tables, in the transaction that does: half-made, they may go again.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn created(
        self,
        replica: &(impl GenericClient + Sync),
        tables: &[TableName],
    ) -> Result<(), PgError> {
        let sql = format!(
            "UPDATE {TABLE} AS t SET replica_oid = {HAS_THE_NAME}
               FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
              WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state <> 'ready'"
        );
        let (schemas, names) = TableName::arrays(tables);
        replica
            .execute(&sql, &[&self.stream.as_str(), &schemas, &names])
            .await?;
        Ok(())
    }

    /// Marks a table as `copying`.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn claim(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
    ) -> Result<IsOurs, PgError> {
        let sql = format!(
            "UPDATE {TABLE} SET state = 'copying', updated_at = now()
              WHERE stream = $1 AND table_schema = $2 AND table_name = $3
                AND snapshot_lsn = $4 AND state IN ('pending', 'copying')"
        );
        self.step(replica, &sql, table, &[]).await
    }

    /// Makes sure that the table is still ours until the transaction ends; for one part of several.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn hold(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
    ) -> Result<IsOurs, PgError> {
        let sql = format!(
            "SELECT 1 FROM {TABLE}
              WHERE stream = $1 AND table_schema = $2 AND table_name = $3
                AND snapshot_lsn = $4 AND state = 'copying' FOR SHARE"
        );
        self.step(replica, &sql, table, &[]).await
    }

    /// Marks a table as `copied`: in the transaction that commits its last row, or behind it.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn copied(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
        rows: u64,
        bytes: u64,
    ) -> Result<IsOurs, PgError> {
        let sql = format!(
            "UPDATE {TABLE} SET state = 'copied', rows = $5, bytes = $6, updated_at = now()
              WHERE stream = $1 AND table_schema = $2 AND table_name = $3
                AND snapshot_lsn = $4 AND state = 'copying'"
        );
        let (rows, bytes) = (signed(rows), signed(bytes));
        self.step(
            replica,
            &sql,
            table,
            &[(&rows, Type::INT8), (&bytes, Type::INT8)],
        )
        .await
    }

    async fn step(
        self,
        replica: &(impl GenericClient + Sync),
        sql: &str,
        table: &TableName,
        more: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<IsOurs, PgError> {
        let stream = self.stream.as_str();
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![
            (&stream, Type::TEXT),
            (&table.schema, Type::TEXT),
            (&table.name, Type::TEXT),
            (&self.snapshot_lsn, Type::PG_LSN),
        ];
        parameters.extend_from_slice(more);
        Ok(replica.execute_typed(sql, &parameters).await? == 1)
    }

    /// What an earlier copy that was killed has analyzed since the last row of the stream was copied.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn analyzed_since_copied(
        self,
        replica: &(impl GenericClient + Sync),
    ) -> Result<HashSet<TableName>, PgError> {
        let sql = format!(
            "SELECT schemaname::text, relname::text FROM pg_stat_user_tables
              WHERE last_analyze > (SELECT max(updated_at) FROM {TABLE}
                                     WHERE stream = $1 AND state IN ('copied', 'ready'))"
        );
        let rows = replica.query(&sql, &[&self.stream.as_str()]).await?;
        Ok(rows.iter().map(TableName::of).collect())
    }

    /// Marks the tables as `ready`: rows, indexes and constraints are there.
    ///
    /// # Errors
    /// When the replica refuses.
    pub async fn ready(
        self,
        replica: &(impl GenericClient + Sync),
        tables: &[TableName],
    ) -> Result<IsOurs, PgError> {
        let sql = format!(
            "UPDATE {TABLE} AS t SET state = 'ready', updated_at = now(), replica_oid = {HAS_THE_NAME}
               FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
              WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n
                AND t.state IN ('copied', 'ready')"
        );
        let (schemas, names) = TableName::arrays(tables);
        let updated = replica
            .execute(&sql, &[&self.stream.as_str(), &schemas, &names])
            .await?;
        Ok(updated == tables.len() as u64)
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
