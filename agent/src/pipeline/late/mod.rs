//! Tables that come late are copied beside the stream, never in its way; those that cannot be are set aside and tried again.
//!
//! ```text
//! look: publish, mend ▶ a copy of the slot, read from here on ▶ snapshot L ▶ rows as of L ▶ their changes from L on
//!                                        ▶ close to the stream? it pauses, with everything up to F applied ▶ up to F ▶ join
//! ```
//! The snapshot waits for every transaction that is open on the source; the stream does not. What changes meanwhile is read a
//! second time, from a copy of the slot ([`catch_up`]), and of it only what concerns these tables is applied, with a progress row
//! of its own, and nothing that the stream has not shipped. Once that is close, the stream ships nothing for a moment, and from
//! `F` on brings their changes itself.
//!
//! # Invariants
//! - A table joins at the very position of the stream: the source may be lost the next moment, and the replica is of one.
//! - Whatever fails here fails no session: the tables stay set aside, with the reason, and are tried again.
//! - The copy of the slot holds WAL on the source no longer than a snapshot may take to come.
//!
//! # What it does not do
//! It takes no table away from the stream: one that is listed anew ends the session, and the next one sets it back.

mod aside;
mod catch_up;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::error::SessionError;
use super::set_aside::TablesAside;
use super::{Leg, Wake, now_instant};
use crate::catalog::Table;
use crate::config::Config;
use crate::copy::export;
use crate::copy::{self, CopyJob};
use crate::error::{Class, Classify, chain};
use crate::failpoint;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::observe::metrics::DatabaseMetrics;
use crate::observe::status::StatusCell;
use crate::pg::{ConnInfo, PgLsn};
use crate::schema::listing::{Copied, Listed};
use crate::setup::{self, SetupError};
use crate::shape::computed::Which;
use crate::sink::replica::Beside;

/// How often it is looked without being told that there is something new.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// The same while commands of the source are on their way, which may bring tables.
const LOOK_SOON: Duration = Duration::from_secs(2);

/// The same beside a replica whose source nobody watches from here.
const LOOK_EVERY_APART: Duration = Duration::from_secs(10);

/// How long the first attempt may wait for open transactions; each further one may wait twice as long, up to an hour: meanwhile
/// the copy of the slot holds WAL.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(60);

/// A replica that needs longer to take tables in is in trouble, and the stream waits meanwhile.
const JOIN_WITHIN: Duration = Duration::from_secs(10);

/// What the stream is asked.
#[derive(Debug)]
pub(super) enum Ask {
    /// Ship nothing more for now, and say up to where everything was, once that is applied.
    Pause(oneshot::Sender<PgLsn>),
    /// Go on.
    GoOn,
}

/// The task of one session.
pub(super) struct Late {
    pub(super) config: Arc<Config>,
    /// Where the tables come from: under [`Leg::Apply`] the source need not be in reach.
    pub(super) leg: Leg,
    pub(super) history: History,
    pub(super) database: String,
    pub(super) stream: StreamName,
    pub(super) term: i64,
    /// Whether the source may send generated columns.
    pub(super) sends_generated: bool,
    pub(super) beside: Beside,
    pub(super) asks: mpsc::Sender<Ask>,
    /// Told when there is something new.
    pub(super) wake: Arc<Notify>,
    /// Up to where the stream has shipped.
    pub(super) shipped: watch::Receiver<PgLsn>,
    pub(super) metrics: DatabaseMetrics,
    pub(super) status: StatusCell,
    pub(super) aside: TablesAside,
    /// Told when a person has mended something.
    pub(super) wanted: Wake,
}

/// What one look leaves for the next.
#[derive(Default)]
struct SeenTables {
    /// Warnings that were said.
    said: Vec<String>,
    /// Commands of the source were on their way: what is missing is not known yet.
    under_way: bool,
    archived: setup::Watch,
}

type Tasks = JoinSet<Result<(), SessionError>>;

impl Late {
    /// Looks and copies for as long as the session lasts.
    pub(super) async fn run(mut self) -> Option<SessionError> {
        let mut seen = SeenTables::default();
        loop {
            if let Err(error) = self.look(&mut seen).await {
                let is_over = matches!(
                    error,
                    SessionError::LateJoin(_)
                        | SessionError::Setup(
                            SetupError::CopiedTogether(_) | SetupError::ListedAnew(_)
                        )
                );
                if error.class() == Class::Fenced || is_over {
                    return Some(error);
                }
                tracing::warn!(database = %self.database, error = %chain(&error), "no look at late tables");
                if let Err(error) = self.tell_unseen(&chain(&error)).await {
                    tracing::debug!(database = %self.database, error = %chain(&error), "not noted");
                }
            }
            let soon = self.aside.troubles().next();
            let every = match self.leg {
                _ if seen.under_way => LOOK_SOON,
                Leg::Apply => LOOK_EVERY_APART,
                Leg::Whole | Leg::Send => LOOK_EVERY,
            };
            let until = soon.map_or(every, |at| {
                at.saturating_duration_since(now_instant()).min(every)
            });
            tokio::select! {
                () = self.wake.notified() => {}
                () = self.beside.news() => {}
                () = self.wanted.wanted() => self.aside.troubles().now(now_instant()),
                () = sleep(until.max(Duration::from_secs(1))) => {}
            }
        }
    }

    async fn look(&self, seen: &mut SeenTables) -> Result<(), SessionError> {
        let (config, database) = (&self.config, &self.database);
        self.aside.recall().await?;
        let mut gone = self.beside.left_out();
        let found = match self.leg {
            Leg::Apply => {
                setup::look_receiving(config, database, self.history, &mut seen.archived).await?
            }
            Leg::Whole | Leg::Send => {
                setup::look(config, database, &CancellationToken::new()).await?
            }
        };
        if found.out_of_reach.is_none() {
            gone.retain(|table| !found.tables.iter().any(|one| one.name == *table));
            self.beside.forget(gone);
        }
        for warning in &found.warnings {
            if !seen.said.contains(warning) {
                tracing::warn!(database = %self.database, "{warning}");
            }
        }
        seen.said = found.warnings;
        seen.under_way = found.under_way;
        let elsewhere = &found.elsewhere;
        // Where the source was seen, those of which changes come and that it has not have gone, or come with the next look.
        let unseen = found.out_of_reach.as_deref();
        let now = now_instant();
        let (known, new): (Vec<Table>, Vec<Table>) = {
            let mut troubles = self.aside.troubles();
            let is_found = |table: &TableName| found.tables.iter().any(|one| one.name == *table);
            troubles.retain(|table| unseen.is_some() || is_found(table));
            let due = found.tables.iter().cloned();
            due.filter(|table| troubles.is_due(&table.name, now))
                .partition(|table| troubles.knows(&table.name))
        };
        self.tell(&found.tables, elsewhere, unseen).await?;
        if known.is_empty() && new.is_empty() {
            return Ok(());
        }
        let mut done: Vec<TableName> = Vec::new();
        for tables in [&new, &known] {
            self.attempt_all(tables, &found.listed, &mut done).await?;
        }
        let mut rest = found.tables;
        rest.retain(|table| !done.contains(&table.name));
        self.tell(&rest, elsewhere, unseen).await
    }

    /// Together; and where that fails for good, one by one, so that one table costs no other. Partitions may have to be copied
    /// together.
    async fn attempt_all(
        &self,
        tables: &[Table],
        listed: &Listed,
        done: &mut Vec<TableName>,
    ) -> Result<(), SessionError> {
        if tables.is_empty() {
            return Ok(());
        }
        let together = self.attempt(tables, listed, done).await?;
        if tables.len() > 1 && together == Some(Class::Definite) {
            let mut by_root: BTreeMap<&TableName, Vec<Table>> = BTreeMap::new();
            for table in tables {
                by_root.entry(&table.root).or_default().push(table.clone());
            }
            for one in by_root.values() {
                self.attempt(one, listed, done).await?;
            }
        }
        Ok(())
    }

    /// Copies tables, and notes what became of it, unless it failed for good because of one of several; returns of which class the
    /// error was. An error only where the session is over.
    async fn attempt(
        &self,
        tables: &[Table],
        listed: &Listed,
        done: &mut Vec<TableName>,
    ) -> Result<Option<Class>, SessionError> {
        let mut outcome = self.try_once(tables, listed).await;
        if let (Err(error), [table]) = (&outcome, tables)
            && is_of_the_table_there(error)
            && self.aside.troubles().rebuild(&table.name, now_instant())
        {
            tracing::info!(database = %self.database, table = %table.name, reason = chain(error), "is created anew");
            outcome = self.try_once(tables, listed).await;
        }
        let Err(error) = outcome else {
            for table in tables {
                self.aside.troubles().joined(&table.name, now_instant());
                done.push(table.name.clone());
                tracing::info!(database = %self.database, table = %table.name, "copied beside the stream, and replicated from now on");
            }
            return Ok(None);
        };
        if error.class() == Class::Fenced || matches!(error, SessionError::LateJoin(_)) {
            return Err(error);
        }
        if tables.len() > 1 && error.class() == Class::Definite {
            return Ok(Some(Class::Definite));
        }
        let mut reason = chain(&error);
        if let ([table], true) = (tables, is_of_the_table_there(&error)) {
            reason.push_str(&self.what_holds(&table.name).await);
        }
        for table in tables {
            let now = now_instant();
            let pause = self.aside.troubles().failed(&table.name, &reason, now);
            tracing::warn!(
                database = %self.database, table = %table.name, error = reason, hint = error.hint(), again_in = ?pause,
                "set aside: it is not protected; the rest goes on"
            );
        }
        Ok(Some(error.class()))
    }

    /// Why a table that is in the way could not be created anew, to go behind the reason; nothing where nobody can say.
    async fn what_holds(&self, table: &TableName) -> String {
        match setup::held_by(&self.replica(), &self.stream, table).await {
            Ok(holders) if !holders.is_empty() => format!(
                "; the replica's table cannot be created anew, because of {}",
                holders.join(", ")
            ),
            Ok(_) => String::new(),
            Err(error) => {
                tracing::debug!(error = %chain(&error), "nobody knows what depends on a table");
                String::new()
            }
        }
    }

    /// One attempt, after which nothing of it is left but the tables, or not even these.
    async fn try_once(&self, tables: &[Table], listed: &Listed) -> Result<(), SessionError> {
        let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
        let attempts = {
            let troubles = self.aside.troubles();
            names.iter().map(|name| troubles.attempts(name)).max()
        };
        let mut tasks = Tasks::new();
        let round = self.round(tables, listed, attempts.unwrap_or(0) + 1, &mut tasks);
        let outcome = Box::pin(round).await;
        tasks.shutdown().await;
        if matches!(outcome, Err(SessionError::LateWaits(_))) {
            let ended = setup::end_late_sessions(&self.source(), &self.stream).await;
            if let Err(error) = ended {
                tracing::debug!(error = %chain(&error), "a session on the source waits on");
            }
        }
        let is_lost = matches!(outcome, Err(SessionError::LateJoin(_)));
        if outcome.is_err() && !is_lost {
            let removing = setup::remove_half_made(&self.replica(), &self.stream, &names).await;
            if let Err(error) = removing {
                tracing::debug!(error = %chain(&error), "what was not finished is left to the next attempt");
            }
        }
        outcome
    }

    fn source(&self) -> ConnInfo {
        self.config.source.conninfo.with_dbname(&self.database)
    }

    fn replica(&self) -> ConnInfo {
        self.config.replica.conninfo.with_dbname(&self.database)
    }

    async fn round(
        &self,
        tables: &[Table],
        listed: &Listed,
        attempts: u32,
        tasks: &mut Tasks,
    ) -> Result<(), SessionError> {
        let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
        let (source, replica) = (self.source(), self.replica());
        // A backend that waits for a snapshot notices late that nobody listens.
        setup::end_late_sessions(&source, &self.stream).await?;
        // From here on what is copied does not count after a crash: the stream passes it by, and leaves its changes out.
        setup::catch_up_from_nothing(&replica, &self.stream, self.term).await?;
        let reading = self.read(tasks).await?;
        failpoint::hit("late:slot-copied");
        let mut exporter = export::session(&source, self.stream.application_name("late"))
            .await
            .map_err(SessionError::LateSnapshot)?;
        let within = SNAPSHOT_WITHIN * (1 << (attempts - 1).min(6));
        let exporting = export::snapshot(&mut exporter, &self.stream);
        let exported = or_ended(tasks, timeout(within, exporting)).await?;
        let exported = exported
            .map_err(|_| SessionError::LateWaits(within))?
            .map_err(SessionError::LateSnapshot)?;
        let snapshot_lsn = exported.consistent_point;
        failpoint::hit("late:snapshot");
        let is_rebuilt = |table: &TableName| self.aside.troubles().is_rebuilt(table);
        setup::make_room(&replica, &self.stream, tables, is_rebuilt, snapshot_lsn).await?;
        let job = CopyJob {
            source: &source,
            replica: &replica,
            stream: &self.stream,
            tables: tables.to_vec(),
            listed,
            snapshot: exported.snapshot_name.as_deref().unwrap_or_default(),
            snapshot_lsn,
            settings: &self.config.copy,
            whole_schema: false,
            beside: true,
        };
        let never = CancellationToken::new();
        or_ended(tasks, copy::copy(job, &(), &never))
            .await?
            .map_err(SessionError::LateCopy)?;
        drop(exporter);
        self.compare(&names).await?;
        failpoint::hit("late:copied");
        let copied = |table: &TableName, lsn| Copied {
            snapshot_lsn: Some(lsn),
            listed_as: listed.get(table).cloned(),
        };
        let synced = names
            .iter()
            .map(|table| (table.clone(), copied(table, snapshot_lsn)));
        let caught_up = self.catch_up(reading, synced.collect(), snapshot_lsn, tasks);
        let joined = match caught_up.await {
            Ok(at) => {
                failpoint::hit("late:caught-up");
                let joining = self.join(&names, (snapshot_lsn, at), |table| copied(table, at));
                joining.await
            }
            Err(error) => Err(error),
        };
        // Whatever became of it.
        let _ = self.asks.send(Ask::GoOn).await;
        joined
    }

    /// Gives the tables to the stream. Where that fails nobody knows whether it was done, and only a new session can look.
    async fn join(
        &self,
        names: &[TableName],
        positions: (PgLsn, PgLsn),
        copied: impl Fn(&TableName) -> Copied,
    ) -> Result<(), SessionError> {
        let replica = self.replica();
        let joining = setup::joined(&replica, &self.stream, self.term, names, positions);
        match timeout(JOIN_WITHIN, joining).await {
            Ok(joined) => joined.map_err(|error| SessionError::LateJoin(Some(error)))?,
            Err(_) => return Err(SessionError::LateJoin(None)),
        }
        failpoint::hit("late:joined");
        for table in names {
            self.beside.join(table.clone(), copied(table));
        }
        failpoint::hit("late:join");
        Ok(())
    }

    /// What the stream does not tell of these tables' columns is the same on both sides.
    async fn compare(&self, names: &[TableName]) -> Result<(), SessionError> {
        let names = names.iter().cloned().collect();
        let (config, database) = (&self.config, &self.database);
        let looked = setup::altered(config, database, None, &names, Which::All).await?;
        match looked {
            Some((_, differences)) if !differences.is_empty() => {
                Err(SetupError::Computed(differences).into())
            }
            _ => Ok(()),
        }
    }
}

/// Whether what is on the replica under the table's name is in the way: created anew it may do.
fn is_of_the_table_there(error: &SessionError) -> bool {
    match error {
        SessionError::LateCopy(error) => error.is_of_the_replicas_table(),
        SessionError::Setup(SetupError::Computed(_)) => true,
        SessionError::Sink(error) => error.costs().is_some(),
        _ => false,
    }
}

/// What is waited for, unless a task ends first.
async fn or_ended<T>(
    tasks: &mut Tasks,
    waiting: impl Future<Output = T>,
) -> Result<T, SessionError> {
    tokio::pin!(waiting);
    tokio::select! {
        biased;
        done = &mut waiting => Ok(done),
        Some(ended) = tasks.join_next() => {
            ended.unwrap_or(Ok(()))?;
            Err(SessionError::TaskLost)
        }
    }
}
