//! `dr_agent.ddl_applied` on the replica: what has become of each command of the source.
//!
//! Written in the transaction of the command. It keeps the newest [`KEPT`] rows of a stream.

use tokio_postgres::GenericClient;

use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.ddl_applied";

/// A migration of a year.
const KEPT: i64 = 10_000;

/// Notes a command.
///
/// # Errors
/// When the replica refuses.
pub async fn note(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    (id, commit_lsn): (i64, PgLsn),
    outcome: &str,
    detail: &str,
) -> Result<(), PgError> {
    let sql = format!(
        "WITH old AS (DELETE FROM {TABLE} WHERE stream = $1 AND id <= $2 - {KEPT})
        INSERT INTO {TABLE} (stream, id, outcome, detail, commit_lsn) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (stream, id) DO UPDATE
               SET outcome = excluded.outcome, detail = excluded.detail, applied_at = clock_timestamp()"
    );
    client
        .execute(
            &sql,
            &[&stream.as_str(), &id, &outcome, &detail, &commit_lsn],
        )
        .await?;
    Ok(())
}
