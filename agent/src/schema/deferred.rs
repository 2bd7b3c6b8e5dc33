//! `dr_agent.deferred` on the replica: statements that wait for the stream, or for the replica to be opened.
//!
//! A foreign key whose rows are still on their way, a partition that cannot be attached yet, a constraint that refuses what the
//! source has accepted. They run in the order in which they were kept.
//!
//! # Invariants
//! - A statement goes from here in the transaction that runs it.

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use super::progress;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.deferred";

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deferred {
    /// What the statement adds, for people.
    pub what: String,
    /// The statement.
    pub statement: String,
    /// The stream has passed what it waits for.
    pub is_due: bool,
}

/// The position behind which a statement runs that waits for the replica to be opened.
pub fn when_opened() -> PgLsn {
    PgLsn::from(u64::MAX)
}

/// Keeps a statement until the stream has passed a position, or the database is opened.
///
/// # Errors
/// When the server refuses.
pub async fn keep(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    (what, statement): (&str, &str),
    after: PgLsn,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, what, statement, after_lsn) VALUES ($1, $2, $3, $4)
            ON CONFLICT (stream, what) DO UPDATE
               SET statement = excluded.statement, after_lsn = excluded.after_lsn"
    );
    client
        .execute(&sql, &[&stream.as_str(), &what, &statement, &after])
        .await?;
    Ok(())
}

/// Reads the statements of a stream, in order; with those that wait for the opening, or without.
///
/// # Errors
/// When the server refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    is_opening: bool,
) -> Result<Vec<Deferred>, PgError> {
    let sql = format!(
        "SELECT d.what, d.statement, d.after_lsn = $2 OR coalesce(d.after_lsn <= p.end_lsn, false)
           FROM {TABLE} d LEFT JOIN {} p USING (stream)
          WHERE d.stream = $1 AND (d.after_lsn < $2 OR $3) ORDER BY d.place",
        progress::TABLE
    );
    let (of_stream, opened) = (stream.as_str(), when_opened());
    let rows = client
        .query_typed(
            &sql,
            &[
                (&of_stream, Type::TEXT),
                (&opened, Type::PG_LSN),
                (&is_opening, Type::BOOL),
            ],
        )
        .await?;
    let deferred = rows.iter().map(|row| Deferred {
        what: row.get(0),
        statement: row.get(1),
        is_due: row.get(2),
    });
    Ok(deferred.collect())
}

/// Whether any wait for the stream.
///
/// # Errors
/// When the server refuses.
pub async fn any_waits(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<bool, PgError> {
    let sql = format!("SELECT EXISTS (SELECT 1 FROM {TABLE} WHERE stream = $1 AND after_lsn < $2)");
    let (of_stream, opened) = (stream.as_str(), when_opened());
    let asked = client
        .query_typed_one(&sql, &[(&of_stream, Type::TEXT), (&opened, Type::PG_LSN)])
        .await?;
    Ok(asked.get(0))
}

/// What waits for one position waits for a later one.
///
/// # Errors
/// When the server refuses.
pub async fn put_off(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    (from, to): (PgLsn, PgLsn),
) -> Result<(), PgError> {
    let sql = format!("UPDATE {TABLE} SET after_lsn = $3 WHERE stream = $1 AND after_lsn = $2");
    client
        .execute(&sql, &[&stream.as_str(), &from, &to])
        .await?;
    Ok(())
}

/// Removes a statement that has run.
///
/// # Errors
/// When the server refuses.
pub async fn remove(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    what: &str,
) -> Result<(), PgError> {
    let sql = format!("DELETE FROM {TABLE} WHERE stream = $1 AND what = $2");
    client.execute(&sql, &[&stream.as_str(), &what]).await?;
    Ok(())
}

/// Notes why the server refuses a statement; whether that is news. A replica whose schema is of an earlier version has no place for
/// it.
///
/// # Errors
/// When the server refuses.
pub async fn note_problem(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    (what, problem): (&str, &str),
) -> Result<bool, PgError> {
    const HAS_PLACE: &str = "
        SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute
                        WHERE attrelid = $1::text::pg_catalog.regclass AND attname = 'problem')";
    let sql = format!(
        "UPDATE {TABLE} SET problem = $3 WHERE stream = $1 AND what = $2 AND problem IS DISTINCT FROM $3"
    );
    let row = client.query_one(HAS_PLACE, &[&TABLE]).await?;
    if !row.get::<_, bool>(0) {
        return Ok(false);
    }
    let noted = client
        .execute(&sql, &[&stream.as_str(), &what, &problem])
        .await?;
    Ok(noted > 0)
}
