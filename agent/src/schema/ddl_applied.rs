//! `dr_agent.ddl_applied` on the replica: what has become of each command of the source.
//!
//! Written in the transaction of the command. It keeps the newest ten thousand rows of a stream.

use tokio_postgres::GenericClient;

use super::ddl::EventObject;
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
        "WITH old AS (DELETE FROM {TABLE} WHERE stream = $1 AND id <= $2::bigint - {KEPT})
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

/// The objects of each command that committed at or behind a position, but for those of one transaction.
///
/// # Errors
/// When the replica refuses.
pub async fn objects_since(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    since: PgLsn,
    but: PgLsn,
) -> Result<Vec<Vec<EventObject>>, PgError> {
    let sql = format!(
        "SELECT d.objects::text FROM {TABLE} a JOIN {} d USING (id) WHERE a.stream = $1 AND a.commit_lsn >= $2 AND a.commit_lsn <> $3",
        super::ddl::TABLE
    );
    let rows = client
        .query(&sql, &[&stream.as_str(), &since, &but])
        .await?;
    let each = rows.iter().map(|row| {
        serde_json::from_str(row.get(0))
            .map_err(|error| PgError::Protocol(format!("objects that are no JSON: {error}")))
    });
    each.collect()
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct AppliedCommand {
    /// In `dr_agent.ddl`.
    pub id: i64,
    /// `ALTER TABLE`; none where the source has deleted the row since.
    pub tag: Option<String>,
    /// What it concerned, for people.
    pub objects: String,
    /// What has become of it.
    pub outcome: String,
    /// What was not possible.
    pub detail: String,
    /// Where it committed on the source.
    pub commit_lsn: PgLsn,
    /// When it was carried out here.
    pub applied_at: std::time::SystemTime,
}

/// The newest rows of a stream, the newest first; none on a replica of an earlier version.
///
/// # Errors
/// When the replica refuses.
pub async fn newest(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    limit: i64,
) -> Result<Vec<AppliedCommand>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT a.id, d.tag,
                coalesce((SELECT string_agg(o ->> 'identity', ', ') FROM json_array_elements(d.objects) AS o), ''),
                a.outcome, a.detail, a.commit_lsn, a.applied_at
           FROM {TABLE} a LEFT JOIN {} d ON d.id = a.id
          WHERE a.stream = $1 ORDER BY a.commit_lsn DESC, a.id DESC LIMIT $2",
        super::ddl::TABLE
    );
    let rows = client.query(&sql, &[&stream.as_str(), &limit]).await?;
    let commands = rows.iter().map(|row| AppliedCommand {
        id: row.get(0),
        tag: row.get(1),
        objects: row.get(2),
        outcome: row.get(3),
        detail: row.get(4),
        commit_lsn: row.get(5),
        applied_at: row.get(6),
    });
    Ok(commands.collect())
}

/// How many commands had which outcome, so far as their rows are kept.
///
/// # Errors
/// When the replica refuses.
pub async fn counts(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<(String, i64)>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT outcome, count(*) FROM {TABLE} WHERE stream = $1 GROUP BY outcome ORDER BY outcome"
    );
    let rows = client.query(&sql, &[&stream.as_str()]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
