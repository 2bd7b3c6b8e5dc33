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

use super::agent_role::{self, Agent, own_schema};
use super::error::{SetupError, Side};
use super::identity::{self, Observed};
use super::mismatch::Mismatch;
use super::role::{self, Statement};
use super::set_back::{self, Missed};
use super::source_side::observe_slot;
use super::target::{self, HalfLoaded, TargetDatabase};
use super::undo::Undo;
use super::{direct, lock, replica, schema, sending, source, source_side};
use crate::catalog::publication::Wanted;
use crate::config::{Config, Route};
use crate::copy::locale::{self, Locale};
use crate::error::chain;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError};

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
    /// Where it is run.
    at: Privileged,
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
    /// What is taken back where not all of it succeeds: on the source, in the replica's database, of its roles.
    undo: (Undo, Undo, Undo),
}

/// The replica, as far as a plan looks at it.
struct SeenReplica {
    admin: Client,
    server: replica::Server,
    inside: Option<Client>,
    known: replica::Known,
    target: TargetDatabase,
}

async fn see(
    privileged: &Privileged,
    database: &str,
    stream: &StreamName,
) -> Result<SeenReplica, SetupError> {
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
    let target = match &inside {
        Some(client) => target::observe(client, &server, stream).await?,
        None => target::of_a_new_database(&admin, &server).await?,
    };
    Ok(SeenReplica {
        admin,
        server,
        inside,
        known,
        target,
    })
}

/// The same; none where the sites do not see one another, as they need not under route `kinesis`.
async fn see_if_in_reach(
    config: &Config,
    privileged: &Privileged,
    database: &str,
    stream: &StreamName,
) -> Result<Option<SeenReplica>, SetupError> {
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

    judge(config, database, &stream, (&client, &found), seen.as_ref()).await?;

    let mut wanted = found.wanted(config);
    let of_source = Undo::of_source(&client, &stream, &found, &wanted).await?;
    let of_replica = seen
        .as_ref()
        .map(|seen| Undo::of_replica(database, &stream, &seen.target));
    let mut plan = Plan {
        database: database.to_owned(),
        stream: stream.clone(),
        at: privileged.clone(),
        source: Vec::new(),
        with_replica: seen.is_some(),
        replica_server: Vec::new(),
        replica: Vec::new(),
        missed: BTreeMap::new(),
        locale: None,
        warnings: Vec::new(),
        undo: (of_source, of_replica.unwrap_or_default(), Undo::default()),
    };
    let refused = wanted.refused();
    let begun = seen.as_ref().filter(|seen| seen.known.progress.is_some());
    match begun.and_then(|seen| seen.inside.as_ref()) {
        Some(inside) => {
            found.require_unaltered(&stream)?;
            let rows = replica::synced_tables(inside, &stream).await?;
            let missed = found.missed(&wanted, &rows);
            plan.list_again(&client, &mut wanted, missed).await?;
        }
        None if !refused.is_empty() => return Err(SetupError::Keyless(refused)),
        None => found.require_listing(&stream)?,
    }
    plan.source = agent_role::source_statements(config, &client, &found, &wanted, &stream).await?;
    match seen {
        Some(seen) => plan.plan_replica(config, &seen, &client, found.version).await?,
        None => plan.warnings.push(
            "the replica cannot be reached from here, and its half was left out: `dr-agent apply` beside it does what its role may"
                .to_owned(),
        ),
    }
    Ok(plan)
}

/// Refuses what `run` would refuse: `init` must not prepare what cannot begin, and least of all somebody else's server.
async fn judge(
    config: &Config,
    database: &str,
    stream: &StreamName,
    (source, found): (&Client, &source::SourceFacts),
    seen: Option<&SeenReplica>,
) -> Result<(), SetupError> {
    source::refuse_replica(source).await?;
    if let Some(seen) = seen.filter(|seen| seen.known.progress.is_none()) {
        let judged = (&seen.target, HalfLoaded::Removed);
        target::contents(database, stream, &seen.known, judged)?;
    }
    let slot = observe_slot(source, stream).await?;
    let noted = source_side::note(source, stream).await?;
    let (cluster, source_lsn) = source::identify(source).await?;
    let verdict = match (config.route == Route::Direct, seen) {
        (true, Some(seen)) => {
            let mut beats = (direct::beats(source, Side::Source).await?, None);
            if let Some(inside) = &seen.inside {
                beats.1 = direct::beats(inside, Side::Replica).await?;
            }
            identity::verdict(&Observed {
                stream: stream.clone(),
                database: database.to_owned(),
                source: cluster,
                source_lsn,
                slot,
                noted: noted.map(|noted| noted.began),
                noted_timeline: noted.map(|noted| noted.cluster.timeline),
                since: noted.and_then(|noted| noted.since),
                recorded: seen.known.recorded,
                applied: seen.known.progress.map(|progress| progress.end_lsn),
                branches: source::branches(source, &cluster, seen.known.recorded.as_ref()).await?,
                beats,
            })
        }
        _ => sending::verdict(stream, database, slot.as_ref(), noted.as_ref(), &cluster),
    };
    match verdict {
        // It is set up and runs.
        Ok(_) | Err(Mismatch::SlotActive { .. }) => {}
        Err(source) => {
            return Err(SetupError::Mismatch {
                database: database.to_owned(),
                source,
            });
        }
    }
    match seen.is_none_or(|seen| seen.known.progress.is_none()) {
        true => source::require_slots(source, stream).await,
        false => found.require_unaltered(stream),
    }
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
        seen: &SeenReplica,
        source: &Client,
        source_version: i32,
    ) -> Result<(), SetupError> {
        let (admin, server, inside) = (&seen.admin, &seen.server, seen.inside.as_ref());
        let doing = "look at the agent's role";
        let agent = config.replica.conninfo.user();
        let rights = Agent::observe(admin, agent)
            .await
            .map_err(SetupError::sql(Side::Replica, doing))?;
        let is_other = agent != server.role;
        let mut on_server = Vec::new();
        on_server.extend(rights.create(agent, server).filter(|_| is_other));
        let roles = role::of_source(source).await?;
        let present = role::present(admin).await?;
        let others: Vec<role::Role> = roles
            .into_iter()
            .filter(|role| role.name != agent)
            .collect();
        on_server.extend(role::statements(&others, &present));
        self.undo.2 = Undo::of_roles(&role::missing(&others, agent, &present));
        if is_other {
            let row_security = agent_role::has_row_security(source)
                .await
                .map_err(SetupError::sql(Side::Source, "look for row security"))?;
            let (grants, warning) = rights.grants(agent, &others, server, row_security);
            on_server.extend(grants);
            self.warnings.extend(warning);
        }
        let managed = is_other && !rights.superuser;
        // The agent guards the database, which takes its ownership, or that of a role that it is a member of.
        let acts_as = |owner: &str| {
            let mut theirs = others.iter().filter(|role| !role.superuser);
            owner == agent || theirs.any(|role| role.name == owner)
        };
        if inside.is_none() {
            let locale = locale::locale(source, source_version)
                .await
                .map_err(SetupError::sql(Side::Source, "read the locale"))?;
            let candidates = locale.create_database(&self.database, server.version);
            on_server.extend(candidates.into_iter().take(1).map(Statement::plain));
            let owner = match (is_other, acts_as(&locale.owner)) {
                (true, true) => Some(locale.owner.as_str()),
                (true, false) => Some(agent),
                (false, _) => server.superuser.then_some(locale.owner.as_str()),
            };
            on_server
                .extend(owner.map(|owner| {
                    Statement::plain(replica::owner_statement(&self.database, owner))
                }));
            self.locale = Some(locale);
        } else if managed && !acts_as(&seen.target.owner) {
            on_server.push(Statement::plain(replica::owner_statement(
                &self.database,
                agent,
            )));
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
        if managed && server.superuser {
            let made = agent_role::untrusted_extensions(source, admin, inside, agent).await?;
            self.replica.extend(made);
        }
        if managed && owner.as_deref() != Some(agent) {
            self.replica.push(Statement::plain(own_schema(agent)));
        }
        let guarded = match inside {
            Some(client) => replica::is_guarded(client).await?,
            None => false,
        };
        // `run` decides about this one.
        if !guarded && self.database != replica::MAINTENANCE {
            self.replica
                .push(Statement::plain(replica::guard_statement(&self.database)));
        }
        Ok(())
    }

    /// Runs what was planned, or nothing of it. Returns what the operator should know.
    pub async fn execute(&self, privileged: &Privileged) -> Result<Vec<String>, SetupError> {
        let mut warnings = self.warnings.clone();
        let source =
            source::open(&privileged.source.with_dbname(&self.database), &self.stream).await?;
        let mut executing = self.execute_on_source(&source).await;
        if executing.is_ok() && self.with_replica {
            executing = match self.execute_on_replica(privileged).await {
                Ok(more) => {
                    warnings.extend(more);
                    Ok(())
                }
                Err(error) => Err(error),
            };
        }
        match executing {
            Ok(()) => Ok(warnings),
            Err(error) => {
                self.undo.0.take_back(&source, Side::Source).await;
                Err(error)
            }
        }
    }

    async fn execute_on_source(&self, source: &Client) -> Result<(), SetupError> {
        for statement in &self.source {
            execute(source, Side::Source, statement).await?;
        }
        Ok(())
    }

    async fn execute_on_replica(&self, privileged: &Privileged) -> Result<Vec<String>, SetupError> {
        let admin = replica::open(&privileged.replica, &self.stream).await?;
        let mut created = false;
        let executing = self.execute_there(&admin, privileged, &mut created).await;
        if executing.is_err() {
            if created {
                replica::drop_database(&admin, &self.database).await;
            }
            self.undo.2.take_back(&admin, Side::Replica).await;
        }
        executing
    }

    async fn execute_there(
        &self,
        admin: &Client,
        privileged: &Privileged,
        created: &mut bool,
    ) -> Result<Vec<String>, SetupError> {
        let mut warnings = Vec::new();
        let server = replica::Server::observe(admin, &self.database).await?;
        for statement in &self.replica_server {
            if statement.sql.starts_with("CREATE DATABASE ") {
                if let Some(locale) = &self.locale {
                    let database =
                        replica::create_database(admin, &server, &self.database, locale).await?;
                    *created = database.by_us;
                    warnings.extend(database.warning);
                }
                continue;
            }
            match execute(admin, Side::Replica, statement).await {
                // A role of a managed service gives what it may.
                Err(error) if !server.superuser && statement.sql.starts_with("GRANT ") => {
                    warnings.push(format!("{}; it is: {statement}", chain(&error)));
                }
                executed => executed?,
            }
        }
        let there = &privileged.replica.with_dbname(&self.database);
        let mut inside = replica::open(there, &self.stream).await?;
        lock::take(&inside, Side::Replica, &self.stream).await?;
        replica::known(&inside, &self.stream).await?;
        let executing = self.execute_inside(&mut inside).await;
        if executing.is_err() {
            self.undo.1.take_back(&inside, Side::Replica).await;
        }
        executing.map(|()| warnings)
    }

    async fn execute_inside(&self, inside: &mut Client) -> Result<(), SetupError> {
        for statement in &self.replica {
            execute(inside, Side::Replica, statement).await?;
        }
        set_back::reset(inside, &self.stream, &self.missed).await
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
    /// A script for `psql`, without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let database = &self.database;
        writeln!(f, "\\set ON_ERROR_STOP on")?;
        let at = self.at.source.with_dbname(database);
        let to_source = format!("On the source, in database {database}:");
        show(f, &to_source, &at, "SET lock_timeout = '2s'", &self.source)?;
        if !self.with_replica {
            return Ok(());
        }
        let on_server = "On the replica's server:";
        show(f, on_server, &self.at.replica, OPEN, &self.replica_server)?;
        let at = self.at.replica.with_dbname(database);
        let in_database = format!("On the replica, in database {database}:");
        show(f, &in_database, &at, OPEN, &self.replica)?;
        for (table, missed) in &self.missed {
            let why = match missed {
                Missed::Changes => {
                    "was not in the publication for a while: init empties it, and it is copied again"
                }
                Missed::All => {
                    "is another table under the same name: init drops it (or empties it, where something depends on it), and it is copied"
                }
            };
            writeln!(f, "-- {} {why}", one_line(&table.to_string()))?;
        }
        Ok(())
    }
}

/// What lets a session past the guard.
const OPEN: &str = "SET default_transaction_read_only = off";

/// A comment must end with its line.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

fn show(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    at: &ConnInfo,
    first: &str,
    statements: &[Statement],
) -> fmt::Result {
    writeln!(f, "\n-- {}", one_line(title))?;
    if statements.is_empty() {
        return writeln!(f, "-- nothing to do");
    }
    // psql takes off one layer of quotes.
    let at = at
        .without_password()
        .replace('\\', "\\\\")
        .replace('\'', "\\'");
    writeln!(f, "\\connect '{at}'\n{first};")?;
    for statement in statements {
        let text = statement.to_string();
        let text = text.trim_end().trim_end_matches(';');
        // A setting for one transaction, taken from there.
        match text.starts_with("SELECT set_config(") {
            true => writeln!(f, "BEGIN;\n{text};\nCOMMIT;")?,
            false => writeln!(f, "{text};")?,
        }
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
