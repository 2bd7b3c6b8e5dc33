//! Carries out what brings the publication to what is wanted, a few tables at a time, and goes on without those that cannot be
//! published.
//!
//! # Invariants
//! - Each piece is a transaction of its own and holds its locks no longer.
//! - A table that was dropped since it was looked at is no failure.
//! - What a lost connection, or a refusal that concerns no table, leaves undone is an error: the next start goes on.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::source::title;
use crate::catalog::publication::Piece;
use crate::names::TableName;
use crate::pg::PgError;

/// A session with the source, and what a table that cannot be published means.
pub(super) struct Publishing<'a> {
    pub(super) client: &'a Client,
    /// Everything must be published.
    pub(super) must: bool,
}

impl Publishing<'_> {
    /// Carries the pieces out, in order. Returns the tables that were left out, and why.
    pub(super) async fn run(
        &self,
        pieces: Vec<Piece>,
        said: &[String],
    ) -> Result<BTreeMap<TableName, String>, SetupError> {
        let mut left_out = BTreeMap::new();
        for piece in pieces {
            let Err(error) = self.execute(&piece, said).await else {
                continue;
            };
            if !self.concerns_a_table(&error, &piece) {
                return Err(refused(&piece, error));
            }
            let single = piece.one_by_one();
            if single.is_empty() {
                note(&mut left_out, &piece, &error);
            }
            for piece in single {
                match self.execute(&piece, said).await {
                    Ok(()) => {}
                    Err(error) if self.concerns_a_table(&error, &piece) => {
                        note(&mut left_out, &piece, &error);
                    }
                    Err(error) => return Err(refused(&piece, error)),
                }
            }
        }
        Ok(left_out)
    }

    async fn execute(&self, piece: &Piece, said: &[String]) -> Result<(), PgError> {
        let Err(error) = self.client.batch_execute(&piece.sql(said)).await else {
            return Ok(());
        };
        let error = PgError::from(error);
        if error.sqlstate().is_some() {
            // Outside a transaction it is a warning, which nobody reads.
            self.client.batch_execute("ROLLBACK").await?;
        }
        Err(error)
    }

    /// Whether to go on without a table.
    fn concerns_a_table(&self, error: &PgError, piece: &Piece) -> bool {
        if piece.tables().is_empty() {
            return false;
        }
        is_gone(error)
            || !self.must
                && error
                    .sqlstate()
                    .is_some_and(|state| !state.starts_with("57P"))
    }
}

fn is_gone(error: &PgError) -> bool {
    // undefined_table, invalid_schema_name
    error.is_of_something_dropped() || matches!(error.sqlstate(), Some("42P01" | "3F000"))
}

fn refused(piece: &Piece, error: PgError) -> SetupError {
    SetupError::sql(Side::Source, &title(&piece.sql(&[])))(error)
}

fn note(left_out: &mut BTreeMap<TableName, String>, piece: &Piece, error: &PgError) {
    if is_gone(error) {
        return;
    }
    for table in piece.tables() {
        left_out.insert(table.clone(), error.to_string());
    }
}
