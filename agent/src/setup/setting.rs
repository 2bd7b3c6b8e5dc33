//! Settings stored with a database or a role (`ALTER DATABASE … SET`, `ALTER ROLE … SET`).
//!
//! `pg_dump` of one database does not carry them, and an application that relies on such a
//! `search_path` would not find its tables after a promotion. They are copied once, at the first
//! start.
//!
//! # Invariants
//! - What would open the read-only guard, or change how the agent applies, is not copied.
//!
//! # What it does not do
//! Settings changed on the source later are not followed.

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::role::Statement;
use crate::catalog::{quote_ident, quote_literal};
use crate::error::{Class, Classify as _};
use crate::pg::PgError;

/// Reads a stored setting as name and value from `c`.
pub(super) const NAME_AND_VALUE: &str = "split_part(c, '=', 1), substr(c, strpos(c, '=') + 1)";

/// The settings that stay on the source.
pub(super) const NOT_COPIED: &str =
    "split_part(c, '=', 1) NOT IN ('default_transaction_read_only', 'session_replication_role')";

/// Stores a value as it is stored on the source. `FROM CURRENT` takes it from the session, because
/// for settings that are lists the text to write is not the text that is stored.
pub(super) fn statement(target: &str, name: &str, value: &str) -> Statement {
    Statement::plain(format!(
        "SELECT set_config({}, {}, true); ALTER {target} SET {} FROM CURRENT",
        quote_literal(name),
        quote_literal(value),
        name.split('.')
            .map(quote_ident)
            .collect::<Vec<_>>()
            .join(".")
    ))
}

/// The settings of the database that `source` is connected to, also those for single roles in it.
pub(super) async fn of_source(
    source: &Client,
    database: &str,
) -> Result<Vec<Statement>, SetupError> {
    let sql = format!(
        "SELECT CASE WHEN s.setrole <> 0 THEN pg_get_userbyid(s.setrole)::text END,
                {NAME_AND_VALUE}
           FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
          CROSS JOIN unnest(s.setconfig) AS c
          WHERE d.datname = current_database() AND {NOT_COPIED} ORDER BY 1, 2"
    );
    let rows = source
        .query(&sql, &[])
        .await
        .map_err(|error| SetupError::sql(Side::Source, "read stored settings")(error.into()))?;
    let database = quote_ident(database);
    Ok(rows
        .iter()
        .map(|row| {
            let target = match row.get::<_, Option<&str>>(0) {
                None => format!("DATABASE {database}"),
                Some(role) => format!("ROLE {} IN DATABASE {database}", quote_ident(role)),
            };
            statement(&target, row.get(1), row.get(2))
        })
        .collect())
}

/// Stores them on the replica; returns a warning for each that it does not take.
pub(super) async fn apply(
    replica: &Client,
    statements: &[Statement],
) -> Result<Vec<String>, SetupError> {
    let mut warnings = Vec::new();
    for statement in statements {
        let Err(error) = replica.batch_execute(&statement.sql).await else {
            continue;
        };
        let error = PgError::from(error);
        if error.class() != Class::Definite {
            return Err(SetupError::sql(Side::Replica, "store settings")(error));
        }
        warnings.push(format!(
            "a setting of the source is missing on the replica: {error}; it is: {statement}"
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_stored_as_it_is_and_not_parsed_again() {
        let statement = statement("DATABASE \"app\"", "search_path", "\"$user\", it's");
        assert_eq!(
            statement.sql,
            "SELECT set_config('search_path', '\"$user\", it''s', true); ALTER DATABASE \"app\" \
             SET \"search_path\" FROM CURRENT"
        );
    }
}
