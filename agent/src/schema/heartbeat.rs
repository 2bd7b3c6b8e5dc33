//! `dr_agent.heartbeat`: one row, which the source's agent alters every second.
//!
//! It keeps an idle stream moving, so that its lag can be seen, and counts: a source that was set back knows of fewer heartbeats than
//! its replica.

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.heartbeat";

/// One more.
///
/// # Errors
/// When the source refuses.
pub async fn write(source: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS h (id, beat, written_at)
             VALUES (1, 1, clock_timestamp())
             ON CONFLICT (id) DO UPDATE SET beat = h.beat + 1, written_at = excluded.written_at"
    );
    source.execute(&sql, &[]).await?;
    Ok(())
}

/// How many a side knows of; none where there is none yet.
///
/// # Errors
/// When the server refuses.
pub async fn beats(client: &(impl GenericClient + Sync)) -> Result<Option<i64>, PgError> {
    let sql = format!("SELECT beat FROM {TABLE}");
    match client.query_typed_opt(&sql, &[]).await {
        Ok(row) => Ok(row.map(|row| row.get(0))),
        // undefined_table, invalid_schema_name
        Err(error) if matches!(error.code().map(SqlState::code), Some("42P01" | "3F000")) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
