//! ● The change log: batches as records outside of a database.
//!
//! ```text
//! Batch ─▶ Packing ─Part, Part, …─▶ a segment of the archive, a record of a stream
//!                                        └─▶ Unpacker ─pgoutput messages─▶ txn::Assembler ─▶ the same transactions
//! ```
//! Pure, except that a large transaction is read from its spill file. The format is `dr_agent.changelog.v1.Part` (package
//! `dr-agent-proto`). Its payload is what the source's walsender would send, so one decoder serves every
//! way that changes can take.
//!
//! # Invariants
//! - A batch is described by itself: it brings the Relation messages its changes need, and the Type messages those need.
//! - What comes out of [`decode`] and [`Unpacker`] is, byte for byte, what went in, or an error.
//! - Bytes that somebody else wrote cost no more memory than their own length and [`PART_BYTES_MAX`].

mod frames;
mod gather;
mod pack;
#[cfg(test)]
mod tests;
mod unpack;

use bytes::Bytes;
use prost::Message as _;

use crate::names::history::History;
pub use dr_agent_proto::changelog::v1::{Compression, Part};
pub use frames::{Frames, FramesError, put_frame};
pub use gather::{FIRST_BATCH, Gap, Gather, Gathered, Worth};
pub use pack::{Author, Packing};
pub use unpack::{UnpackError, Unpacker};

/// What a part's LSNs are of.
pub fn history_of(part: &Part) -> History {
    History {
        system_identifier: part.system_identifier,
        began: part.began,
    }
}

/// Meaning of the records this version writes, and the highest it reads.
pub const VERSION: u32 = 2;

/// From this version on a part's header has a sum of its own.
const SUMMED_HEADER: u32 = 2;

/// Why bytes are no part.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// Not what the format says.
    #[error("it cannot be decoded")]
    Decode(#[from] prost::DecodeError),
    /// What it says of itself is not what was written.
    #[error("the checksum of its header differs")]
    Header,
}

/// Reads a part; what it says of itself is what was written. Its messages are [`Unpacker`]'s, which also refuses versions it does
/// not know.
///
/// # Errors
/// [`PartError`]
pub fn decode(bytes: Bytes) -> Result<Part, PartError> {
    let part = Part::decode(bytes)?;
    let is_summed = (SUMMED_HEADER..=VERSION).contains(&part.version);
    match is_summed && part.header_crc32c != header_sum(&part) {
        true => Err(PartError::Header),
        false => Ok(part),
    }
}

fn header_sum(part: &Part) -> u32 {
    let header = Part {
        messages: Bytes::new(),
        header_crc32c: 0,
        ..part.clone()
    };
    crc32c::crc32c(&header.encode_to_vec())
}

/// Bytes of one part before compression that a reader accepts.
pub const PART_BYTES_MAX: u64 = 64 << 20;
