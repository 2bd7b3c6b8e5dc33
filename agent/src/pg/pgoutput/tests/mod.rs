//! Tests of the decoder: what a real server sent, what none should send, and properties over any bytes.

mod malformed;
mod properties;
mod recorded;

use bytes::Bytes;

use super::{Message, OldTuple, Value, encode};

/// Reads hexadecimal digits; blanks between the fields are for people.
fn bytes(hex: &str) -> Bytes {
    let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
    digits
        .chunks(2)
        .map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap())
        .collect()
}

/// Writes any message with the functions of [`encode`]; changes in a streamed block get their xid.
fn encoded(message: &Message) -> Bytes {
    let in_block = |xid: Option<u32>, plain: Bytes| match xid {
        Some(xid) => encode::streamed(xid, &plain),
        None => plain,
    };
    fn old_values(old: &OldTuple) -> (u8, Vec<Value<'_>>) {
        let kind = match old {
            OldTuple::Key(_) => b'K',
            OldTuple::Full(_) => b'O',
        };
        (kind, old.tuple().values().collect())
    }
    match message {
        Message::Begin(m) => encode::begin(m.final_lsn, m.commit_time, m.xid),
        Message::Commit(m) => encode::commit(m.commit_lsn, m.end_lsn, m.commit_time),
        Message::Relation(relation) => encode::relation(relation),
        Message::Type {
            xid,
            oid,
            schema,
            name,
        } => in_block(*xid, encode::type_name(*oid, schema, name)),
        Message::Origin { commit_lsn, name } => encode::origin(*commit_lsn, name),
        Message::Insert { xid, relation, new } => {
            let new: Vec<_> = new.values().collect();
            in_block(*xid, encode::insert(*relation, &new))
        }
        Message::Update {
            xid,
            relation,
            old,
            new,
        } => {
            let old = old.as_ref().map(old_values);
            let old = old.as_ref().map(|(kind, old)| (*kind, &old[..]));
            let new: Vec<_> = new.values().collect();
            in_block(*xid, encode::update(*relation, old, &new))
        }
        Message::Delete { xid, relation, old } => {
            let (kind, old) = old_values(old);
            in_block(*xid, encode::delete(*relation, (kind, &old)))
        }
        Message::Truncate {
            xid,
            relations,
            cascade,
            restart_identity,
        } => in_block(
            *xid,
            encode::truncate(relations, *cascade, *restart_identity),
        ),
        Message::Message(m) => in_block(m.xid, encode::logical_message(m)),
        Message::StreamStart { xid, first } => encode::stream_start(*xid, *first),
        Message::StreamStop => encode::stream_stop(),
        Message::StreamCommit(m) => encode::stream_commit(m),
        Message::StreamAbort(m) => encode::stream_abort(m),
        Message::BeginPrepare(m) => encode::begin_prepare(m),
        Message::Prepare(m) => encode::prepare(m),
        Message::CommitPrepared(m) => encode::commit_prepared(m),
        Message::RollbackPrepared(m) => encode::rollback_prepared(m),
        Message::StreamPrepare(m) => encode::stream_prepare(m),
    }
}
