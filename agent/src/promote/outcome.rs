//! Makes the report: of databases as far as they have come, and of a plan.
//!
//! # Invariants
//! - Made from what is stored with the databases, so that a promotion killed and repeated reports one
//!   story.
//!
//! # What it does not do
//! Only a plan asks anybody anything here: the source, for the bytes that would be lost now.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::observe::{Database, ObservedReplica};
use super::plan::{PromotionPlan, PromotionRefusal};
use super::report::{DatabaseReport, PromotionOutcome, PromotionReport, StepReport};
use super::state::EdgeAction;
use super::steps::DatabaseRecord;
use super::{ACCEPT_INCOMPLETE, Options, loss};
use crate::config::Config;

/// The report as far as the databases have come; `not_tried` are those that this run did not touch.
pub(super) fn report(
    config: &Config,
    outcome: PromotionOutcome,
    records: &[DatabaseRecord],
    not_tried: Vec<DatabaseReport>,
) -> PromotionReport {
    let mut report = empty_report(config, outcome);
    report.databases = records
        .iter()
        .map(|record| record.detail.database.clone())
        .chain(not_tried)
        .collect();
    report.databases.sort_by(|a, b| a.database.cmp(&b.database));
    for record in records {
        let detail = &record.detail;
        report.accept(&detail.accepted, &detail.overrides);
    }
    let started = records
        .iter()
        .filter_map(|record| record.detail.started_at.parse::<Timestamp>().ok())
        .min();
    report.started_at = started.map(|at| at.to_string()).unwrap_or_default();
    let writable: Option<Vec<Timestamp>> = report
        .databases
        .iter()
        .map(|database| database.writable_at.as_ref()?.parse().ok())
        .collect();
    let writable = writable.and_then(|moments| moments.into_iter().max());
    report.writable_at = writable.map(|at| at.to_string());
    let seconds = started
        .zip(writable)
        .map(|(from, to)| to.duration_since(from).as_secs_f64());
    report.judge(seconds.map(loss::seconds_lost));
    report.warnings = standing_warnings(&report);
    report
}

fn standing_warnings(report: &PromotionReport) -> Vec<String> {
    let mut warnings = Vec::new();
    if report
        .databases
        .iter()
        .any(|database| database.source_answered)
    {
        warnings.push(
            "the source STILL ANSWERS and was not fenced: stop it now; what is written there from here on is lost".to_owned(),
        );
    } else {
        warnings.push(
            "the source was not fenced: if it comes back, nobody must write to it any more"
                .to_owned(),
        );
    }
    let (open, others): (Vec<&DatabaseReport>, Vec<_>) = report
        .databases
        .iter()
        .partition(|database| database.is_open());
    if !open.is_empty() && !others.is_empty() {
        let names: Vec<&str> = others.iter().map(|one| one.database.as_str()).collect();
        warnings.push(format!(
            "NOT OPEN: {}; the others are, and the hooks were told which (DR_AGENT_DATABASES_NOT_OPEN)",
            names.join(", ")
        ));
    }
    if !open.is_empty() {
        warnings
            .push("nothing replicates the new primary yet: set up its own protection".to_owned());
    }
    warnings
}

fn empty_report(config: &Config, outcome: PromotionOutcome) -> PromotionReport {
    PromotionReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mode: "failover".to_owned(),
        outcome,
        replica: config.replica.conninfo.to_string(),
        started_at: String::new(),
        writable_at: None,
        rto_seconds: None,
        rto_objective_seconds: config.objectives.rto.as_secs_f64(),
        rto_met: None,
        rpo_seconds: None,
        rpo_objective_seconds: config.objectives.rpo.as_secs_f64(),
        rpo_met: None,
        overrides: Vec::new(),
        accepted: Vec::new(),
        refusals: Vec::new(),
        databases: Vec::new(),
        hooks: Vec::new(),
        warnings: Vec::new(),
    }
}

/// What would be done, with the values of this moment. Also the answer where it is refused.
pub(super) async fn planned(
    config: &Config,
    observed: &ObservedReplica,
    plan: &PromotionPlan,
    found: &BTreeMap<String, String>,
    options: Options,
    now: Timestamp,
) -> PromotionReport {
    let outcome = if options.plan {
        PromotionOutcome::Planned
    } else {
        PromotionOutcome::Refused
    };
    let mut report = empty_report(config, outcome);
    report.started_at = now.to_string();
    report.refusals = plan
        .refusals
        .iter()
        .map(PromotionRefusal::to_string)
        .collect();
    let accepted: Vec<String> = plan
        .overridden
        .iter()
        .map(PromotionRefusal::to_string)
        .collect();
    if !accepted.is_empty() {
        report.accept(&accepted, &[ACCEPT_INCOMPLETE.to_owned()]);
    }
    for refusal in &plan.after_drain {
        report.warnings.push(format!(
            "{refusal}; judged once the Kinesis stream is drained, which may lead past it"
        ));
    }
    if options.plan && !found.is_empty() {
        report.warnings.push(
            "what is on its way is applied first: less may be lost than is not applied now"
                .to_owned(),
        );
    }
    for (database, steps) in observed.databases.iter().zip(&plan.databases) {
        let mut entry = DatabaseReport {
            database: database.name.clone(),
            stream: database.stream.to_string(),
            state: database.state().to_string(),
            term: database.progress.term,
            end_lsn: database.progress.end_lsn.to_string(),
            batch: database.progress.batch,
            commit_time: database.progress.commit_time.clone(),
            rpo_seconds: database.progress.age_seconds(),
            replica_clock_ahead_seconds: database.progress.replica_ahead_seconds,
            coverage: database.coverage.clone(),
            ..DatabaseReport::default()
        };
        if options.plan && !database.state().is_fenced() {
            let conninfo = config.source.conninfo.with_dbname(&database.name);
            let question = loss::Question {
                conninfo: &conninfo,
                stream: &database.stream,
                end_lsn: database.progress.end_lsn,
                system_identifier: None,
                count: false,
            };
            entry.take_answer(loss::ask(&question).await);
        }
        entry.steps = steps
            .steps
            .iter()
            .map(|edge| StepReport {
                state: edge.to.to_string(),
                seconds: None,
                note: format!(
                    "{}{}",
                    edge.reason,
                    now_there(edge.action, database, config, found)
                ),
            })
            .collect();
        report.databases.push(entry);
    }
    report
        .databases
        .extend(super::close::unreachable(config, observed));
    report.judge(None);
    report
}

fn now_there(
    action: EdgeAction,
    database: &Database,
    config: &Config,
    found: &BTreeMap<String, String>,
) -> String {
    match action {
        EdgeAction::RaiseTerm => format!(" (to {})", database.progress.term + 1),
        EdgeAction::EndSessions => format!(" ({} now)", database.agent_sessions),
        EdgeAction::SettlePrepared => format!(" ({} now)", database.prepared),
        EdgeAction::SetSequences => format!(" ({} sequences)", database.sequences),
        EdgeAction::RunHooks => format!(" ({} hooks)", config.hooks.len()),
        EdgeAction::Drain => match (
            found.get(&database.name),
            config.route.kinesis_stream(&database.name),
        ) {
            (Some(said), _) => format!(" ({said})"),
            (None, Some(stream)) => format!(" (Kinesis stream {stream})"),
            (None, None) => match &config.archive {
                Some(archive) => format!(" (archive {})", archive.url),
                None => " (route direct, and no archive: nothing)".to_owned(),
            },
        },
        EdgeAction::StateLoss | EdgeAction::Open | EdgeAction::StoreReport => String::new(),
    }
}
