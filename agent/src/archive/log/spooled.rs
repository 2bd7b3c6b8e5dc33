//! What waits in a spool, read without touching it.
//!
//! # Invariants
//! - Nothing is opened for writing, renamed or removed, and no lock is taken: an agent may be at work there.
//! - Reading ends where the whole batches end: behind that a crash, or a disk, has left something that is none.
//!
//! # What it does not do
//! It does not say why a file ends: [`super::recover`] looks after that, for whoever owns the spool.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::layout::{Span, parse_digits};
use super::spool::{COMPLETE, OPEN, SpoolError, at, stem_and_ending};
use crate::flow::changelog::{Frames, Unpacker};
use crate::pg::PgLsn;

/// A file of a spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spooled {
    /// The end of the last transaction before it.
    pub start: PgLsn,
    /// Where it is.
    pub path: PathBuf,
}

impl Spooled {
    /// What waits in a directory, in order; nothing where there is no spool on this machine.
    pub fn in_directory(directory: &Path) -> Vec<Self> {
        let entries = fs::read_dir(directory).into_iter().flatten();
        let mut found: Vec<Self> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let start = match stem_and_ending(&path) {
                    (stem, COMPLETE) => Span::parse(stem)?.start,
                    (stem, OPEN) => parse_digits(stem)?,
                    _ => return None,
                };
                Some(Self { start, path })
            })
            .collect();
        found.sort_by(|a, b| (a.start, &a.path).cmp(&(b.start, &b.path)));
        found
    }

    /// Begins to read.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn open(&self) -> Result<SpooledReader, SpoolError> {
        let file = File::open(&self.path).map_err(at("open", &self.path))?;
        Ok(SpooledReader {
            file,
            path: self.path.clone(),
            frames: Frames::default(),
            unpacker: Unpacker::default(),
            block: vec![0; 1 << 16],
        })
    }
}

/// A file of a spool that is being read.
#[derive(Debug)]
pub struct SpooledReader {
    file: File,
    path: PathBuf,
    frames: Frames,
    unpacker: Unpacker,
    block: Vec<u8>,
}

impl SpooledReader {
    /// The next messages, in order; none behind the last part that is whole.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn next_messages(&mut self) -> Result<Option<Vec<Bytes>>, SpoolError> {
        loop {
            match self.frames.next_part() {
                Ok(Some(part)) => {
                    let mut messages = Vec::new();
                    let taken = self.unpacker.push(&part, |message| messages.push(message));
                    return Ok(taken.is_ok().then_some(messages));
                }
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
            let read = self.file.read(&mut self.block);
            match read.map_err(at("read", &self.path))? {
                0 => return Ok(None),
                read => self.frames.push(&self.block[..read]),
            }
        }
    }
}
