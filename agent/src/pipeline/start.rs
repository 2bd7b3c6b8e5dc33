//! Opens both ends of one session and starts its tasks: a source of transactions, a sink for batches, and what stands between
//! or beside them.
//!
//! ```text
//! Whole    walsender ▶ … ▶ [spool] ▶ replica       monitor, archive
//! Send     walsender ▶ … ▶ [spool] ▶ Kinesis       monitor, archive
//! Apply    Kinesis   ▶ … ▶ replica
//! Log      walsender ▶ … ▶ [spool] ▶ nowhere       monitor, archive
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::apply::{Deferred, apply_batches};
use super::error::SessionError;
use super::streaming::{Archiving, Owned, Streaming};
use super::{Leg, Pipeline, QUEUE_TRANSACTIONS};
use crate::archive::{Layout, Log, LogSettings, SpoolLimits};
use crate::batch::{Batch, IN_FLIGHT_MAX, Spacing};
use crate::changelog::Author;
use crate::config::Archive;
use crate::error::chain;
use crate::kinesis::Kinesis;
use crate::ledger::{BatchNumber, FlushLsn, Ledger};
use crate::metrics::{ArchiveMetrics, StreamMetrics};
use crate::monitor::{self, Report};
use crate::pg::ConnInfo;
use crate::setup::{self, Prepared};
use crate::sink::kinesis::KinesisSink;
use crate::sink::replica::{Applied, Outcome, ReplicaSink, SegmentLimits, SinkSettings, Synced};
use crate::source::{
    self, IntakeLimits, Received, SourcePosition, SourceSettings, StreamSettings, Until,
};
use crate::spill::{self, SpillSpace};

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
    outcomes: mpsc::Receiver<Outcome>,
    archive: Option<Archiving>,
    ledger: Ledger,
    spacing: Spacing,
}

/// A sink that lets go of every batch: it is in the spool.
async fn let_go(
    mut batches: mpsc::Receiver<Arc<Batch>>,
    outcomes: mpsc::Sender<Outcome>,
) -> Option<SessionError> {
    while let Some(batch) = batches.recv().await {
        let outcome = Outcome {
            batch,
            result: Ok(Applied::default()),
            took: Duration::ZERO,
        };
        if outcomes.send(outcome).await.is_err() {
            break;
        }
    }
    None
}

impl Pipeline {
    /// Opens both ends and starts the tasks of one session.
    pub(super) async fn start(&self, prepared: &Prepared) -> Result<Streaming<'_>, SessionError> {
        let limits = &self.config.limits;
        let directory = spill::directory_of(&limits.spill_directory, &self.stream);
        let space = SpillSpace::open(directory, limits.spill_bytes)?;
        let mut tasks = JoinSet::new();
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let (sink, spacing) = match self.leg {
            Leg::Send => self.kinesis(prepared, outcomes, &mut tasks).await?,
            Leg::Whole | Leg::Apply | Leg::Log => {
                self.replica(prepared, outcomes, &mut tasks).await?
            }
        };
        let mut ledger = Ledger::resume(1, BatchNumber(prepared.batch), prepared.end_lsn);
        let (batches, archive) = match &self.config.archive {
            Some(archive) if self.leg != Leg::Apply => {
                let (to_spool, archiving) = self.archive(archive, prepared, sink, &mut tasks)?;
                if archive.required {
                    ledger = ledger.with_archive(*archiving.uploaded.borrow());
                }
                (to_spool, Some(archiving))
            }
            _ => (sink, None),
        };
        let ends = Ends {
            leg: self.leg,
            space,
            tasks,
            batches,
            outcomes: outcomes_seen,
            archive,
            ledger,
            spacing,
        };
        self.stream(prepared, ends)
    }

    /// Starts the tasks of a session that only writes the change log: nothing is ever acknowledged.
    pub(super) fn start_logging(
        &self,
        archive: &Archive,
        prepared: &Prepared,
    ) -> Result<Streaming<'_>, SessionError> {
        let limits = &self.config.limits;
        let directory = spill::directory_of(&limits.spill_directory, &self.stream);
        let mut tasks = JoinSet::new();
        let (outcomes, outcomes_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let (sink, spooled) = mpsc::channel(IN_FLIGHT_MAX);
        tasks.spawn(let_go(spooled, outcomes));
        let (batches, archiving) = self.archive(archive, prepared, sink, &mut tasks)?;
        let ends = Ends {
            leg: Leg::Log,
            space: SpillSpace::open(directory, limits.spill_bytes)?,
            tasks,
            batches,
            outcomes: outcomes_seen,
            archive: Some(Archiving {
                required: false,
                ..archiving
            }),
            // A required sink that is told of nothing.
            ledger: Ledger::resume(1, BatchNumber(prepared.batch), prepared.end_lsn)
                .with_archive(prepared.end_lsn),
            spacing: Spacing::new(Duration::ZERO, IN_FLIGHT_MAX),
        };
        self.stream(prepared, ends)
    }

    /// Starts what brings transactions.
    fn stream(&self, prepared: &Prepared, ends: Ends) -> Result<Streaming<'_>, SessionError> {
        let Ends {
            leg,
            space,
            mut tasks,
            batches,
            outcomes,
            archive,
            ledger,
            spacing,
        } = ends;
        let (flush, flush_seen) = watch::channel(ledger.flush_lsn());
        let (position, position_seen) = watch::channel(SourcePosition::default());
        let (received, transactions) = mpsc::channel(QUEUE_TRANSACTIONS);
        let (reports, reports_seen) = mpsc::channel(4);
        match leg {
            Leg::Whole | Leg::Send | Leg::Log => {
                self.tail(prepared, space, received, flush_seen, position, &mut tasks);
                self.monitor(reports, &mut tasks);
            }
            Leg::Apply => {
                self.receive(prepared, space, received, position, &mut tasks)?;
                self.look_for_tables(&mut tasks);
            }
        }
        Ok(Streaming {
            pipeline: self,
            leg,
            tasks,
            transactions,
            outcomes,
            reports: reports_seen,
            position: position_seen,
            batches: Some(batches),
            flush,
            archive,
            owned: Owned::new(&self.config, ledger, spacing, self.lag.clone()),
        })
    }

    fn source_info(&self) -> ConnInfo {
        self.config.source.conninfo.with_dbname(&self.database)
    }

    fn intake_limits(&self) -> IntakeLimits {
        IntakeLimits {
            queue_bytes: self.config.limits.queue_bytes,
            transaction_bytes: self.config.limits.transaction_bytes,
        }
    }

    /// The replica as the sink.
    async fn replica(
        &self,
        prepared: &Prepared,
        outcomes: mpsc::Sender<Outcome>,
        tasks: &mut Tasks,
    ) -> Result<(Batches, Spacing), SessionError> {
        let limits = &self.config.limits;
        let replica = self.config.replica.conninfo.with_dbname(&self.database);
        let (sink, batches) = ReplicaSink::connect(
            &replica,
            SinkSettings {
                stream: self.stream.clone(),
                term: prepared.term,
                // Several are in memory at a time (read, folded, on their way), as rows, not as messages.
                segment: SegmentLimits {
                    bytes: limits.batch_bytes,
                    changes: (limits.batch_changes / 4).max(1),
                },
                lanes: self.config.replica.lanes,
                spread_changes: limits.spread_changes,
            },
            Synced {
                tables: prepared.synced.iter().cloned().collect(),
                as_of: prepared.as_of,
            },
        )
        .await?;
        let newest_snapshot = prepared
            .synced
            .iter()
            .filter_map(|(_, snapshot)| *snapshot)
            .max();
        let mut deferred = Deferred {
            replica,
            stream: self.stream.clone(),
            after: newest_snapshot,
        };
        deferred.passed(prepared.end_lsn).await?;
        let spacing = Spacing::new(sink.round_trip(), IN_FLIGHT_MAX);
        tasks.spawn(apply_batches(sink, outcomes, deferred));
        Ok((batches, spacing))
    }

    /// The Kinesis stream as the sink.
    async fn kinesis(
        &self,
        prepared: &Prepared,
        outcomes: mpsc::Sender<Outcome>,
        tasks: &mut Tasks,
    ) -> Result<(Batches, Spacing), SessionError> {
        let kinesis = Kinesis::open(&self.kinesis_stream()?).await?;
        let author = self.author(prepared)?;
        let (batches, batches_seen) = mpsc::channel(IN_FLIGHT_MAX);
        let sink = KinesisSink::new(kinesis, author, StreamMetrics::new(&self.database));
        tasks.spawn(async move {
            let ended = Box::pin(sink.run(batches_seen, outcomes)).await;
            ended.err().map(SessionError::KinesisSink)
        });
        Ok((batches, Spacing::every(PUT_EVERY, IN_FLIGHT_MAX)))
    }

    fn kinesis_stream(&self) -> Result<String, SessionError> {
        let stream = self.config.route.kinesis_stream(&self.database);
        stream.ok_or(SessionError::NoKinesisStream)
    }

    /// Who writes in this session.
    fn author(&self, prepared: &Prepared) -> Result<Author, SessionError> {
        Ok(Author {
            stream: self.stream.to_string(),
            system_identifier: system_identifier(prepared)?,
            term: prepared.term,
            writer: rand::random(),
        })
    }

    /// The change log, before the sink.
    fn archive(
        &self,
        archive: &Archive,
        prepared: &Prepared,
        sink: Batches,
        tasks: &mut Tasks,
    ) -> Result<(Batches, Archiving), SessionError> {
        let log = self.log(archive, prepared)?;
        let position = log
            .waiting_from()
            .map_or(prepared.end_lsn, |waiting| waiting.min(prepared.end_lsn));
        let (uploaded, uploaded_seen) = watch::channel(position);
        let (to_spool, spooled) = mpsc::channel(IN_FLIGHT_MAX);
        let metrics = ArchiveMetrics::new(&self.database);
        let (spooling, uploading) = log.tasks(spooled, sink, uploaded, metrics);
        tasks.spawn(async move { spooling.await.err().map(SessionError::Spool) });
        let archiving = Archiving {
            uploaded: uploaded_seen,
            required: archive.required,
            upload: AbortOnDropHandle::new(tokio::spawn(uploading)),
        };
        Ok((to_spool, archiving))
    }

    /// The change log of one session, with what an earlier one left in the spool.
    fn log(&self, archive: &Archive, prepared: &Prepared) -> Result<Log, SessionError> {
        let settings = LogSettings {
            author: self.author(prepared)?,
            url: archive.url.clone(),
            encryption: archive.encryption.clone(),
            layout: Layout::new(&self.stream, system_identifier(prepared)?),
            directory: archive.spool_directory.join(self.stream.as_str()),
            limits: SpoolLimits {
                bytes: archive.spool_bytes,
                segment_bytes: archive.segment_bytes,
            },
            // The other half of the time is for the upload.
            age_max: self.config.objectives.rpo / 2,
            required: archive.required,
            retry_max: self.config.limits.retry_max,
        };
        Ok(Log::open(settings)?)
    }

    /// The slot as the source.
    fn tail(
        &self,
        prepared: &Prepared,
        space: SpillSpace,
        received: mpsc::Sender<Received>,
        flush: watch::Receiver<FlushLsn>,
        position: watch::Sender<SourcePosition>,
        tasks: &mut Tasks,
    ) {
        let settings = SourceSettings {
            conninfo: self.source_info(),
            stream: self.stream.clone(),
            start: prepared.end_lsn,
            binary: self.binary && prepared.binary,
            limits: self.intake_limits(),
            catch_up_bytes: self.config.limits.catch_up_bytes,
        };
        tasks.spawn(async move {
            source::run(settings, space, received, flush, position)
                .await
                .err()
                .map(SessionError::Source)
        });
    }

    fn monitor(&self, reports: mpsc::Sender<Report>, tasks: &mut Tasks) {
        let (config, stream) = (Arc::clone(&self.config), self.stream.clone());
        let source = self.source_info();
        tasks.spawn(async move {
            monitor::run(&config, &source, &stream, reports)
                .await
                .err()
                .map(SessionError::Monitor)
        });
    }

    /// A table that never changes after it was published is in no record of the stream.
    fn look_for_tables(&self, tasks: &mut Tasks) {
        let (config, database) = (Arc::clone(&self.config), self.database.clone());
        let metrics = self.metrics.clone();
        tasks.spawn(async move {
            let mut said = None;
            loop {
                tokio::time::sleep(LOOK_FOR_TABLES_EVERY).await;
                let uncopied = match setup::uncopied(&config, &database).await {
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
        prepared: &Prepared,
        space: SpillSpace,
        received: mpsc::Sender<Received>,
        position: watch::Sender<SourcePosition>,
        tasks: &mut Tasks,
    ) -> Result<(), SessionError> {
        let archive = self.config.archive.as_ref();
        let settings = StreamSettings {
            kinesis_stream: self.kinesis_stream()?,
            stream: self.stream.clone(),
            system_identifier: system_identifier(prepared)?,
            term: prepared.term,
            start: prepared.end_lsn,
            commit_time: prepared.commit_time,
            limits: self.intake_limits(),
            archive: archive.map(|archive| (archive.url.clone(), archive.encryption.clone())),
            patience: (self.config.objectives.rpo * 2).max(PATIENCE_MIN),
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

fn system_identifier(prepared: &Prepared) -> Result<u64, SessionError> {
    let text = &prepared.system_identifier;
    text.parse()
        .map_err(|_| SessionError::SystemIdentifier(text.clone()))
}
