//! What can go wrong with a base backup, and what the operator does about it.

use std::fmt;
use std::io;

use crate::cloud::store::StoreError;
use crate::copy::CopyError;
use crate::error::{Because, Class, Classify};
use crate::names::TableName;
use crate::pg::PgError;

/// Why a base backup was not taken, read, loaded or deleted.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The source, its snapshot or PostgreSQL's programs refused.
    #[error(transparent)]
    Copy(CopyError),
    /// A conversation with the source failed.
    #[error(transparent)]
    Because(Because),
    /// A conversation with the database that is being built failed.
    #[error("{doing} in the new database")]
    Target {
        /// Verb and object.
        doing: String,
        /// Why.
        #[source]
        source: PgError,
    },
    /// The tables of the publication could not be looked up.
    #[error(transparent)]
    Tables(Because),
    /// There is no publication yet.
    #[error("database \"{database}\" is not replicated yet")]
    NotReplicated {
        /// The database.
        database: String,
    },
    /// The store refused, or is away.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file or thread of this machine failed.
    #[error("{doing}")]
    Local {
        /// Verb and object.
        doing: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another backup writes, or wrote, the same base.
    #[error("{object} is there already")]
    Exists {
        /// Its name.
        object: String,
    },
    /// The base has no manifest.
    #[error("there is no base backup {base}")]
    NotFound {
        /// Its prefix.
        base: String,
    },
    /// A manifest cannot be read.
    #[error("{object} cannot be used: {reason}")]
    Manifest {
        /// Its name.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Objects of a base are not what the manifest says.
    #[error("base backup {base} is damaged: {}", shown(flaws))]
    Damaged {
        /// Its prefix.
        base: String,
        /// What is wrong, object by object.
        flaws: Vec<Flaw>,
    },
    /// The database to be filled holds something.
    #[error("database \"{database}\" is not empty: {}", shown(found))]
    NotEmpty {
        /// The database.
        database: String,
        /// Kind and name of what is there.
        found: Vec<String>,
    },
    /// A table that was asked for is not in the base.
    #[error("base backup {base} has no rows of table {table}")]
    UnknownTable {
        /// Its prefix.
        base: String,
        /// The table.
        table: TableName,
    },
    /// The base's owners, privileges or policies name roles that the server does not have.
    #[error("base backup {base} needs roles: {problem}")]
    RolesLacking {
        /// Its prefix.
        base: String,
        /// Which, in words.
        problem: String,
    },
    /// The new database stored another number of rows than the base holds.
    #[error("table {table}: {object} holds {expected} rows, the new database stored {stored}")]
    RowCount {
        /// The table.
        table: TableName,
        /// The object.
        object: String,
        /// Rows by the manifest.
        expected: u64,
        /// Rows in the answer to COPY.
        stored: u64,
    },
    /// What is old, two clocks see differently.
    #[error("nothing is deleted: this machine's clock says {here:.0}, the store's {there:.0}")]
    Clocks {
        /// This machine's.
        here: jiff::Timestamp,
        /// The store's.
        there: jiff::Timestamp,
    },
    /// The caller's token was cancelled.
    #[error("the backup was stopped")]
    Cancelled,
}

/// An object that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Its name in the base.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

fn shown<T: ToString>(items: &[T]) -> String {
    const SHOWN_MAX: usize = 10;
    let mut text: Vec<String> = items.iter().take(SHOWN_MAX).map(T::to_string).collect();
    if items.len() > SHOWN_MAX {
        text.push(format!("and {} more", items.len() - SHOWN_MAX));
    }
    text.join("; ")
}

impl BackupError {
    /// One object of a base is not what it should be.
    pub(super) fn damaged(base: &str, object: &str, reason: impl Into<String>) -> Self {
        Self::Damaged {
            base: base.to_owned(),
            flaws: vec![Flaw {
                object: object.to_owned(),
                reason: reason.into(),
            }],
        }
    }

    /// The disk of the archive has no room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_full())
    }

    pub(super) fn target<E: Into<PgError>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        |error: E| Self::Target {
            doing,
            source: error.into(),
        }
    }

    pub(super) fn local(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        |source| Self::Local { doing, source }
    }
}

impl From<CopyError> for BackupError {
    /// What the copy calls the replica is here the database that is being built.
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Replica { doing, source } => Self::Target { doing, source },
            CopyError::Cancelled => Self::Cancelled,
            other => Self::Copy(other),
        }
    }
}

impl Classify for BackupError {
    fn class(&self) -> Class {
        match self {
            Self::Copy(error) => error.class(),
            Self::Target { source, .. } => source.class(),
            Self::Store(error) => error.class(),
            Self::Because(error) | Self::Tables(error) => error.class(),
            // The next attempt has an LSN of its own.
            Self::Exists { .. } | Self::Clocks { .. } | Self::Cancelled => Class::Transient,
            Self::Local { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Class::Transient,
                _ => Class::Definite,
            },
            Self::NotReplicated { .. }
            | Self::NotFound { .. }
            | Self::Manifest { .. }
            | Self::Damaged { .. }
            | Self::NotEmpty { .. }
            | Self::UnknownTable { .. }
            | Self::RolesLacking { .. }
            | Self::RowCount { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Copy(CopyError::SnapshotLost | CopyError::SourceChanged { .. }) => {
                "the backup begins again with a new snapshot"
            }
            Self::Copy(error) => return error.hint(),
            Self::Target { source, .. } => match source.sqlstate() {
                Some("22021" | "22P05") => {
                    "the source held text that is not valid in its encoding; load into a database with encoding \
                     SQL_ASCII"
                }
                Some("42704") => {
                    "the server lacks a role, type or other object the source had; create the roles from \
                     roles.sql.zst first"
                }
                _ => return source.hint(),
            },
            Self::Store(error) => return error.hint(),
            Self::Because(error) | Self::Tables(error) => return error.hint(),
            Self::NotReplicated { .. } => {
                "start `dr-agent run` first: it decides which tables are protected"
            }
            Self::Local { .. } => {
                "the temporary directory (TMPDIR) must be writable and have room for the schema"
            }
            Self::Exists { .. } => {
                "stop one of the two backups of this stream; the next one has a name of its own"
            }
            Self::NotFound { .. } => "`dr-agent backup --list` shows the bases there are",
            Self::Manifest { .. } => "use another base; a newer dr-agent may have written this one",
            Self::Damaged { .. } => {
                "bring back the objects from a version or copy of the bucket, or use another base; take a new one \
                 soon: `dr-agent backup`"
            }
            Self::NotEmpty { .. } => {
                "load into a database that is created for it: CREATE DATABASE … TEMPLATE template0"
            }
            Self::UnknownTable { .. } => {
                "name tables as schema.table, as in the base's manifest.json"
            }
            Self::RolesLacking { base, .. } => {
                return Some(format!(
                    "create them first: {base}roles.sql.zst has the source's (zstd -dcq roles.sql.zst | psql -d postgres); or \
                     leave owners and privileges out with --no-owner --no-privileges"
                ));
            }
            Self::RowCount { .. } => {
                "nothing of this part was kept; a rule or a trigger of the new database may drop rows"
            }
            Self::Clocks { .. } => {
                "set the clock that is wrong (NTP); archive.retention deletes what is old, and by a wrong clock everything may be old"
            }
            Self::Cancelled => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let flaws = (0..12).map(|n| Flaw {
            object: format!("data/{n:05}.copy.zst"),
            reason: "is missing".to_owned(),
        });
        let error = BackupError::Damaged {
            base: "s/1/base/2/".to_owned(),
            flaws: flaws.collect(),
        };
        let text = error.to_string();
        assert!(
            text.contains("data/00009.copy.zst: is missing; and 2 more"),
            "{text}"
        );
        assert_eq!(error.class(), Class::Definite);
    }
}
