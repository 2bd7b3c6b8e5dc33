//! ● Transactions as the source made them, and the assembler that puts them together.
//!
//! Pure. Here are the words everybody downstream uses: [`Change`], [`SourceRelation`],
//! [`Transaction`]. How messages become transactions is in [`Assembler`].
//!
//! # Invariants
//! - A [`Transaction`] is complete and committed; half a one cannot be expressed.
//! - Messages in a [`Change`] never carry an xid: whether a transaction came streamed or in one piece
//!   cannot be seen any more.

mod assembler;
mod descriptions;
mod open;
#[cfg(test)]
mod tests;
mod types;

use std::sync::Arc;

use bytes::Bytes;

pub use self::assembler::{Assembler, Ended};
pub use self::open::{Complete, Pending};
pub use self::types::{FIRST_NAMED_OID, Named, SentType, TypeName, TypeNames};
use crate::error::{Class, Classify};
use crate::flow::counts::ChangeCounts;
use crate::flow::spill::SpillFile;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{DecodeError, Relation};
use crate::time::Micros;

/// A relation as the source described it, with the message that did.
#[derive(Debug)]
pub struct SourceRelation {
    /// The decoded description.
    pub relation: Relation,
    /// The message itself.
    pub message: Bytes,
    /// What the source calls the types of its columns that are not PostgreSQL's own.
    pub types: Named,
}

impl SourceRelation {
    /// The messages that describe it, in the order in which they precede its first change wherever changes are kept.
    pub fn messages(&self) -> impl Iterator<Item = Bytes> {
        types::messages(&self.types).chain(std::iter::once(self.message.clone()))
    }

    /// Whether the two say the same.
    pub fn says_what(&self, other: &Self) -> bool {
        self.message == other.message && self.types == other.types
    }

    /// `schema.name`, for messages.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.schema(), self.relation.name)
    }

    /// Whether its rows are barriers.
    pub fn is_of_barriers(&self) -> bool {
        BARRIERS == (self.schema(), self.relation.name.as_str())
    }

    /// The schema; pgoutput sends an empty string for `pg_catalog`.
    pub fn schema(&self) -> &str {
        if self.relation.schema.is_empty() {
            "pg_catalog"
        } else {
            &self.relation.schema
        }
    }
}

/// The table whose rows are barriers, by schema and name: what the source's event triggers wrote down of a command. What is behind
/// such a row may be of tables that are not there before it.
pub const BARRIERS: (&str, &str) = ("dr_agent", "ddl");

/// One insert, update or delete, or one truncate, with the relations it concerns.
#[derive(Clone, Debug)]
pub struct Change {
    /// One relation for a row change; every truncated one for a truncate.
    pub relations: Relations,
    /// The pgoutput message.
    pub message: Bytes,
}

/// The relations of one change.
#[derive(Clone, Debug)]
pub enum Relations {
    /// Of an insert, update or delete.
    Row(Arc<SourceRelation>),
    /// Of a truncate.
    Truncate(Arc<[Arc<SourceRelation>]>),
}

impl Change {
    /// Whether it is a barrier, or concerns the table of them.
    pub fn is_of_barriers(&self) -> bool {
        let mut relations = self.relations().iter();
        relations.any(|relation| relation.is_of_barriers())
    }

    /// Bytes this change holds in memory, roughly.
    pub fn bytes(&self) -> u64 {
        self.message.len() as u64 + size_of::<Self>() as u64
    }

    /// The relations concerned.
    pub fn relations(&self) -> &[Arc<SourceRelation>] {
        match &self.relations {
            Relations::Row(relation) => std::slice::from_ref(relation),
            Relations::Truncate(relations) => relations,
        }
    }
}

/// One committed source transaction, complete.
#[derive(Debug)]
pub struct Transaction {
    /// Transaction id on the source.
    pub xid: u32,
    /// Start of its commit record.
    pub commit_lsn: PgLsn,
    /// First byte after its commit record.
    pub end_lsn: PgLsn,
    /// Commit time on the source's clock.
    pub commit_time: Micros,
    /// The beginning of a large transaction; it precedes `changes`.
    pub spilled: Option<SpillFile>,
    /// Its changes in the order they were made, or the last of them.
    pub changes: Vec<Change>,
    /// How many changes there are of each kind, the spilled ones included.
    pub counts: ChangeCounts,
    /// Bytes of `changes` in memory.
    pub bytes: u64,
    /// It has a barrier: it is a batch of its own.
    pub has_barrier: bool,
}

/// Why the stream of messages makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A message could not be decoded.
    #[error("decode a replication message")]
    Decode(#[from] DecodeError),
    /// A change came for a relation that was never described.
    #[error("change for relation {0}, which the source has not described")]
    UnknownRelation(u32),
    /// A message came where the protocol does not allow it.
    #[error("{found} message {place}")]
    OutOfPlace {
        /// The message.
        found: &'static str,
        /// Where it came.
        place: &'static str,
    },
    /// A streamed transaction goes on or ends that never began, or begins twice.
    #[error("{found} for transaction {xid}, which {state}")]
    WrongTransaction {
        /// The message.
        found: &'static str,
        /// Transaction id on the source.
        xid: u32,
        /// What is known of it.
        state: &'static str,
    },
    /// A transaction commits before the end of the one before it.
    #[error("transaction {xid} commits at {commit_lsn}, before {previous}")]
    OutOfOrder {
        /// Transaction id on the source.
        xid: u32,
        /// Where it commits.
        commit_lsn: PgLsn,
        /// The end of the one before.
        previous: PgLsn,
    },
}

impl Classify for AssembleError {
    fn class(&self) -> Class {
        Class::Definite
    }

    fn hint(&self) -> Option<String> {
        Some(
            "the source speaks a protocol this version does not know; report it with the \
              source's version"
                .to_owned(),
        )
    }
}
