//! A segment in the store: written from the spool, read back part by part.
//!
//! One zstd frame with a checksum over parts behind one another ([`crate::flow::changelog`]): `zstd -d` unpacks it.
//!
//! # Invariants
//! - An object that is there is read: it serves if it holds what its name says. Only if it does not, it is copied aside and
//!   replaced, in one step and as the one that was read: whatever is killed and however many do it at once, a segment's name never
//!   loses what it has to something worse, and is never without an object.
//! - A segment that ends early, begins elsewhere, has a gap or comes from another source or stream is an error that names it.

use std::fs::File;
use std::io::{Read as _, Write as _};

use bytes::Bytes;

use super::unzstd::Unzstd;
use super::{ArchiveError, Layout, Span, SpoolError, SpoolSegment};
use crate::cloud::store::{ObjectReader, Put, Store, Version};
use crate::flow::changelog::{Frames, Part, Unpacker, history_of};
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;

/// zstd's default: TPC-B takes a fifth of its bytes at it.
const ZSTD_LEVEL: i32 = 3;

/// Read and compressed at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// Decompressed at a time: what comes out may be a thousand times as much.
const COMPRESSED_BYTES: usize = 16 << 10;

/// What an upload did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uploaded {
    /// Bytes before compression.
    pub(super) raw_bytes: u64,
    /// Bytes in the store; none if the object was there before.
    pub(super) stored_bytes: u64,
}

/// Brings a segment into the store.
///
/// # Errors
/// [`ArchiveError`]; the segment is still in the spool.
pub(super) async fn upload(
    store: &Store,
    layout: &Layout,
    segment: &SpoolSegment,
) -> Result<Uploaded, ArchiveError> {
    let there = Uploaded {
        raw_bytes: segment.bytes(),
        stored_bytes: 0,
    };
    if let Some(uploaded) = write(store, layout, segment, None).await? {
        return Ok(uploaded);
    }
    // Another agent's, most of the time.
    let Some(damaged) = copy_aside(store, layout, segment.span).await? else {
        return Ok(there);
    };
    match write(store, layout, segment, Some(damaged)).await? {
        Some(uploaded) => Ok(uploaded),
        // Somebody else has done the same meanwhile.
        None => verify(store, layout, segment.span).await.map(|()| there),
    }
}

/// What has the segment's name already and is damaged, or somebody else's, is kept aside; its version is returned, which is to be
/// replaced. A name is not worth the log behind it: whatever is there is no segment. None if it is one.
///
/// # Errors
/// [`ArchiveError::InTheWay`] where it cannot be read: it may be the segment.
pub(super) async fn copy_aside(
    store: &Store,
    layout: &Layout,
    span: Span,
) -> Result<Option<Version>, ArchiveError> {
    let name = layout.segment(span);
    let in_the_way = |error: ArchiveError| match error {
        ArchiveError::Store(error) if !error.is_of_one_object() => error.into(),
        source => ArchiveError::InTheWay {
            object: name.clone(),
            source: Box::new(source),
        },
    };
    let object = store.read(&name).await;
    let object = object.map_err(|error| in_the_way(error.into()))?;
    let damaged = object.version();
    let reason = match SegmentReader::new(Some(object), Bytes::new(), layout, span)?
        .check()
        .await
    {
        Ok(()) => return Ok(None),
        Err(error @ ArchiveError::Store(_)) => return Err(in_the_way(error)),
        Err(error) => error,
    };
    let aside = layout.aside(span, rand::random());
    let copying = async {
        let mut object = store.read(&name).await?;
        if object.version() != damaged {
            return Ok(());
        }
        let mut copy = store.create(&aside).await?;
        while let Some(piece) = object.next().await? {
            copy.write(piece).await?;
        }
        // Its name is a random number: what has it is a copy of the same.
        copy.finish().await.map(|_| ())
    };
    copying.await.map_err(|error| in_the_way(error.into()))?;
    tracing::error!(
        object = name, aside, reason = %crate::error::chain(&reason),
        "an object in the archive has a segment's name and is none: a copy was put aside, and the segment replaces it"
    );
    Ok(Some(damaged))
}

/// Writes a segment, where nothing has its name or `instead` of what was read; none where something else is there.
pub(super) async fn write(
    store: &Store,
    layout: &Layout,
    segment: &SpoolSegment,
    instead: Option<Version>,
) -> Result<Option<Uploaded>, ArchiveError> {
    let name = layout.segment(segment.span);
    let unreadable = |source| SpoolError::Io {
        doing: "read",
        path: segment.path().to_owned(),
        source,
    };
    let mut file = File::open(segment.path()).map_err(unreadable)?;
    let mut writer = match instead {
        None => store.create(&name).await?,
        Some(damaged) => store.replace(&name, damaged).await?,
    };
    let mut encoder = encoder().map_err(unreadable)?;
    let mut stored_bytes = 0;
    let mut checking = Checking::from(segment.span.start);
    loop {
        let (read, compressed) = tokio::task::block_in_place(|| {
            let mut block = Vec::with_capacity(BLOCK_BYTES);
            let limit = BLOCK_BYTES as u64;
            let read = (&mut file).take(limit).read_to_end(&mut block)?;
            checking.push(&block);
            encoder.write_all(&block)?;
            Ok((read, std::mem::take(encoder.get_mut())))
        })
        .map_err(unreadable)?;
        stored_bytes += compressed.len() as u64;
        if !compressed.is_empty() {
            writer.write(Bytes::from(compressed)).await?;
        }
        if read < BLOCK_BYTES {
            break;
        }
    }
    if checking.end() != Some(segment.span.end) {
        // The object that was begun is not finished: nobody ever sees it.
        return Err(SpoolError::Damaged {
            path: segment.path().to_owned(),
            end: checking.whole,
        }
        .into());
    }
    let rest = encoder.finish().map_err(unreadable)?;
    stored_bytes += rest.len() as u64;
    writer.write(Bytes::from(rest)).await?;
    let (put, _) = writer.finish().await?;
    Ok((put == Put::Created).then_some(Uploaded {
        raw_bytes: segment.bytes(),
        stored_bytes,
    }))
}

/// What a disk gives back is not always what it was given.
struct Checking {
    frames: Frames,
    unpacker: Unpacker,
    /// Where the whole batches so far end.
    whole: PgLsn,
    is_damaged: bool,
}

impl Checking {
    fn from(start: PgLsn) -> Self {
        Self {
            frames: Frames::default(),
            unpacker: Unpacker::default(),
            whole: start,
            is_damaged: false,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.is_damaged {
            return;
        }
        self.frames.push(bytes);
        loop {
            let part = match self.frames.next_part() {
                Ok(Some(part)) => part,
                Ok(None) => return,
                Err(_) => break,
            };
            match self.unpacker.push(&part, |_| {}) {
                Ok(true) => self.whole = part.end_lsn.into(),
                Ok(false) => {}
                Err(_) => break,
            }
        }
        self.is_damaged = true;
    }

    /// Where it ends, if it is whole.
    fn end(&self) -> Option<PgLsn> {
        let whole = !self.is_damaged && self.frames.finish().is_ok();
        whole.then_some(self.whole)
    }
}

fn encoder() -> std::io::Result<zstd::stream::write::Encoder<'static, Vec<u8>>> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

/// Reads a segment and checks all of it, the checksum behind its last byte included: whoever only reads it can do without, since
/// every record has one of its own.
///
/// # Errors
/// [`ArchiveError`]
pub async fn verify(store: &Store, layout: &Layout, span: Span) -> Result<(), ArchiveError> {
    SegmentReader::open(store, layout, span)
        .await?
        .check()
        .await
}

/// A segment that is being read.
pub struct SegmentReader {
    name: String,
    span: Span,
    stream: StreamName,
    history: History,
    /// None where all of it is here already.
    object: Option<ObjectReader>,
    /// Of the object, not yet decompressed.
    compressed: Bytes,
    decoder: Unzstd,
    frames: Frames,
    unpacker: Unpacker,
    /// The end of the last batch that is complete.
    end: PgLsn,
    inside_a_batch: bool,
}

impl SegmentReader {
    /// Begins to read.
    ///
    /// # Errors
    /// When the store does not give it.
    pub async fn open(store: &Store, layout: &Layout, span: Span) -> Result<Self, ArchiveError> {
        let object = store.read(&layout.segment(span)).await?;
        Self::new(Some(object), Bytes::new(), layout, span)
    }

    /// Begins to read what was read from the store before.
    pub(super) fn of(compressed: Bytes, layout: &Layout, span: Span) -> Result<Self, ArchiveError> {
        Self::new(None, compressed, layout, span)
    }

    fn new(
        object: Option<ObjectReader>,
        compressed: Bytes,
        layout: &Layout,
        span: Span,
    ) -> Result<Self, ArchiveError> {
        let name = layout.segment(span);
        let decoder = Unzstd::new().map_err(|error| ArchiveError::Damaged {
            object: name.clone(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            object,
            name,
            span,
            stream: layout.stream().clone(),
            history: layout.history(),
            compressed,
            decoder,
            frames: Frames::default(),
            unpacker: Unpacker::default(),
            end: span.start,
            inside_a_batch: false,
        })
    }

    /// Reads all of it.
    async fn check(mut self) -> Result<(), ArchiveError> {
        while self.next_messages().await?.is_some() {}
        match self.decoder.is_whole() {
            true => Ok(()),
            false => Err(self.damaged("it does not end where its compressed data ends".to_owned())),
        }
    }

    /// The next messages, in order, checked; `None` at the end of the segment, which is where its name says.
    ///
    /// # Errors
    /// [`ArchiveError`]
    pub async fn next_messages(&mut self) -> Result<Option<Vec<Bytes>>, ArchiveError> {
        let Some(part) = self.next_part().await? else {
            return Ok(None);
        };
        let mut messages = Vec::new();
        self.unpacker
            .push(&part, |message| messages.push(message))
            .map_err(|source| ArchiveError::Record {
                object: self.name.clone(),
                source,
            })?;
        Ok(Some(messages))
    }

    async fn next_part(&mut self) -> Result<Option<Part>, ArchiveError> {
        loop {
            let part = self.frames.next_part();
            if let Some(part) = part.map_err(|source| self.frames_error(source))? {
                self.follow(&part)?;
                return Ok(Some(part));
            }
            if self.compressed.is_empty() {
                let next = match &mut self.object {
                    Some(object) => object.next().await?,
                    None => None,
                };
                let Some(bytes) = next else {
                    return self.finish();
                };
                self.compressed = bytes;
            }
            let length = self.compressed.len().min(COMPRESSED_BYTES);
            let bytes = self.compressed.split_to(length);
            let frames = &mut self.frames;
            let decoded = self.decoder.push(&bytes, |raw| frames.push(raw));
            decoded.map_err(|error| self.damaged(error.to_string()))?;
        }
    }

    /// Holds a part against the ones before it.
    fn follow(&mut self, part: &Part) -> Result<(), ArchiveError> {
        // Databases of one source share its LSNs, and often the names of their tables.
        if history_of(part) != self.history || part.stream != self.stream.as_str() {
            return Err(ArchiveError::Foreign {
                object: self.name.clone(),
                stream: part.stream.clone(),
                found: history_of(part),
            });
        }
        let begins = PgLsn::from(part.previous_end_lsn);
        if begins != self.end {
            return Err(self.damaged(format!(
                "a batch begins at {begins} instead of {}",
                self.end
            )));
        }
        self.inside_a_batch = part.parts == 0;
        if !self.inside_a_batch {
            self.end = part.end_lsn.into();
        }
        Ok(())
    }

    fn finish(&self) -> Result<Option<Part>, ArchiveError> {
        self.frames
            .finish()
            .map_err(|source| self.frames_error(source))?;
        if self.inside_a_batch || self.end != self.span.end {
            return Err(ArchiveError::ends_early(&self.name, self.span, self.end));
        }
        Ok(None)
    }

    fn damaged(&self, reason: String) -> ArchiveError {
        ArchiveError::Damaged {
            object: self.name.clone(),
            reason,
        }
    }

    fn frames_error(&self, source: crate::flow::changelog::FramesError) -> ArchiveError {
        ArchiveError::Frames {
            object: self.name.clone(),
            source,
        }
    }
}
