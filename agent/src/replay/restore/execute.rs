//! Carries a plan out: base backup, change log, and what comes behind the log.
//!
//! # Invariants
//! - Nothing is written before a load has been examined, and the observer has been told the plan.
//! - Killed anywhere, the same command goes on: within the base backup anew, behind it from the progress row.
//!
//! # What it does not do
//! It decides nothing: see [`super::plan`].

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tokio_postgres::Client;

use super::closing_notes::{ClosingNotes, Gathering};
use super::log::{LogTold, Replay};
use super::observe::ArchivedBase;
use super::plan::{FirstStage, RestorePlan};
use super::target::{self, TargetPosition};
use super::{RestoreError, RestoreJob, RestoreObserver, RestoreReport, load};
use crate::archive::base;
use crate::copy::{self, CopyObserver};
use crate::error::chain;
use crate::failpoint;
use crate::flow::ledger::BatchNumber;
use crate::flow::spill::{self, SpillSpace};
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgLsn};
use crate::replay::{self, Reached, ReplaySessions, ReplayTarget};
use crate::source::{self, IntakeLimits, LogIntake};

/// Builds the database as planned; `client` holds the target's lock.
///
/// # Errors
/// [`RestoreError`]
pub(super) async fn execute(
    restore: &RestoreJob<'_>,
    archive: &ArchivedBase,
    plan: &RestorePlan,
    mut client: Client,
    copy: &dyn CopyObserver,
    observer: &dyn RestoreObserver,
) -> Result<RestoreReport, RestoreError> {
    let mut position = match &plan.begin {
        FirstStage::Resume(position) => {
            observer.planned(plan);
            position.clone()
        }
        FirstStage::Load(what) => {
            let examined = load::examine(restore, archive, plan, &client).await?;
            observer.planned(plan);
            load::load(restore, archive, plan, what, examined, &mut client, copy).await?
        }
    };
    observer.replayed(position.end_lsn, plan.log_end, None);
    let (reached, told) = replay(restore, archive, plan, &position, observer).await?;
    failpoint::hit("restore:replayed");
    position.kept.note_change(told.last_change);
    target::keep(&client, &restore.stream, &position.kept).await?;
    let unlisted = target::unlisted(&client, &restore.source(), &position).await?;
    let (sequences, mut warnings) = finish(restore, &mut client, &position.kept, copy).await?;
    warnings.extend(unlisted.into_iter().map(|table| {
        format!("{table}: it was dropped on the source, or left out of the stream, before that moment; its rows are older")
    }));
    Ok(RestoreReport {
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

/// What comes behind the log; returns how many sequences were set ahead, and everything that is to be told.
async fn finish(
    restore: &RestoreJob<'_>,
    client: &mut Client,
    kept: &ClosingNotes,
    copy: &dyn CopyObserver,
) -> Result<(u64, Vec<String>), RestoreError> {
    let stream = &restore.stream;
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
    base::refresh_views(&restore.options.target, stream, &kept.views, &gathering).await?;
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

/// Where large transactions wait: of each target elsewhere, because restores into databases of one name, on several servers,
/// may run at the same time.
fn spill_directory(configured: &Path, stream: &StreamName, target: &ConnInfo) -> PathBuf {
    let server = crc32c::crc32c(target.to_string().as_bytes());
    spill::directory_of(configured, stream).with_file_name(format!("{stream}_{server:08x}"))
}

/// A change of a table that is not in the target is an error from here on; where only some tables were asked for, never.
fn as_of(position: &TargetPosition) -> PgLsn {
    match position.whole {
        true => position.base,
        false => PgLsn::from(u64::MAX),
    }
}

/// Replays the log up to the moment.
async fn replay(
    restore: &RestoreJob<'_>,
    archive: &ArchivedBase,
    plan: &RestorePlan,
    position: &TargetPosition,
    observer: &dyn RestoreObserver,
) -> Result<(Reached, LogTold), RestoreError> {
    let (config, options) = (restore.config, restore.options);
    let limits = &config.limits;
    let directory = spill_directory(&limits.spill_directory, &restore.stream, &options.target);
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
        store: restore.store,
        layout: &archive.history.layout,
        from: position.end_lsn,
        segments: &archive.history.segments,
        moment: options.moment,
        tables: (!position.whole).then_some(&position.tables),
    };
    let target = ReplayTarget {
        conninfo: &options.target,
        stream: &restore.stream,
        term: target::TERM,
        tables: target::synced(position),
        listed_by: &restore.source(),
        as_of: as_of(position),
        left_out: HashSet::new(),
        session: &[],
    };
    let sessions = ReplaySessions::connect(config, target).await?;
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
