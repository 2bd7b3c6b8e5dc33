//! The object store of the archive: a bucket on S3, or a directory.
//!
//! Used by the archive sink and by `restore`; knows nothing of either. An object is written once, whole,
//! and never changed; only one that is found damaged may be replaced. The two stores are told apart here and nowhere else: `s3` and `directory`
//! keep the same contract, and one test (`tests/e2e/store.rs`) holds both to it.
//!
//! # Invariants
//! - **Whole or not at all.** A name is either not there or holds every byte that was written under it,
//!   on stable storage. No listing shows, and no read finds, an object that is still being written.
//! - **First come, first kept.** Of any number of writers of one name exactly one gets [`Put::Created`]; the
//!   others get [`Put::Exists`] and have changed nothing. An answer that is lost on the way does not
//!   turn one into the other: the object itself says who wrote it.
//! - **Replaced in one step.** What is damaged is replaced by [`Store::replace`], and only as it was read: at no moment is the name
//!   without an object.
//! - **Settled.** What a dropped write had under way comes to its end in the background; after [`Store::settle`] a listing
//!   shows what is left of it.
//! - **Bounded.** A writer or reader holds a few parts in memory, whatever the size of its object.
//! - No secret is in an error or in a log line of this module.
//!
//! # What it does not do
//! It does not retry for long: S3 gets a few attempts at one request, the rest is the caller's
//! ([`crate::backoff`]). It keeps no index and caches nothing. It does not compress or encrypt; S3 encrypts
//! on its side ([`Encryption`]).

mod directory;
mod error;
mod name;
mod s3;
#[cfg(test)]
mod tests;
mod url;

use std::future::pending;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use metrics::Counter;
use tokio::task::JoinError;
use tokio_util::task::TaskTracker;

use self::directory::{Directory, DirectoryReader, DirectoryWriter};
pub use self::error::{Refusal, StoreError, StoreOperation};
use self::s3::{S3, S3Reader, S3Writer};
pub use self::url::{StoreUrl, StoreUrlError};
pub use crate::cloud::aws::AwsSettings as S3Settings;

/// Server-side encryption of what is written to S3. A directory is encrypted by its disk, or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// As the bucket says.
    #[default]
    Default,
    /// SSE-S3: AES-256 with keys of S3.
    S3,
    /// SSE-KMS.
    Kms {
        /// Id, ARN or alias of the key.
        key: String,
    },
}

/// What became of an attempt to write an object.
#[must_use = "an object that existed may hold something else"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It was not there and is now.
    Created,
    /// There was one of this name; it is as it was.
    Exists,
}

/// What an [`ObjectWriter`] wrote, or would have written had the object not existed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectSummary {
    /// Its size.
    pub bytes: u64,
    /// CRC-32C of all of it.
    pub crc32c: u32,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name, relative to the store.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written, by the store's clock.
    pub written_at: Option<SystemTime>,
}

/// A place for objects. Cheap to clone.
///
/// Names are relative to the place, of the characters `A-Z a-z 0-9 . _ / = -`; see [`StoreError::Name`].
#[derive(Clone, Debug)]
pub struct Store(Kind);

#[derive(Clone, Debug)]
enum Kind {
    S3(S3),
    Directory(Directory),
}

impl Store {
    /// Opens the place. Region, credentials and endpoint of S3 come from the usual AWS environment
    /// (variables, profile, web identity, container, instance); whether they are good shows at the
    /// first request. A directory is made if it is not there.
    pub async fn open(url: &StoreUrl, encryption: &Encryption) -> Result<Self, StoreError> {
        Self::open_with(url, encryption, &S3Settings::default()).await
    }

    /// The same; what `settings` say goes before the environment.
    pub async fn open_with(
        url: &StoreUrl,
        encryption: &Encryption,
        settings: &S3Settings,
    ) -> Result<Self, StoreError> {
        Ok(Self(match url {
            StoreUrl::S3 { bucket, prefix } => {
                Kind::S3(S3::open(bucket, prefix, encryption, settings).await?)
            }
            StoreUrl::Directory(path) => Kind::Directory(Directory::open(path).await?),
        }))
    }

    /// The same for those who only look: a directory is neither made nor tidied up. One that is not there shows at the
    /// first request.
    pub async fn as_it_is(url: &StoreUrl, encryption: &Encryption) -> Result<Self, StoreError> {
        match url {
            StoreUrl::S3 { .. } => Self::open(url, encryption).await,
            StoreUrl::Directory(path) => Ok(Self(Kind::Directory(Directory::as_it_is(path)))),
        }
    }

    /// Has every answer counted by which S3 asks for fewer requests; the first counter that is given stays.
    pub fn count_throttled(&self, counter: Counter) {
        match &self.0 {
            Kind::S3(s3) => s3.count_throttled(counter),
            // A disk is slow without a word.
            Kind::Directory(_) => {}
        }
    }

    /// Whether the bucket itself ends uploads that nobody completes; none where it may not be asked, or need not be.
    pub async fn ends_abandoned_uploads(&self) -> Option<bool> {
        match &self.0 {
            Kind::S3(s3) => s3.ends_abandoned_uploads().await,
            Kind::Directory(_) => None,
        }
    }

    /// What time it is by the store's own clock: of the last answer of S3, of the file system for a directory. None where it does
    /// not tell.
    pub async fn clock(&self) -> Option<SystemTime> {
        match &self.0 {
            Kind::S3(s3) => s3.clock(),
            Kind::Directory(directory) => directory.clock().await,
        }
    }

    /// Waits until everything has ended that dropped writes and writers had under way: requests that were sent, uploads that
    /// are aborted, files that get their names.
    pub async fn settle(&self) {
        let background = match &self.0 {
            Kind::S3(s3) => s3.background(),
            Kind::Directory(directory) => directory.background(),
        };
        background.wait().await;
    }

    /// Writes an object that does not exist yet; one that exists is left as it is.
    ///
    /// Dropped before it is done, it has written all of the object or nothing.
    pub async fn put_new(&self, name: &str, body: Bytes) -> Result<Put, StoreError> {
        name::check(name)?;
        match &self.0 {
            Kind::S3(s3) => s3.put(name, body, None).await,
            Kind::Directory(directory) => directory.put_new(name, body).await,
        }
    }

    /// The same on the way that large objects take: on S3 as an upload in parts, here of one. An upload that finds the name
    /// taken is aborted before this returns.
    pub async fn put_new_in_parts(&self, name: &str, body: Bytes) -> Result<Put, StoreError> {
        name::check(name)?;
        match &self.0 {
            Kind::S3(s3) => s3.put_new_in_parts(name, body).await,
            Kind::Directory(directory) => directory.put_new(name, body).await,
        }
    }

    /// Begins an object of unknown size that does not exist yet.
    pub async fn create(&self, name: &str) -> Result<ObjectWriter, StoreError> {
        name::check(name)?;
        let kind = match &self.0 {
            Kind::S3(s3) => WriterKind::S3(S3Writer::new(s3.clone(), name, None)),
            Kind::Directory(directory) => {
                WriterKind::Directory(directory.create(name, None).await?)
            }
        };
        Ok(ObjectWriter { kind, torn: false })
    }

    /// Begins an object in the place of what was read as `read`: whoever reads the name finds the one or the other, whole. What
    /// is of another version by then is left as it is ([`Put::Exists`]).
    ///
    /// Two who replace the same object at once may both succeed, one behind the other, where the store looks and writes in two
    /// steps (a directory, services that do not know If-Match): what is written here must be as good as what another writes.
    pub async fn replace(&self, name: &str, read: Version) -> Result<ObjectWriter, StoreError> {
        name::check(name)?;
        let kind = match &self.0 {
            Kind::S3(s3) => WriterKind::S3(S3Writer::new(s3.clone(), name, Some(read))),
            Kind::Directory(directory) => {
                WriterKind::Directory(directory.create(name, Some(read)).await?)
            }
        };
        Ok(ObjectWriter { kind, torn: false })
    }

    /// Reads a small object into memory.
    pub async fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        let mut reader = self.read(name).await?;
        let mut whole = BytesMut::new();
        while let Some(piece) = reader.next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    /// Reads an object piece by piece.
    pub async fn read(&self, name: &str) -> Result<ObjectReader, StoreError> {
        name::check(name)?;
        Ok(ObjectReader(match &self.0 {
            Kind::S3(s3) => ReaderKind::S3(Box::new(s3.read(name).await?)),
            Kind::Directory(directory) => ReaderKind::Directory(directory.read(name).await?),
        }))
    }

    /// All objects whose names begin with `prefix` (which need not end at a '/'), in order of their
    /// names as bytes; with `after` only those behind that name.
    pub async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Listed>, StoreError> {
        name::check_prefix(prefix)?;
        match &self.0 {
            Kind::S3(s3) => s3.list(prefix, after).await,
            Kind::Directory(directory) => directory.list(prefix, after).await,
        }
    }

    /// What stands between `prefix`, which ends with a '/', and the next '/' in names that begin with it; each once, in order.
    pub async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        name::check_prefix(prefix)?;
        let mut found = match &self.0 {
            Kind::S3(s3) => s3.folders(prefix).await?,
            Kind::Directory(directory) => {
                let objects = directory.list(prefix, None).await?;
                let rest = objects
                    .iter()
                    .filter_map(|object| object.name.strip_prefix(prefix));
                rest.filter_map(|rest| Some(rest.split_once('/')?.0.to_owned()))
                    .collect()
            }
        };
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Deletes an object; one that is not there is fine.
    pub async fn delete(&self, name: &str) -> Result<(), StoreError> {
        name::check(name)?;
        match &self.0 {
            Kind::S3(s3) => s3.delete(name).await,
            Kind::Directory(directory) => directory.delete(name).await,
        }
    }
}

/// Where dropped writes come to their end.
fn background() -> TaskTracker {
    let tracker = TaskTracker::new();
    // Only then does it ever count as empty; more may come all the same.
    tracker.close();
    tracker
}

/// What a task has come to that nothing cancels but the end of the runtime.
async fn ended<T>(task: Result<T, JoinError>) -> T {
    match task {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and this future with it.
            Err(_) => pending().await,
        },
    }
}

/// An object that is being written. Dropped without [`ObjectWriter::finish`] it leaves nothing; killed, it
/// may leave what no listing shows: parts of an upload on S3 (a lifecycle rule of the bucket removes
/// them), a temporary file in a directory (removed a day later, when the store is opened).
#[derive(Debug)]
pub struct ObjectWriter {
    kind: WriterKind,
    /// A write is under way, has failed, or was given up half way: nobody knows how much of it counts.
    torn: bool,
}

#[derive(Debug)]
enum WriterKind {
    S3(S3Writer),
    Directory(DirectoryWriter),
}

impl ObjectWriter {
    /// Appends. After an error, or when this was not awaited to its end, the writer can only be dropped.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.must_be_intact()?;
        self.torn = true;
        match &mut self.kind {
            WriterKind::S3(writer) => writer.write(bytes).await?,
            WriterKind::Directory(writer) => writer.write(&bytes).await?,
        }
        self.torn = false;
        Ok(())
    }

    /// Makes the object visible, unless there is one of its name by now.
    pub async fn finish(self) -> Result<(Put, ObjectSummary), StoreError> {
        self.must_be_intact()?;
        match self.kind {
            WriterKind::S3(writer) => writer.finish().await,
            WriterKind::Directory(writer) => writer.finish().await,
        }
    }

    fn must_be_intact(&self) -> Result<(), StoreError> {
        if !self.torn {
            return Ok(());
        }
        let object = match &self.kind {
            WriterKind::S3(writer) => writer.url(),
            WriterKind::Directory(writer) => writer.url(),
        };
        Err(StoreError::Torn { object })
    }
}

/// One version of an object, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(String);

/// An object that is being read.
#[derive(Debug)]
pub struct ObjectReader(ReaderKind);

#[derive(Debug)]
enum ReaderKind {
    S3(Box<S3Reader>),
    Directory(DirectoryReader),
}

impl ObjectReader {
    /// Which one it is of all that the name has had.
    pub fn version(&self) -> Version {
        match &self.0 {
            ReaderKind::S3(reader) => reader.version(),
            ReaderKind::Directory(reader) => reader.version(),
        }
    }

    /// The next piece, never empty; `None` behind the last, when all of it came and S3's checksum,
    /// where there is one, was right.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        match &mut self.0 {
            ReaderKind::S3(reader) => reader.next().await,
            ReaderKind::Directory(reader) => reader.next().await,
        }
    }
}
