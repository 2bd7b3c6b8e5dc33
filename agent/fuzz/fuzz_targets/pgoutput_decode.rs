//! Decodes arbitrary bytes as pgoutput messages and reads every value of what decodes.
//!
//! Goal: no input panics, and what a tuple promises about itself holds. The seeds in
//! `seeds/pgoutput_decode` are the messages of `src/pg/pgoutput/tests/recorded.rs`.
#![no_main]

use bytes::Bytes;
use dr_agent::pg::pgoutput::{Message, OldTuple, Tuple, Value, decode, kind};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    for streamed in [false, true] {
        let Ok(message) = decode(&data, streamed) else {
            continue;
        };
        assert_eq!(kind(&data), Some(message.kind()));
        match &message {
            Message::Insert { new, .. } => read(new, &data),
            Message::Update { old, new, .. } => {
                if let Some(old) = old {
                    read(old.tuple(), &data);
                }
                read(new, &data);
            }
            Message::Delete {
                old: OldTuple::Key(old) | OldTuple::Full(old),
                ..
            } => read(old, &data),
            Message::Relation(relation) => assert!(relation.columns.len() < data.len()),
            Message::Truncate { relations, .. } => assert!(relations.len() < data.len()),
            _ => {}
        }
    }
});

/// Reads every value: as many as announced, all of them inside the message.
fn read(tuple: &Tuple, data: &[u8]) {
    let mut columns = 0;
    let mut bytes = 2;
    for value in tuple.values() {
        columns += 1;
        bytes += match value {
            Value::Null | Value::UnchangedToast => 1,
            Value::Text(value) | Value::Binary(value) => 1 + 4 + value.len(),
        };
    }
    assert_eq!(columns, tuple.len());
    assert_eq!(bytes, tuple.wire_bytes());
    assert!(bytes <= data.len());
}
