//! ● Parts become messages.
//!
//! # Invariants
//! - The parts of a batch come in order and without a gap, or there is an error; ordering them is the caller's.
//! - A message is handed out once all of its bytes have been checked.

use bytes::{Buf as _, Bytes, BytesMut};

use super::{Compression, PART_BYTES_MAX, Part, VERSION};
use crate::error::{Class, Classify};

/// Why parts cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A later version of dr-agent wrote it.
    #[error("change-log record of version {version}; this dr-agent reads up to {VERSION}")]
    Version {
        /// What it says.
        version: u32,
    },
    /// The bytes are not those that were written.
    #[error("part {part} of batch {batch} is damaged: {reason}")]
    Damaged {
        /// Number of the batch.
        batch: i64,
        /// Position of the part in it.
        part: u32,
        /// What is wrong.
        reason: String,
    },
    /// Another part was due.
    #[error("part {part} of batch {batch} where part {due} of batch {due_batch} was due")]
    OutOfOrder {
        /// Number of the batch.
        batch: i64,
        /// Position of the part in it.
        part: u32,
        /// The batch that has begun.
        due_batch: i64,
        /// The part that was due.
        due: u32,
    },
}

impl Classify for UnpackError {
    fn class(&self) -> Class {
        Class::Definite
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Version { .. } => "use the dr-agent that wrote it, or a later one".to_owned(),
            Self::Damaged { .. } | Self::OutOfOrder { .. } => {
                "the record is not what dr-agent wrote: look for another copy of it, or begin anew from a base backup \
                 behind it"
                    .to_owned()
            }
        })
    }
}

/// Reads the parts of one batch after the other.
#[derive(Debug, Default)]
pub struct Unpacker {
    /// Writer and number of the batch that has begun, and the part that is due.
    open: Option<(u64, i64, u32)>,
    gathered: BytesMut,
}

impl Unpacker {
    /// Whether a batch has begun and not ended.
    pub fn is_inside_a_batch(&self) -> bool {
        self.open.is_some()
    }

    /// Takes the next part and hands out the messages that are complete with it; says whether the batch
    /// is.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing more can be read then.
    pub fn push(&mut self, part: &Part, mut take: impl FnMut(Bytes)) -> Result<bool, UnpackError> {
        if part.version == 0 || part.version > VERSION {
            let version = part.version;
            return Err(UnpackError::Version { version });
        }
        let (writer, batch, due) = *self.open.get_or_insert((part.writer, part.batch, 0));
        if (part.writer, part.batch, part.part) != (writer, batch, due) {
            return Err(UnpackError::OutOfOrder {
                batch: part.batch,
                part: part.part,
                due_batch: batch,
                due,
            });
        }
        let damaged = |reason: &str| UnpackError::Damaged {
            batch: part.batch,
            part: part.part,
            reason: reason.to_owned(),
        };
        self.gathered
            .extend_from_slice(&raw(part).map_err(|reason| damaged(&reason))?);
        while let Some(message) = next_message(&mut self.gathered) {
            take(message);
        }
        let last = part.parts != 0;
        if last && part.parts != part.part + 1 {
            return Err(damaged("it is the last one and not the last"));
        }
        if last && !self.gathered.is_empty() {
            return Err(damaged("the batch ends inside a message"));
        }
        self.open = (!last).then_some((writer, batch, due + 1));
        Ok(last)
    }
}

/// The bytes before compression, checked.
fn raw(part: &Part) -> Result<Bytes, String> {
    if part.raw_bytes > PART_BYTES_MAX {
        return Err(format!("it claims {} bytes", part.raw_bytes));
    }
    let capacity = usize::try_from(part.raw_bytes).map_err(|error| error.to_string())?;
    let raw = match part.compression() {
        Compression::None => part.messages.clone(),
        Compression::Zstd => zstd::bulk::decompress(&part.messages, capacity)
            .map_err(|error| error.to_string())?
            .into(),
        Compression::Unspecified => return Err("its compression is unknown".to_owned()),
    };
    if raw.len() != capacity || crc32c::crc32c(&raw) != part.crc32c {
        return Err("its checksum differs".to_owned());
    }
    Ok(raw)
}

fn next_message(gathered: &mut BytesMut) -> Option<Bytes> {
    let length = gathered.get(..4)?.try_into().ok().map(u32::from_be_bytes)?;
    let length = usize::try_from(length).ok()?;
    if gathered.len() - 4 < length {
        return None;
    }
    gathered.advance(4);
    Some(gathered.split_to(length).freeze())
}
