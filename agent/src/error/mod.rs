//! ● The three classes of error and the one place that knows which SQLSTATE is which.
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

pub mod remedy;

use std::borrow::Cow;
use std::error::Error;
use std::fmt::{self, Write as _};

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

/// What was being done when another part failed, whose class and hint are the answer.
#[derive(Debug)]
pub struct Because {
    doing: Cow<'static, str>,
    source: Box<dyn Classify + Send + Sync>,
}

impl Because {
    /// `doing` is a verb and its object.
    pub fn new(
        doing: impl Into<Cow<'static, str>>,
        source: impl Classify + Send + Sync + 'static,
    ) -> Self {
        Self {
            doing: doing.into(),
            source: Box::new(source),
        }
    }
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)
    }
}

impl Error for Because {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

impl Classify for Because {
    fn class(&self) -> Class {
        self.source.class()
    }

    fn hint(&self) -> Option<String> {
        self.source.hint()
    }
}

/// Errors of other parts that an enum only hands on, each with what was being done: they become its variant `Because`.
macro_rules! hands_on {
    ($to:ty: $($from:ty => $doing:literal),+ $(,)?) => {$(
        impl From<$from> for $to {
            fn from(error: $from) -> Self {
                Self::Because($crate::error::Because::new($doing, error))
            }
        }
    )+};
}

pub(crate) use hands_on;

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

/// Classifies a SQLSTATE of either server: what can heal without a decision about the data is transient, whether somebody has to
/// act for it or not, because nothing is lost by waiting and nobody has to restart the agent afterwards.
///
/// Source: PostgreSQL documentation, appendix "PostgreSQL Error Codes".
pub fn sqlstate_class(code: &str) -> Class {
    match code {
        // Raised by dr_agent.advance() on the replica: see sql/replica.sql.
        "DR001" => Class::Fenced,
        // object_in_use: the slot is still held by a walsender that has not noticed our death.
        // lock_not_available, deadlock_detected, serialization_failure, statement_completion_unknown, query_canceled.
        "55006" | "55P03" | "40P01" | "40001" | "40003" | "57014"
        // in_failed_sql_transaction follows another error; retrying shows the true one. Transactions ended by a timeout.
        | "25P02" | "25P03" | "25P04"
        // invalid_authorization_specification, invalid_password: pg_hba.conf or a password is being changed.
        | "28000" | "28P01"
        // read_only_sql_transaction: a standby for a moment, or a default that somebody sets. object_not_in_prerequisite_state:
        // wal_level, a server that is being set up.
        | "25006" | "55000"
        // snapshot_too_old; system_error and io_error of a server in trouble.
        | "72000" | "58000" | "58030" => Class::Transient,
        // Connection exceptions; insufficient resources: a full disk, no memory, no file descriptors, no session left; a server
        // that starts, ends, or ends its sessions.
        _ if ["08", "53", "57P"].iter().any(|class| code.starts_with(class)) => Class::Transient,
        _ => Class::Definite,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the disk is full")]
    struct Full;

    impl Classify for Full {
        fn class(&self) -> Class {
            Class::Transient
        }

        fn hint(&self) -> Option<String> {
            Some("make room".to_owned())
        }
    }

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error(transparent)]
        Because(Because),
    }

    hands_on!(Outer: Full => "write a file");

    #[test]
    fn what_is_handed_on_keeps_its_class_and_hint_and_is_named_once() {
        let Outer::Because(because) = Outer::from(Full);
        assert_eq!(because.class(), Class::Transient);
        assert_eq!(because.hint().as_deref(), Some("make room"));
        assert_eq!(
            chain(&Outer::Because(because)),
            "write a file: the disk is full"
        );
    }

    #[test]
    fn what_can_heal_by_itself_is_retried_and_what_needs_a_decision_is_not() {
        for healing in [
            "28000", "28P01", "25006", "55000", "55006", "57P01", "57P02", "57P03", "57P04",
            "57P05", "57014", "53000", "53100", "53200", "53300", "53400", "08006", "08P01",
            "25P03", "25P04", "40001", "40P01", "58030",
        ] {
            assert_eq!(sqlstate_class(healing), Class::Transient, "{healing}");
        }
        for decided in [
            "23505", "22P02", "42501", "42P01", "3D000", "0A000", "XX001", "58P01", "55P02",
            "42704", "DR002", "DR003", "P0001",
        ] {
            assert_eq!(sqlstate_class(decided), Class::Definite, "{decided}");
        }
        assert_eq!(sqlstate_class("DR001"), Class::Fenced);
    }
}
