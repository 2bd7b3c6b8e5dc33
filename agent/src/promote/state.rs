//! ● The promotion as a table: states, and on each edge one idempotent action with its reason.
//!
//! Pure. [`super::execute`] walks the table; `--plan` prints what remains of it. The state is stored
//! in `dr_agent.promotion` of the replica once its action is done and before the next edge is
//! tried, so a promotion that is killed anywhere goes on from the last stored state.
//!
//! ```text
//! standby ─raise term─▶ fenced ─end sessions─▶ quiet ─settle prepared─▶ settled ─drain─▶ drained ─state loss─▶ loss_stated
//!     ─set sequences─▶ finished ─lift guard, write probe─▶ opened ─run hooks─▶ hooks_run ─store report─▶ done
//! ```
//!
//! # Invariants
//! - One edge leaves every state but the last: there is nothing to decide in the middle of the night.
//! - The term is raised on the first edge only, in the transaction that stores `fenced`; a repeated
//!   promotion finds the state and never raises it again.
//! - Everything before `opened` can be repeated without the users noticing: the read-only guard
//!   still stands.
//!
//! # What it does not do
//! No step waits for the source. Under route `direct` without an archive nothing is between source and replica: what was not
//! applied when the term rose is the loss.

use std::fmt;

/// How far a promotion of one database has come. Stored by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PromotionState {
    /// The replica follows the source; no row in `dr_agent.promotion`.
    Standby,
    /// The term is raised: no older agent can commit any more.
    Fenced,
    /// No session of an older agent is left.
    Quiet,
    /// No prepared transaction of an older agent is left.
    Settled,
    /// What was on its way to the replica is applied.
    Drained,
    /// The loss is measured and stored.
    LossStated,
    /// Sequences are ahead of every value that may have been given out.
    Finished,
    /// Other sessions can write; proven by a write.
    Opened,
    /// The hooks have run.
    HooksRun,
    /// The report is stored; a repeat prints it.
    Done,
}

impl PromotionState {
    /// All states, in order.
    pub const ALL: [Self; 10] = [
        Self::Standby,
        Self::Fenced,
        Self::Quiet,
        Self::Settled,
        Self::Drained,
        Self::LossStated,
        Self::Finished,
        Self::Opened,
        Self::HooksRun,
        Self::Done,
    ];

    /// The name stored in `dr_agent.promotion.state`, also used by failpoints and in the report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Fenced => "fenced",
            Self::Quiet => "quiet",
            Self::Settled => "settled",
            Self::Drained => "drained",
            Self::LossStated => "loss_stated",
            Self::Finished => "finished",
            Self::Opened => "opened",
            Self::HooksRun => "hooks_run",
            Self::Done => "done",
        }
    }

    /// Reads a stored name; `None` for one that a newer version has written.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }

    /// Whether the term has been raised: from here on there is no way back to being a replica.
    pub fn is_fenced(self) -> bool {
        self >= Self::Fenced
    }

    /// Whether other sessions can write.
    pub fn is_open(self) -> bool {
        self >= Self::Opened
    }
}

impl fmt::Display for PromotionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is done on an edge. Each is idempotent: done twice it ends as if done once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeAction {
    /// Raises the term in `dr_agent.progress` and stores `fenced`, in one transaction.
    RaiseTerm,
    /// Ends sessions of older agents and waits until they are gone.
    EndSessions,
    /// Commits or rolls back what older agents prepared.
    SettlePrepared,
    /// Applies what the Kinesis stream and the archive hold, after settling what an earlier attempt at it left behind.
    Drain,
    /// Measures what the replica does not have.
    StateLoss,
    /// Sets sequences ahead.
    SetSequences,
    /// Lifts the read-only guard and proves it by a write.
    Open,
    /// Runs the configured hooks, once for all databases.
    RunHooks,
    /// Stores the whole report with every database.
    StoreReport,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    /// The state the action needs.
    pub from: PromotionState,
    /// The state stored once it is done.
    pub to: PromotionState,
    /// What is done.
    pub action: EdgeAction,
    /// Why, for the log, the plan and the operator.
    pub reason: &'static str,
}

/// The table.
pub const EDGES: [Edge; 9] = [
    Edge {
        from: PromotionState::Standby,
        to: PromotionState::Fenced,
        action: EdgeAction::RaiseTerm,
        reason: "raise the term, so that no older agent can commit anything on the replica",
    },
    Edge {
        from: PromotionState::Fenced,
        to: PromotionState::Quiet,
        action: EdgeAction::EndSessions,
        reason: "end the sessions of older agents, so that nothing of theirs holds a lock or is half done",
    },
    Edge {
        from: PromotionState::Quiet,
        to: PromotionState::Settled,
        action: EdgeAction::SettlePrepared,
        reason: "commit prepared lanes of batches that count as applied and roll back the others",
    },
    Edge {
        from: PromotionState::Settled,
        to: PromotionState::Drained,
        action: EdgeAction::Drain,
        reason: "apply what is still on its way, so that it is not lost",
    },
    Edge {
        from: PromotionState::Drained,
        to: PromotionState::LossStated,
        action: EdgeAction::StateLoss,
        reason: "state what the replica does not have, while the source may still be asked",
    },
    Edge {
        from: PromotionState::LossStated,
        to: PromotionState::Finished,
        action: EdgeAction::SetSequences,
        reason: "set sequences ahead of every value the source may have given out",
    },
    Edge {
        from: PromotionState::Finished,
        to: PromotionState::Opened,
        action: EdgeAction::Open,
        reason: "lift the read-only guard and prove it by a write: from here the replica is the primary",
    },
    Edge {
        from: PromotionState::Opened,
        to: PromotionState::HooksRun,
        action: EdgeAction::RunHooks,
        reason: "run the hooks that lead the users here",
    },
    Edge {
        from: PromotionState::HooksRun,
        to: PromotionState::Done,
        action: EdgeAction::StoreReport,
        reason: "store the report, so that a repeated promotion prints the same one",
    },
];

/// The edge that leaves `state`; `None` at the end.
pub fn edge_from(state: PromotionState) -> Option<&'static Edge> {
    EDGES.iter().find(|edge| edge.from == state)
}

/// The next edge that a database walks by itself: none once it is open, since hooks and report
/// belong to all databases together.
pub fn own_edge_from(state: PromotionState) -> Option<&'static Edge> {
    edge_from(state).filter(|_| !state.is_open())
}

/// The edges still to go from `state`, in order.
pub fn remaining(state: PromotionState) -> &'static [Edge] {
    let done = EDGES.iter().take_while(|edge| edge.from < state).count();
    &EDGES[done..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_reached_from_standby_by_exactly_one_edge_each() {
        let mut state = PromotionState::Standby;
        let mut seen = vec![state];
        while let Some(edge) = edge_from(state) {
            assert_eq!(EDGES.iter().filter(|other| other.from == state).count(), 1);
            assert!(
                edge.to > edge.from,
                "{} goes back to {}",
                edge.from,
                edge.to
            );
            state = edge.to;
            seen.push(state);
        }
        assert_eq!(seen, PromotionState::ALL);
        assert_eq!(state, PromotionState::Done);
    }

    #[test]
    fn what_remains_after_a_kill_is_the_rest_of_the_table() {
        for state in PromotionState::ALL {
            let rest = remaining(state);
            assert_eq!(
                rest.first().map(|edge| edge.from),
                edge_from(state).map(|e| e.from)
            );
            let mut reached = state;
            for edge in rest {
                assert_eq!(edge.from, reached);
                reached = edge.to;
            }
            assert_eq!(reached, PromotionState::Done);
        }
    }

    #[test]
    fn the_term_is_raised_on_the_first_edge_only() {
        let raising: Vec<PromotionState> = EDGES
            .iter()
            .filter(|edge| edge.action == EdgeAction::RaiseTerm)
            .map(|edge| edge.from)
            .collect();
        assert_eq!(raising, [PromotionState::Standby]);
        for state in PromotionState::ALL
            .into_iter()
            .filter(|state| state.is_fenced())
        {
            assert!(
                remaining(state)
                    .iter()
                    .all(|edge| edge.action != EdgeAction::RaiseTerm)
            );
        }
    }

    #[test]
    fn a_database_stops_walking_by_itself_once_it_is_open_wherever_it_was_killed() {
        for state in PromotionState::ALL {
            let own = own_edge_from(state).map(|edge| edge.action);
            assert_eq!(own.is_none(), state.is_open(), "{state}");
            assert!(!matches!(
                own,
                Some(EdgeAction::RunHooks | EdgeAction::StoreReport)
            ));
        }
    }

    #[test]
    fn stored_names_read_back_and_unknown_ones_are_noticed() {
        for state in PromotionState::ALL {
            assert_eq!(PromotionState::parse(state.as_str()), Some(state));
        }
        assert_eq!(PromotionState::parse("drained_by_a_newer_version"), None);
    }

    #[test]
    fn the_loss_is_stated_and_sequences_are_set_before_anybody_else_can_write() {
        for action in [
            EdgeAction::StateLoss,
            EdgeAction::SetSequences,
            EdgeAction::SettlePrepared,
        ] {
            let edge = EDGES.iter().find(|edge| edge.action == action).unwrap();
            assert!(!edge.to.is_open(), "{action:?}");
        }
    }
}
