//! ● The values of one row inside a message, read lazily and without a copy.
//!
//! # Invariants
//! A [`Tuple`] can only be made by the decoder, which has checked every kind and every length in it;
//! that is why its iterator cannot fail.
//!
//! # What it does not do
//! It does not look into the values: text is in the connection's client encoding, binary is what the
//! type's `send` function wrote, and neither is checked here.

use std::fmt;
use std::iter::FusedIterator;

use bytes::Bytes;

use super::decode::ByteReader;
use super::error::DecodeError;

/// One column's value as it travels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL null. In the key tuple of an update or delete also every column outside the key.
    Null,
    /// A TOASTed value that the update did not touch and the source therefore did not send.
    UnchangedToast,
    /// The type's text output, in the client encoding of the connection.
    Text(&'a [u8]),
    /// The type's binary output; only if the stream was started with `binary`.
    Binary(&'a [u8]),
}

/// Shows the size only: row values belong in no log.
impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("Null"),
            Self::UnchangedToast => f.write_str("UnchangedToast"),
            Self::Text(value) => write!(f, "Text({} bytes)", value.len()),
            Self::Binary(value) => write!(f, "Binary({} bytes)", value.len()),
        }
    }
}

/// In which form values travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Form {
    /// As text.
    Text,
    /// As the type's `send` function writes them; where a type has none, as text.
    Binary,
}

/// The values of one row, in the column order of its relation: a validated slice of the message.
#[derive(Clone, PartialEq, Eq)]
pub struct Tuple {
    columns: u16,
    has_unchanged_toast: bool,
    form: Option<Form>,
    bytes: Bytes,
}

impl Tuple {
    const NULL: u8 = b'n';
    const UNCHANGED_TOAST: u8 = b'u';
    const TEXT: u8 = b't';
    const BINARY: u8 = b'b';

    /// Bytes of the column count in front of the values.
    const COUNT_BYTES: usize = 2;

    /// Checks one tuple and takes it out of the message.
    pub(super) fn read(reader: &mut ByteReader<'_>) -> Result<Self, DecodeError> {
        let columns = reader.count16()?;
        let start = reader.left();
        let mut has_unchanged_toast = false;
        let mut form = None;
        for _ in 0..columns {
            let of_value = match reader.u8()? {
                Self::NULL => continue,
                Self::UNCHANGED_TOAST => {
                    has_unchanged_toast = true;
                    continue;
                }
                Self::TEXT => Form::Text,
                Self::BINARY => Form::Binary,
                kind => return Err(DecodeError::UnknownValueKind(kind)),
            };
            form = form.max(Some(of_value));
            let length = reader.length()?;
            reader.take(length)?;
        }
        let bytes = &start[..start.len() - reader.left().len()];
        Ok(Self {
            columns,
            has_unchanged_toast,
            form,
            bytes: reader.share(bytes),
        })
    }

    /// The number of columns.
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// Whether the relation has no (published) column at all.
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// Whether some value was left out because it is only in TOAST storage.
    pub fn has_unchanged_toast(&self) -> bool {
        self.has_unchanged_toast
    }

    /// In which form its values came: binary if any did. `None` if it has none.
    pub fn form(&self) -> Option<Form> {
        self.form
    }

    /// The values in column order.
    pub fn values(&self) -> Values<'_> {
        Values {
            left: &self.bytes,
            columns: self.columns,
        }
    }

    /// One of the values, to outlive the tuple: the same memory. `None` for bytes that are not of this tuple.
    pub fn share(&self, value: &[u8]) -> Option<Bytes> {
        share(&self.bytes, value)
    }

    /// Bytes the tuple takes in the message, count and lengths included.
    pub fn wire_bytes(&self) -> usize {
        Self::COUNT_BYTES + self.bytes.len()
    }
}

/// The part of `whole` that `part` is, without a copy.
pub fn share(whole: &Bytes, part: &[u8]) -> Option<Bytes> {
    let (whole_at, part_at) = (whole.as_ptr_range(), part.as_ptr_range());
    let within = whole_at.start <= part_at.start && part_at.end <= whole_at.end;
    within.then(|| whole.slice_ref(part))
}

/// Shows the size only: row values belong in no log.
impl fmt::Debug for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tuple({} columns, {} bytes)",
            self.columns,
            self.wire_bytes()
        )
    }
}

impl<'a> IntoIterator for &'a Tuple {
    type Item = Value<'a>;
    type IntoIter = Values<'a>;

    fn into_iter(self) -> Values<'a> {
        self.values()
    }
}

/// Iterator over the values of a [`Tuple`].
#[derive(Clone)]
pub struct Values<'a> {
    left: &'a [u8],
    columns: u16,
}

impl<'a> Values<'a> {
    /// Takes a length word and as many bytes.
    fn counted(&mut self) -> &'a [u8] {
        let (length, rest) = self
            .left
            .split_first_chunk()
            .expect("the decoder checked that the length is there");
        let length = u32::from_be_bytes(*length) as usize;
        let (value, rest) = rest.split_at(length);
        self.left = rest;
        value
    }
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.columns = self.columns.checked_sub(1)?;
        let (&kind, rest) = self
            .left
            .split_first()
            .expect("the decoder checked that every column has a kind");
        self.left = rest;
        Some(match kind {
            Tuple::NULL => Value::Null,
            Tuple::UNCHANGED_TOAST => Value::UnchangedToast,
            Tuple::TEXT => Value::Text(self.counted()),
            Tuple::BINARY => Value::Binary(self.counted()),
            _ => unreachable!("the decoder refused every other kind"),
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let columns = usize::from(self.columns);
        (columns, Some(columns))
    }
}

impl ExactSizeIterator for Values<'_> {}
impl FusedIterator for Values<'_> {}
