//! The three classes of error and the one place that knows which SQLSTATE is which.
//!
//! Every layer has its own error type; each says through [`Classify`] what is to be done about it.
//! [`crate::backoff`] turns a class and a number of attempts into "retry" or "stop"; nothing else
//! retries.
//!
//! # Invariants
//! - *Transient* errors go away by waiting or reconnecting. *Definite* errors need a person; they
//!   stop the pipeline and carry a hint. *Fenced* means another agent or a promotion superseded us;
//!   it is never retried.
//! - No error text carries a row value or a secret. PostgreSQL's DETAIL quotes rows, so it is
//!   never kept.

use std::error::Error;
use std::fmt::Write as _;

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Goes away by waiting or reconnecting: back off and retry.
    Transient,
    /// Needs a person: stop and say what to do.
    Definite,
    /// This agent was superseded: stop at once, touch nothing, exit with code 3.
    Fenced,
}

impl Class {
    /// The value of the `class` label of `dr_agent_errors_total`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Definite => "definite",
            Self::Fenced => "fenced",
        }
    }
}

/// An error that knows its class and what the operator can do.
pub trait Classify: Error {
    /// What is to be done.
    fn class(&self) -> Class;

    /// One or two sentences for the operator: what to do next. `None` where the error text says it all.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// Renders an error and its causes on one line, each cause after a colon.
///
/// The one place where chains are printed; `Display` of our errors never includes the source.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Classifies an error of a local disk that the agent writes to: a full one heals, a missing right does not.
pub fn disk_class(error: &std::io::Error) -> Class {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied
        | std::io::ErrorKind::ReadOnlyFilesystem
        | std::io::ErrorKind::NotADirectory => Class::Definite,
        _ => Class::Transient,
    }
}

/// Classifies a SQLSTATE of either server. The list of transient codes is narrow on purpose.
///
/// Source: PostgreSQL documentation, appendix "PostgreSQL Error Codes".
pub fn sqlstate_class(code: &str) -> Class {
    match code {
        // Raised by dr_agent.advance() on the replica: see sql/replica.sql.
        "DR001" => Class::Fenced,
        // object_in_use: the slot is still held by a walsender that has not noticed our death.
        // lock_not_available, deadlock_detected, serialization_failure, query_canceled.
        // admin_shutdown, crash_shutdown, cannot_connect_now, idle sessions ended by the server.
        // in_failed_sql_transaction follows another error; retrying shows the true one.
        // too_many_connections, configuration_limit_exceeded (walsenders), disk_full, out_of_memory:
        // a person may have to act, but nothing is lost by waiting, and it heals without a restart.
        "55006" | "55P03" | "40P01" | "40001" | "57014" | "57P01" | "57P02" | "57P03" | "57P05"
        | "25P02" | "25P03" | "53000" | "53100" | "53200" | "53300" | "53400" | "58030" => {
            Class::Transient
        }
        // Connection exceptions (08xxx).
        _ if code.starts_with("08") => Class::Transient,
        _ => Class::Definite,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_heals_without_a_restart_and_a_wrong_password_does_not() {
        assert_eq!(sqlstate_class("53100"), Class::Transient);
        assert_eq!(sqlstate_class("28P01"), Class::Definite);
        assert_eq!(sqlstate_class("DR001"), Class::Fenced);
        assert_eq!(sqlstate_class("08006"), Class::Transient);
        assert_eq!(sqlstate_class("23505"), Class::Definite);
    }
}
