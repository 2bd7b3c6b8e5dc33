//! Route `kinesis`, on the source's side: brings one database to where sending can start. The replica is not asked.
//!
//! ```text
//! observe the source ▶ refuse what a person must settle ▶ verdict
//!     Begin   publication ▶ note in dr_agent.sending that it begins ▶ slot ▶ note since where
//!     Resume  publication brought up to date ▶ from where the slot is confirmed
//! ```
//!
//! # Invariants
//! - A slot that was there and is gone is refused: its successor would leave a gap in the stream that only the
//!   other side could notice.
//! - One agent at a time sends a stream: it holds the right to it on the source (`lock`), because nothing else keeps a
//!   second one away while the first reads a backlog in windows.
//!
//! # What it does not do
//! It copies nothing: rows that are there before the slot reach the replica through [`super::receiving`].

use super::error::{SetupError, Side};
use super::identity::{self, History, Mismatch, Slot, Verdict};
use super::source_side::{self, SourceSide};
use super::{Prepared, lock, slot, source};
use crate::config::Config;
use crate::pg::PgLsn;
use crate::pg::replication::ReplicationConnection;
use crate::stream::StreamName;
use tokio_util::sync::CancellationToken;

const SCHEMA_SQL: &str = include_str!("../../sql/sending.sql");

/// A source that was never a replica sends at this term. A promotion raises its replica's.
const FIRST_TERM: i64 = 1;

/// What `dr_agent.sending` says of a stream.
#[derive(Clone, Debug)]
struct Noted {
    source: History,
    /// None while the slot is being created.
    since: Option<PgLsn>,
}

/// Brings `database` to where sending can start. Repeatable, whatever was killed before.
///
/// # Errors
/// [`SetupError`]
pub async fn prepare_sending(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Prepared, SetupError> {
    Box::pin(prepare(config, database, cancel)).await
}

async fn prepare(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Prepared, SetupError> {
    let mut source = SourceSide::open(config, database, cancel).await?;
    lock::take(&source.client, Side::Source, &source.stream).await?;
    let mut walsender = source.walsender().await?;
    let (history, source_lsn) = source_side::identify(&mut walsender).await?;
    let slot = source.slot().await?;
    let noted = noted(&source).await?;
    let verdict = verdict(
        &source.stream,
        database,
        slot.as_ref(),
        noted.as_ref(),
        &history,
    )
    .map_err(|source| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    })?;
    let start = match verdict {
        Verdict::Begin { drop_slot } => {
            let refused = source.wanted.refused();
            if !refused.is_empty() {
                return Err(SetupError::Keyless(refused));
            }
            source.found.require_listing(&source.stream)?;
            source.publish().await?;
            note(&source, &history, None).await?;
            if drop_slot {
                let name = source.stream.as_str();
                let doing = "drop the slot of an interrupted set-up";
                slot::drop(&mut walsender, name, doing).await?;
            }
            slot::create(&source, &mut walsender)
                .await?
                .consistent_point
        }
        Verdict::Resume => {
            source.found.require_unaltered(&source.stream)?;
            source.leave_out_what_cannot_be_published();
            bring_up_to_date(&mut source, &mut walsender).await?;
            slot.and_then(|slot| slot.confirmed)
                .expect("the verdict is Resume only where the slot was confirmed")
        }
    };
    note(&source, &history, Some(start)).await?;
    let term = term(&source).await?;
    sent_from(&mut source, history, source_lsn, start, term)
        .holding(source.client, Side::Source)
        .await
}

/// Publishes what is new, and makes decoding go by it: also what was published by a start that died before.
async fn bring_up_to_date(
    source: &mut SourceSide<'_>,
    walsender: &mut ReplicationConnection,
) -> Result<(), SetupError> {
    if !source.found.forgets_publication_changes() {
        return source.publish().await;
    }
    source::execute(&source.client, Side::Source, &[SCHEMA_SQL.to_owned()]).await?;
    let before = source.found.publication.clone();
    if !source
        .found
        .statements(&source.stream, &source.wanted)?
        .is_empty()
    {
        listing(source, true).await?;
    }
    source.publish().await?;
    if source.found.publication != before || is_listing(source).await? {
        slot::make_the_list_known(source, walsender).await?;
        listing(source, false).await?;
    }
    Ok(())
}

async fn is_listing(source: &SourceSide<'_>) -> Result<bool, SetupError> {
    let row = source
        .client
        .query_opt(
            "SELECT listing FROM dr_agent.sending WHERE stream = $1",
            &[&source.stream.as_str()],
        )
        .await
        .map_err(|error| SetupError::sql(Side::Source, "read dr_agent.sending")(error.into()))?;
    Ok(row.is_some_and(|row| row.get(0)))
}

async fn listing(source: &SourceSide<'_>, is_listing: bool) -> Result<(), SetupError> {
    source
        .client
        .execute(
            "UPDATE dr_agent.sending SET listing = $2 WHERE stream = $1",
            &[&source.stream.as_str(), &is_listing],
        )
        .await
        .map_err(|error| SetupError::sql(Side::Source, "write dr_agent.sending")(error.into()))?;
    Ok(())
}

/// Where a slot stands whose stream is only to be read, because the replica is away. Nothing is changed, and nobody is kept
/// away: whoever moves the slot meanwhile is noticed where it is read.
///
/// # Errors
/// [`SetupError`]
pub async fn prepare_logging(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Prepared, SetupError> {
    let mut source = Box::pin(SourceSide::open(config, database, cancel)).await?;
    source.found.require_unaltered(&source.stream)?;
    let mut walsender = source.walsender().await?;
    let (history, source_lsn) = source_side::identify(&mut walsender).await?;
    let slot = source.slot().await?;
    let mismatch = |source: Mismatch| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    };
    let verdict = verdict(&source.stream, database, slot.as_ref(), None, &history);
    let confirmed = match verdict.map_err(mismatch)? {
        Verdict::Resume => slot.and_then(|slot| slot.confirmed),
        Verdict::Begin { .. } => None,
    };
    let start = confirmed.ok_or_else(|| SetupError::NotSent {
        stream: source.stream.to_string(),
    })?;
    Ok(sent_from(
        &mut source,
        history,
        source_lsn,
        start,
        FIRST_TERM,
    ))
}

fn sent_from(
    source: &mut SourceSide<'_>,
    history: History,
    as_of: PgLsn,
    start: PgLsn,
    term: i64,
) -> Prepared {
    Prepared {
        term,
        batch: 0,
        end_lsn: start,
        commit_time: None,
        timeline: history.timeline,
        system_identifier: history.system_identifier,
        server_version: source.found.version,
        synced: Vec::new(),
        as_of,
        // Whoever reads it cannot ask for text once something came that does not travel.
        binary: false,
        unpublished: std::mem::take(&mut source.wanted.unpublished),
        warnings: std::mem::take(&mut source.warnings),
        stream: source.stream.clone(),
        right: None,
    }
}

/// Whether the slot can be gone on with.
fn verdict(
    stream: &StreamName,
    database: &str,
    slot: Option<&Slot>,
    noted: Option<&Noted>,
    source: &History,
) -> Result<Verdict, Mismatch> {
    let since = noted.and_then(|noted| noted.since);
    if let Some(noted) = noted.filter(|_| since.is_some()) {
        identity::same_history(&noted.source, source)?;
    }
    let Some(slot) = slot else {
        return match since {
            None => Ok(Verdict::Begin { drop_slot: false }),
            Some(since) => Err(Mismatch::SendingSlotLost {
                slot: stream.clone(),
                since,
            }),
        };
    };
    identity::is_ours(slot, stream, database)?;
    identity::is_free(slot, stream)?;
    let interrupted = noted.is_some() && since.is_none();
    match slot.confirmed {
        // Never built to the end.
        None => Ok(Verdict::Begin { drop_slot: true }),
        Some(_) if interrupted => Ok(Verdict::Begin { drop_slot: true }),
        Some(confirmed) if slot.lost => Err(Mismatch::SlotInvalidated {
            slot: stream.clone(),
            applied: confirmed,
        }),
        Some(_) => Ok(Verdict::Resume),
    }
}

async fn noted(source: &SourceSide<'_>) -> Result<Option<Noted>, SetupError> {
    let sql = |error: tokio_postgres::Error| {
        SetupError::sql(Side::Source, "read dr_agent.sending")(error.into())
    };
    let there: bool = source
        .client
        .query_one("SELECT to_regclass('dr_agent.sending') IS NOT NULL", &[])
        .await
        .map_err(sql)?
        .get(0);
    if !there {
        return Ok(None);
    }
    let row = source
        .client
        .query_opt(
            "SELECT system_identifier, timeline, since FROM dr_agent.sending WHERE stream = $1",
            &[&source.stream.as_str()],
        )
        .await
        .map_err(sql)?;
    Ok(row.map(|row| Noted {
        source: History {
            system_identifier: row.get(0),
            timeline: row.get(1),
        },
        since: row.get(2),
    }))
}

/// Whether this stream is sent from here: its slot was created to the end.
pub(super) async fn is_sent(source: &SourceSide<'_>) -> Result<bool, SetupError> {
    let confirmed = source.slot().await?.and_then(|slot| slot.confirmed);
    let since = noted(source).await?.and_then(|noted| noted.since);
    Ok(confirmed.is_some() && since.is_some())
}

/// Notes that this stream is sent from here, or is going to be; since where stays once it was said.
async fn note(
    source: &SourceSide<'_>,
    history: &History,
    since: Option<PgLsn>,
) -> Result<(), SetupError> {
    source::execute(&source.client, Side::Source, &[SCHEMA_SQL.to_owned()]).await?;
    source
        .client
        .execute(
            "INSERT INTO dr_agent.sending (stream, system_identifier, timeline, since) VALUES ($1, $2, $3, $4)
                 ON CONFLICT (stream) DO UPDATE
                SET system_identifier = EXCLUDED.system_identifier, timeline = EXCLUDED.timeline,
                    since = EXCLUDED.since
              WHERE sending.since IS NULL",
            &[
                &source.stream.as_str(),
                &history.system_identifier,
                &history.timeline,
                &since,
            ],
        )
        .await
        .map_err(|error| SetupError::sql(Side::Source, "write dr_agent.sending")(error.into()))?;
    Ok(())
}

/// The term of this database: a source that was a replica once goes on from where its promotions raised it.
async fn term(source: &SourceSide<'_>) -> Result<i64, SetupError> {
    let sql =
        |error: tokio_postgres::Error| SetupError::sql(Side::Source, "read the term")(error.into());
    let was_replica: bool = source
        .client
        .query_one("SELECT to_regclass('dr_agent.progress') IS NOT NULL", &[])
        .await
        .map_err(sql)?
        .get(0);
    if !was_replica {
        return Ok(FIRST_TERM);
    }
    let row = source
        .client
        .query_one("SELECT max(term) FROM dr_agent.progress", &[])
        .await
        .map_err(sql)?;
    Ok(row.get::<_, Option<i64>>(0).unwrap_or(FIRST_TERM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::lsn;

    fn history(timeline: i32) -> History {
        History {
            system_identifier: "7".to_owned(),
            timeline,
        }
    }

    fn slot(confirmed: Option<u64>) -> Slot {
        Slot {
            plugin: Some("pgoutput".to_owned()),
            database: Some("app".to_owned()),
            active_pid: None,
            confirmed: confirmed.map(lsn),
            lost: false,
        }
    }

    fn judge(slot: Option<&Slot>, noted: Option<i32>) -> Result<Verdict, Mismatch> {
        let noted = noted.map(|timeline| Noted {
            source: history(timeline),
            since: Some(lsn(100)),
        });
        judged(slot, noted.as_ref())
    }

    fn judged(slot: Option<&Slot>, noted: Option<&Noted>) -> Result<Verdict, Mismatch> {
        let stream = StreamName::new("dr_agent", "app");
        verdict(&stream, "app", slot, noted, &history(1))
    }

    #[test]
    fn a_slot_that_is_gone_is_not_created_anew() {
        assert_eq!(judge(None, None), Ok(Verdict::Begin { drop_slot: false }));
        assert!(matches!(
            judge(None, Some(1)),
            Err(Mismatch::SendingSlotLost { .. })
        ));
    }

    #[test]
    fn a_slot_whose_creation_was_interrupted_is_created_anew() {
        // Whoever the source was then.
        let noted = Noted {
            source: history(2),
            since: None,
        };
        let begin = |drop_slot| Ok(Verdict::Begin { drop_slot });
        assert_eq!(judged(None, Some(&noted)), begin(false));
        assert_eq!(judged(Some(&slot(None)), Some(&noted)), begin(true));
        assert_eq!(judged(Some(&slot(Some(200))), Some(&noted)), begin(true));
    }

    #[test]
    fn a_slot_of_route_direct_is_gone_on_with_and_half_a_slot_is_not() {
        assert_eq!(judge(Some(&slot(Some(200))), None), Ok(Verdict::Resume));
        assert_eq!(judge(Some(&slot(Some(200))), Some(1)), Ok(Verdict::Resume));
        assert_eq!(
            judge(Some(&slot(None)), None),
            Ok(Verdict::Begin { drop_slot: true })
        );
    }

    #[test]
    fn what_cannot_be_gone_on_with_is_refused() {
        let mut lost = slot(Some(200));
        lost.lost = true;
        assert!(matches!(
            judge(Some(&lost), Some(1)),
            Err(Mismatch::SlotInvalidated { .. })
        ));
        let mut active = slot(Some(200));
        active.active_pid = Some(7);
        assert!(matches!(
            judge(Some(&active), Some(1)),
            Err(Mismatch::SlotActive { .. })
        ));
        assert!(matches!(
            judge(Some(&slot(Some(200))), Some(2)),
            Err(Mismatch::Timeline { .. })
        ));
    }
}
