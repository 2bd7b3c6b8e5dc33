//! Batching: transactions gather while the replica is busy; what has gathered is the next batch.
//!
//! Pure. There is no waiting for a batch to fill: an idle system ships each transaction at once, a
//! busy one ships thousands at a time, and the batch size finds itself (group commit does the same).
//!
//! # Invariants
//! - A batch is a gap-free run of whole transactions in commit order.
//! - Beyond its first transaction a batch stays within the limits on bytes and changes. A spilled
//!   transaction is a batch of its own.

use std::collections::VecDeque;

use crate::lag::Micros;
use crate::ledger::BatchNumber;
use crate::pg::PgLsn;
use crate::txn::Transaction;

/// A numbered, gap-free run of whole transactions in commit order.
#[derive(Debug)]
pub struct Batch {
    /// Its number.
    pub number: BatchNumber,
    /// Where it begins: the end of the batch before.
    pub previous: PgLsn,
    /// Its transactions; at least one.
    pub transactions: Vec<Transaction>,
}

impl Batch {
    /// First byte after its last transaction.
    pub fn end_lsn(&self) -> PgLsn {
        self.last().end_lsn
    }

    /// Commit time of its last transaction.
    pub fn commit_time(&self) -> Micros {
        self.last().commit_time
    }

    fn last(&self) -> &Transaction {
        self.transactions
            .last()
            .expect("a batch has at least one transaction")
    }
}

/// Transactions that wait for the replica.
#[derive(Debug)]
pub struct Queue {
    bytes_max: u64,
    changes_max: u64,
    waiting: VecDeque<Transaction>,
}

impl Queue {
    /// A queue whose batches stay within these limits.
    pub fn new(bytes_max: u64, changes_max: u64) -> Self {
        Self {
            bytes_max,
            changes_max,
            waiting: VecDeque::new(),
        }
    }

    /// Appends a transaction.
    pub fn push(&mut self, transaction: Transaction) {
        self.waiting.push_back(transaction);
    }

    /// Commit time of the transaction that waits longest.
    pub fn oldest_commit_time(&self) -> Option<Micros> {
        self.waiting
            .front()
            .map(|transaction| transaction.commit_time)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes the next batch out; `None` if nothing waits.
    pub fn take(&mut self, number: BatchNumber, previous: PgLsn) -> Option<Batch> {
        let mut transactions = Vec::new();
        let (mut bytes, mut changes) = (0, 0);
        while let Some(next) = self.waiting.front() {
            let alone = next.spilled.is_some();
            let full = bytes + next.bytes > self.bytes_max
                || changes + next.counts.total() > self.changes_max;
            if !transactions.is_empty() && (alone || full) {
                break;
            }
            bytes += next.bytes;
            changes += next.counts.total();
            transactions.extend(self.waiting.pop_front());
            if alone {
                break;
            }
        }
        (!transactions.is_empty()).then_some(Batch {
            number,
            previous,
            transactions,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changes::ChangeCounts;
    use crate::testing::lsn;

    fn transaction(end: u64, bytes: u64, changes: u64) -> Transaction {
        Transaction {
            xid: 1,
            commit_lsn: lsn(end - 1),
            end_lsn: lsn(end),
            commit_time: i64::try_from(end).unwrap(),
            spilled: None,
            changes: Vec::new(),
            counts: ChangeCounts([changes, 0, 0, 0]),
            bytes,
        }
    }

    fn ends(queue: &mut Queue) -> Vec<u64> {
        let batch = queue.take(BatchNumber(1), lsn(0));
        batch.map_or_else(Vec::new, |batch| {
            batch
                .transactions
                .iter()
                .map(|t| u64::from(t.end_lsn))
                .collect()
        })
    }

    #[test]
    fn everything_that_waits_becomes_one_batch_within_the_limits() {
        let mut queue = Queue::new(100, 10);
        for (end, bytes, changes) in [
            (10, 40, 1),
            (20, 40, 1),
            (30, 40, 1),
            (40, 1, 9),
            (50, 1, 9),
        ] {
            queue.push(transaction(end, bytes, changes));
        }
        assert_eq!(queue.oldest_commit_time(), Some(10));
        assert_eq!(ends(&mut queue), [10, 20]);
        assert_eq!(ends(&mut queue), [30, 40]);
        assert_eq!(ends(&mut queue), [50]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_transaction_over_the_limit_still_goes_out_alone() {
        let mut queue = Queue::new(100, 10);
        queue.push(transaction(10, 1_000, 1));
        queue.push(transaction(20, 1, 1));
        assert_eq!(ends(&mut queue), [10]);
        assert_eq!(ends(&mut queue), [20]);
        assert_eq!(ends(&mut queue), [0; 0]);
    }
}
