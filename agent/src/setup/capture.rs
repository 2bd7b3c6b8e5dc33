//! What tells the replica of the source's commands: event triggers that write them down, installed where a superuser is at work and
//! otherwise missed aloud; and functions that look what has changed, which whoever owns schema dr_agent may install.
//!
//! ```text
//! init as a superuser, or run as one ─▶ shape, fingerprint, look, capture.sql ─▶ dr_agent.ddl, dr_agent.fingerprint
//! run as the owner                    ─▶ shape, fingerprint, look.sql; says once that DDL is not written down, and who can change that
//! run as anybody else                 ─▶ goes on, and says so
//! source.ddl = "off"                  ─▶ the event triggers that are there are removed
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
use crate::schema::ddl;

/// What looks.
const LOOK_SQL: &str = concat!(
    include_str!("../../sql/shape.sql"),
    "\n",
    include_str!("../../sql/fingerprint.sql"),
    "\n",
    include_str!("../../sql/look.sql")
);

/// What writes commands down, by means of that.
const CAPTURE_SQL: &str = include_str!("../../sql/capture.sql");

/// The functions that carry the comments.
const WRITER: &str = "dr_agent.capture(text,text,text,text,text)";
const LOOKER: &str = "dr_agent.look(boolean)";

/// What is called in any session.
const CALLED_ANYWHERE: [&str; 3] = [WRITER, LOOKER, "dr_agent.ddl_now()"];

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
    /// Whoever asks owns what would be written to.
    owner: bool,
    /// The functions that look are there, and of this version.
    looks: bool,
}

/// Reads it.
///
/// # Errors
/// When the source refuses.
pub async fn observe(client: &Client) -> Result<CaptureFacts, PgError> {
    const FACTS: &str = "
        SELECT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user),
               count(*), count(*) FILTER (WHERE evtenabled = 'A'),
               coalesce(pg_catalog.obj_description(pg_catalog.to_regprocedure($1)::oid, 'pg_proc') = $2, false),
               coalesce((SELECT pg_catalog.pg_has_role(c.relowner, 'USAGE') AND pg_catalog.pg_has_role(n.nspowner, 'USAGE')
                           FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                          WHERE c.oid = pg_catalog.to_regclass($5)), false),
               coalesce(pg_catalog.obj_description(pg_catalog.to_regprocedure($3)::oid, 'pg_proc') = $4, false)
          FROM pg_catalog.pg_event_trigger WHERE evtname IN ('dr_agent_command', 'dr_agent_drop', 'dr_agent_rewrite')";
    let row = client
        .query_typed_one(
            FACTS,
            &[
                (&WRITER, Type::TEXT),
                (&form(CAPTURE_SQL), Type::TEXT),
                (&LOOKER, Type::TEXT),
                (&form(LOOK_SQL), Type::TEXT),
                (&ddl::TABLE, Type::TEXT),
            ],
        )
        .await?;
    Ok(CaptureFacts {
        superuser: row.get(0),
        present: row.get(1),
        firing: row.get(2),
        current: row.get(3),
        owner: row.get(4),
        looks: row.get(5),
    })
}

/// What the comment says.
fn form(sql: &str) -> String {
    let sql = format!("{sql}{}", settings(""));
    format!("form {:08x}", crc32c::crc32c(sql.as_bytes()))
}

/// Installs all of it, or replaces what is there; `capturing` with the event triggers.
fn install(capturing: bool) -> String {
    let mut sql = format!("BEGIN;\n{LOOK_SQL}\n");
    if capturing {
        let form = form(CAPTURE_SQL);
        _ = writeln!(
            sql,
            "{CAPTURE_SQL}\nCOMMENT ON FUNCTION {WRITER} IS '{form}';"
        );
    }
    for function in CALLED_ANYWHERE {
        if capturing || function != WRITER {
            sql.push_str(&settings(function));
        }
    }
    _ = write!(
        sql,
        "COMMENT ON FUNCTION {LOOKER} IS '{}';\nCOMMIT",
        form(LOOK_SQL)
    );
    sql
}

/// What is written down must not hang on the settings of whoever runs the command: they are those of our own sessions. Plans are made
/// once for a session, and nobody is waited for.
fn settings(function: &str) -> String {
    let mut sql = String::new();
    let others = [
        ("jit", "off"),
        ("plan_cache_mode", "force_generic_plan"),
        ("lock_timeout", "200ms"),
    ];
    for (name, value) in VALUES.into_iter().chain(others) {
        // It sees names as it was written to, and its text leaves no server.
        if !["search_path", "client_encoding"].contains(&name) {
            let value = quote_literal(value);
            _ = writeln!(sql, "ALTER FUNCTION {function} SET {name} = {value};");
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
            Ddl::Replicate if self.superuser => {
                (!self.works() || !self.looks).then(|| install(true))
            }
            Ddl::Replicate => (self.owner && !self.looks).then(|| install(false)),
            Ddl::Off => (self.superuser && self.present > 0).then(|| REMOVE.to_owned()),
        }
    }

    /// What a person has to be told where nothing can be done from here.
    pub(super) fn warning(&self, ddl: Ddl) -> Option<String> {
        let what = self
            .defect()
            .filter(|_| !self.superuser && ddl == Ddl::Replicate)?;
        let meanwhile = match self.looks || self.owner {
            true => {
                "; what has changed is found by looking every few seconds, or at once by `SELECT dr_agent.ddl_now()` at the end of a migration"
            }
            false => "",
        };
        Some(format!("{what}; {REMEDY}{meanwhile}"))
    }

    /// Whether what has changed is found by looking.
    pub fn looks(&self) -> bool {
        self.looks
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
            owner: superuser,
            looks: current,
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

    #[test]
    fn whoever_owns_the_schema_lets_changes_be_looked_for() {
        let owner = CaptureFacts {
            superuser: false,
            present: 0,
            firing: 0,
            current: false,
            owner: true,
            looks: false,
        };
        let installed = owner.statement(Ddl::Replicate).unwrap();
        assert!(
            installed.contains("FUNCTION dr_agent.ddl_now()")
                && !installed.contains("CREATE EVENT TRIGGER")
        );
        assert!(
            owner
                .warning(Ddl::Replicate)
                .is_some_and(|text| text.contains("ddl_now()"))
        );
        assert_eq!(
            CaptureFacts {
                looks: true,
                ..owner
            }
            .statement(Ddl::Replicate),
            None
        );
        assert_eq!(
            CaptureFacts {
                owner: false,
                ..owner
            }
            .statement(Ddl::Replicate),
            None
        );
        let everything = CaptureFacts {
            superuser: true,
            ..owner
        }
        .statement(Ddl::Replicate);
        assert!(everything.is_some_and(|sql| sql.contains("CREATE EVENT TRIGGER")));
    }
}
