//! Who takes part, and what is the same for all of them.
//!
//! A contestant is prepared once per workload (its replica is caught up, then it is stopped) and drains the
//! backlog once per round. Contestants that differ only in configuration are a [`Family`] and share one
//! replica and one slot.

pub(crate) mod agent;
pub(crate) mod limits;
mod pgcopydb;
mod subscription;

use std::time::Duration;

use anyhow::{Result, bail};
use dr_agent_tests::agent::Running;
use dr_agent_tests::client::Client;
use dr_agent_tests::server::PgServer;
use tokio::time::{Instant, sleep};

use super::arena::{Arena, Backlog, Base};
use super::network::{Network, Wan};
use crate::results::Round;
use crate::usage;

pub(crate) use agent::Variant;

/// How often the replica is asked whether everything is there.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the contestant may take to say itself what the replica shows already.
const CONFIRM_MAX: Duration = Duration::from_secs(15);

/// One contestant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contestant {
    /// The agent, in one configuration.
    Agent(Variant),
    /// PostgreSQL's own subscription.
    Subscription,
    /// pgcopydb: `clone` for the copy, `follow` for a backlog.
    Pgcopydb,
    /// A limit: `pg_recvlogical` writing to nowhere.
    PgRecvlogical,
    /// A limit: the changes decoded and counted on the source itself.
    Peek,
}

/// Contestants that share a replica and a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    /// All variants of the agent.
    Agent,
    /// The subscription.
    Subscription,
    /// pgcopydb.
    Pgcopydb,
    /// The limits: a slot and no replica.
    BareSlot,
}

/// Where and how a round takes place.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    /// The source with the backlog.
    pub(crate) arena: &'a Arena,
    /// The backlog.
    pub(crate) backlog: &'a Backlog,
    /// Without or with a distance.
    pub(crate) network: Network,
    /// How far that is.
    pub(crate) wan: Wan,
    /// A drain that takes longer is given up.
    pub(crate) patience: Duration,
    /// Compare source and replica in full afterwards.
    pub(crate) compare: bool,
}

/// What came of a round.
pub(crate) enum Outcome {
    /// A measurement.
    Measured(Round),
    /// None, because this contestant cannot.
    Skipped(String),
}

impl Contestant {
    /// Reads a name as the command line has it.
    pub(crate) fn parse(name: &str, variants: &[Variant]) -> Result<Self> {
        if let Some(variant) = variants.iter().find(|variant| variant.name == name) {
            return Ok(Self::Agent(variant.clone()));
        }
        Ok(match name {
            "subscription" => Self::Subscription,
            "pgcopydb" => Self::Pgcopydb,
            "pg_recvlogical" => Self::PgRecvlogical,
            "peek" => Self::Peek,
            _ => bail!("there is no contestant \"{name}\""),
        })
    }

    /// As on the command line and in the results.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Agent(variant) => &variant.name,
            Self::Subscription => "subscription",
            Self::Pgcopydb => "pgcopydb",
            Self::PgRecvlogical => "pg_recvlogical",
            Self::Peek => "peek",
        }
    }

    /// Whose replica and slot it uses.
    pub(crate) fn family(&self) -> Family {
        match self {
            Self::Agent(_) => Family::Agent,
            Self::Subscription => Family::Subscription,
            Self::Pgcopydb => Family::Pgcopydb,
            Self::PgRecvlogical | Self::Peek => Family::BareSlot,
        }
    }

    /// Whether there is anything to measure at this workload through this network.
    pub(crate) fn takes_part(&self, workload: &str, network: Network) -> bool {
        match self {
            // Nothing of it leaves the server.
            Self::Peek => network == Network::Local,
            Self::Pgcopydb => pgcopydb::FOLLOWS.contains(&workload) && network == Network::Local,
            Self::Agent(_) | Self::Subscription | Self::PgRecvlogical => true,
        }
    }

    /// How many rounds it gets at most; one that takes minutes varies little.
    pub(crate) fn rounds_max(&self) -> u32 {
        match self {
            Self::Pgcopydb => 1,
            _ => u32::MAX,
        }
    }

    /// Whether it has an initial copy.
    pub(crate) fn copies(&self) -> bool {
        matches!(self, Self::Agent(_) | Self::Subscription | Self::Pgcopydb)
    }

    /// Whether it can stay attached and follow.
    pub(crate) fn attaches(&self) -> bool {
        matches!(self, Self::Agent(_) | Self::Subscription)
    }

    /// The server that is behind the long line for it.
    pub(crate) fn line_leads_to<'a>(
        &self,
        source: &'a PgServer,
        replica: &'a PgServer,
    ) -> &'a PgServer {
        match self {
            Self::Agent(_) | Self::Pgcopydb => replica,
            Self::Subscription | Self::PgRecvlogical | Self::Peek => source,
        }
    }

    /// Copies everything into an empty replica, catches up and stays; `port` is the line's.
    pub(crate) async fn attach(
        &self,
        arena: &Arena,
        replica: &PgServer,
        port: u16,
    ) -> Result<Attached> {
        match self {
            Self::Agent(variant) => {
                let running = agent::attach(Some(variant), arena, replica, port).await?;
                Ok(Attached::Agent(running))
            }
            Self::Subscription => {
                subscription::attach(arena, replica, port).await?;
                Ok(Attached::Subscription)
            }
            _ => bail!("{} does not follow", self.name()),
        }
    }

    /// Drains the backlog once.
    pub(crate) async fn drain(&self, ground: Ground<'_>, base: Option<&Base>) -> Result<Outcome> {
        match (self, base) {
            (Self::Agent(variant), Some(base)) => agent::drain(variant, ground, base).await,
            (Self::Subscription, Some(base)) => subscription::drain(ground, base).await,
            (Self::Pgcopydb, Some(base)) => pgcopydb::drain(ground, base).await,
            (Self::PgRecvlogical, _) => limits::receive(ground).await,
            (Self::Peek, _) => limits::peek(ground).await,
            (_, None) => bail!("{} was not prepared", self.name()),
        }
    }

    /// Copies a filled source into an empty replica.
    pub(crate) async fn copy(&self, ground: CopyGround<'_>) -> Result<Outcome> {
        match self {
            Self::Agent(variant) => agent::copy(variant, ground).await,
            Self::Subscription => subscription::copy(ground).await,
            Self::Pgcopydb => match pgcopydb::missing(&ground.arena.source, false) {
                Some(why) => Ok(Outcome::Skipped(why)),
                None => pgcopydb::copy(ground).await,
            },
            Self::PgRecvlogical | Self::Peek => bail!("{} copies nothing", self.name()),
        }
    }
}

/// A contestant that follows.
pub(crate) enum Attached {
    /// The agent's process.
    Agent(Running),
    /// A subscription on the replica.
    Subscription,
}

impl Attached {
    /// Ends it, and what it keeps on the source.
    pub(crate) async fn end(self, arena: &Arena, replica: &PgServer) {
        match self {
            Self::Agent(running) => agent::detach(running, arena).await,
            Self::Subscription => subscription::detach(arena, replica).await,
        }
    }
}

impl Family {
    /// Why it cannot take part on this machine.
    pub(crate) fn missing(self, source: &PgServer) -> Option<String> {
        match self {
            Self::Pgcopydb => pgcopydb::missing(source, true),
            Self::Agent | Self::Subscription | Self::BareSlot => None,
        }
    }

    /// Brings its replica to where the backlog will begin, and stops; `None` where there is no replica.
    pub(crate) async fn prepare(self, arena: &Arena, fsync: bool) -> Result<Option<Base>> {
        Ok(match self {
            Self::Agent => Some(agent::prepare(arena, fsync).await?),
            Self::Subscription => Some(subscription::prepare(arena, fsync).await?),
            Self::Pgcopydb => Some(pgcopydb::prepare(arena, fsync).await?),
            Self::BareSlot => {
                limits::prepare(arena).await;
                None
            }
        })
    }
}

/// Where and how an initial copy takes place.
#[derive(Clone, Copy)]
pub(crate) struct CopyGround<'a> {
    /// The filled source.
    pub(crate) arena: &'a Arena,
    /// An empty server.
    pub(crate) replica: &'a PgServer,
    /// Without or with a distance.
    pub(crate) network: Network,
    /// How far that is.
    pub(crate) wan: Wan,
    /// Tables copied at the same time.
    pub(crate) jobs: u32,
    /// A copy that takes longer is given up.
    pub(crate) patience: Duration,
}

/// A round under way: when it began, and what the servers had used by then.
struct Watch<'a> {
    source: &'a PgServer,
    replica: Option<&'a PgServer>,
    cpu_source: f64,
    cpu_replica: Option<f64>,
    started: Instant,
}

impl<'a> Watch<'a> {
    fn begin(source: &'a PgServer, replica: Option<&'a PgServer>) -> Result<Self> {
        Ok(Self {
            source,
            replica,
            cpu_source: usage::of_server(source)?,
            cpu_replica: replica.map(usage::of_server).transpose()?,
            started: Instant::now(),
        })
    }

    fn elapsed(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// What the servers have used since the beginning.
    fn end(&self, arrival: &Arrival) -> Result<Round> {
        let round = self.end_after(arrival.last)?;
        Ok(Round {
            first_seconds: Some(arrival.first),
            ..round
        })
    }

    /// The same where the rows between the first and the last are not seen.
    fn end_after(&self, seconds: f64) -> Result<Round> {
        let cpu_replica = match (self.replica, self.cpu_replica) {
            (Some(replica), Some(before)) => Some(usage::of_server(replica)? - before),
            _ => None,
        };
        Ok(Round {
            seconds,
            first_seconds: None,
            confirmed_seconds: None,
            cpu_source: usage::of_server(self.source)? - self.cpu_source,
            cpu_agent: None,
            cpu_replica,
            wire_bytes: None,
            agent_peak_bytes: None,
        })
    }
}

/// When a contestant's work was seen on the replica, in seconds since the beginning.
struct Arrival {
    first: f64,
    last: f64,
}

/// Waits until the row written last is on the replica.
///
/// `alive` fails when waiting has become pointless.
async fn marker_arrives(
    watch: &Watch<'_>,
    replica: &Client,
    patience: Duration,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<Arrival> {
    let mut first = None;
    loop {
        // Row 1 is written before the backlog, row 2 behind it; row 0 was always there.
        let newest = replica.number("SELECT max(id) FROM bench_marker").await;
        if newest >= 1 {
            first.get_or_insert(watch.elapsed());
        }
        if newest >= 2 {
            let last = watch.elapsed();
            return Ok(Arrival {
                first: first.unwrap_or(last),
                last,
            });
        }
        alive()?;
        if watch.started.elapsed() > patience {
            bail!("not drained after {patience:?}");
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Waits until the contestant says itself that it is through; `None` when it does not in time.
async fn confirms(watch: &Watch<'_>, client: &Client, question: &str) -> Option<f64> {
    let begun = Instant::now();
    while begun.elapsed() < CONFIRM_MAX {
        if client.holds(question).await {
            return Some(watch.elapsed());
        }
        sleep(LOOK_EVERY).await;
    }
    None
}

/// Compares source and replica in full.
async fn expect_equal(source: &Client, replica: &Client) -> Result<()> {
    let without = [pgcopydb::SENTINEL];
    let differences = dr_agent_tests::compare::differences(source, replica, &without).await;
    if !differences.is_empty() {
        bail!("source and replica differ:\n{differences}");
    }
    Ok(())
}
