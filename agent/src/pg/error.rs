//! What can go wrong in a conversation with PostgreSQL, without the driver's types.
//!
//! `tokio_postgres::Error` prints its cause in `Display` and returns it from `source()` as well, so it
//! is converted at the boundary and never kept. DETAIL, which quotes rows, is dropped here for good.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use super::{cause, redact};
use crate::error::{Class, Classify, sqlstate_class};

/// An error message of the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`, in no other language.
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
    /// Where in PostgreSQL's own source it was raised: file and function. The message may be in any language, these are in none.
    pub raised: (String, String),
}

impl ServerError {
    /// Takes away what may quote a row: messages of class 22, data exception ("invalid input syntax
    /// for type integer: …").
    pub(super) fn hide_values(&mut self) {
        if self.sqlstate.starts_with("22") {
            let what = redact::without_value(&self.message);
            let what = what.or_else(|| redact::condition(&self.sqlstate).map(str::to_owned));
            self.message = match what {
                Some(what) => format!("the server refused a value: {what}"),
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

    /// Whether a server's lock table is full.
    pub(crate) fn is_of_locks(&self) -> bool {
        matches!(self, Self::Server(error) if cause::is_of_locks(error))
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
            "28000" | "53300" | "53400" | "53200" | "55000" => match cause::of(error) {
                Some(hint) => hint,
                None => return error.hint.clone(),
            },
            "25006" => {
                "the server is a standby, or transactions there are read-only by default; it is tried again"
            }
            "42501" => "the role lacks a right; `dr-agent check` lists every one it needs",
            "3D000" => {
                "create it, or mend its name: for the server as a whole it is in the URL, for each database on both sides the same"
            }
            "53100" => "the server's disk is full; free space, the agent goes on by itself",
            "57P03" => "the server starts, stops or recovers; it is tried again",
            _ => return error.hint.clone(),
        };
        Some(ours.to_owned())
    }
}

impl From<tokio_postgres::Error> for PgError {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            let mut server = ServerError {
                // The other one is translated.
                severity: match db.parsed_severity() {
                    Some(severity) => severity.to_string(),
                    None => db.severity().to_owned(),
                },
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
                raised: (
                    db.file().unwrap_or_default().to_owned(),
                    db.routine().unwrap_or_default().to_owned(),
                ),
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
