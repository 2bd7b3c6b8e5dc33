//! The monitor: an ordinary session with the source, beside whoever reads its stream, that writes the in-band tables.
//!
//! - every `source.heartbeat`: the heartbeat row, so that a quiet database moves its slot and its lag is
//!   measured end to end;
//! - every `source.sequences`: positions of sequences that moved, since logical decoding does not carry
//!   them;
//! - every 30 seconds: what is not protected.
//!
//! # What it does not do
//! It does not keep going after an error: a source that takes no heartbeat is not being replicated
//! either. Its error ends the session like any other. What has to be known whether something streams or not is
//! [`crate::watch`]'s.

mod sequences;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;

use crate::config::Config;
use crate::coverage::{self, Unprotected};
use crate::pg::{self, ConnInfo, PgError, Session};
use crate::stream::StreamName;

const COVERAGE_EVERY: Duration = Duration::from_secs(30);

/// A monitor query that takes longer than this has met a lock or a server in trouble.
const STATEMENT_TIMEOUT: &str = "15s";

/// Runs until an error, or until nobody listens; reports what is not protected.
pub async fn run(
    config: &Config,
    conninfo: &ConnInfo,
    stream: &StreamName,
    reports: mpsc::Sender<Vec<Unprotected>>,
) -> Result<(), PgError> {
    let session = Session::new(stream.application_name("monitor"))
        .set("statement_timeout", STATEMENT_TIMEOUT)
        // Waiting for a synchronous standby would turn its outage into ours.
        .set("synchronous_commit", "local");
    let client = pg::connect(conninfo, &session).await?;
    let mut heartbeat = every(config.source.heartbeat_every);
    let mut sequences = every(config.source.sequences_every);
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
            _ = cover.tick() => match coverage::unprotected(&client, config).await {
                Ok(unprotected) => unprotected,
                // Tables come and go too fast for this look.
                Err(error) if error.is_of_something_dropped() => continue,
                Err(error) => return Err(error),
            },
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
