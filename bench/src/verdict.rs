//! What was promised and what was reached: one line per figure.
//!
//! # What it does not do
//! It does not make the program fail: a missed figure is a result, and shown as such.

use std::io::Write;

use anyhow::Result;

use crate::report::{REFERENCE, number_or_dash};
use crate::results::{Cost, Drain, Pass};

/// The agent as its configuration's defaults make it.
const AGENT: &str = "dr-agent";

/// Largest peak memory of the agent, in MiB.
const PEAK_MAX: f64 = 256.0;

/// Where a figure counts as reached.
#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

struct Figure {
    what: String,
    wanted: String,
    reached: Option<f64>,
    digits: usize,
    bound: Bound,
}

impl Figure {
    fn is_reached(&self) -> Option<bool> {
        let reached = self.reached?;
        Some(match self.bound {
            Bound::AtLeast(bound) => reached >= bound,
            Bound::AtMost(bound) => reached <= bound,
        })
    }

    /// Judged only at full size: a small run measures starting, and noise.
    fn line(&self, judged: bool) -> String {
        format!(
            "| {} | {} | {} | {} |",
            self.what,
            self.wanted,
            number_or_dash(self.reached, self.digits),
            match self.is_reached() {
                Some(_) if !judged => "not judged",
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "not measured",
            }
        )
    }
}

/// Prints the table of figures.
pub(crate) fn write(pass: &Pass, out: &mut impl Write) -> Result<()> {
    writeln!(out, "**Verdict, PostgreSQL {}**\n", pass.postgresql)?;
    if pass.scale != 1.0 {
        writeln!(
            out,
            "At scale {} nothing is judged: start-up and noise outweigh the work.\n",
            pass.scale
        )?;
    }
    writeln!(out, "| figure | wanted | reached | |\n|---|---|---:|---|")?;
    for figure in figures(pass) {
        writeln!(out, "{}", figure.line(pass.scale == 1.0))?;
    }
    writeln!(out)?;
    Ok(())
}

fn figures(pass: &Pass) -> Vec<Figure> {
    let mut figures = Vec::new();
    let tpcb = if pass.postgresql >= 16 { 3.0 } else { 4.0 };
    for (workload, factor) in [("tpcb", tpcb), ("insert-100", 3.0), ("insert-all", 3.0)] {
        figures.push(Figure {
            what: format!("{workload} drained, times as fast as the subscription"),
            wanted: format!("≥ {factor}"),
            reached: ratio(
                pass.drain(workload, "local", REFERENCE),
                pass.drain(workload, "local", AGENT),
            ),
            digits: 2,
            bound: Bound::AtLeast(factor),
        });
    }
    for workload in ["insert-100", "insert-all"] {
        figures.push(Figure {
            what: format!("{workload}, agent's peak memory, MiB"),
            wanted: format!("< {PEAK_MAX}"),
            reached: peak(pass, workload),
            digits: 0,
            bound: Bound::AtMost(PEAK_MAX),
        });
    }
    for workload in ["tpcb", "insert-100", "insert-all"] {
        figures.push(Figure {
            what: format!(
                "{workload} through {} ms, share of the local throughput",
                pass.wan_rtt_ms
            ),
            wanted: "≥ 0.9".to_owned(),
            reached: ratio(
                pass.drain(workload, "local", AGENT),
                pass.drain(workload, "wan", AGENT),
            ),
            digits: 2,
            bound: Bound::AtLeast(0.9),
        });
    }
    figures.push(Figure {
        what: "initial copy, times as fast as pgcopydb clone".to_owned(),
        wanted: "≥ 1".to_owned(),
        reached: ratio(
            pass.drain("copy", "local", "pgcopydb"),
            pass.drain("copy", "local", AGENT),
        ),
        digits: 2,
        bound: Bound::AtLeast(1.0),
    });
    figures.push(Figure {
        what: "replica CPU per TPC-B transaction, share of the subscription's".to_owned(),
        wanted: "≤ 0.33".to_owned(),
        reached: cpu(pass, AGENT)
            .zip(cpu(pass, REFERENCE))
            .map(|(own, of)| own / of),
        digits: 2,
        bound: Bound::AtMost(1.0 / 3.0),
    });
    let lag = pass
        .lags
        .iter()
        .find(|lag| lag.network == "wan" && lag.contestant == AGENT);
    figures.push(Figure {
        what: format!("lag at half load through {} ms, p99, ms", pass.wan_rtt_ms),
        wanted: "< 300".to_owned(),
        reached: lag.map(|lag| lag.p99 * 1e3),
        digits: 0,
        bound: Bound::AtMost(300.0),
    });
    let cost = pass.cost.as_ref().and_then(Cost::percent);
    figures.push(Figure {
        what: "cost on the source beside a bare slot, % of its tps".to_owned(),
        wanted: "≤ 3".to_owned(),
        reached: cost,
        digits: 1,
        bound: Bound::AtMost(3.0),
    });
    figures
}

/// How many times the second is as fast as the first.
fn ratio(of: Option<&Drain>, own: Option<&Drain>) -> Option<f64> {
    Some(of?.seconds()? / own?.seconds()?)
}

fn cpu(pass: &Pass, contestant: &str) -> Option<f64> {
    let drain = pass.drain("tpcb", "local", contestant)?;
    Some(drain.median(|round| round.cpu_replica)? / drain.transactions as f64)
}

/// The largest of all rounds through all networks, in MiB.
fn peak(pass: &Pass, workload: &str) -> Option<f64> {
    let rounds = pass
        .drains
        .iter()
        .filter(|drain| drain.workload == workload && drain.contestant == AGENT)
        .flat_map(|drain| &drain.rounds);
    let largest = rounds.filter_map(|round| round.agent_peak_bytes).max()?;
    Some(largest as f64 / 1_048_576.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Round;

    fn drain(contestant: &str, seconds: f64) -> Drain {
        Drain {
            workload: "tpcb".to_owned(),
            network: "local".to_owned(),
            contestant: contestant.to_owned(),
            transactions: 10,
            rows: 40,
            wal_bytes: 0,
            compared_equal: true,
            rounds: vec![Round {
                seconds,
                first_seconds: None,
                confirmed_seconds: None,
                cpu_source: 1.0,
                cpu_agent: None,
                cpu_replica: Some(seconds),
                wire_bytes: None,
                agent_peak_bytes: Some(1 << 20),
            }],
        }
    }

    #[test]
    fn a_figure_is_reached_missed_or_not_measured() {
        let pass = Pass {
            postgresql: 15,
            scale: 1.0,
            drains: vec![drain(REFERENCE, 8.0), drain(AGENT, 2.0)],
            ..Pass::default()
        };
        let lines: Vec<String> = figures(&pass)
            .iter()
            .map(|figure| figure.line(true))
            .collect();
        let small = figures(&pass)[0].line(false);
        assert!(small.contains("| 4.00 | not judged |"), "{small}");
        assert!(lines[0].contains("| 4.00 | yes |"), "{}", lines[0]);
        assert!(lines[1].contains("not measured"), "{}", lines[1]);
        assert!(
            lines.iter().any(|line| line.contains("0.25 | yes")),
            "{lines:?}"
        );
    }
}
