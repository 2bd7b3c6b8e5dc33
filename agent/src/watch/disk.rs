//! How long the source's WAL disk lasts.
//!
//! # What it does not do
//! It looks at no disk of another machine: there it says nothing.

use std::path::{Path, PathBuf};

use tokio_postgres::Client;

use crate::pg::{ConnInfo, PgError, PgLsn};
use crate::time::Micros;

/// The directory whose disk fills up, where it is this host's and may be seen.
#[derive(Debug, Default)]
pub(super) struct WalDisk(Option<PathBuf>);

impl WalDisk {
    /// Asks the server where it is.
    pub(super) async fn of(client: &Client, conninfo: &ConnInfo) -> Result<Self, PgError> {
        let is_local = conninfo.hosts().iter().all(|host| {
            host.is_unix() || matches!(host.name.as_str(), "localhost" | "127.0.0.1" | "::1")
        });
        if !is_local {
            return Ok(Self(None));
        }
        // Only members of pg_read_all_settings see the row.
        let rows = client
            .query(
                "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_directory'",
                &[],
            )
            .await?;
        let Some(data) = rows.first().map(|row| PathBuf::from(row.get::<_, &str>(0))) else {
            return Ok(Self(None));
        };
        // pg_wal may be a link to another disk, but only PostgreSQL's own user may look into the directory.
        let wal = data.join("pg_wal");
        let seen = [wal, data]
            .into_iter()
            .find(|path| free_bytes(path).is_some());
        Ok(Self(seen))
    }

    /// Seconds until it is full at this rate.
    pub(super) fn seconds_left(&self, per_second: Option<f64>) -> Option<f64> {
        let free = self.0.as_deref().and_then(free_bytes);
        free.zip(per_second)
            .and_then(|(free, rate)| seconds_left(free, rate))
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// How fast WAL is written, smoothed over about a minute.
#[derive(Debug, Default)]
pub(super) struct WalRate {
    last: Option<(PgLsn, Micros)>,
    per_second: Option<f64>,
}

impl WalRate {
    /// Weight of a new observation; they come every other second.
    const WEIGHT: f64 = 0.05;

    #[allow(
        clippy::cast_precision_loss,
        reason = "fewer than 2^52 bytes, and microseconds, between two looks"
    )]
    pub(super) fn observe(&mut self, written: PgLsn, now: Micros) -> Option<f64> {
        if let Some((before, at)) = self.last {
            let seconds = (now - at) as f64 / 1e6;
            if seconds > 0.0 {
                let bytes = u64::from(written).saturating_sub(u64::from(before));
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
        assert_eq!(rate.observe(PgLsn::from(0), 0), None);
        let after = rate.observe(PgLsn::from(20_000_000), 2_000_000).unwrap();
        assert!((after - 1e7).abs() < 1.0, "{after}");
        assert_eq!(seconds_left(1_000_000_000, 1e7), Some(100.0));
        assert_eq!(seconds_left(1, 0.0), None);
    }
}
