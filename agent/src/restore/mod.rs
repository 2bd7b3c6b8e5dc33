//! Restoring: a base backup and the change log become a database as of one moment.
//!
//! ```text
//! plan     newest base backup before the moment ▶ the segments that lead from it to the moment
//! target   empty ▶ base backup loaded ▶ progress row          (killed before: drop it; killed behind: goes on)
//! replay   segments ▶ transactions up to the moment ▶ the replica sink's batches
//! finish   sequences ahead ▶ schema dr_agent removed ▶ report
//! ```
//!
//! # Invariants
//! - What is restored is the source's state as of one commit, which the report names.
//! - Every sum on the way is checked. A damaged or missing object is an error that names it, never a
//!   shorter history; so is a log whose end is not known to lie behind the moment.
//!
//! # What it does not do
//! It needs no source and asks none. Roles are not created: what the target lacks, is said. Tables that came after the
//! base backup have their first rows in no log; a change to one is an error that says so.

mod error;
mod history;
mod log;
mod moment;
mod plan;
mod target;

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use error::RestoreError;
pub use log::Beyond;
pub use moment::Moment;

use crate::archive::{Chain, Layout, Span};
use crate::backup::{self, LoadJob};
use crate::catalog::TableName;
use crate::config::Config;
use crate::failpoint;
use crate::history::History;
use crate::lag::{Micros, pg_micros};
use crate::ledger::BatchNumber;
use crate::pg::{ConnInfo, PgLsn};
use crate::replay::{self, Reached, Sessions, Target};
use crate::snapshot::CopyObserver;
use crate::source::{IntakeLimits, LogIntake};
use crate::spill::{self, SpillSpace};
use crate::store::Store;
use crate::stream::StreamName;
use log::Replay;
use plan::Base;
use target::{Found, Position, Tables};

/// Transactions between reading and applying; their bytes are bounded by `limits.queue_bytes`.
const QUEUE_TRANSACTIONS: usize = 16_384;

/// What is to be restored.
#[derive(Clone, Debug)]
pub struct Options {
    /// The database to build, empty.
    pub target: ConnInfo,
    /// The source's database.
    pub database: String,
    /// Of this history; by default of the one that was alive at the moment.
    pub history: Option<History>,
    /// Its state at this moment.
    pub moment: Moment,
    /// Only these tables; all if empty.
    pub tables: Vec<TableName>,
}

/// What a restore will read.
#[derive(Debug)]
pub struct Plan {
    /// The base backup.
    pub base: backup::Summary,
    /// The segments from there on.
    pub chain: Chain,
    /// Bytes of those segments in the store.
    pub log_bytes: u64,
    /// Every segment there is.
    spans: Vec<Span>,
    layout: Layout,
}

/// What a restore did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Position of the base backup.
    pub base: PgLsn,
    /// The end of the last transaction in the target.
    pub end_lsn: PgLsn,
    /// When it committed on the source; none if nothing came after the base backup.
    pub commit_time: Option<Micros>,
    /// The first transaction that was left out.
    pub beyond: Option<Beyond>,
    /// Transactions replayed.
    pub transactions: u64,
    /// Sequences set ahead.
    pub sequences: u64,
    /// What a person should look at.
    pub warnings: Vec<String>,
}

/// Told how a restore goes.
pub trait Observer: Send + Sync {
    /// The target is at `end_lsn` of the log that ends at `log_end`; `commit_time` is the source's then.
    fn replayed(&self, end_lsn: PgLsn, log_end: PgLsn, commit_time: Option<Micros>);
}

/// Finds what would be read.
///
/// # Errors
/// [`RestoreError`]
pub async fn plan(config: &Config, store: &Store, options: &Options) -> Result<Plan, RestoreError> {
    let stream = config.stream(&options.database);
    let (database, moment) = (&options.database, options.moment);
    let (layout, bases) = history::find(store, &stream, database, moment, options.history).await?;
    let known: Vec<Base> = bases.iter().map(base_of).collect();
    let chosen = plan::choose(&known, options.moment)?;
    let base = bases
        .into_iter()
        .find(|base| base_of(base) == chosen)
        .ok_or_else(|| RestoreError::NothingOf(options.database.clone()))?;
    let sizes = segments(store, &layout).await?;
    let spans: Vec<Span> = sizes.keys().copied().collect();
    let chain = plan::log(chosen.lsn, &spans, options.moment)?;
    Ok(Plan {
        log_bytes: chain.spans.iter().map(|span| sizes[span]).sum(),
        base,
        chain,
        spans,
        layout,
    })
}

fn base_of(summary: &backup::Summary) -> Base {
    Base {
        lsn: summary.lsn,
        time: micros(summary.as_of),
    }
}

/// As PostgreSQL counts.
fn micros(at: Timestamp) -> Micros {
    pg_micros(at.into())
}

/// The segments in the store, and their sizes.
async fn segments(store: &Store, layout: &Layout) -> Result<BTreeMap<Span, u64>, RestoreError> {
    let objects = store.list(&layout.log(), None).await?;
    let segments = objects
        .iter()
        .filter_map(|object| Some((layout.parse_segment(&object.name)?, object.bytes)));
    Ok(segments.collect())
}

/// Builds the database as planned.
///
/// # Errors
/// [`RestoreError`]; started again, it goes on behind the base backup.
pub async fn restore(
    config: &Config,
    store: &Store,
    options: &Options,
    mut plan: Plan,
    copy: &dyn CopyObserver,
    observer: &dyn Observer,
) -> Result<Report, RestoreError> {
    let stream = own_stream(config, options);
    let mut client = target::open(&options.target, &stream).await?;
    let position = match target::find(
        &client,
        options.target.dbname(),
        &stream,
        plan.layout.history(),
    )
    .await?
    {
        Found::Interrupted(position) => {
            expect_the_same(&position, &plan, options)?;
            plan.chain = plan::log(position.end_lsn, &plan.spans, options.moment)?;
            position
        }
        Found::Empty => {
            target::prepare(&client).await?;
            let base = load(config, store, options, &plan, copy).await?;
            let id = plan.layout.history();
            let whole = options.tables.is_empty();
            failpoint::hit("restore:base-loaded");
            target::loaded(&mut client, &stream, id, plan.base.lsn, base, whole).await?
        }
    };
    observer.replayed(position.end_lsn, plan.chain.end, None);
    let (reached, beyond) = replay(config, store, options, &plan, &position, observer).await?;
    failpoint::hit("restore:replayed");
    let sequences = crate::promote::set_sequences_ahead(&client).await;
    let (sequences, warnings) = sequences.map_err(RestoreError::target("set sequences"))?;
    target::finish(&client).await?;
    Ok(Report {
        base: position.base,
        end_lsn: reached.end_lsn,
        commit_time: reached.commit_time,
        beyond,
        transactions: reached.transactions,
        sequences,
        warnings,
    })
}

/// A restore that was interrupted can only go on to where it was going, or further.
fn expect_the_same(
    position: &Position,
    plan: &Plan,
    options: &Options,
) -> Result<(), RestoreError> {
    let time = position.commit_time.unwrap_or(Micros::MIN);
    // The plan has the newest base backup that leads to the moment.
    let too_far =
        position.base > plan.base.lsn || !options.moment.is_at_or_after(position.end_lsn, time);
    if too_far {
        return Err(RestoreError::TooFar {
            at: position.end_lsn,
            moment: options.moment,
        });
    }
    let has = |table: &TableName| position.tables.contains_key(table);
    if position.whole != options.tables.is_empty() || !options.tables.iter().all(has) {
        return Err(RestoreError::OtherTables);
    }
    Ok(())
}

/// Under which name a restore works: names of prepared transactions hold for a whole server, where an agent, or a restore
/// into another database, may be at work; and spill files are beside those of an agent.
fn own_stream(config: &Config, options: &Options) -> StreamName {
    let stream = config.stream(&options.database);
    StreamName::new("restore", &format!("{}_{stream}", options.target.dbname()))
}

/// Loads the base backup; returns the tables that are there then, by every name the log may call them.
async fn load(
    config: &Config,
    store: &Store,
    options: &Options,
    plan: &Plan,
    copy: &dyn CopyObserver,
) -> Result<Tables, RestoreError> {
    let job = LoadJob {
        store,
        base: &plan.base.base,
        target: &options.target,
        stream: &own_stream(config, options),
        settings: &config.copy,
        only: (!options.tables.is_empty()).then_some(options.tables.as_slice()),
    };
    let manifest = backup::load(job, copy, &CancellationToken::new()).await?;
    let is_wanted = |table: &TableName| options.tables.is_empty() || options.tables.contains(table);
    let listed = manifest.listed();
    let names = manifest
        .data()
        .filter(|(_, data)| is_wanted(&data.table))
        .flat_map(|(_, data)| [data.table.clone(), data.root.clone()]);
    let tables = names.map(|table| {
        let listed_as = listed.get(&table).cloned();
        (table, listed_as)
    });
    Ok(tables.collect())
}

/// A change of a table that is not in the target is an error from here on; where only some tables were asked for, never.
fn as_of(position: &Position) -> PgLsn {
    match position.whole {
        true => position.base,
        false => PgLsn::from(u64::MAX),
    }
}

/// Replays the log up to the moment.
async fn replay(
    config: &Config,
    store: &Store,
    options: &Options,
    plan: &Plan,
    position: &Position,
    observer: &dyn Observer,
) -> Result<(Reached, Option<Beyond>), RestoreError> {
    let stream = own_stream(config, options);
    let limits = &config.limits;
    let directory = spill::directory_of(&limits.spill_directory, &stream);
    let space = SpillSpace::open(directory, limits.spill_bytes)?;
    let intake_limits = IntakeLimits {
        queue_bytes: limits.queue_bytes,
        transaction_bytes: limits.transaction_bytes,
    };
    let (received, transactions) = mpsc::channel(QUEUE_TRANSACTIONS);
    let mut intake = LogIntake::new(intake_limits, position.end_lsn, space, received);
    let from = Reached {
        end_lsn: position.end_lsn,
        commit_time: position.commit_time,
        batch: BatchNumber(position.batch),
        transactions: 0,
    };
    let reader = Replay {
        store,
        layout: &plan.layout,
        chain: &plan.chain,
        moment: options.moment,
    };
    let target = Target {
        conninfo: &options.target,
        stream: &stream,
        term: target::TERM,
        tables: target::synced(position),
        listed_by: &config.stream(&options.database),
        as_of: as_of(position),
        left_out: HashSet::new(),
        session: &[],
    };
    let sessions = Sessions::connect(config, target).await?;
    let reading = async move {
        let beyond = reader.run(&mut intake).await;
        // No more transactions come.
        drop(intake);
        beyond
    };
    let applying = replay::apply(config, sessions, from, transactions, |reached| {
        observer.replayed(reached.end_lsn, plan.chain.end, reached.commit_time);
    });
    let (beyond, reached) = tokio::join!(reading, applying);
    // An apply that failed ends the reading, too, and not the other way round: what was read whole is applied.
    let reached = reached?;
    Ok((reached, beyond?))
}
