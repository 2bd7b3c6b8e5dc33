//! `dr_agent.restore` in a database that is restored into: whose restore it is, and of what.
//!
//! # Invariants
//! - Written while the database is empty: what has the row is ours.

use tokio_postgres::GenericClient;

use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.restore";

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// Under which name it works.
    pub stream: String,
    /// What the LSNs are of.
    pub history: String,
    /// Where its base backup stands.
    pub base: PgLsn,
    /// What is to be told at the end, as JSON.
    pub detail: String,
}

/// Whether the database is one that a restore has begun in.
///
/// # Errors
/// When the server refuses.
pub async fn is_there(client: &(impl GenericClient + Sync)) -> Result<bool, PgError> {
    super::has(client, &[TABLE]).await
}

/// Reads all rows: one, unless somebody wrote others.
///
/// # Errors
/// When the server refuses.
pub async fn read(client: &(impl GenericClient + Sync)) -> Result<Vec<Restore>, PgError> {
    let sql = format!("SELECT stream, history, base_lsn, detail::text FROM {TABLE}");
    let rows = client.query(&sql, &[]).await?;
    let restores = rows.iter().map(|row| Restore {
        stream: row.get(0),
        history: row.get(1),
        base: row.get(2),
        detail: row.get(3),
    });
    Ok(restores.collect())
}

/// Adds the row.
///
/// # Errors
/// When the server refuses.
pub async fn begin(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    history: History,
    base: PgLsn,
) -> Result<(), PgError> {
    let sql = format!("INSERT INTO {TABLE} (stream, history, base_lsn) VALUES ($1, $2, $3)");
    client
        .execute(&sql, &[&stream.as_str(), &history.to_string(), &base])
        .await?;
    Ok(())
}

/// Keeps what is to be told at the end.
///
/// # Errors
/// When the server refuses.
pub async fn keep(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    detail: &str,
) -> Result<(), PgError> {
    let sql = format!("UPDATE {TABLE} SET detail = $2::text::jsonb WHERE stream = $1");
    client.execute(&sql, &[&stream.as_str(), &detail]).await?;
    Ok(())
}
