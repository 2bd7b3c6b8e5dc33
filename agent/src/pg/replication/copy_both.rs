//! The stream after `START_REPLICATION`: WAL data and keepalives in, status updates out.
//!
//! Reader and sender are apart, so that keepalives can be answered while the reader's owner is
//! blocked. The walsender issues one `send` per message, and waking for each doubles the cost on both
//! sides: to read in bulk, take everything [`ReplicationReader::next_buffered`] has, call
//! [`ReplicationReader::rest`], let a few milliseconds of data gather (not on a Unix socket:
//! [`ReplicationReader::is_local`]), and only then call [`ReplicationReader::next`] again.
//!
//! # Invariants
//! - Both halves are cancel-safe: a message half read or half written is finished by the next call.
//!
//! # What it does not do
//! It does not know which position may be acknowledged.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::frames::{Frame, WalFrames};
use super::half::Half;
use crate::pg::{PgError, PgLsn};

/// 2000-01-01 00:00 UTC, PostgreSQL's epoch, after 1970's.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// A peer that does not take our goodbye within this time is gone.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// A message of the walsender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicationMessage {
    /// One message of the output plugin.
    WalData {
        /// Where the WAL behind this message begins; zero where the plugin gives none.
        start: PgLsn,
        /// The end of the server's WAL when it sent this.
        wal_end: PgLsn,
        /// Microseconds since 2000-01-01 UTC by the server's clock.
        sent_at: i64,
        /// A slice of the block it arrived in. Who keeps it long should copy it.
        data: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// Up to here the server has sent everything there is for us.
        wal_end: PgLsn,
        /// Microseconds since 2000-01-01 UTC by the server's clock.
        sent_at: i64,
        /// Without an answer soon the server gives us up for dead.
        reply_requested: bool,
    },
}

impl ReplicationMessage {
    fn parse(mut body: Bytes) -> Result<Self, PgError> {
        match body.try_get_u8() {
            Ok(b'w') if body.len() >= 24 => Ok(Self::WalData {
                start: PgLsn::from(body.get_u64()),
                wal_end: PgLsn::from(body.get_u64()),
                sent_at: body.get_i64(),
                data: body,
            }),
            Ok(b'k') if body.len() >= 17 => Ok(Self::Keepalive {
                wal_end: PgLsn::from(body.get_u64()),
                sent_at: body.get_i64(),
                reply_requested: body.get_u8() != 0,
            }),
            Ok(tag) => Err(PgError::Protocol(format!(
                "replication message {tag:#04x} of {} bytes",
                body.len() + 1
            ))),
            Err(_) => Err(PgError::Protocol("an empty replication message".to_owned())),
        }
    }
}

/// The reading half.
pub struct ReplicationReader {
    stream: Half,
    frames: WalFrames,
    local: bool,
}

impl ReplicationReader {
    pub(super) fn new(stream: Half, frames: WalFrames, local: bool) -> Self {
        Self {
            stream,
            frames,
            local,
        }
    }

    /// Whether the connection is a Unix socket, which holds far less unread data than a network one.
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// Waits for the next message; `None` when the server ended the stream. Cancel-safe.
    ///
    /// # Errors
    /// [`PgError::Server`] for what the server gives as its reason (slot invalidated, walsender
    /// terminated, shutdown), [`PgError::Io`] or [`PgError::Closed`] when the connection breaks.
    pub async fn next(&mut self) -> Result<Option<ReplicationMessage>, PgError> {
        loop {
            let Some(frame) = self.frames.next(&mut self.stream).await? else {
                return Err(PgError::Closed);
            };
            match message(frame)? {
                Read::Message(message) => return Ok(Some(message)),
                Read::Other => {}
                Read::End => return Ok(None),
            }
        }
    }

    /// Lets data gather: until the next [`ReplicationReader::next`] nobody is woken for what arrives (except
    /// on a Unix socket). Not while `next` is being waited for.
    pub fn rest(&self) {
        self.stream.rest();
    }

    /// Whether the last read took all that had arrived; if not, the next one finds more at once.
    pub fn drained(&self) -> bool {
        self.frames.drained()
    }

    /// The next message that is already here as a whole, without waiting or reading.
    pub fn next_buffered(&mut self) -> Result<Option<ReplicationMessage>, PgError> {
        // The end of the stream is left for `next`, where `None` says so.
        while !self.frames.at_end() {
            let Some(frame) = self.frames.buffered()? else {
                break;
            };
            if let Read::Message(message) = message(frame)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }
}

enum Read {
    Message(ReplicationMessage),
    /// Something that needs no attention.
    Other,
    End,
}

fn message(frame: Frame) -> Result<Read, PgError> {
    match frame {
        Frame::CopyData(body) => ReplicationMessage::parse(body).map(Read::Message),
        Frame::ParameterStatus { .. } => Ok(Read::Other),
        // An orderly shutdown of the server ends the command without the end of the copy.
        Frame::CopyDone | Frame::Done | Frame::Ready => Ok(Read::End),
        Frame::Error(error) => Err(PgError::Server(error)),
        other => Err(other.unexpected("the replication stream")),
    }
}

/// The writing half.
pub struct StatusSender {
    stream: Outbox<Half>,
}

impl StatusSender {
    pub(super) fn new(stream: Half) -> Self {
        Self {
            stream: Outbox {
                stream,
                pending: BytesMut::new(),
            },
        }
    }

    /// Tells the server what was received, what is durable (this moves the slot) and what is applied.
    /// Cancel-safe.
    pub async fn send(
        &mut self,
        written: PgLsn,
        flushed: PgLsn,
        applied: PgLsn,
        reply_requested: bool,
    ) -> Result<(), PgError> {
        let status = StandbyStatus {
            written,
            flushed,
            applied,
            sent_at: now(),
            reply_requested,
        };
        status.write(&mut self.stream.pending);
        self.stream.drain().await.map_err(PgError::Io)
    }

    /// Ends the stream from our side. Best effort: the server notices a closed connection as well.
    pub async fn finish(mut self) {
        let pending = &mut self.stream.pending;
        postgres_protocol::message::frontend::copy_done(pending);
        postgres_protocol::message::frontend::terminate(pending);
        match tokio::time::timeout(FINISH_TIMEOUT, self.stream.drain()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "end of the replication stream not sent"),
            Err(_) => tracing::debug!("end of the replication stream not sent in time"),
        }
    }
}

/// Bytes on their way; a cancelled write goes on where it stopped.
struct Outbox<W> {
    stream: W,
    pending: BytesMut,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    async fn drain(&mut self) -> std::io::Result<()> {
        self.stream.write_all_buf(&mut self.pending).await?;
        self.stream.flush().await
    }
}

/// PostgreSQL documentation, "Standby status update".
struct StandbyStatus {
    written: PgLsn,
    flushed: PgLsn,
    applied: PgLsn,
    sent_at: i64,
    reply_requested: bool,
}

impl StandbyStatus {
    fn write(&self, out: &mut BytesMut) {
        // Tag, then the length of itself and the body: 'r', three positions, clock, flag.
        out.put_u8(b'd');
        out.put_u32(4 + 1 + 4 * 8 + 1);
        out.put_u8(b'r');
        out.put_u64(self.written.into());
        out.put_u64(self.flushed.into());
        out.put_u64(self.applied.into());
        out.put_i64(self.sent_at);
        out.put_u8(self.reply_requested.into());
    }
}

/// Microseconds since 2000-01-01 UTC by our clock. The server shows it in
/// `pg_stat_replication.reply_time` and decides nothing by it, so a wrong clock does no harm.
#[expect(
    clippy::disallowed_methods,
    reason = "what the server is told, as the protocol wants it"
)]
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH + POSTGRES_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_micros()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wal_data_and_keepalives_are_told_apart() {
        let mut body = BytesMut::new();
        body.put_u8(b'w');
        body.put_u64(0x16_0000_0001);
        body.put_u64(0x16_0000_0002);
        body.put_i64(-3);
        body.put_slice(b"data");
        assert_eq!(
            ReplicationMessage::parse(body.freeze()).unwrap(),
            ReplicationMessage::WalData {
                start: PgLsn::from(0x16_0000_0001),
                wal_end: PgLsn::from(0x16_0000_0002),
                sent_at: -3,
                data: Bytes::from_static(b"data"),
            }
        );
        let mut body = BytesMut::new();
        body.put_u8(b'k');
        body.put_u64(9);
        body.put_i64(8);
        body.put_u8(1);
        assert_eq!(
            ReplicationMessage::parse(body.freeze()).unwrap(),
            ReplicationMessage::Keepalive {
                wal_end: PgLsn::from(9),
                sent_at: 8,
                reply_requested: true,
            }
        );
    }

    #[test]
    fn a_status_update_has_the_documented_layout() {
        let mut out = BytesMut::new();
        let status = StandbyStatus {
            written: PgLsn::from(3),
            flushed: PgLsn::from(2),
            applied: PgLsn::from(1),
            sent_at: 7,
            reply_requested: true,
        };
        status.write(&mut out);
        assert_eq!(out.len(), 1 + 4 + 34);
        assert_eq!(&out[..6], b"d\0\0\0\x26r");
        assert_eq!(&out[6..14], 3_u64.to_be_bytes());
        assert_eq!(&out[14..22], 2_u64.to_be_bytes());
        assert_eq!(&out[22..30], 1_u64.to_be_bytes());
        assert_eq!(&out[30..38], 7_i64.to_be_bytes());
        assert_eq!(out[38], 1);
    }

    #[tokio::test]
    async fn a_write_that_was_cancelled_is_finished_by_the_next_one() {
        use tokio::io::AsyncReadExt as _;
        let (stream, mut server) = tokio::io::duplex(3);
        let mut outbox = Outbox {
            stream,
            pending: BytesMut::from(&b"first message"[..]),
        };
        // The pipe takes three bytes and then blocks.
        assert!(futures_util::FutureExt::now_or_never(outbox.drain()).is_none());
        outbox.pending.put_slice(b", second");
        let reader = tokio::spawn(async move {
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            text
        });
        outbox.drain().await.unwrap();
        drop(outbox);
        assert_eq!(reader.await.unwrap(), "first message, second");
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_replication_message_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..60)
        ) {
            let outcome = ReplicationMessage::parse(Bytes::from(bytes.clone()));
            let whole = match bytes.first() {
                Some(b'w') => bytes.len() >= 25,
                Some(b'k') => bytes.len() >= 18,
                _ => false,
            };
            prop_assert_eq!(outcome.is_ok(), whole);
        }
    }
}
