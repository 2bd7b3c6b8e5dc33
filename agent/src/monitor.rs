//! The monitor: an ordinary session with the source that writes the in-band tables and asks what only
//! the source knows.
//!
//! - every `source.heartbeat`: the heartbeat row, so that a quiet database moves its slot and its lag is
//!   measured end to end;
//! - every `source.sequences`: positions of sequences that moved, since logical decoding does not carry
//!   them;
//! - every 2 seconds: WAL written, WAL kept for our slot, and how long the disk lasts;
//! - every 30 seconds: what is not protected.
//!
//! # What it does not do
//! It does not keep going after an error: a source that takes no heartbeat is not being replicated
//! either. Its error ends the session like any other.

mod sequences;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;

use crate::config::Config;
use crate::coverage::{self, Unprotected};
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session, slot};
use crate::stream::StreamName;

const SLOT_EVERY: Duration = Duration::from_secs(2);
const COVERAGE_EVERY: Duration = Duration::from_secs(30);

/// A monitor query that takes longer than this has met a lock or a server in trouble.
const STATEMENT_TIMEOUT: &str = "15s";

/// What the monitor found.
#[derive(Clone, Debug)]
pub enum Report {
    /// The source's WAL and our slot.
    Wal(WalReport),
    /// What is not protected, by kind.
    Coverage(Vec<Unprotected>),
}

/// The source's WAL and our slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WalReport {
    /// Where WAL is written.
    pub written: PgLsn,
    /// WAL kept for our slot, in bytes.
    pub retained: Option<u64>,
    /// Seconds until the disk is full at the current rate, were nothing acknowledged any more.
    pub disk_full_seconds: Option<f64>,
}

/// Runs until an error, or until nobody listens.
pub async fn run(
    config: &Config,
    conninfo: &ConnInfo,
    stream: &StreamName,
    reports: mpsc::Sender<Report>,
) -> Result<(), PgError> {
    let session = Session::new(stream.application_name("monitor"))
        .set("statement_timeout", STATEMENT_TIMEOUT)
        // Waiting for a synchronous standby would turn its outage into ours.
        .set("synchronous_commit", "local");
    let client = pg::connect(conninfo, &session).await?;
    let disk = wal_disk(&client, conninfo).await?;
    let mut rate = WalRate::default();
    let mut heartbeat = every(config.source.heartbeat_every);
    let mut sequences = every(config.source.sequences_every);
    let mut wal = every(SLOT_EVERY);
    let mut cover = every(COVERAGE_EVERY);
    loop {
        let report = tokio::select! {
            biased;
            () = reports.closed() => return Ok(()),
            _ = heartbeat.tick() => {
                write_heartbeat(&client).await?;
                continue;
            }
            _ = sequences.tick() => {
                sequences::write(&client).await?;
                continue;
            }
            _ = wal.tick() => {
                Report::Wal(observe_wal(&client, stream, disk.as_deref(), &mut rate).await?)
            }
            _ = cover.tick() => {
                match coverage::unprotected(&client, config).await {
                    Ok(unprotected) => Report::Coverage(unprotected),
                    // Tables come and go too fast for this look.
                    Err(error) if error.is_of_something_dropped() => continue,
                    Err(error) => return Err(error),
                }
            }
        };
        if reports.send(report).await.is_err() {
            return Ok(());
        }
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

async fn write_heartbeat(client: &Client) -> Result<(), PgError> {
    client
        .execute(
            "INSERT INTO dr_agent.heartbeat AS h (id, beat, written_at)
             VALUES (1, 1, clock_timestamp())
             ON CONFLICT (id) DO UPDATE SET beat = h.beat + 1, written_at = excluded.written_at",
            &[],
        )
        .await?;
    Ok(())
}

async fn observe_wal(
    client: &Client,
    stream: &StreamName,
    disk: Option<&std::path::Path>,
    rate: &mut WalRate,
) -> Result<WalReport, PgError> {
    let row = client
        .query_one("SELECT pg_catalog.pg_current_wal_lsn()", &[])
        .await?;
    let written: PgLsn = row.get(0);
    #[allow(clippy::disallowed_methods, reason = "the edge: rates need a clock")]
    let per_second = rate.observe(written, Instant::now());
    let free = disk.and_then(free_bytes);
    Ok(WalReport {
        written,
        retained: slot::retained_bytes(client, stream.as_str()).await?,
        disk_full_seconds: free
            .zip(per_second)
            .and_then(|(free, rate)| seconds_left(free, rate)),
    })
}

/// The directory whose disk fills up, where it is this host's and may be seen.
async fn wal_disk(client: &Client, conninfo: &ConnInfo) -> Result<Option<PathBuf>, PgError> {
    let is_local = conninfo.hosts().iter().all(|host| {
        host.is_unix() || matches!(host.name.as_str(), "localhost" | "127.0.0.1" | "::1")
    });
    if !is_local {
        return Ok(None);
    }
    // Only members of pg_read_all_settings see the row.
    let rows = client
        .query(
            "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory'",
            &[],
        )
        .await?;
    let Some(data) = rows.first().map(|row| PathBuf::from(row.get::<_, &str>(0))) else {
        return Ok(None);
    };
    // pg_wal may be a link to another disk, but only PostgreSQL's own user may look into the directory.
    let wal = data.join("pg_wal");
    let seen = [wal, data]
        .into_iter()
        .find(|path| free_bytes(path).is_some());
    Ok(seen)
}

fn free_bytes(path: &std::path::Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// How fast WAL is written, smoothed over about a minute.
#[derive(Debug, Default)]
struct WalRate {
    last: Option<(PgLsn, Instant)>,
    per_second: Option<f64>,
}

impl WalRate {
    /// Weight of a new observation; they come every [`SLOT_EVERY`].
    const WEIGHT: f64 = 0.05;

    fn observe(&mut self, written: PgLsn, now: Instant) -> Option<f64> {
        if let Some((before, at)) = self.last {
            let seconds = now.duration_since(at).as_secs_f64();
            if seconds > 0.0 {
                let bytes = u64::from(written).saturating_sub(u64::from(before));
                #[allow(
                    clippy::cast_precision_loss,
                    reason = "fewer than 2^52 bytes in two seconds"
                )]
                let current = bytes as f64 / seconds;
                let smooth = self
                    .per_second
                    .map_or(current, |rate| rate + Self::WEIGHT * (current - rate));
                self.per_second = Some(smooth);
            }
        }
        self.last = Some((written, now));
        self.per_second
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "disks are smaller than 2^52 bytes"
)]
fn seconds_left(free: u64, per_second: f64) -> Option<f64> {
    (per_second > 0.0).then(|| free as f64 / per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_lasts_as_long_as_the_rate_says() {
        let mut rate = WalRate::default();
        let start = Instant::now();
        assert_eq!(rate.observe(PgLsn::from(0), start), None);
        let after = rate
            .observe(PgLsn::from(20_000_000), start + Duration::from_secs(2))
            .unwrap();
        assert!((after - 1e7).abs() < 1.0, "{after}");
        assert_eq!(seconds_left(1_000_000_000, 1e7), Some(100.0));
        assert_eq!(seconds_left(1, 0.0), None);
    }
}
