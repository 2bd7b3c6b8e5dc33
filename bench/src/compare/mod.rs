//! dr-agent beside its peers: the same work, on the same machine, in the same run, in turn.
//!
//! ```text
//! drain   backlogs of several kinds; `arena` makes one once and puts contestants back before it
//! copy    the initial copy
//! lag     delay of probe rows at half of the source's peak rate
//! cost    what an attached reader costs the source
//! ```
//!
//! Results are written to a file after every single round, so that an interrupted run loses the
//! round it was at. `report` makes tables, plots and the verdict of it.
//!
//! # Invariants
//! - All contestants find the same backlog and the same servers with the same settings.
//! - The end of a round is the same for all: a row written last is visible on the replica.
//! - After the first round of each contestant source and replica are compared in full.

mod arena;
mod contestant;
mod copy;
mod cost;
mod drain;
mod lag;
mod network;
mod workload;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use dr_agent_tests::binaries::Binaries;

use crate::machine;
use crate::results::{Drain, Pass, Results, Round, Skipped};
use contestant::{Contestant, Variant};
use network::{Network, Wan};

/// A part of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Backlogs.
    Drain,
    /// The initial copy.
    Copy,
    /// Lag under a constant load.
    Lag,
    /// What a reader costs the source.
    Cost,
}

/// What is compared, and how often.
#[derive(Args)]
pub(crate) struct Options {
    /// Parts of the comparison.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["drain", "copy", "lag", "cost"])]
    parts: Vec<Part>,
    /// Only these workloads.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Who takes part.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "dr-agent,dr-agent-1-lane,subscription,pgcopydb,pg_recvlogical,peek"
    )]
    contestants: Vec<String>,
    /// A further configuration of the agent, NAME:KEY=VALUE[,KEY=VALUE]; name it in --contestants.
    #[arg(long = "variant")]
    variants: Vec<String>,
    /// Networks.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["local", "wan"])]
    network: Vec<Network>,
    #[command(flatten)]
    wan: Wan,
    /// Rounds of each contestant at each workload through each network.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Pairs of rounds of the cost on the source.
    #[arg(long, default_value_t = 5)]
    cost_rounds: u32,
    /// Seconds of each load of lag and cost.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Factor on all sizes.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Jobs of the initial copy.
    #[arg(long, default_value_t = 4)]
    jobs: u32,
    /// Seconds after which a drain is given up.
    #[arg(long, default_value_t = 600)]
    patience: u64,
    /// Where the results go.
    #[arg(long, default_value = "bench/results/pass.tmp")]
    out: PathBuf,
}

impl Options {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }

    fn contestants(&self) -> Result<Vec<Contestant>> {
        let mut variants = Variant::built_in();
        for text in &self.variants {
            variants.push(Variant::parse(text)?);
        }
        self.contestants
            .iter()
            .map(|name| Contestant::parse(name, &variants))
            .collect()
    }
}

/// The results so far, and the file they are in.
pub(crate) struct Journal {
    path: PathBuf,
    results: Results,
}

impl Journal {
    fn new(path: PathBuf, pass: Pass) -> Self {
        Self {
            path,
            results: Results { passes: vec![pass] },
        }
    }

    fn pass(&mut self) -> &mut Pass {
        // Made with one, and never with another.
        &mut self.results.passes[0]
    }

    /// Adds a round to the drain of the same workload, network and contestant, or to a new one.
    fn add_round(&mut self, drain: Drain, round: Round) -> Result<()> {
        let drains = &mut self.pass().drains;
        let found = drains.iter_mut().find(|other| {
            (&other.workload, &other.network, &other.contestant)
                == (&drain.workload, &drain.network, &drain.contestant)
        });
        match found {
            Some(found) => found.rounds.push(round),
            None => drains.push(Drain {
                rounds: vec![round],
                ..drain
            }),
        }
        self.write()
    }

    fn skip(&mut self, skipped: Skipped) -> Result<()> {
        self.pass().skipped.push(skipped);
        self.write()
    }

    fn write(&self) -> Result<()> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let text = serde_json::to_string_pretty(&self.results)?;
        fs::write(&self.path, text).with_context(|| format!("write {}", self.path.display()))
    }
}

/// Runs the chosen parts; the results are in the file.
pub(crate) async fn measure(options: &Options, fsync: bool) -> Result<()> {
    let contestants = options.contestants()?;
    let mut journal = Journal::new(
        options.out.clone(),
        Pass {
            machine: machine::facts(fsync),
            postgresql: Binaries::of_source().major,
            scale: options.scale,
            wan_rtt_ms: options.wan.rtt_ms,
            wan_mbit: options.wan.mbit,
            ..Pass::default()
        },
    );
    journal.write()?;
    let names: Vec<&str> = if options.only.is_empty() {
        workload::ALL.iter().map(|workload| workload.name).collect()
    } else {
        options.only.iter().map(String::as_str).collect()
    };
    if options.parts.contains(&Part::Drain) {
        for name in names {
            let workload = drain::workload(name)?;
            drain::measure(workload, &contestants, options, fsync, &mut journal).await?;
        }
    }
    if options.parts.contains(&Part::Copy) {
        copy::measure(&contestants, options, fsync, &mut journal).await?;
    }
    if options.parts.contains(&Part::Lag) {
        lag::measure(&contestants, options, fsync, &mut journal).await?;
    }
    if options.parts.contains(&Part::Cost) {
        cost::measure(options, fsync, &mut journal).await?;
    }
    Ok(())
}
