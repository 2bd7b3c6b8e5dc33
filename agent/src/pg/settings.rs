//! ● The one list of settings with which every session of ours begins, on either side.
//!
//! A server, a database and a role may each carry settings of their own (`postgresql.conf`, `ALTER DATABASE … SET`,
//! `ALTER ROLE … SET`). Whatever of that would change what a value or a name means, or would end a session of ours or make it wait
//! for ever, is set here; [`super::Session`] begins with it, so that no session can be opened without.
//!
//! # Invariants
//! - Every role may set each of them in the start-up packet, and every version we support knows it; an unknown or forbidden
//!   one there is a refused session. What only later versions have, or only some may set, is [`later`].
//! - The two sides differ in nothing that is here, unless a session says so for itself.
//!
//! # What it does not do
//! It sets nothing that only makes us slower (but `jit`, which makes looks at catalogs slower by far), and `lc_messages`, which takes
//! a right, only where it costs no round trip of its own: nothing depends on the language of a message.

/// What decides how values and names are written and read.
pub const VALUES: [(&str, &str); 19] = [
    ("client_encoding", "UTF8"),
    // Names of types, tables and functions come out with their schema, and are read with it: also those in values
    // of type regclass and its kin.
    ("search_path", ""),
    ("DateStyle", DATE_STYLE),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("xmloption", "content"),
    ("xmlbinary", "base64"),
    ("lc_monetary", "C"),
    ("lc_numeric", "C"),
    ("lc_time", "C"),
    ("array_nulls", "on"),
    ("standard_conforming_strings", "on"),
    ("backslash_quote", "safe_encoding"),
    ("transform_null_equals", "off"),
    ("quote_all_identifiers", "off"),
    // A policy never hides a row: one that would apply is an error.
    ("row_security", "off"),
    // An index of type GIN never leaves out rows to save time.
    ("gin_fuzzy_search_limit", "0"),
];

/// A form that no server has by default, so that a session without our settings is known by it.
const DATE_STYLE: &str = "ISO, YMD";

/// What decides whether a session may do its work, and for how long.
const CONDUCT: [(&str, &str); 12] = [
    ("role", "none"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("exit_on_error", "off"),
    ("local_preload_libraries", ""),
    // A look at the catalogs of thousands of tables would be compiled for seconds and run for a tenth of one.
    ("jit", "off"),
    // The server takes a client that does not read for a while, because what was read before is being applied, for a dead one.
    ("tcp_user_timeout", "0"),
];

/// With it, ordinary triggers, rules, foreign keys and event triggers do not fire. For every session that writes to a replica;
/// it needs a right that a role of the source does not have.
pub const SILENT: (&str, &str) = ("session_replication_role", "replica");

/// Every setting of the list.
pub fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    VALUES.into_iter().chain(CONDUCT)
}

/// What a server of this `server_version_num` has to be told in a statement of its own, because others would refuse the
/// start-up packet for it.
pub fn later(version: i32) -> Option<&'static str> {
    // Who may not set event_triggers fires those that are ENABLE ALWAYS, as before version 17.
    // Messages in English where we may ask for them: what is in them is told apart better, and can be looked up.
    const SINCE_17: &str = "SET transaction_timeout = 0; \
        SELECT pg_catalog.set_config('lc_messages', 'C', false) \
         WHERE pg_catalog.has_parameter_privilege('lc_messages', 'SET'); \
        SELECT pg_catalog.set_config('event_triggers', 'off', false) \
         WHERE pg_catalog.has_parameter_privilege('event_triggers', 'SET')";
    (version >= 170_000).then_some(SINCE_17)
}

/// The same as `options` of a start-up packet, for programs that are told the version.
pub fn later_options(version: i32) -> &'static [(&'static str, &'static str)] {
    if version >= 170_000 {
        &[("transaction_timeout", "0")]
    } else {
        &[]
    }
}

/// Whether a session began with our settings, by what the server reports of its own accord. A pooler may drop `options`.
pub fn were_taken(date_style: Option<&str>) -> bool {
    date_style.is_none_or(|reported| reported == DATE_STYLE)
}

/// `server_version_num` from `server_version`: "15.18 (Debian …)", "19beta1".
pub fn version_number(text: &str) -> Option<i32> {
    let number = text
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .next()?;
    let mut parts = number.split('.');
    let major: i32 = parts.next()?.parse().ok()?;
    let minor: i32 = match parts.next() {
        Some(minor) => minor.parse().ok()?,
        None => 0,
    };
    major.checked_mul(10_000)?.checked_add(minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_setting_is_listed_twice_and_none_that_a_version_or_a_role_would_refuse() {
        let names: Vec<&str> = all().map(|(name, _)| name).collect();
        for name in &names {
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1);
            let refused = [
                "transaction_timeout",
                "event_triggers",
                SILENT.0,
                "lc_messages",
            ];
            assert!(!refused.contains(name), "{name}");
        }
    }

    #[test]
    fn a_version_is_told_what_it_knows() {
        assert_eq!(later(160_004), None);
        assert!(later(170_000).is_some_and(|sql| sql.contains("transaction_timeout")));
        assert!(later(180_004).is_some_and(|sql| sql.contains("event_triggers")));
    }

    #[test]
    fn versions_of_all_vendors_are_understood() {
        let table = [
            ("15.18 (Debian 15.18-1.pgdg12+1)", Some(150_018)),
            ("14.0", Some(140_000)),
            ("17beta1", Some(170_000)),
            ("18devel", Some(180_000)),
            ("", None),
            ("PgBouncer", None),
            ("99999999999.1", None),
        ];
        for (text, expected) in table {
            assert_eq!(version_number(text), expected, "{text}");
        }
    }

    #[test]
    fn a_session_whose_options_were_dropped_is_known() {
        assert!(were_taken(Some("ISO, YMD")));
        assert!(were_taken(None));
        for default in ["ISO, MDY", "ISO, DMY", "German, DMY"] {
            assert!(!were_taken(Some(default)));
        }
    }
}
