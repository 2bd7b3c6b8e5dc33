//! Restoring: a base backup and the change log become a database as of one moment.
//!
//! ```text
//! plan     newest base backup before the moment ▶ the segments that lead from it to the moment
//! target   empty, or half loaded ▶ everything that can be known beforehand ▶ base backup loaded ▶ progress row
//!          interrupted behind that: goes on
//! replay   segments ▶ transactions up to the moment ▶ the replica sink's batches
//! finish   materialized views ▶ sequences ahead ▶ schema dr_agent removed ▶ report
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
mod history;
mod log;
mod moment;
mod pick_base;
mod plan;
mod target;

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

pub use error::RestoreError;
pub use log::Committed;
pub use moment::Moment;
pub use plan::{Plan, Start, plan};

use crate::archive::base;
use crate::cloud::store::Store;
use crate::config::Config;
use crate::copy::{self, CopyObserver};
use crate::error::chain;
use crate::failpoint;
use crate::flow::ledger::BatchNumber;
use crate::flow::spill::{self, SpillSpace};
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::replay::{self, Reached, Sessions, Target};
use crate::source::{self, IntakeLimits, LogIntake};
use crate::time::Micros;
use closing_notes::{Gathering, Kept};
use log::{Replay, Told};
use target::{Found, Loaded, Position};

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
    /// Only these tables, a partitioned one with all of its partitions; all if empty.
    pub tables: Vec<TableName>,
    /// Everything belongs to the role that restores.
    pub no_owner: bool,
    /// Nobody else may use anything.
    pub no_privileges: bool,
}

impl Options {
    /// The tables that were asked for, in name order.
    fn asked(&self) -> Vec<TableName> {
        let asked: BTreeSet<&TableName> = self.tables.iter().collect();
        asked.into_iter().cloned().collect()
    }
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

/// Told how a restore goes.
pub trait Observer: Send + Sync {
    /// The target is at `end_lsn` of the log that is read up to `log_end`; `commit_time` is the source's then.
    fn replayed(&self, end_lsn: PgLsn, log_end: PgLsn, commit_time: Option<Micros>);
}

/// Builds the database as planned.
///
/// # Errors
/// [`RestoreError`]; started again, it goes on behind the base backup, or begins anew.
pub async fn restore(
    config: &Config,
    store: &Store,
    options: &Options,
    mut plan: Plan,
    copy: &dyn CopyObserver,
    observer: &dyn Observer,
) -> Result<Report, RestoreError> {
    let stream = own_stream(config, options);
    let owner = plan.owner(&stream);
    let mut client = target::open(&options.target, &stream).await?;
    target::lock(&client).await?;
    let mut found = target::look(&client, owner).await?;
    if matches!(found, Found::Interrupted(_)) {
        target::settle(&client, &stream).await?;
        found = target::look(&client, owner).await?;
    }
    plan.start(&found, options)?;
    let mut position = match found {
        Found::Interrupted(position) => position,
        Found::Empty | Found::HalfLoaded => {
            let job = plan.job(config, store, options, &stream);
            let (examined, mut left_out) = plan::examine(&job, &client).await?;
            target::begin(&mut client, owner, plan.base.lsn, &found).await?;
            let gathering = Gathering::new(copy);
            base::load(job, examined, &gathering, &CancellationToken::new()).await?;
            failpoint::hit("restore:base-loaded");
            left_out.extend(gathering.into_left_out());
            let loaded = Loaded {
                base: plan.base.lsn,
                tables: plan.names(),
                whole: plan.tables.is_none(),
                kept: kept(&plan, options, left_out),
            };
            target::loaded(&mut client, owner, loaded).await?
        }
    };
    observer.replayed(position.end_lsn, plan.log_end, None);
    let (reached, told) = replay(config, store, options, &plan, &position, observer).await?;
    failpoint::hit("restore:replayed");
    position.kept.note_change(told.last_change);
    target::keep(&client, owner, &position.kept).await?;
    let source = config.stream(&options.database);
    let unlisted = target::unlisted(&client, &source, &position).await?;
    let (sequences, mut warnings) =
        finish(options, &stream, &mut client, &position.kept, copy).await?;
    warnings.extend(unlisted.into_iter().map(|table| {
        format!("{table}: it was dropped on the source, or left out of the stream, before that moment; its rows are of before")
    }));
    Ok(Report {
        base: position.base,
        end_lsn: reached.end_lsn,
        commit_time: reached.commit_time,
        last_change: position.kept.last_change(),
        beyond: told.beyond,
        change_beyond: told.change_beyond,
        transactions: reached.transactions,
        sequences,
        warnings,
    })
}

/// What is to be told at the end, by this run or a later one.
fn kept(plan: &Plan, options: &Options, left_out: Vec<String>) -> Kept {
    let mut kept = Kept::of(options.asked());
    let views = &plan.manifest.materialized_views;
    match plan.tables {
        None => kept.views.clone_from(views),
        // Of a part of the tables a view would hold who knows what.
        Some(_) => {
            let empty = views
                .iter()
                .map(|view| format!("rows of materialized view {view}"));
            kept.left_out.extend(empty);
        }
    }
    let mut seen = BTreeSet::new();
    let all = left_out.into_iter();
    kept.left_out
        .extend(all.filter(|what| seen.insert(what.clone())));
    kept
}

/// What comes behind the log; returns how many sequences were set ahead, and everything that is to be told.
async fn finish(
    options: &Options,
    stream: &StreamName,
    client: &mut Client,
    kept: &Kept,
    copy: &dyn CopyObserver,
) -> Result<(u64, Vec<String>), RestoreError> {
    let mut warnings = kept.left_out.clone();
    let added = copy::run_deferred(client, stream, copy::Moment::Opening).await;
    match added {
        Ok(ran) => {
            let refused = ran.refused.into_iter();
            warnings.extend(refused.map(|(what, reason)| format!("{what}: {reason}")));
        }
        Err(error) => {
            let what = "constraints that refused rows of the source";
            warnings.push(format!("{what}: {}", chain(&error)));
            let ended = client.batch_execute("ROLLBACK").await;
            ended.map_err(|error| RestoreError::target("add constraints")(error.into()))?;
        }
    }
    let gathering = Gathering::new(copy);
    base::refresh_views(&options.target, stream, &kept.views, &gathering).await?;
    warnings.extend(gathering.into_left_out());
    failpoint::hit("restore:views-filled");
    let sequences = crate::promote::set_sequences_ahead(client, stream.as_str()).await;
    let (sequences, of_sequences) = sequences.map_err(RestoreError::target("set sequences"))?;
    let of_sequences = of_sequences.into_iter();
    warnings.extend(of_sequences.map(|warning| format!("sequence {warning}")));
    let gone = target::finish(client).await?.into_iter();
    warnings.extend(gone.map(|what| {
        format!("{what}: it needs schema dr_agent of the source, which is not restored")
    }));
    Ok((sequences, warnings))
}

/// Under which name a restore works: names of prepared transactions hold for a whole server, where an agent, or a restore
/// into another database, may be at work; and spill files are beside those of an agent.
fn own_stream(config: &Config, options: &Options) -> StreamName {
    let stream = config.stream(&options.database);
    StreamName::new("restore", &format!("{}_{stream}", options.target.dbname()))
}

/// Where large transactions wait: of each target elsewhere, because restores into databases of one name, on several servers,
/// may run at the same time.
fn spill_directory(configured: &Path, stream: &StreamName, target: &ConnInfo) -> PathBuf {
    let server = crc32c::crc32c(target.to_string().as_bytes());
    spill::directory_of(configured, stream).with_file_name(format!("{stream}_{server:08x}"))
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
) -> Result<(Reached, Told), RestoreError> {
    let stream = own_stream(config, options);
    let limits = &config.limits;
    let directory = spill_directory(&limits.spill_directory, &stream, &options.target);
    let space = SpillSpace::open(directory, limits.spill_bytes)?;
    let (received, transactions) = source::queue();
    let intake = LogIntake::new(IntakeLimits::of(limits), position.end_lsn, space, received);
    let from = Reached {
        end_lsn: position.end_lsn,
        commit_time: position.commit_time,
        batch: BatchNumber(position.batch),
        transactions: 0,
    };
    let reader = Replay {
        store,
        layout: &plan.layout,
        from: position.end_lsn,
        segments: &plan.segments,
        moment: options.moment,
        tables: (!position.whole).then_some(&position.tables),
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
    let applying = replay::apply(config, sessions, from, transactions, |reached| {
        observer.replayed(reached.end_lsn, plan.log_end, reached.commit_time);
    });
    let (told, reached) = tokio::join!(reader.run(intake), applying);
    // An apply that failed ends the reading, too, and not the other way round: what was read whole is applied.
    let reached = reached?;
    Ok((reached, told?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restores_into_databases_of_one_name_spill_apart() {
        let stream = StreamName::new("restore", "app_dr_agent_app");
        let directory = |url: &str| {
            let target = ConnInfo::parse(url, None).unwrap();
            spill_directory(Path::new("/spill"), &stream, &target)
        };
        let one = directory("postgres://postgres@one.example/app");
        let other = directory("postgres://postgres@other.example/app");
        assert_ne!(one, other);
        assert_eq!(one, directory("postgres://postgres@one.example/app"));
        assert_eq!(one.parent(), Some(Path::new("/spill")));
    }
}
