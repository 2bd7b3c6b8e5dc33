//! Restoring: a base backup and the change log become a database as of one moment.
//!
//! ```text
//! observe  what the archive has ▶ history and base backup chosen ● ▶ its manifest; what the target holds
//! plan ●   refused, or: which base backup, how much of the log, and whether the target is empty, wiped, or resumed
//! execute  base backup examined, loaded, progress row ▶ segments up to the moment, through the replica sink ▶
//!          materialized views ▶ sequences ahead ▶ schema dr_agent removed ▶ report
//! ```
//!
//! # Invariants
//! - What is restored is the source's state as of one commit, which the report names.
//! - Every sum on the way is checked. A damaged or missing object is an error that names it, never a
//!   shorter history; so is a log whose end is not known to lie behind the moment.
//! - What can be refused without writing is refused before anything is written, and a plan refuses it, too.
//! - What the target is without, is told at the end, by whichever run that is.
//!
//! # What it does not do
//! It needs no source and asks none. Roles are not created: a role that is lacking is refused, or its rights are left out.
//! Tables that came after the base backup have their first rows in no log; a change to one is an error that says so.

mod closing_notes;
mod encoding;
mod error;
mod execute;
mod load;
mod log;
mod moment;
mod observe;
mod pick_base;
mod pick_history;
mod plan;
mod target;

use std::collections::BTreeSet;

pub use error::RestoreError;
pub use log::Committed;
pub use moment::RestoreMoment;
pub use plan::{RestorePlan, TargetStart};

use crate::cloud::store::Store;
use crate::config::Config;
use crate::copy::CopyObserver;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::time::Micros;
use plan::FirstStage;

/// What is to be restored.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The database to build, empty.
    pub target: ConnInfo,
    /// The source's database.
    pub database: String,
    /// Of this history; by default of the one that was alive at the moment.
    pub history: Option<History>,
    /// Its state at this moment.
    pub moment: RestoreMoment,
    /// Only these tables, a partitioned one with all of its partitions; all if empty.
    pub tables: Vec<TableName>,
    /// Everything belongs to the role that restores.
    pub no_owner: bool,
    /// Nobody else may use anything.
    pub no_privileges: bool,
}

impl RestoreOptions {
    /// The tables that were asked for, in name order.
    fn asked(&self) -> Vec<TableName> {
        let asked: BTreeSet<&TableName> = self.tables.iter().collect();
        asked.into_iter().cloned().collect()
    }
}

/// What a restore did.
#[derive(Clone, Debug)]
pub struct RestoreReport {
    /// Position of the base backup.
    pub base: PgLsn,
    /// The end of the last transaction in the target.
    pub end_lsn: PgLsn,
    /// When it committed on the source; none if nothing came after the base backup.
    pub commit_time: Option<Micros>,
    /// The last transaction in the target that changed a table of the users'; none if the log that was read has none.
    pub last_change: Option<Committed>,
    /// The first transaction that was left out.
    pub beyond: Option<Committed>,
    /// The first that was left out and changed a table of the users'; none if the log has none soon behind the moment.
    pub change_beyond: Option<Committed>,
    /// Transactions replayed by this run.
    pub transactions: u64,
    /// Sequences set ahead.
    pub sequences: u64,
    /// What the target is without, and what a person should look at.
    pub warnings: Vec<String>,
}

/// Hears how a restore goes.
pub trait RestoreObserver: Send + Sync {
    /// This is what it does; nothing is written yet.
    fn planned(&self, plan: &RestorePlan);
    /// The target is at `end_lsn` of the log that is read up to `log_end`; `commit_time` is the source's then.
    fn replayed(&self, end_lsn: PgLsn, log_end: PgLsn, commit_time: Option<Micros>);
}

/// One restore: from where, of what, to where.
struct RestoreJob<'a> {
    config: &'a Config,
    store: &'a Store,
    options: &'a RestoreOptions,
    /// Under which name it works: names of prepared transactions hold for a whole server, where an agent, or a restore into
    /// another database, may be at work; and spill files are beside those of an agent.
    stream: StreamName,
}

impl<'a> RestoreJob<'a> {
    fn new(config: &'a Config, store: &'a Store, options: &'a RestoreOptions) -> Self {
        let stream = config.stream(&options.database);
        let stream = StreamName::new("restore", &format!("{}_{stream}", options.target.dbname()));
        Self {
            config,
            store,
            options,
            stream,
        }
    }

    /// The stream that is restored.
    fn source(&self) -> StreamName {
        self.config.stream(&self.options.database)
    }
}

/// What `--plan` shows.
#[derive(Clone, Debug)]
pub struct Preview {
    /// What would be done.
    pub plan: RestorePlan,
    /// What the target would be without, as far as that is known beforehand.
    pub warnings: Vec<String>,
}

/// Finds out what a restore would do, and whether anything is in its way that can be known beforehand. Writes nothing.
///
/// # Errors
/// [`RestoreError`]
pub async fn preview(
    config: &Config,
    store: &Store,
    options: &RestoreOptions,
) -> Result<Preview, RestoreError> {
    let restore = RestoreJob::new(config, store, options);
    let archive = observe::archive(&restore).await?;
    let client = target::open(&options.target, &restore.stream).await?;
    let found = target::look(&client, &restore.stream).await?;
    let plan = plan::decide(&archive, &found, options, &restore.stream)?;
    let warnings = match plan.begin {
        FirstStage::Resume(_) => Vec::new(),
        FirstStage::Load(_) => load::examine(&restore, &archive, &plan, &client)
            .await?
            .warnings(),
    };
    Ok(Preview { plan, warnings })
}

/// Builds the database.
///
/// # Errors
/// [`RestoreError`]; started again, it goes on behind the base backup, or begins anew.
pub async fn restore(
    config: &Config,
    store: &Store,
    options: &RestoreOptions,
    copy: &dyn CopyObserver,
    observer: &dyn RestoreObserver,
) -> Result<RestoreReport, RestoreError> {
    let restore = RestoreJob::new(config, store, options);
    let archive = observe::archive(&restore).await?;
    let client = target::open(&options.target, &restore.stream).await?;
    target::lock(&client).await?;
    let found = target::look(&client, &restore.stream).await?;
    let mut plan = plan::decide(&archive, &found, options, &restore.stream)?;
    if matches!(plan.begin, FirstStage::Resume(_)) {
        target::settle(&client, &restore.stream).await?;
        // What was prepared may have been committed by that.
        let found = target::look(&client, &restore.stream).await?;
        plan = plan::decide(&archive, &found, options, &restore.stream)?;
    }
    execute::execute(&restore, &archive, &plan, client, copy, observer).await
}

#[cfg(test)]
pub(crate) use plan::tests::{example as example_plan, options as example_options};
