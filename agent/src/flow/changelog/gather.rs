//! ● Parts in any order become batches in order.
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
//! - What a call costs grows with the logarithm of what waits, and with what it gives out or drops: a day's batches may wait.
//!
//! # What it does not do
//! It does not hold the parts: it keeps whatever the caller gives for them. It does not look into their messages.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use super::{Part, history_of};
use crate::names::history::History;
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
    /// By when the stream had accepted everything before `to`, if it ever did: whoever has read all that arrived until then
    /// does not wait for it any more. `None`: it may still be on its way.
    pub accepted_by: Option<Instant>,
}

/// Who wrote a batch, and its number.
type Id = (u64, i64);

#[derive(Debug)]
struct OpenBatch<K> {
    previous: PgLsn,
    end_lsn: PgLsn,
    parts: BTreeMap<u32, K>,
    total: Option<u32>,
    /// By when the first of its parts had arrived.
    arrived_by: Instant,
}

impl<K> OpenBatch<K> {
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
    open: HashMap<Id, OpenBatch<K>>,
    /// All of them by where they end: behind the position.
    ends: BTreeSet<(PgLsn, Id)>,
    /// Those that are complete and begin at or before the position, by where they end.
    ready: BTreeSet<(PgLsn, Id)>,
    /// Those that are complete and begin behind the position, by where they begin.
    beyond: BTreeSet<(PgLsn, Id)>,
    /// The same by writer and number, each with [`OpenBatch::arrived_by`].
    written: BTreeMap<u64, BTreeMap<i64, Instant>>,
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
            open: HashMap::new(),
            ends: BTreeSet::new(),
            ready: BTreeSet::new(),
            beyond: BTreeSet::new(),
            written: BTreeMap::new(),
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

    /// Keeps `kept` for a part that is needed, and had arrived in the stream by that time.
    ///
    /// # Errors
    /// When the part contradicts what others say of its batch.
    pub fn keep(&mut self, part: &Part, arrived_by: Instant, kept: K) -> Result<(), &'static str> {
        let (previous, end_lsn) = (part.previous_end_lsn.into(), part.end_lsn.into());
        if previous >= end_lsn {
            return Err("a batch ends before it begins");
        }
        if part.parts != 0 && part.parts != part.part + 1 {
            return Err("it is the last part and not the last");
        }
        let id = (part.writer, part.batch);
        let open = self.open.entry(id).or_insert_with(|| OpenBatch {
            previous,
            end_lsn,
            parts: BTreeMap::new(),
            total: None,
            arrived_by,
        });
        if (open.previous, open.end_lsn) != (previous, end_lsn) {
            return Err("two parts of a batch say different things of it");
        }
        let total = open.total.or((part.parts != 0).then_some(part.parts));
        let last = open.parts.keys().next_back().copied().max(Some(part.part));
        if total.is_some_and(|total| last >= Some(total)) {
            return Err("a batch has more parts than it says");
        }
        open.total = total;
        open.arrived_by = open.arrived_by.min(arrived_by);
        open.parts.insert(part.part, kept);
        self.ends.insert((end_lsn, id));
        if !open.is_complete() {
            return Ok(());
        }
        if previous <= self.position {
            self.ready.insert((end_lsn, id));
        } else {
            self.beyond.insert((previous, id));
            let written = self.written.entry(id.0).or_default();
            written.insert(id.1, open.arrived_by);
        }
        Ok(())
    }

    /// The next batch that is complete, without a gap before it.
    pub fn next_batch(&mut self) -> Option<Gathered<K>> {
        let (_, id) = self.ready.pop_last()?;
        let batch = self.open.remove(&id)?;
        self.ends.remove(&(batch.end_lsn, id));
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
        while let Some((end_lsn, id)) = self.ends.first().copied()
            && end_lsn <= self.position
        {
            self.ends.pop_first();
            self.ready.remove(&(end_lsn, id));
            if let Some(open) = self.open.remove(&id) {
                self.beyond.remove(&(open.previous, id));
                self.not_beyond(id);
            }
        }
        while let Some((previous, id)) = self.beyond.first().copied()
            && previous <= self.position
        {
            self.beyond.pop_first();
            self.not_beyond(id);
            if let Some(open) = self.open.get(&id) {
                self.ready.insert((open.end_lsn, id));
            }
        }
    }

    fn not_beyond(&mut self, (writer, number): Id) {
        if let Some(written) = self.written.get_mut(&writer) {
            written.remove(&number);
            if written.is_empty() {
                self.written.remove(&writer);
            }
        }
    }

    /// The stretch that is missing before what is complete, if [`Gather::next_batch`] has nothing to give.
    pub fn gap(&self) -> Option<Gap> {
        let (to, _) = *self.beyond.first()?;
        let proofs = self.written.values().flat_map(|batches| {
            // The first batch of a writer begins where the slot was: what is before it was accepted when it was put. So was
            // what is further back than a writer may have on its way.
            let first = batches.get(&FIRST_BATCH);
            let full = batches.values().nth(self.in_flight_max.saturating_sub(1));
            first.into_iter().chain(full)
        });
        Some(Gap {
            from: self.position,
            to,
            accepted_by: proofs.min().copied(),
        })
    }
}

/// The number of a writer's first batch in a Kinesis stream.
pub const FIRST_BATCH: i64 = 1;

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::time::Duration;

    use super::*;
    use crate::flow::testing::lsn;
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

    /// So many seconds after some moment.
    fn at(seconds: u64) -> Instant {
        static START: OnceLock<Instant> = OnceLock::new();
        *START.get_or_init(Instant::now) + Duration::from_secs(seconds)
    }

    fn put(gather: &mut Gather<u32>, part: &Part) {
        put_at(gather, part, 0);
    }

    fn put_at(gather: &mut Gather<u32>, part: &Part, seconds: u64) {
        assert_eq!(gather.worth(part), Worth::Needed, "{part:?}");
        gather.keep(part, at(seconds), part.part).unwrap();
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
        let refused = |gather: &mut Gather<u32>, part: Part| gather.keep(&part, at(0), 1).is_err();
        put(&mut gather, &part(1, 1, (10, 20), 0, 0));
        assert!(refused(&mut gather, part(1, 1, (10, 21), 1, 2)));
        assert!(refused(&mut gather, part(1, 1, (10, 20), 1, 3)));
        put(&mut gather, &part(1, 1, (10, 20), 1, 2));
        assert!(refused(&mut gather, part(1, 1, (10, 20), 2, 0)));
        assert!(refused(&mut gather, part(1, 2, (30, 20), 0, 1)));
        // The last one comes last, and one that lies behind it is there already.
        put(&mut gather, &part(1, 3, (40, 50), 5, 0));
        assert!(refused(&mut gather, part(1, 3, (40, 50), 1, 2)));
    }

    #[test]
    fn a_gap_is_certain_once_the_writer_cannot_be_at_it_any_more() {
        let mut gather = gather(10);
        // The first batch may still be on its way.
        for n in 2..=4 {
            let of_n = part(1, n, (n as u64 * 10, n as u64 * 10 + 10), 0, 1);
            put_at(&mut gather, &of_n, n as u64);
        }
        let gap = |accepted_by| {
            Some(Gap {
                from: lsn(10),
                to: lsn(20),
                accepted_by,
            })
        };
        assert_eq!(gather.next_batch(), None);
        assert_eq!(gather.gap(), gap(None));
        // Its writer put no part of the fifth before it knew that the first was accepted.
        put_at(&mut gather, &part(1, 5, (50, 60), 1, 2), 8);
        assert_eq!(gather.gap(), gap(None));
        put_at(&mut gather, &part(1, 5, (50, 60), 0, 0), 7);
        assert_eq!(gather.gap(), gap(Some(at(7))));
        // Nor is anything expected later because there is more.
        put_at(&mut gather, &part(1, 6, (60, 70), 0, 1), 9);
        assert_eq!(gather.gap(), gap(Some(at(7))));
        gather.advance(lsn(20));
        let filled: Vec<PgLsn> =
            std::iter::from_fn(|| gather.next_batch().map(|batch| batch.end_lsn)).collect();
        assert_eq!(filled, [30, 40, 50, 60, 70].map(lsn));
        assert_eq!(gather.gap(), None);
        // A new writer begins behind what was accepted.
        put_at(&mut gather, &part(2, FIRST_BATCH, (80, 90), 0, 1), 10);
        assert_eq!(gather.gap().unwrap().accepted_by, Some(at(10)));
        // Half a batch is no gap.
        gather.advance(lsn(90));
        put(&mut gather, &part(2, 2, (90, 100), 1, 2));
        assert_eq!(gather.gap(), None);
    }

    /// What it must come to, by looking at everything every time.
    struct Slow {
        position: PgLsn,
        open: BTreeMap<Id, OpenBatch<u32>>,
    }

    impl Slow {
        fn next_batch(&mut self) -> Option<Gathered<u32>> {
            let follows = |open: &OpenBatch<u32>| {
                open.is_complete() && open.previous <= self.position && open.end_lsn > self.position
            };
            let all = self.open.iter();
            let (id, _) = all
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

        fn advance(&mut self, position: PgLsn) {
            self.position = position.max(self.position);
            self.open.retain(|_, open| open.end_lsn > self.position);
        }

        fn gap(&self) -> Option<Gap> {
            let beyond = || {
                let all = self.open.iter();
                all.filter(|(_, open)| open.is_complete() && open.previous > self.position)
            };
            let proves = |(writer, number): Id| {
                let lower = beyond().filter(|(id, _)| id.0 == writer && id.1 < number);
                number == FIRST_BATCH || lower.count() == IN_FLIGHT_MAX - 1
            };
            Some(Gap {
                from: self.position,
                to: beyond().map(|(_, open)| open.previous).min()?,
                accepted_by: beyond()
                    .filter(|(id, _)| proves(**id))
                    .map(|(_, open)| open.arrived_by)
                    .min(),
            })
        }
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
                    gather.keep(&part, at(0), part.part).unwrap();
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

        /// In between, the archive may fill any stretch.
        #[test]
        fn what_is_looked_up_is_what_a_look_at_everything_finds(
            seed in any::<u64>(), transactions in 1u64..40, filled in prop::collection::vec(0u64..400, 0..4)
        ) {
            let mut gather = gather(0);
            let mut slow = Slow { position: lsn(0), open: BTreeMap::new() };
            let parts = written(seed, transactions);
            let every = parts.len() / (filled.len() + 1) + 1;
            let mut filled = filled.into_iter();
            for (n, part) in parts.into_iter().enumerate() {
                let arrived_by = at(seed % 97 * n as u64 % 1000);
                if gather.worth(&part) == Worth::Needed {
                    gather.keep(&part, arrived_by, part.part).unwrap();
                    let open = slow.open.entry((part.writer, part.batch)).or_insert_with(|| OpenBatch {
                        previous: part.previous_end_lsn.into(),
                        end_lsn: part.end_lsn.into(),
                        parts: BTreeMap::new(),
                        total: None,
                        arrived_by,
                    });
                    open.parts.insert(part.part, part.part);
                    open.arrived_by = open.arrived_by.min(arrived_by);
                    open.total = open.total.or((part.parts != 0).then_some(part.parts));
                }
                if n % every == every - 1 && let Some(to) = filled.next() {
                    gather.advance(lsn(to));
                    slow.advance(lsn(to));
                }
                // Not always at once: several may be ready.
                if n % 3 != 0 {
                    loop {
                        let given = gather.next_batch();
                        prop_assert_eq!(&given, &slow.next_batch());
                        if given.is_none() {
                            break;
                        }
                    }
                    prop_assert_eq!(gather.gap(), slow.gap());
                }
                prop_assert_eq!(gather.position(), slow.position);
                prop_assert_eq!(gather.is_waiting(), !slow.open.is_empty());
            }
        }
    }

    /// A look at everything for each of them would take minutes.
    #[test]
    fn a_day_of_batches_may_wait_for_one() {
        const BATCHES: u64 = 100_000;
        let started = Instant::now();
        let mut gather = gather(0);
        for n in (1..BATCHES).rev() {
            let number = n as i64 + 1;
            put(&mut gather, &part(1, number, (n * 10, n * 10 + 10), 0, 1));
            assert!(gather.next_batch().is_none());
            assert!(gather.gap().is_some());
        }
        put(&mut gather, &part(1, FIRST_BATCH, (0, 10), 0, 1));
        for n in 1..=BATCHES {
            assert_eq!(gather.next_batch().unwrap().end_lsn, lsn(n * 10));
        }
        assert!(!gather.is_waiting());
        let took = started.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}
