//! Segments read before their turn: a store answers in tens of milliseconds, and a quiet day has thousands of them.
//!
//! # Invariants
//! - At most [`COUNT_MAX`] are on their way or wait, of [`BYTES_MAX`] together as the store lists them; a larger one is read when
//!   its turn comes, piece by piece.
//! - They are given in the order of the way, whatever order they come in; what the way has given up is dropped.
//! - What passes by itself is waited for, a minute at most: a restore does not end because of a store that was busy.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{ArchiveError, Layout, SegmentReader, Span, Way};
use crate::backoff::{self, Decision};
use crate::cloud::store::{Store, StoreError};
use crate::error::{Classify as _, chain};

/// Requests at the same time.
const COUNT_MAX: usize = 8;

/// Compressed bytes in memory.
const BYTES_MAX: u64 = 32 << 20;

/// How long one is tried.
const WITHIN: Duration = Duration::from_secs(60);

/// The longest pause between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// One that is being read, or was.
struct BegunRead {
    span: Span,
    bytes: u64,
    reading: AbortOnDropHandle<Result<Bytes, StoreError>>,
}

/// Reads ahead on a way.
pub struct Ahead {
    store: Store,
    layout: Layout,
    /// What the store lists.
    sizes: BTreeMap<Span, u64>,
    begun: VecDeque<BegunRead>,
}

impl Ahead {
    /// Nothing is read yet. `sizes`: of every segment there is.
    pub fn new(
        store: &Store,
        layout: &Layout,
        sizes: impl IntoIterator<Item = (Span, u64)>,
    ) -> Self {
        Self {
            store: store.clone(),
            layout: layout.clone(),
            sizes: sizes.into_iter().collect(),
            begun: VecDeque::new(),
        }
    }

    /// The segment whose turn it is; those behind it on the way are begun.
    ///
    /// # Errors
    /// When the store does not give it.
    pub async fn open(&mut self, span: Span, way: &Way) -> Result<SegmentReader, ArchiveError> {
        self.begin(std::iter::once(span).chain(way.ahead()));
        let is_begun = self.begun.front().is_some_and(|first| first.span == span);
        match is_begun.then(|| self.begun.pop_front()).flatten() {
            Some(first) => {
                let read = first.reading.await;
                // Only the end of the runtime cancels it.
                let bytes = read.unwrap_or_else(|error| {
                    std::panic::resume_unwind(error.into_panic());
                })?;
                SegmentReader::of(bytes, &self.layout, span)
            }
            None => SegmentReader::open(&self.store, &self.layout, span).await,
        }
    }

    /// Begins what comes next, as far as there is room.
    fn begin(&mut self, next: impl Iterator<Item = Span>) {
        let mut before = std::mem::take(&mut self.begun);
        let mut bytes = 0;
        for span in next.take(COUNT_MAX) {
            let size = self.sizes.get(&span).copied().unwrap_or(u64::MAX);
            if bytes + size.min(BYTES_MAX) > BYTES_MAX || size > BYTES_MAX {
                break;
            }
            bytes += size;
            // What was in between is not on the way any more.
            let known = before.iter().position(|begun| begun.span == span);
            let begun = known.and_then(|at| before.remove(at));
            let begun = begun.unwrap_or_else(|| BegunRead {
                span,
                bytes: size,
                reading: AbortOnDropHandle::new(tokio::spawn(read(
                    self.store.clone(),
                    self.layout.segment(span),
                ))),
            });
            self.begun.push_back(begun);
        }
        debug_assert!(self.begun.iter().map(|begun| begun.bytes).sum::<u64>() <= BYTES_MAX);
    }
}

/// Reads an object whole.
async fn read(store: Store, name: String) -> Result<Bytes, StoreError> {
    let (began, mut attempt) = (Instant::now(), 0);
    loop {
        let error = match store.get(&name).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => error,
        };
        attempt += 1;
        match backoff::decide(error.class(), attempt, RETRY_MAX, rand::random()) {
            Decision::Retry(pause) if error.passes() && began.elapsed() + pause < WITHIN => {
                tracing::warn!(object = name, attempt, ?pause, error = %chain(&error), "will read it again");
                tokio::time::sleep(pause).await;
            }
            Decision::Retry(_) | Decision::Stop => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::store::{Encryption, Put, StoreUrl};
    use crate::flow::testing::lsn;
    use crate::names::history::History;
    use crate::names::stream::StreamName;

    fn span(n: u64) -> Span {
        Span {
            start: lsn(n * 10),
            end: lsn(n * 10 + 10),
        }
    }

    #[tokio::test]
    async fn as_many_are_begun_as_there_is_room_for_and_in_order() {
        let home = tempfile::tempdir().unwrap();
        let url = StoreUrl::Directory(home.path().to_owned());
        let store = Store::open(&url, &Encryption::Default).await.unwrap();
        let history = History {
            system_identifier: 7,
            began: 0,
        };
        let layout = Layout::new(&StreamName::new("s", "app"), history);
        for n in 0..20 {
            let name = layout.segment(span(n));
            assert_eq!(
                store.put_new(&name, Bytes::new()).await.unwrap(),
                Put::Created
            );
        }
        let begun = |ahead: &Ahead| -> Vec<Span> { ahead.begun.iter().map(|it| it.span).collect() };
        let spans = |range: std::ops::Range<u64>| range.map(span).collect::<Vec<_>>();
        let mut way = Way::new(lsn(0), spans(0..20));
        let mut ahead = Ahead::new(&store, &layout, spans(0..20).into_iter().map(|it| (it, 9)));
        let first = way.pop().unwrap();
        ahead.open(first, &way).await.unwrap();
        assert_eq!(begun(&ahead), spans(1..8));
        let second = way.pop().unwrap();
        ahead.open(second, &way).await.unwrap();
        assert_eq!(begun(&ahead), spans(2..9));
        // The way leads elsewhere.
        way.give_up(span(3), lsn(100));
        let next = way.pop().unwrap();
        ahead.open(next, &way).await.unwrap();
        assert_eq!((next, begun(&ahead)), (span(10), spans(11..18)));
        // Bytes bound it as well, and a large one is nobody's to hold.
        let large = |n: u64| match n {
            0 | 1 => BYTES_MAX / 2,
            2 => 1,
            _ => BYTES_MAX + 1,
        };
        let sizes = (0..20).map(|n| (span(n), large(n)));
        let mut ahead = Ahead::new(&store, &layout, sizes);
        ahead.begin((0..20).map(span));
        assert_eq!(begun(&ahead), spans(0..2));
        ahead.begin((2..20).map(span));
        assert_eq!(begun(&ahead), spans(2..3));
        ahead.begin((3..20).map(span));
        assert_eq!(begun(&ahead), []);
    }
}
