//! What the copy must know of each table: pages, columns, format; and that the snapshot still shows it.
//!
//! Read in one source session that has imported the snapshot and stays open while rows are copied.
//! That session holds ACCESS SHARE on every table, as `pg_dump` does, so that nobody drops, truncates
//! or rewrites one meanwhile: a rewritten table looks empty to an older snapshot.
//!
//! # Invariants
//! - What happened between the snapshot and the lock is noticed: the file a table had under the
//!   snapshot must be the file it has now.
//! - Rows are copied into columns of exactly the same types; binary data would otherwise be read as
//!   something else without an error.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::error::CopyError;
use super::format::{FIRST_NOT_PINNED, Shape, TypeInfo, TypeOid, is_binary_safe};
use crate::catalog::routing;
use crate::names::TableName;
use crate::pg::quote::quote_ident;

/// One table as the copy sees it.
#[derive(Clone, Debug)]
pub(crate) struct TableLayout {
    /// Its name.
    pub(crate) name: TableName,
    /// Heap pages.
    pub(crate) pages: u32,
    /// Size with TOAST, in bytes.
    pub(crate) bytes: u64,
    /// A heap table: its ctids mean pages.
    pub(crate) is_heap: bool,
    /// Where its rows are written where not into itself ([`crate::catalog::routing`]).
    pub(crate) top: Option<TableName>,
    /// Columns that are stored and sent, in order: name and type.
    pub(crate) columns: Vec<(String, String)>,
    /// FORMAT binary or text.
    pub(crate) binary: bool,
}

impl TableLayout {
    /// The table that takes the rows.
    pub(crate) fn taker(&self) -> &TableName {
        self.top.as_ref().unwrap_or(&self.name)
    }

    /// The sent columns, quoted, with commas; empty for a table without any.
    pub(crate) fn column_list(&self) -> String {
        let names: Vec<String> = self
            .columns
            .iter()
            .map(|(name, _)| quote_ident(name))
            .collect();
        names.join(", ")
    }
}

/// As many tables are locked with one statement.
const LOCKED_AT_ONCE: usize = 200;

/// Locks the tables against being dropped or rewritten, until the session's transaction ends.
pub(crate) async fn lock(source: &Client, tables: &[TableName]) -> Result<(), CopyError> {
    for some in tables.chunks(LOCKED_AT_ONCE) {
        let only: Vec<String> = some
            .iter()
            .map(|table| format!("ONLY {}", table.sql()))
            .collect();
        let statement = format!("LOCK TABLE {} IN ACCESS SHARE MODE", only.join(", "));
        source.batch_execute(&statement).await.map_err(|error| {
            match error.as_db_error() {
                // Dropped or renamed since the snapshot; the message names it.
                Some(db) if matches!(db.code().code(), "42P01" | "3F000") => {
                    CopyError::SourceChanged {
                        what: db.message().to_owned(),
                    }
                }
                _ => CopyError::source("lock the tables")(error),
            }
        })?;
    }
    Ok(())
}

/// Reads the layouts of `tables`, in their order.
pub(crate) async fn read(
    source: &Client,
    tables: &[TableName],
) -> Result<Vec<TableLayout>, CopyError> {
    const SQL: &str = "
        SELECT c.oid, coalesce(am.amname = 'heap', false),
               c.relfilenode = pg_relation_filenode(c.oid),
               pg_relation_size(c.oid) / current_setting('block_size')::bigint,
               pg_table_size(c.oid)
          FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (nspname, relname, place)
          LEFT JOIN (pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace)
            ON n.nspname = wanted.nspname AND c.relname = wanted.relname
          LEFT JOIN pg_am am ON am.oid = c.relam
         ORDER BY place";
    let (schemas, names) = TableName::arrays(tables);
    let rows = source
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(CopyError::source("read the tables' sizes"))?;
    let tops = routing::tops(source, tables).await;
    let mut tops = tops.map_err(CopyError::source("read the partitioned tables"))?;
    let mut oids = Vec::with_capacity(rows.len());
    let mut layouts = Vec::with_capacity(rows.len());
    for (row, table) in rows.iter().zip(tables) {
        let oid: Option<u32> = row.get(0);
        // pg_class shows the snapshot's row, pg_relation_filenode() the current one.
        let same_file: Option<bool> = row.get(2);
        let (Some(oid), Some(true)) = (oid, same_file) else {
            return Err(CopyError::SourceChanged {
                what: format!("table {table} was rewritten"),
            });
        };
        oids.push(oid);
        let (pages, bytes): (i64, i64) = (row.get(3), row.get(4));
        layouts.push(TableLayout {
            name: table.clone(),
            pages: u32::try_from(pages).unwrap_or(u32::MAX),
            bytes: u64::try_from(bytes).unwrap_or(0),
            is_heap: row.get(1),
            top: tops.remove(table),
            columns: Vec::new(),
            binary: true,
        });
    }
    read_columns(source, &oids, &mut layouts).await?;
    Ok(layouts)
}

async fn read_columns(
    source: &Client,
    oids: &[u32],
    layouts: &mut [TableLayout],
) -> Result<(), CopyError> {
    const SQL: &str = "
        SELECT attrelid, attname::text, format_type(atttypid, atttypmod), atttypid
          FROM pg_attribute
         WHERE attrelid = ANY ($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
         ORDER BY attrelid, attnum";
    let rows = source
        .query(SQL, &[&oids])
        .await
        .map_err(CopyError::source("read the tables' columns"))?;
    let place: HashMap<u32, usize> = oids.iter().enumerate().map(|(i, oid)| (*oid, i)).collect();
    let types = read_types(source, rows.iter().map(|row| row.get(3)).collect()).await?;
    for row in &rows {
        let oid: u32 = row.get(0);
        let layout = &mut layouts[place[&oid]];
        layout.columns.push((row.get(1), row.get(2)));
        layout.binary &= is_binary_safe(row.get(3), &types);
    }
    Ok(())
}

/// Reads these types and, in rounds, the types they are made of.
async fn read_types(
    source: &Client,
    mut wanted: Vec<TypeOid>,
) -> Result<HashMap<TypeOid, TypeInfo>, CopyError> {
    const SQL: &str = "
        SELECT t.oid, t.typname::text, t.typsend <> 0 AND t.typreceive <> 0,
               CASE WHEN t.typtype = 'b' AND t.typcategory = 'A' AND t.typelem <> 0 THEN 'array'
                    WHEN t.typtype = 'b' THEN 'base'
                    WHEN t.typtype = 'e' THEN 'enum'
                    WHEN t.typtype = 'd' THEN 'domain'
                    WHEN t.typtype IN ('r', 'm') THEN 'range'
                    ELSE 'other' END,
               CASE WHEN t.typtype = 'b' THEN t.typelem
                    WHEN t.typtype = 'd' THEN t.typbasetype
                    ELSE coalesce(r.rngsubtype, 0) END
          FROM pg_type t
          LEFT JOIN pg_range r ON t.oid IN (r.rngtypid, r.rngmultitypid)
         WHERE t.oid = ANY ($1)";
    let mut types = HashMap::new();
    loop {
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|oid| !types.contains_key(oid));
        if wanted.is_empty() {
            return Ok(types);
        }
        let rows = source
            .query(SQL, &[&wanted])
            .await
            .map_err(CopyError::source("read the columns' types"))?;
        if rows.is_empty() {
            return Ok(types);
        }
        wanted.clear();
        for row in &rows {
            let oid: TypeOid = row.get(0);
            let part: TypeOid = row.get(4);
            let shape = match row.get(3) {
                "array" => Shape::Array(part),
                "base" => Shape::Base,
                "enum" => Shape::Enum,
                "domain" => Shape::Domain(part),
                "range" => Shape::Range(part),
                _ => Shape::Other,
            };
            if !matches!(shape, Shape::Base | Shape::Enum | Shape::Other) {
                wanted.push(part);
            }
            let info = TypeInfo {
                name: row.get(1),
                built_in: oid < FIRST_NOT_PINNED,
                has_binary: row.get(2),
                shape,
            };
            types.insert(oid, info);
        }
    }
}

/// Checks that the replica's tables can take the rows: every sent column is there, with its type.
pub(super) async fn verify(replica: &Client, layouts: &[TableLayout]) -> Result<(), CopyError> {
    const SQL: &str = "
        SELECT wanted.place, a.attname::text, format_type(a.atttypid, a.atttypmod)
          FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (nspname, relname, place)
          JOIN pg_namespace n ON n.nspname = wanted.nspname
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.relname
               AND c.relkind = 'r'
          LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               AND a.attgenerated = ''";
    let names: Vec<TableName> = layouts.iter().map(|layout| layout.name.clone()).collect();
    let (schemas, names) = TableName::arrays(&names);
    let rows = replica
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(CopyError::replica("read the tables' columns"))?;
    let mut found: HashMap<usize, HashMap<String, String>> = HashMap::new();
    for row in &rows {
        let place: i64 = row.get(0);
        let columns = found
            .entry(usize::try_from(place - 1).unwrap_or(usize::MAX))
            .or_default();
        if let (Some(name), Some(kind)) = (row.get(1), row.get(2)) {
            columns.insert(name, kind);
        }
    }
    for (place, layout) in layouts.iter().enumerate() {
        if let Some(reason) = difference(layout, found.get(&place)) {
            return Err(CopyError::ReplicaTable {
                table: layout.name.clone(),
                reason,
            });
        }
    }
    Ok(())
}

fn difference(layout: &TableLayout, found: Option<&HashMap<String, String>>) -> Option<String> {
    let Some(found) = found else {
        return Some("does not exist".to_owned());
    };
    layout
        .columns
        .iter()
        .find_map(|(name, kind)| match found.get(name) {
            Some(other) if other == kind => None,
            Some(other) => Some(format!(
                "has column {name} as {other}, the source as {kind}"
            )),
            None => Some(format!("has no column {name} that can be written")),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_of_another_type_is_named() {
        let layout = TableLayout {
            name: TableName {
                schema: "public".into(),
                name: "t".into(),
            },
            pages: 1,
            bytes: 1,
            is_heap: true,
            top: None,
            columns: vec![
                ("id".into(), "integer".into()),
                ("at".into(), "date".into()),
            ],
            binary: true,
        };
        let replica = |at: &str| -> HashMap<String, String> {
            [("id".into(), "integer".into()), ("at".into(), at.into())].into()
        };
        assert_eq!(difference(&layout, Some(&replica("date"))), None);
        assert_eq!(
            difference(&layout, Some(&replica("time"))).unwrap(),
            "has column at as time, the source as date"
        );
        assert_eq!(difference(&layout, None).unwrap(), "does not exist");
    }
}
