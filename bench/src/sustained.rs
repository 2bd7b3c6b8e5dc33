//! How many transactions per second the agent follows with a lag under a second.
//!
//! pgbench runs at one rate after the other, each for the same time. Meanwhile the lag is sampled
//! twice: as the agent reports it (`dr_agent_lag_seconds`), and by a probe the agent knows nothing of: one
//! row is updated on the source with the time, again and again, and read on the replica. A rate
//! counts as sustained when pgbench really reached it and the 99th percentile of both lags stayed
//! under a second.

use std::time::Duration;

use anyhow::{Error, Result};
use clap::Args;
use dr_agent_tests::agent::Running;
use dr_agent_tests::http::Metrics;
use dr_agent_tests::site::{Database, Site};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::load;
use crate::sample::Samples;
use crate::servers;
use crate::usage;

/// Lag that still counts as following.
const LAG_MAX_SECONDS: f64 = 1.0;

/// The share of the asked rate pgbench must reach for the step to say anything.
const REACHED_MIN: f64 = 0.97;

/// How often both lags are read, and the probe is written.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

#[derive(Args)]
pub(crate) struct Options {
    /// Scale of the pgbench database: 100 000 accounts each.
    #[arg(long, default_value_t = 20)]
    scale: u32,
    /// Clients of pgbench.
    #[arg(long, default_value_t = 8)]
    clients: u32,
    /// Seconds of each step, after the warm-up.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Seconds at the begin of each step that are not sampled.
    #[arg(long, default_value_t = 5)]
    warm_up: u32,
    /// First rate, transactions per second.
    #[arg(long, default_value_t = 500)]
    start: u32,
    /// By how much the rate grows.
    #[arg(long, default_value_t = 500)]
    step: u32,
    /// Last rate.
    #[arg(long, default_value_t = 20_000)]
    end: u32,
}

/// One step.
struct Step {
    asked: u32,
    achieved: load::Achieved,
    reported: Samples,
    probed: Samples,
    applied_tps: f64,
    cpu_share: f64,
}

impl Step {
    /// pgbench really produced what was asked.
    fn is_reached(&self) -> bool {
        self.achieved.tps >= REACHED_MIN * f64::from(self.asked)
    }

    fn is_followed(&self) -> bool {
        [&self.reported, &self.probed].into_iter().all(|samples| {
            samples
                .percentile(99.0)
                .is_some_and(|lag| lag < LAG_MAX_SECONDS)
        })
    }

    fn to_json(&self) -> Value {
        json!({
            "asked_tps": self.asked,
            "source_tps": self.achieved.tps,
            "source_latency_ms": self.achieved.latency_ms,
            "applied_tps": self.applied_tps,
            "agent_processors_used": self.cpu_share,
            "lag_reported_seconds": self.reported.to_json(),
            "lag_probed_seconds": self.probed.to_json(),
            "reached": self.is_reached(),
            "followed": self.is_followed(),
        })
    }

    fn line(&self) -> String {
        let show = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        format!(
            "{:>8} {:>10.0} {:>11.0} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6.2}  {}",
            self.asked,
            self.achieved.tps,
            self.applied_tps,
            show(self.reported.percentile(50.0)),
            show(self.reported.percentile(99.0)),
            show(self.reported.max()),
            show(self.probed.percentile(50.0)),
            show(self.probed.percentile(99.0)),
            show(self.probed.max()),
            self.cpu_share,
            match (self.is_reached(), self.is_followed()) {
                (true, true) => "sustained",
                (false, true) => "followed; pgbench did not reach the rate",
                (_, false) => "lag",
            }
        )
    }
}

pub(crate) async fn measure(options: &Options, fsync: bool) -> Result<Value> {
    let site = servers::site(fsync).await;
    let database = site.database("bench").await;
    eprintln!("load pgbench, scale {}", options.scale);
    load::initialise(&site.source, &database.name, options.scale).await?;
    database.source().await.run(PROBE_TABLE).await;
    let mut agent = servers::agent(&database).start();
    servers::wait_for_streaming(&mut agent, &database.name)
        .await
        .map_err(Error::msg)?;
    eprintln!(
        "{:>8} {:>10} {:>11} {:>29} {:>29} {:>6}",
        "asked",
        "source tps",
        "applied tps",
        "reported lag p50/p99/max",
        "probed lag p50/p99/max",
        "cpu"
    );
    let mut steps = Vec::new();
    let mut rate = options.start;
    while rate <= options.end {
        let step = run_step(options, rate, &site, &database, &agent).await?;
        eprintln!("{}", step.line());
        let goes_on = step.is_reached() && step.is_followed();
        steps.push(step);
        servers::catch_up(&database).await;
        if !goes_on {
            break;
        }
        rate += options.step;
    }
    let best = steps
        .iter()
        .filter(|step| step.is_followed())
        .map(|step| step.achieved.tps)
        .fold(0.0, f64::max);
    let peak = agent.peak_resident_bytes();
    eprintln!(
        "sustained: {best:.0} transactions per second; agent's peak memory {} MiB",
        peak >> 20
    );
    servers::catch_up(&database).await;
    servers::expect_equal(&database.source().await, &database.replica().await).await;
    agent.stop().await;
    Ok(json!({
        "sustained_tps": best,
        "lag_max_seconds": LAG_MAX_SECONDS,
        "scale": options.scale,
        "clients": options.clients,
        "seconds_per_step": options.seconds,
        "agent_peak_resident_bytes": peak,
        "steps": steps.iter().map(Step::to_json).collect::<Vec<_>>(),
        "compared_equal": true,
    }))
}

pub(crate) const PROBE_TABLE: &str =
    "CREATE TABLE bench_probe (id int PRIMARY KEY, written_at timestamptz NOT NULL);
    INSERT INTO bench_probe VALUES (1, clock_timestamp())";

async fn run_step(
    options: &Options,
    rate: u32,
    site: &Site,
    database: &Database,
    agent: &Running,
) -> Result<Step> {
    let name = &database.name;
    let (warm_up, measured) = (seconds(options.warm_up), seconds(options.seconds));
    let load = load::start(
        &site.source,
        name,
        options.clients,
        rate,
        options.warm_up + options.seconds,
    )?;
    let begun = Instant::now();
    let end = begun + warm_up + measured;
    let writer = tokio::spawn(write_probe(database.clone(), end));
    sleep_until(begun + warm_up).await;

    let (cpu_before, applied_before) = (usage::of_process(agent.pid())?, applied(agent).await);
    let started = Instant::now();
    let (reported, probed) = tokio::join!(
        sample_reported(agent, name, end),
        sample_probe(database, end),
    );
    let sampled = started.elapsed().as_secs_f64();
    let cpu_share = (usage::of_process(agent.pid())? - cpu_before) / sampled;
    let applied_tps = (applied(agent).await - applied_before) / sampled;
    writer.await?;
    Ok(Step {
        asked: rate,
        reported,
        probed,
        applied_tps,
        cpu_share,
        achieved: load::finish(load).await?,
    })
}

fn seconds(number: u32) -> Duration {
    Duration::from_secs(number.into())
}

async fn applied(agent: &Running) -> f64 {
    agent
        .metrics()
        .await
        .sum("dr_agent_transactions_total", &[])
}

pub(crate) async fn sample_reported(agent: &Running, database: &str, end: Instant) -> Samples {
    let mut samples = Samples::default();
    let mut ticks = interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        ticks.tick().await;
        // No answer means no sample here; the probe goes on by itself and shows a standstill.
        if let Ok(answer) = agent.get("/metrics").await {
            let labels = [("database", database)];
            if let Some(lag) = Metrics::parse(&answer.body).value("dr_agent_lag_seconds", &labels) {
                // -1 means unknown, which is no small lag.
                samples.push(if lag < 0.0 { f64::INFINITY } else { lag });
            }
        }
    }
    samples
}

pub(crate) async fn write_probe(database: Database, end: Instant) {
    let source = database.source().await;
    let mut ticks = interval(SAMPLE_EVERY);
    while Instant::now() < end {
        ticks.tick().await;
        source
            .run("UPDATE bench_probe SET written_at = clock_timestamp()")
            .await;
    }
}

/// The age of the probe on the replica. Up to one writing interval of it is not lag, so what is
/// reported is an upper bound.
pub(crate) async fn sample_probe(database: &Database, end: Instant) -> Samples {
    const AGE: &str =
        "SELECT extract(epoch FROM clock_timestamp() - written_at)::float8 FROM bench_probe";
    let replica = database.replica().await;
    let mut samples = Samples::default();
    let mut ticks = interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        ticks.tick().await;
        let age = replica.value(AGE).await;
        if let Some(age) = age.and_then(|text| text.parse().ok()) {
            samples.push(age);
        }
    }
    samples
}
