//! What a Kinesis stream has no longer, or not yet, out of the archive's change log.
//!
//! # Invariants
//! - What is taken begins at the position and has no gap; it moves the position.
//!
//! # What it does not do
//! It does not decide when: what the archive has is right at any time, and costs reading.

use super::shelf::Kept;
use super::{LogIntake, SourceError};
use crate::archive::{ArchiveError, Chain, Layout, SegmentReader, Span};
use crate::changelog::{Gap, Gather};
use crate::store::{Encryption, Store, StoreUrl};

/// The archive's change log of one stream, where there is an archive.
pub(super) struct FromArchive {
    place: Option<(StoreUrl, Encryption)>,
    layout: Layout,
    store: Option<Store>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// The archive has nothing of the stretch.
    Nothing,
    /// Some of the stretch, or all of it.
    Some,
    /// Nobody wants transactions any more.
    Unwanted,
}

impl FromArchive {
    /// Nothing is opened yet.
    pub(super) fn new(place: Option<(StoreUrl, Encryption)>, layout: Layout) -> Self {
        Self {
            place,
            layout,
            store: None,
        }
    }

    /// Whether there is one.
    pub(super) fn is_there(&self) -> bool {
        self.place.is_some()
    }

    /// Takes what there is of a gap.
    pub(super) async fn fill(
        &mut self,
        gap: Gap,
        gather: &mut Gather<Kept>,
        intake: &mut LogIntake,
    ) -> Result<Filled, SourceError> {
        let Some(store) = self.open().await? else {
            return Ok(Filled::Nothing);
        };
        let objects = store
            .list(&self.layout.log(), None)
            .await
            .map_err(ArchiveError::from)?;
        let spans: Vec<Span> = objects
            .iter()
            .filter_map(|object| self.layout.parse_segment(&object.name))
            .collect();
        let chain = Chain::from(gap.from, &spans);
        for span in &chain.spans {
            if gather.position() >= gap.to {
                break;
            }
            let mut segment = SegmentReader::open(&store, &self.layout, *span).await?;
            while let Some(messages) = segment.next_messages().await? {
                for message in messages {
                    if !intake.take(message).await? {
                        return Ok(Filled::Unwanted);
                    }
                }
            }
            gather.advance(span.end);
        }
        Ok(match chain.spans.is_empty() {
            true => Filled::Nothing,
            false => Filled::Some,
        })
    }

    async fn open(&mut self) -> Result<Option<Store>, ArchiveError> {
        let Some((url, encryption)) = &self.place else {
            return Ok(None);
        };
        if self.store.is_none() {
            self.store = Some(Store::open(url, encryption).await?);
        }
        Ok(self.store.clone())
    }
}
