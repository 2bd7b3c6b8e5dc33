//! ● How a timeline came about: what PostgreSQL's history files say.
//!
//! # Invariants
//! - A line that is not understood makes the whole history unknown: nothing is concluded from half of it.

use crate::pg::PgLsn;

/// A timeline that another one began on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// The older timeline.
    pub timeline: i32,
    /// Where the newer one left it.
    pub ends: PgLsn,
}

/// Where the source's timeline left another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// Everything before is part of both.
    At(PgLsn),
    /// It is no ancestor, or the history cannot be had.
    Unknown,
}

impl Fork {
    /// Of a timeline among those the source's came from.
    pub fn of(branches: &[Branch], timeline: i32) -> Self {
        let found = branches.iter().find(|branch| branch.timeline == timeline);
        found.map_or(Self::Unknown, |branch| Self::At(branch.ends))
    }
}

/// Reads a history file: a line each of timeline, position and reason; empty where it is not understood.
pub fn parse(content: &str) -> Vec<Branch> {
    let lines = content.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let branch = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        Some(Branch {
            timeline: words.next()?.parse().ok()?,
            ends: words.next()?.parse().ok()?,
        })
    };
    lines.map(branch).collect::<Option<_>>().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_file_says_where_each_timeline_was_left() {
        let read = parse(
            "1\t0/3000148\tno recovery target specified\n\n# x\n2\t16/B374D848\tbefore 2026\n",
        );
        assert_eq!(read.len(), 2);
        assert_eq!(Fork::of(&read, 1), Fork::At("0/3000148".parse().unwrap()));
        assert_eq!(Fork::of(&read, 2), Fork::At("16/B374D848".parse().unwrap()));
        assert_eq!(Fork::of(&read, 3), Fork::Unknown);
        assert!(parse("1\t0/3000148\tx\nnonsense\n").is_empty());
    }
}
