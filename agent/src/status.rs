//! What the outside may know of each pipeline: `/status`, the page, `/readyz`, `dr-agent status`.
//!
//! The JSON is a contract: fields are added, never renamed or removed.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The state of one pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Connecting, checking, setting up.
    #[default]
    Initializing,
    /// Copying tables.
    Copying,
    /// Replicating.
    Streaming,
    /// Waiting before the next attempt.
    Retrying,
    /// Stopped, by an error that needs a person or because it was told to.
    Stopped,
    /// The replica was promoted, or another agent has a higher term.
    Fenced,
    /// The replica is the primary now.
    Promoted,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Initializing,
        Self::Copying,
        Self::Streaming,
        Self::Retrying,
        Self::Stopped,
        Self::Fenced,
        Self::Promoted,
    ];

    /// The value of the `state` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Copying => "copying",
            Self::Streaming => "streaming",
            Self::Retrying => "retrying",
            Self::Stopped => "stopped",
            Self::Fenced => "fenced",
            Self::Promoted => "promoted",
        }
    }
}

/// The part of the way from source to replica that a pipeline carries changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Leg {
    /// All of it: `run` under route `direct`.
    #[default]
    Direct,
    /// Into the Kinesis stream: `run` under route `kinesis`. Lag and position are those of the stream, not of the replica.
    Send,
    /// From the Kinesis stream to the replica: `apply`.
    Apply,
}

/// One database, as `/status` shows it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DatabaseStatus {
    /// Database on the source; the same name on the replica.
    pub database: String,
    /// Slot, publication, progress row.
    pub stream: String,
    /// Which part of the way it goes.
    pub leg: Leg,
    /// What the pipeline is doing.
    pub state: State,
    /// Fencing token.
    pub term: i64,
    /// Last applied batch.
    pub batch: i64,
    /// First byte after the last applied transaction.
    pub end_lsn: Option<String>,
    /// Its commit time, RFC 3339.
    pub commit_time: Option<String>,
    /// Seconds of work that would be lost now; null while unknown.
    pub lag_seconds: Option<f64>,
    /// WAL written and not applied, in bytes; null while unknown.
    pub lag_bytes: Option<u64>,
    /// Lag above the RPO, or unknown.
    pub rpo_breached: bool,
    /// WAL the source keeps for the slot, in bytes.
    pub slot_retained_bytes: Option<u64>,
    /// Seconds until the source's disk is full if nothing were acknowledged any more.
    pub source_disk_full_seconds: Option<f64>,
    /// Objects that are not protected, by kind.
    pub unprotected: BTreeMap<&'static str, u64>,
    /// What went wrong last, with its causes; null while all is well.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

/// A slot for one database's status: the pipeline writes, HTTP reads.
#[derive(Clone, Debug)]
pub struct StatusCell(Arc<Mutex<DatabaseStatus>>);

impl StatusCell {
    /// A new pipeline.
    pub fn new(database: &str, stream: &str, leg: Leg) -> Self {
        Self(Arc::new(Mutex::new(DatabaseStatus {
            database: database.to_owned(),
            stream: stream.to_owned(),
            leg,
            rpo_breached: true,
            ..DatabaseStatus::default()
        })))
    }

    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut DatabaseStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A copy of it.
    pub fn read(&self) -> DatabaseStatus {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Every pipeline of the process; databases may be added while it runs.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Mutex<Vec<StatusCell>>>);

impl Registry {
    /// Adds a pipeline.
    pub fn add(&self, cell: StatusCell) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(cell);
    }

    /// A copy of every status, by database name.
    pub fn read(&self) -> Vec<DatabaseStatus> {
        let cells = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut all: Vec<_> = cells.iter().map(StatusCell::read).collect();
        all.sort_by(|a, b| a.database.cmp(&b.database));
        all
    }
}
