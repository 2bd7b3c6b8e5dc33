//! Watches the two servers for as long as the process lives, whatever becomes of its pipelines.
//!
//! One session with each server for all databases together, because what is asked is the server's: how far its WAL is, what it
//! keeps for every slot, how long its disk lasts, what time it has, and what our sessions there wait for. So a replica that is
//! away, a copy, or a pipeline that has stopped hides none of that.
//!
//! # Invariants
//! - Reads only, catalogs and views of the server, within time limits; a server that does not answer is asked again with
//!   growing pauses.
//! - What was said keeps the time it was said at: whoever reads it decides for how long it is true.
//!
//! # What it does not do
//! It writes no heartbeat: see [`crate::watch::monitor`]. It ends nothing and decides nothing.

pub mod coverage;
pub mod monitor;
pub(crate) mod sequence_look;

mod disk;
mod fingerprint;
pub(crate) mod waits;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_postgres::{Client, Statement};
use tokio_util::sync::CancellationToken;

use crate::backoff::{self, Decision};
use crate::config::{Config, Databases};
use crate::error::{Class, chain};
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session};
use crate::time;
use crate::time::clock::Offset;
use crate::time::{Micros, pg_micros};
use disk::{WalDisk, WalRate};
pub use waits::Wait;

/// How often it is looked what our sessions wait for: some give up after two seconds.
const WAITS_EVERY: Duration = Duration::from_secs(1);

/// The rest is asked every so many looks.
const REST_EVERY: u32 = 2;

const STATEMENT_TIMEOUT: &str = "10s";

/// A server whose machine is gone says nothing at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// How long a clock's offset is shown without being measured again.
const CLOCK_SHOWN: Micros = 60_000_000;

/// Clocks that differ by less are nobody's business.
const CLOCK_SAID: Micros = 1_000_000;

/// One of the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchedSide {
    /// Where changes come from.
    Source,
    /// Where they go.
    Replica,
}

impl WatchedSide {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Source, Self::Replica];

    /// The value of the `side` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Replica => "replica",
        }
    }
}

/// The source's WAL.
#[derive(Clone, Debug, PartialEq)]
pub struct Wal {
    /// When it was asked, by the agent's time.
    pub at: Micros,
    /// Where WAL is written.
    pub written: PgLsn,
    /// By name.
    pub slots: BTreeMap<String, WatchedSlot>,
    /// Seconds until the disk is full at the present rate, were nothing acknowledged any more.
    pub disk_full_seconds: Option<f64>,
}

/// What the source keeps for one slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WatchedSlot {
    /// WAL, in bytes; none once it is lost.
    pub retained: Option<u64>,
    /// What it was moved to.
    pub confirmed: Option<PgLsn>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct WatchedClock {
    at: Micros,
    offset: Offset,
}

/// What the two servers said last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// The source's WAL.
    pub wal: Option<Wal>,
    clocks: [Option<WatchedClock>; 2],
    waits: [Vec<Wait>; 2],
}

impl Facts {
    /// What a session of this stream waits for.
    pub(crate) fn waits_for(&self, stream: &str, now: Micros) -> Option<String> {
        let of_it = |wait: &&Wait| wait.is_of(stream) && wait.is_fresh(now);
        let found = self.waits.iter().flatten().find(of_it);
        found.map(|wait| wait.text.clone())
    }
}

/// The same, shared: the watch writes, whoever shows something reads.
#[derive(Clone, Debug, Default)]
pub struct Servers(Arc<Mutex<Arc<Facts>>>);

impl Servers {
    fn lock(&self) -> MutexGuard<'_, Arc<Facts>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn read(&self) -> Arc<Facts> {
        Arc::clone(&self.lock())
    }

    fn update(&self, change: impl FnOnce(&mut Facts)) {
        change(Arc::make_mut(&mut self.lock()));
    }

    /// How far the source's clock is ahead of the agent's time; once measured it is known, for clocks are not set every day.
    pub fn source_ahead(&self) -> Option<Micros> {
        let clock = self.lock().clocks[WatchedSide::Source as usize];
        clock.map(|clock| clock.offset.ahead)
    }

    /// By how many seconds the replica's clock is ahead of the source's, if both were measured lately.
    pub fn replica_ahead_seconds(&self) -> Option<f64> {
        let replica = self.clock_offset_seconds(WatchedSide::Replica)?;
        Some(replica - self.clock_offset_seconds(WatchedSide::Source)?)
    }

    /// How far a server's clock is ahead of this machine's, in seconds, if it was measured lately.
    pub fn clock_offset_seconds(&self, side: WatchedSide) -> Option<f64> {
        let clock = self.lock().clocks[side as usize]?;
        let (now, wall) = (time::now(), time::wall());
        (now - clock.at <= CLOCK_SHOWN).then(|| seconds(clock.offset.ahead + now - wall))
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "fewer than 2^52 microseconds are 142 years"
)]
fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}

/// Watches one side until told to stop. `expected`: the other site need not be in reach from here.
pub async fn watch(
    side: WatchedSide,
    config: Arc<Config>,
    servers: Servers,
    expected: bool,
    stop: CancellationToken,
) {
    let places = places(side, &config);
    let mut attempt: u32 = 0;
    let mut disk = WalRate::default();
    while !stop.is_cancelled() {
        let place = &places[attempt as usize % places.len()];
        let mut server = WatchedServer {
            side,
            servers: &servers,
            rate: &mut disk,
            answered: false,
        };
        let watched = stop.run_until_cancelled(Box::pin(server.watch(place)));
        let Some(Err(error)) = watched.await else {
            return;
        };
        if server.answered {
            attempt = 0;
        }
        let text = chain(&error);
        if attempt == 0 && !expected {
            tracing::warn!(
                side = side.as_str(), error = %text,
                "the server cannot be watched; its WAL, disk and clock are unknown meanwhile"
            );
        } else {
            tracing::debug!(side = side.as_str(), error = %text, "the server cannot be watched");
        }
        attempt = attempt.saturating_add(1);
        let retry_max = config.limits.retry_max;
        // Whatever it is, it may be mended at any time.
        let decision = backoff::decide(Class::Transient, attempt, retry_max, rand::random());
        if let Decision::Retry(pause) = decision {
            let _ = timeout(pause, stop.cancelled()).await;
        }
    }
}

/// The databases by which the server can be reached: that of the URL, and where that is refused those that are replicated.
fn places(side: WatchedSide, config: &Config) -> Vec<ConnInfo> {
    let conninfo = match side {
        WatchedSide::Source => &config.source.conninfo,
        WatchedSide::Replica => &config.replica.conninfo,
    };
    let listed = match &config.source.databases {
        Databases::List(names) => names.as_slice(),
        Databases::All => &[],
    };
    let others = listed.iter().map(|name| conninfo.with_dbname(name));
    std::iter::once(conninfo.clone()).chain(others).collect()
}

/// One server, while it answers.
struct WatchedServer<'a> {
    side: WatchedSide,
    servers: &'a Servers,
    rate: &'a mut WalRate,
    answered: bool,
}

impl WatchedServer<'_> {
    async fn watch(&mut self, conninfo: &ConnInfo) -> Result<(), PgError> {
        let session = Session::new("dr_agent:watch")
            .set("statement_timeout", STATEMENT_TIMEOUT)
            .set("default_transaction_read_only", "on")
            .set("idle_session_timeout", "0");
        let client = pg::connect(conninfo, &session).await?;
        let time = client
            .prepare("SELECT pg_catalog.clock_timestamp()")
            .await?;
        let disk = match self.side {
            WatchedSide::Source => WalDisk::of(&client, conninfo).await?,
            WatchedSide::Replica => WalDisk::default(),
        };
        let mut tick = interval(WAITS_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look: u32 = 0;
        loop {
            tick.tick().await;
            let looking = self.look(&client, &time, &disk, look.is_multiple_of(REST_EVERY));
            match timeout(ANSWER_WITHIN, looking).await {
                Ok(looked) => looked?,
                Err(_) => {
                    let after = ANSWER_WITHIN;
                    let doing = "watch the server";
                    return Err(PgError::Timeout { doing, after });
                }
            }
            self.answered = true;
            look = look.wrapping_add(1);
        }
    }

    async fn look(
        &mut self,
        client: &Client,
        time: &Statement,
        disk: &WalDisk,
        everything: bool,
    ) -> Result<(), PgError> {
        if everything {
            self.measure(client, time).await?;
            if self.side == WatchedSide::Source {
                let wal = wal(client, disk, self.rate).await?;
                self.servers.update(|facts| facts.wal = Some(wal));
            }
        }
        let found = waits::look(client).await?;
        let now = time::now();
        self.servers.update(|facts| {
            waits::say(&mut facts.waits[self.side as usize], found, self.side, now);
        });
        Ok(())
    }

    /// Asks what time the server has.
    async fn measure(&self, client: &Client, statement: &Statement) -> Result<(), PgError> {
        let asked = time::now();
        let said: std::time::SystemTime = client.query_one(statement, &[]).await?.try_get(0)?;
        let at = time::now();
        let newer = Offset::of(asked, pg_micros(said), at);
        let before = self.servers.lock().clocks[self.side as usize];
        let offset = before.map_or(newer, |before| before.offset.then(newer));
        if offset.is_beyond(CLOCK_SAID)
            && !before.is_some_and(|before| before.offset.is_beyond(CLOCK_SAID))
        {
            tracing::warn!(
                side = self.side.as_str(),
                seconds_ahead = seconds(offset.ahead + at - time::wall()),
                "the server's clock differs from this machine's; the lag is corrected by that, times in logs and reports are \
                 not: see to NTP"
            );
        }
        self.servers
            .update(|facts| facts.clocks[self.side as usize] = Some(WatchedClock { at, offset }));
        Ok(())
    }
}

async fn wal(client: &Client, disk: &WalDisk, rate: &mut WalRate) -> Result<Wal, PgError> {
    const WRITTEN: &str = "
        SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                    ELSE pg_catalog.pg_current_wal_lsn() END";
    const SLOTS: &str = "
        SELECT slot_name::text, restart_lsn, confirmed_flush_lsn FROM pg_catalog.pg_replication_slots
         WHERE plugin IS NOT NULL";
    let slots = client.query(SLOTS, &[]).await?;
    let written: Option<PgLsn> = client.query_one(WRITTEN, &[]).await?.try_get(0)?;
    let written = written.unwrap_or(PgLsn::from(0));
    let at = time::now();
    let per_second = rate.observe(written, at);
    let slots = slots.iter().map(|row| {
        let restart: Option<PgLsn> = row.get(1);
        let slot = WatchedSlot {
            retained: restart.map(|from| u64::from(written).saturating_sub(u64::from(from))),
            confirmed: row.get(2),
        };
        (row.get(0), slot)
    });
    Ok(Wal {
        at,
        written,
        slots: slots.collect(),
        disk_full_seconds: disk.seconds_left(per_second),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_asked_by_another_database_where_that_of_the_url_is_refused() {
        let text = "[source]\nurl = \"postgres://a@h/x\"\ndatabases = [\"one\", \"two\"]\n\
                    [replica]\nurl = \"postgres://b@h/y\"\n";
        let config = Config::parse("f", text, []).unwrap();
        let names: Vec<String> = places(WatchedSide::Replica, &config)
            .iter()
            .map(|place| place.dbname().to_owned())
            .collect();
        assert_eq!(names, ["y", "one", "two"]);
    }

    #[test]
    fn an_offset_that_was_measured_long_ago_is_not_shown_and_still_counts() {
        let servers = Servers::default();
        let offset = Offset {
            ahead: -600_000_000,
            error: 100,
        };
        let at = time::now() - CLOCK_SHOWN - 1;
        servers.update(|facts| facts.clocks[0] = Some(WatchedClock { at, offset }));
        assert_eq!(servers.clock_offset_seconds(WatchedSide::Source), None);
        assert_eq!(servers.source_ahead(), Some(-600_000_000));
    }
}
