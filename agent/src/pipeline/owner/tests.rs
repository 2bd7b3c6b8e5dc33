//! Every state, and what each action leads to in it. Two changes fill a batch.

use std::collections::VecDeque;
use std::rc::Rc;

use super::*;
use crate::error::{Class, Classify as _};
use crate::flow::batch::IN_FLIGHT_MAX;
use crate::flow::ledger::BatchNumber;
use crate::flow::testing::{lsn, transaction};
use crate::pg::{PgError, ServerError};
use crate::pipeline::now_instant;
use crate::sink::replica::SinkError;

pub(super) const GRACE: Duration = Duration::from_millis(1_000);

pub(super) const TERMS: Terms = Terms {
    left_out: 2,
    copies_beside: true,
    grace: GRACE,
};

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(super) fn near() -> Spacing {
    Spacing::new(Duration::ZERO, IN_FLIGHT_MAX)
}

/// A session from batch 7, which ended at 100, on.
pub(super) fn owner<P>(spacing: Spacing, terms: Terms, held: bool, now: Instant) -> Owner<P> {
    let shipment = Shipment::resume(BatchNumber(7), lsn(100), 1_000, 2);
    let shipment = match held {
        true => shipment.held(lsn(0)),
        false => shipment,
    };
    let lag = Lag::new(Duration::from_secs(1), Duration::from_secs(30));
    Owner::new(shipment, spacing, lag, terms, now)
}

pub(super) fn answer(
    batch: &Arc<Batch>,
    result: Result<(), SessionError>,
) -> Outcome<SessionError> {
    Outcome {
        batch: Arc::clone(batch),
        result: result.map(|()| Applied::default()),
        took: Duration::ZERO,
    }
}

/// An owner with a clock that stands still, and a sink that has taken every batch.
struct Bench {
    owner: Owner<Rc<()>>,
    /// Each permit is one of these.
    permit: Rc<()>,
    now: Now,
    in_flight: VecDeque<Arc<Batch>>,
}

impl Bench {
    fn with(spacing: Spacing, terms: Terms, held: bool) -> Self {
        let now = Now {
            instant: now_instant(),
            time: 1_000,
        };
        Self {
            owner: owner(spacing, terms, held, now.instant),
            permit: Rc::new(()),
            now,
            in_flight: VecDeque::new(),
        }
    }

    fn new() -> Self {
        Self::with(near(), TERMS, false)
    }

    fn wait(&mut self, time: Duration) -> &mut Self {
        self.now.instant += time;
        self
    }

    /// What comes of it, in words.
    fn apply(&mut self, action: Action<Rc<()>>) -> String {
        let steps = self.owner.apply(action, self.now);
        let words = steps.into_iter().map(|step| match step {
            Step::Acknowledge(flush) => format!("acknowledge {}", u64::from(flush.lsn())),
            Step::Count { batch, .. } => format!("count {}", batch.number.0),
            Step::Show(unprotected) => format!("show {}", unprotected.len()),
            Step::WakeLate => "wake".to_owned(),
            Step::Ship(batch) => {
                let (number, end) = (batch.number.0, u64::from(batch.end_lsn()));
                self.in_flight.push_back(Arc::new(batch));
                format!("ship {number} to {end}")
            }
            Step::Paused(at) => format!("paused at {}", u64::from(at)),
            Step::End(Ok(())) => "end".to_owned(),
            Step::End(Err(error)) => format!("{:?}: {error}", error.class()),
        });
        words.collect::<Vec<_>>().join(", ")
    }

    /// Transactions of one change that end there.
    fn receive(&mut self, ends: &[u64]) -> String {
        let received = ends.iter().map(|end| Received {
            transaction: transaction(*end),
            permit: Rc::clone(&self.permit),
        });
        let received = received.collect();
        self.apply(Action::Received(received))
    }

    /// The batch that was shipped first is durable.
    fn good(&mut self) -> String {
        let batch = self.in_flight.pop_front().unwrap();
        self.apply(Action::Outcome(answer(&batch, Ok(()))))
    }

    fn bad(&mut self, error: SessionError) -> String {
        let batch = self.in_flight.pop_front().unwrap();
        self.apply(Action::Outcome(answer(&batch, Err(error))))
    }

    fn covered(&mut self, kinds: &[(&'static str, u64)]) -> String {
        let found = kinds.iter().map(|(kind, count)| Unprotected {
            kind,
            count: *count,
            examples: Vec::new(),
        });
        let found = found.collect();
        self.apply(Action::Covered(found))
    }

    fn permits(&self) -> usize {
        Rc::strong_count(&self.permit) - 1
    }
}

#[test]
fn a_transaction_goes_at_once_and_is_acknowledged_once_it_is_durable() {
    let mut bench = Bench::new();
    assert_eq!(bench.apply(Action::Tick), "");
    assert_eq!(bench.receive(&[110]), "ship 8 to 110");
    assert_eq!(bench.permits(), 1);
    assert_eq!(bench.good(), "acknowledge 110, count 8");
    assert_eq!(bench.permits(), 0);
}

#[test]
fn what_gathers_meanwhile_is_the_next_batch_and_a_full_one_does_not_wait() {
    let mut bench = Bench::new();
    bench.receive(&[110]);
    assert_eq!(bench.receive(&[120]), "");
    assert_eq!(bench.receive(&[130, 140]), "ship 9 to 130");
    assert_eq!(bench.good(), "acknowledge 110, count 8");
    assert_eq!(bench.good(), "acknowledge 130, count 9, ship 10 to 140");
    // No more than may be on their way.
    let ends: Vec<u64> = (150..260).step_by(10).collect();
    assert_eq!(
        bench.receive(&ends),
        "ship 11 to 160, ship 12 to 180, ship 13 to 200"
    );
    assert_eq!(bench.good(), "acknowledge 140, count 10, ship 14 to 220");
    assert_eq!((bench.permits(), bench.in_flight.len()), (11, 4));
}

#[test]
fn to_a_far_replica_the_next_one_goes_when_it_is_due() {
    let mut bench = Bench::with(Spacing::new(ms(80), IN_FLIGHT_MAX), TERMS, false);
    bench.receive(&[110]);
    assert_eq!(bench.wait(ms(5)).receive(&[120]), "");
    assert_eq!(bench.owner.due(), Some(bench.now.instant + ms(15)));
    assert_eq!(bench.wait(ms(14)).apply(Action::Tick), "");
    assert_eq!(bench.wait(ms(1)).apply(Action::Tick), "ship 9 to 120");
    assert_eq!(bench.owner.due(), None);
}

#[test]
fn a_batch_that_fails_ends_the_session_and_nothing_of_it_is_told() {
    let promoted = ServerError {
        sqlstate: "DR001".to_owned(),
        ..ServerError::default()
    };
    let promoted = PgError::Server(Box::new(promoted));
    let errors = [
        (SessionError::NoKinesisStream, Class::Definite),
        (SessionError::TaskLost, Class::Transient),
        (SinkError::from(promoted).into(), Class::Fenced),
    ];
    for (error, class) in errors {
        let mut bench = Bench::new();
        bench.receive(&[110, 120, 130, 140]);
        assert_eq!(bench.good(), "acknowledge 120, count 8");
        let told = bench.bad(error);
        assert!(told.starts_with(&format!("{class:?}: ")), "{told}");
        // They are given back with the session.
        assert_eq!(bench.permits(), 2);
        let Bench { owner, permit, .. } = bench;
        drop(owner);
        assert_eq!(Rc::strong_count(&permit), 1);
    }
}

#[test]
fn the_slot_waits_for_the_change_log_as_for_the_sink() {
    let mut bench = Bench::with(near(), TERMS, true);
    bench.receive(&[110]);
    assert_eq!(bench.good(), "count 8");
    let held = |position: u64| Action::Held(Some(lsn(position)));
    assert_eq!(bench.apply(held(105)), "acknowledge 105");
    assert_eq!(bench.apply(held(104)), "");
    assert_eq!(bench.apply(held(200)), "acknowledge 110");
    assert_eq!(bench.receive(&[120]), "ship 9 to 120");
    assert_eq!(bench.apply(held(110)), "");
    assert_eq!(bench.good(), "count 9");
    assert_eq!(bench.apply(Action::Held(None)), "acknowledge 120");
    assert_eq!(bench.owner.sunk(), lsn(120));
}

#[test]
fn while_a_table_joins_nothing_is_shipped_and_it_hears_of_the_standstill_once() {
    let mut bench = Bench::new();
    assert_eq!(bench.apply(Action::Pause), "paused at 100");
    assert_eq!(bench.apply(Action::Tick), "");
    assert_eq!(bench.receive(&[110]), "");
    assert_eq!(bench.apply(Action::GoOn), "ship 8 to 110");
    assert_eq!(bench.receive(&[120, 130]), "ship 9 to 130");
    assert_eq!(bench.apply(Action::Pause), "");
    assert_eq!(bench.receive(&[140]), "");
    assert_eq!(bench.good(), "acknowledge 110, count 8");
    assert_eq!(bench.good(), "acknowledge 130, count 9, paused at 130");
    // Another one asks, or the same again.
    assert_eq!(bench.apply(Action::Pause), "paused at 130");
    // It was given up before the standstill.
    assert_eq!(bench.apply(Action::GoOn), "ship 10 to 140");
    assert_eq!(bench.apply(Action::Pause), "");
    assert_eq!(bench.apply(Action::GoOn), "");
    assert_eq!(bench.good(), "acknowledge 140, count 10");
    assert_eq!(bench.owner.shipped(), lsn(140));
}

#[test]
fn who_is_told_to_stop_applies_what_was_received() {
    let mut bench = Bench::new();
    assert!(bench.owner.is_running());
    assert_eq!(bench.apply(Action::Stop), "end");
    assert!(!bench.owner.is_running());

    let mut bench = Bench::new();
    bench.receive(&[110]);
    bench.receive(&[120]);
    assert_eq!(bench.apply(Action::Stop), "");
    assert_eq!(bench.good(), "acknowledge 110, count 8, ship 9 to 120");
    assert_eq!(bench.good(), "acknowledge 120, count 9, end");

    // The table does not join any more.
    let mut bench = Bench::new();
    bench.apply(Action::Pause);
    bench.receive(&[110]);
    assert_eq!(bench.apply(Action::Stop), "ship 8 to 110");
    assert_eq!(bench.good(), "acknowledge 110, count 8, end");
}

#[test]
fn what_is_not_applied_in_time_is_counted_and_the_time_is_not_given_twice() {
    let mut bench = Bench::new();
    bench.receive(&[110, 120, 130]);
    bench.apply(Action::Stop);
    assert_eq!(bench.wait(GRACE - ms(1)).apply(Action::Stop), "");
    assert_eq!(bench.apply(Action::Tick), "");
    let error = "Transient: 3 transactions had been received and were not applied within limits.shutdown_grace (1s)";
    assert_eq!(bench.wait(ms(1)).apply(Action::Tick), error);
    // An answer that comes just then still counts.
    let mut bench = Bench::new();
    bench.receive(&[110]);
    bench.apply(Action::Stop);
    assert_eq!(bench.wait(GRACE).good(), "acknowledge 110, count 8, end");
}

#[test]
fn a_task_that_ends_takes_the_session_with_it() {
    let mut bench = Bench::new();
    bench.receive(&[110]);
    let ended = bench.apply(Action::TaskEnded(Some(SessionError::NewTable)));
    assert_eq!(ended, "Transient: a new table is to be copied");
    let lost = Bench::new().apply(Action::TaskEnded(None));
    assert!(lost.contains("ended without saying why"), "{lost}");
}

#[test]
fn tables_that_are_new_are_copied_beside_the_stream_or_by_the_next_session() {
    const NEW: &str = "show 1, Transient: a new table is to be copied";
    type Kinds<'k> = &'k [(&'static str, u64)];
    let cases: [(Kinds<'_>, &str, &str); 7] = [
        (&[], "show 0", "show 0"),
        (&[("large_object", 5)], "show 1", "show 1"),
        // As many as could not be published when the session began.
        (
            &[(coverage::UNPUBLISHED_TABLE, 2)],
            "show 1, wake",
            "show 1",
        ),
        (&[(coverage::UNPUBLISHED_TABLE, 3)], "show 1, wake", NEW),
        (&[(coverage::UNIDENTIFIED_TABLE, 1)], "show 1, wake", NEW),
        (&[(coverage::RELISTED_TABLE, 1)], NEW, NEW),
        (&[(coverage::RELISTED_TABLE, 0)], "show 1", "show 1"),
    ];
    for (kinds, beside, anew) in cases {
        assert_eq!(Bench::new().covered(kinds), beside, "{kinds:?}");
        let terms = Terms {
            copies_beside: false,
            ..TERMS
        };
        let mut bench = Bench::with(near(), terms, false);
        assert_eq!(bench.covered(kinds), anew, "{kinds:?}");
    }
}

#[test]
fn the_lag_is_that_of_the_oldest_that_is_not_durable() {
    let mut bench = Bench::new();
    let queued = |bench: &Bench| {
        let verdict = bench.owner.lag.verdict(1_000);
        (verdict.queued_seconds * 1e6).round()
    };
    bench.receive(&[110]);
    bench.receive(&[120]);
    assert_eq!(queued(&bench), 890.0);
    bench.good();
    assert_eq!(queued(&bench), 880.0);
    bench.good();
    assert_eq!(queued(&bench), 0.0);
    let lag = bench.owner.lag.verdict(1_000).lag_seconds.unwrap();
    assert_eq!((lag * 1e6).round(), 880.0);
}
