//! What the archive has of base backups: which there are, and whether one is whole.
//!
//! Only reads.
//!
//! # Invariants
//! - A base without a manifest is not listed. One whose manifest cannot be read is named beside the others: nobody must
//!   think that it was never there, and it must not keep anybody from the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;

use super::error::{BackupError, Flaw};
use super::manifest::{self, Manifest, Object};
use super::object::{self, Sum, Summing};
use crate::archive::log::Layout;
use crate::cloud::store::{Listed, Store, StoreError};
use crate::error::{Classify as _, chain};
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;

/// Objects that are read at the same time.
const READERS: usize = 4;

/// What the names of one base's objects begin with.
pub(super) fn base(bases: &str, lsn: PgLsn) -> String {
    format!("{bases}{:016X}/", u64::from(lsn))
}

/// One base, at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BaseSummary {
    /// What the names of its objects begin with.
    pub base: String,
    /// Its LSN, as `16/B374D848`.
    #[serde(serialize_with = "text")]
    pub lsn: PgLsn,
    /// When the rows were like this, by the source's clock.
    #[serde(serialize_with = "text")]
    pub as_of: jiff::Timestamp,
    /// When it was finished, by the agent's clock.
    #[serde(serialize_with = "text")]
    pub finished_at: jiff::Timestamp,
    /// When it was begun, by the store's clock.
    #[serde(skip)]
    pub begun_at: Option<jiff::Timestamp>,
    /// The source's `server_version_num`.
    pub server_version: i32,
    /// Tables.
    pub tables: usize,
    /// Rows.
    pub rows: u64,
    /// Bytes of rows, before compression.
    pub raw_bytes: u64,
    /// Bytes in the archive.
    pub bytes: u64,
}

fn text<S: serde::Serializer>(value: &impl ToString, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&value.to_string())
}

impl BaseSummary {
    fn new(base: String, manifest: &Manifest, written_at: Option<SystemTime>) -> Self {
        let mut tables: Vec<_> = manifest.data().map(|(_, data)| &data.table).collect();
        tables.sort();
        tables.dedup();
        Self {
            base,
            lsn: manifest.lsn,
            as_of: manifest.as_of,
            finished_at: manifest.finished_at,
            begun_at: written_at
                .and_then(|at| jiff::Timestamp::try_from(at.checked_sub(manifest.took())?).ok()),
            server_version: manifest.server_version,
            tables: tables.len(),
            rows: manifest.data().map(|(_, data)| data.rows).sum(),
            raw_bytes: manifest.data().map(|(_, data)| data.raw_bytes).sum(),
            bytes: manifest.bytes(),
        }
    }

    /// Since when it counts for the retention: of what the source's and the store's clock say the later. One that was wrong must
    /// not make a base look old.
    pub(super) fn counts_from(&self) -> jiff::Timestamp {
        self.begun_at
            .map_or(self.as_of, |begun_at| begun_at.max(self.as_of))
    }
}

/// A base whose manifest cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unusable {
    /// What the names of its objects begin with.
    pub base: String,
    /// Its LSN.
    #[serde(serialize_with = "text")]
    pub lsn: PgLsn,
    /// What is wrong with the manifest.
    pub reason: String,
}

/// Everything below a prefix of bases.
#[derive(Debug, Default)]
pub struct FoundBases {
    /// The bases, oldest first.
    pub bases: Vec<BaseSummary>,
    /// Those that were there and cannot be used, oldest first.
    pub unusable: Vec<Unusable>,
    /// Objects of each base and leftover, by its LSN.
    pub(super) objects: BTreeMap<u64, Vec<Listed>>,
}

impl FoundBases {
    /// Says aloud what cannot be used.
    pub fn warn(&self) {
        for Unusable { base, reason, .. } in &self.unusable {
            warn(base, reason);
        }
    }
}

/// Looks what is below a prefix (`<stream>/<history>/base/`).
///
/// # Errors
/// [`BackupError::Store`]
pub async fn find(store: &Store, bases: &str) -> Result<FoundBases, BackupError> {
    let mut objects: BTreeMap<u64, Vec<Listed>> = BTreeMap::new();
    for listed in store.list(bases, None).await? {
        // What has another name is not ours.
        if let Some(lsn) = lsn_of(bases, &listed.name) {
            objects.entry(lsn).or_default().push(listed);
        }
    }
    let mut found = FoundBases::default();
    for (&lsn, listed) in &objects {
        let lsn = PgLsn::from(lsn);
        let base = base(bases, lsn);
        let its_manifest = format!("{base}{}", manifest::NAME);
        let Some(its_manifest) = listed.iter().find(|object| object.name == its_manifest) else {
            continue;
        };
        match manifest(store, &base).await {
            Ok(manifest) => {
                let summary = BaseSummary::new(base, &manifest, its_manifest.written_at);
                found.bases.push(summary);
            }
            // Somebody has tidied up meanwhile.
            Err(BackupError::NotFound { .. }) => {}
            Err(error) => {
                let reason = unusable(error)?;
                found.unusable.push(Unusable { base, lsn, reason });
            }
        }
    }
    found.objects = objects;
    Ok(found)
}

/// Why a base whose manifest could not be read cannot be used. One that the store keeps back (frozen, its key disabled, its disk
/// block bad) says nothing about the others.
///
/// # Errors
/// Where the store itself is away: then nothing is known of any base.
fn unusable(error: BackupError) -> Result<String, BackupError> {
    match error {
        BackupError::Manifest { reason, .. } => Ok(reason),
        BackupError::Store(error) if error.is_of_one_object() => Ok(unreadable(&error)),
        error => Err(error),
    }
}

fn unreadable(error: &StoreError) -> String {
    let hint = error.hint().map(|hint| format!(" ({hint})"));
    format!(
        "it cannot be read: {}{}",
        chain(error),
        hint.unwrap_or_default()
    )
}

fn lsn_of(bases: &str, name: &str) -> Option<u64> {
    let (digits, _) = name.strip_prefix(bases)?.split_once('/')?;
    let lsn = u64::from_str_radix(digits, 16).ok()?;
    (format!("{lsn:016X}") == digits).then_some(lsn)
}

/// Every history of a stream that the archive has, in the order in which they began.
///
/// # Errors
/// [`BackupError::Store`]
pub async fn histories(store: &Store, stream: &StreamName) -> Result<Vec<Layout>, BackupError> {
    let folders = store.folders(&format!("{stream}/")).await?;
    let mut histories: Vec<History> = folders
        .iter()
        .filter_map(|folder| folder.parse().ok())
        .collect();
    histories.sort_by_key(|history| history.began);
    let layouts = histories.into_iter();
    Ok(layouts
        .map(|history| Layout::new(stream, history))
        .collect())
}

/// The newest base of a stream, for whoever asks again and again: a manifest is read once, however many objects and bases the
/// archive has.
#[derive(Debug, Default)]
pub struct Newest {
    known: Option<(String, Manifest)>,
    /// Prefixes of bases that cannot be used, which have been named.
    unusable: BTreeSet<String>,
}

impl Newest {
    /// Its prefix and its manifest, of the history that began last; none before that one has its first. An older history leads
    /// nowhere.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn find(
        &mut self,
        store: &Store,
        stream: &StreamName,
    ) -> Result<Option<(&str, &Manifest)>, BackupError> {
        let Some(layout) = histories(store, stream).await?.pop() else {
            return Ok(None);
        };
        let bases = layout.bases();
        let mut found = None;
        for folder in store.folders(&bases).await?.iter().rev() {
            let base = format!("{bases}{folder}/");
            if self.known.as_ref().is_some_and(|(known, _)| *known == base) {
                found = self.known.take();
                break;
            }
            // What has another name is not ours.
            if lsn_of(&bases, &base).is_none() || self.unusable.contains(&base) {
                continue;
            }
            match manifest(store, &base).await {
                Ok(manifest) => {
                    found = Some((base, manifest));
                    break;
                }
                // A leftover, or one that is being taken.
                Err(BackupError::NotFound { .. }) => {}
                // What cannot be read now may be readable at the next look; what is damaged stays so.
                Err(error @ BackupError::Store(_)) => {
                    warn(&base, &unusable(error)?);
                }
                Err(error) => {
                    warn(&base, &unusable(error)?);
                    self.unusable.insert(base);
                }
            }
        }
        self.known = found;
        let known = self.known.as_ref();
        Ok(known.map(|(base, manifest)| (base.as_str(), manifest)))
    }
}

fn warn(base: &str, reason: &str) {
    tracing::warn!(base, reason, "a base backup cannot be used: its manifest");
}

/// Reads the manifest of the base with this prefix.
///
/// # Errors
/// [`BackupError::NotFound`] where there is none, [`BackupError::Manifest`] where it cannot be used.
pub async fn manifest(store: &Store, base: &str) -> Result<Manifest, BackupError> {
    let object = format!("{base}{}", manifest::NAME);
    let json = match store.get(&object).await {
        Err(StoreError::NotFound { .. }) => {
            return Err(BackupError::NotFound {
                base: base.to_owned(),
            });
        }
        other => other?,
    };
    let manifest =
        Manifest::from_json(&json).and_then(|manifest| match manifest.belongs_to(base) {
            true => Ok(manifest),
            false => Err(format!(
                "it is of stream {} and history {}: it was copied there",
                manifest.stream,
                manifest.history()
            )),
        });
    manifest.map_err(|reason| BackupError::Manifest { object, reason })
}

/// Reads everything of a base back and compares it with the manifest, which is returned.
///
/// # Errors
/// [`BackupError::Damaged`] with every object that is missing, too many, or not what it was.
pub async fn verify(store: &Store, base: &str) -> Result<Manifest, BackupError> {
    let manifest = manifest(store, base).await?;
    let listed = store.list(base, None).await?;
    let mut flaws = flaws(base, &manifest, &listed);
    let rest = manifest
        .objects
        .iter()
        .filter(|object| !flaws.iter().any(|flaw| flaw.object == object.name));
    let checks: Vec<_> = rest.map(|object| check(store, base, object)).collect();
    let mut found: Vec<Flaw> = stream::iter(checks)
        .buffer_unordered(READERS)
        .try_filter_map(|flaw| std::future::ready(Ok(flaw)))
        .try_collect()
        .await?;
    flaws.append(&mut found);
    if flaws.is_empty() {
        return Ok(manifest);
    }
    flaws.sort_by(|one, other| one.object.cmp(&other.object));
    Err(BackupError::Damaged {
        base: base.to_owned(),
        flaws,
    })
}

/// What a listing tells: missing objects, surplus ones, and wrong sizes.
pub(super) fn flaws(base: &str, manifest: &Manifest, listed: &[Listed]) -> Vec<Flaw> {
    let mut sizes: BTreeMap<&str, u64> = listed
        .iter()
        .map(|object| {
            let name = object.name.strip_prefix(base).unwrap_or(&object.name);
            (name, object.bytes)
        })
        .collect();
    sizes.remove(manifest::NAME);
    let mut flaws = Vec::new();
    let mut flaw = |object: &str, reason: String| {
        flaws.push(Flaw {
            object: object.to_owned(),
            reason,
        });
    };
    for Object { name, sum, .. } in &manifest.objects {
        match sizes.remove(name.as_str()) {
            None => flaw(name, "is missing".to_owned()),
            Some(bytes) if bytes != sum.bytes => {
                flaw(name, format!("has {bytes} bytes instead of {}", sum.bytes));
            }
            Some(_) => {}
        }
    }
    for name in sizes.keys() {
        flaw(name, "is not in the manifest".to_owned());
    }
    flaws
}

async fn check(store: &Store, base: &str, object: &Object) -> Result<Option<Flaw>, BackupError> {
    let flaw = match summed(store, base, &object.name).await {
        Ok(sum) => sum.flaw(&object.sum),
        // Deleted since it was listed.
        Err(BackupError::Damaged { mut flaws, .. }) => return Ok(flaws.pop()),
        Err(BackupError::Store(error)) if error.is_of_one_object() => Some(unreadable(&error)),
        Err(error) => return Err(error),
    };
    Ok(flaw.map(|reason| Flaw {
        object: object.name.clone(),
        reason,
    }))
}

async fn summed(store: &Store, base: &str, object: &str) -> Result<Sum, BackupError> {
    let mut reader = object::read(store, base, object).await?;
    let mut summing = Summing::default();
    while let Some(piece) = reader.next().await? {
        summing.add(&piece);
    }
    Ok(summing.sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::base::manifest::tests::example;
    use crate::cloud::store::{Encryption, StoreUrl};
    use crate::time::system_time;

    fn listed(name: &str, bytes: u64) -> Listed {
        Listed {
            name: name.to_owned(),
            bytes,
            written_at: None,
        }
    }

    #[test]
    fn a_listing_shows_what_is_missing_too_many_or_cut_off() {
        let manifest = example();
        let whole = [
            listed("b/data/00001.copy.zst", 3),
            listed("b/manifest.json", 9),
        ];
        assert_eq!(flaws("b/", &manifest, &whole), []);
        let told = |listing: &[Listed]| -> Vec<String> {
            let flaws = flaws("b/", &manifest, listing);
            flaws.iter().map(ToString::to_string).collect()
        };
        assert_eq!(told(&whole[1..]), ["data/00001.copy.zst: is missing"]);
        assert_eq!(
            told(&[listed("b/data/00001.copy.zst", 2), listed("b/x", 1)]),
            [
                "data/00001.copy.zst: has 2 bytes instead of 3",
                "x: is not in the manifest"
            ]
        );
    }

    #[tokio::test]
    async fn the_newest_base_is_read_once_and_one_that_cannot_be_used_is_passed_over() {
        let home = tempfile::tempdir().unwrap();
        let url = StoreUrl::Directory(home.path().to_owned());
        let store = Store::open(&url, &Encryption::Default).await.unwrap();
        let stream = StreamName::new("dr_agent", "app");
        let of = |began: i64| {
            let history = History {
                system_identifier: 7312,
                began,
            };
            Layout::new(&stream, history).bases()
        };
        let prefix = |began: i64, lsn: u64| base(&of(began), PgLsn::from(lsn));
        let manifest_of = |began, lsn| home.path().join(prefix(began, lsn)).join(manifest::NAME);
        let put = async |began: i64, lsn: u64, body: String| {
            let name = format!("{}{}", prefix(began, lsn), manifest::NAME);
            assert_eq!(
                store.put_new(&name, body.into()).await.unwrap(),
                crate::cloud::store::Put::Created
            );
        };
        let mut newest = Newest::default();
        let mut found = async || {
            let found = newest.find(&store, &stream).await.unwrap();
            found.map(|(base, _)| base.to_owned())
        };
        let whole = |began: i64| {
            let mut manifest = example();
            manifest.began = system_time(began).try_into().unwrap();
            manifest.to_json().unwrap()
        };
        assert_eq!(found().await, None);
        put(1, 10, whole(1)).await;
        put(1, 20, whole(1)).await;
        assert_eq!(found().await, Some(prefix(1, 20)));
        // It is not read again, nor is an older one at all; one without a manifest is nobody's.
        std::fs::write(manifest_of(1, 20), "damaged").unwrap();
        std::fs::write(manifest_of(1, 10), "damaged").unwrap();
        let name = format!("{}schema.dump", prefix(1, 30));
        let _ = store.put_new(&name, "x".into()).await.unwrap();
        assert_eq!(found().await, Some(prefix(1, 20)));
        put(1, 40, "damaged".to_owned()).await;
        assert_eq!(found().await, Some(prefix(1, 20)));
        put(1, 50, whole(1)).await;
        assert_eq!(found().await, Some(prefix(1, 50)));
        std::fs::remove_file(manifest_of(1, 50)).unwrap();
        assert_eq!(found().await, None);
        // One of another history leads nowhere, wherever somebody has copied it.
        put(1, 70, whole(2)).await;
        assert_eq!(found().await, None);
        // Of a history that began later.
        put(2, 5, whole(2)).await;
        put(1, 60, whole(1)).await;
        assert_eq!(found().await, Some(prefix(2, 5)));
    }

    #[test]
    fn only_names_of_ours_are_bases() {
        let lsn = PgLsn::from(0x16_B374_D848);
        let name = format!("{}manifest.json", base("s/1/base/", lsn));
        assert_eq!(name, "s/1/base/00000016B374D848/manifest.json");
        assert_eq!(lsn_of("s/1/base/", &name), Some(u64::from(lsn)));
        for other in [
            "s/1/base/x/y",
            "s/1/base/16B374D848/m",
            "s/1/base/00000016b374d848/m",
            "q",
        ] {
            assert_eq!(lsn_of("s/1/base/", other), None);
        }
    }
}
