//! pgbench against the source.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use dr_agent_tests::server::PgServer;
use tokio::process::{Child, Command};

/// What one run of pgbench did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Achieved {
    /// Transactions per second.
    pub(crate) tps: f64,
    /// Average latency in milliseconds.
    pub(crate) latency_ms: f64,
}

/// A client program: the server's own, or where it has none (some builds lack pgbench) the one on PATH.
pub(crate) fn program(server: &PgServer, name: &str) -> PathBuf {
    let own = server.program(name);
    if own.exists() { own } else { name.into() }
}

/// Creates pgbench's tables.
pub(crate) async fn initialise(source: &PgServer, database: &str, scale: u32) -> Result<()> {
    let output = Command::new(program(source, "pgbench"))
        .args(["-i", "-q", "-s", &scale.to_string()])
        .arg(source.url(database))
        .stdin(Stdio::null())
        .output()
        .await
        .context("start pgbench")?;
    ensure!(
        output.status.success(),
        "pgbench -i: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Starts the TPC-B-like load; `rate` 0 means as fast as it goes.
pub(crate) fn start(
    source: &PgServer,
    database: &str,
    clients: u32,
    rate: u32,
    seconds: u32,
) -> Result<Child> {
    let mut command = Command::new(program(source, "pgbench"));
    // Without --no-vacuum it would begin with TRUNCATE pgbench_history.
    command
        .args(["--no-vacuum", "-M", "prepared"])
        .args([
            "-c",
            &clients.to_string(),
            "-j",
            &clients.min(2).to_string(),
        ])
        .args(["-T", &seconds.to_string()]);
    if rate > 0 {
        command.args(["--rate", &rate.to_string()]);
    }
    command
        .arg(source.url(database))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start pgbench")
}

/// Waits for its end and reads what it achieved.
pub(crate) async fn finish(load: Child) -> Result<Achieved> {
    let output = load.wait_with_output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "pgbench: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    parse(&text).with_context(|| format!("read the result of pgbench: {text}"))
}

fn parse(text: &str) -> Option<Achieved> {
    let number_after = |start: &str| {
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(start)?;
            rest.split_whitespace().next()?.parse().ok()
        })
    };
    Some(Achieved {
        tps: number_after("tps = ")?,
        latency_ms: number_after("latency average = ")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_of_pgbench_is_read() {
        let text = "number of transactions actually processed: 5\nlatency average = 1.250 ms\n\
                    tps = 799.5 (without initial connection time)\n";
        let achieved = parse(text).unwrap();
        assert_eq!((achieved.tps, achieved.latency_ms), (799.5, 1.25));
        assert!(parse("pgbench: error").is_none());
    }
}
