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

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};

use super::view::{ArchiveStatus, LogGap};
use crate::archive::base::{BackupError, Bases, FoundBases};
use crate::archive::log::{LogChain, Span, Spool};
use crate::cloud::store::Store;
use crate::config::{Archive, Config};
use crate::error::{Classify as _, chain};
use crate::pg::PgLsn;

/// For all databases together.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// Databases that are asked for at the same time.
const AT_A_TIME: usize = 8;

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
    let FoundBases {
        bases, unusable, ..
    } = history.find().await?;
    let segments = history.log(PgLsn::from(0)).await?;
    let spans: Vec<Span> = segments.iter().map(|(span, _)| *span).collect();
    let (oldest, newest) = (bases.first(), bases.last());
    let (gaps, end) = LogChain::gaps(oldest.map_or(PgLsn::from(0), |base| base.lsn), &spans);
    let last = segments.iter().max_by_key(|(span, _)| span.end);
    let written_at = last.and_then(|(_, object)| Timestamp::try_from(object.written_at?).ok());
    Ok(ArchiveStatus {
        bases: Some(bases.len()),
        unusable_bases: Some(unusable.len()),
        base_lsn: newest.map(|base| base.lsn.to_string()),
        base_as_of: newest.map(|base| base.as_of.to_string()),
        log_end_lsn: Some(end.to_string()),
        log_written_at: written_at.map(|at| at.to_string()),
        gaps: Some(gaps.into_iter().map(LogGap::new).collect()),
        ..ArchiveStatus::default()
    })
}

impl LogGap {
    fn new(span: Span) -> Self {
        Self {
            from_lsn: span.start.to_string(),
            to_lsn: span.end.to_string(),
        }
    }
}
