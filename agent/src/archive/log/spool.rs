//! The spool: segments of the change log on local disk, until the store has them.
//!
//! ```text
//! <directory>/<start>.open          being written; parts behind one another, uncompressed
//! <directory>/<start>-<end>.log     complete, waiting for the store
//! <directory>/<start>-<end>.taken   the last one that the store has taken, and where that is
//! <directory>/<start>-<end>.missing empty: what is to be read again of a segment that was damaged
//! <directory>/<start>….damaged     such a segment, as it was found
//! ```
//! One directory for each history. Its *position* is how far the log has come; what is appended begins there.
//!
//! # Invariants
//! - When [`Spool::append`] has returned, the batch survives `kill -9` and a loss of power.
//! - A segment holds whole batches without a gap. What a crash left behind the last of them is cut off when the spool is opened;
//!   what was damaged otherwise is kept aside, and the position goes back to where it begins, until the log has passed it.
//! - What is in the log is not written again, whoever offers it once more.
//! - All files together hold at most [`SpoolLimits::bytes`], unless a single batch is larger than that.
//!
//! # What it does not do
//! It does not upload and knows no clock: how old a segment may be is the caller's business.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::BytesMut;

use super::LogChain;
use super::layout::{Span, digits, parse_digits};
use super::recover;
use crate::error::{Because, Class, Classify, disk_class, hands_on};
use crate::flow::batch::Batch;
use crate::flow::changelog::{Author, Compression, Packing, put_frame};
use crate::flow::spill::SpillError;
use crate::names::history::{WentBack, comes_again};
use crate::pg::PgLsn;
use crate::private;
use crate::time::{Micros, pg_micros};

/// Bytes of one part. Large enough that its header is nothing, small enough to be in memory twice.
const PART_BYTES: usize = 1 << 20;

pub(super) const OPEN: &str = "open";
pub(super) const COMPLETE: &str = "log";
const TAKEN: &str = "taken";
pub(super) const DAMAGED: &str = "damaged";
const MISSING: &str = "missing";

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
    /// What was written is not what is read.
    #[error("{} is damaged: it ends or breaks off at {end}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where the whole batches at its beginning end.
        end: PgLsn,
    },
    /// The source gives LSNs out a second time.
    #[error(transparent)]
    WentBack(#[from] WentBack),
    /// A large transaction could not be read back, or what another version of the agent has left.
    #[error(transparent)]
    Because(Because),
}

hands_on!(SpoolError: SpillError => "read a large transaction for the spool");

impl Classify for SpoolError {
    fn class(&self) -> Class {
        match self {
            Self::Io { source, .. } => disk_class(source),
            Self::Full { .. } => Class::Transient,
            Self::InUse { .. } | Self::Damaged { .. } | Self::WentBack(_) => Class::Definite,
            Self::Because(error) => error.class(),
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
            Self::Damaged { .. } => Some(
                "the disk, or its controller, or memory is failing: look there; what the source still has is read again".to_owned(),
            ),
            Self::WentBack(_) => Some(WentBack::hint()),
            Self::Because(error) => error.hint(),
        }
    }
}

/// A complete segment in the spool.
#[derive(Debug)]
pub struct SpoolSegment {
    /// What it holds.
    pub span: Span,
    path: PathBuf,
    bytes: u64,
    used: Arc<AtomicU64>,
}

impl SpoolSegment {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Removes it: the store at `place` has it. Only its name stays, and that place, until the next one's does.
    ///
    /// # Errors
    /// [`SpoolError::Io`]
    pub fn taken(self, place: &str) -> Result<(), SpoolError> {
        let directory = directory_of(&self.path);
        let mark = directory.join(format!("{}.{TAKEN}", self.span.name()));
        fs::rename(&self.path, &mark).map_err(at("rename", &self.path))?;
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
        let mut file = File::create(&mark).map_err(at("empty", &mark))?;
        file.write_all(place.as_bytes())
            .map_err(at("write", &mark))?;
        sync_directory(directory)?;
        for (path, span) in with_ending(directory, TAKEN)? {
            if span.end < self.span.end {
                fs::remove_file(&path).map_err(at("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// The segments of that kind in a directory.
fn with_ending(directory: &Path, ending: &str) -> Result<Vec<(PathBuf, Span)>, SpoolError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(at("list", directory))? {
        let path = entry.map_err(at("list", directory))?.path();
        let (stem, extension) = stem_and_ending(&path);
        if extension == ending
            && let Some(span) = Span::parse(stem)
        {
            found.push((path, span));
        }
    }
    Ok(found)
}

fn last_taken(mark: &Path, span: Span) -> io::Result<LastTaken> {
    let place = fs::read_to_string(mark)?;
    Ok(LastTaken {
        span,
        at: fs::metadata(mark)?.modified()?,
        place: (!place.is_empty()).then_some(place),
    })
}

/// Names of ours are ASCII; of others nothing is said.
pub(super) fn stem_and_ending(path: &Path) -> (&str, &str) {
    let name = path.file_name().and_then(|name| name.to_str());
    let parts = name.and_then(|name| name.rsplit_once('.'));
    parts.unwrap_or_default()
}

/// The spool of one history.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    limits: SpoolLimits,
    used: Arc<AtomicU64>,
    open: Option<OpenSegment>,
    /// How far the log has come.
    position: PgLsn,
    /// By when everything had committed that is in the log, as far as the spool remembers.
    newest: Option<Micros>,
    /// What is to be read again, in order.
    missing: Vec<Span>,
    /// Held as long as the spool is open.
    _lock: File,
}

/// What an opened spool has.
#[derive(Debug)]
pub struct OpenedSpool {
    /// The spool.
    pub spool: Spool,
    /// What waits in it, in order.
    pub waiting: Vec<SpoolSegment>,
    /// The last segment that the store has taken from here.
    pub taken: Option<LastTaken>,
}

/// The last segment that the store has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastTaken {
    /// What it holds.
    pub span: Span,
    /// When that was.
    pub at: SystemTime,
    /// Which store, as a URL; none where an earlier version took it.
    pub place: Option<String>,
}

/// The segment that is being written.
#[derive(Debug)]
struct OpenSegment {
    file: File,
    path: PathBuf,
    span: Span,
    bytes: u64,
}

/// What became of a batch that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is in the log now.
    Now,
    /// It was in the log before.
    Known,
    /// It begins behind the position: something before it is missing, and it was not taken.
    Ahead,
}

impl Spool {
    /// Opens the spool. Where nothing is in it, the log begins at `start`.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn open(
        directory: &Path,
        limits: SpoolLimits,
        start: PgLsn,
    ) -> Result<OpenedSpool, SpoolError> {
        make_durably(directory)?;
        let lock = lock(directory)?;
        let used = Arc::new(AtomicU64::new(0));
        let (mut waiting, mut newest) = (Vec::new(), None);
        // Listed before anything is renamed: what is now complete must not be met once more.
        let entries = fs::read_dir(directory).map_err(at("list", directory))?;
        let paths: Result<Vec<PathBuf>, io::Error> =
            entries.map(|entry| Ok(entry?.path())).collect();
        for path in paths.map_err(at("list", directory))? {
            let (stem, ending) = stem_and_ending(&path);
            let recovered = match (ending, Span::parse(stem), parse_digits(stem)) {
                (COMPLETE, Some(span), _) => recover::finished(&path, span)?,
                (OPEN, _, Some(start)) => recover::unfinished(&path, start)?,
                _ => None,
            };
            if let Some((path, span)) = recovered {
                let status = fs::metadata(&path).map_err(at("look at", &path))?;
                let written = status.modified().map_err(at("look at", &path))?;
                newest = newest.max(Some(pg_micros(written)));
                let bytes = status.len();
                used.fetch_add(bytes, Ordering::Relaxed);
                waiting.push(SpoolSegment {
                    span,
                    path,
                    bytes,
                    used: Arc::clone(&used),
                });
            }
        }
        waiting.sort_by_key(|segment| segment.span);
        let taken = with_ending(directory, TAKEN)?;
        let taken = taken.into_iter().max_by_key(|(_, span)| span.end);
        let taken = taken.map(|(mark, span)| last_taken(&mark, span).map_err(at("look at", &mark)));
        let taken = taken.transpose()?;
        newest = newest.max(taken.as_ref().map(|taken| pg_micros(taken.at)));
        let spans = waiting.iter().map(|segment| segment.span);
        let spans: Vec<Span> = spans
            .chain(taken.as_ref().map(|taken| taken.span))
            .collect();
        let missing = with_ending(directory, MISSING)?;
        let mut missing: Vec<Span> = missing.into_iter().map(|(_, span)| span).collect();
        missing.sort();
        let position = match missing.first() {
            // As far as it was read again.
            Some(span) => LogChain::from(span.start, &spans).end,
            None => spans.iter().map(|span| span.end).max().unwrap_or(start),
        };
        let mut spool = Self {
            directory: directory.to_owned(),
            limits,
            used,
            open: None,
            position,
            newest,
            missing,
            _lock: lock,
        };
        spool.pass()?;
        Ok(OpenedSpool {
            spool,
            waiting,
            taken,
        })
    }

    /// Removes the directory of a history that nothing is left of; one with something in it stays.
    ///
    /// # Errors
    /// [`SpoolError::Io`]
    pub fn forget(directory: &Path) -> Result<(), SpoolError> {
        for entry in fs::read_dir(directory).map_err(at("list", directory))? {
            let path = entry.map_err(at("list", directory))?.path();
            if matches!(stem_and_ending(&path), (_, OPEN | COMPLETE | DAMAGED)) {
                return Ok(());
            }
        }
        fs::remove_dir_all(directory).map_err(at("remove", directory))
    }

    /// Bytes that wait below this directory for the store, without touching it: whoever writes there goes on. None where there
    /// is no spool, on a machine that is not the agent's for instance.
    pub fn waiting(directory: &Path) -> Option<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(directory).ok()? {
            let path = entry.ok()?.path();
            if path.is_dir() {
                bytes += Self::waiting(&path).unwrap_or(0);
            } else if matches!(stem_and_ending(&path), (_, OPEN | COMPLETE)) {
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

    /// How far the log has come.
    pub fn position(&self) -> PgLsn {
        self.position
    }

    /// Where what is here goes on, if something before it is to be read again.
    pub fn resumes_at(&self) -> Option<PgLsn> {
        let mut ends = self.missing.iter().map(|span| span.end);
        ends.find(|end| *end > self.position)
    }

    /// The log goes on at `position`: what lies before it is elsewhere, or nowhere. The segment that is being written is complete
    /// before.
    ///
    /// # Errors
    /// [`SpoolError::Io`]
    ///
    /// # Panics
    /// If that would be backwards, or within a segment.
    pub fn go_on_at(&mut self, position: PgLsn) -> Result<(), SpoolError> {
        assert!(
            position >= self.position && self.open.is_none(),
            "a segment has no gap inside"
        );
        self.position = position;
        self.pass()
    }

    /// Forgets what was missing before the position: it is on disk again, or elsewhere. Once the store has taken it, nothing else
    /// here would tell.
    fn pass(&mut self) -> Result<(), SpoolError> {
        while let Some(span) = self.missing.first().copied()
            && span.start < self.position
        {
            let start = self.position;
            let rest = (start < span.end).then_some(Span { start, ..span });
            if let Some(rest) = rest {
                mark_missing(&self.directory, rest)?;
            }
            let mark = missing_mark(&self.directory, span);
            fs::remove_file(&mark).map_err(at("remove", &mark))?;
            self.missing.splice(..1, rest);
        }
        Ok(())
    }

    /// Whether the segment that is being written is as large as it may become.
    pub fn is_full(&self) -> bool {
        self.open
            .as_ref()
            .is_some_and(|open| open.bytes >= self.limits.segment_bytes)
    }

    /// Appends what is new of a batch to the segment that is being written, and begins one if there is none. Blocks for the
    /// disk.
    ///
    /// # Errors
    /// [`SpoolError`]; nothing of the batch is in the spool then, and what was there before it still is.
    pub fn append(&mut self, author: &Author, batch: &Batch) -> Result<Appended, SpoolError> {
        let (end_lsn, newest) = (batch.end_lsn(), batch.newest());
        if end_lsn <= self.position {
            comes_again(end_lsn, newest, self.newest)?;
            return Ok(Appended::Known);
        }
        if batch.previous > self.position {
            return Ok(Appended::Ahead);
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(begin(&self.directory, self.position)?),
        };
        let room = match self.used.load(Ordering::Relaxed) {
            // It has to go somewhere.
            0 => u64::MAX,
            used => self.limits.bytes.saturating_sub(used),
        };
        match write(open, author, batch, self.position, room) {
            Ok(written) => {
                self.used.fetch_add(written, Ordering::Relaxed);
                open.bytes += written;
                open.span.end = end_lsn;
                self.newest = self.newest.max(Some(newest));
                self.position = end_lsn;
                Ok(Appended::Now)
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
    pub fn close(&mut self) -> Result<Option<SpoolSegment>, SpoolError> {
        self.pass()?;
        let Some(open) = self.open.take() else {
            return Ok(None);
        };
        let path = complete(&self.directory, &open.path, open.span)?;
        Ok(Some(SpoolSegment {
            span: open.span,
            path,
            bytes: open.bytes,
            used: Arc::clone(&self.used),
        }))
    }
}

pub(super) fn directory_of(file: &Path) -> &Path {
    file.parent().unwrap_or_else(|| Path::new("."))
}

fn missing_mark(directory: &Path, span: Span) -> PathBuf {
    directory.join(format!("{}.{MISSING}", span.name()))
}

/// Marks what is to be read again.
pub(super) fn mark_missing(directory: &Path, span: Span) -> Result<(), SpoolError> {
    let mark = missing_mark(directory, span);
    File::create(&mark).map_err(at("create", &mark))?;
    sync_directory(directory)
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

fn begin(directory: &Path, start: PgLsn) -> Result<OpenSegment, SpoolError> {
    let path = directory.join(format!("{}.{OPEN}", digits(start)));
    let file = File::create(&path).map_err(at("create", &path))?;
    sync_directory(directory)?;
    Ok(OpenSegment {
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
    open: &mut OpenSegment,
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

pub(super) fn truncate(file: &mut File, path: &Path, bytes: u64) -> Result<(), SpoolError> {
    file.set_len(bytes).map_err(at("truncate", path))?;
    file.seek(SeekFrom::Start(bytes))
        .map_err(at("truncate", path))?;
    file.sync_all().map_err(at("sync", path))
}

/// Makes a directory and whatever is missing above it; a loss of power takes none of them away.
fn make_durably(directory: &Path) -> Result<(), SpoolError> {
    let mut missing: Vec<&Path> = Vec::new();
    let mut above = Some(directory);
    while let Some(path) = above.filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
        missing.push(path);
        above = path.parent();
    }
    private::create_dir_all(directory).map_err(at("create", directory))?;
    for path in missing {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(parent.unwrap_or_else(|| Path::new(".")))?;
    }
    Ok(())
}

pub(super) fn complete(directory: &Path, path: &Path, span: Span) -> Result<PathBuf, SpoolError> {
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

pub(super) fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Io {
        doing,
        path,
        source,
    }
}
