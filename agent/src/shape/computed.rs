//! What a table's columns are that the stream does not tell by itself: what a generated column is computed from, and what a column's
//! type is made of.
//!
//! The replica computes generated columns itself, so another expression there means other values, and nothing in the stream shows
//! it. So the catalogs of both sides are compared: at every start, and whenever what the source's catalog says is another than last
//! time. What types are made of goes from here into the stream ([`crate::pg::made_of`]).
//!
//! # What it does not do
//! It compares the present of both. A source that was altered and a replica that has not come to that yet differ, and the
//! replica stops a little before it would have to. Expressions are compared as text where both servers are of one major
//! version; another may write the same expression differently.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use futures_util::future;
use tokio_postgres::Client;

use crate::catalog::server_version;
use crate::names::TableName;
use crate::pg::PgError;
use crate::pg::made_of::made_of;

/// A column of a table.
type ColumnPlace = (TableName, String);

/// The columns of one side that are generated, or of a type that is not PostgreSQL's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Computed {
    major: i32,
    columns: BTreeMap<ColumnPlace, String>,
    types: Arc<HashMap<u32, String>>,
}

impl Computed {
    /// What the types of columns are made of that are not PostgreSQL's own, by OID.
    pub fn types(&self) -> &Arc<HashMap<u32, String>> {
        &self.types
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Generated columns. Another type is found at its place in the stream, where that was read by this version.
    Generated,
    /// Columns of types that are not PostgreSQL's own as well.
    All,
}

/// A column that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The table.
    pub table: TableName,
    /// The column.
    pub column: String,
    /// What it is on the source; `None`: an ordinary column, or none.
    pub source: Option<String>,
    /// What it is on the replica.
    pub replica: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_ordinary =
            |side: &Option<String>| side.clone().unwrap_or("an ordinary column".to_owned());
        write!(
            f,
            "column {} of {} is {} on the source and {} on the replica",
            self.column,
            self.table,
            or_ordinary(&self.source),
            or_ordinary(&self.replica)
        )
    }
}

/// Reads what this side says. Names are qualified whatever the session's `search_path` is.
///
/// # Errors
/// When the server does not answer.
pub async fn read(client: &Client) -> Result<Computed, PgError> {
    const COLUMNS: &str = "
        SELECT n.nspname::text, c.relname::text, a.attname::text, a.atttypid,
               'GENERATED ALWAYS AS (' || pg_catalog.pg_get_expr(d.adbin, d.adrelid) || ')'
          FROM pg_catalog.pg_attribute a
          JOIN pg_catalog.pg_class c ON c.oid = a.attrelid AND c.relkind = 'r'
          JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum AND a.attgenerated <> ''
         WHERE a.attnum > 0 AND NOT a.attisdropped AND (a.attgenerated <> '' OR a.atttypid >= 10000)
           AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'";
    let types_sql = format!(
        "SELECT used.oid, {} FROM (
             SELECT DISTINCT a.atttypid FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_class c ON c.oid = a.attrelid AND c.relkind = 'r'
              WHERE a.atttypid >= 10000 AND a.attnum > 0 AND NOT a.attisdropped) AS used (oid)",
        made_of("used.oid")
    );
    // Together: the replica may be far away.
    let (version, begun, rows, types, ended) = future::join5(
        server_version(client),
        client.batch_execute("BEGIN; SET LOCAL search_path = ''"),
        client.query_typed(COLUMNS, &[]),
        client.query_typed(&types_sql, &[]),
        client.batch_execute("COMMIT"),
    )
    .await;
    let major = version? / 10_000;
    begun?;
    ended?;
    let types: HashMap<u32, String> = types?
        .iter()
        .filter_map(|row| Some((row.get(0), row.get::<_, Option<String>>(1)?)))
        .collect();
    let column = |row: &tokio_postgres::Row| {
        let what = row.get::<_, Option<String>>(4);
        let what = what.or_else(|| types.get(&row.get(3)).cloned())?;
        Some(((TableName::of(row), row.get(2)), what))
    };
    Ok(Computed {
        major,
        columns: rows?.iter().filter_map(column).collect(),
        types: Arc::new(types),
    })
}

/// The columns of these tables that are not the same on both sides, of each table the first. A column that the replica does not
/// have at all is the stream's to find.
///
/// # Errors
/// When the replica does not answer.
pub async fn differences(
    source: &Computed,
    replica: &Client,
    tables: &BTreeSet<TableName>,
    which: Which,
) -> Result<Vec<Difference>, PgError> {
    let here = read(replica).await?;
    differences_from(source, &here, replica, tables, which).await
}

/// The same, where the replica has been [`read`].
///
/// # Errors
/// When the replica does not answer.
pub async fn differences_from(
    source: &Computed,
    here: &Computed,
    replica: &Client,
    tables: &BTreeSet<TableName>,
    which: Which,
) -> Result<Vec<Difference>, PgError> {
    let mut found: Vec<Difference> = Vec::new();
    let places: BTreeSet<&ColumnPlace> = source.columns.keys().chain(here.columns.keys()).collect();
    for place in places {
        let (there, here_is) = (source.columns.get(place), here.columns.get(place));
        let is_generated = [there, here_is]
            .into_iter()
            .flatten()
            .any(|what| is_generated(what));
        if which == Which::Generated && !is_generated {
            continue;
        }
        if found.last().is_some_and(|last| last.table == place.0) {
            continue;
        }
        if !tables.contains(&place.0) || is_same(there, here_is, source.major == here.major) {
            continue;
        }
        if here_is.is_none() && !exists(replica, place).await? {
            continue;
        }
        found.push(Difference {
            table: place.0.clone(),
            column: place.1.clone(),
            source: there.cloned(),
            replica: here_is.cloned(),
        });
    }
    Ok(found)
}

fn is_generated(what: &str) -> bool {
    what.starts_with("GENERATED")
}

fn is_same(there: Option<&String>, here: Option<&String>, one_major: bool) -> bool {
    match (there, here) {
        (Some(there), Some(here)) if !one_major && is_generated(there) => is_generated(here),
        (there, here) => there == here,
    }
}

async fn exists(client: &Client, (table, column): &ColumnPlace) -> Result<bool, PgError> {
    const SQL: &str = "
        SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a
                         JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
                         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                        WHERE n.nspname = $1 AND c.relname = $2 AND a.attname = $3 AND NOT a.attisdropped)";
    let row = client
        .query_one(SQL, &[&table.schema, &table.name, column])
        .await?;
    Ok(row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_compared_within_a_major_version_and_what_a_column_is_across() {
        let text = |text: &str| Some(text.to_owned());
        let (a, b) = (
            text("GENERATED ALWAYS AS (a)"),
            text("GENERATED ALWAYS AS (b)"),
        );
        let (c, d) = (text("s.c over integer"), text("s.d over integer"));
        for (there, here, within, across) in [
            (&a, &a, true, true),
            (&a, &b, false, true),
            (&a, &None, false, false),
            (&None, &a, false, false),
            (&c, &d, false, false),
            (&c, &c, true, true),
            (&a, &c, false, false),
        ] {
            assert_eq!(is_same(there.as_ref(), here.as_ref(), true), within);
            assert_eq!(is_same(there.as_ref(), here.as_ref(), false), across);
        }
    }
}
