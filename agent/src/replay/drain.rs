//! Empties the Kinesis stream, and then the archive's change log, into a replica that is being promoted.
//!
//! ```text
//! promote ─settled─▶ RouteDrain: lanes ▶ the lock is held still? ▶ stream up to its tip ─┐
//!                                                              └▶ archive, spool ────────┴▶ LogIntake ▶ replay ▶ progress row
//! ```
//!
//! # Invariants
//! - The term is raised before, and what a killed drain left is settled: nobody moves the progress row meanwhile, and a
//!   promotion that is killed here drains again from that row.
//! - Nothing is applied by a promotion that has lost its lock, however long it slept: the lanes are there before the lock is
//!   looked at, and who takes it over ends their sessions first.
//! - What cannot be applied is said: a gap before it, or a table that was never copied.
//! - Nothing is waited for without an end: neither a stream that stands still nor somebody else's lock.
//!
//! # What it does not do
//! It does not wait for the source: what is in the stream when it begins is all it takes. It leaves no table out by itself: it
//! ends before the change that is in the way, and says of which table that is.

mod archive;
mod error;
mod scratch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use self::error::Failed;
use crate::backoff::{self, Decision};
use crate::cloud::kinesis::{Kinesis, KinesisError};
use crate::config::{Config, Route, SetAside};
use crate::error::{Class, Classify, chain};
use crate::failpoint;
use crate::flow::ledger::BatchNumber;
use crate::flow::spill::SpillSpace;
use crate::names::TableName;
use crate::observe::metrics::StreamMetrics;
use crate::pg;
use crate::promote::{Asked, Drain, DrainEnd, DrainError, Drained};
use crate::replay::{self, Reached, ReplayError, ReplaySessions, ReplayTarget};
use crate::setup::{self, Ready};
use crate::sink::replica::{SinkError, session};
use crate::source::{
    self, IntakeLimits, LogIntake, SourceError, SourcePosition, StreamSettings, Tip, Until,
};
use crate::time::pg_micros;

/// Settings of the sessions that apply.
const SESSION: &[(&str, &str)] = &[
    // As long as lanes wait for one another. Nobody may be waited for without an end: the users wait, too.
    ("lock_timeout", "10s"),
    // Durable here; a standby of the replica that is away must not hold up the promotion.
    ("synchronous_commit", "local"),
];

/// How long a stream may take to let itself be read before anybody is fenced: two connections that are given up.
const READABLE_WITHIN: Duration = Duration::from_secs(10);

/// The longest pause between two attempts at that.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// What a configuration has between the two sides.
pub struct RouteDrain<'c> {
    /// Where it and the replica are.
    pub config: &'c Config,
}

impl<'c> RouteDrain<'c> {
    /// None where there is nothing: route `direct` without an archive.
    pub fn of(config: &'c Config) -> Option<Self> {
        let is_direct = config.route == Route::Direct;
        (!is_direct || config.archive.is_some()).then_some(Self { config })
    }
}

impl Drain for RouteDrain<'_> {
    fn what(&self) -> &'static str {
        match (&self.config.route, &self.config.archive) {
            (Route::Direct, _) => "the archive",
            (Route::Kinesis { .. }, None) => "the Kinesis stream",
            (Route::Kinesis { .. }, Some(_)) => "the Kinesis stream, or the archive,",
        }
    }

    fn look<'a>(&'a self, database: &'a str) -> BoxFuture<'a, Result<String, DrainError>> {
        Box::pin(async move { Box::pin(self.look_at(database)).await.map_err(drain_error) })
    }

    fn drain<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<Drained, DrainError>> {
        Box::pin(async move { self.database(asked).await.map_err(drain_error) })
    }
}

fn drain_error(error: Failed) -> DrainError {
    DrainError {
        message: chain(&error),
        class: error.class(),
        hint: error.hint(),
    }
}

impl RouteDrain<'_> {
    /// Tries what a drain needs; says what it found, and where its large transactions would go.
    async fn look_at(&self, database: &str) -> Result<String, Failed> {
        let prepared = setup::prepare_draining(self.config, database).await?;
        let replica = self.config.replica.conninfo.with_dbname(database);
        pg::connect(&replica, &session(&prepared.stream)).await?;
        let scratch = scratch::make(&self.config.limits, &prepared.stream)?;
        let mut found = Vec::new();
        if let Some(stream) = self.config.route.kinesis_stream(database) {
            readable(&stream).await?;
            found.push(format!("Kinesis stream {stream}, which can be read"));
        }
        if let Some(archived) = archive::find(self.config, &prepared).await? {
            found.push(archived.says());
        }
        let directory = scratch.path().parent().map(PathBuf::from);
        let directory = directory.unwrap_or_default();
        found.push(format!(
            "large transactions wait below {}",
            directory.display()
        ));
        Ok(found.join("; "))
    }

    async fn database(&self, asked: Asked<'_>) -> Result<Drained, Failed> {
        let mut drained = Drained {
            streamed: None,
            archived: None,
            end: DrainEnd::Tip {
                warnings: Vec::new(),
            },
        };
        match Box::pin(self.both(&asked, &mut drained)).await {
            Ok(warnings) => drained.end = DrainEnd::Tip { warnings },
            // Its first rows are on the source alone.
            Err(Failed::Replay(ReplayError::Sink(error)))
                if error.uncopied().is_none() && self.set_aside(&error).is_some() =>
            {
                let table = self.set_aside(&error);
                let reason = chain(&error);
                drained.end =
                    table.map_or(drained.end, |table| DrainEnd::Troubled { table, reason });
            }
            Err(error) => match error.uncopied() {
                Some(table) => drained.end = DrainEnd::Uncopied(table.clone()),
                None => return Err(error),
            },
        }
        Ok(drained)
    }

    /// The table that an error costs, where one table is not to cost the rest.
    fn set_aside(&self, error: &SinkError) -> Option<TableName> {
        let is_wanted = self.config.replica.set_aside == SetAside::Retry;
        // Where a right is missing of one table, it may be of all.
        let cost = error.costs().filter(|cost| is_wanted && !cost.of_a_right);
        cost.map(|cost| cost.table)
    }

    /// The stream, and from where that ends the archive; returns what could not be applied, in words.
    async fn both(&self, asked: &Asked<'_>, drained: &mut Drained) -> Result<Vec<String>, Failed> {
        let mut warnings = Vec::new();
        let mut prepared = setup::prepare_draining(self.config, asked.database).await?;
        if self.config.route != Route::Direct {
            let applied = drained.streamed.insert(0);
            let tip = self.up_to_the_tip(asked, &prepared, applied).await?;
            warnings = self.warnings(asked, &prepared, tip)?;
            prepared = setup::prepare_draining(self.config, asked.database).await?;
        }
        if let Some(archived) = archive::find(self.config, &prepared).await? {
            let applied = drained.archived.insert(0);
            let more = self.archived(asked, &prepared, archived, applied).await?;
            warnings.extend(more);
        }
        Ok(warnings)
    }

    /// Applies what the archive holds beyond the replica, and counts the transactions.
    async fn archived(
        &self,
        asked: &Asked<'_>,
        prepared: &Ready,
        archived: archive::Archived,
        applied: &mut u64,
    ) -> Result<Vec<String>, Failed> {
        if !archived.leads_on() {
            return Ok(archived.warnings());
        }
        let limits = &self.config.limits;
        scratch::remove_old(limits, &prepared.stream);
        let scratch = scratch::make(limits, &prepared.stream)?;
        let space = SpillSpace::open(scratch.path().join("transactions"), limits.spill_bytes)?;
        let (lanes, from) = self.lanes(asked, prepared).await?;
        let (received, transactions) = source::queue();
        let applied_by = prepared
            .applied_at
            .map(|at| at.max(prepared.commit_time.unwrap_or(at)));
        let intake = LogIntake::new(IntakeLimits::of(limits), prepared.end_lsn, space, received)
            .committed_by(applied_by.map(pg_micros));
        let reading = Box::pin(archived.read(intake));
        let count = |reached: &Reached| *applied = reached.transactions;
        let applying = Box::pin(replay::apply(self.config, lanes, from, transactions, count));
        let (warnings, reached) = tokio::join!(reading, applying);
        // An apply that failed ends the reading, too.
        reached?;
        warnings
    }

    /// The sessions that apply, and from where.
    async fn lanes(
        &self,
        asked: &Asked<'_>,
        prepared: &Ready,
    ) -> Result<(ReplaySessions, Reached), Failed> {
        let config = self.config;
        let target = ReplayTarget {
            conninfo: &config.replica.conninfo.with_dbname(asked.database),
            stream: &prepared.stream,
            term: prepared.term,
            tables: prepared.synced.iter().cloned().collect::<HashMap<_, _>>(),
            listed_by: &prepared.stream,
            as_of: prepared.as_of,
            left_out: asked.left_out.iter().cloned().collect(),
            session: SESSION,
        };
        let from = Reached {
            end_lsn: prepared.end_lsn,
            commit_time: prepared.commit_time.map(pg_micros),
            batch: BatchNumber(prepared.batch),
            transactions: 0,
        };
        failpoint::hit("drain:settled");
        let lanes = ReplaySessions::connect(config, target).await?;
        let lock = asked.lock.check_connection().await;
        lock.map_err(|error| Failed::LockLost(error.into()))?;
        Ok((lanes, from))
    }

    fn warnings(
        &self,
        asked: &Asked<'_>,
        prepared: &Ready,
        tip: Tip,
    ) -> Result<Vec<String>, Failed> {
        let mut warnings = Vec::new();
        if let Some(gap) = tip.gap {
            warnings.push(format!(
                "the Kinesis stream has transactions behind {} whose predecessors, from {} on, had not arrived when the \
                 source was lost: they were not applied",
                gap.to, gap.from
            ));
        } else if tip.unfinished {
            warnings.push(format!(
                "the Kinesis stream has a part of what the source committed behind {}, whose other parts had not arrived: it was \
                 not applied",
                tip.position
            ));
        }
        if !tip.joined {
            warnings.push(format!(
                "nothing in the Kinesis stream {} leads on from {}: its records were too old and are gone, or it is not the \
                 stream of this database (route.stream, AWS_REGION)",
                self.kinesis_stream(asked.database)?,
                prepared.end_lsn
            ));
        }
        Ok(warnings)
    }

    /// Applies what is in the stream now, and counts the transactions.
    async fn up_to_the_tip(
        &self,
        asked: &Asked<'_>,
        prepared: &Ready,
        applied: &mut u64,
    ) -> Result<Tip, Failed> {
        let config = self.config;
        let limits = &config.limits;
        scratch::remove_old(limits, &prepared.stream);
        let scratch = scratch::make(limits, &prepared.stream)?;
        tracing::info!(
            database = asked.database, directory = %scratch.path().display(),
            "large transactions of the Kinesis stream wait here"
        );
        let space = SpillSpace::open(scratch.path().join("transactions"), limits.spill_bytes)?;
        let archive = config.archive.as_ref();
        let settings = StreamSettings {
            kinesis_stream: self.kinesis_stream(asked.database)?,
            stream: prepared.stream.clone(),
            history: prepared.history,
            // The promotion raised it by one; what the agents wrote before is what is wanted.
            term: prepared.term - 1,
            start: prepared.end_lsn,
            commit_time: prepared.commit_time,
            applied_at: prepared.applied_at,
            limits: IntakeLimits::of(limits),
            archive: archive.map(|archive| (archive.url.clone(), archive.encryption.clone())),
            // Nobody writes it any more.
            patience: Duration::ZERO,
        };
        let (lanes, from) = self.lanes(asked, prepared).await?;
        let (received, transactions) = source::queue();
        let (position, _) = watch::channel(SourcePosition::default());
        let metrics = StreamMetrics::new(asked.database);
        let until = Until::Tip(clock());
        let reading = Box::pin(source::receive(
            settings, until, space, received, position, metrics,
        ));
        let count = |reached: &Reached| *applied = reached.transactions;
        let applying = Box::pin(replay::apply(config, lanes, from, transactions, count));
        let (tip, reached) = tokio::join!(reading, applying);
        // An apply that failed ends the reading, too.
        reached?;
        Ok(tip?)
    }

    fn kinesis_stream(&self, database: &str) -> Result<String, Failed> {
        let stream = self.config.route.kinesis_stream(database);
        stream.ok_or(Failed::Records("route.kind is not kinesis"))
    }
}

/// Reads a record, as a drain does. What goes away by itself may do so for a while: once the term is raised there is no way back.
async fn readable(stream: &str) -> Result<(), Failed> {
    let deadline = tokio::time::Instant::now() + READABLE_WITHIN;
    let reading = async {
        let kinesis = Kinesis::open(stream).await?;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let refused = kinesis.try_reading().await;
            // What does not pass goes first, and is not waited for: nobody is fenced yet.
            let worst = refused.into_iter().min_by_key(KinesisError::passes);
            let Some(error) = worst else {
                return Ok(());
            };
            let class = match error.passes() {
                true => error.class(),
                false => Class::Definite,
            };
            match backoff::decide(class, attempt, RETRY_MAX, rand::random()) {
                Decision::Retry(pause) if tokio::time::Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                }
                Decision::Retry(_) | Decision::Stop => return Err(error.into()),
            }
        }
    };
    let silent = || SourceError::Silent {
        stream: stream.to_owned(),
    };
    let read = tokio::time::timeout_at(deadline, Box::pin(reading)).await;
    read.unwrap_or_else(|_| Err(silent().into()))
}

fn clock() -> Instant {
    Instant::now()
}
