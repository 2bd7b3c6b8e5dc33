//! Why a session ended early, and what is to be done about it.

use crate::archive::log::SpoolError;
use crate::cloud::kinesis::KinesisError;
use crate::copy::CopyError;
use crate::error::{Class, Classify};
use crate::flow::spill::SpillError;
use crate::names::TableName;
use crate::pg::PgError;
use crate::setup::{SetupError, Side};
use crate::sink::kinesis::KinesisSinkError;
use crate::sink::replica::SinkError;
use crate::source::SourceError;
use std::time::Duration;

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("prepare")]
    Setup(#[from] SetupError),
    #[error("stream")]
    Source(#[from] SourceError),
    #[error("apply")]
    Sink(#[from] SinkError),
    #[error("send")]
    KinesisSink(#[from] KinesisSinkError),
    #[error("open the Kinesis stream")]
    Kinesis(#[from] KinesisError),
    #[error("route.kind is not \"kinesis\"")]
    NoKinesisStream,
    #[error("watch the source")]
    Monitor(#[source] PgError),
    #[error("open the spill directory")]
    Spill(#[from] SpillError),
    #[error("keep the change log for the archive")]
    Spool(#[from] SpoolError),
    #[error("keep the change log for the archive: {text}")]
    Log { class: Class, text: String },
    #[error("finish the initial copy")]
    Deferred(#[source] CopyError),
    #[error("take a snapshot for late tables")]
    LateSnapshot(#[source] PgError),
    #[error("a snapshot waits for transactions that are open on the source, for {0:?} so far")]
    LateWaits(std::time::Duration),
    #[error("copy late tables")]
    LateCopy(#[source] CopyError),
    #[error(
        "take copied tables in: the replica did not answer in time, or refused; the next start looks"
    )]
    LateJoin(#[source] Option<SetupError>),
    #[error("the configuration was changed")]
    Reconfigured,
    #[error("a new table is to be copied")]
    NewTable,
    #[error("table {table} is published on the source and not copied yet")]
    NotCopied { table: TableName },
    #[error("a task of the pipeline ended without saying why")]
    TaskLost,
    #[error(
        "{transactions} transactions had been received and were not applied within limits.shutdown_grace ({grace:?})"
    )]
    NotDrained {
        transactions: usize,
        grace: Duration,
    },
}

impl Classify for SessionError {
    fn class(&self) -> Class {
        match self {
            Self::Setup(error) => error.class(),
            Self::Source(error) => error.class(),
            Self::Sink(error) => error.class(),
            Self::KinesisSink(error) => error.class(),
            Self::Kinesis(error) => error.class(),
            Self::Monitor(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::Log { class, .. } => *class,
            Self::NoKinesisStream => Class::Definite,
            Self::Deferred(error) | Self::LateCopy(error) => error.class(),
            Self::LateSnapshot(error) => error.class(),
            // Whether the tables are in shows at the next start.
            Self::LateJoin(Some(error)) if error.class() == Class::Fenced => Class::Fenced,
            Self::LateWaits(_)
            | Self::LateJoin(_)
            | Self::Reconfigured
            | Self::NewTable
            | Self::NotCopied { .. }
            | Self::NotDrained { .. }
            | Self::TaskLost => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Sink(error) => error.hint(),
            Self::KinesisSink(error) => error.hint(),
            Self::Kinesis(error) => error.hint(),
            Self::Monitor(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::Deferred(error) | Self::LateCopy(error) => error.hint(),
            Self::LateSnapshot(error) => error.hint(),
            Self::LateJoin(error) => error.as_ref()?.hint(),
            Self::LateWaits(_) => Some(
                "look at pg_stat_activity (xact_start) and pg_prepared_xacts on the source; it is tried again".to_owned(),
            ),
            Self::NotDrained { .. } => Some(
                "nothing is lost: the next start receives them again. Where they go to does not answer, or needs longer"
                    .to_owned(),
            ),
            Self::Log { .. }
            | Self::NoKinesisStream
            | Self::Reconfigured
            | Self::NewTable
            | Self::NotCopied { .. }
            | Self::TaskLost => None,
        }
    }
}

impl SessionError {
    /// Whether the source could be read and what comes behind could not be written: then the change log can go on.
    pub(super) fn is_the_sinks(&self) -> bool {
        match self {
            Self::Setup(
                SetupError::Sql { side, .. }
                | SetupError::Unfit { side, .. }
                | SetupError::InRecovery { side },
            ) => *side == Side::Replica,
            Self::Setup(
                SetupError::ReplicaNotEmpty { .. }
                | SetupError::ReplicaIsSource { .. }
                | SetupError::ReplicaOfAnother { .. }
                | SetupError::ProgressGone { .. }
                | SetupError::ReplicaTableMissing(_)
                | SetupError::Computed(_)
                | SetupError::Copy { .. },
            ) => true,
            Self::Sink(_) | Self::KinesisSink(_) | Self::Kinesis(_) | Self::Deferred(_) => true,
            _ => false,
        }
    }

    /// The table that has to be copied before anything goes on.
    pub(super) fn uncopied(&self) -> Option<&TableName> {
        match self {
            Self::NotCopied { table }
            | Self::Setup(SetupError::CopiedTogether(table) | SetupError::ListedAnew(table)) => {
                Some(table)
            }
            Self::Sink(error) => error.uncopied(),
            _ => None,
        }
    }

    /// Not a failure: starting again is how the pipeline takes in what is new.
    pub(super) fn is_expected(&self) -> bool {
        matches!(
            self,
            Self::Reconfigured | Self::NewTable | Self::Source(SourceError::NewType)
        ) || self.uncopied().is_some()
    }
}
