//! Spill files: where the beginning of a transaction goes that is too large for memory.
//!
//! Written by the source task while the transaction arrives ([`Spills`]), read by the replica sink while
//! it is applied ([`SpillReader`]), removed when the transaction is dropped. The format is
//! `dr_agent.journal.v1.Frame` (package `dr-agent-proto`): runs of pgoutput messages under zstd with a
//! checksum. Each file carries the relation messages its changes need, so it is read without any other
//! knowledge.
//!
//! # Invariants
//! - What a rolled back subtransaction did is not read back, also when it was written before that.
//! - All files of one stream together stay within `limits.spill_bytes`, those included in which records of a Kinesis stream
//!   wait for others; beyond it the pipeline stops with an error that names the setting.
//! - Spill files are never needed after a crash: the source sends the transaction again. What an
//!   earlier agent left is removed when the space is opened.

mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use self::reader::SpillReader;
pub use self::writer::{SpillWriter, Spills};
use crate::error::{Class, Classify, disk_class};
use crate::private;

/// From version 2 on a record names the (sub)transaction that made the change; from 3 on the messages follow their frame.
const FRAME_VERSION: u32 = 3;

/// What can go wrong with a spill file.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The file system refused.
    #[error("{doing} spill file {}", path.display())]
    Io {
        /// Verb.
        doing: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The limit is reached.
    #[error(
        "a transaction needs more than what is left of the {limit} bytes of limits.spill_bytes"
    )]
    Full {
        /// The limit, in bytes.
        limit: u64,
    },
    /// The file does not hold what was written.
    #[error("spill file {}: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Classify for SpillError {
    fn class(&self) -> Class {
        match self {
            Self::Io { source, .. } => disk_class(source),
            Self::Full { .. } => Class::Definite,
            Self::Damaged { .. } => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => Some(
                "limits.spill_directory must be writable for the agent and have room for the \
                 largest transaction"
                    .to_owned(),
            ),
            Self::Full { .. } => Some(
                "raise limits.spill_bytes (and give the disk that room), then send SIGHUP to the agent \
                 (systemctl reload); the transaction is sent again from its beginning"
                    .to_owned(),
            ),
            Self::Damaged { .. } => {
                Some("the transaction is fetched again; if it repeats, check the disk".to_owned())
            }
        }
    }
}

/// What all files of one stream may take together. Clones count together.
#[derive(Clone, Debug)]
pub struct SpillRoom {
    limit: u64,
    used: Arc<AtomicU64>,
}

impl SpillRoom {
    /// The whole of it, in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How much of it is in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes so many bytes, if no more than `most` are in use with them.
    ///
    /// # Errors
    /// [`SpillError::Full`]
    pub fn take(&self, bytes: u64, most: u64) -> Result<(), SpillError> {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if used > most {
            self.give_back(bytes);
            return Err(SpillError::Full { limit: self.limit });
        }
        Ok(())
    }

    /// Gives back what was taken.
    pub fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The spill files of one stream: a directory and a budget.
#[derive(Debug)]
pub struct SpillSpace {
    directory: PathBuf,
    room: SpillRoom,
    files: u64,
}

impl SpillSpace {
    /// Opens the space and removes what an earlier agent left. The directory is made when the first
    /// file is.
    pub fn open(directory: PathBuf, limit: u64) -> Result<Self, SpillError> {
        match fs::remove_dir_all(&directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(SpillError::Io {
                    doing: "remove old",
                    path: directory,
                    source,
                });
            }
        }
        Ok(Self {
            directory,
            room: SpillRoom {
                limit,
                used: Arc::default(),
            },
            files: 0,
        })
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What they may take, to be shared with whoever else puts something there.
    pub fn room(&self) -> SpillRoom {
        self.room.clone()
    }

    /// Begins a file.
    pub fn create(&mut self) -> Result<SpillWriter, SpillError> {
        self.files += 1;
        let path = self.directory.join(format!("{}.spill", self.files));
        let at = |source| SpillError::Io {
            doing: "create",
            path: path.clone(),
            source,
        };
        private::create_dir_all(&self.directory).map_err(at)?;
        let file = File::create(&path).map_err(at)?;
        let spill = SpillFile {
            path: path.clone(),
            bytes: 0,
            room: self.room(),
            aborted: Arc::default(),
        };
        Ok(SpillWriter::new(file, spill))
    }
}

/// A finished spill file; removed when dropped.
#[derive(Debug)]
pub struct SpillFile {
    path: PathBuf,
    bytes: u64,
    room: SpillRoom,
    /// Subtransactions whose changes are in the file and do not count.
    aborted: Arc<HashSet<u32>>,
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        self.room.give_back(self.bytes);
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "spill file not removed");
        }
    }
}

impl SpillFile {
    /// Reads the file from its beginning; may be done more than once.
    pub fn reader(&self) -> Result<SpillReader, SpillError> {
        SpillReader::new(self)
    }
}

/// Where the spill files of `stream` live under the configured directory.
pub fn directory_of(configured: &Path, stream: &crate::names::stream::StreamName) -> PathBuf {
    configured.join(stream.as_str())
}
