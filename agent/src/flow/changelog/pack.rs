//! A batch becomes parts.
//!
//! # Invariants
//! - In memory is one part, and what the change that fills it is larger; of a spilled transaction one frame more.
//! - Transactions that end at or before the position the reader already has are left out, never part of one.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::{Compression, Part, VERSION, header_sum};
use crate::flow::batch::Batch;
use crate::flow::spill::{SpillError, SpillReader};
use crate::flow::transaction::{Change, SourceRelation, Transaction};
use crate::names::history::History;
use crate::pg::PgLsn;

/// zstd's default: TPC-B takes a fifth of its bytes at it, where batches are large.
const ZSTD_LEVEL: i32 = 3;

/// A part of at most so many bytes is compressed harder: there is little in it to refer back to, and it takes a millisecond.
const SMALL_BYTES: usize = 64 << 10;

/// For those.
const ZSTD_LEVEL_SMALL: i32 = 9;

fn level(bytes: usize) -> i32 {
    match bytes <= SMALL_BYTES {
        true => ZSTD_LEVEL_SMALL,
        false => ZSTD_LEVEL,
    }
}

/// Who writes: the same in every part.
#[derive(Clone, Debug)]
pub struct Author {
    /// Name of the stream.
    pub stream: String,
    /// What the LSNs are of.
    pub history: History,
    /// The term at which this agent writes.
    pub term: i64,
    /// Drawn at random for this run of the agent.
    pub writer: u64,
}

/// A batch that is being packed.
#[derive(Debug)]
pub struct Packing<'b> {
    author: &'b Author,
    batch: &'b Batch,
    previous: PgLsn,
    part_bytes: usize,
    compression: Compression,
    transactions: std::slice::Iter<'b, Transaction>,
    at: At<'b>,
    part: u32,
    gathered: BytesMut,
    /// Which description of each relation the batch holds last.
    described: HashMap<u32, Arc<SourceRelation>>,
}

/// How far the packing has come in a transaction.
#[derive(Debug)]
enum At<'b> {
    Between,
    Spilled(&'b Transaction, Box<SpillReader>),
    Changes(&'b Transaction, std::slice::Iter<'b, Change>),
    End,
}

impl<'b> Packing<'b> {
    /// Begins with a batch, without what ends at or before `after`. Parts hold `part_bytes` before compression.
    pub fn new(
        author: &'b Author,
        batch: &'b Batch,
        after: PgLsn,
        part_bytes: usize,
        compression: Compression,
    ) -> Self {
        let known = batch
            .transactions
            .partition_point(|transaction| transaction.end_lsn <= after);
        Self {
            author,
            batch,
            previous: batch.previous.max(after),
            part_bytes,
            compression,
            transactions: batch.transactions[known..].iter(),
            at: At::Between,
            part: 0,
            gathered: BytesMut::new(),
            described: HashMap::new(),
        }
    }

    /// The next part; `None` after the last, and of a batch of which nothing is new.
    ///
    /// # Errors
    /// When a spill file cannot be read back.
    pub fn next_part(&mut self) -> Result<Option<Part>, SpillError> {
        while self.gathered.len() <= self.part_bytes && !matches!(self.at, At::End) {
            self.step()?;
        }
        if self.gathered.is_empty() {
            return Ok(None);
        }
        let last = self.gathered.len() <= self.part_bytes;
        let length = self.gathered.len().min(self.part_bytes);
        let raw = self.gathered.split_to(length).freeze();
        let number = self.part;
        self.part += 1;
        let mut part = Part {
            version: VERSION,
            stream: self.author.stream.clone(),
            system_identifier: self.author.history.system_identifier,
            began: self.author.history.began,
            term: self.author.term,
            writer: self.author.writer,
            batch: self.batch.number.0,
            previous_end_lsn: self.previous.into(),
            end_lsn: self.batch.end_lsn().into(),
            commit_time: self.batch.commit_time(),
            part: number,
            parts: if last { number + 1 } else { 0 },
            compression: self.compression.into(),
            raw_bytes: raw.len() as u64,
            crc32c: crc32c::crc32c(&raw),
            messages: self.compressed(raw),
            header_crc32c: 0,
        };
        part.header_crc32c = header_sum(&part);
        Ok(Some(part))
    }

    fn compressed(&self, raw: Bytes) -> Bytes {
        match self.compression {
            Compression::Zstd => zstd::bulk::compress(&raw, level(raw.len()))
                .expect("zstd compresses into memory")
                .into(),
            Compression::None | Compression::Unspecified => raw,
        }
    }

    /// Gathers one change, or one frame of a spill file, or what stands between two transactions.
    fn step(&mut self) -> Result<(), SpillError> {
        match std::mem::replace(&mut self.at, At::End) {
            At::End => {}
            At::Between => {
                let Some(transaction) = self.transactions.next() else {
                    return Ok(());
                };
                self.begin(transaction);
                self.at = match &transaction.spilled {
                    Some(spilled) => At::Spilled(transaction, Box::new(spilled.reader()?)),
                    None => At::Changes(transaction, transaction.changes.iter()),
                };
            }
            At::Spilled(transaction, mut reader) => {
                self.at = match reader.next_changes()? {
                    None => At::Changes(transaction, transaction.changes.iter()),
                    Some(changes) => {
                        changes.iter().for_each(|change| self.change(change));
                        At::Spilled(transaction, reader)
                    }
                };
            }
            At::Changes(transaction, mut changes) => {
                self.at = match changes.next() {
                    None => {
                        self.commit(transaction);
                        At::Between
                    }
                    Some(change) => {
                        self.change(change);
                        At::Changes(transaction, changes)
                    }
                };
            }
        }
        Ok(())
    }

    fn change(&mut self, change: &Change) {
        for relation in change.relations() {
            let id = relation.relation.id;
            let known = self.described.get(&id);
            // A spill file describes its relations anew: equal is enough.
            if known.is_none_or(|known| !known.says_what(relation)) {
                self.described.insert(id, Arc::clone(relation));
                for message in relation.messages() {
                    self.message(&message);
                }
            }
        }
        self.message(&change.message);
    }

    fn message(&mut self, message: &[u8]) {
        self.length(message.len());
        self.gathered.put_slice(message);
    }

    fn length(&mut self, length: usize) {
        let length = u32::try_from(length).expect("PostgreSQL messages are below 2 GiB");
        self.gathered.put_u32(length);
    }

    /// Begin, as `logicalrep_write_begin` writes it.
    fn begin(&mut self, transaction: &Transaction) {
        self.length(1 + 8 + 8 + 4);
        self.gathered.put_u8(b'B');
        self.gathered.put_u64(transaction.commit_lsn.into());
        self.gathered.put_i64(transaction.commit_time);
        self.gathered.put_u32(transaction.xid);
    }

    /// Commit, as `logicalrep_write_commit` writes it.
    fn commit(&mut self, transaction: &Transaction) {
        self.length(1 + 1 + 8 + 8 + 8);
        self.gathered.put_u8(b'C');
        self.gathered.put_u8(0);
        self.gathered.put_u64(transaction.commit_lsn.into());
        self.gathered.put_u64(transaction.end_lsn.into());
        self.gathered.put_i64(transaction.commit_time);
    }
}
