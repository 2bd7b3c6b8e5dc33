//! `dr_agent.schema_sync` on the replica: of which streams the source's schema is there, as a whole.

use tokio_postgres::GenericClient;

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.schema_sync";

/// Whether it is.
///
/// # Errors
/// When the replica refuses.
pub async fn is_noted(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<bool, PgError> {
    let sql = format!("SELECT 1 FROM {TABLE} WHERE stream = $1");
    let row = client.query_opt(&sql, &[&stream.as_str()]).await?;
    Ok(row.is_some())
}

/// Notes that it is, in the transaction that creates it. Repeatable.
///
/// # Errors
/// When the replica refuses.
pub async fn note(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<(), PgError> {
    let sql = format!("INSERT INTO {TABLE} (stream) VALUES ($1) ON CONFLICT (stream) DO NOTHING");
    client.execute(&sql, &[&stream.as_str()]).await?;
    Ok(())
}
