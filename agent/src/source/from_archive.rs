//! What a Kinesis stream has no longer, or not yet, out of the archive's change log.
//!
//! # Invariants
//! - What is taken begins at the position and has no gap; it moves the position.
//!
//! # What it does not do
//! It does not decide when: what the archive has is right at any time, and costs reading.

use super::overflow::Held;
use super::{LogIntake, SourceError};
use crate::archive::log::{Ahead, ArchiveError, Layout, SegmentReader, Span, Way};
use crate::cloud::store::{Encryption, Store, StoreUrl};
use crate::error::chain;
use crate::flow::changelog::{Gap, Gather};

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
        gather: &mut Gather<Held>,
        intake: &mut LogIntake,
    ) -> Result<Filled, SourceError> {
        let Some(store) = self.open().await? else {
            return Ok(Filled::Nothing);
        };
        let objects = store
            .list(&self.layout.log(), None)
            .await
            .map_err(ArchiveError::from)?;
        let sizes: Vec<(Span, u64)> = objects
            .iter()
            .filter_map(|object| Some((self.layout.parse_segment(&object.name)?, object.bytes)))
            .collect();
        let spans = sizes.iter().map(|(span, _)| *span).collect();
        let mut ahead = Ahead::new(&store, &self.layout, sizes);
        let before = gather.position();
        let mut way = Way::new(gap.from, spans);
        while gather.position() < gap.to
            && let Some(span) = way.pop()
        {
            let segment = ahead.open(span, &way).await.map_err(SourceError::from);
            let taken = match segment {
                Ok(segment) => take(segment, intake).await,
                Err(error) => Err(error),
            };
            match taken {
                Ok(true) => gather.advance(span.end),
                Ok(false) => return Ok(Filled::Unwanted),
                Err(SourceError::Archive(error)) if error.is_of_one_object() => {
                    intake.restart();
                    let here = gather.position().max(intake.end_lsn());
                    gather.advance(here);
                    tracing::warn!(
                        segment = span.name(), error = %chain(&error), from = %here,
                        "a segment of the change log cannot be read"
                    );
                    if !way.give_up(span, here) {
                        break;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(match gather.position() > before {
            true => Filled::Some,
            false => Filled::Nothing,
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

/// Takes a segment; false once nobody wants more.
async fn take(mut segment: SegmentReader, intake: &mut LogIntake) -> Result<bool, SourceError> {
    while let Some(messages) = segment.next_messages().await? {
        for message in messages {
            if !intake.take(message).await? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
