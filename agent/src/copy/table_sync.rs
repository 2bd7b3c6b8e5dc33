//! The table ledger: which tables of a stream hold their rows, kept on the replica.
//!
//! `pending` → `copying` → `copied` → `ready`. A table is `copied` once its rows are committed and
//! `ready` once indexes and constraints are there too; only then may it be streamed and promoted.
//!
//! # Invariants
//! - Every step compares the table's snapshot LSN, so that an agent whose tables were taken over by
//!   a later copy of the same stream changes nothing more.
//! - `copied` is committed together with the table's last row, or after it.
//! - A `copied` table keeps the LSN of the snapshot its rows came from, and what it was listed as then, whatever later copies
//!   use.

use std::collections::HashSet;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, Row};

use super::CopyJob;
use super::error::CopyError;
use super::layout::name_arrays;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::schema::listing::ListedAs;

/// The ledger of one stream, for one copy.
#[derive(Clone, Copy)]
pub(super) struct Ledger<'a> {
    pub(super) stream: &'a StreamName,
    pub(super) snapshot_lsn: PgLsn,
}

impl Ledger<'_> {
    /// Enters all tables as `pending` at this copy's snapshot, except those that hold their rows
    /// from an earlier one; where everything is copied, forgets unfinished ones that are not in the copy any more. Returns
    /// all tables of the stream that hold their rows.
    pub(super) async fn begin(
        self,
        replica: &Client,
        tables: &[TableName],
        job: &CopyJob<'_>,
    ) -> Result<HashSet<TableName>, CopyError> {
        const SQL: &str = "
            INSERT INTO dr_agent.table_sync AS t
                   (stream, table_schema, table_name, state, snapshot_lsn, listed_as)
            SELECT $1, s, n, 'pending', $5, l FROM unnest($2::text[], $3::text[], $4::text[]) AS wanted (s, n, l)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE
               SET state = 'pending', snapshot_lsn = excluded.snapshot_lsn, listed_as = excluded.listed_as,
                   rows = 0, bytes = 0, updated_at = now()
             WHERE t.state NOT IN ('copied', 'ready')";
        // Then all tables that are not ready are in this copy; others have left the source.
        const FORGET: &str = "
            DELETE FROM dr_agent.table_sync AS t
             WHERE stream = $1 AND state <> 'ready'
               AND NOT EXISTS (SELECT 1 FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
                                WHERE s = t.table_schema AND n = t.table_name)";
        const HELD: &str = "
            SELECT table_schema, table_name FROM dr_agent.table_sync
             WHERE stream = $1 AND state IN ('copied', 'ready')";
        let (schemas, names) = name_arrays(tables);
        let listed_as: Vec<Option<&str>> = tables
            .iter()
            .map(|table| job.listed.get(table).map(ListedAs::as_str))
            .collect();
        let enter = CopyError::replica("enter the tables into dr_agent.table_sync");
        replica
            .execute(
                SQL,
                &[
                    &self.stream.as_str(),
                    &schemas,
                    &names,
                    &listed_as,
                    &self.snapshot_lsn,
                ],
            )
            .await
            .map_err(enter)?;
        if job.whole_schema {
            replica
                .execute(FORGET, &[&self.stream.as_str(), &schemas, &names])
                .await
                .map_err(CopyError::replica("clean dr_agent.table_sync"))?;
        }
        let rows = replica
            .query(HELD, &[&self.stream.as_str()])
            .await
            .map_err(CopyError::replica("read dr_agent.table_sync"))?;
        Ok(rows.iter().map(table_name).collect())
    }

    /// Notes that this copy has created these tables, in the transaction that does: half-made, they may go again.
    pub(super) async fn created(
        self,
        replica: &impl GenericClient,
        tables: &[TableName],
    ) -> Result<(), tokio_postgres::Error> {
        const SQL: &str = "
            UPDATE dr_agent.table_sync AS t
               SET replica_oid = to_regclass(format('%I.%I', t.table_schema, t.table_name))
              FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
             WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state <> 'ready'";
        let (schemas, names) = name_arrays(tables);
        replica
            .execute(SQL, &[&self.stream.as_str(), &schemas, &names])
            .await?;
        Ok(())
    }

    /// Marks a table as `copying`.
    pub(super) async fn claim(
        self,
        replica: &impl GenericClient,
        table: &TableName,
    ) -> Result<(), CopyError> {
        const SQL: &str = "
            UPDATE dr_agent.table_sync SET state = 'copying', updated_at = now()
             WHERE stream = $1 AND table_schema = $2 AND table_name = $3
               AND snapshot_lsn = $4 AND state IN ('pending', 'copying')";
        self.step(replica, SQL, table).await
    }

    /// Makes sure that the table is still ours until the transaction ends; for one part of several.
    pub(super) async fn hold(
        self,
        replica: &impl GenericClient,
        table: &TableName,
    ) -> Result<(), CopyError> {
        const SQL: &str = "
            SELECT 1 FROM dr_agent.table_sync
             WHERE stream = $1 AND table_schema = $2 AND table_name = $3
               AND snapshot_lsn = $4 AND state = 'copying' FOR SHARE";
        self.step(replica, SQL, table).await
    }

    async fn step(
        self,
        replica: &impl GenericClient,
        sql: &str,
        table: &TableName,
    ) -> Result<(), CopyError> {
        let stream = self.stream.as_str();
        let rows = replica
            .execute_typed(
                sql,
                &[
                    (&stream, Type::TEXT),
                    (&table.schema, Type::TEXT),
                    (&table.name, Type::TEXT),
                    (&self.snapshot_lsn, Type::PG_LSN),
                ],
            )
            .await
            .map_err(CopyError::replica("update dr_agent.table_sync"))?;
        self.must_be_ours(rows, table)
    }

    /// Marks a table as `copied`.
    pub(super) async fn copied(
        self,
        replica: &impl GenericClient,
        table: &TableName,
        rows: u64,
        bytes: u64,
    ) -> Result<(), CopyError> {
        const SQL: &str = "
            UPDATE dr_agent.table_sync
               SET state = 'copied', rows = $5, bytes = $6, updated_at = now()
             WHERE stream = $1 AND table_schema = $2 AND table_name = $3
               AND snapshot_lsn = $4 AND state = 'copying'";
        let (rows, bytes) = (signed(rows), signed(bytes));
        let stream = self.stream.as_str();
        let updated = replica
            .execute_typed(
                SQL,
                &[
                    (&stream, Type::TEXT),
                    (&table.schema, Type::TEXT),
                    (&table.name, Type::TEXT),
                    (&self.snapshot_lsn, Type::PG_LSN),
                    (&rows, Type::INT8),
                    (&bytes, Type::INT8),
                ],
            )
            .await
            .map_err(CopyError::replica("update dr_agent.table_sync"))?;
        self.must_be_ours(updated, table)
    }

    fn must_be_ours(self, rows: u64, table: &TableName) -> Result<(), CopyError> {
        if rows == 1 {
            return Ok(());
        }
        Err(CopyError::Superseded {
            table: table.clone(),
        })
    }

    /// What an earlier copy that was killed has analyzed since the last row of the stream was copied.
    pub(super) async fn analyzed_since_copied(
        self,
        replica: &Client,
    ) -> Result<HashSet<TableName>, CopyError> {
        const SQL: &str = "
            SELECT schemaname::text, relname::text FROM pg_stat_user_tables
             WHERE last_analyze > (SELECT max(updated_at) FROM dr_agent.table_sync
                                    WHERE stream = $1 AND state IN ('copied', 'ready'))";
        let rows = replica
            .query(SQL, &[&self.stream.as_str()])
            .await
            .map_err(CopyError::replica("look up what was analyzed"))?;
        Ok(rows.iter().map(table_name).collect())
    }

    /// Marks the tables as `ready`: rows, indexes and constraints are there.
    pub(super) async fn ready(
        self,
        replica: &Client,
        tables: &[TableName],
    ) -> Result<(), CopyError> {
        const SQL: &str = "
            UPDATE dr_agent.table_sync AS t SET state = 'ready', updated_at = now(),
                   replica_oid = to_regclass(format('%I.%I', t.table_schema, t.table_name))
              FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
             WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n
               AND t.state IN ('copied', 'ready')";
        let (schemas, names) = name_arrays(tables);
        let updated = replica
            .execute(SQL, &[&self.stream.as_str(), &schemas, &names])
            .await
            .map_err(CopyError::replica("update dr_agent.table_sync"))?;
        match tables.first() {
            Some(table) if updated != tables.len() as u64 => Err(CopyError::Superseded {
                table: table.clone(),
            }),
            _ => Ok(()),
        }
    }
}

fn table_name(row: &Row) -> TableName {
    TableName {
        schema: row.get(0),
        name: row.get(1),
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
