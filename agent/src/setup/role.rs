//! Roles that the source's database needs and the replica lacks.
//!
//! Logical decoding carries no roles. Without the owners the schema cannot be restored as it is;
//! without the members nobody can log in on the bad day.
//!
//! # Invariants
//! - A role that exists on the replica is never altered.
//! - A password is copied as the hash that the source stores, and never shown: [`Statement::shown`]
//!   is what plans and warnings print.
//!
//! # What it does not do
//! Roles dropped or altered on the source later are not followed; `check` compares them.

use std::fmt;

use tokio_postgres::Client;

use super::agent_role::Agent;
use super::error::{SetupError, Side};
use super::setting;
use crate::error::{Class, Classify as _};
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};

/// A role of the source.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Role {
    pub(super) name: String,
    pub(super) superuser: bool,
    inherit: bool,
    create_role: bool,
    create_db: bool,
    login: bool,
    replication: bool,
    bypass_rls: bool,
    connection_limit: i32,
    valid_until: Option<String>,
    password: Option<String>,
    /// The roles it is a member of, each with or without ADMIN OPTION.
    member_of: Vec<(String, bool)>,
    /// Settings stored with it, for all databases.
    settings: Vec<(String, String)>,
}

/// A statement, and the same without secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct Statement {
    pub(super) sql: String,
    pub(super) shown: String,
}

impl Statement {
    pub(super) fn plain(sql: impl Into<String>) -> Self {
        let sql = sql.into();
        Self {
            shown: sql.clone(),
            sql,
        }
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// The roles that own something in this database of the source or hold grants on it, the roles
/// these are members of, and their members; in name order.
pub(super) async fn of_source(source: &Client) -> Result<Vec<Role>, SetupError> {
    read(source)
        .await
        .map_err(SetupError::sql(Side::Source, "read the roles"))
}

async fn read(source: &Client) -> Result<Vec<Role>, PgError> {
    // pg_shdepend knows every owner and grantee but the bootstrap superuser, which is pinned; that
    // one counts where it owns a relation or schema made after initdb (OIDs from 16384).
    const NEEDED: &str = "
        WITH RECURSIVE here AS (SELECT oid FROM pg_database WHERE datname = current_database()),
        needed(oid) AS (
            SELECT d.refobjid FROM pg_shdepend d, here
             WHERE d.refclassid = 'pg_authid'::regclass
               AND (d.dbid = here.oid
                    OR d.classid = 'pg_database'::regclass AND d.objid = here.oid)
            UNION SELECT relowner FROM pg_class WHERE oid >= 16384
                     AND relnamespace <> 'pg_toast'::regnamespace
            UNION SELECT nspowner FROM pg_namespace WHERE oid >= 16384
            UNION SELECT CASE WHEN m.member = n.oid THEN m.roleid ELSE m.member END
                    FROM needed n JOIN pg_auth_members m ON n.oid IN (m.member, m.roleid))
        SELECT r.oid, r.rolname::text, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb,
               r.rolcanlogin, r.rolreplication, r.rolbypassrls, r.rolconnlimit,
               CASE WHEN isfinite(r.rolvaliduntil) THEN r.rolvaliduntil::text END
          FROM pg_roles r
         WHERE r.oid IN (SELECT oid FROM needed) AND r.rolname NOT LIKE 'pg\\_%'
         ORDER BY r.rolname";
    const MEMBER_OF: &str = "
        SELECT g.rolname::text, bool_or(m.admin_option)
          FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
         WHERE m.member = $1 GROUP BY 1 ORDER BY 1";
    let settings = format!(
        "SELECT {} FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) AS c
          WHERE s.setdatabase = 0 AND s.setrole = $1 AND {} ORDER BY 1",
        setting::NAME_AND_VALUE,
        setting::NOT_COPIED
    );
    let reads_passwords: bool = source
        .query_one("SELECT has_table_privilege('pg_authid', 'SELECT')", &[])
        .await?
        .get(0);
    let mut roles = Vec::new();
    for row in source.query(NEEDED, &[]).await? {
        let oid: u32 = row.get(0);
        let password = if reads_passwords {
            const PASSWORD: &str = "SELECT rolpassword FROM pg_authid WHERE oid = $1";
            source.query_one(PASSWORD, &[&oid]).await?.get(0)
        } else {
            None
        };
        let member_of = source.query(MEMBER_OF, &[&oid]).await?;
        let settings = source.query(&settings, &[&oid]).await?;
        roles.push(Role {
            name: row.get(1),
            superuser: row.get(2),
            inherit: row.get(3),
            create_role: row.get(4),
            create_db: row.get(5),
            login: row.get(6),
            replication: row.get(7),
            bypass_rls: row.get(8),
            connection_limit: row.get(9),
            valid_until: row.get(10),
            password,
            member_of: member_of
                .iter()
                .map(|row| (row.get(0), row.get(1)))
                .collect(),
            settings: settings
                .iter()
                .map(|row| (row.get(0), row.get(1)))
                .collect(),
        });
    }
    Ok(roles)
}

/// The roles that these statements and that of the agent's own role make.
pub(super) fn missing(roles: &[Role], agent: &str, present: &[String]) -> Vec<String> {
    let names = roles.iter().map(|role| role.name.as_str()).chain([agent]);
    let missing = names.filter(|name| !present.iter().any(|there| there == name));
    missing.map(str::to_owned).collect()
}

/// The statements that add the missing roles: the roles, then memberships, then stored settings.
pub(super) fn statements(roles: &[Role], present: &[String]) -> Vec<Statement> {
    let missing: Vec<&Role> = roles
        .iter()
        .filter(|role| !present.contains(&role.name))
        .collect();
    let create = missing.iter().map(|role| role.create());
    let grants = missing.iter().flat_map(|role| {
        role.member_of.iter().map(|(group, admin)| {
            let option = if *admin { " WITH ADMIN OPTION" } else { "" };
            Statement::plain(format!(
                "GRANT {} TO {}{option}",
                quote_ident(group),
                quote_ident(&role.name)
            ))
        })
    });
    let settings = missing.iter().flat_map(|role| role.stored(false));
    create.chain(grants).chain(settings).collect()
}

impl Role {
    /// The statements of its settings; those that are left to a person, or the others.
    fn stored(&self, left: bool) -> impl Iterator<Item = Statement> {
        let target = format!("ROLE {}", quote_ident(&self.name));
        let settings = self.settings.iter();
        let settings = settings.filter(move |(name, _)| setting::keeps_out(name) == left);
        settings.map(move |(name, value)| setting::statement(&target, name, value))
    }

    fn create(&self) -> Statement {
        let flag = |on: bool, word: &str| format!(" {}{word}", if on { "" } else { "NO" });
        let mut sql = format!("CREATE ROLE {} WITH", quote_ident(&self.name));
        for (on, word) in [
            (self.login, "LOGIN"),
            (self.inherit, "INHERIT"),
            (self.create_db, "CREATEDB"),
            (self.create_role, "CREATEROLE"),
        ] {
            sql.push_str(&flag(on, word));
        }
        // Left unsaid where they are off: naming them at all takes a superuser before version 16.
        for (on, word) in [
            (self.superuser, "SUPERUSER"),
            (self.replication, "REPLICATION"),
            (self.bypass_rls, "BYPASSRLS"),
        ] {
            if on {
                sql.push_str(&flag(true, word));
            }
        }
        if self.connection_limit >= 0 {
            sql.push_str(&format!(" CONNECTION LIMIT {}", self.connection_limit));
        }
        if let Some(until) = &self.valid_until {
            sql.push_str(&format!(" VALID UNTIL {}", quote_literal(until)));
        }
        let mut shown = sql.clone();
        if let Some(hash) = &self.password {
            sql.push_str(&format!(" PASSWORD {}", quote_literal(hash)));
            shown.push_str(" /* init gives it the password hash of the source as well, which is not printed */");
        }
        Statement { sql, shown }
    }
}

/// The names of the roles of the replica's server.
pub(super) async fn present(replica: &Client) -> Result<Vec<String>, SetupError> {
    let rows = replica
        .query_typed("SELECT rolname::text FROM pg_roles", &[])
        .await
        .map_err(|error| SetupError::sql(Side::Replica, "list roles")(error.into()))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Adds the missing roles as far as our rights allow; returns a warning for each statement that they
/// do not.
pub(super) async fn ensure(admin: &Client, roles: &[Role]) -> Result<Vec<String>, SetupError> {
    let present = present(admin).await?;
    let missing = roles.iter().filter(|role| !present.contains(&role.name));
    let left = missing.flat_map(|role| role.stored(true));
    let mut warnings: Vec<String> = left.map(|statement| setting::left(&statement)).collect();
    for statement in statements(roles, &present) {
        let Err(error) = admin.batch_execute(&statement.sql).await else {
            continue;
        };
        let error = PgError::from(error);
        match error.sqlstate() {
            // duplicate_object, unique_violation: another database's set-up was quicker.
            Some("42710" | "23505") => {}
            // Above all insufficient_privilege, and undefined_object that follows from it.
            _ if error.class() == Class::Definite => warnings.push(format!(
                "the replica lacks a role of the source: {error}; run there as a superuser: {}",
                statement.shown
            )),
            _ => return Err(SetupError::sql(Side::Replica, "create roles")(error)),
        }
    }
    Ok(warnings)
}

/// Makes our role, where it is no superuser, a member of the source's roles, so that it can give them what is theirs. Returns a
/// warning for each that it may not join.
pub(super) async fn join(admin: &Client, roles: &[Role]) -> Result<Vec<String>, SetupError> {
    let doing = "look at our role";
    let sql = |error: PgError| SetupError::sql(Side::Replica, doing)(error);
    const WHO: &str = "SELECT current_user::text, current_setting('server_version_num')::int";
    let row = admin.query_typed_one(WHO, &[]).await;
    let row = row.map_err(|error| sql(error.into()))?;
    let (me, version): (String, i32) = (row.get(0), row.get(1));
    let ours = Agent::observe(admin, &me).await.map_err(sql)?;
    let mut warnings = Vec::new();
    for statement in ours.memberships(&me, roles, version) {
        let Err(error) = admin.batch_execute(&statement.sql).await else {
            continue;
        };
        warnings.push(format!(
            "what that role owns will belong to ours on the replica: {}; run there as a superuser: {statement}",
            PgError::from(error)
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
impl Role {
    /// One that owns something.
    pub(super) fn testing(name: &str, superuser: bool) -> Self {
        Self {
            name: name.to_owned(),
            superuser,
            inherit: true,
            connection_limit: -1,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(name: &str) -> Role {
        Role {
            name: name.to_owned(),
            inherit: true,
            connection_limit: -1,
            ..Role::default()
        }
    }

    #[test]
    fn a_password_is_copied_and_never_shown() {
        let mut app = role("App \"1\"");
        app.login = true;
        app.password = Some("SCRAM-SHA-256$4096:c2FsdA==$x:y".to_owned());
        app.valid_until = Some("2030-01-01 00:00:00+00".to_owned());
        let statement = app.create();
        assert!(
            statement
                .sql
                .starts_with("CREATE ROLE \"App \"\"1\"\"\" WITH LOGIN INHERIT NOCREATEDB")
        );
        assert!(statement.sql.contains("SCRAM-SHA-256$"));
        assert!(!statement.shown.contains("SCRAM"), "{}", statement.shown);
        assert!(
            !statement.shown.contains(" PASSWORD "),
            "no placeholder that would become a password"
        );
        assert!(!statement.sql.contains("SUPERUSER"));
    }

    #[test]
    fn memberships_follow_when_every_role_is_there_and_present_roles_are_left_alone() {
        let mut member = role("a_member");
        member.member_of = vec![("z_group".to_owned(), true)];
        let mut here = role("here");
        here.member_of = vec![("z_group".to_owned(), false)];
        let roles = [member, here, role("z_group")];
        let sql: Vec<String> = statements(&roles, &["here".to_owned()])
            .into_iter()
            .map(|statement| statement.sql)
            .collect();
        assert_eq!(sql.len(), 3);
        assert!(sql[0].starts_with("CREATE ROLE \"a_member\""));
        assert!(sql[1].starts_with("CREATE ROLE \"z_group\""));
        assert_eq!(
            sql[2],
            "GRANT \"z_group\" TO \"a_member\" WITH ADMIN OPTION"
        );
    }
}
