//! ● What has become of a command, as it is recorded and counted.

use std::collections::BTreeSet;

use crate::names::TableName;
use crate::names::object::ObjectAddress;
use crate::schema::ddl_waiting::WaitingObject;

/// How a command took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was as recorded already.
    Nothing,
    /// By its own statement.
    Statement,
    /// From the shape.
    Shape,
    /// From the shape, and rows have to be copied again.
    Copy,
    /// It concerns tables that are newer only, or is older than what came before it.
    Skipped,
    /// An index is built beside the stream.
    Later,
    /// Objects wait.
    Waits,
}

impl Outcome {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Nothing,
        Self::Statement,
        Self::Shape,
        Self::Copy,
        Self::Skipped,
        Self::Later,
        Self::Waits,
    ];

    /// As it is recorded, and the label of the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Statement => "statement",
            Self::Shape => "shape",
            Self::Copy => "copy",
            Self::Skipped => "skipped",
            Self::Later => "later",
            Self::Waits => "waits",
        }
    }
}

/// How many commands had which outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandCounts([u64; Outcome::ALL.len()]);

impl CommandCounts {
    /// One more.
    pub fn count(&mut self, outcome: Outcome) {
        for (count, one) in self.0.iter_mut().zip(Outcome::ALL) {
            *count += u64::from(one == outcome);
        }
    }

    /// Each outcome with its number.
    pub fn each(&self) -> impl Iterator<Item = (Outcome, u64)> {
        Outcome::ALL.into_iter().zip(self.0)
    }
}

/// What has become of a command.
#[derive(Clone, Debug)]
pub struct Done {
    /// How.
    pub outcome: Outcome,
    /// Tables whose rows have to be copied again.
    pub copy_again: BTreeSet<TableName>,
    /// What is not as recorded.
    pub waiting: Vec<WaitingObject>,
    /// What is as recorded now, and may have waited.
    pub settled: Vec<ObjectAddress>,
}

impl Done {
    /// By a command behind which these tables' rows have to be copied again.
    pub(super) fn with_rows(outcome: Outcome, copy_again: BTreeSet<TableName>) -> Self {
        Self {
            outcome: match copy_again.is_empty() {
                true => outcome,
                false => Outcome::Copy,
            },
            copy_again,
            ..Self::of(outcome)
        }
    }

    pub(super) fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            copy_again: BTreeSet::new(),
            waiting: Vec::new(),
            settled: Vec::new(),
        }
    }
}
