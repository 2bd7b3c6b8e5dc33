//! Objects as files below a directory: the embedded default, for a disk or a network file system.
//!
//! An object is written to a temporary file at the root, synced, and given its name by link(2), which
//! fails where the name is taken: that is the whole of "first come, first kept". Then every directory
//! from the object's up to the root is synced, because any of them may have been made a moment ago,
//! by this writer or another.
//!
//! # Invariants
//! - A file of an object's name is complete and on stable storage before it has that name.
//! - Temporary files have names that no object can have ([`TEMPORARY`]). One that a killed writer left is
//!   removed when the store is opened, a day after it was last written.
//! - Files are for their owner only: they hold whole databases.
//!
//! # What it does not do
//! A name cannot be an object and the directory of another at once (`a` and `a/b`); on S3 it could. It keeps no
//! checksum beside a file. Nothing here is awaited while the disk works: that is done on tokio's
//! threads for blocking work.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::task::TaskTracker;

use super::name::{self, TEMPORARY};
use super::{Listed, ObjectSummary, Put, StoreError, StoreOperation, Version};
use crate::private;
use crate::time::wall_clock;

/// No writer leaves its file untouched for so long.
const LEFT_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Another agent that deletes the last object of a directory may remove the directory between its
/// making and its use, but hardly so often.
const LINK_ATTEMPTS: u32 = 50;

/// What is read at once.
const CHUNK: usize = 1 << 20;

/// The directory.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    root: Arc<Path>,
    background: TaskTracker,
}

impl Directory {
    /// The directory as it is: nothing is made, nothing removed.
    pub(super) fn as_it_is(root: &Path) -> Self {
        Self {
            root: root.into(),
            background: super::background(),
        }
    }

    /// What goes on after those who wanted it are gone.
    pub(super) fn background(&self) -> &TaskTracker {
        &self.background
    }

    /// Makes the directory if it is not there, and removes what killed writers left.
    pub(super) async fn open(root: &Path) -> Result<Self, StoreError> {
        let directory = Self::as_it_is(root);
        let opened = directory.clone();
        let making = directory.blocking(move || {
            make_durably(&opened.root)
                .and_then(|()| opened.remove_left(wall_clock()))
                .map_err(|source| opened.failed(StoreOperation::Open, "", source))
        });
        making.await?;
        Ok(directory)
    }

    pub(super) async fn put_new(&self, name: &str, body: Bytes) -> Result<Put, StoreError> {
        let (directory, name) = (self.clone(), name.to_owned());
        self.blocking(move || {
            let put = || {
                let (mut file, temporary) = directory.temporary()?;
                file.write_all(&body)?;
                file.sync_all()?;
                directory.publish(&temporary, &name)
            };
            put().map_err(|source| directory.failed(StoreOperation::Write, &name, source))
        })
        .await
    }

    pub(super) async fn create(
        &self,
        name: &str,
        instead: Option<Version>,
    ) -> Result<DirectoryWriter, StoreError> {
        let directory = self.clone();
        // Given up while the file is being made, its guard is dropped with the answer.
        let (file, temporary) = self
            .blocking(move || directory.temporary())
            .await
            .map_err(|source| self.failed(StoreOperation::Write, name, source))?;
        Ok(DirectoryWriter {
            directory: self.clone(),
            name: name.to_owned(),
            instead,
            file: tokio::fs::File::from_std(file),
            temporary,
            written: ObjectSummary::default(),
        })
    }

    pub(super) async fn read(&self, name: &str) -> Result<DirectoryReader, StoreError> {
        let (directory, path) = (self.clone(), self.root.join(name));
        let opened = self.blocking(move || match File::open(path) {
            // A directory can be opened too, and is no object.
            Ok(file) => {
                let status = file.metadata()?;
                Ok(status.is_file().then(|| (file, version(&status))))
            }
            Err(error) if is_absent(&error) => directory.must_be_there().map(|()| None),
            Err(error) => Err(error),
        });
        match opened.await {
            Ok(Some((file, version))) => Ok(DirectoryReader {
                directory: self.clone(),
                name: name.to_owned(),
                version,
                file: tokio::fs::File::from_std(file),
            }),
            Ok(None) => Err(StoreError::NotFound {
                object: self.url(name),
            }),
            Err(source) => Err(self.failed(StoreOperation::Read, name, source)),
        }
    }

    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<Vec<Listed>, StoreError> {
        let (directory, prefix) = (self.clone(), prefix.to_owned());
        let after = after.map(str::to_owned);
        self.blocking(move || {
            directory
                .walk(&prefix, after.as_deref())
                .map_err(|source| directory.failed(StoreOperation::List, &prefix, source))
        })
        .await
    }

    pub(super) async fn delete(&self, name: &str) -> Result<(), StoreError> {
        let (directory, name) = (self.clone(), name.to_owned());
        self.blocking(move || {
            directory
                .remove(&name)
                .map_err(|source| directory.failed(StoreOperation::Delete, &name, source))
        })
        .await
    }

    /// Does what waits for the disk where waiting blocks nobody.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        super::ended(self.background.spawn_blocking(work).await).await
    }

    /// What a file gets as its time that is written now.
    pub(super) async fn clock(&self) -> Option<SystemTime> {
        let directory = self.clone();
        self.blocking(move || {
            let (mut file, _guard) = directory.temporary().ok()?;
            file.write_all(b"time").ok()?;
            file.metadata().ok()?.modified().ok()
        })
        .await
    }

    /// A new temporary file and its guard.
    fn temporary(&self) -> io::Result<(File, Temporary)> {
        let path = self
            .root
            .join(format!("{TEMPORARY}{:016x}", rand::random::<u64>()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok((file, Temporary { path }))
    }

    /// Gives a complete, synced temporary file the name of an object.
    fn publish(&self, temporary: &Temporary, name: &str) -> io::Result<Put> {
        let path = self.root.join(name);
        let mut attempts = 0;
        let put = loop {
            attempts += 1;
            match path.parent().map_or(Ok(()), private::create_dir_all) {
                Ok(()) => {}
                // A directory on the way was made by somebody else, or deleted, between two looks.
                Err(error) if is_a_race(&error) && attempts < LINK_ATTEMPTS => continue,
                Err(error) => return Err(error),
            }
            let linked = match fs::hard_link(&temporary.path, &path) {
                Ok(()) => Ok(Put::Created),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    temporary.became(&path)
                }
                Err(error) => Err(error),
            };
            match linked {
                Ok(put) => break put,
                // The directory, or the object that was in the way, has been deleted meanwhile.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && attempts < LINK_ATTEMPTS => {}
                Err(error) => return Err(error),
            }
        };
        // For an object that exists too: the other writer may not have come so far.
        self.make_names_durable(&path)?;
        Ok(put)
    }

    /// Gives it the name of an object that is still what it was when it was read; none in between finds nothing there.
    fn publish_instead(
        &self,
        temporary: &Temporary,
        name: &str,
        read: &Version,
    ) -> io::Result<Put> {
        let path = self.root.join(name);
        if version(&fs::metadata(&path)?) != *read {
            return Ok(Put::Exists);
        }
        fs::rename(&temporary.path, &path)?;
        self.make_names_durable(&path)?;
        Ok(Put::Created)
    }

    fn make_names_durable(&self, path: &Path) -> io::Result<()> {
        for above in path.ancestors().skip(1) {
            sync(above)?;
            if *above == *self.root {
                break;
            }
        }
        Ok(())
    }

    fn walk(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<Listed>> {
        self.must_be_there()?;
        let (below, _) = prefix.rsplit_once('/').unwrap_or_default();
        let mut directories = vec![below.to_owned()];
        let mut found = Vec::new();
        while let Some(directory) = directories.pop() {
            let entries = match fs::read_dir(self.root.join(&directory)) {
                Ok(entries) => entries,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                // What cannot be an object is not ours: temporary files, and what people put here.
                let Some(name) = name_of(&directory, &entry.file_name()) else {
                    continue;
                };
                // Follows symbolic links, as writing does.
                let status = match fs::metadata(entry.path()) {
                    Ok(status) => status,
                    Err(error) if is_absent(&error) => continue,
                    Err(error) => return Err(error),
                };
                if status.is_dir() {
                    if format!("{name}/").starts_with(prefix) {
                        directories.push(name);
                    }
                } else if name.starts_with(prefix) && after.is_none_or(|after| *name > *after) {
                    found.push(Listed {
                        name,
                        bytes: status.len(),
                        written_at: status.modified().ok(),
                    });
                }
            }
        }
        // Of whole names, not directory by directory: "a-b" comes before "a/b", as on S3.
        found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.root.join(name);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if is_absent(&error) || error.kind() == io::ErrorKind::IsADirectory => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        // Directories that hold nothing any more go too; rmdir(2) refuses the others.
        for above in path.ancestors().skip(1) {
            if *above == *self.root || fs::remove_dir(above).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Removes temporary files that nobody has written to for long.
    fn remove_left(&self, now: SystemTime) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if !entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(TEMPORARY.as_bytes())
            {
                continue;
            }
            let removed = entry.metadata().and_then(|status| {
                let age = now.duration_since(status.modified()?);
                if age.is_ok_and(|age| age > LEFT_AFTER) {
                    fs::remove_file(entry.path())?;
                }
                Ok(())
            });
            match removed {
                Err(error) if !is_absent(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Without its root a store is not empty but gone: its file system is not mounted, say.
    fn must_be_there(&self) -> io::Result<()> {
        match fs::metadata(&self.root)?.is_dir() {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::NotADirectory)),
        }
    }

    fn url(&self, name: &str) -> String {
        format!("file://{}", self.root.join(name).display())
    }

    fn failed(&self, doing: StoreOperation, name: &str, source: io::Error) -> StoreError {
        StoreError::Io {
            doing,
            object: self.url(name),
            source,
        }
    }
}

/// A file that is not an object. Removed when dropped, also once it is one: the object is another
/// name of the same file.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    /// Who is in the way? Over a network a link can be made and its answer lost; then it is this file.
    fn became(&self, path: &Path) -> io::Result<Put> {
        let there = fs::metadata(path)?;
        if there.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        let own = fs::metadata(&self.path)?;
        Ok(if (own.dev(), own.ino()) == (there.dev(), there.ino()) {
            Put::Created
        } else {
            Put::Exists
        })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let removed = fs::remove_file(&self.path);
        // It may be an object by now, and have no other name.
        if let Err(error) = removed.or_else(|error| {
            if is_absent(&error) {
                Ok(())
            } else {
                Err(error)
            }
        }) {
            tracing::warn!(path = %self.path.display(), %error, "temporary file not removed");
        }
    }
}

/// An object on its way to the disk.
#[derive(Debug)]
pub(super) struct DirectoryWriter {
    directory: Directory,
    name: String,
    /// What it is to replace.
    instead: Option<Version>,
    file: tokio::fs::File,
    temporary: Temporary,
    written: ObjectSummary,
}

impl DirectoryWriter {
    pub(super) fn url(&self) -> String {
        self.directory.url(&self.name)
    }

    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).await.map_err(|source| {
            self.directory
                .failed(StoreOperation::Write, &self.name, source)
        })?;
        self.written.bytes += bytes.len() as u64;
        self.written.crc32c = crc32c::crc32c_append(self.written.crc32c, bytes);
        Ok(())
    }

    pub(super) async fn finish(self) -> Result<(Put, ObjectSummary), StoreError> {
        let Self {
            directory,
            name,
            instead,
            mut file,
            temporary,
            written,
        } = self;
        let failed = |source| directory.failed(StoreOperation::Write, &name, source);
        // The last write goes on in the background; only this says how it ended.
        file.flush().await.map_err(failed)?;
        file.sync_all().await.map_err(failed)?;
        let (to, object) = (directory.clone(), name.clone());
        let put = directory
            .blocking(move || match instead {
                None => to.publish(&temporary, &object),
                Some(read) => to.publish_instead(&temporary, &object, &read),
            })
            .await
            .map_err(failed)?;
        Ok((put, written))
    }
}

/// An object on its way from the disk.
#[derive(Debug)]
pub(super) struct DirectoryReader {
    directory: Directory,
    name: String,
    version: Version,
    file: tokio::fs::File,
}

impl DirectoryReader {
    pub(super) fn version(&self) -> Version {
        self.version.clone()
    }

    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let mut piece = BytesMut::with_capacity(CHUNK);
        match self.file.read_buf(&mut piece).await {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(piece.freeze())),
            Err(source) => Err(self
                .directory
                .failed(StoreOperation::Read, &self.name, source)),
        }
    }
}

/// A file that is written anew is another file, and one that is written to has another time.
fn version(status: &fs::Metadata) -> Version {
    let (seconds, nanos) = (status.mtime(), status.mtime_nsec());
    Version(format!(
        "{}-{}-{seconds}.{nanos}",
        status.ino(),
        status.len()
    ))
}

/// What making directories says while others make and delete them. It may be meant, too: then it says so every time.
fn is_a_race(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
    )
}

/// The same, and durable in the directory above.
fn make_durably(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let Some(above) = path.parent() else {
        return Ok(());
    };
    make_durably(above)?;
    private::create_dir_all(path)?;
    sync(above)
}

/// Makes durable what names a directory holds.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn name_of(directory: &str, file: &OsStr) -> Option<String> {
    let file = file.to_str()?;
    let name = if directory.is_empty() {
        file.to_owned()
    } else {
        format!("{directory}/{file}")
    };
    name::check(&name).is_ok().then_some(name)
}

/// There is nothing of that name; "not a directory" says it of `a/b` where `a` is an object.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
