//! Walks the table of states: all databases at once. What follows for all together is `super::close`.
//!
//! # Invariants
//! - No database is touched before its plan has been accepted and it has been found drainable.
//! - A state is stored before the next edge is tried; dying right after is a failpoint of its name.
//! - One promotion at a time works on a database: it holds an advisory lock there.
//!
//! # What it does not do
//! It does not retry: a failure is reported with the state reached, and the command is repeated.

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::close::{NotTried, close};
use super::draining::{self, Looked};
use super::lock::{self, PromotionLock};
use super::observe::{self, DATABASES_AT_ONCE, Database, ObservedReplica};
use super::outcome::planned;
use super::plan::{PromotionRefusal, plan};
use super::report::{DatabaseReport, PromotionReport};
use super::state::{self, Edge, EdgeAction, PromotionState};
use super::steps::{DatabaseRecord, Detail};
use super::{ACCEPT_INCOMPLETE, Doing, Drain, Options, PromoteError, fence, loss, steps};
use crate::config::Config;
use crate::error::{Classify as _, chain};
use crate::failpoint;
use crate::pg::{self, Session};
use crate::time::timestamp;

/// Promotes, or says what it would do. `started_at` is when the command was started: RTO counts
/// from there. `route` is what may still hold something for the replica.
pub async fn promote(
    config: &Config,
    options: Options,
    started_at: Timestamp,
    route: Option<&dyn Drain>,
) -> Result<PromotionReport, PromoteError> {
    let lock = match options.plan {
        true => None,
        false => Some(PromotionLock::take(config).await?),
    };
    let observed = observe::observe(config, "promote").await?;
    if observed.databases.is_empty() {
        return Err(PromoteError::NothingToPromote {
            slot: config.source.slot.clone(),
        });
    }
    let drains = route.filter(|_| !options.skip_drain);
    let mut plan = plan(&observed, options, drains.is_some());
    let looked = match drains {
        Some(route) => draining::look(route, &observed, &plan).await,
        None => Looked::default(),
    };
    plan.refusals.extend(looked.refusals.iter().cloned());
    let going: Vec<&Database> = observed
        .databases
        .iter()
        .filter(|database| plan.refusal_of(&database.name).is_none())
        .collect();
    let Some(lock) = lock.filter(|_| !going.is_empty()) else {
        let found = &looked.found;
        return Ok(planned(config, &observed, &plan, found, options, started_at).await);
    };
    if plan.is_done() && plan.refusals.is_empty() && observed.unreachable.is_empty() {
        return finished(&observed);
    }

    let accepted = plan
        .overridden
        .iter()
        .map(PromotionRefusal::to_string)
        .collect();
    let begun = Begun {
        config,
        started_at: started_at.to_string(),
        accepted,
        route,
        options,
    };
    let walks = going
        .into_iter()
        .map(|database| Box::pin(walk(&begun, database)));
    let mut records: Vec<DatabaseRecord> = stream::iter(walks)
        .buffer_unordered(DATABASES_AT_ONCE)
        .collect()
        .await;
    records.sort_by(|a, b| a.name.cmp(&b.name));
    close(
        config,
        &lock,
        records,
        NotTried::of(config, &observed, &plan),
    )
    .await
}

/// What every database of this run shares.
pub(super) struct Begun<'a> {
    config: &'a Config,
    started_at: String,
    accepted: Vec<String>,
    pub(super) route: Option<&'a dyn Drain>,
    pub(super) options: Options,
}

/// The report of a promotion that has ended before.
fn finished(observed: &ObservedReplica) -> Result<PromotionReport, PromoteError> {
    let stored = observed
        .databases
        .iter()
        .find_map(|database| database.promotion.as_ref()?.detail.report.clone());
    stored.ok_or_else(|| PromoteError::Stored {
        stream: observed
            .databases
            .iter()
            .map(|d| d.stream.as_str())
            .collect::<Vec<_>>()
            .join(", "),
        reason: "the promotion is done and its report is missing".to_owned(),
    })
}

/// Takes one database as far as `opened`. A failure is kept in the record, for the others go on.
async fn walk(begun: &Begun<'_>, database: &Database) -> DatabaseRecord {
    let mut record = DatabaseRecord {
        name: database.name.clone(),
        stream: database.stream.clone(),
        state: database.state(),
        detail: detail(begun, database),
    };
    if let Err(error) = walk_edges(begun, &mut record).await {
        let report = &mut record.detail.database;
        report.error = Some(chain(&error));
        report.hint = error.hint();
        tracing::error!(database = record.name, state = %record.state, error = chain(&error), "promotion stopped");
    }
    record
}

fn detail(begun: &Begun<'_>, database: &Database) -> Detail {
    match &database.promotion {
        Some(stored) => stored.detail.clone(),
        None => Detail {
            started_at: begun.started_at.clone(),
            accepted: begun.accepted.clone(),
            overrides: match begun.accepted.is_empty() {
                true => Vec::new(),
                false => vec![ACCEPT_INCOMPLETE.to_owned()],
            },
            database: DatabaseReport {
                database: database.name.clone(),
                stream: database.stream.to_string(),
                state: PromotionState::Standby.to_string(),
                term: database.progress.term,
                end_lsn: database.progress.end_lsn.to_string(),
                batch: database.progress.batch,
                commit_time: database.progress.commit_time.clone(),
                replica_clock_ahead_seconds: database.progress.replica_ahead_seconds,
                ..DatabaseReport::default()
            },
            ..Detail::default()
        },
    }
}

async fn walk_edges(begun: &Begun<'_>, record: &mut DatabaseRecord) -> Result<(), PromoteError> {
    let mut client = connect(begun.config, record).await?;
    lock(&client, record).await?;
    // Only now is nobody else at it: another promotion may have gone further since we looked.
    if let Some(stored) = observe::promotion(&client, &record.stream).await? {
        record.state = stored.state;
        record.detail = stored.detail;
    }
    record.detail.accept_incomplete |= begun.options.accept_incomplete;
    while let Some(edge) = state::own_edge_from(record.state) {
        tracing::info!(database = record.name, to = %edge.to, "{}", edge.reason);
        Box::pin(walk_edge(begun, &mut client, record, edge)).await?;
        failpoint::hit(&format!("promote:{}", edge.to));
    }
    Ok(())
}

async fn walk_edge(
    begun: &Begun<'_>,
    client: &mut Client,
    record: &mut DatabaseRecord,
    edge: &Edge,
) -> Result<(), PromoteError> {
    let start = Instant::now();
    let mut probe = None;
    let note = match edge.action {
        EdgeAction::RaiseTerm => {
            let watcher = connect(begun.config, record).await?;
            fence::raise_term(client, &watcher, record).await?
        }
        EdgeAction::EndSessions => fence::end_sessions(client, &record.stream).await?,
        EdgeAction::SettlePrepared => {
            let settled = steps::settle_prepared(client, record).await?;
            format!(
                "{} committed, {} rolled back",
                settled.committed, settled.rolled_back
            )
        }
        EdgeAction::Drain => draining::drain(begun, client, record).await?,
        EdgeAction::StateLoss => {
            // What is there counts, and what is told of it.
            steps::add_deferred(client, record).await?;
            state_loss(begun.config, client, record).await?
        }
        EdgeAction::SetSequences => steps::set_sequences(begun.config, client, record).await?,
        EdgeAction::Open => {
            let now = || timestamp().to_string();
            let (session, note) = steps::open(begun.config, client, record, now).await?;
            probe = Some(session);
            note
        }
        EdgeAction::RunHooks | EdgeAction::StoreReport => {
            unreachable!("these edges are walked once for all databases, by close()")
        }
    };
    record.note(edge.to, start.elapsed().as_secs_f64(), note);
    record
        .store(probe.as_ref().unwrap_or(client), edge.to)
        .await
}

pub(super) async fn connect(
    config: &Config,
    record: &DatabaseRecord,
) -> Result<Client, PromoteError> {
    let session = Session::new(record.stream.application_name("promote"))
        .silent()
        .set("statement_timeout", "30s")
        .set("lock_timeout", "10s")
        // Durable here; a standby of the replica that is away must not hold up the promotion.
        .set("synchronous_commit", "local");
    pg::connect(&config.replica.conninfo.with_dbname(&record.name), &session)
        .await
        .doing("connect to the replica")
}

/// Held until the session ends.
async fn lock(client: &Client, record: &DatabaseRecord) -> Result<(), PromoteError> {
    let sql = "SELECT pg_try_advisory_lock(hashtext('dr_agent.promote'), hashtext($1))";
    lock::take(client, sql, record.stream.as_str()).await
}

async fn state_loss(
    config: &Config,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<String, PromoteError> {
    let system_identifier = steps::system_identifier(client, record).await?;
    let end_lsn = record.end_lsn()?;
    let answer = loss::ask(&loss::Question {
        conninfo: &config.source.conninfo.with_dbname(&record.name),
        stream: &record.stream,
        end_lsn,
        system_identifier,
        count: true,
    })
    .await;
    let note = match &answer.unknown {
        None => "the source answered",
        Some(_) if answer.alive => "the source answered, but not everything is known",
        Some(_) => "the source did not answer",
    };
    record.detail.database.take_answer(answer);
    // As far as the drain has led.
    record.detail.database.coverage = observe::coverage(client, &record.stream).await?;
    Ok(note.to_owned())
}
