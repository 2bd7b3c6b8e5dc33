//! Deletes what the retention lets go ([`super::retention`] decides).
//!
//! # Invariants
//! - Of a base the manifest goes first: killed in the middle, it is a leftover and not a damaged base.
//! - Bases go before the log: killed in between, no base is without its log. So it is with a whole history.
//! - A dry run reads and deletes nothing.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::bases::Bases;
use super::error::BackupError;
use super::manifest;
use super::repository::{self, BaseSummary, FoundBases};
use super::retention::{self, Holdings, Life, RetentionBase, RetentionSegment};
use crate::cloud::store::{Listed, Store};
use crate::failpoint;
use crate::pg::PgLsn;

/// What was deleted, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Prefixes of bases.
    pub bases: Vec<String>,
    /// Prefixes of what killed backups left.
    pub leftovers: Vec<String>,
    /// Objects of the change log.
    pub log: Vec<String>,
    /// Prefixes of whole histories.
    pub histories: Vec<String>,
    /// Objects of the bases and leftovers.
    pub objects: usize,
    /// Bytes of everything.
    pub bytes: u64,
}

impl Pruned {
    /// Both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.bases.extend(other.bases);
        self.leftovers.extend(other.leftovers);
        self.log.extend(other.log);
        self.histories.extend(other.histories);
        self.objects += other.objects;
        self.bytes += other.bytes;
        self
    }
}

/// Deletes bases, leftovers and pieces of the `log` that are older than the retention needs.
pub async fn prune(
    store: &Store,
    bases: &str,
    log: &[RetentionSegment],
    now: Timestamp,
    retention: Duration,
    dry_run: bool,
) -> Result<Pruned, BackupError> {
    let found = repository::find(store, bases).await?;
    let whole: Vec<RetentionBase> = found
        .bases
        .iter()
        .map(|base| RetentionBase {
            lsn: base.lsn,
            as_of: base.counts_from(),
        })
        .collect();
    let unusable = || found.unusable.iter().map(|base| base.lsn);
    let is_whole =
        |lsn: PgLsn| whole.iter().any(|base| base.lsn == lsn) || unusable().any(|it| it == lsn);
    let leftovers: Vec<PgLsn> = found
        .objects
        .keys()
        .map(|&lsn| PgLsn::from(lsn))
        .filter(|&lsn| !is_whole(lsn))
        .collect();
    let unusable: Vec<PgLsn> = unusable().collect();
    let holdings = Holdings {
        bases: &whole,
        unusable: &unusable,
        leftovers: &leftovers,
        log,
    };
    let expired = retention::expired(holdings, now, retention);
    let name = |lsn: &PgLsn| repository::base(bases, *lsn);
    let mut pruned = Pruned {
        bases: expired.bases.iter().map(name).collect(),
        leftovers: expired.leftovers.iter().map(name).collect(),
        log: expired.log.clone(),
        histories: Vec::new(),
        objects: 0,
        bytes: log
            .iter()
            .filter(|segment| expired.log.contains(&segment.name))
            .map(|segment| segment.bytes)
            .sum(),
    };
    for &lsn in expired.bases.iter().chain(&expired.leftovers) {
        let (objects, bytes) = delete(store, bases, &found, lsn, dry_run).await?;
        pruned.objects += objects;
        pruned.bytes += bytes;
    }
    for segment in &expired.log {
        if !dry_run {
            store.delete(segment).await?;
            failpoint::hit("prune:segment-deleted");
        }
    }
    Ok(pruned)
}

/// Deletes the histories of a stream that have ended longer ago than the retention. `all` of them, in the order in which
/// they began.
pub(super) async fn ended(
    all: &[Bases],
    now: Timestamp,
    retention: Duration,
    dry_run: bool,
) -> Result<Pruned, BackupError> {
    let mut lives = Vec::new();
    let mut found = Vec::new();
    for history in all {
        let bases = history.find().await?;
        let objects = history.store.list(&history.layout.root(), None).await?;
        lives.push(Life {
            written_at: newest(&objects),
            first_base: bases.bases.iter().map(BaseSummary::counts_from).min(),
        });
        found.push((bases, objects));
    }
    let mut pruned = Pruned::default();
    let ended = retention::ended(&lives, now, retention);
    for ((history, (bases, objects)), _) in all.iter().zip(&found).zip(ended).filter(|(_, it)| *it)
    {
        pruned.histories.push(history.layout.root());
        pruned.bytes += objects.iter().map(|object| object.bytes).sum::<u64>();
        if dry_run {
            continue;
        }
        for &lsn in bases.objects.keys() {
            let prefix = history.layout.bases();
            delete(&history.store, &prefix, bases, PgLsn::from(lsn), false).await?;
        }
        for object in objects {
            history.store.delete(&object.name).await?;
        }
        tracing::info!(
            history = history.layout.root(),
            "deleted a history that has ended"
        );
    }
    Ok(pruned)
}

/// When the youngest of them was written; none unless that is known of all.
fn newest(objects: &[Listed]) -> Option<Timestamp> {
    let times = objects
        .iter()
        .map(|object| Timestamp::try_from(object.written_at?).ok());
    let times: Option<Vec<Timestamp>> = times.collect();
    times?.into_iter().max()
}

async fn delete(
    store: &Store,
    bases: &str,
    found: &FoundBases,
    lsn: PgLsn,
    dry_run: bool,
) -> Result<(usize, u64), BackupError> {
    let objects = found.objects.get(&u64::from(lsn));
    let objects = objects.map(Vec::as_slice).unwrap_or_default();
    let bytes = objects.iter().map(|object| object.bytes).sum();
    if !dry_run {
        let base = repository::base(bases, lsn);
        store.delete(&format!("{base}{}", manifest::NAME)).await?;
        failpoint::hit("prune:manifest-deleted");
        for object in objects {
            store.delete(&object.name).await?;
            failpoint::hit("prune:object-deleted");
        }
        tracing::info!(base, objects = objects.len(), "deleted");
    }
    Ok((objects.len(), bytes))
}
