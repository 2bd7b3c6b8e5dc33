//! ● A schema as a role can create it that may not act as everybody: owners and privileges statement by statement.
//!
//! `pg_restore` leaves out all owners or none. A role that is no superuser gives each object to its owner where it is a member of
//! that role, keeps it where it is not, and drops only the privileges of roles that are not there.
//!
//! # Invariants
//! - Only statements of `pg_dump`'s own are touched: quotes, bodies and comments are passed over.
//! - Owners come last, in one piece: an owner needs CREATE on the schema when something is given to it, and has it for as long as
//!   that takes.

use std::collections::BTreeMap;

use super::roles::LackingRoles;
use super::script::{statements, without_comments};
use crate::pg::quote::{identifier, quote_ident, quote_literal};

/// The script of a section for this role. `extensions` are those of the source, with their owners.
pub(super) fn as_role(
    script: &str,
    lacking: &LackingRoles,
    extensions: &BTreeMap<String, String>,
) -> String {
    let mut kept = String::with_capacity(script.len());
    let mut owners = OwnerStatements::default();
    for piece in statements(script) {
        let statement = without_comments(piece);
        match verdict(statement, lacking, extensions) {
            OwnerVerdict::Keep => kept.push_str(piece),
            OwnerVerdict::Drop => {}
            OwnerVerdict::Instead(other) => kept.push_str(&other),
            OwnerVerdict::Owner(role) if lacking.restricted => owners.add(statement, role),
            OwnerVerdict::Owner(_) => kept.push_str(piece),
        }
    }
    owners.append_to(&mut kept);
    kept
}

enum OwnerVerdict {
    Keep,
    Drop,
    Instead(String),
    Owner(String),
}

fn verdict(
    statement: &str,
    lacking: &LackingRoles,
    extensions: &BTreeMap<String, String>,
) -> OwnerVerdict {
    let is_lacking =
        |role: &String| lacking.absent.contains(role) || lacking.foreign.contains(role);
    if statement.starts_with("ALTER ")
        && let Some(role) = behind(statement, " OWNER TO ").and_then(|mut roles| roles.pop())
    {
        return match is_lacking(&role) {
            true => OwnerVerdict::Drop,
            false => OwnerVerdict::Owner(role),
        };
    }
    if let Some(rest) = statement.strip_prefix("ALTER DEFAULT PRIVILEGES FOR ROLE ") {
        let maker = identifier(rest).map(|(name, _)| name);
        if maker.is_some_and(|maker| is_lacking(&maker)) {
            return OwnerVerdict::Drop;
        }
    }
    let is_grant = ["GRANT ", "REVOKE ", "ALTER DEFAULT PRIVILEGES "];
    if is_grant.iter().any(|words| statement.starts_with(words)) {
        let named = [" TO ", " FROM "].map(|word| behind(statement, word).unwrap_or_default());
        let absent = |role: &String| lacking.absent.contains(role);
        return match named.iter().flatten().any(absent) {
            true => OwnerVerdict::Drop,
            false => OwnerVerdict::Keep,
        };
    }
    if lacking.restricted {
        // Both take a superuser. What it is for, a grant in another's name, is then one of the owner's.
        if statement.contains("SET SESSION AUTHORIZATION")
            || statement.starts_with("COMMENT ON EXTENSION ")
        {
            return OwnerVerdict::Drop;
        }
        if let Some(rest) = statement.strip_prefix("CREATE SCHEMA ") {
            return OwnerVerdict::Instead(format!("\nCREATE SCHEMA IF NOT EXISTS {rest}\n"));
        }
    }
    match statement
        .strip_prefix("CREATE EXTENSION IF NOT EXISTS ")
        .and_then(identifier)
    {
        Some((name, _)) => match extensions.get(&name).filter(|owner| !is_lacking(owner)) {
            Some(owner) => OwnerVerdict::Instead(extension(statement, owner)),
            None => OwnerVerdict::Keep,
        },
        None => OwnerVerdict::Keep,
    }
}

/// Creates an extension in the name of its owner, who could not be given it later, where that may.
fn extension(statement: &str, owner: &str) -> String {
    let statement = statement.trim_end_matches(';');
    format!(
        "
DO $extension$
BEGIN
    SET LOCAL ROLE {};
    {statement};
    RESET ROLE;
EXCEPTION WHEN insufficient_privilege THEN
    {statement};
END
$extension$;
",
        quote_ident(owner)
    )
}

/// The roles that stand behind the last of these words, up to the end.
fn behind(statement: &str, word: &str) -> Option<Vec<String>> {
    let (_, mut rest) = statement.rsplit_once(word)?;
    let mut names = Vec::new();
    while let Some((name, behind)) = identifier(rest.trim_start()) {
        names.push(name);
        match behind.strip_prefix(", ") {
            Some(next) => rest = next,
            None => break,
        }
    }
    Some(names)
}

/// Who gets what.
#[derive(Default)]
struct OwnerStatements {
    statements: String,
    roles: Vec<String>,
}

impl OwnerStatements {
    fn add(&mut self, statement: &str, role: String) {
        self.statements.push_str(statement);
        self.statements.push('\n');
        if !self.roles.contains(&role) {
            self.roles.push(role);
        }
    }

    fn append_to(&self, script: &mut String) {
        if self.roles.is_empty() {
            return;
        }
        let roles: Vec<String> = self.roles.iter().map(|role| quote_literal(role)).collect();
        script.push_str(&format!(
            "
DO $own$
DECLARE
    place record;
    given text := '';
BEGIN
    FOR place IN
        SELECT n.nspname, r.rolname FROM pg_catalog.pg_namespace n
          JOIN pg_catalog.pg_roles r ON r.rolname = ANY (ARRAY[{}]::pg_catalog.name[])
         WHERE n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'dr_agent')
           AND NOT pg_catalog.has_schema_privilege(r.oid, n.oid, 'CREATE')
           AND pg_catalog.has_schema_privilege(n.oid, 'CREATE WITH GRANT OPTION')
    LOOP
        EXECUTE pg_catalog.format('GRANT CREATE ON SCHEMA %I TO %I', place.nspname, place.rolname);
        -- Not from whom the schema itself is given to meanwhile.
        given := given || pg_catalog.format(
            'DO $back$ BEGIN IF (SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = %L) <> %L
             THEN REVOKE CREATE ON SCHEMA %I FROM %I; END IF; END $back$;',
            place.nspname, place.rolname, place.nspname, place.rolname);
    END LOOP;
    PERFORM pg_catalog.set_config('dr_agent.given', given, true);
END
$own$;
{}
DO $own$ BEGIN EXECUTE pg_catalog.current_setting('dr_agent.given'); END $own$;
",
            roles.join(", "),
            self.statements
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "SET x = 0;
--
-- Name: s; Type: SCHEMA; Schema: -; Owner: app
--
CREATE SCHEMA s;
ALTER SCHEMA s OWNER TO app;
CREATE EXTENSION IF NOT EXISTS citext WITH SCHEMA public;
COMMENT ON EXTENSION citext IS 'it''s; text';
CREATE FUNCTION s.f() RETURNS text LANGUAGE plpgsql AS $_$
BEGIN
ALTER TABLE s.t OWNER TO boss;
GRANT ALL ON s.t TO gone;
END $_$;
ALTER FUNCTION s.f() OWNER TO boss;
ALTER TABLE s.\"a;b\" OWNER TO \"App 2\";
GRANT SELECT ON TABLE s.t TO reader;
GRANT SELECT ON TABLE s.t TO gone;
SET SESSION AUTHORIZATION app;
GRANT SELECT ON TABLE s.t TO boss;
RESET SESSION AUTHORIZATION;
";

    fn lacking(restricted: bool) -> LackingRoles {
        LackingRoles {
            absent: ["gone".to_owned()].into(),
            foreign: ["boss".to_owned()].into(),
            restricted,
        }
    }

    fn owner() -> BTreeMap<String, String> {
        BTreeMap::from([("citext".to_owned(), "app".to_owned())])
    }

    #[test]
    fn a_script_is_split_where_its_statements_end() {
        let joined: String = statements(SCRIPT).concat();
        assert_eq!(joined, SCRIPT);
    }

    #[test]
    fn each_object_goes_to_its_owner_where_ours_may_give_it() {
        let script = as_role(SCRIPT, &lacking(true), &owner());
        let (before, owners) = script.split_once("DO $own$").unwrap();
        assert!(!before.contains("ALTER SCHEMA s OWNER TO app"), "{before}");
        assert!(owners.contains("ALTER SCHEMA s OWNER TO app;"), "{owners}");
        assert!(owners.contains("ALTER TABLE s.\"a;b\" OWNER TO \"App 2\";"));
        assert!(
            !script.contains("ALTER FUNCTION s.f() OWNER TO boss"),
            "{script}"
        );
        // What looks like one in a body stays.
        assert!(script.contains("ALTER TABLE s.t OWNER TO boss;\nGRANT ALL ON s.t TO gone;"));
    }

    #[test]
    fn privileges_of_roles_that_are_not_there_go_and_all_others_stay() {
        let script = as_role(SCRIPT, &lacking(true), &owner());
        assert!(script.contains("GRANT SELECT ON TABLE s.t TO reader;"));
        assert!(script.contains("GRANT SELECT ON TABLE s.t TO boss;"));
        assert!(!script.contains("GRANT SELECT ON TABLE s.t TO gone;"));
        assert!(!script.contains("SESSION AUTHORIZATION"), "{script}");
        assert!(!script.contains("COMMENT ON EXTENSION"), "{script}");
        assert!(script.contains("CREATE SCHEMA IF NOT EXISTS s;"));
        assert!(
            script.contains("SET LOCAL ROLE \"app\";\n    CREATE EXTENSION IF NOT EXISTS citext")
        );
    }

    #[test]
    fn a_superuser_gives_everything_at_once() {
        let script = as_role(SCRIPT, &lacking(false), &BTreeMap::new());
        assert!(script.contains("ALTER SCHEMA s OWNER TO app;\nCREATE EXTENSION"));
        assert!(script.contains("SET SESSION AUTHORIZATION app;") && !script.contains("DO $own$"));
    }
}
