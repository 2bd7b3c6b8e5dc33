//! The change log as a source: segments in, transactions out, up to the moment.
//!
//! ```text
//! store ─▶ SegmentReader ─▶ Unpacker ─messages─▶ Replay ─▶ source::Intake ─transaction─▶ [queue_bytes] ─▶ apply
//! ```
//! Behind the moment it reads on a little: an operator looks for the first transaction of the users' that is left out, and
//! before that there may be heartbeats of ours.
//!
//! # Invariants
//! - Each transaction is handed over once, in commit order: segments overlap where an agent was restarted.
//! - Nothing of a transaction behind the moment is handed over, and the first such one proves that the log
//!   reaches the moment. Without that proof the end of the log is an error, unless everything was asked for.
//! - What is wrong with the log behind the moment is no error; before it, what is wrong with a segment is none where others hold
//!   its stretch.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use bytes::Bytes;

use super::RestoreError;
use super::moment::RestoreMoment;
use super::pick_base::falls_short;
use super::target::Tables;
use crate::archive::log::{Ahead, Layout, SegmentReader, Span, Way};
use crate::cloud::store::Store;
use crate::error::chain;
use crate::names::TableName;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{self, Begin, Message, MessageKind};
use crate::source::LogIntake;
use crate::time::Micros;

/// Segments that are read behind the moment at most: a quiet source writes nothing but heartbeats for days.
const SEGMENTS_BEHIND_MAX: usize = 32;

/// A transaction of the source, as an operator finds it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its id.
    pub xid: u32,
    /// Start of its commit record.
    pub commit_lsn: PgLsn,
    /// When it committed, by the source's clock.
    pub commit_time: Micros,
}

impl From<Begin> for Committed {
    fn from(begin: Begin) -> Self {
        Self {
            xid: begin.xid,
            commit_lsn: begin.final_lsn,
            commit_time: begin.commit_time,
        }
    }
}

/// What reading the log has told.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LogTold {
    /// The last transaction before the moment that changed a table.
    pub(super) last_change: Option<Committed>,
    /// The first behind it.
    pub(super) beyond: Option<Committed>,
    /// The first behind it that changed a table; none was found where there is none.
    pub(super) change_beyond: Option<Committed>,
}

/// A change log that is being read.
pub(super) struct Replay<'a> {
    /// Where it is.
    pub(super) store: &'a Store,
    /// Names there.
    pub(super) layout: &'a Layout,
    /// Where to begin.
    pub(super) from: PgLsn,
    /// Every segment there is, and its size.
    pub(super) segments: &'a BTreeMap<Span, u64>,
    /// How far.
    pub(super) moment: RestoreMoment,
    /// The tables whose changes count; all of the users' if there is no list.
    pub(super) tables: Option<&'a Tables>,
}

impl Replay<'_> {
    /// Hands over every transaction up to the moment.
    ///
    /// # Errors
    /// [`RestoreError`]; what was handed over before stays right.
    pub(super) async fn run(&self, intake: LogIntake) -> Result<LogTold, RestoreError> {
        let mut reading = LogReading {
            moment: self.moment,
            tables: self.tables,
            intake: Some(intake),
            counts: HashMap::new(),
            now: None,
            told: LogTold::default(),
        };
        let mut way = Way::new(self.from, self.segments.keys().copied().collect());
        let sizes = self.segments.iter().map(|(span, bytes)| (*span, *bytes));
        let mut ahead = Ahead::new(self.store, self.layout, sizes);
        let mut behind = 0;
        while let Some(span) = way.pop() {
            if reading.is_behind() {
                behind += 1;
                if behind > SEGMENTS_BEHIND_MAX {
                    break;
                }
            }
            let segment = ahead.open(span, &way).await.map_err(RestoreError::from);
            let read = match segment {
                Ok(segment) => read(segment, &mut reading).await,
                Err(error) => Err(error),
            };
            match read {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(reading.told),
                Err(error) if reading.is_behind() => {
                    tracing::debug!(error = %chain(&error), "the log behind the moment is not read");
                    break;
                }
                Err(error) => {
                    let here = reading.restart(self.from);
                    if !is_of_one_object(&error) || !way.give_up(span, here) {
                        return Err(error);
                    }
                    tracing::warn!(
                        segment = span.name(), error = %chain(&error), from = %here,
                        "a segment of the change log cannot be read; others hold what it promises, or a part of that"
                    );
                }
            }
        }
        if reading.is_behind() {
            return Ok(reading.told);
        }
        falls_short(way.chain(), self.moment).map_or(Ok(reading.told), Err)
    }
}

async fn read(
    mut segment: SegmentReader,
    reading: &mut LogReading<'_>,
) -> Result<ControlFlow<()>, RestoreError> {
    while let Some(messages) = segment.next_messages().await? {
        for message in messages {
            if reading.take(message).await?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn is_of_one_object(error: &RestoreError) -> bool {
    match error {
        RestoreError::Archive(error) => error.is_of_one_object(),
        RestoreError::Store(error) => error.is_of_one_object(),
        _ => false,
    }
}

/// The transaction that is being read.
struct Now {
    committed: Committed,
    /// It changed a table that counts.
    changes: bool,
}

struct LogReading<'a> {
    moment: RestoreMoment,
    tables: Option<&'a Tables>,
    /// None behind the moment.
    intake: Option<LogIntake>,
    /// Whether a relation's changes count.
    counts: HashMap<u32, bool>,
    now: Option<Now>,
    told: LogTold,
}

impl LogReading<'_> {
    fn is_behind(&self) -> bool {
        self.intake.is_none()
    }

    /// Forgets a transaction without an end; returns where to go on.
    fn restart(&mut self, from: PgLsn) -> PgLsn {
        self.now = None;
        match &mut self.intake {
            Some(intake) => {
                intake.restart();
                intake.end_lsn().max(from)
            }
            None => from,
        }
    }

    /// Takes one message. Breaks when nothing more is to be found, or nobody wants more: the apply has failed, and says why.
    async fn take(&mut self, message: Bytes) -> Result<ControlFlow<()>, RestoreError> {
        self.look(&message)?;
        if self.told.change_beyond.is_some() {
            return Ok(ControlFlow::Break(()));
        }
        let Some(intake) = &mut self.intake else {
            return Ok(ControlFlow::Continue(()));
        };
        Ok(match intake.take(message).await? {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        })
    }

    fn look(&mut self, message: &Bytes) -> Result<(), RestoreError> {
        match pgoutput::kind(message) {
            Some(MessageKind::Begin) => {
                let Message::Begin(begin) = pgoutput::decode(message, false)? else {
                    unreachable!("the first byte says what it is");
                };
                self.begin(begin);
            }
            Some(MessageKind::Relation) => {
                if let Message::Relation(relation) = pgoutput::decode(message, false)? {
                    let counts = self.counts(&relation.schema, &relation.name);
                    self.counts.insert(relation.id, counts);
                }
            }
            Some(MessageKind::Insert | MessageKind::Update | MessageKind::Delete) => {
                if let Some((_, relation)) = pgoutput::row_change(message, false) {
                    self.changed(&[relation]);
                }
            }
            Some(MessageKind::Truncate) => {
                if let Message::Truncate { relations, .. } = pgoutput::decode(message, false)? {
                    self.changed(&relations);
                }
            }
            Some(MessageKind::Commit) => self.commit(),
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, begin: Begin) {
        let committed = Committed::from(begin);
        // What is in the target is passed over, whatever its time: the source's clock may have been set back since.
        let is_new = |intake: &LogIntake| begin.final_lsn >= intake.end_lsn();
        if self.intake.as_ref().is_some_and(is_new) && !self.moment.includes(&begin) {
            self.told.beyond = Some(committed);
            // No more transactions come.
            self.intake = None;
        }
        self.now = Some(Now {
            committed,
            changes: false,
        });
    }

    fn counts(&self, schema: &str, name: &str) -> bool {
        let is = |table: &TableName| table.schema == schema && table.name == name;
        match self.tables {
            Some(tables) => tables.keys().any(is),
            None => schema != "dr_agent",
        }
    }

    fn changed(&mut self, relations: &[u32]) {
        let Some(now) = &mut self.now else {
            return;
        };
        let counts = |relation| self.counts.get(relation).copied().unwrap_or(false);
        now.changes = now.changes || relations.iter().any(counts);
        if now.changes && self.intake.is_none() {
            self.told.change_beyond = Some(now.committed);
        }
    }

    fn commit(&mut self) {
        let Some(Now { committed, changes }) = self.now.take() else {
            return;
        };
        // Segments overlap: one may come again.
        let last = self.told.last_change;
        let is_later = last.is_none_or(|last| last.commit_lsn < committed.commit_lsn);
        if changes && self.intake.is_some() && is_later {
            self.told.last_change = Some(committed);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::flow::spill::SpillSpace;
    use crate::flow::testing::{lsn, table};
    use crate::pg::pgoutput::{Value, encode};
    use crate::source::{IntakeLimits, Received};

    /// One transaction of one change to relation 1 (a user's) or 2 (ours).
    fn transaction(xid: u32, time: Micros, relation: u32) -> Vec<Bytes> {
        let at = lsn(u64::from(xid) * 100);
        vec![
            encode::begin(at, time, xid),
            encode::insert(relation, &[Value::Text(b"1")]),
            encode::commit(at, lsn(u64::from(xid) * 100 + 10), time),
        ]
    }

    fn described() -> Vec<Bytes> {
        let users = table(1, "t", &["a"]);
        let mut ours = table(2, "heartbeat", &["a"]);
        ours.schema = "dr_agent".to_owned();
        vec![encode::relation(&users), encode::relation(&ours)]
    }

    /// Which transactions are handed over, and what is told, of a target that is at `from`.
    async fn read(moment: RestoreMoment, from: u64, messages: Vec<Bytes>) -> (Vec<u32>, LogTold) {
        let directory = tempfile::tempdir().unwrap();
        let space = SpillSpace::open(directory.path().join("spill"), 1 << 20).unwrap();
        let limits = IntakeLimits {
            queue_bytes: 1 << 20,
            transaction_bytes: 1 << 20,
        };
        let (received, mut transactions) = mpsc::channel::<Received>(100);
        let mut reading = LogReading {
            moment,
            tables: None,
            intake: Some(LogIntake::new(limits, lsn(from), space, received)),
            counts: HashMap::new(),
            now: None,
            told: LogTold::default(),
        };
        for message in described().into_iter().chain(messages) {
            if reading.take(message).await.unwrap().is_break() {
                break;
            }
        }
        reading.intake = None;
        let mut taken = Vec::new();
        while let Some(received) = transactions.recv().await {
            taken.push(received.transaction.xid);
        }
        (taken, reading.told)
    }

    fn xid(committed: Option<Committed>) -> Option<u32> {
        committed.map(|committed| committed.xid)
    }

    #[tokio::test]
    async fn the_first_change_behind_the_moment_is_found_behind_heartbeats() {
        let messages = [
            transaction(1, 10, 1),
            transaction(2, 20, 2),
            transaction(3, 30, 2),
            transaction(4, 40, 2),
            transaction(5, 50, 1),
            transaction(6, 60, 1),
        ];
        let (taken, told) = read(RestoreMoment::Time(25), 0, messages.concat()).await;
        assert_eq!(taken, [1, 2]);
        assert_eq!(xid(told.last_change), Some(1));
        assert_eq!(xid(told.beyond), Some(3));
        assert_eq!(xid(told.change_beyond), Some(5));
    }

    #[tokio::test]
    async fn what_the_target_has_is_not_judged_by_a_clock_that_was_set_back() {
        let messages = [
            transaction(1, 90, 1),
            transaction(2, 20, 1),
            transaction(3, 95, 1),
        ];
        // Transaction 1 was applied by a run that asked for a later moment.
        let (taken, told) = read(RestoreMoment::Time(25), 150, messages.concat()).await;
        assert_eq!(taken, [2]);
        assert_eq!(xid(told.last_change), Some(2));
        assert_eq!(xid(told.beyond), Some(3));
        // One that comes again in another segment changes nothing.
        let twice = [
            transaction(1, 10, 1),
            transaction(2, 20, 1),
            transaction(1, 10, 1),
        ];
        let (taken, told) = read(RestoreMoment::End, 0, twice.concat()).await;
        assert_eq!(taken, [1, 2]);
        assert_eq!(xid(told.last_change), Some(2));
        assert_eq!(told.beyond, None);
    }
}
