//! The spool: segments of the change log on local disk, until the store has them.
//!
//! ```text
//! <directory>/<start>.open          being written; parts behind one another, uncompressed
//! <directory>/<start>-<end>.log     complete, waiting for the store
//! ```
//!
//! # Invariants
//! - When [`Spool::append`] has returned, the batch survives `kill -9` and a loss of power.
//! - A segment holds whole batches. What a crash left behind the last of them is cut off when the spool is opened.
//! - What waits in the spool is not written again: a session that received it and died before the replica had it
//!   receives it once more.
//! - All files together hold at most [`SpoolLimits::bytes`].
//!
//! # What it does not do
//! It does not upload and knows no clock: how old a segment may be is the caller's business.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;

use super::Chain;
use super::layout::{Span, digits, parse_digits};
use crate::batch::Batch;
use crate::changelog::{Author, Compression, Frames, Packing, Unpacker, put_frame};
use crate::error::{Class, Classify, disk_class};
use crate::pg::PgLsn;
use crate::spill::SpillError;

/// Bytes of one part. Large enough that its header is nothing, small enough to be in memory twice.
const PART_BYTES: usize = 1 << 20;

const OPEN: &str = "open";
const COMPLETE: &str = "log";

/// What the spool may hold.
#[derive(Clone, Copy, Debug)]
pub struct SpoolLimits {
    /// All files together, in bytes on disk.
    pub bytes: u64,
    /// A segment is complete at this many bytes.
    pub segment_bytes: u64,
}

/// Why a batch is not in the spool.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system refused.
    #[error("{doing} spool {}", path.display())]
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
        "the change log waiting for the archive needs more than the {limit} bytes of archive.spool_bytes"
    )]
    Full {
        /// The limit, in bytes.
        limit: u64,
    },
    /// Another agent uses the directory.
    #[error("spool {} is in use by another process", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A large transaction could not be read back.
    #[error("read a large transaction for the spool")]
    Spill(#[from] SpillError),
}

impl Classify for SpoolError {
    fn class(&self) -> Class {
        match self {
            Self::Io { source, .. } => disk_class(source),
            Self::Full { .. } => Class::Transient,
            Self::InUse { .. } => Class::Definite,
            Self::Spill(error) => error.class(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => Some(
                "archive.spool_directory must be writable for the agent and have room for archive.spool_bytes"
                    .to_owned(),
            ),
            Self::Full { .. } => Some(
                "the archive has not taken segments for a while: see why (the log says), or raise archive.spool_bytes"
                    .to_owned(),
            ),
            Self::InUse { .. } => Some(
                "stop the other agent, or give this one a spool_directory of its own".to_owned(),
            ),
            Self::Spill(error) => error.hint(),
        }
    }
}

/// A complete segment in the spool.
#[derive(Debug)]
pub struct Segment {
    /// What it holds.
    pub span: Span,
    path: PathBuf,
    bytes: u64,
    used: Arc<AtomicU64>,
}

impl Segment {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Removes it: the store has it.
    ///
    /// # Errors
    /// [`SpoolError::Io`]
    pub fn remove(self) -> Result<(), SpoolError> {
        fs::remove_file(&self.path).map_err(at("remove from", &self.path))?;
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// The spool of one stream.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    limits: SpoolLimits,
    used: Arc<AtomicU64>,
    open: Option<Open>,
    /// What earlier sessions left.
    left: Vec<Span>,
    /// Held as long as the spool is open.
    _lock: File,
}

/// The segment that is being written.
#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    span: Span,
    bytes: u64,
}

impl Spool {
    /// Opens the spool; also returns the segments that wait in it, in order.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn open(directory: &Path, limits: SpoolLimits) -> Result<(Self, Vec<Segment>), SpoolError> {
        fs::create_dir_all(directory).map_err(at("create", directory))?;
        let lock = lock(directory)?;
        let used = Arc::new(AtomicU64::new(0));
        let mut complete = Vec::new();
        for entry in fs::read_dir(directory).map_err(at("list", directory))? {
            let path = entry.map_err(at("list", directory))?.path();
            let stem = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default();
            let found = match path.extension().and_then(|extension| extension.to_str()) {
                Some(COMPLETE) => Span::parse(stem).map(|span| (path.clone(), span)),
                Some(OPEN) => match parse_digits(stem) {
                    Some(start) => recover(&path, start)?,
                    None => None,
                },
                _ => None,
            };
            if let Some((path, span)) = found {
                let bytes = fs::metadata(&path).map_err(at("look at", &path))?.len();
                used.fetch_add(bytes, Ordering::Relaxed);
                complete.push(Segment {
                    span,
                    path,
                    bytes,
                    used: Arc::clone(&used),
                });
            }
        }
        complete.sort_by_key(|segment| segment.span);
        let spool = Self {
            directory: directory.to_owned(),
            limits,
            used,
            open: None,
            left: complete.iter().map(|segment| segment.span).collect(),
            _lock: lock,
        };
        Ok((spool, complete))
    }

    /// Bytes that wait in this directory for the store, without touching it: whoever writes there goes on. None where there
    /// is no spool, on a machine that is not the agent's for instance.
    pub fn waiting(directory: &Path) -> Option<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(directory).ok()? {
            let path = entry.ok()?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if matches!(extension, Some(OPEN | COMPLETE)) {
                // One that has just gone waits no more.
                bytes += fs::metadata(&path).map_or(0, |status| status.len());
            }
        }
        Some(bytes)
    }

    /// Bytes on disk, of all segments.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// How far the spool leads without a gap from where a batch begins.
    fn held_from(&self, previous: PgLsn) -> PgLsn {
        Chain::from(previous, &self.left).end
    }

    /// Whether a segment has begun that ends elsewhere than where a batch begins.
    pub fn would_leave_a_gap(&self, previous: PgLsn) -> bool {
        let begins = self.held_from(previous);
        self.open
            .as_ref()
            .is_some_and(|open| open.span.end != begins)
    }

    /// Whether the segment that is being written is as large as it may become.
    pub fn is_full(&self) -> bool {
        self.open
            .as_ref()
            .is_some_and(|open| open.bytes >= self.limits.segment_bytes)
    }

    /// Appends a batch to the segment that is being written, and begins one if there is none. Blocks for the disk.
    ///
    /// # Errors
    /// [`SpoolError`]; nothing of the batch is in the spool then, and what was there before it still is.
    ///
    /// # Panics
    /// If that would leave a gap in the segment.
    pub fn append(&mut self, author: &Author, batch: &Batch) -> Result<(), SpoolError> {
        assert!(
            !self.would_leave_a_gap(batch.previous),
            "a segment has no gap inside"
        );
        self.left.retain(|span| span.end > batch.previous);
        let held = self.held_from(batch.previous);
        if batch.end_lsn() <= held {
            return Ok(());
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(begin(&self.directory, held)?),
        };
        let before = self.used.load(Ordering::Relaxed);
        let room = self.limits.bytes.saturating_sub(before);
        match write(open, author, batch, held, room) {
            Ok(written) => {
                self.used.fetch_add(written, Ordering::Relaxed);
                open.bytes += written;
                open.span.end = batch.end_lsn();
                Ok(())
            }
            Err(WriteError::Room) => {
                self.take_back()?;
                Err(SpoolError::Full {
                    limit: self.limits.bytes,
                })
            }
            Err(WriteError::Other(error)) => {
                self.take_back()?;
                Err(error)
            }
        }
    }

    /// Cuts off what a failed append has left.
    fn take_back(&mut self) -> Result<(), SpoolError> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        if open.bytes == 0 {
            return fs::remove_file(&open.path).map_err(at("remove", &open.path));
        }
        truncate(&mut open.file, &open.path, open.bytes)?;
        self.open = Some(open);
        Ok(())
    }

    /// Completes the segment that is being written, if there is one.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn close(&mut self) -> Result<Option<Segment>, SpoolError> {
        let Some(open) = self.open.take() else {
            return Ok(None);
        };
        let path = complete(&self.directory, &open.path, open.span)?;
        Ok(Some(Segment {
            span: open.span,
            path,
            bytes: open.bytes,
            used: Arc::clone(&self.used),
        }))
    }
}

/// One agent at a time. The lock goes with the process.
fn lock(directory: &Path) -> Result<File, SpoolError> {
    let path = directory.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(at("open", &path))?;
    let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SpoolError::InUse {
            path: directory.to_owned(),
        }),
        Err(error) => Err(at("lock", &path)(error.into())),
    }
}

fn begin(directory: &Path, start: PgLsn) -> Result<Open, SpoolError> {
    let path = directory.join(format!("{}.{OPEN}", digits(start)));
    let file = File::create(&path).map_err(at("create", &path))?;
    sync_directory(directory)?;
    Ok(Open {
        file,
        path,
        span: Span { start, end: start },
        bytes: 0,
    })
}

enum WriteError {
    /// There is no room for it.
    Room,
    Other(SpoolError),
}

impl<E: Into<SpoolError>> From<E> for WriteError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// Writes the parts of a batch, without what ends at or before `held`; waits for the disk, and returns how many bytes that
/// took: at most `room`.
fn write(
    open: &mut Open,
    author: &Author,
    batch: &Batch,
    held: PgLsn,
    room: u64,
) -> Result<u64, WriteError> {
    let mut packing = Packing::new(author, batch, held, PART_BYTES, Compression::None);
    let mut written = 0;
    let mut frame = BytesMut::new();
    while let Some(part) = packing.next_part().map_err(SpoolError::from)? {
        frame.clear();
        put_frame(&part, &mut frame);
        written += frame.len() as u64;
        if written > room {
            return Err(WriteError::Room);
        }
        open.file
            .write_all(&frame)
            .map_err(at("write to", &open.path))?;
    }
    open.file.sync_data().map_err(at("sync", &open.path))?;
    Ok(written)
}

fn truncate(file: &mut File, path: &Path, bytes: u64) -> Result<(), SpoolError> {
    file.set_len(bytes).map_err(at("truncate", path))?;
    file.seek(SeekFrom::Start(bytes))
        .map_err(at("truncate", path))?;
    file.sync_all().map_err(at("sync", path))
}

/// What a killed agent was writing: the whole batches in it become a complete segment.
fn recover(path: &Path, start: PgLsn) -> Result<Option<(PathBuf, Span)>, SpoolError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(at("open", path))?;
    let (bytes, end) = whole_batches(&mut file, path, start)?;
    if bytes == 0 {
        fs::remove_file(path).map_err(at("remove", path))?;
        return Ok(None);
    }
    truncate(&mut file, path, bytes)?;
    let span = Span { start, end };
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    Ok(Some((complete(directory, path, span)?, span)))
}

/// How many bytes whole batches take at the beginning of the file, and where the last of them ends.
fn whole_batches(file: &mut File, path: &Path, start: PgLsn) -> Result<(u64, PgLsn), SpoolError> {
    let mut frames = Frames::default();
    let mut unpacker = Unpacker::default();
    let mut whole = (0, start);
    let mut block = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut block).map_err(at("read", path))?;
        if read == 0 {
            return Ok(whole);
        }
        frames.push(&block[..read]);
        loop {
            match frames.next_part() {
                Ok(Some(part)) => match unpacker.push(&part, |_| {}) {
                    Ok(true) => whole = (frames.taken(), PgLsn::from(part.end_lsn)),
                    Ok(false) => {}
                    // Written in part when the power went.
                    Err(_) => return Ok(whole),
                },
                Ok(None) => break,
                Err(_) => return Ok(whole),
            }
        }
    }
}

fn complete(directory: &Path, path: &Path, span: Span) -> Result<PathBuf, SpoolError> {
    let to = directory.join(format!("{}.{COMPLETE}", span.name()));
    fs::rename(path, &to).map_err(at("rename", path))?;
    sync_directory(directory)?;
    Ok(to)
}

fn sync_directory(directory: &Path) -> Result<(), SpoolError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(at("sync", directory))
}

fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Io {
        doing,
        path,
        source,
    }
}
