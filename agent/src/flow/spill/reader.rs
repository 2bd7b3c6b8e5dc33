//! Reads a spill file back, change by change, without what was rolled back after it was written.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use dr_agent_proto::journal::v1::Frame;
use prost::Message as _;

use super::{FRAME_VERSION, SpillError, SpillFile};
use crate::flow::transaction::{Change, Relations, SourceRelation, TypeNames};
use crate::pg::pgoutput::{self, Message};

/// No frame is larger: it holds a few changes, or one, and PostgreSQL sends none of 2 GiB.
const FRAME_BYTES_MAX: usize = 2 << 30;

/// A spill file that is being read.
#[derive(Debug)]
pub struct SpillReader {
    path: PathBuf,
    file: BufReader<File>,
    sequence: u64,
    /// The frame that comes next, as far as its header says.
    next: Option<Frame>,
    relations: HashMap<u32, Arc<SourceRelation>>,
    types: TypeNames,
    aborted: Arc<HashSet<u32>>,
}

impl SpillReader {
    pub(super) fn new(spill: &SpillFile) -> Result<Self, SpillError> {
        let file = File::open(&spill.path).map_err(|source| SpillError::Io {
            doing: "open",
            path: spill.path.clone(),
            source,
        })?;
        Ok(Self {
            path: spill.path.clone(),
            file: BufReader::with_capacity(1 << 16, file),
            sequence: 0,
            next: None,
            relations: HashMap::new(),
            types: TypeNames::default(),
            aborted: Arc::clone(&spill.aborted),
        })
    }

    /// What the next frame takes in memory; `None` at the end.
    pub fn next_bytes(&mut self) -> Result<Option<u64>, SpillError> {
        if self.next.is_none() {
            self.next = self.next_frame()?;
        }
        Ok(self.next.as_ref().map(|frame| frame.raw_bytes))
    }

    /// The surviving changes of the next frame in order, possibly none; `None` at the end.
    pub fn next_changes(&mut self) -> Result<Option<Vec<Change>>, SpillError> {
        if self.next_bytes()?.is_none() {
            return Ok(None);
        }
        let Some(frame) = self.next.take() else {
            return Ok(None);
        };
        if frame.version != FRAME_VERSION || frame.sequence != self.sequence {
            return Err(self.damaged(format!(
                "frame {} of version {} where frame {} was due",
                frame.sequence, frame.version, self.sequence
            )));
        }
        self.sequence += 1;
        let raw = self.raw_of(&frame)?;
        if raw.len() as u64 != frame.raw_bytes || crc32c::crc32c(&raw) != frame.crc32c {
            return Err(self.damaged("checksum differs".to_owned()));
        }
        self.parse(Bytes::from(raw)).map(Some)
    }

    /// The bytes that follow a frame's header, decompressed as they are read.
    fn raw_of(&mut self, frame: &Frame) -> Result<Vec<u8>, SpillError> {
        let mut raw = Vec::new();
        let length = usize::try_from(frame.raw_bytes).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX || raw.try_reserve_exact(length).is_err() {
            return Err(self.damaged(format!("a frame of {length} bytes")));
        }
        let decompressing = zstd::stream::read::Decoder::with_buffer(&mut self.file);
        let read = decompressing.and_then(|decompressing| {
            let mut within = decompressing.single_frame().take(frame.raw_bytes + 1);
            within.read_to_end(&mut raw)
        });
        match read {
            Ok(_) => Ok(raw),
            Err(error) => Err(self.damaged(error.to_string())),
        }
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
        let (mut kept, all) = (0, raw.remaining());
        while raw.has_remaining() {
            if raw.remaining() < 8 {
                return Err(self.damaged("ends inside a record".to_owned()));
            }
            let length = raw.get_u32() as usize;
            let maker = raw.get_u32();
            if raw.remaining() < length {
                return Err(self.damaged("ends inside a message".to_owned()));
            }
            let message = raw.split_to(length);
            if self.aborted.contains(&maker) {
                continue;
            }
            let decoded = pgoutput::decode(&message, false)
                .map_err(|error| self.damaged(error.to_string()))?;
            let relations = match decoded {
                Message::Type {
                    oid, schema, name, ..
                } => {
                    self.types.tell(oid, schema, name);
                    continue;
                }
                Message::Relation(relation) => {
                    let described = SourceRelation {
                        types: self.types.of(&relation),
                        relation,
                        // Copied: descriptions are kept for long, and must not keep their frame.
                        message: Bytes::copy_from_slice(&message),
                    };
                    let id = described.relation.id;
                    self.relations.insert(id, Arc::new(described));
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
            kept += length;
            changes.push(Change { relations, message });
        }
        if kept < all / 2 && !self.aborted.is_empty() {
            // Most of the frame was rolled back: do not keep all of it in memory for the rest.
            for change in &mut changes {
                change.message = Bytes::copy_from_slice(&change.message);
            }
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
