//! Rows and changes that the source has, and that a constraint of its own refuses here.
//!
//! A CHECK may read another table, or the clock; a constraint that is NOT VALID was never held against the rows that were there
//! before it. What the source has accepted is the source's, so it is copied and applied. A constraint that refuses it is
//! dropped in the same transaction that keeps its statement in `dr_agent.deferred`, and comes back as NOT VALID when the replica
//! is opened: until then it would only say again what the source has decided, with another clock and other neighbours.
//!
//! # Invariants
//! - Nothing is dropped that is not kept: killed anywhere, the replica has the constraint or its statement.
//! - It is said, once for each constraint.

use tokio_postgres::GenericClient;
use tokio_postgres::types::{ToSql, Type};

use crate::names::TableName;
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
           || CASE WHEN m.text IS NULL THEN '' ELSE pg_catalog.format('; COMMENT ON CONSTRAINT %I ON %s IS %L', c.conname, c.conrelid::regclass, m.text) END
      FROM up JOIN pg_catalog.pg_constraint c ON c.conrelid = up.oid
      LEFT JOIN LATERAL pg_catalog.obj_description(c.oid, 'pg_constraint') AS m (text) ON true
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
           || CASE WHEN m.text IS NULL THEN '' ELSE pg_catalog.format('; COMMENT ON CONSTRAINT %I ON DOMAIN %s IS %L', c.conname, c.contypid::regtype, m.text) END
      FROM down JOIN pg_catalog.pg_constraint c ON c.contypid = down.oid
      LEFT JOIN LATERAL pg_catalog.obj_description(c.oid, 'pg_constraint') AS m (text) ON true
     WHERE c.contype = 'c' AND c.conname = $2";

/// Several connections meet the same constraint at once; who comes later is to see that it is gone. None of them holds another lock.
const ONE_AT_A_TIME: &str = "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('dr_agent: constraints set aside'))";

/// A constraint that was taken away.
#[derive(Debug)]
pub struct Taken {
    /// What it is, for people.
    pub what: String,
    /// Adds it again, as NOT VALID.
    pub add: String,
}

impl Taken {
    /// What becomes of it, for people.
    pub fn told(&self) -> String {
        let refused =
            "it refuses rows of the source; it comes back as NOT VALID once the database is opened";
        format!("{}: {refused}", self.what)
    }
}

/// Drops what may have refused rows of this table; `None` if the error is not one of a constraint.
///
/// # Errors
/// When the server refuses.
pub async fn take_away(
    transaction: &(impl GenericClient + Sync),
    error: &PgError,
    table: &TableName,
) -> Result<Option<Vec<Taken>>, tokio_postgres::Error> {
    let PgError::Server(refused) = error else {
        return Ok(None);
    };
    let Some((sql, parameters)) = suspects(refused, table) else {
        return Ok(None);
    };
    let typed = |parameter| (parameter as &(dyn ToSql + Sync), Type::TEXT);
    let parameters: Vec<_> = parameters.iter().map(typed).collect();
    transaction.batch_execute(ONE_AT_A_TIME).await?;
    let mut taken = Vec::new();
    for row in transaction.query_typed(sql, &parameters).await? {
        transaction.batch_execute(row.get(1)).await?;
        taken.push(Taken {
            what: row.get(0),
            add: row.get(2),
        });
    }
    Ok(Some(taken))
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
