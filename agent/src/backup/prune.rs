//! Deletes what the retention lets go ([`super::retention`] decides).
//!
//! # Invariants
//! - Of a base the manifest goes first: killed in the middle, it is a leftover and not a damaged base.
//! - Bases go before the log: killed in between, no base is without its log.
//! - A dry run reads and deletes nothing.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::error::BackupError;
use super::manifest;
use super::repository::{self, Found};
use super::retention::{self, Base, Holdings, Segment};
use crate::failpoint;
use crate::pg::PgLsn;
use crate::store::Store;

/// What was deleted, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Prefixes of bases.
    pub bases: Vec<String>,
    /// Prefixes of what killed backups left.
    pub leftovers: Vec<String>,
    /// Objects of the change log.
    pub log: Vec<String>,
    /// Objects of the bases and leftovers.
    pub objects: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Deletes bases, leftovers and pieces of the `log` that are older than the retention needs.
pub async fn prune(
    store: &Store,
    bases: &str,
    log: &[Segment],
    now: Timestamp,
    retention: Duration,
    dry_run: bool,
) -> Result<Pruned, BackupError> {
    let found = repository::find(store, bases).await?;
    let whole: Vec<Base> = found
        .bases
        .iter()
        .map(|base| Base {
            lsn: base.lsn,
            as_of: base.as_of,
        })
        .collect();
    let is_whole = |lsn: PgLsn| whole.iter().any(|base| base.lsn == lsn);
    let leftovers: Vec<PgLsn> = found
        .objects
        .keys()
        .map(|&lsn| PgLsn::from(lsn))
        .filter(|&lsn| !is_whole(lsn))
        .collect();
    let holdings = Holdings {
        bases: &whole,
        leftovers: &leftovers,
        log,
    };
    let expired = retention::expired(holdings, now, retention);
    let name = |lsn: &PgLsn| repository::base(bases, *lsn);
    let mut pruned = Pruned {
        bases: expired.bases.iter().map(name).collect(),
        leftovers: expired.leftovers.iter().map(name).collect(),
        log: expired.log.clone(),
        objects: 0,
        bytes: 0,
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

async fn delete(
    store: &Store,
    bases: &str,
    found: &Found,
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
