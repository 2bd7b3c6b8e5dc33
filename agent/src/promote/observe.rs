//! Reads what a promotion must know, and `status` shows: progress, initial copy, promotion.
//!
//! First step of every promotion and the whole of `--plan`. Only the replica is asked.
//!
//! # Invariants
//! - Touches nothing: every session starts with `default_transaction_read_only = on`.
//!
//! # What it does not do
//! It judges nothing: see [`super::plan`].

use std::pin::pin;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio_postgres::Client;

use super::loss::CommitAge;
use super::state::State;
use super::{Detail, Doing, PromoteError};
use crate::config::{Config, Databases};
use crate::error::{Class, Classify as _, chain};
use crate::names::TableName;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::{self, PgLsn, Session};
use crate::watch::coverage::{self, Coverage};

/// Databases looked at, or worked on, at the same time.
pub(super) const DATABASES_AT_ONCE: usize = 8;

/// Attempts at looking at one of them, and the pause between them, which grows.
const ATTEMPTS: u32 = 4;
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// The row of `dr_agent.progress`.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Fencing token.
    pub term: i64,
    /// Number of the last applied batch.
    pub batch: i64,
    /// First byte after the last applied transaction.
    pub end_lsn: PgLsn,
    /// Its commit time on the source's clock, RFC 3339.
    pub commit_time: Option<String>,
    /// Seconds from then until now, source's clock against replica's.
    pub commit_age_seconds: Option<f64>,
    /// Seconds since anything was applied, both on the replica's clock.
    pub applied_age_seconds: f64,
    /// By which the replica's clock is ahead of the source's, as the source's agent measured.
    pub replica_ahead_seconds: Option<f64>,
}

impl Progress {
    /// How old the last applied commit is, at most; none where a clock was set and nothing can be said.
    pub fn age_seconds(&self) -> Option<f64> {
        let age = CommitAge {
            since_commit: self.commit_age_seconds,
            since_applied: self.applied_age_seconds,
            replica_ahead: self.replica_ahead_seconds,
        };
        age.seconds()
    }
}

/// What `dr_agent.table_sync` says of the initial copy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableSync {
    /// Tables known.
    pub total: i64,
    /// Tables not `ready`.
    pub not_ready: i64,
    /// The first few of them, as `schema.table (state)`.
    pub examples: Vec<String>,
    /// The newest snapshot: before it, tables are of different moments.
    pub newest_snapshot: Option<PgLsn>,
}

/// The row of `dr_agent.promotion`.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The state reached.
    pub state: State,
    /// The term this promotion raised to.
    pub term: i64,
    /// What it remembers.
    pub detail: Detail,
}

/// One replicated database.
#[derive(Clone, Debug)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Its stream.
    pub stream: StreamName,
    /// How far it is.
    pub progress: Progress,
    /// Its initial copy.
    pub table_sync: TableSync,
    /// A promotion begun or finished.
    pub promotion: Option<Stored>,
    /// Sequences of users in it.
    pub sequences: i64,
    /// Sessions of agents connected to it.
    pub agent_sessions: i64,
    /// Prepared transactions of agents.
    pub prepared: i64,
    /// What is not protected, as far as it is known here.
    pub coverage: Coverage,
}

impl Database {
    /// The state a promotion would go on from.
    pub fn state(&self) -> State {
        self.promotion
            .as_ref()
            .map_or(State::Standby, |stored| stored.state)
    }
}

/// A database that is replicated, as far as can be told, and could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Everything observed.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Replicated databases, in name order.
    pub databases: Vec<Database>,
    /// Databases named in `source.databases` that the replica does not have, or not as a replica.
    pub missing: Vec<String>,
    /// Those that cannot be looked at.
    pub unreachable: Vec<Unreachable>,
}

/// Looks at every database of the stream set. One that cannot be looked at costs none of the others.
///
/// # Errors
/// Where nothing could be looked at.
pub async fn observe(config: &Config, role: &str) -> Result<Observed, PromoteError> {
    let mut observed = Observed::default();
    let mut first_error = None;
    let looks = candidates(config, role)
        .await?
        .into_iter()
        .map(|candidate| async move {
            let found = Box::pin(look(config, &candidate, role)).await;
            (candidate, found)
        });
    let mut looks = pin!(stream::iter(looks).buffered(DATABASES_AT_ONCE));
    while let Some((candidate, found)) = looks.next().await {
        match found {
            Ok(Some(database)) => observed.databases.push(database),
            Ok(None) if candidate.is_listed => observed.missing.push(candidate.name),
            // With "*" a database without our progress row is simply not replicated.
            Ok(None) => {}
            Err(error) if candidate.is_not_ours(&error) => {
                tracing::info!(
                    database = candidate.name,
                    error = chain(&error),
                    "not a database of ours"
                );
            }
            Err(error) => {
                observed.unreachable.push(Unreachable {
                    name: candidate.name,
                    reason: chain(&error),
                    hint: error.hint(),
                });
                first_error.get_or_insert(error);
            }
        }
    }
    observed.databases.sort_by(|a, b| a.name.cmp(&b.name));
    match first_error {
        Some(error) if observed.databases.is_empty() => Err(error),
        _ => Ok(observed),
    }
}

/// A database that may be replicated.
struct Candidate {
    name: String,
    is_listed: bool,
    /// It has the read-only guard, which we set.
    is_guarded: bool,
    /// Why nobody, or not this role, may enter it.
    barred: Option<&'static str>,
}

impl Candidate {
    /// With "*", a database that lets this role not in, such as `rdsadmin`, is somebody else's, unless it has our guard.
    fn is_not_ours(&self, error: &PromoteError) -> bool {
        // invalid_authorization_specification, invalid_password, insufficient_privilege, object_not_in_prerequisite_state.
        const NOT_LET_IN: [&str; 4] = ["28000", "28P01", "42501", "55000"];
        let is_let_in = |code| !NOT_LET_IN.contains(&code);
        !self.is_listed && !self.is_guarded && !error.sqlstate().is_none_or(is_let_in)
    }
}

/// The databases that may be replicated; those that are certainly not ours are left out.
async fn candidates(config: &Config, role: &str) -> Result<Vec<Candidate>, PromoteError> {
    const SQL: &str = "
        SELECT d.datname::text, d.datallowconn, has_database_privilege(d.oid, 'CONNECT'),
               EXISTS (SELECT FROM pg_db_role_setting s WHERE s.setdatabase = d.oid AND s.setrole = 0
                          AND 'default_transaction_read_only=on' = ANY (s.setconfig))
          FROM pg_database d WHERE NOT d.datistemplate ORDER BY d.datname";
    if let Databases::List(names) = &config.source.databases {
        let named = names.iter().map(|name| Candidate {
            name: name.clone(),
            is_listed: true,
            is_guarded: false,
            barred: None,
        });
        return Ok(named.collect());
    }
    let client = anywhere(config, &reading(&format!("{APPLICATION_PREFIX}{role}"))).await?;
    let rows = client
        .query(SQL, &[])
        .await
        .doing("list the replica's databases")?;
    let all = rows.iter().map(|row| Candidate {
        name: row.get(0),
        is_listed: false,
        is_guarded: row.get(3),
        barred: match (row.get(1), row.get(2)) {
            (false, _) => {
                Some("it allows no connections (ALTER DATABASE … ALLOW_CONNECTIONS true)")
            }
            (_, false) => Some("this role may not connect to it (GRANT CONNECT ON DATABASE …)"),
            (true, true) => None,
        },
    });
    Ok(all
        .filter(|candidate| candidate.barred.is_none() || candidate.is_guarded)
        .collect())
}

/// A session with the replica's server, in whichever database lets us in: that of the URL may be the one in trouble.
pub(super) async fn anywhere(config: &Config, session: &Session) -> Result<Client, PromoteError> {
    let conninfo = &config.replica.conninfo;
    let error = match pg::connect_silently(conninfo, session.clone()).await {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    if error.sqlstate().is_some() {
        for name in ["postgres", "template1"] {
            if let Ok(client) =
                pg::connect_silently(&conninfo.with_dbname(name), session.clone()).await
            {
                return Ok(client);
            }
        }
    }
    Err(error).doing("connect to the replica")
}

/// Looks at one; what goes away within a moment is tried again.
async fn look(
    config: &Config,
    candidate: &Candidate,
    role: &str,
) -> Result<Option<Database>, PromoteError> {
    if let Some(why) = candidate.barred {
        return Err(PromoteError::Barred(why));
    }
    let mut attempt = 1;
    loop {
        let found = Box::pin(database(config, &candidate.name, role)).await;
        match found {
            Err(error)
                if error.class() == Class::Transient
                    && error.sqlstate().is_some()
                    && attempt < ATTEMPTS =>
            {
                tokio::time::sleep(RETRY_AFTER * attempt).await;
                attempt += 1;
            }
            found => return found,
        }
    }
}

fn reading(application_name: &str) -> Session {
    Session::new(application_name)
        .set("default_transaction_read_only", "on")
        .set("statement_timeout", "10s")
}

/// One database; `None` where it does not exist or is not replicated under our stream name.
async fn database(
    config: &Config,
    name: &str,
    role: &str,
) -> Result<Option<Database>, PromoteError> {
    let stream = config.stream(name);
    let session = reading(&stream.application_name(role));
    let client =
        match pg::connect_silently(&config.replica.conninfo.with_dbname(name), session).await {
            Ok(client) => client,
            // invalid_catalog_name: no such database.
            Err(error) if error.sqlstate() == Some("3D000") => return Ok(None),
            Err(error) => return Err(error).doing("connect to the replica"),
        };
    // One moment for all of it: another promotion may be at work.
    client
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await
        .doing("begin to read the replica")?;
    let here: bool = client
        .query_one(
            "SELECT count(*) = 3 FROM (VALUES ('progress'), ('table_sync'), ('promotion')) AS t (name)
              WHERE to_regclass('dr_agent.' || t.name) IS NOT NULL",
            &[],
        )
        .await
        .doing("look for schema dr_agent on the replica")?
        .get(0);
    if !here {
        return Ok(None);
    }
    let in_recovery: bool = client
        .query_one("SELECT pg_is_in_recovery()", &[])
        .await
        .doing("ask whether the replica is a standby")?
        .get(0);
    if in_recovery {
        return Err(PromoteError::InRecovery);
    }
    let Some(progress) = progress(&client, &stream).await? else {
        return Ok(None);
    };
    let counts = client
        .query_one(
            "SELECT (SELECT count(*) FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
                      WHERE c.relpersistence <> 't' AND c.relnamespace <> 'dr_agent'::regnamespace),
                    (SELECT count(*) FROM pg_stat_activity
                      WHERE datname = current_database() AND application_name = ANY ($1)),
                    (SELECT count(*) FROM pg_prepared_xacts
                      WHERE database = current_database() AND starts_with(gid, $2))",
            &[
                &agent_application_names(&stream),
                &format!("{APPLICATION_PREFIX}{stream}:"),
            ],
        )
        .await
        .doing("count sequences and sessions")?;
    let table_sync = table_sync(&client, &stream).await?;
    let promotion = promotion(&client, &stream).await?;
    Ok(Some(Database {
        name: name.to_owned(),
        table_sync,
        promotion,
        progress,
        coverage: coverage(&client, &stream).await?,
        stream,
        sequences: counts.get(0),
        agent_sessions: counts.get(1),
        prepared: counts.get(2),
    }))
}

/// The names of the sessions by which an agent writes to the replica.
pub fn agent_application_names(stream: &StreamName) -> Vec<String> {
    ["apply", "copy", "setup"]
        .map(|role| stream.application_name(role))
        .to_vec()
}

/// The progress row of a stream.
pub async fn progress(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<Progress>, PromoteError> {
    const SQL: &str = "
        SELECT term, batch, end_lsn,
               to_char(commit_time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
               extract(epoch FROM clock_timestamp() - commit_time)::float8,
               extract(epoch FROM clock_timestamp() - applied_at)::float8
          FROM dr_agent.progress WHERE stream = $1";
    let row = client
        .query_opt(SQL, &[&stream.as_str()])
        .await
        .doing("read dr_agent.progress")?;
    let Some(row) = row else {
        return Ok(None);
    };
    Ok(Some(Progress {
        replica_ahead_seconds: replica_ahead(client, stream).await?,
        term: row.get(0),
        batch: row.get(1),
        end_lsn: row.get(2),
        commit_time: row.get(3),
        commit_age_seconds: row.get(4),
        applied_age_seconds: row.get(5),
    }))
}

/// By how many seconds the replica's clock is ahead of the source's, as it was told in-band.
pub(super) async fn replica_ahead(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<f64>, PromoteError> {
    let doing = "read dr_agent.clock";
    let there = client
        .query_one("SELECT to_regclass('dr_agent.clock') IS NOT NULL", &[])
        .await
        .doing(doing)?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let row = client
        .query_opt(
            "SELECT replica_ahead FROM dr_agent.clock WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await
        .doing(doing)?;
    Ok(row.map(|row| row.get(0)))
}

/// What `dr_agent.table_sync` says.
pub(super) async fn table_sync(
    client: &Client,
    stream: &StreamName,
) -> Result<TableSync, PromoteError> {
    // What is set aside is named, and keeps nobody from going on.
    let counts = match knows_set_aside(client).await? {
        true => {
            "state <> 'ready' AND NOT EXISTS (
                 SELECT 1 FROM dr_agent.set_aside a WHERE a.stream = t.stream
                    AND a.table_schema = t.table_schema AND a.table_name = t.table_name)"
        }
        false => "state <> 'ready'",
    };
    let sql = format!(
        "SELECT count(*), count(*) FILTER (WHERE {counts}), max(snapshot_lsn) FILTER (WHERE state = 'ready' OR {counts}),
                (array_agg(table_schema || '.' || table_name || ' (' || state || ')'
                           ORDER BY table_schema, table_name)
                 FILTER (WHERE {counts}))[1:5]
           FROM dr_agent.table_sync t WHERE stream = $1"
    );
    let row = client
        .query_one(&sql, &[&stream.as_str()])
        .await
        .doing("read dr_agent.table_sync")?;
    Ok(TableSync {
        total: row.get(0),
        not_ready: row.get(1),
        newest_snapshot: row.get(2),
        examples: row.get::<_, Option<Vec<String>>>(3).unwrap_or_default(),
    })
}

pub(super) async fn knows_set_aside(client: &Client) -> Result<bool, PromoteError> {
    let row = client
        .query_one("SELECT to_regclass('dr_agent.set_aside') IS NOT NULL", &[])
        .await
        .doing("look for dr_agent.set_aside")?;
    Ok(row.get(0))
}

/// What to say of each table that is set aside.
pub(super) async fn set_aside(
    client: &Client,
    stream: &StreamName,
) -> Result<Vec<String>, PromoteError> {
    let aside = coverage::set_aside(client, stream)
        .await
        .doing("read dr_agent.set_aside")?;
    let said = aside.iter().map(|(table, reason)| {
        format!("table {table} was set aside, and is not on the replica as it was on the source: {reason}")
    });
    Ok(said.collect())
}

/// The tables whose copy is not complete.
pub(super) async fn not_ready(
    client: &Client,
    stream: &StreamName,
) -> Result<Vec<TableName>, PromoteError> {
    const SQL: &str = "
        SELECT table_schema, table_name FROM dr_agent.table_sync
         WHERE stream = $1 AND state <> 'ready' ORDER BY 1, 2";
    let rows = client
        .query(SQL, &[&stream.as_str()])
        .await
        .doing("read dr_agent.table_sync")?;
    let tables = rows.iter().map(|row| TableName {
        schema: row.get(0),
        name: row.get(1),
    });
    Ok(tables.collect())
}

/// What is not protected. Whatever keeps it from being read, it keeps nothing from being promoted.
pub(super) async fn coverage(
    client: &Client,
    stream: &StreamName,
) -> Result<Coverage, PromoteError> {
    match coverage::of(client, stream).await {
        Ok(coverage) => Ok(coverage),
        Err(error) => {
            tracing::warn!(%stream, error = %chain(&error), "what is not protected cannot be read");
            Ok(Coverage::default())
        }
    }
}

/// The promotion row of a stream.
pub async fn promotion(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<Stored>, PromoteError> {
    let row = client
        .query_opt(
            "SELECT state, term, detail::text FROM dr_agent.promotion WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await
        .doing("read dr_agent.promotion")?;
    let Some(row) = row else {
        return Ok(None);
    };
    let unreadable = |reason: String| PromoteError::Stored {
        stream: stream.to_string(),
        reason,
    };
    let name: &str = row.get(0);
    let state =
        State::parse(name).ok_or_else(|| unreadable(format!("unknown state \"{name}\"")))?;
    let detail: Detail =
        serde_json::from_str(row.get(2)).map_err(|error| unreadable(format!("detail: {error}")))?;
    Ok(Some(Stored {
        state,
        term: row.get(1),
        detail,
    }))
}
