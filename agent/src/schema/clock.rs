//! `dr_agent.clock`: by how much the replica's clock is ahead of the source's, as the source's agent has measured it.
//!
//! Written on the source, and on the replica like any other row: a promotion knows it when the source is gone.

use tokio_postgres::GenericClient;

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.clock";

/// Notes by how many seconds the replica's clock is ahead; a tenth more or less is not news.
///
/// # Errors
/// When the source refuses.
pub async fn write(
    source: &(impl GenericClient + Sync),
    stream: &StreamName,
    replica_ahead: f64,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS c (stream, replica_ahead, measured_at) VALUES ($1, $2, clock_timestamp())
             ON CONFLICT (stream) DO UPDATE
                SET replica_ahead = excluded.replica_ahead, measured_at = excluded.measured_at
              WHERE abs(c.replica_ahead - excluded.replica_ahead) > 0.1"
    );
    source
        .execute(&sql, &[&stream.as_str(), &replica_ahead])
        .await?;
    Ok(())
}

/// By how many seconds the replica's clock is ahead; none where nobody has measured it.
///
/// # Errors
/// When the server refuses.
pub async fn replica_ahead(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<f64>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(None);
    }
    let sql = format!("SELECT replica_ahead FROM {TABLE} WHERE stream = $1");
    let row = client.query_opt(&sql, &[&stream.as_str()]).await?;
    Ok(row.map(|row| row.get(0)))
}
