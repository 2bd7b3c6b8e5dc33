//! Where parts wait for others: in memory up to a limit, beyond it in a file.
//!
//! # Invariants
//! - The file has no name: whatever ends the process, it is gone.
//! - Its room is given back once nothing waits in it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use prost::Message as _;

use crate::changelog::Part;
use crate::spill::SpillError;

/// The parts of one reader.
#[derive(Debug)]
pub(super) struct Shelf {
    directory: PathBuf,
    memory_max: u64,
    disk_max: u64,
    memory: Arc<AtomicU64>,
    /// The file, and where the next part goes.
    disk: Option<(Arc<File>, u64)>,
}

/// A part on the shelf.
#[derive(Debug)]
pub(super) enum Kept {
    /// In memory.
    Memory {
        /// The part.
        part: Part,
        /// Given back with it.
        _share: Share,
    },
    /// In the file.
    Disk {
        /// It lives as long as something waits in it.
        file: Arc<File>,
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        length: usize,
        /// For errors.
        directory: PathBuf,
    },
}

/// A share of the memory, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    memory: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Shelf {
    /// Holds `memory_max` bytes in memory, and `disk_max` in a file of `directory`.
    pub(super) fn new(directory: PathBuf, memory_max: u64, disk_max: u64) -> Self {
        Self {
            directory,
            memory_max,
            disk_max,
            memory: Arc::default(),
            disk: None,
        }
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        let on_disk = self.disk.as_ref().map_or(0, |(_, end)| *end);
        self.memory.load(Ordering::Relaxed) + on_disk
    }

    /// Puts a part there.
    ///
    /// # Errors
    /// [`SpillError`]
    pub(super) fn put(&mut self, part: &Part) -> Result<Kept, SpillError> {
        let bytes = part.messages.len() as u64;
        if self.memory.load(Ordering::Relaxed) + bytes <= self.memory_max {
            self.memory.fetch_add(bytes, Ordering::Relaxed);
            let memory = Arc::clone(&self.memory);
            let _share = Share { memory, bytes };
            let part = part.clone();
            return Ok(Kept::Memory { part, _share });
        }
        let encoded = part.encode_to_vec();
        if self
            .disk
            .as_ref()
            .is_some_and(|(file, _)| Arc::strong_count(file) == 1)
        {
            self.disk = None;
        }
        let (file, end) = match &mut self.disk {
            Some(disk) => disk,
            None => {
                let file = create(&self.directory).map_err(failed("create", &self.directory))?;
                self.disk.insert((Arc::new(file), 0))
            }
        };
        let length = encoded.len();
        if *end + length as u64 > self.disk_max {
            return Err(SpillError::Full {
                limit: self.disk_max,
            });
        }
        file.write_all_at(&encoded, *end)
            .map_err(failed("write", &self.directory))?;
        let kept = Kept::Disk {
            file: Arc::clone(file),
            offset: *end,
            length,
            directory: self.directory.clone(),
        };
        *end += length as u64;
        Ok(kept)
    }
}

impl Kept {
    /// Takes the part from the shelf.
    ///
    /// # Errors
    /// [`SpillError`]
    pub(super) fn take(self) -> Result<Part, SpillError> {
        let (file, offset, length, directory) = match self {
            Self::Memory { part, .. } => return Ok(part),
            Self::Disk {
                file,
                offset,
                length,
                directory,
            } => (file, offset, length, directory),
        };
        let mut encoded = vec![0; length];
        file.read_exact_at(&mut encoded, offset)
            .map_err(failed("read", &directory))?;
        Part::decode(Bytes::from(encoded)).map_err(|error| SpillError::Damaged {
            path: directory,
            reason: error.to_string(),
        })
    }
}

fn create(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    tempfile::tempfile_in(directory)
}

fn failed(doing: &'static str, directory: &Path) -> impl FnOnce(io::Error) -> SpillError {
    let path = directory.to_owned();
    move |source| SpillError::Io {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(n: u32) -> Part {
        Part {
            part: n,
            messages: Bytes::from(vec![b'x'; 100]),
            ..Part::default()
        }
    }

    #[test]
    fn what_memory_does_not_hold_waits_in_a_file_whose_room_comes_back() {
        let home = tempfile::tempdir().unwrap();
        let mut shelf = Shelf::new(home.path().join("spill"), 250, 400);
        for round in 0..3 {
            let kept: Vec<Kept> = (0..5).map(|n| shelf.put(&part(n)).unwrap()).collect();
            assert!(matches!(kept[1], Kept::Memory { .. }), "{round}");
            assert!(matches!(kept[2], Kept::Disk { .. }), "{round}");
            assert!(shelf.bytes() > 500);
            assert!(matches!(shelf.put(&part(9)), Err(SpillError::Full { .. })));
            for (n, kept) in kept.into_iter().enumerate() {
                assert_eq!(kept.take().unwrap(), part(n as u32));
            }
        }
        // Nothing that has a name.
        assert_eq!(fs::read_dir(home.path().join("spill")).unwrap().count(), 0);
    }
}
