//! `dr-agent restore`: a database as of any moment, out of the archive.
//!
//! Thin: everything happens in [`crate::restore`]. Here its plan and report become text or JSON.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use serde_json::json;

use crate::catalog::TableName;
use crate::config::{Config, Databases};
use crate::error::{Classify as _, chain};
use crate::history::History;
use crate::lag::{Micros, pg_micros, system_time};
use crate::pg::{ConnInfo, PgLsn};
use crate::restore::{self, Moment, Observer, Options, Plan, Report, RestoreError};
use crate::snapshot::ProgressDisplay;
use crate::store::Store;

/// Flags of `restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "The target is an empty database: CREATE DATABASE … TEMPLATE template0. Killed within the base backup, drop \
    it and begin again; killed behind it, run the same command again and it goes on.\n\
    Times are RFC 3339, such as 2026-11-22T03:00:00Z, on the source's clock: the first transaction that committed later \
    is the first that is left out.\n\
    Exit codes: 0 restored (or planned); 1 failed; 2 usage or configuration."
)]
pub struct Args {
    /// The database to build: postgres://user@host/database
    #[arg(long, value_name = "URL")]
    target: String,
    /// The source's database; needed where the archive has several
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// Restore the state at this time
    #[arg(long, value_name = "TIME", conflicts_with = "to_lsn")]
    to_time: Option<Timestamp>,
    /// Restore the state at this position of the source's WAL
    #[arg(long, value_name = "LSN", value_parser = lsn)]
    to_lsn: Option<PgLsn>,
    /// Restore this history, where the archive has several of the database: a system identifier and when its slot was created
    #[arg(long, value_name = "HISTORY", value_parser = history)]
    history: Option<History>,
    /// Restore only these tables
    #[arg(long = "table", value_name = "SCHEMA.TABLE")]
    tables: Vec<String>,
    /// Print what would be read; touch nothing
    #[arg(long)]
    plan: bool,
    /// Print the plan or the report as JSON
    #[arg(long)]
    json: bool,
}

fn history(text: &str) -> Result<History, String> {
    text.parse().map_err(|_| {
        "is not a history such as 7312345678901234567-20261126T143000.123456Z".to_owned()
    })
}

fn lsn(text: &str) -> Result<PgLsn, String> {
    text.parse()
        .map_err(|_| "is not an LSN such as 16/B374D848".to_owned())
}

/// Restores and prints the report.
pub async fn run(config: Config, args: Args) -> ExitCode {
    match Box::pin(restore(&config, &args)).await {
        Ok(said) => {
            let mut stdout = std::io::stdout().lock();
            let _ = writeln!(stdout, "{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let hint = error.hint();
            eprintln!("dr-agent: {}", chain(&error));
            if let Some(hint) = &hint {
                eprintln!("  hint: {hint}");
            }
            if args.json {
                let object = json!({ "outcome": "failed", "error": chain(&error), "hint": hint });
                let mut stdout = std::io::stdout().lock();
                let _ = writeln!(stdout, "{object:#}");
            }
            ExitCode::FAILURE
        }
    }
}

async fn restore(config: &Config, args: &Args) -> Result<String, RestoreError> {
    let archive = config.archive.as_ref().ok_or(RestoreError::NoArchive)?;
    let store = Store::open(&archive.url, &archive.encryption).await?;
    let options = options(config, args)?;
    let plan = restore::plan(config, &store, &options).await?;
    if args.plan {
        return Ok(match args.json {
            true => format!("{:#}", plan_json(&plan, &options)),
            false => plan_text(&plan, &options),
        });
    }
    eprintln!("{}", plan_text(&plan, &options));
    let display = ProgressDisplay::new(&options.database, &());
    let replay = ReplayDisplay::new(&options.database);
    let report = restore::restore(config, &store, &options, plan, &display, &replay).await?;
    replay.end();
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(match args.json {
        true => format!("{:#}", report_json(&report)),
        false => report_text(&report),
    })
}

fn options(config: &Config, args: &Args) -> Result<Options, RestoreError> {
    let target = ConnInfo::parse(&args.target, None).map_err(RestoreError::TargetUrl)?;
    let database = match (&args.database, &config.source.databases) {
        (Some(name), _) => name.clone(),
        (None, Databases::List(names)) if names.len() == 1 => names[0].clone(),
        (None, Databases::List(names)) => return Err(RestoreError::WhichDatabase(names.clone())),
        (None, Databases::All) => return Err(RestoreError::WhichDatabase(Vec::new())),
    };
    let moment = match (args.to_time, args.to_lsn) {
        (Some(time), _) => Moment::Time(pg_micros(time.into())),
        (None, Some(lsn)) => Moment::Lsn(lsn),
        (None, None) => Moment::End,
    };
    let tables = args
        .tables
        .iter()
        .map(|text| table(text))
        .collect::<Result<_, _>>()?;
    Ok(Options {
        target,
        database,
        history: args.history,
        moment,
        tables,
    })
}

fn table(text: &str) -> Result<TableName, RestoreError> {
    let (schema, name) = text
        .split_once('.')
        .ok_or_else(|| RestoreError::NoTable(text.to_owned()))?;
    Ok(TableName {
        schema: schema.to_owned(),
        name: name.to_owned(),
    })
}

fn time(micros: Micros) -> String {
    humantime::format_rfc3339_micros(system_time(micros)).to_string()
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

fn plan_text(plan: &Plan, options: &Options) -> String {
    let moment = options.moment;
    format!(
        "restores {} to {moment}\n  base backup of {} at {}: {}\n  change log from there: {} in {} segments, up to {}",
        options.database,
        plan.base.as_of,
        plan.base.lsn,
        size(plan.base.bytes),
        size(plan.log_bytes),
        plan.chain.spans.len(),
        plan.chain.end,
    )
}

fn plan_json(plan: &Plan, options: &Options) -> serde_json::Value {
    json!({
        "database": options.database,
        "moment": options.moment.to_string(),
        "base_lsn": plan.base.lsn.to_string(),
        "base_time": plan.base.as_of.to_string(),
        "base_bytes": plan.base.bytes,
        "log_bytes": plan.log_bytes,
        "log_segments": plan.chain.spans.len(),
        "log_end_lsn": plan.chain.end.to_string(),
    })
}

fn report_text(report: &Report) -> String {
    let last = report.commit_time.map_or_else(
        || "nothing was committed after the base backup".to_owned(),
        |at| {
            format!(
                "the last transaction committed at {} and ends at {}",
                time(at),
                report.end_lsn
            )
        },
    );
    let beyond = report.beyond.map_or_else(String::new, |beyond| {
        format!(
            "\n  the first that was left out committed at {} ({})",
            time(beyond.commit_time),
            beyond.commit_lsn
        )
    });
    format!(
        "restored from the base backup at {}\n  {last}{beyond}\n  {} transactions replayed, {} sequences set ahead",
        report.base, report.transactions, report.sequences
    )
}

fn report_json(report: &Report) -> serde_json::Value {
    json!({
        "outcome": "restored",
        "base_lsn": report.base.to_string(),
        "end_lsn": report.end_lsn.to_string(),
        "commit_time": report.commit_time.map(time),
        "left_out_lsn": report.beyond.map(|beyond| beyond.commit_lsn.to_string()),
        "left_out_commit_time": report.beyond.map(|beyond| time(beyond.commit_time)),
        "transactions": report.transactions,
        "sequences": report.sequences,
        "warnings": report.warnings,
    })
}

/// How often a log line shows the progress where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Shows how far the log is replayed: a bar where standard error is a terminal, log lines elsewhere.
struct ReplayDisplay {
    database: String,
    bar: Option<ProgressBar>,
    state: Mutex<ReplayState>,
}

#[derive(Clone, Copy, Default)]
struct ReplayState {
    from: Option<PgLsn>,
    logged: Option<Instant>,
}

impl ReplayDisplay {
    fn new(database: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {binary_bytes}/{binary_total_bytes} of WAL, {eta} left  {msg}",
            )
            .expect("the template is a constant and well-formed")
            .progress_chars("=> ");
            bar.set_style(style);
            bar.set_prefix(format!("{database} log"));
            bar
        });
        Self {
            database: database.to_owned(),
            bar,
            state: Mutex::default(),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "only for how often a line is shown"
)]
fn now() -> Instant {
    Instant::now()
}

impl Observer for ReplayDisplay {
    fn replayed(&self, end_lsn: PgLsn, log_end: PgLsn, commit_time: Option<Micros>) {
        let mut state = self.state.lock().expect("nobody panics with the lock held");
        let from = *state.from.get_or_insert(end_lsn);
        let far = |lsn: PgLsn| u64::from(lsn).saturating_sub(u64::from(from));
        let at = commit_time.map(time);
        if let Some(bar) = &self.bar {
            bar.set_length(far(log_end));
            bar.set_position(far(end_lsn));
            bar.set_message(at.unwrap_or_default());
            return;
        }
        let due = state
            .logged
            .is_none_or(|logged| logged.elapsed() >= LOG_EVERY);
        if due {
            state.logged = Some(now());
            tracing::info!(
                database = %self.database, position = %end_lsn, log_end = %log_end,
                source_time = at, "replaying the change log"
            );
        }
    }
}
