//! Folding: batches in, their net changes out, ahead of the lanes.
//!
//! ```text
//! batches ─▶ segments ─▶ Relations (what is wanted, and where it goes) ─▶ net::fold ─▶ Folded ─▶ lanes
//! ```
//! A task of its own, so that one batch is folded while the one before is applied. It has its own session
//! with the replica for looking up tables: the lanes' sessions are in the middle of transactions.
//!
//! # Invariants
//! - Batches and their segments come out in the order they went in; the last of a batch says so.
//! - Of segments with a large value that come from a spill file, one is in memory at a time.
//! - What cannot be folded comes out as an error in its place. The lanes decide.
//! - A batch with a barrier is not folded here: what its rows go into is there only behind it. Nothing of what comes next is
//!   looked at before the barrier is behind us.
//!
//! # What it does not do
//! It changes nothing on the replica.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_postgres::Client;

use super::SinkError;
use super::array::ArrayParameter;
use super::large::LARGE_BYTES;
use super::moved::Moved;
use super::relations::{Relations, Standing};
use super::slice::{Slice, SliceLimits, Slices};
use super::target::{Target, Targets, address};
use crate::flow::batch::Batch;
use crate::flow::net::{self, Step};
use crate::flow::transaction::{Change, SourceRelation};
use crate::names::TableName;
use crate::pg::PgLsn;

/// How changes become steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// Folded.
    Fast,
    /// One by one.
    Slow,
}

/// A segment's changes, folded, and where they go.
#[derive(Debug, Default)]
pub(super) struct Folded {
    pub(super) steps: Vec<Step>,
    pub(super) targets: Targets,
    pub(super) net_changes: u64,
    /// Whether the batch ends with it.
    pub(super) last: bool,
    /// Goes when it has been sent; then the next one with a large value may come.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

/// One segment of a batch on its way to the lanes.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) batch: Arc<Batch>,
    pub(super) folded: Result<Folded, SinkError>,
    /// Whether the batch ends with it. So it does with an error.
    pub(super) last: bool,
    /// A batch with a barrier, which is not folded: to be told what has become of the tables once it is durable.
    pub(super) barrier: Option<oneshot::Sender<Moved>>,
}

/// Folds with what it knows of the replica's tables.
#[derive(Debug)]
pub(super) struct Folder {
    catalog: Arc<Client>,
    relations: Relations,
    segment: SliceLimits,
    /// For one segment with a large value.
    large: Arc<Semaphore>,
}

impl Folder {
    pub(super) fn new(catalog: Arc<Client>, relations: Relations, segment: SliceLimits) -> Self {
        Self {
            catalog,
            relations,
            segment,
            large: Arc::new(Semaphore::new(1)),
        }
    }

    /// Begins with a batch.
    pub(super) fn begin<'b>(&mut self, batch: &'b Batch) -> Folding<'_, 'b> {
        self.trim();
        Folding {
            segments: Slices::new(&batch.transactions, self.segment),
            folder: self,
            ended: false,
        }
    }

    /// Forgets what it knows if that is too much. Not between [`Folder::wanted`] and [`Folder::steps`].
    pub(super) fn trim(&mut self) {
        self.relations.trim();
    }

    /// What is in memory at the same time.
    pub(super) fn limits(&self) -> SliceLimits {
        self.segment
    }

    /// Leaves out what the copy already holds, and looks up where the rest goes: in a session that sees what is there, which is the
    /// one that applies where that has defined something.
    pub(super) async fn wanted<'c>(
        &mut self,
        client: &Client,
        changes: impl Iterator<Item = (PgLsn, &'c Change)>,
    ) -> Result<Vec<Cow<'c, Change>>, SinkError> {
        self.relations.wanted(client, changes).await
    }

    /// The tables are others from here on, and what is known of any is looked up again.
    pub(super) fn renew(&mut self, moved: &Moved) {
        self.relations.renew(moved);
    }

    /// What becomes of a table's changes of a commit, as far as that is decided by where it was copied.
    pub(super) fn standing(&self, table: &TableName, commit_lsn: PgLsn) -> Standing {
        self.relations.standing(table, commit_lsn)
    }

    /// Changes that are wanted as steps, and where these go.
    pub(super) fn steps<'c>(
        &self,
        changes: impl Iterator<Item = &'c Change>,
        path: Path,
    ) -> Result<(Vec<Step>, Targets), SinkError> {
        let targets = &self.relations.targets;
        let key_of = |relation: &Arc<SourceRelation>| targets.of(relation).key.clone();
        let steps = match path {
            Path::Fast => net::fold(changes, &key_of)?,
            Path::Slow => net::serial(changes, &key_of)?,
        };
        let targets = targets.of_each(relations_of(&steps));
        Ok((steps, targets))
    }

    /// Where the changes of a relation go that are wanted.
    pub(super) fn target(&self, relation: &Arc<SourceRelation>) -> Arc<Target> {
        Arc::clone(self.relations.targets.of(relation))
    }

    /// Whether the replica refuses a value in a statement that only reads.
    pub(super) async fn refuses(&self, sql: &str, value: &ArrayParameter) -> bool {
        match self.catalog.query(sql, &[value]).await {
            Ok(_) => false,
            Err(error) => SinkError::from(error).is_of_a_value(),
        }
    }

    /// Folds batches until there are no more, or nobody wants them.
    pub(super) async fn run(
        mut self,
        mut batches: mpsc::Receiver<Arc<Batch>>,
        work: mpsc::Sender<Work>,
    ) {
        while let Some(batch) = batches.recv().await {
            if batch.has_barrier() {
                let (barrier, behind) = oneshot::channel();
                let one = Work {
                    batch,
                    folded: Ok(Folded::default()),
                    last: true,
                    barrier: Some(barrier),
                };
                if work.send(one).await.is_err() {
                    return;
                }
                // Without an answer the session is over.
                let Ok(moved) = behind.await else {
                    return;
                };
                self.renew(&moved);
                continue;
            }
            let mut folding = self.begin(&batch);
            loop {
                let (folded, last) = match folding.next().await {
                    Ok(Some(folded)) => (Ok(folded), folding.ended),
                    // Only after the last one, which has said so.
                    Ok(None) => break,
                    Err(error) => (Err(error), true),
                };
                let batch = Arc::clone(&batch);
                let one = Work {
                    batch,
                    folded,
                    last,
                    barrier: None,
                };
                if work.send(one).await.is_err() {
                    return;
                }
                if last {
                    break;
                }
            }
        }
    }
}

/// A batch that is being folded, segment by segment.
pub(super) struct Folding<'f, 'b> {
    folder: &'f mut Folder,
    segments: Slices<'b>,
    ended: bool,
}

impl Folding<'_, '_> {
    /// The next segment; `None` at the end of the batch.
    pub(super) async fn next(&mut self) -> Result<Option<Folded>, SinkError> {
        let room = match self.segments.next_bytes()? >= LARGE_BYTES as u64 {
            true => {
                let large = Arc::clone(&self.folder.large);
                let room = large.acquire_owned().await;
                Some(room.expect("the semaphore is never closed"))
            }
            false => None,
        };
        let Some(segment) = self.segments.next()? else {
            return Ok(None);
        };
        self.ended = self.segments.is_at_end();
        let mut folded = self.fold(&segment).await?;
        folded.room = room;
        Ok(Some(folded))
    }

    async fn fold(&mut self, segment: &Slice<'_>) -> Result<Folded, SinkError> {
        let catalog = Arc::clone(&self.folder.catalog);
        let wanted = self.folder.wanted(&catalog, segment.changes()).await?;
        let changes = wanted.iter().map(|change| &**change);
        let (steps, targets) = self.folder.steps(changes, Path::Fast)?;
        Ok(Folded {
            targets,
            net_changes: net::count(&steps),
            last: self.ended,
            room: None,
            steps,
        })
    }
}

/// Each relation of the steps once.
fn relations_of(steps: &[Step]) -> impl Iterator<Item = &Arc<SourceRelation>> {
    let mut seen = HashSet::new();
    steps
        .iter()
        .flat_map(Step::relations)
        .filter(move |relation| seen.insert(address(relation)))
}
