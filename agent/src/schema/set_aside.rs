//! `dr_agent.set_aside` on the replica: tables that are not applied for now, and why.
//!
//! # Invariants
//! - A row without a meaning is passed over: a table that is `ready` in `dr_agent.table_sync` is not set aside, whatever stands here.

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use super::table_sync;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.set_aside";

/// A table that is not protected for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// Which.
    pub table: TableName,
    /// Why.
    pub reason: String,
}

/// The reason while nothing is wrong.
pub const BEING_COPIED: &str = "is being copied";

/// What becomes of what was noted before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// It goes.
    Alone,
    /// It stays.
    Beside,
}

/// What makes a row count: `a` is the row's table.
pub(super) fn counts() -> String {
    format!(
        "NOT EXISTS (SELECT 1 FROM {} AS t
                      WHERE t.stream = a.stream AND t.table_schema = a.table_schema AND t.table_name = a.table_name
                        AND t.state = 'ready')",
        table_sync::TABLE
    )
}

/// The tables that are set aside, in the order of their names; none on a replica of a version that set none aside.
///
/// # Errors
/// When the replica refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<Aside>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT table_schema, table_name, reason FROM {TABLE} AS a WHERE stream = $1 AND {} ORDER BY 1, 2",
        counts()
    );
    let rows = client
        .query_typed(&sql, &[(&stream.as_str(), Type::TEXT)])
        .await?;
    let aside = rows.iter().map(|row| Aside {
        table: TableName::of(row),
        reason: row.get(2),
    });
    Ok(aside.collect())
}

/// Notes tables with their reasons.
///
/// # Errors
/// When the replica refuses.
pub async fn note(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    aside: &[Aside],
    noted: Noted,
) -> Result<(), PgError> {
    let sql = format!(
        "WITH wanted (s, n, r) AS (SELECT * FROM unnest($2::text[], $3::text[], $4::text[])),
        gone AS (
            DELETE FROM {TABLE} AS a WHERE stream = $1 AND $5
               AND NOT EXISTS (SELECT 1 FROM wanted WHERE s = a.table_schema AND n = a.table_name))
        INSERT INTO {TABLE} AS a (stream, table_schema, table_name, reason)
        SELECT $1, s, n, r FROM wanted
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET reason = excluded.reason, since = now()
         WHERE a.reason <> excluded.reason"
    );
    let (schemas, names) = TableName::arrays(aside.iter().map(|one| &one.table));
    let reasons: Vec<&str> = aside.iter().map(|one| one.reason.as_str()).collect();
    let alone = noted == Noted::Alone;
    client
        .execute(
            &sql,
            &[&stream.as_str(), &schemas, &names, &reasons, &alone],
        )
        .await?;
    Ok(())
}

/// Forgets tables: they are applied again.
///
/// # Errors
/// When the replica refuses.
pub async fn forget(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let sql = format!(
        "DELETE FROM {TABLE} AS a USING unnest($2::text[], $3::text[]) AS wanted (s, n)
         WHERE a.stream = $1 AND a.table_schema = s AND a.table_name = n"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Notes one that is taken out of what is applied, with its row in `dr_agent.table_sync`, at once.
///
/// # Errors
/// When the replica refuses.
pub async fn take_out(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    Aside { table, reason }: Aside,
) -> Result<(), PgError> {
    let sql = format!(
        "WITH out AS (
            UPDATE {} SET state = 'pending', updated_at = now()
             WHERE stream = $1 AND table_schema = $2 AND table_name = $3)
        INSERT INTO {TABLE} (stream, table_schema, table_name, reason) VALUES ($1, $2, $3, $4)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET reason = excluded.reason",
        table_sync::TABLE
    );
    client
        .execute(
            &sql,
            &[&stream.as_str(), &table.schema, &table.name, &reason],
        )
        .await?;
    Ok(())
}
