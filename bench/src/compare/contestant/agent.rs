//! The agent, in as many configurations as are asked for.

use anyhow::{Context as _, Error, Result, bail, ensure};
use dr_agent_tests::agent::{Agent, AgentConfig, Running};
use dr_agent_tests::server::PgServer;

use super::{CopyGround, Ground, Outcome, Watch, confirms, expect_equal, marker_arrives};
use crate::compare::arena::{Arena, Base};
use crate::compare::network::Way;
use crate::compare::workload::DATABASE;
use crate::results::Round;
use crate::servers;
use crate::usage;

const SLOT: &str = "dr";

/// Stream, slot and publication of the database.
pub(crate) const STREAM: &str = "dr_bench";

/// The exit code for a configuration the binary does not accept.
const REFUSED: i32 = 2;

/// A configuration that competes under a name of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    /// As in the results.
    pub(crate) name: String,
    /// Keys and TOML values besides the defaults.
    pub(crate) settings: Vec<(String, String)>,
}

impl Variant {
    /// Reads `NAME:KEY=VALUE,…`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (name, settings) = text
            .split_once(':')
            .with_context(|| format!("\"{text}\" is not NAME:KEY=VALUE[,KEY=VALUE]"))?;
        ensure!(
            name.starts_with("dr-agent"),
            "the name of a variant begins with dr-agent: \"{name}\""
        );
        let settings = settings.split(',').filter(|setting| !setting.is_empty());
        Ok(Self {
            name: name.to_owned(),
            settings: settings
                .map(|setting| {
                    let (key, value) = setting.split_once('=')?;
                    Some((key.to_owned(), value.to_owned()))
                })
                .collect::<Option<_>>()
                .with_context(|| format!("\"{text}\" has a setting without \"=\""))?,
        })
    }

    /// What competes without being asked for.
    pub(crate) fn built_in() -> Vec<Self> {
        let lanes = |name: &str, lanes: Option<u32>| Self {
            name: name.to_owned(),
            settings: lanes
                .map(|lanes| ("replica.lanes".to_owned(), lanes.to_string()))
                .into_iter()
                .collect(),
        };
        vec![
            lanes("dr-agent", None),
            lanes("dr-agent-1-lane", Some(1)),
            lanes("dr-agent-2-lanes", Some(2)),
            lanes("dr-agent-4-lanes", Some(4)),
        ]
    }

    fn configure(&self, config: AgentConfig) -> AgentConfig {
        self.settings
            .iter()
            .fold(config, |config, (key, value)| config.set(key, value))
    }
}

/// The agent beside the source; the replica is behind `port`.
pub(crate) fn config(source: &PgServer, replica: &PgServer, port: u16) -> AgentConfig {
    let config = AgentConfig::new(
        &source.url("postgres"),
        &replica.url_through(port, "postgres"),
    );
    servers::as_shipped(config)
        .databases(&[DATABASE])
        .set("source.exclude", "[\"pgcopydb.*\"]")
        .slot(SLOT)
}

/// Starts the agent, and waits until it has copied everything and nothing is left to do.
pub(crate) async fn attach(
    variant: Option<&Variant>,
    arena: &Arena,
    replica: &PgServer,
    port: u16,
) -> Result<Running> {
    let config = config(&arena.source, replica, port);
    let config = match variant {
        Some(variant) => variant.configure(config),
        None => config,
    };
    let mut running = Agent::new(config).start();
    servers::wait_for_streaming(&mut running, DATABASE)
        .await
        .map_err(Error::msg)?;
    let (source, replica) = (arena.session().await, replica.client(DATABASE).await);
    servers::reach(&source, &replica, STREAM).await;
    Ok(running)
}

/// Drops what an attached agent keeps on the source.
pub(crate) async fn detach(mut running: Running, arena: &Arena) {
    running.kill();
    arena.drop_slot(STREAM).await;
}

pub(super) async fn prepare(arena: &Arena, fsync: bool) -> Result<Base> {
    let replica = Base::new_replica(fsync).await;
    let running = attach(None, arena, &replica, replica.port()).await?;
    running.stop().await;
    arena.keep_slot(STREAM, "agent").await;
    Base::keep(replica).await
}

pub(super) async fn drain(variant: &Variant, ground: Ground<'_>, base: &Base) -> Result<Outcome> {
    let arena = ground.arena;
    base.restore().await?;
    arena.restore_slot(STREAM, "agent").await;
    let way = Way::to(&base.replica, ground.network, ground.wan).await;
    let agent = Agent::new(variant.configure(config(&arena.source, &base.replica, way.port())));
    let replica = base.replica.client(DATABASE).await;

    let watch = Watch::begin(&arena.source, Some(&base.replica))?;
    let mut running = agent.start();
    let arrived = marker_arrives(&watch, &replica, ground.patience, || {
        match running.exit_status() {
            None => Ok(()),
            Some(_) => bail!("{}", servers::last_line(&running.log())),
        }
    })
    .await;
    let arrival = match arrived {
        Ok(arrival) => arrival,
        Err(error) => {
            let code = running.exit_status().and_then(|status| status.code());
            base.retire().await;
            if code == Some(REFUSED) {
                return Ok(Outcome::Skipped(format!("{error}")));
            }
            return Err(error.context(format!("{}:\n{}", variant.name, running.log())));
        }
    };
    let mut round = with_agent(watch.end(&arrival)?, &running, &way)?;
    let position = format!(
        "SELECT end_lsn > '{}' FROM dr_agent.progress WHERE stream = '{STREAM}'",
        ground.backlog.before_marker
    );
    round.confirmed_seconds = confirms(&watch, &replica, &position).await;
    running.kill();
    if ground.compare {
        expect_equal(&arena.session().await, &replica).await?;
    }
    base.retire().await;
    Ok(Outcome::Measured(round))
}

pub(super) async fn copy(variant: &Variant, ground: CopyGround<'_>) -> Result<Outcome> {
    let arena = ground.arena;
    let way = Way::to(ground.replica, ground.network, ground.wan).await;
    let config = config(&arena.source, ground.replica, way.port())
        .set("copy.jobs", &ground.jobs.to_string());
    let agent = Agent::new(variant.configure(config));
    let watch = Watch::begin(&arena.source, Some(ground.replica))?;
    let mut running = agent.start();
    if let Err(error) = servers::wait_for_streaming(&mut running, DATABASE).await {
        let code = running.exit_status().and_then(|status| status.code());
        if code == Some(REFUSED) {
            return Ok(Outcome::Skipped(error));
        }
        bail!("{}: {error}\n{}", variant.name, running.log());
    }
    let round = with_agent(watch.end_after(watch.elapsed())?, &running, &way)?;
    expect_equal(
        &arena.session().await,
        &ground.replica.client(DATABASE).await,
    )
    .await?;
    detach(running, arena).await;
    Ok(Outcome::Measured(round))
}

fn with_agent(round: Round, running: &Running, way: &Way) -> Result<Round> {
    Ok(Round {
        cpu_agent: Some(usage::of_process(running.pid())?),
        wire_bytes: way.bytes(),
        agent_peak_bytes: Some(running.peak_resident_bytes()),
        ..round
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_is_a_name_and_settings() {
        let variant = Variant::parse("dr-agent-x:replica.lanes=4,limits.batch_changes=10").unwrap();
        assert_eq!(variant.name, "dr-agent-x");
        assert_eq!(variant.settings[1].1, "10");
        assert!(Variant::parse("dr-agent").is_err());
        assert!(Variant::parse("other:a.b=1").is_err());
        assert!(Variant::parse("dr-agent-x:a.b").is_err());
    }
}
