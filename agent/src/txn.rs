//! Messages become transactions: the assembler behind the replication connection.
//!
//! Pure. pgoutput sends each transaction whole and in commit order (without `streaming`): Begin,
//! its changes, Commit. The assembler resolves relation ids while they arrive, so that every change
//! carries the relation as it was at that point of the WAL.
//!
//! # Invariants
//! - Nothing downstream sees half a transaction: only a Commit message lets one out.
//! - Transactions come out in commit order, each beginning at or after the end of the one before.
//!   PostgreSQL guarantees `commit_lsn(N+1) >= end_lsn(N)`, often with equality.
//!
//! # What it does not do
//! It does not bound memory by itself: the caller watches [`Assembler::pending_bytes`] and moves
//! what has gathered into a spill file ([`crate::spill`]).

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::changes::ChangeCounts;
use crate::error::{Class, Classify};
use crate::lag::Micros;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{self, DecodeError, Message, Relation};
use crate::spill::SpillFile;

/// A relation as the source described it, with the message that did.
#[derive(Debug)]
pub struct SourceRelation {
    /// The decoded description.
    pub relation: Relation,
    /// The message itself; it precedes the relation's first change in a spill file.
    pub message: Bytes,
}

impl SourceRelation {
    /// `schema.name`, for messages.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.schema(), self.relation.name)
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

#[derive(Debug)]
struct Open {
    xid: u32,
    commit_lsn: PgLsn,
    changes: Vec<Change>,
    counts: ChangeCounts,
    bytes: u64,
}

/// Puts the messages of one replication connection together.
#[derive(Debug)]
pub struct Assembler {
    relations: HashMap<u32, Arc<SourceRelation>>,
    open: Option<Open>,
    end_lsn: PgLsn,
}

impl Assembler {
    /// Starts with a connection that was asked to begin at `start`.
    pub fn new(start: PgLsn) -> Self {
        Self {
            relations: HashMap::new(),
            open: None,
            end_lsn: start,
        }
    }

    /// Takes one message; returns the transaction it completes.
    pub fn push(&mut self, data: Bytes) -> Result<Option<Transaction>, AssembleError> {
        match pgoutput::decode(&data, false)? {
            Message::Begin(begin) => {
                if self.open.is_some() {
                    return Err(AssembleError::OutOfPlace {
                        found: "Begin",
                        place: "inside a transaction",
                    });
                }
                self.open = Some(Open {
                    xid: begin.xid,
                    commit_lsn: begin.final_lsn,
                    changes: Vec::new(),
                    counts: ChangeCounts::default(),
                    bytes: 0,
                });
                Ok(None)
            }
            Message::Commit(commit) => self.commit(&commit).map(Some),
            Message::Relation(relation) => {
                // The source often repeats a description unchanged (after TRUNCATE, for one); keeping
                // the one we have keeps what others have learnt about it.
                if !self
                    .relations
                    .get(&relation.id)
                    .is_some_and(|known| known.relation == relation)
                {
                    // Copied, so that it does not keep the connection's whole read buffer alive.
                    let message = Bytes::copy_from_slice(&data);
                    let id = relation.id;
                    self.relations
                        .insert(id, Arc::new(SourceRelation { relation, message }));
                }
                Ok(None)
            }
            Message::Insert { relation, .. }
            | Message::Update { relation, .. }
            | Message::Delete { relation, .. } => {
                let relations = Relations::Row(self.relation(relation)?);
                self.change(Change {
                    relations,
                    message: data,
                })
            }
            Message::Truncate { relations, .. } => {
                let relations: Result<Arc<[_]>, _> =
                    relations.iter().map(|id| self.relation(*id)).collect();
                self.change(Change {
                    relations: Relations::Truncate(relations?),
                    message: data,
                })
            }
            // Types name what Relation messages already identify by OID; origins and logical
            // messages carry no rows.
            Message::Type { .. } | Message::Origin { .. } | Message::Message { .. } => Ok(None),
            _ => Err(AssembleError::OutOfPlace {
                found: "streaming or two-phase",
                place: "in a stream that asked for neither",
            }),
        }
    }

    fn relation(&self, id: u32) -> Result<Arc<SourceRelation>, AssembleError> {
        self.relations
            .get(&id)
            .map(Arc::clone)
            .ok_or(AssembleError::UnknownRelation(id))
    }

    fn change(&mut self, change: Change) -> Result<Option<Transaction>, AssembleError> {
        let open = self.open.as_mut().ok_or(AssembleError::OutOfPlace {
            found: "change",
            place: "outside a transaction",
        })?;
        open.bytes += change.bytes();
        open.counts.count(&change);
        open.changes.push(change);
        Ok(None)
    }

    fn commit(&mut self, commit: &pgoutput::Commit) -> Result<Transaction, AssembleError> {
        let open = self.open.take().ok_or(AssembleError::OutOfPlace {
            found: "Commit",
            place: "outside a transaction",
        })?;
        if open.commit_lsn < self.end_lsn || commit.commit_lsn != open.commit_lsn {
            return Err(AssembleError::OutOfOrder {
                xid: open.xid,
                commit_lsn: open.commit_lsn,
                previous: self.end_lsn,
            });
        }
        self.end_lsn = commit.end_lsn;
        Ok(Transaction {
            xid: open.xid,
            commit_lsn: commit.commit_lsn,
            end_lsn: commit.end_lsn,
            commit_time: commit.commit_time,
            spilled: None,
            changes: open.changes,
            counts: open.counts,
            bytes: open.bytes,
        })
    }

    /// Bytes of the transaction that is being received.
    pub fn pending_bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.bytes)
    }

    /// Takes the changes gathered so far out of the open transaction, to be put elsewhere.
    pub fn take_pending(&mut self) -> Vec<Change> {
        match &mut self.open {
            Some(open) => {
                open.bytes = 0;
                std::mem::take(&mut open.changes)
            }
            None => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::pgoutput::encode;
    use crate::testing::{lsn, table};

    #[test]
    fn a_transaction_comes_out_at_its_commit_with_the_relation_of_its_time() {
        let mut assembler = Assembler::new(lsn(5));
        let before = table(1, "t", &["id"]);
        let after = table(1, "t", &["id", "note"]);
        let row = [pgoutput::Value::Text(b"1")];
        assert!(
            assembler
                .push(encode::begin(lsn(10), 77, 3))
                .unwrap()
                .is_none()
        );
        assert!(assembler.push(encode::relation(&before)).unwrap().is_none());
        assert!(assembler.push(encode::insert(1, &row)).unwrap().is_none());
        assert!(assembler.push(encode::relation(&after)).unwrap().is_none());
        assert!(
            assembler
                .push(encode::insert(1, &[row[0], row[0]]))
                .unwrap()
                .is_none()
        );
        let transaction = assembler
            .push(encode::commit(lsn(10), lsn(12), 77))
            .unwrap()
            .unwrap();
        assert_eq!(transaction.counts.total(), 2);
        let columns = |i: usize| transaction.changes[i].relations()[0].relation.columns.len();
        assert_eq!((columns(0), columns(1)), (1, 2));
    }

    #[test]
    fn equality_of_end_and_next_commit_is_the_normal_case_and_going_back_is_not() {
        let mut assembler = Assembler::new(lsn(10));
        assembler.push(encode::begin(lsn(10), 0, 3)).unwrap();
        assembler.push(encode::commit(lsn(10), lsn(12), 0)).unwrap();
        assembler.push(encode::begin(lsn(11), 0, 4)).unwrap();
        let error = assembler
            .push(encode::commit(lsn(11), lsn(13), 0))
            .unwrap_err();
        assert!(
            matches!(error, AssembleError::OutOfOrder { xid: 4, .. }),
            "{error}"
        );
    }

    #[test]
    fn changes_outside_a_transaction_or_of_unknown_relations_are_errors() {
        let mut assembler = Assembler::new(lsn(1));
        let row = [pgoutput::Value::Null];
        let unknown = assembler.push(encode::insert(9, &row)).unwrap_err();
        assert!(matches!(unknown, AssembleError::UnknownRelation(9)));
        assembler
            .push(encode::relation(&table(9, "t", &["id"])))
            .unwrap();
        let outside = assembler.push(encode::insert(9, &row)).unwrap_err();
        assert!(matches!(outside, AssembleError::OutOfPlace { .. }));
    }

    #[test]
    fn what_is_taken_out_of_an_open_transaction_still_counts_as_its_changes() {
        let mut assembler = Assembler::new(lsn(1));
        assembler.push(encode::begin(lsn(10), 0, 3)).unwrap();
        assembler
            .push(encode::relation(&table(1, "t", &["id"])))
            .unwrap();
        assembler
            .push(encode::insert(1, &[pgoutput::Value::Null]))
            .unwrap();
        assert!(assembler.pending_bytes() > 0);
        assert_eq!(assembler.take_pending().len(), 1);
        assert_eq!(assembler.pending_bytes(), 0);
        let transaction = assembler
            .push(encode::commit(lsn(10), lsn(12), 0))
            .unwrap()
            .unwrap();
        assert_eq!(
            (transaction.counts.total(), transaction.changes.len()),
            (1, 0)
        );
    }
}
