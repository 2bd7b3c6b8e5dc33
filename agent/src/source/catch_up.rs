//! Catching up: a large backlog is read through SQL, window by window.
//!
//! ```text
//! our slot ──copy──▶ temporary slot ──pg_logical_slot_get_binary_changes(… up to the window's end)──▶ COPY ──▶ Intake
//!     ▲ pg_replication_slot_advance(FlushLsn)
//! ```
//!
//! A walsender issues one `send` per message and decodes no further until it has been taken. The function
//! decodes a whole window at full speed, and COPY sends it in large pieces: a backlog of small transactions
//! costs the source about half as much (`bench/README.md`).
//!
//! # Invariants
//! - Our own slot moves to what is durable and no further. The copy is the session's own, and gone with it; it begins where
//!   the last transaction ended, whoever may have moved the slot while nobody held it.
//! - The function puts a window's changes into a temporary file on the source before it returns the first. No
//!   window ends further than [`REACH_MAX`](super::positions) from where its decoding begins, so the file holds no more
//!   than so much WAL does, whatever the transactions are; values that were stored compressed take more there.
//! - A change of more than [`CHANGE_BYTES_MAX`] ends the windows: the walsender goes on from the end of the last whole transaction.
//! - The query holds a snapshot, which keeps VACUUM from its work: a window that is not taken within
//!   [`WINDOW_TIME_MAX`] is given up.
//! - Whatever the source refuses here is no error of the replication: the walsender goes on from the end of
//!   the last whole transaction.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::binary_copy::BinaryCopyOutStream;
use tokio_postgres::types::Type;
use tokio_util::task::AbortOnDropHandle;

use super::backlog::{Positions, first_size};
use super::feedback::{Feedback, HeldSlot, Listener, ticks};
use super::intake::{Intake, TakenIn};
use super::{Next, Reader, SourceError, SourceSettings, begins_at};
use crate::failpoint;
use crate::flow::ledger::FlushLsn;
use crate::pg::{self, PgError, PgLsn, Session, slot};

/// Once only this part of `limits.catch_up_bytes` is left, one in so many, the walsender goes on.
const NEARLY: u64 = 8;

/// WAL in the largest window, in bytes.
const WINDOW_MAX: u64 = 256 << 20;

/// For the source's decoding and our taking of one window.
const WINDOW_TIME_MAX: Duration = Duration::from_secs(60);

/// What a window may be expected to take: far enough below that a busy replica does not end it.
const WINDOW_TIME: Duration = Duration::from_secs(20);

/// A larger change is left to the walsender, whose messages are in memory once; a row of a result is there three times.
const CHANGE_BYTES_MAX: usize = 4 << 20;

/// Rows handed on at a time, at most; usually as many as one read of the socket brought.
const ROWS_MAX: usize = 512;

/// Rows are kept in blocks of this many bytes.
const BLOCK_BYTES: usize = 32 * 1024;

/// Groups of rows between the session and the intake.
const ROWS_AHEAD: usize = 4;

/// The last window's changes are applied so soon. An archive that is required may be away for hours: the slot waits for it
/// then, and the replica must not.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(5);

/// A walsender of ours that was told to end needs a moment.
const SLOT_FREE_MAX: Duration = Duration::from_secs(10);

/// Moving the slot reads the WAL in between; copying one takes milliseconds.
const STATEMENT_TIMEOUT: &str = "60s";

/// Reads the backlog, if it is worth it and the source allows it.
pub(super) async fn read(
    settings: &SourceSettings,
    intake: &mut Intake,
    flush: watch::Receiver<FlushLsn>,
) -> Result<Next, SourceError> {
    match windows(settings, intake, flush).await {
        Ok(next) => Ok(next),
        Err(SourceError::Pg(error @ (PgError::Server(_) | PgError::Timeout { .. }))) => {
            tracing::warn!(
                stream = %settings.stream, %error,
                "the backlog cannot be read in windows; the walsender goes on"
            );
            Ok(Next::OnlyWalsender)
        }
        Err(error) => Err(error),
    }
}

async fn windows(
    settings: &SourceSettings,
    intake: &mut Intake,
    flush: watch::Receiver<FlushLsn>,
) -> Result<Next, SourceError> {
    let application = settings.stream.application_name("catch-up");
    let session = Session::new(application).set("statement_timeout", STATEMENT_TIMEOUT);
    let client = pg::connect(&settings.conninfo, &session).await?;
    let Some(slot) = free(&client, settings.stream.as_str()).await? else {
        return Ok(Next::Walsender);
    };
    let worth = settings.catch_up_bytes;
    // Before anything is asked of the slot: moving one reads the WAL from where its decoding begins, too.
    if !slot.is_far_behind(intake.end_lsn(), worth) {
        return Ok(Next::Walsender);
    }
    let own = HeldSlot::new(client, settings.stream.clone(), slot.confirmed);
    let mut feedback = Feedback::new(flush, Listener::Slot(own));
    feedback.send().await?;
    let backlog = Backlog::open(settings, intake.end_lsn()).await?;
    tracing::info!(
        stream = %settings.stream, bytes = slot.behind(intake.end_lsn()),
        "far behind: reading the backlog in windows"
    );
    let mut size = first_size(worth);
    loop {
        let positions = backlog.positions().await?;
        let Some(end) = positions.window(intake.end_lsn(), size, worth / NEARLY) else {
            // The walsender would decode again whatever is not acknowledged. A moment's wait costs less.
            if !feedback
                .until(intake.end_lsn(), ACKNOWLEDGED_WITHIN)
                .await?
            {
                return Ok(Next::End);
            }
            let positions = backlog.positions().await?;
            let more = positions.window(intake.end_lsn(), size, worth);
            if more.is_none() {
                break;
            }
            continue;
        };
        tracing::debug!(
            stream = %settings.stream, from = %intake.end_lsn(), to = %end,
            decoding_from = %positions.restart, "reading a window"
        );
        intake.at(positions.written);
        intake.here.reader = Reader::CatchUp;
        intake.tell();
        let began = Instant::now();
        match take(backlog.window(end), intake, &mut feedback).await? {
            WindowEnd::Read => {}
            WindowEnd::Unwanted => return Ok(Next::End),
            WindowEnd::TooLarge => {
                tracing::info!(
                    stream = %settings.stream,
                    "a change is too large for a window; the walsender goes on"
                );
                return Ok(Next::OnlyWalsender);
            }
        }
        failpoint::hit("source:window-taken");
        size = next_size(size, began.elapsed());
    }
    tracing::info!(stream = %settings.stream, "the backlog is read");
    failpoint::hit("source:caught-up");
    Ok(Next::Walsender)
}

/// Where the slot stands, once nobody uses it; none where it is not to be had, or this server is a standby.
async fn free(client: &Client, slot: &str) -> Result<Option<Positions>, PgError> {
    let deadline = Instant::now() + SLOT_FREE_MAX;
    loop {
        let found = Positions::of(client, slot).await?;
        match found {
            Some(positions) if positions.active && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            // The walsender that is refused as well says who has it.
            Some(positions) if positions.active => return Ok(None),
            found => return Ok(found),
        }
    }
}

/// The size of the window after one of `size` that took so long.
fn next_size(size: u64, took: Duration) -> u64 {
    let in_time = u128::from(size) * WINDOW_TIME.as_millis() / took.as_millis().max(1);
    let in_time = u64::try_from(in_time).unwrap_or(u64::MAX);
    (2 * size).min(in_time).clamp(1, WINDOW_MAX)
}

/// Takes one window; breaks off when nobody wants transactions any more.
async fn take(
    mut window: Window,
    intake: &mut Intake,
    feedback: &mut Feedback,
) -> Result<WindowEnd, SourceError> {
    let mut due = ticks();
    loop {
        tokio::select! {
            biased;
            _ = due.tick() => feedback.send().await?,
            rows = window.rows.recv() => {
                let Some(rows) = rows else { break };
                for data in rows {
                    if intake.take(data, feedback).await? == TakenIn::Unwanted {
                        return Ok(WindowEnd::Unwanted);
                    }
                }
                intake.tell();
            }
        }
    }
    match window.reading.await {
        Ok(read) => Ok(read?),
        Err(_) => Err(SourceError::Ended),
    }
}

/// The session that reads the backlog, with its slot.
struct Backlog {
    client: Arc<Client>,
    slot: String,
    /// Options of the output plugin as arguments of the function.
    options: String,
}

/// One window that is being read.
struct Window {
    rows: mpsc::Receiver<Vec<Bytes>>,
    reading: AbortOnDropHandle<Result<WindowEnd, PgError>>,
}

/// How a window ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WindowEnd {
    /// Everything was handed over.
    Read,
    /// Before a change that is too large for a window.
    TooLarge,
    /// Nobody wants transactions any more.
    Unwanted,
}

impl Backlog {
    /// A copy of our slot that begins at `start`: what is received need not be durable yet.
    async fn open(settings: &SourceSettings, start: PgLsn) -> Result<Self, SourceError> {
        let session = Session::new(settings.stream.application_name("backlog"));
        let client = pg::connect(&settings.conninfo, &session).await?;
        // An earlier agent's session may not be gone yet, and its slot neither.
        const COPY: &str = "
            SELECT slot_name::text, lsn FROM pg_catalog.pg_copy_logical_replication_slot(
                $1::text::name, pg_catalog.format('dr_agent_backlog_%s', pg_catalog.pg_backend_pid())::name, true)";
        let row = client
            .query_one(COPY, &[&settings.stream.as_str()])
            .await
            .map_err(PgError::from)?;
        let (name, confirmed): (String, PgLsn) = (row.get(0), row.get(1));
        begins_at(settings, confirmed, start)?;
        if confirmed < start {
            slot::advance(&client, &name, start).await?;
        }
        let binary = if settings.binary {
            ", 'binary', 'true'"
        } else {
            ""
        };
        Ok(Self {
            client: Arc::new(client),
            slot: name,
            options: format!(
                "'proto_version', '1', 'publication_names', '\"{}\"'{binary}",
                settings.stream
            ),
        })
    }

    /// Where the copy stands. Without it nothing can be read.
    async fn positions(&self) -> Result<Positions, PgError> {
        Positions::of(&self.client, &self.slot)
            .await?
            .ok_or_else(|| PgError::Protocol("the copy of the slot is gone".to_owned()))
    }

    /// Begins to read up to the first commit at or beyond `end`.
    fn window(&self, end: PgLsn) -> Window {
        let sql = format!(
            "COPY (SELECT CASE WHEN pg_catalog.length(data) <= {CHANGE_BYTES_MAX} THEN data END \
             FROM pg_catalog.pg_logical_slot_get_binary_changes('{}', '{end}', NULL, {})) \
             TO STDOUT (FORMAT binary)",
            self.slot, self.options
        );
        let (sender, rows) = mpsc::channel(ROWS_AHEAD);
        let client = Arc::clone(&self.client);
        // A task of its own: it keeps its deadline also while the intake waits for room.
        let reading = tokio::spawn(async move {
            tokio::time::timeout(WINDOW_TIME_MAX, rows_of(&client, &sql, sender))
                .await
                .unwrap_or(Err(PgError::Timeout {
                    doing: "read a window of the backlog",
                    after: WINDOW_TIME_MAX,
                }))
        });
        Window {
            rows,
            reading: AbortOnDropHandle::new(reading),
        }
    }
}

async fn rows_of(
    client: &Client,
    sql: &str,
    sender: mpsc::Sender<Vec<Bytes>>,
) -> Result<WindowEnd, PgError> {
    let copy = client.copy_out(sql).await?;
    let rows = BinaryCopyOutStream::new(copy, &[Type::BYTEA]);
    let mut groups = pin!(rows.ready_chunks(ROWS_MAX));
    // One block of memory for many rows.
    let mut block = BytesMut::new();
    while let Some(group) = groups.next().await {
        let mut data = Vec::with_capacity(group.len());
        let mut ended = None;
        for row in group {
            let row = row?;
            let Some(change) = row.try_get::<Option<&[u8]>>(0)? else {
                ended = Some(WindowEnd::TooLarge);
                break;
            };
            if block.capacity() < change.len() {
                block.reserve(BLOCK_BYTES.max(change.len()));
            }
            block.put_slice(change);
            data.push(block.split().freeze());
        }
        if sender.send(data).await.is_err() {
            return Ok(WindowEnd::Unwanted);
        }
        if let Some(ended) = ended {
            return Ok(ended);
        }
    }
    Ok(WindowEnd::Read)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn windows_grow_as_long_as_they_are_taken_in_time() {
        let next = |size, seconds| next_size(size * MIB, Duration::from_secs(seconds)) / MIB;
        assert_eq!(next(8, 0), 16);
        assert_eq!(next(8, 10), 16);
        assert_eq!(next(8, 16), 10);
        assert_eq!(next(30, 40), 15);
        assert_eq!(next(200, 1), 256);
    }
}
