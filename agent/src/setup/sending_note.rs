//! What the source itself remembers of a stream's slot: `dr_agent.sending`.
//!
//! Under route `kinesis` nobody else on the source's side could know that a slot was there and is gone; under either route it
//! tells which history the slot's LSNs are of, also while the replica is away.
//!
//! # Invariants
//! - A slot whose note has no `since` was not created to the end, and is not gone on with.
//! - A history begins with the slot that is created; nothing else changes when it began.

use std::time::SystemTime;

use tokio_postgres::{Client, Row};

use super::error::{SetupError, Side};
use super::identity::{Cluster, Recorded};
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::quote::quote_literal;
use crate::pg::{PgError, PgLsn};
use crate::time::{Micros, pg_micros};

/// A row of `dr_agent.sending`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Note {
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
    pub(super) fn recorded(&self) -> Recorded {
        Recorded {
            cluster: self.cluster,
            began: self.began,
        }
    }

    /// What the slot's LSNs are of.
    pub(crate) fn history(&self) -> History {
        self.recorded().history()
    }
}

const READ: &str = "read dr_agent.sending";
const WRITE: &str = "write dr_agent.sending";

fn sql(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> SetupError {
    move |error| SetupError::sql(Side::Source, doing)(error.into())
}

/// Reads it; none before the first set-up.
///
/// # Errors
/// When the source refuses, or the row makes no sense.
pub(crate) async fn read(client: &Client, stream: &StreamName) -> Result<Option<Note>, SetupError> {
    let there: bool = client
        .query_one("SELECT to_regclass('dr_agent.sending') IS NOT NULL", &[])
        .await
        .map_err(sql(READ))?
        .get(0);
    if !there {
        return Ok(None);
    }
    const ROW: &str = "
        SELECT system_identifier, timeline, began, since, listing FROM dr_agent.sending WHERE stream = $1";
    let row = client
        .query_opt(ROW, &[&stream.as_str()])
        .await
        .map_err(sql(READ))?;
    row.map(|row| {
        Ok(Note {
            cluster: cluster(&row).map_err(SetupError::sql(Side::Source, READ))?,
            began: pg_micros(row.get::<_, SystemTime>(2)),
            since: row.get(3),
            listing: row.get(4),
        })
    })
    .transpose()
}

/// A system identifier and a timeline, as our tables have them in their first columns.
pub(super) fn cluster(row: &Row) -> Result<Cluster, PgError> {
    let text: String = row.get(0);
    let system_identifier = text
        .parse()
        .map_err(|_| PgError::Protocol(format!("\"{text}\" is no system identifier")))?;
    Ok(Cluster {
        system_identifier,
        timeline: row.get(1),
    })
}

/// Notes that a slot is going to be created: a history begins. Returns when.
pub(super) async fn begin(
    client: &Client,
    stream: &StreamName,
    source: &Cluster,
) -> Result<Micros, SetupError> {
    // Never one that was there before, whatever the clock has done meanwhile.
    const BEGIN: &str = "
        INSERT INTO dr_agent.sending (stream, system_identifier, timeline, began)
        VALUES ($1, $2, $3, clock_timestamp())
            ON CONFLICT (stream) DO UPDATE
           SET system_identifier = EXCLUDED.system_identifier, timeline = EXCLUDED.timeline, since = NULL, listing = false,
               began = greatest(EXCLUDED.began, sending.began + interval '1 microsecond')
        RETURNING began";
    let row = client
        .query_one(
            BEGIN,
            &[
                &stream.as_str(),
                &source.system_identifier.to_string(),
                &source.timeline,
            ],
        )
        .await
        .map_err(sql(WRITE))?;
    Ok(pg_micros(row.get::<_, SystemTime>(0)))
}

/// Notes where the slot begins that has been created.
pub(super) async fn created(
    client: &Client,
    stream: &StreamName,
    since: PgLsn,
) -> Result<(), SetupError> {
    client
        .execute(
            "UPDATE dr_agent.sending SET since = $2 WHERE stream = $1 AND since IS NULL",
            &[&stream.as_str(), &since],
        )
        .await
        .map_err(sql(WRITE))?;
    Ok(())
}

/// Whether the publication was altered, and decoding may not go by it yet.
pub(super) async fn is_listing(client: &Client, stream: &StreamName) -> Result<bool, SetupError> {
    let noted = read(client, stream).await?;
    Ok(noted.is_some_and(|noted| noted.listing))
}

/// Notes that it is altered, in the transaction that does it.
pub(super) fn list_is_new(stream: &StreamName) -> String {
    let stream = quote_literal(stream.as_str());
    format!("UPDATE dr_agent.sending SET listing = true WHERE stream = {stream}")
}

/// Notes that decoding goes by it.
pub(super) async fn list_is_known(client: &Client, stream: &StreamName) -> Result<(), SetupError> {
    client
        .execute(
            "UPDATE dr_agent.sending SET listing = false WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await
        .map_err(sql(WRITE))?;
    Ok(())
}
