//! Large values: sent ahead of the statement that needs them, piece by piece, and read from a table there.
//!
//! ```text
//! BEGIN … COPY dr_agent.large_value ◀── pieces of the message · INSERT … SELECT … large_value … · DELETE FROM large_value … COMMIT
//! ```
//! As a parameter a value would be there four times: in the message it came in, in the array of its column, in the statement,
//! and in the connection's buffer, which keeps the size it once had. COPY takes it straight out of the message, in pieces, as
//! fast as the replica takes them.
//!
//! # Invariants
//! - The rows of `dr_agent.large_value` never outlive the transaction that wrote them, so every transaction sees its own alone.
//! - A piece is a slice of the message: nothing of the size of the value is allocated here.
//!
//! # What it does not do
//! The old row of a table without a key identifies by its values, and those go as parameters, however large.

use std::pin::pin;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::SinkExt as _;
use tokio_postgres::{Client, Statement};

use super::SinkError;
use super::target::TargetColumn;
use crate::flow::net::RowValues;
use crate::pg::pgoutput::Value;
use crate::schema::large_value;

/// From this size on a value is sent ahead. Below it an array of many rows is faster.
pub(super) const LARGE_BYTES: usize = 4 << 20;

/// What the replica is sent at a time.
const PIECE_BYTES: usize = 64 << 10;

/// PostgreSQL documentation, COPY, "Binary Format": signature, flags, length of the extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: [u8; 2] = [0xff, 0xff];

/// How the bytes of a large value become one of its column's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reading {
    /// They are its text.
    Text,
    /// They are it.
    Bytes,
    /// They are its text behind a version (`jsonb_send`).
    Jsonb,
}

impl Reading {
    /// How this value is read, if it is large, and if it can be sent ahead.
    pub(super) fn of(value: Value<'_>, column: &TargetColumn) -> Option<Self> {
        match value {
            Value::Text(text) if text.len() >= LARGE_BYTES => Some(Self::Text),
            Value::Binary(bytes) if bytes.len() >= LARGE_BYTES => {
                match column.native.as_ref()?.element_oid {
                    // bytea; json, text, character, character varying; jsonb.
                    17 => Some(Self::Bytes),
                    25 | 114 | 1042 | 1043 => Some(Self::Text),
                    3802 => Some(Self::Jsonb),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The value with this number, as SQL.
    pub(super) fn sql(self, number: &str, type_sql: &str) -> String {
        let value = match self {
            Self::Bytes => "l.bytes",
            Self::Text => "pg_catalog.convert_from(l.bytes, 'UTF8')",
            Self::Jsonb => "pg_catalog.convert_from(pg_catalog.substr(l.bytes, 2), 'UTF8')",
        };
        format!("{}::{type_sql}", large_value::taken(value, number))
    }
}

/// One value that is sent ahead.
pub(super) struct LargeValue {
    /// By which the statement finds it.
    pub(super) number: i64,
    pub(super) bytes: Bytes,
}

impl LargeValue {
    /// Takes the value out of its row.
    pub(super) fn of(number: i64, value: Value<'_>, row: &impl RowValues) -> Option<Self> {
        match value {
            Value::Text(bytes) | Value::Binary(bytes) => Some(Self {
                number,
                bytes: row.share(bytes),
            }),
            Value::Null | Value::UnchangedToast => None,
        }
    }

    fn head(&self) -> Bytes {
        let length = i32::try_from(self.bytes.len()).expect("a value is below 1 GiB");
        let mut head = BytesMut::new();
        head.put_slice(HEADER);
        head.put_i16(2);
        head.put_i32(8);
        head.put_i64(self.number);
        head.put_i32(length);
        head.freeze()
    }

    /// Sends it, by a prepared [`COPY`].
    pub(super) async fn send(self, client: &Client, copy: &Statement) -> Result<(), SinkError> {
        let mut sink = pin!(client.copy_in::<_, Bytes>(copy).await?);
        sink.send(self.head()).await?;
        let mut left = self.bytes;
        while !left.is_empty() {
            let piece = left.split_to(left.len().min(PIECE_BYTES));
            sink.send(piece).await?;
        }
        sink.send(Bytes::from_static(&TRAILER)).await?;
        sink.finish().await?;
        Ok(())
    }
}

/// Shows the size only: row values belong in no log.
impl std::fmt::Debug for LargeValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "value {} of {} bytes", self.number, self.bytes.len())
    }
}
