//! What the outside may know of each pipeline: `/metrics`, `/status`, the page, `/readyz`, `dr-agent status`.
//!
//! A pipeline writes down what happened and when; what that means is worked out when somebody asks (`judge`). So nothing
//! here can stand still while time goes on: not when the pipeline waits, has ended, or has died.
//!
//! ```text
//! pipeline ─▶ StatusCell ┐
//! watch    ─▶ Servers    ┴▶ Registry::read(now) ─▶ /metrics /status /readyz /
//! ```
//!
//! The JSON is a contract: fields are added, never renamed or removed.
//!
//! # Invariants
//! - In every state that is not streaming the lag grows, or is unknown, and unknown is breached.
//! - What needs a person is breached at once, and stays so until it streams again.

mod judge;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::observe::lag::Lag;
use crate::pg::PgLsn;
use crate::time::Micros;
use crate::watch::Servers;
use crate::watch::coverage::Coverage;
pub use judge::Stages;
use judge::judge;

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

/// The part of the way from source to replica that a pipeline carries changes; `/status` names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Leg {
    /// All of it: `run` under route `direct`.
    #[default]
    #[serde(rename = "direct")]
    Whole,
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
    /// Since when, RFC 3339.
    pub since: Option<String>,
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
    /// Lag above the RPO, or unknown, or it needs a person.
    pub rpo_breached: bool,
    /// WAL the source keeps for the slot, in bytes; null while the source does not answer.
    pub slot_retained_bytes: Option<u64>,
    /// Seconds until the source's disk is full if nothing were acknowledged any more.
    pub source_disk_full_seconds: Option<f64>,
    /// What a session of ours waits for, on either server, and since when; null while none has for longer than a second or two.
    pub waits_for: Option<String>,
    /// Objects that are not protected, by kind.
    pub unprotected: BTreeMap<&'static str, u64>,
    /// Tables that are not protected for now, and why: they cannot be created, copied or applied, or that is being done.
    pub set_aside: BTreeMap<String, String>,
    /// Foreign keys and partitions that the replica refuses, and why; they are tried again.
    pub missing_constraints: BTreeMap<String, String>,
    /// What a failover would bring, and what not, as seen on the replica; null before the first look, and where the last one is old.
    pub coverage: Option<Coverage>,
    /// What went wrong last, with its causes; null while all is well.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// Lag by stage; on `/metrics` only.
    #[serde(skip)]
    pub stages: Stages,
}

/// What a pipeline has written down.
#[derive(Debug)]
struct Written {
    status: DatabaseStatus,
    since: Micros,
    /// An error that needs a person has ended it, and it has not streamed since.
    needs_a_person: bool,
    lag: Lag,
    /// The end of the source's WAL, as the stream itself told last.
    told: Option<PgLsn>,
    /// Up to where the sink is.
    applied: Option<PgLsn>,
    /// What was seen on the replica, and when.
    coverage: Option<(Micros, Coverage)>,
}

/// A slot for one database's status: the pipeline writes, HTTP reads.
#[derive(Clone, Debug)]
pub struct StatusCell {
    written: Arc<Mutex<Written>>,
    servers: Servers,
}

impl StatusCell {
    /// A new pipeline, which has not applied anything yet.
    pub fn new(database: &str, stream: &str, leg: Leg, lag: Lag, servers: &Servers) -> Self {
        let status = DatabaseStatus {
            database: database.to_owned(),
            stream: stream.to_owned(),
            leg,
            ..DatabaseStatus::default()
        };
        Self {
            written: Arc::new(Mutex::new(Written {
                status,
                since: crate::time::now(),
                needs_a_person: false,
                lag,
                told: None,
                applied: None,
                coverage: None,
            })),
            servers: servers.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it.
    pub fn update(&self, change: impl FnOnce(&mut DatabaseStatus)) {
        change(&mut self.lock().status);
    }

    /// The tables that are not protected for now, and why.
    pub fn set_aside(&self) -> BTreeMap<String, String> {
        self.lock().status.set_aside.clone()
    }

    /// Another state begins.
    pub fn enter(&self, state: State, now: Micros) {
        let mut written = self.lock();
        if written.status.state != state {
            written.since = now;
        }
        written.status.state = state;
        if state == State::Streaming {
            written.needs_a_person = false;
        }
    }

    /// An error that needs a person has ended it; or it is fenced, or died of a bug.
    pub fn end(&self, state: State, now: Micros) {
        self.enter(state, now);
        self.lock().needs_a_person = true;
    }

    /// What is known of the lag. Outlives sessions: while one is being restored, the lag goes on growing from where it was.
    pub fn lag(&self) -> Lag {
        self.lock().lag.clone()
    }

    /// The lag is judged by these values of the configuration from now on.
    pub fn go_by(&self, heartbeat_every: Duration, rpo: Duration) {
        self.lock().lag.go_by(heartbeat_every, rpo);
    }

    /// Takes over what a session knows.
    pub fn progress(&self, lag: &Lag, told: Option<PgLsn>, applied: Option<PgLsn>) {
        let mut written = self.lock();
        written.lag.clone_from(lag);
        written.told = told;
        written.applied = applied.or(written.applied);
    }

    /// What is protected, as seen on the replica.
    pub fn covered(&self, coverage: Coverage, now: Micros) {
        self.lock().coverage = Some((now, coverage));
    }

    /// What is known of the two servers.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// How far the source's clock is ahead, where that could be measured.
    pub fn source_ahead(&self) -> Option<Micros> {
        self.servers.source_ahead()
    }

    /// What it means at `now`.
    pub fn read(&self, now: Micros) -> DatabaseStatus {
        judge(&self.lock(), &self.servers.read(), now)
    }
}

/// Every pipeline of the process; databases may be added while it runs.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    cells: Arc<Mutex<Vec<StatusCell>>>,
    servers: Servers,
}

impl Registry {
    /// Adds a pipeline.
    pub fn add(&self, cell: StatusCell) {
        self.lock().push(cell);
    }

    /// What is known of the two servers.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    fn lock(&self) -> MutexGuard<'_, Vec<StatusCell>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every status as it is at `now`, by database name.
    pub fn read(&self, now: Micros) -> Vec<DatabaseStatus> {
        let cells = self.lock().clone();
        let mut all: Vec<_> = cells.iter().map(|cell| cell.read(now)).collect();
        all.sort_by(|a, b| a.database.cmp(&b.database));
        all
    }
}
