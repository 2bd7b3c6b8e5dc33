//! Why no change log is written, and what is to be done about it.

use super::reader::LogReaderError;
use crate::archive::log::SpoolError;
use crate::error::{Class, Classify as _};
use crate::setup::SetupError;

/// Why no log is written.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    #[error("look where the change log can be read")]
    Look(#[from] SetupError),
    #[error("open the spool")]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    LogReader(#[from] LogReaderError),
    #[error(
        "another agent reads the slot, and what is missing in this one's change log may be in its spool"
    )]
    Elsewhere,
}

impl KeepError {
    pub(super) fn class(&self) -> Class {
        match self {
            Self::Look(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::LogReader(error) => error.class(),
            Self::Elsewhere => Class::Transient,
        }
    }

    pub(super) fn hint(&self) -> Option<String> {
        match self {
            Self::Look(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::LogReader(error) => error.hint(),
            Self::Elsewhere => None,
        }
    }

    /// The pipeline says so itself, or it is how every database begins.
    pub(super) fn is_said_elsewhere(&self) -> bool {
        match self {
            Self::Look(SetupError::NotSent { .. })
            | Self::LogReader(LogReaderError::Ended)
            | Self::Elsewhere => true,
            Self::Look(error) => error.class() == Class::Transient,
            Self::Spool(_) | Self::LogReader(_) => false,
        }
    }
}
