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
use super::state::PromotionState;
use super::{Detail, Doing, PromoteError};
use crate::config::{Config, Databases};
use crate::error::{Class, Classify as _, chain};
use crate::names::TableName;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::{self, PgLsn, Session};
use crate::schema;
use crate::schema::set_aside::Aside;
pub use crate::schema::table_sync::Summary as TableSync;
use crate::time::rfc3339;
use crate::watch::coverage::{self, Coverage};

/// Databases looked at, or worked on, at the same time.
pub(super) const DATABASES_AT_ONCE: usize = 8;

/// Attempts at looking at one of them, and the pause between them, which grows.
const ATTEMPTS: u32 = 4;
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// How far a database is.
#[derive(Clone, Debug, PartialEq)]
pub struct AppliedProgress {
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

impl AppliedProgress {
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

/// A promotion that was begun.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The state reached.
    pub state: PromotionState,
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
    pub progress: AppliedProgress,
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
    pub fn state(&self) -> PromotionState {
        self.promotion
            .as_ref()
            .map_or(PromotionState::Standby, |stored| stored.state)
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
pub struct ObservedReplica {
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
pub async fn observe(config: &Config, role: &str) -> Result<ObservedReplica, PromoteError> {
    let mut observed = ObservedReplica::default();
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
    let tables = [
        schema::progress::TABLE,
        schema::table_sync::TABLE,
        schema::promotion::TABLE,
    ];
    let here = schema::has(&client, &tables)
        .await
        .doing("look for schema dr_agent on the replica")?;
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
    // What is compared next may give up and ask again.
    client
        .batch_execute("COMMIT")
        .await
        .doing("end reading the replica")?;
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
    ["apply", "copy", "setup", "index"]
        .map(|role| stream.application_name(role))
        .to_vec()
}

/// The progress row of a stream.
pub async fn progress(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<AppliedProgress>, PromoteError> {
    let Some(row) = schema::progress::read(client, stream)
        .await
        .doing("read how far the replica is")?
    else {
        return Ok(None);
    };
    Ok(Some(AppliedProgress {
        replica_ahead_seconds: replica_ahead(client, stream).await?,
        term: row.term,
        batch: row.batch,
        end_lsn: row.end_lsn,
        commit_time: row.commit_time.map(rfc3339),
        commit_age_seconds: row.since_commit(),
        applied_age_seconds: row.since_applied(),
    }))
}

/// By how many seconds the replica's clock is ahead of the source's, as it was told in-band.
pub(super) async fn replica_ahead(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<f64>, PromoteError> {
    schema::clock::replica_ahead(client, stream)
        .await
        .doing("read by how much the replica's clock is ahead")
}

/// How far the initial copy is. What is set aside is named, and keeps nobody from going on.
pub(super) async fn table_sync(
    client: &Client,
    stream: &StreamName,
) -> Result<TableSync, PromoteError> {
    schema::table_sync::summary(client, stream)
        .await
        .doing("read which tables are copied")
}

/// What to say of each table that is set aside.
pub(super) async fn set_aside(
    client: &Client,
    stream: &StreamName,
) -> Result<Vec<String>, PromoteError> {
    let aside = schema::set_aside::read(client, stream)
        .await
        .doing("read which tables are set aside")?;
    let said = aside.iter().map(|Aside { table, reason }| {
        format!("table {table} was set aside, and is not on the replica as it was on the source: {reason}")
    });
    Ok(said.collect())
}

/// The tables whose copy is not complete.
pub(super) async fn not_ready(
    client: &Client,
    stream: &StreamName,
) -> Result<Vec<TableName>, PromoteError> {
    schema::table_sync::not_ready(client, stream)
        .await
        .doing("read which tables are copied")
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
    let row = schema::promotion::read(client, stream)
        .await
        .doing("read how far the promotion is")?;
    let Some(row) = row else {
        return Ok(None);
    };
    let unreadable = |reason: String| PromoteError::Stored {
        stream: stream.to_string(),
        reason,
    };
    let name = &row.state;
    let state = PromotionState::parse(name)
        .ok_or_else(|| unreadable(format!("unknown state \"{name}\"")))?;
    let detail: Detail = serde_json::from_str(&row.detail)
        .map_err(|error| unreadable(format!("detail: {error}")))?;
    Ok(Some(Stored {
        state,
        term: row.term,
        detail,
    }))
}
