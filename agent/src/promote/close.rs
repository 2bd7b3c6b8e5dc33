//! The end of a promotion: the hooks, once, and the report, with every database that is open.
//!
//! ```text
//! records, and what was not tried ─▶ a stored report covers all that is open? ─no─▶ hooks ─┐
//!                                                                        └─yes─────────────┴▶ report ─▶ stored with every database
//! ```
//!
//! # Invariants
//! - Hooks run while the promotion's lock is held, and again only if a database has been opened since.
//! - A promotion killed between the hooks and the storing of their result runs them again; one killed while storing does not.
//! - A database whose report cannot be stored costs none of the others theirs.

use std::io::Write as _;

use super::execute::connect;
use super::lock::PromotionLock;
use super::observe::ObservedReplica;
use super::outcome::report;
use super::plan::{PromotionPlan, PromotionRefusal};
use super::report::{DatabaseReport, HookReport, PromotionOutcome, PromotionReport};
use super::state::PromotionState;
use super::steps::DatabaseRecord;
use super::{PromoteError, hooks};
use crate::config::Config;
use crate::error::{Classify as _, chain};
use crate::failpoint;

/// Databases that this run did not touch.
pub(super) struct NotTried {
    refusals: Vec<String>,
    databases: Vec<DatabaseReport>,
}

impl NotTried {
    /// Those that were refused, that are missing, and that cannot be entered.
    pub(super) fn of(config: &Config, observed: &ObservedReplica, plan: &PromotionPlan) -> Self {
        let mut databases = Vec::new();
        for refusal in &plan.refusals {
            let database = refusal.database();
            let here = observed.databases.iter().find(|one| one.name == database);
            databases.push(DatabaseReport {
                state: here.map_or("missing".to_owned(), |here| here.state().to_string()),
                term: here.map_or(0, |here| here.progress.term),
                error: Some(format!("refused: {refusal}")),
                ..of_name(config, database)
            });
        }
        // Several reasons for one database are one database.
        databases.dedup_by(|b, a| a.database == b.database);
        databases.extend(unreachable(config, observed));
        Self {
            refusals: plan
                .refusals
                .iter()
                .map(PromotionRefusal::to_string)
                .collect(),
            databases,
        }
    }
}

fn of_name(config: &Config, database: &str) -> DatabaseReport {
    DatabaseReport {
        database: database.to_owned(),
        stream: config.stream(database).to_string(),
        ..DatabaseReport::default()
    }
}

/// What is said of databases that could not be looked at.
pub(super) fn unreachable(config: &Config, observed: &ObservedReplica) -> Vec<DatabaseReport> {
    let said = observed.unreachable.iter().map(|one| DatabaseReport {
        state: "unreachable".to_owned(),
        error: Some(one.reason.clone()),
        hint: one.hint.clone(),
        ..of_name(config, &one.name)
    });
    said.collect()
}

/// Runs the hooks and stores the report with every database that is open.
pub(super) async fn close(
    config: &Config,
    lock: &PromotionLock,
    mut records: Vec<DatabaseRecord>,
    not_tried: NotTried,
) -> Result<PromotionReport, PromoteError> {
    let all = not_tried.databases.is_empty() && records.iter().all(|record| record.state.is_open());
    let outcome = if all {
        PromotionOutcome::Promoted
    } else {
        PromotionOutcome::Failed
    };
    let mut report = report(config, outcome, &records, not_tried.databases);
    report.refusals = not_tried.refusals;
    if !records.iter().any(|record| record.state.is_open()) {
        return Ok(report);
    }
    match already_run(&records) {
        Some(hooks) => report.hooks = hooks,
        None if config.hooks.is_empty() => {}
        None => {
            lock.check().await?;
            let file = report_file(&report).map_err(PromoteError::ReportFile)?;
            let environment = hooks::environment(config, &report, file.path());
            report.hooks = hooks::run(&config.hooks, &environment).await;
        }
    }
    let failed = report.hooks.iter().filter(|hook| !hook.ok);
    let warnings: Vec<String> = failed
        .map(|hook| {
            format!(
                "hook {} failed ({}): do by hand what it does",
                hook.name, hook.outcome
            )
        })
        .collect();
    report.warnings.extend(warnings);
    for database in &mut report.databases {
        if database.is_open() {
            // Stored with the last two states, and read once they are.
            database.state = PromotionState::Done.to_string();
        }
    }
    store(config, &mut records, &mut report).await;
    Ok(report)
}

/// What the hooks did, if they ran when everything was open that is.
fn already_run(records: &[DatabaseRecord]) -> Option<Vec<HookReport>> {
    let covers = |report: &&PromotionReport| {
        records
            .iter()
            .filter(|record| record.state.is_open())
            .all(|record| {
                let of = |database: &DatabaseReport| {
                    database.database == record.name && database.is_open()
                };
                report.databases.iter().any(of)
            })
    };
    let stored = records
        .iter()
        .filter_map(|record| record.detail.report.as_ref());
    stored
        .filter(covers)
        .map(|report| report.hooks.clone())
        .next()
}

async fn store(config: &Config, records: &mut [DatabaseRecord], report: &mut PromotionReport) {
    for to in [PromotionState::HooksRun, PromotionState::Done] {
        for record in records.iter_mut().filter(|record| record.state.is_open()) {
            if record.state >= to && record.detail.report.as_ref() == Some(&*report) {
                continue;
            }
            record.detail.report = Some(report.clone());
            let to = to.max(record.state);
            record.detail.database.state = to.to_string();
            let stored = async { record.store(&connect(config, record).await?, to).await };
            if let Err(error) = stored.await {
                let said = format!(
                    "database {} is open, and its report could not be stored: {}",
                    record.name,
                    chain(&error)
                );
                tracing::error!(hint = error.hint(), "{said}");
                report.outcome = PromotionOutcome::Failed;
                if !report.warnings.contains(&said) {
                    report.warnings.push(said);
                }
            }
            failpoint::hit(&format!("promote:{to}"));
        }
    }
}

fn report_file(report: &PromotionReport) -> std::io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix("dr-agent-promotion-")
        .suffix(".json")
        .tempfile()?;
    file.write_all(&serde_json::to_vec_pretty(report)?)?;
    file.flush()?;
    Ok(file)
}
