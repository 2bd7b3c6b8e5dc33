//! Opens both ends of one session and starts its tasks: a source of transactions, a sink for batches, and what stands between
//! or beside them.
//!
//! ```text
//! Whole    walsender ▶ … ▶ [change log] ▶ replica       monitor
//! Send     walsender ▶ … ▶ [change log] ▶ Kinesis       monitor
//! Apply    Kinesis   ▶ … ▶ replica
//! ```

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;

use super::apply::{DeferredStatements, apply_batches};
use super::change_log::{SessionLog, spool_first};
use super::cover::Cover;
use super::error::SessionError;
use super::late::Late;
use super::owner::{Owner, Terms};
use super::passwords::Passwords;
use super::streaming::{LateSide, Shown, Streaming};
use super::waiting::Waiting;
use super::{Leg, Pipeline, now_instant};
use crate::archive::log::idle_age;
use crate::cloud::kinesis::Kinesis;
use crate::config::{Ddl, SetAside};
use crate::error::chain;
use crate::flow::batch::{Batch, IN_FLIGHT_MAX, Spacing};
use crate::flow::changelog::Author;
use crate::flow::ledger::{BatchNumber, FlushLsn};
use crate::flow::shipment::Shipment;
use crate::flow::spill::{self, SpillSpace};
use crate::names::TableName;
use crate::observe::metrics::StreamMetrics;
use crate::pg::{ConnInfo, PgLsn};
use crate::setup::{self, Ready, SetupError};
use crate::shape::computed::Which;
use crate::sink::kinesis::KinesisSink;
use crate::sink::replica::{Beside, ReplicaSink, SinkSettings, Synced};
use crate::sink::{self, Outcome};
use crate::source::{
    self, IntakeLimits, MadeOf, Received, SlotUse, SourcePosition, SourceSettings, StreamSettings,
    Until,
};
use crate::watch::coverage::Unprotected;
use crate::watch::monitor;

/// Between two batches that are not full: a record has its price, and small batches compress badly. A transaction that comes
/// alone does not wait.
const PUT_EVERY: Duration = Duration::from_millis(100);

/// How often it is looked whether the source publishes what the replica does not have.
const LOOK_FOR_TABLES_EVERY: Duration = Duration::from_secs(10);

/// Tables that are published and not on the replica, in `dr_agent_unprotected_objects`.
const NOT_COPIED: &str = "table_not_copied";

/// The archive has a segment within an RPO, if the store takes it. It is given twice that, and so much at least.
const PATIENCE_MIN: Duration = Duration::from_secs(10);

type Tasks = JoinSet<Option<SessionError>>;
type Batches = mpsc::Sender<Arc<Batch>>;

/// A sink and what is around it, before transactions come.
struct Ends {
    leg: Leg,
    space: SpillSpace,
    tasks: Tasks,
    batches: Batches,
    outcomes: mpsc::Receiver<Outcome<SessionError>>,
    held: Option<SessionLog>,
    shipment: Shipment<OwnedSemaphorePermit>,
    spacing: Spacing,
    beside: Option<Beside>,
}

impl Pipeline {
    /// Opens both ends and starts the tasks of one session.
    pub(super) async fn start(&self, prepared: &Ready) -> Result<Streaming<'_>, SessionError> {
        let limits = &self.config.limits;
        let directory = spill::directory_of(&limits.spill_directory, &self.stream);
        let space = SpillSpace::open(directory, limits.spill_bytes)?;
        let mut tasks = JoinSet::new();
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let beside = self.copies_beside().then(Beside::default);
        let (sink, spacing) = match self.leg {
            Leg::Send => self.kinesis(prepared, outcomes, &mut tasks).await?,
            Leg::Whole | Leg::Apply => {
                let beside = beside.clone();
                self.replica(prepared, beside, outcomes, &mut tasks).await?
            }
        };
        let (bytes, changes) = (limits.batch_bytes, limits.batch_changes);
        let number = BatchNumber(prepared.batch);
        let mut shipment = Shipment::resume(number, prepared.end_lsn, bytes, changes);
        let (mut batches, mut held) = (sink, None);
        if let Some(log) = &self.change_log {
            let log = log.of(prepared.history);
            // Until it says how far it is.
            shipment = shipment.held(PgLsn::from(0));
            held = Some(log.clone());
            let (to_log, to_be_logged) = mpsc::channel(IN_FLIGHT_MAX);
            let sink = std::mem::replace(&mut batches, to_log);
            tasks.spawn(async move { spool_first(log, to_be_logged, sink).await.err() });
        }
        let ends = Ends {
            leg: self.leg,
            space,
            tasks,
            batches,
            outcomes: outcomes_seen,
            held,
            shipment,
            spacing,
            beside,
        };
        self.stream(prepared, ends)
    }

    /// Starts what brings transactions.
    fn stream(&self, prepared: &Ready, ends: Ends) -> Result<Streaming<'_>, SessionError> {
        let Ends {
            leg,
            space,
            mut tasks,
            batches,
            outcomes,
            held,
            shipment,
            spacing,
            beside,
        } = ends;
        let (flush, flush_seen) = watch::channel(shipment.flush_lsn());
        let (position, position_seen) = watch::channel(SourcePosition::default());
        let (received, transactions) = source::queue();
        let (reports, reports_seen) = mpsc::channel(4);
        match leg {
            Leg::Whole | Leg::Send => {
                self.tail(prepared, space, received, flush_seen, position, &mut tasks);
                self.monitor(reports, &mut tasks);
                if leg == Leg::Whole {
                    self.passwords(prepared, &mut tasks);
                    self.look_for_alterations(prepared, beside.clone(), &mut tasks);
                }
            }
            Leg::Apply => {
                self.receive(prepared, space, received, position, &mut tasks)?;
                if beside.is_none() {
                    self.look_for_tables(&mut tasks);
                }
                self.look_for_alterations(prepared, beside.clone(), &mut tasks);
            }
        }
        if leg != Leg::Send {
            let cover = Cover {
                replica: self.config.replica.conninfo.with_dbname(&self.database),
                stream: self.stream.clone(),
                status: self.status.clone(),
                changed: Arc::clone(&self.aside.changed),
            };
            tasks.spawn(cover.run());
            let waiting = Waiting {
                replica: self.config.replica.conninfo.with_dbname(&self.database),
                stream: self.stream.clone(),
                term: prepared.term,
                aside: self.aside.clone(),
                wanted: self.wake.clone(),
                wholly: None,
            };
            tasks.spawn(waiting.run());
        }
        let at = shipment.shipped();
        let late = beside.map(|beside| self.late(prepared, beside, at, &mut tasks));
        let terms = Terms {
            left_out: prepared.left_out,
            copies_beside: late.is_some(),
            grace: self.config.limits.shutdown_grace,
        };
        Ok(Streaming {
            pipeline: self,
            late,
            leg,
            tasks,
            transactions,
            outcomes,
            reports: reports_seen,
            position: position_seen,
            batches,
            flush,
            held,
            shown: Shown::default(),
            arrived: Vec::new(),
            owner: Owner::new(shipment, spacing, self.status.lag(), terms, now_instant()),
        })
    }

    /// Starts what brings passwords from server to server.
    fn passwords(&self, prepared: &Ready, tasks: &mut Tasks) {
        if self.config.source.ddl != Ddl::Replicate {
            return;
        }
        let passwords = Passwords {
            source: self.config.source.conninfo.with_dbname(&self.database),
            replica: self.config.replica.conninfo.with_dbname(&self.database),
            stream: self.stream.clone(),
            term: prepared.term,
        };
        tasks.spawn(passwords.run());
    }

    /// Whether late tables are copied beside the stream, and those in trouble set aside until they are.
    pub(super) fn copies_beside(&self) -> bool {
        self.leg != Leg::Send && self.config.replica.set_aside == SetAside::Retry
    }

    fn late(&self, prepared: &Ready, beside: Beside, at: PgLsn, tasks: &mut Tasks) -> LateSide {
        let (asks, asked) = mpsc::channel(1);
        let (shipped, shipped_seen) = watch::channel(at);
        let wake = Arc::new(Notify::new());
        let late = Late {
            config: Arc::clone(&self.config),
            leg: self.leg,
            history: prepared.history,
            database: self.database.clone(),
            stream: self.stream.clone(),
            term: prepared.term,
            sends_generated: prepared.sends_generated(),
            beside,
            asks,
            wake: Arc::clone(&wake),
            wanted: self.wake.clone(),
            shipped: shipped_seen,
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            aside: self.aside.clone(),
        };
        tasks.spawn(late.run());
        LateSide {
            asked,
            pausing: None,
            shipped,
            wake,
        }
    }

    fn source_info(&self) -> ConnInfo {
        self.config.source.conninfo.with_dbname(&self.database)
    }

    /// The replica as the sink.
    async fn replica(
        &self,
        prepared: &Ready,
        beside: Option<Beside>,
        outcomes: mpsc::Sender<Outcome<SessionError>>,
        tasks: &mut Tasks,
    ) -> Result<(Batches, Spacing), SessionError> {
        let replica = self.config.replica.conninfo.with_dbname(&self.database);
        let (sink, batches) = ReplicaSink::connect(
            &replica,
            SinkSettings {
                distance: prepared.distance,
                ..SinkSettings::of(&self.config, self.stream.clone(), prepared.term)
            },
            Synced {
                tables: prepared.synced.iter().cloned().collect(),
                listed_by: self.stream.clone(),
                as_of: prepared.as_of,
                beside: beside.clone(),
                left_out: HashSet::new(),
                sends_generated: prepared.sends_generated(),
            },
        )
        .await?;
        let newest_snapshot = prepared
            .synced
            .iter()
            .filter_map(|(_, copied)| copied.snapshot_lsn)
            .max()
            .filter(|_| prepared.deferred);
        let mut deferred = DeferredStatements {
            replica,
            stream: self.stream.clone(),
            after: newest_snapshot,
            beside: beside.unwrap_or_default(),
            joined: None,
            status: self.status.clone(),
            again: None,
        };
        deferred.passed(prepared.end_lsn).await?;
        let spacing = Spacing::new(sink.round_trip(), IN_FLIGHT_MAX);
        tasks.spawn(apply_batches(sink, outcomes, deferred));
        Ok((batches, spacing))
    }

    /// The Kinesis stream as the sink.
    async fn kinesis(
        &self,
        prepared: &Ready,
        outcomes: mpsc::Sender<Outcome<SessionError>>,
        tasks: &mut Tasks,
    ) -> Result<(Batches, Spacing), SessionError> {
        let kinesis = Kinesis::open(&self.kinesis_stream()?).await?;
        let author = self.author(prepared)?;
        let metrics = StreamMetrics::new(&self.database);
        let (sink, batches) = KinesisSink::new(kinesis, author, metrics);
        tasks.spawn(async move {
            sink::hand_on(sink, outcomes).await;
            None
        });
        Ok((batches, Spacing::every(PUT_EVERY, IN_FLIGHT_MAX)))
    }

    fn kinesis_stream(&self) -> Result<String, SessionError> {
        let stream = self.config.route.kinesis_stream(&self.database);
        stream.ok_or(SessionError::NoKinesisStream)
    }

    /// Who writes in this session.
    fn author(&self, prepared: &Ready) -> Result<Author, SessionError> {
        Ok(Author {
            stream: self.stream.to_string(),
            history: prepared.history,
            term: prepared.term,
            writer: rand::random(),
        })
    }

    /// The slot as the source.
    fn tail(
        &self,
        prepared: &Ready,
        space: SpillSpace,
        received: mpsc::Sender<Received>,
        flush: watch::Receiver<FlushLsn>,
        position: watch::Sender<SourcePosition>,
        tasks: &mut Tasks,
    ) {
        let settings = SourceSettings {
            conninfo: self.source_info(),
            stream: self.stream.clone(),
            slot: SlotUse::Own,
            start: prepared.end_lsn,
            binary: self.binary && prepared.binary,
            limits: IntakeLimits::of(&self.config.limits),
            catch_up_bytes: self.config.limits.catch_up_bytes,
            types: match &prepared.computed {
                Some(computed) => Arc::clone(computed.types()),
                None => MadeOf::default(),
            },
        };
        tasks.spawn(async move {
            source::run(settings, space, received, flush, position)
                .await
                .err()
                .map(SessionError::Source)
        });
    }

    fn monitor(&self, reports: mpsc::Sender<Vec<Unprotected>>, tasks: &mut Tasks) {
        let (config, stream) = (Arc::clone(&self.config), self.stream.clone());
        let (source, servers) = (self.source_info(), self.status.servers().clone());
        tasks.spawn(async move {
            monitor::run(&config, &source, &stream, &servers, reports)
                .await
                .err()
                .map(SessionError::Monitor)
        });
    }

    /// What columns are computed from is in no record of the stream.
    fn look_for_alterations(&self, prepared: &Ready, beside: Option<Beside>, tasks: &mut Tasks) {
        let (config, database) = (Arc::clone(&self.config), self.database.clone());
        let tables = prepared.synced.iter().map(|(table, _)| table.clone());
        let listed: BTreeSet<TableName> = tables.collect();
        let beside = beside.unwrap_or_default();
        let mut seen = prepared.computed.clone();
        let which = match seen.is_some() {
            true => Which::Generated,
            false => Which::All,
        };
        tasks.spawn(async move {
            loop {
                tokio::time::sleep(LOOK_FOR_TABLES_EVERY).await;
                let tables = listed.union(&beside.tables()).cloned().collect();
                match setup::altered(&config, &database, seen.as_ref(), &tables, which).await {
                    Ok(None) => {}
                    Ok(Some((computed, found))) if found.is_empty() => seen = Some(computed),
                    Ok(Some((_, found))) => return Some(SetupError::Computed(found).into()),
                    // Under route `kinesis` the source need not be in reach.
                    Err(error) => {
                        tracing::debug!(database, error = %chain(&error), "no look for alterations");
                    }
                }
            }
        });
    }

    /// A table that never changes after it was published is in no record of the stream.
    fn look_for_tables(&self, tasks: &mut Tasks) {
        let (config, database) = (Arc::clone(&self.config), self.database.clone());
        let metrics = self.metrics.clone();
        tasks.spawn(async move {
            let (mut said, mut archived) = (None, setup::Watch::default());
            loop {
                tokio::time::sleep(LOOK_FOR_TABLES_EVERY).await;
                let uncopied = match setup::uncopied(&config, &database, &mut archived).await {
                    Ok(uncopied) => uncopied,
                    // Neither the source nor the archive need be in reach all the time.
                    Err(error) => {
                        tracing::debug!(database, error = %chain(&error), "no look for new tables");
                        continue;
                    }
                };
                metrics.unprotected(NOT_COPIED, uncopied.tables.len() as u64);
                let Some(table) = uncopied.tables.into_iter().next() else {
                    continue;
                };
                if uncopied.source_in_reach {
                    return Some(SessionError::NotCopied { table });
                }
                if said.as_ref() != Some(&table) {
                    tracing::error!(
                        database, %table,
                        "a table is new on the source and not on the replica; it is copied once source.url can be reached from here"
                    );
                    said = Some(table);
                }
            }
        });
    }

    /// The Kinesis stream as the source.
    fn receive(
        &self,
        prepared: &Ready,
        space: SpillSpace,
        received: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
        tasks: &mut Tasks,
    ) -> Result<(), SessionError> {
        let archive = self.config.archive.as_ref();
        let settings = StreamSettings {
            kinesis_stream: self.kinesis_stream()?,
            stream: self.stream.clone(),
            history: prepared.history,
            term: prepared.term,
            start: prepared.end_lsn,
            commit_time: prepared.commit_time,
            applied_at: prepared.applied_at,
            limits: IntakeLimits::of(&self.config.limits),
            archive: archive.map(|archive| (archive.url.clone(), archive.encryption.clone())),
            // What is missing may be a heartbeat, and wait in an idle segment.
            patience: (self.config.objectives.rpo * 2).max(PATIENCE_MIN)
                + idle_age(self.config.objectives.rpo / 2),
        };
        let metrics = StreamMetrics::new(&self.database);
        tasks.spawn(async move {
            let receiving =
                source::receive(settings, Until::Stopped, space, received, position, metrics);
            Box::pin(receiving).await.err().map(SessionError::Source)
        });
        Ok(())
    }
}
