//! The initial copy: schema and rows of one database, at an exported snapshot.
//!
//! ```text
//! source ──pg_dump──▶ archive ──▶ pre-data ▶ [rows] ▶ post-data ▶ sequences, views, statistics ▶ ready
//!   └─────COPY TO STDOUT──────────────────────▲  (N connection pairs, passed through)
//! ```
//!
//! The caller creates the slot, exports the snapshot, keeps the exporting session open, and decides
//! which tables; [`copy`] does the rest and returns when all of them are `ready` in
//! `dr_agent.table_sync`. First copies ([`CopyJob::whole_schema`]) and tables that appeared later go
//! the same way.
//!
//! # Invariants
//! - Killed anywhere and called again with a new snapshot, it ends in the same place: tables that
//!   hold their rows (`copied`) keep them and their older snapshot LSN, the others are emptied and
//!   filled again, indexes that exist stay, and so do statistics.
//! - A table is `ready` only when rows, indexes and constraints are there.
//! - Whatever of the source is not carried over is logged as a warning and told to the observer.
//!
//! # What it does not do
//! It creates neither database nor roles nor schema `dr_agent`, and it retries nothing: a
//! [`crate::error::Class::Transient`] error means "call again with a new snapshot".

mod build;
pub(crate) mod deferred;
pub(crate) mod dump;
mod error;
pub(crate) mod export;
pub(crate) mod finish;
mod format;
pub(crate) mod inventory;
mod lanes;
pub(crate) mod layout;
mod ledger;
pub mod locale;
mod owners;
pub(crate) mod plan;
mod progress;
mod refused;
pub(crate) mod roles;
mod said;
mod schema;
mod script;
pub(crate) mod session;
pub(crate) mod silence_triggers;
pub(crate) mod table;
pub(crate) mod toc;
pub(crate) mod tools;
pub(crate) mod work;

use std::collections::HashSet;

use tokio_util::sync::CancellationToken;

pub use deferred::{Moment, Ran, run_deferred};
pub use error::CopyError;
pub use progress::{CopyObserver, CopyPhase, ProgressDisplay};

use crate::catalog::Table;
use crate::config::CopySettings;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::schema::listing::Listed;
use layout::TableLayout;
use ledger::CopyLedger;
use plan::TablePart;
use session::{CopySource, ReplicaSide};

/// One copy: what, from where, to where.
pub struct CopyJob<'a> {
    /// The source, with the database's name.
    pub source: &'a ConnInfo,
    /// The replica, with the database's name; schema `dr_agent` is there.
    pub replica: &'a ConnInfo,
    /// Whose ledger is kept. On the replica, other sessions of this stream with role `copy` are
    /// ended when the copy begins.
    pub stream: &'a StreamName,
    /// The tables that are not `ready`.
    pub tables: Vec<Table>,
    /// What they are listed as, read before the snapshot was taken.
    pub listed: &'a Listed,
    /// Name of the exported snapshot; its session must stay open until [`copy`] returns.
    pub snapshot: &'a str,
    /// The snapshot's LSN: commits before it are in the snapshot.
    pub snapshot_lsn: PgLsn,
    /// `[copy]`
    pub settings: &'a CopySettings,
    /// Whether the whole schema of the database is to be there afterwards (the first copy) or only
    /// these tables, in a database that is replicated already.
    pub whole_schema: bool,
    /// Whether the rows alone are not enough: the tables are copied beside the stream, and are `ready` only once their changes
    /// have been caught up with. They stay `copied`.
    pub beside: bool,
}

/// Finds the `pg_dump` and `pg_restore` that a copy from a source of this `server_version_num` would run;
/// returns their version and directory.
///
/// # Errors
/// [`CopyError::ToolMissing`] and [`CopyError::ToolTooOld`].
pub async fn find_tools(
    settings: &CopySettings,
    source_version_num: i32,
) -> Result<String, CopyError> {
    let tools = tools::Tools::find(settings.pg_bin.as_deref(), source_version_num).await?;
    Ok(tools.to_string())
}

/// Their version, major and minor.
///
/// # Errors
/// As [`find_tools`].
pub async fn find_tools_version(
    settings: &CopySettings,
    source_version_num: i32,
) -> Result<(i32, i32), CopyError> {
    let tools = tools::Tools::find(settings.pg_bin.as_deref(), source_version_num).await?;
    let minor = tools
        .version
        .text
        .split('.')
        .nth(1)
        .and_then(|minor| minor.parse().ok());
    let major = i32::try_from(tools.version.major).unwrap_or(0);
    Ok((major, minor.unwrap_or(0)))
}

/// Copies schema and rows; returns when every table of the job is `ready`.
///
/// # Errors
/// [`CopyError`]; transient ones are over with a new snapshot. [`CopyError::Cancelled`] soon after
/// `cancel` was cancelled.
pub async fn copy(
    job: CopyJob<'_>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<(), CopyError> {
    // Everything below may be dropped at any point: sessions roll back, tools are killed.
    let all = Box::pin(copy_all(&job, observer));
    match cancel.run_until_cancelled(all).await {
        Some(result) => result,
        None => Err(CopyError::Cancelled),
    }
}

async fn copy_all(job: &CopyJob<'_>, observer: &dyn CopyObserver) -> Result<(), CopyError> {
    if job.tables.is_empty() && !job.whole_schema {
        return Ok(());
    }
    let role = job.stream.application_name("copy");
    let (source_side, source) = CopySource::begin(job.source, role.clone(), job.snapshot).await?;
    let names: Vec<TableName> = job.tables.iter().map(|table| table.name.clone()).collect();
    layout::lock(&source, &names).await?;
    let (replica_side, replica) = ReplicaSide::begin(job.replica, role).await?;
    let sessions = Sessions {
        source: source_side,
        replica: replica_side,
        settings: job.settings,
    };
    let ledger = CopyLedger::new(job);

    observer.phase(CopyPhase::PreData);
    let held = ledger.begin(&replica, &names, job).await?;
    let schema = schema::Schema::new(job, &sessions, &source, observer).await?;
    // An earlier copy may have been killed between creating and quieting them.
    silence_triggers::quiet(&replica, job.stream, observer).await?;
    schema.restore_pre_data(&source, &replica).await?;

    observer.phase(CopyPhase::Data);
    let wanted: Vec<TableName> = names
        .iter()
        .filter(|name| !held.contains(name))
        .cloned()
        .collect();
    let layouts = layout::read(&source, &wanted).await?;
    layout::verify(&replica, &layouts).await?;
    table::empty_tops(&replica, &layouts, &held).await?;
    copy_rows(&sessions, ledger, &layouts, observer, names.len()).await?;

    observer.phase(CopyPhase::PostData);
    let one_snapshot = held.is_empty();
    let replicated: HashSet<TableName> = held.into_iter().chain(names.iter().cloned()).collect();
    schema
        .restore_post_data(&source, &replica, &replicated, one_snapshot)
        .await?;
    silence_triggers::quiet(&replica, job.stream, observer).await?;
    let only = (!job.whole_schema).then_some(names.as_slice());
    for some in finish::sequences(&source, only).await? {
        finish::set_sequences(&replica, &some).await?;
    }
    let pairs: Vec<_> = job
        .tables
        .iter()
        .map(|table| (table.name.clone(), table.root.clone()))
        .collect();
    let analyzed = ledger.analyzed_since_copied(&replica).await?;
    finish::analyze(&replica, &pairs, job.whole_schema, &analyzed).await?;
    if job.whole_schema {
        let views = finish::filled_views(&source).await?;
        finish::refresh_views(&replica, &views, observer).await?;
        for what in finish::left_behind(&source).await? {
            leave_out(observer, &what);
        }
    }
    match job.beside {
        true => Ok(()),
        false => ledger.ready(&replica, &names).await,
    }
}

async fn copy_rows(
    sessions: &Sessions<'_>,
    ledger: CopyLedger<'_>,
    layouts: &[TableLayout],
    observer: &dyn CopyObserver,
    tables_total: usize,
) -> Result<(), CopyError> {
    let parts = parts(layouts, sessions.settings.split_bytes);
    table::copy_all(sessions, ledger, layouts, &parts, observer, tables_total).await
}

/// The parts of all tables, in the order in which they are best copied.
pub(crate) fn parts(layouts: &[TableLayout], split_bytes: u64) -> Vec<TablePart> {
    let sizes: Vec<(u32, u64, bool)> = layouts
        .iter()
        // What is written through another table cannot be emptied by itself: it is there as a whole or not at all.
        .map(|layout| {
            let divisible = layout.is_heap && layout.top.is_none();
            (layout.pages, layout.bytes, divisible)
        })
        .collect();
    plan::order(&sizes, split_bytes)
}

/// Both servers of one copy.
struct Sessions<'a> {
    source: CopySource<'a>,
    replica: ReplicaSide<'a>,
    settings: &'a CopySettings,
}

impl Sessions<'_> {
    /// Connection pairs, and sessions that build indexes.
    fn jobs(&self) -> u16 {
        self.settings.jobs.max(1)
    }
}

/// Says that something of the source will not be on the replica.
pub(crate) fn leave_out(observer: &dyn CopyObserver, what: &str) {
    tracing::warn!(what, "left out of the copy");
    observer.left_out(what);
}
