//! What can stop a batch on its way into the replica.

use crate::catalog::TableName;
use crate::error::{Class, Classify};
use crate::net::FoldError;
use crate::pg::PgError;
use crate::plan::Unplannable;
use crate::remedy;
use crate::spill::SpillError;

/// What can stop a batch on its way into the replica.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The replica was promoted, or another agent has a higher term.
    #[error("fenced")]
    Fenced(#[source] PgError),
    /// The progress row was deleted: where the replica stands is not known any more.
    #[error("the replica's progress row is gone")]
    ProgressGone(#[source] PgError),
    /// Somebody else moved the progress row under the same term.
    #[error("the replica's progress row is not where this agent left it")]
    PositionMismatch(#[source] PgError),
    /// A row to be updated or deleted is not on the replica.
    #[error("the replica has diverged")]
    Diverged(#[source] PgError),
    /// The replica lost or gained rows while we inserted.
    #[error("inserting into {table} touched {found} rows instead of {expected}")]
    Swallowed {
        /// `schema.table`.
        table: String,
        /// Rows sent.
        expected: u64,
        /// Rows the replica says it took.
        found: u64,
    },
    /// A table of the stream is not on the replica.
    #[error("table {table} is not on the replica")]
    TableMissing {
        /// Which one.
        table: TableName,
    },
    /// A column of the stream is not on the replica.
    #[error("column {column} of {table} is not on the replica")]
    ColumnMissing {
        /// Which table.
        table: TableName,
        /// Which column.
        column: String,
    },
    /// A table appeared on the source after the last look, or took the place of another, or was not published for a while: it
    /// must be copied first.
    #[error("table {table} is new on the source, or listed anew, and not copied yet")]
    TableNotCopied {
        /// Which one.
        table: TableName,
    },
    /// A value came in the binary form of a type that the column does not have here.
    #[error("column {column} of {table} came in a binary form that does not travel")]
    BinaryForm {
        /// Which table.
        table: TableName,
        /// Which column.
        column: String,
    },
    /// The changes make no sense together.
    #[error("fold changes")]
    Fold(#[from] FoldError),
    /// A constraint of the replica refuses a change, even one by one and in order.
    #[error("the replica refuses a change of {table}{constraint}")]
    Refused {
        /// `schema.table`, or "a table".
        table: String,
        /// ` (constraint name)`, or nothing.
        constraint: String,
        /// What the server said.
        #[source]
        source: PgError,
    },
    /// The batch has to go through one lane.
    #[error(transparent)]
    Unplannable(#[from] Unplannable),
    /// The task that folds batches ended.
    #[error("the batch was interrupted")]
    Interrupted,
    /// A spill file cannot be read.
    #[error("read a large transaction back")]
    Spill(#[from] SpillError),
    /// The replica failed otherwise.
    #[error("apply to the replica")]
    Pg(#[source] PgError),
}

impl SinkError {
    /// Whether the changes might still go in one by one.
    pub(super) fn is_for_the_slow_path(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Diverged(_) | Self::Fold(_) => true,
            Self::Fenced(_)
            | Self::ProgressGone(_)
            | Self::PositionMismatch(_)
            | Self::Swallowed { .. }
            | Self::TableMissing { .. }
            | Self::ColumnMissing { .. }
            | Self::TableNotCopied { .. }
            | Self::BinaryForm { .. }
            | Self::Unplannable(_)
            | Self::Interrupted
            | Self::Spill(_)
            | Self::Pg(_) => false,
        }
    }

    /// Whether a batch that was refused on several lanes might go in on one: it cannot be spread, lanes
    /// waited for one another, or the server has no room for another prepared transaction.
    pub(super) fn is_for_one_lane(&self) -> bool {
        match self {
            Self::Unplannable(_) => true,
            // lock_not_available, deadlock_detected; out_of_memory is what "maximum number of prepared
            // transactions reached" is called, feature_not_supported what cannot be prepared (a trigger of
            // the replica used a temporary table, or NOTIFY).
            Self::Pg(PgError::Server(error)) => {
                matches!(
                    error.sqlstate.as_str(),
                    "55P03" | "40P01" | "53200" | "0A000"
                )
            }
            _ => false,
        }
    }
}

impl From<PgError> for SinkError {
    fn from(error: PgError) -> Self {
        let PgError::Server(server) = &error else {
            return Self::Pg(error);
        };
        match server.sqlstate.as_str() {
            "DR001" => Self::Fenced(error),
            "DR002" => Self::PositionMismatch(error),
            "DR003" => Self::Diverged(error),
            "DR004" => Self::ProgressGone(error),
            // Class 23, integrity constraint violation.
            state if state.starts_with("23") => Self::Refused {
                table: server.table.clone().unwrap_or_else(|| "a table".to_owned()),
                constraint: server
                    .constraint
                    .as_ref()
                    .map_or_else(String::new, |name| format!(" (constraint {name})")),
                source: error,
            },
            _ => Self::Pg(error),
        }
    }
}

impl From<tokio_postgres::Error> for SinkError {
    fn from(error: tokio_postgres::Error) -> Self {
        PgError::from(error).into()
    }
}

impl Classify for SinkError {
    fn class(&self) -> Class {
        match self {
            Self::Fenced(_) => Class::Fenced,
            // Starting again cures it: the copy is made.
            Self::TableNotCopied { .. } => Class::Transient,
            // Never seen outside: one lane takes over, or the session ends with another error first.
            Self::Unplannable(_) | Self::Interrupted => Class::Transient,
            Self::Pg(error) => error.class(),
            Self::Spill(error) => error.class(),
            // A pipeline asks the source for text, and does not get here.
            Self::BinaryForm { .. } => Class::Definite,
            Self::ProgressGone(_)
            | Self::PositionMismatch(_)
            | Self::Diverged(_)
            | Self::Swallowed { .. }
            | Self::TableMissing { .. }
            | Self::ColumnMissing { .. }
            | Self::Fold(_)
            | Self::Refused { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Fenced(_) => {
                "the replica was promoted: it is the primary now, and this agent must not touch it; \
                 make sure that nobody writes to the old source"
            }
            Self::PositionMismatch(_) => {
                "another agent applies the same stream to this replica; stop one of them"
            }
            Self::ProgressGone(_) => {
                return Some(format!(
                    "somebody deleted it: {}. Put the row back if you know it (a backup of the replica has it). {}",
                    remedy::STAY,
                    remedy::start_over(remedy::SLOT_TOO)
                ));
            }
            Self::Diverged(_) | Self::Swallowed { .. } => {
                return Some(format!(
                    "the row is not there as the source had it: a trigger of the replica that fires ALWAYS, somebody who wrote \
                     there, or an error of dr-agent; if nobody did, report it with the table's definition. {}",
                    remedy::copy_again(None)
                ));
            }
            Self::TableMissing { .. } | Self::ColumnMissing { .. } => {
                "DDL is not replicated: run the same DDL on the replica (SET \
                 default_transaction_read_only = off), then start the agent again; it resumes \
                 where it stopped"
            }
            Self::Refused { .. } => {
                "the replica has a constraint, or rows, that the source does not have; compare \
                 with `dr-agent check`, mend the replica, then start the agent again. If both sides are alike, report it"
            }
            Self::Fold(_) => "the change stream contradicts itself; report it",
            Self::BinaryForm { .. } => {
                "the column has another type than on the source when the change was logged, and DDL is in no log: give \
                 it that type with ALTER TABLE, then the same command again"
            }
            Self::Pg(error) => return error.hint(),
            Self::Spill(error) => return error.hint(),
            Self::TableNotCopied { .. } | Self::Unplannable(_) | Self::Interrupted => return None,
        };
        Some(text.to_owned())
    }
}
