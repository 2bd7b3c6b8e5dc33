//! One object of a base on its way: compressed and summed while it is written, summed and
//! decompressed while it is read.
//!
//! ```text
//! COPY rows ─Feed─▶ [thread: zstd, SHA-256] ──▶ store          store ──▶ [thread: SHA-256, zstd] ─Receiver─▶ COPY
//! ```
//! Compression is work for a processor, so it is done on one of tokio's threads for blocking work: one
//! for each object that is being written or read.
//!
//! # Invariants
//! - At most [`QUEUED`] pieces wait on either side of the thread; who is slow slows the others down.
//! - An object is there when the future of [`pack`] succeeded, and only then; whether it is this one or was there before, the
//!   future says.
//! - [`unpack`] succeeds only if what was read has the expected size and sum, and is one whole zstd stream. Its reader
//!   has seen the bytes by then, and must not keep them before.

use std::fmt::Write as _;
use std::io::{self, Read, Write};

use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::{JoinError, spawn_blocking};

use super::error::BackupError;
use crate::cloud::store::{Put, Store, StoreError};

/// As fast as one processor reads from PostgreSQL; higher levels gain little on rows.
const LEVEL: i32 = 3;

/// What is handed to the store at once.
const PIECE_BYTES: usize = 1 << 20;

/// Decompressed bytes handed on at once.
const RAW_BYTES: usize = 256 << 10;

/// Pieces that may wait on either side of the thread.
const QUEUED: usize = 4;

/// Size and checksum of what is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256, in hexadecimal digits.
    pub sha256: String,
}

impl Sum {
    /// Why something with this sum is not what `expected` says; `None` if it is.
    pub(super) fn flaw(&self, expected: &Self) -> Option<String> {
        if self.bytes != expected.bytes {
            return Some(format!(
                "has {} bytes instead of {}",
                self.bytes, expected.bytes
            ));
        }
        (self.sha256 != expected.sha256).then(|| "its SHA-256 is wrong".to_owned())
    }
}

/// Adds up a [`Sum`].
#[derive(Default)]
pub(super) struct Summing {
    bytes: u64,
    digest: Sha256,
}

impl Summing {
    /// Adds what comes next.
    pub(super) fn add(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.digest.update(piece);
    }

    /// The sum of all.
    pub(super) fn sum(self) -> Sum {
        let mut sha256 = String::with_capacity(64);
        for byte in self.digest.finalize() {
            write!(sha256, "{byte:02x}").expect("a string can be written to");
        }
        Sum {
            bytes: self.bytes,
            sha256,
        }
    }
}

/// SHA-256 in hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    sum_of(bytes).sha256
}

fn sum_of(bytes: &[u8]) -> Sum {
    let mut summing = Summing::default();
    summing.add(bytes);
    summing.sum()
}

/// Takes what goes into an object.
pub(super) struct Feed(Sender<Bytes>);

impl Feed {
    /// Hands a piece on, and waits while the store is slower. Where the object has failed the piece is dropped:
    /// the future of [`pack`] says why.
    pub(super) async fn send(&self, raw: Bytes) {
        let _ = self.0.send(raw).await;
    }
}

/// Begins an object. Drive the future together with whoever feeds; it ends when the feed was dropped and the
/// object is there. Dropped before, it leaves nothing.
pub(super) fn pack(
    store: &Store,
    name: String,
) -> (
    Feed,
    impl Future<Output = Result<(Put, Sum), BackupError>> + use<>,
) {
    let (feed, raw) = channel(QUEUED);
    let (packed_to, mut packed) = channel(QUEUED);
    let store = store.clone();
    let packing = async move {
        let mut writer = store.create(&name).await?;
        let thread = spawn_blocking(move || compress(raw, packed_to));
        while let Some(piece) = packed.recv().await {
            writer.write(piece).await?;
        }
        let sum = ended(thread.await, "compress", &name)?;
        let (put, summary) = writer.finish().await?;
        if summary.bytes != sum.bytes {
            let lost = format!("{} bytes of {} arrived", summary.bytes, sum.bytes);
            return Err(BackupError::local(format!("write {name}"))(
                io::Error::other(lost),
            ));
        }
        Ok((put, sum))
    };
    (Feed(feed), packing)
}

/// Writes a small object as it is.
pub(super) async fn put(store: &Store, name: &str, body: Bytes) -> Result<(Put, Sum), BackupError> {
    let sum = sum_of(&body);
    Ok((store.put_new(name, body).await?, sum))
}

/// Writes a small object under zstd.
pub(super) async fn put_packed(
    store: &Store,
    name: &str,
    body: Bytes,
) -> Result<(Put, Sum), BackupError> {
    let (feed, packing) = pack(store, name.to_owned());
    let feeding = async move {
        feed.send(body).await;
        drop(feed);
        Ok(())
    };
    let ((), written) = tokio::try_join!(feeding, packing)?;
    Ok(written)
}

/// Begins to read an object under zstd. Drive the future together with whoever takes the pieces.
pub(super) fn unpack(
    store: &Store,
    base: &str,
    name: &str,
    expected: Sum,
) -> (
    Receiver<Bytes>,
    impl Future<Output = Result<(), BackupError>>,
) {
    let (raw_to, raw) = channel(QUEUED);
    let (packed_to, packed) = channel(QUEUED);
    let (store, base, name) = (store.clone(), base.to_owned(), name.to_owned());
    let unpacking = async move {
        let mut reader = read(&store, &base, &name).await?;
        let thread = spawn_blocking(move || decompress(packed, &raw_to));
        while let Some(piece) = reader.next().await? {
            // A thread that has given up says why below.
            if packed_to.send(piece).await.is_err() {
                break;
            }
        }
        drop(packed_to);
        let found = match thread.await {
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(BackupError::damaged(&base, &name, "cannot be decompressed"));
            }
            other => ended(other, "decompress", &name)?,
        };
        match found.flaw(&expected) {
            None => Ok(()),
            Some(reason) => Err(BackupError::damaged(&base, &name, reason)),
        }
    };
    (raw, unpacking)
}

/// Reads a small object as it is stored, and checks it.
pub(super) async fn get(
    store: &Store,
    base: &str,
    name: &str,
    expected: &Sum,
) -> Result<Bytes, BackupError> {
    let mut reader = read(store, base, name).await?;
    let mut whole = BytesMut::new();
    while let Some(piece) = reader.next().await? {
        whole.extend_from_slice(&piece);
    }
    match sum_of(&whole).flaw(expected) {
        None => Ok(whole.freeze()),
        Some(reason) => Err(BackupError::damaged(base, name, reason)),
    }
}

/// Reads a small object under zstd, which holds text, and checks it.
pub(super) async fn get_packed(
    store: &Store,
    base: &str,
    name: &str,
    expected: &Sum,
) -> Result<String, BackupError> {
    let (mut pieces, unpacking) = unpack(store, base, name, expected.clone());
    let taking = async {
        let mut whole = Vec::new();
        while let Some(piece) = pieces.recv().await {
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    };
    let (whole, ()) = tokio::try_join!(taking, unpacking)?;
    String::from_utf8(whole).map_err(|_| BackupError::damaged(base, name, "is not UTF-8"))
}

/// Opens an object of a base.
pub(super) async fn read(
    store: &Store,
    base: &str,
    name: &str,
) -> Result<crate::cloud::store::ObjectReader, BackupError> {
    match store.read(&format!("{base}{name}")).await {
        Err(StoreError::NotFound { .. }) => Err(BackupError::damaged(base, name, "is missing")),
        other => Ok(other?),
    }
}

fn ended<T>(
    thread: Result<io::Result<T>, JoinError>,
    doing: &str,
    name: &str,
) -> Result<T, BackupError> {
    let result = thread.map_err(io::Error::other).and_then(|result| result);
    result.map_err(BackupError::local(format!("{doing} {name}")))
}

fn gone<T>(_: T) -> io::Error {
    io::Error::from(io::ErrorKind::BrokenPipe)
}

fn compress(mut raw: Receiver<Bytes>, to: Sender<Bytes>) -> io::Result<Sum> {
    let outlet = Outlet {
        to,
        piece: BytesMut::with_capacity(PIECE_BYTES),
        summing: Summing::default(),
    };
    let mut encoder = zstd::stream::write::Encoder::new(outlet, LEVEL)?;
    encoder.include_checksum(true)?;
    while let Some(bytes) = raw.blocking_recv() {
        encoder.write_all(&bytes)?;
    }
    let mut outlet = encoder.finish()?;
    outlet.send()?;
    Ok(outlet.summing.sum())
}

/// Where compressed bytes go.
struct Outlet {
    to: Sender<Bytes>,
    piece: BytesMut,
    summing: Summing,
}

impl Outlet {
    fn send(&mut self) -> io::Result<()> {
        let piece = self.piece.split().freeze();
        self.summing.add(&piece);
        self.to.blocking_send(piece).map_err(gone)
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn decompress(packed: Receiver<Bytes>, to: &Sender<Bytes>) -> io::Result<Sum> {
    let inlet = Inlet {
        packed,
        piece: Bytes::new(),
        summing: Summing::default(),
    };
    let mut decoder = zstd::stream::read::Decoder::new(inlet)?;
    loop {
        let mut raw = BytesMut::zeroed(RAW_BYTES);
        let length = decoder.read(&mut raw)?;
        if length == 0 {
            break;
        }
        raw.truncate(length);
        to.blocking_send(raw.freeze()).map_err(gone)?;
    }
    Ok(decoder.finish().into_inner().summing.sum())
}

/// Where compressed bytes come from.
struct Inlet {
    packed: Receiver<Bytes>,
    piece: Bytes,
    summing: Summing,
}

impl Read for Inlet {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let Some(piece) = self.packed.blocking_recv() else {
                return Ok(0);
            };
            self.summing.add(&piece);
            self.piece = piece;
        }
        let length = self.piece.len().min(into.len());
        self.piece.copy_to_slice(&mut into[..length]);
        Ok(length)
    }
}
