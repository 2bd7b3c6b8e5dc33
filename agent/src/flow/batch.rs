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

    /// Whether it is one transaction with a barrier.
    pub fn has_barrier(&self) -> bool {
        self.transactions.iter().any(|it| it.has_barrier)
    }

    /// Its last transaction.
    pub fn last(&self) -> &Transaction {
        self.transactions
            .last()
            .expect("a batch has at least one transaction")
    }
}

/// A transaction that was received, with its share of the memory that what waits may take.
#[derive(Debug)]
pub struct Received<P> {
    /// The transaction.
    pub transaction: Transaction,
    /// Given back when it is dropped: once the transaction is durable, or nobody wants it any more.
    pub permit: P,
}

/// Transactions that wait for the replica.
#[derive(Debug)]
pub(super) struct Queue<P> {
    bytes_max: u64,
    changes_max: u64,
    waiting: VecDeque<Received<P>>,
    /// Of what waits.
    bytes: u64,
    changes: u64,
}

impl<P> Queue<P> {
    /// A queue whose batches stay within these limits.
    pub(super) fn new(bytes_max: u64, changes_max: u64) -> Self {
        Self {
            bytes_max,
            changes_max,
            waiting: VecDeque::new(),
            bytes: 0,
            changes: 0,
        }
    }

    /// Appends a transaction.
    pub(super) fn push(&mut self, received: Received<P>) {
        self.bytes += received.transaction.bytes;
        self.changes += received.transaction.counts.total();
        self.waiting.push_back(received);
    }

    /// Whether what waits fills a batch: waiting longer would not make it larger.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= self.bytes_max || self.changes >= self.changes_max
    }

    /// Commit time of the transaction that waits longest.
    pub(super) fn oldest_commit_time(&self) -> Option<Micros> {
        let first = self.waiting.front();
        first.map(|received| received.transaction.commit_time)
    }

    /// How many transactions wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes the next batch out, with the permits of its transactions; `None` if nothing waits.
    pub(super) fn take(&mut self, number: BatchNumber, previous: PgLsn) -> Option<(Batch, Vec<P>)> {
        let (mut transactions, mut permits) = (Vec::new(), Vec::new());
        let (mut bytes, mut changes) = (0, 0);
        while let Some(first) = self.waiting.front() {
            let next = &first.transaction;
            let alone = next.spilled.is_some() || next.has_barrier;
            let full = bytes + next.bytes > self.bytes_max
                || changes + next.counts.total() > self.changes_max;
            if !transactions.is_empty() && (alone || full) {
                break;
            }
            bytes += next.bytes;
            changes += next.counts.total();
            if let Some(received) = self.waiting.pop_front() {
                transactions.push(received.transaction);
                permits.push(received.permit);
            }
            if alone {
                break;
            }
        }
        self.bytes -= bytes;
        self.changes -= changes;
        let batch = Batch {
            number,
            previous,
            transactions,
        };
        (!batch.transactions.is_empty()).then_some((batch, permits))
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
    use crate::flow::testing::{lsn, transaction};

    fn received(end: u64, bytes: u64, changes: u64) -> Received<()> {
        Received {
            transaction: Transaction {
                bytes,
                counts: ChangeCounts([changes, 0, 0, 0]),
                ..transaction(end)
            },
            permit: (),
        }
    }

    fn ends(queue: &mut Queue<()>) -> Vec<u64> {
        let batch = queue.take(BatchNumber(1), lsn(0));
        batch.map_or_else(Vec::new, |(batch, permits)| {
            assert_eq!(batch.transactions.len(), permits.len());
            let transactions = batch.transactions.iter();
            transactions.map(|t| u64::from(t.end_lsn)).collect()
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
            queue.push(received(end, bytes, changes));
        }
        assert_eq!(queue.oldest_commit_time(), Some(10));
        assert_eq!(ends(&mut queue), [10, 20]);
        assert_eq!(ends(&mut queue), [30, 40]);
        assert_eq!(ends(&mut queue), [50]);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn a_transaction_with_a_barrier_goes_out_alone() {
        let mut queue = Queue::new(100, 10);
        for (end, has_barrier) in [(10, false), (20, true), (30, true), (40, false)] {
            let mut one = received(end, 1, 1);
            one.transaction.has_barrier = has_barrier;
            queue.push(one);
        }
        assert_eq!(ends(&mut queue), [10]);
        assert_eq!(ends(&mut queue), [20]);
        assert_eq!(ends(&mut queue), [30]);
        assert_eq!(ends(&mut queue), [40]);
    }

    #[test]
    fn a_transaction_over_the_limit_still_goes_out_alone() {
        let mut queue = Queue::new(100, 10);
        queue.push(received(10, 1_000, 1));
        queue.push(received(20, 1, 1));
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
        queue.push(received(10, 60, 1));
        assert!(!queue.is_full());
        queue.push(received(20, 60, 1));
        assert!(queue.is_full());
        assert_eq!(ends(&mut queue), [10]);
        assert!(!queue.is_full());
        queue.push(received(30, 1, 9));
        assert!(queue.is_full());
    }
}
