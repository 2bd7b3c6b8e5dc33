//! Properties over arbitrary, damaged and synthesised messages.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;

use super::super::*;
use super::encoded;
use crate::pg::PgLsn;

fn any_lsn() -> impl Strategy<Value = PgLsn> {
    any::<u64>().prop_map(PgLsn::from)
}

fn any_name() -> impl Strategy<Value = String> {
    // Anything but the zero that ends a string: empty, spaces, quotes, other scripts.
    vec(any::<char>().prop_filter("no zero", |c| *c != '\0'), 0..8)
        .prop_map(|chars| chars.into_iter().collect())
}

fn any_tuple() -> impl Strategy<Value = Tuple> {
    vec((0..4u8, vec(any::<u8>(), 0..12)), 0..6).prop_map(|columns| {
        let values: Vec<_> = columns
            .iter()
            .map(|(kind, bytes)| match kind {
                0 => Value::Null,
                1 => Value::UnchangedToast,
                2 => Value::Text(bytes),
                _ => Value::Binary(bytes),
            })
            .collect();
        let tuple = encode::tuple(&values);
        assert_eq!(tuple.len(), values.len());
        assert_eq!(tuple.values().len(), values.len());
        assert_eq!(tuple.values().collect::<Vec<_>>(), values);
        tuple
    })
}

fn any_old_tuple() -> impl Strategy<Value = OldTuple> {
    prop_oneof![
        any_tuple().prop_map(OldTuple::Key),
        any_tuple().prop_map(OldTuple::Full)
    ]
}

fn any_relation() -> impl Strategy<Value = Relation> {
    let identity = prop_oneof![
        Just(ReplicaIdentity::Default),
        Just(ReplicaIdentity::Nothing),
        Just(ReplicaIdentity::Full),
        Just(ReplicaIdentity::Index)
    ];
    let column = (any::<bool>(), any_name(), any::<u32>(), any::<i32>()).prop_map(
        |(is_key, name, type_oid, type_modifier)| Column {
            is_key,
            name,
            type_oid,
            type_modifier,
        },
    );
    (
        any::<u32>(),
        any_name(),
        any_name(),
        identity,
        vec(column, 0..5),
    )
        .prop_map(|(id, schema, name, identity, columns)| Relation {
            id,
            schema,
            name,
            identity,
            columns,
        })
}

fn any_prepare() -> impl Strategy<Value = Prepare> {
    (any_lsn(), any_lsn(), any::<i64>(), any::<u32>(), any_name()).prop_map(
        |(prepare_lsn, end_lsn, prepare_time, xid, gid)| Prepare {
            prepare_lsn,
            end_lsn,
            prepare_time,
            xid,
            gid,
        },
    )
}

/// Changes and descriptions, which carry `xid` in a streamed block.
fn any_change(xid: Option<u32>) -> impl Strategy<Value = Message> {
    prop_oneof![
        any_relation().prop_map(Message::Relation),
        (any::<u32>(), any_name(), any_name()).prop_map(move |(oid, schema, name)| Message::Type {
            xid,
            oid,
            schema,
            name
        }),
        (any::<u32>(), any_tuple()).prop_map(move |(relation, new)| Message::Insert {
            xid,
            relation,
            new
        }),
        (any::<u32>(), option::of(any_old_tuple()), any_tuple()).prop_map(
            move |(relation, old, new)| Message::Update {
                xid,
                relation,
                old,
                new
            }
        ),
        (any::<u32>(), any_old_tuple()).prop_map(move |(relation, old)| Message::Delete {
            xid,
            relation,
            old
        }),
        (vec(any::<u32>(), 0..5), any::<bool>(), any::<bool>()).prop_map(
            move |(relations, cascade, restart_identity)| Message::Truncate {
                xid,
                relations,
                cascade,
                restart_identity,
            }
        ),
        (
            any::<bool>(),
            any_lsn(),
            any_name(),
            vec(any::<u8>(), 0..20)
        )
            .prop_map(
                move |(transactional, lsn, prefix, content)| Message::Message(LogicalMessage {
                    xid,
                    transactional,
                    lsn,
                    prefix,
                    content: content.into(),
                })
            ),
    ]
}

/// Everything else.
fn any_frame() -> impl Strategy<Value = Message> {
    prop_oneof![
        (any_lsn(), any::<i64>(), any::<u32>()).prop_map(|(final_lsn, commit_time, xid)| {
            Message::Begin(Begin {
                final_lsn,
                commit_time,
                xid,
            })
        }),
        (any_lsn(), any_lsn(), any::<i64>()).prop_map(|(commit_lsn, end_lsn, commit_time)| {
            Message::Commit(Commit {
                commit_lsn,
                end_lsn,
                commit_time,
            })
        }),
        (any_lsn(), any_name()).prop_map(|(commit_lsn, name)| Message::Origin { commit_lsn, name }),
        (any::<u32>(), any::<bool>()).prop_map(|(xid, first)| Message::StreamStart { xid, first }),
        Just(Message::StreamStop),
        (any::<u32>(), any_lsn(), any_lsn(), any::<i64>()).prop_map(
            |(xid, commit_lsn, end_lsn, commit_time)| Message::StreamCommit(StreamCommit {
                xid,
                commit_lsn,
                end_lsn,
                commit_time,
            })
        ),
        (
            any::<u32>(),
            any::<u32>(),
            option::of((any_lsn(), any::<i64>()))
        )
            .prop_map(|(xid, subxid, abort)| Message::StreamAbort(StreamAbort {
                xid,
                subxid,
                abort
            })),
        any_prepare().prop_map(Message::BeginPrepare),
        any_prepare().prop_map(Message::Prepare),
        any_prepare().prop_map(Message::StreamPrepare),
        (any_lsn(), any_lsn(), any::<i64>(), any::<u32>(), any_name()).prop_map(
            |(commit_lsn, end_lsn, commit_time, xid, gid)| Message::CommitPrepared(
                CommitPrepared {
                    commit_lsn,
                    end_lsn,
                    commit_time,
                    xid,
                    gid,
                }
            )
        ),
        (
            any_lsn(),
            any_lsn(),
            any::<i64>(),
            any::<i64>(),
            any::<u32>(),
            any_name()
        )
            .prop_map(
                |(prepare_end_lsn, rollback_end_lsn, prepare_time, rollback_time, xid, gid)| {
                    Message::RollbackPrepared(RollbackPrepared {
                        prepare_end_lsn,
                        rollback_end_lsn,
                        prepare_time,
                        rollback_time,
                        xid,
                        gid,
                    })
                }
            ),
    ]
}

/// A message and whether it stands in a streamed block.
fn any_message() -> impl Strategy<Value = (Message, bool)> {
    prop_oneof![
        any_change(None).prop_map(|message| (message, false)),
        any::<u32>().prop_flat_map(|xid| any_change(Some(xid)).prop_map(|message| (message, true))),
        (any_frame(), any::<bool>()),
    ]
}

/// As [`encoded`], and a relation gets some xid too if it stands in a streamed block.
fn encoded_in(message: &Message, streamed: bool) -> Bytes {
    let plain = encoded(message);
    match message {
        Message::Relation(_) if streamed => encode::streamed(7, &plain),
        _ => plain,
    }
}

/// Decodes either way and reads every value: what must never panic.
fn decode_and_read(data: &Bytes) {
    for streamed in [false, true] {
        let Ok(message) = decode(data, streamed) else {
            continue;
        };
        let tuples: Vec<&Tuple> = match &message {
            Message::Insert { new, .. } => vec![new],
            Message::Update { old, new, .. } => {
                old.iter().map(OldTuple::tuple).chain([new]).collect()
            }
            Message::Delete { old, .. } => vec![old.tuple()],
            _ => vec![],
        };
        for tuple in tuples {
            assert_eq!(tuple.values().count(), tuple.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_message_survives_the_round_trip((message, streamed) in any_message()) {
        let data = encoded_in(&message, streamed);
        prop_assert_eq!(kind(&data), Some(message.kind()));
        prop_assert_eq!(decode(&data, streamed), Ok(message));
    }

    #[test]
    fn no_bytes_panic(data in vec(any::<u8>(), 0..200)) {
        decode_and_read(&data.into());
    }

    #[test]
    fn no_bytes_panic_behind_a_known_first_byte(
        first in prop::sample::select(b"BMCORYIUDTSEcAbPKrp".to_vec()),
        rest in vec(prop_oneof![Just(0u8), 0..4u8, any::<u8>(), prop::sample::select(b"KONntub".to_vec())], 0..120),
    ) {
        let mut data = vec![first];
        data.extend(rest);
        decode_and_read(&data.into());
    }

    #[test]
    fn a_damaged_message_is_refused_or_is_another_valid_one(
        (message, streamed) in any_message(),
        damage in vec((any::<Index>(), any::<u8>()), 0..4),
        cut in option::weighted(0.3, any::<Index>()),
    ) {
        let mut data = encoded_in(&message, streamed).to_vec();
        for (at, byte) in damage {
            let at = at.index(data.len());
            data[at] = byte;
        }
        if let Some(cut) = cut {
            data.truncate(cut.index(data.len() + 1));
        }
        let data = Bytes::from(data);
        decode_and_read(&data);
        // Nothing was guessed or skipped if writing it again gives the same bytes.
        if let Ok(message) = decode(&data, streamed)
            && !(streamed && message.kind() == MessageKind::Relation)
        {
            prop_assert_eq!(encoded(&message), data);
        }
    }
}
