//! Writes spill files: one writer per transaction, and all writers of a connection together.
//!
//! # Invariants
//! - What is gathered for frames that are not written yet takes at most [`GATHERING_MAX`] frames, however many
//!   transactions are open.
//! - A change that fills a frame by itself is written from where it is: no copy of it is made, compressed or not.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use dr_agent_proto::journal::v1::Frame;
use prost::Message as _;

use super::{FRAME_VERSION, SpillError, SpillFile, SpillSpace};
use crate::flow::transaction::{Pending, SourceRelation};

/// Bytes of messages gathered into one frame. Large enough for zstd to find repetition, small
/// enough to be decompressed at once without being noticed in the memory limit.
pub(super) const FRAME_BYTES: usize = 1 << 20;

/// Fast: the spill competes with the apply for two cores, and is read once.
const ZSTD_LEVEL: i32 = 1;

/// So many writers may have part of a frame in memory; beyond it the fullest is written out.
const GATHERING_MAX: usize = 4;

/// The maker of a description: it belongs to the file, and is never skipped. No transaction has this id.
const NOBODY: u32 = 0;

/// The parts on disk of all transactions that are open on one connection, by their xids.
///
/// Dropped with its files when the connection ends: everything is sent again.
#[derive(Debug)]
pub struct Spills {
    space: SpillSpace,
    writers: HashMap<u32, SpillWriter>,
}

impl Spills {
    /// Nothing is spilled yet.
    pub fn new(space: SpillSpace) -> Self {
        Self {
            space,
            writers: HashMap::new(),
        }
    }

    /// Appends to the file of a transaction; begins it if there is none.
    pub fn append(&mut self, xid: u32, pending: &Pending) -> Result<(), SpillError> {
        if pending.is_empty() {
            return Ok(());
        }
        let writer = match self.writers.entry(xid) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.space.create()?),
        };
        writer.append(pending)?;
        self.bound()
    }

    /// Whether part of this transaction is on disk.
    pub fn holds(&self, xid: u32) -> bool {
        self.writers.contains_key(&xid)
    }

    /// Completes the file of a committed transaction, if there is one; changes of the `aborted`
    /// subtransactions will not be read back.
    pub fn finish(
        &mut self,
        xid: u32,
        aborted: HashSet<u32>,
    ) -> Result<Option<SpillFile>, SpillError> {
        let writer = self.writers.remove(&xid);
        writer.map(|writer| writer.finish(aborted)).transpose()
    }

    /// Removes the file of a transaction that was rolled back.
    pub fn discard(&mut self, xid: u32) {
        self.writers.remove(&xid);
    }

    /// Removes the files of all transactions that are not complete.
    pub fn clear(&mut self) {
        self.writers.clear();
    }

    /// Whether no transaction has a part on disk.
    pub fn is_empty(&self) -> bool {
        self.writers.is_empty()
    }

    /// How many writers have part of a frame in memory.
    pub(super) fn gathering(&self) -> usize {
        let writers = self.writers.values();
        writers.filter(|writer| !writer.gathered.is_empty()).count()
    }

    fn bound(&mut self) -> Result<(), SpillError> {
        if self.gathering() <= GATHERING_MAX {
            return Ok(());
        }
        let fullest = self
            .writers
            .values_mut()
            .max_by_key(|writer| writer.gathered.len());
        fullest.map_or(Ok(()), SpillWriter::write_frame)
    }
}

/// A spill file that is being written.
#[derive(Debug)]
pub struct SpillWriter {
    file: File,
    spill: SpillFile,
    sequence: u64,
    gathered: BytesMut,
    /// Which description of each relation id the file holds last.
    described: HashMap<u32, Arc<SourceRelation>>,
}

impl SpillWriter {
    pub(super) fn new(file: File, spill: SpillFile) -> Self {
        Self {
            file,
            spill,
            sequence: 0,
            gathered: BytesMut::new(),
            described: HashMap::new(),
        }
    }

    /// Appends changes in order.
    pub fn append(&mut self, pending: &Pending) -> Result<(), SpillError> {
        for (maker, change) in pending.iter() {
            for relation in change.relations() {
                let id = relation.relation.id;
                if !self
                    .described
                    .get(&id)
                    .is_some_and(|known| Arc::ptr_eq(known, relation))
                {
                    self.described.insert(id, Arc::clone(relation));
                    for message in relation.messages() {
                        self.gather(NOBODY, &message)?;
                    }
                }
            }
            self.gather(maker, &change.message)?;
            if self.gathered.len() >= FRAME_BYTES {
                self.write_frame()?;
            }
        }
        Ok(())
    }

    /// Writes what is left and closes the file.
    pub fn finish(mut self, aborted: HashSet<u32>) -> Result<SpillFile, SpillError> {
        if !self.gathered.is_empty() {
            self.write_frame()?;
        }
        self.spill.aborted = Arc::new(aborted);
        Ok(self.spill)
    }

    fn gather(&mut self, maker: u32, message: &[u8]) -> Result<(), SpillError> {
        let length = u32::try_from(message.len()).expect("PostgreSQL messages are below 2 GiB");
        let mut head = [0; 8];
        head[..4].copy_from_slice(&length.to_be_bytes());
        head[4..].copy_from_slice(&maker.to_be_bytes());
        if message.len() >= FRAME_BYTES {
            let gathered = std::mem::take(&mut self.gathered);
            return self.write(&[&gathered, &head, message]);
        }
        if self.gathered.capacity() == 0 {
            // A little more, so that the change that fills it does not make it grow.
            self.gathered.reserve(FRAME_BYTES + FRAME_BYTES / 16);
        }
        self.gathered.put_slice(&head);
        self.gathered.put_slice(message);
        Ok(())
    }

    fn write_frame(&mut self) -> Result<(), SpillError> {
        // Given back, not kept for the next frame: there may be many writers.
        let raw = std::mem::take(&mut self.gathered);
        self.write(&[&raw])
    }

    /// Writes one frame of these bytes.
    fn write(&mut self, raw: &[&[u8]]) -> Result<(), SpillError> {
        let frame = Frame {
            version: FRAME_VERSION,
            sequence: self.sequence,
            raw_bytes: raw.iter().map(|part| part.len() as u64).sum(),
            crc32c: raw
                .iter()
                .fold(0, |sum, part| crc32c::crc32c_append(sum, part)),
            messages: Bytes::new(),
        };
        let mut within = WithinRoom {
            file: &self.file,
            spill: &mut self.spill,
            full: None,
        };
        let written = write_frame(&frame, raw, &mut within);
        let full = within.full.take();
        self.sequence += 1;
        written.map_err(|source| {
            full.unwrap_or(SpillError::Io {
                doing: "write",
                path: self.spill.path.clone(),
                source,
            })
        })
    }
}

fn write_frame(frame: &Frame, raw: &[&[u8]], out: &mut WithinRoom<'_>) -> io::Result<()> {
    out.write_all(&frame.encode_length_delimited_to_vec())?;
    let mut compressing = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
    for part in raw {
        compressing.write_all(part)?;
    }
    compressing.finish().map(|_| ())
}

/// The file, as far as `limits.spill_bytes` reach.
struct WithinRoom<'w> {
    file: &'w File,
    spill: &'w mut SpillFile,
    full: Option<SpillError>,
}

impl Write for WithinRoom<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = &self.spill.room;
        let size = bytes.len() as u64;
        if let Err(full) = room.take(size, room.limit()) {
            self.full = Some(full);
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.spill.bytes += size;
        self.file.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
