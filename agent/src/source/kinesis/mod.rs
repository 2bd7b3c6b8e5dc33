//! A Kinesis stream as the source: records become transactions in the queue.
//!
//! ```text
//! shards ─Records─▶ Gather (order, duplicates) ─batch─▶ Unpacker ─messages─▶ LogIntake ─transaction─▶ pipeline
//!                      │  └─ what waits: Overflow
//!                      └─ a gap ─▶ the archive's change log ─▶ LogIntake
//! ```
//!
//! # Invariants
//! - A batch is handed over once all of its parts are there and nothing before it is missing: transactions come in commit order,
//!   each once.
//! - A gap is filled or it is an error that names it. It counts as one only when every shard has been read beyond the time by
//!   which its writer had what is missing accepted ([`Gap::accepted_by`]); until then it may only have come later. That is soon
//!   after it shows, however much of the stream is left: what waits for it is little.
//! - That nothing is left before the tip is believed only of a stream that was seen to lead on from the position, or was read
//!   from its oldest record on: where a reading begins is a guess by two clocks.
//! - A stream that was begun anew, from another slot of the same source, is an error once everything before that was applied:
//!   nothing of ours comes any more.
//! - What waits stays within its limits. Where they are reached and the archive has what is missing, reading waits for it.
//!
//! What is to be done about a gap is decided in `gaps` ●; `receiving` reads, and carries it out.
//!
//! # What it does not do
//! It keeps no place in the stream: the replica's progress row says where to begin, and a look a little further back costs only
//! reading. Nobody is told how far it is.

mod gaps;
mod receiving;

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};

use super::{IntakeLimits, Received, SourceError, SourcePosition};
use crate::cloud::store::{Encryption, StoreUrl};
use crate::flow::changelog::Gap;
use crate::flow::spill::SpillSpace;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::observe::metrics::StreamMetrics;
use crate::pg::PgLsn;
use receiving::Receiving;

/// What is received.
#[derive(Clone, Debug)]
pub struct StreamSettings {
    /// The Kinesis stream.
    pub kinesis_stream: String,
    /// The stream in it.
    pub stream: StreamName,
    /// What its LSNs are of.
    pub history: History,
    /// What was written at a lower term is ignored.
    pub term: i64,
    /// Where to begin: the end of the last applied transaction.
    pub start: PgLsn,
    /// When that committed on the source, where it is known.
    pub commit_time: Option<SystemTime>,
    /// When it was applied, where that is known: whatever lies before committed earlier.
    pub applied_at: Option<SystemTime>,
    /// What may be held at a time, records that wait for others included.
    pub limits: IntakeLimits,
    /// Where a gap may be filled from.
    pub archive: Option<(StoreUrl, Encryption)>,
    /// How long the archive may take until it has what is missing; and how long a writer may be at it, before the archive is
    /// asked.
    pub patience: Duration,
}

/// How long is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// For ever.
    Stopped,
    /// Until everything has been read that was in the stream at this time.
    Tip(Instant),
}

/// How a reading came to the tip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tip {
    /// What keeps the rest of the stream from being applied, if there is something.
    pub gap: Option<Gap>,
    /// Whether anything was read that leads on from where the reading was to begin.
    pub joined: bool,
    /// Where everything that was handed over ends.
    pub position: PgLsn,
    /// Whether parts of a batch behind that wait for others.
    pub unfinished: bool,
}

/// Receives until an error, or until nobody wants transactions any more, or the tip was reached; then says how.
///
/// # Errors
/// [`SourceError`]
pub async fn receive(
    settings: StreamSettings,
    until: Until,
    space: SpillSpace,
    queue: mpsc::Sender<Received>,
    position: watch::Sender<SourcePosition>,
    metrics: StreamMetrics,
) -> Result<Tip, SourceError> {
    let receiving = Receiving::open(settings, until, space, queue, position, metrics);
    receiving.await?.run().await
}
