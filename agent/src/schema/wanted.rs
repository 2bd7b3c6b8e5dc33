//! `dr_agent.wanted` on the source: which new tables an event trigger publishes, as the configuration says.

use tokio_postgres::GenericClient;

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.wanted";

/// Writes it, where it is another one: `keyless` as in the configuration, `exclude` as LIKE has it.
///
/// # Errors
/// When the source refuses.
pub async fn write(
    source: &(impl GenericClient + Sync),
    stream: &StreamName,
    keyless: &str,
    exclude: &[String],
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS w (stream, keyless, exclude) VALUES ($1, $2, $3)
            ON CONFLICT (stream) DO UPDATE SET keyless = excluded.keyless, exclude = excluded.exclude
         WHERE (w.keyless, w.exclude) IS DISTINCT FROM (excluded.keyless, excluded.exclude)"
    );
    source
        .execute(&sql, &[&stream.as_str(), &keyless, &exclude])
        .await?;
    Ok(())
}

/// Removes it: no new table is published by itself.
///
/// # Errors
/// When the source refuses.
pub async fn remove(
    source: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<(), PgError> {
    let sql = format!("DELETE FROM {TABLE} WHERE stream = $1");
    source.execute(&sql, &[&stream.as_str()]).await?;
    Ok(())
}
