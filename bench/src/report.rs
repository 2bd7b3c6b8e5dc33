//! Tables of a comparison, in Markdown; the verdict is in `verdict`, the pictures are in `plot`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::plot;
use crate::results::{Drain, Loaded, Pass, Results, median};
use crate::verdict;

/// Where all of it is shown against.
pub(crate) const REFERENCE: &str = "subscription";

#[derive(Args)]
pub(crate) struct Options {
    /// Files that `compare` wrote, one per version of PostgreSQL.
    #[arg(required = true)]
    passes: Vec<PathBuf>,
    /// Directory of `latest.json` and the plots.
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
}

/// Joins the passes, writes `latest.json` and the plots, and prints the tables.
pub(crate) fn write(options: &Options) -> Result<()> {
    let mut results = Results::default();
    for path in &options.passes {
        results.passes.extend(read(path)?.passes);
    }
    fs::create_dir_all(&options.out)?;
    let mut text = serde_json::to_string_pretty(&results)?;
    text.push('\n');
    fs::write(options.out.join("latest.json"), text)?;
    plot::write(&results, &options.out)?;
    let mut out = std::io::stdout().lock();
    for pass in &results.passes {
        writeln!(
            out,
            "\n# PostgreSQL {} on both sides, scale {}\n",
            pass.postgresql, pass.scale
        )?;
        tables(pass, &mut out)?;
        verdict::write(pass, &mut out)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Results> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("understand {}", path.display()))
}

fn tables(pass: &Pass, out: &mut impl Write) -> Result<()> {
    for (workload, network) in pass.grounds() {
        let drains: Vec<&Drain> = pass
            .drains
            .iter()
            .filter(|drain| drain.workload == workload && drain.network == network)
            .collect();
        let Some(first) = drains.first() else {
            continue;
        };
        let what = match first.transactions {
            0 => format!("{} rows", first.rows),
            number => format!(
                "{number} transactions, {} rows, {} MiB of WAL",
                first.rows,
                first.wal_bytes >> 20
            ),
        };
        let rounds = drains.iter().map(|drain| drain.rounds.len()).max();
        writeln!(
            out,
            "**{workload}, {network}**: {what}; median of {} rounds\n",
            rounds.unwrap_or_default()
        )?;
        writeln!(
            out,
            "| contestant | seconds | of them to the first row | transactions/s | rows/s | × {REFERENCE} | CPU s source | agent | replica | replica µs/transaction | wire MiB | peak MiB |"
        )?;
        writeln!(
            out,
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        )?;
        let reference = pass
            .drain(&workload, &network, REFERENCE)
            .and_then(Drain::seconds);
        for drain in drains {
            writeln!(out, "{}", line(drain, reference))?;
        }
        writeln!(out)?;
    }
    if !pass.lags.is_empty() {
        writeln!(
            out,
            "**lag at half of the source's peak rate**, milliseconds\n\n| network | contestant | peak tps | tps | probes | p50 | p99 | max |\n|---|---|---:|---:|---:|---:|---:|---:|"
        )?;
        for lag in &pass.lags {
            writeln!(
                out,
                "| {} | {} | {:.0} | {:.0} | {} | {:.0} | {:.0} | {:.0} |",
                lag.network,
                lag.contestant,
                lag.peak_tps,
                lag.tps,
                lag.probes,
                lag.p50 * 1e3,
                lag.p99 * 1e3,
                lag.max * 1e3
            )?;
        }
        writeln!(out)?;
    }
    if let Some(cost) = &pass.cost {
        writeln!(
            out,
            "**cost on the source**: pgbench as fast as it goes\n\n| attached | rounds | tps | lowest | highest | processors of the source | of the reader |\n|---|---:|---:|---:|---:|---:|---:|"
        )?;
        for (name, rounds) in [("dr-agent", &cost.agent), ("bare slot", &cost.bare_slot)] {
            let middle = |figure: fn(&Loaded) -> f64| median(rounds.iter().map(figure).collect());
            writeln!(
                out,
                "| {name} | {} | {} | {} | {} | {} | {} |",
                rounds.len(),
                number_or_dash(middle(|round| round.tps), 0),
                number_or_dash(rounds.iter().map(|round| round.tps).reduce(f64::min), 0),
                number_or_dash(rounds.iter().map(|round| round.tps).reduce(f64::max), 0),
                number_or_dash(middle(|round| round.source_processors), 2),
                number_or_dash(middle(|round| round.reader_processors), 2)
            )?;
        }
        writeln!(out)?;
    }
    for skipped in &pass.skipped {
        writeln!(
            out,
            "Not measured: {}, {}: {}\n",
            skipped.workload, skipped.contestant, skipped.why
        )?;
    }
    Ok(())
}

fn line(drain: &Drain, reference: Option<f64>) -> String {
    let seconds = drain.seconds();
    // A copy has no transactions.
    let transactions = (drain.transactions > 0).then_some(drain.transactions as f64);
    let per_second = |number: Option<f64>| {
        let rate = number
            .zip(seconds)
            .map(|(number, seconds)| number / seconds);
        number_or_dash(rate, 0)
    };
    let replica = drain.median(|round| round.cpu_replica);
    let mib = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / 1_048_576.0);
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
        drain.contestant,
        number_or_dash(seconds, 2),
        number_or_dash(drain.median(|round| round.first_seconds), 2),
        per_second(transactions),
        per_second(Some(drain.rows as f64)),
        number_or_dash(reference.zip(seconds).map(|(of, own)| of / own), 2),
        number_or_dash(drain.median(|round| Some(round.cpu_source)), 1),
        number_or_dash(drain.median(|round| round.cpu_agent), 1),
        number_or_dash(replica, 1),
        number_or_dash(replica.zip(transactions).map(|(s, of)| s * 1e6 / of), 0),
        number_or_dash(drain.median(|round| mib(round.wire_bytes)), 0),
        number_or_dash(drain.median(|round| mib(round.agent_peak_bytes)), 0),
    )
}

/// A number with so many digits behind the point; a dash where there is none.
pub(crate) fn number_or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

impl Pass {
    /// Workloads and networks that were measured, in that order.
    pub(crate) fn grounds(&self) -> Vec<(String, String)> {
        let mut seen = BTreeSet::new();
        let grounds = self
            .drains
            .iter()
            .map(|drain| (&drain.workload, &drain.network));
        grounds
            .filter(|ground| seen.insert(*ground))
            .map(|(workload, network)| (workload.clone(), network.clone()))
            .collect()
    }
}
