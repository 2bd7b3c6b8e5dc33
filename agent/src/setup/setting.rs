//! Settings stored with a database or a role (`ALTER DATABASE … SET`, `ALTER ROLE … SET`).
//!
//! `pg_dump` of one database does not carry them, and an application that relies on such a
//! `search_path` would not find its tables after a promotion. They are copied once, at the first
//! start.
//!
//! # Invariants
//! - What would open the read-only guard, or change how the agent applies, is not copied.
//! - What can keep sessions out of a server that lacks a library or a role is not copied either; it is named, with the
//!   statement, for a person to decide.
//!
//! # What it does not do
//! Settings changed on the source later are not followed.

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::role::Statement;
use crate::error::{Class, Classify as _};
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};

/// Reads a stored setting as name and value from `c`.
pub(super) const NAME_AND_VALUE: &str = "split_part(c, '=', 1), substr(c, strpos(c, '=') + 1)";

/// The settings that stay on the source.
pub(super) const NOT_COPIED: &str =
    "split_part(c, '=', 1) NOT IN ('default_transaction_read_only', 'session_replication_role')";

/// Settings with which a session may not come up, or not as who it is, on another server.
const KEEPS_OUT: [&str; 5] = [
    "session_preload_libraries",
    "local_preload_libraries",
    "role",
    "session_authorization",
    "post_auth_delay",
];

/// Lists of names, which are stored as the text that `set_config` takes and not as what `SET` takes
/// (`variable_is_guc_list_quote()` of `pg_dump`).
const LISTS: [&str; 4] = [
    "search_path",
    "temp_tablespaces",
    "session_preload_libraries",
    "local_preload_libraries",
];

/// Whether a setting is left to a person.
pub(super) fn keeps_out(name: &str) -> bool {
    KEEPS_OUT.iter().any(|kept| name.eq_ignore_ascii_case(kept))
}

/// What is said of a setting that is left to a person.
pub(super) fn left(statement: &Statement) -> String {
    format!(
        "a setting of the source is not copied, because it could keep sessions out of the replica; if it is wanted there, run: \
         {statement}"
    )
}

/// Stores a value as it is stored on the source. Of a list, `FROM CURRENT` takes it from the session. Nothing else is set in
/// ours: a timeout would end it.
pub(super) fn statement(target: &str, name: &str, value: &str) -> Statement {
    let quoted: Vec<String> = name.split('.').map(quote_ident).collect();
    let quoted = quoted.join(".");
    let value = quote_literal(value);
    if LISTS.iter().any(|list| name.eq_ignore_ascii_case(list)) {
        return Statement::plain(format!(
            "SELECT set_config({}, {value}, true); ALTER {target} SET {quoted} FROM CURRENT",
            quote_literal(name),
        ));
    }
    Statement::plain(format!("ALTER {target} SET {quoted} TO {value}"))
}

/// The settings of the database that `source` is connected to, also those for single roles in it; and what is said of those that
/// are left to a person.
pub(super) async fn of_source(
    source: &Client,
    database: &str,
) -> Result<(Vec<Statement>, Vec<String>), SetupError> {
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
    let (mut statements, mut warnings) = (Vec::new(), Vec::new());
    for row in &rows {
        let target = match row.get::<_, Option<&str>>(0) {
            None => format!("DATABASE {database}"),
            Some(role) => format!("ROLE {} IN DATABASE {database}", quote_ident(role)),
        };
        let name = row.get(1);
        let statement = statement(&target, name, row.get(2));
        if keeps_out(name) {
            warnings.push(left(&statement));
        } else {
            statements.push(statement);
        }
    }
    Ok((statements, warnings))
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

    #[test]
    fn what_is_no_list_is_not_set_in_our_own_session() {
        let table = [
            ("transaction_timeout", "1ms"),
            ("DateStyle", "SQL, DMY"),
            ("app.x", "it's"),
        ];
        for (name, value) in table {
            let sql = statement("ROLE \"a\"", name, value).sql;
            assert!(sql.starts_with("ALTER ROLE \"a\" SET \""), "{sql}");
            assert!(!sql.contains("set_config"), "{sql}");
        }
    }

    #[test]
    fn what_can_keep_sessions_out_is_left_to_a_person() {
        for name in [
            "role",
            "session_preload_libraries",
            "Local_Preload_Libraries",
        ] {
            assert!(keeps_out(name), "{name}");
        }
        for name in ["search_path", "statement_timeout", "app.role"] {
            assert!(!keeps_out(name), "{name}");
        }
    }
}
