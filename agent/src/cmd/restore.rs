//! `dr-agent restore`: a database as of any moment, out of the archive.
//!
//! Thin: everything happens in [`crate::replay::restore`], and becomes text or JSON in `view`.

mod display;
mod view;

use std::io::Write as _;
use std::process::ExitCode;

use jiff::Timestamp;

use crate::cloud::store::Store;
use crate::config::{Config, Databases};
use crate::copy::ProgressDisplay;
use crate::error::{Classify as _, chain};
use crate::names::TableName;
use crate::names::history::History;
use crate::pg::{ConnInfo, PgLsn};
use crate::replay::restore::{self, RestoreError, RestoreMoment, RestoreOptions};
use crate::time::pg_micros;
use display::RestoreDisplay;

/// Flags of `restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "The target is an empty database: CREATE DATABASE … TEMPLATE template0, with the source's encoding. If it \
    is interrupted, run the same command again: it continues where it was, or, if that was within the base backup, removes \
    what it had restored and starts over.\n\
    Times are RFC 3339, such as 2026-11-22T03:00:00Z, on the source's clock: the restore stops before the first \
    transaction that committed later.\n\
    Exit codes: 0 restored (or planned); 1 failed; 2 usage or configuration."
)]
pub struct RestoreArgs {
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
    /// Restore only the rows of these tables; names as in SQL, a partitioned table includes its partitions
    #[arg(long = "table", value_name = "SCHEMA.TABLE")]
    tables: Vec<String>,
    /// Do not restore owners: everything belongs to the role in the target's URL
    #[arg(long)]
    no_owner: bool,
    /// Do not restore privileges; with --no-owner, nor the policies of roles that do not exist
    #[arg(long)]
    no_privileges: bool,
    /// Print what would be done, or why it would be refused, and change nothing
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
pub async fn run(config: Config, args: RestoreArgs) -> ExitCode {
    match Box::pin(restore(&config, &args)).await {
        Ok(report) => {
            print(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("dr-agent: {}", chain(&error));
            if let Some(hint) = error.hint() {
                eprintln!("  hint: {hint}");
            }
            if args.json {
                print(&format!("{:#}", view::failure_json(&error)));
            }
            match error.is_usage() {
                true => ExitCode::from(USAGE),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn print(text: &str) {
    // A closed pipe is no reason to fail.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Plans or restores; returns what is to be printed.
async fn restore(config: &Config, args: &RestoreArgs) -> Result<String, RestoreError> {
    let archive = config.archive.as_ref().ok_or(RestoreError::NoArchive)?;
    let options = options(config, args)?;
    // It only reads there: a directory that is not there is an error, and no empty archive.
    let store = Store::as_it_is(&archive.url, &archive.encryption).await?;
    if args.plan {
        let preview = restore::preview(config, &store, &options).await?;
        return Ok(match args.json {
            true => format!("{:#}", view::preview_json(&preview, &options)),
            false => view::preview_text(&preview, &options),
        });
    }
    let copy = ProgressDisplay::new(&options.database, &());
    let display = RestoreDisplay::new(&options);
    let report = restore::restore(config, &store, &options, &copy, &display).await?;
    display.end();
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(match args.json {
        true => format!("{:#}", view::report_json(&report)),
        false => view::report_text(&report),
    })
}

fn options(config: &Config, args: &RestoreArgs) -> Result<RestoreOptions, RestoreError> {
    let target = ConnInfo::parse(&args.target, None).map_err(RestoreError::TargetUrl)?;
    let database = match (&args.database, &config.source.databases) {
        (Some(name), _) => name.clone(),
        (None, Databases::List(names)) if names.len() == 1 => names[0].clone(),
        (None, Databases::List(names)) => return Err(RestoreError::WhichDatabase(names.clone())),
        (None, Databases::All) => return Err(RestoreError::WhichDatabase(Vec::new())),
    };
    let moment = match (args.to_time, args.to_lsn) {
        (Some(time), _) => RestoreMoment::Time(pg_micros(time.into())),
        (None, Some(lsn)) => RestoreMoment::Lsn(lsn),
        (None, None) => RestoreMoment::End,
    };
    let table =
        |text: &String| TableName::parse(text).ok_or_else(|| RestoreError::TableName(text.clone()));
    Ok(RestoreOptions {
        target,
        database,
        history: args.history,
        moment,
        tables: args.tables.iter().map(table).collect::<Result<_, _>>()?,
        no_owner: args.no_owner,
        no_privileges: args.no_privileges,
    })
}
