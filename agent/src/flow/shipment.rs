//! ● What gathers, what is on its way and what is settled: the one place between transactions that are received and batches
//! that are durable.
//!
//! ```text
//! received ─▶ waiting ─ship─▶ on its way ─durable─▶ FlushLsn; the permits are given back
//! ```
//! Pure. Whoever applies transactions has one: the pipeline, a replay of a log, whoever reads for the change log or for late
//! tables. When the next batch goes is theirs to say ([`Spacing`]); what it holds and when it is settled is said here.
//!
//! # Invariants
//! - Batches are numbered without gaps, and each begins where the one before ended: nothing is lost, and nothing goes twice.
//! - The permit of a transaction rides with it, and is dropped when its batch is durable, or with the shipment.
//!
//! # What it does not do
//! It sends nothing and looks at no clock.

use std::collections::VecDeque;
use std::time::Duration;

use super::batch::{Batch, Queue, Received, Ship, Spacing};
use super::ledger::{BatchNumber, FlushLsn, Ledger};
use crate::pg::PgLsn;
use crate::time::Micros;

/// The one sink that takes batches.
const SINK: usize = 0;

/// A batch on its way.
#[derive(Debug)]
struct OnItsWay<P> {
    number: BatchNumber,
    /// Commit time of its first transaction.
    oldest: Micros,
    permits: Vec<P>,
}

/// The transactions of one stream between their arrival and their end.
#[derive(Debug)]
pub struct Shipment<P> {
    waiting: Queue<P>,
    on_its_way: VecDeque<OnItsWay<P>>,
    ledger: Ledger,
}

impl<P> Shipment<P> {
    /// Begins behind the batch at which a progress row stands: everything up to there is durable. Its batches stay within
    /// these limits.
    pub fn resume(batch: BatchNumber, end_lsn: PgLsn, bytes_max: u64, changes_max: u64) -> Self {
        Self {
            waiting: Queue::new(bytes_max, changes_max),
            on_its_way: VecDeque::new(),
            ledger: Ledger::resume(SINK + 1, batch, end_lsn),
        }
    }

    /// From the beginning the change log lets the slot move up to `position` only.
    #[must_use]
    pub fn held(self, position: PgLsn) -> Self {
        Self {
            ledger: self.ledger.held(position),
            ..self
        }
    }

    /// The change log lets the slot move up to there, or wherever the sink is; returns the flush LSN if that moved.
    pub fn hold(&mut self, position: Option<PgLsn>) -> Option<FlushLsn> {
        self.ledger.hold(position)
    }

    /// A transaction has come, with its share of the memory.
    pub fn receive(&mut self, received: Received<P>) {
        self.waiting.push(received);
    }

    /// Whether the next batch may go, `since` after the last one; none where nothing waits.
    pub fn judge(&self, spacing: &Spacing, since: Duration) -> Option<Ship> {
        let full = self.waiting.is_full();
        (self.waiting.len() > 0).then(|| spacing.judge(self.in_flight(), full, since))
    }

    /// The next batch, which is on its way with this; none where nothing waits.
    pub fn ship(&mut self) -> Option<Batch> {
        let oldest = self.waiting.oldest_commit_time()?;
        let (last, end_lsn) = self.ledger.last();
        let (batch, permits) = self.waiting.take(last.next(), end_lsn)?;
        let number = batch.number;
        self.ledger.ship(number, batch.previous, batch.end_lsn());
        self.on_its_way.push_back(OnItsWay {
            number,
            oldest,
            permits,
        });
        Some(batch)
    }

    /// A batch is durable: its permits are given back. Returns the flush LSN if that moved it.
    ///
    /// # Panics
    /// If it is not on its way.
    pub fn durable(&mut self, batch: BatchNumber) -> Option<FlushLsn> {
        let flush = self.ledger.durable(SINK, batch);
        self.on_its_way.retain(|other| other.number != batch);
        flush
    }

    /// Everything before this is durable, and the change log has let it go.
    pub fn flush_lsn(&self) -> FlushLsn {
        self.ledger.flush_lsn()
    }

    /// Everything before this is durable, whatever the change log says.
    pub fn sunk(&self) -> PgLsn {
        self.ledger.sunk()
    }

    /// Where the batch that was shipped last ends.
    pub fn shipped(&self) -> PgLsn {
        self.ledger.last().1
    }

    /// Batches on their way.
    pub fn in_flight(&self) -> usize {
        self.on_its_way.len()
    }

    /// Transactions that were received and are not durable.
    pub fn transactions(&self) -> usize {
        let on_its_way = self.on_its_way.iter().map(|batch| batch.permits.len());
        self.waiting.len() + on_its_way.sum::<usize>()
    }

    /// Whether everything that was received is durable.
    pub fn is_settled(&self) -> bool {
        self.transactions() == 0
    }

    /// When the first of those committed.
    pub fn oldest_commit_time(&self) -> Option<Micros> {
        let first = self.on_its_way.front().map(|batch| batch.oldest);
        first.or_else(|| self.waiting.oldest_commit_time())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::flow::testing::{lsn, transaction};

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Permits are counted by who else holds this.
    fn receive(shipment: &mut Shipment<Rc<()>>, permit: &Rc<()>, end: u64) {
        shipment.receive(Received {
            transaction: transaction(end),
            permit: Rc::clone(permit),
        });
    }

    /// Two transactions fill a batch.
    fn shipment() -> Shipment<Rc<()>> {
        Shipment::resume(BatchNumber(7), lsn(100), 1_000, 2)
    }

    #[test]
    fn batches_lead_on_and_permits_ride_until_they_are_durable() {
        let (mut shipment, permit) = (shipment(), Rc::new(()));
        assert!(shipment.ship().is_none());
        for end in [110, 120, 130, 140, 150] {
            receive(&mut shipment, &permit, end);
        }
        let first = shipment.ship().unwrap();
        let second = shipment.ship().unwrap();
        assert_eq!((first.number, first.previous), (BatchNumber(8), lsn(100)));
        assert_eq!((second.number, second.previous), (BatchNumber(9), lsn(120)));
        assert_eq!(shipment.shipped(), lsn(140));
        assert_eq!((shipment.in_flight(), shipment.transactions()), (2, 5));
        assert_eq!(Rc::strong_count(&permit), 6);
        let flush = shipment.durable(BatchNumber(8)).unwrap();
        assert_eq!((flush.lsn(), shipment.sunk()), (lsn(120), lsn(120)));
        assert_eq!(Rc::strong_count(&permit), 4);
        // The sink has the batch still; its permits are not with it.
        drop(first);
        assert_eq!(shipment.oldest_commit_time(), Some(130));
        shipment.durable(BatchNumber(9)).unwrap();
        assert_eq!(shipment.oldest_commit_time(), Some(150));
        assert!(!shipment.is_settled());
        drop(shipment);
        assert_eq!(Rc::strong_count(&permit), 1);
    }

    #[test]
    fn whatever_is_answered_first_only_what_leads_on_is_told() {
        let (mut shipment, permit) = (shipment(), Rc::new(()));
        for end in [110, 120, 130, 140] {
            receive(&mut shipment, &permit, end);
        }
        shipment.ship();
        shipment.ship();
        assert_eq!(shipment.durable(BatchNumber(9)), None);
        assert_eq!((shipment.sunk(), shipment.transactions()), (lsn(100), 2));
        assert_eq!(shipment.oldest_commit_time(), Some(110));
        assert_eq!(shipment.durable(BatchNumber(8)).unwrap().lsn(), lsn(140));
        assert!(shipment.is_settled());
        assert_eq!(Rc::strong_count(&permit), 1);
    }

    #[test]
    #[should_panic(expected = "a sink reports only batches that were shipped")]
    fn what_was_settled_is_not_settled_again() {
        let (mut shipment, permit) = (shipment(), Rc::new(()));
        receive(&mut shipment, &permit, 110);
        shipment.ship();
        shipment.durable(BatchNumber(8));
        shipment.durable(BatchNumber(8));
    }

    #[test]
    fn what_the_change_log_holds_is_durable_and_not_told() {
        let (mut shipment, permit) = (shipment().held(lsn(90)), Rc::new(()));
        assert_eq!(shipment.flush_lsn().lsn(), lsn(90));
        receive(&mut shipment, &permit, 110);
        shipment.ship();
        assert_eq!(shipment.durable(BatchNumber(8)), None);
        assert_eq!((shipment.sunk(), shipment.is_settled()), (lsn(110), true));
        assert_eq!(shipment.hold(Some(lsn(105))).unwrap().lsn(), lsn(105));
        assert_eq!(shipment.hold(None).unwrap().lsn(), lsn(110));
    }

    #[test]
    fn it_is_judged_by_what_waits_and_what_is_on_its_way() {
        let (mut shipment, permit) = (shipment(), Rc::new(()));
        let near = Spacing::new(Duration::ZERO, 2);
        assert_eq!(shipment.judge(&near, ms(0)), None);
        receive(&mut shipment, &permit, 110);
        assert_eq!(shipment.judge(&near, ms(0)), Some(Ship::Now));
        shipment.ship();
        assert_eq!(shipment.judge(&near, ms(9)), None);
        receive(&mut shipment, &permit, 120);
        assert_eq!(shipment.judge(&near, ms(9)), Some(Ship::AfterAnAnswer));
        receive(&mut shipment, &permit, 130);
        assert_eq!(shipment.judge(&near, ms(0)), Some(Ship::Now));
        shipment.ship();
        receive(&mut shipment, &permit, 140);
        receive(&mut shipment, &permit, 150);
        assert_eq!(shipment.judge(&near, ms(9)), Some(Ship::AfterAnAnswer));
    }
}
