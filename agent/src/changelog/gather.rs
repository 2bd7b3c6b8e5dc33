//! Parts in any order become batches in order.
//!
//! Pure. A Kinesis stream keeps no order between shards, delivers a record more than once, and holds what
//! several runs of an agent wrote, who cut the same transactions into other batches. What a batch says of itself is enough:
//! where it begins, where it ends, and how many parts it has.
//!
//! # Invariants
//! - A batch is given out once all of its parts are there, and only if it begins at or before the position and ends behind
//!   it: what is given out, one after the other, has no gap.
//! - A part that is never completed costs nothing but its room: whoever took over from its writer sends the same
//!   transactions again.
//!
//! # What it does not do
//! It does not hold the parts: it keeps whatever the caller gives for them. It does not look into their messages.

use std::collections::BTreeMap;

use super::{Part, history_of};
use crate::history::History;
use crate::pg::PgLsn;

/// What a part is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worth {
    /// It is needed.
    Needed,
    /// It is here already, or its batch lies before the position.
    Known,
    /// Of another stream: another database shares the Kinesis stream.
    OtherStream,
    /// Of another history: the same stream name, another source, or another slot of the same one.
    OtherHistory,
    /// Written before the last promotion.
    OlderTerm,
}

/// A batch that is complete.
#[derive(Debug, PartialEq, Eq)]
pub struct Gathered<K> {
    /// Its number, of its writer's.
    pub number: i64,
    /// The end of its last transaction.
    pub end_lsn: PgLsn,
    /// What was kept for its parts, in order.
    pub parts: Vec<K>,
}

/// A stretch that is not there although something behind it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The position.
    pub from: PgLsn,
    /// Where the next batch begins.
    pub to: PgLsn,
    /// Whether a writer had everything before it accepted when it wrote what is behind it. Otherwise it may still be on its
    /// way.
    pub accepted: bool,
}

/// Who wrote a batch, and its number.
type Id = (u64, i64);

#[derive(Debug)]
struct Open<K> {
    previous: PgLsn,
    end_lsn: PgLsn,
    parts: BTreeMap<u32, K>,
    total: Option<u32>,
}

impl<K> Open<K> {
    fn is_complete(&self) -> bool {
        // Each part is there once, and none lies behind the last.
        self.total
            .is_some_and(|total| self.parts.len() == total as usize)
    }
}

/// The parts of one stream.
#[derive(Debug)]
pub struct Gather<K> {
    stream: String,
    history: History,
    term: i64,
    in_flight_max: usize,
    position: PgLsn,
    open: BTreeMap<Id, Open<K>>,
}

impl<K> Gather<K> {
    /// Begins behind `position`. `term`: what was written at a lower one is ignored. A writer has at most
    /// `in_flight_max` batches on their way.
    pub fn new(
        stream: &str,
        history: History,
        term: i64,
        position: PgLsn,
        in_flight_max: usize,
    ) -> Self {
        Self {
            stream: stream.to_owned(),
            history,
            term,
            in_flight_max,
            position,
            open: BTreeMap::new(),
        }
    }

    /// The end of what was given out.
    pub fn position(&self) -> PgLsn {
        self.position
    }

    /// Whether parts wait for others.
    pub fn is_waiting(&self) -> bool {
        !self.open.is_empty()
    }

    /// Says what a part is good for.
    pub fn worth(&self, part: &Part) -> Worth {
        if part.stream != self.stream {
            return Worth::OtherStream;
        }
        if history_of(part) != self.history {
            return Worth::OtherHistory;
        }
        if part.term < self.term {
            return Worth::OlderTerm;
        }
        if PgLsn::from(part.end_lsn) <= self.position {
            return Worth::Known;
        }
        let open = self.open.get(&(part.writer, part.batch));
        match open.is_some_and(|open| open.parts.contains_key(&part.part)) {
            true => Worth::Known,
            false => Worth::Needed,
        }
    }

    /// Keeps `kept` for a part that is needed.
    ///
    /// # Errors
    /// When the part contradicts what others say of its batch.
    pub fn keep(&mut self, part: &Part, kept: K) -> Result<(), &'static str> {
        let (previous, end_lsn) = (part.previous_end_lsn.into(), part.end_lsn.into());
        if previous >= end_lsn {
            return Err("a batch ends before it begins");
        }
        if part.parts != 0 && part.parts != part.part + 1 {
            return Err("it is the last part and not the last");
        }
        let open = self
            .open
            .entry((part.writer, part.batch))
            .or_insert_with(|| Open {
                previous,
                end_lsn,
                parts: BTreeMap::new(),
                total: None,
            });
        if (open.previous, open.end_lsn) != (previous, end_lsn) {
            return Err("two parts of a batch say different things of it");
        }
        if part.parts != 0 {
            open.total = Some(part.parts);
        }
        if open.total.is_some_and(|total| part.part >= total) {
            return Err("a batch has more parts than it says");
        }
        open.parts.insert(part.part, kept);
        Ok(())
    }

    /// The next batch that is complete, without a gap before it.
    pub fn next_batch(&mut self) -> Option<Gathered<K>> {
        let follows = |open: &Open<K>| {
            open.is_complete() && open.previous <= self.position && open.end_lsn > self.position
        };
        let (id, _) = self
            .open
            .iter()
            .filter(|(_, open)| follows(open))
            .max_by_key(|(_, open)| open.end_lsn)?;
        let id = *id;
        let batch = self.open.remove(&id)?;
        self.advance(batch.end_lsn);
        Some(Gathered {
            number: id.1,
            end_lsn: batch.end_lsn,
            parts: batch.parts.into_values().collect(),
        })
    }

    /// Moves the position: up to there, everything came another way. Drops what is not needed any more.
    pub fn advance(&mut self, position: PgLsn) {
        self.position = position.max(self.position);
        self.open.retain(|_, open| open.end_lsn > self.position);
    }

    /// The stretch that is missing before what is complete, if [`Gather::next_batch`] has nothing to give.
    pub fn gap(&self) -> Option<Gap> {
        let beyond = || {
            self.open
                .iter()
                .filter(|(_, open)| open.is_complete() && open.previous > self.position)
        };
        let to = beyond().map(|(_, open)| open.previous).min()?;
        let accepted = beyond().any(|((writer, batch), _)| {
            let of_writer = beyond().filter(|((other, _), _)| other == writer);
            // The first batch of a writer begins where the slot was: what is before it was accepted. So was what is further
            // back than a writer may have on its way.
            *batch == FIRST_BATCH || of_writer.count() >= self.in_flight_max
        });
        Some(Gap {
            from: self.position,
            to,
            accepted,
        })
    }
}

/// The number of a writer's first batch in a Kinesis stream.
pub const FIRST_BATCH: i64 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::lsn;
    use proptest::prelude::*;

    const IN_FLIGHT_MAX: usize = 4;

    fn part(writer: u64, batch: i64, span: (u64, u64), part: u32, parts: u32) -> Part {
        Part {
            version: 1,
            stream: "dr_agent_app".to_owned(),
            system_identifier: 7,
            began: 5,
            term: 1,
            writer,
            batch,
            previous_end_lsn: span.0,
            end_lsn: span.1,
            part,
            parts,
            ..Part::default()
        }
    }

    fn gather(position: u64) -> Gather<u32> {
        let history = History {
            system_identifier: 7,
            began: 5,
        };
        Gather::new("dr_agent_app", history, 1, lsn(position), IN_FLIGHT_MAX)
    }

    fn put(gather: &mut Gather<u32>, part: &Part) {
        assert_eq!(gather.worth(part), Worth::Needed, "{part:?}");
        gather.keep(part, part.part).unwrap();
    }

    #[test]
    fn a_batch_waits_for_its_parts_and_for_the_one_before_it() {
        let mut gather = gather(10);
        put(&mut gather, &part(1, 2, (20, 30), 0, 1));
        assert_eq!(gather.next_batch(), None);
        put(&mut gather, &part(1, 1, (10, 20), 1, 2));
        assert_eq!(gather.next_batch(), None);
        put(&mut gather, &part(1, 1, (10, 20), 0, 0));
        let first = gather.next_batch().unwrap();
        assert_eq!((first.end_lsn, first.parts), (lsn(20), vec![0, 1]));
        assert_eq!(gather.next_batch().unwrap().end_lsn, lsn(30));
        assert!(!gather.is_waiting());
        assert_eq!(gather.worth(&part(1, 2, (20, 30), 0, 1)), Worth::Known);
    }

    #[test]
    fn what_is_not_ours_is_told_apart() {
        let gather = gather(10);
        let ours = part(1, 1, (10, 20), 0, 1);
        let other = |change: fn(&mut Part)| {
            let mut part = ours.clone();
            change(&mut part);
            gather.worth(&part)
        };
        assert_eq!(other(|_| {}), Worth::Needed);
        assert_eq!(other(|p| p.stream.push('x')), Worth::OtherStream);
        assert_eq!(other(|p| p.system_identifier += 1), Worth::OtherHistory);
        assert_eq!(other(|p| p.began += 1), Worth::OtherHistory);
        assert_eq!(other(|p| p.term -= 1), Worth::OlderTerm);
        assert_eq!(other(|p| p.term += 1), Worth::Needed);
    }

    #[test]
    fn parts_that_contradict_each_other_are_refused() {
        let mut gather = gather(10);
        put(&mut gather, &part(1, 1, (10, 20), 0, 0));
        assert!(gather.keep(&part(1, 1, (10, 21), 1, 2), 1).is_err());
        assert!(gather.keep(&part(1, 1, (10, 20), 1, 3), 1).is_err());
        put(&mut gather, &part(1, 1, (10, 20), 1, 2));
        assert!(gather.keep(&part(1, 1, (10, 20), 2, 0), 1).is_err());
        assert!(gather.keep(&part(1, 2, (30, 20), 0, 1), 1).is_err());
    }

    #[test]
    fn a_gap_is_certain_once_the_writer_cannot_be_at_it_any_more() {
        let mut gather = gather(10);
        // The first batch may still be on its way.
        for n in 2..=4 {
            put(
                &mut gather,
                &part(1, n, (n as u64 * 10, n as u64 * 10 + 10), 0, 1),
            );
        }
        let gap = |accepted| {
            Some(Gap {
                from: lsn(10),
                to: lsn(20),
                accepted,
            })
        };
        assert_eq!(gather.next_batch(), None);
        assert_eq!(gather.gap(), gap(false));
        put(&mut gather, &part(1, 5, (50, 60), 0, 1));
        assert_eq!(gather.gap(), gap(true));
        gather.advance(lsn(20));
        let filled: Vec<PgLsn> =
            std::iter::from_fn(|| gather.next_batch().map(|batch| batch.end_lsn)).collect();
        assert_eq!(filled, [30, 40, 50, 60].map(lsn));
        assert_eq!(gather.gap(), None);
        // A new writer begins behind what was accepted.
        put(&mut gather, &part(2, FIRST_BATCH, (70, 80), 0, 1));
        assert!(gather.gap().is_some_and(|gap| gap.accepted));
        // Half a batch is no gap.
        gather.advance(lsn(80));
        put(&mut gather, &part(2, 2, (80, 90), 1, 2));
        assert_eq!(gather.gap(), None);
    }

    /// Transactions end at 10, 20, … A writer cuts them into batches and these into parts, from where the one before it
    /// was confirmed; all but the last writer die with some parts of their last batches unwritten.
    fn written(seed: u64, transactions: u64) -> Vec<Part> {
        let mut state = seed | 1;
        let mut draw = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut parts = Vec::new();
        let mut confirmed = 0;
        let writers = 1 + draw(3);
        for writer in 0..writers {
            let mut at = confirmed;
            let mut batch = FIRST_BATCH;
            let last_writer = writer + 1 == writers;
            let until = match last_writer {
                true => transactions,
                false => (confirmed + 1 + draw(transactions)).min(transactions),
            };
            while at < until {
                let end = (at + 1 + draw(3)).min(transactions);
                let total = 1 + draw(3) as u32;
                // The last few may be lost; what is confirmed is not.
                let lost = !last_writer && end + 4 > until && draw(2) == 0;
                for n in 0..total {
                    let last = if n + 1 == total { total } else { 0 };
                    if !(lost && draw(2) == 0) {
                        parts.push(part(writer, batch, (at * 10, end * 10), n, last));
                    }
                }
                if !lost && confirmed == at {
                    confirmed = end;
                }
                (at, batch) = (end, batch + 1);
            }
        }
        // Shards mix them, and some come twice.
        for i in (1..parts.len()).rev() {
            parts.swap(i, draw(i as u64 + 1) as usize);
        }
        for _ in 0..draw(5) {
            let again = parts[draw(parts.len() as u64) as usize].clone();
            parts.insert(draw(parts.len() as u64) as usize, again);
        }
        parts
    }

    proptest! {
        /// Whatever died, and in whatever order it comes: every transaction comes out, in order, once a batch that has it
        /// is there.
        #[test]
        fn what_comes_out_has_no_gap_and_reaches_the_end(seed in any::<u64>(), transactions in 1u64..40) {
            let mut gather = gather(0);
            let mut position = lsn(0);
            for part in written(seed, transactions) {
                if gather.worth(&part) == Worth::Needed {
                    gather.keep(&part, part.part).unwrap();
                }
                while let Some(batch) = gather.next_batch() {
                    prop_assert!(batch.end_lsn > position);
                    prop_assert!(batch.parts.iter().copied().eq(0..batch.parts.len() as u32));
                    position = batch.end_lsn;
                }
            }
            prop_assert_eq!(position, lsn(transactions * 10));
            prop_assert!(!gather.is_waiting());
            prop_assert_eq!(gather.gap(), None);
        }
    }
}
