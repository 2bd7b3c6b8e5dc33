//! The two tasks that write the change log: batches into the spool, segments into the store.
//!
//! ```text
//! pipeline ─batch─▶ spool_batches ─batch─▶ replica sink
//!                        └─complete segment─▶ upload_segments ─▶ store; `uploaded` says how far
//! ```
//!
//! # Invariants
//! - A batch goes on to the replica once it is in the spool.
//! - Without `archive.required` the archive never holds up replication: what the spool cannot take is left out, said
//!   aloud and counted, and the log goes on behind the gap. With it, the stream stops until there is room.
//! - Segments reach the store in order, one at a time. Whatever the store says, it is asked again: only the spool's
//!   limit ends that.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::segment::{Uploaded, upload};
use super::{ArchiveError, Layout, Segment, Spool, SpoolError, SpoolLimits};
use crate::backoff::{self, Decision};
use crate::batch::Batch;
use crate::changelog::Author;
use crate::error::{Class, Classify as _, chain};
use crate::failpoint;
use crate::metrics::ArchiveMetrics;
use crate::pg::PgLsn;
use crate::store::{Encryption, Store, StoreUrl};

/// How the change log of one stream is written.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// Who writes.
    pub author: Author,
    /// Where the store is.
    pub url: StoreUrl,
    /// How it keeps objects.
    pub encryption: Encryption,
    /// Names in it.
    pub layout: Layout,
    /// The spool's directory, of this stream alone.
    pub directory: PathBuf,
    /// The spool's limits.
    pub limits: SpoolLimits,
    /// A segment is complete at this age.
    pub age_max: Duration,
    /// `archive.required`
    pub required: bool,
    /// Longest pause between two attempts to reach the store.
    pub retry_max: Duration,
}

/// The change log of one session.
#[derive(Debug)]
pub struct Log {
    settings: LogSettings,
    spool: Spool,
    waiting: Vec<Segment>,
}

impl Log {
    /// Opens the spool, with what an earlier session left in it.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn open(settings: LogSettings) -> Result<Self, SpoolError> {
        let (spool, waiting) = Spool::open(&settings.directory, settings.limits)?;
        Ok(Self {
            settings,
            spool,
            waiting,
        })
    }

    /// Where what waits for the store begins.
    pub fn waiting_from(&self) -> Option<PgLsn> {
        self.waiting.first().map(|segment| segment.span.start)
    }

    /// The two tasks: the first ends when batches end, the second when the first has and all is in the store.
    pub fn tasks(
        self,
        batches: mpsc::Receiver<Arc<Batch>>,
        onward: mpsc::Sender<Arc<Batch>>,
        uploaded: watch::Sender<PgLsn>,
        metrics: ArchiveMetrics,
    ) -> (
        impl Future<Output = Result<(), SpoolError>> + Send,
        impl Future<Output = ()> + Send,
    ) {
        // As many as the spool has room for.
        let (complete, segments) = mpsc::unbounded_channel();
        for segment in self.waiting {
            // The receiver is here.
            let _ = complete.send(segment);
        }
        let spooling = Spooling {
            settings: self.settings.clone(),
            spool: self.spool,
            complete,
            metrics: metrics.clone(),
            opened_at: None,
            in_a_gap: false,
        };
        let uploading = Uploading {
            settings: self.settings,
            uploaded,
            metrics,
        };
        (spooling.run(batches, onward), uploading.run(segments))
    }
}

/// Batches into the spool.
struct Spooling {
    settings: LogSettings,
    spool: Spool,
    complete: mpsc::UnboundedSender<Segment>,
    metrics: ArchiveMetrics,
    /// When the segment that is being written began.
    opened_at: Option<Instant>,
    /// The batch before could not be taken.
    in_a_gap: bool,
}

impl Spooling {
    async fn run(
        mut self,
        mut batches: mpsc::Receiver<Arc<Batch>>,
        onward: mpsc::Sender<Arc<Batch>>,
    ) -> Result<(), SpoolError> {
        loop {
            let (growing, due) = self.due();
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due), if growing => self.complete()?,
                batch = batches.recv() => {
                    let Some(batch) = batch else {
                        return self.complete();
                    };
                    tokio::task::block_in_place(|| self.take(&batch))?;
                    failpoint::hit("archive:spooled");
                    if !self.send_on(batch, &onward).await? {
                        // The sink is gone, and says why.
                        return self.complete();
                    }
                }
            }
        }
    }

    /// Whether a segment has begun, and when it is old enough.
    fn due(&self) -> (bool, Instant) {
        let opened_at = self.opened_at.unwrap_or_else(Instant::now);
        (self.opened_at.is_some(), opened_at + self.settings.age_max)
    }

    /// Waits for the replica, while segments grow old all the same.
    async fn send_on(
        &mut self,
        batch: Arc<Batch>,
        onward: &mpsc::Sender<Arc<Batch>>,
    ) -> Result<bool, SpoolError> {
        loop {
            let (growing, due) = self.due();
            tokio::select! {
                biased;
                place = onward.reserve() => {
                    return Ok(place.map(|place| place.send(batch)).is_ok());
                }
                () = tokio::time::sleep_until(due), if growing => self.complete()?,
            }
        }
    }

    fn take(&mut self, batch: &Batch) -> Result<(), SpoolError> {
        if self.spool.would_leave_a_gap(batch.previous) {
            self.complete()?;
        }
        match self.spool.append(&self.settings.author, batch) {
            Ok(()) if self.in_a_gap => {
                tracing::warn!(
                    stream = self.settings.author.stream, from = %batch.previous,
                    "the change log goes on; only a base backup taken from now on leads across the gap"
                );
                self.in_a_gap = false;
            }
            Ok(()) => {}
            // The transaction cannot be applied either.
            Err(error @ SpoolError::Spill(_)) => return Err(error),
            Err(error) => {
                self.leave_out(error)?;
                return self.complete();
            }
        }
        self.opened_at.get_or_insert_with(Instant::now);
        if self.spool.is_full() {
            self.complete()?;
        }
        self.metrics.spool(self.spool.used());
        Ok(())
    }

    /// What the disk did not take is missing from the log; with `archive.required` that ends the session.
    fn leave_out(&mut self, error: SpoolError) -> Result<(), SpoolError> {
        if self.settings.required {
            return Err(error);
        }
        if !self.in_a_gap {
            tracing::error!(
                stream = self.settings.author.stream, error = %chain(&error), hint = error.hint(),
                "the change log has a gap: replication goes on, the archive does not"
            );
            self.metrics.gaps.increment(1);
        }
        self.in_a_gap = true;
        Ok(())
    }

    /// Hands the segment that is being written to the upload.
    fn complete(&mut self) -> Result<(), SpoolError> {
        self.opened_at = None;
        match self.spool.close() {
            Ok(Some(segment)) => {
                // Without an upload it waits in the spool.
                let _ = self.complete.send(segment);
                Ok(())
            }
            Ok(None) => Ok(()),
            // The next start finds it.
            Err(error) => self.leave_out(error),
        }
    }
}

/// Segments into the store.
struct Uploading {
    settings: LogSettings,
    uploaded: watch::Sender<PgLsn>,
    metrics: ArchiveMetrics,
}

impl Uploading {
    async fn run(self, mut segments: mpsc::UnboundedReceiver<Segment>) {
        let mut store = None;
        while let Some(segment) = segments.recv().await {
            let mut attempt = 0;
            let uploaded = loop {
                match self.upload(&mut store, &segment).await {
                    Ok(uploaded) => break uploaded,
                    Err(error) => {
                        attempt += 1;
                        self.failed(&error, &segment, attempt).await;
                    }
                }
            };
            failpoint::hit("archive:uploaded");
            let end = segment.span.end;
            let (raw, stored) = (uploaded.raw_bytes, uploaded.stored_bytes);
            self.metrics.segment(raw, stored, end, now());
            if let Err(error) = segment.remove() {
                // It is uploaded again after the next start, which does no harm.
                tracing::warn!(stream = self.settings.author.stream, error = %chain(&error), "a segment stays in the spool");
            }
            self.uploaded.send_replace(end);
        }
    }

    async fn upload(
        &self,
        store: &mut Option<Store>,
        segment: &Segment,
    ) -> Result<Uploaded, ArchiveError> {
        let store = match store {
            Some(store) => store,
            None => store.insert(Store::open(&self.settings.url, &self.settings.encryption).await?),
        };
        upload(store, &self.settings.layout, segment).await
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
