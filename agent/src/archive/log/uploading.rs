//! Brings complete segments from the spool into the store, in order, for as long as it takes.
//!
//! # Invariants
//! - Segments reach the store one at a time. Whatever the store says, it is asked again: only the spool's limit ends that.
//! - How far the store has the log is told without anything that is missing and still to come.
//! - What the disk has spoilt is not uploaded: the task ends, and whoever opens the spool anew sees to it.
//! - What stands in one segment's place holds up that segment, not those behind it.
//!
//! # What it does not do
//! It makes no segments: [`super::log`] does.

use tokio::sync::{mpsc, watch};

use super::chain::LogChain;
use super::change_log::LogSettings;
use super::segment::{Uploaded, upload};
use super::spool::LastTaken;
use super::{ArchiveError, Span, SpoolError, SpoolSegment};
use crate::backoff::{self, Decision};
use crate::cloud::store::Store;
use crate::error::{Class, Classify as _, chain};
use crate::failpoint;
use crate::observe::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::time::wall_clock;

/// What the upload is given.
#[derive(Debug)]
pub(super) enum Item {
    Segment(SpoolSegment),
    /// What lies before this is elsewhere, or nowhere: nobody waits for it.
    GoOnAt(PgLsn),
}

/// What an earlier run has left. What is missing before `position` was left out on purpose; what is missing from there on is to
/// come.
pub(super) fn send_waiting(
    to: &mpsc::UnboundedSender<Item>,
    waiting: Vec<SpoolSegment>,
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
    /// The last segment that an earlier run has brought there, or elsewhere.
    pub(super) taken: Option<LastTaken>,
    /// Segments whose names something else has that cannot be read: they wait in the spool, and hold nobody up.
    pub(super) parked: Vec<SpoolSegment>,
}

impl Uploading {
    pub(super) async fn run(mut self, mut items: mpsc::UnboundedReceiver<Item>) {
        let mut store = None;
        loop {
            let parked = !self.parked.is_empty();
            let segment = tokio::select! {
                biased;
                item = items.recv() => match item {
                    Some(Item::Segment(segment)) => segment,
                    Some(Item::GoOnAt(position)) => {
                        self.reached(position);
                        continue;
                    }
                    // What is parked is in the spool, and the next start finds it.
                    None => return,
                },
                () = tokio::time::sleep(self.settings.retry_max), if parked => self.parked.remove(0),
            };
            let mut attempt = 0;
            let uploaded = loop {
                match self.upload(&mut store, &segment).await {
                    Ok(uploaded) => break Some((segment, uploaded)),
                    Err(ArchiveError::Spool(error @ SpoolError::Damaged { .. })) => {
                        // Whoever opens the spool anew keeps it aside, and reads the source again.
                        tracing::error!(
                            stream = self.settings.author.stream, error = %chain(&error), hint = error.hint(),
                            "a segment cannot be archived"
                        );
                        return;
                    }
                    Err(error @ ArchiveError::InTheWay { .. }) => {
                        self.park(segment, &error);
                        break None;
                    }
                    Err(error) => {
                        attempt += 1;
                        self.failed(&error, &segment, attempt).await;
                    }
                }
            };
            let Some((segment, uploaded)) = uploaded else {
                continue;
            };
            failpoint::hit("archive:uploaded");
            let (span, end) = (segment.span, segment.span.end);
            let (raw, stored) = (uploaded.raw_bytes, uploaded.stored_bytes);
            self.metrics.segment(raw, stored, end, wall_clock());
            if let Err(error) = segment.taken(&self.settings.url.to_string()) {
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
        let parked = self.parked.iter().map(|segment| segment.span.start).min();
        let end = LogChain::from(from, &self.stored).end;
        let end = parked.map_or(end, |parked| end.min(parked).max(*self.uploaded.borrow()));
        self.stored.retain(|span| span.end > end);
        self.uploaded.send_replace(end);
    }

    async fn upload(
        &mut self,
        store: &mut Option<Store>,
        segment: &SpoolSegment,
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

    /// The others go on; it is tried again now and then.
    fn park(&mut self, segment: SpoolSegment, error: &ArchiveError) {
        self.metrics.retries.increment(1);
        tracing::error!(
            stream = self.settings.author.stream, segment = segment.span.name(), error = %chain(error), hint = error.hint(),
            "a segment waits in the spool: what has its name in the archive cannot be read; those behind it go on"
        );
        self.parked.push(segment);
    }

    /// A place that has lost what it took from here is another one: a file system that is not mounted, an emptied bucket. One
    /// that the configuration names since is meant: the log goes on there, and a base backup is taken, as in any new place.
    async fn recognize(&mut self, store: &Store) -> Result<(), ArchiveError> {
        let Some(taken) = &self.taken else {
            return Ok(());
        };
        let here = self.settings.url.to_string();
        if let Some(before) = taken.place.as_ref().filter(|place| **place != here) {
            tracing::warn!(
                stream = self.settings.author.stream,
                before,
                now = here,
                "archive.url has changed: the change log goes on in the new place, which leads on from its first base backup; what \
                 is in the old one stays there"
            );
            self.taken = None;
            return Ok(());
        }
        let name = self.settings.layout.segment(taken.span);
        if store.list(&name, None).await?.is_empty() {
            return Err(ArchiveError::Lost { object: name });
        }
        self.taken = None;
        Ok(())
    }

    /// Says so, and waits.
    async fn failed(&self, error: &ArchiveError, segment: &SpoolSegment, attempt: u32) {
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
