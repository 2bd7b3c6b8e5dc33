//! Where parts wait for others: in memory up to a limit, beyond it in files.
//!
//! # Invariants
//! - The files have no names: whatever ends the process, they are gone.
//! - A file ends at a certain size, and goes with the last part that waits in it: what has passed through takes no room.
//! - Memory and disk stay within what they were given; the disk is shared with the spill files of large transactions, for
//!   which some of it is left. A part that is larger than that has to go somewhere: alone, it is in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use prost::Message as _;

use crate::flow::changelog::Part;
use crate::flow::spill::{SpillError, SpillRoom, SpillSpace};
use crate::private;

/// A file ends at this size. Small, so that few stragglers hold little; but each open file counts for the process, too.
const FILE_BYTES: u64 = 64 << 20;

/// No more files than this hold a full disk, however large it is, and a small one is held by some.
const FILES: (u64, u64) = (16, 256);

/// The part of the disk that is left for large transactions on their way to the replica, one in so many: what waits for
/// others must not keep those from leaving that it waits for.
const LEFT: u64 = 8;

/// The parts of one reader.
#[derive(Debug)]
pub(super) struct Overflow {
    directory: PathBuf,
    memory_max: u64,
    disk_max: u64,
    file_bytes: u64,
    room: SpillRoom,
    memory: Arc<AtomicU64>,
    disk: Arc<AtomicU64>,
    /// What all files take, with what does not wait in them any more.
    files: Arc<AtomicU64>,
    /// The file that is being written.
    file: Option<Arc<OverflowFile>>,
}

/// A part on the shelf.
#[derive(Debug)]
pub(super) enum Held {
    /// In memory.
    Memory {
        /// The part.
        part: Part,
        /// Given back with it.
        _share: Share,
    },
    /// In a file.
    Disk {
        /// It lives as long as something waits in it.
        file: Arc<OverflowFile>,
        /// Where the part begins.
        offset: u64,
        /// Its bytes.
        length: usize,
        /// Given back with it.
        _share: Share,
    },
}

/// A share of what waits, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    of: Arc<AtomicU64>,
    bytes: u64,
}

impl Share {
    fn take(of: &Arc<AtomicU64>, bytes: u64) -> Self {
        of.fetch_add(bytes, Ordering::Relaxed);
        let of = Arc::clone(of);
        Self { of, bytes }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A file without a name.
#[derive(Debug)]
pub(super) struct OverflowFile {
    file: File,
    directory: PathBuf,
    room: SpillRoom,
    /// What was written, whether or not it still waits.
    written: AtomicU64,
    /// The same of all files.
    files: Arc<AtomicU64>,
}

impl Drop for OverflowFile {
    fn drop(&mut self) {
        let written = self.written.load(Ordering::Relaxed);
        self.files.fetch_sub(written, Ordering::Relaxed);
        self.room.give_back(written);
    }
}

impl OverflowFile {
    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> SpillError {
        failed(doing, self.directory.clone())
    }
}

impl Overflow {
    /// Holds `memory_max` bytes in memory, and beyond that what the disk of `space` has room for.
    pub(super) fn new(space: &SpillSpace, memory_max: u64) -> Self {
        let room = space.room();
        let disk = room.limit();
        Self {
            directory: space.directory().to_owned(),
            memory_max,
            disk_max: disk - disk / LEFT,
            file_bytes: (disk / FILES.0).min(FILE_BYTES).max(disk / FILES.1),
            room,
            memory: Arc::default(),
            disk: Arc::default(),
            files: Arc::default(),
            file: None,
        }
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.memory.load(Ordering::Relaxed) + self.disk.load(Ordering::Relaxed)
    }

    /// Whether large transactions that are on their way to the replica hold some of the room, which they will give back.
    pub(super) fn others_have_room(&self) -> bool {
        self.room.used() > self.files.load(Ordering::Relaxed)
    }

    /// Puts a part there.
    ///
    /// # Errors
    /// [`SpillError`]
    pub(super) fn put(&mut self, part: &Part) -> Result<Held, SpillError> {
        let bytes = part.messages.len() as u64;
        let held = self.memory.load(Ordering::Relaxed);
        if held == 0 || held + bytes <= self.memory_max {
            return Ok(Held::Memory {
                _share: Share::take(&self.memory, bytes),
                part: part.clone(),
            });
        }
        let encoded = part.encode_to_vec();
        let length = encoded.len();
        let file = self.file()?;
        self.room.take(length as u64, self.disk_max)?;
        self.files.fetch_add(length as u64, Ordering::Relaxed);
        let offset = file.written.fetch_add(length as u64, Ordering::Relaxed);
        file.file
            .write_all_at(&encoded, offset)
            .map_err(file.failed("write"))?;
        Ok(Held::Disk {
            _share: Share::take(&self.disk, length as u64),
            file,
            offset,
            length,
        })
    }

    /// The file that is written now. One that is full, or in which nothing waits any more, is left to what still does.
    fn file(&mut self) -> Result<Arc<OverflowFile>, SpillError> {
        let current = self.file.take().filter(|file| {
            let written = file.written.load(Ordering::Relaxed);
            written < self.file_bytes && Arc::strong_count(file) > 1
        });
        let file = match current {
            Some(file) => file,
            None => Arc::new(self.create()?),
        };
        Ok(Arc::clone(self.file.insert(file)))
    }

    fn create(&self) -> Result<OverflowFile, SpillError> {
        let create = || {
            private::create_dir_all(&self.directory)?;
            tempfile::tempfile_in(&self.directory)
        };
        Ok(OverflowFile {
            file: create().map_err(failed("create", self.directory.clone()))?,
            directory: self.directory.clone(),
            room: self.room.clone(),
            written: AtomicU64::new(0),
            files: Arc::clone(&self.files),
        })
    }
}

impl Held {
    /// Takes the part from the shelf.
    ///
    /// # Errors
    /// [`SpillError`]
    pub(super) fn take(self) -> Result<Part, SpillError> {
        let (file, offset, length) = match self {
            Self::Memory { part, .. } => return Ok(part),
            Self::Disk {
                file,
                offset,
                length,
                ..
            } => (file, offset, length),
        };
        let mut encoded = vec![0; length];
        file.file
            .read_exact_at(&mut encoded, offset)
            .map_err(file.failed("read"))?;
        Part::decode(Bytes::from(encoded)).map_err(|error| SpillError::Damaged {
            path: file.directory.clone(),
            reason: error.to_string(),
        })
    }
}

fn failed(doing: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> SpillError {
    move |source| SpillError::Io {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn part(n: u32) -> Part {
        Part {
            part: n,
            messages: Bytes::from(vec![b'x'; 100]),
            ..Part::default()
        }
    }

    fn shelf(home: &tempfile::TempDir, memory: u64, disk: u64) -> (SpillSpace, Overflow) {
        let space = SpillSpace::open(home.path().join("spill"), disk).unwrap();
        let shelf = Overflow::new(&space, memory);
        (space, shelf)
    }

    #[test]
    fn what_memory_does_not_hold_waits_in_a_file_whose_room_comes_back() {
        let home = tempfile::tempdir().unwrap();
        let (_space, mut shelf) = shelf(&home, 250, 400);
        for round in 0..3 {
            let kept: Vec<Held> = (0..5).map(|n| shelf.put(&part(n)).unwrap()).collect();
            assert!(matches!(kept[1], Held::Memory { .. }), "{round}");
            assert!(matches!(kept[2], Held::Disk { .. }), "{round}");
            assert!(shelf.bytes() > 500);
            assert!(matches!(shelf.put(&part(9)), Err(SpillError::Full { .. })));
            for (n, kept) in kept.into_iter().enumerate() {
                assert_eq!(kept.take().unwrap(), part(n as u32));
            }
            assert_eq!(shelf.bytes(), 0);
        }
        // Nothing that has a name.
        assert_eq!(
            std::fs::read_dir(home.path().join("spill"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn a_part_larger_than_everything_waits_alone() {
        let home = tempfile::tempdir().unwrap();
        let (_space, mut shelf) = shelf(&home, 10, 50);
        for n in 0..3 {
            let kept = shelf.put(&part(n)).unwrap();
            assert!(shelf.put(&part(9)).is_err());
            assert_eq!(kept.take().unwrap(), part(n));
        }
    }

    #[test]
    fn much_more_than_the_limit_passes_through_while_little_waits() {
        let home = tempfile::tempdir().unwrap();
        let (space, mut shelf) = shelf(&home, 0, 16 << 10);
        let mut waiting = VecDeque::new();
        for n in 0..10_000 {
            waiting.push_back(shelf.put(&part(n)).unwrap());
            // There is always something that waits.
            if waiting.len() > 20 {
                let first = waiting.pop_front().unwrap();
                assert_eq!(first.take().unwrap(), part(n - 20));
            }
            assert!(shelf.bytes() < 21 * 120, "{}", shelf.bytes());
            assert!(shelf.bytes() > 0);
        }
        drop((waiting, shelf));
        // Nothing is left behind of what was taken.
        space.room().take(16 << 10, 16 << 10).unwrap();
    }

    #[test]
    fn some_of_the_disk_is_left_for_what_others_wait_for() {
        let home = tempfile::tempdir().unwrap();
        let (space, mut shelf) = shelf(&home, 0, 16 << 10);
        let mut waiting = Vec::new();
        let full = loop {
            match shelf.put(&part(0)) {
                Ok(kept) => waiting.push(kept),
                Err(error) => break error,
            }
        };
        assert!(matches!(full, SpillError::Full { limit } if limit == 16 << 10));
        assert!(shelf.bytes() > 13 << 10, "{}", shelf.bytes());
        let room = space.room();
        assert!(!shelf.others_have_room());
        room.take(2 << 10, room.limit()).unwrap();
        assert!(room.take(2 << 10, room.limit()).is_err());
        // Full as it is, somebody else gives some back.
        assert!(shelf.others_have_room());
        room.give_back(2 << 10);
        waiting.clear();
        assert!(!shelf.others_have_room());
    }
}
