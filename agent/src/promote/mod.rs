//! Promotion: the replica becomes the primary, killed or repeated as often as it takes.
//!
//! ```text
//! observe ──Observed──▶ plan ● ──Plan──▶ (refused: exit 4, nothing touched)
//!                                  └────▶ execute: walk state ● per database, all at once
//!                                            └─ nothing more opens ─▶ hooks ─▶ report
//! ```
//!
//! The source is never needed: it is usually dead. Where it still answers it is asked, within
//! seconds, how much was lost.
//!
//! # Invariants
//! - What is wrong with one database costs that database: the others are opened, and report and exit code say which is not.
//! - One promotion of a replica at a time, so that hooks run once; they run when all that can be opened is open, and are told
//!   what is open and what is not. What opens later runs them again.
//! - Never imports `pipeline`: a promotion shares nothing with a running agent but the replica.

mod ahead;
mod close;
mod draining;
pub mod execute;
mod fence;
pub mod hooks;
mod lock;
pub mod loss;
pub mod observe;
mod outcome;
pub mod plan;
pub mod report;
pub mod sequences;
pub mod state;
mod steps;

pub use ahead::set_sequences_ahead;
pub use draining::{Asked, Drain, DrainEnd, DrainError, Drained};
pub use steps::Detail;

use crate::error::{Class, Classify};
use crate::pg::PgError;
use crate::schema::promotion;

/// The flag of [`Options::accept_incomplete`].
const ACCEPT_INCOMPLETE: &str = "--accept-incomplete";
/// The flag of [`Options::skip_drain`].
const SKIP_DRAIN: &str = "--skip-drain";

/// What the operator asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Print what would be done and touch nothing.
    pub plan: bool,
    /// Promote although the initial copy is not complete.
    pub accept_incomplete: bool,
    /// Open without what the Kinesis stream and the archive still hold.
    pub skip_drain: bool,
}

/// Why a promotion did not get further. The state reached stays stored: the command is repeated.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    /// The replica could not do something.
    #[error("{doing}")]
    Replica {
        /// Verb and object.
        doing: &'static str,
        /// Why.
        #[source]
        source: PgError,
    },
    /// No database of the replica has a progress row of ours.
    #[error("no database of the replica is replicated under the slot name \"{slot}\"")]
    NothingToPromote {
        /// `source.slot`.
        slot: String,
    },
    /// A database of ours that cannot be entered.
    #[error("{0}")]
    Barred(&'static str),
    /// The server behind `replica.url` cannot be written to at all.
    #[error("the server behind replica.url is itself a physical standby")]
    InRecovery,
    /// Another `promote` is at work on this database, or on this replica.
    #[error("another promotion of {stream} is running")]
    Busy {
        /// The stream, or the slot name that all of them begin with and the databases.
        stream: String,
    },
    /// Somebody has ended the session that keeps other promotions away.
    #[error("the session that holds the promotion's lock has ended")]
    LockLost,
    /// The row of the stream vanished between two steps.
    #[error("{table} has no row for stream {stream} at term {term}")]
    RowGone {
        /// That of the progress, or of promotions.
        table: &'static str,
        /// The stream.
        stream: String,
        /// The term expected.
        term: i64,
    },
    /// Stored by a newer version, or by hand.
    #[error("{} of stream {stream} cannot be read: {reason}", promotion::TABLE)]
    Stored {
        /// The stream.
        stream: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What is still on its way cannot be applied.
    #[error("apply what {what} still holds")]
    Drain {
        /// Where it is.
        what: &'static str,
        /// Why.
        #[source]
        source: DrainError,
    },
    /// Tables are of different moments, and the drain did not change that.
    #[error("{0}")]
    NotOneMoment(plan::PromotionRefusal),
    /// Something keeps the progress row locked and cannot be ended.
    #[error("the progress row of stream {stream} stays locked by {by}")]
    FenceBlocked {
        /// The stream.
        stream: String,
        /// Process ids, or prepared transactions.
        by: String,
    },
    /// Sessions of older agents do not end.
    #[error("sessions of older agents of stream {stream} do not end: pid {pids}")]
    SessionsRemain {
        /// The stream.
        stream: String,
        /// Process ids on the replica.
        pids: String,
    },
    /// The guard is lifted and still a new session cannot write.
    #[error(
        "new sessions of database {database} still find default_transaction_read_only = on, set by {set_by}"
    )]
    StillReadOnly {
        /// The database.
        database: String,
        /// `pg_settings.source`, such as `configuration file`.
        set_by: String,
    },
    /// The report could not be written where a hook can read it.
    #[error("write the report for the hooks")]
    ReportFile(#[source] std::io::Error),
}

impl Classify for PromoteError {
    fn class(&self) -> Class {
        match self {
            Self::Replica { source, .. } => source.class(),
            Self::Drain { source, .. } => source.class,
            Self::Busy { .. }
            | Self::LockLost
            | Self::FenceBlocked { .. }
            | Self::SessionsRemain { .. } => Class::Transient,
            Self::NothingToPromote { .. }
            | Self::InRecovery
            | Self::Barred(_)
            | Self::RowGone { .. }
            | Self::Stored { .. }
            | Self::NotOneMoment(_)
            | Self::StillReadOnly { .. }
            | Self::ReportFile(_) => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Replica { source, .. } => match source.hint() {
                Some(hint) => return Some(hint),
                None => "run the same command again: it goes on where it stopped",
            },
            Self::Drain { source: error, .. } => {
                let what = error.hint.as_deref().unwrap_or("run the same command again: it goes on where it stopped");
                return Some(format!(
                    "{what}. If there is no time for that: the same command with --skip-drain opens the replica without it, and \
                     the report says so"
                ));
            }
            Self::NothingToPromote { .. } => {
                "check replica.url, source.slot and source.databases: is this the replica, and has `dr-agent run` ever started?"
            }
            Self::InRecovery => "point replica.url at its primary",
            Self::Busy { .. } => "wait for it, or end its session (application_name dr_agent:promote:…) and repeat",
            Self::LockLost => {
                "another promotion may have taken over: see `dr-agent promote --failover --plan`"
            }
            Self::Barred(_) => "once that is done, run the same command again: it opens the rest",
            Self::RowGone { .. } => "schema dr_agent was changed by hand; nothing more was done",
            Self::Stored { .. } => {
                "use the version of dr-agent that wrote it; the row may go only if this replica was set up \
                 anew after that promotion"
            }
            Self::NotOneMoment(_) => {
                "the Kinesis stream did not lead that far, or was left out (--skip-drain): with more of it, run the same command \
                 again; with --accept-incomplete it opens the replica as it is, and the report says so"
            }
            Self::FenceBlocked { .. } | Self::SessionsRemain { .. } => {
                "end these sessions on the replica as a superuser (pg_terminate_backend), then run the same command again"
            }
            Self::StillReadOnly { .. } => {
                "remove that setting (ALTER SYSTEM RESET, ALTER ROLE … RESET or the configuration file), then run the same command again"
            }
            Self::ReportFile(_) => "make room in the directory for temporary files, then run the same command again",
        }
        .to_owned())
    }
}

impl PromoteError {
    /// What the replica's server said, if it did.
    pub(crate) fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Replica { source, .. } => source.sqlstate(),
            _ => None,
        }
    }
}

/// Adds what was being done to a failure of the replica.
pub(crate) trait Doing<T> {
    /// `doing` is a verb and its object.
    fn doing(self, doing: &'static str) -> Result<T, PromoteError>;
}

impl<T, E: Into<PgError>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, PromoteError> {
        self.map_err(|error| PromoteError::Replica {
            doing,
            source: error.into(),
        })
    }
}
