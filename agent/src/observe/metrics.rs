//! Every metric the agent exports, in one table, and the handles the pipelines write through.
//!
//! The names are a contract (ARCHITECTURE.md, README.md): dashboards and alerts outside this
//! repository depend on them. All but the first three carry the label `database`.

use std::time::{Duration, SystemTime};

use metrics::{Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge};
use metrics::{describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::cloud::kinesis::{PutStats, ReadStats};
use crate::config::Objectives;
use crate::error::Class;
use crate::observe::reader::Reader;
use crate::observe::status::{DatabaseStatus, State};
use crate::pg::PgLsn;
use crate::watch::coverage::DRIFT_KINDS;
use crate::watch::{Servers, WatchedSide};

/// Kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes both ways.
    Gauge,
    /// Distribution.
    Histogram,
}

/// Name, kind and meaning of every metric.
pub const ALL: &[(&str, Kind, &str)] = &[
    (
        "dr_agent_build_info",
        Kind::Gauge,
        "Version of the agent; always 1",
    ),
    (
        "dr_agent_objective_rpo_seconds",
        Kind::Gauge,
        "Recovery point objective, from the configuration",
    ),
    (
        "dr_agent_objective_rto_seconds",
        Kind::Gauge,
        "Recovery time objective, from the configuration",
    ),
    (
        "dr_agent_state",
        Kind::Gauge,
        "1 for the state the pipeline is in, 0 for the others",
    ),
    (
        "dr_agent_lag_seconds",
        Kind::Gauge,
        "Seconds of committed work that would be lost if the source vanished now; NaN while unknown",
    ),
    (
        "dr_agent_lag_bytes",
        Kind::Gauge,
        "WAL written on the source and not yet applied; NaN while the source does not answer",
    ),
    (
        "dr_agent_rpo_breached",
        Kind::Gauge,
        "1 while the lag is above the RPO, or unknown, or an error that needs a person stands in the way",
    ),
    (
        "dr_agent_stage_lag_seconds",
        Kind::Gauge,
        "Lag by stage: received from the source, queued for the replica, applied",
    ),
    (
        "dr_agent_transactions_total",
        Kind::Counter,
        "Source transactions made durable on the replica",
    ),
    (
        "dr_agent_changes_total",
        Kind::Counter,
        "Changes in those transactions",
    ),
    (
        "dr_agent_net_changes_total",
        Kind::Counter,
        "Net changes carried out for them",
    ),
    (
        "dr_agent_batches_total",
        Kind::Counter,
        "Batches made durable on the replica",
    ),
    (
        "dr_agent_batch_apply_seconds",
        Kind::Histogram,
        "Time from sending a batch to its being durable",
    ),
    (
        "dr_agent_slow_path_total",
        Kind::Counter,
        "Batches replayed change by change after a constraint refused the folded form",
    ),
    (
        "dr_agent_ddl_total",
        Kind::Counter,
        "Commands (DDL) of the source on the replica, by outcome: nothing, statement, shape, copy, later, skipped, waits",
    ),
    (
        "dr_agent_ddl_pending",
        Kind::Gauge,
        "Objects that are not as a command of the source has left them there, and are tried again; NaN while that is not known",
    ),
    (
        "dr_agent_shape_drift_objects",
        Kind::Gauge,
        "Objects that differ from the source although no command has told of it, by kind; they count as pending, too",
    ),
    (
        "dr_agent_shape_compared_seconds",
        Kind::Gauge,
        "Seconds since everything that the source has, as it last looked, was compared with the replica; NaN before, and where the source does not tell",
    ),
    (
        "dr_agent_source_reader",
        Kind::Gauge,
        "1 for how the source is read now: eager, lazy (behind, or a busy source) or catch_up (far behind)",
    ),
    (
        "dr_agent_spread_batches_total",
        Kind::Counter,
        "Batches that were large enough to be spread over several lanes",
    ),
    (
        "dr_agent_bytes_total",
        Kind::Counter,
        "Bytes of pgoutput messages, received from the source",
    ),
    (
        "dr_agent_slot_retained_bytes",
        Kind::Gauge,
        "WAL the source keeps for our slot",
    ),
    (
        "dr_agent_source_disk_full_seconds",
        Kind::Gauge,
        "Seconds until the source's WAL disk is full at the current rate of writing, were nothing acknowledged any more; absent if unknown",
    ),
    (
        "dr_agent_clock_offset_seconds",
        Kind::Gauge,
        "How far the clock of a side is ahead of the agent's; NaN while it does not answer",
    ),
    (
        "dr_agent_term",
        Kind::Gauge,
        "Fencing token this agent applies under",
    ),
    (
        "dr_agent_errors_total",
        Kind::Counter,
        "Errors that ended a session, by class",
    ),
    (
        "dr_agent_copy_rows_total",
        Kind::Counter,
        "Rows of the initial copy",
    ),
    (
        "dr_agent_copy_bytes_total",
        Kind::Counter,
        "Bytes of the initial copy",
    ),
    (
        "dr_agent_copy_tables",
        Kind::Gauge,
        "Tables of the initial copy, by state",
    ),
    (
        "dr_agent_unprotected_objects",
        Kind::Gauge,
        "Objects that replication does not protect, by kind",
    ),
    (
        "dr_agent_tables_set_aside",
        Kind::Gauge,
        "Tables whose changes are kept out for now; status names them and says why",
    ),
    (
        "dr_agent_tables",
        Kind::Gauge,
        "Tables of the users on the source; NaN while unknown",
    ),
    (
        "dr_agent_tables_protected",
        Kind::Gauge,
        "Of these, tables whose rows are all on the replica; NaN while unknown",
    ),
    (
        "dr_agent_sink_flush_lsn",
        Kind::Gauge,
        "LSN up to which a sink is durable, as a number",
    ),
    (
        "dr_agent_stream_records_total",
        Kind::Counter,
        "Records that the Kinesis stream took (put) or gave (read)",
    ),
    (
        "dr_agent_stream_bytes_total",
        Kind::Counter,
        "Bytes of the records put, before compression (raw) and as records (stored); of the records read, as records",
    ),
    (
        "dr_agent_stream_retried_records_total",
        Kind::Counter,
        "Records put once more because the Kinesis stream had not taken them",
    ),
    (
        "dr_agent_stream_throttled_total",
        Kind::Counter,
        "Records and calls refused because a shard's throughput was exceeded",
    ),
    (
        "dr_agent_stream_iterator_age_seconds",
        Kind::Gauge,
        "How far the shard that is furthest behind trails the tip of the Kinesis stream",
    ),
    (
        "dr_agent_stream_ignored_records_total",
        Kind::Counter,
        "Records read and not needed: known (duplicates), of another stream, of another source, of an older term, unreadable",
    ),
    (
        "dr_agent_stream_waiting_bytes",
        Kind::Gauge,
        "Records read that wait for others of their batch, or for the batch before it",
    ),
    (
        "dr_agent_archive_segments_total",
        Kind::Counter,
        "Segments of the change log that the archive took",
    ),
    (
        "dr_agent_archive_bytes_total",
        Kind::Counter,
        "Bytes of those segments, before compression (raw) and as stored",
    ),
    (
        "dr_agent_archive_retries_total",
        Kind::Counter,
        "Attempts to bring a segment of the change log or an object of a base backup into the archive that failed",
    ),
    (
        "dr_agent_archive_throttled_total",
        Kind::Counter,
        "Answers by which S3 asked for fewer requests (429, 503, SlowDown)",
    ),
    (
        "dr_agent_archive_gaps_total",
        Kind::Counter,
        "Stretches of the change log that neither the spool nor the archive took",
    ),
    (
        "dr_agent_archive_last_base_timestamp_seconds",
        Kind::Gauge,
        "What the newest base backup is as of; absent before the first",
    ),
    (
        "dr_agent_archive_base_bytes",
        Kind::Gauge,
        "Size of the newest base backup in the archive; absent before the first",
    ),
    (
        "dr_agent_archive_base_seconds",
        Kind::Gauge,
        "How long it took to take the newest base backup; absent before the first",
    ),
    (
        "dr_agent_archive_base_progress",
        Kind::Gauge,
        "How much of the base backup that is being taken has been read, 0 to 1; 1 while none is",
    ),
    (
        "dr_agent_archive_failed_bases_total",
        Kind::Counter,
        "Base backups that were due and could not be taken",
    ),
    (
        "dr_agent_archive_spool_bytes",
        Kind::Gauge,
        "Change log on local disk that the archive does not have yet",
    ),
    (
        "dr_agent_archive_last_segment_timestamp_seconds",
        Kind::Gauge,
        "When the archive last took a segment; when the agent started, where it does not know of any",
    ),
];

/// Upper bounds of `dr_agent_batch_apply_seconds`, in seconds: a batch of one row takes about a
/// millisecond next door, a full one over a WAN seconds.
const APPLY_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// Installs the recorder and describes every metric. Once per process.
pub fn install(objectives: &Objectives) -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(
            Matcher::Full("dr_agent_batch_apply_seconds".to_owned()),
            APPLY_BUCKETS,
        )?
        .install_recorder()?;
    for (name, kind, meaning) in ALL {
        match kind {
            Kind::Counter => describe_counter!(*name, Unit::Count, *meaning),
            Kind::Gauge => describe_gauge!(*name, Unit::Count, *meaning),
            Kind::Histogram => describe_histogram!(*name, Unit::Seconds, *meaning),
        }
    }
    gauge!("dr_agent_build_info", "version" => crate::VERSION).set(1.0);
    self::objectives(objectives);
    Ok(handle)
}

/// Shows the objectives of the configuration.
pub fn objectives(objectives: &Objectives) {
    gauge!("dr_agent_objective_rpo_seconds").set(objectives.rpo.as_secs_f64());
    gauge!("dr_agent_objective_rto_seconds").set(objectives.rto.as_secs_f64());
}

/// The metrics of one database's archive; exported where there is one.
#[derive(Clone)]
pub struct ArchiveMetrics {
    database: String,
    segments: Counter,
    raw_bytes: Counter,
    stored_bytes: Counter,
    /// `dr_agent_archive_retries_total`
    pub retries: Counter,
    /// `dr_agent_archive_throttled_total`
    pub throttled: Counter,
    /// `dr_agent_archive_gaps_total`
    pub gaps: Counter,
    /// `dr_agent_archive_failed_bases_total`
    pub failed_bases: Counter,
    spool_bytes: Gauge,
    flush_lsn: Gauge,
}

#[allow(
    clippy::cast_precision_loss,
    reason = "metrics; exact below 2^52, that is 4 PiB"
)]
impl ArchiveMetrics {
    /// Registers the metrics of `database`.
    pub fn new(database: &str) -> Self {
        let label = || database.to_owned();
        let bytes = |form: &'static str| counter!("dr_agent_archive_bytes_total", "database" => label(), "form" => form);
        Self {
            database: label(),
            segments: counter!("dr_agent_archive_segments_total", "database" => label()),
            raw_bytes: bytes("raw"),
            stored_bytes: bytes("stored"),
            retries: counter!("dr_agent_archive_retries_total", "database" => label()),
            throttled: counter!("dr_agent_archive_throttled_total", "database" => label()),
            gaps: counter!("dr_agent_archive_gaps_total", "database" => label()),
            failed_bases: counter!("dr_agent_archive_failed_bases_total", "database" => label()),
            spool_bytes: gauge!("dr_agent_archive_spool_bytes", "database" => label()),
            flush_lsn: gauge!("dr_agent_sink_flush_lsn", "database" => label(), "sink" => "archive"),
        }
    }

    /// The archive took a segment that ends there.
    pub fn segment(&self, raw_bytes: u64, stored_bytes: u64, end: PgLsn, at: SystemTime) {
        self.segments.increment(1);
        self.raw_bytes.increment(raw_bytes);
        self.stored_bytes.increment(stored_bytes);
        self.has_segment(end, at);
    }

    /// The archive took its last segment then, in an earlier life of the agent.
    pub fn has_segment(&self, end: PgLsn, at: SystemTime) {
        self.flush_lsn.set(u64::from(end) as f64);
        self.last_segment(at);
    }

    /// Nothing of the archive is known yet: its age counts from here, and not from when it first takes something.
    pub fn starts(&self, at: SystemTime) {
        self.last_segment(at);
    }

    fn last_segment(&self, at: SystemTime) {
        gauge!(
            "dr_agent_archive_last_segment_timestamp_seconds", "database" => self.database.clone()
        )
        .set(seconds(at));
    }

    /// The newest base backup is of then, has this size, and took that long.
    pub fn base(&self, as_of: SystemTime, bytes: u64, took: Duration) {
        let database = || self.database.clone();
        gauge!("dr_agent_archive_last_base_timestamp_seconds", "database" => database())
            .set(seconds(as_of));
        gauge!("dr_agent_archive_base_bytes", "database" => database()).set(bytes as f64);
        gauge!("dr_agent_archive_base_seconds", "database" => database()).set(took.as_secs_f64());
    }

    /// So much of the base backup that is being taken has been read, from 0 to 1.
    pub fn base_progress(&self, done: f64) {
        gauge!("dr_agent_archive_base_progress", "database" => self.database.clone()).set(done);
    }

    /// What the spool holds.
    pub fn spool(&self, bytes: u64) {
        self.spool_bytes.set(bytes as f64);
    }
}

fn seconds(at: SystemTime) -> f64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// The metrics of one database's Kinesis stream; exported under route `kinesis`.
#[derive(Clone)]
pub struct StreamMetrics {
    database: String,
    records_put: Counter,
    raw_bytes: Counter,
    stored_bytes: Counter,
    retried: Counter,
    throttled: Counter,
}

#[allow(
    clippy::cast_precision_loss,
    reason = "metrics; exact below 2^52, that is 4 PiB"
)]
impl StreamMetrics {
    /// Registers the metrics of `database`.
    pub fn new(database: &str) -> Self {
        let label = || database.to_owned();
        let bytes = |form: &'static str| counter!("dr_agent_stream_bytes_total", "database" => label(), "form" => form);
        Self {
            database: label(),
            records_put: counter!("dr_agent_stream_records_total", "database" => label(), "direction" => "put"),
            raw_bytes: bytes("raw"),
            stored_bytes: bytes("stored"),
            retried: counter!("dr_agent_stream_retried_records_total", "database" => label()),
            throttled: counter!("dr_agent_stream_throttled_total", "database" => label()),
        }
    }

    /// The stream took a record.
    pub fn put(&self, raw_bytes: u64, stored_bytes: u64) {
        self.records_put.increment(1);
        self.raw_bytes.increment(raw_bytes);
        self.stored_bytes.increment(stored_bytes);
    }

    /// What happened on the way there.
    pub fn putting(&self, stats: PutStats) {
        self.retried.increment(stats.retried);
        self.throttled.increment(stats.throttled);
    }

    /// What happened while reading.
    pub fn reading(&self, stats: ReadStats) {
        counter!("dr_agent_stream_records_total", "database" => self.database.clone(), "direction" => "read")
            .increment(stats.records);
        counter!("dr_agent_stream_bytes_total", "database" => self.database.clone(), "form" => "stored")
            .increment(stats.bytes);
        self.throttled.increment(stats.throttled);
        gauge!("dr_agent_stream_iterator_age_seconds", "database" => self.database.clone())
            .set(stats.behind.as_secs_f64());
    }

    /// A record that was read is not needed.
    pub fn ignored(&self, reason: &'static str) {
        counter!("dr_agent_stream_ignored_records_total", "database" => self.database.clone(), "reason" => reason)
            .increment(1);
    }

    /// Bytes of records that wait for others.
    pub fn waiting(&self, bytes: u64) {
        gauge!("dr_agent_stream_waiting_bytes", "database" => self.database.clone())
            .set(bytes as f64);
    }

    /// The stream has everything up to there.
    pub fn flushed(&self, lsn: PgLsn) {
        gauge!("dr_agent_sink_flush_lsn", "database" => self.database.clone(), "sink" => "kinesis")
            .set(u64::from(lsn) as f64);
    }
}

/// The metrics of one database.
#[derive(Clone)]
pub struct DatabaseMetrics {
    database: String,
    /// `dr_agent_transactions_total`
    pub transactions: Counter,
    /// `dr_agent_net_changes_total`
    pub net_changes: Counter,
    /// `dr_agent_batches_total`
    pub batches: Counter,
    /// `dr_agent_batch_apply_seconds`
    pub batch_apply_seconds: Histogram,
    /// `dr_agent_slow_path_total`
    pub slow_path: Counter,
    /// `dr_agent_spread_batches_total`
    pub spread_batches: Counter,
    /// `dr_agent_bytes_total{direction="received"}`
    pub bytes_received: Counter,
    /// `dr_agent_term`
    pub term: Gauge,
    /// `dr_agent_copy_rows_total`
    pub copy_rows: Counter,
    /// `dr_agent_copy_bytes_total`
    pub copy_bytes: Counter,
    /// `dr_agent_sink_flush_lsn{sink="replica"}`
    pub replica_flush_lsn: Gauge,
}

impl DatabaseMetrics {
    /// Registers the metrics of `database`, so that each is there from the first scrape on.
    pub fn new(database: &str) -> Self {
        let label = || database.to_owned();
        let metrics = Self {
            database: label(),
            transactions: counter!("dr_agent_transactions_total", "database" => label()),
            net_changes: counter!("dr_agent_net_changes_total", "database" => label()),
            batches: counter!("dr_agent_batches_total", "database" => label()),
            batch_apply_seconds: histogram!("dr_agent_batch_apply_seconds", "database" => label()),
            slow_path: counter!("dr_agent_slow_path_total", "database" => label()),
            spread_batches: counter!("dr_agent_spread_batches_total", "database" => label()),
            bytes_received: counter!(
                "dr_agent_bytes_total", "database" => label(), "direction" => "received"
            ),
            term: gauge!("dr_agent_term", "database" => label()),
            copy_rows: counter!("dr_agent_copy_rows_total", "database" => label()),
            copy_bytes: counter!("dr_agent_copy_bytes_total", "database" => label()),
            replica_flush_lsn: gauge!(
                "dr_agent_sink_flush_lsn", "database" => label(), "sink" => "replica"
            ),
        };
        for class in [Class::Transient, Class::Definite, Class::Fenced] {
            metrics.errors(class).absolute(0);
        }
        for kind in crate::flow::counts::KINDS {
            metrics.changes(kind).absolute(0);
        }
        metrics.reader(Reader::default());
        metrics.copy_tables(0, 0);
        metrics
    }

    fn label(&self) -> String {
        self.database.clone()
    }

    /// Shows how the source is read, one-hot.
    pub fn reader(&self, now: Reader) {
        for reader in Reader::ALL {
            let value = if reader == now { 1.0 } else { 0.0 };
            gauge!("dr_agent_source_reader", "database" => self.label(), "reader" => reader.as_str())
                .set(value);
        }
    }

    /// `dr_agent_changes_total{kind}`
    pub fn changes(&self, kind: &'static str) -> Counter {
        counter!("dr_agent_changes_total", "database" => self.label(), "kind" => kind)
    }

    /// `dr_agent_ddl_total{outcome}`
    pub fn ddl(&self, outcome: &'static str) -> Counter {
        counter!("dr_agent_ddl_total", "database" => self.label(), "outcome" => outcome)
    }

    /// `dr_agent_errors_total{class}`
    pub fn errors(&self, class: Class) -> Counter {
        counter!("dr_agent_errors_total", "database" => self.label(), "class" => class.as_str())
    }

    /// `dr_agent_copy_tables{state}`
    pub fn copy_tables(&self, total: usize, ready: usize) {
        let set = |state: &'static str, count: usize| {
            #[allow(clippy::cast_precision_loss, reason = "fewer than 2^52 tables")]
            gauge!("dr_agent_copy_tables", "database" => self.label(), "state" => state)
                .set(count as f64);
        };
        set("pending", total.saturating_sub(ready));
        set("ready", ready);
    }

    /// `dr_agent_tables_set_aside`
    #[allow(clippy::cast_precision_loss, reason = "fewer than 2^52 tables")]
    pub fn tables_set_aside(&self, count: u64) {
        gauge!("dr_agent_tables_set_aside", "database" => self.label()).set(count as f64);
    }

    /// `dr_agent_unprotected_objects{kind}`
    #[allow(clippy::cast_precision_loss, reason = "fewer than 2^52 objects")]
    pub fn unprotected(&self, kind: &'static str, count: u64) {
        gauge!("dr_agent_unprotected_objects", "database" => self.label(), "kind" => kind)
            .set(count as f64);
    }
}

/// Sets the gauges that are worked out when somebody asks: nothing that stands still can go on looking well.
#[allow(
    clippy::cast_precision_loss,
    reason = "metrics; exact below 2^52, that is 4 PiB"
)]
pub fn show(databases: &[DatabaseStatus], servers: &Servers) {
    let or_nan = |value: Option<f64>| value.unwrap_or(f64::NAN);
    for status in databases {
        let set = |name: &'static str, value: Option<f64>| {
            gauge!(name, "database" => status.database.clone()).set(or_nan(value));
        };
        set("dr_agent_lag_seconds", status.lag_seconds);
        set(
            "dr_agent_lag_bytes",
            status.lag_bytes.map(|bytes| bytes as f64),
        );
        let breached = f64::from(u8::from(status.rpo_breached));
        set("dr_agent_rpo_breached", Some(breached));
        let retained = status.slot_retained_bytes.map(|bytes| bytes as f64);
        set("dr_agent_slot_retained_bytes", retained);
        set(
            "dr_agent_source_disk_full_seconds",
            status.source_disk_full_seconds,
        );
        let coverage = status.coverage.as_ref();
        for (name, count) in [
            ("dr_agent_tables", coverage.and_then(|seen| seen.tables)),
            (
                "dr_agent_tables_protected",
                coverage.and_then(|seen| seen.protected),
            ),
            (
                "dr_agent_ddl_pending",
                coverage.map(|seen| seen.waiting.len() as u64),
            ),
        ] {
            set(name, count.map(|count| count as f64));
        }
        let compared = coverage.and_then(|seen| seen.compared_seconds_ago);
        set(
            "dr_agent_shape_compared_seconds",
            compared.map(|ago| ago as f64),
        );
        for kind in DRIFT_KINDS {
            let count = coverage.map(|seen| seen.drift.get(kind).copied().unwrap_or(0));
            gauge!("dr_agent_shape_drift_objects", "database" => status.database.clone(), "kind" => kind)
                .set(or_nan(count.map(|count| count as f64)));
        }
        for (stage, seconds) in [
            ("received", status.stages.received),
            ("queued", Some(status.stages.queued)),
            ("applied", status.stages.applied),
        ] {
            gauge!("dr_agent_stage_lag_seconds", "database" => status.database.clone(), "stage" => stage)
                .set(or_nan(seconds));
        }
        for state in State::ALL {
            let value = f64::from(u8::from(state == status.state));
            gauge!("dr_agent_state", "database" => status.database.clone(), "state" => state.as_str())
                .set(value);
        }
    }
    for side in WatchedSide::ALL {
        gauge!("dr_agent_clock_offset_seconds", "side" => side.as_str())
            .set(or_nan(servers.clock_offset_seconds(side)));
    }
}
