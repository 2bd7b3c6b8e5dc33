//! The change log: batches as records outside of a database.
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
//! - A batch is described by itself: it brings the Relation messages its changes need.
//! - What comes out of [`Unpacker`] is, byte for byte, what went in, or an error. What a part says of itself (stream, term,
//!   where its batch begins and ends, which part it is) has a checksum of its own ([`is_intact`]).
//! - Bytes that somebody else wrote cost no more memory than their own length and [`PART_BYTES_MAX`].

mod frames;
mod gather;
mod pack;
mod seal;
#[cfg(test)]
mod tests;
mod unpack;

pub use dr_agent_proto::changelog::v1::{Compression, Part};
pub use frames::{Frames, FramesError, put_frame};
pub use gather::{FIRST_BATCH, Gap, Gather, Gathered, Worth};
pub use pack::{Author, Packing};
pub use seal::{is_intact, sealed};
pub use unpack::{UnpackError, Unpacker};

/// Meaning of the records this version writes, and the highest it reads.
pub const VERSION: u32 = 2;

/// Bytes of one part before compression that a reader accepts.
pub const PART_BYTES_MAX: u64 = 64 << 20;
