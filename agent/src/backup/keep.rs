//! Base backups of one database of the configuration: on demand, and as often as `archive.base_every` says.
//!
//! Here [`take`] gets what it needs: the tables of the publication, and which history the source is in.
//!
//! # Invariants
//! - A backup that fails never touches replication; it is tried again, and the log and a metric show it.
//! - None is taken before the stream's slot begins: the log would not lead on from it.
//! - What the retention lets go is deleted now and then, whether base backups succeed or not: otherwise a full disk would
//!   stay full.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{BackupError, Bases, Manifest, Pruned, TakeJob, histories, manifest, take};
use crate::archive::{Chain, Layout, Span};
use crate::catalog::TableName;
use crate::config::{Archive, Config};
use crate::error::{Classify as _, chain};
use crate::history::History;
use crate::listed::{Listed, ListedAs};
use crate::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::setup::{self, Published};
use crate::snapshot::CopyObserver;
use crate::store::Store;

/// How often it is looked whether a base backup is due. Each look asks the source for its tables.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// The same, as long as there is none.
const LOOK_FIRST: Duration = Duration::from_secs(2);

/// After a failure.
const PAUSE: Duration = Duration::from_secs(60);

/// How often it is looked what the retention lets go.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Whoever takes base backups of one database.
pub struct Keeper<'c> {
    config: &'c Config,
    archive: &'c Archive,
    database: &'c str,
    store: Store,
}

impl<'c> Keeper<'c> {
    /// Opens the archive.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn open(
        config: &'c Config,
        archive: &'c Archive,
        database: &'c str,
    ) -> Result<Self, BackupError> {
        Ok(Self {
            config,
            archive,
            database,
            store: Store::open(&archive.url, &archive.encryption).await?,
        })
    }

    /// What the archive has of the history that the source is in, and what is published.
    ///
    /// # Errors
    /// [`BackupError::NotReplicated`] before the stream's slot is there.
    pub async fn look(&self) -> Result<(Bases, Published), BackupError> {
        let source = self.config.source.conninfo.with_dbname(self.database);
        let stream = self.config.stream(self.database);
        let published = setup::published(&source, &stream).await;
        let published = published.map_err(|error| BackupError::Tables(Box::new(error)))?;
        let published = published.ok_or_else(|| BackupError::NotReplicated {
            database: self.database.to_owned(),
        })?;
        let bases = Bases {
            store: self.store.clone(),
            layout: Layout::new(&stream, published.history),
        };
        Ok((bases, published))
    }

    /// Takes a base backup of what is published now.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn take(
        &self,
        bases: &Bases,
        published: &Published,
        observer: &dyn CopyObserver,
        cancel: &CancellationToken,
    ) -> Result<Manifest, BackupError> {
        let job = TakeJob {
            source: &self.config.source.conninfo.with_dbname(self.database),
            stream: bases.layout.stream(),
            history: bases.layout.history(),
            tables: &published.tables,
            listed: &published.listed,
            store: &self.store,
            bases: &bases.layout.bases(),
            settings: &self.config.copy,
        };
        take(job, observer, cancel).await
    }

    /// Deletes what the retention lets go, of this history and of those that have ended.
    async fn prune(&self, bases: &Bases) -> Result<(), BackupError> {
        let retention = self.archive.retention;
        let layouts = histories(&self.store, bases.layout.stream()).await?;
        let all: Vec<Bases> = layouts
            .into_iter()
            .map(|layout| Bases {
                store: self.store.clone(),
                layout,
            })
            .collect();
        let pruned = bases.prune(retention, false).await?;
        let pruned = pruned.and(Bases::prune_ended(&all, retention, false).await?);
        if pruned != Pruned::default() {
            tracing::info!(
                database = self.database,
                bases = pruned.bases.len(),
                segments = pruned.log.len(),
                histories = pruned.histories.len(),
                "deleted what is older than archive.retention"
            );
        }
        Ok(())
    }
}

/// What the newest base backup holds.
struct Newest {
    history: History,
    lsn: PgLsn,
    /// By the source's clock.
    as_of: Timestamp,
    /// By the agent's clock.
    finished_at: Timestamp,
    listed: Listed,
    /// The log behind it has a gap.
    leads_nowhere: bool,
}

impl Newest {
    fn of(manifest: &Manifest) -> Self {
        Self {
            history: manifest.history(),
            lsn: manifest.lsn,
            as_of: manifest.as_of,
            finished_at: manifest.finished_at,
            listed: manifest.listed(),
            leads_nowhere: false,
        }
    }

    /// The newest of a history, as an earlier run of the agent has left it.
    async fn find(bases: &Bases) -> Result<Option<Self>, BackupError> {
        let found = bases.find().await?;
        found.warn();
        let Some(base) = found.bases.last() else {
            return Ok(None);
        };
        let manifest = manifest(&bases.store, &base.base).await?;
        let log = bases.log(base.lsn).await?;
        let spans: Vec<Span> = log.iter().map(|(span, _)| *span).collect();
        Ok(Some(Self {
            leads_nowhere: Chain::from(base.lsn, &spans).resumes.is_some(),
            ..Self::of(&manifest)
        }))
    }

    /// Why another one is due.
    fn due(&self, listed: &Listed, now: Timestamp, base_every: Duration) -> Option<&'static str> {
        // The first rows of a new table are in no log, nor are the changes of one that was not listed for a while: nothing behind
        // them could be restored.
        let has = |(table, listed_as): (&TableName, &ListedAs)| {
            self.listed.get(table).is_some_and(|was| was == listed_as)
        };
        // Also of a clock that was wrong, and set right.
        let age = now.duration_since(self.finished_at).unsigned_abs();
        if !listed.iter().all(has) {
            Some(
                "there are tables that the newest one does not have, or that were listed anew since",
            )
        } else if self.leads_nowhere {
            Some("the change log has a gap behind the newest one")
        } else if age >= base_every {
            Some("archive.base_every has passed")
        } else {
            None
        }
    }
}

/// Takes base backups of one database as often as they are due, until stopped.
/// `broken`: where one must be taken from, because the change log has a gap before that.
pub async fn keep(
    config: &Config,
    database: &str,
    broken: watch::Receiver<Option<PgLsn>>,
    stop: &CancellationToken,
) {
    let Some(archive) = &config.archive else {
        return;
    };
    let metrics = ArchiveMetrics::new(database);
    let (mut keeper, mut pruned_at) = (None, None);
    let mut newest: Option<Newest> = None;
    let mut pause = LOOK_FIRST;
    while tokio::time::timeout(pause, stop.cancelled()).await.is_err() {
        let looked = async {
            let keeper = match &mut keeper {
                Some(keeper) => keeper,
                none => none.insert(Keeper::open(config, archive, database).await?),
            };
            if let Some((newest, broken)) = newest.as_mut().zip(*broken.borrow()) {
                newest.leads_nowhere |= newest.lsn < broken;
            }
            one_look(keeper, &mut newest, &mut pruned_at, stop).await
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

/// Takes a base backup if one is due, and tidies up if it is time.
async fn one_look(
    keeper: &Keeper<'_>,
    newest: &mut Option<Newest>,
    pruned_at: &mut Option<Instant>,
    stop: &CancellationToken,
) -> Result<(), BackupError> {
    let (bases, published) = keeper.look().await?;
    let taken = Box::pin(take_if_due(keeper, &bases, &published, newest, stop)).await;
    let overdue = pruned_at.is_none_or(|at| elapsed(at) >= PRUNE_EVERY);
    if overdue || matches!(taken, Ok(true)) {
        keeper.prune(&bases).await?;
        *pruned_at = Some(now());
    }
    taken.map(|_| ())
}

async fn take_if_due(
    keeper: &Keeper<'_>,
    bases: &Bases,
    published: &Published,
    newest: &mut Option<Newest>,
    stop: &CancellationToken,
) -> Result<bool, BackupError> {
    let history = bases.layout.history();
    if newest
        .as_ref()
        .is_none_or(|newest| newest.history != history)
    {
        *newest = Newest::find(bases).await?;
    }
    let reason = match newest {
        None => "it is the first",
        Some(newest) => {
            let (now, base_every) = (Timestamp::now(), keeper.archive.base_every);
            match newest.due(&published.listed, now, base_every) {
                Some(reason) => reason,
                None => return Ok(false),
            }
        }
    };
    let database = keeper.database;
    tracing::info!(database, reason, "taking a base backup");
    let base = keeper.take(bases, published, &(), stop).await?;
    *newest = Some(Newest::of(&base));
    tracing::info!(database, lsn = %base.lsn, "base backup taken");
    Ok(true)
}

#[allow(clippy::disallowed_methods, reason = "only for when to tidy up next")]
fn now() -> Instant {
    Instant::now()
}

fn elapsed(since: Instant) -> Duration {
    now().saturating_duration_since(since)
}
