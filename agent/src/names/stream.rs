//! ● The names one pipeline goes by: stream, slot, publication, application names.
//!
//! Pure. Everything that must be found again after a crash, on the source or on the replica, is
//! named here and nowhere else.

use std::fmt;

/// The identity of one pipeline: one database of one source server, replicated under one slot.
///
/// The same word names the replication slot, the publication and the row of `dr_agent.progress`.
/// A slot name may hold only lower-case letters, digits and underscores and at most 63 bytes
/// (PostgreSQL documentation, "Replication Slots"), so database names that do not fit are
/// shortened and given a checksum.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamName(String);

impl StreamName {
    const BYTES_MAX: usize = 63;

    /// Names the stream of `database` under the configured slot name.
    pub fn new(slot: &str, database: &str) -> Self {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let plain = format!("{slot}_{database}");
        if database.chars().all(fits) && plain.len() <= Self::BYTES_MAX {
            return Self(plain);
        }
        let safe: String = database
            .chars()
            .map(|c| if fits(c) { c } else { '_' })
            .collect();
        let checksum = crc32c::crc32c(database.as_bytes());
        let room = Self::BYTES_MAX.saturating_sub(slot.len() + 10);
        Self(format!(
            "{slot}_{}_{checksum:08x}",
            &safe[..safe.len().min(room)]
        ))
    }

    /// The stream of that name, if it is one under the configured slot name. Its database cannot be told from it.
    pub fn called(slot: &str, name: &str) -> Option<Self> {
        let rest = name.strip_prefix(slot)?.strip_prefix('_')?;
        (!rest.is_empty() && name.len() <= Self::BYTES_MAX).then(|| Self(name.to_owned()))
    }

    /// The slot's, publication's and progress row's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What catches up with the changes of tables that are copied beside the stream. No slot has such a name.
    #[must_use]
    pub fn late(&self) -> Self {
        Self(format!("{}/late", self.0))
    }

    /// `application_name` of a session with the given role ("apply", "copy", "monitor", "stream").
    ///
    /// `promote` finds the sessions of older terms by the prefix [`APPLICATION_PREFIX`] and this name.
    pub fn application_name(&self, role: &str) -> String {
        // PostgreSQL cuts application_name at 63 bytes; the role comes first so that it survives.
        let mut name = format!("{APPLICATION_PREFIX}{role}:{}", self.0);
        name.truncate(Self::BYTES_MAX);
        name
    }
}

/// What every `application_name` of ours begins with.
pub const APPLICATION_PREFIX: &str = "dr_agent:";

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_readable_and_others_stay_distinct() {
        assert_eq!(StreamName::new("dr_agent", "app").as_str(), "dr_agent_app");
        let a = StreamName::new("dr_agent", "Sales-2024");
        let b = StreamName::new("dr_agent", "sales_2024");
        assert_ne!(a, b);
        let long = StreamName::new("dr_agent", &"ä".repeat(31));
        assert!(long.as_str().len() <= 63);
        assert!(
            long.as_str()
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        );
    }
}
