//! ● The report of a promotion: what `promote --json` prints and `dr_agent.promotion.detail` keeps.
//!
//! Plain data with serde, and one rendering for people. The JSON object is part of the contract:
//! fields are added, never renamed or removed. Times are RFC 3339 in UTC, LSNs text such as
//! `16/B374D848`, durations seconds. `null` always means "unknown", never "none".
//!
//! # Invariants
//! - A promotion that was killed and repeated tells one story: times run from the first start.
//! - Nothing here is computed from the moment of printing, so a repeat prints the same.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::loss::SourceAnswer;
use super::state::PromotionState;
use crate::watch::coverage::Coverage;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromotionOutcome {
    /// Every database is open; exit code 0.
    Promoted,
    /// Something is left to do, for some databases or all; repeat the command; exit code 1.
    Failed,
    /// Nothing was touched because a promise would be broken; exit code 4.
    Refused,
    /// `--plan`: nothing was touched; exit code 0, or 4 where the promotion would be refused.
    Planned,
}

/// The whole of one promotion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromotionReport {
    /// Of the program that wrote it.
    pub version: String,
    /// `failover`.
    pub mode: String,
    /// How it ended.
    pub outcome: PromotionOutcome,
    /// `host:port/database` of the replica.
    pub replica: String,
    /// When the command was first started.
    pub started_at: String,
    /// When the last database became writable.
    pub writable_at: Option<String>,
    /// From `started_at` to `writable_at`.
    pub rto_seconds: Option<f64>,
    /// `objectives.rto`.
    pub rto_objective_seconds: f64,
    /// Whether the objective was met; `null` while not writable.
    pub rto_met: Option<bool>,
    /// The worst of the databases: see [`DatabaseReport::rpo_seconds`].
    pub rpo_seconds: Option<f64>,
    /// `objectives.rpo`.
    pub rpo_objective_seconds: f64,
    /// Whether the objective was met for every database; `null` where a loss is unknown.
    pub rpo_met: Option<bool>,
    /// Every override that had an effect: `--accept-incomplete`, `--skip-drain`.
    pub overrides: Vec<String>,
    /// The promises that are broken because of it.
    pub accepted: Vec<String>,
    /// Why the promotion was, or would be, refused.
    pub refusals: Vec<String>,
    /// One entry per database, in name order.
    pub databases: Vec<DatabaseReport>,
    /// In the order they ran.
    pub hooks: Vec<HookReport>,
    /// What a person must still see to.
    pub warnings: Vec<String>,
}

/// One database.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DatabaseReport {
    /// Its name, the same on both sides.
    pub database: String,
    /// Slot, publication and progress row.
    pub stream: String,
    /// Name of the state reached: see `promote::state`.
    pub state: String,
    /// The term after the promotion.
    pub term: i64,
    /// First byte after the last applied transaction: the database equals the source as of here.
    pub end_lsn: String,
    /// Number of the last applied batch.
    pub batch: i64,
    /// Commit time of the last applied transaction, on the source's clock.
    pub commit_time: Option<String>,
    /// When the term was raised, on the replica's clock.
    pub fenced_at: Option<String>,
    /// From `commit_time` to `fenced_at`: nothing older can be missing. An upper bound, since the
    /// source may have died earlier than the promotion began.
    pub rpo_seconds: Option<f64>,
    /// By how many seconds the replica's clock was ahead of the source's when an agent measured both last.
    pub replica_clock_ahead_seconds: Option<f64>,
    /// WAL of the source beyond `end_lsn`, in bytes: an upper bound of the changes missing.
    pub lost_bytes: Option<u64>,
    /// Committed transactions with changes to published tables beyond `end_lsn`.
    pub lost_transactions: Option<u64>,
    /// Counting stopped at a limit: there are at least `lost_transactions`.
    pub lost_transactions_at_least: bool,
    /// The source answered when it was asked for the loss: it is alive, and not fenced.
    pub source_answered: bool,
    /// Why `lost_bytes` or `lost_transactions` is unknown.
    pub loss_unknown: Option<String>,
    /// What a failover brings, and what not: as the source told it in-band, compared with what is here.
    pub coverage: Coverage,
    /// Prepared transactions of older agents, or of a drain that was killed, that were committed.
    pub prepared_committed: u64,
    /// … that were rolled back.
    pub prepared_rolled_back: u64,
    /// Sequences set ahead.
    pub sequences_set: u64,
    /// When a write was proven possible.
    pub writable_at: Option<String>,
    /// What was done, in order.
    pub steps: Vec<StepReport>,
    /// Why this database did not get further in this run.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// What a person must still see to.
    pub warnings: Vec<String>,
}

/// One edge of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The state it led to.
    pub state: String,
    /// How long it took; `null` in a plan.
    pub seconds: Option<f64>,
    /// What happened; in a plan, why it would be done.
    pub note: String,
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HookReport {
    /// Its name in the configuration.
    pub name: String,
    /// Whether it exited with 0 in time.
    pub ok: bool,
    /// `exited 0`, `exited 7`, `killed by signal 9`, `timed out after 60s`, `not started: …`, `not run: …`.
    pub outcome: String,
    /// How long it took.
    pub seconds: f64,
    /// The last of what it wrote on both outputs.
    pub output: String,
}

impl PromotionReport {
    /// Notes what was accepted, and the overrides by which it was; each once.
    pub fn accept(&mut self, accepted: &[String], overrides: &[String]) {
        for (all, more) in [
            (&mut self.accepted, accepted),
            (&mut self.overrides, overrides),
        ] {
            for one in more {
                if !all.contains(one) {
                    all.push(one.clone());
                }
            }
        }
    }

    /// Works out what follows from the databases: RPO, RTO and whether the objectives were met.
    /// `rto_seconds` is given, since it needs two moments.
    pub fn judge(&mut self, rto_seconds: Option<f64>) {
        self.rto_seconds = rto_seconds;
        self.rto_met = rto_seconds.map(|seconds| seconds <= self.rto_objective_seconds);
        let losses: Option<Vec<f64>> = self
            .databases
            .iter()
            .map(DatabaseReport::loss_seconds)
            .collect();
        self.rpo_seconds = losses
            .filter(|losses| !losses.is_empty())
            .map(|losses| losses.into_iter().fold(0.0, f64::max));
        self.rpo_met = self
            .rpo_seconds
            .map(|seconds| seconds <= self.rpo_objective_seconds);
        let copied = |database: &DatabaseReport| database.coverage.not_copied() == 0;
        if !self.databases.iter().all(copied) {
            // Tables without their rows are a loss without a number, and no objective allows it.
            (self.rpo_seconds, self.rpo_met) = (None, Some(false));
        }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let open = self.databases.iter().filter(|one| one.is_open()).count();
        let title = match self.outcome {
            PromotionOutcome::Promoted => "PROMOTED: the replica is now the primary".to_owned(),
            PromotionOutcome::Failed if open > 0 => format!(
                "NOT FINISHED: {open} of {} databases are open; run the same command again for the rest",
                self.databases.len()
            ),
            PromotionOutcome::Failed => "NOT FINISHED: run the same command again".to_owned(),
            PromotionOutcome::Refused => "REFUSED: nothing was touched".to_owned(),
            PromotionOutcome::Planned => "PLAN: nothing was touched".to_owned(),
        };
        let _ = writeln!(out, "{title} ({})", self.replica);
        if self.outcome == PromotionOutcome::Promoted || self.outcome == PromotionOutcome::Failed {
            let _ = writeln!(
                out,
                "  RTO   {}",
                verdict(
                    self.rto_seconds,
                    self.rto_objective_seconds,
                    self.rto_met,
                    "not writable yet"
                )
            );
            let _ = writeln!(
                out,
                "  RPO   {}",
                verdict(
                    self.rpo_seconds,
                    self.rpo_objective_seconds,
                    self.rpo_met,
                    "unknown"
                )
            );
        }
        for refusal in &self.refusals {
            let _ = writeln!(out, "  refused: {refusal}");
        }
        for accepted in &self.accepted {
            let _ = writeln!(
                out,
                "  accepted by {}: {accepted}",
                self.overrides.join(" ")
            );
        }
        for database in &self.databases {
            database.write_text(&mut out, self.outcome == PromotionOutcome::Planned);
        }
        for hook in &self.hooks {
            let _ = writeln!(
                out,
                "\nhook {}: {} in {:.1} s",
                hook.name, hook.outcome, hook.seconds
            );
            for line in hook.output.lines() {
                let _ = writeln!(out, "  | {line}");
            }
        }
        if !self.warnings.is_empty() {
            let _ = writeln!(out);
        }
        for warning in &self.warnings {
            let _ = writeln!(out, "WARNING: {warning}");
        }
        out
    }
}

/// Names of a kind in the text; the JSON has more.
const NAMES_SHOWN: usize = 5;

fn verdict(seconds: Option<f64>, objective: f64, met: Option<bool>, unknown: &str) -> String {
    match (seconds, met) {
        (Some(seconds), Some(met)) => {
            let word = if met { "met" } else { "MISSED" };
            format!("{seconds:.2} s, objective {objective} s: {word}")
        }
        (None, Some(false)) => format!("whole tables are missing, objective {objective} s: MISSED"),
        _ => format!("{unknown}, objective {objective} s"),
    }
}

impl DatabaseReport {
    /// Whether its users can write.
    pub fn is_open(&self) -> bool {
        self.writable_at.is_some()
            && PromotionState::parse(&self.state).is_some_and(PromotionState::is_open)
    }

    /// Seconds lost at most: 0 where the source said that nothing is missing.
    pub fn loss_seconds(&self) -> Option<f64> {
        if self.coverage.not_copied() > 0 {
            return None;
        }
        if self.lost_transactions == Some(0) && !self.lost_transactions_at_least {
            return Some(0.0);
        }
        self.rpo_seconds
    }

    /// Takes over what the source said.
    pub fn take_answer(&mut self, answer: SourceAnswer) {
        self.source_answered = answer.alive;
        self.lost_bytes = answer.bytes;
        self.lost_transactions = answer.transactions;
        self.lost_transactions_at_least = answer.at_least;
        self.loss_unknown = answer.unknown;
    }

    fn write_text(&self, out: &mut String, planned: bool) {
        let _ = writeln!(
            out,
            "\ndatabase {} (stream {}): {}, term {}",
            self.database, self.stream, self.state, self.term
        );
        let commit_time = self
            .commit_time
            .as_deref()
            .unwrap_or("no transaction applied yet");
        // Of one that could not be looked at nothing is known.
        let is_known = !self.end_lsn.is_empty();
        if is_known {
            let equals = match self.coverage.is_whole() {
                true => "equals the source as of",
                false => "has the source up to",
            };
            let _ = writeln!(out, "  {equals:<25} {} ({commit_time})", self.end_lsn);
            self.write_coverage(out);
        }
        if self.fenced_at.is_some() || (planned && is_known) {
            let label = if planned { "would be lost now" } else { "lost" };
            let _ = writeln!(out, "  {label:<25} {}", self.loss_text());
        }
        for step in &self.steps {
            let seconds = step
                .seconds
                .map(|seconds| format!("{seconds:>7.3} s"))
                .unwrap_or_default();
            let _ = writeln!(out, "  {:<12} {seconds:<9} {}", step.state, step.note);
        }
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  ERROR after state {}: {error}", self.state);
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "  hint: {hint}");
        }
        for warning in &self.warnings {
            let _ = writeln!(out, "  WARNING: {warning}");
        }
    }

    fn write_coverage(&self, out: &mut String) {
        let coverage = &self.coverage;
        let _ = writeln!(out, "  {:<25} {}", "protected", coverage.verdict());
        for one in &coverage.missing {
            let _ = writeln!(
                out,
                "  {:<25} {}",
                "NOT as on the source",
                one.text(NAMES_SHOWN)
            );
        }
        for (table, reason) in &coverage.set_aside {
            let _ = writeln!(out, "  {:<25} {table}: {reason}", "set aside");
        }
        for (object, reason) in &coverage.waiting {
            let _ = writeln!(out, "  {:<25} {object}: {reason}", "NOT as on the source");
        }
        if let Some(text) = coverage.comparison() {
            let _ = writeln!(out, "  {:<25} {text}", "comparison");
        }
    }

    /// One sentence: what the replica does not have.
    pub fn loss_text(&self) -> String {
        let mut parts = Vec::new();
        let tables = self.coverage.not_copied();
        if tables > 0 {
            let noun = match tables {
                1 => "table that was",
                _ => "tables that were",
            };
            parts.push(format!(
                "everything in {tables} {noun} never copied, or what was written since it was set aside; of the others"
            ));
        }
        if let Some(transactions) = self.lost_transactions {
            let least = if self.lost_transactions_at_least {
                "at least "
            } else {
                ""
            };
            let noun = if transactions == 1 {
                "transaction"
            } else {
                "transactions"
            };
            parts.push(format!("{least}{transactions} {noun}"));
        }
        if let Some(bytes) = self.lost_bytes {
            parts.push(format!("at most {bytes} bytes of WAL"));
        }
        match self.loss_seconds() {
            Some(seconds) if seconds > 0.0 => {
                parts.push(format!(
                    "committed within the {seconds:.2} s before the term was raised"
                ));
            }
            Some(_) => {}
            None if tables > 0 => {}
            None => parts.push("seconds unknown: no transaction was applied yet".to_owned()),
        }
        if let Some(reason) = &self.loss_unknown {
            parts.push(format!("beyond that unknown: {reason}"));
        }
        parts.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::coverage::NotProtected;

    fn report(databases: Vec<DatabaseReport>) -> PromotionReport {
        PromotionReport {
            version: "0".into(),
            mode: "failover".into(),
            outcome: PromotionOutcome::Promoted,
            replica: "r:5432/postgres".into(),
            started_at: "2026-01-01T00:00:00Z".into(),
            writable_at: None,
            rto_seconds: None,
            rto_objective_seconds: 300.0,
            rto_met: None,
            rpo_seconds: None,
            rpo_objective_seconds: 30.0,
            rpo_met: None,
            overrides: Vec::new(),
            accepted: Vec::new(),
            refusals: Vec::new(),
            databases,
            hooks: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn lost(seconds: Option<f64>, transactions: Option<u64>) -> DatabaseReport {
        DatabaseReport {
            fenced_at: Some("2026-01-01T00:00:00Z".into()),
            rpo_seconds: seconds,
            lost_transactions: transactions,
            ..DatabaseReport::default()
        }
    }

    #[test]
    fn the_worst_database_decides_and_one_unknown_loss_makes_the_whole_unknown() {
        let mut both = report(vec![lost(Some(1.0), None), lost(Some(31.0), None)]);
        both.judge(Some(2.0));
        assert_eq!((both.rpo_seconds, both.rpo_met), (Some(31.0), Some(false)));
        assert_eq!((both.rto_seconds, both.rto_met), (Some(2.0), Some(true)));

        let mut unknown = report(vec![lost(Some(1.0), None), lost(None, None)]);
        unknown.judge(None);
        assert_eq!((unknown.rpo_met, unknown.rto_met), (None, None));
        let mut none = report(Vec::new());
        none.judge(None);
        assert_eq!(none.rpo_met, None);
    }

    #[test]
    fn a_source_that_says_nothing_is_missing_means_no_loss_however_old_the_last_commit() {
        let quiet = lost(Some(4000.0), Some(0));
        assert_eq!(quiet.loss_seconds(), Some(0.0));
        assert!(
            quiet.loss_text().starts_with("0 transactions"),
            "{}",
            quiet.loss_text()
        );
        let counted = DatabaseReport {
            lost_transactions_at_least: true,
            ..quiet
        };
        assert_eq!(counted.loss_seconds(), Some(4000.0));
    }

    #[test]
    fn nothing_equals_the_source_while_something_is_missing_or_not_known() {
        let whole = Coverage {
            known: true,
            tables: Some(2),
            protected: Some(2),
            missing: Vec::new(),
            ..Coverage::default()
        };
        let mut one = lost(Some(1.0), Some(0));
        one.end_lsn = "0/1A2B3C4".into();
        one.coverage = whole.clone();
        let text = |one: &DatabaseReport| report(vec![one.clone()]).text();
        assert!(text(&one).contains("equals the source as of"));
        assert!(text(&one).contains("2 of 2 tables"));
        one.coverage.missing.push(NotProtected {
            kind: "missing_sequence".into(),
            count: 1,
            names: vec!["public.late".into()],
        });
        assert!(!text(&one).contains("equals"));
        assert!(text(&one).contains("NOT as on the source      missing sequence: 1 (public.late)"));
        one.coverage = Coverage::default();
        assert!(!text(&one).contains("equals") && text(&one).contains("not known"));
    }

    #[test]
    fn tables_that_were_never_copied_are_a_loss_without_a_number() {
        let mut one = lost(Some(1.0), Some(0));
        one.coverage.missing.push(NotProtected {
            kind: crate::watch::coverage::NOT_COPIED.into(),
            count: 3,
            names: Vec::new(),
        });
        assert!(
            one.loss_text().starts_with("everything in 3 tables"),
            "{}",
            one.loss_text()
        );
        let mut all = report(vec![one, lost(Some(1.0), Some(0))]);
        all.judge(Some(1.0));
        assert_eq!((all.rpo_seconds, all.rpo_met), (None, Some(false)));
        assert!(
            all.text().contains("whole tables are missing"),
            "{}",
            all.text()
        );
    }

    #[test]
    fn a_stored_report_reads_back_the_same_and_prints_the_same() {
        let mut written = report(vec![lost(Some(1.5), Some(3))]);
        written.judge(Some(0.25));
        let read: PromotionReport =
            serde_json::from_str(&serde_json::to_string(&written).unwrap()).unwrap();
        assert_eq!(read, written);
        assert_eq!(read.text(), written.text());
        assert!(read.text().contains("3 transactions"));
    }

    #[test]
    fn what_was_accepted_is_told_once_and_by_which_flag() {
        let mut both = report(Vec::new());
        let skipped = (["left out".to_owned()], ["--skip-drain".to_owned()]);
        both.accept(&[], &[]);
        both.accept(&skipped.0, &skipped.1);
        both.accept(&skipped.0, &skipped.1);
        assert_eq!((both.accepted.len(), both.overrides.len()), (1, 1));
        let text = both.text();
        assert!(
            text.contains("accepted by --skip-drain: left out"),
            "{text}"
        );
    }

    #[test]
    fn the_text_says_loudly_that_an_objective_was_missed() {
        let mut late = report(vec![lost(Some(31.0), None)]);
        late.judge(Some(301.0));
        assert_eq!(late.text().matches("MISSED").count(), 2, "{}", late.text());
    }
}
