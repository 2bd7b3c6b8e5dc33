//! ● Decides from what was observed whether a promotion may begin, and what remains to be done.
//!
//! Pure. The same plan is printed by `--plan` and obeyed by [`super::execute`].
//!
//! # Invariants
//! - A replica that does not equal the source as of one commit LSN is not promoted unless the
//!   operator says so, and then the report says that he did.
//! - A promotion that has raised the term is never refused: there is no way back, only onwards.
//! - Every database is judged by itself: what is wrong with one costs none of the others.

use std::fmt;

use super::observe::{Database, ObservedReplica, TableSync};
use super::state::{self, Edge, PromotionState};
use super::{Options, SKIP_DRAIN};
use crate::pg::PgLsn;
use crate::schema::progress::TABLE as PROGRESS;
use crate::schema::promotion::TABLE as PROMOTION;

/// A promise that the promotion would break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromotionRefusal {
    /// A configured database is not replicated at all.
    Missing {
        /// Its name.
        database: String,
    },
    /// The initial copy has not begun.
    NotCopied {
        /// The database.
        database: String,
    },
    /// Tables are not copied yet.
    TablesNotReady {
        /// The database.
        database: String,
        /// How many.
        count: i64,
        /// The first few.
        examples: Vec<String>,
    },
    /// Tables were copied at different moments and the stream has not passed the newest.
    BeforeSnapshot {
        /// The database.
        database: String,
        /// Where the stream is.
        end_lsn: PgLsn,
        /// Where it must be.
        snapshot_lsn: PgLsn,
    },
    /// What is on its way to the replica cannot be applied from here. Overridden by leaving it out.
    NotDrainable {
        /// The database.
        database: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The stored promotion is not of this replica's present life. Cannot be overridden.
    OtherTerm {
        /// The database.
        database: String,
        /// Of the promotion row.
        promotion: i64,
        /// Of the progress row.
        progress: i64,
    },
}

impl PromotionRefusal {
    /// The database it concerns.
    pub fn database(&self) -> &str {
        match self {
            Self::Missing { database }
            | Self::NotCopied { database }
            | Self::TablesNotReady { database, .. }
            | Self::BeforeSnapshot { database, .. }
            | Self::NotDrainable { database, .. }
            | Self::OtherTerm { database, .. } => database,
        }
    }

    /// Whether `--accept-incomplete` covers it.
    pub fn can_be_overridden(&self) -> bool {
        !matches!(self, Self::OtherTerm { .. } | Self::NotDrainable { .. })
    }

    /// Whether what is still on its way to the replica may cure it.
    fn ends_with_a_drain(&self) -> bool {
        matches!(self, Self::BeforeSnapshot { .. })
    }
}

impl fmt::Display for PromotionRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { database } => write!(
                f,
                "{database}: named in source.databases, but the replica has no progress of it"
            ),
            Self::NotCopied { database } => write!(f, "{database}: the initial copy has not begun"),
            Self::TablesNotReady {
                database,
                count,
                examples,
            } => {
                let more = if *count > examples.len() as i64 {
                    ", …"
                } else {
                    ""
                };
                write!(
                    f,
                    "{database}: the initial copy of {count} tables is not complete: {}{more}",
                    examples.join(", ")
                )
            }
            Self::BeforeSnapshot {
                database,
                end_lsn,
                snapshot_lsn,
            } => write!(
                f,
                "{database}: applied up to {end_lsn}, but a table was copied at {snapshot_lsn}: tables are of different moments"
            ),
            Self::NotDrainable { database, reason } => write!(
                f,
                "{database}: what is on its way to the replica cannot be applied from here: {reason}. {SKIP_DRAIN} promotes \
                 without it"
            ),
            Self::OtherTerm {
                database,
                promotion,
                progress,
            } => write!(
                f,
                "{database}: {PROMOTION} is of term {promotion}, {PROGRESS} of term {progress}; \
                 the row of {PROMOTION} may go only if this replica was set up anew after that promotion"
            ),
        }
    }
}

/// What remains to be done for one database.
#[derive(Clone, Debug)]
pub struct DatabasePlan {
    /// Its name.
    pub database: String,
    /// Where it stands.
    pub state: PromotionState,
    /// The edges to go.
    pub steps: &'static [Edge],
}

/// The plan.
#[derive(Clone, Debug)]
pub struct PromotionPlan {
    /// Per database, in name order.
    pub databases: Vec<DatabasePlan>,
    /// Promises that would be broken and are not overridden; the databases they concern are not touched.
    pub refusals: Vec<PromotionRefusal>,
    /// Promises that are broken because the operator said so.
    pub overridden: Vec<PromotionRefusal>,
    /// Promises that the drain may keep: judged once it is done.
    pub after_drain: Vec<PromotionRefusal>,
}

impl PromotionPlan {
    /// Why a database is refused, if it is.
    pub fn refusal_of(&self, database: &str) -> Option<&PromotionRefusal> {
        self.refusals
            .iter()
            .find(|refusal| refusal.database() == database)
    }

    /// Whether every database has been promoted and the report stored.
    pub fn is_done(&self) -> bool {
        self.databases
            .iter()
            .all(|database| database.steps.is_empty())
    }
}

/// Makes the plan. `drains`: what is still on its way will be applied first.
pub fn plan(observed: &ObservedReplica, options: Options, drains: bool) -> PromotionPlan {
    // Asked once is enough: whoever repeats a promotion goes on with it.
    let accept_incomplete = options.accept_incomplete
        || observed.databases.iter().any(|database| {
            let stored = database.promotion.as_ref();
            stored.is_some_and(|stored| stored.detail.accept_incomplete)
        });
    let mut found: Vec<PromotionRefusal> = observed.databases.iter().flat_map(refusals).collect();
    let missing = observed.missing.iter().cloned();
    found.extend(missing.map(|database| PromotionRefusal::Missing { database }));
    let (after_drain, now): (Vec<PromotionRefusal>, Vec<PromotionRefusal>) = found
        .into_iter()
        .partition(|refusal| drains && refusal.ends_with_a_drain());
    let (overridden, refusals) = now
        .into_iter()
        .partition(|refusal| accept_incomplete && refusal.can_be_overridden());
    PromotionPlan {
        databases: observed
            .databases
            .iter()
            .map(|database| DatabasePlan {
                database: database.name.clone(),
                state: database.state(),
                steps: state::remaining(database.state()),
            })
            .collect(),
        refusals,
        overridden,
        after_drain,
    }
}

fn refusals(database: &Database) -> Vec<PromotionRefusal> {
    let name = || database.name.clone();
    if let Some(stored) = &database.promotion {
        if stored.term == database.progress.term {
            return Vec::new();
        }
        return vec![PromotionRefusal::OtherTerm {
            database: name(),
            promotion: stored.term,
            progress: database.progress.term,
        }];
    }
    let sync = &database.table_sync;
    // The in-band tables are copied like any other, so a copy that has begun has rows here.
    if sync.total == 0 {
        return vec![PromotionRefusal::NotCopied { database: name() }];
    }
    let mut found = Vec::new();
    if sync.not_ready > 0 {
        found.push(PromotionRefusal::TablesNotReady {
            database: name(),
            count: sync.not_ready,
            examples: sync.examples.clone(),
        });
    }
    found.extend(before_snapshot(
        &database.name,
        database.progress.end_lsn,
        sync,
    ));
    found
}

/// Whether tables are of different moments where the stream stands.
pub(super) fn before_snapshot(
    database: &str,
    end_lsn: PgLsn,
    table_sync: &TableSync,
) -> Option<PromotionRefusal> {
    let snapshot_lsn = table_sync
        .newest_snapshot
        .filter(|snapshot| end_lsn < *snapshot)?;
    Some(PromotionRefusal::BeforeSnapshot {
        database: database.to_owned(),
        end_lsn,
        snapshot_lsn,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::stream::StreamName;
    use crate::promote::Detail;
    use crate::promote::observe::{AppliedProgress, Stored};

    fn ready(name: &str) -> Database {
        Database {
            name: name.to_owned(),
            stream: StreamName::new("dr_agent", name),
            progress: AppliedProgress {
                term: 1,
                batch: 7,
                end_lsn: PgLsn::from(1000),
                commit_time: None,
                commit_age_seconds: None,
                applied_age_seconds: 0.0,
                replica_ahead_seconds: None,
            },
            table_sync: TableSync {
                total: 3,
                newest_snapshot: Some(PgLsn::from(1000)),
                ..TableSync::default()
            },
            promotion: None,
            sequences: 0,
            agent_sessions: 0,
            prepared: 0,
            coverage: crate::watch::coverage::Coverage::default(),
        }
    }

    fn promoted(name: &str, state: PromotionState, term: i64) -> Database {
        let mut database = ready(name);
        database.progress.term = 2;
        database.promotion = Some(Stored {
            state,
            term,
            detail: Detail::default(),
        });
        database
    }

    fn observed(databases: Vec<Database>) -> ObservedReplica {
        ObservedReplica {
            databases,
            ..ObservedReplica::default()
        }
    }

    fn plan(observed: &ObservedReplica, options: Options) -> PromotionPlan {
        super::plan(observed, options, false)
    }

    const ACCEPT: Options = Options {
        plan: false,
        accept_incomplete: true,
        skip_drain: false,
    };

    #[test]
    fn a_complete_replica_walks_the_whole_table() {
        let plan = plan(&observed(vec![ready("app")]), Options::default());
        assert!(plan.refusals.is_empty());
        assert_eq!(plan.databases[0].steps.len(), state::EDGES.len());
        assert!(!plan.is_done());
    }

    #[test]
    fn one_incomplete_database_is_refused_and_the_others_are_not() {
        let mut half = ready("half");
        half.table_sync.not_ready = 1;
        half.table_sync.examples = vec!["public.t (copying)".to_owned()];
        let plan = plan(&observed(vec![ready("app"), half]), Options::default());
        assert_eq!(plan.refusals.len(), 1);
        assert!(plan.refusals[0].to_string().contains("public.t (copying)"));
        assert!(plan.refusal_of("half").is_some() && plan.refusal_of("app").is_none());
    }

    #[test]
    fn tables_of_different_moments_are_refused() {
        let mut behind = ready("app");
        behind.progress.end_lsn = PgLsn::from(999);
        let plan = plan(&observed(vec![behind]), Options::default());
        assert!(matches!(
            plan.refusals[..],
            [PromotionRefusal::BeforeSnapshot { .. }]
        ));
    }

    #[test]
    fn whether_they_are_is_judged_later_where_more_is_applied_first() {
        let mut behind = ready("app");
        behind.progress.end_lsn = PgLsn::from(999);
        behind.table_sync.not_ready = 1;
        let plan = super::plan(&observed(vec![behind]), Options::default(), true);
        assert!(matches!(
            plan.after_drain[..],
            [PromotionRefusal::BeforeSnapshot { .. }]
        ));
        // A copy that never ended does not end by it.
        assert!(matches!(
            plan.refusals[..],
            [PromotionRefusal::TablesNotReady { .. }]
        ));
    }

    #[test]
    fn a_progress_row_without_a_copy_and_a_missing_database_are_refused() {
        let mut empty = ready("app");
        empty.table_sync = TableSync::default();
        let plan = plan(
            &ObservedReplica {
                databases: vec![empty],
                missing: vec!["gone".to_owned()],
                ..ObservedReplica::default()
            },
            Options::default(),
        );
        assert!(matches!(
            plan.refusals[..],
            [
                PromotionRefusal::NotCopied { .. },
                PromotionRefusal::Missing { .. }
            ]
        ));
    }

    #[test]
    fn the_override_is_obeyed_and_recorded() {
        let mut empty = ready("app");
        empty.table_sync = TableSync::default();
        let plan = plan(&observed(vec![empty]), ACCEPT);
        assert!(plan.refusals.is_empty());
        assert_eq!(plan.overridden.len(), 1);
    }

    #[test]
    fn a_promotion_that_has_raised_the_term_is_not_refused_any_more() {
        let mut fenced = promoted("app", PromotionState::Fenced, 2);
        fenced.table_sync = TableSync::default();
        let plan = plan(&observed(vec![fenced]), Options::default());
        assert!(plan.refusals.is_empty());
        assert_eq!(plan.databases[0].steps.len(), state::EDGES.len() - 1);
    }

    #[test]
    fn what_was_accepted_when_it_began_need_not_be_said_again() {
        let mut begun = promoted("app", PromotionState::Opened, 2);
        begun.promotion.as_mut().unwrap().detail.accept_incomplete = true;
        let missing = vec!["gone".to_owned()];
        let observed = ObservedReplica {
            missing,
            ..observed(vec![begun])
        };
        assert!(plan(&observed, Options::default()).refusals.is_empty());
    }

    #[test]
    fn a_finished_promotion_leaves_nothing_to_do() {
        let plan = plan(
            &observed(vec![promoted("app", PromotionState::Done, 2)]),
            Options::default(),
        );
        assert!(plan.is_done() && plan.refusals.is_empty());
    }

    #[test]
    fn a_promotion_of_another_life_of_the_replica_is_refused_whatever_is_accepted() {
        let plan = plan(
            &observed(vec![promoted("app", PromotionState::Done, 9)]),
            ACCEPT,
        );
        assert!(matches!(
            plan.refusals[..],
            [PromotionRefusal::OtherTerm { .. }]
        ));
    }
}
