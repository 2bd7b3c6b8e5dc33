//! What can go wrong in a copy, and what the operator does about it.
//!
//! # Invariants
//! - A lost or outdated snapshot is transient: the caller starts again with a new one and keeps the
//!   tables that are finished.
//! - What a tool wrote to standard error is kept as its last lines only, and without DETAIL and
//!   CONTEXT lines, which may quote rows.

use std::io;
use std::path::PathBuf;

use super::said;
use crate::error::{Class, Classify};
use crate::names::TableName;
use crate::pg::PgError;

/// Why a copy ended before all its tables were ready.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// `pg_dump` or `pg_restore` was found nowhere.
    #[error("{program} {needed} or newer needed: source is {source_version}, found none")]
    ToolMissing {
        /// `pg_dump` or `pg_restore`.
        program: &'static str,
        /// Major version of the source.
        needed: u32,
        /// The source's version, as 16.4.
        source_version: String,
    },
    /// Every `pg_dump` found is older than the source and would refuse it.
    #[error(
        "{program} {needed} or newer needed: source is {source_version}, found {found} at {}",
        path.display()
    )]
    ToolTooOld {
        /// `pg_dump` or `pg_restore`.
        program: &'static str,
        /// Major version of the source.
        needed: u32,
        /// The source's version, as 16.4.
        source_version: String,
        /// The newest version found.
        found: String,
        /// Where.
        path: PathBuf,
    },
    /// A tool could not be started or talked to.
    #[error("run {program}")]
    ToolStart {
        /// Its path.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tool reported a failure.
    #[error("{program} could not {doing}: {stderr}")]
    ToolFailed {
        /// `pg_dump` or `pg_restore`.
        program: &'static str,
        /// Verb and object.
        doing: &'static str,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A conversation with the source failed.
    #[error("{doing} on the source")]
    Source {
        /// Verb and object.
        doing: String,
        /// Why.
        #[source]
        source: PgError,
    },
    /// A conversation with the replica failed.
    #[error("{doing} on the replica")]
    Replica {
        /// Verb and object.
        doing: String,
        /// Why.
        #[source]
        source: PgError,
    },
    /// Extensions that only a superuser creates are not on the replica yet.
    #[error("only a superuser can create these extensions on the replica: {}", names.join(", "))]
    ExtensionsUntrusted {
        /// Their names.
        names: Vec<String>,
    },
    /// The source uses extensions that are not installed on the replica's machine.
    #[error("the replica's server lacks extensions the source uses: {}", names.join(", "))]
    ExtensionsMissing {
        /// Their names.
        names: Vec<String>,
    },
    /// The exported snapshot is gone: its session ended, or the source restarted.
    #[error("the exported snapshot is gone")]
    SnapshotLost,
    /// A table was dropped or rewritten after the snapshot was taken, so that the snapshot no longer
    /// shows its rows.
    #[error("the source changed under the snapshot: {what}")]
    SourceChanged {
        /// Which table, and how.
        what: String,
    },
    /// The replica's table cannot take the source's rows.
    #[error("table {table} on the replica {reason}")]
    ReplicaTable {
        /// The table.
        table: TableName,
        /// How it differs.
        reason: String,
    },
    /// The replica stored another number of rows than the source sent.
    #[error("table {table}: the source sent {sent} rows, the replica stored {stored}")]
    RowCount {
        /// The table.
        table: TableName,
        /// Rows in the source's COPY stream.
        sent: u64,
        /// Rows in the replica's COPY tag.
        stored: u64,
    },
    /// Another copy of the same stream has taken the table over.
    #[error("table {table} is being copied by another agent of this stream")]
    Superseded {
        /// The table.
        table: TableName,
    },
    /// The caller's token was cancelled.
    #[error("the copy was stopped")]
    Cancelled,
}

impl CopyError {
    pub(crate) fn source(doing: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Self {
        let doing = doing.into();
        |error| Self::Source {
            doing,
            source: error.into(),
        }
    }

    /// Whether a foreign key may have been refused because of rows that violate it. A tool passes on what the server says, and
    /// no SQLSTATE; the server may speak another language.
    pub(crate) fn may_be_missing_reference(&self) -> bool {
        match self {
            Self::ToolFailed { .. } => self.class() == Class::Definite,
            Self::Replica { source, .. } => source.sqlstate() == Some("23503"),
            _ => false,
        }
    }

    /// Whether the replica's table of that name is in the way of the rows: its columns, a constraint, a trigger.
    pub(crate) fn is_of_the_replicas_table(&self) -> bool {
        match self {
            Self::ReplicaTable { .. } | Self::RowCount { .. } => true,
            Self::Replica { source, .. } => {
                let state = source.sqlstate().unwrap_or_default();
                ["23", "P0", "54", "XX"]
                    .iter()
                    .any(|class| state.starts_with(class))
            }
            _ => false,
        }
    }

    pub(super) fn replica<E: Into<PgError>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        let doing = doing.into();
        |error: E| Self::Replica {
            doing,
            source: error.into(),
        }
    }
}

/// Whether a program is not there, or is none.
fn is_of_the_file(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    // ENOEXEC
    let no_program = error.raw_os_error() == Some(8);
    no_program
        || matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::NotADirectory
        )
}

impl Classify for CopyError {
    fn class(&self) -> Class {
        match self {
            Self::Source { source, .. } | Self::Replica { source, .. } => source.class(),
            Self::ToolFailed { stderr, .. } if said::passes_by_itself(stderr) => Class::Transient,
            // No process, no memory, no file descriptor is left.
            Self::ToolStart { source, .. } if !is_of_the_file(source) => Class::Transient,
            Self::SnapshotLost
            | Self::SourceChanged { .. }
            | Self::Superseded { .. }
            | Self::Cancelled => Class::Transient,
            Self::ToolMissing { .. }
            | Self::ToolTooOld { .. }
            | Self::ToolStart { .. }
            | Self::ToolFailed { .. }
            | Self::ExtensionsMissing { .. }
            | Self::ExtensionsUntrusted { .. }
            | Self::ReplicaTable { .. }
            | Self::RowCount { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::ToolMissing { needed, .. } | Self::ToolTooOld { needed, .. } => Some(format!(
                "install postgresql-client-{needed} or set copy.pg_bin"
            )),
            Self::ToolStart { .. } => {
                Some("copy.pg_bin must name a directory with pg_dump and pg_restore".to_owned())
            }
            Self::ToolFailed { stderr, .. } => said::hint(stderr),
            Self::Source { source, .. } | Self::Replica { source, .. } => {
                server_hint(source).or_else(|| source.hint())
            }
            Self::ExtensionsMissing { .. } => Some(
                "install their packages on the replica's machine; CREATE EXTENSION is then done \
                 by the copy"
                    .to_owned(),
            ),
            Self::ExtensionsUntrusted { .. } => Some(
                "run `dr-agent init --replica-url URL` with a superuser, or CREATE EXTENSION there as one; then start the \
                 agent again"
                    .to_owned(),
            ),
            Self::ReplicaTable { .. } => Some(
                "give the replica's table the source's columns (SET default_transaction_read_only = off, ALTER TABLE), or take \
                 away the views that depend on it, so that the copy can create it anew"
                    .to_owned(),
            ),
            Self::RowCount { .. } => Some(
                "nothing was kept of this table; a rule or a trigger that fires ALWAYS on the \
                 replica may drop rows"
                    .to_owned(),
            ),
            Self::SnapshotLost | Self::SourceChanged { .. } => {
                Some("the copy starts again with a new snapshot; finished tables stay".to_owned())
            }
            Self::Superseded { .. } => {
                Some("stop one of the two agents that run with this configuration".to_owned())
            }
            Self::Cancelled => None,
        }
    }
}

fn server_hint(error: &PgError) -> Option<String> {
    let hint = match error.sqlstate()? {
        "22021" | "22P05" => {
            "the source holds text that is not valid in its encoding (SQL_ASCII holds anything); \
             repair it there"
        }
        "42P07" | "42710" | "42723" | "42P06" => {
            "something of that name is there already, and it is not the agent's: rename it away, or let replica.url lead to \
             another server; the copy goes into an empty database, or one that has all of the source's tables"
        }
        "42704" => {
            "the replica lacks a role, type or other object the source has; create it there first"
        }
        "23503" | "23505" => {
            "the source itself holds rows that break this constraint; repair them there"
        }
        "53200" if error.is_of_locks() => {
            "raise max_locks_per_transaction on that server, and restart it: every table is locked once"
        }
        "53200" => "that server has no memory left; it is tried again",
        _ => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(stderr: &str) -> CopyError {
        CopyError::ToolFailed {
            program: "pg_restore",
            doing: "restore indexes",
            stderr: stderr.to_owned(),
        }
    }

    #[test]
    fn a_tool_that_lost_its_server_is_retried_and_one_without_rights_is_not() {
        let lost = failed("pg_restore: error: server closed the connection unexpectedly");
        assert_eq!(lost.class(), Class::Transient);
        let waited = failed(
            "pg_dump: error: query failed: ERROR:  canceling statement due to statement timeout",
        );
        assert_eq!(waited.class(), Class::Transient);
        for passing in [
            "connection to server at \"h\" failed: FATAL: password authentication failed for user \"a\"",
            "connection to server at \"h\" failed: FATAL:  no pg_hba.conf entry for host",
            "connection to server at \"h\" failed: could not fork new process for connection",
            "query failed: ERROR:  could not open file \"base/1\": Too many open files in system",
        ] {
            assert_eq!(failed(passing).class(), Class::Transient, "{passing}");
        }
        let absent = failed("connection to server failed: FATAL:  database \"a\" does not exist");
        assert_eq!(absent.class(), Class::Definite);
        assert!(failed("permission denied for schema x").hint().is_some());
    }

    #[test]
    fn an_old_tool_names_the_version_that_is_needed() {
        let error = CopyError::ToolTooOld {
            program: "pg_dump",
            needed: 16,
            source_version: "16.4".to_owned(),
            found: "15.18".to_owned(),
            path: PathBuf::from("/usr/bin/pg_dump"),
        };
        assert_eq!(
            error.to_string(),
            "pg_dump 16 or newer needed: source is 16.4, found 15.18 at /usr/bin/pg_dump"
        );
        assert_eq!(
            error.hint().as_deref(),
            Some("install postgresql-client-16 or set copy.pg_bin")
        );
    }
}
