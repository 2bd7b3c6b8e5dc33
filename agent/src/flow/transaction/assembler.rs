//! ● Messages become transactions: the assembler behind the replication connection.
//!
//! Pure. pgoutput sends a transaction either whole (Begin, its changes, Commit) or, if it is large, in
//! blocks while it is still running (Stream Start, changes, Stream Stop), between which other
//! transactions come and go; then Stream Commit or Stream Abort says how it ended.
//!
//! ```text
//! Begin 7, I, I, Commit │ Start 5, I⁵, I⁶, Stop │ Begin 8, I, Commit │ Abort 5/6 │ Start 5, I⁵, Stop │ Commit 5
//!        ▼                                             ▼                                           ▼
//!  7: two changes                                8: one change                       5: two changes, without 6's
//! ```
//!
//! Relation ids are resolved while changes arrive, so that every change carries the relation as its
//! transaction saw it at that point.
//!
//! # Invariants
//! - Nothing downstream sees half a transaction: only a commit message lets one out, and it does not
//!   contain what a subtransaction did that was rolled back.
//! - Transactions come out in commit order, each beginning at or after the end of the one before.
//!   PostgreSQL guarantees `commit_lsn(N+1) >= end_lsn(N)`, often with equality.
//! - What a streamed transaction describes is its own until it commits.
//!
//! # What it does not do
//! It does not bound memory by itself: the caller watches [`Assembler::pending_bytes`] and moves
//! what has gathered into spill files ([`crate::flow::spill`]).

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::descriptions::Descriptions;
use super::open::{self, CommitPoint, Complete, OpenTransaction, Pending};
use super::{AssembleError, Change, Relations, SourceRelation, TypeNames};
use crate::pg::PgLsn;
use crate::pg::pgoutput::{self, Message, Relation, StreamAbort};

/// How a transaction ended.
#[derive(Debug)]
pub enum Ended {
    /// It committed.
    Committed(Box<Complete>),
    /// It was rolled back; nothing of it is left here.
    Aborted {
        /// Transaction id on the source.
        xid: u32,
    },
}

/// Puts the messages of one replication connection together.
#[derive(Debug)]
pub struct Assembler {
    /// What holds for every transaction that has not described the relation itself.
    described: Descriptions,
    types: TypeNames,
    arrivals: u64,
    /// Between Begin and Commit: the transaction, and where it commits.
    whole: Option<(OpenTransaction, PgLsn)>,
    /// Those that came in blocks and have not ended.
    streamed: HashMap<u32, Streamed>,
    /// Between Stream Start and Stream Stop.
    block: Option<u32>,
    end_lsn: PgLsn,
}

#[derive(Debug)]
struct Streamed {
    open: OpenTransaction,
    described: Descriptions,
}

impl Assembler {
    /// Starts with a connection that was asked to begin at `start`.
    pub fn new(start: PgLsn) -> Self {
        Self {
            described: Descriptions::default(),
            types: TypeNames::default(),
            arrivals: 0,
            whole: None,
            streamed: HashMap::new(),
            block: None,
            end_lsn: start,
        }
    }

    /// Takes one message; returns the transaction it ends.
    pub fn push(&mut self, data: Bytes) -> Result<Option<Ended>, AssembleError> {
        let streamed = self.block.is_some();
        // Most messages by far; their rows are decoded where they are folded, and only there.
        if let Some((maker, relation)) = pgoutput::row_change(&data, streamed) {
            let relations = Relations::Row(self.relation(relation)?);
            self.change(maker, relations, data)?;
            return Ok(None);
        }
        match pgoutput::decode(&data, streamed)? {
            Message::Begin(begin) => {
                self.expect_between("Begin")?;
                self.whole = Some((OpenTransaction::new(begin.xid), begin.final_lsn));
            }
            Message::Commit(commit) => {
                let point = CommitPoint {
                    commit_lsn: commit.commit_lsn,
                    end_lsn: commit.end_lsn,
                    commit_time: commit.commit_time,
                };
                return self.commit(point).map(Some);
            }
            Message::StreamStart { xid, first } => self.start_block(xid, first)?,
            Message::StreamStop => {
                self.block.take().ok_or(AssembleError::OutOfPlace {
                    found: "Stream Stop",
                    place: "outside a block",
                })?;
            }
            Message::StreamCommit(commit) => {
                let point = CommitPoint {
                    commit_lsn: commit.commit_lsn,
                    end_lsn: commit.end_lsn,
                    commit_time: commit.commit_time,
                };
                return self.stream_commit(commit.xid, point).map(Some);
            }
            Message::StreamAbort(abort) => return self.stream_abort(abort),
            Message::Relation(relation) => self.describe(relation, &data),
            // One that ends before its relation is no message, and `decode` has said so.
            Message::Insert { .. } | Message::Update { .. } | Message::Delete { .. } => {
                unreachable!("a row change with a relation was taken above")
            }
            Message::Truncate { xid, relations, .. } => {
                let relations: Result<Arc<[_]>, _> =
                    relations.iter().map(|id| self.relation(*id)).collect();
                self.change(xid, Relations::Truncate(relations?), data)?;
            }
            Message::Type {
                oid, schema, name, ..
            } => self.types.tell(oid, schema, name),
            // Origins and logical messages carry no rows.
            Message::Origin { .. } | Message::Message { .. } => {}
            Message::BeginPrepare(_)
            | Message::Prepare(_)
            | Message::CommitPrepared(_)
            | Message::RollbackPrepared(_)
            | Message::StreamPrepare(_) => {
                return Err(AssembleError::OutOfPlace {
                    found: "two-phase",
                    place: "in a stream that did not ask for it",
                });
            }
        }
        Ok(None)
    }

    /// The types of the relation that this message describes of which it is not known what they are made of; none of any other
    /// message.
    ///
    /// # Errors
    /// [`AssembleError`]
    pub fn unknown_types(&self, data: &Bytes) -> Result<Vec<u32>, AssembleError> {
        if data.first() != Some(&b'R') {
            return Ok(Vec::new());
        }
        Ok(match pgoutput::decode(data, self.block.is_some())? {
            Message::Relation(relation) => self.types.unknown_of(&relation),
            _ => Vec::new(),
        })
    }

    /// Takes in what a type is made of, for the descriptions that come; empty where the source has no such type.
    pub fn tell_made_of(&mut self, oid: u32, made_of: String) {
        self.types.tell_made_of(oid, made_of);
    }

    /// The transaction that is being received whole, between Begin and Commit: it has committed.
    pub fn whole(&self) -> Option<u32> {
        self.whole.as_ref().map(|(open, _)| open.xid)
    }

    /// The transaction that a block is of, between Stream Start and Stream Stop: it may not have ended.
    pub fn block(&self) -> Option<u32> {
        self.block
    }

    /// The end of the last transaction that came out.
    pub fn end_lsn(&self) -> PgLsn {
        self.end_lsn
    }

    /// Drops what has no end yet, for a new connection that is asked to begin at [`Assembler::end_lsn`] and
    /// sends all of it again.
    pub fn restart(&mut self) {
        *self = Self::new(self.end_lsn);
    }

    /// Bytes in memory of all transactions that are being received.
    pub fn pending_bytes(&self) -> u64 {
        self.open().map(OpenTransaction::bytes).sum()
    }

    /// The transaction that holds most of them.
    pub fn largest_open(&self) -> Option<u32> {
        self.open()
            .max_by_key(|open| open.bytes())
            .map(|open| open.xid)
    }

    /// Takes the changes gathered so far out of an open transaction, to be put elsewhere.
    pub fn take_pending(&mut self, xid: u32) -> Pending {
        let whole = self.whole.iter_mut().map(|(open, _)| open);
        let streamed = self
            .streamed
            .values_mut()
            .map(|streamed| &mut streamed.open);
        whole
            .chain(streamed)
            .find(|open| open.xid == xid)
            .map_or_else(Pending::default, OpenTransaction::take_pending)
    }

    fn open(&self) -> impl Iterator<Item = &OpenTransaction> {
        let whole = self.whole.iter().map(|(open, _)| open);
        whole.chain(self.streamed.values().map(|streamed| &streamed.open))
    }

    /// What ends or begins a transaction comes neither inside a whole one nor inside a block.
    fn expect_between(&self, found: &'static str) -> Result<(), AssembleError> {
        let place = if self.whole.is_some() {
            "inside a transaction"
        } else if self.block.is_some() {
            "inside a block of a streamed transaction"
        } else {
            return Ok(());
        };
        Err(AssembleError::OutOfPlace { found, place })
    }

    fn start_block(&mut self, xid: u32, first: bool) -> Result<(), AssembleError> {
        const FOUND: &str = "Stream Start";
        self.expect_between(FOUND)?;
        let wrong = |state| AssembleError::WrongTransaction {
            found: FOUND,
            xid,
            state,
        };
        match (first, self.streamed.contains_key(&xid)) {
            (true, true) => return Err(wrong("has begun already")),
            (false, false) => return Err(wrong("has not begun")),
            (false, true) => {}
            (true, false) => {
                let streamed = Streamed {
                    open: OpenTransaction::new(xid),
                    described: Descriptions::default(),
                };
                self.streamed.insert(xid, streamed);
            }
        }
        self.block = Some(xid);
        Ok(())
    }

    fn stream_commit(&mut self, xid: u32, point: CommitPoint) -> Result<Ended, AssembleError> {
        const FOUND: &str = "Stream Commit";
        self.expect_between(FOUND)?;
        let streamed = self
            .streamed
            .remove(&xid)
            .ok_or(AssembleError::WrongTransaction {
                found: FOUND,
                xid,
                state: "has not begun",
            })?;
        self.described.adopt(streamed.described);
        self.complete(streamed.open, point)
    }

    fn stream_abort(&mut self, abort: StreamAbort) -> Result<Option<Ended>, AssembleError> {
        self.expect_between("Stream Abort")?;
        let StreamAbort { xid, subxid, .. } = abort;
        if subxid == xid {
            let known = self.streamed.remove(&xid).is_some();
            return Ok(known.then_some(Ended::Aborted { xid }));
        }
        // PostgreSQL 18 tells of subtransactions it has never sent, even to clients that did not ask
        // for streaming (its bug 19616). What is not here need not be dropped.
        if let Some(streamed) = self.streamed.get_mut(&xid) {
            streamed.open.abort(subxid);
        }
        Ok(None)
    }

    fn commit(&mut self, point: CommitPoint) -> Result<Ended, AssembleError> {
        let (open, commit_lsn) = self.whole.take().ok_or(AssembleError::OutOfPlace {
            found: "Commit",
            place: "outside a transaction",
        })?;
        if commit_lsn != point.commit_lsn {
            return Err(self.out_of_order(open.xid, commit_lsn));
        }
        self.complete(open, point)
    }

    fn complete(
        &mut self,
        open: OpenTransaction,
        point: CommitPoint,
    ) -> Result<Ended, AssembleError> {
        if point.commit_lsn < self.end_lsn {
            return Err(self.out_of_order(open.xid, point.commit_lsn));
        }
        self.end_lsn = point.end_lsn;
        Ok(Ended::Committed(Box::new(Complete::new(open, point))))
    }

    fn out_of_order(&self, xid: u32, commit_lsn: PgLsn) -> AssembleError {
        AssembleError::OutOfOrder {
            xid,
            commit_lsn,
            previous: self.end_lsn,
        }
    }

    /// The source often repeats a description unchanged (after TRUNCATE, for one, and for every streamed
    /// transaction); keeping the one we have keeps what others have learnt about it.
    fn describe(&mut self, relation: Relation, data: &Bytes) {
        let types = self.types.of(&relation);
        let known = std::iter::once(&self.described)
            .chain(self.streamed.values().map(|streamed| &streamed.described))
            .find_map(|described| described.same(&relation, &types));
        let relation = known.unwrap_or_else(|| {
            // Copied, so that it does not keep the connection's whole read buffer alive.
            let message = if self.block.is_some() {
                let mut plain = BytesMut::with_capacity(data.len());
                pgoutput::put_without_xid(data, &mut plain);
                plain.freeze()
            } else {
                Bytes::copy_from_slice(data)
            };
            Arc::new(SourceRelation {
                relation,
                message,
                types,
            })
        });
        self.arrivals += 1;
        let described = match self.block.and_then(|xid| self.streamed.get_mut(&xid)) {
            Some(streamed) => &mut streamed.described,
            None => &mut self.described,
        };
        described.describe(relation, self.arrivals);
    }

    fn relation(&self, id: u32) -> Result<Arc<SourceRelation>, AssembleError> {
        self.block
            .and_then(|xid| self.streamed.get(&xid))
            .and_then(|streamed| streamed.described.get(id))
            .or_else(|| self.described.get(id))
            .ok_or(AssembleError::UnknownRelation(id))
    }

    fn change(
        &mut self,
        maker: Option<u32>,
        relations: Relations,
        data: Bytes,
    ) -> Result<(), AssembleError> {
        let streamed = self.block.and_then(|xid| self.streamed.get_mut(&xid));
        if let (Some(streamed), Some(maker)) = (streamed, maker) {
            let message = streamed.open.keep(data);
            streamed.open.push(maker, Change { relations, message });
            return Ok(());
        }
        let (open, _) = self.whole.as_mut().ok_or(AssembleError::OutOfPlace {
            found: "change",
            place: "outside a transaction",
        })?;
        // The connection's blocks may be full of streamed messages, which are copied out of them; a small
        // transaction among those would keep a block alive that nobody has counted.
        let message = match self.streamed.is_empty() || open::is_alone(&data) {
            true => data,
            false => Bytes::copy_from_slice(&data),
        };
        open.push(open.xid, Change { relations, message });
        Ok(())
    }
}
