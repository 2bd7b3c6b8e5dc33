//! Fencing: raises the term and ends the sessions of older agents.
//!
//! Every apply transaction begins with a compare-and-set of the progress row that includes the term.
//! Raising the term is therefore all it takes to keep older agents out; but a batch in flight holds
//! the row's lock, and the agent that began it may be stopped, unreachable or half dead. It gets
//! [`LOCK_WAIT`] to finish, so that its transactions are not lost needlessly, and is ended then.
//!
//! # Invariants
//! - The term rises and `fenced` is stored in one transaction: a repeat cannot raise it twice.
//! - What the report says was applied is read by that same transaction.
//!
//! # What it does not do
//! It does not fence the *source*: nothing here keeps users from writing to an old primary that is
//! still alive. The report says so.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::loss::CommitAge;
use super::observe::{self, agent_application_names};
use super::steps::DatabaseRecord;
use super::{Doing, PromoteError};
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::schema::{prepared, progress};
use crate::time::rfc3339;

/// How long a batch in flight may take to finish before it is ended.
const LOCK_WAIT: &str = "2s";
/// Attempts to get the lock; what blocks it is ended after each.
const ATTEMPTS_MAX: u32 = 5;
/// How often we look who blocks us.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A backend that does not end within this long is stuck in the kernel or stopped by a debugger.
const END_WITHIN: Duration = Duration::from_secs(15);

/// Raises the term and stores `fenced`. `watcher` is a second session of ours, used while the first
/// waits for the lock.
pub(super) async fn raise_term(
    client: &mut Client,
    watcher: &Client,
    record: &mut DatabaseRecord,
) -> Result<String, PromoteError> {
    let pid: i32 = client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .doing("raise the term")?
        .get(0);
    let mut blockers = BTreeSet::new();
    for attempt in 1..=ATTEMPTS_MAX {
        blockers.clear();
        let outcome = {
            let mut raising = Box::pin(try_raise(client, record));
            loop {
                tokio::select! {
                    outcome = &mut raising => break outcome,
                    () = sleep(LOOK_EVERY) => blockers.extend(blocking(watcher, pid).await?),
                }
            }
        };
        match outcome {
            Ok(true) => {
                for warning in observe::set_aside(watcher, &record.stream).await? {
                    record.warn(warning);
                }
                let term = record.detail.database.term;
                return Ok(match attempt {
                    1 => format!("the term is {term} now"),
                    _ => format!("the term is {term} now, after ending what held the progress row"),
                });
            }
            Ok(false) => {
                return Err(PromoteError::RowGone {
                    table: progress::TABLE,
                    stream: record.stream.to_string(),
                    term: record.detail.database.term,
                });
            }
            Err(error) if error.sqlstate() == Some("55P03") => {
                tracing::warn!(stream = %record.stream, ?blockers, "the progress row is locked; ending what holds it");
                make_way(watcher, record, &blockers).await?;
            }
            Err(error) => return Err(error).doing("raise the term"),
        }
    }
    let by: Vec<String> = blockers.iter().map(|pid| who(*pid)).collect();
    Err(PromoteError::FenceBlocked {
        stream: record.stream.to_string(),
        by: by.join(", "),
    })
}

/// `pg_blocking_pids` shows a prepared transaction as process 0.
fn who(pid: i32) -> String {
    match pid {
        0 => "a prepared transaction".to_owned(),
        pid => format!("pid {pid}"),
    }
}

/// One attempt; `Ok(false)` where the progress row is gone. The record is filled from the row.
async fn try_raise(client: &mut Client, record: &mut DatabaseRecord) -> Result<bool, PgError> {
    let replica_ahead = record.detail.database.replica_clock_ahead_seconds;
    let tx = client.transaction().await?;
    tx.batch_execute(&format!("SET LOCAL lock_timeout = '{LOCK_WAIT}'"))
        .await?;
    let Some(row) = progress::raise_term(&tx, &record.stream).await? else {
        return Ok(false);
    };
    // Nor goes on what is copied beside the stream.
    progress::end(&tx, &record.stream.late()).await?;
    let report = &mut record.detail.database;
    report.term = row.term;
    report.batch = row.batch;
    report.end_lsn = row.end_lsn.to_string();
    record.detail.fenced_lsn.clone_from(&report.end_lsn);
    report.commit_time = row.commit_time.map(rfc3339);
    report.fenced_at = Some(rfc3339(row.read_at));
    record.loses(&CommitAge {
        since_commit: row.since_commit(),
        since_applied: row.since_applied(),
        replica_ahead,
    });
    record.insert_fenced(&tx).await?;
    tx.commit().await?;
    Ok(true)
}

async fn blocking(watcher: &Client, pid: i32) -> Result<Vec<i32>, PromoteError> {
    let row = watcher
        .query_one("SELECT pg_blocking_pids($1)", &[&pid])
        .await
        .doing("ask who holds the progress row")?;
    Ok(row.get(0))
}

/// Ends whatever holds the progress row: agents by name, and anything else by its process id.
async fn make_way(
    watcher: &Client,
    record: &mut DatabaseRecord,
    blockers: &BTreeSet<i32>,
) -> Result<(), PromoteError> {
    if blockers.contains(&0)
        && prepared::refuse_undecided(watcher, &record.stream)
            .await
            .doing("settle a prepared transaction")?
    {
        record.detail.database.prepared_rolled_back += 1;
    }
    let agents = terminate_agents(watcher, &record.stream).await?;
    for pid in blockers
        .iter()
        .filter(|pid| **pid != 0 && !agents.contains(pid))
    {
        let row = watcher
            .query_opt(
                "SELECT coalesce(usename, ''), coalesce(application_name, ''), pg_terminate_backend(pid)
                   FROM pg_stat_activity WHERE pid = $1 AND datname = current_database()",
                &[pid],
            )
            .await
            .doing("end a session that holds the progress row")?;
        if let Some(row) = row {
            let (user, application): (&str, &str) = (row.get(0), row.get(1));
            record.warn(format!(
                "ended session {pid} of {user} ({application}), which held the progress row"
            ));
        }
    }
    Ok(())
}

async fn terminate_agents(client: &Client, stream: &StreamName) -> Result<Vec<i32>, PromoteError> {
    let rows = client
        .query(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND application_name = ANY ($1)",
            &[&agent_application_names(stream)],
        )
        .await
        .doing("end sessions of older agents")?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Ends sessions of older agents until none is left. They may come back to find the new term; they
/// cannot commit, so a look at one moment is enough.
pub(super) async fn end_sessions(
    client: &Client,
    stream: &StreamName,
) -> Result<String, PromoteError> {
    let deadline = Instant::now() + END_WITHIN;
    let mut ended = BTreeSet::new();
    loop {
        let left = terminate_agents(client, stream).await?;
        ended.extend(left.iter().copied());
        if left.is_empty() {
            return Ok(match ended.len() {
                0 => "no session of an agent was left".to_owned(),
                count => format!("ended {count} sessions of agents"),
            });
        }
        if Instant::now() >= deadline {
            let pids: Vec<String> = left.iter().map(i32::to_string).collect();
            return Err(PromoteError::SessionsRemain {
                stream: stream.to_string(),
                pids: pids.join(", "),
            });
        }
        sleep(Duration::from_millis(50)).await;
    }
}
