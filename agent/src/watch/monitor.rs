//! The monitor: an ordinary session with the source, beside whoever reads its stream, that writes the in-band tables.
//!
//! - every `source.heartbeat`: the heartbeat row, so that a quiet database moves its slot and its lag is
//!   measured end to end;
//! - every `source.sequences`: positions of sequences that moved, since logical decoding does not carry
//!   them;
//! - every 2 seconds: by how much the replica's clock is ahead, if that has changed;
//! - every 30 seconds, and within 2 when tables, indexes or publications changed: what there is, and what of it is not
//!   protected;
//! - every 2 seconds, where something was defined: what the objects are (`watch::fingerprint`).
//!
//! It also deletes what is old among the commands that event triggers have written down: a week, and the newest twenty thousand,
//! stay.
//!
//! # What it does not do
//! It does not keep going after an error: a source that takes no heartbeat is not being replicated
//! either, unless it is read-only (`writable`). Its error ends the session like any other. What has to be known whether
//! something streams or not is [`crate::watch`]'s.

mod writable;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;

use crate::config::{Config, Ddl};
use crate::error::chain;
use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, Session};
use crate::schema::{clock, ddl, fingerprint, heartbeat};
use crate::watch::Servers;
use crate::watch::coverage::{self, Unprotected};
use crate::watch::sequence_look::{self, Notes};
use writable::Writable;

use super::fingerprint::Looks;

const CLOCK_EVERY: Duration = Duration::from_secs(2);
/// What is not protected is looked at when the catalogs changed, which costs next to nothing to ask, and every now and then.
const CATALOGS_EVERY: Duration = Duration::from_secs(2);
const COVERAGE_EVERY: Duration = Duration::from_secs(30);
/// Definitions cost more to read, and are read when something was defined, and every now and then.
const DEFINITIONS_EVERY: Duration = Duration::from_secs(600);

/// A monitor query that takes longer than this has met a lock or a server in trouble.
const STATEMENT_TIMEOUT: &str = "15s";

/// Runs until an error, or until nobody listens; reports what is not protected.
pub async fn run(
    config: &Config,
    conninfo: &ConnInfo,
    stream: &StreamName,
    servers: &Servers,
    reports: mpsc::Sender<Vec<Unprotected>>,
) -> Result<(), PgError> {
    let client = pg::connect(conninfo, &session(stream)).await?;
    let mut noted = Notes::read(&client).await?;
    let mut heartbeat = every(config.source.heartbeat_every);
    let mut sequences = every(config.source.sequences_every);
    let mut clock = every(CLOCK_EVERY);
    let mut cover = every(CATALOGS_EVERY);
    let mut covered = Covered::default();
    let mut writable = Writable::default();
    let mut look_writable = every(COVERAGE_EVERY);
    let mut telling = Telling::default();
    let mut looks = Looks::default();
    let mut look = every(CATALOGS_EVERY);
    let replicates_ddl = config.source.ddl == Ddl::Replicate;
    if !replicates_ddl {
        writable.after(stream, fingerprint::clear(&client).await)?;
    }
    loop {
        let report = tokio::select! {
            biased;
            () = reports.closed() => return Ok(()),
            _ = heartbeat.tick() => {
                writable.after(stream, heartbeat::write(&client).await)?;
                continue;
            }
            _ = sequences.tick() => {
                let look = sequence_look::read(&client).await?;
                if !writable.after(stream, noted.write(&client, &look).await)? {
                    // What was not stored is not noted.
                    noted = Notes::read(&client).await?;
                }
                continue;
            }
            _ = look.tick(), if replicates_ddl => {
                looks.tick(&client, (conninfo, stream)).await?;
                continue;
            }
            _ = look_writable.tick() => {
                writable.look(conninfo, stream).await;
                writable.after(stream, ddl::prune(&client).await)?;
                continue;
            }
            _ = clock.tick() => {
                if let Some(ahead) = servers.replica_ahead_seconds() {
                    telling.told(stream, clock::write(&client, stream, ahead).await)?;
                }
                continue;
            }
            _ = cover.tick() => {
                if !covered.is_old(catalog_changes(&client).await?) {
                    continue;
                }
                let from = (config, conninfo);
                match cover_all(&client, from, stream, &mut telling).await {
                    Ok(unprotected) => unprotected,
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

/// Looks what is not protected, and tells the replica, with what there is.
async fn cover_all(
    client: &Client,
    (config, conninfo): (&Config, &ConnInfo),
    stream: &StreamName,
    telling: &mut Telling,
) -> Result<Vec<Unprotected>, PgError> {
    let unprotected = coverage::unprotected(client, config).await?;
    telling.join(stream)?;
    let began = now();
    let rests = telling.rests_until.is_some_and(|until| until > began);
    if rests || !telling.elsewhere.is_empty() {
        return Ok(unprotected);
    }
    let changes: i64 = client.query_one(coverage::CHANGES, &[]).await?.get(0);
    if telling.defined.is_fresh(changes, DEFINITIONS_EVERY) {
        let told = coverage::tell(client, stream, &unprotected, false).await;
        telling.told(stream, told)?;
        telling.rest(began.elapsed());
    } else {
        telling.defined.last = Some((began, changes));
        let (conninfo, stream, unprotected) =
            (conninfo.clone(), stream.clone(), unprotected.clone());
        telling.elsewhere.spawn(async move {
            let told = tell_definitions(&conninfo, &stream, &unprotected).await;
            (told, began.elapsed())
        });
    }
    Ok(unprotected)
}

/// Beside the heartbeat, which must not wait for it.
async fn tell_definitions(
    conninfo: &ConnInfo,
    stream: &StreamName,
    unprotected: &[Unprotected],
) -> Result<(), PgError> {
    let client = pg::connect(conninfo, &session(stream)).await?;
    coverage::tell(&client, stream, unprotected, true).await
}

fn session(stream: &StreamName) -> Session {
    Session::new(stream.application_name("monitor"))
        .set("statement_timeout", STATEMENT_TIMEOUT)
        // Waiting for a synchronous standby would turn its outage into ours.
        .set("synchronous_commit", "local")
}

/// Telling the replica what there is reads all of the catalogs: whatever their size, and however often they change, the source
/// is at it for one part of the time in so many.
const TELLING_RESTS: u32 = 20;

/// What the replica only wants to know.
#[derive(Debug, Default)]
struct Telling {
    rests_until: Option<Instant>,
    /// Definitions and privileges.
    defined: Covered,
    /// The telling of those, and how long it took.
    elsewhere: JoinSet<(Result<(), PgError>, Duration)>,
    refused: bool,
}

impl Telling {
    /// Takes what has ended elsewhere. What failed is told again when something is defined, or after a while.
    fn join(&mut self, stream: &StreamName) -> Result<(), PgError> {
        while let Some(ended) = self.elsewhere.try_join_next() {
            match ended {
                Ok((Err(error), _)) if error.sqlstate().is_none() => {
                    tracing::debug!(%stream, error = %chain(&error), "definitions were not told");
                    self.defined.last = None;
                }
                Ok((told, took)) => {
                    self.told(stream, told)?;
                    self.rest(took);
                }
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        Ok(())
    }

    fn rest(&mut self, took: Duration) {
        self.rests_until = Some(now() + took * TELLING_RESTS);
    }

    /// A source that refuses it is still replicated; that is said once.
    fn told(&mut self, stream: &StreamName, told: Result<(), PgError>) -> Result<(), PgError> {
        let refused = match told {
            Err(error) if error.sqlstate().is_some() => error,
            told => {
                self.refused = false;
                return told;
            }
        };
        if !std::mem::replace(&mut self.refused, true) {
            tracing::warn!(%stream, error = %chain(&refused), "the replica cannot be told what there is");
        }
        Ok(())
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// How often the rows of the catalogs were changed that say what is protected. Statistics are written a second late, and not at
/// all without `track_counts`.
async fn catalog_changes(client: &Client) -> Result<i64, PgError> {
    const SQL: &str = "
        SELECT coalesce(sum(pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid)
                            + pg_stat_get_tuples_deleted(oid)), 0)::bigint
          FROM pg_class
         WHERE oid IN ('pg_class'::regclass, 'pg_index'::regclass, 'pg_inherits'::regclass,
                       'pg_publication'::regclass, 'pg_publication_rel'::regclass)";
    Ok(client.query_one(SQL, &[]).await?.get(0))
}

fn now() -> Instant {
    Instant::now()
}

/// When what is not protected was looked at, and what the catalogs were then.
#[derive(Debug, Default)]
struct Covered {
    last: Option<(Instant, i64)>,
}

impl Covered {
    fn is_old(&mut self, changes: i64) -> bool {
        if self.is_fresh(changes, COVERAGE_EVERY) {
            return false;
        }
        self.last = Some((now(), changes));
        true
    }

    fn is_fresh(&self, changes: i64, every: Duration) -> bool {
        let is_fresh = |(at, then): (Instant, i64)| then == changes && at.elapsed() < every;
        self.last.is_some_and(is_fresh)
    }
}
