//! What a reader costs the source: pgbench as fast as it goes, with the agent attached and caught
//! up, and with `pg_recvlogical` on a bare slot, in turn.
//!
//! On one machine the replica would take its processor time from the source, which it does not do in
//! an installation. So where there are two processors or more the source's site (server, pgbench, agent or
//! `pg_recvlogical`) keeps to one half of them and the replica to the other.

use std::process::Stdio;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use dr_agent_tests::agent::Agent;
use dr_agent_tests::rundir::children_of;
use dr_agent_tests::server::PgServer;
use dr_agent_tests::wait::wait_until;
use tokio::process::Command;

use super::arena::{Arena, Base, PREPARE_MAX, wal_end};
use super::contestant::{agent, limits};
use super::drain::workload;
use super::workload::DATABASE;
use super::{Journal, Options};
use crate::results::{Cost, median};
use crate::{load, servers, usage};

/// Clients of pgbench.
const CLIENTS: u32 = 8;

/// Alternates both readers, and adds what pgbench reached to the results.
pub(crate) async fn measure(options: &Options, fsync: bool, journal: &mut Journal) -> Result<()> {
    eprintln!("\n== cost on the source: set up");
    let arena = Arena::open(workload("tpcb")?, options.scale, fsync).await?;
    let replica = Base::new_replica(fsync).await;
    agent::attach(None, &arena, &replica, replica.port())
        .await?
        .stop()
        .await;
    let agent = Agent::new(agent::config(&arena.source, &replica, replica.port()));
    let sites = halves();
    if let Some([source_site, replica_site]) = &sites {
        pin_server(&arena.source, source_site).await?;
        pin_server(&replica, replica_site).await?;
    }
    let site = sites.as_ref().map(|[source, _]| source.as_str());
    journal.pass().cost = Some(Cost {
        agent_tps: Vec::new(),
        bare_slot_tps: Vec::new(),
        pinned: sites.clone(),
    });
    for number in 0..options.cost_rounds {
        // The one that begins is the second the next time.
        for agent_is_next in [number % 2 == 0, number % 2 == 1] {
            let tps = if agent_is_next {
                beside_agent(&arena, &replica, &agent, site, options.seconds).await?
            } else {
                beside_bare_slot(&arena, site, options.seconds).await?
            };
            eprintln!(
                "   {:<18} {tps:>8.0} tps",
                if agent_is_next {
                    "dr-agent"
                } else {
                    "bare slot"
                }
            );
            if let Some(cost) = &mut journal.pass().cost {
                let of = if agent_is_next {
                    &mut cost.agent_tps
                } else {
                    &mut cost.bare_slot_tps
                };
                of.push(tps);
            }
            journal.write()?;
        }
    }
    if let Some(cost) = &journal.pass().cost
        && let Some(own) = median(cost.agent_tps.clone())
        && let Some(bare) = median(cost.bare_slot_tps.clone())
    {
        eprintln!("   cost {:.1} %", (1.0 - own / bare) * 100.0);
    }
    Ok(())
}

async fn beside_agent(
    arena: &Arena,
    replica: &PgServer,
    agent: &Agent,
    site: Option<&str>,
    seconds: u32,
) -> Result<f64> {
    let mut running = agent.start();
    if let Some(site) = site {
        pin(running.pid(), site).await?;
    }
    servers::wait_for_streaming(&mut running, DATABASE)
        .await
        .map_err(anyhow::Error::msg)?;
    let (source, copy) = (arena.session().await, replica.client(DATABASE).await);
    servers::reach(&source, &copy, agent::STREAM).await;
    let tps = pgbench(arena, site, seconds).await?;
    // It need not have drained: what it has not read is read before the next round begins.
    running.kill();
    Ok(tps)
}

async fn beside_bare_slot(arena: &Arena, site: Option<&str>, seconds: u32) -> Result<f64> {
    limits::create_slot(arena).await;
    let mut reader = limits::reader(arena, arena.source.port(), None)?;
    if let Some(site) = site
        && let Some(pid) = reader.id()
    {
        pin(pid, site).await?;
    }
    let source = arena.session().await;
    let end = wal_end(&source).await?;
    let sent = format!(
        "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = 'pg_recvlogical' AND sent_lsn >= '{end}')"
    );
    wait_until("pg_recvlogical to be there", PREPARE_MAX, || {
        source.holds(&sent)
    })
    .await;
    let tps = pgbench(arena, site, seconds).await?;
    reader.kill().await?;
    limits::drop_slot(arena).await;
    Ok(tps)
}

async fn pgbench(arena: &Arena, site: Option<&str>, seconds: u32) -> Result<f64> {
    // Neither round pays for the pages the other one left dirty.
    arena.session().await.run("CHECKPOINT").await;
    let load = load::start(&arena.source, DATABASE, CLIENTS, 0, seconds)?;
    if let Some(site) = site
        && let Some(pid) = load.id()
    {
        pin(pid, site).await?;
    }
    Ok(load::finish(load).await?.tps)
}

/// The processors of the source's site and of the replica, as `taskset` writes them.
fn halves() -> Option<[String; 2]> {
    let all = thread::available_parallelism().map_or(1, usize::from);
    let half = all / 2;
    (half > 0).then(|| [format!("0-{}", half - 1), format!("{half}-{}", all - 1)])
}

/// Keeps a server to some processors; its future processes inherit that.
async fn pin_server(server: &PgServer, processors: &str) -> Result<()> {
    let postmaster = usage::postmaster(server)?;
    pin(postmaster, processors).await?;
    for child in children_of(postmaster) {
        // It may have ended meanwhile.
        let _ = pin(child, processors).await;
    }
    Ok(())
}

async fn pin(pid: u32, processors: &str) -> Result<()> {
    let status = Command::new("taskset")
        .args(["-a", "-c", "-p", processors, &pid.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await
        .context("start taskset (package util-linux)")?;
    ensure!(status.success(), "taskset: {status}");
    Ok(())
}
