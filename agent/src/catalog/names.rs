//! What every table of a database is called, by oid: before and behind a command, to see which were renamed, and which went.

use std::collections::BTreeMap;

use tokio_postgres::GenericClient;

use crate::names::TableName;
use crate::pg::PgError;

/// By oid.
pub type TableNames = BTreeMap<u32, TableName>;

/// Reads them.
///
/// # Errors
/// When the server refuses.
pub async fn of_tables(client: &(impl GenericClient + Sync)) -> Result<TableNames, PgError> {
    const SQL: &str = "
        SELECT n.nspname, c.relname, c.oid
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
           AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'dr_agent', 'pg_toast')";
    let rows = client.query_typed(SQL, &[]).await?;
    let named = rows.iter().map(|row| (row.get(2), TableName::of(row)));
    Ok(named.collect())
}
