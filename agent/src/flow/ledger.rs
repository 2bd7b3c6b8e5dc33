//! ● Which batches are durable where, and therefore what the slot may be told.
//!
//! Pure. The pipeline registers a batch when it is shipped and reports each sink's outcome; the
//! source task takes the resulting [`FlushLsn`] and sends it in its next status update.
//!
//! # Invariants
//! - Only this file constructs a [`FlushLsn`]; only a [`FlushLsn`] is ever sent to the walsender. Losing
//!   data by acknowledging too early needs a bug here.
//! - A flush LSN is the end of a batch that every required sink has made durable, with every batch
//!   before it, or what the change log of the archive has before that. It never moves backwards.
//!
//! # What it does not do
//! It does not ship, retry or look at a clock.

use std::collections::VecDeque;

use crate::pg::PgLsn;

/// A position up to which every required sink is durable: the only thing the slot is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushLsn(PgLsn);

impl FlushLsn {
    /// The position, for the wire and for metrics.
    pub fn lsn(self) -> PgLsn {
        self.0
    }
}

/// Number of a batch; consecutive within a stream, over restarts too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BatchNumber(pub i64);

impl BatchNumber {
    /// The number of the batch that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Index of a required sink, in the order the ledger was created with.
pub type SinkIndex = usize;

#[derive(Debug)]
struct Shipped {
    batch: BatchNumber,
    end_lsn: PgLsn,
    durable: Vec<bool>,
}

/// The acknowledgements of one stream.
#[derive(Debug)]
pub struct Ledger {
    sinks: usize,
    /// What all sinks that take batches have.
    flush: FlushLsn,
    /// How far the change log lets the slot move, if it does not let it go.
    hold: Option<PgLsn>,
    /// What the slot was told.
    told: FlushLsn,
    last: (BatchNumber, PgLsn),
    in_flight: VecDeque<Shipped>,
}

impl Ledger {
    /// Starts where the replica's progress row stands: everything up to there is durable.
    pub fn resume(sinks: usize, batch: BatchNumber, end_lsn: PgLsn) -> Self {
        assert!(
            sinks > 0,
            "a ledger without sinks would acknowledge everything"
        );
        Self {
            sinks,
            flush: FlushLsn(end_lsn),
            hold: None,
            told: FlushLsn(end_lsn),
            last: (batch, end_lsn),
            in_flight: VecDeque::new(),
        }
    }

    /// From the beginning the change log lets the slot move up to `position` only.
    #[must_use]
    pub fn held(self, position: PgLsn) -> Self {
        Self {
            hold: Some(position),
            told: self.flush.min(FlushLsn(position)),
            ..self
        }
    }

    /// The change log lets the slot move up to there, or wherever the sinks are; returns the flush LSN if that moved.
    pub fn hold(&mut self, position: Option<PgLsn>) -> Option<FlushLsn> {
        self.hold = position;
        self.tell()
    }

    /// Registers a batch that is about to be shipped to every sink.
    ///
    /// # Panics
    /// If the batch does not follow the one registered before: that would be a gap.
    pub fn ship(&mut self, batch: BatchNumber, previous: PgLsn, end_lsn: PgLsn) {
        let (last, last_end) = self.last;
        assert_eq!(batch, last.next(), "batches are numbered without gaps");
        assert_eq!(
            previous, last_end,
            "batch {batch:?} does not begin where {last:?} ended"
        );
        assert!(end_lsn > previous, "batch {batch:?} ends before it begins");
        self.last = (batch, end_lsn);
        self.in_flight.push_back(Shipped {
            batch,
            end_lsn,
            durable: vec![false; self.sinks],
        });
    }

    /// Notes that `sink` has made `batch` durable; returns the flush LSN when that moved it.
    ///
    /// # Panics
    /// If that batch was never shipped, or the same sink reports it twice.
    pub fn durable(&mut self, sink: SinkIndex, batch: BatchNumber) -> Option<FlushLsn> {
        let shipped = self
            .in_flight
            .iter_mut()
            .find(|shipped| shipped.batch == batch)
            .expect("a sink reports only batches that were shipped to it");
        assert!(
            !shipped.durable[sink],
            "sink {sink} reported {batch:?} twice"
        );
        shipped.durable[sink] = true;
        while self
            .in_flight
            .front()
            .is_some_and(|oldest| oldest.durable.iter().all(|done| *done))
        {
            let oldest = self
                .in_flight
                .pop_front()
                .expect("the loop has just seen it");
            assert!(
                oldest.end_lsn > self.flush.0,
                "the flush LSN never moves backwards"
            );
            self.flush = FlushLsn(oldest.end_lsn);
        }
        self.tell()
    }

    fn tell(&mut self) -> Option<FlushLsn> {
        let now = self
            .hold
            .map_or(self.flush, |hold| FlushLsn(hold).min(self.flush));
        // A log that is held up later on does not take back what the slot was told.
        let moved = now > self.told;
        self.told = self.told.max(now);
        moved.then_some(now)
    }

    /// Everything before this is durable in every required sink, and the change log has let it go.
    pub fn flush_lsn(&self) -> FlushLsn {
        self.told
    }

    /// Everything before this is durable in the sinks that take batches, whatever the change log says.
    pub fn sunk(&self) -> PgLsn {
        self.flush.0
    }

    /// Batches shipped and not yet durable in every sink that takes batches.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Number and end of the batch shipped last: where the next one begins.
    pub fn last(&self) -> (BatchNumber, PgLsn) {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lsn(n: u64) -> PgLsn {
        PgLsn::from(n)
    }

    #[test]
    fn flush_lsn_waits_for_the_slowest_required_sink() {
        let mut ledger = Ledger::resume(2, BatchNumber(7), lsn(100));
        ledger.ship(BatchNumber(8), lsn(100), lsn(200));
        assert_eq!(ledger.durable(0, BatchNumber(8)), None);
        assert_eq!(ledger.flush_lsn().lsn(), lsn(100));
        assert_eq!(
            ledger.durable(1, BatchNumber(8)).map(FlushLsn::lsn),
            Some(lsn(200))
        );
    }

    #[test]
    fn flush_lsn_waits_for_the_change_log_and_never_goes_back_with_it() {
        let mut ledger = Ledger::resume(1, BatchNumber(0), lsn(10)).held(lsn(5));
        assert_eq!(ledger.flush_lsn().lsn(), lsn(5));
        ledger.ship(BatchNumber(1), lsn(10), lsn(20));
        ledger.ship(BatchNumber(2), lsn(20), lsn(30));
        assert_eq!(ledger.durable(0, BatchNumber(1)), None);
        assert_eq!((ledger.in_flight(), ledger.sunk()), (1, lsn(20)));
        let flush = |moved: Option<FlushLsn>| moved.map(FlushLsn::lsn);
        assert_eq!(flush(ledger.hold(Some(lsn(10)))), Some(lsn(10)));
        // It is ahead of the replica: batches reach the spool first.
        assert_eq!(flush(ledger.hold(Some(lsn(30)))), Some(lsn(20)));
        assert_eq!(flush(ledger.hold(Some(lsn(20)))), None);
        assert_eq!(flush(ledger.durable(0, BatchNumber(2))), None);
        // A spool that takes nothing lets go, and what was told then stays told.
        assert_eq!(flush(ledger.hold(None)), Some(lsn(30)));
        assert_eq!(flush(ledger.hold(Some(lsn(20)))), None);
        assert_eq!(ledger.flush_lsn().lsn(), lsn(30));
    }

    #[test]
    fn a_later_batch_does_not_overtake_an_earlier_one() {
        let mut ledger = Ledger::resume(1, BatchNumber(0), lsn(10));
        ledger.ship(BatchNumber(1), lsn(10), lsn(20));
        ledger.ship(BatchNumber(2), lsn(20), lsn(30));
        assert_eq!(ledger.durable(0, BatchNumber(2)), None);
        assert_eq!(
            ledger.durable(0, BatchNumber(1)).map(FlushLsn::lsn),
            Some(lsn(30))
        );
        assert_eq!(ledger.in_flight(), 0);
    }

    proptest! {
        /// Any order of completion ends at the same flush LSN, which never decreases and never
        /// passes a batch that some sink has not reported.
        #[test]
        fn any_completion_order_gives_the_same_flush_lsn(
            batches in 1usize..12, sinks in 1usize..4, seed in any::<u64>(),
        ) {
            let mut ledger = Ledger::resume(sinks, BatchNumber(0), lsn(0));
            for n in 1..=batches {
                ledger.ship(BatchNumber(n as i64), lsn((n as u64 - 1) * 10), lsn(n as u64 * 10));
            }
            let mut reports: Vec<(usize, usize)> =
                (1..=batches).flat_map(|b| (0..sinks).map(move |s| (s, b))).collect();
            let mut state = seed | 1;
            for i in (1..reports.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                reports.swap(i, (state >> 33) as usize % (i + 1));
            }
            let mut reported = vec![0usize; batches + 1];
            let mut before = ledger.flush_lsn();
            for (sink, batch) in reports {
                reported[batch] += 1;
                ledger.durable(sink, BatchNumber(batch as i64));
                let complete = (1..=batches).take_while(|b| reported[*b] == sinks).count() as u64;
                prop_assert_eq!(ledger.flush_lsn().lsn(), lsn(complete * 10));
                prop_assert!(ledger.flush_lsn() >= before);
                before = ledger.flush_lsn();
            }
            prop_assert_eq!(ledger.flush_lsn().lsn(), lsn(batches as u64 * 10));
        }
    }
}
