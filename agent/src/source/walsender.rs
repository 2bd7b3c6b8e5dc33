//! Reading from a walsender: what is used while the replica keeps up, and for large transactions always.
//!
//! Large transactions are asked for while they are still running (`streaming`), so that the source need
//! not write them to its disk a second time, and most of one is here when it commits.
//!
//! While it is behind, it reads in bulk; caught up, it reads at once ([`super::pace`]).

use std::pin::Pin;

use tokio::sync::watch;
use tokio::time::Sleep;

use super::backlog::BacklogWatch;
use super::feedback::{Feedback, Listener, ticks};
use super::intake::{Intake, Meanwhile as _, TakenIn};
use super::pace::Pace;
use super::{Next, Reader, SlotUse, SourceError, SourceSettings, begins_at};
use crate::flow::ledger::FlushLsn;
use crate::pg::replication::{
    ReplicationConnection, ReplicationMessage, ReplicationReader, StatusSender,
};
use crate::pg::{self, PgLsn, Session, slot};

/// A look at a slot takes milliseconds; a source that needs longer is in trouble.
const STATEMENT_TIMEOUT: &str = "60s";

/// Streams from the end of what `intake` has, until an error or until another way is better.
pub(super) async fn read(
    settings: &SourceSettings,
    intake: &mut Intake,
    flush: watch::Receiver<FlushLsn>,
    backlog: &mut BacklogWatch,
) -> Result<Next, SourceError> {
    let (reader, status) = open(settings, intake.end_lsn()).await?;
    let mut walsender = Walsender {
        pace: Pace::new(reader.is_local()),
        reader,
        feedback: Feedback::new(flush, Listener::Walsender(status)),
    };
    let outcome = walsender.stream(intake, backlog).await;
    walsender.feedback.finish().await;
    outcome
}

async fn open(
    settings: &SourceSettings,
    start: PgLsn,
) -> Result<(ReplicationReader, StatusSender), SourceError> {
    let role = match settings.slot {
        SlotUse::Own => "stream",
        SlotUse::Copy => "log",
        SlotUse::Late => "late",
    };
    let session = Session::new(settings.stream.application_name(role));
    let mut connection = ReplicationConnection::connect(&settings.conninfo, &session).await?;
    let own = settings.stream.as_str();
    let slot = match settings.slot {
        SlotUse::Own => own.to_owned(),
        SlotUse::Copy | SlotUse::Late => connection.copy_slot(own).await?,
    };
    let publication = format!("\"{}\"", settings.stream);
    let mut options = vec![
        // Version 2 has streaming, and every source we support has version 2. What later ones add
        // (two-phase, parallel apply) has no use here.
        ("proto_version", "2"),
        ("streaming", "on"),
        ("publication_names", publication.as_str()),
    ];
    if settings.binary {
        options.push(("binary", "true"));
    }
    let streaming = connection.start_replication(&slot, start, &options).await?;
    // From here on the slot is ours, or it is our copy, and nobody else moves it.
    if settings.slot != SlotUse::Late {
        begins_at(settings, confirmed(settings, &slot, start).await?, start)?;
    }
    Ok(streaming)
}

/// Where the slot stands that is streamed from `start`.
async fn confirmed(
    settings: &SourceSettings,
    slot: &str,
    start: PgLsn,
) -> Result<PgLsn, SourceError> {
    let session = Session::new(settings.stream.application_name("position"))
        .set("statement_timeout", STATEMENT_TIMEOUT);
    let client = pg::connect(&settings.conninfo, &session).await?;
    let state = slot::slot_state(&client, slot).await?;
    let confirmed = state.and_then(|state| state.confirmed_flush_lsn);
    // It is there: a server that does not have it is another one.
    confirmed.ok_or_else(|| SourceError::Behind {
        end_lsn: start.to_string(),
    })
}

struct Walsender {
    reader: ReplicationReader,
    pace: Pace,
    feedback: Feedback,
}

async fn over(pause: &mut Option<Pin<Box<Sleep>>>) {
    if let Some(sleep) = pause {
        sleep.as_mut().await;
    }
}

impl Walsender {
    async fn stream(
        &mut self,
        intake: &mut Intake,
        backlog: &mut BacklogWatch,
    ) -> Result<Next, SourceError> {
        let mut due = ticks();
        let mut pause: Option<Pin<Box<Sleep>>> = None;
        loop {
            tokio::select! {
                biased;
                // 1. Acknowledge what has become durable; the source may forget its WAL. All four
                //    futures may be dropped at any point: nothing is lost.
                more = self.feedback.due() => {
                    self.feedback.send().await?;
                    if !more {
                        return Ok(Next::End);
                    }
                }
                // 2. Sign of life.
                _ = due.tick() => {
                    self.feedback.send().await?;
                    let asking = backlog.is_far(self.pace.late(), intake.end_lsn());
                    if !intake.is_spilling() && self.feedback.during(asking).await? {
                        return Ok(Next::CatchUp);
                    }
                }
                // 3. Letting data gather.
                () = over(&mut pause), if pause.is_some() => pause = None,
                // 4. Work.
                message = self.reader.next(), if pause.is_none() => {
                    let Some(message) = message? else { return Err(SourceError::Ended) };
                    if !self.take(message, intake).await? || !self.take_buffered(intake).await? {
                        return Ok(Next::End);
                    }
                    pause = self.pace.pause(self.reader.drained()).map(|length| {
                        self.reader.rest();
                        Box::pin(tokio::time::sleep(length))
                    });
                    intake.here.reader = if pause.is_some() { Reader::Lazy } else { Reader::Eager };
                    intake.tell();
                }
            }
        }
    }

    /// Takes what has been read already without going back to the socket.
    async fn take_buffered(&mut self, intake: &mut Intake) -> Result<bool, SourceError> {
        while let Some(message) = self.reader.next_buffered()? {
            if !self.take(message, intake).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes one message; false if nobody wants transactions any more.
    async fn take(
        &mut self,
        message: ReplicationMessage,
        intake: &mut Intake,
    ) -> Result<bool, SourceError> {
        match message {
            ReplicationMessage::Keepalive {
                wal_end,
                reply_requested,
                ..
            } => {
                intake.at(wal_end);
                if reply_requested {
                    self.feedback.send().await?;
                }
                Ok(true)
            }
            ReplicationMessage::WalData {
                wal_end,
                sent_at,
                data,
                ..
            } => {
                intake.at(wal_end);
                self.pace.received(data.len() as u64);
                Ok(match intake.take(data, &mut self.feedback).await? {
                    TakenIn::Part => true,
                    TakenIn::Transaction(commit_time) => {
                        self.pace.committed(commit_time, sent_at);
                        true
                    }
                    TakenIn::Unwanted => false,
                })
            }
        }
    }
}
