//! What a spool's files still hold, when it is opened: a crash cuts the last batch off, a disk may spoil any of them.
//!
//! # Invariants
//! - What is left of a file are the whole batches at its beginning. Where something was spoilt that had been on disk, the file as
//!   it was found is kept aside.
//!
//! # What it does not do
//! It brings nothing back: [`super::spool`] remembers what is missing, and the source is read again from there.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::layout::Span;
use super::spool::{DAMAGED, SpoolError, at, complete, directory_of, mark_missing, truncate};
use crate::error::Because;
use crate::failpoint;
use crate::flow::changelog::{Frames, Part, UnpackError, Unpacker, VERSION};
use crate::pg::PgLsn;

/// How far behind damage it is looked for more.
const BEYOND_BYTES: u64 = 64 << 20;

/// What a killed agent was writing: the whole batches in it become a complete segment.
pub(super) fn unfinished(path: &Path, start: PgLsn) -> Result<Option<(PathBuf, Span)>, SpoolError> {
    let mut file = open(path)?;
    let whole = whole_batches(&mut file, path, start)?;
    if whole.is_damaged {
        keep_aside(path, whole.end)?;
    }
    // Nothing follows: the log goes on where it ends now.
    cut_off(path, &mut file, start, &whole)
}

/// A complete segment is as it was, unless the disk has spoilt it. What is missing then is marked before anything is cut off: a
/// crash in between must not make it forgotten.
pub(super) fn finished(path: &Path, span: Span) -> Result<Option<(PathBuf, Span)>, SpoolError> {
    let mut file = open(path)?;
    let length = file.metadata().map_err(at("look at", path))?.len();
    let whole = whole_batches(&mut file, path, span.start)?;
    if whole.bytes == length && whole.end == span.end {
        return Ok(Some((path.to_owned(), span)));
    }
    keep_aside(path, whole.end)?;
    let missing = Span {
        start: whole.end.min(span.end),
        end: span.end,
    };
    mark_missing(directory_of(path), missing)?;
    failpoint::hit("archive:missing-marked");
    cut_off(path, &mut file, span.start, &whole)
}

fn open(path: &Path) -> Result<File, SpoolError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .open(path)
        .map_err(at("open", path))
}

fn keep_aside(path: &Path, from: PgLsn) -> Result<(), SpoolError> {
    let aside = path.with_extension(DAMAGED);
    // After a crash the file may have been cut off already: what was found first is kept.
    if !aside.exists() {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy)
            .and_then(|_| File::open(&copy)?.sync_all())
            .and_then(|()| fs::rename(&copy, &aside))
            .map_err(at("keep aside", path))?;
    }
    tracing::error!(
        spool = %path.display(), kept = %aside.display(), %from,
        "the spool was damaged on disk: the change log is read anew from there, if the source still has it"
    );
    Ok(())
}

/// What is whole becomes a complete segment.
fn cut_off(
    path: &Path,
    file: &mut File,
    start: PgLsn,
    whole: &Whole,
) -> Result<Option<(PathBuf, Span)>, SpoolError> {
    if whole.bytes == 0 {
        fs::remove_file(path).map_err(at("remove", path))?;
        return Ok(None);
    }
    truncate(file, path, whole.bytes)?;
    let span = Span {
        start,
        end: whole.end,
    };
    Ok(Some((complete(directory_of(path), path, span)?, span)))
}

/// The whole batches at the beginning of a file.
struct Whole {
    /// How many bytes they take.
    bytes: u64,
    /// Where the last of them ends.
    end: PgLsn,
    /// Batches follow behind what cannot be read. Each was on disk before the next was begun, so that is not where a crash cut
    /// the last one off.
    is_damaged: bool,
}

fn whole_batches(file: &mut File, path: &Path, start: PgLsn) -> Result<Whole, SpoolError> {
    let mut frames = Frames::default();
    let mut unpacker = Unpacker::default();
    let mut whole = Whole {
        bytes: 0,
        end: start,
        is_damaged: false,
    };
    let mut block = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut block).map_err(at("read", path))?;
        if read == 0 {
            // A length that was spoilt looks like a record that was cut off.
            return match frames.finish() {
                Ok(()) => Ok(whole),
                Err(_) => look_beyond(file, path, whole),
            };
        }
        frames.push(&block[..read]);
        loop {
            let part = match frames.next_part() {
                Ok(Some(part)) => part,
                Ok(None) => break,
                Err(_) => return look_beyond(file, path, whole),
            };
            match unpacker.push(&part, |_| {}) {
                Ok(true) => {
                    whole.bytes = frames.taken();
                    whole.end = part.end_lsn.into();
                }
                Ok(false) => {}
                Err(source @ UnpackError::Version { .. }) => {
                    let doing = format!("read what waits in spool {}", path.display());
                    return Err(SpoolError::Because(Because::new(doing, source)));
                }
                Err(_) => return look_beyond(file, path, whole),
            }
        }
    }
}

/// Whether anything can be read behind what cannot.
fn look_beyond(file: &mut File, path: &Path, whole: Whole) -> Result<Whole, SpoolError> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(whole.bytes))
        .and_then(|_| file.take(BEYOND_BYTES).read_to_end(&mut bytes))
        .map_err(at("read", path))?;
    let is_damaged = (1..bytes.len())
        .filter_map(|offset| whole_part(&bytes[offset..]))
        .any(|part| PgLsn::from(part.previous_end_lsn) > whole.end);
    Ok(Whole {
        is_damaged,
        ..whole
    })
}

/// The part that begins here, if one does.
fn whole_part(bytes: &[u8]) -> Option<Part> {
    let part = Frames::peek(bytes)?;
    let sound = part.version == VERSION
        && part.messages.len() as u64 == part.raw_bytes
        && crc32c::crc32c(&part.messages) == part.crc32c;
    sound.then_some(part)
}
