//! The source task: replication connection to transactions to a bounded queue.
//!
//! ```text
//! walsender ─messages─▶ Assembler ─transaction─▶ [limits.queue_bytes] ─▶ pipeline
//!     ▲                     └─ too large ─▶ spill files
//!     └──── standby status ◀── FlushLsn (watch)
//! ```
//!
//! Large transactions are asked for while they are still running (`streaming`), so that the source need
//! not write them to its disk a second time, and most of one is here when it commits.
//!
//! # Invariants
//! - The walsender is told a [`FlushLsn`] and nothing else.
//! - Status updates go out at least every five seconds, also while the queue is full and nothing is
//!   read, so that a slow replica does not look like a dead agent (`wal_sender_timeout`).
//! - Received and not yet applied transactions hold at most `limits.queue_bytes`; beyond it nothing is
//!   read, and TCP makes the walsender wait. WAL then gathers on the source, where the metrics show it.
//!
//! - While it is behind it reads in bulk; caught up, it reads at once (`pace`).
//!
//! # What it does not do
//! It does not reconnect: its error ends the session, and the pipeline starts the next one from the
//! progress row.

mod pace;
mod subtransactions;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{MissedTickBehavior, Sleep};

use self::pace::Pace;
use crate::error::{Class, Classify};
use crate::failpoint;
use crate::lag::Micros;
use crate::ledger::FlushLsn;
use crate::pg::replication::{
    ReplicationConnection, ReplicationMessage, ReplicationReader, StatusSender,
};
use crate::pg::{ConnInfo, PgError, PgLsn, Session};
use crate::spill::{SpillError, SpillSpace, Spills};
use crate::stream::StreamName;
use crate::txn::{AssembleError, Assembler, Complete, Ended, Transaction};

/// Well below the smallest sensible `wal_sender_timeout` (its default is 60 s).
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// The questions asked in passing take milliseconds; a source that needs longer is in trouble.
const STATEMENT_TIMEOUT: &str = "60s";

/// What the source task needs to know.
#[derive(Clone, Debug)]
pub struct SourceSettings {
    /// How to reach the source, with the database.
    pub conninfo: ConnInfo,
    /// Slot and publication.
    pub stream: StreamName,
    /// Where to begin: the end of the last applied transaction.
    pub start: PgLsn,
    /// Whether values may come in binary form.
    pub binary: bool,
    /// `limits.queue_bytes`
    pub queue_bytes: u64,
    /// `limits.transaction_bytes`
    pub transaction_bytes: u64,
}

/// Why the stream ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The connection failed, or the server refused.
    #[error("replicate from the source")]
    Pg(#[from] PgError),
    /// The messages make no sense.
    #[error("read the change stream")]
    Assemble(#[from] AssembleError),
    /// A large transaction could not be put on disk.
    #[error("keep a large transaction")]
    Spill(#[from] SpillError),
    /// The source does not know whether a subtransaction was rolled back.
    #[error("the source does not know what became of subtransaction {subxid}")]
    UnknownFate {
        /// Its transaction id on the source.
        subxid: i64,
    },
    /// The server that was asked has not seen the transaction's commit.
    #[error("the server that answers ordinary sessions has not come to {end_lsn} yet")]
    Behind {
        /// Where the transaction's commit ends.
        end_lsn: String,
    },
    /// The server ended the stream; it does so when it shuts down.
    #[error("the source ended the stream")]
    Ended,
}

impl Classify for SourceError {
    fn class(&self) -> Class {
        match self {
            Self::Pg(error) => error.class(),
            Self::Assemble(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::UnknownFate { .. } => Class::Definite,
            Self::Behind { .. } | Self::Ended => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Pg(error) => error.hint(),
            Self::Assemble(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::UnknownFate { .. } => Some(
                "nothing of the transaction was applied; report this with the source's version, and \
                 copy the database anew"
                    .to_owned(),
            ),
            Self::Behind { .. } => Some(
                "source.url must lead every session to the same server".to_owned(),
            ),
            Self::Ended => None,
        }
    }
}

/// A transaction in the queue, with its share of `limits.queue_bytes`.
#[derive(Debug)]
pub struct Received {
    /// The transaction.
    pub transaction: Transaction,
    /// Given back once the transaction is durable, or dropped.
    pub permit: OwnedSemaphorePermit,
}

/// What the source task tells of its position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourcePosition {
    /// The end of the source's WAL as far as the walsender has told.
    pub wal_end: Option<PgLsn>,
    /// Bytes of pgoutput messages received in this session.
    pub bytes: u64,
    /// Whether data is left to gather between two reads, because we are behind.
    pub in_bulk: bool,
}

/// Streams until an error, or until nobody wants transactions any more.
pub async fn run(
    settings: SourceSettings,
    space: SpillSpace,
    queue: mpsc::Sender<Received>,
    flush: watch::Receiver<FlushLsn>,
    position: watch::Sender<SourcePosition>,
) -> Result<(), SourceError> {
    let (reader, status) = open(&settings).await?;
    let budget = usize::try_from(settings.queue_bytes)
        .unwrap_or(usize::MAX)
        .min(Semaphore::MAX_PERMITS)
        .min(u32::MAX as usize);
    let mut task = Task {
        pace: Pace::new(reader.is_local()),
        reader,
        feedback: Feedback { status, flush },
        assembler: Assembler::new(settings.start),
        spills: Spills::new(space),
        transaction_bytes: settings.transaction_bytes,
        ordinary: Session::new(settings.stream.application_name("subtransactions"))
            .set("statement_timeout", STATEMENT_TIMEOUT),
        conninfo: settings.conninfo,
        budget: Arc::new(Semaphore::new(budget)),
        budget_bytes: budget as u64,
        queue,
        here: SourcePosition::default(),
        position,
    };
    let outcome = task.stream().await;
    task.feedback.status.finish().await;
    outcome
}

/// Text output depends on these settings; the apply session ([`crate::sink::replica::session`]) reads
/// with the same.
async fn open(settings: &SourceSettings) -> Result<(ReplicationReader, StatusSender), SourceError> {
    let session = Session::new(settings.stream.application_name("stream"))
        .set("client_encoding", "UTF8")
        .set("DateStyle", "ISO, YMD")
        .set("IntervalStyle", "postgres")
        .set("TimeZone", "UTC")
        .set("extra_float_digits", "3")
        .set("bytea_output", "hex")
        .set("lc_monetary", "C");
    let connection = ReplicationConnection::connect(&settings.conninfo, &session).await?;
    let publication = format!("\"{}\"", settings.stream);
    let mut options = vec![
        // Version 2 has streaming, and every source we support has version 2. What later ones add
        // (two-phase, parallel apply) has no use here.
        ("proto_version", "2"),
        ("streaming", "on"),
        ("publication_names", publication.as_str()),
    ];
    if settings.binary {
        options.push(("binary", "true"));
    }
    Ok(connection
        .start_replication(settings.stream.as_str(), settings.start, &options)
        .await?)
}

struct Task {
    reader: ReplicationReader,
    pace: Pace,
    feedback: Feedback,
    assembler: Assembler,
    spills: Spills,
    transaction_bytes: u64,
    conninfo: ConnInfo,
    /// For the questions that a walsender cannot answer while it streams.
    ordinary: Session,
    budget: Arc<Semaphore>,
    budget_bytes: u64,
    queue: mpsc::Sender<Received>,
    /// As far as this task has come, and what it last told of that.
    here: SourcePosition,
    position: watch::Sender<SourcePosition>,
}

struct Feedback {
    status: StatusSender,
    flush: watch::Receiver<FlushLsn>,
}

impl Feedback {
    async fn send(&mut self) -> Result<(), SourceError> {
        let flush = self.flush.borrow_and_update().lsn();
        Ok(self.status.send(flush, flush, flush, false).await?)
    }

    /// Keeps the walsender informed for as long as `waiting` takes.
    async fn during<T>(
        &mut self,
        waiting: impl Future<Output = T> + Send,
    ) -> Result<T, SourceError> {
        tokio::pin!(waiting);
        let mut due = tokio::time::interval(STATUS_EVERY);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        due.reset();
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return Ok(done),
                _ = due.tick() => self.send().await?,
            }
        }
    }
}

async fn over(pause: &mut Option<Pin<Box<Sleep>>>) {
    if let Some(sleep) = pause {
        sleep.as_mut().await;
    }
}

impl Task {
    async fn stream(&mut self) -> Result<(), SourceError> {
        let mut due = tokio::time::interval(STATUS_EVERY);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pause: Option<Pin<Box<Sleep>>> = None;
        loop {
            tokio::select! {
                biased;
                // 1. Acknowledge what has become durable; the source may forget its WAL. All four
                //    futures may be dropped at any point: nothing is lost.
                changed = self.feedback.flush.changed() => {
                    self.feedback.send().await?;
                    failpoint::hit("source:acknowledged");
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                // 2. Sign of life.
                _ = due.tick() => self.feedback.send().await?,
                // 3. Letting data gather.
                () = over(&mut pause), if pause.is_some() => pause = None,
                // 4. Work.
                message = self.reader.next(), if pause.is_none() => {
                    let Some(message) = message? else { return Err(SourceError::Ended) };
                    if !self.take(message).await? || !self.take_buffered().await? {
                        return Ok(());
                    }
                    pause = self.pace.pause(self.reader.drained()).map(|length| {
                        self.reader.rest();
                        Box::pin(tokio::time::sleep(length))
                    });
                    self.here.in_bulk = pause.is_some();
                    // Once for all of them: telling costs more than a message does.
                    self.position.send_replace(self.here);
                }
            }
        }
    }

    /// Takes what has been read already without going back to the socket.
    async fn take_buffered(&mut self) -> Result<bool, SourceError> {
        while let Some(message) = self.reader.next_buffered()? {
            if !self.take(message).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes one message; false if nobody wants transactions any more.
    async fn take(&mut self, message: ReplicationMessage) -> Result<bool, SourceError> {
        match message {
            ReplicationMessage::Keepalive {
                wal_end,
                reply_requested,
                ..
            } => {
                self.at(wal_end, 0);
                if reply_requested {
                    self.feedback.send().await?;
                }
                Ok(true)
            }
            ReplicationMessage::WalData {
                wal_end,
                sent_at,
                data,
                ..
            } => {
                self.at(wal_end, data.len() as u64);
                self.pace.received(data.len() as u64);
                self.message(data, sent_at).await
            }
        }
    }

    fn at(&mut self, wal_end: PgLsn, bytes: u64) {
        self.here.wal_end = self.here.wal_end.max(Some(wal_end));
        self.here.bytes += bytes;
    }

    async fn message(&mut self, data: Bytes, sent_at: Micros) -> Result<bool, SourceError> {
        match self.assembler.push(data)? {
            None => {
                self.relieve()?;
                Ok(true)
            }
            Some(Ended::Committed(complete)) => {
                self.pace.committed(complete.commit_time(), sent_at);
                self.hand_over(*complete).await
            }
            Some(Ended::Aborted { xid }) => {
                self.spills.discard(xid);
                Ok(true)
            }
        }
    }

    /// Moves changes to disk until what is in memory is within the limit.
    fn relieve(&mut self) -> Result<(), SourceError> {
        while self.assembler.pending_bytes() > self.transaction_bytes {
            let Some(xid) = self.assembler.largest_open() else {
                break;
            };
            let pending = self.assembler.take_pending(xid);
            tokio::task::block_in_place(|| self.spills.append(xid, &pending))?;
        }
        Ok(())
    }

    /// Drops what was rolled back and what the walsender has not told of as such.
    async fn settle(&mut self, complete: &mut Complete) -> Result<(), SourceError> {
        let subtransactions: Vec<u32> = complete.subtransactions().collect();
        if subtransactions.is_empty() {
            return Ok(());
        }
        let asking = Box::pin(subtransactions::rolled_back(
            &self.conninfo,
            &self.ordinary,
            &subtransactions,
            complete.end_lsn(),
        ));
        let rolled_back = self.feedback.during(asking).await??;
        if !rolled_back.is_empty() {
            tracing::info!(
                xid = complete.xid(),
                subtransactions = rolled_back.len(),
                "left out what the source has rolled back without telling"
            );
        }
        for subxid in rolled_back {
            complete.abort(subxid);
        }
        Ok(())
    }

    async fn hand_over(&mut self, mut complete: Complete) -> Result<bool, SourceError> {
        self.settle(&mut complete).await?;
        let (mut transaction, aborted) = complete.into_transaction();
        let xid = transaction.xid;
        if self.spills.holds(xid) {
            let spills = &mut self.spills;
            transaction.spilled = tokio::task::block_in_place(|| spills.finish(xid, aborted))?;
        }
        // A single transaction above the whole budget takes all of it.
        let bytes = transaction.bytes.clamp(1, self.budget_bytes);
        let bytes = u32::try_from(bytes).expect("the budget fits");
        let budget = Arc::clone(&self.budget);
        let permit = self
            .feedback
            .during(async move { budget.acquire_many_owned(bytes).await })
            .await?
            .expect("the semaphore is never closed");
        let queue = self.queue.clone();
        let sent = self
            .feedback
            .during(async move {
                queue
                    .send(Received {
                        transaction,
                        permit,
                    })
                    .await
            })
            .await?;
        Ok(sent.is_ok())
    }
}
