//! Brings one database to where streaming can start, from wherever a crash or an operator left it.
//!
//! The first step of every pipeline, at every start and whenever a table appears:
//!
//! ```text
//! observe both sides ▶ identity::verdict, target::judge: refuse what a person must settle
//!     Begin   database ▶ publication ▶ stream row ▶ slot, and a snapshot where it begins ▶ roles, settings
//!                      ▶ progress row ▶ copy everything at that snapshot
//!     Resume  settle what a killed agent left ▶ missed tables back to pending ▶ publication ▶ copy what is not ready at the
//!             snapshot of a temporary slot
//! ```
//!
//! # Invariants
//! - Every step can be killed and repeated. What was done is read from the two servers, never from
//!   a file: the slot, `dr_agent.stream`, `dr_agent.progress`, `dr_agent.table_sync`.
//! - The order makes each crash recognizable: the stream row is written before the slot is created
//!   (a slot of ours without it belongs to somebody else), the progress row after it (without one
//!   nothing was copied, and the slot may be dropped).
//! - A table that was unlisted for a while is set back to `pending` before it is listed again: once
//!   listed, nothing would show that its changes were missed.
//! - Everything is judged before anything is written, on either side. What a first start has written and could not finish is
//!   taken back (`undo`).
//! - One agent at a time: an advisory lock on the replica is held to the end (`lock`).
//!
//! # What it does not do
//! It does not stream, retry or log; [`SetupError`] says what a person has to do. The copy itself
//! is [`crate::copy`].

mod binary_form;
pub mod identity;
mod late;
mod publishing;

mod agent_role;
mod aside;
mod base;
mod begin;
mod capture;
mod direct;
mod error;
mod init;
mod lock;
mod lock_table;
mod mismatch;
mod receiving;
mod recover;
mod replica;
mod resume;
mod role;
mod schema;
mod sending;
mod set_back;
mod setting;
mod slot;
mod source;
mod source_side;
mod target;
pub mod timeline;
mod under_way;
mod undo;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use futures_util::future;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

pub use aside::{held_by, make_room, note_aside, noted_aside, remove_half_made, set_aside};
pub use base::Watch;
pub use capture::{REMEDY as CAPTURE_REMEDY, observe as observe_capture};
pub use error::{SetupError, Side};
pub use init::{Plan, Privileged, plan};
pub use late::{Found, catch_up_from_nothing, end_late_sessions, joined, look};
pub use mismatch::Mismatch;
pub(crate) use mismatch::raise;
pub use receiving::{Uncopied, look_receiving, prepare_draining, prepare_receiving, uncopied};
pub use recover::settle_prepared;
pub use role::Statement;
pub use sending::{Logged, logged, prepare_sending};

use crate::catalog::routing;
use crate::catalog::{self, Protection, Table};
use crate::config::{Config, Databases, Route};
use crate::copy::{self, CopyJob, CopyObserver};
use crate::failpoint;
use crate::names::TableName;
use crate::names::history::{Cluster, History};
use crate::names::stream::StreamName;
use crate::pg::replication::CreatedSlot;
use crate::pg::{ConnInfo, PgError, PgLsn, Session, connect};
use crate::schema::ddl::EventsSeen;
use crate::schema::listing::{Copied, Listed};
use crate::schema::progress::Progress;
use crate::schema::stream;
use crate::shape::computed::{self, Computed, Difference, Which};
use crate::sink::replica::Distance;
use lock::Right;
use source_side::SourceSide;

/// The SQL that creates schema `dr_agent` in a database that changes are applied to. Repeatable.
pub fn replica_schema() -> String {
    schema::statements()
}

/// A database that streaming can start on.
#[derive(Debug)]
pub struct Ready {
    /// The stream: slot, publication and progress row.
    pub stream: StreamName,
    /// The term at which this agent applies.
    pub term: i64,
    /// Number of the last applied batch.
    pub batch: i64,
    /// Where streaming starts: first byte after the last applied transaction.
    pub end_lsn: PgLsn,
    /// When the last applied transaction committed on the source.
    pub commit_time: Option<SystemTime>,
    /// When it was applied, by the replica's clock, where an earlier start did.
    pub applied_at: Option<SystemTime>,
    /// The source's timeline.
    pub timeline: i32,
    /// What the LSNs here are of.
    pub history: History,
    /// The source's `server_version_num`.
    pub server_version: i32,
    /// Every table whose changes are applied, each with what is there of it already.
    pub synced: Vec<(TableName, Copied)>,
    /// Whether constraints of the copy wait for the stream.
    pub deferred: bool,
    /// What has been seen of the replica.
    pub distance: Option<Distance>,
    /// Where the source's WAL stood before the list of tables was read: a table that is not on it and
    /// changes later than this is new.
    pub as_of: PgLsn,
    /// What the source's columns are computed from, where that was compared with the replica's.
    pub computed: Option<Computed>,
    /// Whether values may travel in binary form.
    pub binary: bool,
    /// Tables that stay unprotected, and why.
    pub unpublished: Vec<(TableName, Protection)>,
    /// Tables that are to be published and cannot be now.
    pub left_out: u64,
    /// What is not as it should be and does not keep the stream from running.
    pub warnings: Vec<String>,
    /// The right to work on the stream, where something else than the replica's progress has to keep others away.
    right: Option<Right>,
}

impl Ready {
    /// Whether a source may send generated columns; of one that is not known it may be.
    pub fn sends_generated(&self) -> bool {
        self.server_version == 0 || self.server_version >= 180_000
    }

    /// With the right that this session has taken.
    async fn holding(mut self, client: Client, side: Side) -> Result<Self, SetupError> {
        self.right = Some(Right::held_by(client, side).await?);
        Ok(self)
    }

    /// Ends once the right to work on the stream is lost.
    pub async fn right_lost(&self) -> SetupError {
        match &self.right {
            Some(right) => right.lost().await,
            None => std::future::pending().await,
        }
    }
}

/// The databases to replicate, by name.
pub async fn source_databases(config: &Config) -> Result<Vec<String>, SetupError> {
    match &config.source.databases {
        Databases::List(names) => Ok(names.clone()),
        Databases::All => databases(&config.source.conninfo).await,
    }
}

/// The same, asked with the rights that `init` has.
pub async fn source_databases_as(
    config: &Config,
    privileged: &Privileged,
) -> Result<Vec<String>, SetupError> {
    match &config.source.databases {
        Databases::List(names) => Ok(names.clone()),
        Databases::All => databases(&privileged.source).await,
    }
}

async fn databases(conninfo: &ConnInfo) -> Result<Vec<String>, SetupError> {
    let client = connect(conninfo, &Session::new("dr_agent:setup"))
        .await
        .map_err(SetupError::sql(Side::Source, "connect"))?;
    catalog::databases(&client)
        .await
        .map_err(SetupError::sql(Side::Source, "list databases"))
}

/// What is published under a stream's name.
#[derive(Debug)]
pub struct Published {
    /// What its slot's LSNs are of.
    pub history: History,
    /// The tables.
    pub tables: Vec<Table>,
    /// The source's commands so far.
    pub commands: EventsSeen,
    /// What they are listed as.
    pub listed: Listed,
    /// Which of them are below a table that places their rows.
    pub tops: BTreeMap<TableName, TableName>,
}

/// Reads what is published under a stream's name; nothing before its slot is there.
///
/// # Errors
/// When the source refuses.
pub async fn published(
    source: &ConnInfo,
    stream: &StreamName,
) -> Result<Option<Published>, SetupError> {
    let client = source::open(source, stream).await?;
    let noted = source_side::note(&client, stream).await?;
    let Some(noted) = noted.filter(|noted| noted.since.is_some()) else {
        return Ok(None);
    };
    if noted.listing {
        return Err(SetupError::ListIsNew {
            publication: stream.to_string(),
        });
    }
    let found = source::observe(&client, stream).await?;
    let Some(publication) = found.publication else {
        return Ok(None);
    };
    let mut tables = found.tables;
    tables.retain(|table| publication.publishes(table) && !table.unlogged);
    let tops = routing::tops(&client, tables.iter().map(|table| &table.name)).await;
    let tops = tops.map_err(|error| {
        SetupError::sql(Side::Source, "read the partitioned tables")(error.into())
    })?;
    Ok(Some(Published {
        tops,
        history: noted.history(),
        commands: under_way::of_source(&client).await?,
        tables,
        listed: found.listed,
    }))
}

/// What the source's columns are computed from, if that is not what was `seen`, and which of these tables are not so on the
/// replica.
///
/// # Errors
/// When either side does not answer.
pub async fn altered(
    config: &Config,
    database: &str,
    seen: Option<&Computed>,
    tables: &BTreeSet<TableName>,
    which: Which,
) -> Result<Option<(Computed, Vec<Difference>)>, SetupError> {
    const DOING: &str = "look up what columns are computed from";
    let stream = config.stream(database);
    let source = source::open(&config.source.conninfo.with_dbname(database), &stream).await?;
    let before = under_way::of_source(&source).await?;
    let computed = computed::read(&source).await;
    let computed = computed.map_err(SetupError::sql(Side::Source, DOING))?;
    if seen == Some(&computed) {
        return Ok(None);
    }
    let replica = replica::open(&config.replica.conninfo.with_dbname(database), &stream).await?;
    let found = computed::differences(&computed, &replica, tables, which).await;
    let found = found.map_err(SetupError::sql(Side::Replica, DOING))?;
    if !found.is_empty() {
        // A command on its way says the same, at its place.
        let after = under_way::of_source(&source).await?;
        if before != after || !under_way::have_arrived(&after, &replica).await? {
            return Ok(None);
        }
    }
    Ok(Some((computed, found)))
}

/// Brings `database` to where streaming can start. Repeatable, whatever was killed before.
///
/// `uncopied` is a table that the stream has shown not to be on the replica, or to be another one. `observer` is told how the
/// copy goes; after `cancel` this ends soon and the next start goes on.
pub async fn prepare(
    config: &Config,
    database: &str,
    uncopied: Option<&TableName>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Ready, SetupError> {
    Box::pin(direct::prepare(
        config, database, uncopied, observer, cancel,
    ))
    .await
}

/// Looks whether a start would be refused, and writes nothing: what `check` asks.
///
/// # Errors
/// What [`prepare`], or [`prepare_sending`] under route `kinesis`, would refuse.
pub async fn rehearse(config: &Config, database: &str) -> Result<(), SetupError> {
    match config.route {
        Route::Direct => Box::pin(direct::rehearse(config, database)).await,
        Route::Kinesis { .. } => Box::pin(sending::rehearse(config, database)).await,
    }
}

/// The sessions and findings that the steps share.
struct Setup<'a> {
    database: &'a str,
    source: SourceSide<'a>,
    replica_info: ConnInfo,
    replica: Client,
    observer: &'a dyn CopyObserver,
    /// What has been seen of the replica.
    distance: Option<Distance>,
}

impl Setup<'_> {
    /// Copies tables at the snapshot that was exported; its connection has to stay idle and open.
    async fn copy(
        &self,
        tables: Vec<Table>,
        exported: &CreatedSlot,
        whole_schema: bool,
    ) -> Result<(), SetupError> {
        let snapshot = exported.snapshot_name.as_deref().ok_or_else(|| {
            let error = PgError::Protocol("the slot exported no snapshot".to_owned());
            SetupError::sql(Side::Source, "create a slot")(error)
        })?;
        let job = CopyJob {
            source: &self.source.info,
            replica: &self.replica_info,
            stream: &self.source.stream,
            tables,
            listed: &self.source.found.listed,
            snapshot,
            snapshot_lsn: exported.consistent_point,
            settings: &self.source.config.copy,
            whole_schema,
            beside: false,
        };
        copy::copy(job, self.observer, self.source.cancel)
            .await
            .map_err(|source| SetupError::Copy {
                database: self.database.to_owned(),
                source: Box::new(source),
            })
    }

    /// What streaming needs to know; and the session that holds the right to the stream.
    async fn finish(
        mut self,
        (cluster, history): (Cluster, History),
        progress: Progress,
        as_of: PgLsn,
    ) -> Result<(Ready, Client), SetupError> {
        let binary = binary_form::binary_travels(&self.source.client, &self.source.stream)
            .await
            .map_err(SetupError::sql(
                Side::Source,
                "look up the types of published columns",
            ))?;
        let computed = computed::read(&self.source.client)
            .await
            .map_err(SetupError::sql(
                Side::Source,
                "look up what columns are computed from",
            ))?;
        let stream = &self.source.stream;
        let asked = Instant::now();
        let (rows, deferred, noted, here) = future::join4(
            replica::synced_tables(&self.replica, stream),
            replica::has_deferred(&self.replica, stream),
            stream::note_tables(&self.replica, stream, as_of),
            computed::read(&self.replica),
        )
        .await;
        let round_trip = asked.elapsed();
        let rows = rows?;
        noted.map_err(SetupError::sql(Side::Replica, "note which tables are here"))?;
        // What is not ready is copied once more, as it is by then.
        let ready = rows.iter().filter(|row| row.ready);
        let tables = ready.map(|row| row.table.clone()).collect();
        let looking = "look up what columns are computed from";
        let here = here.map_err(SetupError::sql(Side::Replica, looking))?;
        let which = Which::Generated;
        let found =
            computed::differences_from(&computed, &here, &self.replica, &tables, which).await;
        let found = found.map_err(SetupError::sql(Side::Replica, looking))?;
        if !found.is_empty() {
            return Err(SetupError::Computed(found));
        }
        if self.database == replica::MAINTENANCE {
            // It may hold tables now.
            replica::guard(&mut self.replica, self.database).await?;
        }
        failpoint::hit("setup:tables-noted");
        let prepared = Ready {
            term: progress.term,
            batch: progress.batch,
            end_lsn: progress.end_lsn,
            commit_time: progress.commit_time,
            applied_at: progress.applied_at,
            timeline: cluster.timeline,
            history,
            server_version: self.source.found.version,
            synced: replica::synced(rows),
            deferred: deferred?,
            distance: self.distance.map(|seen| Distance {
                round_trip: seen.round_trip.min(round_trip),
                ..seen
            }),
            as_of,
            computed: Some(computed),
            binary,
            left_out: self.source.left_out,
            unpublished: self.source.wanted.unpublished,
            warnings: self.source.warnings,
            stream: self.source.stream,
            right: None,
        };
        Ok((prepared, self.replica))
    }
}
