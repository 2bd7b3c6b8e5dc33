//! ● Batching: transactions gather while the replica is busy; what has gathered is the next batch.
//!
//! Pure. There is no waiting for a batch to fill: an idle system ships each transaction at once, a
//! busy one ships thousands at a time, and the batch size finds itself (group commit does the same).
//!
//! # Invariants
//! - A batch is a gap-free run of whole transactions in commit order.
//! - Beyond its first transaction a batch stays within the limits on bytes and changes. A spilled
//!   transaction is a batch of its own.

use std::collections::VecDeque;
use std::time::Duration;

use crate::flow::ledger::BatchNumber;
use crate::flow::transaction::Transaction;
use crate::pg::PgLsn;
use crate::time::Micros;

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

    /// The latest commit time in it. It need not be the last one's: a transaction that the source has of another node by logical
    /// replication bears that one's time.
    pub fn newest(&self) -> Micros {
        let times = self.transactions.iter().map(|it| it.commit_time);
        times.max().unwrap_or(Micros::MIN)
    }

    /// Its last transaction.
    pub fn last(&self) -> &Transaction {
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
    /// Of what waits.
    bytes: u64,
    changes: u64,
}

impl Queue {
    /// A queue whose batches stay within these limits.
    pub fn new(bytes_max: u64, changes_max: u64) -> Self {
        Self {
            bytes_max,
            changes_max,
            waiting: VecDeque::new(),
            bytes: 0,
            changes: 0,
        }
    }

    /// Appends a transaction.
    pub fn push(&mut self, transaction: Transaction) {
        self.bytes += transaction.bytes;
        self.changes += transaction.counts.total();
        self.waiting.push_back(transaction);
    }

    /// Whether what waits fills a batch: waiting longer would not make it larger.
    pub fn is_full(&self) -> bool {
        self.bytes >= self.bytes_max || self.changes >= self.changes_max
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
        self.bytes -= bytes;
        self.changes -= changes;
        (!transactions.is_empty()).then_some(Batch {
            number,
            previous,
            transactions,
        })
    }
}

/// Batches between the pipeline and the last acknowledgement at most. Their bytes are bounded by
/// `limits.queue_bytes` as well; this many cover a round trip without a pause.
pub const IN_FLIGHT_MAX: usize = 4;

/// When the next batch may be shipped, given what is on its way.
///
/// Natural batching alone ships one batch, waits for its answer, and ships what has gathered: right on a
/// short way, where the answer is what tells that the replica is free. On a long one most of that time
/// nothing happens at either end. So a full batch may follow at once, and where the round trip is long,
/// one that is not full may follow after its share of the round trip.
#[derive(Clone, Copy, Debug)]
pub struct Spacing {
    in_flight_max: usize,
    /// Between batches that are not full; `None` where the replica is near.
    between: Option<Duration>,
    /// Between batches that are not full, whether or not there is an answer.
    least: Duration,
}

/// What [`Spacing::judge`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ship {
    /// Now.
    Now,
    /// Not before this time has passed.
    In(Duration),
    /// Not before a batch in flight has been answered.
    AfterAnAnswer,
}

impl Spacing {
    /// A replica that answers later than this is far: far above what a data centre needs, far below what
    /// two sites need.
    pub const FAR: Duration = Duration::from_millis(5);

    /// For a replica this far away.
    pub fn new(round_trip: Duration, in_flight_max: usize) -> Self {
        let share = u32::try_from(in_flight_max).unwrap_or(u32::MAX).max(1);
        Self {
            in_flight_max,
            between: (round_trip >= Self::FAR).then(|| round_trip / share),
            least: Duration::ZERO,
        }
    }

    /// For a sink where each batch has its price, however small: those that are not full follow one another at this
    /// distance.
    pub fn every(least: Duration, in_flight_max: usize) -> Self {
        Self {
            in_flight_max,
            between: Some(least),
            least,
        }
    }

    /// Judges, `since` after the last one was shipped.
    pub fn judge(&self, in_flight: usize, full: bool, since: Duration) -> Ship {
        match self.between {
            _ if !full && since < self.least => Ship::In(self.least - since),
            _ if in_flight == 0 => Ship::Now,
            _ if in_flight >= self.in_flight_max => Ship::AfterAnAnswer,
            _ if full => Ship::Now,
            None => Ship::AfterAnAnswer,
            Some(spacing) if since >= spacing => Ship::Now,
            Some(spacing) => Ship::In(spacing - since),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::counts::ChangeCounts;
    use crate::flow::testing::lsn;

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

    #[test]
    fn a_near_replica_gets_the_next_batch_with_its_answer_and_a_far_one_before() {
        let ms = Duration::from_millis;
        let near = Spacing::new(ms(1), 4);
        assert_eq!(near.judge(0, false, ms(0)), Ship::Now);
        assert_eq!(near.judge(1, false, ms(900)), Ship::AfterAnAnswer);
        assert_eq!(near.judge(3, true, ms(0)), Ship::Now);
        assert_eq!(near.judge(4, true, ms(0)), Ship::AfterAnAnswer);
        let far = Spacing::new(ms(80), 4);
        assert_eq!(far.judge(1, false, ms(5)), Ship::In(ms(15)));
        assert_eq!(far.judge(3, false, ms(20)), Ship::Now);
        assert_eq!(far.judge(4, false, ms(900)), Ship::AfterAnAnswer);
    }

    #[test]
    fn where_a_batch_has_its_price_one_that_is_not_full_waits_for_company() {
        let ms = Duration::from_millis;
        let spacing = Spacing::every(ms(100), 4);
        assert_eq!(spacing.judge(0, false, ms(100)), Ship::Now);
        assert_eq!(spacing.judge(0, false, ms(30)), Ship::In(ms(70)));
        assert_eq!(spacing.judge(3, false, ms(100)), Ship::Now);
        assert_eq!(spacing.judge(4, false, ms(100)), Ship::AfterAnAnswer);
        assert_eq!(spacing.judge(1, true, ms(0)), Ship::Now);
    }

    #[test]
    fn the_queue_is_full_when_one_batch_is() {
        let mut queue = Queue::new(100, 10);
        queue.push(transaction(10, 60, 1));
        assert!(!queue.is_full());
        queue.push(transaction(20, 60, 1));
        assert!(queue.is_full());
        assert_eq!(ends(&mut queue), [10]);
        assert!(!queue.is_full());
        queue.push(transaction(30, 1, 9));
        assert!(queue.is_full());
    }
}
