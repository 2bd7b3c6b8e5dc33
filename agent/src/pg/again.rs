//! Questions to catalogs that other sessions change meanwhile.
//!
//! A query sees the catalogs as of its snapshot; the functions that it calls with an OID from them (`pg_get_indexdef`,
//! `pg_sequence_last_value`) look the object up as of now. One that was dropped in between fails the whole query with an internal
//! error. It says nothing about what is there, so the query is asked again.
//!
//! # What it does not do
//! It does not help where something is dropped all the time and the query takes long: then the last error comes out, which is
//! transient. What is asked for in bulk and often is asked one by one in the end (`monitor`).

use super::PgError;

/// How often it is asked: a second failure in a row is rare already.
const ATTEMPTS: u32 = 5;

/// Internal errors, which are never translated: `elog` in relation.c, ruleutils.c and their like.
const DROPPED: [&str; 4] = [
    "could not open relation with OID",
    "cache lookup failed for",
    "could not find tuple for",
    "no such relation",
];

impl PgError {
    /// Whether an object was dropped between the moment it was found in a catalog and the moment it was looked at.
    pub(crate) fn is_of_something_dropped(&self) -> bool {
        match self {
            Self::Server(error) => error.sqlstate == "XX000" && tells_of_a_drop(&error.message),
            _ => false,
        }
    }
}

/// Whether a message that may have come through a tool is such an error.
pub(crate) fn tells_of_a_drop(message: &str) -> bool {
    DROPPED.iter().any(|text| message.contains(text))
}

/// Whether to ask again: `match ask().await { Err(error) if again.after(&error) => continue, answer => return answer }`.
#[derive(Debug, Default)]
pub(crate) struct Again(u32);

impl Again {
    /// After this error.
    pub(crate) fn after(&mut self, error: &PgError) -> bool {
        self.0 += 1;
        self.0 < ATTEMPTS && error.is_of_something_dropped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Classify};
    use crate::pg::ServerError;

    fn error(sqlstate: &str, message: &str) -> PgError {
        PgError::Server(Box::new(ServerError {
            sqlstate: sqlstate.to_owned(),
            message: message.to_owned(),
            ..ServerError::default()
        }))
    }

    #[test]
    fn what_was_dropped_in_between_is_told_from_other_internal_errors() {
        for (sqlstate, message, dropped) in [
            ("XX000", "could not open relation with OID 16412", true),
            ("XX000", "cache lookup failed for relation 16412", true),
            ("XX000", "cache lookup failed for constraint 16412", true),
            ("XX000", "could not find tuple for attrdef 16412", true),
            ("XX000", "unexpected chunk number 3", false),
            ("XX001", "could not open relation with OID 16412", false),
        ] {
            let error = error(sqlstate, message);
            assert_eq!(error.is_of_something_dropped(), dropped, "{message}");
            assert_eq!(error.class() == Class::Transient, dropped, "{message}");
        }
    }

    #[test]
    fn it_is_asked_again_but_not_for_ever() {
        let dropped = error("XX000", "cache lookup failed for type 1");
        let mut again = Again::default();
        for attempt in 1..=7 {
            assert_eq!(again.after(&dropped), attempt < ATTEMPTS, "{attempt}");
        }
        assert!(!Again::default().after(&error("42501", "permission denied")));
    }
}
