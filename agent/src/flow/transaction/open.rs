//! ● A transaction that is being received, and one that is complete.
//!
//! Pure. Every change is kept with its maker, the (sub)transaction that made it, until it is certain
//! that the maker was not rolled back.
//!
//! # Invariants
//! - [`OpenTransaction::bytes`] covers all memory the changes hold, those of rolled back subtransactions included:
//!   they share blocks with the others and are let go together with them.
//! - Counts are those of the changes that survive, wherever they are.
//!
//! # What it does not do
//! Of every subtransaction that changed something a few dozen bytes stay in memory until the end,
//! whatever the limits (the walsender keeps ten times as much of each).

use std::collections::{HashMap, HashSet};

use bytes::{Bytes, BytesMut};

use super::{Change, Transaction};
use crate::flow::counts::ChangeCounts;
use crate::pg::PgLsn;
use crate::pg::pgoutput;
use crate::time::Micros;

/// Messages of a streamed transaction are gathered in blocks of this size, so that they do not keep the
/// connection's blocks alive, which hold messages of other transactions as well.
const BLOCK_BYTES: usize = 32 * 1024;

/// A message of this size that has its memory to itself, as one with a large value comes, is not copied.
const ALONE_BYTES: usize = 1 << 20;

/// Whether a message is large, and nobody else's memory.
pub(super) fn is_alone(message: &Bytes) -> bool {
    message.len() >= ALONE_BYTES && message.is_unique()
}

/// A transaction without its end.
#[derive(Debug)]
pub(super) struct OpenTransaction {
    pub(super) xid: u32,
    pending: Pending,
    /// Of the changes the transaction made outside subtransactions.
    counts: ChangeCounts,
    /// Of every subtransaction that made changes and was not rolled back so far.
    subtransactions: HashMap<u32, ChangeCounts>,
    /// Subtransactions that made changes and were rolled back.
    aborted: HashSet<u32>,
    bytes: u64,
    block: BytesMut,
    /// One that was rolled back since counts, too.
    has_barrier: bool,
}

/// Changes in order, each with the (sub)transaction that made it.
#[derive(Debug, Default)]
pub struct Pending {
    makers: Vec<u32>,
    changes: Vec<Change>,
}

impl Pending {
    /// The changes with their makers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Change)> {
        self.makers.iter().copied().zip(&self.changes)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    fn push(&mut self, maker: u32, change: Change) {
        self.makers.push(maker);
        self.changes.push(change);
    }

    fn drop_aborted(&mut self, aborted: &HashSet<u32>) {
        if aborted.is_empty() {
            return;
        }
        let mut makers = self.makers.iter();
        self.changes
            .retain(|_| makers.next().is_some_and(|maker| !aborted.contains(maker)));
        self.makers.retain(|maker| !aborted.contains(maker));
    }
}

impl FromIterator<(u32, Change)> for Pending {
    fn from_iter<I: IntoIterator<Item = (u32, Change)>>(changes: I) -> Self {
        let (makers, changes) = changes.into_iter().unzip();
        Self { makers, changes }
    }
}

impl OpenTransaction {
    pub(super) fn new(xid: u32) -> Self {
        Self {
            xid,
            pending: Pending::default(),
            counts: ChangeCounts::default(),
            subtransactions: HashMap::new(),
            aborted: HashSet::new(),
            bytes: 0,
            block: BytesMut::new(),
            has_barrier: false,
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The message of a streamed block as it would be outside of one, in memory of this transaction.
    pub(super) fn keep(&mut self, streamed: Bytes) -> Bytes {
        let streamed = match streamed.try_into_mut() {
            Ok(owned) if owned.len() >= ALONE_BYTES => return pgoutput::without_xid(owned),
            Ok(small) => small.freeze(),
            Err(shared) => shared,
        };
        if self.block.capacity() < streamed.len() {
            self.block = BytesMut::with_capacity(BLOCK_BYTES.max(streamed.len()));
        }
        pgoutput::put_without_xid(&streamed, &mut self.block);
        self.block.split().freeze()
    }

    pub(super) fn push(&mut self, maker: u32, change: Change) {
        let counts = if maker == self.xid {
            &mut self.counts
        } else {
            self.subtransactions.entry(maker).or_default()
        };
        counts.count(&change.message);
        self.bytes += change.bytes();
        self.has_barrier |= change.is_of_barriers();
        self.pending.push(maker, change);
    }

    /// A subtransaction was rolled back. Those nested in it are told of one by one.
    pub(super) fn abort(&mut self, subxid: u32) {
        // One that changed nothing, or whose changes were not sent yet, is not known here.
        if self.subtransactions.remove(&subxid).is_some() {
            self.aborted.insert(subxid);
        }
    }

    /// Takes out what is in memory and has survived so far.
    pub(super) fn take_pending(&mut self) -> Pending {
        self.bytes = 0;
        self.block = BytesMut::new();
        let mut pending = std::mem::take(&mut self.pending);
        pending.drop_aborted(&self.aborted);
        pending
    }
}

/// Where and when a transaction committed.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitPoint {
    pub(super) commit_lsn: PgLsn,
    pub(super) end_lsn: PgLsn,
    pub(super) commit_time: Micros,
}

/// A transaction with its commit; what was taken out of it is elsewhere.
#[derive(Debug)]
pub struct Complete {
    open: OpenTransaction,
    commit: CommitPoint,
}

impl Complete {
    pub(super) fn new(open: OpenTransaction, commit: CommitPoint) -> Self {
        Self { open, commit }
    }

    /// Transaction id on the source.
    pub fn xid(&self) -> u32 {
        self.open.xid
    }

    /// First byte after its commit record.
    pub fn end_lsn(&self) -> PgLsn {
        self.commit.end_lsn
    }

    /// Commit time on the source's clock.
    pub fn commit_time(&self) -> Micros {
        self.commit.commit_time
    }

    /// Subtransactions whose changes are part of it.
    pub fn subtransactions(&self) -> impl Iterator<Item = u32> {
        self.open.subtransactions.keys().copied()
    }

    /// Drops the changes of a subtransaction that turns out to have been rolled back.
    pub fn abort(&mut self, subxid: u32) {
        self.open.abort(subxid);
    }

    /// The transaction, and the subtransactions whose changes must be left out where they have been
    /// taken to.
    pub fn into_transaction(self) -> (Transaction, HashSet<u32>) {
        let Self { mut open, commit } = self;
        open.block = BytesMut::new();
        open.pending.drop_aborted(&open.aborted);
        let mut changes = open.pending.changes;
        let bytes = changes.iter().map(Change::bytes).sum();
        if bytes < open.bytes / 2 {
            // Most of the memory is of changes that were rolled back: do not keep it for the rest.
            for change in &mut changes {
                change.message = Bytes::copy_from_slice(&change.message);
            }
        }
        let mut counts = open.counts;
        for of_subtransaction in open.subtransactions.values() {
            counts.add(of_subtransaction);
        }
        let transaction = Transaction {
            xid: open.xid,
            commit_lsn: commit.commit_lsn,
            end_lsn: commit.end_lsn,
            commit_time: commit.commit_time,
            spilled: None,
            changes,
            counts,
            bytes,
            has_barrier: open.has_barrier,
        };
        (transaction, open.aborted)
    }
}
