//! `dr-agent promote`: the replica becomes the primary.
//!
//! Thin: everything happens in [`crate::promote`]. Here its outcome becomes text or JSON and an
//! exit code: 0 open (or planned), 1 not finished, 4 refused.

use std::io::Write as _;
use std::process::ExitCode;

use serde_json::json;

use crate::config::Config;
use crate::error::{Classify as _, chain};
use crate::promote::report::{PromotionOutcome, PromotionReport};
use crate::promote::{Drain, Options, execute};
use crate::replay::drain::RouteDrain;
use crate::time::timestamp;

/// Flags of `promote`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(
    after_help = "If it fails or is interrupted, run the same command again: it continues where it stopped. \
    Once it has finished, it prints the same report again.\n\
    A planned switchover that loses nothing is not in this version.\n\
    Exit codes: 0 the replica is open; 1 not finished, or not every database is open; 4 refused, nothing was changed."
)]
pub struct PromoteArgs {
    /// The source is lost: accept the loss of what was not replicated.
    #[arg(long, required = true)]
    pub failover: bool,
    /// Print the observed values and the steps, and change nothing.
    #[arg(long)]
    pub plan: bool,
    /// Promote although the initial copy is not complete; recorded in the report.
    #[arg(long)]
    pub accept_incomplete: bool,
    /// Open without what the Kinesis stream and the archive still hold; recorded in the report.
    #[arg(long)]
    pub skip_drain: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Promotes and prints the report.
pub async fn run(config: Config, args: PromoteArgs) -> ExitCode {
    // RTO counts from here.
    let started_at = timestamp();
    let options = Options {
        plan: args.plan,
        accept_incomplete: args.accept_incomplete,
        skip_drain: args.skip_drain,
    };
    let between = RouteDrain::of(&config);
    let route = between.as_ref().map(|between| between as &dyn Drain);
    match Box::pin(execute::promote(&config, options, started_at, route)).await {
        Ok(report) => {
            let text = if args.json {
                pretty(&report)
            } else {
                report.text()
            };
            print(&text);
            ExitCode::from(exit_code(&report))
        }
        Err(error) => {
            let hint = error.hint();
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "error: {}", chain(&error));
            if let Some(hint) = &hint {
                let _ = writeln!(stderr, "hint: {hint}");
            }
            if args.json {
                print(&pretty(&json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "mode": "failover",
                    "outcome": PromotionOutcome::Failed,
                    "error": chain(&error),
                    "hint": hint,
                })));
            }
            ExitCode::from(1)
        }
    }
}

fn exit_code(report: &PromotionReport) -> u8 {
    match report.outcome {
        PromotionOutcome::Promoted => 0,
        PromotionOutcome::Failed => 1,
        PromotionOutcome::Refused => 4,
        PromotionOutcome::Planned if report.refusals.is_empty() => 0,
        PromotionOutcome::Planned => 4,
    }
}

fn pretty(value: &impl serde::Serialize) -> String {
    let mut text =
        serde_json::to_string_pretty(value).expect("plain data with text keys always serializes");
    text.push('\n');
    text
}

fn print(text: &str) {
    // A closed pipe must not turn a promotion that worked into a failure.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
