//! ● pgoutput: the logical decoding messages of PostgreSQL, protocol versions 1 to 4.
//!
//! The payload of one XLogData message (or of one row of `pg_logical_slot_peek_binary_changes`) goes
//! through [`decode`] and comes out as one [`Message`]; the assembler puts transactions together from
//! them. [`kind`] looks at the first byte only, for whoever routes messages without reading them.
//!
//! Format: PostgreSQL documentation, "Logical Replication Message Formats"; where that is silent,
//! `src/backend/replication/logical/proto.c`.
//!
//! # Invariants
//! - No bytes make this code panic or allocate more than a small multiple of their own length.
//! - Tuples are validated once, here, and never copied: a [`Tuple`] is a slice of the message, and
//!   reading its values cannot fail.
//! - A message is understood completely or refused: unknown flags, kinds and left-over bytes are
//!   errors, because each of them would mean that the source says something we do not understand.
//! - `Debug` of a message shows the size of values and never the values.
//!
//! # What it does not do
//! It keeps no state: whether a message belongs to a streamed block, whether a relation is known and
//! whether a tuple has as many columns as its relation is for the caller to know.

mod decode;
#[cfg(test)]
pub(crate) mod encode;
mod error;
mod message;
#[cfg(test)]
mod tests;
mod tuple;

pub use decode::{decode, kind, put_without_xid, row_change, without_xid};
pub use error::DecodeError;
pub use message::{
    Begin, Column, Commit, CommitPrepared, LogicalMessage, Message, MessageKind, OldTuple, Prepare,
    Relation, ReplicaIdentity, RollbackPrepared, StreamAbort, StreamCommit,
};
pub use tuple::{Form, Tuple, Value, Values, share};
