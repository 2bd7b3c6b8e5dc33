//! What the store has of a change log: another agent, with a spool of its own, may have brought it there.

use std::time::Duration;

use crate::archive::base::{BackupError, Bases};
use crate::archive::log::{self, ArchiveError, Layout, Span, Way};
use crate::cloud::store::Store;
use crate::config::Archive;
use crate::error::{Classify as _, chain};
use crate::pg::PgLsn;

/// How long the store may take to say what it has of the log.
const STORE_WITHIN: Duration = Duration::from_secs(10);

/// What the source may write between two questions, in bytes.
const WRITTEN_MEANWHILE: u64 = 1 << 30;

/// Segments that are read before they are believed; more at a time are another agent's work of hours.
const READ_FIRST: usize = 8;

/// What the store has of the log. Where it does not answer nobody knows, and it is taken for missing. The log goes on behind what
/// leads on from `from`: that is believed once it was read, and of a name that promises what the source has not written yet
/// nothing is.
pub(super) async fn in_store(
    archive: &Archive,
    database: &str,
    layout: Layout,
    from: PgLsn,
    wal_end: PgLsn,
) -> Vec<Span> {
    let written = u64::from(wal_end).saturating_add(WRITTEN_MEANWHILE);
    let asking = async {
        let (url, encryption) = (&archive.url, &archive.encryption);
        let store = Store::as_it_is(url, encryption).await?;
        let bases = Bases { store, layout };
        let log = bases.log(PgLsn::from(0)).await?;
        let spans = log.into_iter().map(|(span, _)| span);
        let spans = spans
            .filter(|span| u64::from(span.end) <= written)
            .collect();
        believed(&bases, from, spans).await
    };
    match tokio::time::timeout(STORE_WITHIN, asking).await {
        Ok(Ok(spans)) => spans,
        Ok(Err(error)) => {
            tracing::warn!(
                database, error = %chain(&error), hint = error.hint(),
                "the archive does not say what it has of the change log"
            );
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

/// Leaves out the segments that lead on from a position by their names alone.
async fn believed(bases: &Bases, from: PgLsn, spans: Vec<Span>) -> Result<Vec<Span>, BackupError> {
    let mut left = spans.clone();
    let mut way = Way::new(from, spans);
    for _ in 0..READ_FIRST {
        let Some(span) = way.pop() else { break };
        match log::verify(&bases.store, &bases.layout, span).await {
            Ok(()) => {}
            Err(ArchiveError::Store(error)) if !error.is_of_one_object() => {
                return Err(error.into());
            }
            Err(error) => {
                tracing::warn!(
                    segment = span.name(), error = %chain(&error),
                    "a segment in the archive does not hold what its name says"
                );
                left.retain(|other| *other != span);
                way.give_up(span, from);
            }
        }
    }
    Ok(left)
}
