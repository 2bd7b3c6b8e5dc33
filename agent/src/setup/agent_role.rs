//! The agent's own role: what it has on either side, and what `init` gives it.
//!
//! # Invariants
//! - On the replica it is no superuser: what it applies evaluates code that users of the source wrote (checks, defaults,
//!   expressions of indexes), with its rights. PostgreSQL 14 is excepted, where only a superuser may silence triggers.
//! - It gets no membership of a superuser: that would be the right to become one.

use tokio_postgres::Client;

use super::capture;
use super::error::{SetupError, Side};
use super::replica::Server;
use super::role::{Role, Statement};
use super::source;
use crate::catalog::publication::Wanted;
use crate::config::Config;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};
use crate::schema::listing;

/// The agent's own role on one side, as it is.
#[derive(Debug, Default)]
pub(super) struct Agent {
    pub(super) exists: bool,
    pub(super) superuser: bool,
    replication: bool,
    bypass_rls: bool,
    sets_replication_role: bool,
    /// The roles it has all rights of, and may give things to.
    member_of: Vec<String>,
}

impl Agent {
    pub(super) async fn observe(client: &Client, name: &str) -> Result<Self, PgError> {
        // From 16 on a membership may be one without the right to use it (`createrole_self_grant` is empty as a rule).
        const SQL: &str = "
            SELECT rolsuper, rolreplication, rolbypassrls,
                   ARRAY(SELECT g.rolname::text FROM pg_auth_members m
                           JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid
                          GROUP BY 1
                         HAVING bool_or(coalesce((to_jsonb(m) ->> 'set_option')::boolean, true))
                            AND bool_or(coalesce((to_jsonb(m) ->> 'inherit_option')::boolean, r.rolinherit))),
                   current_setting('server_version_num')::int
              FROM pg_roles r WHERE rolname = $1";
        let Some(row) = client.query_opt(SQL, &[&name]).await? else {
            return Ok(Self::default());
        };
        let sets_replication_role = row.get::<_, i32>(4) >= 150_000
            && client
                .query_one(
                    "SELECT has_parameter_privilege($1::name, 'session_replication_role', 'SET')",
                    &[&name],
                )
                .await?
                .get(0);
        Ok(Self {
            exists: true,
            superuser: row.get(0),
            replication: row.get(1),
            bypass_rls: row.get(2),
            member_of: row.get(3),
            sets_replication_role,
        })
    }

    /// Whether schema `dr_agent` is complete on this replica, and who owns it.
    pub(super) async fn schema(client: &Client) -> Result<(bool, Option<String>), PgError> {
        const SQL: &str = "
            SELECT (SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid
                       AND c.relname IN ('progress', 'stream', 'table_sync', 'promotion',
                                         'schema_sync', 'heartbeat', 'sequence_state',
                                         'listed', 'coverage', 'clock')) = 10
                   AND EXISTS (SELECT 1 FROM pg_proc p
                                WHERE p.pronamespace = n.oid AND p.proname = 'advance'),
                   pg_get_userbyid(n.nspowner)::text
              FROM pg_namespace n WHERE n.nspname = 'dr_agent'";
        let row = client.query_opt(SQL, &[]).await?;
        Ok(row.map_or((false, None), |row| (row.get(0), row.get(1))))
    }
}

impl Agent {
    /// What makes the role, on a replica where `init` connects as another.
    pub(super) fn create(&self, name: &str, server: &Server) -> Option<Statement> {
        let name = quote_ident(name);
        let of_14 = " SUPERUSER /* PostgreSQL 14 lets only a superuser silence triggers */";
        let more = match server.version < 150_000 && server.superuser && !self.superuser {
            true => of_14,
            false => "",
        };
        match self.exists {
            false => Some(format!("CREATE ROLE {name} LOGIN{more}")),
            true => (!more.is_empty()).then(|| format!("ALTER ROLE {name}{more}")),
        }
        .map(Statement::plain)
    }

    /// What it needs beside that to write as the source's roles, and what an operator should know.
    pub(super) fn grants(
        &self,
        agent: &str,
        roles: &[Role],
        server: &Server,
        row_security: bool,
    ) -> (Vec<Statement>, Option<String>) {
        let name = quote_ident(agent);
        if self.superuser {
            let warning = (server.version >= 150_000).then(|| {
                format!(
                    "role {name} is a superuser on the replica, and need not be: ALTER ROLE {name} NOSUPERUSER, then \
                     `dr-agent init` again"
                )
            });
            return (Vec::new(), warning);
        }
        let mut grants = Vec::new();
        let mut warning = None;
        if server.version < 150_000 {
            if !server.superuser {
                warning = Some(format!(
                    "PostgreSQL 14 lets only a superuser set session_replication_role; run ALTER ROLE {name} SUPERUSER on \
                     the replica"
                ));
            }
        } else if !self.sets_replication_role {
            grants.push(format!(
                "GRANT SET ON PARAMETER session_replication_role TO {name}"
            ));
        }
        if row_security && server.superuser && !self.bypass_rls {
            grants.push(format!("ALTER ROLE {name} BYPASSRLS"));
        }
        let mut grants: Vec<Statement> = grants.into_iter().map(Statement::plain).collect();
        grants.extend(self.memberships(agent, roles, server.version));
        (grants, warning)
    }

    /// What makes it a member of these roles, so that it may act as them and give them things.
    pub(super) fn memberships(&self, agent: &str, roles: &[Role], version: i32) -> Vec<Statement> {
        if self.superuser {
            return Vec::new();
        }
        let name = quote_ident(agent);
        let how = match version >= 160_000 {
            true => " WITH INHERIT TRUE, SET TRUE",
            false => "",
        };
        let roles = roles
            .iter()
            .filter(|role| !role.superuser && role.name != agent);
        let lacking = roles.filter(|role| !self.member_of.contains(&role.name));
        lacking
            .map(|role| {
                Statement::plain(format!("GRANT {} TO {name}{how}", quote_ident(&role.name)))
            })
            .collect()
    }
}

/// Creates the extensions of the source that only a superuser may, in schemas of the agent's.
///
/// # Errors
/// When a server refuses.
pub(super) async fn untrusted_extensions(
    source: &Client,
    admin: &Client,
    inside: Option<&Client>,
    agent: &str,
) -> Result<Vec<Statement>, SetupError> {
    // Their own schema comes with some of them.
    const USED: &str = "
        SELECT extname::text, nspname::text,
               EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = n.oid AND d.deptype = 'e')
               OR nspname IN ('public', 'pg_catalog')
          FROM pg_extension e JOIN pg_namespace n ON n.oid = extnamespace ORDER BY e.oid";
    const UNTRUSTED: &str = "
        SELECT DISTINCT name::text FROM pg_available_extension_versions
         WHERE name = ANY ($1::text[]) AND superuser AND NOT trusted";
    const THERE: &str = "SELECT extname::text FROM pg_extension";
    let of = |side| SetupError::sql(side, "look at the extensions");
    let used = source.query(USED, &[]).await;
    let used = used.map_err(|error| of(Side::Source)(error.into()))?;
    let names: Vec<&str> = used.iter().map(|row| row.get(0)).collect();
    let untrusted = admin.query(UNTRUSTED, &[&names]).await;
    let untrusted = untrusted.map_err(|error| of(Side::Replica)(error.into()))?;
    let mut wanted: Vec<String> = untrusted.iter().map(|row| row.get(0)).collect();
    if let Some(inside) = inside {
        let there = inside.query(THERE, &[]).await;
        let there = there.map_err(|error| of(Side::Replica)(error.into()))?;
        wanted.retain(|name| !there.iter().any(|row| row.get::<_, &str>(0) == name));
    }
    let used = used
        .iter()
        .filter(|row| wanted.iter().any(|name| name == row.get::<_, &str>(0)));
    let create = used.flat_map(|row| {
        let (name, schema) = (quote_ident(row.get(0)), quote_ident(row.get(1)));
        let place = (!row.get::<_, bool>(2)).then(|| {
            format!(
                "CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {}",
                quote_ident(agent)
            )
        });
        let within = place
            .as_ref()
            .map(|_| format!(" WITH SCHEMA {schema}"))
            .unwrap_or_default();
        let extension = format!("CREATE EXTENSION IF NOT EXISTS {name}{within}");
        place.into_iter().chain([extension])
    });
    Ok(create.map(Statement::plain).collect())
}

/// Whether row security is in force anywhere in this database.
pub(super) async fn has_row_security(client: &Client) -> Result<bool, PgError> {
    const SQL: &str = "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relrowsecurity)";
    Ok(client.query_one(SQL, &[]).await?.get(0))
}

/// What the source needs: schema and publication, and for an agent that runs with fewer rights than
/// `init` its role, its grants and its ownership.
pub(super) async fn source_statements(
    config: &Config,
    client: &Client,
    found: &source::SourceFacts,
    wanted: &Wanted,
    stream: &StreamName,
) -> Result<Vec<Statement>, SetupError> {
    let doing = "look at the agent's role";
    let sql = |error| SetupError::sql(Side::Source, doing)(error);
    let agent = config.source.conninfo.user();
    let agent_sql = quote_ident(agent);
    let rights = Agent::observe(client, agent).await.map_err(sql)?;
    let mut statements = Vec::new();
    if !rights.exists {
        statements.push(format!("CREATE ROLE {agent_sql} LOGIN REPLICATION"));
    } else if !rights.replication && !rights.superuser {
        statements.push(format!("ALTER ROLE {agent_sql} REPLICATION"));
    }
    let is_other = agent != found.role && !rights.superuser;
    if is_other {
        for group in ["pg_read_all_data", "pg_monitor"] {
            if !rights.member_of.iter().any(|name| name == group) {
                statements.push(format!("GRANT {group} TO {agent_sql}"));
            }
        }
        let row_security = has_row_security(client).await.map_err(sql)?;
        if row_security && !rights.bypass_rls {
            // Otherwise the copy of a table with row security fails.
            statements.push(format!("ALTER ROLE {agent_sql} BYPASSRLS"));
        }
    }
    if is_other {
        let owners = owners_lacking(client, agent, wanted).await.map_err(sql)?;
        statements.extend(grants_of_owners(&owners, &agent_sql, found.version));
    }
    let said = found.said(stream);
    let pieces = found.pieces(stream, wanted)?;
    statements.extend(pieces.iter().map(|piece| piece.sql(&said)));
    if is_other {
        let owners = source::owners(client, stream).await.map_err(sql)?;
        if owners.schema.as_deref() != Some(agent) {
            statements.push(own_schema(agent));
        }
        if owners.publication.as_deref() != Some(agent) {
            // In one transaction: another owner of it is nothing that was missed.
            statements.push(format!(
                "BEGIN;\n{};\nALTER PUBLICATION {} OWNER TO {agent_sql};\n{};\nCOMMIT",
                listing::note(stream),
                quote_ident(stream.as_str()),
                listing::acknowledge(stream)
            ));
        }
    }
    // Last: what writes belongs to whoever owns what it writes to.
    let facts = capture::observe(client).await.map_err(sql)?;
    statements.extend(facts.statement(config.source.ddl));
    Ok(statements.into_iter().map(Statement::plain).collect())
}

/// A role that owns published tables, and in whose name the agent does not act.
struct Owner {
    name: String,
    superuser: bool,
}

/// Only its owner may publish a table, tables that are created later included.
async fn owners_lacking(
    client: &Client,
    agent: &str,
    wanted: &Wanted,
) -> Result<Vec<Owner>, PgError> {
    // A role that does not exist yet has no rights at all.
    const SQL: &str = "
        SELECT DISTINCT r.rolname::text, r.rolsuper
          FROM unnest($2::text[], $3::text[]) AS wanted (s, t)
          JOIN pg_namespace n ON n.nspname = wanted.s
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.t
          JOIN pg_roles r ON r.oid = c.relowner
         WHERE r.rolname <> $1 AND n.nspname <> 'dr_agent'
           AND NOT coalesce((SELECT pg_has_role(a.oid, r.oid, 'USAGE') FROM pg_roles a WHERE a.rolname = $1), false)
         ORDER BY 1";
    let tables = wanted.published.iter().map(|table| &table.name);
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .map(|name| (name.schema.as_str(), name.name.as_str()))
        .unzip();
    let rows = client.query(SQL, &[&agent, &schemas, &names]).await?;
    Ok(rows
        .iter()
        .map(|row| Owner {
            name: row.get(0),
            superuser: row.get(1),
        })
        .collect())
}

fn grants_of_owners(owners: &[Owner], agent_sql: &str, version: i32) -> Vec<String> {
    let inherit = match version >= 160_000 {
        true => " WITH INHERIT TRUE",
        false => "",
    };
    // Membership of a superuser is the right to become one; `check` says what becomes of its tables.
    let owners = owners.iter().filter(|owner| !owner.superuser);
    owners
        .map(|owner| format!("GRANT {} TO {agent_sql}{inherit}", quote_ident(&owner.name)))
        .collect()
}

/// Gives schema `dr_agent`, its tables and its function to the agent.
pub(super) fn own_schema(agent: &str) -> String {
    let ident = quote_ident(agent);
    let literal = quote_literal(agent);
    format!(
        "DO $own$
DECLARE
    object text;
BEGIN
    ALTER SCHEMA dr_agent OWNER TO {ident};
    FOR object IN
        SELECT format('TABLE dr_agent.%I', relname) FROM pg_class
         WHERE relnamespace = 'dr_agent'::regnamespace AND relkind = 'r'
        UNION ALL
        SELECT 'FUNCTION ' || oid::regprocedure FROM pg_proc
         WHERE pronamespace = 'dr_agent'::regnamespace AND prorettype <> 'event_trigger'::regtype
    LOOP
        EXECUTE format('ALTER %s OWNER TO %I', object, {literal});
    END LOOP;
END
$own$"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(statements: &[Statement]) -> Vec<String> {
        statements.iter().map(ToString::to_string).collect()
    }

    fn owner(name: &str, superuser: bool) -> Role {
        Role::testing(name, superuser)
    }

    fn of(version: i32) -> Server {
        let mut server = Server::testing(version, "postgres");
        server.superuser = true;
        server
    }

    #[test]
    fn the_agent_is_made_no_superuser_but_on_14() {
        let create = |version| {
            Agent::default()
                .create("dr", &of(version))
                .unwrap()
                .to_string()
        };
        assert_eq!(create(150_004), "CREATE ROLE \"dr\" LOGIN");
        assert!(create(140_011).contains("SUPERUSER"));
        let there = Agent {
            exists: true,
            ..Agent::default()
        };
        assert!(there.create("dr", &of(180_000)).is_none());
    }

    #[test]
    fn it_may_give_things_to_every_owner_that_is_no_superuser_with_the_options_of_its_version() {
        let roles = [
            owner("app", false),
            owner("postgres", true),
            owner("known", false),
        ];
        let agent = Agent {
            exists: true,
            member_of: vec!["known".to_owned()],
            ..Agent::default()
        };
        let set = "GRANT SET ON PARAMETER session_replication_role TO \"dr\"";
        let (grants, _) = agent.grants("dr", &roles, &of(150_000), false);
        assert_eq!(shown(&grants), [set, "GRANT \"app\" TO \"dr\""]);
        let (grants, _) = agent.grants("dr", &roles, &of(160_000), true);
        assert_eq!(
            shown(&grants),
            [
                set,
                "ALTER ROLE \"dr\" BYPASSRLS",
                "GRANT \"app\" TO \"dr\" WITH INHERIT TRUE, SET TRUE"
            ]
        );
    }

    #[test]
    fn a_superuser_of_an_earlier_set_up_is_told() {
        let agent = Agent {
            exists: true,
            superuser: true,
            ..Agent::default()
        };
        let (grants, warning) = agent.grants("dr", &[owner("app", false)], &of(170_000), true);
        assert!(grants.is_empty() && warning.unwrap().contains("NOSUPERUSER"));
    }
}
