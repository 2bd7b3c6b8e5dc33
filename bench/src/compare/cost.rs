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
use tokio::time::Instant;

use super::arena::{Arena, Base, PREPARE_MAX, wal_end};
use super::contestant::{agent, limits};
use super::drain::workload;
use super::workload::DATABASE;
use super::{Journal, Options};
use crate::load;
use crate::results::{Cost, Loaded};
use crate::servers;
use crate::usage;

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
        agent: Vec::new(),
        bare_slot: Vec::new(),
        pinned: sites.clone(),
    });
    for number in 0..options.cost_rounds {
        // The one that begins is the second the next time.
        for agent_is_next in [number % 2 == 0, number % 2 == 1] {
            let loaded = if agent_is_next {
                beside_agent(&arena, &replica, &agent, site, options.seconds).await?
            } else {
                beside_bare_slot(&arena, site, options.seconds).await?
            };
            eprintln!(
                "   {:<18} {:>8.0} tps   processors of the source {:.2}, of the reader {:.2}",
                if agent_is_next {
                    "dr-agent"
                } else {
                    "bare slot"
                },
                loaded.tps,
                loaded.source_processors,
                loaded.reader_processors
            );
            if let Some(cost) = &mut journal.pass().cost {
                let of = if agent_is_next {
                    &mut cost.agent
                } else {
                    &mut cost.bare_slot
                };
                of.push(loaded);
            }
            journal.write()?;
        }
    }
    let percent = journal.pass().cost.as_ref().and_then(Cost::percent);
    if let Some(percent) = percent {
        eprintln!("   cost {percent:.1} %");
    }
    Ok(())
}

async fn beside_agent(
    arena: &Arena,
    replica: &PgServer,
    agent: &Agent,
    site: Option<&str>,
    seconds: u32,
) -> Result<Loaded> {
    let mut running = agent.start();
    if let Some(site) = site {
        pin(running.pid(), site).await?;
    }
    servers::wait_for_streaming(&mut running, DATABASE)
        .await
        .map_err(anyhow::Error::msg)?;
    let (source, copy) = (arena.session().await, replica.client(DATABASE).await);
    servers::reach(&source, &copy, agent::STREAM).await;
    let loaded = pgbench(arena, running.pid(), site, seconds).await?;
    // It need not have drained: what it has not read is read before the next round begins.
    running.kill();
    Ok(loaded)
}

async fn beside_bare_slot(arena: &Arena, site: Option<&str>, seconds: u32) -> Result<Loaded> {
    limits::create_slot(arena).await;
    let mut reader = limits::reader(arena, arena.source.port(), None)?;
    let pid = reader.id().context("pg_recvlogical has ended")?;
    if let Some(site) = site {
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
    let loaded = pgbench(arena, pid, site, seconds).await?;
    reader.kill().await?;
    limits::drop_slot(arena).await;
    Ok(loaded)
}

async fn pgbench(arena: &Arena, reader: u32, site: Option<&str>, seconds: u32) -> Result<Loaded> {
    // Neither round pays for the pages the other one left dirty.
    arena.session().await.run("CHECKPOINT").await;
    let begun = Instant::now();
    let before = [usage::of_server(&arena.source)?, usage::of_process(reader)?];
    let load = load::start(&arena.source, DATABASE, CLIENTS, 0, seconds)?;
    if let Some(site) = site
        && let Some(pid) = load.id()
    {
        pin(pid, site).await?;
    }
    let tps = load::finish(load).await?.tps;
    let after = [usage::of_server(&arena.source)?, usage::of_process(reader)?];
    let elapsed = begun.elapsed().as_secs_f64();
    let [source_processors, reader_processors] =
        [0, 1].map(|which| (after[which] - before[which]) / elapsed);
    Ok(Loaded {
        tps,
        source_processors,
        reader_processors,
    })
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
