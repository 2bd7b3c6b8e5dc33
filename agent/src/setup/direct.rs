//! Route `direct`: one agent sets both sides up. Both are observed, then judged, and only then written to.
//!
//! # Invariants
//! - A promoted replica is refused without the source, which may be gone for good.
//! - Nothing is written on either side before [`identity::verdict`] and, for a first start, [`super::target::judge`] and
//!   [`SourceSide::judge`] have agreed.

use std::time::{Duration, Instant};

use futures_util::future::{self, OptionFuture};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::begin::{Beginning, First};
use super::error::{SetupError, Side};
use super::identity::{self, Observed, StartVerdict};
use super::replica::{self, Known, Server};
use super::source_side::{self, SourceSide};
use super::target::HalfLoaded;
use super::{Ready, Setup, lock, recover, role, schema};
use crate::config::Config;
use crate::copy::CopyObserver;
use crate::names::TableName;
use crate::names::history::Cluster;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::replication::ReplicationConnection;
use crate::pg::{ConnInfo, PgLsn};
use crate::schema::heartbeat;
use crate::schema::progress::Progress;
use crate::schema::sending;
use crate::schema::stream::{self, Recorded};
use crate::sink::replica::Distance;

/// See [`super::prepare`].
pub(super) async fn prepare(
    config: &Config,
    database: &str,
    uncopied: Option<&TableName>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Ready, SetupError> {
    let opened = open(config, database, observer, cancel, lock::take).await?;
    let Opened {
        sides,
        replica,
        mut walsender,
        mut seen,
    } = opened;
    let (setup, progress, history) = match (seen.verdict, replica) {
        (StartVerdict::Resume | StartVerdict::Follow, Some(replica)) => {
            if seen.verdict == StartVerdict::Follow {
                seen.follow(&sides.source, &replica).await?;
                tracing::warn!(
                    database,
                    timeline = seen.cluster.timeline,
                    "the source failed over to its standby, which has everything that was applied: going on there"
                );
            }
            sides
                .go_on(
                    &mut walsender,
                    replica,
                    (&seen.known, seen.round_trip),
                    uncopied,
                )
                .await?
        }
        (StartVerdict::Begin { drop_slot }, replica) => {
            let from = (&seen.known, &seen.cluster, Beginning::Nothing { drop_slot });
            sides.begin(&mut walsender, replica, from).await?
        }
        (StartVerdict::BeginAt { since }, replica) => {
            let from = (&seen.known, &seen.cluster, Beginning::SeenSlot { since });
            sides.begin(&mut walsender, replica, from).await?
        }
        (StartVerdict::Resume | StartVerdict::Follow, None) => {
            unreachable!("there is no progress without a replica")
        }
    };
    let from = (seen.cluster, history);
    // From here on every transaction of another agent would fail, or ours: both begin at the progress row.
    let (prepared, _) = setup.finish(from, progress, seen.source_lsn).await?;
    Ok(prepared)
}

/// Looks and judges as a start does, and writes nothing; see [`super::rehearse`].
pub(super) async fn rehearse(config: &Config, database: &str) -> Result<(), SetupError> {
    let cancel = CancellationToken::new();
    let opened = open(config, database, &(), &cancel, async |_, _, _| Ok(())).await?;
    let Sides {
        source,
        admin,
        server,
        ..
    } = opened.sides;
    let begins = |verdict| {
        matches!(
            verdict,
            StartVerdict::Begin { .. } | StartVerdict::BeginAt { .. }
        )
    };
    if begins(opened.seen.verdict) {
        source.judge().await?;
        let place = (database, &source.stream);
        let how = (source.locale().await?, HalfLoaded::Refused);
        let known = &opened.seen.known;
        First::judge((admin, server), opened.replica, known, place, how).await?;
        return Ok(());
    }
    source.found.require_unaltered(&source.stream)
}

/// Both sides with what they say.
struct Opened<'a> {
    sides: Sides<'a>,
    /// The replica's database, where it is there.
    replica: Option<Client>,
    walsender: ReplicationConnection,
    seen: SeenSides,
}

/// Opens both sides and looks at them; `lock` takes the right to the stream where there is a database to take it in.
async fn open<'a>(
    config: &'a Config,
    database: &'a str,
    observer: &'a dyn CopyObserver,
    cancel: &'a CancellationToken,
    lock: impl AsyncFnOnce(&Client, Side, &StreamName) -> Result<(), SetupError>,
) -> Result<Opened<'a>, SetupError> {
    let stream = config.stream(database);
    let replica_info = config.replica.conninfo.with_dbname(database);

    // First of all, and without the source: was it promoted? Here and below, what need not wait for an answer is asked together:
    // the replica may be far away, and every session begins with this.
    let (admin, replica) = future::join(
        replica::open(&config.replica.conninfo, &stream),
        replica::open(&replica_info, &stream),
    )
    .await;
    let admin = admin?;
    let replica = replica::if_it_exists(replica, (&admin, database)).await?;
    let present = replica.as_ref();
    let (server, promoted, locked) = future::join3(
        Server::observe(&admin, database),
        OptionFuture::from(present.map(|client| replica::known(client, &stream))),
        OptionFuture::from(present.map(|client| lock(client, Side::Replica, &stream))),
    )
    .await;
    let server = server?;
    promoted.transpose()?;
    locked.transpose()?;

    let source = SourceSide::open(config, database, cancel).await?;
    server.require(&source.info.to_string(), &source.found.started_at)?;
    let mut walsender = source.walsender().await?;
    let seen = look(&source, replica.as_ref(), &mut walsender, database).await?;
    let sides = Sides {
        database,
        source,
        replica_info,
        admin,
        server,
        observer,
    };
    Ok(Opened {
        sides,
        replica,
        walsender,
        seen,
    })
}

/// What both sides say.
struct SeenSides {
    known: Known,
    cluster: Cluster,
    source_lsn: PgLsn,
    verdict: StartVerdict,
    /// How long an answer of the replica took.
    round_trip: Duration,
}

impl SeenSides {
    /// Begins the history of the new timeline: on the source first, where a start that ends in between finds it.
    async fn follow(
        &mut self,
        source: &SourceSide<'_>,
        replica: &Client,
    ) -> Result<(), SetupError> {
        let timeline = self.cluster.timeline;
        let noted = sending::follow(&source.client, &source.stream, timeline).await;
        let noted = noted.map_err(SetupError::sql(Side::Source, "note the timeline"))?;
        if let Some(recorded) = &mut self.known.recorded {
            recorded.cluster.timeline = timeline;
            recorded.began = noted.unwrap_or(recorded.began);
            stream::follow(replica, &source.stream, recorded)
                .await
                .map_err(SetupError::sql(Side::Replica, "record the timeline"))?;
        }
        Ok(())
    }
}

/// How many heartbeats a side knows of: a source that was set back knows of fewer than its replica.
pub(super) async fn beats(client: &Client, side: Side) -> Result<Option<i64>, SetupError> {
    heartbeat::beats(client)
        .await
        .map_err(SetupError::sql(side, "read the heartbeats"))
}

/// In this order: the replica is never behind the slot, and the source never behind the replica. Another agent, which may go on
/// until it is gone, must not look like a slot that somebody has moved.
async fn look(
    source: &SourceSide<'_>,
    replica: Option<&Client>,
    walsender: &mut ReplicationConnection,
    database: &str,
) -> Result<SeenSides, SetupError> {
    let slot = source.slot().await?;
    let (mut known, mut applied_of_them) = (Known::default(), None);
    let asked = Instant::now();
    if let Some(client) = replica {
        let (of_stream, beats) = future::join(
            replica::known(client, &source.stream),
            beats(client, Side::Replica),
        )
        .await;
        (known, applied_of_them) = (of_stream?, beats?);
    }
    let round_trip = asked.elapsed();
    let written = beats(&source.client, Side::Source).await?;
    let (cluster, source_lsn) = source_side::identify(walsender).await?;
    let branches = match known.recorded {
        Some(recorded) if recorded.cluster.is_promoted(&cluster) => {
            source_side::branches(walsender, cluster.timeline).await?
        }
        _ => Vec::new(),
    };
    let noted = source.note().await?;
    let is_published = source.found.publication.is_some();
    let verdict = identity::verdict(&Observed {
        stream: source.stream.clone(),
        database: database.to_owned(),
        source: cluster,
        source_lsn,
        slot,
        noted: noted.map(|noted| noted.began),
        noted_timeline: noted.map(|noted| noted.cluster.timeline),
        since: noted.and_then(|noted| noted.since.filter(|_| is_published)),
        recorded: known.recorded,
        applied: known.progress.map(|progress| progress.end_lsn),
        branches,
        beats: (written, applied_of_them),
    })
    .map_err(|source| SetupError::Mismatch {
        database: database.to_owned(),
        source,
    })?;
    Ok(SeenSides {
        known,
        cluster,
        source_lsn,
        verdict,
        round_trip,
    })
}

/// Both sides, looked at and not yet written to.
struct Sides<'a> {
    database: &'a str,
    source: SourceSide<'a>,
    replica_info: ConnInfo,
    admin: Client,
    server: Server,
    observer: &'a dyn CopyObserver,
}

impl<'a> Sides<'a> {
    /// The first start, or one that repeats an interrupted first start.
    async fn begin(
        mut self,
        walsender: &mut ReplicationConnection,
        replica: Option<Client>,
        (known, cluster, from): (&Known, &Cluster, Beginning),
    ) -> Result<(Setup<'a>, Progress, History), SetupError> {
        self.source.judge().await?;
        let how = (self.source.locale().await?, HalfLoaded::Refused);
        let place = (self.database, &self.source.stream);
        let both = (self.admin, self.server);
        let mut first = First::judge(both, replica, known, place, how).await?;
        let (replica, warning) = first.database(&self.replica_info, place).await?;
        self.source.warnings.extend(warning);
        let mut setup = Setup {
            database: self.database,
            source: self.source,
            replica_info: self.replica_info,
            replica,
            observer: self.observer,
            distance: None,
        };
        let from = (cluster, known.recorded, from);
        match setup.begin(walsender, from, &mut first).await {
            Ok((progress, history)) => Ok((setup, progress, history)),
            Err(error) => {
                let place = (setup.database, &setup.source.stream);
                first.abandon(setup.replica, place).await;
                Err(error)
            }
        }
    }

    /// Every later start.
    async fn go_on(
        mut self,
        walsender: &mut ReplicationConnection,
        mut replica: Client,
        (known, round_trip): (&Known, Duration),
        uncopied: Option<&TableName>,
    ) -> Result<(Setup<'a>, Progress, History), SetupError> {
        self.source.found.require_unaltered(&self.source.stream)?;
        let roles = role::of_source(&self.source.client).await?;
        let asked = Instant::now();
        let (roles, ensured, progress, guarded) = future::join4(
            role::ensure(&self.admin, &roles),
            schema::ensure(&replica, &self.server.role),
            recover::settle(&replica, &self.source.stream),
            replica::is_safely_guarded(&replica),
        )
        .await;
        let round_trip = round_trip.min(asked.elapsed());
        self.source.warnings.extend(roles?);
        ensured?;
        let progress = progress?;
        if !guarded? {
            replica::guard(&mut replica, self.database).await?;
        }
        drop(self.admin);
        let distance = Some(Distance {
            round_trip,
            prepared_max: self.server.prepared_max,
        });
        let mut setup = Setup {
            database: self.database,
            source: self.source,
            replica_info: self.replica_info,
            replica,
            observer: self.observer,
            distance,
        };
        setup.resume(walsender, uncopied).await?;
        let both = progress.zip(known.recorded.map(Recorded::history));
        let (progress, history) = both.expect("the verdict is Resume only where there is progress");
        Ok((setup, progress, history))
    }
}
