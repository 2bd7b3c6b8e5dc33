//! Schema `dr_agent` of a replica: created where it is not there, renewed by a newer agent, and otherwise left alone.
//!
//! Its comment says which form it is of. A start that finds the form it knows alters nothing: DDL that changes nothing still
//! takes locks, and shows in whatever of the users' records DDL.
//!
//! # Invariants
//! - Repeatable, and one transaction.
//! - The session is silent ([`crate::pg::Session::silent`]): the users' event triggers do not see it.
//!
//! # What it does not do
//! It does not look into tables and functions that are there: nobody but an agent has reason to alter them.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::{SetupError, Side};
use crate::pg::PgError;

const SQL: &str = concat!(
    include_str!("../../sql/replica.sql"),
    "\n",
    include_str!("../../sql/shape.sql"),
    "\n",
    include_str!("../../sql/fingerprint.sql")
);

/// The statements that create or renew it.
pub(super) fn statements() -> String {
    format!("{SQL}\nCOMMENT ON SCHEMA dr_agent IS '{}'", comment())
}

/// What its comment says, and thereby of which form it is.
fn comment() -> String {
    format!(
        "dr-agent: progress of replication and promotion (form {:08x})",
        crc32c::crc32c(SQL.as_bytes())
    )
}

/// Creates what schema `dr_agent` lacks; `role` is ours.
pub(super) async fn ensure(client: &Client, role: &str) -> Result<(), SetupError> {
    let doing = "create schema dr_agent";
    let current = is_current(client).await;
    if current.map_err(SetupError::sql(Side::Replica, "look at schema dr_agent"))? {
        return Ok(());
    }
    client.batch_execute(&statements()).await.map_err(|error| {
        let error = PgError::from(error);
        if error.sqlstate() == Some("42501") {
            return SetupError::RightMissing {
                side: Side::Replica,
                role: role.to_owned(),
                what: doing.to_owned(),
                right: "ownership of the database and of schema dr_agent".to_owned(),
            };
        }
        SetupError::sql(Side::Replica, doing)(error)
    })
}

/// Whether it is of this form and has every table and function.
async fn is_current(client: &Client) -> Result<bool, PgError> {
    const IS_CURRENT: &str = "
        SELECT coalesce(obj_description(n.oid, 'pg_namespace') = $1, false)
               AND NOT EXISTS (SELECT FROM unnest($2::text[]) AS name WHERE NOT EXISTS (
                     SELECT FROM pg_class WHERE relnamespace = n.oid AND relname = name))
               AND NOT EXISTS (SELECT FROM unnest($3::text[]) AS name WHERE NOT EXISTS (
                     SELECT FROM pg_proc WHERE pronamespace = n.oid AND proname = name))
          FROM pg_namespace n WHERE n.nspname = 'dr_agent'";
    let found = client
        .query_typed_opt(
            IS_CURRENT,
            &[
                (&comment(), Type::TEXT),
                (&made_by("TABLE IF NOT EXISTS "), Type::TEXT_ARRAY),
                (&made_by("FUNCTION "), Type::TEXT_ARRAY),
            ],
        )
        .await?;
    Ok(found.is_some_and(|row| row.get(0)))
}

/// The names of the schema's objects of a kind, by the end of the words that make one.
fn made_by(words: &str) -> Vec<String> {
    let made = SQL.lines().filter(|line| line.starts_with("CREATE "));
    let made = made.filter_map(|line| line.split_once(&format!("{words}dr_agent.")));
    let names = made.filter_map(|(_, rest)| rest.split([' ', '(']).next());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_is_known_by_name_and_nothing_else_is_made() {
        let tables = made_by("TABLE IF NOT EXISTS ");
        let functions = made_by("FUNCTION ");
        assert!(tables.contains(&"progress".to_owned()), "{tables:?}");
        assert!(functions.contains(&"advance".to_owned()), "{functions:?}");
        let made = SQL.lines().filter(|line| line.starts_with("CREATE "));
        // The schema itself.
        assert_eq!(made.count(), tables.len() + functions.len() + 1);
    }
}
