//! Whatever happens in whatever order: the owner beside a model of what was received, shipped and made durable.
//!
//! All short orders are tried, and many long ones by chance (a failure names the shortest that shows it).

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use proptest::prelude::*;

use super::tests::{GRACE, TERMS, answer, ms, near, owner};
use super::*;
use crate::flow::batch::IN_FLIGHT_MAX;
use crate::flow::counts::ChangeCounts;
use crate::flow::testing::{lsn, transaction};
use crate::pipeline::now_instant;

/// What happens, as far as it can: an answer needs a batch that is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// So many transactions of one change.
    Receive(u64),
    /// One that fills a batch by itself.
    ReceiveLarge,
    Durable,
    Failed,
    /// The change log has a little more.
    HoldLess,
    /// It has less than before: another log.
    HoldMore,
    LetGo,
    Pause,
    GoOn,
    /// Time passes.
    Wait,
    WaitLong,
    Covered,
    NewTable,
    Stop,
    TaskEnded,
}

use Event::*;

/// All of them.
const EVENTS: [Event; 16] = [
    Receive(1),
    Receive(3),
    ReceiveLarge,
    Durable,
    HoldLess,
    HoldMore,
    LetGo,
    Pause,
    GoOn,
    Wait,
    WaitLong,
    Covered,
    Stop,
    Failed,
    NewTable,
    TaskEnded,
];

/// The first so many keep a session going.
const GOING_ON: usize = 12;

/// A share of the memory.
#[derive(Debug)]
struct Permit(Rc<Cell<usize>>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Drained,
    Failed,
}

/// What must be, worked out in the simplest way.
struct Model {
    owner: Owner<Permit>,
    now: Now,
    permits: Rc<Cell<usize>>,
    /// The end of every transaction that was received, in order.
    received: Vec<u64>,
    /// How many of them were shipped, and are durable.
    shipped: usize,
    durable: usize,
    in_flight: VecDeque<Arc<Batch>>,
    number: i64,
    /// None where nothing holds the slot.
    hold: Option<u64>,
    told: u64,
    is_paused: bool,
    /// Somebody waits to hear of the standstill.
    is_asked: bool,
    draining_until: Option<Instant>,
    ended: Option<Ended>,
}

impl Model {
    fn new(spacing: Spacing, held: bool) -> Self {
        let instant = now_instant();
        Self {
            owner: owner(spacing, TERMS, held, instant),
            now: Now { instant, time: 0 },
            permits: Rc::default(),
            received: Vec::new(),
            shipped: 0,
            durable: 0,
            in_flight: VecDeque::new(),
            number: 7,
            hold: held.then_some(0),
            told: if held { 0 } else { 100 },
            is_paused: false,
            is_asked: false,
            draining_until: None,
            ended: None,
        }
    }

    /// Where the first so many transactions end.
    fn end_of(&self, transactions: usize) -> u64 {
        match transactions {
            0 => 100,
            n => self.received[n - 1],
        }
    }

    fn receive(&mut self, count: u64, changes: u64) -> Action<Permit> {
        let arrived = (0..count).map(|_| {
            let end = self.end_of(self.received.len()) + 10;
            self.received.push(end);
            self.permits.set(self.permits.get() + 1);
            Received {
                transaction: crate::flow::transaction::Transaction {
                    counts: ChangeCounts([changes, 0, 0, 0]),
                    ..transaction(end)
                },
                permit: Permit(Rc::clone(&self.permits)),
            }
        });
        Action::Received(arrived.collect())
    }

    /// The action, if it can happen now; what the model knows of it is noted.
    fn action(&mut self, event: Event) -> Option<Action<Permit>> {
        let found = |kind| {
            let count = 9;
            let examples = Vec::new();
            Action::Covered(vec![Unprotected {
                kind,
                count,
                examples,
            }])
        };
        Some(match event {
            // The loop takes nothing in any more.
            Receive(_) | ReceiveLarge if self.draining_until.is_some() => return None,
            Receive(count) => self.receive(count, 1),
            ReceiveLarge => self.receive(1, 5),
            Durable => {
                let batch = self.in_flight.pop_front()?;
                self.durable += batch.transactions.len();
                Action::Outcome(answer(&batch, Ok(())))
            }
            Failed => {
                let batch = self.in_flight.front()?;
                Action::Outcome(answer(batch, Err(SessionError::NoKinesisStream)))
            }
            HoldLess | HoldMore => {
                let (more, less) = if event == HoldLess { (15, 0) } else { (0, 5) };
                let hold = self.hold.unwrap_or(100) + more - less.min(self.hold.unwrap_or(100));
                self.hold = Some(hold);
                Action::Held(Some(lsn(hold)))
            }
            LetGo => {
                self.hold = None;
                Action::Held(None)
            }
            Pause => {
                (self.is_paused, self.is_asked) = (true, true);
                Action::Pause
            }
            GoOn => {
                (self.is_paused, self.is_asked) = (false, false);
                Action::GoOn
            }
            Wait | WaitLong => {
                let time = if event == Wait { ms(60) } else { GRACE };
                self.now.instant += time;
                Action::Tick
            }
            Covered => found(coverage::UNPUBLISHED_TABLE),
            NewTable => found(coverage::RELISTED_TABLE),
            Stop => {
                let until = self.now.instant + GRACE;
                self.draining_until.get_or_insert(until);
                Action::Stop
            }
            TaskEnded => Action::TaskEnded(None),
        })
    }

    fn happen(&mut self, event: Event) {
        if self.ended.is_some() {
            return;
        }
        let Some(action) = self.action(event) else {
            return;
        };
        let late = self
            .draining_until
            .is_some_and(|until| self.now.instant >= until);
        let may_fail = matches!(event, Failed | NewTable | TaskEnded)
            || late && matches!(event, Wait | WaitLong);
        for step in self.owner.apply(action, self.now) {
            assert_eq!(self.ended, None, "nothing follows the end");
            self.step(step, event, may_fail);
        }
        if may_fail {
            assert_eq!(self.ended, Some(Ended::Failed));
        }
        self.check();
    }

    fn step(&mut self, step: Step, event: Event, may_fail: bool) {
        match step {
            Step::Acknowledge(flush) => {
                let flush = u64::from(flush.lsn());
                assert!(
                    flush > self.told,
                    "{flush} again or back from {}",
                    self.told
                );
                assert!(flush <= self.end_of(self.durable), "not durable yet");
                assert!(self.hold.is_none_or(|hold| flush <= hold), "held");
                self.told = flush;
            }
            Step::Count { .. } => assert_eq!(event, Durable),
            Step::Show(_) => assert!(matches!(event, Covered | NewTable)),
            Step::WakeLate => assert_eq!(event, Covered),
            Step::Ship(batch) => self.ship(batch),
            Step::Paused(at) => {
                assert!(std::mem::take(&mut self.is_asked), "nobody asks");
                assert!(self.in_flight.is_empty(), "something is on its way");
                assert_eq!(u64::from(at), self.end_of(self.durable));
            }
            Step::End(Ok(())) => {
                assert!(self.draining_until.is_some(), "nobody wants it to end");
                assert_eq!(self.durable, self.received.len(), "not drained");
                self.ended = Some(Ended::Drained);
            }
            Step::End(Err(error)) => {
                assert!(may_fail, "{error}");
                self.ended = Some(Ended::Failed);
            }
        }
    }

    /// It is what was received next, whole, and goes when it may.
    fn ship(&mut self, batch: Batch) {
        self.number += 1;
        assert_eq!(batch.number.0, self.number);
        assert_eq!(u64::from(batch.previous), self.end_of(self.shipped));
        let ends = batch.transactions.iter().map(|it| u64::from(it.end_lsn));
        let next = &self.received[self.shipped..][..batch.transactions.len()];
        assert_eq!(ends.collect::<Vec<_>>(), next);
        assert!(!self.is_paused || self.draining_until.is_some(), "paused");
        self.shipped += batch.transactions.len();
        self.in_flight.push_back(Arc::new(batch));
        assert!(self.in_flight.len() <= IN_FLIGHT_MAX);
    }

    /// What holds after every action.
    fn check(&self) {
        let undone = self.received.len() - self.durable;
        assert_eq!(self.permits.get(), undone, "permits");
        if self.ended.is_some() {
            return;
        }
        let may = self.end_of(self.durable);
        let may = self.hold.map_or(may, |hold| hold.min(may));
        assert!(self.told >= may, "the slot could be told of {may}");
        assert_eq!(u64::from(self.owner.sunk()), self.end_of(self.durable));
        assert_eq!(u64::from(self.owner.shipped()), self.end_of(self.shipped));
        assert_eq!(self.owner.is_running(), self.draining_until.is_none());
        if self.in_flight.is_empty() {
            assert!(!self.is_asked, "who waits for the standstill was not told");
            let waits = self.shipped < self.received.len();
            let paused = self.is_paused && self.owner.is_running();
            assert!(
                !waits || paused || self.owner.due().is_some(),
                "it stands still"
            );
        }
        assert!(self.owner.due().is_none_or(|due| due > self.now.instant));
    }

    /// Told to stop, with a sink that works, everything arrives; or, where the time is over, it is said that it did not.
    fn finish(mut self) {
        let in_time = self.draining_until.is_none() && self.ended.is_none();
        self.happen(Stop);
        for _ in 0..=2 * self.received.len() {
            self.happen(Durable);
            if let (Some(due), Some(until)) = (self.owner.due(), self.draining_until) {
                self.now.instant = due.min(until - ms(1));
                self.happen(Covered);
            }
        }
        self.happen(WaitLong);
        match in_time {
            true => assert_eq!(self.ended, Some(Ended::Drained)),
            false => assert!(self.ended.is_some(), "it does not end"),
        }
        let permits = Rc::clone(&self.permits);
        drop(self);
        assert_eq!(permits.get(), 0, "they are given back with the session");
    }
}

/// A replica that is near, one that is far, and a stream in which each record has its price.
fn spacings() -> [Spacing; 3] {
    [
        near(),
        Spacing::new(ms(400), IN_FLIGHT_MAX),
        Spacing::every(ms(100), IN_FLIGHT_MAX),
    ]
}

fn try_all(events: &mut Vec<Event>, left: usize) {
    let is_over = matches!(events.last(), Some(Failed | NewTable | TaskEnded));
    if left == 0 || is_over {
        let mut model = Model::new(near(), true);
        events.iter().for_each(|event| model.happen(*event));
        return model.finish();
    }
    for event in EVENTS {
        events.push(event);
        try_all(events, left - 1);
        events.pop();
    }
}

#[test]
fn all_orders_of_four_events() {
    for before in [&[][..], &[Receive(3)], &[Receive(3), Receive(3), Durable]] {
        try_all(&mut before.to_vec(), 4);
    }
}

proptest! {
    #[test]
    fn many_orders_of_many_events(
        spacing in 0usize..3,
        held in any::<bool>(),
        events in proptest::collection::vec(0..GOING_ON, 0..80),
        last in proptest::collection::vec(0..EVENTS.len(), 0..12),
    ) {
        let mut model = Model::new(spacings()[spacing], held);
        for event in events.into_iter().chain(last) {
            model.happen(EVENTS[event]);
        }
        model.finish();
    }
}
