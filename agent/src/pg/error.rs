//! What can go wrong in a conversation with PostgreSQL, without the driver's types.
//!
//! `tokio_postgres::Error` prints its cause in `Display` and returns it from `source()` as well, so it
//! is converted at the boundary and never kept. DETAIL, which quotes rows, is dropped here for good.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use super::redact;
use crate::error::{Class, Classify, sqlstate_class};

/// An error message of the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`.
    pub severity: String,
    /// Five characters; PostgreSQL documentation, appendix "PostgreSQL Error Codes".
    pub sqlstate: String,
    /// The primary message; data exceptions (class 22) quote values, so of theirs only what holds none is kept.
    pub message: String,
    /// The server's hint.
    pub hint: Option<String>,
    /// `schema.table` where the server names one.
    pub table: Option<String>,
    /// Where the server names one.
    pub column: Option<String>,
    /// Where the server names one.
    pub constraint: Option<String>,
    /// `schema.type` where the server names one.
    pub datatype: Option<String>,
}

impl ServerError {
    /// Takes away what may quote a row: messages of class 22, data exception ("invalid input syntax
    /// for type integer: …").
    pub(super) fn hide_values(&mut self) {
        if self.sqlstate.starts_with("22") {
            self.message = match redact::without_value(&self.message) {
                Some(rest) => format!("the server refused a value: {rest}"),
                None => "the server refused a value".to_owned(),
            };
        }
    }
}

/// What can go wrong in a conversation with PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// No host of the URL could be reached.
    #[error("connect to {server}")]
    Connect {
        /// `host:port`, or the socket.
        server: String,
        /// Why the last host failed.
        #[source]
        source: io::Error,
    },
    /// The server cannot or may not speak TLS as `sslmode` asks.
    #[error("TLS with {server}: {reason}")]
    Tls {
        /// `host:port`.
        server: String,
        /// What is wrong and which setting it belongs to.
        reason: String,
    },
    /// No password was found, or it cannot be read.
    #[error("password for {user}@{server}: {reason}")]
    Password {
        /// The role.
        user: String,
        /// `host:port`.
        server: String,
        /// Where it was looked for.
        reason: String,
    },
    /// What stands between us and the server has dropped the settings of a session.
    #[error("{server} does not give a session the settings it asks for")]
    OptionsDropped {
        /// `host:port`.
        server: String,
    },
    /// The server refused or failed.
    #[error("{} (SQLSTATE {})", .0.message, .0.sqlstate)]
    Server(Box<ServerError>),
    /// The connection ended under us.
    #[error("the connection was closed")]
    Closed,
    /// Reading or writing the connection failed.
    #[error("connection lost")]
    Io(#[source] io::Error),
    /// The server did not answer in time.
    #[error("no answer within {after:?} while trying to {doing}")]
    Timeout {
        /// Verb and object.
        doing: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// A message that the protocol does not allow here, or a value of an unexpected type.
    #[error("unexpected answer: {0}")]
    Protocol(String),
}

impl PgError {
    /// The SQLSTATE, where the server sent one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server(error) => Some(&error.sqlstate),
            _ => None,
        }
    }
}

impl Classify for PgError {
    fn class(&self) -> Class {
        match self {
            Self::Connect { .. } | Self::Closed | Self::Io(_) | Self::Timeout { .. } => {
                Class::Transient
            }
            Self::Server(_) if self.is_of_something_dropped() => Class::Transient,
            Self::Server(error) => sqlstate_class(&error.sqlstate),
            Self::Tls { .. }
            | Self::Password { .. }
            | Self::OptionsDropped { .. }
            | Self::Protocol(_) => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        let error = match self {
            Self::Server(error) => error,
            Self::Connect { .. } => {
                return Some(
                    "the server is down, or a firewall, listen_addresses or the URL is in the way; \
                     it is tried again"
                        .to_owned(),
                );
            }
            Self::OptionsDropped { .. } => {
                return Some(
                    "a pooler that drops the start-up parameter `options` is in between: let the URL lead to the server itself"
                        .to_owned(),
                );
            }
            _ => return None,
        };
        let ours = match error.sqlstate.as_str() {
            "28P01" => {
                "the password is wrong; it comes from password_file, PGPASSWORD or ~/.pgpass, and is read again for every attempt"
            }
            "28000" => refused_at_the_door(&error.message),
            "25006" => {
                "the server is a standby, or transactions there are read-only by default; it is tried again"
            }
            "42501" => "the role lacks a right; `dr-agent check` lists every one it needs",
            "3D000" => {
                "create it, or mend its name: for the server as a whole it is in the URL, for each database on both sides the same"
            }
            "53100" => "the server's disk is full; free space, the agent goes on by itself",
            "53300" | "53400" => none_left(&error.message),
            "53200" if error.message.contains("shared memory") => {
                "raise max_locks_per_transaction on that server, and restart it; it is tried again"
            }
            "55000"
                if error
                    .message
                    .contains("not currently accepting connections") =>
            {
                "that database lets nobody in (ALTER DATABASE … ALLOW_CONNECTIONS true); it is tried again"
            }
            "57P03" => "the server starts, stops or recovers; it is tried again",
            _ => return error.hint.clone(),
        };
        Some(ours.to_owned())
    }
}

/// What to do about invalid_authorization_specification, which has many causes; the message tells them apart, where it is English.
fn refused_at_the_door(message: &str) -> &'static str {
    let causes = [
        (
            "pg_hba.conf",
            "pg_hba.conf of that server has no line that lets this role into this database from here; a logical replication \
             connection goes by the line of its database. After a change: SELECT pg_reload_conf()",
        ),
        (
            "client certificate",
            "pg_hba.conf demands a client certificate: sslcert and sslkey in the URL",
        ),
        (
            "certificate authentication",
            "the client certificate (sslcert) is not that of this role: see pg_ident.conf and clientname in pg_hba.conf",
        ),
        (
            "not permitted to log in",
            "the role needs the attribute LOGIN: ALTER ROLE … LOGIN",
        ),
        (
            "set role",
            "a stored setting `role` (ALTER ROLE or ALTER DATABASE … SET role) names a role that ours may not become: RESET it",
        ),
        (
            "does not exist",
            "there is no such role on that server: correct the URL, or create it (`dr-agent init` does)",
        ),
    ];
    let found = causes.iter().find(|(words, _)| message.contains(words));
    found.map_or(
        "pg_hba.conf or the role's attributes do not let us in; the message above says which",
        |(_, hint)| hint,
    )
}

/// What there is not enough of, which the message tells, where it is English.
fn none_left(message: &str) -> &'static str {
    let causes = [
        (
            "for role",
            "raise the role's own limit on that server: ALTER ROLE … CONNECTION LIMIT; it is tried again",
        ),
        (
            "for database",
            "raise the database's own limit on that server: ALTER DATABASE … CONNECTION LIMIT; it is tried again",
        ),
        (
            "max_wal_senders",
            "raise max_wal_senders on that server, and restart it; it is tried again",
        ),
        (
            "replication slots",
            "raise max_replication_slots on that server, and restart it; it is tried again",
        ),
    ];
    let found = causes.iter().find(|(words, _)| message.contains(words));
    found.map_or(
        "all sessions of that server are taken: end some, or raise max_connections there and restart it; it is tried again",
        |(_, hint)| hint,
    )
}

impl From<tokio_postgres::Error> for PgError {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            let mut server = ServerError {
                severity: db.severity().to_owned(),
                sqlstate: db.code().code().to_owned(),
                message: db.message().to_owned(),
                hint: db.hint().map(str::to_owned),
                table: db.table().map(|table| match db.schema() {
                    Some(schema) => format!("{schema}.{table}"),
                    None => table.to_owned(),
                }),
                column: db.column().map(str::to_owned),
                constraint: db.constraint().map(str::to_owned),
                datatype: db
                    .schema()
                    .zip(db.datatype())
                    .map(|(schema, datatype)| format!("{schema}.{datatype}")),
            };
            server.hide_values();
            return Self::Server(Box::new(server));
        }
        if error.is_closed() {
            return Self::Closed;
        }
        let io_kind = error
            .source()
            .and_then(|cause| cause.downcast_ref::<io::Error>());
        match io_kind {
            Some(cause) => Self::Io(io::Error::new(cause.kind(), cause.to_string())),
            None => Self::Protocol(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(sqlstate: &str, message: &str) -> String {
        let error = ServerError {
            sqlstate: sqlstate.to_owned(),
            message: message.to_owned(),
            ..ServerError::default()
        };
        PgError::Server(Box::new(error)).hint().unwrap_or_default()
    }

    #[test]
    fn who_is_not_let_in_is_told_by_whom() {
        let cases = [
            (
                "no pg_hba.conf entry for host \"10.0.0.7\", user \"dr\", database \"app\", no encryption",
                "pg_reload_conf",
            ),
            (
                "pg_hba.conf rejects connection for host \"10.0.0.7\"",
                "pg_reload_conf",
            ),
            ("role \"dr\" does not exist", "no such role"),
            ("role \"dr\" is not permitted to log in", "LOGIN"),
            ("connection requires a valid client certificate", "sslcert"),
            (
                "certificate authentication failed for user \"dr\"",
                "pg_ident.conf",
            ),
            ("permission denied to set role \"app\"", "RESET"),
            ("Rolle »dr« existiert nicht", "the message above"),
        ];
        for (message, words) in cases {
            let hint = refused("28000", message);
            assert!(hint.contains(words), "{message}: {hint}");
        }
        assert!(refused("28P01", "password authentication failed").contains("password"));
    }

    #[test]
    fn what_there_is_not_enough_of_is_named() {
        let cases = [
            ("sorry, too many clients already", "max_connections"),
            (
                "remaining connection slots are reserved for non-replication superuser connections",
                "max_connections",
            ),
            ("too many connections for role \"dr\"", "ALTER ROLE"),
            (
                "too many connections for database \"app\"",
                "ALTER DATABASE",
            ),
            (
                "number of requested standby connections exceeds max_wal_senders (currently 2)",
                "max_wal_senders",
            ),
            ("all replication slots are in use", "max_replication_slots"),
        ];
        for (message, words) in cases {
            let hint = refused("53300", message);
            assert!(hint.contains(words), "{message}: {hint}");
        }
        let locks = refused("53200", "out of shared memory");
        assert!(locks.contains("max_locks_per_transaction"), "{locks}");
        assert!(!refused("53200", "out of memory").contains("locks"));
    }
}
