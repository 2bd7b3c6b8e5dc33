//! Where the sequences of the source stand, and how fast they go.
//!
//! ```text
//! monitor, every source.sequences ─┐
//! promote, once it has fenced ─────┴▶ read(source), in pieces ▶ Notes ● ▶ dr_agent.sequence_state ─in-band─▶ replica ▶ setval
//! ```
//!
//! Beside the positions `sequence_state` holds notes of ours, under schema `dr_agent`, whose own sequences nobody asks for: when the
//! last look was ([`LOOKED_AT`]), and the calls per second of sequences that are in use ([`RATE_OF`]). A promotion sets a sequence
//! ahead by what it may have given out since.
//!
//! # Invariants
//! - Every sequence that may be read is in the answer, those that were never called included.
//! - The time of a look is read before the first position, and it is noted only if none had to be left out that may have moved:
//!   nothing given out later counts as known.
//! - Sequences that are dropped or locked meanwhile are left out until the next look; they stop nobody.
//! - No statement locks more than [`PIECE`] sequences.
//!
//! # What it does not do
//! Temporary sequences belong to a session, and one that this role may not read shows no position: a promotion names it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::Oid;

use crate::names::TableName;
use crate::pg::PgError;
use crate::schema::sequence_state::{self, LOOKED_AT, RATE_OF, State};

/// The schema that is ours.
const OURS: &str = "dr_agent";

/// Sequences that one statement reads.
const PIECE: usize = 200;

/// How long a sequence may be locked before it is left out, and how long it may take to find those that give trouble: the heartbeat
/// waits.
const LOCK_WITHIN: &str = "50ms";
const TROUBLE_WITHIN: Duration = Duration::from_secs(1);

/// By how much a rate must have risen, and fallen, to be noted anew: every note is replicated.
const RISEN: f64 = 1.1;
const FALLEN: f64 = 0.25;
/// A rate that fell is forgotten by this much with every look, so that yesterday's peak does not hold for ever.
const FORGET: f64 = 0.999;

/// Where one sequence stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SequenceSeen {
    name: TableName,
    increment: i64,
    value: i64,
    called: bool,
}

/// One look at all sequences of a database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Microseconds since 1970, before the first was read.
    at: i64,
    positions: Vec<SequenceSeen>,
    /// All there are, also those that could not be read.
    existing: BTreeSet<TableName>,
    /// None had to be left out that may have moved.
    complete: bool,
}

/// Reads all sequences of the database.
///
/// # Errors
/// [`PgError`]
pub(crate) async fn read(client: &Client) -> Result<Look, PgError> {
    const LIST: &str = "
        SELECT n.nspname::text, c.relname::text, c.oid
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'dr_agent'";
    let at = client
        .query_one(
            "SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1e6)::bigint",
            &[],
        )
        .await?
        .get(0);
    let rows = client.query(LIST, &[]).await?;
    let all: Vec<Oid> = rows.iter().map(|row| row.get(2)).collect();
    // Reading a position opens the sequence, which waits for whoever has it locked.
    let lock_timeout = format!("SET lock_timeout = '{LOCK_WITHIN}'");
    client.batch_execute(&lock_timeout).await?;
    let mut reading = SequenceReading {
        client,
        trouble_until: Instant::now() + TROUBLE_WITHIN,
        complete: true,
        positions: Vec::new(),
        uncalled: Vec::new(),
    };
    for oids in all.chunks(PIECE) {
        reading.called(oids).await?;
        let uncalled = std::mem::take(&mut reading.uncalled);
        reading.first(&uncalled).await?;
    }
    let (positions, complete) = (reading.positions, reading.complete);
    client.batch_execute("RESET lock_timeout").await?;
    let existing = rows.iter().map(TableName::of).collect();
    Ok(Look {
        at,
        positions,
        existing,
        complete,
    })
}

struct SequenceReading<'c> {
    client: &'c Client,
    /// Until then those that give trouble are told from the others.
    trouble_until: Instant,
    complete: bool,
    positions: Vec<SequenceSeen>,
    /// They have a first value, which only they themselves tell.
    uncalled: Vec<SequenceSeen>,
}

impl SequenceReading<'_> {
    /// Reads those that gave a value.
    fn called<'a>(&'a mut self, oids: &'a [Oid]) -> BoxFuture<'a, Result<(), PgError>> {
        const CALLED: &str = "
            SELECT n.nspname::text, c.relname::text, s.seqincrement, s.seqstart,
                   pg_catalog.pg_sequence_last_value(s.seqrelid),
                   pg_catalog.has_sequence_privilege(s.seqrelid, 'SELECT')
                   AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
              FROM pg_catalog.pg_sequence s
              JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid
              JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE s.seqrelid = ANY ($1) AND pg_catalog.has_sequence_privilege(s.seqrelid, 'USAGE, SELECT')";
        Box::pin(async move {
            let rows = match self.client.query(CALLED, &[&oids]).await {
                Ok(rows) => rows,
                Err(error) => {
                    for half in self.halves(oids, error.into())? {
                        self.called(half).await?;
                    }
                    return Ok(());
                }
            };
            for row in &rows {
                let value: Option<i64> = row.get(4);
                let position = SequenceSeen {
                    name: TableName::of(row),
                    increment: row.get(2),
                    value: value.unwrap_or_else(|| row.get(3)),
                    called: value.is_some(),
                };
                match value {
                    Some(_) => self.positions.push(position),
                    None if row.get(5) => self.uncalled.push(position),
                    None => {}
                }
            }
            Ok(())
        })
    }

    /// Reads what the others would give first.
    fn first<'a>(&'a mut self, uncalled: &'a [SequenceSeen]) -> BoxFuture<'a, Result<(), PgError>> {
        let each: Vec<String> = uncalled
            .iter()
            .enumerate()
            .map(|(at, one)| format!("SELECT {at}, last_value, is_called FROM {}", one.name.sql()))
            .collect();
        Box::pin(async move {
            if each.is_empty() {
                return Ok(());
            }
            let rows = match self.client.query(&each.join(" UNION ALL "), &[]).await {
                Ok(rows) => rows,
                Err(error) => {
                    for half in self.halves(uncalled, error.into())? {
                        self.first(half).await?;
                    }
                    return Ok(());
                }
            };
            let positions = rows.iter().filter_map(|row| {
                let at = usize::try_from(row.get::<_, i32>(0)).ok()?;
                Some(SequenceSeen {
                    value: row.get(1),
                    called: row.get(2),
                    ..uncalled.get(at)?.clone()
                })
            });
            self.positions.extend(positions);
            Ok(())
        })
    }

    /// One of them was dropped, locked, or taken away from us between the list and the look: they are read in halves, and one that
    /// cannot be read alone is left out.
    fn halves<'a, T>(&mut self, all: &'a [T], error: PgError) -> Result<Vec<&'a [T]>, PgError> {
        // undefined_table, invalid_schema_name, insufficient_privilege, wrong_object_type, lock_not_available.
        const GONE: [&str; 5] = ["42P01", "3F000", "42501", "42809", "55P03"];
        let is_gone = error.sqlstate().is_some_and(|code| GONE.contains(&code));
        if !is_gone && !error.is_of_something_dropped() {
            return Err(error);
        }
        let is_late = Instant::now() >= self.trouble_until;
        if all.len() == 1 || is_late {
            self.complete &= !is_late && error.sqlstate() != Some("55P03");
            return Ok(Vec::new());
        }
        let (one, other) = all.split_at(all.len() / 2);
        Ok(vec![one, other])
    }
}

/// What is written down in `sequence_state`, and what has to be.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    written: BTreeMap<TableName, State>,
    looked_at: Option<i64>,
    /// Of sequences that were in use, without the rounding of what is written.
    rates: BTreeMap<TableName, f64>,
}

impl Look {
    /// Keeps what is written where that is further: a source that was set back has given out what it no longer knows of.
    pub(crate) fn nowhere_behind(mut self, notes: &Notes) -> Self {
        for position in &mut self.positions {
            let Some((value, true)) = notes.written.get(&position.name).copied() else {
                continue;
            };
            let is_behind = match position.increment > 0 {
                true => position.value < value,
                false => position.value > value,
            };
            if is_behind {
                (position.value, position.called) = (value, true);
            }
        }
        self
    }
}

/// What differs from what is written.
#[derive(Debug, Default, PartialEq)]
struct Change {
    put: Vec<(TableName, State)>,
    removed: BTreeSet<TableName>,
}

impl Notes {
    /// Reads what is written.
    ///
    /// # Errors
    /// [`PgError`]
    pub(crate) async fn read(client: &Client) -> Result<Self, PgError> {
        let written = sequence_state::read(client).await?;
        Ok(Self {
            written,
            ..Self::default()
        })
    }

    /// Writes what has changed, and when that was seen.
    ///
    /// # Errors
    /// [`PgError`]; what is written is to be read again.
    pub(crate) async fn write(&mut self, client: &Client, look: &Look) -> Result<(), PgError> {
        let change = self.note(look);
        sequence_state::write(client, &change.put, &change.removed).await
    }

    /// The same where others are known that this look may not have seen.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(crate) async fn add(&mut self, client: &Client, look: &Look) -> Result<(), PgError> {
        let mut change = self.note(look);
        change.removed.clear();
        sequence_state::write(client, &change.put, &change.removed).await
    }

    /// What a look changes. Pure.
    fn note(&mut self, look: &Look) -> Change {
        let noted = self.written.get(&ours(LOOKED_AT)).map(|(at, _)| *at);
        let before = self.looked_at.or(noted);
        let mut change = Change::default();
        let mut seen = BTreeSet::new();
        for position in &look.positions {
            let now = (position.value, position.called);
            let was = self.written.get(&position.name).copied();
            let rate = was
                .zip(before)
                .and_then(|(was, before)| rate(position, was, look.at - before));
            self.note_rate(&position.name, rate.unwrap_or(0.0), &mut change);
            if was != Some(now) {
                self.put(position.name.clone(), now, &mut change);
            }
        }
        seen.insert(ours(LOOKED_AT));
        // What could not be read this time stays as it was, and so does its rate.
        for name in &look.existing {
            seen.insert(ours(&rate_of(name)));
            seen.insert(name.clone());
        }
        change.removed = self
            .written
            .keys()
            .filter(|name| !seen.contains(name))
            .cloned()
            .collect();
        self.written
            .retain(|name, _| !change.removed.contains(name));
        self.looked_at = Some(look.at);
        if look.complete {
            self.put(ours(LOOKED_AT), (look.at, true), &mut change);
        }
        change
    }

    /// The highest rate of a sequence, slowly forgotten.
    fn note_rate(&mut self, name: &TableName, now: f64, change: &mut Change) {
        let note = ours(&rate_of(name));
        #[expect(clippy::cast_precision_loss, reason = "a rate is far below 2^52")]
        let written = self.written.get(&note).map(|(rate, _)| *rate as f64);
        if written.is_none() && now < 1.0 {
            return;
        }
        let held = self.rates.get(name).copied().or(written).unwrap_or(0.0);
        let held = (held * FORGET).max(now);
        self.rates.insert(name.clone(), held);
        let written = written.unwrap_or(0.0);
        if held > written * RISEN || held < written * FALLEN {
            #[expect(clippy::cast_possible_truncation, reason = "a cast saturates")]
            let rounded = held.ceil() as i64;
            self.put(note, (rounded, true), change);
        }
    }

    fn put(&mut self, name: TableName, state: State, change: &mut Change) {
        self.written.insert(name.clone(), state);
        change.put.push((name, state));
    }
}

/// Calls per second since the look before; none where it went backwards, or where the clock did.
fn rate(position: &SequenceSeen, (was, called): State, micros: i64) -> Option<f64> {
    if micros <= 0 || position.increment == 0 {
        return None;
    }
    let mut calls = (i128::from(position.value) - i128::from(was)) / i128::from(position.increment);
    // The first call gives what was there before.
    calls += i128::from(position.called && !called);
    #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
    let per_second = calls as f64 * 1e6 / micros as f64;
    (calls > 0).then_some(per_second)
}

fn rate_of(name: &TableName) -> String {
    format!("{RATE_OF}{}.{}", name.schema, name.name)
}

fn ours(name: &str) -> TableName {
    TableName {
        schema: OURS.to_owned(),
        name: name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(name: &str, increment: i64, value: i64, called: bool) -> SequenceSeen {
        let schema = "public".to_owned();
        let name = name.to_owned();
        SequenceSeen {
            name: TableName { schema, name },
            increment,
            value,
            called,
        }
    }

    fn look(seconds: i64, positions: &[SequenceSeen]) -> Look {
        Look {
            at: seconds * 1_000_000,
            positions: positions.to_vec(),
            existing: positions.iter().map(|one| one.name.clone()).collect(),
            complete: true,
        }
    }

    fn put(change: &Change) -> Vec<(String, State)> {
        let named = change.put.iter();
        named
            .map(|(name, state)| (format!("{}.{}", name.schema, name.name), *state))
            .collect()
    }

    #[test]
    fn what_did_not_change_is_not_written_but_the_time_is() {
        let mut notes = Notes::default();
        let all = [position("a", 1, 1, false), position("b", 1, 7, true)];
        assert_eq!(notes.note(&look(1, &all)).put.len(), 3);
        let again = notes.note(&look(6, &all));
        assert_eq!(
            put(&again),
            [("dr_agent.looked at".to_owned(), (6_000_000, true))]
        );
        assert!(again.removed.is_empty());
    }

    #[test]
    fn a_dropped_sequence_goes_with_its_rate() {
        let mut notes = Notes::default();
        notes.note(&look(1, &[position("a", 1, 1, true)]));
        notes.note(&look(2, &[position("a", 1, 1001, true)]));
        let gone = notes.note(&look(3, &[])).removed;
        let names: Vec<_> = gone.iter().map(|name| name.name.as_str()).collect();
        assert_eq!(names, ["calls per second of public.a", "a"]);
        assert_eq!(notes.written.len(), 1);
    }

    #[test]
    fn what_could_not_be_read_stays_as_it_was() {
        let mut notes = Notes::default();
        let all = [position("a", 1, 1, true), position("b", 1, 7, true)];
        notes.note(&look(1, &all));
        let mut locked = look(6, &all);
        locked.positions.pop();
        locked.complete = false;
        assert_eq!(notes.note(&locked), Change::default());
        assert!(notes.written.contains_key(&all[1].name));
    }

    #[test]
    fn a_rate_is_noted_when_it_rises_and_forgotten_slowly() {
        let mut notes = Notes::default();
        let rate_of = |change: &Change| {
            let put = put(change).into_iter();
            put.filter(|(name, _)| name.contains("calls per second"))
                .map(|(_, (rate, _))| rate)
                .collect::<Vec<_>>()
        };
        let at = |seconds, value| look(seconds, &[position("a", 5, value, true)]);
        assert_eq!(rate_of(&notes.note(&at(10, 0))), [0; 0]);
        // 5,000 calls in five seconds, by steps of five.
        assert_eq!(rate_of(&notes.note(&at(15, 25_000))), [1000]);
        assert_eq!(rate_of(&notes.note(&at(20, 50_100))), [0; 0]);
        assert_eq!(rate_of(&notes.note(&at(25, 150_100))), [4000]);
        // It stands still, or is set back: that is no rate.
        assert_eq!(rate_of(&notes.note(&at(30, 5))), [0; 0]);
        let mut looks = 0;
        let mut seconds = 30;
        loop {
            looks += 1;
            seconds += 5;
            let noted = rate_of(&notes.note(&at(seconds, 5)));
            if let [noted] = noted[..] {
                assert!((990..=1000).contains(&noted), "{noted}");
                break;
            }
        }
        assert!(looks > 1000, "forgotten after {looks} looks");
    }

    #[test]
    fn a_source_that_was_set_back_takes_nothing_back() {
        let mut notes = Notes::default();
        notes.note(&look(
            1,
            &[position("up", 1, 90, true), position("down", -1, -90, true)],
        ));
        let asked = look(
            9,
            &[
                position("up", 1, 50, true),
                position("down", -1, -50, false),
            ],
        );
        let positions = asked.nowhere_behind(&notes).positions;
        assert_eq!(
            positions,
            [position("up", 1, 90, true), position("down", -1, -90, true)]
        );
        let later = look(9, &[position("up", 1, 91, true)]);
        assert_eq!(later.clone().nowhere_behind(&notes), later);
    }

    #[test]
    fn rates_of_every_direction_and_of_the_first_call() {
        let per = |position: &SequenceSeen, was, micros| rate(position, was, micros);
        assert_eq!(
            per(&position("a", -2, -20, true), (0, true), 1_000_000),
            Some(10.0)
        );
        assert_eq!(
            per(&position("a", 1, 1, true), (1, false), 1_000_000),
            Some(1.0)
        );
        assert_eq!(per(&position("a", 1, 1, true), (1, true), 1_000_000), None);
        assert_eq!(per(&position("a", 1, 9, true), (1, true), 0), None);
        assert_eq!(per(&position("a", 1, 9, true), (1, true), -5), None);
        let far = position("a", 1, i64::MAX, true);
        assert!(per(&far, (i64::MIN, true), 1).unwrap() > 1e18);
    }
}
