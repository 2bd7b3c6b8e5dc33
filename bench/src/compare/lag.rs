//! Lag under a constant load: half of what the source reaches alone.
//!
//! Probe rows are inserted on the source all the time, each with its moment; a session on the replica
//! looks for new ones all the time. Every probe has a delay, also those that arrive together after a
//! standstill, so a standstill counts as often as it should. What is measured is an upper bound: the
//! time between two looks is in it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::PgServer;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::arena::{Arena, Base};
use super::contestant::{Attached, Contestant};
use super::drain::workload;
use super::network::Way;
use super::workload::DATABASE;
use super::{Journal, Options};
use crate::load;
use crate::results::{Lag, Skipped};
use crate::sample::Samples;

/// Clients of pgbench.
const CLIENTS: u32 = 8;

/// At the begin of the load, not sampled.
const WARM_UP: u32 = 5;

/// How often a probe is written.
const WRITE_EVERY: Duration = Duration::from_millis(20);

/// How often the replica is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A probe that is not there so long after the load has ended counts as this late.
const STRAGGLER_MAX: Duration = Duration::from_secs(60);

/// Measures all contestants that stay attached, and adds them to the results.
pub(crate) async fn measure(
    contestants: &[Contestant],
    options: &Options,
    fsync: bool,
    journal: &mut Journal,
) -> Result<()> {
    eprintln!("\n== lag: set up");
    let arena = Arena::open(workload("tpcb")?, options.scale, fsync).await?;
    let alone = load::start(&arena.source, DATABASE, CLIENTS, 0, options.seconds)?;
    let peak = load::finish(alone).await?.tps;
    let rate = (peak / 2.0) as u32;
    eprintln!("   the source alone reaches {peak:.0} tps; the load is {rate}");
    for network in &options.network {
        for contestant in contestants
            .iter()
            .filter(|contestant| contestant.attaches())
        {
            let replica = Base::new_replica(fsync).await;
            let to = contestant.line_leads_to(&arena.source, &replica);
            let way = Way::to(to, *network, options.wan).await;
            let attached = match contestant.attach(&arena, &replica, way.port()).await {
                Ok(attached) => attached,
                Err(error) => {
                    eprintln!("   {}: skipped, {error:#}", contestant.name());
                    journal.skip(Skipped {
                        workload: "lag".to_owned(),
                        contestant: contestant.name().to_owned(),
                        why: format!("{}: {error:#}", network.name()),
                    })?;
                    continue;
                }
            };
            let (achieved, delays) = sample(&arena, &replica, rate, options.seconds).await?;
            detach(attached, &arena, &replica).await;
            let figure = |percent| delays.percentile(percent).context("no probe has arrived");
            let lag = Lag {
                network: network.name().to_owned(),
                contestant: contestant.name().to_owned(),
                peak_tps: peak,
                tps: achieved.tps,
                probes: delays.len(),
                p50: figure(50.0)?,
                p99: figure(99.0)?,
                max: figure(100.0)?,
            };
            eprintln!(
                "   {:<5} {:<18} {:>6.0} tps   p50 {:>6.0} ms  p99 {:>6.0} ms  max {:>6.0} ms",
                lag.network,
                lag.contestant,
                lag.tps,
                lag.p50 * 1e3,
                lag.p99 * 1e3,
                lag.max * 1e3
            );
            journal.pass().lags.push(lag);
            journal.write()?;
        }
    }
    Ok(())
}

async fn detach(attached: Attached, arena: &Arena, replica: &PgServer) {
    attached.end(arena, replica).await;
    replica.stop_immediately().await;
}

async fn sample(
    arena: &Arena,
    replica: &PgServer,
    rate: u32,
    seconds: u32,
) -> Result<(load::Achieved, Samples)> {
    let reader = replica.client(DATABASE).await;
    let seen = newest(&reader).await;
    let load = load::start(&arena.source, DATABASE, CLIENTS, rate, WARM_UP + seconds)?;
    let begun = Instant::now();
    let warm = begun + Duration::from_secs(WARM_UP.into());
    let end = warm + Duration::from_secs(seconds.into());
    let writer = tokio::spawn(write(arena.session().await, warm, end));
    let delays = read(&reader, seen, writer).await?;
    Ok((load::finish(load).await?, delays))
}

async fn newest(client: &Client) -> i64 {
    client
        .number("SELECT coalesce(max(id), 0) FROM bench_probe")
        .await
}

/// Writes probes until the end; the first one after the warm-up, and the last one.
async fn write(source: Client, warm: Instant, end: Instant) -> (i64, i64) {
    let mut ticks = interval(WRITE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut first, mut last) = (None, 0);
    while Instant::now() < end {
        ticks.tick().await;
        last = source
            .number("INSERT INTO bench_probe (written_at) VALUES (clock_timestamp()) RETURNING id")
            .await;
        if Instant::now() >= warm {
            first.get_or_insert(last);
        }
    }
    (first.unwrap_or(last), last)
}

/// Reads probes until the last one is there.
async fn read(
    replica: &Client,
    mut seen: i64,
    writer: tokio::task::JoinHandle<(i64, i64)>,
) -> Result<Samples> {
    let mut delays: Vec<(i64, f64)> = Vec::new();
    let mut look_again = Instant::now();
    let mut deadline = None;
    let mut writer = Some(writer);
    let mut span = None;
    loop {
        let rows = replica
            .rows(&format!(
                "SELECT id, extract(epoch FROM clock_timestamp() - written_at)::float8
                     FROM bench_probe WHERE id > {seen} ORDER BY id"
            ))
            .await;
        for row in rows {
            let mut values = row.into_iter().flatten();
            let id = values.next().context("a probe has an id")?.parse()?;
            delays.push((id, values.next().context("a probe has an age")?.parse()?));
            seen = id;
        }
        if writer.as_ref().is_some_and(|writer| writer.is_finished())
            && let Some(writer) = writer.take()
        {
            span = Some(writer.await?);
            deadline = Some(Instant::now() + STRAGGLER_MAX);
        }
        if let Some((first, last)) = span {
            let late = deadline.is_some_and(|deadline| Instant::now() > deadline);
            if seen >= last || late {
                // Those that never came are as late as we have waited.
                let missing = (seen + 1..=last).map(|id| (id, STRAGGLER_MAX.as_secs_f64()));
                delays.extend(missing);
                let counted = delays.into_iter().filter(|(id, _)| *id >= first);
                return Ok(counted.map(|(_, delay)| delay).collect());
            }
        }
        look_again = (look_again + LOOK_EVERY).max(Instant::now());
        sleep_until(look_again).await;
    }
}
