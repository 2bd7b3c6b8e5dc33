//! One attempt to apply one batch, on one lane or on several, while nothing else is in flight.
//!
//! ```text
//! lane 0   BEGIN · advance() · its share … PREPARE ─┐            ┌─ COMMIT PREPARED (the decision) ─┐
//! lane 1   BEGIN · hold()    · its share … PREPARE ─┼─ all did ──┘                                  ├─ COMMIT PREPARED
//! lane n   BEGIN · hold()    · its share … PREPARE ─┘                                               ┘
//! ```
//! A large batch comes in parts, so that memory stays bounded: the next part is folded and sent while the
//! replica works on the one before.
//!
//! # Invariants
//! - Before the decision an error leaves nothing behind: every lane is rolled back, prepared or not. If
//!   even that fails the session is over and the next start settles it.
//! - From the decision on there is no way back: whatever fails ends the session, and the next start
//!   commits the lanes that are left.
//! - No lane waits for another one for ever: on several lanes locks are waited for so long and no
//!   longer, and the batch is tried on one.

use std::collections::VecDeque;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::mpsc;

use super::chain::{Chain, while_settling};
use super::fold::{Folded, Folding, Work};
use super::lane::Lane;
use super::{SinkError, SinkSettings, sql};
use crate::ddl::CommandCounts;
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::lanes::{Part, Planner};
use crate::flow::net::Step;
use crate::flow::transaction::Transaction;
use crate::schema::prepared::{Prepared, Verdict};
use crate::sink::Applied;
use crate::time::system_time;

/// Lanes of one batch never wait for one another by design ([`crate::flow::lanes`]). A trigger that the replica
/// alone has could make them: two-phase commit would hide that from the deadlock detector.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '10s'";

/// Begins the transaction that carries the progress row: of a batch up to this transaction of it.
pub(super) fn begin(settings: &SinkSettings, batch: &Batch, last: &Transaction) -> String {
    let advance = sql::advance(
        settings.stream.as_str(),
        settings.term,
        batch.previous,
        batch.number.0,
        last.end_lsn,
        system_time(last.commit_time),
    );
    format!("BEGIN; {advance}")
}

/// Where the parts of a batch come from.
pub(super) enum Parts<'p> {
    /// From the task that folds ahead.
    Received {
        waiting: VecDeque<Work>,
        work: &'p mut mpsc::Receiver<Work>,
        ended: bool,
    },
    /// Folded here and now.
    Folding(Box<Folding<'p, 'p>>),
}

impl<'p> Parts<'p> {
    pub(super) fn received(first: Work, work: &'p mut mpsc::Receiver<Work>) -> Self {
        Self::Received {
            waiting: VecDeque::from([first]),
            work,
            ended: false,
        }
    }

    async fn next(&mut self) -> Result<Option<Folded>, SinkError> {
        match self {
            Self::Folding(folding) => folding.next().await,
            Self::Received { ended: true, .. } => Ok(None),
            Self::Received {
                waiting,
                work,
                ended,
            } => {
                let next = match waiting.pop_front() {
                    Some(work) => Some(work),
                    None => work.recv().await,
                };
                // Without an end the task that folds is gone, and with it the session.
                let next = next.ok_or(SinkError::Interrupted)?;
                *ended = next.last;
                next.folded.map(Some)
            }
        }
    }

    /// Takes what is left of a batch that was given up, so that the next one is next.
    pub(super) async fn skip_the_rest(&mut self) {
        while let Ok(Some(_)) = self.next().await {}
    }
}

/// One attempt.
pub(super) struct Attempt<'a> {
    settings: &'a SinkSettings,
    lanes: &'a mut [Lane],
    batch: &'a Batch,
    planner: Planner,
    /// By lane; `None` while it has no share.
    chains: Vec<Option<Chain>>,
    prepared: Vec<usize>,
}

impl<'a> Attempt<'a> {
    pub(super) fn new(settings: &'a SinkSettings, lanes: &'a mut [Lane], batch: &'a Batch) -> Self {
        Self {
            planner: Planner::new(lanes.len()),
            chains: lanes.iter().map(|_| None).collect(),
            prepared: Vec::new(),
            settings,
            lanes,
            batch,
        }
    }

    /// All of the batch or nothing.
    pub(super) async fn run(mut self, parts: &mut Parts<'_>) -> Result<Applied, SinkError> {
        let net_changes = match self.share_out(parts).await {
            Ok(net_changes) => net_changes,
            Err(error) => {
                // An error here outweighs the first: with something left behind nothing may be tried again.
                if error.is_for_the_slow_path() || error.is_for_one_lane() {
                    self.roll_back().await?;
                }
                return Err(error);
            }
        };
        let spread = self.prepared.len() > 1;
        if spread {
            self.commit_prepared().await?;
        }
        Ok(Applied {
            net_changes,
            slow_path: false,
            spread,
            commands: CommandCounts::default(),
        })
    }

    /// Up to the decision: with one lane that is its COMMIT, with several all of them are prepared.
    async fn share_out(&mut self, parts: &mut Parts<'_>) -> Result<u64, SinkError> {
        let mut net_changes = 0;
        let mut parts_seen = 0;
        self.open(0).await;
        while let Some(folded) = parts.next().await? {
            net_changes += folded.net_changes;
            parts_seen += 1;
            let targets = folded.targets;
            let shares = if self.lanes.len() == 1 {
                vec![folded.steps]
            } else {
                let spread_of = |relation: &_| targets.of(relation).spread;
                let part = match (parts_seen, folded.last) {
                    (1, true) => Part::Whole,
                    _ => Part::OneOfMany,
                };
                self.planner.plan(folded.steps, part, spread_of)?
            };
            for (number, share) in shares.into_iter().enumerate() {
                if !share.is_empty() {
                    self.send(number, &share, &targets).await?;
                }
            }
        }
        let open = self.chains.iter().flatten().count();
        if open == 1 {
            failpoint::hit("apply:before-commit");
            self.end(0, "COMMIT".to_owned()).await;
            self.finish(0).await?;
            failpoint::hit("apply:after-commit");
        } else {
            self.prepare_all().await?;
        }
        Ok(net_changes)
    }

    /// Begins the lane's transaction.
    async fn open(&mut self, number: usize) {
        let mut begin = match number {
            0 => begin(self.settings, self.batch, self.batch.last()),
            _ => {
                let hold = sql::hold(self.settings.stream.as_str(), self.settings.term);
                format!("BEGIN; {hold}")
            }
        };
        if self.lanes.len() > 1 {
            begin = format!("{begin}; {LOCK_TIMEOUT}");
        }
        let mut chain = Chain::default();
        self.lanes[number].sql(begin, &mut chain).await;
        self.chains[number] = Some(chain);
    }

    /// Sends a lane its share of one part.
    async fn send(
        &mut self,
        number: usize,
        share: &[Step],
        targets: &super::target::Targets,
    ) -> Result<(), SinkError> {
        let preparing = self.lanes[number].prepare(share, targets);
        let prepared = while_settling(self.chains[number].iter_mut(), preparing).await;
        if self.chains[number].is_none() {
            self.open(number).await;
        }
        if let Some(chain) = &mut self.chains[number] {
            if prepared.is_err() {
                // In a transaction that has failed nothing can be prepared: what failed first counts.
                chain.finish().await?;
            }
            // At most the part before may still be unanswered.
            chain.mark().await?;
            self.lanes[number].send(prepared?, chain).await;
        }
        Ok(())
    }

    async fn end(&mut self, number: usize, sql: String) {
        if let Some(chain) = &mut self.chains[number] {
            self.lanes[number].sql(sql, chain).await;
        }
    }

    async fn finish(&mut self, number: usize) -> Result<(), SinkError> {
        match &mut self.chains[number] {
            Some(chain) => chain.finish().await,
            None => Ok(()),
        }
    }

    fn share_of(&self, number: usize) -> Prepared {
        let lane = u16::try_from(number).expect("replica.lanes is a u16");
        Prepared::new(&self.settings.stream, self.batch.number.0, lane)
    }

    async fn prepare_all(&mut self) -> Result<(), SinkError> {
        for number in 0..self.lanes.len() {
            self.end(number, self.share_of(number).prepare_sql()).await;
        }
        let mut preparing: FuturesUnordered<_> = self
            .chains
            .iter_mut()
            .enumerate()
            .filter_map(|(number, chain)| Some((number, chain.as_mut()?)))
            .map(|(number, chain)| async move { (number, chain.finish().await) })
            .collect();
        // Every lane's answer counts: what is prepared must be known in order to be rolled back.
        let mut failed = None;
        while let Some((number, result)) = preparing.next().await {
            match result {
                Ok(()) => {
                    self.prepared.push(number);
                    failpoint::hit("apply:lane-prepared");
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)?;
        failpoint::hit("apply:all-prepared");
        Ok(())
    }

    /// The decision, and what follows from it.
    async fn commit_prepared(&mut self) -> Result<(), SinkError> {
        let decision = self.share_of(0).finish_sql(Verdict::Commit);
        self.lanes[0].run(&decision).await?;
        failpoint::hit("apply:lane-0-committed");
        let rest = self.prepared.iter().filter(|number| **number != 0);
        let mut committing: FuturesUnordered<_> = rest
            .map(|number| {
                let sql = self.share_of(*number).finish_sql(Verdict::Commit);
                let lane = &self.lanes[*number];
                async move { lane.run(&sql).await }
            })
            .collect();
        while let Some(result) = committing.next().await {
            result?;
            failpoint::hit("apply:lane-committed");
        }
        failpoint::hit("apply:last-lane-committed");
        Ok(())
    }

    /// Leaves no lane in a transaction and nothing prepared.
    async fn roll_back(&mut self) -> Result<(), SinkError> {
        for number in 0..self.lanes.len() {
            if let Some(chain) = &mut self.chains[number] {
                // Its errors have been told; what counts is that nothing is on its way any more.
                let _ = chain.finish().await;
                let sql = match self.prepared.contains(&number) {
                    true => self.share_of(number).finish_sql(Verdict::RollBack),
                    false => "ROLLBACK".to_owned(),
                };
                self.lanes[number].run(&sql).await?;
            }
        }
        Ok(())
    }
}
