//! Takes back what a first start has written before it failed.
//!
//! ```text
//! observe ▶ judge ▶ Undo::of what is not there yet ▶ execute ─▶ progress row: nothing is taken back any more
//!                                                       └─ failed ▶ take back, in reverse
//! ```
//!
//! # Invariants
//! - What was there before the start stays: it is not this start's to remove.
//! - Nothing is taken back once a row was copied: from the progress row on, the next start goes on from here.
//!
//! # What it does not do
//! A start that is killed takes nothing back; the next one goes on from what it left. Roles and settings come last, right
//! before the progress row, and stay.

use std::time::Duration;

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::source;
use super::target::TargetDatabase;
use crate::catalog::publication::Wanted;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};
use crate::schema::{sending, stream};

/// How long it may take: an operator waits for the error.
const WITHIN: Duration = Duration::from_secs(10);

/// What becomes of one side again, last statement first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Undo {
    statements: Vec<String>,
}

impl Undo {
    /// What a first start of `stream` adds to the replica's database.
    pub(super) fn of_replica(database: &str, stream: &StreamName, target: &TargetDatabase) -> Self {
        let mut statements = Vec::new();
        statements.push(match target.has_schema {
            false => "DROP SCHEMA IF EXISTS dr_agent CASCADE".to_owned(),
            true => stream::forget(stream),
        });
        if !target.guarded {
            statements.push(format!(
                "ALTER DATABASE {} RESET default_transaction_read_only",
                quote_ident(database)
            ));
        }
        Self { statements }
    }

    /// What it adds to the source's.
    ///
    /// # Errors
    /// When the source refuses.
    pub(super) async fn of_source(
        client: &Client,
        stream: &StreamName,
        found: &source::SourceFacts,
        wanted: &Wanted,
    ) -> Result<Self, SetupError> {
        let identities = identities(client, &wanted.identity_full)
            .await
            .map_err(SetupError::sql(Side::Source, "look at the tables"))?;
        let (name, literal) = (quote_ident(stream.as_str()), quote_literal(stream.as_str()));
        let mut statements = Vec::new();
        statements.push(match found.has_namespace {
            // Another stream may have been set up in it meanwhile.
            false => sending::drop_schema_of(stream),
            true => sending::forget_unfinished(stream),
        });
        statements.extend(identities);
        if found.publication.is_none() {
            statements.push(format!("DROP PUBLICATION IF EXISTS {name}"));
        }
        statements.push(format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
              WHERE slot_name = {literal} AND NOT active"
        ));
        Ok(Self { statements })
    }

    /// Roles that were not there.
    pub(super) fn of_roles(created: &[String]) -> Self {
        let drop = |role: &String| format!("DROP ROLE IF EXISTS {}", quote_ident(role));
        Self {
            statements: created.iter().map(drop).collect(),
        }
    }

    /// Takes it back; what cannot be is logged.
    pub(super) async fn take_back(&self, client: &Client, side: Side) {
        for statement in self.statements.iter().rev() {
            let undoing = client.batch_execute(statement);
            let failed = match tokio::time::timeout(WITHIN, undoing).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => PgError::from(error).to_string(),
                Err(_) => "no answer in time".to_owned(),
            };
            tracing::warn!(%side, statement, error = failed, "what a failed start has written stays");
        }
    }
}

/// What gives keyless tables the replica identity back that they have now.
async fn identities(client: &Client, keyless: &[TableName]) -> Result<Vec<String>, PgError> {
    const NOW: &str = "
        SELECT n.nspname, c.relname, c.relreplident = 'n'
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          JOIN unnest($1::text[], $2::text[]) AS t(s, n) ON t.s = n.nspname AND t.n = c.relname";
    if keyless.is_empty() {
        return Ok(Vec::new());
    }
    let schemas: Vec<&str> = keyless.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = keyless.iter().map(|table| table.name.as_str()).collect();
    let rows = client.query(NOW, &[&schemas, &names]).await?;
    let statement = |row: &tokio_postgres::Row| {
        let table = TableName::of(row);
        let identity = if row.get(2) { "NOTHING" } else { "DEFAULT" };
        format!("ALTER TABLE {} REPLICA IDENTITY {identity}", table.sql())
    };
    Ok(rows.iter().map(statement).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_stays() {
        let stream = StreamName::new("dr_agent", "app");
        let fresh = Undo::of_replica("app", &stream, &TargetDatabase::default());
        assert_eq!(
            fresh.statements,
            [
                "DROP SCHEMA IF EXISTS dr_agent CASCADE",
                "ALTER DATABASE \"app\" RESET default_transaction_read_only"
            ]
        );
        let after_init = TargetDatabase {
            has_schema: true,
            guarded: true,
            ..TargetDatabase::default()
        };
        let kept = Undo::of_replica("app", &stream, &after_init);
        assert_eq!(
            kept.statements,
            ["DELETE FROM dr_agent.stream WHERE stream = 'dr_agent_app'"]
        );
    }
}
