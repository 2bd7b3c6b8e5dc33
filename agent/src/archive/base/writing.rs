//! A base on its way into the store: claimed, written object by object, and discarded if it comes to nothing.
//!
//! ```text
//! claim ▶ [object: write ▶ failed? ▶ wait ▶ nothing left of it ▶ write again] ▶ manifest
//!   └──────────────── an error, or told to stop ▶ discard ◀────┘
//! ```
//! A large base takes a day, and no store and no line to one is there for all of it. What has been read so far lives as long as
//! the snapshot does; so one object is written again, and not the whole base.
//!
//! # Invariants
//! - Whoever creates the first object has the base to itself: from then on whatever is below its prefix is ours, and nobody
//!   else's is deleted.
//! - Before an object is written again the store has answered that nothing is there of the attempt before. One that arrives
//!   later still is in the way of the next attempt, and goes as well.
//! - A store that is away is waited for, [`AWAY_MAX`] at most, one that refuses [`REFUSED_MAX`]. A full disk is not: only what is discarded makes room there.
//! - What came to nothing is deleted, as far as the store answers. Nothing is, once the manifest is on its way: it may be there
//!   whatever the answer was.
//!
//! # What it does not do
//! The first object is not written again: nothing would be lost with it. What a killed backup leaves goes with the retention.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use metrics::Counter;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::error::BackupError;
use super::manifest::{self, Manifest};
use super::object::{self, Sum};
use super::repository;
use crate::backoff::{self, Decision};
use crate::cloud::store::{Put, Store, StoreError};
use crate::error::{Classify as _, chain};
use crate::failpoint;
use crate::observe::metrics::ArchiveMetrics;

/// So long a store may be away before the base is given up. Meanwhile the snapshot holds back vacuum on the source, as any long
/// query does; but beginning anew holds it back for all the time that the base has taken so far.
const AWAY_MAX: Duration = Duration::from_secs(3600);

/// So long what somebody has to mend may be: a change of rights or keys takes seconds to come into force.
const REFUSED_MAX: Duration = Duration::from_secs(60);

/// Objects that are deleted at the same time: a base may have thousands, and whoever stops waits for it.
const DELETED_AT_ONCE: usize = 16;

/// How long the store is waited for, and who is told.
#[derive(Clone, Debug)]
pub struct Patience {
    retry_max: Duration,
    grace: Duration,
    retries: Counter,
}

impl Patience {
    /// `retry_max`: longest pause between two attempts. `grace`: what deleting may take once the backup was told to stop.
    /// Attempts that the store refused are counted.
    pub fn new(retry_max: Duration, grace: Duration, metrics: &ArchiveMetrics) -> Self {
        Self {
            retry_max,
            grace,
            retries: metrics.retries.clone(),
        }
    }
}

/// What a base leaves in the store if nothing becomes of it: the prefix, from the claim until the manifest is on its way.
#[derive(Debug, Default)]
pub(super) struct Remains(Mutex<Option<String>>);

impl Remains {
    fn set(&self, base: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = base;
    }

    /// Deletes what is there, after everything that wrote has been dropped.
    pub(super) async fn discard(
        self,
        store: &Store,
        patience: &Patience,
        cancel: &CancellationToken,
    ) {
        let base = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Some(base) = base else { return };
        let hurry = async {
            cancel.cancelled().await;
            tokio::time::sleep(patience.grace).await;
        };
        tokio::select! {
            deleted = delete(store, &base) => match deleted {
                Ok(objects) => tracing::info!(base, objects, "deleted what was there of the base backup"),
                Err(error) => tracing::warn!(
                    base, error = %chain(&error),
                    "not all that was there of the base backup could be deleted; the rest goes with the retention"
                ),
            },
            () = hurry => tracing::warn!(
                base, "no time to delete what was there of the base backup; the rest goes with the retention"
            ),
        }
    }
}

async fn delete(store: &Store, base: &str) -> Result<usize, StoreError> {
    // Whatever was under way when its writer was dropped is there now, or never will be.
    store.settle().await;
    let listed = store.list(base, None).await?;
    let each: Vec<_> = listed.iter().map(|it| store.delete(&it.name)).collect();
    stream::iter(each)
        .buffer_unordered(DELETED_AT_ONCE)
        .try_collect::<()>()
        .await?;
    Ok(listed.len())
}

/// A base that is ours.
pub(super) struct Writing<'a> {
    store: &'a Store,
    patience: &'a Patience,
    remains: &'a Remains,
    base: String,
}

impl<'a> Writing<'a> {
    /// Begins a base with its first object.
    pub(super) async fn claim(
        store: &'a Store,
        patience: &'a Patience,
        remains: &'a Remains,
        base: String,
        (name, body): (&str, Bytes),
    ) -> Result<(Self, Sum), BackupError> {
        let object = format!("{base}{name}");
        let (put, sum) = object::put(store, &object, body).await?;
        if put == Put::Exists {
            return Err(BackupError::Exists { object });
        }
        remains.set(Some(base.clone()));
        let claimed = Self {
            store,
            patience,
            remains,
            base,
        };
        Ok((claimed, sum))
    }

    /// Writes an object until the store has it. `write` is called with its name in the store, again after each failure.
    pub(super) async fn write<'w, T>(
        &self,
        name: &str,
        mut write: impl FnMut(String) -> BoxFuture<'w, Result<(Put, Sum, T), BackupError>>,
    ) -> Result<(Sum, T), BackupError> {
        let object = format!("{}{name}", self.base);
        let mut attempts = StoreAttempts::new(self.patience);
        loop {
            let error = match write(object.clone()).await {
                Ok((Put::Created, sum, rest)) => return Ok((sum, rest)),
                Ok((Put::Exists, ..)) => BackupError::Exists {
                    object: object.clone(),
                },
                Err(error) => error,
            };
            attempts.failed(&object, error).await?;
            // Not before the store answers: reading again from the source would be in vain.
            while let Err(error) = self.store.delete(&object).await {
                attempts.failed(&object, error.into()).await?;
            }
        }
    }

    /// Writes a small object that is text, under zstd.
    pub(super) async fn put_packed(&self, name: &str, body: String) -> Result<Sum, BackupError> {
        let body = Bytes::from(body);
        let write = |object: String| -> BoxFuture<'_, _> {
            let body = body.clone();
            Box::pin(async move {
                let (put, sum) = object::put_packed(self.store, &object, body).await?;
                Ok((put, sum, ()))
            })
        };
        self.write(name, write).await.map(|(sum, ())| sum)
    }

    /// Writes a small object as it is.
    pub(super) async fn put(&self, name: &str, body: Bytes) -> Result<Sum, BackupError> {
        let write = |object: String| -> BoxFuture<'_, _> {
            let body = body.clone();
            Box::pin(async move {
                let (put, sum) = object::put(self.store, &object, body).await?;
                Ok((put, sum, ()))
            })
        };
        self.write(name, write).await.map(|(sum, ())| sum)
    }

    /// Writes the manifest, if everything else is there: somebody may have tidied up under a backup that took days.
    pub(super) async fn seal(self, manifest: &Manifest) -> Result<(), BackupError> {
        let object = format!("{}{}", self.base, manifest::NAME);
        let json = manifest
            .to_json()
            .map_err(|error| BackupError::local("write the manifest")(error.into()))?;
        let json = Bytes::from(json);
        let mut attempts = StoreAttempts::new(self.patience);
        let listed = loop {
            match self.store.list(&self.base, None).await {
                Ok(listed) => break listed,
                Err(error) => attempts.failed(&object, error.into()).await?,
            }
        };
        let flaws = repository::flaws(&self.base, manifest, &listed);
        if !flaws.is_empty() {
            return Err(BackupError::Damaged {
                base: self.base,
                flaws,
            });
        }
        failpoint::hit("backup:before-manifest");
        self.remains.set(None);
        let mut attempts = StoreAttempts::new(self.patience);
        loop {
            match self.put_manifest(&object, &json).await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(BackupError::Exists { object }),
                Err(error) => attempts.failed(&object, error.into()).await?,
            }
        }
    }

    /// Whether it is there and ours: an earlier attempt may have written it, and its answer been lost.
    async fn put_manifest(&self, object: &str, json: &Bytes) -> Result<bool, StoreError> {
        match self.store.put_new(object, json.clone()).await? {
            Put::Created => Ok(true),
            Put::Exists => Ok(self.store.get(object).await? == *json),
        }
    }
}

/// Failures of one object in a row.
struct StoreAttempts<'a> {
    patience: &'a Patience,
    number: u32,
    since: Option<Instant>,
}

impl<'a> StoreAttempts<'a> {
    fn new(patience: &'a Patience) -> Self {
        Self {
            patience,
            number: 0,
            since: None,
        }
    }

    /// Says so and waits until it is time for another attempt. The error, if there is to be none.
    async fn failed(&mut self, object: &str, error: BackupError) -> Result<(), BackupError> {
        self.number += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        let retry_max = self.patience.retry_max;
        let pause = pause(
            &error,
            self.number,
            since.elapsed(),
            retry_max,
            rand::random(),
        );
        if matches!(error, BackupError::Store(_)) {
            self.patience.retries.increment(1);
        }
        let Some(pause) = pause else {
            return Err(error);
        };
        tracing::warn!(
            object, attempt = self.number, ?pause, error = %chain(&error), hint = error.hint(),
            "the archive did not take an object of the base backup; will retry"
        );
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// How long to wait after failure number `attempt` in a row, the first of which is so long ago; none if that is the end.
fn pause(
    error: &BackupError,
    attempt: u32,
    ago: Duration,
    retry_max: Duration,
    jitter: f64,
) -> Option<Duration> {
    let within = match error {
        _ if error.is_full() => return None,
        BackupError::Store(error) if error.passes() => AWAY_MAX,
        BackupError::Store(_) => REFUSED_MAX,
        // One of our own that has arrived after all; before the first failure it is somebody else's.
        BackupError::Exists { .. } if attempt > 1 => AWAY_MAX,
        // Of the source, most of the time: its snapshot is gone.
        _ => return None,
    };
    match backoff::decide(error.class(), attempt, retry_max, jitter) {
        Decision::Retry(pause) if ago + pause < within => Some(pause),
        Decision::Retry(_) | Decision::Stop => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::archive::base::manifest::tests::example;
    use crate::cloud::store::{Encryption, Refusal, StoreOperation, StoreUrl};

    const BASE: &str = "s/1/base/000000000000000A/";

    fn refused(refusal: Refusal) -> BackupError {
        let error = StoreError::S3 {
            doing: StoreOperation::Write,
            object: "s3://b/a".to_owned(),
            refusal,
            said: "no".to_owned(),
        };
        error.into()
    }

    fn on_disk(kind: io::ErrorKind) -> BackupError {
        let error = StoreError::Io {
            doing: StoreOperation::Write,
            object: "file:///b/a".to_owned(),
            source: kind.into(),
        };
        error.into()
    }

    fn patience() -> Patience {
        let quick = Duration::from_millis(10);
        Patience::new(quick, quick, &ArchiveMetrics::new("app"))
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let url = StoreUrl::Directory(home.path().to_owned());
        let store = Store::open(&url, &Encryption::Default).await.unwrap();
        (home, store)
    }

    async fn names(store: &Store) -> Vec<String> {
        let listed = store.list("", None).await.unwrap();
        listed.into_iter().map(|object| object.name).collect()
    }

    async fn claim<'a>(
        store: &'a Store,
        patience: &'a Patience,
        remains: &'a Remains,
    ) -> Result<Writing<'a>, BackupError> {
        let first = ("schema.dump", "schema".into());
        let claimed = Writing::claim(store, patience, remains, BASE.to_owned(), first);
        claimed.await.map(|(base, _)| base)
    }

    #[test]
    fn a_store_is_waited_for_an_hour_and_a_full_disk_or_a_lost_snapshot_not_at_all() {
        let hour = Duration::from_secs(3600);
        let after = |error: &BackupError, attempt, ago| {
            pause(error, attempt, ago, Duration::from_secs(30), 0.0)
        };
        for error in [
            refused(Refusal::Unavailable),
            refused(Refusal::Throttled),
            refused(Refusal::Conflict),
            on_disk(io::ErrorKind::TimedOut),
        ] {
            assert!(after(&error, 1, Duration::ZERO).is_some(), "{error}");
            assert_eq!(after(&error, 99, hour / 2), Some(Duration::from_secs(30)));
            assert_eq!(after(&error, 99, hour - Duration::from_secs(30)), None);
        }
        let object = || "a".to_owned();
        for error in [
            refused(Refusal::Invalid),
            on_disk(io::ErrorKind::StorageFull),
            on_disk(io::ErrorKind::QuotaExceeded),
            crate::copy::CopyError::SnapshotLost.into(),
            BackupError::Exists { object: object() },
        ] {
            assert_eq!(after(&error, 1, Duration::ZERO), None, "{error}");
        }
        // A right that was taken away and given back, or never given: who waits for an answer is not kept for an hour.
        let denied = refused(Refusal::Denied);
        assert!(after(&denied, 3, Duration::from_secs(5)).is_some());
        assert_eq!(after(&denied, 9, REFUSED_MAX), None);
        let late = BackupError::Exists { object: object() };
        assert!(after(&late, 2, Duration::ZERO).is_some());
    }

    #[tokio::test]
    async fn what_an_earlier_attempt_left_is_not_taken_for_the_object() {
        let (_home, store) = store().await;
        let (patience, remains) = (patience(), Remains::default());
        let base = claim(&store, &patience, &remains).await.unwrap();
        let mut attempt = 0;
        let (written, again) = base
            .write("data/1", |object| {
                attempt += 1;
                let (store, attempt) = (&store, attempt);
                Box::pin(async move {
                    let body = Bytes::from(format!("attempt {attempt}"));
                    let (put, sum) = object::put(store, &object, body).await?;
                    match attempt {
                        // It is there, and the answer is lost.
                        1 => Err(refused(Refusal::Unavailable)),
                        // It comes late, in the way of the next one.
                        2 => Ok((Put::Exists, sum, attempt)),
                        _ => Ok((put, sum, attempt)),
                    }
                })
            })
            .await
            .unwrap();
        assert_eq!(again, 3);
        let there = store.get(&format!("{BASE}data/1")).await.unwrap();
        assert_eq!(there, "attempt 3");
        assert_eq!(written.bytes, there.len() as u64);
    }

    #[tokio::test]
    async fn a_base_that_came_to_nothing_is_deleted_and_nobody_elses_is() {
        let (_home, store) = store().await;
        let patience = patience();
        let of_others = ["s/1/base/0000000000000009/manifest.json", "s/1/log/a.zst"];
        for name in of_others {
            let _ = store.put_new(name, "x".into()).await.unwrap();
        }
        let running = CancellationToken::new();
        let remains = Remains::default();
        let base = claim(&store, &patience, &remains).await.unwrap();
        base.put_packed("roles.sql.zst", "x".to_owned())
            .await
            .unwrap();
        // A second backup at the same position.
        let second = Remains::default();
        let refused = claim(&store, &patience, &second).await.err();
        assert!(matches!(refused, Some(BackupError::Exists { .. })));
        second.discard(&store, &patience, &running).await;
        assert_eq!(names(&store).await.len(), 4);
        drop(base);
        remains.discard(&store, &patience, &running).await;
        assert_eq!(names(&store).await, of_others);
    }

    #[tokio::test]
    async fn nothing_is_deleted_once_the_manifest_may_be_there() {
        let (_home, store) = store().await;
        let (patience, remains) = (patience(), Remains::default());
        let base = claim(&store, &patience, &remains).await.unwrap();
        let sum = base.put("load.sql", "load".into()).await.unwrap();
        let mut manifest = example();
        let file = |name: &str, sum: Sum| super::manifest::Object {
            name: name.to_owned(),
            sum,
            data: None,
        };
        // An object is missing: the manifest is not written, and the rest may go.
        manifest.objects = vec![file("load.sql", sum.clone()), file("data/1", sum.clone())];
        let error = base.seal(&manifest).await.unwrap_err();
        assert!(
            error.to_string().contains("schema.dump: is not in"),
            "{error}"
        );
        assert!(error.to_string().contains("data/1: is missing"), "{error}");
        let running = CancellationToken::new();
        remains.discard(&store, &patience, &running).await;
        assert_eq!(names(&store).await, [""; 0]);

        let remains = Remains::default();
        let base = claim(&store, &patience, &remains).await.unwrap();
        let schema = object::sha256(b"schema");
        let schema = Sum {
            bytes: 6,
            sha256: schema,
        };
        manifest.objects = vec![file("schema.dump", schema)];
        // As if an earlier attempt at it had arrived, and its answer been lost.
        let name = format!("{BASE}{}", super::manifest::NAME);
        let json = manifest.to_json().unwrap();
        let _ = store.put_new(&name, json.into()).await.unwrap();
        base.seal(&manifest).await.unwrap();
        remains.discard(&store, &patience, &running).await;
        assert_eq!(names(&store).await.len(), 2);
    }
}
