//! Brings complete segments from the spool into the store, in order, for as long as it takes.
//!
//! # Invariants
//! - Segments reach the store one at a time. Whatever the store says, it is asked again: only the spool's limit ends that.
//! - How far the store has the log is told without anything that is missing and still to come.
//! - What the disk has spoilt is not uploaded: the task ends, and whoever opens the spool anew sees to it.
//!
//! # What it does not do
//! It makes no segments: [`super::log`] does.

use std::time::SystemTime;

use tokio::sync::{mpsc, watch};

use super::chain::Chain;
use super::log::LogSettings;
use super::segment::{Uploaded, upload};
use super::{ArchiveError, Segment, Span, SpoolError};
use crate::backoff::{self, Decision};
use crate::error::{Class, Classify as _, chain};
use crate::failpoint;
use crate::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::store::Store;

/// What the upload is given.
#[derive(Debug)]
pub(super) enum Item {
    Segment(Segment),
    /// What lies before this is elsewhere, or nowhere: nobody waits for it.
    GoOnAt(PgLsn),
}

/// What an earlier run has left. What is missing before `position` was left out on purpose; what is missing from there on is to
/// come.
pub(super) fn send_waiting(
    to: &mpsc::UnboundedSender<Item>,
    waiting: Vec<Segment>,
    position: PgLsn,
) {
    for segment in waiting {
        let start = segment.span.start;
        if start <= position {
            // The receiver is here.
            let _ = to.send(Item::GoOnAt(start));
        }
        let _ = to.send(Item::Segment(segment));
    }
}

/// Segments into the store.
pub(super) struct Uploading {
    pub(super) settings: LogSettings,
    /// How far the store has the log, without anything missing that is to come.
    pub(super) uploaded: watch::Sender<PgLsn>,
    /// What it has beyond that.
    pub(super) stored: Vec<Span>,
    pub(super) metrics: ArchiveMetrics,
    /// The last segment that an earlier run has brought there.
    pub(super) taken: Option<Span>,
}

impl Uploading {
    pub(super) async fn run(mut self, mut items: mpsc::UnboundedReceiver<Item>) {
        let mut store = None;
        while let Some(item) = items.recv().await {
            let segment = match item {
                Item::Segment(segment) => segment,
                Item::GoOnAt(position) => {
                    self.reached(position);
                    continue;
                }
            };
            let mut attempt = 0;
            let uploaded = loop {
                match self.upload(&mut store, &segment).await {
                    Ok(uploaded) => break uploaded,
                    Err(ArchiveError::Spool(error @ SpoolError::Damaged { .. })) => {
                        // Whoever opens the spool anew keeps it aside, and reads the source again.
                        tracing::error!(
                            stream = self.settings.author.stream, error = %chain(&error), hint = error.hint(),
                            "a segment cannot be archived"
                        );
                        return;
                    }
                    Err(error) => {
                        attempt += 1;
                        self.failed(&error, &segment, attempt).await;
                    }
                }
            };
            failpoint::hit("archive:uploaded");
            let (span, end) = (segment.span, segment.span.end);
            let (raw, stored) = (uploaded.raw_bytes, uploaded.stored_bytes);
            self.metrics.segment(raw, stored, end, now());
            if let Err(error) = segment.taken() {
                // It is uploaded again after the next start, which does no harm.
                tracing::warn!(stream = self.settings.author.stream, error = %chain(&error), "a segment stays in the spool");
            }
            self.stored.push(span);
            self.reached(PgLsn::from(0));
        }
    }

    /// The store has everything up to where it had, or up to `position`, and what was stored beyond.
    fn reached(&mut self, position: PgLsn) {
        let from = position.max(*self.uploaded.borrow());
        let end = Chain::from(from, &self.stored).end;
        self.stored.retain(|span| span.end > end);
        self.uploaded.send_replace(end);
    }

    async fn upload(
        &mut self,
        store: &mut Option<Store>,
        segment: &Segment,
    ) -> Result<Uploaded, ArchiveError> {
        let store = match store {
            Some(store) => store,
            None => {
                let opened = Store::open(&self.settings.url, &self.settings.encryption).await?;
                opened.count_throttled(self.metrics.throttled.clone());
                self.recognize(&opened).await?;
                store.insert(opened)
            }
        };
        upload(store, &self.settings.layout, segment).await
    }

    /// A place that has lost what it took from here is another one: a file system that is not mounted, an emptied bucket.
    async fn recognize(&mut self, store: &Store) -> Result<(), ArchiveError> {
        let Some(taken) = self.taken else {
            return Ok(());
        };
        let name = self.settings.layout.segment(taken);
        if store.list(&name, None).await?.is_empty() {
            return Err(ArchiveError::Lost { object: name });
        }
        self.taken = None;
        Ok(())
    }

    /// Says so, and waits.
    async fn failed(&self, error: &ArchiveError, segment: &Segment, attempt: u32) {
        self.metrics.retries.increment(1);
        let retry_max = self.settings.retry_max;
        let decision = backoff::decide(error.class(), attempt, retry_max, rand::random());
        let pause = match decision {
            Decision::Retry(pause) => pause,
            // A person is needed; whatever they do, it is seen soon.
            Decision::Stop => retry_max,
        };
        let segment = segment.span.name();
        let stream = &self.settings.author.stream;
        let (hint, error_text) = (error.hint(), chain(error));
        match error.class() {
            Class::Transient => {
                tracing::warn!(stream, segment, attempt, ?pause, error = %error_text, hint, "the archive did not take a segment; will retry");
            }
            Class::Definite | Class::Fenced => {
                tracing::error!(stream, segment, attempt, ?pause, error = %error_text, hint, "the archive does not take a segment; will retry");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "only for a metric: when the archive last took something"
)]
fn now() -> SystemTime {
    SystemTime::now()
}
