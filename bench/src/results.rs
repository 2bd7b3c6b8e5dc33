//! What the comparison writes and the report reads: one JSON file.
//!
//! The fields are documented here; `bench/README.md` says how each number comes to be. All durations are seconds,
//! all sizes bytes. A figure that does not exist for a contestant, or was not measured, is null.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The whole file.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    /// One pass per version of PostgreSQL.
    pub(crate) passes: Vec<Pass>,
}

/// Everything measured with one version of PostgreSQL on both sides.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pass {
    /// Processor, memory, kernel, versions.
    pub(crate) machine: Value,
    /// Major version of both servers.
    pub(crate) postgresql: u32,
    /// Factor on all sizes; 1 is what the figures are defined for.
    pub(crate) scale: f64,
    /// Round trip of the long line, in milliseconds.
    pub(crate) wan_rtt_ms: u64,
    /// Rate of the long line, in Mbit/s.
    pub(crate) wan_mbit: u64,
    /// Backlogs drained, and initial copies (workload `copy`).
    pub(crate) drains: Vec<Drain>,
    /// Lag under a constant load.
    pub(crate) lags: Vec<Lag>,
    /// What an attached reader costs the source.
    pub(crate) cost: Option<Cost>,
    /// What could not be measured.
    pub(crate) skipped: Vec<Skipped>,
}

/// One contestant's rounds at one workload through one network.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Drain {
    /// Name of the workload.
    pub(crate) workload: String,
    /// `local` or `wan`.
    pub(crate) network: String,
    /// Name of the contestant.
    pub(crate) contestant: String,
    /// Source transactions of the backlog.
    pub(crate) transactions: u64,
    /// Rows inserted, updated or deleted by them, or copied.
    pub(crate) rows: u64,
    /// WAL the backlog took on the source.
    pub(crate) wal_bytes: u64,
    /// Whether source and replica were compared in full, after the first round.
    pub(crate) compared_equal: bool,
    /// In the order in which they ran.
    pub(crate) rounds: Vec<Round>,
}

/// One drain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Round {
    /// From the start of the contestant until a row written last was seen on the replica.
    pub(crate) seconds: f64,
    /// Until the first row of the backlog was seen there: connecting, catching up with itself.
    pub(crate) first_seconds: Option<f64>,
    /// Until the contestant itself said so as well: `dr_agent.progress`, `confirmed_flush_lsn`.
    pub(crate) confirmed_seconds: Option<f64>,
    /// Processor time of the source's server.
    pub(crate) cpu_source: f64,
    /// Of the program between the servers, where there is one.
    pub(crate) cpu_agent: Option<f64>,
    /// Of the replica's server, where there is one.
    pub(crate) cpu_replica: Option<f64>,
    /// Bytes through the proxy, both directions.
    pub(crate) wire_bytes: Option<u64>,
    /// Peak resident memory of the agent.
    pub(crate) agent_peak_bytes: Option<u64>,
}

/// Delay of probe rows while pgbench runs at a fixed rate.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Lag {
    /// `local` or `wan`.
    pub(crate) network: String,
    /// Name of the contestant.
    pub(crate) contestant: String,
    /// Transactions per second the source reaches alone.
    pub(crate) peak_tps: f64,
    /// What pgbench did meanwhile.
    pub(crate) tps: f64,
    /// Probe rows that arrived in time to count.
    pub(crate) probes: usize,
    /// Median delay.
    pub(crate) p50: f64,
    /// 99th percentile.
    pub(crate) p99: f64,
    /// Longest.
    pub(crate) max: f64,
}

/// pgbench's rate with either reader attached, alternating.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// With the agent attached and caught up.
    pub(crate) agent: Vec<Loaded>,
    /// With `pg_recvlogical` reading a bare slot.
    pub(crate) bare_slot: Vec<Loaded>,
    /// Processors of the source's site and of the replica, where they were kept apart.
    pub(crate) pinned: Option<[String; 2]>,
}

/// One run of pgbench beside a reader.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Loaded {
    /// What pgbench reached.
    pub(crate) tps: f64,
    /// Processors the source's server used, all of its processes.
    pub(crate) source_processors: f64,
    /// Processors the reader used: the agent, or `pg_recvlogical`.
    pub(crate) reader_processors: f64,
}

impl Cost {
    /// By how many percent of its rate pgbench is slower beside the agent.
    pub(crate) fn percent(&self) -> Option<f64> {
        let tps = |rounds: &[Loaded]| median(rounds.iter().map(|round| round.tps).collect());
        Some((1.0 - tps(&self.agent)? / tps(&self.bare_slot)?) * 100.0)
    }
}

/// What could not be measured, and why.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Skipped {
    /// Name of the workload.
    pub(crate) workload: String,
    /// Name of the contestant.
    pub(crate) contestant: String,
    /// In words.
    pub(crate) why: String,
}

impl Drain {
    /// The median of a figure over the rounds that have it.
    pub(crate) fn median(&self, figure: impl Fn(&Round) -> Option<f64>) -> Option<f64> {
        median(self.rounds.iter().filter_map(figure).collect())
    }

    /// The median of the seconds.
    pub(crate) fn seconds(&self) -> Option<f64> {
        self.median(|round| Some(round.seconds))
    }
}

impl Pass {
    /// The drain of a contestant.
    pub(crate) fn drain(&self, workload: &str, network: &str, contestant: &str) -> Option<&Drain> {
        self.drains.iter().find(|drain| {
            drain.workload == workload && drain.network == network && drain.contestant == contestant
        })
    }
}

/// The middle value; of an even number of values the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some((values.get(middle - 1)? + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
