//! The archive: base backups and the change log, on S3 or in a directory, from which any moment can be restored.
//!
//! ```text
//! batches ─▶ Log ─▶ Spool (local files, fsync)
//!                     └─ a segment is full or old enough ─▶ upload ─zstd─▶ store   log/<start>-<end>.zst
//! ```
//!
//! # Invariants
//! - The pipeline offers a batch before its sink gets it. The slot is told what the sink has, so whatever
//!   the source has forgotten is in the spool or in the archive, also after `kill -9`.
//! - A segment leaves the spool once the store has it.
//! - What the archive lacks is never hidden: segments name where they begin and end, and a reader that finds
//!   no segment for a position says which range is missing.
//!
//! # What it does not do
//! Segments may overlap, after a restart or with two writers: a reader takes each transaction once, by its LSN.

mod ahead;
mod chain;
mod change_log;
mod error;
mod idle;
mod layout;
mod recover;
#[cfg(test)]
mod repair_tests;
mod segment;
mod spool;
mod spooled;
#[cfg(test)]
mod tests;
mod unzstd;
mod uploading;
mod way;

pub use ahead::Ahead;
pub use chain::LogChain;
pub use change_log::{
    Closed, Log, LogHandle, LogReach, LogSettings, Origin, TakenBatch, upload_leftover,
};
pub use error::ArchiveError;
pub use idle::idle_age;
pub use layout::{Layout, Span};
pub use segment::{SegmentReader, verify};
pub use spool::{Spool, SpoolError, SpoolLimits, SpoolSegment};
pub use spooled::Spooled;
pub use way::Way;
