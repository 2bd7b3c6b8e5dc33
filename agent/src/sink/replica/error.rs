//! What can stop a batch on its way into the replica.

use std::fmt;

use super::unfit::{Misfit, Unfit};
use crate::error::remedy;
use crate::error::{Class, Classify};
use crate::flow::lanes::Unplannable;
use crate::flow::net::FoldError;
use crate::flow::spill::SpillError;
use crate::names::TableName;
use crate::pg::{PgError, PgLsn};
use crate::schema::ddl::{self, EventError};

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
    /// An INSERT touched another number of rows than it had: a trigger or a rule of the replica's did away with them.
    #[error("the replica did not take a row")]
    Swallowed(#[source] PgError),
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
    /// Rows of a table of the stream cannot be applied to the replica's table of that name.
    #[error("{0}")]
    Unfit(Box<Unfit>),
    /// A table appeared on the source after the last look, or took the place of another, or was not published for a while: it
    /// must be copied first.
    #[error("table {table} is new on the source, or listed anew, and not copied yet")]
    TableNotCopied {
        /// Which one.
        table: TableName,
    },
    /// Some partitions were emptied whose rows cannot be told from those of the others on the replica: all of them must be copied
    /// again.
    #[error(
        "partition {table} was truncated on the source, and on the replica its rows are among those of other partitions of {top}"
    )]
    TruncatedInPart {
        /// The partition.
        table: TableName,
        /// What it is a partition of.
        top: TableName,
    },
    /// A row belongs, on the replica, to a partition that is not there yet.
    #[error("a row of {table} belongs to a partition of {top} that is not on the replica yet")]
    PartitionMissing {
        /// The partition that has the row on the source.
        table: TableName,
        /// What it is a partition of.
        top: TableName,
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
        table: Box<str>,
        /// The same, where the server names one.
        named: Option<Box<TableName>>,
        /// ` (constraint name)`, or nothing.
        constraint: Box<str>,
        /// What the server said.
        #[source]
        source: PgError,
    },
    /// One of the others, and where in the stream.
    #[error("{0}")]
    At(Box<Place>, #[source] Box<SinkError>),
    /// A row of [`ddl::TABLE`] is not as the source's triggers write it.
    #[error("understand a command of the source")]
    Event(#[from] EventError),
    /// A command of the source cannot be carried out, and nothing may be set aside.
    #[error(
        "{tag} of the source (row {id} of {}) cannot be carried out on the replica: {reason}",
        ddl::TABLE
    )]
    Command {
        /// Which row.
        id: i64,
        /// Its command tag.
        tag: Box<str>,
        /// Each object, and why.
        reason: Box<str>,
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

/// A change of the source that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The table.
    pub table: TableName,
    /// The column, as in SQL, and its type on the replica, where it is a value that is refused.
    pub column: Option<(String, String)>,
    /// Where the source's transaction committed; what comes before it is applied.
    pub commit_lsn: PgLsn,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped at a change of {}", self.table)?;
        if let Some((column, type_sql)) = &self.column {
            write!(f, ", value of column {column} of type {type_sql}")?;
        }
        write!(
            f,
            ", in the transaction that committed at {}",
            self.commit_lsn
        )
    }
}

impl SinkError {
    /// The same, and where.
    pub(super) fn at(self, place: Place) -> Self {
        Self::At(Box::new(place), Box::new(self))
    }

    /// What is wrong, wherever it is.
    pub fn cause(&self) -> &Self {
        match self {
            Self::At(_, cause) => cause.cause(),
            other => other,
        }
    }

    /// The one table whose changes are in the way.
    pub fn table(&self) -> Option<&TableName> {
        match self {
            Self::At(place, _) => Some(&place.table),
            Self::Unfit(unfit) => Some(&unfit.table),
            Self::TableMissing { table }
            | Self::ColumnMissing { table, .. }
            | Self::BinaryForm { table, .. }
            | Self::TableNotCopied { table }
            | Self::TruncatedInPart { table, .. } => Some(table),
            Self::Refused { named, .. } => named.as_deref(),
            _ => None,
        }
    }

    /// The table that has to be copied before anything goes on.
    pub fn uncopied(&self) -> Option<&TableName> {
        match self.cause() {
            Self::TableNotCopied { table }
            | Self::TruncatedInPart { table, .. }
            | Self::PartitionMissing { table, .. } => Some(table),
            _ => None,
        }
    }

    /// What the server has said.
    pub(super) fn of_server(&self) -> Option<&PgError> {
        match self {
            Self::Pg(error) | Self::Refused { source: error, .. } => Some(error),
            _ => None,
        }
    }

    /// Whether the server found no partition for a row.
    pub(super) fn is_of_no_partition(&self) -> bool {
        let Some(PgError::Server(server)) = self.of_server() else {
            return false;
        };
        server.sqlstate == "23514" && server.constraint.is_none() && server.datatype.is_none()
    }

    /// Whether the server refused a value: data exceptions, and checks of a domain, which it says no table of.
    pub(super) fn is_of_a_value(&self) -> bool {
        let (Self::Pg(PgError::Server(server))
        | Self::Refused {
            source: PgError::Server(server),
            ..
        }) = self
        else {
            return false;
        };
        server.sqlstate.starts_with("22")
            || server.sqlstate.starts_with("23") && server.table.is_none()
    }

    /// Whether the changes might still go in part by part, or at least those before the one that is in the way.
    pub(super) fn is_for_the_slow_path(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::Diverged(_)
            | Self::Fold(_)
            | Self::Swallowed(_)
            | Self::Unfit(_)
            | Self::TableMissing { .. }
            | Self::ColumnMissing { .. } => true,
            Self::Pg(error @ PgError::Server(_)) => error.class() == Class::Definite,
            Self::Fenced(_)
            | Self::ProgressGone(_)
            | Self::PositionMismatch(_)
            | Self::TableNotCopied { .. }
            | Self::TruncatedInPart { .. }
            | Self::PartitionMissing { .. }
            | Self::BinaryForm { .. }
            | Self::Event(_)
            | Self::Command { .. }
            | Self::At(..)
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
            "DR005" => Self::Swallowed(error),
            // Class 23, integrity constraint violation.
            state if state.starts_with("23") => Self::Refused {
                table: server.table.as_deref().unwrap_or("a table").into(),
                named: server.table.as_deref().and_then(named).map(Box::new),
                constraint: server
                    .constraint
                    .as_ref()
                    .map_or_else(Box::default, |name| format!(" (constraint {name})").into()),
                source: error,
            },
            _ => Self::Pg(error),
        }
    }
}

fn named(table: &str) -> Option<TableName> {
    let (schema, name) = table.split_once('.')?;
    Some(TableName {
        schema: schema.to_owned(),
        name: name.to_owned(),
    })
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
            // Starting again cures it: the copy is made, the source is asked.
            Self::TableNotCopied { .. }
            | Self::TruncatedInPart { .. }
            | Self::PartitionMissing { .. } => Class::Transient,
            // Never seen outside: one lane takes over, or the session ends with another error first.
            Self::Unplannable(_) | Self::Interrupted => Class::Transient,
            Self::Pg(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::At(_, cause) => cause.class(),
            // A pipeline asks the source for text, and does not get here.
            Self::BinaryForm { .. } => Class::Definite,
            Self::ProgressGone(_)
            | Self::PositionMismatch(_)
            | Self::Diverged(_)
            | Self::Swallowed(_)
            | Self::Unfit(_)
            | Self::TableMissing { .. }
            | Self::ColumnMissing { .. }
            | Self::Fold(_)
            | Self::Event(_)
            | Self::Command { .. }
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
            Self::Swallowed(_) => {
                "a trigger or a rule of the replica's that fires ALWAYS does away with rows: ALTER TABLE … ENABLE \
                 TRIGGER (or RULE) there without ALWAYS, then start the agent again; it resumes where it stopped"
            }
            Self::Unfit(unfit) => match unfit.why {
                Misfit::GeneratedHere => {
                    return Some(format!(
                        "DDL ran on one side only: make the same ALTER TABLE on the replica (SET \
                         default_transaction_read_only = off), then start the agent again. If the transaction of that ALTER \
                         TABLE changed rows of the table before it, copy it again as well. {}",
                        remedy::copy_again(Some(&unfit.table.name))
                    ));
                }
                Misfit::Type { .. } => {
                    "DDL ran on one side only: make the same ALTER TABLE on the replica (SET \
                     default_transaction_read_only = off), then start the agent again; it stands right before the \
                     first change of the altered table"
                }
                Misfit::KeyOfAPartition => {
                    "ALTER TABLE … REPLICA IDENTITY FULL on the source for this partition, or a key on the partitioned table; \
                     then start the agent again"
                }
                Misfit::KeyNotSent => {
                    return Some(format!(
                        "ALTER TABLE … REPLICA IDENTITY FULL on the source, or leave the table out with source.exclude. {}",
                        remedy::copy_again(Some(&unfit.table.name))
                    ));
                }
            },
            Self::Diverged(_) => {
                return Some(format!(
                    "the row is not there as the source had it: a trigger of the replica that fires ALWAYS, somebody who wrote \
                     there, or an error of dr-agent; if nobody did, report it with the table's definition. {}",
                    remedy::copy_again(None)
                ));
            }
            Self::TableMissing { .. } | Self::ColumnMissing { .. } => {
                "DDL ran on one side only: run the same DDL on the replica (SET \
                 default_transaction_read_only = off), then start the agent again; it resumes \
                 where it stopped"
            }
            Self::Refused { .. } => {
                "the replica has a constraint, or rows, that the source does not have; compare \
                 with `dr-agent check`, mend the replica, then start the agent again. If both sides are alike, report it"
            }
            Self::Fold(FoldError::NoIdentity { .. }) => {
                "the source's table has no key that is sent: ALTER TABLE … REPLICA IDENTITY FULL there, then copy it \
                 again, or leave it out with source.exclude"
            }
            Self::Event(_) => {
                "somebody else has written into the table of commands on the source, or its agent is of a newer version than this one"
            }
            Self::Command { .. } => {
                "the database stands right before that command. Mend what is missing on the replica (SET \
                 default_transaction_read_only = off) and start the agent again; or, with replica.set_aside = \"retry\", the object waits \
                 and the rest goes on"
            }
            Self::Fold(_) => "the change stream contradicts itself; report it",
            Self::At(_, cause) => return cause.hint(),
            Self::BinaryForm { .. } => {
                "the column has another type than on the source when the change was logged, and DDL is in no log: give \
                 it that type with ALTER TABLE, then the same command again"
            }
            Self::Pg(error) => return error.hint(),
            Self::Spill(error) => return error.hint(),
            Self::TableNotCopied { .. }
            | Self::TruncatedInPart { .. }
            | Self::PartitionMissing { .. }
            | Self::Unplannable(_)
            | Self::Interrupted => return None,
        };
        Some(text.to_owned())
    }
}
