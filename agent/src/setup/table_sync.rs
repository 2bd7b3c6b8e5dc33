//! The ledger of copied tables: `dr_agent.table_sync` on the replica.
//!
//! A row says since which position a table's changes are applied, and as what the table was listed then. The copy moves rows from
//! `pending` over `copying` and `copied` to `ready`; here rows are added, set back and forgotten.
//!
//! # Invariants
//! - A `ready` row is never deleted: changes of a dropped or unlisted table may still be on their
//!   way, and a table that is listed again must be known to have missed some.
//! - A table is emptied in the same transaction that sets its row back to `pending`.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Transaction};

use super::error::{SetupError, Side};
use crate::catalog::routing;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};
use crate::schema::listing::{Copied, Listed, ListedAs};

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) table: TableName,
    /// Rows, indexes and constraints are there.
    pub(super) ready: bool,
    /// At least the rows are there (`copied` or `ready`).
    pub(super) held: bool,
    pub(super) copied: Copied,
    /// The table on the replica is not the one that was copied: it is gone, or another one has its name.
    pub(super) another: bool,
    /// Which table was copied is known.
    pub(super) noted: bool,
}

/// Reads the rows of a stream.
pub(super) async fn rows(client: &Client, stream: &StreamName) -> Result<Vec<Row>, SetupError> {
    const SQL: &str = "
        SELECT table_schema, table_name, state = 'ready', state IN ('copied', 'ready'),
               snapshot_lsn, listed_as,
               coalesce((to_jsonb(t) ->> 'replica_oid')::oid
                        IS DISTINCT FROM to_regclass(format('%I.%I', table_schema, table_name))::oid
                        AND to_jsonb(t) ->> 'replica_oid' IS NOT NULL, false),
               to_jsonb(t) ->> 'replica_oid' IS NOT NULL
          FROM dr_agent.table_sync t WHERE stream = $1 ORDER BY 1, 2";
    let rows = client
        .query_typed(SQL, &[(&stream.as_str(), Type::TEXT)])
        .await
        .map_err(|error| {
            SetupError::sql(Side::Replica, "read dr_agent.table_sync")(error.into())
        })?;
    Ok(rows
        .iter()
        .map(|row| Row {
            table: TableName {
                schema: row.get(0),
                name: row.get(1),
            },
            ready: row.get(2),
            held: row.get(3),
            copied: Copied {
                snapshot_lsn: row.get(4),
                listed_as: row.get::<_, Option<String>>(5).map(ListedAs::new),
            },
            another: row.get(6),
            noted: row.get(7),
        })
        .collect())
}

/// Notes which tables hold the rows that were copied before that was noted.
pub(super) async fn adopt(client: &Client, stream: &StreamName) -> Result<(), SetupError> {
    const SQL: &str = "
        UPDATE dr_agent.table_sync
           SET replica_oid = to_regclass(format('%I.%I', table_schema, table_name))
         WHERE stream = $1 AND state = 'ready' AND replica_oid IS NULL";
    client
        .execute(SQL, &[&stream.as_str()])
        .await
        .map_err(|error| {
            SetupError::sql(Side::Replica, "note which tables were copied")(error.into())
        })?;
    Ok(())
}

/// The tables whose changes are applied, and what is there of them already.
pub(super) fn synced(rows: Vec<Row>) -> Vec<(TableName, Copied)> {
    rows.into_iter()
        .filter(|row| row.ready)
        .map(|row| (row.table, row.copied))
        .collect()
}

/// Adds tables that were loaded as of a position.
pub(super) async fn add_ready(
    client: &(impl tokio_postgres::GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
    listed: &Listed,
    lsn: PgLsn,
) -> Result<(), PgError> {
    const SQL: &str = "
        INSERT INTO dr_agent.table_sync (stream, table_schema, table_name, state, snapshot_lsn, listed_as)
        SELECT $1, t.s, t.n, 'ready', $5, t.l FROM unnest($2::text[], $3::text[], $4::text[]) AS t(s, n, l)";
    let (schemas, names) = split(tables);
    let listed_as: Vec<Option<&str>> = tables
        .iter()
        .map(|table| listed.get(table).map(ListedAs::as_str))
        .collect();
    client
        .execute(SQL, &[&stream.as_str(), &schemas, &names, &listed_as, &lsn])
        .await?;
    Ok(())
}

/// Adds tables as `pending`; those that have a row keep it.
pub(super) async fn add(
    client: &(impl tokio_postgres::GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    const SQL: &str = "
        INSERT INTO dr_agent.table_sync (stream, table_schema, table_name, state)
        SELECT $1, t.s, t.n, 'pending' FROM unnest($2::text[], $3::text[]) AS t(s, n)
            ON CONFLICT DO NOTHING";
    let (schemas, names) = split(tables);
    client
        .execute(SQL, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Forgets tables whose copy was never finished and that are not to be copied any more; waiting
/// for them, the replica would never be complete.
pub(super) async fn forget(
    client: &Client,
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    const SQL: &str = "
        DELETE FROM dr_agent.table_sync AS r USING unnest($2::text[], $3::text[]) AS t(s, n)
         WHERE r.stream = $1 AND r.table_schema = t.s AND r.table_name = t.n
           AND r.state <> 'ready'";
    if tables.is_empty() {
        return Ok(());
    }
    let (schemas, names) = split(tables);
    client
        .execute(SQL, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

fn split(tables: &[TableName]) -> (Vec<&str>, Vec<&str>) {
    tables
        .iter()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip()
}

/// Why the rows that are there are not those that belong there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    /// Changes of the table were not published.
    Changes,
    /// It is another table.
    All,
}

/// Sets tables whose changes were missed back to `pending`, and empties them. One that is another table goes as a whole, so that
/// the copy creates it as it is now; unless something else on the replica depends on it. What was catching up with tables beside
/// the stream ends in the same moment: a session that an agent has left behind writes to them no more.
pub(super) async fn reset(
    client: &mut Client,
    stream: &StreamName,
    tables: &BTreeMap<TableName, Missed>,
) -> Result<(), SetupError> {
    set_back(client, stream, tables)
        .await
        .map_err(SetupError::sql(
            Side::Replica,
            "empty tables that have to be copied again",
        ))
}

async fn set_back(
    client: &mut Client,
    stream: &StreamName,
    tables: &BTreeMap<TableName, Missed>,
) -> Result<(), PgError> {
    const PENDING: &str = "
        UPDATE dr_agent.table_sync
           SET state = 'pending', snapshot_lsn = NULL, listed_as = NULL, replica_oid = NULL, rows = 0, bytes = 0, updated_at = now()
         WHERE stream = $1 AND table_schema = $2 AND table_name = $3";
    // TRUNCATE refuses tables that others refer to, whatever session_replication_role says.
    const EXISTS_AND_IS_REFERRED_TO: &str = "
        SELECT to_regclass($1::text) IS NOT NULL,
               EXISTS (SELECT 1 FROM pg_constraint
                        WHERE contype = 'f' AND confrelid = to_regclass($1::text)
                          AND conrelid <> confrelid)";
    let mut transaction = client.transaction().await?;
    transaction
        .execute(
            "DELETE FROM dr_agent.progress WHERE stream = $1",
            &[&stream.late().as_str()],
        )
        .await?;
    let replaced = tables.iter().filter(|(_, missed)| **missed == Missed::All);
    // Ours are not in a dump.
    let replaced = replaced.filter(|(table, _)| table.schema != "dr_agent");
    let replaced: Vec<String> = replaced.map(|(table, _)| table.sql()).collect();
    drop_tables(&mut transaction, &replaced).await?;
    let tops = routing::tops(&transaction, tables.keys()).await?;
    for top in tops.values().collect::<BTreeSet<_>>() {
        routing::empty(&transaction, top).await?;
        set_back_below(&transaction, stream, top).await?;
    }
    for table in tables.keys().filter(|table| !tops.contains_key(table)) {
        let sql = table.sql();
        let found = transaction
            .query_one(EXISTS_AND_IS_REFERRED_TO, &[&sql])
            .await?;
        // Where it does not exist, the copy creates it.
        let empty = match (found.get(0), found.get(1)) {
            (false, _) => None,
            (true, true) => Some(format!("DELETE FROM ONLY {sql}")),
            (true, false) => Some(format!("TRUNCATE ONLY {sql}")),
        };
        if let Some(empty) = empty {
            transaction.batch_execute(&empty).await?;
        }
        transaction
            .execute(PENDING, &[&stream.as_str(), &table.schema, &table.name])
            .await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// The rows of its partitions have gone together.
async fn set_back_below(
    transaction: &Transaction<'_>,
    stream: &StreamName,
    top: &TableName,
) -> Result<(), PgError> {
    const PENDING: &str = "
        UPDATE dr_agent.table_sync AS s
           SET state = 'pending', snapshot_lsn = NULL, listed_as = NULL, replica_oid = NULL, rows = 0, bytes = 0, updated_at = now()
          FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass($2)) AS t
          JOIN pg_catalog.pg_class c ON c.oid = t.relid
          JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE s.stream = $1 AND s.table_schema = n.nspname AND s.table_name = c.relname";
    let of_stream = stream.as_str();
    let parameters = [
        (&of_stream as &(dyn ToSql + Sync), Type::TEXT),
        (&top.sql(), Type::TEXT),
    ];
    transaction.query_typed(PENDING, &parameters).await?;
    Ok(())
}

/// Drops those of the tables that nothing else depends on: all at once, because they may refer to one another, or one by one.
async fn drop_tables(transaction: &mut Transaction<'_>, tables: &[String]) -> Result<(), PgError> {
    let together = (!tables.is_empty()).then(|| tables.join(", "));
    for tables in together.iter().chain(tables) {
        let attempt = transaction.savepoint("drop_tables").await?;
        match attempt
            .batch_execute(&format!("DROP TABLE IF EXISTS {tables}"))
            .await
        {
            Ok(()) => attempt.commit().await?,
            Err(error) if error.code() == Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST) => {
                attempt.rollback().await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
