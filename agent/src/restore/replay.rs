//! The change log as a source: segments in, transactions out, up to the moment.
//!
//! ```text
//! store ─▶ SegmentReader ─▶ Unpacker ─messages─▶ Replay ─▶ source::Intake ─transaction─▶ [queue_bytes] ─▶ apply
//! ```
//!
//! # Invariants
//! - Each transaction is handed over once, in commit order: segments overlap where an agent was restarted.
//! - Nothing of a transaction behind the moment is handed over, and the first such one proves that the log
//!   reaches the moment. Without that proof the end of the log is an error, unless everything was asked for.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::RestoreError;
use super::moment::Moment;
use crate::archive::{ArchiveError, Chain, Layout, SegmentReader};
use crate::changelog::Unpacker;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{self, Message, MessageKind};
use crate::source::LogIntake;
use crate::store::Store;

/// The transaction that was the first not to be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// Start of its commit record.
    pub commit_lsn: PgLsn,
    /// When it committed.
    pub commit_time: i64,
}

/// A change log that is being read.
pub(super) struct Replay<'a> {
    /// Where it is.
    pub(super) store: &'a Store,
    /// Names there.
    pub(super) layout: &'a Layout,
    /// What to read.
    pub(super) chain: &'a Chain,
    /// How far.
    pub(super) moment: Moment,
}

/// Where the reading stands between two messages.
struct State<'i> {
    intake: &'i mut LogIntake,
    /// The transaction has been taken before, from another segment.
    skipping: bool,
}

impl Replay<'_> {
    /// Hands over every transaction up to the moment; returns the first that lies behind it.
    ///
    /// # Errors
    /// [`RestoreError`]; what was handed over before stays right.
    pub(super) async fn run(&self, intake: &mut LogIntake) -> Result<Option<Beyond>, RestoreError> {
        let mut state = State {
            intake,
            skipping: false,
        };
        for span in &self.chain.spans {
            let mut segment = SegmentReader::open(self.store, self.layout, *span).await?;
            let mut unpacker = Unpacker::default();
            while let Some(part) = segment.next().await? {
                let mut messages = Vec::new();
                unpacker
                    .push(&part, |message| messages.push(message))
                    .map_err(|source| segment.record(source))?;
                for message in messages {
                    if let ControlFlow::Break(beyond) = self.take(message, &mut state).await? {
                        return Ok(beyond);
                    }
                }
            }
        }
        match (self.moment, self.chain.resumes) {
            (Moment::Lsn(lsn), _) if lsn <= self.chain.end => Ok(None),
            // Behind a gap there may be anything.
            (_, Some(next)) => Err(RestoreError::Archive(ArchiveError::Missing {
                from: self.chain.end,
                next: Some(next),
            })),
            (Moment::End, None) => Ok(None),
            (moment, None) => Err(RestoreError::LogEnds {
                end: self.chain.end,
                moment,
            }),
        }
    }

    async fn take(
        &self,
        message: Bytes,
        state: &mut State<'_>,
    ) -> Result<ControlFlow<Option<Beyond>>, RestoreError> {
        let kind = pgoutput::kind(&message);
        if kind == Some(MessageKind::Begin) {
            let Message::Begin(begin) = pgoutput::decode(&message, false)? else {
                unreachable!("the first byte says what it is");
            };
            if !self.moment.includes(&begin) {
                return Ok(ControlFlow::Break(Some(Beyond {
                    commit_lsn: begin.final_lsn,
                    commit_time: begin.commit_time,
                })));
            }
            state.skipping = begin.final_lsn < state.intake.end_lsn();
        }
        // A description is needed by later transactions of the same batch.
        if state.skipping && kind != Some(MessageKind::Relation) {
            return Ok(ControlFlow::Continue(()));
        }
        Ok(match state.intake.take(message).await? {
            true => ControlFlow::Continue(()),
            // Nobody wants more: the apply has failed, and says why.
            false => ControlFlow::Break(None),
        })
    }
}
