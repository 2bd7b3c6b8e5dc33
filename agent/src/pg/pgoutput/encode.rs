//! ● [`Message`](super::Message) to bytes, for tests: synthesises what a source would send.
//!
//! One function per message, named as in the documentation. Changes and descriptions are written as
//! outside a streamed block; [`streamed`] turns one into what it looks like inside.
//!
//! # Invariants
//! First bytes and flags are written as literals of their own, not taken from the decoder's tables, so
//! that a round trip tests both.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::message::{
    CommitPrepared, LogicalMessage, Prepare, Relation, ReplicaIdentity, RollbackPrepared,
    StreamAbort, StreamCommit,
};
use super::tuple::{Tuple, Value};
use super::{Message, decode};
use crate::pg::PgLsn;

pub(crate) fn begin(commit_lsn: PgLsn, commit_time: i64, xid: u32) -> Bytes {
    let mut out = message(b'B');
    out.put_u64(commit_lsn.into());
    out.put_i64(commit_time);
    out.put_u32(xid);
    out.freeze()
}

pub(crate) fn commit(commit_lsn: PgLsn, end_lsn: PgLsn, commit_time: i64) -> Bytes {
    let mut out = message(b'C');
    out.put_u8(0);
    out.put_u64(commit_lsn.into());
    out.put_u64(end_lsn.into());
    out.put_i64(commit_time);
    out.freeze()
}

pub(crate) fn origin(commit_lsn: PgLsn, name: &str) -> Bytes {
    let mut out = message(b'O');
    out.put_u64(commit_lsn.into());
    put_string(&mut out, name);
    out.freeze()
}

pub(crate) fn relation(relation: &Relation) -> Bytes {
    let mut out = message(b'R');
    out.put_u32(relation.id);
    put_string(&mut out, &relation.schema);
    put_string(&mut out, &relation.name);
    out.put_u8(match relation.identity {
        ReplicaIdentity::Default => b'd',
        ReplicaIdentity::Nothing => b'n',
        ReplicaIdentity::Full => b'f',
        ReplicaIdentity::Index => b'i',
    });
    out.put_i16(relation.columns.len().try_into().unwrap());
    for column in &relation.columns {
        out.put_u8(u8::from(column.is_key));
        put_string(&mut out, &column.name);
        out.put_u32(column.type_oid);
        out.put_i32(column.type_modifier);
    }
    out.freeze()
}

/// The message that names a type (`type` is a keyword).
pub(crate) fn type_name(oid: u32, schema: &str, name: &str) -> Bytes {
    let mut out = message(b'Y');
    out.put_u32(oid);
    put_string(&mut out, schema);
    put_string(&mut out, name);
    out.freeze()
}

pub(crate) fn insert(relation: u32, new: &[Value<'_>]) -> Bytes {
    let mut out = message(b'I');
    out.put_u32(relation);
    put_tuple(&mut out, b'N', new);
    out.freeze()
}

/// `old` comes with its kind: `b'K'` (key) or `b'O'` (whole row).
pub(crate) fn update(relation: u32, old: Option<(u8, &[Value<'_>])>, new: &[Value<'_>]) -> Bytes {
    let mut out = message(b'U');
    out.put_u32(relation);
    if let Some((kind, old)) = old {
        put_tuple(&mut out, kind, old);
    }
    put_tuple(&mut out, b'N', new);
    out.freeze()
}

/// `old` comes with its kind: `b'K'` (key) or `b'O'` (whole row).
pub(crate) fn delete(relation: u32, old: (u8, &[Value<'_>])) -> Bytes {
    let mut out = message(b'D');
    out.put_u32(relation);
    put_tuple(&mut out, old.0, old.1);
    out.freeze()
}

pub(crate) fn truncate(relations: &[u32], cascade: bool, restart_identity: bool) -> Bytes {
    let mut out = message(b'T');
    out.put_i32(relations.len().try_into().unwrap());
    out.put_u8(u8::from(cascade) | u8::from(restart_identity) << 1);
    for &relation in relations {
        out.put_u32(relation);
    }
    out.freeze()
}

/// `pg_logical_emit_message`; its xid is left to [`streamed`].
pub(crate) fn logical_message(logical: &LogicalMessage) -> Bytes {
    let mut out = message(b'M');
    out.put_u8(u8::from(logical.transactional));
    out.put_u64(logical.lsn.into());
    put_string(&mut out, &logical.prefix);
    out.put_i32(logical.content.len().try_into().unwrap());
    out.put_slice(&logical.content);
    out.freeze()
}

pub(crate) fn stream_start(xid: u32, first: bool) -> Bytes {
    let mut out = message(b'S');
    out.put_u32(xid);
    out.put_u8(u8::from(first));
    out.freeze()
}

pub(crate) fn stream_stop() -> Bytes {
    message(b'E').freeze()
}

pub(crate) fn stream_commit(commit: &StreamCommit) -> Bytes {
    let mut out = message(b'c');
    out.put_u32(commit.xid);
    out.put_u8(0);
    out.put_u64(commit.commit_lsn.into());
    out.put_u64(commit.end_lsn.into());
    out.put_i64(commit.commit_time);
    out.freeze()
}

pub(crate) fn stream_abort(abort: &StreamAbort) -> Bytes {
    let mut out = message(b'A');
    out.put_u32(abort.xid);
    out.put_u32(abort.subxid);
    if let Some((lsn, time)) = abort.abort {
        out.put_u64(lsn.into());
        out.put_i64(time);
    }
    out.freeze()
}

pub(crate) fn begin_prepare(prepare: &Prepare) -> Bytes {
    let mut out = message(b'b');
    put_prepare(&mut out, prepare);
    out.freeze()
}

pub(crate) fn prepare(prepare: &Prepare) -> Bytes {
    let mut out = message(b'P');
    out.put_u8(0);
    put_prepare(&mut out, prepare);
    out.freeze()
}

pub(crate) fn commit_prepared(commit: &CommitPrepared) -> Bytes {
    let mut out = message(b'K');
    out.put_u8(0);
    out.put_u64(commit.commit_lsn.into());
    out.put_u64(commit.end_lsn.into());
    out.put_i64(commit.commit_time);
    out.put_u32(commit.xid);
    put_string(&mut out, &commit.gid);
    out.freeze()
}

pub(crate) fn rollback_prepared(rollback: &RollbackPrepared) -> Bytes {
    let mut out = message(b'r');
    out.put_u8(0);
    out.put_u64(rollback.prepare_end_lsn.into());
    out.put_u64(rollback.rollback_end_lsn.into());
    out.put_i64(rollback.prepare_time);
    out.put_i64(rollback.rollback_time);
    out.put_u32(rollback.xid);
    put_string(&mut out, &rollback.gid);
    out.freeze()
}

pub(crate) fn stream_prepare(prepare: &Prepare) -> Bytes {
    let mut out = message(b'p');
    out.put_u8(0);
    put_prepare(&mut out, prepare);
    out.freeze()
}

/// The same change or description as it looks between Stream Start and Stream Stop.
pub(crate) fn streamed(xid: u32, plain: &[u8]) -> Bytes {
    assert!(
        b"IUDTRYM".contains(&plain[0]),
        "only changes and descriptions carry an xid"
    );
    let mut out = message(plain[0]);
    out.put_u32(xid);
    out.put_slice(&plain[1..]);
    out.freeze()
}

/// A tuple by itself, made the only way there is: by decoding a message.
pub(crate) fn tuple(values: &[Value<'_>]) -> Tuple {
    match decode(&insert(0, values), false) {
        Ok(Message::Insert { new, .. }) => new,
        other => panic!("an insert was decoded as {other:?}"),
    }
}

fn message(kind: u8) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u8(kind);
    out
}

fn put_string(out: &mut BytesMut, text: &str) {
    assert!(
        !text.contains('\0'),
        "the protocol ends strings with a zero"
    );
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

fn put_prepare(out: &mut BytesMut, prepare: &Prepare) {
    out.put_u64(prepare.prepare_lsn.into());
    out.put_u64(prepare.end_lsn.into());
    out.put_i64(prepare.prepare_time);
    out.put_u32(prepare.xid);
    put_string(out, &prepare.gid);
}

fn put_tuple(out: &mut BytesMut, kind: u8, values: &[Value<'_>]) {
    out.put_u8(kind);
    out.put_i16(values.len().try_into().unwrap());
    for value in values {
        match value {
            Value::Null => out.put_u8(b'n'),
            Value::UnchangedToast => out.put_u8(b'u'),
            Value::Text(bytes) => put_counted(out, b't', bytes),
            Value::Binary(bytes) => put_counted(out, b'b', bytes),
        }
    }
}

fn put_counted(out: &mut BytesMut, kind: u8, bytes: &[u8]) {
    out.put_u8(kind);
    out.put_i32(bytes.len().try_into().unwrap());
    out.put_slice(bytes);
}
