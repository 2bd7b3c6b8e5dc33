//! Why a stream could not be drained, and what a person does about it who is promoting.
//!
//! The errors are those of an agent that applies. What to do is not: nobody starts an agent again, the same command is run
//! again; and no copy is begun anew on a replica that is fenced.

use std::time::Duration;

use crate::archive::log::{ArchiveError, SpoolError};
use crate::cloud::kinesis::KinesisError;
use crate::cloud::store::StoreError;
use crate::error::{Because, Class, Classify, hands_on};
use crate::flow::spill::SpillError;
use crate::names::TableName;
use crate::pg::PgError;
use crate::replay::ReplayError;
use crate::setup::SetupError;
use crate::sink::replica::{Misfit, SinkError};
use crate::source::SourceError;

#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error("look at the replica")]
    Setup(#[from] SetupError),
    #[error("open a directory for large transactions")]
    Spill(#[from] SpillError),
    #[error("read the stream")]
    Source(#[from] SourceError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("the replica's records of the stream are inconsistent: {0}")]
    Records(&'static str),
    #[error("read the archive's change log")]
    Archive(#[from] ArchiveError),
    #[error("the archive did not answer within {0:?}")]
    ArchiveSilent(Duration),
    #[error("the session that holds the promotion's lock has ended")]
    LockLost(#[source] PgError),
    #[error(transparent)]
    Because(Because),
}

hands_on!(Failed:
    PgError => "open a session that applies to the replica",
    KinesisError => "read the stream",
);

impl Failed {
    /// The table whose rows are on the source alone.
    pub(super) fn uncopied(&self) -> Option<&TableName> {
        match self {
            Self::Replay(ReplayError::Sink(error)) => error.uncopied(),
            _ => None,
        }
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        ArchiveError::from(error).into()
    }
}

impl From<SpoolError> for Failed {
    fn from(error: SpoolError) -> Self {
        ArchiveError::from(error).into()
    }
}

impl Classify for Failed {
    fn class(&self) -> Class {
        match self {
            Self::Setup(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Source(error) => error.class(),
            Self::Replay(error) => error.class(),
            Self::Archive(error) => error.class(),
            Self::ArchiveSilent(_) => Class::Transient,
            Self::Records(_) => Class::Definite,
            Self::LockLost(error) => error.class(),
            Self::Because(error) => error.class(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Archive(error) => error.hint(),
            Self::Because(error) => error.hint(),
            Self::ArchiveSilent(_) => {
                Some("check that archive.url is right and can be reached from here".to_owned())
            }
            Self::Spill(error) | Self::Source(SourceError::Spill(error)) => of_spill(error),
            Self::Source(error) => of_source(error),
            Self::Replay(ReplayError::Sink(error)) => of_sink(error),
            Self::LockLost(_) => Some(
                "another promotion may have taken over: see `dr-agent promote --failover --plan`"
                    .to_owned(),
            ),
            // Its hints are for who sets up a replica.
            Self::Setup(_) | Self::Replay(ReplayError::TaskLost) | Self::Records(_) => None,
        }
    }
}

fn of_spill(error: &SpillError) -> Option<String> {
    let hint = match error {
        SpillError::Io { .. } => {
            "limits.spill_directory, or else the directory that TMPDIR names (without it /var/tmp), must be writable for \
             the user who promotes and have room for the largest transaction"
        }
        SpillError::Full { .. } => {
            "raise limits.spill_bytes (and have that much disk), then run the same command again"
        }
        SpillError::Damaged { .. } => return None,
    };
    Some(hint.to_owned())
}

fn of_source(error: &SourceError) -> Option<String> {
    let hint = match error {
        SourceError::TooMuchWaits { .. } => {
            "raise limits.spill_bytes (and have that much disk), then run the same command again"
        }
        SourceError::Gap { .. } => {
            "what comes before is applied. If the archive gets the rest later (its spool may still be uploading), run the same \
             command again"
        }
        error => return error.hint(),
    };
    Some(hint.to_owned())
}

fn of_sink(error: &SinkError) -> Option<String> {
    let hint = match error.cause() {
        SinkError::Fenced(_) => {
            "another promotion has raised the term since: see `dr-agent promote --failover --plan`"
        }
        SinkError::PositionMismatch(_) => {
            "something else moved the progress row; run the same command again: it goes on from where that is now"
        }
        SinkError::Swallowed(_) => {
            "a trigger or a rule of the replica's that fires ALWAYS does away with rows: ENABLE it there without ALWAYS, then run \
             the same command again"
        }
        SinkError::Unfit(unfit) if unfit.why != Misfit::KeyNotSent => {
            "DDL ran on one side only: make the same ALTER TABLE on the replica (SET default_transaction_read_only = off), then run \
             the same command again: it goes on where it stopped"
        }
        SinkError::Diverged(_) => {
            "the row is not there as the source had it: a trigger of the replica that fires ALWAYS, somebody who wrote there, or \
             an error of dr-agent. Put back the rows it concerns, then run the same command again; or --skip-drain opens the \
             replica as it is"
        }
        SinkError::TableMissing { .. } | SinkError::ColumnMissing { .. } => {
            "DDL ran on one side only: run the same DDL on the replica (SET default_transaction_read_only = off), then run the \
             same command again: it goes on where it stopped"
        }
        SinkError::Refused { .. } => {
            "the replica has a constraint, or rows, that the source does not have: mend that, then run the same command again"
        }
        SinkError::Spill(error) => return of_spill(error),
        // lock_not_available
        SinkError::Pg(error) if error.sqlstate() == Some("55P03") => {
            "a session on the replica holds a lock that a change needs (pg_locks, pg_stat_activity): end it, then run the same \
             command again"
        }
        error => return error.hint(),
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::changelog::Gap;
    use crate::flow::testing::lsn;

    #[test]
    fn what_the_replicas_server_and_kinesis_say_is_handed_on() {
        let lost = || PgError::Protocol("as planned".to_owned());
        let refused = || KinesisError::Record {
            stream: "s".to_owned(),
            reason: "it is too large".to_owned(),
        };
        for (error, class, hint) in [
            (Failed::from(lost()), lost().class(), lost().hint()),
            (refused().into(), refused().class(), refused().hint()),
        ] {
            assert_eq!((error.class(), error.hint()), (class, hint), "{error}");
        }
        assert_eq!(Failed::from(refused()).to_string(), "read the stream");
    }

    #[test]
    fn nobody_who_promotes_is_told_to_start_an_agent() {
        let gap = Gap {
            from: lsn(1),
            to: lsn(2),
            accepted_by: Some(std::time::Instant::now()),
        };
        let missing = SinkError::TableMissing {
            table: crate::names::TableName {
                schema: "public".to_owned(),
                name: "t".to_owned(),
            },
        };
        let moved = PgError::Protocol("as planned".to_owned());
        for error in [
            Failed::Spill(SpillError::Full { limit: 1 }),
            Failed::Source(SourceError::TooMuchWaits { limit: 1 }),
            Failed::Source(SourceError::Gap {
                gap,
                stream: "s".to_owned(),
                archive: "no archive is configured".to_owned(),
            }),
            Failed::Replay(ReplayError::Sink(missing)),
            Failed::Replay(ReplayError::Sink(SinkError::PositionMismatch(moved))),
        ] {
            let hint = error.hint().unwrap();
            assert!(hint.contains("run the same command again"), "{hint}");
            assert!(!hint.contains("start"), "{hint}");
        }
    }
}
