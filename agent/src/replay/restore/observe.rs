//! Reads what a restore must know of the archive: histories, base backups, segments of the change log.
//!
//! First step of every restore, beside a look at the target ([`super::target::look`]). The source is never asked.
//!
//! # Invariants
//! - Touches nothing.
//!
//! # What it does not do
//! It judges nothing: see [`super::plan`]. It reads no rows and no segment.

use std::collections::BTreeMap;

use super::pick_base::DatedBase;
use super::pick_history::ArchivedLife;
use super::{RestoreError, RestoreJob, plan};
use crate::archive::base::{self, BaseSummary, Bases, FoundBases, Manifest};
use crate::archive::log::{Layout, Span};
use crate::cloud::store::Store;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::time::{Micros, pg_micros};

/// What the archive has of one history.
#[derive(Clone, Debug)]
pub(super) struct ArchivedHistory {
    /// What its objects are called.
    pub(super) layout: Layout,
    /// Its base backups that can be used, oldest first; there is one at least.
    pub(super) bases: Vec<BaseSummary>,
    /// Every segment of its change log, and its size.
    pub(super) segments: BTreeMap<Span, u64>,
    /// When something of it was written last, by the store's clock.
    pub(super) written_at: Option<Micros>,
}

impl ArchivedHistory {
    /// As far as choosing a history is concerned.
    pub(super) fn life(&self) -> ArchivedLife {
        let end = self.segments.keys().map(|span| span.end).max();
        ArchivedLife {
            history: self.layout.history(),
            bases: self.bases().map(|base| (base.lsn, base.time)).collect(),
            end: end.unwrap_or(PgLsn::from(0)),
            written_at: self.written_at,
        }
    }

    /// As far as choosing a base backup is concerned.
    pub(super) fn bases(&self) -> impl Iterator<Item = DatedBase> {
        self.bases.iter().map(|base| DatedBase {
            lsn: base.lsn,
            time: pg_micros(base.as_of.into()),
        })
    }
}

/// The archive, as far as one restore is concerned.
#[derive(Debug)]
pub(super) struct ArchivedBase {
    /// The history that is meant.
    pub(super) history: ArchivedHistory,
    /// The newest of its base backups that leads to the moment.
    pub(super) base: BaseSummary,
    /// What is in that.
    pub(super) manifest: Manifest,
}

/// Looks what the archive has for a restore.
///
/// # Errors
/// Where it cannot be read, or has nothing that leads to the moment.
pub(super) async fn archive(restore: &RestoreJob<'_>) -> Result<ArchivedBase, RestoreError> {
    let mut histories = histories(restore.store, &restore.source()).await?;
    let choice = plan::choose(&histories, restore.options)?;
    let history = histories.swap_remove(choice.history);
    let base = history.bases[choice.base].clone();
    let manifest = base::manifest(restore.store, &base.base).await?;
    Ok(ArchivedBase {
        history,
        base,
        manifest,
    })
}

/// Every history of a stream that has a base backup that can be used, in the order in which they began.
async fn histories(
    store: &Store,
    stream: &StreamName,
) -> Result<Vec<ArchivedHistory>, RestoreError> {
    let mut histories = Vec::new();
    for of in Bases::all(store, stream).await? {
        let FoundBases {
            bases, unusable, ..
        } = of.find().await?;
        for base in unusable {
            tracing::warn!(
                base = base.base,
                reason = base.reason,
                "a base backup cannot be used"
            );
        }
        if !bases.is_empty() {
            histories.push(history(of, bases).await?);
        }
    }
    Ok(histories)
}

async fn history(of: Bases, bases: Vec<BaseSummary>) -> Result<ArchivedHistory, RestoreError> {
    let log = of.log(PgLsn::from(0)).await?;
    let written = log.iter().filter_map(|(_, object)| object.written_at);
    let finished = bases.iter().map(|base| base.finished_at.into());
    Ok(ArchivedHistory {
        written_at: written.chain(finished).map(pg_micros).max(),
        segments: log
            .iter()
            .map(|(span, object)| (*span, object.bytes))
            .collect(),
        layout: of.layout,
        bases,
    })
}
