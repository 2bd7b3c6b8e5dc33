//! ● What may be under way at once on several sessions, and behind what on the same one.
//!
//! Statements are sent without waiting for the one before. Those of one session run one after the other, so what needs the same
//! table goes to the session that has it already; what needs it on two sessions waits. A session gets several small pieces of work
//! ahead, so that distance costs nothing, and a large one only when it has nothing else, so that large ones run side by side.
//!
//! # Invariants
//! - Nothing that conflicts is on two sessions: they cannot lock one another out.
//! - Only what conflicts with nothing before it overtakes.

use std::collections::{BTreeMap, VecDeque};

/// As much of tables is ahead on one session.
const BYTES_AHEAD: u64 = 8 << 20;

/// As many pieces of work are ahead on one session.
const AHEAD: usize = 64;

/// How far is looked for something that can be begun.
const LOOK: usize = 64;

/// How a piece of work holds a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneHold {
    /// Beside others that share it: CREATE INDEX.
    Shared,
    /// Alone.
    Exclusive,
}

/// What a piece of work holds, by table.
#[derive(Clone, Debug)]
pub(super) enum Holds {
    /// These tables.
    Tables(BTreeMap<u32, LaneHold>),
    /// Whatever there is: nothing runs beside it.
    Everything,
}

impl Holds {
    fn conflicts(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tables(ours), Self::Tables(theirs)) => ours.iter().any(|(table, hold)| {
                let both = theirs.get(table).map(|other| (hold, other));
                both.is_some_and(|both| both != (&LaneHold::Shared, &LaneHold::Shared))
            }),
            _ => true,
        }
    }
}

/// One piece of work.
#[derive(Clone, Debug)]
pub(super) struct LaneWork<T> {
    pub(super) holds: Holds,
    /// The size of its table.
    pub(super) bytes: u64,
    pub(super) what: T,
}

#[derive(Debug, Default)]
struct CopyLane {
    /// In the order in which they were sent, which is the one in which they end.
    under_way: VecDeque<(Holds, u64)>,
}

impl CopyLane {
    fn has_room(&self, bytes: u64) -> bool {
        let ahead: u64 = self.under_way.iter().map(|(_, bytes)| bytes).sum();
        self.under_way.is_empty()
            || self.under_way.len() < AHEAD && ahead.saturating_add(bytes) <= BYTES_AHEAD
    }

    fn conflicts(&self, holds: &Holds) -> bool {
        self.under_way
            .iter()
            .any(|(others, _)| others.conflicts(holds))
    }
}

/// The sessions and what is left to do.
#[derive(Debug)]
pub(super) struct Lanes<T> {
    lanes: Vec<CopyLane>,
    left: VecDeque<LaneWork<T>>,
}

impl<T> Lanes<T> {
    pub(super) fn new(lanes: usize, work: Vec<LaneWork<T>>) -> Self {
        Self {
            lanes: (0..lanes).map(|_| CopyLane::default()).collect(),
            left: work.into(),
        }
    }

    /// What can be sent now, and on which session; `None` until something has ended, or if nothing is left.
    pub(super) fn next(&mut self) -> Option<(usize, T)> {
        let (at, lane) = (0..self.left.len().min(LOOK)).find_map(|at| {
            let work = &self.left[at];
            let passed = self.left.range(..at);
            let waits = passed.into_iter().any(|p| p.holds.conflicts(&work.holds));
            let lane = if waits { None } else { self.lane_for(work) };
            lane.map(|lane| (at, lane))
        })?;
        let LaneWork { holds, bytes, what } = self.left.remove(at)?;
        self.lanes[lane].under_way.push_back((holds, bytes));
        Some((lane, what))
    }

    fn lane_for(&self, work: &LaneWork<T>) -> Option<usize> {
        let mut conflicting =
            (0..self.lanes.len()).filter(|&lane| self.lanes[lane].conflicts(&work.holds));
        match (conflicting.next(), conflicting.next()) {
            (Some(lane), None) => self.lanes[lane].has_room(work.bytes).then_some(lane),
            (Some(_), Some(_)) => None,
            (None, _) => (0..self.lanes.len())
                .min_by_key(|&lane| self.lanes[lane].under_way.len())
                .filter(|&lane| self.lanes[lane].has_room(work.bytes)),
        }
    }

    /// The first piece of work that is under way on this session has ended.
    pub(super) fn ended(&mut self, lane: usize) {
        self.lanes[lane].under_way.pop_front();
    }

    /// Nothing more is begun.
    pub(super) fn stop(&mut self) {
        self.left.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(
        tables: &[u32],
        hold: LaneHold,
        bytes: u64,
        what: &'static str,
    ) -> LaneWork<&'static str> {
        LaneWork {
            holds: Holds::Tables(tables.iter().map(|&table| (table, hold)).collect()),
            bytes,
            what,
        }
    }

    fn everything(what: &'static str) -> LaneWork<&'static str> {
        LaneWork {
            holds: Holds::Everything,
            bytes: 0,
            what,
        }
    }

    fn begun(lanes: &mut Lanes<&'static str>) -> Vec<(usize, &'static str)> {
        std::iter::from_fn(|| lanes.next()).collect()
    }

    #[test]
    fn what_is_small_goes_ahead_and_what_needs_the_same_table_follows_it() {
        let work = vec![
            on(&[1], LaneHold::Exclusive, 1, "key of 1"),
            on(&[2], LaneHold::Exclusive, 1, "key of 2"),
            on(&[3], LaneHold::Exclusive, 1, "key of 3"),
            on(&[1], LaneHold::Shared, 1, "index of 1"),
            on(&[1, 2], LaneHold::Exclusive, 1, "1 refers to 2"),
            on(&[4], LaneHold::Exclusive, 1, "key of 4"),
        ];
        let mut lanes = Lanes::new(2, work);
        let all = begun(&mut lanes);
        assert_eq!(
            all,
            [
                (0, "key of 1"),
                (1, "key of 2"),
                (0, "key of 3"),
                (0, "index of 1"),
                // What needs both sessions' tables is overtaken by what it does not concern.
                (1, "key of 4")
            ]
        );
        lanes.ended(1);
        assert_eq!(begun(&mut lanes), [(0, "1 refers to 2")]);
    }

    #[test]
    fn large_ones_run_side_by_side_and_one_behind_another_waits() {
        let large = 1 << 30;
        let work = vec![
            on(&[1], LaneHold::Shared, large, "a"),
            on(&[1], LaneHold::Shared, large, "b"),
            on(&[1], LaneHold::Shared, large, "c"),
            on(&[2], LaneHold::Shared, 1, "d"),
        ];
        let mut lanes = Lanes::new(2, work);
        // Behind a large one nothing waits, however small it is: another session may be free before.
        assert_eq!(begun(&mut lanes), [(0, "a"), (1, "b")]);
        lanes.ended(1);
        assert_eq!(begun(&mut lanes), [(1, "c")]);
        lanes.ended(0);
        assert_eq!(begun(&mut lanes), [(0, "d")]);
    }

    #[test]
    fn nothing_runs_beside_what_holds_everything_and_several_such_follow_one_another() {
        let work = vec![
            on(&[1], LaneHold::Shared, 1, "a"),
            on(&[2], LaneHold::Shared, 1, "b"),
            everything("attach"),
            everything("attach more"),
            on(&[3], LaneHold::Shared, 1, "c"),
        ];
        let mut lanes = Lanes::new(2, work);
        assert_eq!(begun(&mut lanes), [(0, "a"), (1, "b")]);
        lanes.ended(0);
        assert_eq!(
            begun(&mut lanes),
            [(1, "attach"), (1, "attach more"), (1, "c")]
        );
    }

    #[test]
    fn what_is_stopped_begins_nothing() {
        let mut lanes = Lanes::new(1, vec![everything("a")]);
        lanes.stop();
        assert!(begun(&mut lanes).is_empty());
    }
}
