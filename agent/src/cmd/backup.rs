//! `dr-agent backup`: base backups on demand, and what the archive has.
//!
//! Thin: everything happens in [`crate::archive::base`] and [`crate::archive::log`], and becomes text or JSON in `view`.

mod view;

use std::io::Write as _;
use std::process::ExitCode;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::run::stop_on_signal;
use crate::archive::base::{BackupError, Bases, Pruned};
use crate::archive::log::{Span, idle_age};
use crate::cloud::store::{Store, StoreError};
use crate::config::{Archive, Config, Databases};
use crate::copy::ProgressDisplay;
use crate::error::{Because, Classify as _, chain, hands_on};
use crate::names::stream::StreamName;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::pipeline::schedule::Keeper;
use crate::setup::{self, SetupError};
use view::{NamedStream, Said};

/// Flags of `backup`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Without a flag it takes a base backup now; `dr-agent run` does so every archive.base_every.\n\
    --list, --verify and --prune need the archive alone: they work when the source is lost.\n\
    A backup that is interrupted (SIGINT, SIGTERM) deletes what it has written so far; a second signal ends it at once.\n\
    Exit codes: 0 done; 1 failed or interrupted, or damage was found; 2 usage or configuration."
)]
pub struct BackupArgs {
    /// Only this database
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// List base backups, and how far the change log leads from each
    #[arg(long, group = "what")]
    list: bool,
    /// Read base backups and change log, and verify every checksum
    #[arg(long, group = "what")]
    verify: bool,
    /// Delete what archive.retention does not keep
    #[arg(long, group = "what")]
    prune: bool,
    /// With --prune: only print what would be deleted
    #[arg(long, requires = "prune")]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("there is no [archive] in the configuration")]
    NoArchive,
    #[error(transparent)]
    Because(#[from] Because),
}

hands_on!(Failure:
    SetupError => "find the databases",
    StoreError => "look into the archive",
);

impl Failure {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NoArchive => Some("write [archive] with its url".to_owned()),
            Self::Because(error) => error.hint(),
        }
    }
}

/// Does it for every database and prints what came of it.
pub async fn run(config: Config, args: BackupArgs) -> ExitCode {
    let said = match Box::pin(each(&config, &args)).await {
        Ok(said) => said,
        Err(error) => {
            tell(&error);
            return ExitCode::FAILURE;
        }
    };
    let mut stdout = std::io::stdout().lock();
    let _ = match args.json {
        true => {
            let all: Vec<&Value> = said.iter().map(|said| &said.json).collect();
            writeln!(stdout, "{:#}", json!(all))
        }
        false => said
            .iter()
            .try_for_each(|said| writeln!(stdout, "{}", said.text)),
    };
    match said.iter().all(|said| said.sound) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn tell(error: &Failure) {
    eprintln!("dr-agent: {}", chain(error));
    if let Some(hint) = error.hint() {
        eprintln!("  hint: {hint}");
    }
}

async fn each(config: &Config, args: &BackupArgs) -> Result<Vec<Said>, Failure> {
    let archive = config.archive.as_ref().ok_or(Failure::NoArchive)?;
    if !(args.list || args.verify || args.prune) {
        return take(config, archive, args).await;
    }
    let store = match args.prune && !args.dry_run {
        true => Store::open(&archive.url, &archive.encryption).await?,
        // Looking makes nothing and tidies nothing up.
        false => Store::as_it_is(&archive.url, &archive.encryption).await?,
    };
    let mut said = Vec::new();
    for named in streams(config, args, &store).await? {
        let looked = Box::pin(look(config, archive, args, &store, &named)).await;
        let doing = || format!("look into the archive of {}", named.name());
        said.extend(looked.map_err(|error| Because::new(doing(), error))?);
    }
    Ok(said)
}

/// Takes a base backup of every database.
async fn take(config: &Config, archive: &Archive, args: &BackupArgs) -> Result<Vec<Said>, Failure> {
    let databases = match &args.database {
        Some(database) => vec![database.clone()],
        None => setup::source_databases(config).await?,
    };
    let stop = CancellationToken::new();
    tokio::spawn(stop_on_signal(
        stop.clone(),
        "stopping: the unfinished base backup is deleted",
    ));
    let mut said = Vec::new();
    for database in databases {
        let taken = Box::pin(take_one(config, archive, &database, &stop)).await;
        match taken {
            Ok(one) => said.push(one),
            // The others are worth as much.
            Err(source) => {
                said.push(view::not_taken(&database, &source));
                let doing = format!("back up {database}");
                tell(&Because::new(doing, source).into());
            }
        }
        if stop.is_cancelled() {
            break;
        }
    }
    Ok(said)
}

async fn take_one(
    config: &Config,
    archive: &Archive,
    database: &str,
    stop: &CancellationToken,
) -> Result<Said, BackupError> {
    let metrics = ArchiveMetrics::new(database);
    let looking = async {
        let keeper = Keeper::open(config, archive, database, &metrics).await?;
        let (bases, published) = keeper.look().await?;
        Ok::<_, BackupError>((keeper, bases, published))
    };
    // Nothing is there yet that would have to be deleted.
    let looked = stop.run_until_cancelled(Box::pin(looking)).await;
    let (keeper, bases, published) = looked.unwrap_or(Err(BackupError::Cancelled))?;
    let display = ProgressDisplay::new(database, &());
    let manifest = keeper.take(&bases, &published, &display, stop).await?;
    drop(display);
    let taken = bases.find().await?.bases;
    let taken = taken.iter().find(|base| base.lsn == manifest.lsn);
    Ok(view::taken(
        database,
        manifest.lsn,
        taken,
        &manifest.warnings,
    ))
}

/// The streams that are meant, by the configuration or, where that says "all", by what the archive has: the source may be
/// lost.
async fn streams(
    config: &Config,
    args: &BackupArgs,
    store: &Store,
) -> Result<Vec<NamedStream>, Failure> {
    let of = |database: &String| NamedStream {
        stream: config.stream(database),
        database: Some(database.clone()),
    };
    Ok(match (&args.database, &config.source.databases) {
        (Some(database), _) => vec![of(database)],
        (None, Databases::List(names)) => names.iter().map(of).collect(),
        (None, Databases::All) => {
            let folders = store.folders("").await?;
            let streams = folders
                .iter()
                .filter_map(|folder| StreamName::called(&config.source.slot, folder));
            let named = streams.map(|stream| NamedStream {
                stream,
                database: None,
            });
            named.collect()
        }
    })
}

/// Looks into the archive of one stream, or tidies it up: every history of it.
async fn look(
    config: &Config,
    archive: &Archive,
    args: &BackupArgs,
    store: &Store,
    named: &NamedStream,
) -> Result<Vec<Said>, BackupError> {
    let all = Bases::all(store, &named.stream).await?;
    if all.is_empty() && !args.prune {
        return Ok(vec![view::nothing(named, args.verify)]);
    }
    let mut said = Vec::new();
    let retention = archive.retention;
    let mut pruned = Pruned::default();
    for bases in &all {
        let of = named.of_history(bases.layout.history(), all.len());
        if args.list {
            let log = bases.log(PgLsn::from(0)).await?;
            let spans: Vec<Span> = log.iter().map(|(span, _)| *span).collect();
            said.push(view::listed(&of, &bases.find().await?, &spans));
        } else if args.verify {
            // What was written lately is in the store after that, if all is well.
            let is_last = all.last().is_some_and(|last| last.layout == bases.layout);
            let settled = config.objectives.rpo * 2 + idle_age(config.objectives.rpo / 2);
            let verified = bases.verify(settled, is_last).await?;
            said.push(view::verified(&of, &verified));
        } else {
            pruned = pruned.and(bases.prune(retention, args.dry_run).await?);
        }
    }
    if args.prune {
        let ended = Bases::prune_ended(&all, retention, args.dry_run).await?;
        said.push(view::pruned(named, &pruned.and(ended), args.dry_run));
    }
    Ok(said)
}
