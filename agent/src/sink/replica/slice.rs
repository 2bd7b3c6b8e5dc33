//! Slices: the parts of a batch that are in memory at the same time.
//!
//! A batch of ordinary transactions is one segment. A spilled transaction comes back from its file in
//! parts of bounded size, followed by what never left memory.

use std::collections::VecDeque;

use super::large::LARGE_BYTES;
use crate::config::Limits;
use crate::flow::spill::{SpillError, SpillReader};
use crate::flow::transaction::{Change, Transaction};
use crate::pg::PgLsn;

/// Changes that are folded together.
pub(super) enum Slice<'b> {
    /// Whole transactions.
    Whole(&'b [Transaction]),
    /// A part of one transaction, read back from its spill file.
    Part {
        commit_lsn: PgLsn,
        changes: Vec<Change>,
    },
}

impl Slice<'_> {
    /// The changes in order, each with the commit LSN of its transaction.
    pub(super) fn changes(&self) -> Box<dyn Iterator<Item = (PgLsn, &Change)> + Send + '_> {
        match self {
            Self::Whole(transactions) => Box::new(transactions.iter().flat_map(|transaction| {
                transaction
                    .changes
                    .iter()
                    .map(|change| (transaction.commit_lsn, change))
            })),
            Self::Part {
                commit_lsn,
                changes,
            } => Box::new(changes.iter().map(|change| (*commit_lsn, change))),
        }
    }
}

/// Cuts a batch into segments.
pub(super) struct Slices<'b> {
    waiting: VecDeque<&'b [Transaction]>,
    reading: Option<(SpillReader, &'b Transaction)>,
    limits: SliceLimits,
}

/// What a segment of a spilled transaction may hold.
#[derive(Clone, Copy, Debug)]
pub struct SliceLimits {
    /// In bytes.
    pub bytes: u64,
    /// In changes: narrow rows need many times their bytes while they are folded.
    pub changes: u64,
}

impl SliceLimits {
    /// Several are in memory at a time (read, folded, on their way), as rows, not as messages.
    pub fn of(limits: &Limits) -> Self {
        Self {
            bytes: limits.batch_bytes,
            changes: (limits.batch_changes / 4).max(1),
        }
    }
}

impl<'b> Slices<'b> {
    pub(super) fn new(transactions: &'b [Transaction], limits: SliceLimits) -> Self {
        let waiting = transactions
            .chunk_by(|a, b| a.spilled.is_none() && b.spilled.is_none())
            .collect();
        Self {
            waiting,
            reading: None,
            limits,
        }
    }

    /// What the next segment takes in memory at least, where it comes from a spill file.
    pub(super) fn next_bytes(&mut self) -> Result<u64, SpillError> {
        if self.reading.is_none()
            && let Some([transaction]) = self.waiting.front()
            && let Some(spill) = &transaction.spilled
        {
            self.reading = Some((spill.reader()?, transaction));
            self.waiting.pop_front();
        }
        match &mut self.reading {
            Some((reader, _)) => Ok(reader.next_bytes()?.unwrap_or(0)),
            None => Ok(0),
        }
    }

    /// The next segment; `None` at the end of the batch.
    pub(super) fn next(&mut self) -> Result<Option<Slice<'b>>, SpillError> {
        loop {
            if let Some((reader, transaction)) = &mut self.reading {
                let commit_lsn = transaction.commit_lsn;
                let changes = read_part(reader, self.limits)?;
                if !changes.is_empty() {
                    return Ok(Some(Slice::Part {
                        commit_lsn,
                        changes,
                    }));
                }
                let rest = std::slice::from_ref(*transaction);
                self.reading = None;
                return Ok(Some(Slice::Whole(rest)));
            }
            match self.waiting.pop_front() {
                None => return Ok(None),
                Some([transaction]) if transaction.spilled.is_some() => {
                    let spill = transaction.spilled.as_ref().expect("the guard has seen it");
                    self.reading = Some((spill.reader()?, transaction));
                }
                Some(transactions) => return Ok(Some(Slice::Whole(transactions))),
            }
        }
    }

    /// Whether the segment handed out last ends the batch.
    pub(super) fn is_at_end(&self) -> bool {
        self.waiting.is_empty() && self.reading.is_none()
    }
}

fn read_part(reader: &mut SpillReader, limits: SliceLimits) -> Result<Vec<Change>, SpillError> {
    let mut part: Vec<Change> = Vec::new();
    let mut bytes = 0;
    while bytes < limits.bytes && (part.len() as u64) < limits.changes {
        // A large value comes alone: whoever asks for it has made room.
        let large = reader
            .next_bytes()?
            .is_some_and(|next| next >= LARGE_BYTES as u64);
        if large && !part.is_empty() {
            break;
        }
        let Some(changes) = reader.next_changes()? else {
            break;
        };
        bytes += changes.iter().map(Change::bytes).sum::<u64>();
        part.extend(changes);
    }
    Ok(part)
}
