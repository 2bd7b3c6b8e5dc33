//! `dr_agent.stream` on the replica: which source, and which history of it, each stream comes from.
//!
//! # Invariants
//! - Written before anything of the source is copied; whoever goes on compares it first.

use std::time::SystemTime;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{GenericClient, Row};

use crate::names::history::{Cluster, History};
use crate::names::stream::StreamName;
use crate::pg::quote::quote_literal;
use crate::pg::{PgError, PgLsn};
use crate::time::{Micros, pg_micros, system_time};

/// The table.
pub const TABLE: &str = "dr_agent.stream";

/// What a replica has recorded of where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its source.
    pub cluster: Cluster,
    /// When its history began.
    pub began: Micros,
}

impl Recorded {
    /// What the replica's LSNs are of.
    pub fn history(self) -> History {
        History {
            system_identifier: self.cluster.system_identifier,
            began: self.began,
        }
    }
}

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Where it comes from.
    pub recorded: Recorded,
    /// Where the source stood when its tables were last looked at.
    pub tables_as_of: Option<PgLsn>,
}

/// A system identifier and a timeline, in a row's first columns.
///
/// # Errors
/// Where the text is no number.
pub fn cluster(row: &Row) -> Result<Cluster, PgError> {
    let text: String = row.get(0);
    let system_identifier = text
        .parse()
        .map_err(|_| PgError::Protocol(format!("\"{text}\" is no system identifier")))?;
    Ok(Cluster {
        system_identifier,
        timeline: row.get(1),
    })
}

/// Reads the row of a stream.
///
/// # Errors
/// When the replica refuses, or the row makes no sense.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Option<Stream>, PgError> {
    let sql = format!(
        "SELECT system_identifier, timeline, began, tables_as_of FROM {TABLE} WHERE stream = $1"
    );
    let name = stream.as_str();
    let of_stream = [(&name as &(dyn ToSql + Sync), Type::TEXT)];
    let row = client.query_typed_opt(&sql, &of_stream).await?;
    row.map(|row| {
        let recorded = Recorded {
            cluster: cluster(&row)?,
            began: pg_micros(row.get::<_, SystemTime>(2)),
        };
        Ok(Stream {
            recorded,
            tables_as_of: row.get(3),
        })
    })
    .transpose()
}

/// The names of all streams.
///
/// # Errors
/// When the replica refuses.
pub async fn names(client: &(impl GenericClient + Sync)) -> Result<Vec<String>, PgError> {
    let sql = format!("SELECT stream FROM {TABLE} ORDER BY 1");
    let rows = client.query_typed(&sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Records whose replica this is.
///
/// # Errors
/// When the replica refuses.
pub async fn record(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    source: &Recorded,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, system_identifier, timeline, began) VALUES ($1, $2, $3, $4)
            ON CONFLICT (stream) DO UPDATE
           SET system_identifier = EXCLUDED.system_identifier, timeline = EXCLUDED.timeline, began = EXCLUDED.began,
               tables_as_of = NULL, created_at = now()"
    );
    let Recorded { cluster, began } = source;
    client
        .execute(
            &sql,
            &[
                &stream.as_str(),
                &cluster.system_identifier.to_string(),
                &cluster.timeline,
                &system_time(*began),
            ],
        )
        .await?;
    Ok(())
}

/// Records that the source is on a later timeline, which has everything that was applied, and when that history began.
///
/// # Errors
/// When the replica refuses.
pub async fn follow(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    source: &Recorded,
) -> Result<(), PgError> {
    let sql = format!("UPDATE {TABLE} SET timeline = $2, began = $3 WHERE stream = $1");
    let Recorded { cluster, began } = source;
    client
        .execute(
            &sql,
            &[&stream.as_str(), &cluster.timeline, &system_time(*began)],
        )
        .await?;
    Ok(())
}

/// Notes that every table is here that the source publishes at `as_of`. A later start without the source goes by it.
///
/// # Errors
/// When the replica refuses.
pub async fn note_tables(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    as_of: PgLsn,
) -> Result<(), PgError> {
    let sql =
        format!("UPDATE {TABLE} SET tables_as_of = greatest(tables_as_of, $2) WHERE stream = $1");
    client
        .execute_typed(
            &sql,
            &[(&stream.as_str(), Type::TEXT), (&as_of, Type::PG_LSN)],
        )
        .await?;
    Ok(())
}

/// The statement that forgets a stream.
pub fn forget(stream: &StreamName) -> String {
    let stream = quote_literal(stream.as_str());
    format!("DELETE FROM {TABLE} WHERE stream = {stream}")
}
