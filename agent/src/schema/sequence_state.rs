//! `dr_agent.sequence_state`: where the source's sequences stand, as its agent saw them last.
//!
//! Written on the source, and on the replica like any other row. Beside the sequences of the users it has notes of our own, in schema
//! `dr_agent`: when they were looked at ([`LOOKED_AT`], microseconds since 1970 by the source's clock) and how fast one is used
//! ([`RATE_OF`] and its name, calls per second).

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::GenericClient;
use tokio_postgres::types::Oid;

use super::progress;
use crate::names::TableName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.sequence_state";

/// Name of the note of the last look.
pub const LOOKED_AT: &str = "looked at";

/// What the notes of rates begin with; the sequence's `schema.name` follows.
pub const RATE_OF: &str = "calls per second of ";

/// `last_value` and `is_called` of a sequence.
pub type State = (i64, bool);

/// Reads all rows.
///
/// # Errors
/// When the server refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
) -> Result<BTreeMap<TableName, State>, PgError> {
    let sql = format!("SELECT schema_name, sequence_name, last_value, is_called FROM {TABLE}");
    let rows = client.query(&sql, &[]).await?;
    let states = rows
        .iter()
        .map(|row| (TableName::of(row), (row.get(2), row.get(3))));
    Ok(states.collect())
}

/// Puts rows in place of those that are there, and removes others.
///
/// # Errors
/// When the server refuses.
pub async fn write(
    client: &(impl GenericClient + Sync),
    put: &[(TableName, State)],
    removed: &BTreeSet<TableName>,
) -> Result<(), PgError> {
    let sql = format!(
        "WITH gone AS (
            DELETE FROM {TABLE} AS s
             USING ROWS FROM (pg_catalog.unnest($5::text[]), pg_catalog.unnest($6::text[])) AS g (schema_name, sequence_name)
             WHERE s.schema_name = g.schema_name AND s.sequence_name = g.sequence_name)
        INSERT INTO {TABLE} AS s (schema_name, sequence_name, last_value, is_called)
        SELECT * FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[]),
                                 pg_catalog.unnest($3::bigint[]), pg_catalog.unnest($4::boolean[])) AS p
            ON CONFLICT (schema_name, sequence_name)
            DO UPDATE SET last_value = excluded.last_value, is_called = excluded.is_called"
    );
    let (schemas, names) = TableName::arrays(put.iter().map(|(name, _)| name));
    let (values, called): (Vec<i64>, Vec<bool>) = put.iter().map(|(_, state)| *state).unzip();
    let (gone_schemas, gone_names) = TableName::arrays(removed);
    client
        .execute(
            &sql,
            &[
                &schemas,
                &names,
                &values,
                &called,
                &gone_schemas,
                &gone_names,
            ],
        )
        .await?;
    Ok(())
}

/// What is known of sequences that are here: where the source's stand, and how fast they are used.
///
/// # Errors
/// When the server refuses.
pub async fn of(
    client: &(impl GenericClient + Sync),
    oids: &[Oid],
) -> Result<BTreeMap<Oid, (Option<State>, i64)>, PgError> {
    let sql = format!(
        "SELECT c.oid, k.last_value, k.is_called, coalesce(r.last_value, 0)
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           LEFT JOIN {TABLE} k ON k.schema_name = n.nspname AND k.sequence_name = c.relname
           LEFT JOIN {TABLE} r ON r.schema_name = 'dr_agent' AND r.sequence_name = $2 || n.nspname || '.' || c.relname
          WHERE c.oid = ANY ($1)"
    );
    let rows = client.query(&sql, &[&oids, &RATE_OF]).await?;
    let known = rows.iter().map(|row| {
        let value: Option<i64> = row.get(1);
        (row.get(0), (value.zip(row.get(2)), row.get(3)))
    });
    Ok(known.collect())
}

/// Sequences of the source that are not here, and where they stand.
///
/// # Errors
/// When the server refuses.
pub async fn missing(
    client: &(impl GenericClient + Sync),
) -> Result<Vec<(TableName, i64)>, PgError> {
    let sql = format!(
        "SELECT k.schema_name, k.sequence_name, k.last_value
           FROM {TABLE} k
           LEFT JOIN pg_namespace n ON n.nspname = k.schema_name
           LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = k.sequence_name AND c.relkind = 'S'
          WHERE c.oid IS NULL AND k.schema_name <> 'dr_agent' ORDER BY 1, 2"
    );
    let rows = client.query(&sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| (TableName::of(row), row.get(2)))
        .collect())
}

/// How many seconds may have passed between the last look and `until`, a time as text, by whichever clocks say more; without it, up
/// to the last transaction that was applied. None where nobody looked.
///
/// # Errors
/// When the server refuses.
pub async fn since_last_look(
    client: &(impl GenericClient + Sync),
    stream: &str,
    until: Option<&str>,
) -> Result<Option<f64>, PgError> {
    // The source's clock and the replica's may differ: each is compared with itself, and both with one another.
    let sql = format!(
        "SELECT greatest(0, extract(epoch FROM $2::text::timestamptz - l.at),
                         coalesce(extract(epoch FROM $2::text::timestamptz - p.applied_at), 0)
                         + coalesce(extract(epoch FROM p.commit_time - l.at), 0))::float8
           FROM (SELECT to_timestamp(last_value / 1e6) AS at FROM {TABLE}
                  WHERE schema_name = 'dr_agent' AND sequence_name = $3) AS l
           LEFT JOIN {} p ON p.stream = $1",
        progress::TABLE
    );
    let row = client
        .query_opt(&sql, &[&stream, &until, &LOOKED_AT])
        .await?;
    Ok(row.map(|row| row.get(0)))
}
