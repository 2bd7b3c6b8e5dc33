//! ● Column-wise parameters: the values of one column over many rows as one PostgreSQL array.
//!
//! Pure. A statement takes one array per column and unnests them, so its text does not depend on the
//! number of rows. Values that came as text travel as `text[]` and are cast on the replica; values
//! that came in binary travel in the element type's own array, byte for byte.

use bytes::{BufMut as _, BytesMut};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::large::Reading;
use crate::pg::pgoutput::Value;

/// In which form a column's values travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ArrayForm {
    /// `text[]`, cast on the replica.
    Text,
    /// The element type's own array.
    Native,
    /// The value's number, as `bigint[]`: it was sent ahead ([`super::large`]).
    Ahead(Reading),
}

/// OID of `text`, the element type of arrays in text form.
const TEXT_OID: u32 = 25;

/// OID of `bigint`, the type of a large value's number.
pub(super) const INT8_OID: u32 = 20;

/// Array header of `array_recv`: dimensions, flags, element type, length, lower bound.
const HEADER_BYTES: usize = 20;

/// Gathers one column.
#[derive(Debug)]
pub(super) struct ArrayBuilder {
    form: Option<ArrayForm>,
    bytes: BytesMut,
    length: i32,
    has_null: bool,
}

/// Text and binary values in one column.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MixedForms;

impl ArrayBuilder {
    pub(super) fn new() -> Self {
        let mut bytes = BytesMut::with_capacity(256);
        bytes.put_bytes(0, HEADER_BYTES);
        Self {
            form: None,
            bytes,
            length: 0,
            has_null: false,
        }
    }

    /// Appends a value.
    ///
    /// # Panics
    /// For a value that is only on the replica: callers leave such columns out, and writing NULL
    /// instead would lose it.
    pub(super) fn push(&mut self, value: Value<'_>) -> Result<(), MixedForms> {
        let (form, raw) = match value {
            Value::Text(raw) => (ArrayForm::Text, raw),
            Value::Binary(raw) => (ArrayForm::Native, raw),
            Value::UnchangedToast => panic!("a value that was not sent cannot be written"),
            Value::Null => {
                self.has_null = true;
                self.length += 1;
                self.bytes.put_i32(-1);
                return Ok(());
            }
        };
        if *self.form.get_or_insert(form) != form {
            return Err(MixedForms);
        }
        self.length += 1;
        self.bytes
            .put_i32(i32::try_from(raw.len()).expect("a value is below 1 GiB"));
        self.bytes.put_slice(raw);
        Ok(())
    }

    /// The form of the values seen; text if all were NULL.
    pub(super) fn form(&self) -> ArrayForm {
        self.form.unwrap_or(ArrayForm::Text)
    }

    /// Appends the number of a value that was sent ahead; the column then has no others.
    pub(super) fn push_ahead(&mut self, number: i64, reading: Reading) {
        self.form = Some(ArrayForm::Ahead(reading));
        self.length += 1;
        self.bytes.put_i32(8);
        self.bytes.put_i64(number);
    }

    /// Closes the array. `element_oid` is the element type on the replica, for the native form.
    pub(super) fn finish(mut self, element_oid: u32) -> ArrayParameter {
        let element = match self.form() {
            ArrayForm::Text => TEXT_OID,
            ArrayForm::Native => element_oid,
            ArrayForm::Ahead(_) => INT8_OID,
        };
        let mut header = &mut self.bytes[..HEADER_BYTES];
        header.put_i32(1);
        header.put_i32(i32::from(self.has_null));
        header.put_u32(element);
        header.put_i32(self.length);
        header.put_i32(1);
        ArrayParameter(self.bytes)
    }
}

/// A finished array in binary format.
pub(super) struct ArrayParameter(BytesMut);

/// Shows the size only: the driver logs parameters, and row values belong in no log.
impl std::fmt::Debug for ArrayParameter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "array of {} bytes", self.0.len())
    }
}

impl ToSql for ArrayParameter {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.put_slice(&self.0);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_what_array_recv_reads() {
        let mut builder = ArrayBuilder::new();
        builder.push(Value::Binary(&7i32.to_be_bytes())).unwrap();
        builder.push(Value::Null).unwrap();
        assert_eq!(builder.form(), ArrayForm::Native);
        let ArrayParameter(bytes) = builder.finish(23);
        let words: Vec<i32> = bytes
            .chunks_exact(4)
            .map(|word| i32::from_be_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [1, 1, 23, 2, 1, 4, 7, -1]);
    }

    #[test]
    fn a_column_has_one_form() {
        let mut builder = ArrayBuilder::new();
        builder.push(Value::Null).unwrap();
        assert_eq!(builder.form(), ArrayForm::Text);
        builder.push(Value::Text(b"a")).unwrap();
        assert_eq!(builder.push(Value::Binary(b"a")), Err(MixedForms));
    }
}
