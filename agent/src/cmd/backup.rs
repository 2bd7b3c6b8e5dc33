//! `dr-agent backup`: base backups on demand, and what the archive has.
//!
//! Thin: everything happens in [`crate::backup`] and [`crate::archive`]. Here it becomes text or JSON.

use std::io::Write as _;
use std::process::ExitCode;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::archive::{self, ArchiveError, Chain, Span};
use crate::backup::keep::Bases;
use crate::backup::{self, BackupError, Summary};
use crate::config::{Archive, Config};
use crate::error::{Classify, chain};
use crate::setup::{self, SetupError};
use crate::snapshot::ProgressDisplay;
use crate::store::StoreError;

/// Flags of `backup`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Without a flag it takes a base backup now; `dr-agent run` does so by itself every archive.base_every.\n\
    Exit codes: 0 done; 1 failed, or damage was found; 2 usage or configuration."
)]
pub struct Args {
    /// Only this database
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// List base backups, and how far the change log leads from each
    #[arg(long, group = "what")]
    list: bool,
    /// Read base backups and change log back, and check every sum
    #[arg(long, group = "what")]
    verify: bool,
    /// Delete what archive.retention lets go
    #[arg(long, group = "what")]
    prune: bool,
    /// With --prune: only say what would be deleted
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
    #[error("find the databases")]
    Databases(#[from] SetupError),
    #[error("back up {database}")]
    Backup {
        database: String,
        #[source]
        source: BackupError,
    },
}

impl Failure {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NoArchive => Some("write [archive] with its url".to_owned()),
            Self::Databases(error) => error.hint(),
            Self::Backup { source, .. } => source.hint(),
        }
    }
}

/// What is said of one database, for people and for programs, and whether all is well.
struct Said {
    text: String,
    json: Value,
    sound: bool,
}

/// Does it for every database and prints what came of it.
pub async fn run(config: Config, args: Args) -> ExitCode {
    let said = match Box::pin(each(&config, &args)).await {
        Ok(said) => said,
        Err(error) => {
            eprintln!("dr-agent: {}", chain(&error));
            if let Some(hint) = error.hint() {
                eprintln!("  hint: {hint}");
            }
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

async fn each(config: &Config, args: &Args) -> Result<Vec<Said>, Failure> {
    let archive = config.archive.as_ref().ok_or(Failure::NoArchive)?;
    let databases = match &args.database {
        Some(database) => vec![database.clone()],
        None => setup::source_databases(config).await?,
    };
    let mut said = Vec::new();
    for database in databases {
        let one = one(config, archive, &database, args).await;
        said.push(one.map_err(|source| Failure::Backup { database, source })?);
    }
    Ok(said)
}

async fn one(
    config: &Config,
    archive: &Archive,
    database: &str,
    args: &Args,
) -> Result<Said, BackupError> {
    let bases = Bases::open(config, archive, database).await?;
    if args.list {
        return Ok(listed(database, &bases.list().await?, &bases.log().await?));
    }
    if args.verify {
        return verify(&bases, database).await;
    }
    if args.prune {
        let pruned = bases.prune(args.dry_run).await?;
        let verb = if args.dry_run {
            "would be deleted"
        } else {
            "deleted"
        };
        let mut text = format!(
            "{database}: {} base backups, {} leftovers and {} segments of the log {verb}",
            pruned.bases.len(),
            pruned.leftovers.len(),
            pruned.log.len()
        );
        // What cannot be undone is shown by name beforehand.
        let names = [&pruned.bases, &pruned.leftovers, &pruned.log];
        for name in names.into_iter().flatten().filter(|_| args.dry_run) {
            text.push_str("\n  ");
            text.push_str(name);
        }
        return Ok(Said {
            text,
            json: json!({ "database": database, "dry_run": args.dry_run, "deleted": pruned }),
            sound: true,
        });
    }
    let display = ProgressDisplay::new(database, &());
    let cancel = CancellationToken::new();
    let tables = bases.published().await?;
    let manifest = bases.take(&tables, &display, &cancel).await?;
    drop(display);
    let taken = bases.list().await?;
    let taken = taken.iter().find(|base| base.lsn == manifest.lsn);
    Ok(Said {
        text: match taken {
            Some(base) => format!("{database}: {}", base_text(base)),
            None => format!("{database}: base backup at {}", manifest.lsn),
        },
        json: json!({ "database": database, "base": taken, "warnings": manifest.warnings }),
        sound: true,
    })
}

fn base_text(base: &Summary) -> String {
    format!(
        "base backup at {}, as of {}: {} tables, {} rows, {}",
        base.lsn,
        base.as_of,
        base.tables,
        base.rows,
        bytesize::ByteSize(base.bytes).display().iec()
    )
}

fn listed(database: &str, bases: &[Summary], spans: &[Span]) -> Said {
    let mut lines = Vec::new();
    let mut objects = Vec::new();
    for base in bases {
        let chain = Chain::from(base.lsn, spans);
        let gap = chain
            .resumes
            .map(|next| format!(", then a gap up to {next}"));
        lines.push(format!(
            "{database}: {}; restorable up to {}{}",
            base_text(base),
            chain.end,
            gap.unwrap_or_default()
        ));
        objects.push(json!({
            "base": base,
            "restorable_to": chain.end.to_string(),
            "log_resumes_at": chain.resumes.map(|lsn| lsn.to_string()),
        }));
    }
    if bases.is_empty() {
        lines.push(format!("{database}: no base backup"));
    }
    Said {
        text: lines.join("\n"),
        json: json!({ "database": database, "segments": spans.len(), "bases": objects }),
        sound: true,
    }
}

/// Everything is read; what is wrong is said and the rest is read all the same.
async fn verify(kept: &Bases<'_>, database: &str) -> Result<Said, BackupError> {
    let mut flaws = Vec::new();
    let bases = kept.list().await?;
    for base in &bases {
        match backup::verify(&kept.store, &base.base).await {
            Ok(_) => {}
            Err(error @ BackupError::Damaged { .. }) => flaws.push(chain(&error)),
            Err(error) => return Err(error),
        }
    }
    let spans = kept.log().await?;
    for span in &spans {
        match archive::verify(&kept.store, &kept.layout, *span).await {
            Ok(()) => {}
            // A store that is away says nothing about what is in it.
            Err(ArchiveError::Store(error)) if !matches!(error, StoreError::NotFound { .. }) => {
                return Err(error.into());
            }
            Err(error) => flaws.push(chain(&error)),
        }
    }
    // From the oldest base on the log must lead to its end.
    if let Some(oldest) = bases.first() {
        let chain = Chain::from(oldest.lsn, &spans);
        if let Some(next) = chain.resumes {
            flaws.push(format!(
                "the change log from {} to {next} is missing",
                chain.end
            ));
        }
    }
    let verdict = match flaws.as_slice() {
        [] => "sound".to_owned(),
        flaws => format!("DAMAGED\n  {}", flaws.join("\n  ")),
    };
    Ok(Said {
        text: format!(
            "{database}: {} base backups and {} segments read: {verdict}",
            bases.len(),
            spans.len()
        ),
        json: json!({
            "database": database, "bases": bases.len(), "segments": spans.len(), "flaws": flaws,
        }),
        sound: flaws.is_empty(),
    })
}
