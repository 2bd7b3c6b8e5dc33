//! Prepared transactions that an older agent left behind: committed or rolled back.
//!
//! With several lanes each lane prepares its share as `dr_agent:<stream>:<batch>:<lane>`; when all
//! are prepared, lane 0, which carries the progress row, is committed first. That commit is the
//! decision: what belongs to a batch at or below the progress row must be committed, what lies above
//! was never decided and is rolled back.
//!
//! # Invariants
//! - The decision is pure and depends on the progress row alone, so it is the same however often and by
//!   whomever it is taken.
//! - Before the term is raised only lane 0 of an undecided batch may be rolled back: that decides
//!   against the batch as a whole. Rolling back any other lane first could tear it.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::{Doing, PromoteError};
use crate::catalog::quote_literal;
use crate::pg::PgError;
use crate::stream::{APPLICATION_PREFIX, StreamName};

/// A prepared transaction of an agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prepared {
    pub(super) lane: u16,
    pub(super) batch: i64,
    pub(super) gid: String,
}

/// What becomes of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Commit,
    RollBack,
}

/// Reads the name of a prepared transaction; `None` where it is not of this stream's agents.
pub(super) fn parse(stream: &StreamName, gid: &str) -> Option<Prepared> {
    let rest = gid
        .strip_prefix(APPLICATION_PREFIX)?
        .strip_prefix(stream.as_str())?;
    let (batch, lane) = rest.strip_prefix(':')?.split_once(':')?;
    Some(Prepared {
        lane: lane.parse().ok()?,
        batch: batch.parse().ok()?,
        gid: gid.to_owned(),
    })
}

/// Decides about one, given the batch of the progress row.
pub(super) fn verdict(prepared: &Prepared, applied_batch: i64) -> Verdict {
    if prepared.batch <= applied_batch {
        Verdict::Commit
    } else {
        Verdict::RollBack
    }
}

/// How many were committed and rolled back.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settled {
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
}

/// Settles everything this stream's agents prepared in the database of this session.
pub(super) async fn settle(
    client: &Client,
    stream: &StreamName,
    applied_batch: i64,
) -> Result<Settled, PromoteError> {
    let mut settled = Settled::default();
    // In the set's order lane 0 comes first.
    for prepared in left_behind(client, stream).await? {
        let verdict = verdict(&prepared, applied_batch);
        if finish(client, &prepared, verdict).await? {
            match verdict {
                Verdict::Commit => settled.committed += 1,
                Verdict::RollBack => settled.rolled_back += 1,
            }
        }
    }
    Ok(settled)
}

/// Before the term is raised: decides against the batch whose prepared lane 0 keeps the progress row
/// locked. Returns whether there was one.
pub(super) async fn refuse_undecided(
    client: &Client,
    stream: &StreamName,
) -> Result<bool, PromoteError> {
    let applied: Option<i64> = client
        .query_opt(
            "SELECT batch FROM dr_agent.progress WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await
        .doing("read dr_agent.progress")?
        .map(|row| row.get(0));
    let mut any = false;
    for prepared in left_behind(client, stream).await? {
        let undecided = applied.is_some_and(|batch| verdict(&prepared, batch) == Verdict::RollBack);
        if prepared.lane == 0 && undecided {
            any |= finish(client, &prepared, Verdict::RollBack).await?;
        }
    }
    Ok(any)
}

async fn left_behind(
    client: &Client,
    stream: &StreamName,
) -> Result<BTreeSet<Prepared>, PromoteError> {
    let rows = client
        .query(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()",
            &[],
        )
        .await
        .doing("list prepared transactions")?;
    Ok(rows
        .iter()
        .filter_map(|row| parse(stream, row.get(0)))
        .collect())
}

/// Returns whether it was still there.
async fn finish(
    client: &Client,
    prepared: &Prepared,
    verdict: Verdict,
) -> Result<bool, PromoteError> {
    let verb = match verdict {
        Verdict::Commit => "COMMIT",
        Verdict::RollBack => "ROLLBACK",
    };
    let sql = format!("{verb} PREPARED {}", quote_literal(&prepared.gid));
    match client.batch_execute(&sql).await.map_err(PgError::from) {
        Ok(()) => {
            tracing::info!(gid = prepared.gid, verb, "settled a prepared transaction");
            Ok(true)
        }
        // undefined_object: settled by somebody else in the meantime, by the same rule.
        Err(error) if error.sqlstate() == Some("42704") => Ok(false),
        Err(error) => Err(error).doing("settle a prepared transaction"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_up_to_the_progress_row_are_committed_and_later_ones_rolled_back() {
        let stream = StreamName::new("dr_agent", "app");
        for (batch, expected) in [
            (6, Verdict::Commit),
            (7, Verdict::Commit),
            (8, Verdict::RollBack),
        ] {
            let prepared = parse(&stream, &format!("dr_agent:dr_agent_app:{batch}:3")).unwrap();
            assert_eq!(prepared.lane, 3);
            assert_eq!(verdict(&prepared, 7), expected, "batch {batch}");
        }
    }

    #[test]
    fn what_others_prepared_is_not_ours_to_settle() {
        let stream = StreamName::new("dr_agent", "app");
        for gid in [
            "dr_agent:dr_agent_app2:7:0",
            "dr_agent:dr_agent_ap:7:0",
            "dr_agent:dr_agent_app:7",
            "dr_agent:dr_agent_app:seven:0",
            "dr_agent_app:7:0",
            "an application's own",
            "",
        ] {
            assert_eq!(parse(&stream, gid), None, "{gid}");
        }
    }

    #[test]
    fn lane_0_is_settled_first_since_its_commit_or_rollback_is_the_decision() {
        let stream = StreamName::new("dr_agent", "app");
        let set: BTreeSet<Prepared> = ["8:2", "8:0", "8:1"]
            .iter()
            .filter_map(|rest| parse(&stream, &format!("dr_agent:dr_agent_app:{rest}")))
            .collect();
        let lanes: Vec<u16> = set.iter().map(|prepared| prepared.lane).collect();
        assert_eq!(lanes, [0, 1, 2]);
    }
}
