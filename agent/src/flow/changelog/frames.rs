//! ● Parts one after the other in a file: each preceded by its length as a varint.
//!
//! # What it does not do
//! It does not look into a part beyond decoding it: sums and order are [`Unpacker`](super::Unpacker)'s.

use bytes::{Buf as _, Bytes, BytesMut};
use prost::Message as _;

use super::{PART_BYTES_MAX, Part, PartError, decode};

/// Longest varint of a 64-bit number.
const VARINT_MAX: usize = 10;

/// Bytes of a part beside its messages: a few numbers and the stream's name.
const HEADER_MAX: u64 = 64 << 10;

/// The bytes are no parts.
#[derive(Debug, thiserror::Error)]
pub enum FramesError {
    /// A length that cannot be.
    #[error("a record's length makes no sense")]
    Length,
    /// Not what was written.
    #[error("read a record")]
    Part(#[from] PartError),
    /// The bytes end too early.
    #[error("it ends inside a record")]
    Cut,
}

/// Appends a part.
pub fn put_frame(part: &Part, out: &mut BytesMut) {
    out.reserve(part.encoded_len() + VARINT_MAX);
    part.encode_length_delimited(out)
        .expect("there is room for it");
}

/// Takes bytes as they come and gives parts.
#[derive(Debug, Default)]
pub struct Frames {
    gathered: BytesMut,
    /// Bytes of all parts given.
    taken: u64,
}

impl Frames {
    /// Takes bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.gathered.extend_from_slice(bytes);
    }

    /// The next part; `None` until more bytes have come.
    ///
    /// # Errors
    /// When what has come is no part.
    pub fn next_part(&mut self) -> Result<Option<Part>, FramesError> {
        let Some(prefix) = prefix(&self.gathered)? else {
            return Ok(None);
        };
        let (header, length) = prefix;
        if self.gathered.len() < header + length {
            return Ok(None);
        }
        self.gathered.advance(header);
        let encoded: Bytes = self.gathered.split_to(length).freeze();
        self.taken += (header + length) as u64;
        Ok(Some(decode(encoded)?))
    }

    /// The part that these bytes begin with, if they do. Cheap where they do not.
    pub fn peek(bytes: &[u8]) -> Option<Part> {
        // Field 1, the version, comes first.
        const VERSION_TAG: u8 = 1 << 3;
        let (header, length) = prefix(bytes).ok()??;
        let encoded = bytes.get(header..header + length)?;
        if encoded.first() != Some(&VERSION_TAG) {
            return None;
        }
        decode(Bytes::copy_from_slice(encoded)).ok()
    }

    /// How many bytes the parts given so far took.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// To be asked once no more bytes come.
    ///
    /// # Errors
    /// [`FramesError::Cut`] if part of a part is left.
    pub fn finish(&self) -> Result<(), FramesError> {
        match self.gathered.is_empty() {
            true => Ok(()),
            false => Err(FramesError::Cut),
        }
    }
}

/// Bytes of the length, and the length.
fn prefix(gathered: &[u8]) -> Result<Option<(usize, usize)>, FramesError> {
    let Some(end) = gathered
        .iter()
        .take(VARINT_MAX)
        .position(|byte| byte & 0x80 == 0)
    else {
        return match gathered.len() < VARINT_MAX {
            true => Ok(None),
            false => Err(FramesError::Length),
        };
    };
    let length =
        prost::decode_length_delimiter(&gathered[..=end]).map_err(|_| FramesError::Length)?;
    if length as u64 > PART_BYTES_MAX + HEADER_MAX {
        return Err(FramesError::Length);
    }
    Ok(Some((end + 1, length)))
}
