//! Spill files: where the beginning of a transaction goes that is too large for memory.
//!
//! Written by the source task while the transaction arrives, read by the replica sink while it is
//! applied, removed when the transaction is dropped. The format is `dr_agent.journal.v1.Frame`
//! (package `dr-agent-proto`): runs of pgoutput messages under zstd with a checksum. Each file
//! carries the relation messages its changes need, so it is read without any other knowledge.
//!
//! # Invariants
//! - All files of one stream together stay within `limits.spill_bytes`; beyond it the pipeline stops
//!   with an error that names the setting.
//! - Spill files are never needed after a crash: the source sends the transaction again. What an
//!   earlier agent left is removed when the space is opened.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use dr_agent_proto::journal::v1::Frame;
use prost::Message as _;

use crate::error::{Class, Classify};
use crate::pg::pgoutput::{self, Message};
use crate::txn::{Change, Relations, SourceRelation};

/// Bytes of messages gathered into one frame. Large enough for zstd to find repetition, small
/// enough to be decompressed at once without being noticed in the memory limit.
const FRAME_BYTES: usize = 1 << 20;

/// Fast: the spill competes with the apply for two cores, and is read once.
const ZSTD_LEVEL: i32 = 1;

const FRAME_VERSION: u32 = 1;

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
    #[error("a transaction needs more than the {limit} bytes of limits.spill_bytes")]
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
            // A full disk heals; a missing right does not.
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::NotADirectory => Class::Definite,
                _ => Class::Transient,
            },
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
                "raise limits.spill_bytes (and give the disk that room), then start the agent \
                 again; the transaction is sent again from its beginning"
                    .to_owned(),
            ),
            Self::Damaged { .. } => {
                Some("the transaction is fetched again; if it repeats, check the disk".to_owned())
            }
        }
    }
}

/// The spill files of one stream: a directory and a budget.
#[derive(Debug)]
pub struct SpillSpace {
    directory: PathBuf,
    limit: u64,
    used: Arc<AtomicU64>,
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
            limit,
            used: Arc::new(AtomicU64::new(0)),
            files: 0,
        })
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
        fs::create_dir_all(&self.directory).map_err(at)?;
        let file = File::create(&path).map_err(at)?;
        Ok(SpillWriter {
            file,
            spill: SpillFile {
                path,
                bytes: 0,
                used: Arc::clone(&self.used),
            },
            limit: self.limit,
            sequence: 0,
            gathered: BytesMut::with_capacity(FRAME_BYTES),
            described: HashMap::new(),
        })
    }
}

/// A finished spill file; removed when dropped.
#[derive(Debug)]
pub struct SpillFile {
    path: PathBuf,
    bytes: u64,
    used: Arc<AtomicU64>,
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "spill file not removed");
        }
    }
}

impl SpillFile {
    /// Reads the file from its beginning; may be done more than once.
    pub fn reader(&self) -> Result<SpillReader, SpillError> {
        let file = File::open(&self.path).map_err(|source| SpillError::Io {
            doing: "open",
            path: self.path.clone(),
            source,
        })?;
        Ok(SpillReader {
            path: self.path.clone(),
            file: BufReader::with_capacity(1 << 16, file),
            sequence: 0,
            relations: HashMap::new(),
        })
    }
}

/// A spill file that is being written.
#[derive(Debug)]
pub struct SpillWriter {
    file: File,
    spill: SpillFile,
    limit: u64,
    sequence: u64,
    gathered: BytesMut,
    /// Which description of each relation id the file holds last.
    described: HashMap<u32, Arc<SourceRelation>>,
}

impl SpillWriter {
    /// Appends changes in order.
    pub fn append(&mut self, changes: &[Change]) -> Result<(), SpillError> {
        for change in changes {
            for relation in change.relations() {
                let id = relation.relation.id;
                if !self
                    .described
                    .get(&id)
                    .is_some_and(|known| Arc::ptr_eq(known, relation))
                {
                    self.described.insert(id, Arc::clone(relation));
                    self.gather(&relation.message);
                }
            }
            self.gather(&change.message);
            if self.gathered.len() >= FRAME_BYTES {
                self.write_frame()?;
            }
        }
        Ok(())
    }

    /// Writes what is left and closes the file.
    pub fn finish(mut self) -> Result<SpillFile, SpillError> {
        if !self.gathered.is_empty() {
            self.write_frame()?;
        }
        Ok(self.spill)
    }

    fn gather(&mut self, message: &[u8]) {
        let length = u32::try_from(message.len()).expect("PostgreSQL messages are below 2 GiB");
        self.gathered.put_u32(length);
        self.gathered.put_slice(message);
    }

    fn write_frame(&mut self) -> Result<(), SpillError> {
        let raw = &self.gathered[..];
        let at = |source| SpillError::Io {
            doing: "write",
            path: self.spill.path.clone(),
            source,
        };
        let compressed = zstd::bulk::compress(raw, ZSTD_LEVEL).map_err(at)?;
        let frame = Frame {
            version: FRAME_VERSION,
            sequence: self.sequence,
            raw_bytes: raw.len() as u64,
            crc32c: crc32c::crc32c(raw),
            messages: Bytes::from(compressed),
        };
        let encoded = frame.encode_length_delimited_to_vec();
        let size = encoded.len() as u64;
        let used = self.spill.used.fetch_add(size, Ordering::Relaxed) + size;
        self.spill.bytes += size;
        if used > self.limit {
            return Err(SpillError::Full { limit: self.limit });
        }
        self.file.write_all(&encoded).map_err(at)?;
        self.sequence += 1;
        self.gathered.clear();
        Ok(())
    }
}

/// A spill file that is being read.
#[derive(Debug)]
pub struct SpillReader {
    path: PathBuf,
    file: BufReader<File>,
    sequence: u64,
    relations: HashMap<u32, Arc<SourceRelation>>,
}

impl SpillReader {
    /// The changes of the next frame in order; `None` at the end.
    pub fn next_changes(&mut self) -> Result<Option<Vec<Change>>, SpillError> {
        let Some(frame) = self.next_frame()? else {
            return Ok(None);
        };
        if frame.version != FRAME_VERSION || frame.sequence != self.sequence {
            return Err(self.damaged(format!(
                "frame {} of version {} where frame {} was due",
                frame.sequence, frame.version, self.sequence
            )));
        }
        self.sequence += 1;
        let capacity = usize::try_from(frame.raw_bytes)
            .unwrap_or(usize::MAX)
            .min(2 << 30);
        let raw = zstd::bulk::decompress(&frame.messages, capacity)
            .map_err(|error| self.damaged(error.to_string()))?;
        if raw.len() as u64 != frame.raw_bytes || crc32c::crc32c(&raw) != frame.crc32c {
            return Err(self.damaged("checksum differs".to_owned()));
        }
        self.parse(Bytes::from(raw)).map(Some)
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, SpillError> {
        let mut prefix = BytesMut::new();
        let length = loop {
            let mut byte = [0];
            let read = self
                .file
                .read(&mut byte)
                .map_err(|source| self.unreadable(source))?;
            if read == 0 {
                return if prefix.is_empty() {
                    Ok(None)
                } else {
                    Err(self.damaged("ends inside a frame".to_owned()))
                };
            }
            prefix.put_u8(byte[0]);
            if byte[0] & 0x80 == 0 {
                break prost::decode_length_delimiter(prefix.freeze())
                    .map_err(|error| self.damaged(error.to_string()))?;
            }
            if prefix.len() > 10 {
                return Err(self.damaged("frame length makes no sense".to_owned()));
            }
        };
        let mut encoded = vec![0; length];
        self.file
            .read_exact(&mut encoded)
            .map_err(|source| self.unreadable(source))?;
        Frame::decode(Bytes::from(encoded))
            .map(Some)
            .map_err(|error| self.damaged(error.to_string()))
    }

    fn parse(&mut self, mut raw: Bytes) -> Result<Vec<Change>, SpillError> {
        let mut changes = Vec::new();
        while raw.has_remaining() {
            if raw.remaining() < 4 {
                return Err(self.damaged("ends inside a length".to_owned()));
            }
            let length = raw.get_u32() as usize;
            if raw.remaining() < length {
                return Err(self.damaged("ends inside a message".to_owned()));
            }
            let message = raw.split_to(length);
            let decoded = pgoutput::decode(&message, false)
                .map_err(|error| self.damaged(error.to_string()))?;
            let relations = match decoded {
                Message::Relation(relation) => {
                    let id = relation.id;
                    self.relations
                        .insert(id, Arc::new(SourceRelation { relation, message }));
                    continue;
                }
                Message::Insert { relation, .. }
                | Message::Update { relation, .. }
                | Message::Delete { relation, .. } => Relations::Row(self.relation(relation)?),
                Message::Truncate { relations, .. } => {
                    let relations: Result<Arc<[_]>, _> =
                        relations.iter().map(|id| self.relation(*id)).collect();
                    Relations::Truncate(relations?)
                }
                _ => return Err(self.damaged("holds a message that is no change".to_owned())),
            };
            changes.push(Change { relations, message });
        }
        Ok(changes)
    }

    fn relation(&self, id: u32) -> Result<Arc<SourceRelation>, SpillError> {
        self.relations
            .get(&id)
            .map(Arc::clone)
            .ok_or_else(|| self.damaged(format!("does not describe relation {id}")))
    }

    fn damaged(&self, reason: String) -> SpillError {
        SpillError::Damaged {
            path: self.path.clone(),
            reason,
        }
    }

    fn unreadable(&self, source: io::Error) -> SpillError {
        SpillError::Io {
            doing: "read",
            path: self.path.clone(),
            source,
        }
    }
}

/// Where the spill files of `stream` live under the configured directory.
pub fn directory_of(configured: &Path, stream: &crate::stream::StreamName) -> PathBuf {
    configured.join(stream.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::pgoutput::{Value, encode};
    use crate::testing::{relation, table};

    fn changes(relation: &Arc<SourceRelation>, values: &[&str]) -> Vec<Change> {
        values
            .iter()
            .map(|value| Change {
                relations: Relations::Row(Arc::clone(relation)),
                message: encode::insert(relation.relation.id, &[Value::Text(value.as_bytes())]),
            })
            .collect()
    }

    fn read_all(file: &SpillFile) -> Vec<Bytes> {
        let mut reader = file.reader().unwrap();
        let mut messages = Vec::new();
        while let Some(changes) = reader.next_changes().unwrap() {
            messages.extend(changes.into_iter().map(|change| change.message));
        }
        messages
    }

    #[test]
    fn what_is_written_is_read_twice_over_and_then_removed() {
        let home = tempfile::tempdir().unwrap();
        let mut space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
        let before = relation(table(1, "t", &["a"]));
        let after = relation(table(1, "t", &["b"]));
        let mut writer = space.create().unwrap();
        let first = changes(&before, &["1", &"x".repeat(FRAME_BYTES), "2"]);
        let second = changes(&after, &["3"]);
        writer.append(&first).unwrap();
        writer.append(&second).unwrap();
        let file = writer.finish().unwrap();
        let expected: Vec<Bytes> = first
            .iter()
            .chain(&second)
            .map(|change| change.message.clone())
            .collect();
        assert_eq!(read_all(&file), expected);
        assert_eq!(read_all(&file), expected);
        let mut reader = file.reader().unwrap();
        let mut last = Vec::new();
        while let Some(changes) = reader.next_changes().unwrap() {
            last = changes;
        }
        assert_eq!(
            last.last().unwrap().relations()[0].relation.columns[0].name,
            "b"
        );
        let path = file.path.clone();
        drop(file);
        assert!(!path.exists());
        assert_eq!(space.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_limit_is_an_error_that_names_the_setting() {
        let home = tempfile::tempdir().unwrap();
        let mut space = SpillSpace::open(home.path().join("s"), 10).unwrap();
        let mut writer = space.create().unwrap();
        writer
            .append(&changes(&relation(table(1, "t", &["a"])), &["some text"]))
            .unwrap();
        let error = writer.finish().unwrap_err();
        assert!(error.to_string().contains("limits.spill_bytes"), "{error}");
        assert_eq!(error.class(), Class::Definite);
    }

    #[test]
    fn damage_is_noticed() {
        let home = tempfile::tempdir().unwrap();
        let mut space = SpillSpace::open(home.path().join("s"), 1 << 20).unwrap();
        let mut writer = space.create().unwrap();
        let written = changes(&relation(table(1, "t", &["a"])), &["some text"]);
        writer.append(&written).unwrap();
        let file = writer.finish().unwrap();
        let good = fs::read(&file.path).unwrap();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x10;
            fs::write(&file.path, &bad).unwrap();
            // A zstd header has a bit that decoders ignore; what is read must be what was written.
            if let Ok(read) = file.reader().unwrap().next_changes() {
                let read = read.expect("one frame");
                assert_eq!(read[0].message, written[0].message, "byte {position}");
            }
        }
        for length in 1..good.len() {
            fs::write(&file.path, &good[..length]).unwrap();
            assert!(
                file.reader().unwrap().next_changes().is_err(),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn what_an_earlier_agent_left_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("s");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("1.spill"), b"old").unwrap();
        SpillSpace::open(directory.clone(), 1).unwrap();
        assert!(!directory.exists());
    }
}
