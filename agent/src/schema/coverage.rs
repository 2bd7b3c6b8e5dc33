//! `dr_agent.coverage`: what the source has, and what of it is not protected, by kind.
//!
//! Written on the source by its agent, and on the replica like any other row: what is missing there can be told when the source is
//! gone.

use tokio_postgres::GenericClient;

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.coverage";

/// What is as it was is not written.
const CHANGED: &str = "
    ON CONFLICT (stream, kind, protected) DO UPDATE SET objects = EXCLUDED.objects, names = EXCLUDED.names
     WHERE (c.objects, c.names) IS DISTINCT FROM (EXCLUDED.objects, EXCLUDED.names)";

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Which kind of objects.
    pub kind: String,
    /// What the source has; otherwise what of it is not protected.
    pub protected: bool,
    /// How many.
    pub objects: u64,
    /// Their names; none where there are too many.
    pub names: Option<Vec<String>>,
}

/// Writes what the source has. `by_kind` is a query of kind, count and a JSON list of names, whose parameters are the kinds and the
/// stream.
///
/// # Errors
/// When the source refuses.
pub async fn write_all(
    source: &(impl GenericClient + Sync),
    stream: &StreamName,
    by_kind: &str,
    kinds: &[&str],
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS c (stream, kind, protected, objects, names)
         SELECT $2, b.kind, true, b.objects, b.names FROM ({by_kind}) AS b (kind, objects, names) {CHANGED}"
    );
    source.execute(&sql, &[&kinds, &stream.as_str()]).await?;
    Ok(())
}

/// Writes what is not protected: kind, count, and a JSON list of names.
///
/// # Errors
/// When the source refuses.
pub async fn write_unprotected(
    source: &(impl GenericClient + Sync),
    stream: &StreamName,
    unprotected: &[(&str, u64, String)],
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS c (stream, kind, protected, objects, names)
         SELECT $1, u.kind, false, u.objects, u.names
           FROM unnest($2::text[], $3::bigint[], $4::text[]) AS u (kind, objects, names) {CHANGED}"
    );
    let kinds: Vec<&str> = unprotected.iter().map(|(kind, ..)| *kind).collect();
    let counts = unprotected.iter().map(|(_, count, _)| *count);
    let counts: Vec<i64> = counts
        .map(|count| i64::try_from(count).unwrap_or(i64::MAX))
        .collect();
    let names: Vec<&str> = unprotected
        .iter()
        .map(|(.., names)| names.as_str())
        .collect();
    source
        .execute(&sql, &[&stream.as_str(), &kinds, &counts, &names])
        .await?;
    Ok(())
}

/// What the source told last, as far as it has arrived; nothing of an agent that did not tell.
///
/// # Errors
/// When the server refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<Told>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!("SELECT kind, protected, objects, names FROM {TABLE} WHERE stream = $1");
    let rows = client.query(&sql, &[&stream.as_str()]).await?;
    let told = rows.iter().map(|row| Told {
        kind: row.get(0),
        protected: row.get(1),
        objects: row.get::<_, i64>(2).unsigned_abs(),
        names: serde_json::from_str(row.get(3)).ok(),
    });
    Ok(told.collect())
}
