//! Rows that the source has, and that a constraint of its own refuses here.
//!
//! A CHECK may read another table, or the clock; a constraint that is NOT VALID was never held against the rows that were there
//! before it; a foreign key does not see what was written in replica role. The rows are the source's, so they are copied. A
//! constraint that refuses them is dropped in the same transaction that keeps its statement in `dr_agent.deferred`, and
//! comes back as NOT VALID once the stream has passed the copy: what is written from then on it sees.
//!
//! # Invariants
//! - Nothing is dropped that is not kept: killed anywhere, the replica has the constraint or its statement.
//! - It is said, once for each constraint.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::CopyError;
use super::progress::CopyObserver;
use super::table_sync::Ledger;
use crate::catalog::TableName;
use crate::pg::{PgError, ServerError};

/// CHECK constraints of the table and those above it, as they were declared; `$2` is the name of one, or NULL for all.
const CHECKS: &str = "
    WITH RECURSIVE up(oid) AS (
        SELECT pg_catalog.to_regclass($1)::oid
        UNION SELECT i.inhparent FROM up JOIN pg_catalog.pg_inherits i ON i.inhrelid = up.oid)
    SELECT pg_catalog.format('check constraint %s of %s', c.conname, c.conrelid::regclass),
           pg_catalog.format('ALTER TABLE %s DROP CONSTRAINT %I', c.conrelid::regclass, c.conname),
           pg_catalog.format('ALTER TABLE %s ADD CONSTRAINT %I %s%s', c.conrelid::regclass, c.conname,
                             pg_catalog.pg_get_constraintdef(c.oid), CASE WHEN c.convalidated THEN ' NOT VALID' END)
      FROM up JOIN pg_catalog.pg_constraint c ON c.conrelid = up.oid
     WHERE c.contype = 'c' AND c.coninhcount = 0 AND ($2 IS NULL OR c.conname = $2)";

/// The same of a domain and those under it; the server names the outermost.
const OF_DOMAINS: &str = "
    WITH RECURSIVE down(oid) AS (
        SELECT t.oid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
         WHERE n.nspname || '.' || t.typname = $1
        UNION SELECT t.typbasetype FROM down JOIN pg_catalog.pg_type t USING (oid) WHERE t.typbasetype <> 0)
    SELECT pg_catalog.format('constraint %s of domain %s', c.conname, c.contypid::regtype),
           pg_catalog.format('ALTER DOMAIN %s DROP CONSTRAINT %I', c.contypid::regtype, c.conname),
           pg_catalog.format('ALTER DOMAIN %s ADD CONSTRAINT %I %s%s', c.contypid::regtype, c.conname,
                             pg_catalog.pg_get_constraintdef(c.oid), CASE WHEN c.convalidated THEN ' NOT VALID' END)
      FROM down JOIN pg_catalog.pg_constraint c ON c.contypid = down.oid
     WHERE c.contype = 'c' AND c.conname = $2";

/// Sets aside what has refused rows of this table, and returns how many constraints that were. `None` if the error is not one
/// of a constraint; none may be left where another connection has set it aside meanwhile.
pub(super) async fn set_aside(
    replica: &mut Client,
    ledger: Ledger<'_>,
    table: &TableName,
    error: &CopyError,
    observer: &dyn CopyObserver,
) -> Result<Option<usize>, CopyError> {
    let CopyError::Replica {
        source: PgError::Server(refused),
        ..
    } = error
    else {
        return Ok(None);
    };
    let Some((sql, parameters)) = suspects(refused, table) else {
        return Ok(None);
    };
    let doing = || CopyError::replica(format!("set a constraint of table {table} aside"));
    replica.batch_execute("ROLLBACK").await.map_err(doing())?;
    let parameters: Vec<_> = parameters
        .iter()
        .map(|parameter| {
            (
                parameter as &(dyn tokio_postgres::types::ToSql + Sync),
                Type::TEXT,
            )
        })
        .collect();
    let transaction = replica.transaction().await.map_err(doing())?;
    let found = transaction
        .query_typed(sql, &parameters)
        .await
        .map_err(doing())?;
    for row in &found {
        let (what, drop, add): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        transaction.batch_execute(&drop).await.map_err(doing())?;
        super::deferred::keep(&transaction, ledger, &what, &add)
            .await
            .map_err(doing())?;
    }
    transaction.commit().await.map_err(doing())?;
    for row in &found {
        let what: String = row.get(0);
        let refuses = format!(
            "{what}: rows of the source were refused (SQLSTATE {}); it comes back as NOT VALID",
            refused.sqlstate
        );
        super::leave_out(observer, &refuses);
    }
    Ok(Some(found.len()))
}

/// Which constraints may have refused rows, and the query's parameters.
fn suspects(
    refused: &ServerError,
    table: &TableName,
) -> Option<(&'static str, Vec<Option<String>>)> {
    let constraint = refused.constraint.clone();
    match (refused.sqlstate.as_str(), &refused.datatype) {
        ("23514", Some(domain)) => {
            Some((OF_DOMAINS, vec![Some(domain.clone()), Some(constraint?)]))
        }
        // Without a name: a row that is in the wrong partition.
        ("23514", None) => Some((CHECKS, vec![Some(table.sql()), Some(constraint?)])),
        // What a function in a CHECK raises: an undefined table, division by zero, its own exception.
        (state, _)
            if constraint.is_none()
                && ["42", "22", "P0", "38"]
                    .iter()
                    .any(|class| state.starts_with(class)) =>
        {
            Some((CHECKS, vec![Some(table.sql()), None]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_have_refused_a_row_is_suspected() {
        let table = TableName {
            schema: "s".to_owned(),
            name: "t".to_owned(),
        };
        let refused =
            |sqlstate: &str, constraint: Option<&str>, datatype: Option<&str>| ServerError {
                sqlstate: sqlstate.to_owned(),
                constraint: constraint.map(str::to_owned),
                datatype: datatype.map(str::to_owned),
                ..ServerError::default()
            };
        let cases = [
            (refused("23514", Some("c"), None), Some((CHECKS, 2))),
            (
                refused("23514", Some("c"), Some("s.d")),
                Some((OF_DOMAINS, 2)),
            ),
            (refused("23514", None, None), None),
            (refused("42P01", None, None), Some((CHECKS, 2))),
            (refused("P0001", None, None), Some((CHECKS, 2))),
            (refused("23505", Some("k"), None), None),
            (refused("53100", None, None), None),
            (refused("57014", None, None), None),
        ];
        for (refused, expected) in cases {
            let found = suspects(&refused, &table).map(|(sql, values)| (sql, values.len()));
            assert_eq!(found, expected, "{refused:?}");
        }
    }
}
