//! How old a segment of the change log may become before it goes to the store.
//!
//! A source that nobody writes to has heartbeats all the same, and every object is listed by every restore: what proves only that
//! nothing happened may wait longer than what did.
//!
//! # Invariants
//! - A change of the users' waits for its segment no longer than the age it is given, however idle the segment was before.

use std::time::Duration;

use tokio::time::Instant;

use crate::flow::batch::Batch;

/// How old a segment may become in which there is nothing but heartbeats: whoever looks whether the archive goes on waits five
/// minutes for it (README, "What to alert on").
const IDLE_MAX: Duration = Duration::from_secs(240);

/// How many times as old as one with the users' changes.
const IDLE_TIMES: u32 = 8;

/// How old a segment may become in which there is nothing of the users', where others may become `age_max`. What it holds is worth
/// nothing but the proof that nothing happened; a quiet day has thousands of heartbeats, and every object is listed by every restore.
pub fn idle_age(age_max: Duration) -> Duration {
    (age_max * IDLE_TIMES).min(IDLE_MAX).max(age_max)
}

/// When the segment that is being written is old enough; none while there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Due(Option<Instant>);

impl Due {
    /// When that is.
    pub(super) fn at(self) -> Option<Instant> {
        self.0
    }

    /// A batch has come. The first with a change of the users' decides, however long the segment has been idle.
    pub(super) fn took(&mut self, now: Instant, is_idle: bool, age_max: Duration) {
        let age = if is_idle { idle_age(age_max) } else { age_max };
        let due = now + age;
        self.0 = Some(self.0.map_or(due, |before| before.min(due)));
    }
}

/// Whether a batch has nothing but heartbeats.
pub(super) fn is_idle(batch: &Batch) -> bool {
    batch.transactions.iter().all(|transaction| {
        transaction.spilled.is_none()
            && transaction.changes.iter().all(|change| {
                let mut relations = change.relations().iter();
                relations.all(|it| it.schema() == "dr_agent" && it.relation.name == "heartbeat")
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::counts::ChangeCounts;
    use crate::flow::ledger::BatchNumber;
    use crate::flow::testing::{lsn, relation, table};
    use crate::flow::transaction::{Change, Relations, Transaction};

    fn batch(tables: &[(&str, &str)]) -> Batch {
        let changes = tables.iter().map(|(schema, name)| {
            let mut table = table(1, name, &["a"]);
            table.schema = (*schema).to_owned();
            Change {
                relations: Relations::Row(relation(table)),
                message: bytes::Bytes::new(),
            }
        });
        let transaction = Transaction {
            xid: 1,
            commit_lsn: lsn(1),
            end_lsn: lsn(2),
            commit_time: 0,
            spilled: None,
            changes: changes.collect(),
            counts: ChangeCounts::default(),
            bytes: 0,
            has_barrier: false,
        };
        Batch {
            number: BatchNumber(1),
            previous: lsn(1),
            transactions: vec![transaction],
        }
    }

    #[test]
    fn only_heartbeats_are_idle() {
        let heartbeat = ("dr_agent", "heartbeat");
        assert!(is_idle(&batch(&[heartbeat, heartbeat])));
        for other in [
            ("public", "heartbeat"),
            ("dr_agent", "listed"),
            ("dr_agent", "sequence_state"),
        ] {
            assert!(!is_idle(&batch(&[heartbeat, other])), "{other:?}");
        }
    }

    #[test]
    fn an_idle_segment_grows_older_until_the_users_write() {
        let seconds = Duration::from_secs;
        for (age_max, idle) in [(1, 8), (15, 120), (30, 240), (150, 240), (1800, 1800)] {
            assert_eq!(idle_age(seconds(age_max)), seconds(idle));
        }
        let start = Instant::now();
        let mut due = Due::default();
        due.took(start, true, seconds(15));
        due.took(start + seconds(1), true, seconds(15));
        assert_eq!(due.0, Some(start + seconds(120)));
        due.took(start + seconds(60), false, seconds(15));
        due.took(start + seconds(70), false, seconds(15));
        assert_eq!(due.0, Some(start + seconds(75)));
        let mut late = Due::default();
        late.took(start, true, seconds(15));
        late.took(start + seconds(110), false, seconds(15));
        assert_eq!(late.0, Some(start + seconds(120)));
    }
}
