//! What is neither schema nor rows: sequences, materialized views, statistics, and what is not carried
//! over at all.
//!
//! Runs after the constraints are there. Sequences must be right, so their errors are errors. A
//! materialized view can be refreshed and statistics gathered at any later time, so theirs are warnings.

use std::collections::HashSet;

use tokio_postgres::Client;

use super::error::CopyError;
use super::layout::name_arrays;
use super::progress::CopyObserver;
use crate::catalog::{TableName, quote_literal};

/// As many sequences are read or set with one statement.
const SEQUENCES_AT_ONCE: usize = 200;

/// Sets the replica's sequences to the source's positions: all of them, or those that belong to
/// `only`.
///
/// Sequences are in no snapshot: the position is the current one, at or after the rows'.
pub(super) async fn set_sequences(
    source: &Client,
    replica: &Client,
    only: Option<&[TableName]>,
) -> Result<(), CopyError> {
    const SEQUENCES: &str = "
        SELECT n.nspname::text, s.relname::text
          FROM pg_class s JOIN pg_namespace n ON n.oid = s.relnamespace
         WHERE s.relkind = 'S' AND s.relpersistence <> 't' AND n.nspname <> 'dr_agent'
           AND ($1 OR EXISTS (
                SELECT 1 FROM pg_depend d
                  JOIN pg_class t ON t.oid = d.refobjid
                  JOIN pg_namespace tn ON tn.oid = t.relnamespace
                  JOIN unnest($2::text[], $3::text[]) AS wanted (s, t)
                    ON wanted.s = tn.nspname AND wanted.t = t.relname
                 WHERE d.classid = 'pg_class'::regclass AND d.objid = s.oid
                   AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')))
         ORDER BY 1, 2";
    let (schemas, names) = name_arrays(only.unwrap_or_default());
    let sequences: Vec<TableName> = source
        .query(SEQUENCES, &[&only.is_none(), &schemas, &names])
        .await
        .map_err(CopyError::source("list the sequences"))?
        .iter()
        .map(|row| TableName {
            schema: row.get(0),
            name: row.get(1),
        })
        .collect();
    for some in sequences.chunks(SEQUENCES_AT_ONCE) {
        let each: Vec<String> = some
            .iter()
            .map(|name| {
                let literal = quote_literal(&name.sql());
                format!(
                    "SELECT {literal}::text, last_value, is_called FROM {}",
                    name.sql()
                )
            })
            .collect();
        let rows = source
            .query(&each.join(" UNION ALL "), &[])
            .await
            .map_err(CopyError::source("read the sequences"))?;
        let mut names: Vec<String> = Vec::with_capacity(rows.len());
        let mut values: Vec<i64> = Vec::with_capacity(rows.len());
        let mut called: Vec<bool> = Vec::with_capacity(rows.len());
        for row in &rows {
            names.push(row.get(0));
            values.push(row.get(1));
            called.push(row.get(2));
        }
        replica
            .execute(
                "SELECT setval(to_regclass(name), value, called)
                   FROM unnest($1::text[], $2::bigint[], $3::boolean[]) AS s (name, value, called)
                  WHERE to_regclass(name) IS NOT NULL",
                &[&names, &values, &called],
            )
            .await
            .map_err(CopyError::replica("set the sequences"))?;
    }
    Ok(())
}

/// Fills the materialized views that are filled on the source. One that reads another that is still
/// empty fails and comes again, so that they end up in the right order.
pub(super) async fn refresh_views(
    source: &Client,
    replica: &Client,
    observer: &dyn CopyObserver,
) -> Result<(), CopyError> {
    const FILLED: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid";
    const EMPTY: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'm' AND NOT c.relispopulated";
    let view = |row: &tokio_postgres::Row| TableName {
        schema: row.get(0),
        name: row.get(1),
    };
    let filled = source
        .query(FILLED, &[])
        .await
        .map_err(CopyError::source("list the materialized views"))?;
    let empty: HashSet<TableName> = replica
        .query(EMPTY, &[])
        .await
        .map_err(CopyError::replica("list the materialized views"))?
        .iter()
        .map(view)
        .collect();
    let mut left: Vec<TableName> = filled
        .iter()
        .map(view)
        .filter(|name| empty.contains(name))
        .collect();
    loop {
        let mut failed = Vec::new();
        for name in &left {
            let refresh = format!("REFRESH MATERIALIZED VIEW {}", name.sql());
            if let Err(error) = replica.batch_execute(&refresh).await {
                let Some(db) = error.as_db_error() else {
                    return Err(CopyError::replica("refresh materialized views")(error));
                };
                failed.push((name.clone(), db.code().code().to_owned()));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        if failed.len() == left.len() {
            for (name, sqlstate) in failed {
                let what = format!("rows of materialized view {name}: SQLSTATE {sqlstate}");
                super::leave_out(observer, &what);
            }
            return Ok(());
        }
        left = failed.into_iter().map(|(name, _)| name).collect();
    }
}

/// Gathers statistics, without which the replica's first plans after a promotion would be bad.
/// `tables` are copied tables with the topmost table above each; where all of a partitioned table is
/// new, the topmost one is analyzed, which includes its partitions.
pub(super) async fn analyze(
    replica: &Client,
    tables: &[(TableName, TableName)],
    roots: bool,
) -> Result<(), CopyError> {
    let mut done = HashSet::new();
    for (table, root) in tables {
        let target = if roots { root } else { table };
        if !done.insert(target) {
            continue;
        }
        if let Err(error) = replica
            .batch_execute(&format!("ANALYZE {}", target.sql()))
            .await
        {
            if error.as_db_error().is_none() {
                return Err(CopyError::replica("analyze")(error));
            }
            let error = crate::pg::PgError::from(error);
            tracing::warn!(table = %target, %error, "could not gather statistics");
        }
    }
    Ok(())
}

/// Says what a copy of the whole schema does not carry over.
pub(super) async fn tell_what_is_left(
    source: &Client,
    observer: &dyn CopyObserver,
) -> Result<(), CopyError> {
    const SQL: &str = "
        SELECT (SELECT count(*) FROM pg_largeobject_metadata),
               (SELECT count(*) FROM pg_class
                 WHERE reltablespace <> 0
                   AND reltablespace <> (SELECT oid FROM pg_tablespace WHERE spcname = 'pg_global'))";
    let row = source
        .query_one(SQL, &[])
        .await
        .map_err(CopyError::source("count what is left out"))?;
    let (objects, elsewhere): (i64, i64) = (row.get(0), row.get(1));
    if objects > 0 {
        super::leave_out(observer, &format!("{objects} large objects"));
    }
    if elsewhere > 0 {
        let what =
            format!("the tablespaces of {elsewhere} tables and indexes; theirs is the default");
        super::leave_out(observer, &what);
    }
    Ok(())
}
