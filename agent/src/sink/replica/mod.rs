//! The replica sink: applies batches to the replica, each in one transaction with its progress row.
//!
//! ```text
//! batch ─▶ net::fold ─▶ steps ─▶ statements ─▶ BEGIN · advance() · … · COMMIT   (pipelined)
//!            │ refused by a constraint, or not foldable
//!            └──────▶ net::serial ─▶ the same, one change at a time (slow path)
//! ```
//!
//! # Invariants
//! - Every apply transaction begins with `dr_agent.advance()`, the compare-and-set of the progress row:
//!   ordering, exactly-once and fencing in one comparison.
//! - Every statement says how many rows it must touch. Another number is an error, never a shrug: the
//!   replica has diverged.
//! - COMMIT is synchronous on the replica, so that `Ok` means durable.
//!
//! # What it does not do
//! It does not retry, reconnect or skip: the pipeline decides. It does not know where batches come from.

mod array;
mod chain;
mod error;
mod execute;
mod relations;
mod segment;
mod sql;
mod target;

use std::sync::Arc;

use tokio_postgres::Client;

use crate::batch::Batch;
use crate::failpoint;
use crate::lag::system_time;
use crate::net::{self, Step};
use crate::pg::{self, ConnInfo, Session};
use crate::stream::StreamName;
use crate::txn::SourceRelation;
use chain::Chain;
use execute::{Execution, Statements};
use relations::Relations;
use segment::{Segment, Segments};

pub use error::SinkError;
pub use relations::Synced;

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Net changes carried out.
    pub net_changes: u64,
    /// Whether the slow path was needed.
    pub slow_path: bool,
}

/// One session with the replica.
#[derive(Debug)]
pub struct ReplicaSink {
    client: Client,
    stream: StreamName,
    term: i64,
    relations: Relations,
    statements: Statements,
    segment_bytes: u64,
}

/// How one sink session works.
#[derive(Clone, Debug)]
pub struct SinkSettings {
    /// Whose progress row.
    pub stream: StreamName,
    /// The term it must hold.
    pub term: i64,
    /// How much of a spilled transaction is in memory at once, in bytes.
    pub segment_bytes: u64,
}

impl ReplicaSink {
    /// Opens the session.
    pub async fn connect(
        replica: &ConnInfo,
        settings: SinkSettings,
        synced: Synced,
    ) -> Result<Self, SinkError> {
        let client = pg::connect(replica, &session(&settings.stream)).await?;
        Ok(Self {
            client,
            stream: settings.stream,
            term: settings.term,
            relations: Relations::new(synced),
            statements: Statements::default(),
            segment_bytes: settings.segment_bytes,
        })
    }

    /// Makes a batch durable on the replica. After an error the session is of no further use.
    pub async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        if self.relations.trim() {
            self.statements.clear();
        }
        let refused = match self.attempt(batch, Path::Fast).await {
            Ok(net_changes) => {
                return Ok(Applied {
                    net_changes,
                    slow_path: false,
                });
            }
            Err(error) if error.is_for_the_slow_path() => error,
            Err(error) => return Err(error),
        };
        tracing::debug!(
            batch = batch.number.0,
            reason = %crate::error::chain(&refused),
            "folded batch refused, replaying its changes one by one"
        );
        self.client.batch_execute("ROLLBACK").await?;
        let net_changes = self.attempt(batch, Path::Slow).await?;
        Ok(Applied {
            net_changes,
            slow_path: true,
        })
    }

    /// One replica transaction: all of the batch or nothing. After an error it may still be open.
    async fn attempt(&mut self, batch: &Batch, path: Path) -> Result<u64, SinkError> {
        let Self {
            client,
            relations,
            statements,
            ..
        } = self;
        let client = &*client;
        let mut chain = Chain::default();
        chain.send(client.batch_execute("BEGIN")).await;
        let advance = sql::advance(
            self.stream.as_str(),
            self.term,
            batch.previous,
            batch.number.0,
            batch.end_lsn(),
            system_time(batch.commit_time()),
        );
        chain
            .send(async move { client.batch_execute(&advance).await })
            .await;
        if path == Path::Slow {
            chain
                .send(client.batch_execute("SET CONSTRAINTS ALL DEFERRED"))
                .await;
        }
        let mut net_changes = 0;
        let mut segments = Segments::new(&batch.transactions, self.segment_bytes);
        while let Some(segment) = segments.next()? {
            let steps = fold(client, relations, &segment, path).await?;
            net_changes += net::count(&steps);
            let execution =
                Execution::prepare(client, statements, &relations.targets, &steps).await?;
            if segments.has_begun_to_stream() {
                // A large transaction goes in parts, one after another, so that memory stays bounded.
                std::mem::take(&mut chain).finish().await?;
            }
            execution.send(client, &mut chain).await;
        }
        failpoint::hit("apply:before-commit");
        chain.send(client.batch_execute("COMMIT")).await;
        chain.finish().await?;
        failpoint::hit("apply:after-commit");
        Ok(net_changes)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Fast,
    Slow,
}

/// Leaves out what the copy already holds, looks up where the rest goes, and folds it.
async fn fold(
    client: &Client,
    relations: &mut Relations,
    segment: &Segment<'_>,
    path: Path,
) -> Result<Vec<Step>, SinkError> {
    let mut wanted = Vec::new();
    for (commit_lsn, change) in segment.changes() {
        wanted.extend(relations.wanted(client, commit_lsn, change).await?);
    }
    let key_of = |relation: &Arc<SourceRelation>| relations.targets.of(relation).key.clone();
    let changes = wanted.iter().map(|change| &**change);
    Ok(match path {
        Path::Fast => net::fold(changes, &key_of)?,
        Path::Slow => net::serial(changes, &key_of)?,
    })
}

/// The settings of an apply session. Values in text form must be read as the source wrote them
/// ([`crate::source`] sets the same there), triggers and foreign keys have fired on the source already,
/// and a plan must not depend on how many rows the first batches had.
pub fn session(stream: &StreamName) -> Session {
    Session::new(stream.application_name("apply"))
        .set("session_replication_role", "replica")
        .set("default_transaction_read_only", "off")
        .set("search_path", "")
        .set("synchronous_commit", "on")
        .set("plan_cache_mode", "force_generic_plan")
        .set("jit", "off")
        .set("row_security", "off")
        .set("statement_timeout", "0")
        .set("lock_timeout", "0")
        .set("idle_in_transaction_session_timeout", "0")
        .set("client_encoding", "UTF8")
        .set("DateStyle", "ISO, YMD")
        .set("IntervalStyle", "postgres")
        .set("TimeZone", "UTC")
        .set("extra_float_digits", "3")
        .set("lc_monetary", "C")
        .set("xmloption", "content")
}
