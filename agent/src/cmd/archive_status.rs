//! What `dr-agent status` says of the archive: from when to when it can restore, and what it does not have yet.
//!
//! The store is asked, as `restore` would ask it on the bad day, and not the agent; the spool is looked at on local disk.
//!
//! # Invariants
//! - Reads only: nothing is made, deleted or tidied up.
//! - What was not learnt is `None`, with the error beside it; it is never taken for nothing.
//!
//! # What it does not do
//! It reads no rows and no segment: whether they are sound is `dr-agent backup --verify`'s business. It has no part in the
//! verdict on the RPO, which is the replica's.

use std::fmt::Write as _;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use crate::archive::base::{BackupError, Bases, Found};
use crate::archive::log::{Chain, Span, Spool};
use crate::cloud::store::Store;
use crate::config::{Archive, Config};
use crate::error::{Classify as _, chain};
use crate::pg::PgLsn;

/// For all databases together.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// Databases that are asked for at the same time.
const AT_A_TIME: usize = 8;

/// The archive of one database; `null` is "unknown".
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ArchiveStatus {
    /// Base backups; none can be restored from before the first.
    pub bases: Option<usize>,
    /// Base backups that nobody can restore from now: their manifests are damaged, or cannot be read.
    pub unusable_bases: Option<usize>,
    /// Position of the newest base backup.
    pub base_lsn: Option<String>,
    /// What it is as of, on the source's clock.
    pub base_as_of: Option<String>,
    /// Where the log in the store ends.
    pub log_end_lsn: Option<String>,
    /// When the store took that end, on its own clock.
    pub log_written_at: Option<String>,
    /// What is missing from the log behind the oldest base backup.
    pub gaps: Option<Vec<Gap>>,
    /// Bytes of the log that wait on this machine for the store; unknown where there is no spool.
    pub spool_bytes: Option<u64>,
    /// Why something is unknown.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

/// A stretch of the log that the store does not have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gap {
    /// Where the log breaks off.
    pub from_lsn: String,
    /// Where it goes on. Only a base backup from there on leads further.
    pub to_lsn: String,
}

/// Asks for these databases; answers in their order.
pub(super) async fn ask(
    config: &Config,
    archive: &Archive,
    databases: &[String],
) -> Vec<ArchiveStatus> {
    let deadline = Instant::now() + ANSWER_WITHIN;
    let store = Store::as_it_is(&archive.url, &archive.encryption).await;
    let store = store.map_err(|error| (chain(&error), error.hint()));
    let each = databases.iter().map(|database| {
        let store = &store;
        async move {
            let asked = match store {
                Err(error) => Err(error.clone()),
                Ok(store) => match timeout_at(deadline, look(config, store, database)).await {
                    Ok(asked) => asked.map_err(|error| (chain(&error), error.hint())),
                    Err(_) => Err((format!("no answer within {ANSWER_WITHIN:?}"), None)),
                },
            };
            let stream = config.stream(database);
            let spool = archive.spool_directory.join(stream.as_str());
            let mut status = asked.unwrap_or_else(|(error, hint)| ArchiveStatus {
                error: Some(error),
                hint,
                ..ArchiveStatus::default()
            });
            status.spool_bytes = Spool::waiting(&spool);
            status
        }
    });
    stream::iter(each).buffered(AT_A_TIME).collect().await
}

async fn look(
    config: &Config,
    store: &Store,
    database: &str,
) -> Result<ArchiveStatus, BackupError> {
    let stream = config.stream(database);
    let Some(history) = Bases::all(store, &stream).await?.pop() else {
        // Nothing to begin from: that is known, and no error of the store.
        return Ok(ArchiveStatus {
            bases: Some(0),
            ..ArchiveStatus::default()
        });
    };
    let Found {
        bases, unusable, ..
    } = history.find().await?;
    let segments = history.log(PgLsn::from(0)).await?;
    let spans: Vec<Span> = segments.iter().map(|(span, _)| *span).collect();
    let (oldest, newest) = (bases.first(), bases.last());
    let (gaps, end) = Chain::gaps(oldest.map_or(PgLsn::from(0), |base| base.lsn), &spans);
    let last = segments.iter().max_by_key(|(span, _)| span.end);
    let written_at = last.and_then(|(_, object)| Timestamp::try_from(object.written_at?).ok());
    Ok(ArchiveStatus {
        bases: Some(bases.len()),
        unusable_bases: Some(unusable.len()),
        base_lsn: newest.map(|base| base.lsn.to_string()),
        base_as_of: newest.map(|base| base.as_of.to_string()),
        log_end_lsn: Some(end.to_string()),
        log_written_at: written_at.map(|at| at.to_string()),
        gaps: Some(gaps.into_iter().map(Gap::new).collect()),
        ..ArchiveStatus::default()
    })
}

impl Gap {
    fn new(span: Span) -> Self {
        Self {
            from_lsn: span.start.to_string(),
            to_lsn: span.end.to_string(),
        }
    }
}

impl ArchiveStatus {
    /// For people; `now` is this machine's clock.
    pub(super) fn write_text(&self, out: &mut String, now: Timestamp) {
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  archive: DOES NOT ANSWER: {error}");
        }
        if self.bases == Some(0) {
            let _ = writeln!(
                out,
                "  archive: NO BASE BACKUP: nothing can be restored yet"
            );
        }
        if let Some(unusable) = self.unusable_bases.filter(|unusable| *unusable > 0) {
            let _ = writeln!(
                out,
                "  archive: {unusable} base backups that CANNOT BE USED; `dr-agent backup --list` names them"
            );
        }
        if let (Some(lsn), Some(as_of)) = (&self.base_lsn, &self.base_as_of) {
            let _ = writeln!(out, "  archive: newest base backup as of {as_of} at {lsn}");
        }
        if let Some(end) = &self.log_end_lsn {
            let written = self.log_written_at.as_deref();
            let age = written
                .and_then(|at| at.parse::<Timestamp>().ok())
                .map_or(String::new(), |at| {
                    format!(", written {} s ago", now.duration_since(at).as_secs())
                });
            let _ = writeln!(out, "  archive: the log reaches {end}{age}");
        }
        for gap in self.gaps.iter().flatten() {
            let _ = writeln!(
                out,
                "  archive: GAP in the log from {} to {}: a restore across it needs a base backup taken behind it",
                gap.from_lsn, gap.to_lsn
            );
        }
        match self.spool_bytes {
            Some(bytes) => {
                let bytes = bytesize::ByteSize(bytes).display().iec();
                let _ = writeln!(out, "  archive: {bytes} wait in the spool for the store");
            }
            None => {
                let _ = writeln!(out, "  archive: there is no spool on this machine");
            }
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "  hint: {hint}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_said_and_not_taken_for_nothing() {
        let now = "2026-01-01T00:01:00Z".parse().unwrap();
        let text = |status: &ArchiveStatus| {
            let mut text = String::new();
            status.write_text(&mut text, now);
            text
        };
        let away = ArchiveStatus {
            error: Some("S3 is away".to_owned()),
            ..ArchiveStatus::default()
        };
        let said = text(&away);
        assert!(
            said.contains("DOES NOT ANSWER: S3 is away") && said.contains("no spool"),
            "{said}"
        );
        assert!(
            !said.contains("reaches") && !said.contains("NO BASE"),
            "{said}"
        );
        let there = ArchiveStatus {
            bases: Some(1),
            base_lsn: Some("0/10".to_owned()),
            base_as_of: Some("2026-01-01T00:00:00Z".to_owned()),
            log_end_lsn: Some("0/20".to_owned()),
            log_written_at: Some("2026-01-01T00:00:45Z".to_owned()),
            gaps: Some(vec![Gap {
                from_lsn: "0/12".to_owned(),
                to_lsn: "0/14".to_owned(),
            }]),
            spool_bytes: Some(2048),
            ..ArchiveStatus::default()
        };
        let said = text(&there);
        for part in [
            "as of 2026-01-01T00:00:00Z at 0/10",
            "reaches 0/20, written 15 s ago",
            "GAP in the log from 0/12 to 0/14",
            "2.0 KiB wait",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}
