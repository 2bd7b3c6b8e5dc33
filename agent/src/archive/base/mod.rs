//! Base backups: schema and rows of one database at an exact LSN, in the archive.
//!
//! ```text
//! source ──temporary slot, exported snapshot──▶ take ──▶ store   <bases>/<LSN>/ schema.dump, *.sql.zst, data/NNNNN.copy.zst,
//!                                                                 last of all manifest.json
//! store ──▶ load ──▶ an empty database      verify, list, prune: what the store has, and what it may lose
//! ```
//! A base is where every restore begins; the change log leads on from its LSN. It needs nothing of ours to
//! be read: `psql` and `zstd` load it (`script`), on any version of PostgreSQL from the source's on.
//!
//! # Invariants
//! - A base is there when its manifest is, and the manifest is written last. What has none is a leftover of a
//!   backup that was killed, and neither listed nor loaded.
//! - Rows pass through: nothing of them is put on a disk here, and each connection holds a few MiB at most.
//! - What is loaded is what was written: sizes and SHA-256 of every object, rows of every part. A part whose sums are
//!   wrong is rolled back.
//! - The last base is never deleted, and no piece of the log that a kept base needs ([`retention`]).
//!
//! # What it does not do
//! It replicates nothing and reads no log; it does not create databases or roles; it retries nothing. Large
//! objects and tablespaces are left out, and said so. It does not encrypt: the store does.

mod bases;
mod error;
mod examine;
mod load;
mod manifest;
mod object;
mod prune;
mod repository;
pub mod retention;
mod rows;
mod script;
mod take;
mod wipe;
mod writing;

pub use bases::{Bases, VerifiedArchive};
pub use error::{BackupError, Flaw};
pub use examine::{Examined, examine};
pub use load::{LoadJob, Ownership, found_in, load, refresh_views};
pub use manifest::{DataFile, Manifest, Object};
pub use object::Sum;
pub use prune::{Pruned, prune};
pub use repository::{
    BaseSummary, FoundBases, Newest, Unusable, find, histories, manifest, verify,
};
pub use take::{TakeJob, take};
pub use wipe::wipe;
pub use writing::Patience;

#[cfg(test)]
pub(crate) use manifest::tests::example as example_manifest;
