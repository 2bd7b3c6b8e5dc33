//! ● Bytes to [`Message`].
//!
//! One function per message that has more than a few fields, in the order of the documentation;
//! [`ByteReader`] takes the fields one by one and is the only place that looks at lengths.
//!
//! # Invariants
//! - Every read is checked against what is left, and every message must end exactly where its last
//!   field does.
//! - Nothing is reserved on the word of a count: a count is first compared with the bytes behind it.

use bytes::{Buf as _, Bytes, BytesMut};

use super::error::DecodeError;
use super::message::{
    Begin, Column, Commit, CommitPrepared, LogicalMessage, Message, MessageKind, OldTuple, Prepare,
    Relation, ReplicaIdentity, RollbackPrepared, StreamAbort, StreamCommit,
};
use super::tuple::Tuple;
use crate::pg::PgLsn;

/// The kind of a message by its first byte; `None` if it is empty or of no known kind.
pub fn kind(data: &[u8]) -> Option<MessageKind> {
    MessageKind::from_byte(*data.first()?)
}

/// Decodes one message.
///
/// `streamed` says that it stands between Stream Start and Stream Stop, where changes and
/// descriptions carry their xid; with the wrong answer the fields shift and the message is garbage or
/// an error. Tuples and contents share the memory of `data`.
pub fn decode(data: &Bytes, streamed: bool) -> Result<Message, DecodeError> {
    let &first = data.first().ok_or(DecodeError::Empty)?;
    let kind = MessageKind::from_byte(first).ok_or(DecodeError::UnknownMessage(first))?;
    let mut reader = ByteReader {
        message: char::from(first),
        data,
        left: &data[1..],
    };
    let message = read(kind, &mut reader, streamed)?;
    match reader.left.len() {
        0 => Ok(message),
        left => Err(DecodeError::TrailingBytes {
            message: reader.message,
            left,
        }),
    }
}

/// The relation, and in a streamed block the (sub)transaction, of an insert, update or delete. Its rows
/// are not looked at: whoever needs them decodes them. `None` for other messages and for one that ends
/// before its relation.
pub fn row_change(data: &[u8], streamed: bool) -> Option<(Option<u32>, u32)> {
    let kind = MessageKind::from_byte(*data.first()?)?;
    if !matches!(
        kind,
        MessageKind::Insert | MessageKind::Update | MessageKind::Delete
    ) {
        return None;
    }
    let word = |at: usize| Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?));
    match streamed {
        true => Some((Some(word(1)?), word(5)?)),
        false => Some((None, word(1)?)),
    }
}

/// Bytes in front of a streamed message's own: what it is, and the transaction that it is of.
const KIND_BYTES: usize = 1;
const XID_BYTES: usize = 4;

/// The same as [`put_without_xid`] does, in place.
pub fn without_xid(mut streamed: BytesMut) -> Bytes {
    let kind = streamed[0];
    streamed.advance(XID_BYTES);
    streamed[0] = kind;
    streamed.freeze()
}

/// Writes a change or description of a streamed block as it would be outside of one.
///
/// The message must be one that [`decode`] or [`row_change`] has understood as `streamed`.
pub fn put_without_xid(streamed: &[u8], out: &mut BytesMut) {
    let (kind, rest) = streamed.split_at(KIND_BYTES);
    out.extend_from_slice(kind);
    out.extend_from_slice(&rest[XID_BYTES..]);
}

fn read(
    kind: MessageKind,
    reader: &mut ByteReader<'_>,
    streamed: bool,
) -> Result<Message, DecodeError> {
    Ok(match kind {
        MessageKind::Begin => Message::Begin(Begin {
            final_lsn: reader.lsn()?,
            commit_time: reader.i64()?,
            xid: reader.u32()?,
        }),
        MessageKind::Message => {
            let xid = reader.xid(streamed)?;
            let [transactional] = reader.flags()?;
            Message::Message(LogicalMessage {
                xid,
                transactional,
                lsn: reader.lsn()?,
                prefix: reader.string()?,
                content: reader.counted()?,
            })
        }
        MessageKind::Commit => {
            let [] = reader.flags()?;
            Message::Commit(Commit {
                commit_lsn: reader.lsn()?,
                end_lsn: reader.lsn()?,
                commit_time: reader.i64()?,
            })
        }
        // An origin carries no xid even in a streamed block.
        MessageKind::Origin => Message::Origin {
            commit_lsn: reader.lsn()?,
            name: reader.string()?,
        },
        MessageKind::Relation => {
            reader.xid(streamed)?;
            Message::Relation(read_relation(reader)?)
        }
        MessageKind::Type => Message::Type {
            xid: reader.xid(streamed)?,
            oid: reader.u32()?,
            schema: reader.string()?,
            name: reader.string()?,
        },
        MessageKind::Insert => Message::Insert {
            xid: reader.xid(streamed)?,
            relation: reader.u32()?,
            new: match reader.u8()? {
                b'N' => Tuple::read(reader)?,
                kind => return Err(reader.unexpected_tuple(kind)),
            },
        },
        MessageKind::Update => read_update(reader, streamed)?,
        MessageKind::Delete => Message::Delete {
            xid: reader.xid(streamed)?,
            relation: reader.u32()?,
            old: match reader.u8()? {
                b'K' => OldTuple::Key(Tuple::read(reader)?),
                b'O' => OldTuple::Full(Tuple::read(reader)?),
                kind => return Err(reader.unexpected_tuple(kind)),
            },
        },
        MessageKind::Truncate => read_truncate(reader, streamed)?,
        MessageKind::StreamStart => {
            let xid = reader.u32()?;
            let [first] = reader.flags()?;
            Message::StreamStart { xid, first }
        }
        MessageKind::StreamStop => Message::StreamStop,
        MessageKind::StreamCommit => {
            let xid = reader.u32()?;
            let [] = reader.flags()?;
            Message::StreamCommit(StreamCommit {
                xid,
                commit_lsn: reader.lsn()?,
                end_lsn: reader.lsn()?,
                commit_time: reader.i64()?,
            })
        }
        MessageKind::StreamAbort => Message::StreamAbort(StreamAbort {
            xid: reader.u32()?,
            subxid: reader.u32()?,
            abort: match reader.left.len() {
                0 => None,
                _ => Some((reader.lsn()?, reader.i64()?)),
            },
        }),
        // Alone among the prepared family it has no flags.
        MessageKind::BeginPrepare => Message::BeginPrepare(read_prepare(reader)?),
        MessageKind::Prepare => {
            let [] = reader.flags()?;
            Message::Prepare(read_prepare(reader)?)
        }
        MessageKind::CommitPrepared => {
            let [] = reader.flags()?;
            Message::CommitPrepared(CommitPrepared {
                commit_lsn: reader.lsn()?,
                end_lsn: reader.lsn()?,
                commit_time: reader.i64()?,
                xid: reader.u32()?,
                gid: reader.string()?,
            })
        }
        MessageKind::RollbackPrepared => {
            let [] = reader.flags()?;
            Message::RollbackPrepared(RollbackPrepared {
                prepare_end_lsn: reader.lsn()?,
                rollback_end_lsn: reader.lsn()?,
                prepare_time: reader.i64()?,
                rollback_time: reader.i64()?,
                xid: reader.u32()?,
                gid: reader.string()?,
            })
        }
        MessageKind::StreamPrepare => {
            let [] = reader.flags()?;
            Message::StreamPrepare(read_prepare(reader)?)
        }
    })
}

fn read_relation(reader: &mut ByteReader<'_>) -> Result<Relation, DecodeError> {
    /// Flags, an empty name, type and modifier.
    const COLUMN_BYTES_MIN: usize = 1 + 1 + 4 + 4;

    let id = reader.u32()?;
    let schema = reader.string()?;
    let name = reader.string()?;
    let identity = match reader.u8()? {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        other => return Err(DecodeError::UnknownReplicaIdentity(other)),
    };
    let count = usize::from(reader.count16()?);
    reader.need(count * COLUMN_BYTES_MIN)?;
    let mut columns = Vec::with_capacity(count);
    for _ in 0..count {
        let [is_key] = reader.flags()?;
        columns.push(Column {
            is_key,
            name: reader.string()?,
            type_oid: reader.u32()?,
            type_modifier: reader.i32()?,
        });
    }
    Ok(Relation {
        id,
        schema,
        name,
        identity,
        columns,
    })
}

fn read_update(reader: &mut ByteReader<'_>, streamed: bool) -> Result<Message, DecodeError> {
    let xid = reader.xid(streamed)?;
    let relation = reader.u32()?;
    let mut kind = reader.u8()?;
    let old = match kind {
        b'K' => Some(OldTuple::Key(Tuple::read(reader)?)),
        b'O' => Some(OldTuple::Full(Tuple::read(reader)?)),
        _ => None,
    };
    if old.is_some() {
        kind = reader.u8()?;
    }
    if kind != b'N' {
        return Err(reader.unexpected_tuple(kind));
    }
    Ok(Message::Update {
        xid,
        relation,
        old,
        new: Tuple::read(reader)?,
    })
}

fn read_truncate(reader: &mut ByteReader<'_>, streamed: bool) -> Result<Message, DecodeError> {
    const OID_BYTES: usize = 4;

    let xid = reader.xid(streamed)?;
    let count = reader.length()?;
    let [cascade, restart_identity] = reader.flags()?;
    reader.need(count.saturating_mul(OID_BYTES))?;
    let mut relations = Vec::with_capacity(count);
    for _ in 0..count {
        relations.push(reader.u32()?);
    }
    Ok(Message::Truncate {
        xid,
        relations,
        cascade,
        restart_identity,
    })
}

fn read_prepare(reader: &mut ByteReader<'_>) -> Result<Prepare, DecodeError> {
    Ok(Prepare {
        prepare_lsn: reader.lsn()?,
        end_lsn: reader.lsn()?,
        prepare_time: reader.i64()?,
        xid: reader.u32()?,
        gid: reader.string()?,
    })
}

/// What is left of a message.
pub(super) struct ByteReader<'a> {
    message: char,
    data: &'a Bytes,
    left: &'a [u8],
}

impl<'a> ByteReader<'a> {
    pub(super) fn left(&self) -> &'a [u8] {
        self.left
    }

    /// The same bytes, kept alive by sharing the message's memory.
    pub(super) fn share(&self, part: &'a [u8]) -> Bytes {
        self.data.slice_ref(part)
    }

    fn need(&self, needed: usize) -> Result<(), DecodeError> {
        let left = self.left.len();
        if needed > left {
            return Err(DecodeError::Truncated {
                message: self.message,
                needed,
                left,
            });
        }
        Ok(())
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        self.need(length)?;
        let (taken, left) = self.left.split_at(length);
        self.left = left;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let Some((taken, left)) = self.left.split_first_chunk() else {
            return Err(DecodeError::Truncated {
                message: self.message,
                needed: N,
                left: self.left.len(),
            });
        };
        self.left = left;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, DecodeError> {
        self.array().map(i32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.array().map(i64::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<PgLsn, DecodeError> {
        self.array().map(u64::from_be_bytes).map(PgLsn::from)
    }

    fn xid(&mut self, streamed: bool) -> Result<Option<u32>, DecodeError> {
        streamed.then(|| self.u32()).transpose()
    }

    /// Takes a byte of `N` flags, the lowest bit first; any other bit set is an error.
    fn flags<const N: usize>(&mut self) -> Result<[bool; N], DecodeError> {
        let flags = self.u8()?;
        if u32::from(flags) >> N != 0 {
            return Err(DecodeError::UnknownFlags {
                message: self.message,
                flags,
            });
        }
        Ok(std::array::from_fn(|bit| flags & (1 << bit) != 0))
    }

    fn negative(&self, length: i32) -> DecodeError {
        DecodeError::NegativeLength {
            message: self.message,
            length,
        }
    }

    pub(super) fn count16(&mut self) -> Result<u16, DecodeError> {
        let count = i16::from_be_bytes(self.array()?);
        u16::try_from(count).map_err(|_| self.negative(i32::from(count)))
    }

    pub(super) fn length(&mut self) -> Result<usize, DecodeError> {
        let length = self.i32()?;
        usize::try_from(length).map_err(|_| self.negative(length))
    }

    fn counted(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        Ok(self.share(bytes))
    }

    fn string(&mut self) -> Result<String, DecodeError> {
        let message = self.message;
        let end = self
            .left
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(DecodeError::UnterminatedString { message })?;
        let text = std::str::from_utf8(&self.left[..end])
            .map_err(|_| DecodeError::InvalidUtf8 { message })?;
        self.left = &self.left[end + 1..];
        Ok(text.to_owned())
    }

    fn unexpected_tuple(&self, kind: u8) -> DecodeError {
        DecodeError::UnexpectedTuple {
            message: self.message,
            kind,
        }
    }
}
