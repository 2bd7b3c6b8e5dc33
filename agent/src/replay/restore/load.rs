//! The first part of a restore: the base backup into the target, and the note from which the rest goes on.
//!
//! # Invariants
//! - What can be known of a load beforehand is known before anything is written ([`examine`]).
//! - What the target is without, is kept in the target together with the position.

use std::collections::BTreeSet;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::closing_notes::Gathering;
use super::observe::ArchivedBase;
use super::plan::{Load, RestorePlan};
use super::target::{self, Loaded, RestoreOwner, TargetPosition};
use super::{RestoreError, RestoreJob, encoding};
use crate::archive::base::{self, LoadJob, Ownership};
use crate::copy::CopyObserver;
use crate::failpoint;

/// What is known of a load before it writes.
pub(super) struct ExaminedLoad {
    load: base::Examined,
    /// What is to be told of it at the end.
    to_tell: Vec<String>,
}

impl ExaminedLoad {
    /// What the target will be without, as far as that is known beforehand.
    pub(super) fn warnings(&self) -> Vec<String> {
        let without = self.load.without();
        self.to_tell.iter().chain(without).cloned().collect()
    }
}

fn job<'a>(
    restore: &'a RestoreJob<'_>,
    archive: &'a ArchivedBase,
    plan: &'a RestorePlan,
) -> LoadJob<'a> {
    let options = restore.options;
    LoadJob {
        store: restore.store,
        base: &plan.base.base,
        manifest: &archive.manifest,
        target: &options.target,
        stream: &restore.stream,
        settings: &restore.config.copy,
        only: plan.tables.as_deref(),
        ownership: Ownership::Without {
            owners: options.no_owner,
            privileges: options.no_privileges,
        },
        // As of the moment, at the end.
        views: false,
    }
}

/// Finds out what can be known of a load before it writes, by any session on the target.
///
/// # Errors
/// [`RestoreError`], where it cannot succeed.
pub(super) async fn examine(
    restore: &RestoreJob<'_>,
    archive: &ArchivedBase,
    plan: &RestorePlan,
    client: &Client,
) -> Result<ExaminedLoad, RestoreError> {
    let manifest = &archive.manifest;
    let locale = encoding::check(client, &manifest.locale).await?;
    let load = base::examine(&job(restore, archive, plan), client).await?;
    Ok(ExaminedLoad {
        load,
        to_tell: manifest.warnings.iter().cloned().chain(locale).collect(),
    })
}

/// Loads the base backup; returns from where the log goes on.
///
/// # Errors
/// [`RestoreError`]; the next run removes what is there and begins anew.
pub(super) async fn load(
    restore: &RestoreJob<'_>,
    archive: &ArchivedBase,
    plan: &RestorePlan,
    load: &Load,
    examined: ExaminedLoad,
    client: &mut Client,
    copy: &dyn CopyObserver,
) -> Result<TargetPosition, RestoreError> {
    let owner = RestoreOwner {
        stream: &restore.stream,
        history: archive.history.layout.history(),
    };
    target::begin(client, owner, plan.base.lsn, load.wipes).await?;
    let gathering = Gathering::new(copy);
    let job = job(restore, archive, plan);
    base::load(job, examined.load, &gathering, &CancellationToken::new()).await?;
    failpoint::hit("restore:base-loaded");
    let mut kept = load.kept.clone();
    let mut seen = BTreeSet::new();
    let left_out = examined.to_tell.into_iter();
    kept.left_out.extend(
        left_out
            .chain(gathering.into_left_out())
            .filter(|what| seen.insert(what.clone())),
    );
    let loaded = Loaded {
        base: plan.base.lsn,
        tables: load.names.clone(),
        whole: plan.tables.is_none(),
        kept,
    };
    target::loaded(client, owner.stream, loaded).await
}
