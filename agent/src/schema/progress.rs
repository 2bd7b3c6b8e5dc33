//! `dr_agent.progress` on the replica: up to where each stream is applied, and under which term.
//!
//! A batch advances the row in the transaction that applies it (`dr_agent.advance`), and only under the term that it finds: a
//! promotion raises the term, and nothing of an older agent commits behind that.
//!
//! # Invariants
//! - No row, no replica: it comes at the end of a first copy, together with the tables that were copied.
//! - `end_lsn` never goes back.

use std::time::SystemTime;

use tokio_postgres::types::Type;
use tokio_postgres::{GenericClient, Row};

use super::promotion;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.progress";

/// One row, as it is at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Fencing token; raised by every promotion.
    pub term: i64,
    /// Number of the last applied batch.
    pub batch: i64,
    /// First byte after the last applied transaction.
    pub end_lsn: PgLsn,
    /// When that committed, by the source's clock; before the first, the copy's moment.
    pub commit_time: Option<SystemTime>,
    /// When it was applied, by the replica's clock; none where the row was just added and nothing was applied yet.
    pub applied_at: Option<SystemTime>,
    /// When the row was read, by the replica's clock.
    pub read_at: SystemTime,
}

impl Progress {
    /// Seconds from the last applied commit until the row was read: the source's clock against the replica's.
    pub fn since_commit(&self) -> Option<f64> {
        self.commit_time.map(|at| seconds(at, self.read_at))
    }

    /// Seconds since anything was applied, both on the replica's clock.
    pub fn since_applied(&self) -> f64 {
        self.applied_at.map_or(0.0, |at| seconds(at, self.read_at))
    }
}

#[cfg(test)]
impl Progress {
    /// One of the first term, that was applied and read at one moment.
    pub fn testing(end_lsn: PgLsn) -> Self {
        Self {
            term: 1,
            batch: 1,
            end_lsn,
            commit_time: None,
            applied_at: Some(SystemTime::UNIX_EPOCH),
            read_at: SystemTime::UNIX_EPOCH,
        }
    }
}

/// Negative where `from` is the later one.
fn seconds(from: SystemTime, to: SystemTime) -> f64 {
    match to.duration_since(from) {
        Ok(since) => since.as_secs_f64(),
        Err(ahead) => -ahead.duration().as_secs_f64(),
    }
}

const COLUMNS: &str = "term, batch, end_lsn, commit_time, applied_at";

fn progress(row: &Row) -> Progress {
    Progress {
        term: row.get(0),
        batch: row.get(1),
        end_lsn: row.get(2),
        commit_time: row.get(3),
        applied_at: row.get(4),
        read_at: row.get(5),
    }
}

/// Reads the row of a stream.
///
/// # Errors
/// When the replica refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<Progress>, PgError> {
    read_as_of(client, stream, None).await
}

/// The row of a stream as if it were read at a moment of the replica's clock, written as text.
///
/// # Errors
/// When the replica refuses.
pub async fn read_as_of(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    as_of: Option<&str>,
) -> Result<Option<Progress>, PgError> {
    let sql = format!(
        "SELECT {COLUMNS}, coalesce($2::text::timestamptz, pg_catalog.clock_timestamp()) FROM {TABLE} WHERE stream = $1"
    );
    let row = client
        .query_typed_opt(
            &sql,
            &[(&stream.as_str(), Type::TEXT), (&as_of, Type::TEXT)],
        )
        .await?;
    Ok(row.as_ref().map(progress))
}

/// The highest term of any stream here; none where this database never was a replica.
///
/// # Errors
/// When the server refuses.
pub async fn highest_term(client: &(impl GenericClient + Sync)) -> Result<Option<i64>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(None);
    }
    let sql = format!("SELECT max(term) FROM {TABLE}");
    Ok(client.query_typed_one(&sql, &[]).await?.get(0))
}

/// The streams of which this database is the replica: it was not promoted.
///
/// # Errors
/// When the server refuses.
pub async fn replicated(client: &(impl GenericClient + Sync)) -> Result<Vec<String>, PgError> {
    if !super::has(client, &[TABLE, promotion::TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT stream FROM {TABLE} WHERE NOT EXISTS (SELECT FROM {}) ORDER BY 1",
        promotion::TABLE
    );
    let rows = client.query_typed(&sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Adds the row of a stream: batch 0 of `term`, applied now.
///
/// # Errors
/// When the replica refuses.
pub async fn begin(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    term: i64,
    (end_lsn, commit_time): (PgLsn, Option<SystemTime>),
) -> Result<Progress, PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, term, batch, end_lsn, commit_time, applied_at) VALUES ($1, $2, 0, $3, $4, now())
         RETURNING applied_at"
    );
    let row = client
        .query_one(&sql, &[&stream.as_str(), &term, &end_lsn, &commit_time])
        .await?;
    Ok(Progress {
        term,
        batch: 0,
        end_lsn,
        commit_time,
        applied_at: None,
        read_at: row.get(0),
    })
}

/// Removes the row of a stream.
///
/// # Errors
/// When the replica refuses.
pub async fn end(client: &(impl GenericClient + Sync), stream: &StreamName) -> Result<(), PgError> {
    let sql = format!("DELETE FROM {TABLE} WHERE stream = $1");
    client.execute(&sql, &[&stream.as_str()]).await?;
    Ok(())
}

/// Locks the row until the transaction ends: a promotion waits, or has come first and is seen by the next statement. Whether there
/// is one.
///
/// # Errors
/// When the replica refuses.
pub async fn lock(
    transaction: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<bool, PgError> {
    let sql = format!("SELECT 1 FROM {TABLE} WHERE stream = $1 FOR SHARE");
    let row = transaction.query_opt(&sql, &[&stream.as_str()]).await?;
    Ok(row.is_some())
}

/// The same, and makes sure of the term.
///
/// # Errors
/// DR001 after a promotion, DR004 without a row.
pub async fn hold(
    transaction: &(impl GenericClient + Sync),
    stream: &StreamName,
    term: i64,
) -> Result<(), PgError> {
    let sql = format!(
        "SELECT dr_agent.hold($1, $2) FROM (SELECT 1 FROM {TABLE} WHERE stream = $1 FOR SHARE) AS row"
    );
    transaction
        .execute(&sql, &[&stream.as_str(), &term])
        .await?;
    Ok(())
}

/// Raises the term: nothing of an older agent commits from here on. The row as it is then; none without one.
///
/// # Errors
/// When the replica refuses; 55P03 where somebody holds the row.
pub async fn raise_term(
    transaction: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<Progress>, PgError> {
    let sql = format!(
        "UPDATE {TABLE} SET term = term + 1 WHERE stream = $1 RETURNING {COLUMNS}, pg_catalog.clock_timestamp()"
    );
    let row = transaction.query_opt(&sql, &[&stream.as_str()]).await?;
    Ok(row.as_ref().map(progress))
}
