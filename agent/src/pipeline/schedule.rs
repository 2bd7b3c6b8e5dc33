//! Base backups of one database of the configuration: on demand, and as often as `archive.base_every` says.
//!
//! Here [`take`] gets what it needs: the tables of the publication, and which history the source is in.
//!
//! # Invariants
//! - A backup that fails never touches replication; it is tried again, and the log and a metric show it. At most half of the
//!   time goes into backups that fail: reading all of a database is work for the source.
//! - None is taken before the stream's slot begins: the log would not lead on from it.
//! - What the retention lets go is deleted now and then, whether base backups succeed or not, and at once where a disk is
//!   full: otherwise it would stay full.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::archive::base::{BackupError, Bases, Manifest, Patience, Pruned, TakeJob};
use crate::archive::base::{histories, manifest, take};
use crate::archive::log::{Layout, LogChain, Span};
use crate::cloud::store::Store;
use crate::config::{Archive, Config};
use crate::copy::{CopyObserver, CopyPhase};
use crate::error::{Because, Classify as _, chain};
use crate::names::TableName;
use crate::names::history::History;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::schema::listing::{Listed, ListedAs};
use crate::setup::{self, Published};
use crate::time::timestamp;

/// How often it is looked whether a base backup is due. Each look asks the source for its tables.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// The same, as long as there is none.
const LOOK_FIRST: Duration = Duration::from_secs(2);

/// The longest pause after a failure; it is as long as the attempt took, but not below `limits.retry_max`.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// How often it is looked what the retention lets go.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Whoever takes base backups of one database.
pub struct Keeper<'c> {
    config: &'c Config,
    archive: &'c Archive,
    database: &'c str,
    store: Store,
    patience: Patience,
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
        metrics: &ArchiveMetrics,
    ) -> Result<Self, BackupError> {
        let store = Store::open(&archive.url, &archive.encryption).await?;
        store.count_throttled(metrics.throttled.clone());
        Ok(Self {
            config,
            archive,
            database,
            store,
            patience: Patience::new(
                config.limits.retry_max,
                config.limits.shutdown_grace,
                metrics,
            ),
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
        let published = published.map_err(|error| {
            BackupError::Tables(Because::new("look up the published tables", error))
        })?;
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
            patience: &self.patience,
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
struct NewestBase {
    history: History,
    lsn: PgLsn,
    /// By the source's clock.
    as_of: Timestamp,
    /// By the agent's clock.
    finished_at: Timestamp,
    took: Duration,
    /// In the archive.
    bytes: u64,
    listed: Listed,
    /// The log behind it has a gap.
    leads_nowhere: bool,
}

impl NewestBase {
    fn of(manifest: &Manifest) -> Self {
        Self {
            history: manifest.history(),
            lsn: manifest.lsn,
            as_of: manifest.as_of,
            finished_at: manifest.finished_at,
            took: manifest.took(),
            bytes: manifest.bytes(),
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
            leads_nowhere: LogChain::from(base.lsn, &spans).resumes.is_some(),
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
    let mut newest: Option<NewestBase> = None;
    let pause_min = config.limits.retry_max.min(PAUSE_MAX);
    let mut pause = LOOK_FIRST;
    while tokio::time::timeout(pause, stop.cancelled()).await.is_err() {
        let began = now();
        let looked = async {
            let keeper = match &mut keeper {
                Some(keeper) => keeper,
                none => none.insert(Keeper::open(config, archive, database, &metrics).await?),
            };
            if let Some((newest, broken)) = newest.as_mut().zip(*broken.borrow()) {
                newest.leads_nowhere |= newest.lsn < broken;
            }
            one_look(keeper, &mut newest, &mut pruned_at, &metrics, stop).await
        };
        pause = match Box::pin(looked).await {
            Ok(()) => LOOK_EVERY.min(archive.base_every),
            // Before the first copy there is nothing to back up.
            Err(BackupError::NotReplicated { .. } | BackupError::Cancelled) => LOOK_FIRST,
            // The pipeline says so, and it is not known whether one is due.
            Err(error @ BackupError::Tables(_)) => {
                tracing::warn!(
                    database, error = %chain(&error), hint = error.hint(), pause = ?pause_min,
                    "no look whether a base backup is due; will try again"
                );
                pause_min
            }
            Err(error) => {
                let pause = elapsed(began).clamp(pause_min, PAUSE_MAX);
                metrics.failed_bases.increment(1);
                tracing::error!(
                    database, error = %chain(&error), hint = error.hint(), ?pause,
                    "no base backup was taken; will try again"
                );
                pause
            }
        };
        if let Some(newest) = &newest {
            metrics.base(newest.as_of.into(), newest.bytes, newest.took);
        }
    }
}

/// Takes a base backup if one is due, and tidies up if it is time.
async fn one_look(
    keeper: &Keeper<'_>,
    newest: &mut Option<NewestBase>,
    pruned_at: &mut Option<Instant>,
    metrics: &ArchiveMetrics,
    stop: &CancellationToken,
) -> Result<(), BackupError> {
    let (bases, published) = keeper.look().await?;
    let taken = take_if_due(keeper, &bases, &published, newest, metrics, stop);
    let taken = Box::pin(taken).await;
    let overdue = pruned_at.is_none_or(|at| elapsed(at) >= PRUNE_EVERY);
    let makes_room = match &taken {
        Ok(was_due) => *was_due,
        Err(error) => error.is_full(),
    };
    if overdue || makes_room {
        match keeper.prune(&bases).await {
            Ok(()) => *pruned_at = Some(now()),
            Err(error) => tracing::warn!(
                database = keeper.database, error = %chain(&error), hint = error.hint(),
                "what archive.retention lets go is still there; will try again"
            ),
        }
    }
    taken.map(|_| ())
}

async fn take_if_due(
    keeper: &Keeper<'_>,
    bases: &Bases,
    published: &Published,
    newest: &mut Option<NewestBase>,
    metrics: &ArchiveMetrics,
    stop: &CancellationToken,
) -> Result<bool, BackupError> {
    let history = bases.layout.history();
    if newest
        .as_ref()
        .is_none_or(|newest| newest.history != history)
    {
        *newest = NewestBase::find(bases).await?;
    }
    let reason = match newest {
        None => "it is the first",
        Some(newest) => {
            let (now, base_every) = (timestamp(), keeper.archive.base_every);
            match newest.due(&published.listed, now, base_every) {
                Some(reason) => reason,
                None => return Ok(false),
            }
        }
    };
    let database = keeper.database;
    tracing::info!(database, reason, "taking a base backup");
    let progress = ScheduleProgress::begin(metrics);
    let base = keeper.take(bases, published, &progress, stop).await?;
    drop(progress);
    let taken = NewestBase::of(&base);
    tracing::info!(
        database, lsn = %base.lsn, bytes = taken.bytes, took = ?taken.took, "base backup taken"
    );
    *newest = Some(taken);
    Ok(true)
}

/// Shows how far a base backup has come.
struct ScheduleProgress<'m> {
    metrics: &'m ArchiveMetrics,
    planned: AtomicU64,
    copied: AtomicU64,
}

impl<'m> ScheduleProgress<'m> {
    fn begin(metrics: &'m ArchiveMetrics) -> Self {
        metrics.base_progress(0.0);
        Self {
            metrics,
            planned: AtomicU64::new(0),
            copied: AtomicU64::new(0),
        }
    }

    #[allow(
        clippy::cast_precision_loss,
        reason = "a metric; exact below 2^52, that is 4 PiB"
    )]
    fn show(&self) {
        let planned = self.planned.load(Ordering::Relaxed).max(1) as f64;
        let copied = self.copied.load(Ordering::Relaxed) as f64;
        // What was read twice counts twice, and what was planned is an estimate.
        self.metrics.base_progress((copied / planned).min(1.0));
    }
}

impl Drop for ScheduleProgress<'_> {
    fn drop(&mut self) {
        self.metrics.base_progress(1.0);
    }
}

impl CopyObserver for ScheduleProgress<'_> {
    fn tables(&self, _: usize, _: usize) {}

    fn planned(&self, bytes: u64) {
        self.planned.store(bytes, Ordering::Relaxed);
        self.show();
    }

    fn copied(&self, _: u64, bytes: u64) {
        self.copied.fetch_add(bytes, Ordering::Relaxed);
        self.show();
    }

    fn table_ready(&self, _: &TableName, _: u64) {}

    fn phase(&self, _: CopyPhase) {}
}

fn now() -> Instant {
    Instant::now()
}

fn elapsed(since: Instant) -> Duration {
    now().saturating_duration_since(since)
}
