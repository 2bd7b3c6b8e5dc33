//! `dr_agent.promotion` on the replica: that, and how far, the database was promoted.
//!
//! # Invariants
//! - The first row comes in the transaction that raises the term; no agent touches the database behind it.
//! - A state is stored over the one before it and no other, so that none is skipped.

use std::time::SystemTime;

use tokio_postgres::{GenericClient, Row};

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.promotion";

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promotion {
    /// The term it raised to.
    pub term: i64,
    /// `failover`.
    pub mode: String,
    /// The state reached.
    pub state: String,
    /// When it was begun, by the clock of the host it runs on.
    pub started_at: SystemTime,
    /// What it remembers, as JSON.
    pub detail: String,
}

const COLUMNS: &str = "term, mode, state, started_at, detail::text";

fn promotion(row: &Row) -> Promotion {
    Promotion {
        term: row.get(0),
        mode: row.get(1),
        state: row.get(2),
        started_at: row.get(3),
        detail: row.get(4),
    }
}

/// Reads the row of a stream.
///
/// # Errors
/// When the server refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<Promotion>, PgError> {
    let sql = format!("SELECT {COLUMNS} FROM {TABLE} WHERE stream = $1");
    let row = client.query_opt(&sql, &[&stream.as_str()]).await?;
    Ok(row.as_ref().map(promotion))
}

/// The last promotion of this database, under whichever stream: it takes writes of its own.
///
/// # Errors
/// When the server refuses.
pub async fn last(client: &(impl GenericClient + Sync)) -> Result<Option<Promotion>, PgError> {
    let sql = format!("SELECT {COLUMNS} FROM {TABLE} ORDER BY started_at DESC LIMIT 1");
    let row = client.query_typed_opt(&sql, &[]).await?;
    Ok(row.as_ref().map(promotion))
}

/// Keeps promotions from beginning until the transaction ends.
///
/// # Errors
/// When the server refuses.
pub async fn hold_off(transaction: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    let sql = format!("LOCK TABLE {TABLE} IN SHARE MODE");
    Ok(transaction.batch_execute(&sql).await?)
}

/// Adds the row of a stream. `started_at` is a time as text.
///
/// # Errors
/// When the server refuses.
pub async fn begin(
    transaction: &(impl GenericClient + Sync),
    stream: &StreamName,
    term: i64,
    state: &str,
    (started_at, detail): (&str, &str),
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, term, mode, state, started_at, updated_at, detail)
         VALUES ($1, $2, 'failover', $3, $4::text::timestamptz, clock_timestamp(), $5::text::jsonb)"
    );
    transaction
        .execute(
            &sql,
            &[&stream.as_str(), &term, &state, &started_at, &detail],
        )
        .await?;
    Ok(())
}

/// Stores a state over the one before, or once more; whether there was a row in one of them, of this term.
///
/// # Errors
/// When the server refuses.
pub async fn store(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    term: i64,
    (before, after): (&str, &str),
    detail: &str,
) -> Result<bool, PgError> {
    let sql = format!(
        "UPDATE {TABLE}
            SET state = $4, updated_at = clock_timestamp(), detail = $5::text::jsonb
          WHERE stream = $1 AND term = $2 AND state IN ($3, $4)"
    );
    let stored = client
        .execute(&sql, &[&stream.as_str(), &term, &before, &after, &detail])
        .await?;
    Ok(stored == 1)
}
