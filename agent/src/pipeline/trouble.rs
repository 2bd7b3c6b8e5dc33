//! ● Which tables of a database are set aside, why, and when each is tried again.
//!
//! Pure: time is an argument. The pipeline keeps it across sessions, so that a table that fails again and again makes neither
//! sessions nor copies in a loop; what a person and a promotion see is on the replica (`dr_agent.set_aside`), and is read from
//! there when the process begins.
//!
//! ```text
//! refused by the stream ─▶ at once ─▶ copied, joined ─▶ refused again soon ─▶ in 30 s, 1 min, … 10 min, created anew
//!                                 └─▶ copy failed ────────────────────────▶ in 30 s, 1 min, … 10 min
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::error::SessionError;
use crate::error::{Class, Classify};
use crate::names::TableName;
use crate::setup::SetupError;

/// How soon what failed is tried again at first.
const AGAIN_MIN: Duration = Duration::from_secs(30);

/// What fails again and again is tried this often; and what has been well for so long has failed for the first time.
pub(super) const AGAIN_MAX: Duration = Duration::from_secs(600);

/// What an error costs where it does not cost the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TableCost {
    pub(super) tables: Vec<TableName>,
    /// Rows alone would not do: the definitions on the replica are in the way.
    pub(super) of_definition: bool,
    /// A right is missing, perhaps of every table.
    pub(super) of_a_right: bool,
}

impl TableCost {
    /// The tables that an error costs; none where it is the database's.
    pub(super) fn of(error: &SessionError) -> Option<Self> {
        if error.class() != Class::Definite {
            return None;
        }
        let of_definitions = |tables: BTreeSet<TableName>| Self {
            tables: tables.into_iter().collect(),
            of_definition: true,
            of_a_right: false,
        };
        match error {
            SessionError::Sink(error) => error.costs().map(|cost| Self {
                tables: vec![cost.table],
                of_definition: cost.of_definition,
                of_a_right: cost.of_a_right,
            }),
            SessionError::Setup(SetupError::Computed(differences)) => {
                let tables = differences.iter().map(|one| one.table.clone());
                Some(of_definitions(tables.collect()))
            }
            SessionError::Setup(SetupError::ReplicaTableMissing(tables)) => {
                Some(of_definitions(tables.iter().cloned().collect()))
            }
            _ => None,
        }
    }
}

/// What is known of one table.
#[derive(Clone, Debug)]
struct Trouble {
    /// None once it has joined the stream again; then it is watched for a while.
    reason: Option<String>,
    attempts: u32,
    again_at: Instant,
    /// The copy has to create it anew.
    rebuild: bool,
    joined_at: Option<Instant>,
}

/// All of them, of one database.
#[derive(Debug, Default)]
pub(super) struct Troubles(BTreeMap<TableName, Trouble>);

fn pause(attempts: u32) -> Duration {
    match attempts {
        0 => Duration::ZERO,
        attempts => AGAIN_MIN
            .saturating_mul(1 << (attempts - 1).min(10))
            .min(AGAIN_MAX),
    }
}

impl Troubles {
    fn of(&mut self, table: &TableName, now: Instant) -> &mut Trouble {
        self.0.entry(table.clone()).or_insert(Trouble {
            reason: None,
            attempts: 0,
            again_at: now,
            rebuild: false,
            joined_at: None,
        })
    }

    /// The stream was refused by it. Returns how long it waits.
    pub(super) fn refused(
        &mut self,
        table: &TableName,
        reason: &str,
        of_definition: bool,
        now: Instant,
    ) -> Duration {
        let one = self.of(table, now);
        let was_well = |at: Instant| now.saturating_duration_since(at) > AGAIN_MAX;
        if one.joined_at.is_some_and(was_well) {
            one.attempts = 0;
            one.rebuild = false;
        }
        // Copying rows has not been enough.
        one.rebuild |= of_definition || one.attempts > 0;
        let pause = pause(one.attempts);
        one.reason = Some(reason.to_owned());
        one.again_at = now + pause;
        one.joined_at = None;
        pause
    }

    /// It could not be copied. Returns how long it waits.
    pub(super) fn failed(&mut self, table: &TableName, reason: &str, now: Instant) -> Duration {
        let one = self.of(table, now);
        one.attempts = one.attempts.saturating_add(1);
        let pause = pause(one.attempts);
        one.reason = Some(reason.to_owned());
        one.again_at = now + pause;
        pause
    }

    /// It has joined the stream.
    pub(super) fn joined(&mut self, table: &TableName, now: Instant) {
        if let Some(one) = self.0.get_mut(table) {
            one.attempts = one.attempts.saturating_add(1);
            one.reason = None;
            one.joined_at = Some(now);
        }
    }

    /// An earlier process has set it aside.
    pub(super) fn noted(&mut self, table: &TableName, reason: &str, now: Instant) {
        let one = self.of(table, now);
        if one.joined_at.is_none() {
            one.reason.get_or_insert(reason.to_owned());
        }
    }

    /// Forgets tables that are neither waited for nor watched.
    pub(super) fn retain(&mut self, is_waited_for: impl Fn(&TableName) -> bool) {
        self.0
            .retain(|table, one| one.joined_at.is_some() || is_waited_for(table));
    }

    /// A person wants it now.
    pub(super) fn now(&mut self, now: Instant) {
        self.0.values_mut().for_each(|one| one.again_at = now);
    }

    /// What is not known is due.
    pub(super) fn is_due(&self, table: &TableName, now: Instant) -> bool {
        self.0.get(table).is_none_or(|one| one.again_at <= now)
    }

    /// Whether it has failed before.
    pub(super) fn knows(&self, table: &TableName) -> bool {
        self.0.contains_key(table)
    }

    /// Why it is set aside.
    pub(super) fn reason(&self, table: &TableName) -> Option<&str> {
        self.0.get(table)?.reason.as_deref()
    }

    /// All that are set aside, and why.
    pub(super) fn reasons(&self) -> impl Iterator<Item = (&TableName, &String)> {
        let all = self.0.iter();
        all.filter_map(|(table, one)| Some((table, one.reason.as_ref()?)))
    }

    /// How often it was tried.
    pub(super) fn attempts(&self, table: &TableName) -> u32 {
        self.0.get(table).map_or(0, |one| one.attempts)
    }

    /// Whether the copy has to create it anew.
    pub(super) fn is_rebuilt(&self, table: &TableName) -> bool {
        self.0.get(table).is_some_and(|one| one.rebuild)
    }

    /// The copy has to create it anew; whether that is new.
    pub(super) fn rebuild(&mut self, table: &TableName, now: Instant) -> bool {
        !std::mem::replace(&mut self.of(table, now).rebuild, true)
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let waiting = self.0.values().filter(|one| one.joined_at.is_none());
        waiting.map(|one| one.again_at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::{PgError, ServerError};
    use crate::setup::Side;
    use crate::shape::computed::Difference;
    use crate::sink::replica::SinkError;

    const SECOND: Duration = Duration::from_secs(1);

    fn table(name: &str) -> TableName {
        TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn what_fails_again_and_again_waits_longer_and_what_was_well_for_long_begins_anew() {
        let start = super::super::now_instant();
        let mut troubles = Troubles::default();
        let t = table("t");
        assert!(troubles.is_due(&t, start));
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let pause = troubles.refused(&t, "why", false, now);
            pauses.push(pause.as_secs());
            assert!(pause.is_zero() || !troubles.is_due(&t, now + pause - SECOND));
            assert!(troubles.is_due(&t, now + pause));
            now += pause + SECOND;
            troubles.joined(&t, now);
            assert_eq!(troubles.reason(&t), None);
            now += SECOND;
        }
        assert_eq!(pauses, [0, 30, 60, 120, 240, 480, 600]);
        // Rows alone were not enough.
        assert!(troubles.is_rebuilt(&t));
        now += AGAIN_MAX;
        assert!(troubles.refused(&t, "why", false, now).is_zero());
        assert!(!troubles.is_rebuilt(&t));
    }

    #[test]
    fn copies_that_fail_wait_and_a_person_may_end_that() {
        let now = super::super::now_instant();
        let mut troubles = Troubles::default();
        let (t, other) = (table("t"), table("other"));
        let pauses: Vec<u64> = (0..7)
            .map(|_| troubles.failed(&t, "why", now).as_secs())
            .collect();
        assert_eq!(pauses, [30, 60, 120, 240, 480, 600, 600]);
        troubles.refused(&other, "definition", true, now);
        assert!(troubles.is_rebuilt(&other) && !troubles.is_rebuilt(&t));
        assert_eq!(troubles.next(), Some(now));
        assert!(!troubles.is_due(&t, now));
        troubles.now(now);
        assert!(troubles.is_due(&t, now));
        troubles.noted(&t, "an earlier process said so", now);
        assert_eq!(troubles.reason(&t), Some("why"));
        troubles.joined(&other, now);
        troubles.retain(|_| false);
        assert!(!troubles.knows(&t) && troubles.knows(&other));
    }

    #[test]
    fn what_a_start_finds_of_tables_costs_these_tables() {
        let difference = |name: &str| Difference {
            table: table(name),
            column: "c".to_owned(),
            source: None,
            replica: None,
        };
        let computed =
            SetupError::Computed(vec![difference("a"), difference("b"), difference("a")]);
        let missing = SetupError::ReplicaTableMissing(vec![table("a"), table("b")]);
        for error in [computed, missing] {
            let cost = TableCost::of(&error.into()).unwrap();
            assert_eq!(cost.tables, [table("a"), table("b")]);
            assert!(cost.of_definition);
        }
        let server = |sqlstate: &str| {
            PgError::Server(Box::new(ServerError {
                sqlstate: sqlstate.to_owned(),
                ..ServerError::default()
            }))
        };
        let others: [SessionError; 4] = [
            SetupError::Keyless(vec![table("a")]).into(),
            SetupError::Sql {
                side: Side::Replica,
                doing: "look".to_owned(),
                source: server("42501"),
            }
            .into(),
            SinkError::from(server("DR001")).into(),
            SessionError::TaskLost,
        ];
        for error in others {
            assert_eq!(TableCost::of(&error), None, "{error}");
        }
    }
}
