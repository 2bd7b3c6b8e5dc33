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
use super::{
    BackupError, DataFile, Manifest, Pruned, Summary, TakeJob, list, manifest, prune, take,
};
use crate::archive::{Layout, Span};
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

/// The archive of one database.
pub struct Bases<'c> {
    config: &'c Config,
    archive: &'c Archive,
    database: &'c str,
    /// Where its objects are.
    pub store: Store,
    /// What they are called.
    pub layout: Layout,
}

impl<'c> Bases<'c> {
    /// Opens it. The source says who it is.
    ///
    /// # Errors
    /// [`BackupError::Store`], [`BackupError::Source`]
    pub async fn open(
        config: &'c Config,
        archive: &'c Archive,
        database: &'c str,
    ) -> Result<Self, BackupError> {
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
        Ok(Self {
            config,
            archive,
            database,
            store: Store::open(&archive.url, &archive.encryption).await?,
            layout: Layout::new(&stream, system_identifier.cast_unsigned()),
        })
    }

    /// The tables that are protected.
    ///
    /// # Errors
    /// [`BackupError::NotReplicated`] before the first `run`.
    pub async fn published(&self) -> Result<Vec<Table>, BackupError> {
        let source = self.config.source.conninfo.with_dbname(self.database);
        let tables = setup::published(&source, &self.config.stream(self.database))
            .await
            .map_err(|error| BackupError::Tables(Box::new(error)))?;
        tables.ok_or_else(|| BackupError::NotReplicated {
            database: self.database.to_owned(),
        })
    }

    /// Takes a base backup of these tables now.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn take(
        &self,
        tables: &[Table],
        observer: &dyn CopyObserver,
        cancel: &CancellationToken,
    ) -> Result<Manifest, BackupError> {
        let job = TakeJob {
            source: &self.config.source.conninfo.with_dbname(self.database),
            stream: &self.config.stream(self.database),
            tables,
            store: &self.store,
            bases: &self.layout.bases(),
            settings: &self.config.copy,
        };
        take(job, observer, cancel).await
    }

    /// The base backups, oldest first.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn list(&self) -> Result<Vec<Summary>, BackupError> {
        list(&self.store, &self.layout.bases()).await
    }

    /// The segments of the change log.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn log(&self) -> Result<Vec<Span>, BackupError> {
        let objects = self.store.list(&self.layout.log(), None).await?;
        let spans = objects
            .iter()
            .filter_map(|object| self.layout.parse_segment(&object.name));
        Ok(spans.collect())
    }

    /// Deletes what the retention lets go, or says what it would.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn prune(&self, dry_run: bool) -> Result<Pruned, BackupError> {
        let log: Vec<Segment> = self
            .log()
            .await?
            .into_iter()
            .map(|span| Segment {
                name: self.layout.segment(span),
                start: span.start,
                end: span.end,
            })
            .collect();
        let (now, retention) = (Timestamp::now(), self.archive.retention);
        prune(
            &self.store,
            &self.layout.bases(),
            &log,
            now,
            retention,
            dry_run,
        )
        .await
    }
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
    let (mut bases, mut newest) = (None, None);
    let mut pause = LOOK_FIRST;
    while tokio::time::timeout(pause, stop.cancelled()).await.is_err() {
        let looked = async {
            let bases = match &mut bases {
                Some(bases) => bases,
                none => none.insert(Bases::open(config, archive, database).await?),
            };
            due(bases, &mut newest, stop).await
        };
        pause = match Box::pin(looked).await {
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
    bases: &Bases<'_>,
    newest: &mut Option<Newest>,
    stop: &CancellationToken,
) -> Result<(), BackupError> {
    if newest.is_none()
        && let Some(base) = bases.list().await?.pop()
    {
        *newest = Some(Newest::of(&manifest(&bases.store, &base.base).await?));
    }
    let tables = bases.published().await?;
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
            if Duration::try_from(age).is_ok_and(|age| age < bases.archive.base_every) {
                return Ok(());
            }
            "archive.base_every has passed"
        }
    };
    let database = bases.database;
    tracing::info!(database, reason, "taking a base backup");
    let base = bases.take(&tables, &(), stop).await?;
    let mut taken = Newest::of(&base);
    // A table that has no rows of its own is in no file.
    taken
        .tables
        .extend(tables.into_iter().map(|table| table.name));
    *newest = Some(taken);
    tracing::info!(database, lsn = %base.lsn, "base backup taken");
    let pruned = bases.prune(false).await?;
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
