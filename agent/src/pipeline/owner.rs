//! ● The state of one session, and what is to be done about whatever happens to it.
//!
//! ```text
//! Action, now ─▶ apply ─▶ Step, Step, …      streaming: waits for the next action, and carries the steps out
//! ```
//! Pure: time is an argument, and what a step costs is somebody else's. So every order of events can be tried.
//!
//! # Invariants
//! - Only one thing happens at a time, and all state of the session is here.
//! - The slot is told what is durable and what the change log lets go, nothing else; each batch is shipped once, in order.
//! - What was received is applied before a session ends that was told to stop, or the session says that it was not.
//! - While a late table joins nothing is shipped; it is told the position at which nothing is on its way.
//!
//! # What it does not do
//! It waits for nothing, sends nothing, and counts nothing that is shown.

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::SessionError;
use crate::flow::batch::{Batch, Received, Ship, Spacing};
use crate::flow::ledger::FlushLsn;
use crate::flow::shipment::Shipment;
use crate::observe::lag::Lag;
use crate::pg::PgLsn;
use crate::sink::{Applied, Outcome};
use crate::time::Micros;
use crate::watch::coverage::{self, Unprotected};

/// What can happen to a pipeline that streams.
#[derive(Debug)]
pub(super) enum Action<P> {
    /// These have arrived together.
    Received(Vec<Received<P>>),
    Outcome(Outcome<SessionError>),
    /// What the monitor found unprotected.
    Covered(Vec<Unprotected>),
    /// The change log lets the slot move up to here, or anywhere.
    Held(Option<PgLsn>),
    /// A late table wants to join: nothing more is to be shipped, and it is to be told up to where everything is applied.
    Pause,
    /// It has joined, or does not want to any more.
    GoOn,
    /// Some time has passed.
    Tick,
    Stop,
    TaskEnded(Option<SessionError>),
}

/// What is to be done, in this order.
#[derive(Debug)]
pub(super) enum Step {
    /// The slot may forget what lies before.
    Acknowledge(FlushLsn),
    /// A batch is durable: it is counted and shown.
    Count {
        batch: Arc<Batch>,
        applied: Applied,
        took: Duration,
    },
    /// What is unprotected is shown.
    Show(Vec<Unprotected>),
    /// There is something for whoever copies late tables.
    WakeLate,
    Ship(Batch),
    /// Nothing is on its way any more: everything up to here is applied.
    Paused(PgLsn),
    /// The session is over: it has drained, or cannot go on. Nothing follows.
    End(Result<(), SessionError>),
}

/// When something happens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// The agent's own time.
    pub(super) time: Micros,
}

/// What holds for a whole session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Tables that could not be published when the session began.
    pub(super) left_out: u64,
    /// Whether late tables are copied beside the stream.
    pub(super) copies_beside: bool,
    /// How long what was received may take once it is told to stop.
    pub(super) grace: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Nothing more is taken in; what has been received is still applied.
    Draining {
        deadline: Instant,
    },
}

/// Whether the stream waits for a late table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    No,
    /// What was shipped before is still on its way.
    Asked,
    Answered,
}

/// The state proper.
#[derive(Debug)]
pub(super) struct Owner<P> {
    shipment: Shipment<P>,
    spacing: Spacing,
    shipped_at: Instant,
    due: Option<Instant>,
    pub(super) lag: Lag,
    terms: Terms,
    pause: Pause,
    phase: Phase,
}

impl<P> Owner<P> {
    pub(super) fn new(
        shipment: Shipment<P>,
        spacing: Spacing,
        lag: Lag,
        terms: Terms,
        now: Instant,
    ) -> Self {
        Self {
            shipment,
            spacing,
            shipped_at: now,
            due: None,
            lag,
            terms,
            pause: Pause::No,
            phase: Phase::Running,
        }
    }

    /// Whether more is taken in.
    pub(super) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// When the next batch is due that is not full and waits behind others.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Where what was shipped last ends.
    pub(super) fn shipped(&self) -> PgLsn {
        self.shipment.shipped()
    }

    /// Up to where everything is durable, whatever the change log says.
    pub(super) fn sunk(&self) -> PgLsn {
        self.shipment.sunk()
    }

    /// Takes in what has happened; says what is to be done.
    pub(super) fn apply(&mut self, action: Action<P>, now: Now) -> Vec<Step> {
        let mut steps = Vec::new();
        if let Err(error) = self.take(action, now, &mut steps) {
            steps.push(Step::End(Err(error)));
            return steps;
        }
        // Whatever it was: what may go goes, and who waits for a standstill hears of it.
        while let Some(batch) = self.next_batch(now.instant) {
            steps.push(Step::Ship(batch));
        }
        if self.pause == Pause::Asked && self.shipment.in_flight() == 0 {
            self.pause = Pause::Answered;
            steps.push(Step::Paused(self.shipped()));
        }
        self.lag.queued(self.shipment.oldest_commit_time());
        if !self.is_running() && self.shipment.is_settled() {
            steps.push(Step::End(Ok(())));
        }
        steps
    }

    fn take(
        &mut self,
        action: Action<P>,
        now: Now,
        steps: &mut Vec<Step>,
    ) -> Result<(), SessionError> {
        match action {
            Action::Received(arrived) => {
                for received in arrived {
                    self.lag
                        .received(received.transaction.commit_time, now.time);
                    self.shipment.receive(received);
                }
            }
            Action::Outcome(outcome) => self.durable(outcome, now.time, steps)?,
            Action::Covered(unprotected) => {
                let wanted = Wanted::of(&unprotected, self.terms);
                steps.push(Step::Show(unprotected));
                match wanted {
                    Wanted::Nothing => {}
                    Wanted::Beside => steps.push(Step::WakeLate),
                    Wanted::NewSession => return Err(SessionError::NewTable),
                }
            }
            Action::Held(position) => {
                let flush = self.shipment.hold(position);
                steps.extend(flush.map(Step::Acknowledge));
            }
            Action::Pause => self.pause = Pause::Asked,
            Action::GoOn => self.pause = Pause::No,
            Action::Tick => return self.grace_is_over(now.instant),
            Action::Stop if self.is_running() => {
                let deadline = now.instant + self.terms.grace;
                self.phase = Phase::Draining { deadline };
            }
            Action::Stop => {}
            Action::TaskEnded(error) => return Err(error.unwrap_or(SessionError::TaskLost)),
        }
        Ok(())
    }

    fn durable(
        &mut self,
        outcome: Outcome<SessionError>,
        now: Micros,
        steps: &mut Vec<Step>,
    ) -> Result<(), SessionError> {
        let Outcome {
            batch,
            result,
            took,
        } = outcome;
        let applied = result?;
        let flush = self.shipment.durable(batch.number);
        steps.extend(flush.map(Step::Acknowledge));
        self.lag.applied(batch.commit_time(), now);
        steps.push(Step::Count {
            batch,
            applied,
            took,
        });
        Ok(())
    }

    /// What was not applied is sent again after the next start.
    fn grace_is_over(&self, now: Instant) -> Result<(), SessionError> {
        match self.phase {
            Phase::Draining { deadline } if now >= deadline => Err(SessionError::NotDrained {
                transactions: self.shipment.transactions(),
                grace: self.terms.grace,
            }),
            Phase::Draining { .. } | Phase::Running => Ok(()),
        }
    }

    /// The next batch, if it is time for one.
    fn next_batch(&mut self, now: Instant) -> Option<Batch> {
        self.due = None;
        // A session that ends does not wait for a table.
        if self.pause != Pause::No && self.is_running() {
            return None;
        }
        let since = now.saturating_duration_since(self.shipped_at);
        match self.shipment.judge(&self.spacing, since)? {
            Ship::Now => {}
            Ship::In(wait) => {
                self.due = Some(now + wait);
                return None;
            }
            Ship::AfterAnAnswer => return None,
        }
        self.shipped_at = now;
        self.shipment.ship()
    }
}

/// What is wanted for tables that are unprotected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Nothing,
    /// They are copied beside the stream.
    Beside,
    /// Only the beginning of a session takes them in.
    NewSession,
}

impl Wanted {
    fn of(unprotected: &[Unprotected], terms: Terms) -> Self {
        let count = |kind: &str| {
            let found = unprotected.iter().find(|found| found.kind == kind);
            found.map_or(0, |found| found.count)
        };
        let unpublished = count(coverage::UNPUBLISHED_TABLE);
        let new = unpublished > terms.left_out || count(coverage::UNIDENTIFIED_TABLE) > 0;
        let relisted = count(coverage::RELISTED_TABLE) > 0;
        match terms.copies_beside && !relisted {
            true if new || unpublished > 0 => Self::Beside,
            false if new || relisted => Self::NewSession,
            _ => Self::Nothing,
        }
    }
}
