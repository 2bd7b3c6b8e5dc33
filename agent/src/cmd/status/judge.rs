//! ● One verdict per database out of what the witnesses say.
//!
//! Pure.
//!
//! # Invariants
//! - Silence is not health: what is not known to be within the RPO is not said to be.

use super::agent::AgentDatabase;
use super::view::{DatabaseOverview, RpoVerdict};
use crate::promote::loss::SourceAnswer;
use crate::promote::observe::Database;

/// What the witnesses say of one database.
pub(super) struct WitnessFacts<'a> {
    pub(super) rpo_seconds: f64,
    pub(super) here: Option<&'a Database>,
    pub(super) missing: bool,
    pub(super) report: Option<&'a AgentDatabase>,
    pub(super) answer: Option<&'a SourceAnswer>,
}

/// Judges; name, stream, archive and Kinesis stream are added by whoever asked.
pub(super) fn judge(facts: &WitnessFacts<'_>) -> DatabaseOverview {
    let WitnessFacts { here, report, .. } = *facts;
    let promotion = here.and_then(|here| here.promotion.as_ref());
    let age = |here: &Database| here.progress.age_seconds();
    let lag_seconds = match (report, here) {
        // It knows how far the stream is, and the replica how far it is itself.
        (Some(report), Some(here)) if report.sends() => report
            .lag_seconds
            .zip(age(here))
            .map(|(sent, applied)| sent.max(applied)),
        (Some(report), _) => report.lag_seconds,
        (None, here) => here.and_then(age),
    };
    let not_ready = here.map(|here| here.table_sync.not_ready);
    let behind_snapshot = here.is_some_and(|here| {
        here.table_sync
            .newest_snapshot
            .is_some_and(|snapshot| here.progress.end_lsn < snapshot)
    });

    let (state, rpo, reason) = if promotion.is_some() {
        (
            "promoted",
            RpoVerdict::Promoted,
            Some("nothing replicates it any more".to_owned()),
        )
    } else {
        let state = match report {
            Some(report) => report.state.as_str(),
            None if facts.missing => "missing",
            None => "no_agent",
        };
        let (rpo, reason) = if facts.missing {
            (
                RpoVerdict::Breached,
                Some("the replica does not have it".to_owned()),
            )
        } else if not_ready.is_some_and(|count| count > 0) || behind_snapshot {
            (
                RpoVerdict::Breached,
                Some("the initial copy is not complete: it cannot be promoted".to_owned()),
            )
        } else if report.is_some_and(AgentDatabase::stands) {
            (
                RpoVerdict::Breached,
                Some("it is not replicated until its error is resolved".to_owned()),
            )
        } else if report.is_some_and(|report| report.rpo_breached == Some(true)) {
            (RpoVerdict::Breached, None)
        } else {
            match lag_seconds {
                Some(lag) if lag <= facts.rpo_seconds => (RpoVerdict::Met, None),
                Some(_) => (RpoVerdict::Breached, None),
                None => (
                    RpoVerdict::Unknown,
                    Some("the lag is not known yet".to_owned()),
                ),
            }
        };
        (state, rpo, reason)
    };
    let progress = here.map(|here| &here.progress);
    DatabaseOverview {
        database: String::new(),
        stream: String::new(),
        leg: report.and_then(|report| report.leg.clone()),
        state: state.to_owned(),
        since: report.and_then(|report| report.since.clone()),
        waits_for: report.and_then(|report| report.waits_for.clone()),
        set_aside: report
            .map(|report| report.set_aside.clone())
            .unwrap_or_default(),
        missing_constraints: report
            .map(|report| report.missing_constraints.clone())
            .unwrap_or_default(),
        rpo,
        reason,
        lag_seconds,
        lag_bytes: match report {
            Some(report) => report.lag_bytes,
            None => facts.answer.and_then(|answer| answer.bytes),
        },
        slot_retained_bytes: report.and_then(|report| report.slot_retained_bytes),
        term: progress.map(|progress| progress.term),
        batch: progress.map(|progress| progress.batch),
        end_lsn: progress.map(|progress| progress.end_lsn.to_string()),
        commit_time: progress.and_then(|progress| progress.commit_time.clone()),
        promotion: promotion.map(|stored| stored.state.to_string()),
        tables_not_ready: not_ready,
        coverage: here.map(|here| here.coverage.clone()),
        error: report
            .and_then(|report| report.error.clone())
            .or_else(|| facts.answer.and_then(|answer| answer.unknown.clone())),
        hint: report.and_then(|report| report.hint.clone()),
        archive: None,
        kinesis: None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::agent::SEND;
    use super::*;
    use crate::names::stream::StreamName;
    use crate::pg::PgLsn;
    use crate::promote::Detail;
    use crate::promote::observe::{AppliedProgress, Stored, TableSync};
    use crate::promote::state::PromotionState;
    use crate::watch::coverage::Coverage;

    fn applied(age: Option<f64>) -> Database {
        Database {
            name: "app".to_owned(),
            stream: StreamName::new("dr_agent", "app"),
            progress: AppliedProgress {
                term: 1,
                batch: 7,
                end_lsn: PgLsn::from(1000),
                commit_time: None,
                commit_age_seconds: age,
                applied_age_seconds: 0.0,
                replica_ahead_seconds: None,
            },
            table_sync: TableSync {
                total: 3,
                ..TableSync::default()
            },
            promotion: None,
            sequences: 0,
            agent_sessions: 0,
            prepared: 0,
            coverage: Coverage::default(),
        }
    }

    #[test]
    fn what_needs_a_person_is_breached_whatever_its_lag() {
        let here = applied(Some(0.0));
        for (state, verdict) in [
            ("initializing", RpoVerdict::Met),
            ("copying", RpoVerdict::Met),
            ("streaming", RpoVerdict::Met),
            ("retrying", RpoVerdict::Met),
            ("stopped", RpoVerdict::Breached),
            ("fenced", RpoVerdict::Breached),
            ("promoted", RpoVerdict::Breached),
        ] {
            let mut report = streaming(Some(0.0));
            report.state = state.to_owned();
            assert_eq!(judged(Some(&here), Some(&report)).1, verdict, "{state}");
        }
    }

    #[test]
    fn a_replica_whose_clock_is_behind_does_not_make_the_last_commit_younger() {
        let mut here = applied(Some(-500.0));
        here.progress.applied_age_seconds = 100.0;
        assert_eq!(judged(Some(&here), None).1, RpoVerdict::Breached);
        here.progress.applied_age_seconds = -1.0;
        assert_eq!(judged(Some(&here), None).1, RpoVerdict::Unknown);
    }

    fn streaming(lag: Option<f64>) -> AgentDatabase {
        AgentDatabase {
            database: "app".to_owned(),
            state: "streaming".to_owned(),
            lag_seconds: lag,
            ..AgentDatabase::default()
        }
    }

    fn judged(here: Option<&Database>, report: Option<&AgentDatabase>) -> (String, RpoVerdict) {
        let status = judge(&WitnessFacts {
            rpo_seconds: 30.0,
            here,
            missing: false,
            report,
            answer: None,
        });
        (status.state, status.rpo)
    }

    #[test]
    fn the_agents_lag_counts_where_it_answers_and_the_last_commits_age_where_it_does_not() {
        let old = applied(Some(300.0));
        assert_eq!(
            judged(Some(&old), Some(&streaming(Some(0.1)))),
            ("streaming".into(), RpoVerdict::Met)
        );
        assert_eq!(
            judged(Some(&old), None),
            ("no_agent".into(), RpoVerdict::Breached)
        );
        assert_eq!(
            judged(Some(&applied(Some(1.0))), None),
            ("no_agent".into(), RpoVerdict::Met)
        );
    }

    #[test]
    fn what_is_in_the_stream_is_not_on_the_replica_where_that_can_be_seen() {
        let mut sending = streaming(Some(0.1));
        sending.leg = Some(SEND.to_owned());
        assert_eq!(judged(None, Some(&sending)).1, RpoVerdict::Met);
        assert_eq!(
            judged(Some(&applied(Some(1.0))), Some(&sending)).1,
            RpoVerdict::Met
        );
        assert_eq!(
            judged(Some(&applied(Some(300.0))), Some(&sending)).1,
            RpoVerdict::Breached
        );
        assert_eq!(
            judged(Some(&applied(None)), Some(&sending)).1,
            RpoVerdict::Unknown
        );
    }

    #[test]
    fn a_lag_above_the_objective_or_the_agents_own_alarm_breaches() {
        let here = applied(Some(1.0));
        assert_eq!(
            judged(Some(&here), Some(&streaming(Some(30.1)))).1,
            RpoVerdict::Breached
        );
        let mut alarmed = streaming(Some(0.0));
        alarmed.rpo_breached = Some(true);
        assert_eq!(judged(Some(&here), Some(&alarmed)).1, RpoVerdict::Breached);
    }

    #[test]
    fn what_cannot_be_promoted_does_not_meet_the_rpo_however_small_its_lag() {
        let mut copying = applied(Some(0.0));
        copying.table_sync.not_ready = 1;
        assert_eq!(
            judged(Some(&copying), Some(&streaming(Some(0.0)))).1,
            RpoVerdict::Breached
        );
        let mut behind = applied(Some(0.0));
        behind.table_sync.newest_snapshot = Some(PgLsn::from(1001));
        assert_eq!(judged(Some(&behind), None).1, RpoVerdict::Breached);
    }

    #[test]
    fn an_unknown_lag_is_not_taken_for_none() {
        assert_eq!(judged(Some(&applied(None)), None).1, RpoVerdict::Unknown);
        assert_eq!(judged(None, Some(&streaming(None))).1, RpoVerdict::Unknown);
    }

    #[test]
    fn a_promoted_database_says_so_whatever_an_old_agent_claims() {
        let mut promoted = applied(Some(0.0));
        promoted.promotion = Some(Stored {
            state: PromotionState::Done,
            term: 2,
            detail: Detail::default(),
        });
        assert_eq!(
            judged(Some(&promoted), Some(&streaming(Some(0.0)))),
            ("promoted".into(), RpoVerdict::Promoted)
        );
    }
}
