//! Route `kinesis`, on the source's side: brings one database to where sending can start. The replica is not asked.
//!
//! ```text
//! observe the source ▶ refuse what a person must settle ▶ verdict
//!     Begin   publication ▶ slot, and a note of it in dr_agent.sending
//!     Resume  publication brought up to date ▶ from where the slot is confirmed
//! ```
//!
//! # Invariants
//! - A slot that was there and is gone is refused: its successor would leave a gap in the stream that only the
//!   other side could notice.
//! - A first start is judged before anything is written; what it has written and could not finish is taken back.
//! - One agent at a time sends a stream: it holds the right to it on the source (`lock`), because nothing else keeps a
//!   second one away while the first reads a backlog in windows.
//!
//! # What it does not do
//! It copies nothing: rows that are there before the slot reach the replica through [`super::receiving`].

use super::error::{SetupError, Side};
use super::identity::{self, SeenSlot, StartVerdict};
use super::mismatch::Mismatch;
use super::source_side::{self, SourceSide};
use super::{Ready, binary_form, lock, slot};
use crate::config::{Config, Route};
use crate::names::history::Cluster;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::pg::replication::ReplicationConnection;
use crate::schema::progress;
use crate::schema::sending::Note;
use crate::schema::stream::Recorded;
use tokio_util::sync::CancellationToken;

/// A source that was never a replica sends at this term. A promotion raises its replica's.
const FIRST_TERM: i64 = 1;

/// Brings `database` to where sending can start. Repeatable, whatever was killed before.
///
/// # Errors
/// [`SetupError`]
pub async fn prepare_sending(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Ready, SetupError> {
    Box::pin(prepare(config, database, cancel)).await
}

async fn prepare(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Ready, SetupError> {
    let mut source = SourceSide::open(config, database, cancel).await?;
    lock::take(&source.client, Side::Source, &source.stream).await?;
    let mut walsender = source.walsender().await?;
    let (cluster, source_lsn) = source_side::identify(&mut walsender).await?;
    let slot = source.slot().await?;
    let noted = source.note().await?;
    let verdict = verdict(
        &source.stream,
        database,
        slot.as_ref(),
        noted.as_ref(),
        &cluster,
    )
    .map_err(|source| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    })?;
    let (start, history) = match verdict {
        StartVerdict::Begin { drop_slot } => {
            source.judge().await?;
            let undo = source.undo().await?;
            let begun = begin(&mut source, &mut walsender, &cluster, drop_slot).await;
            if begun.is_err() {
                undo.take_back(&source.client, Side::Source).await;
            }
            begun?
        }
        StartVerdict::BeginAt { .. } => unreachable!("what is sent begins at its slot in any case"),
        StartVerdict::Resume | StartVerdict::Follow => {
            source.found.require_unaltered(&source.stream)?;
            source.leave_out_what_cannot_be_published();
            source.publish(false).await?;
            slot::make_the_list_known(&source, &mut walsender).await?;
            let confirmed = slot.and_then(|slot| slot.confirmed);
            let both = confirmed.zip(noted.map(|noted| noted.history()));
            both.expect("the verdict is Resume only where the slot was noted and confirmed")
        }
    };
    let term = term(&source).await?;
    sent_from(&mut source, &cluster, history, source_lsn, (start, term))
        .holding(source.client, Side::Source)
        .await
}

/// Looks and judges as a start does, and writes nothing.
pub(super) async fn rehearse(config: &Config, database: &str) -> Result<(), SetupError> {
    let cancel = CancellationToken::new();
    let source = SourceSide::open(config, database, &cancel).await?;
    let mut walsender = source.walsender().await?;
    let (cluster, _) = source_side::identify(&mut walsender).await?;
    let (slot, noted) = (source.slot().await?, source.note().await?);
    let verdict = verdict(
        &source.stream,
        database,
        slot.as_ref(),
        noted.as_ref(),
        &cluster,
    );
    match verdict.map_err(|source| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    })? {
        StartVerdict::Begin { .. } | StartVerdict::BeginAt { .. } => source.judge().await,
        StartVerdict::Resume | StartVerdict::Follow => {
            source.found.require_unaltered(&source.stream)
        }
    }
}

/// Publication, history and slot; returns where the slot begins.
async fn begin(
    source: &mut SourceSide<'_>,
    walsender: &mut ReplicationConnection,
    cluster: &Cluster,
    drop_slot: bool,
) -> Result<(PgLsn, History), SetupError> {
    source.publish(true).await?;
    let history = slot::begin(source, cluster).await?;
    let snapshot = slot::create(source, walsender, drop_slot).await?;
    Ok((snapshot.consistent_point, history))
}

/// Where the change log of a database can be read from.
#[derive(Clone, Copy, Debug)]
pub struct Logged {
    /// What the slot's LSNs are of.
    pub history: History,
    /// The source has nothing before it any more.
    pub confirmed: PgLsn,
    /// Where the source's WAL ends.
    pub wal_end: PgLsn,
    /// Somebody reads the slot.
    pub is_read: bool,
    /// The term at which the source sends.
    pub term: i64,
    /// Whether values travel in binary form, as they do in the pipeline.
    pub binary: bool,
}

/// Looks where the slot stands; nothing is changed, and the replica is not asked.
///
/// # Errors
/// [`SetupError::NotSent`] before the slot is there; [`SetupError`]
pub async fn logged(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Logged, SetupError> {
    let source = Box::pin(SourceSide::open(config, database, cancel)).await?;
    let noted = source.note().await?.filter(|noted| noted.since.is_some());
    let slot = source.slot().await?;
    let is_read = slot.as_ref().is_some_and(|slot| slot.active_pid.is_some());
    let lost_by = slot.as_ref().and_then(|slot| slot.reason.clone());
    let both = noted.zip(slot.and_then(|slot| Some((slot.lost, slot.confirmed?))));
    let (noted, (lost, confirmed)) = both.ok_or_else(|| SetupError::NotSent {
        stream: source.stream.to_string(),
    })?;
    source.found.require_unaltered(&source.stream)?;
    let mut walsender = source.walsender().await?;
    let (cluster, wal_end) = source_side::identify(&mut walsender).await?;
    let mismatch = |source: Mismatch| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    };
    identity::same_cluster(&noted.cluster, &cluster).map_err(mismatch)?;
    if lost {
        return Err(mismatch(Mismatch::SlotInvalidated {
            slot: source.stream.clone(),
            applied: confirmed,
            reason: lost_by,
        }));
    }
    let travels = binary_form::binary_travels(&source.client, &source.stream).await;
    let travels = travels.map_err(SetupError::sql(
        Side::Source,
        "look up the types of published columns",
    ))?;
    Ok(Logged {
        history: noted.history(),
        confirmed,
        wal_end,
        is_read,
        term: term(&source).await?,
        binary: travels && config.route == Route::Direct,
    })
}

fn sent_from(
    source: &mut SourceSide<'_>,
    cluster: &Cluster,
    history: History,
    as_of: PgLsn,
    (start, term): (PgLsn, i64),
) -> Ready {
    Ready {
        term,
        batch: 0,
        end_lsn: start,
        commit_time: None,
        applied_at: None,
        timeline: cluster.timeline,
        history,
        server_version: source.found.version,
        synced: Vec::new(),
        as_of,
        computed: None,
        // Whoever reads it cannot ask for text once something came that does not travel.
        binary: false,
        left_out: source.left_out,
        unpublished: std::mem::take(&mut source.wanted.unpublished),
        warnings: std::mem::take(&mut source.warnings),
        stream: source.stream.clone(),
        deferred: false,
        distance: None,
        right: None,
    }
}

/// Whether the slot can be gone on with.
pub(super) fn verdict(
    stream: &StreamName,
    database: &str,
    slot: Option<&SeenSlot>,
    noted: Option<&Note>,
    source: &Cluster,
) -> Result<StartVerdict, Mismatch> {
    let since = noted.and_then(|noted| noted.since);
    if let Some(noted) = noted.filter(|_| since.is_some()) {
        identity::same_cluster(&noted.cluster, source)?;
    }
    let Some(slot) = slot else {
        return match since {
            None => Ok(StartVerdict::Begin { drop_slot: false }),
            Some(since) => Err(Mismatch::SendingSlotLost {
                slot: stream.clone(),
                since,
            }),
        };
    };
    identity::is_ours(slot, stream, database)?;
    if noted.is_none() {
        return Err(Mismatch::SlotOccupied {
            slot: stream.clone(),
        });
    }
    identity::is_free(slot, stream)?;
    match slot.confirmed {
        // Never built to the end.
        _ if since.is_none() => Ok(StartVerdict::Begin { drop_slot: true }),
        None => Ok(StartVerdict::Begin { drop_slot: true }),
        Some(confirmed) if slot.lost => Err(Mismatch::SlotInvalidated {
            slot: stream.clone(),
            applied: confirmed,
            reason: slot.reason.clone(),
        }),
        Some(_) => Ok(StartVerdict::Resume),
    }
}

/// What is sent from here; nothing until the stream's slot was created to the end.
pub(super) async fn sent(source: &SourceSide<'_>) -> Result<Option<Recorded>, SetupError> {
    let confirmed = source.slot().await?.and_then(|slot| slot.confirmed);
    let noted = source.note().await?.filter(|noted| noted.since.is_some());
    let both = confirmed.and(noted);
    Ok(both.map(|noted| noted.recorded()))
}

/// The term of this database: a source that was a replica once goes on from where its promotions raised it.
async fn term(source: &SourceSide<'_>) -> Result<i64, SetupError> {
    let highest = progress::highest_term(&source.client).await;
    let highest = highest.map_err(SetupError::sql(Side::Source, "read the term"))?;
    Ok(highest.unwrap_or(FIRST_TERM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn cluster(timeline: i32) -> Cluster {
        Cluster {
            system_identifier: 7,
            timeline,
        }
    }

    fn note(timeline: i32, since: Option<u64>) -> Note {
        Note {
            cluster: cluster(timeline),
            began: 5,
            since: since.map(lsn),
            listing: false,
        }
    }

    fn slot(confirmed: Option<u64>) -> SeenSlot {
        SeenSlot {
            plugin: Some("pgoutput".to_owned()),
            database: Some("app".to_owned()),
            active_pid: None,
            confirmed: confirmed.map(lsn),
            lost: false,
            reason: None,
            synced: false,
        }
    }

    fn judge(slot: Option<&SeenSlot>, noted: Option<Note>) -> Result<StartVerdict, Mismatch> {
        let stream = StreamName::new("dr_agent", "app");
        verdict(&stream, "app", slot, noted.as_ref(), &cluster(1))
    }

    #[test]
    fn a_slot_that_is_gone_is_not_created_anew() {
        assert_eq!(
            judge(None, None),
            Ok(StartVerdict::Begin { drop_slot: false })
        );
        assert!(matches!(
            judge(None, Some(note(1, Some(100)))),
            Err(Mismatch::SendingSlotLost { .. })
        ));
    }

    #[test]
    fn a_slot_whose_creation_was_interrupted_is_created_anew() {
        // Whoever the source was then.
        let noted = Some(note(2, None));
        let begin = |drop_slot| Ok(StartVerdict::Begin { drop_slot });
        assert_eq!(judge(None, noted), begin(false));
        assert_eq!(judge(Some(&slot(None)), noted), begin(true));
        assert_eq!(judge(Some(&slot(Some(200))), noted), begin(true));
    }

    #[test]
    fn a_slot_is_gone_on_with_where_it_is_known() {
        let noted = Some(note(1, Some(100)));
        assert_eq!(
            judge(Some(&slot(Some(200))), noted),
            Ok(StartVerdict::Resume)
        );
        assert!(matches!(
            judge(Some(&slot(Some(200))), None),
            Err(Mismatch::SlotOccupied { .. })
        ));
    }

    #[test]
    fn what_cannot_be_gone_on_with_is_refused() {
        let noted = Some(note(1, Some(100)));
        let mut lost = slot(Some(200));
        lost.lost = true;
        assert!(matches!(
            judge(Some(&lost), noted),
            Err(Mismatch::SlotInvalidated { .. })
        ));
        let mut active = slot(Some(200));
        active.active_pid = Some(7);
        assert!(matches!(
            judge(Some(&active), noted),
            Err(Mismatch::SlotActive { .. })
        ));
        assert!(matches!(
            judge(Some(&slot(Some(200))), Some(note(2, Some(100)))),
            Err(Mismatch::Timeline { .. })
        ));
    }
}
