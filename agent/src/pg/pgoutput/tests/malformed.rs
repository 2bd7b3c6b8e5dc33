//! Messages no server should send, each with the reason it is refused; and what a valid one must not show.

use bytes::Bytes;

use super::super::*;
use super::bytes;
use crate::error::{Class, Classify as _};
use crate::pg::PgLsn;

#[test]
fn malformed_messages_are_refused_with_the_reason() {
    let cases = [
        ("", DecodeError::Empty),
        ("00", DecodeError::UnknownMessage(0)),
        ("5a", DecodeError::UnknownMessage(b'Z')),
        (
            "42 0000",
            DecodeError::Truncated {
                message: 'B',
                needed: 8,
                left: 2,
            },
        ),
        (
            "45 00",
            DecodeError::TrailingBytes {
                message: 'E',
                left: 1,
            },
        ),
        // A commit and a prepare have no flags yet, a truncate two, a column one.
        (
            "43 01 0000000000000001 0000000000000002 0000000000000003",
            DecodeError::UnknownFlags {
                message: 'C',
                flags: 1,
            },
        ),
        (
            "50 80 0000000000000001 0000000000000002 0000000000000003 00000004 6700",
            DecodeError::UnknownFlags {
                message: 'P',
                flags: 0x80,
            },
        ),
        (
            "54 00000000 04",
            DecodeError::UnknownFlags {
                message: 'T',
                flags: 4,
            },
        ),
        (
            "52 00004005 7000 7400 64 0001 02 6900 00000017 ffffffff",
            DecodeError::UnknownFlags {
                message: 'R',
                flags: 2,
            },
        ),
        (
            "52 00004005 7000 7400 78 0000",
            DecodeError::UnknownReplicaIdentity(b'x'),
        ),
        // 32767 columns and two thousand million relations announced, nothing behind them.
        (
            "52 00004005 7000 7400 64 7fff",
            DecodeError::Truncated {
                message: 'R',
                needed: 327_670,
                left: 0,
            },
        ),
        (
            "54 7fffffff 00",
            DecodeError::Truncated {
                message: 'T',
                needed: 8_589_934_588,
                left: 0,
            },
        ),
        (
            "52 00004005 7000 7400 64 ffff",
            DecodeError::NegativeLength {
                message: 'R',
                length: -1,
            },
        ),
        (
            "54 80000000 00",
            DecodeError::NegativeLength {
                message: 'T',
                length: i32::MIN,
            },
        ),
        (
            "49 00004005 4e fffe",
            DecodeError::NegativeLength {
                message: 'I',
                length: -2,
            },
        ),
        // -1 is how the ordinary protocol writes a null; pgoutput does not.
        (
            "49 00004005 4e 0001 74 ffffffff",
            DecodeError::NegativeLength {
                message: 'I',
                length: -1,
            },
        ),
        (
            "49 00004005 4e 0001 74 00000005 61",
            DecodeError::Truncated {
                message: 'I',
                needed: 5,
                left: 1,
            },
        ),
        (
            "49 00004005 4e 0001 7a",
            DecodeError::UnknownValueKind(b'z'),
        ),
        (
            "49 00004005 4e 0001 6e 6e",
            DecodeError::TrailingBytes {
                message: 'I',
                left: 1,
            },
        ),
        (
            "49 00004005 4b 0001 6e",
            DecodeError::UnexpectedTuple {
                message: 'I',
                kind: b'K',
            },
        ),
        (
            "44 00004005 4e 0001 6e",
            DecodeError::UnexpectedTuple {
                message: 'D',
                kind: b'N',
            },
        ),
        (
            "55 00004005 4b 0001 6e 4f 0001 6e",
            DecodeError::UnexpectedTuple {
                message: 'U',
                kind: b'O',
            },
        ),
        (
            "55 00004005 00",
            DecodeError::UnexpectedTuple {
                message: 'U',
                kind: 0,
            },
        ),
        (
            "59 00004005 7075 6d6f",
            DecodeError::UnterminatedString { message: 'Y' },
        ),
        (
            "4f 0000000000000001 c328 00",
            DecodeError::InvalidUtf8 { message: 'O' },
        ),
        (
            "4d 01 0000000000000001 7000 ffffffff",
            DecodeError::NegativeLength {
                message: 'M',
                length: -1,
            },
        ),
        // One of the two extra fields of an abort makes no abort.
        (
            "41 000002e6 000002e7 0000000000000001",
            DecodeError::Truncated {
                message: 'A',
                needed: 8,
                left: 0,
            },
        ),
    ];
    for (hex, expected) in cases {
        assert_eq!(decode(&bytes(hex), false), Err(expected), "{hex}");
        assert_eq!(expected.class(), Class::Definite);
        assert!(expected.hint().is_some_and(|hint| !hint.is_empty()));
        let text = expected.to_string();
        assert!(!text.ends_with('.'), "{text}");
    }
}

#[test]
fn values_share_the_memory_of_the_message() {
    let data = encode::insert(1, &[Value::Null, Value::Text(b"shared")]);
    let Ok(Message::Insert { new, .. }) = decode(&data, false) else {
        panic!("not an insert");
    };
    let Some(Value::Text(text)) = new.values().nth(1) else {
        panic!("not a text");
    };
    assert!(data.as_ptr_range().contains(&text.as_ptr()));
    assert_eq!(new.wire_bytes(), data.len() - b"I....N".len());
}

#[test]
fn debug_output_shows_no_value() {
    let row = [Value::Text(b"secret"), Value::Binary(b"secret")];
    let full: (u8, &[Value<'_>]) = (b'O', &row);
    let logical = LogicalMessage {
        xid: None,
        transactional: true,
        lsn: PgLsn::from(1),
        prefix: String::new(),
        content: Bytes::from_static(b"secret"),
    };
    for data in [
        encode::insert(1, &row),
        encode::update(1, Some(full), &row),
        encode::delete(1, full),
        encode::logical_message(&logical),
    ] {
        let message = decode(&data, false).unwrap();
        let text = format!("{message:?} {row:?}");
        assert!(!text.contains("secret"), "{text}");
        // Bytes could also be printed as numbers.
        assert!(!text.contains("115"), "{text}");
    }
}
