//! ● Why a pgoutput message could not be understood.
//!
//! # Invariants
//! Every variant is definite: the same bytes would come again after a reconnect. None quotes a value,
//! only kinds, lengths and flags.

use crate::error::{Class, Classify};

/// Why a pgoutput message could not be understood. `message` is its first byte, as in the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is not even a first byte.
    #[error("empty pgoutput message")]
    Empty,
    /// The first byte names no message of protocol versions 1 to 4.
    #[error("unknown pgoutput message 0x{0:02x}")]
    UnknownMessage(u8),
    /// The message ends before the field does.
    #[error("pgoutput message '{message}' is cut short: {needed} bytes needed, {left} left")]
    Truncated {
        /// Which message.
        message: char,
        /// Bytes the next field needs.
        needed: usize,
        /// Bytes that are there.
        left: usize,
    },
    /// The message goes on after its last field.
    #[error("pgoutput message '{message}' has {left} bytes too many")]
    TrailingBytes {
        /// Which message.
        message: char,
        /// Bytes after the last field.
        left: usize,
    },
    /// A length or a count is negative.
    #[error("pgoutput message '{message}' has the negative length {length}")]
    NegativeLength {
        /// Which message.
        message: char,
        /// What it says.
        length: i32,
    },
    /// A string has no terminating zero byte.
    #[error("pgoutput message '{message}' has a string without an end")]
    UnterminatedString {
        /// Which message.
        message: char,
    },
    /// A name, a prefix or a transaction identifier is not UTF-8.
    #[error("pgoutput message '{message}' has a name that is not UTF-8")]
    InvalidUtf8 {
        /// Which message.
        message: char,
    },
    /// A column is neither null, unchanged, text nor binary.
    #[error("unknown kind 0x{0:02x} of a column value")]
    UnknownValueKind(u8),
    /// A tuple is neither key, old nor new, or not the one that belongs here.
    #[error("pgoutput message '{message}' has the unexpected tuple kind 0x{kind:02x}")]
    UnexpectedTuple {
        /// Which message.
        message: char,
        /// What stands where `K`, `O` or `N` should.
        kind: u8,
    },
    /// A flag that protocol version 4 does not know.
    #[error("pgoutput message '{message}' has the unknown flags 0x{flags:02x}")]
    UnknownFlags {
        /// Which message.
        message: char,
        /// The whole byte.
        flags: u8,
    },
    /// A replica identity that is none of `d`, `n`, `f` and `i`.
    #[error("unknown replica identity 0x{0:02x}")]
    UnknownReplicaIdentity(u8),
}

impl Classify for DecodeError {
    fn class(&self) -> Class {
        match self {
            Self::Empty
            | Self::UnknownMessage(_)
            | Self::Truncated { .. }
            | Self::TrailingBytes { .. }
            | Self::NegativeLength { .. }
            | Self::UnterminatedString { .. }
            | Self::InvalidUtf8 { .. }
            | Self::UnknownValueKind(_)
            | Self::UnexpectedTuple { .. }
            | Self::UnknownFlags { .. }
            | Self::UnknownReplicaIdentity(_) => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InvalidUtf8 { .. } => {
                "names must reach the agent as UTF-8: look for a database in encoding SQL_ASCII \
                 whose names hold other bytes, and rename them"
            }
            Self::Empty
            | Self::UnknownMessage(_)
            | Self::Truncated { .. }
            | Self::TrailingBytes { .. }
            | Self::NegativeLength { .. }
            | Self::UnterminatedString { .. }
            | Self::UnknownValueKind(_)
            | Self::UnexpectedTuple { .. }
            | Self::UnknownFlags { .. }
            | Self::UnknownReplicaIdentity(_) => {
                "nothing was applied and nothing acknowledged; the source's version may be newer \
                 than this agent knows: upgrade dr-agent, or report this text with the source's version"
            }
        };
        Some(hint.to_owned())
    }
}
