//! ● Counts changes by kind, for `dr_agent_changes_total{kind}`. Pure.

/// The values of the `kind` label.
pub const KINDS: [&str; 4] = ["insert", "update", "delete", "truncate"];

/// Position of truncates in [`KINDS`].
pub const TRUNCATE: usize = 3;

/// How many changes of each kind, in the order of [`KINDS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChangeCounts(pub [u64; 4]);

impl ChangeCounts {
    /// Counts one change by its message of `pgoutput`; the kind is its first byte.
    pub fn count(&mut self, message: &[u8]) {
        let kind = match message.first() {
            Some(b'I') => 0,
            Some(b'U') => 1,
            Some(b'D') => 2,
            _ => TRUNCATE,
        };
        self.0[kind] += 1;
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}
