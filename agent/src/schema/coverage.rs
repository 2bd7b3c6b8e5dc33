//! `dr_agent.coverage`: what the source has, and what of it is not protected, by kind.
//!
//! Written on the source by its agent, and on the replica like any other row: what is missing there can be told when the source is
//! gone.

use tokio_postgres::{GenericClient, Row};

use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.coverage";

/// What stands before hashes; they have [`HASH_CHARS`] each. Other names are a JSON list, or nothing where there are too many.
pub const HASHED: char = '#';

/// See [`HASHED`].
pub const HASH_CHARS: usize = 8;

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
    /// The names are hashes of names.
    pub hashed: bool,
    /// Their names; none where there are too many.
    pub names: Option<Vec<String>>,
}

/// The statement that writes what the source has. `by_kind` is a query of kind, count and names, as [`Told`] reads them; its
/// parameters are the kinds and the stream.
pub fn writing(by_kind: &str) -> String {
    format!(
        "INSERT INTO {TABLE} AS c (stream, kind, protected, objects, names)
         SELECT $2, b.kind, true, b.objects, b.names FROM ({by_kind}) AS b (kind, objects, names) {CHANGED}"
    )
}

/// The statement that reads kind, count and names of this side, names being NULL where the source has told the same. `$4` is the
/// stream, the others are those of `by_kind`.
pub fn unlike(by_kind: &str) -> String {
    format!(
        "SELECT b.kind, b.objects, CASE WHEN b.names = c.names AND b.names <> '' THEN NULL ELSE b.names END
           FROM ({by_kind}) AS b LEFT JOIN {TABLE} c ON c.stream = $4 AND c.kind = b.kind AND c.protected"
    )
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

/// What the source told last, as far as it has arrived, with the names of what is not protected and of the kinds `named`; nothing of
/// an agent that did not tell.
///
/// # Errors
/// When the server refuses.
pub async fn read_without_names(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    named: &[&str],
) -> Result<Vec<Told>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT kind, objects, CASE WHEN protected AND kind <> ALL ($2) THEN left(names, 1) ELSE names END, protected
           FROM {TABLE} WHERE stream = $1"
    );
    let rows = client.query(&sql, &[&stream.as_str(), &named]).await?;
    Ok(rows.iter().map(told).collect())
}

/// The source's rows of these kinds.
///
/// # Errors
/// When the server refuses.
pub async fn read_names(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    kinds: &[&str],
) -> Result<Vec<Told>, PgError> {
    let sql = format!(
        "SELECT kind, objects, names, protected FROM {TABLE} WHERE stream = $1 AND protected AND kind = ANY ($2)"
    );
    let rows = client.query(&sql, &[&stream.as_str(), &kinds]).await?;
    Ok(rows.iter().map(told).collect())
}

/// A row of kind, count, names and whether it is protected.
fn told(row: &Row) -> Told {
    Told {
        protected: row.get(3),
        ..counted(row)
    }
}

/// A row of kind, count and names, of what is there.
pub fn counted(row: &Row) -> Told {
    let names: Option<&str> = row.get(2);
    let hashes = names.and_then(|names| names.strip_prefix(HASHED));
    Told {
        kind: row.get(0),
        protected: true,
        objects: row.get::<_, i64>(1).unsigned_abs(),
        hashed: hashes.is_some(),
        names: match (names, hashes) {
            (None, _) => Some(Vec::new()),
            (_, Some(hashes)) => Some(split(hashes)),
            (Some(names), None) => serde_json::from_str(names).ok(),
        },
    }
}

/// Hashes that stand behind one another.
fn split(hashes: &str) -> Vec<String> {
    let bytes = hashes.as_bytes().chunks(HASH_CHARS);
    bytes
        .map(|hash| String::from_utf8_lossy(hash).into_owned())
        .collect()
}
