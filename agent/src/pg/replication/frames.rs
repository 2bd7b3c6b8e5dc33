//! Cuts the walsender's bytes into messages.
//!
//! One buffer of blocks: bytes are read in bulk, and WAL data leaves as slices of the block it arrived
//! in, without a copy. `CopyBothResponse` and the messages inside CopyBoth, which `postgres-protocol`
//! does not know or reads too generally, are told apart here by their tag; the rest is left to it.
//!
//! # Invariants
//! - No bytes from the network can make this panic, or reserve more than [`MESSAGE_BYTES_MAX`].
//! - A slice keeps its block alive. A block is filled to its end before the next is begun, so blocks
//!   hold little that nobody asked for; a block for one oversized message serves that message only.
//! - [`WalFrames::next`] is cancel-safe: what was read stays in the buffer.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use bytes::{Buf as _, Bytes, BytesMut};
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, COPY_DATA_TAG, COPY_DONE_TAG, DataRowBody, ErrorResponseBody, Header,
    Message, READY_FOR_QUERY_TAG,
};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::pg::{PgError, ServerError};

/// PostgreSQL builds no message larger than its `MaxAllocSize`, one byte below 1 GiB; the rest is
/// for the header. A larger length is not PostgreSQL speaking.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// One read fills at most this: a busy walsender sends small messages, one `send` each.
const BLOCK_BYTES: usize = 256 * 1024;

/// With less room than this a read is not worth its system call, so a new block is begun.
const READ_BYTES_MIN: usize = 8 * 1024;

/// Tag of `CopyBothResponse`.
const COPY_BOTH_RESPONSE_TAG: u8 = b'W';

/// A message of the server, as far as a walsender session cares.
pub(super) enum Frame {
    Authentication(Message),
    ParameterStatus {
        name: String,
        value: String,
    },
    Row(Vec<Option<String>>),
    /// One of the messages that end a statement, or describe its rows, and need no answer.
    Done,
    Ready,
    Error(Box<ServerError>),
    CopyBoth,
    CopyData(Bytes),
    CopyDone,
}

impl Frame {
    pub(super) fn unexpected(&self, place: &str) -> PgError {
        let name = match self {
            Self::Authentication(_) => "an authentication request",
            Self::ParameterStatus { .. } => "a parameter's value",
            Self::Row(_) => "a row",
            Self::Done => "the end of a statement",
            Self::Ready => "ready for query",
            Self::Error(error) => return PgError::Server(error.clone()),
            Self::CopyBoth => "the start of CopyBoth",
            Self::CopyData(_) => "copy data",
            Self::CopyDone => "the end of copy",
        };
        PgError::Protocol(format!("{name} in {place}"))
    }
}

/// The buffer and what is still in it.
pub(super) struct WalFrames {
    buffer: BytesMut,
    /// The block was made for one message larger than a block and must not be used again.
    oversized: bool,
    /// The last read took all there was.
    drained: bool,
}

impl WalFrames {
    pub(super) fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            oversized: false,
            drained: true,
        }
    }

    /// The next message; `None` when the server closed the connection between two messages.
    pub(super) async fn next<S>(&mut self, stream: &mut S) -> Result<Option<Frame>, PgError>
    where
        S: AsyncRead + Unpin,
    {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if self.read(stream).await.map_err(PgError::Io)? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(PgError::Closed)
                };
            }
        }
    }

    /// The next message that is already here as a whole. Notices are dealt with on the way.
    pub(super) fn buffered(&mut self) -> Result<Option<Frame>, PgError> {
        loop {
            let Some(header) = Header::parse(&self.buffer).map_err(malformed)? else {
                return Ok(None);
            };
            let length = message_length(header)?;
            if self.buffer.len() < length {
                return Ok(None);
            }
            match header.tag() {
                COPY_DATA_TAG => {
                    let mut data = self.buffer.split_to(length).freeze();
                    self.leave_oversized();
                    data.advance(5);
                    return Ok(Some(Frame::CopyData(data)));
                }
                COPY_BOTH_RESPONSE_TAG => {
                    self.buffer.advance(length);
                    return Ok(Some(Frame::CopyBoth));
                }
                _ => {}
            }
            let message = Message::parse(&mut self.buffer)
                .map_err(malformed)?
                .ok_or_else(|| PgError::Protocol("a message shorter than its length".to_owned()))?;
            if let Some(frame) = frame(message)? {
                return Ok(Some(frame));
            }
        }
    }

    /// Whether the next message ends the copy, or the command it belongs to.
    pub(super) fn at_end(&self) -> bool {
        matches!(
            self.buffer.first(),
            Some(&(COPY_DONE_TAG | COMMAND_COMPLETE_TAG | READY_FOR_QUERY_TAG))
        )
    }

    /// Whether the last read took all that had arrived, and not only what the block had room for.
    pub(super) fn drained(&self) -> bool {
        self.drained
    }

    /// Reads what the stream has, up to the end of the block; returns zero at its end.
    async fn read<S: AsyncRead + Unpin>(&mut self, stream: &mut S) -> io::Result<usize> {
        self.make_room();
        let Self {
            buffer, drained, ..
        } = self;
        let before = buffer.len();
        poll_fn(|cx| {
            // TLS hands out one record at a time: go on until nothing is left or the block is full.
            while buffer.len() < buffer.capacity() {
                match pin!(stream.read_buf(buffer)).poll(cx) {
                    Poll::Ready(Ok(0)) => break,
                    Poll::Ready(Ok(_)) => {}
                    // What was read first counts; the error comes again with the next read.
                    Poll::Ready(Err(_)) | Poll::Pending if buffer.len() > before => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            *drained = buffer.len() < buffer.capacity();
            Poll::Ready(Ok(buffer.len() - before))
        })
        .await
    }

    /// The block of an oversized message is its message's alone: whoever drops that gives the memory back.
    fn leave_oversized(&mut self) {
        if self.oversized && self.buffer.is_empty() {
            self.buffer = BytesMut::new();
            self.oversized = false;
        }
    }

    /// Makes sure that the next read has room: for the rest of the message that has begun, or for
    /// whatever comes.
    fn make_room(&mut self) {
        let begun = match Header::parse(&self.buffer) {
            Ok(Some(header)) => message_length(header).unwrap_or(0),
            Ok(None) | Err(_) => 0,
        };
        let free = self.buffer.capacity() - self.buffer.len();
        let missing = begun.saturating_sub(self.buffer.len());
        // An oversized block is left as soon as its message is out.
        let leave = self.oversized && begun <= BLOCK_BYTES;
        if !leave && free >= missing.max(READ_BYTES_MIN) {
            return;
        }
        let wanted = begun.max(BLOCK_BYTES);
        if !leave && wanted == BLOCK_BYTES {
            // Takes the same block again when no slice of it is left.
            self.buffer.reserve(wanted - self.buffer.len());
        } else {
            let mut block = BytesMut::with_capacity(wanted);
            block.extend_from_slice(&self.buffer);
            self.buffer = block;
            self.oversized = wanted > BLOCK_BYTES;
        }
    }
}

/// The whole length, tag included.
fn message_length(header: Header) -> Result<usize, PgError> {
    usize::try_from(header.len())
        .ok()
        .and_then(|length| length.checked_add(1))
        .filter(|length| *length <= MESSAGE_BYTES_MAX)
        .ok_or_else(|| PgError::Protocol(format!("a message of {} bytes", header.len())))
}

fn malformed(error: io::Error) -> PgError {
    PgError::Protocol(format!("malformed message: {error}"))
}

/// Sorts a message; `None` for those that are dealt with here.
fn frame(message: Message) -> Result<Option<Frame>, PgError> {
    Ok(Some(match message {
        Message::DataRow(body) => Frame::Row(row(&body)?),
        Message::ErrorResponse(body) => Frame::Error(Box::new(server_error(&body)?)),
        Message::NoticeResponse(body) => {
            let mut fields = body.fields();
            while let Some(field) = fields.next().map_err(malformed)? {
                if field.type_() == b'M' {
                    tracing::debug!(message = %text(field.value_bytes()), "notice");
                }
            }
            return Ok(None);
        }
        Message::ParameterStatus(body) => Frame::ParameterStatus {
            name: body.name().map_err(malformed)?.to_owned(),
            value: body.value().map_err(malformed)?.to_owned(),
        },
        Message::ReadyForQuery(_) => Frame::Ready,
        Message::CopyDone => Frame::CopyDone,
        Message::CommandComplete(_)
        | Message::RowDescription(_)
        | Message::EmptyQueryResponse
        | Message::BackendKeyData(_)
        | Message::NotificationResponse(_) => Frame::Done,
        Message::AuthenticationOk
        | Message::AuthenticationCleartextPassword
        | Message::AuthenticationMd5Password(_)
        | Message::AuthenticationSasl(_)
        | Message::AuthenticationSaslContinue(_)
        | Message::AuthenticationSaslFinal(_)
        | Message::AuthenticationGss
        | Message::AuthenticationGssContinue(_)
        | Message::AuthenticationKerberosV5
        | Message::AuthenticationScmCredential
        | Message::AuthenticationSspi => Frame::Authentication(message),
        _ => {
            return Err(PgError::Protocol(
                "a message that no walsender sends".to_owned(),
            ));
        }
    }))
}

fn row(body: &DataRowBody) -> Result<Vec<Option<String>>, PgError> {
    let mut row = Vec::new();
    let mut ranges = body.ranges();
    while let Some(range) = ranges.next().map_err(malformed)? {
        row.push(match range {
            Some(range) => {
                let bytes = body.buffer().get(range).ok_or_else(|| {
                    PgError::Protocol("a value that reaches beyond its row".to_owned())
                })?;
                Some(text(bytes).into_owned())
            }
            None => None,
        });
    }
    Ok(row)
}

/// Before the session knows the client's encoding, messages come in the server's own: hence lossy.
fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// PostgreSQL documentation, "Error and Notice Message Fields".
fn server_error(body: &ErrorResponseBody) -> Result<ServerError, PgError> {
    let mut error = ServerError::default();
    let (mut schema, mut table) = (None, None);
    let mut fields = body.fields();
    while let Some(field) = fields.next().map_err(malformed)? {
        let value = text(field.value_bytes()).into_owned();
        match field.type_() {
            // `S` is translated, `V` (always sent from 9.6 on) is not.
            b'V' => error.severity = value,
            b'C' => error.sqlstate = value,
            b'M' => error.message = value,
            b'H' => error.hint = Some(value),
            b's' => schema = Some(value),
            b't' => table = Some(value),
            b'c' => error.column = Some(value),
            b'n' => error.constraint = Some(value),
            b'F' => error.raised.0 = value,
            b'R' => error.raised.1 = value,
            _ => {}
        }
    }
    error.table = match (schema, table) {
        (Some(schema), Some(table)) => Some(format!("{schema}.{table}")),
        (_, table) => table,
    };
    error.hide_values();
    Ok(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn frames(bytes: &[u8]) -> WalFrames {
        WalFrames {
            buffer: BytesMut::from(bytes),
            oversized: false,
            drained: true,
        }
    }

    #[test]
    fn a_message_is_handed_out_only_when_all_of_it_is_here() {
        let bytes = message(b'd', b"hello");
        for end in 0..bytes.len() {
            assert!(frames(&bytes[..end]).buffered().unwrap().is_none(), "{end}");
        }
        let whole = frames(&bytes).buffered().unwrap();
        assert!(matches!(whole, Some(Frame::CopyData(data)) if data == "hello"));
    }

    #[test]
    fn an_error_message_keeps_its_sqlstate_and_loses_values() {
        let body = b"SFEHLER\0VERROR\0C22P02\0Minvalid: secret\0Dsecret\0ttab\0ssch\0Fnumutils.c\0Rpg_strtoint32\0\0";
        let Some(Frame::Error(error)) = frames(&message(b'E', body)).buffered().unwrap() else {
            panic!("not an error");
        };
        assert_eq!(error.severity, "ERROR");
        assert_eq!(error.raised.1, "pg_strtoint32");
        assert_eq!(error.sqlstate, "22P02");
        assert_eq!(error.table.as_deref(), Some("sch.tab"));
        assert!(!format!("{error:?}").contains("secret"));
    }

    #[test]
    fn lengths_that_postgresql_never_sends_are_refused() {
        for length in [0_u32, 3, 1 << 30, u32::MAX] {
            let mut bytes = vec![b'd'];
            bytes.extend_from_slice(&length.to_be_bytes());
            assert!(frames(&bytes).buffered().is_err(), "{length}");
            // And no memory is reserved for them before that is noticed.
            let mut frames = frames(&bytes);
            frames.make_room();
            assert!(frames.buffer.capacity() <= 2 * BLOCK_BYTES);
        }
    }

    #[tokio::test]
    async fn messages_survive_any_cutting_and_large_blocks_are_left_again() {
        let sizes = [0, 1, 300_000, 5, 1_000_000, BLOCK_BYTES, 17];
        let stream: Vec<u8> = sizes
            .iter()
            .flat_map(|size| message(b'd', &vec![7; *size]))
            .collect();
        let (mut server, mut client) = tokio::io::duplex(1000);
        let server = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut server, &stream)
                .await
                .unwrap();
        });
        let mut frames = WalFrames::new();
        for size in sizes {
            match frames.next(&mut client).await.unwrap() {
                Some(Frame::CopyData(data)) => assert_eq!(data.len(), size),
                _ => panic!("not copy data"),
            }
        }
        assert!(frames.next(&mut client).await.unwrap().is_none());
        assert!(!frames.oversized);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_ends_within_a_message_is_an_error() {
        let bytes = message(b'd', b"hello");
        let mut stream = &bytes[..7];
        let outcome = WalFrames::new().next(&mut stream).await;
        assert!(matches!(outcome, Err(PgError::Closed)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = frames(&bytes);
            while let Ok(Some(_)) = frames.buffered() {}
            frames.make_room();
        }

        #[test]
        fn no_body_makes_the_reader_panic(
            tag in proptest::sample::select(b"123ACDEGHIKNRSTVWZcdnst".to_vec()),
            body in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut frames = frames(&message(tag, &body));
            while let Ok(Some(_)) = frames.buffered() {}
        }
    }
}
