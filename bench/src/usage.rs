//! Processor time, as Linux counts it in `/proc`.
//!
//! A server is its postmaster, the processes it has, and those that ended: the kernel adds the time
//! of an ended child to its parent's account.

use std::fs;

use anyhow::{Context as _, Result};
use dr_agent_tests::rundir::children_of;
use dr_agent_tests::server::PgServer;

/// Linux counts in hundredths of a second on every platform (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor seconds of a server so far, all its processes, user and system.
pub(crate) fn of_server(server: &PgServer) -> Result<f64> {
    let postmaster = postmaster(server)?;
    let mut sum = of_process(postmaster)?;
    for child in children_of(postmaster) {
        // It may end between the two looks; then it is in its parent's account a moment later.
        sum += of_process(child).unwrap_or(0.0);
    }
    Ok(sum)
}

/// Processor seconds of a process so far, and of its children that ended.
pub(crate) fn of_process(pid: u32) -> Result<f64> {
    let [user, system, of_children @ ..] = times(&format!("/proc/{pid}/stat"))?;
    Ok(user + system + of_children.iter().sum::<f64>())
}

/// Processor seconds of all programs that this one has started and that have ended.
pub(crate) fn of_ended_programs() -> Result<f64> {
    let [_, _, user, system] = times("/proc/self/stat")?;
    Ok(user + system)
}

/// The process id of a running server's postmaster.
pub(crate) fn postmaster(server: &PgServer) -> Result<u32> {
    let path = server.data_directory().join("postmaster.pid");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let first = text.lines().next().unwrap_or_default();
    first.parse().context("postmaster.pid begins with a number")
}

/// User and system time of the process, then of its ended children.
fn times(path: &str) -> Result<[f64; 4]> {
    let stat = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    parse(&stat).with_context(|| format!("{path} has no times: {stat}"))
}

fn parse(stat: &str) -> Option<[f64; 4]> {
    // "pid (name) state …": the name may hold spaces; the state is field 3, the times are 14 to 17.
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let mut times = [0.0; 4];
    for (time, field) in times.iter_mut().zip(fields.get(11..15)?) {
        *time = field.parse::<f64>().ok()? / TICKS_PER_SECOND;
    }
    Some(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_times_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 9 9 0 0 150 25 300 50 20 0 1 0 5";
        assert_eq!(parse(stat), Some([1.5, 0.25, 3.0, 0.5]));
        assert_eq!(parse("7 (a) S 1"), None);
        assert!(of_process(std::process::id()).unwrap() >= 0.0);
    }
}
