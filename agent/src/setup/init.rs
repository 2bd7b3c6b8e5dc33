//! `dr-agent init`: the privileged part of the set-up, planned from what is there.
//!
//! [`plan`] only reads and answers with SQL; [`Plan::execute`] runs it. It uses the same observations
//! and the same statements as [`super::prepare`], and adds what only a privileged role can give:
//! the agent's own roles, their grants, and ownership of what the agent must be able to alter.
//!
//! # Invariants
//! - What is there is left alone: run again, it plans nothing, or only what changed.
//! - No password is set or shown. A role made here cannot log in by password until somebody gives
//!   it one.
//!
//! # What it does not do
//! It creates no slot and copies nothing; `run` does.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::identity::Mismatch;
use super::locale::{self, Locale};
use super::publication::Wanted;
use super::role::{self, Statement};
use super::source_side::observe_slot;
use super::table_sync::Missed;
use super::{lock, replica, schema, source, table_sync};
use crate::catalog::{TableName, quote_ident, quote_literal};
use crate::config::{Config, Route};
use crate::listed;
use crate::pg::{ConnInfo, PgError};
use crate::stream::StreamName;

/// How long a replica may take to answer that may be out of reach for good.
const REPLICA_WITHIN: Duration = Duration::from_secs(10);

/// Whom `init` connects as: roles with more rights than the agent will run with.
#[derive(Clone, Debug)]
pub struct Privileged {
    /// On the source.
    pub source: ConnInfo,
    /// On the replica.
    pub replica: ConnInfo,
}

/// The SQL that one database needs on both sides.
#[derive(Debug)]
pub struct Plan {
    database: String,
    stream: StreamName,
    /// In the source's database.
    source: Vec<Statement>,
    /// Whether the replica was looked at.
    with_replica: bool,
    /// On the replica's server, outside the database.
    replica_server: Vec<Statement>,
    /// In the replica's database.
    replica: Vec<Statement>,
    /// Copied tables that are to be listed again, and are emptied first.
    missed: BTreeMap<TableName, Missed>,
    locale: Option<Locale>,
    warnings: Vec<String>,
}

/// The replica, as far as a plan looks at it.
struct Seen {
    admin: Client,
    server: replica::Server,
    inside: Option<Client>,
    known: replica::Known,
}

async fn see(
    privileged: &Privileged,
    database: &str,
    stream: &StreamName,
) -> Result<Seen, SetupError> {
    let admin = replica::open(&privileged.replica, stream).await?;
    let server = replica::Server::observe(&admin, database).await?;
    let inside = if server.has_database {
        Some(replica::open(&privileged.replica.with_dbname(database), stream).await?)
    } else {
        None
    };
    let known = match &inside {
        Some(client) => replica::known(client, stream).await?,
        None => replica::Known::default(),
    };
    Ok(Seen {
        admin,
        server,
        inside,
        known,
    })
}

/// The same; none where the sites do not see one another, as they need not under route `kinesis`.
async fn see_if_in_reach(
    config: &Config,
    privileged: &Privileged,
    database: &str,
    stream: &StreamName,
) -> Result<Option<Seen>, SetupError> {
    let seeing = see(privileged, database, stream);
    if config.route == Route::Direct {
        return seeing.await.map(Some);
    }
    match tokio::time::timeout(REPLICA_WITHIN, seeing).await {
        Ok(Ok(seen)) => Ok(Some(seen)),
        Ok(Err(error)) if error.is_out_of_reach(Side::Replica) => Ok(None),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Reads both sides of one database and plans what is missing. Under route `kinesis` the replica may be out of reach.
pub async fn plan(
    config: &Config,
    privileged: &Privileged,
    database: &str,
) -> Result<Plan, SetupError> {
    let stream = config.stream(database);
    let seen = Box::pin(see_if_in_reach(config, privileged, database, &stream)).await?;

    let client = source::open(&privileged.source.with_dbname(database), &stream).await?;
    let found = source::observe(&client, &stream).await?;
    found.require()?;
    if let Some(seen) = &seen {
        let source = privileged.source.to_string();
        seen.server.require(&source, &found.started_at)?;
    }

    let mut wanted = found.wanted(config);
    let mut plan = Plan {
        database: database.to_owned(),
        stream: stream.clone(),
        source: Vec::new(),
        with_replica: seen.is_some(),
        replica_server: Vec::new(),
        replica: Vec::new(),
        missed: BTreeMap::new(),
        locale: None,
        warnings: Vec::new(),
    };
    let refused = wanted.refused();
    let begun = seen.as_ref().filter(|seen| seen.known.progress.is_some());
    match begun.and_then(|seen| seen.inside.as_ref()) {
        Some(inside) => {
            found.require_unaltered(&stream)?;
            let rows = table_sync::rows(inside, &stream).await?;
            let missed = found.missed(&wanted, &rows);
            plan.list_again(&client, &mut wanted, missed).await?;
        }
        None if !refused.is_empty() => return Err(SetupError::Keyless(refused)),
        None => found.require_listing(&stream)?,
    }
    plan.source = source_statements(config, &client, &found, &wanted, &stream).await?;
    match seen {
        Some(seen) => plan.plan_replica(config, &seen, &client, found.version).await?,
        None => plan.warnings.push(
            "the replica cannot be reached from here, and its half was left out: `dr-agent apply` beside it does what its role may"
                .to_owned(),
        ),
    }
    Ok(plan)
}

impl Plan {
    /// Tables that were off the list are emptied before they are listed again, which must not
    /// happen under a running agent.
    async fn list_again(
        &mut self,
        source: &Client,
        wanted: &mut Wanted,
        missed: BTreeMap<TableName, Missed>,
    ) -> Result<(), SetupError> {
        if missed.is_empty() {
            return Ok(());
        }
        let slot = observe_slot(source, &self.stream).await?;
        if let Some(pid) = slot.and_then(|slot| slot.active_pid) {
            return Err(SetupError::Mismatch {
                database: self.database.clone(),
                source: Mismatch::SlotActive {
                    slot: self.stream.clone(),
                    pid,
                },
            });
        }
        wanted
            .published
            .retain(|table| !missed.contains_key(&table.name));
        self.missed = missed;
        Ok(())
    }

    async fn plan_replica(
        &mut self,
        config: &Config,
        seen: &Seen,
        source: &Client,
        source_version: i32,
    ) -> Result<(), SetupError> {
        let (admin, server, inside) = (&seen.admin, &seen.server, seen.inside.as_ref());
        let doing = "look at the agent's role";
        let agent = config.replica.conninfo.user();
        let agent_sql = quote_ident(agent);
        let rights = Agent::observe(admin, agent)
            .await
            .map_err(SetupError::sql(Side::Replica, doing))?;
        let mut on_server = Vec::new();
        let is_other = agent != server.role && !rights.superuser;
        let attributes = if is_other && server.superuser {
            // Said in the plan, so that whoever reads it knows why.
            " LOGIN SUPERUSER /* it writes as every owner, past triggers and row security */"
        } else {
            " LOGIN"
        };
        if !rights.exists {
            on_server.push(Statement::plain(format!(
                "CREATE ROLE {agent_sql}{attributes}"
            )));
        } else if is_other && server.superuser {
            on_server.push(Statement::plain(format!(
                "ALTER ROLE {agent_sql}{attributes}"
            )));
        }
        let roles = role::of_source(source).await?;
        let present = role::present(admin).await?;
        let others: Vec<role::Role> = roles
            .into_iter()
            .filter(|role| role.name != agent)
            .collect();
        on_server.extend(role::statements(&others, &present));
        let managed = is_other && !server.superuser;
        if managed {
            on_server.extend(self.grants(&others, server, &rights, &agent_sql));
        }
        if inside.is_none() {
            let locale = locale::locale(source, source_version)
                .await
                .map_err(SetupError::sql(Side::Source, "read the locale"))?;
            let candidates = locale.create_database(&self.database, server.version);
            on_server.extend(candidates.into_iter().take(1).map(Statement::plain));
            self.locale = Some(locale);
        }
        let (has_schema, owner) = match inside {
            Some(client) => Agent::schema(client)
                .await
                .map_err(SetupError::sql(Side::Replica, doing))?,
            None => (false, None),
        };
        self.replica_server = on_server;
        if !has_schema {
            self.replica.push(Statement::plain(schema::statements()));
        }
        if managed && owner.as_deref() != Some(agent) {
            self.replica.push(Statement::plain(own_schema(agent)));
        }
        let guarded = match inside {
            Some(client) => replica::is_guarded(client).await?,
            None => false,
        };
        if !guarded {
            self.replica
                .push(Statement::plain(replica::guard_statement(&self.database)));
        }
        Ok(())
    }

    /// What an agent that cannot be a superuser, as on a managed service, needs to write as the
    /// source's roles.
    fn grants(
        &mut self,
        roles: &[role::Role],
        server: &replica::Server,
        rights: &Agent,
        agent_sql: &str,
    ) -> Vec<Statement> {
        let mut grants = Vec::new();
        if server.version < 150_000 {
            self.warnings.push(format!(
                "PostgreSQL 14 lets only a superuser set session_replication_role; run ALTER ROLE \
                 {agent_sql} SUPERUSER on the replica"
            ));
        } else if !rights.sets_replication_role {
            grants.push(Statement::plain(format!(
                "GRANT SET ON PARAMETER session_replication_role TO {agent_sql}"
            )));
        }
        for role in roles {
            // Membership of a superuser is the right to become one.
            if !role.superuser && !rights.member_of.contains(&role.name) {
                grants.push(Statement::plain(format!(
                    "GRANT {} TO {agent_sql}",
                    quote_ident(&role.name)
                )));
            }
        }
        grants
    }

    /// Runs what was planned. Returns what the operator should know.
    pub async fn execute(&self, privileged: &Privileged) -> Result<Vec<String>, SetupError> {
        let mut warnings = self.warnings.clone();
        if self.with_replica {
            warnings.extend(self.execute_on_replica(privileged).await?);
        }
        let source =
            source::open(&privileged.source.with_dbname(&self.database), &self.stream).await?;
        for statement in &self.source {
            execute(&source, Side::Source, statement).await?;
        }
        Ok(warnings)
    }

    async fn execute_on_replica(&self, privileged: &Privileged) -> Result<Vec<String>, SetupError> {
        let mut warnings = Vec::new();
        let admin = replica::open(&privileged.replica, &self.stream).await?;
        let server = replica::Server::observe(&admin, &self.database).await?;
        for statement in &self.replica_server {
            if statement.sql.starts_with("CREATE DATABASE ") {
                if let Some(locale) = &self.locale {
                    warnings.extend(
                        replica::create_database(&admin, &server, &self.database, locale).await?,
                    );
                }
                continue;
            }
            execute(&admin, Side::Replica, statement).await?;
        }
        let mut inside = replica::open(
            &privileged.replica.with_dbname(&self.database),
            &self.stream,
        )
        .await?;
        lock::take(&inside, Side::Replica, &self.stream).await?;
        replica::known(&inside, &self.stream).await?;
        for statement in &self.replica {
            execute(&inside, Side::Replica, statement).await?;
        }
        table_sync::reset(&mut inside, &self.stream, &self.missed).await?;
        Ok(warnings)
    }

    /// Whether everything is there.
    pub fn is_empty(&self) -> bool {
        self.source.is_empty() && self.replica_server.is_empty() && self.replica.is_empty()
    }

    /// What the operator should know before running it.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl fmt::Display for Plan {
    /// A script for `psql` on each side, without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let database = quote_ident(&self.database);
        writeln!(f, "-- On the source, in database {database}:")?;
        show(f, &self.source)?;
        if !self.with_replica {
            return Ok(());
        }
        writeln!(f, "\n-- On the replica's server:")?;
        show(f, &self.replica_server)?;
        writeln!(f, "\n-- On the replica, in database {database}:")?;
        show(f, &self.replica)?;
        for (table, missed) in &self.missed {
            let why = match missed {
                Missed::Changes => {
                    "was not in the publication for a while: it is emptied and copied again"
                }
                Missed::All => {
                    "is another table under the same name: it is dropped (or emptied, where something depends on it) and copied"
                }
            };
            writeln!(f, "-- {table} {why}")?;
        }
        Ok(())
    }
}

fn show(f: &mut fmt::Formatter<'_>, statements: &[Statement]) -> fmt::Result {
    if statements.is_empty() {
        return writeln!(f, "-- nothing to do");
    }
    for statement in statements {
        let text = statement.to_string();
        let text = text.trim_end().trim_end_matches(';');
        writeln!(f, "{text};")?;
    }
    Ok(())
}

async fn execute(client: &Client, side: Side, statement: &Statement) -> Result<(), SetupError> {
    let Err(error) = client.batch_execute(&statement.sql).await else {
        return Ok(());
    };
    let error = PgError::from(error);
    match error.sqlstate() {
        // duplicate_object: the plan of another database named the same role.
        Some("42710") => Ok(()),
        _ => Err(SetupError::sql(side, &source::title(&statement.shown))(
            error,
        )),
    }
}

/// The agent's own role on one side, as it is.
#[derive(Debug, Default)]
struct Agent {
    exists: bool,
    superuser: bool,
    replication: bool,
    bypass_rls: bool,
    sets_replication_role: bool,
    member_of: Vec<String>,
}

impl Agent {
    async fn observe(client: &Client, name: &str) -> Result<Self, PgError> {
        const SQL: &str = "
            SELECT rolsuper, rolreplication, rolbypassrls,
                   ARRAY(SELECT g.rolname::text FROM pg_auth_members m
                           JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid),
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
    async fn schema(client: &Client) -> Result<(bool, Option<String>), PgError> {
        const SQL: &str = "
            SELECT (SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid
                       AND c.relname IN ('progress', 'stream', 'table_sync', 'promotion',
                                         'schema_sync', 'heartbeat', 'sequence_state',
                                         'listed', 'coverage')) = 9
                   AND EXISTS (SELECT 1 FROM pg_proc p
                                WHERE p.pronamespace = n.oid AND p.proname = 'advance'),
                   pg_get_userbyid(n.nspowner)::text
              FROM pg_namespace n WHERE n.nspname = 'dr_agent'";
        let row = client.query_opt(SQL, &[]).await?;
        Ok(row.map_or((false, None), |row| (row.get(0), row.get(1))))
    }
}

/// What the source needs: schema and publication, and for an agent that runs with fewer rights than
/// `init` its role, its grants and its ownership.
async fn source_statements(
    config: &Config,
    client: &Client,
    found: &source::Observed,
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
        const ROW_SECURITY: &str = "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relrowsecurity)";
        let row_security = client.query_one(ROW_SECURITY, &[]).await;
        let row_security: bool = row_security.map_err(|error| sql(error.into()))?.get(0);
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
                listed::note(stream),
                quote_ident(stream.as_str()),
                listed::acknowledge(stream)
            ));
        }
    }
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
fn own_schema(agent: &str) -> String {
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
         WHERE pronamespace = 'dr_agent'::regnamespace
    LOOP
        EXECUTE format('ALTER %s OWNER TO %I', object, {literal});
    END LOOP;
END
$own$"
    )
}
