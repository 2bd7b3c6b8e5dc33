//! Base backups of one database of the configuration: on demand, and as often as `archive.base_every` says.
//!
//! Here [`take`] and [`prune`] get what they need: the tables of the publication, the names in the archive, the segments of
//! the change log.
//!
//! # Invariants
//! - A backup that fails never touches replication; it is tried again, and the log and a metric show it.
//! - What is older than the retention goes after a new base backup is there, and at no other time.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::retention::Segment;
use super::{BackupError, DataFile, Manifest, Pruned, TakeJob, list, manifest, prune, take};
use crate::archive::Layout;
use crate::catalog::{Table, TableName};
use crate::config::{Archive, Config};
use crate::error::{Classify as _, chain};
use crate::metrics::ArchiveMetrics;
use crate::pg::{self, PgError, Session};
use crate::setup;
use crate::snapshot::CopyObserver;
use crate::store::Store;

/// How often it is looked whether a base backup is due. Each look asks the source for its tables.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// The same, as long as there is none.
const LOOK_FIRST: Duration = Duration::from_secs(2);

/// After a failure.
const PAUSE: Duration = Duration::from_secs(60);

/// Opens the archive of a configuration.
///
/// # Errors
/// [`BackupError::Store`]
pub async fn store(archive: &Archive) -> Result<Store, BackupError> {
    Ok(Store::open(&archive.url, &archive.encryption).await?)
}

/// The names of a database's objects, as its source says who it is.
///
/// # Errors
/// [`BackupError::Source`]
pub async fn layout(config: &Config, database: &str) -> Result<Layout, BackupError> {
    let stream = config.stream(database);
    let source = config.source.conninfo.with_dbname(database);
    let refused = |source: PgError| BackupError::Source {
        doing: "ask for the system identifier",
        source,
    };
    let session = Session::new(stream.application_name("backup"));
    let client = pg::connect(&source, &session).await.map_err(refused)?;
    let row = client
        .query_one(
            "SELECT system_identifier FROM pg_catalog.pg_control_system()",
            &[],
        )
        .await
        .map_err(|error| refused(error.into()))?;
    let system_identifier: i64 = row.get(0);
    Ok(Layout::new(&stream, system_identifier.cast_unsigned()))
}

/// The tables that are protected.
async fn published(config: &Config, database: &str) -> Result<Vec<Table>, BackupError> {
    let source = config.source.conninfo.with_dbname(database);
    let tables = setup::published(&source, &config.stream(database))
        .await
        .map_err(|error| BackupError::Tables(Box::new(error)))?;
    tables.ok_or_else(|| BackupError::NotReplicated {
        database: database.to_owned(),
    })
}

/// Takes a base backup of one database now.
///
/// # Errors
/// [`BackupError`]; [`BackupError::NotReplicated`] before the first `run`.
pub async fn now(
    config: &Config,
    store: &Store,
    database: &str,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Manifest, BackupError> {
    let stream = config.stream(database);
    let source = config.source.conninfo.with_dbname(database);
    let layout = layout(config, database).await?;
    let tables = published(config, database).await?;
    let job = TakeJob {
        source: &source,
        stream: &stream,
        tables: &tables,
        store,
        bases: &layout.bases(),
        settings: &config.copy,
    };
    take(job, observer, cancel).await
}

/// Deletes what the retention lets go, or says what it would.
///
/// # Errors
/// [`BackupError`]
pub async fn prune_now(
    archive: &Archive,
    store: &Store,
    layout: &Layout,
    dry_run: bool,
) -> Result<Pruned, BackupError> {
    let objects = store.list(&layout.log(), None).await?;
    let log: Vec<Segment> = objects
        .into_iter()
        .filter_map(|object| {
            let span = layout.parse_segment(&object.name)?;
            Some(Segment {
                name: object.name,
                start: span.start,
                end: span.end,
            })
        })
        .collect();
    let retention = archive.retention;
    prune(
        store,
        &layout.bases(),
        &log,
        Timestamp::now(),
        retention,
        dry_run,
    )
    .await
}

/// What the newest base backup holds.
struct Newest {
    as_of: Timestamp,
    tables: BTreeSet<TableName>,
}

impl Newest {
    fn of(manifest: &Manifest) -> Self {
        let names = |data: &DataFile| [data.table.clone(), data.root.clone()];
        Self {
            as_of: manifest.as_of,
            tables: manifest.data().flat_map(|(_, data)| names(data)).collect(),
        }
    }
}

/// Takes base backups of one database as often as they are due, until stopped.
pub async fn keep(config: &Config, database: &str, stop: &CancellationToken) {
    let Some(archive) = &config.archive else {
        return;
    };
    let metrics = ArchiveMetrics::new(database);
    let mut newest = None;
    let mut pause = LOOK_FIRST;
    while tokio::time::timeout(pause, stop.cancelled()).await.is_err() {
        let looking = due(config, archive, database, &mut newest, stop);
        pause = match Box::pin(looking).await {
            Ok(()) => LOOK_EVERY,
            // Before the first copy there is nothing to back up.
            Err(BackupError::NotReplicated { .. } | BackupError::Cancelled) => LOOK_FIRST,
            Err(error) => {
                metrics.failed_bases.increment(1);
                tracing::error!(
                    database, error = %chain(&error), hint = error.hint(),
                    "no base backup was taken; will try again"
                );
                PAUSE
            }
        };
        if let Some(newest) = &newest {
            metrics.base(newest.as_of.into());
        }
    }
}

/// Takes one if it is due: by the clock, or because a table is not in the newest one. The first rows of that are in no
/// log, so nothing behind its first change could be restored.
async fn due(
    config: &Config,
    archive: &Archive,
    database: &str,
    newest: &mut Option<Newest>,
    stop: &CancellationToken,
) -> Result<(), BackupError> {
    let store = store(archive).await?;
    let layout = layout(config, database).await?;
    if newest.is_none()
        && let Some(base) = list(&store, &layout.bases()).await?.pop()
    {
        *newest = Some(Newest::of(&manifest(&store, &base.base).await?));
    }
    let tables = published(config, database).await?;
    let reason = match newest {
        None => "it is the first",
        Some(newest)
            if !tables
                .iter()
                .all(|table| newest.tables.contains(&table.name)) =>
        {
            "there are tables that the newest one does not have"
        }
        Some(newest) => {
            let age = Timestamp::now().duration_since(newest.as_of);
            if Duration::try_from(age).is_ok_and(|age| age < archive.base_every) {
                return Ok(());
            }
            "archive.base_every has passed"
        }
    };
    tracing::info!(database, reason, "taking a base backup");
    let base = now(config, &store, database, &(), stop).await?;
    let mut taken = Newest::of(&base);
    // A table that has no rows of its own is in no file.
    taken
        .tables
        .extend(tables.into_iter().map(|table| table.name));
    *newest = Some(taken);
    tracing::info!(database, lsn = %base.lsn, "base backup taken");
    let pruned = prune_now(archive, &store, &layout, false).await?;
    if pruned != Pruned::default() {
        tracing::info!(
            database,
            bases = pruned.bases.len(),
            segments = pruned.log.len(),
            "deleted what is older than archive.retention"
        );
    }
    Ok(())
}
