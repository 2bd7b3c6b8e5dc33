//! Empties the Kinesis stream into a replica that is being promoted.
//!
//! ```text
//! promote ─term raised─▶ StreamDrain: stream up to its tip ▶ LogIntake ▶ replay ▶ the replica's progress row
//! ```
//!
//! # Invariants
//! - The term is raised before: no `apply` moves the progress row meanwhile, and a promotion that is killed here drains again
//!   from that row.
//! - What cannot be applied is said: a gap before it, or a table that was never copied.
//!
//! # What it does not do
//! It does not wait for the source: what is in the stream when it begins is all it takes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use crate::changelog::Gap;
use crate::config::Config;
use crate::error::{Class, Classify, chain};
use crate::lag::pg_micros;
use crate::ledger::BatchNumber;
use crate::metrics::StreamMetrics;
use crate::pg::PgLsn;
use crate::promote::{Drain, DrainError, Drained};
use crate::replay::{self, Reached, ReplayError, Target};
use crate::setup::{self, Prepared, SetupError};
use crate::sink::replica::SinkError;
use crate::source::{self, IntakeLimits, SourceError, SourcePosition, StreamSettings, Until};
use crate::spill::{self, SpillError, SpillSpace};

/// Transactions between reading and applying; their bytes are bounded by `limits.queue_bytes`.
const QUEUE_TRANSACTIONS: usize = 16_384;

/// The stream of a configuration.
pub struct StreamDrain<'c> {
    /// Where it and the replica are.
    pub config: &'c Config,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("look at the replica")]
    Setup(#[from] SetupError),
    #[error("open the spill directory")]
    Spill(#[from] SpillError),
    #[error("read the stream")]
    Source(#[from] SourceError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("the replica's records of the stream make no sense: {0}")]
    Records(&'static str),
}

impl Classify for Failed {
    fn class(&self) -> Class {
        match self {
            Self::Setup(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Source(error) => error.class(),
            Self::Replay(error) => error.class(),
            Self::Records(_) => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::Source(error) => error.hint(),
            Self::Replay(error) => error.hint(),
            Self::Records(_) => None,
        }
    }
}

impl Drain for StreamDrain<'_> {
    fn drain<'a>(&'a self, database: &'a str) -> BoxFuture<'a, Result<Drained, DrainError>> {
        Box::pin(async move {
            self.database(database).await.map_err(|error| DrainError {
                message: chain(&error),
                class: error.class(),
                hint: error.hint(),
            })
        })
    }
}

impl StreamDrain<'_> {
    async fn database(&self, database: &str) -> Result<Drained, Failed> {
        let mut drained = Drained::default();
        let mut prepared = setup::prepare_draining(self.config, database).await?;
        let gap = loop {
            let applied = &mut drained.transactions;
            match self.up_to_the_tip(database, &prepared, applied).await {
                Ok(gap) => break gap,
                // Its first rows are on the source alone.
                Err(Failed::Replay(ReplayError::Sink(SinkError::TableNotCopied { table }))) => {
                    drained.warnings.push(format!(
                        "table {table} was new on the source and never copied: neither it nor its changes are here"
                    ));
                    prepared = setup::prepare_draining(self.config, database).await?;
                    tracing::warn!(database, %table, "a table was never copied: its changes are left out");
                    prepared.as_of = PgLsn::from(u64::MAX);
                }
                Err(error) => return Err(error),
            }
        };
        if let Some(Gap { from, to, .. }) = gap {
            drained.warnings.push(format!(
                "the Kinesis stream has transactions behind {to} whose predecessors, from {from} on, had not arrived when the \
                 source was lost: they were not applied"
            ));
        }
        Ok(drained)
    }

    /// Applies what is in the stream now, and counts the transactions; returns the gap behind which there is more.
    async fn up_to_the_tip(
        &self,
        database: &str,
        prepared: &Prepared,
        applied: &mut u64,
    ) -> Result<Option<Gap>, Failed> {
        let config = self.config;
        let limits = &config.limits;
        let kinesis_stream = config
            .route
            .kinesis_stream(database)
            .ok_or(Failed::Records("route.kind is not kinesis"))?;
        let spill_directory = spill::directory_of(&limits.spill_directory, &prepared.stream);
        let space = SpillSpace::open(spill_directory, limits.spill_bytes)?;
        let archive = config.archive.as_ref();
        let settings = StreamSettings {
            kinesis_stream,
            stream: prepared.stream.clone(),
            system_identifier: prepared
                .system_identifier
                .parse()
                .map_err(|_| Failed::Records("the system identifier is no number"))?,
            // The promotion raised it by one; what the agents wrote before is what is wanted.
            term: prepared.term - 1,
            start: prepared.end_lsn,
            commit_time: prepared.commit_time,
            limits: IntakeLimits {
                queue_bytes: limits.queue_bytes,
                transaction_bytes: limits.transaction_bytes,
            },
            archive: archive.map(|archive| (archive.url.clone(), archive.encryption.clone())),
            // Nobody writes it any more.
            patience: Duration::ZERO,
        };
        let target = Target {
            conninfo: &config.replica.conninfo.with_dbname(database),
            stream: &prepared.stream,
            term: prepared.term,
            tables: prepared.synced.iter().cloned().collect::<HashMap<_, _>>(),
            as_of: prepared.as_of,
        };
        let from = Reached {
            end_lsn: prepared.end_lsn,
            commit_time: prepared.commit_time.map(pg_micros),
            batch: BatchNumber(prepared.batch),
            transactions: 0,
        };
        let (received, transactions) = mpsc::channel(QUEUE_TRANSACTIONS);
        let (position, _) = watch::channel(SourcePosition::default());
        let metrics = StreamMetrics::new(database);
        let until = Until::Tip(clock());
        let reading = Box::pin(source::receive(
            settings, until, space, received, position, metrics,
        ));
        let before = *applied;
        let count = |reached: &Reached| *applied = before + reached.transactions;
        let applying = Box::pin(replay::apply(config, target, from, transactions, count));
        let (gap, reached) = tokio::join!(reading, applying);
        // An apply that failed ends the reading, too.
        reached?;
        Ok(gap?)
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the edge: the tip is what is in the stream from now on"
)]
fn clock() -> Instant {
    Instant::now()
}
