//! `dr-agent restore`: a database as of any moment, out of the archive.
//!
//! Thin: everything happens in [`crate::replay::restore`]. Here its plan and report become text or JSON.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use serde_json::json;

use crate::cloud::store::Store;
use crate::config::{Config, Databases};
use crate::copy::ProgressDisplay;
use crate::error::{Classify as _, chain};
use crate::names::TableName;
use crate::names::history::History;
use crate::pg::{ConnInfo, PgLsn};
use crate::replay::restore::{
    self, Committed, Moment, Observer, Options, Plan, Report, RestoreError, Start,
};
use crate::time::{Micros, pg_micros, system_time};

/// Flags of `restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "The target is an empty database: CREATE DATABASE … TEMPLATE template0, with the source's encoding. Killed, run \
    the same command again: behind the base backup it goes on, within it, it removes what it left and begins anew.\n\
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
    /// Restore only the rows of these tables; names as in SQL, a partitioned one stands for its partitions
    #[arg(long = "table", value_name = "SCHEMA.TABLE")]
    tables: Vec<String>,
    /// Leave owners out: everything belongs to the role of the target's URL
    #[arg(long)]
    no_owner: bool,
    /// Leave privileges out; with --no-owner also the policies of roles that are lacking
    #[arg(long)]
    no_privileges: bool,
    /// Print what would be done, and refuse what would be refused; touch nothing
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

/// Exit code for a wrong command line or configuration, as everywhere.
const USAGE: u8 = 2;

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
            match error.is_usage() {
                true => ExitCode::from(USAGE),
                false => ExitCode::FAILURE,
            }
        }
    }
}

async fn restore(config: &Config, args: &Args) -> Result<String, RestoreError> {
    let archive = config.archive.as_ref().ok_or(RestoreError::NoArchive)?;
    let options = options(config, args)?;
    // It only reads there: a directory that is not there is an error, and no empty archive.
    let store = Store::as_it_is(&archive.url, &archive.encryption).await?;
    let plan = restore::plan(config, &store, &options).await?;
    if args.plan {
        return Ok(match args.json {
            true => format!("{:#}", plan_json(&plan, &options)),
            false => plan_text(&plan, &options) + &without_text(&plan),
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
    let table =
        |text: &String| TableName::parse(text).ok_or_else(|| RestoreError::TableName(text.clone()));
    Ok(Options {
        target,
        database,
        history: args.history,
        moment,
        tables: args.tables.iter().map(table).collect::<Result<_, _>>()?,
        no_owner: args.no_owner,
        no_privileges: args.no_privileges,
    })
}

fn time(micros: Micros) -> String {
    humantime::format_rfc3339_micros(system_time(micros)).to_string()
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

fn plan_text(plan: &Plan, options: &Options) -> String {
    let base = format!(
        "base backup of {} at {}: {}{}",
        plan.base.as_of,
        plan.base.lsn,
        size(plan.base_bytes),
        plan.tables
            .as_ref()
            .map_or_else(String::new, |tables| format!(" of {} tables", tables.len())),
    );
    let first = match plan.start {
        Start::Empty => base,
        Start::Anew => {
            format!("what an interrupted restore left is removed from the target\n  {base}")
        }
        Start::Resumed(lsn) => {
            format!("the target is at {lsn}, where a restore was interrupted: it goes on there")
        }
    };
    format!(
        "restores {} to {}\n  {first}\n  change log from there: at most {} in {} segments, up to {}",
        options.database,
        options.moment,
        size(plan.log_bytes),
        plan.log_segments,
        plan.log_end,
    )
}

/// What the target will be without.
fn without_text(plan: &Plan) -> String {
    let lines = plan.warnings.iter();
    lines
        .map(|warning| format!("\n  warning: {warning}"))
        .collect()
}

fn plan_json(plan: &Plan, options: &Options) -> serde_json::Value {
    let (target, resumes_at) = match plan.start {
        Start::Empty => ("empty", None),
        Start::Anew => ("begun_anew", None),
        Start::Resumed(lsn) => ("resumed", Some(lsn.to_string())),
    };
    let names = |tables: &Vec<TableName>| tables.iter().map(TableName::sql).collect::<Vec<_>>();
    json!({
        "database": options.database,
        "moment": options.moment.to_string(),
        "target": target,
        "resumes_at": resumes_at,
        "tables": plan.tables.as_ref().map(names),
        "base_lsn": plan.base.lsn.to_string(),
        "base_time": plan.base.as_of.to_string(),
        "base_bytes": plan.base_bytes,
        "log_bytes": plan.log_bytes,
        "log_segments": plan.log_segments,
        "log_end_lsn": plan.log_end.to_string(),
        "warnings": plan.warnings,
    })
}

fn committed(transaction: &Committed) -> String {
    format!(
        "{}, committed at {} ({})",
        transaction.xid,
        time(transaction.commit_time),
        transaction.commit_lsn
    )
}

fn report_text(report: &Report) -> String {
    let mut lines = vec![format!(
        "restored from the base backup at {}, up to {}",
        report.base, report.end_lsn
    )];
    lines.push(match report.commit_time {
        Some(at) => format!("the last transaction committed at {}", time(at)),
        None => "nothing was committed after the base backup".to_owned(),
    });
    let transactions = [
        ("the last one that changed a table", &report.last_change),
        ("the first one that was left out", &report.beyond),
        (
            "the first one that was left out and changed a table",
            &report.change_beyond,
        ),
    ];
    for (which, transaction) in transactions {
        if let Some(transaction) = transaction {
            lines.push(format!("{which}: {}", committed(transaction)));
        }
    }
    lines.push(format!(
        "{} transactions replayed, {} sequences set ahead",
        report.transactions, report.sequences
    ));
    match report.warnings.len() {
        0 => {}
        1 => lines.push("one thing is not there or needs a look: the warning above".to_owned()),
        n => lines.push(format!(
            "{n} things are not there or need a look: the warnings above"
        )),
    }
    lines.join("\n  ")
}

fn committed_json(transaction: &Committed) -> serde_json::Value {
    json!({
        "xid": transaction.xid,
        "commit_lsn": transaction.commit_lsn.to_string(),
        "commit_time": time(transaction.commit_time),
    })
}

fn report_json(report: &Report) -> serde_json::Value {
    let beyond = report.beyond.as_ref();
    json!({
        "outcome": "restored",
        "base_lsn": report.base.to_string(),
        "end_lsn": report.end_lsn.to_string(),
        "commit_time": report.commit_time.map(time),
        "last_change": report.last_change.as_ref().map(committed_json),
        "left_out_lsn": beyond.map(|beyond| beyond.commit_lsn.to_string()),
        "left_out_commit_time": beyond.map(|beyond| time(beyond.commit_time)),
        "left_out_xid": beyond.map(|beyond| beyond.xid),
        "left_out_change": report.change_beyond.as_ref().map(committed_json),
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
