//! What is neither schema nor rows: sequences, materialized views, statistics, and what is not carried
//! over at all.
//!
//! Runs after the constraints are there. Sequences must be right, so their errors are errors. A
//! materialized view can be refreshed and statistics gathered at any later time, so theirs are warnings.

use std::collections::HashSet;

use futures_util::future;
use tokio_postgres::Client;

use super::error::CopyError;
use super::progress::CopyObserver;
use crate::names::TableName;
use crate::pg::quote::quote_literal;

/// As many sequences are read or set with one statement.
const SEQUENCES_AT_ONCE: usize = 200;

/// As many tables are analyzed without an answer in between.
const ANALYZED_AT_ONCE: usize = 64;

/// Where one sequence stands.
#[derive(Clone, Debug)]
pub(crate) struct SequenceState {
    /// `"schema"."name"`
    pub(crate) name: String,
    /// `last_value`
    pub(crate) value: i64,
    /// `is_called`
    pub(crate) called: bool,
}

/// Reads where the source's sequences stand: all of them, or those that belong to `only` or that its columns call. In pieces
/// that one statement can set.
///
/// Sequences are in no snapshot: the position is the current one, at or after the rows'.
pub(crate) async fn sequences(
    source: &Client,
    only: Option<&[TableName]>,
) -> Result<Vec<Vec<SequenceState>>, CopyError> {
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
                   AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i'))
              OR EXISTS (
                SELECT 1 FROM pg_depend d
                  JOIN pg_attrdef a ON a.oid = d.objid
                  JOIN pg_class t ON t.oid = a.adrelid
                  JOIN pg_namespace tn ON tn.oid = t.relnamespace
                  JOIN unnest($2::text[], $3::text[]) AS wanted (s, t)
                    ON wanted.s = tn.nspname AND wanted.t = t.relname
                 WHERE d.classid = 'pg_attrdef'::regclass
                   AND d.refclassid = 'pg_class'::regclass AND d.refobjid = s.oid))
         ORDER BY 1, 2";
    let (schemas, names) = TableName::arrays(only.unwrap_or_default());
    let sequences: Vec<TableName> = source
        .query(SEQUENCES, &[&only.is_none(), &schemas, &names])
        .await
        .map_err(CopyError::source("list the sequences"))?
        .iter()
        .map(TableName::of)
        .collect();
    let mut positions = Vec::new();
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
        let positions_of = |row: &tokio_postgres::Row| SequenceState {
            name: row.get(0),
            value: row.get(1),
            called: row.get(2),
        };
        positions.push(rows.iter().map(positions_of).collect());
    }
    Ok(positions)
}

/// Sets those of these sequences that the replica has.
pub(super) async fn set_sequences(
    replica: &Client,
    positions: &[SequenceState],
) -> Result<(), CopyError> {
    let names: Vec<&str> = positions.iter().map(|at| at.name.as_str()).collect();
    let values: Vec<i64> = positions.iter().map(|at| at.value).collect();
    let called: Vec<bool> = positions.iter().map(|at| at.called).collect();
    replica
        .execute(
            "SELECT setval(to_regclass(name), value, called)
               FROM unnest($1::text[], $2::bigint[], $3::boolean[]) AS s (name, value, called)
              WHERE to_regclass(name) IS NOT NULL",
            &[&names, &values, &called],
        )
        .await
        .map_err(CopyError::replica("set the sequences"))?;
    Ok(())
}

fn view(row: &tokio_postgres::Row) -> TableName {
    TableName::of(row)
}

/// The materialized views that are filled on the source.
pub(crate) async fn filled_views(source: &Client) -> Result<Vec<TableName>, CopyError> {
    const FILLED: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid";
    let filled = source
        .query(FILLED, &[])
        .await
        .map_err(CopyError::source("list the materialized views"))?;
    Ok(filled.iter().map(view).collect())
}

/// Fills these materialized views where they are empty. One that reads another that is still
/// empty fails and comes again, so that they end up in the right order.
pub(crate) async fn refresh_views(
    replica: &Client,
    filled: &[TableName],
    observer: &dyn CopyObserver,
) -> Result<(), CopyError> {
    const EMPTY: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'm' AND NOT c.relispopulated";
    let empty: HashSet<TableName> = replica
        .query(EMPTY, &[])
        .await
        .map_err(CopyError::replica("list the materialized views"))?
        .iter()
        .map(view)
        .collect();
    let mut left: Vec<TableName> = filled
        .iter()
        .filter(|name| empty.contains(name))
        .cloned()
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
/// new, the topmost one is analyzed, which includes its partitions. What was `analyzed` since its rows are there is left out.
pub(crate) async fn analyze(
    replica: &Client,
    tables: &[(TableName, TableName)],
    roots: bool,
    analyzed: &HashSet<TableName>,
) -> Result<(), CopyError> {
    let mut done: HashSet<&TableName> = analyzed.iter().collect();
    let targets: Vec<&TableName> = tables
        .iter()
        .map(|(table, root)| if roots { root } else { table })
        .filter(|target| done.insert(*target))
        .collect();
    // Several at once, since the replica may be far away; it does them one after the other.
    let mut analyzed = Vec::with_capacity(targets.len());
    for some in targets.chunks(ANALYZED_AT_ONCE) {
        let mut asked = Vec::with_capacity(some.len());
        for target in some {
            let sql = format!("ANALYZE {}", target.sql());
            asked.push(async move { replica.batch_execute(&sql).await });
        }
        analyzed.extend(future::join_all(asked).await);
    }
    for (target, analyzed) in targets.into_iter().zip(analyzed) {
        if let Err(error) = analyzed {
            if error.as_db_error().is_none() {
                return Err(CopyError::replica("analyze")(error));
            }
            let error = crate::pg::PgError::from(error);
            tracing::warn!(table = %target, %error, "could not gather statistics");
        }
    }
    Ok(())
}

/// What is on the source and in no copy of the whole schema.
pub(crate) async fn left_behind(source: &Client) -> Result<Vec<String>, CopyError> {
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
    let mut left = Vec::new();
    if objects > 0 {
        left.push(format!("{objects} large objects"));
    }
    if elsewhere > 0 {
        left.push(format!(
            "the tablespaces of {elsewhere} tables and indexes; theirs is the default"
        ));
    }
    Ok(left)
}
