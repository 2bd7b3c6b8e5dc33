//! Prepared transactions of the lanes: what they are called, and what becomes of those left behind.
//!
//! With several lanes each lane prepares its share of a batch as `dr_agent:<stream>:<batch>:<lane>`; when
//! all are prepared, lane 0, which carries the progress row, is committed first. That commit is the
//! decision: what belongs to a batch at or below the progress row must be committed, what lies above
//! was never decided and is rolled back.
//!
//! # Invariants
//! - The decision is pure and depends on the progress row alone, so it is the same however often and by
//!   whomever it is taken.
//! - Who settles must first have ended the sessions of the agent that prepared, or hold the progress row
//!   under a higher term: as long as that agent may still commit lane 0, rolling back another lane could
//!   tear the batch.
//!
//! # What it does not do
//! It prepares nothing: see [`crate::sink::replica`].

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::progress;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::PgError;
use crate::pg::quote::quote_literal;

/// A prepared transaction of an agent. Within a batch lane 0 sorts first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prepared {
    /// Number of the batch.
    pub batch: i64,
    /// Number of the lane.
    pub lane: u16,
    /// Its name on the server.
    pub gid: String,
}

/// What becomes of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its batch counts as applied.
    Commit,
    /// Its batch was never decided.
    RollBack,
}

impl Prepared {
    /// The share of `lane` in `batch`.
    pub fn new(stream: &StreamName, batch: i64, lane: u16) -> Self {
        Self {
            batch,
            lane,
            gid: format!("{APPLICATION_PREFIX}{stream}:{batch}:{lane}"),
        }
    }

    /// Reads the name of a prepared transaction; `None` where it is not of this stream's agents.
    pub fn parse(stream: &StreamName, gid: &str) -> Option<Self> {
        let rest = gid
            .strip_prefix(APPLICATION_PREFIX)?
            .strip_prefix(stream.as_str())?;
        let (batch, lane) = rest.strip_prefix(':')?.split_once(':')?;
        Some(Self {
            lane: lane.parse().ok()?,
            batch: batch.parse().ok()?,
            gid: gid.to_owned(),
        })
    }

    /// Decides, given the batch of the progress row.
    pub fn verdict(&self, applied_batch: i64) -> Verdict {
        if self.batch <= applied_batch {
            Verdict::Commit
        } else {
            Verdict::RollBack
        }
    }

    /// `PREPARE TRANSACTION`: ends the lane's transaction, to be decided later.
    pub fn prepare_sql(&self) -> String {
        format!("PREPARE TRANSACTION {}", quote_literal(&self.gid))
    }

    /// `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub fn finish_sql(&self, verdict: Verdict) -> String {
        let verb = match verdict {
            Verdict::Commit => "COMMIT",
            Verdict::RollBack => "ROLLBACK",
        };
        format!("{verb} PREPARED {}", quote_literal(&self.gid))
    }
}

/// How many were committed and rolled back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Of batches that count as applied.
    pub committed: u64,
    /// Of batches that do not.
    pub rolled_back: u64,
}

/// Settles everything this stream's agents prepared in the database of this session, by the batch of
/// the progress row. Nothing may still be able to move that row.
pub async fn settle(
    client: &Client,
    stream: &StreamName,
    applied_batch: i64,
) -> Result<Settled, PgError> {
    settle_these(client, left_behind(client, stream).await?, applied_batch).await
}

/// The same, of what [`left_behind`] has found.
pub async fn settle_these(
    client: &Client,
    left: BTreeSet<Prepared>,
    applied_batch: i64,
) -> Result<Settled, PgError> {
    let mut settled = Settled::default();
    for prepared in left {
        let verdict = prepared.verdict(applied_batch);
        if finish(client, &prepared, verdict).await? {
            match verdict {
                Verdict::Commit => settled.committed += 1,
                Verdict::RollBack => settled.rolled_back += 1,
            }
        }
    }
    Ok(settled)
}

/// What this stream's agents prepared in the database of this session and nobody has finished.
pub async fn left_behind(
    client: &Client,
    stream: &StreamName,
) -> Result<BTreeSet<Prepared>, PgError> {
    let rows = client
        .query_typed(
            "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .filter_map(|row| Prepared::parse(stream, row.get(0)))
        .collect())
}

/// Commits or rolls back one; returns whether it was still there.
pub async fn finish(
    client: &Client,
    prepared: &Prepared,
    verdict: Verdict,
) -> Result<bool, PgError> {
    let sql = prepared.finish_sql(verdict);
    match client.batch_execute(&sql).await.map_err(PgError::from) {
        Ok(()) => {
            tracing::info!(
                gid = prepared.gid,
                ?verdict,
                "settled a prepared transaction"
            );
            Ok(true)
        }
        // undefined_object: settled by somebody else in the meantime, by the same rule.
        Err(error) if error.sqlstate() == Some("42704") => Ok(false),
        Err(error) => Err(error),
    }
}

/// Before the term is raised: decides against the batch whose prepared lane 0 keeps the progress row locked. Whether there was one.
///
/// Only lane 0 may be rolled back then: that decides against the batch as a whole. Rolling back any other lane first could tear it.
///
/// # Errors
/// When the replica refuses.
pub async fn refuse_undecided(client: &Client, stream: &StreamName) -> Result<bool, PgError> {
    let applied = progress::read(client, stream).await?;
    let mut any = false;
    for prepared in left_behind(client, stream).await? {
        let undecided = applied.is_some_and(|row| prepared.verdict(row.batch) == Verdict::RollBack);
        if prepared.lane == 0 && undecided {
            any |= finish(client, &prepared, Verdict::RollBack).await?;
        }
    }
    Ok(any)
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
            let prepared = Prepared::new(&stream, batch, 3);
            assert_eq!(prepared.gid, format!("dr_agent:dr_agent_app:{batch}:3"));
            assert_eq!(
                Prepared::parse(&stream, &prepared.gid).as_ref(),
                Some(&prepared)
            );
            assert_eq!(prepared.verdict(7), expected, "batch {batch}");
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
            assert_eq!(Prepared::parse(&stream, gid), None, "{gid}");
        }
    }

    #[test]
    fn within_a_batch_lane_0_is_settled_first_since_its_end_is_the_decision() {
        let stream = StreamName::new("dr_agent", "app");
        let set: BTreeSet<Prepared> = [(8, 2), (8, 0), (7, 1), (8, 1)]
            .map(|(batch, lane)| Prepared::new(&stream, batch, lane))
            .into();
        let order: Vec<(i64, u16)> = set.iter().map(|one| (one.batch, one.lane)).collect();
        assert_eq!(order, [(7, 1), (8, 0), (8, 1), (8, 2)]);
    }
}
