//! Partitions whose rows each server places for itself.
//!
//! The hash of an enum is that of an OID, which another server has given anew; that of a name of the catalog (`regclass`) too,
//! and what an ICU collation or somebody's own operator class makes of a value only that server knows. Of a table that is
//! partitioned by such a hash the rows of one partition are in other partitions on the replica. So they are written, found
//! and emptied through the topmost table that is so partitioned (the *top*), never by the name of a partition.
//!
//! # Invariants
//! - Both servers give the same answer for the same definition: it goes by types, not by values.
//! - The rows of one partition cannot be told from those of the others. Whatever empties one empties all below the top, and
//!   they are copied together.
//!
//! # What it does not do
//! It knows nothing of ranges over a collation that sorts otherwise on the replica.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use crate::names::TableName;

/// The OID of the top above a table, or NULL; `{table}` is the table's.
const TOP: &str = "(
    SELECT up.relid::pg_catalog.oid
      FROM pg_catalog.pg_partition_ancestors({table}) WITH ORDINALITY AS up (relid, height)
      JOIN pg_catalog.pg_partitioned_table p ON p.partrelid = up.relid AND p.partstrat = 'h'
     WHERE EXISTS (
        SELECT 1
          FROM unnest(p.partclass::pg_catalog.oid[], p.partattrs::pg_catalog.int2[], p.partcollation::pg_catalog.oid[])
               AS k (class, number, collated)
          JOIN pg_catalog.pg_opclass o ON o.oid = k.class
          LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = k.number
          LEFT JOIN pg_catalog.pg_collation c ON c.oid = k.collated
         WHERE o.oid >= 16384 OR NOT coalesce(c.collisdeterministic, true)
            OR o.opcintype IN ('pg_catalog.anyenum'::pg_catalog.regtype, 'pg_catalog.anyarray'::pg_catalog.regtype,
                               'pg_catalog.anyrange'::pg_catalog.regtype, 'pg_catalog.anymultirange'::pg_catalog.regtype,
                               'pg_catalog.record'::pg_catalog.regtype)
            OR o.opcintype = 'pg_catalog.oid'::pg_catalog.regtype
               AND coalesce(a.atttypid <> 'pg_catalog.oid'::pg_catalog.regtype, true))
     ORDER BY up.height DESC LIMIT 1)";

/// The OID of the top above a table, or NULL, as an expression of SQL.
pub fn top_of(table: &str) -> String {
    TOP.replace("{table}", table)
}

/// Those of the tables that are below a top, and which one, as this server has them.
///
/// # Errors
/// When the server does not answer.
pub async fn tops<'t>(
    client: &(impl GenericClient + Sync),
    tables: impl IntoIterator<Item = &'t TableName>,
) -> Result<BTreeMap<TableName, TableName>, tokio_postgres::Error> {
    let sql = format!(
        "SELECT w.s, w.t, n.nspname::text, c.relname::text
           FROM unnest($1::text[], $2::text[]) AS w (s, t)
           JOIN pg_catalog.pg_namespace wn ON wn.nspname = w.s
           JOIN pg_catalog.pg_class wc ON wc.relnamespace = wn.oid AND wc.relname = w.t AND wc.relispartition
           JOIN pg_catalog.pg_class c ON c.oid = {}
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace",
        top_of("wc.oid")
    );
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .into_iter()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip();
    if names.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows = client
        .query_typed(
            &sql,
            &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)],
        )
        .await?;
    let name = |row: &tokio_postgres::Row, at: usize| TableName {
        schema: row.get(at),
        name: row.get(at + 1),
    };
    Ok(rows
        .iter()
        .map(|row| (name(row, 0), name(row, 2)))
        .collect())
}

/// The partitions whose rows cannot be told from those of this table here, and itself.
///
/// # Errors
/// When the server does not answer.
pub async fn beside(
    client: &(impl GenericClient + Sync),
    table: &TableName,
) -> Result<Vec<TableName>, tokio_postgres::Error> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text
           FROM pg_catalog.pg_partition_tree({}) AS t
           JOIN pg_catalog.pg_class c ON c.oid = t.relid AND t.isleaf
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace",
        top_of("pg_catalog.to_regclass($1)")
    );
    let rows = client
        .query_typed(&sql, &[(&table.sql(), Type::TEXT)])
        .await?;
    let mut all: Vec<TableName> = rows.iter().map(TableName::of).collect();
    if all.is_empty() {
        all.push(table.clone());
    }
    Ok(all)
}

/// Empties a top with all of its partitions.
///
/// # Errors
/// When the server refuses.
pub async fn empty(
    client: &(impl GenericClient + Sync),
    top: &TableName,
) -> Result<(), tokio_postgres::Error> {
    // TRUNCATE refuses tables that others refer to, whatever session_replication_role says.
    const REFERRED_TO: &str = "
        SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_constraint f
                         JOIN pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1)) AS t ON t.relid = f.confrelid
                        WHERE f.contype = 'f')";
    let sql = top.sql();
    let row = client
        .query_typed(REFERRED_TO, &[(&sql, Type::TEXT)])
        .await?;
    let referred_to = row.first().is_some_and(|row| row.get(0));
    let statement = match referred_to {
        true => format!("DELETE FROM {sql}"),
        false => format!("TRUNCATE {sql}"),
    };
    client.batch_execute(&statement).await
}

/// The tables that have to be copied again with those that are: all below the same tops. `tops` are those of all tables.
pub fn copied_together(
    tops: &BTreeMap<TableName, TableName>,
    is_copied: impl Fn(&TableName) -> bool,
) -> impl Iterator<Item = &TableName> {
    let concerned: BTreeSet<&TableName> = tops
        .iter()
        .filter(|(table, _)| is_copied(table))
        .map(|(_, top)| top)
        .collect();
    tops.iter()
        .filter(move |(_, top)| concerned.contains(top))
        .map(|(table, _)| table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_one_top_is_copied_together() {
        let name = |name: &str| TableName {
            schema: "s".to_owned(),
            name: name.to_owned(),
        };
        let tops = [("a1", "a"), ("a2", "a"), ("b1", "b")]
            .map(|(table, top)| (name(table), name(top)))
            .into();
        let with = |one: &str| {
            let one = name(one);
            let together = copied_together(&tops, |table| *table == one);
            together.map(|table| table.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(with("a2"), ["a1", "a2"]);
        assert_eq!(with("b1"), ["b1"]);
        assert!(with("c").is_empty());
    }
}
