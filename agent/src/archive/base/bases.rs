//! What the archive has of one history of a stream: base backups and change log. No source is needed.
//!
//! Here [`prune`] and [`verify`] get what they need. Whoever takes base backups is in [`super::keep`].

use std::time::Duration;

use jiff::Timestamp;

use super::prune::{Pruned, ended, prune};
use super::repository::{self, FoundBases};
use super::retention::{self, RetentionSegment};
use super::{BackupError, verify};
use crate::archive::log::{self, ArchiveError, Layout, LogChain, Span};
use crate::cloud::store::{Listed, Store};
use crate::error::chain;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::time::timestamp;

/// The archive of one history.
#[derive(Clone, Debug)]
pub struct Bases {
    /// Where its objects are.
    pub store: Store,
    /// What they are called.
    pub layout: Layout,
}

/// What reading everything back has come to.
#[derive(Clone, Debug, Default)]
pub struct VerifiedArchive {
    /// Base backups read.
    pub bases: usize,
    /// Segments of the log read.
    pub segments: usize,
    /// How far the log leads, and when its last segment was written.
    pub end: Option<(PgLsn, Option<Timestamp>)>,
    /// What is wrong, in words.
    pub flaws: Vec<String>,
}

impl Bases {
    /// Every history that the archive has of a stream, in the order in which they began.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn all(store: &Store, stream: &StreamName) -> Result<Vec<Self>, BackupError> {
        let layouts = repository::histories(store, stream).await?;
        let each = layouts.into_iter().map(|layout| Self {
            store: store.clone(),
            layout,
        });
        Ok(each.collect())
    }

    /// The base backups.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn find(&self) -> Result<FoundBases, BackupError> {
        repository::find(&self.store, &self.layout.bases()).await
    }

    /// The segments of the change log that end behind a position.
    ///
    /// # Errors
    /// [`BackupError::Store`]
    pub async fn log(&self, behind: PgLsn) -> Result<Vec<(Span, Listed)>, BackupError> {
        let objects = self.store.list(&self.layout.log(), None).await?;
        let segments = objects
            .into_iter()
            .filter_map(|object| Some((self.layout.parse_segment(&object.name)?, object)));
        Ok(segments.filter(|(span, _)| span.end > behind).collect())
    }

    /// Deletes what the retention lets go of this history, or says what it would.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn prune(&self, retention: Duration, dry_run: bool) -> Result<Pruned, BackupError> {
        let log: Vec<RetentionSegment> = self
            .log(PgLsn::from(0))
            .await?
            .into_iter()
            .map(|(span, object)| RetentionSegment {
                name: object.name,
                start: span.start,
                end: span.end,
                bytes: object.bytes,
            })
            .collect();
        let bases = self.layout.bases();
        let now = agreed(&self.store).await?;
        prune(&self.store, &bases, &log, now, retention, dry_run).await
    }

    /// Deletes the histories that have ended longer ago than the retention, or says what it would.
    ///
    /// # Errors
    /// [`BackupError`]
    pub async fn prune_ended(
        all: &[Self],
        retention: Duration,
        dry_run: bool,
    ) -> Result<Pruned, BackupError> {
        match all.first() {
            None => Ok(Pruned::default()),
            Some(first) => ended(all, agreed(&first.store).await?, retention, dry_run).await,
        }
    }

    /// Reads everything back; what is wrong is said, and the rest is read all the same. Without a flaw every moment that is
    /// promised can be restored: from the oldest base backup to the end of the log. `is_last`: no other history began after this
    /// one. `settled`: what was written longer ago
    /// must have its log, which may still be on its way for what is younger.
    ///
    /// # Errors
    /// Where the store is away: that says nothing about what is in it.
    pub async fn verify(
        &self,
        settled: Duration,
        is_last: bool,
    ) -> Result<VerifiedArchive, BackupError> {
        let found = self.find().await?;
        let mut flaws: Vec<String> = found
            .unusable
            .iter()
            .map(|base| format!("base backup {} cannot be used: {}", base.base, base.reason))
            .collect();
        // An earlier history that ended before its first base backup promises nothing.
        if found.bases.is_empty() && (is_last || !found.objects.is_empty()) {
            flaws.push(
                "there is no base backup that can be used: nothing can be restored".to_owned(),
            );
        }
        for base in &found.bases {
            match verify(&self.store, &base.base).await {
                Ok(_) => {}
                Err(error @ (BackupError::Damaged { .. } | BackupError::Manifest { .. })) => {
                    flaws.push(chain(&error));
                }
                Err(error) => return Err(error),
            }
        }
        let log = self.log(PgLsn::from(0)).await?;
        let segments = log.len();
        let mut sound = Vec::new();
        for (span, object) in log {
            match log::verify(&self.store, &self.layout, span).await {
                Ok(()) => sound.push((span, object)),
                Err(ArchiveError::Store(error)) if !error.is_of_one_object() => {
                    return Err(error.into());
                }
                Err(error) => flaws.push(chain(&error)),
            }
        }
        // What cannot be read leads nowhere, whatever its name says.
        let spans: Vec<Span> = sound.iter().map(|(span, _)| *span).collect();
        flaws.extend(missing(&found, &spans, timestamp(), settled));
        let last = sound.iter().max_by_key(|(span, _)| span.end);
        Ok(VerifiedArchive {
            bases: found.bases.len(),
            segments,
            end: last.map(|(span, object)| {
                let written_at = object.written_at.and_then(|at| at.try_into().ok());
                (span.end, written_at)
            }),
            flaws,
        })
    }
}

/// What time it is, by this machine's clock and the store's.
///
/// # Errors
/// [`BackupError::Clocks`] where they contradict each other: nothing is deleted by a clock that may be wrong.
async fn agreed(store: &Store) -> Result<Timestamp, BackupError> {
    let (here, there) = (timestamp(), store.clock().await);
    let there = there.and_then(|there| there.try_into().ok());
    retention::agreed(here, there).map_err(|there| BackupError::Clocks { here, there })
}

/// From the oldest base on the log must lead to its end, and past every base that is not quite young.
fn missing(found: &FoundBases, spans: &[Span], now: Timestamp, settled: Duration) -> Vec<String> {
    let Some(oldest) = found.bases.first() else {
        return Vec::new();
    };
    let (gaps, end) = LogChain::gaps(oldest.lsn, spans);
    let mut missing: Vec<String> = gaps
        .iter()
        .map(|gap| {
            format!(
                "the change log from {} to {} is missing",
                gap.start, gap.end
            )
        })
        .collect();
    let is_settled =
        |at: Timestamp| Duration::try_from(now.duration_since(at)).is_ok_and(|age| age > settled);
    let beyond = found.bases.iter().rev();
    let mut beyond = beyond.filter(|base| base.lsn > end && is_settled(base.finished_at));
    if let Some(base) = beyond.next() {
        missing.push(format!(
            "the change log ends at {end}; what follows up to the base backup at {} is missing",
            base.lsn
        ));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::base::BaseSummary;
    use crate::flow::testing::lsn;

    fn base(at: u64, minutes_ago: i64) -> BaseSummary {
        let time = now() - jiff::SignedDuration::from_mins(minutes_ago);
        BaseSummary {
            base: format!("b/{at}/"),
            lsn: lsn(at),
            as_of: time,
            finished_at: time,
            begun_at: None,
            server_version: 150_018,
            tables: 1,
            rows: 1,
            raw_bytes: 1,
            bytes: 1,
        }
    }

    fn now() -> Timestamp {
        "2026-11-26T12:00:00Z".parse().unwrap()
    }

    fn span(start: u64, end: u64) -> Span {
        Span {
            start: lsn(start),
            end: lsn(end),
        }
    }

    #[test]
    fn every_gap_is_named_and_so_is_a_log_that_stopped() {
        let said = |bases: Vec<BaseSummary>, spans: &[Span]| {
            let found = FoundBases {
                bases,
                ..FoundBases::default()
            };
            missing(&found, spans, now(), Duration::from_secs(600))
        };
        let bases = || vec![base(100, 3000), base(200, 1500), base(300, 30)];
        assert_eq!(said(bases(), &[span(90, 250), span(250, 310)]), [""; 0]);
        assert_eq!(
            said(bases(), &[span(90, 150), span(160, 250), span(280, 310)]),
            [
                "the change log from 0/96 to 0/A0 is missing",
                "the change log from 0/FA to 0/118 is missing"
            ]
        );
        let stopped = said(bases(), &[span(90, 210)]);
        assert_eq!(stopped.len(), 1);
        assert!(stopped[0].contains("ends at 0/D2"), "{stopped:?}");
        assert!(stopped[0].contains("0/12C"), "{stopped:?}");
        // Its log may be in the spool.
        assert_eq!(
            said(vec![base(100, 3000), base(300, 5)], &[span(90, 210)]),
            [""; 0]
        );
        assert_eq!(said(vec![base(300, 5)], &[]), [""; 0]);
        assert_eq!(said(vec![], &[span(90, 210)]), [""; 0]);
    }
}
