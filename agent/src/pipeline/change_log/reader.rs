//! Reads the source only for the change log, through a copy of the slot, while the pipeline does not keep up with it.
//!
//! # Invariants
//! - The stream's own slot is neither used nor moved.
//! - It ends by itself once the pipeline has been at the front for a while, or nothing can be taken.
//!
//! # What it does not do
//! It copies no tables and applies nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::log::{LogHandle, Origin, SpoolError, TakenBatch};
use crate::config::Config;
use crate::error::{Class, Classify};
use crate::flow::ledger::BatchNumber;
use crate::flow::shipment::Shipment;
use crate::flow::spill::{self, SpillError, SpillSpace};
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::setup::Logged;
use crate::source::{
    self, IntakeLimits, MadeOf, Received, SlotUse, SourceError, SourcePosition, SourceSettings,
};
use crate::watch::Servers;
use crate::watch::monitor;

/// How often it is looked whether the pipeline is at the front again.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Why the reading has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogReaderError {
    #[error("read the source for the change log")]
    Source(#[from] SourceError),
    #[error("watch the source for the change log")]
    Monitor(#[source] PgError),
    #[error("open the spill directory")]
    Spill(#[from] SpillError),
    #[error("keep the change log for the archive")]
    Spool(#[from] SpoolError),
    #[error("another change log has begun")]
    Ended,
}

impl Classify for LogReaderError {
    fn class(&self) -> Class {
        match self {
            Self::Source(error) => error.class(),
            Self::Monitor(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Spool(error) => error.class(),
            Self::Ended => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Source(error) => error.hint(),
            Self::Monitor(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::Ended => None,
        }
    }
}

/// One reading.
pub(super) struct LogReader<'a> {
    pub(super) config: &'a Arc<Config>,
    pub(super) database: &'a str,
    pub(super) stream: &'a StreamName,
    pub(super) log: &'a LogHandle,
    pub(super) found: &'a Logged,
    /// How long the pipeline must be at the front.
    pub(super) lead: Duration,
    pub(super) end: &'a CancellationToken,
}

type Tasks = JoinSet<Result<(), LogReaderError>>;

impl LogReader<'_> {
    /// Reads from where the log ends, until it is not needed any more, or told to end.
    pub(super) async fn read(&self) -> Result<(), LogReaderError> {
        let start = self.log.reach().position;
        let mut tasks = Tasks::new();
        let outcome = self.read_with(&mut tasks).await;
        // The next reading works with the same files.
        tasks.shutdown().await;
        if outcome.is_ok() {
            let position = self.log.reach().position;
            tracing::info!(database = self.database, from = %start, to = %position, "read the change log apart");
        }
        outcome
    }

    async fn read_with(&self, tasks: &mut Tasks) -> Result<(), LogReaderError> {
        let start = self.log.reach().position;
        tracing::info!(
            database = self.database, from = %start,
            "the change log goes on by itself: nothing has come to it for a while"
        );
        let (began, limits) = (Instant::now(), &self.config.limits);
        let (bytes, changes) = (limits.batch_bytes, limits.batch_changes);
        let mut shipment = Shipment::resume(BatchNumber(0), start, bytes, changes);
        let (flush, flush_seen) = watch::channel(shipment.flush_lsn());
        let (received, mut transactions) = source::queue();
        // Whoever looks at positions looks at the pipeline's.
        let (position, _) = watch::channel(SourcePosition::default());
        let (reports, mut reported) = mpsc::channel(4);
        let source = self.config.source.conninfo.with_dbname(self.database);
        let settings = SourceSettings {
            conninfo: source.clone(),
            stream: self.stream.clone(),
            slot: SlotUse::Copy,
            start,
            binary: self.found.binary,
            limits: IntakeLimits::of(limits),
            catch_up_bytes: limits.catch_up_bytes,
            types: MadeOf::default(),
        };
        let space = SpillSpace::open(self.spill_directory(), limits.spill_bytes)?;
        tasks.spawn(async move {
            let reading = source::run(settings, space, received, flush_seen, position);
            Ok(Box::pin(reading).await?)
        });
        let (config, stream) = (Arc::clone(self.config), self.stream.clone());
        tasks.spawn(async move {
            // A quiet source needs a heartbeat, or no moment of it could be told to be reached.
            let watching =
                monitor::run(&config, &source, &stream, &Servers::default(), reports).await;
            watching.map_err(LogReaderError::Monitor)
        });
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let received: Received = tokio::select! {
                biased;
                () = self.end.cancelled() => return Ok(()),
                Some(ended) = tasks.join_next() => {
                    // A task that was lost has said why elsewhere.
                    ended.unwrap_or(Ok(()))?;
                    return Err(LogReaderError::Ended);
                }
                _ = look.tick() => {
                    if self.log.reach().pipeline_leads(began, Instant::now(), self.lead) {
                        return Ok(());
                    }
                    continue;
                }
                Some(_) = reported.recv() => continue,
                Some(received) = transactions.recv() => received,
            };
            shipment.receive(received);
            while let Ok(received) = transactions.try_recv() {
                shipment.receive(received);
            }
            while let Some(batch) = shipment.ship() {
                let (number, batch) = (batch.number, Arc::new(batch));
                let offered = tokio::select! {
                    offered = self.log.offer(&batch, Origin::Apart) => offered,
                    () = self.end.cancelled() => return Ok(()),
                };
                match offered.map_err(|_| LogReaderError::Ended)?? {
                    TakenBatch::Yes => {}
                    // Said by the log.
                    TakenBatch::LeftOut => return Ok(()),
                    TakenBatch::Ahead => return Err(LogReaderError::Ended),
                }
                if let Some(durable) = shipment.durable(number) {
                    flush.send_replace(durable);
                }
            }
        }
    }

    /// Beside the pipeline's own.
    fn spill_directory(&self) -> PathBuf {
        let own = spill::directory_of(&self.config.limits.spill_directory, self.stream);
        own.with_extension("log")
    }
}
