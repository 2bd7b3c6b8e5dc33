//! `dr_agent.sending` on the source: what it remembers of a stream's slot.
//!
//! Under route `kinesis` nobody else on the source's side could know that a slot was there and is gone; under either route it
//! tells which history the slot's LSNs are of, also while the replica is away.
//!
//! # Invariants
//! - A slot whose note has no `since` was not created to the end, and is not gone on with.
//! - A history begins with the slot that is created, and with the timeline on which it is gone on with; nothing else changes when
//!   it began.

use std::time::SystemTime;

use tokio_postgres::GenericClient;

use super::stream::{self, Recorded};
use crate::names::history::{Cluster, History};
use crate::names::stream::StreamName;
use crate::pg::quote::quote_literal;
use crate::pg::{PgError, PgLsn};
use crate::time::{Micros, pg_micros};

/// The table.
pub const TABLE: &str = "dr_agent.sending";

/// A row of `dr_agent.sending`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The source that the slot was created on.
    pub cluster: Cluster,
    /// When, by its clock.
    pub began: Micros,
    /// Where the slot begins; none while it is being created.
    pub since: Option<PgLsn>,
    /// The publication was altered, and decoding may not go by it yet.
    pub listing: bool,
}

impl Note {
    /// What a replica records of it.
    pub fn recorded(&self) -> Recorded {
        Recorded {
            cluster: self.cluster,
            began: self.began,
        }
    }

    /// What the slot's LSNs are of.
    pub fn history(&self) -> History {
        self.recorded().history()
    }
}

/// Reads it; none before the first set-up.
///
/// # Errors
/// When the source refuses, or the row makes no sense.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<Note>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(None);
    }
    let sql = format!(
        "SELECT system_identifier, timeline, began, since, listing FROM {TABLE} WHERE stream = $1"
    );
    let row = client.query_opt(&sql, &[&stream.as_str()]).await?;
    row.map(|row| {
        Ok(Note {
            cluster: stream::cluster(&row)?,
            began: pg_micros(row.get::<_, SystemTime>(2)),
            since: row.get(3),
            listing: row.get(4),
        })
    })
    .transpose()
}

/// The names of all streams.
///
/// # Errors
/// When the source refuses.
pub async fn names(client: &(impl GenericClient + Sync)) -> Result<Vec<String>, PgError> {
    let sql = format!("SELECT stream FROM {TABLE} ORDER BY 1");
    let rows = client.query_typed(&sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Notes that a slot is going to be created: a history begins. Returns when.
///
/// # Errors
/// When the source refuses.
pub async fn begin(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    source: &Cluster,
) -> Result<Micros, PgError> {
    // Never one that was there before, whatever the clock has done meanwhile.
    let sql = format!(
        "INSERT INTO {TABLE} (stream, system_identifier, timeline, began)
        VALUES ($1, $2, $3, clock_timestamp())
            ON CONFLICT (stream) DO UPDATE
           SET system_identifier = EXCLUDED.system_identifier, timeline = EXCLUDED.timeline, since = NULL, listing = false,
               began = greatest(EXCLUDED.began, sending.began + interval '1 microsecond')
        RETURNING began"
    );
    let row = client
        .query_one(
            &sql,
            &[
                &stream.as_str(),
                &source.system_identifier.to_string(),
                &source.timeline,
            ],
        )
        .await?;
    Ok(pg_micros(row.get::<_, SystemTime>(0)))
}

/// Notes that the source failed over and the slot is gone on with: a history begins. Returns when; none without a note.
///
/// # Errors
/// When the source refuses.
pub async fn follow(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    timeline: i32,
) -> Result<Option<Micros>, PgError> {
    let sql = format!(
        "UPDATE {TABLE} SET timeline = $2, began = greatest(clock_timestamp(), began + interval '1 microsecond')
          WHERE stream = $1 RETURNING began"
    );
    let row = client
        .query_opt(&sql, &[&stream.as_str(), &timeline])
        .await?;
    Ok(row.map(|row| pg_micros(row.get::<_, SystemTime>(0))))
}

/// Notes where the slot begins that has been created.
///
/// # Errors
/// When the source refuses.
pub async fn created(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    since: PgLsn,
) -> Result<(), PgError> {
    client
        .execute(
            &format!("UPDATE {TABLE} SET since = $2 WHERE stream = $1 AND since IS NULL"),
            &[&stream.as_str(), &since],
        )
        .await?;
    Ok(())
}

/// Notes that it is altered, in the transaction that does it.
pub fn list_is_new(stream: &StreamName) -> String {
    let stream = quote_literal(stream.as_str());
    format!("UPDATE {TABLE} SET listing = true WHERE stream = {stream}")
}

/// Notes that decoding goes by it.
///
/// # Errors
/// When the source refuses.
pub async fn list_is_known(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<(), PgError> {
    client
        .execute(
            &format!("UPDATE {TABLE} SET listing = false WHERE stream = $1"),
            &[&stream.as_str()],
        )
        .await?;
    Ok(())
}

/// The statement that forgets a stream whose slot was not created to the end.
pub fn forget_unfinished(stream: &StreamName) -> String {
    let stream = quote_literal(stream.as_str());
    format!("DELETE FROM {TABLE} WHERE stream = {stream} AND since IS NULL")
}

/// The statement that drops schema `dr_agent` of the source, unless another stream is sent from it.
pub fn drop_schema_of(stream: &StreamName) -> String {
    let stream = quote_literal(stream.as_str());
    format!(
        "DO $undo$
BEGIN
    IF to_regclass('{TABLE}') IS NULL
       OR NOT EXISTS (SELECT FROM {TABLE} WHERE stream <> {stream}) THEN
        DROP SCHEMA IF EXISTS dr_agent CASCADE;
    END IF;
END
$undo$"
    )
}
