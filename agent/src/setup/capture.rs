//! The source's event triggers, which write its commands down: installed where a superuser is at work, and otherwise missed aloud.
//!
//! ```text
//! init as a superuser, or run as one ─▶ shape.sql, capture.sql ─▶ dr_agent.ddl
//! run as anybody else                 ─▶ goes on; says once that DDL is not written down, and who can change that
//! source.ddl = "off"                  ─▶ what is there is removed
//! ```
//!
//! # Invariants
//! - One transaction; repeatable. Event triggers that are disabled, or do not fire ALWAYS, count as not there.
//! - Whatever the session of a command has set, its objects are described as our own sessions would ([`crate::pg::settings`]).
//! - A comment says of which form they are: those of an earlier version are replaced.

use std::fmt::Write as _;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::config::Ddl;
use crate::pg::PgError;
use crate::pg::quote::quote_literal;
use crate::pg::settings::VALUES;

const SQL: &str = concat!(
    include_str!("../../sql/shape.sql"),
    "\n",
    include_str!("../../sql/capture.sql")
);

/// The function that carries the comment.
const WRITER: &str = "dr_agent.capture(text,text,text,text,text)";

/// What to do about it.
pub const REMEDY: &str = "run `dr-agent init --source-url URL` as a superuser";

/// How many event triggers there are.
const TRIGGERS: i64 = 3;

const REMOVE: &str = "DROP EVENT TRIGGER IF EXISTS dr_agent_command;
DROP EVENT TRIGGER IF EXISTS dr_agent_drop;
DROP EVENT TRIGGER IF EXISTS dr_agent_rewrite";

/// What is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureFacts {
    /// Whoever asks may install it.
    superuser: bool,
    /// Event triggers of ours.
    present: i64,
    /// Of these, those that always fire.
    firing: i64,
    /// They are of this version.
    current: bool,
}

/// Reads it.
///
/// # Errors
/// When the source refuses.
pub async fn observe(client: &Client) -> Result<CaptureFacts, PgError> {
    const FACTS: &str = "
        SELECT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user),
               count(*), count(*) FILTER (WHERE evtenabled = 'A'),
               coalesce(pg_catalog.obj_description(pg_catalog.to_regprocedure($1)::oid, 'pg_proc') = $2, false)
          FROM pg_catalog.pg_event_trigger WHERE evtname IN ('dr_agent_command', 'dr_agent_drop', 'dr_agent_rewrite')";
    let row = client
        .query_typed_one(FACTS, &[(&WRITER, Type::TEXT), (&form(), Type::TEXT)])
        .await?;
    Ok(CaptureFacts {
        superuser: row.get(0),
        present: row.get(1),
        firing: row.get(2),
        current: row.get(3),
    })
}

/// What the comment says.
fn form() -> String {
    format!("form {:08x}", crc32c::crc32c(sql().as_bytes()))
}

/// Installs it, or replaces what is there.
fn install() -> String {
    format!(
        "BEGIN;\n{}\nCOMMENT ON FUNCTION {WRITER} IS '{}';\nCOMMIT",
        sql(),
        form()
    )
}

/// All of it. What is written down must not hang on the settings of whoever runs the command: they are those of our own sessions.
fn sql() -> String {
    let mut sql = SQL.to_owned();
    for (name, value) in VALUES {
        // It sees names as it was written to, and its text leaves no server.
        if !["search_path", "client_encoding"].contains(&name) {
            let value = quote_literal(value);
            _ = writeln!(sql, "ALTER FUNCTION {WRITER} SET {name} = {value};");
        }
    }
    sql
}

impl CaptureFacts {
    /// Whether commands are written down, by what this version knows.
    fn works(&self) -> bool {
        self.firing == TRIGGERS && self.current
    }

    /// What is to be run; none where everything is as it should be, or may not be changed from here.
    pub(super) fn statement(&self, ddl: Ddl) -> Option<String> {
        match ddl {
            _ if !self.superuser => None,
            Ddl::Replicate => (!self.works()).then(install),
            Ddl::Off => (self.present > 0).then(|| REMOVE.to_owned()),
        }
    }

    /// What a person has to be told where nothing can be done from here.
    pub(super) fn warning(&self, ddl: Ddl) -> Option<String> {
        let what = self
            .defect()
            .filter(|_| !self.superuser && ddl == Ddl::Replicate)?;
        Some(format!("{what}; {REMEDY}"))
    }

    /// Why the source's commands are not, or not all, written down.
    pub fn defect(&self) -> Option<&'static str> {
        if self.works() {
            return None;
        }
        Some(match self.present {
            0 => "DDL is not written down on the source: its event triggers are not installed",
            _ if self.firing < TRIGGERS => {
                "DDL is not all written down on the source: event triggers of schema dr_agent are disabled, or do not fire ALWAYS"
            }
            _ => "the source's event triggers are of another version of dr-agent",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_depends_on_who_asks_and_what_is_there() {
        let facts = |superuser, present, firing, current| CaptureFacts {
            superuser,
            present,
            firing,
            current,
        };
        // Facts; whether something is run with "replicate", and with "off"; a word of the warning.
        let table = [
            (facts(true, 0, 0, false), true, false, None),
            (facts(true, 3, 3, true), false, true, None),
            (facts(true, 3, 2, true), true, true, None),
            (facts(true, 3, 3, false), true, true, None),
            (
                facts(false, 0, 0, false),
                false,
                false,
                Some("not installed"),
            ),
            (facts(false, 3, 2, true), false, false, Some("disabled")),
            (
                facts(false, 3, 3, false),
                false,
                false,
                Some("another version"),
            ),
            (facts(false, 3, 3, true), false, false, None),
        ];
        for (facts, replicate, off, word) in table {
            assert_eq!(
                facts.statement(Ddl::Replicate).is_some(),
                replicate,
                "{facts:?}"
            );
            assert_eq!(facts.statement(Ddl::Off).is_some(), off, "{facts:?}");
            let warning = facts.warning(Ddl::Replicate);
            assert_eq!(warning.is_some(), word.is_some(), "{facts:?}");
            assert!(warning.is_none_or(|text| text.contains(word.unwrap_or_default())));
            assert_eq!(facts.warning(Ddl::Off), None);
        }
    }
}
