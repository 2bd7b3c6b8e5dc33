//! What can go wrong with the archive, beside the store itself.

use super::Span;
use super::spool::SpoolError;
use crate::cloud::store::StoreError;
use crate::error::{Class, Classify};
use crate::flow::changelog::{FramesError, UnpackError};
use crate::names::history::History;
use crate::pg::PgLsn;

/// Why the archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The store refused, or is away.
    #[error("use the archive")]
    Store(#[from] StoreError),
    /// The spool refused.
    #[error("use the archive's spool")]
    Spool(#[from] SpoolError),
    /// An object does not hold what its name says.
    #[error("{object}: {reason}")]
    Damaged {
        /// Its name.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A record in an object cannot be read.
    #[error("{object}: a record cannot be read")]
    Record {
        /// The object's name.
        object: String,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// An object cannot be taken apart.
    #[error("{object}: it is not a segment of a change log")]
    Frames {
        /// The object's name.
        object: String,
        /// Why.
        #[source]
        source: FramesError,
    },
    /// An object that should be ours is of another stream or source.
    #[error("{object} was written for stream {stream} of history {found}")]
    Foreign {
        /// The object's name.
        object: String,
        /// The stream in it.
        stream: String,
        /// The history in it.
        found: History,
    },
    /// Something else has a segment's name, and it cannot be said what.
    #[error("{object} is there already, and is not known to be the segment")]
    InTheWay {
        /// Its name.
        object: String,
        /// Why that is not known.
        #[source]
        source: Box<ArchiveError>,
    },
    /// What the store has taken is not there any more.
    #[error("{object}, which the archive had taken, is not there")]
    Lost {
        /// Its name.
        object: String,
    },
    /// A stretch of the log is not there.
    #[error("the change log from {from} on is missing{}", goes_on(.next))]
    Missing {
        /// Where it breaks off.
        from: PgLsn,
        /// Where it goes on.
        next: Option<PgLsn>,
    },
}

fn goes_on(next: &Option<PgLsn>) -> String {
    next.map_or_else(String::new, |next| format!("; it goes on at {next}"))
}

impl ArchiveError {
    /// What a segment of this name lacks.
    pub(super) fn ends_early(object: &str, span: Span, end: PgLsn) -> Self {
        Self::Damaged {
            object: object.to_owned(),
            reason: format!("it ends at {end} instead of {}", span.end),
        }
    }
}

impl ArchiveError {
    /// Whether it says something about one object, while the archive is there and may give others.
    pub fn is_of_one_object(&self) -> bool {
        match self {
            Self::Store(error) => error.is_of_one_object(),
            Self::Damaged { .. }
            | Self::Record { .. }
            | Self::Frames { .. }
            | Self::Foreign { .. } => true,
            Self::InTheWay { .. } => true,
            Self::Spool(_) | Self::Lost { .. } | Self::Missing { .. } => false,
        }
    }
}

impl Classify for ArchiveError {
    fn class(&self) -> Class {
        match self {
            Self::Store(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::InTheWay { source, .. } => source.class(),
            Self::Damaged { .. }
            | Self::Record { .. }
            | Self::Frames { .. }
            | Self::Foreign { .. }
            | Self::Lost { .. }
            | Self::Missing { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::Record { source, .. } => source.hint(),
            Self::InTheWay { source, .. } => source.hint(),
            Self::Damaged { .. } | Self::Frames { .. } => Some(
                "bring back an earlier version of the object, if the bucket keeps versions; otherwise restore to \
                 a moment before it, or from a base backup behind it"
                    .to_owned(),
            ),
            Self::Foreign { .. } => Some(
                "it was copied there, or two sources share a prefix of archive.url: move it away; every agent \
                 needs a prefix or a source.slot of its own"
                    .to_owned(),
            ),
            Self::Lost { .. } => Some(
                "is archive.url mounted, and the same place as before? If it was emptied on purpose, delete the files that end \
                 in .taken below archive.spool_directory"
                    .to_owned(),
            ),
            Self::Missing { .. } => Some(
                "restore to a moment before it, or from a base backup behind it".to_owned(),
            ),
        }
    }
}
