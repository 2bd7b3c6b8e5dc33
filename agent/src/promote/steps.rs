//! The record of one database's promotion, and the steps that set sequences and open the database.
//!
//! # Invariants
//! - The record is stored with `UPDATE … WHERE state = <the one before>`, so that a state can neither
//!   be skipped nor stored by a promotion that lost its place.
//! - The write that stores `opened` is the write probe: it goes through a new session that has
//!   nothing of ours set but its name.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_postgres::{Client, Transaction};

use super::ahead::{self, Setting};
use super::loss::CommitAge;
use super::observe;
use super::report::{DatabaseReport, PromotionReport, StepReport};
use super::sequences::Since;
use super::state::PromotionState;
use super::{Doing, PromoteError, loss};
use crate::config::Config;
use crate::copy::{self, Ran};
use crate::error::chain;
use crate::failpoint;
use crate::names::TableName;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::quote::quote_ident;
use crate::pg::{self, PgError, PgLsn, Session};
use crate::schema::deferred::TABLE as DEFERRED;
use crate::schema::prepared::{self, Settled};
use crate::schema::{progress, promotion, stream};
use crate::time::rfc3339;
use crate::watch::sequence_look::Notes;

/// How long storing a state may take: somebody may have locked the table.
const STORE_WITHIN: Duration = Duration::from_secs(30);
/// Sequences named in the report; beyond it they are counted there, and named in the log.
const NAMED_MAX: u64 = 100;

/// `dr_agent.promotion.detail`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Detail {
    /// When the command was first started.
    pub started_at: String,
    /// Promises that the operator accepted to break.
    pub accepted: Vec<String>,
    /// The flags by which he did.
    pub overrides: Vec<String>,
    /// `--accept-incomplete` was given, now or before: what it covers may be found later.
    pub accept_incomplete: bool,
    /// How far the replica was when the term was raised; a drain goes on from there.
    pub fenced_lsn: String,
    /// Tables that were never copied, whose changes are left out.
    pub left_out: Vec<TableName>,
    /// The source was asked where its sequences stand, and has answered.
    pub sequences_asked: bool,
    /// Sequences up to this oid are set.
    pub sequences_after: u32,
    /// Sequences with a warning in the report.
    pub sequences_named: u64,
    /// … and beyond what it holds.
    pub sequences_unnamed: u64,
    /// This database's part of the report.
    pub database: DatabaseReport,
    /// The whole report, once the hooks have run.
    pub report: Option<PromotionReport>,
}

/// The promotion of one database, as it is stored.
#[derive(Clone, Debug)]
pub(super) struct DatabaseRecord {
    pub(super) name: String,
    pub(super) stream: StreamName,
    pub(super) state: PromotionState,
    pub(super) detail: Detail,
}

/// Takes over how far the replica is; the loss counts up to when the term was raised.
pub(super) async fn read_progress(
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
    let fenced_at = record.detail.database.fenced_at.as_deref();
    let row = progress::read_as_of(client, &record.stream, fenced_at)
        .await
        .doing("read how far the replica is")?;
    let Some(row) = row else {
        return Err(PromoteError::RowGone {
            table: progress::TABLE,
            stream: record.stream.to_string(),
            term: record.detail.database.term,
        });
    };
    let report = &mut record.detail.database;
    report.batch = row.batch;
    report.end_lsn = row.end_lsn.to_string();
    report.commit_time = row.commit_time.map(rfc3339);
    let replica_ahead = observe::replica_ahead(client, &record.stream).await?;
    record.loses(&CommitAge {
        since_commit: row.since_commit(),
        since_applied: row.since_applied(),
        replica_ahead,
    });
    Ok(())
}

/// Commits or rolls back what is left prepared, by the batch of the record.
pub(super) async fn settle_prepared(
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<Settled, PromoteError> {
    let settled = prepared::settle(client, &record.stream, record.detail.database.batch)
        .await
        .doing("settle prepared transactions")?;
    let report = &mut record.detail.database;
    report.prepared_committed += settled.committed;
    report.prepared_rolled_back += settled.rolled_back;
    Ok(settled)
}

impl DatabaseRecord {
    /// Takes over how old the last applied transaction was when the term was raised.
    pub(super) fn loses(&mut self, age: &CommitAge) {
        let report = &mut self.detail.database;
        report.rpo_seconds = age.seconds();
        report.replica_clock_ahead_seconds = age.replica_ahead;
        if let Some(warning) = age.warning() {
            self.warn(warning);
        }
    }

    /// Where the replica is, as far as the record knows.
    pub(super) fn end_lsn(&self) -> Result<PgLsn, PromoteError> {
        let end_lsn = &self.detail.database.end_lsn;
        end_lsn.parse().map_err(|_| PromoteError::Stored {
            stream: self.stream.to_string(),
            reason: "its end_lsn is no LSN".to_owned(),
        })
    }

    /// Notes a promise that is broken because of a flag.
    pub(super) fn accept(&mut self, flag: &str, promise: String) {
        let detail = &mut self.detail;
        for (list, text) in [
            (&mut detail.overrides, flag.to_owned()),
            (&mut detail.accepted, promise),
        ] {
            if !list.contains(&text) {
                list.push(text);
            }
        }
    }

    pub(super) fn warn(&mut self, warning: String) {
        tracing::warn!(database = self.name, warning);
        let warnings = &mut self.detail.database.warnings;
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    /// Notes a step that is done; the caller stores it.
    pub(super) fn note(&mut self, state: PromotionState, seconds: f64, note: String) {
        tracing::info!(database = self.name, %state, seconds, note, "promotion");
        self.detail.database.state = state.to_string();
        self.detail.database.steps.push(StepReport {
            state: state.to_string(),
            seconds: Some(super::loss::seconds_lost(seconds)),
            note,
        });
    }

    /// The first store, in the transaction that raises the term.
    pub(super) async fn insert_fenced(&self, tx: &Transaction<'_>) -> Result<(), PgError> {
        let mut detail = self.detail.clone();
        detail.database.state = PromotionState::Fenced.to_string();
        detail.database.steps.push(StepReport {
            state: PromotionState::Fenced.to_string(),
            seconds: None,
            note: format!("term {}", detail.database.term),
        });
        let (term, state) = (detail.database.term, PromotionState::Fenced.as_str());
        let begun = (self.detail.started_at.as_str(), json(&detail));
        promotion::begin(tx, &self.stream, term, state, (begun.0, &begun.1)).await?;
        Ok(())
    }

    /// Stores `state` over the present one; storing the present one again is allowed.
    pub(super) async fn store(
        &mut self,
        client: &Client,
        state: PromotionState,
    ) -> Result<(), PromoteError> {
        let doing = "store the state of the promotion";
        let term = self.detail.database.term;
        let detail = json(&self.detail);
        let (before, after) = (self.state.as_str(), state.as_str());
        // The session that proves a write has no limits of its own.
        let storing = promotion::store(client, &self.stream, term, (before, after), &detail);
        let stored = timeout(STORE_WITHIN, storing).await;
        let stored = match stored {
            Ok(stored) => stored.doing(doing)?,
            Err(_) => {
                let after = STORE_WITHIN;
                return Err(PgError::Timeout { doing, after }).doing(doing);
            }
        };
        if !stored {
            return Err(PromoteError::RowGone {
                table: promotion::TABLE,
                stream: self.stream.to_string(),
                term,
            });
        }
        self.state = state;
        Ok(())
    }
}

fn json(detail: &Detail) -> String {
    serde_json::to_string(detail).expect("plain data with text keys always serializes")
}

/// Adds the constraints of the initial copy that waited for the stream. One that cannot be added is
/// a warning: a database without one of its constraints is worth more than none.
pub(super) async fn add_deferred(
    client: &mut Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
    match copy::run_deferred(client, &record.stream, copy::Moment::Opening).await {
        Ok(Ran { waiting, refused }) => {
            if waiting > 0 {
                record.warn(format!(
                    "{waiting} constraints of the initial copy were not added, because the stream had not \
                     passed the copy's snapshot; their text is in {DEFERRED}"
                ));
            }
            for (what, reason) in refused {
                record.warn(format!(
                    "{what} is not on the replica, which refuses it ({reason}); its text is in {DEFERRED}"
                ));
            }
        }
        Err(error) => record.warn(format!(
            "not every constraint of the initial copy is there: {}; their text is in {DEFERRED}",
            chain(&error)
        )),
    }
    client
        .batch_execute("ROLLBACK")
        .await
        .doing("add deferred constraints")?;
    Ok(())
}

/// Sets every sequence ahead; returns what to note. Stored piece by piece, so that a repeat goes on.
pub(super) async fn set_sequences(
    config: &Config,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<String, PromoteError> {
    let doing = "set sequences ahead";
    let asked = ask_for_sequences(config, client, record).await?;
    let since = match record.detail.sequences_asked {
        true => Since::Asked,
        false => {
            let fenced_at = record.detail.database.fenced_at.as_deref();
            ahead::since_last_look(client, record.stream.as_str(), fenced_at)
                .await
                .doing(doing)?
        }
    };
    let mut setting = Setting::begin(client, record.detail.sequences_after, since)
        .await
        .doing(doing)?;
    while let Some(piece) = setting.next().await.doing(doing)? {
        record.detail.sequences_after = piece.last;
        record.detail.database.sequences_set += piece.set;
        name_sequences(record, piece.warnings);
        record.store(client, record.state).await?;
        failpoint::hit("promote:sequences");
    }
    let missing = setting.missing().await.doing(doing)?;
    name_sequences(record, missing);
    client
        .batch_execute("RESET statement_timeout; RESET lock_timeout")
        .await
        .doing(doing)?;
    if let more @ 1.. = record.detail.sequences_unnamed {
        record.warn(format!(
            "{more} more sequences need attention: the log of this command names them"
        ));
    }
    let set = record.detail.database.sequences_set;
    Ok(match (asked, since) {
        (Some(reason), _) => {
            format!("{set} sequences set ahead; the source could not be asked: {reason}")
        }
        (None, Since::Asked) => {
            format!("{set} sequences set ahead of where the source said they stand")
        }
        (None, Since::Seconds(age)) => {
            format!(
                "{set} sequences set ahead of what may have been given out in {age:.0} s since the last look at the source"
            )
        }
    })
}

/// Warns of sequences: the first of them in the report, all of them in the log.
fn name_sequences(record: &mut DatabaseRecord, warnings: Vec<String>) {
    for warning in warnings {
        if record.detail.sequences_named < NAMED_MAX {
            record.detail.sequences_named += 1;
            record.warn(format!("sequence {warning}"));
        } else {
            record.detail.sequences_unnamed += 1;
            tracing::warn!(database = record.name, "sequence {warning}");
        }
    }
}

/// Takes one more look at the source, where it answers; returns why it could not.
async fn ask_for_sequences(
    config: &Config,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<Option<String>, PromoteError> {
    if record.detail.sequences_asked || !record.detail.database.source_answered {
        return Ok(None);
    }
    let conninfo = config.source.conninfo.with_dbname(&record.name);
    let look = match loss::sequences(
        &conninfo,
        &record.stream,
        system_identifier(client, record).await?,
    )
    .await
    {
        Ok(look) => look,
        Err(reason) => return Ok(Some(reason)),
    };
    let doing = "note where the source's sequences stand";
    let mut notes = Notes::read(client).await.doing(doing)?;
    let look = look.nowhere_behind(&notes);
    notes.add(client, &look).await.doing(doing)?;
    record.detail.sequences_asked = true;
    record.store(client, record.state).await?;
    Ok(None)
}

/// The source that was followed, where that was noted.
pub(super) async fn system_identifier(
    client: &Client,
    record: &DatabaseRecord,
) -> Result<Option<String>, PromoteError> {
    let row = stream::read(client, &record.stream)
        .await
        .doing("read which source was followed")?;
    Ok(row.map(|row| row.recorded.cluster.system_identifier.to_string()))
}

/// Lifts the guard, then stores `opened` by an ordinary write of a new session.
pub(super) async fn open(
    config: &Config,
    client: &Client,
    record: &mut DatabaseRecord,
    now: impl FnOnce() -> String,
) -> Result<(Client, String), PromoteError> {
    let database = quote_ident(&record.name);
    client
        .batch_execute(&format!(
            "ALTER DATABASE {database} RESET default_transaction_read_only"
        ))
        .await
        .doing("lift the read-only guard")?;

    let session = Session::new(record.stream.application_name("promote"))
        .as_found("default_transaction_read_only");
    let probe = pg::connect(&config.replica.conninfo.with_dbname(&record.name), &session)
        .await
        .doing("open a session like the users'")?;
    let row = probe
        .query_one(
            "SELECT setting, source FROM pg_settings WHERE name = 'default_transaction_read_only'",
            &[],
        )
        .await
        .doing("read default_transaction_read_only")?;
    if row.get::<_, &str>(0) != "off" {
        return Err(PromoteError::StillReadOnly {
            database: record.name.clone(),
            set_by: row.get(1),
        });
    }
    // The instant before the write: the write itself then proves it.
    record.detail.database.writable_at = Some(now());
    warn_of_read_only_roles(&probe, record).await?;
    warn_of_old_sessions(client, record).await?;
    Ok((
        probe,
        "writes are allowed; proven by storing this".to_owned(),
    ))
}

/// A role may have the setting of its own, which no database setting lifts.
async fn warn_of_read_only_roles(
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
    let rows = client
        .query(
            "SELECT coalesce(r.rolname, 'every role') FROM pg_db_role_setting s
               LEFT JOIN pg_roles r ON r.oid = s.setrole
               LEFT JOIN pg_database d ON d.oid = s.setdatabase
              WHERE (s.setdatabase = 0 OR d.datname = current_database())
                AND 'default_transaction_read_only=on' = ANY (s.setconfig) ORDER BY 1",
            &[],
        )
        .await
        .doing("look for roles that are read-only")?;
    for row in &rows {
        let role: &str = row.get(0);
        record.warn(format!(
            "{role} still has default_transaction_read_only = on by ALTER ROLE; its sessions cannot write"
        ));
    }
    Ok(())
}

/// Sessions keep the default they started with. They are not ended: a reader may be in the middle of something.
async fn warn_of_old_sessions(
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
    let count: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_stat_activity
              WHERE datname = current_database() AND backend_type = 'client backend'
                AND NOT starts_with(coalesce(application_name, ''), $1)",
            &[&APPLICATION_PREFIX],
        )
        .await
        .doing("count older sessions")?
        .get(0);
    if count > 0 {
        record.warn(format!(
            "{count} sessions opened before the promotion still find default_transaction_read_only = on; \
             reconnect them (poolers too)"
        ));
    }
    Ok(())
}
