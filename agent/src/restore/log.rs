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

impl Replay<'_> {
    /// Hands over every transaction up to the moment; returns the first that lies behind it.
    ///
    /// # Errors
    /// [`RestoreError`]; what was handed over before stays right.
    pub(super) async fn run(&self, intake: &mut LogIntake) -> Result<Option<Beyond>, RestoreError> {
        for span in &self.chain.spans {
            let mut segment = SegmentReader::open(self.store, self.layout, *span).await?;
            while let Some(messages) = segment.next_messages().await? {
                for message in messages {
                    if let ControlFlow::Break(beyond) = self.take(message, intake).await? {
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
        intake: &mut LogIntake,
    ) -> Result<ControlFlow<Option<Beyond>>, RestoreError> {
        if pgoutput::kind(&message) == Some(MessageKind::Begin) {
            let Message::Begin(begin) = pgoutput::decode(&message, false)? else {
                unreachable!("the first byte says what it is");
            };
            if !self.moment.includes(&begin) {
                return Ok(ControlFlow::Break(Some(Beyond {
                    commit_lsn: begin.final_lsn,
                    commit_time: begin.commit_time,
                })));
            }
        }
        Ok(match intake.take(message).await? {
            true => ControlFlow::Continue(()),
            // Nobody wants more: the apply has failed, and says why.
            false => ControlFlow::Break(None),
        })
    }
}
