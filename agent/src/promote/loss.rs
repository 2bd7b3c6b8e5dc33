//! The loss: what was committed on the source and is not on the replica.
//!
//! Seconds come from the replica alone: between the commit time of the last applied transaction and
//! the raising of the term. The heartbeat commits every second, so on a healthy stream that is a
//! second or two more than was really lost. Bytes and transactions need the source's answer.
//!
//! # Invariants
//! - The source is asked, never needed: every question has a time limit, and a failure turns into a
//!   sentence of the report.
//! - The slot is only peeked at: nothing is consumed, so it can still be salvaged from.
//! - Transactions that the source has committed without flushing them count, too.
//! - A server that is not the source we followed is not believed.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{TryStreamExt as _, pin_mut};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::error::chain;
use crate::names::stream::StreamName;
use crate::pg::pgoutput::{self, DecodeError, Message};
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session};
use crate::watch::sequence_look::{self, Look};

/// How long the source may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// How long the fenced agent may take to let go of the slot.
const SLOT_FREE_WITHIN: Duration = Duration::from_secs(5);
/// How long everything together may take: the users are waiting.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long what was committed may take to be flushed, where it cannot be made to.
const FLUSHED_WITHIN: Duration = Duration::from_secs(2);
/// Counting stops after this many changes.
const CHANGES_MAX: i32 = 100_000;

const OTHER_SERVER: &str = "another server answers at source.url";
const STANDBY: &str = "the server at source.url is a standby now";

/// What the source said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceAnswer {
    /// It answered at all: it is alive, and nobody has fenced it.
    pub alive: bool,
    /// WAL beyond `end_lsn`.
    pub bytes: Option<u64>,
    /// Transactions beyond `end_lsn`.
    pub transactions: Option<u64>,
    /// There are at least `transactions`.
    pub at_least: bool,
    /// Why something is unknown.
    pub unknown: Option<String>,
}

/// Whom to ask, about what.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The source, with the database.
    pub conninfo: &'a ConnInfo,
    /// Slot and publication.
    pub stream: &'a StreamName,
    /// First byte after the last applied transaction.
    pub end_lsn: PgLsn,
    /// The system identifier of the source we followed, where it is known.
    pub system_identifier: Option<String>,
    /// Whether transactions are counted: needs the slot, which a running agent holds.
    pub count: bool,
}

/// Never negative, in milliseconds' precision. Clocks differ; a negative age says that the source's
/// clock is ahead, not that something was gained.
pub fn seconds_lost(age_seconds: f64) -> f64 {
    (age_seconds.max(0.0) * 1000.0).round() / 1000.0
}

/// How long ago a commit was, by the clocks there are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CommitAge {
    /// From the commit on the source's clock until now on the replica's; none before the first.
    pub since_commit: Option<f64>,
    /// Since it was applied, on the replica's clock alone.
    pub since_applied: f64,
    /// By which the replica's clock was ahead when both were last measured, if they ever were.
    pub replica_ahead: Option<f64>,
}

/// Clocks that differ by less, in seconds, are not worth a word.
const CLOCKS_AGREE_WITHIN: f64 = 1.0;

impl CommitAge {
    /// Seconds, at most: a clock that is behind makes nothing younger, and one that is ahead may have been set since. None
    /// where nothing can be said.
    pub fn seconds(&self) -> Option<f64> {
        let behind = (-self.replica_ahead.unwrap_or(0.0)).max(0.0);
        let age = (self.since_commit? + behind).max(self.since_applied);
        (age >= 0.0).then(|| seconds_lost(age))
    }

    /// What is to be said of the clocks.
    pub fn warning(&self) -> Option<String> {
        let ahead = self
            .replica_ahead
            .filter(|ahead| ahead.abs() > CLOCKS_AGREE_WITHIN);
        let shown = self.since_applied - self.since_commit?;
        match ahead {
            Some(ahead) if ahead > 0.0 => Some(format!(
                "the replica's clock was {ahead:.1} s ahead of the source's: of the seconds lost so many may not have been"
            )),
            Some(ahead) => Some(format!(
                "the replica's clock was {:.1} s behind the source's: the seconds lost are corrected by that",
                -ahead
            )),
            None if shown > CLOCKS_AGREE_WITHIN => Some(format!(
                "the last transaction was applied {shown:.1} s before it was committed: the replica's clock is at least that \
                 much behind the source's, so the seconds lost are counted from when it was applied"
            )),
            None => None,
        }
    }
}

/// Asks the source.
pub async fn ask(question: &Question<'_>) -> SourceAnswer {
    let mut answer = SourceAnswer::default();
    let asked = Box::pin(ask_all(question, &mut answer));
    let reason = match timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(())) => None,
        Ok(Err(reason)) => Some(reason),
        Err(_) => Some(format!(
            "the source did not answer within {ANSWER_WITHIN:?}"
        )),
    };
    if let Some(reason) = reason {
        tracing::warn!(stream = %question.stream, reason, "the loss is only partly known");
        answer.unknown = Some(reason);
    }
    answer
}

/// Asks the source where its sequences stand.
///
/// # Errors
/// Why that is not known, in words.
pub(super) async fn sequences(
    conninfo: &ConnInfo,
    stream: &StreamName,
    system_identifier: Option<String>,
) -> Result<Look, String> {
    let asking = async {
        let client = connect(conninfo, stream).await?;
        let (identifier, lsn) = identity(&client).await.map_err(|error| chain(&error))?;
        if system_identifier.is_some_and(|expected| expected != identifier) {
            return Err(OTHER_SERVER.to_owned());
        }
        lsn.ok_or(STANDBY)?;
        sequence_look::read(&client)
            .await
            .map_err(|error| chain(&error))
    };
    timeout(ANSWER_WITHIN, asking)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {ANSWER_WITHIN:?}")))
}

async fn connect(conninfo: &ConnInfo, stream: &StreamName) -> Result<Client, String> {
    let session = Session::new(stream.application_name("promote"))
        .set("default_transaction_read_only", "on")
        .set("statement_timeout", "10s");
    match timeout(CONNECT_WITHIN, pg::connect(conninfo, &session)).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(format!("source unreachable: {}", chain(&error))),
        Err(_) => Err(format!(
            "source unreachable: no connection within {CONNECT_WITHIN:?}"
        )),
    }
}

async fn ask_all(question: &Question<'_>, answer: &mut SourceAnswer) -> Result<(), String> {
    let client = connect(question.conninfo, question.stream).await?;
    answer.alive = true;
    let (identifier, lsn) = identity(&client).await.map_err(|error| chain(&error))?;
    if question
        .system_identifier
        .as_ref()
        .is_some_and(|expected| *expected != identifier)
    {
        answer.alive = false;
        return Err(OTHER_SERVER.to_owned());
    }
    let lsn = lsn.ok_or(STANDBY)?;
    answer.bytes = Some(u64::from(lsn).saturating_sub(question.end_lsn.into()));
    if question.count {
        let flushed = flush(&client).await.map_err(|error| chain(&error))?;
        let counted = count(&client, question).await?;
        answer.transactions = Some(counted.transactions);
        answer.at_least = !flushed || counted.changes >= CHANGES_MAX as u64;
    }
    Ok(())
}

async fn identity(client: &Client) -> Result<(String, Option<PgLsn>), PgError> {
    let row = client
        .query_one(
            "SELECT system_identifier::text,
                    CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn() END
               FROM pg_control_system()",
            &[],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

/// Has everything flushed that is committed by now: without synchronous_commit it is not, and a slot shows what is flushed only. An
/// empty message is committed for it, which nobody reads. Returns whether it is known to have worked.
async fn flush(client: &Client) -> Result<bool, PgError> {
    let committed: PgLsn = client
        .query_one("SELECT pg_current_wal_insert_lsn()", &[])
        .await?
        .get(0);
    let message =
        "SET synchronous_commit = local; SELECT pg_logical_emit_message(true, 'dr_agent', '')";
    if let Err(error) = client.batch_execute(message).await.map_err(PgError::from) {
        tracing::debug!(
            error = chain(&error),
            "the source's WAL writer is waited for"
        );
    }
    let deadline = Instant::now() + FLUSHED_WITHIN;
    loop {
        let flushed: PgLsn = client
            .query_one("SELECT pg_current_wal_flush_lsn()", &[])
            .await?
            .get(0);
        if flushed >= committed || Instant::now() >= deadline {
            return Ok(flushed >= committed);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for the slot, then counts what it still holds.
async fn count(client: &Client, question: &Question<'_>) -> Result<Counter, String> {
    let deadline = Instant::now() + SLOT_FREE_WITHIN;
    loop {
        let slot = client
            .query_opt(
                "SELECT active_pid, wal_status, confirmed_flush_lsn FROM pg_replication_slots
                  WHERE slot_name = $1",
                &[&question.stream.as_str()],
            )
            .await
            .map_err(|error| chain(&PgError::from(error)))?
            .ok_or("the source has no slot of this stream")?;
        if slot.get::<_, Option<&str>>(1) == Some("lost") {
            return Err("the source has removed WAL the slot needs".to_owned());
        }
        if slot
            .get::<_, Option<PgLsn>>(2)
            .is_some_and(|lsn| lsn > question.end_lsn)
        {
            return Err(
                "the slot begins after the last applied transaction: it was created anew, or the Kinesis stream holds more \
                 than was applied"
                    .to_owned(),
            );
        }
        let Some(pid) = slot.get::<_, Option<i32>>(0) else {
            break;
        };
        if Instant::now() >= deadline {
            return Err(format!(
                "an agent still holds the slot (pid {pid} on the source)"
            ));
        }
        sleep(Duration::from_millis(100)).await;
    }
    let name = question.stream.as_str();
    let parameters: [&(dyn ToSql + Sync); 3] = [&name, &CHANGES_MAX, &name];
    let rows = client
        .query_raw(
            "SELECT data FROM pg_logical_slot_peek_binary_changes(
                 $1, NULL, $2, 'proto_version', '1', 'publication_names', $3)",
            parameters,
        )
        .await
        .map_err(|error| chain(&PgError::from(error)))?;
    pin_mut!(rows);
    let mut counter = Counter::new(question.end_lsn);
    while let Some(row) = rows
        .try_next()
        .await
        .map_err(|error| chain(&PgError::from(error)))?
    {
        let data: &[u8] = row.get(0);
        counter
            .add(&Bytes::copy_from_slice(data))
            .map_err(|error| chain(&error))?;
    }
    Ok(counter)
}

/// Counts transactions that changed a table of the users and were not applied. Pure.
#[derive(Debug)]
struct Counter {
    end_lsn: PgLsn,
    /// Relation to whether it is the users' own, and not one of our in-band tables.
    relations: HashMap<u32, bool>,
    changed: bool,
    transactions: u64,
    changes: u64,
}

impl Counter {
    fn new(end_lsn: PgLsn) -> Self {
        Self {
            end_lsn,
            relations: HashMap::new(),
            changed: false,
            transactions: 0,
            changes: 0,
        }
    }

    fn add(&mut self, data: &Bytes) -> Result<(), DecodeError> {
        self.changes += 1;
        match pgoutput::decode(data, false)? {
            Message::Begin(_) => self.changed = false,
            Message::Relation(relation) => {
                self.relations
                    .insert(relation.id, relation.schema != "dr_agent");
            }
            Message::Insert { relation, .. }
            | Message::Update { relation, .. }
            | Message::Delete { relation, .. } => self.touch(relation),
            Message::Truncate { relations, .. } => {
                for relation in relations {
                    self.touch(relation);
                }
            }
            Message::Commit(commit) => {
                // Transactions the replica has and the slot was not told of yet come first.
                if self.changed && commit.end_lsn > self.end_lsn {
                    self.transactions += 1;
                }
                self.changed = false;
            }
            _ => {}
        }
        Ok(())
    }

    fn touch(&mut self, relation: u32) {
        // A relation that was never described cannot be ours: count it, rather too much than too little.
        self.changed |= self.relations.get(&relation).copied().unwrap_or(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> Bytes {
        let mut out = vec![b'B'];
        out.extend(0u64.to_be_bytes());
        out.extend(0i64.to_be_bytes());
        out.extend(7u32.to_be_bytes());
        out.into()
    }

    fn commit(end_lsn: u64) -> Bytes {
        let mut out = vec![b'C', 0];
        out.extend((end_lsn - 8).to_be_bytes());
        out.extend(end_lsn.to_be_bytes());
        out.extend(0i64.to_be_bytes());
        out.into()
    }

    fn relation(id: u32, schema: &str) -> Bytes {
        let mut out = vec![b'R'];
        out.extend(id.to_be_bytes());
        out.extend(schema.as_bytes());
        out.extend(b"\0t\0d");
        out.extend(1u16.to_be_bytes());
        out.push(1);
        out.extend(b"id\0");
        out.extend(23u32.to_be_bytes());
        out.extend((-1i32).to_be_bytes());
        out.into()
    }

    fn insert(id: u32) -> Bytes {
        let mut out = vec![b'I'];
        out.extend(id.to_be_bytes());
        out.extend(b"N\0\x01t\0\0\0\x011");
        out.into()
    }

    fn truncate(ids: &[u32]) -> Bytes {
        let mut out = vec![b'T'];
        out.extend(u32::try_from(ids.len()).unwrap().to_be_bytes());
        out.push(0);
        for id in ids {
            out.extend(id.to_be_bytes());
        }
        out.into()
    }

    fn counted(end_lsn: u64, messages: &[Bytes]) -> u64 {
        let mut counter = Counter::new(PgLsn::from(end_lsn));
        for message in messages {
            counter.add(message).unwrap();
        }
        counter.transactions
    }

    #[test]
    fn only_transactions_beyond_the_applied_end_are_lost() {
        let messages = [
            begin(),
            relation(1, "public"),
            insert(1),
            commit(100),
            begin(),
            insert(1),
            insert(1),
            commit(200),
            begin(),
            truncate(&[1]),
            commit(300),
        ];
        assert_eq!(counted(0, &messages), 3);
        assert_eq!(counted(100, &messages), 2);
        assert_eq!(counted(200, &messages), 1);
        assert_eq!(counted(300, &messages), 0);
    }

    #[test]
    fn heartbeats_are_no_loss_but_a_truncate_that_also_names_a_user_table_is() {
        let messages = [
            begin(),
            relation(1, "dr_agent"),
            insert(1),
            commit(100),
            begin(),
            relation(2, "public"),
            truncate(&[1, 2]),
            commit(200),
            begin(),
            insert(1),
            commit(300),
            begin(),
            commit(400),
        ];
        assert_eq!(counted(0, &messages), 1);
    }

    #[test]
    fn a_transaction_cut_off_before_its_commit_is_not_counted() {
        assert_eq!(counted(0, &[begin(), relation(1, "public"), insert(1)]), 0);
    }

    #[test]
    fn a_clock_that_is_behind_makes_no_loss_smaller() {
        for (since_commit, since_applied, replica_ahead, age_is, said) in [
            (Some(3.0), 2.9, None, Some(3.0), None),
            (Some(3.0), 2.9, Some(0.2), Some(3.0), None),
            // The replica is ten minutes behind, then ten minutes ahead.
            (
                Some(-597.0),
                2.9,
                None,
                Some(2.9),
                Some("at least that much behind"),
            ),
            (
                Some(-597.0),
                2.9,
                Some(-600.0),
                Some(3.0),
                Some("600.0 s behind"),
            ),
            (Some(603.0), 2.9, None, Some(603.0), None),
            (
                Some(603.0),
                2.9,
                Some(600.0),
                Some(603.0),
                Some("600.0 s ahead"),
            ),
            // It was applied late, and the replica is behind.
            (Some(100.0), 90.0, Some(-600.0), Some(700.0), Some("behind")),
            // It was set back since.
            (Some(-597.0), -597.1, None, None, None),
            (Some(-597.0), -597.1, Some(0.0), None, None),
            (None, 2.9, Some(-600.0), None, None),
        ] {
            let age = CommitAge {
                since_commit,
                since_applied,
                replica_ahead,
            };
            assert_eq!(age.seconds(), age_is, "{age:?}");
            let warning = age.warning();
            assert_eq!(warning.is_some(), said.is_some(), "{warning:?}");
            assert!(warning.is_none_or(|text| text.contains(said.unwrap())));
        }
    }

    #[test]
    fn seconds_are_never_negative_and_have_three_decimals() {
        assert_eq!(seconds_lost(-5.0).to_bits(), 0.0f64.to_bits());
        assert_eq!(seconds_lost(1.23456).to_bits(), 1.235f64.to_bits());
    }
}
