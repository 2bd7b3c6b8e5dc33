//! `dr-agent check [--json]`: asks [`crate::check`], prints the report on standard output.
//!
//! Exit code 0 without errors, 1 with errors. The JSON object is described with [`CheckReport`].

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;

use crate::check::{CheckReport, Style, check, render};
use crate::config::Config;

/// Flags of `check`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(
    after_help = "Under route kinesis it may run on either side: a source or replica that cannot be reached from here is a \
    note that says which command needs it, and an error only where neither can be reached.\n\
    Exit codes: 0 no errors (warnings are fine); 1 at least one error."
)]
pub struct CheckArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

/// Checks both sides and prints what was found.
pub async fn run(config: &Config, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let report = Box::pin(check(config)).await;
    print(&report, args.json).context("write the report")?;
    Ok(if report.errors == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

fn print(report: &CheckReport, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, report)?;
        writeln!(out)?;
    } else {
        out.write_all(render(report, style()).as_bytes())?;
    }
    out.flush()
}

/// Colours on a terminal, unless the operator wants none (<https://no-color.org>).
fn style() -> Style {
    if !io::stdout().is_terminal() {
        return Style::PLAIN;
    }
    let columns = std::env::var("COLUMNS").ok();
    Style {
        width: columns
            .and_then(|columns| columns.parse().ok())
            .unwrap_or(Style::PLAIN.width),
        colour: std::env::var_os("NO_COLOR").is_none(),
    }
}
