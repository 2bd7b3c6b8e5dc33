//! Two servers and an agent, set up as an installation would be.
//!
//! The harness of the end-to-end tests makes everything quick; here its settings are put back to the
//! agent's defaults, so that what is measured is what is shipped.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::wait_for;

/// Nothing that works takes longer, also on two busy cores.
pub(crate) const CATCH_UP_MAX: Duration = Duration::from_secs(900);

/// A source and a replica of their own.
pub(crate) async fn site(fsync: bool) -> Site {
    let fsync = if fsync { "on" } else { "off" };
    let tuned = |options: ServerOptions| {
        options
            .set("fsync", fsync)
            .set("full_page_writes", fsync)
            .set("shared_buffers", "256MB")
            .set("max_wal_size", "4GB")
    };
    Site::with(
        tuned(ServerOptions::source()),
        tuned(ServerOptions::replica()),
    )
    .await
}

/// An agent with the defaults of the product for everything the harness makes quicker.
pub(crate) fn agent(database: &Database) -> Agent {
    Agent::new(
        database
            .config()
            .set("source.keyless", "\"full\"")
            .set("source.heartbeat", "\"1s\"")
            .set("source.sequences", "\"5s\"")
            .set("limits.retry_max", "\"30s\""),
    )
}

/// Waits until the replica has everything the source has committed by now.
pub(crate) async fn catch_up(database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    let lsn = source
        .value("SELECT pg_current_wal_insert_lsn()")
        .await
        .expect("a server has a WAL position");
    let stream = database.stream();
    let sql = format!(
        "SELECT end_lsn >= '{lsn}', end_lsn FROM dr_agent.progress WHERE stream = '{stream}'"
    );
    wait_for(
        &format!("the replica to reach {lsn}"),
        CATCH_UP_MAX,
        || async {
            let row = replica
                .rows(&sql)
                .await
                .into_iter()
                .next()
                .unwrap_or_default();
            match row.first() {
                Some(Some(reached)) if reached == "t" => Ok(()),
                _ => Err(format!("{row:?}")),
            }
        },
    )
    .await;
}

/// Compares every table by full content; panics and shows the difference where there is one.
pub(crate) async fn expect_equal(source: &Client, replica: &Client) {
    compare::expect_same_content(source, replica).await;
}

/// Processor time the agent has used so far, in seconds, user and system.
pub(crate) fn cpu_seconds(agent: &Running) -> Result<f64> {
    // Linux counts in hundredths of a second on every platform (USER_HZ).
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    let (_, after_name) = stat.rsplit_once(')').context("/proc/pid/stat has a name")?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // utime and stime are fields 14 and 15; the state after the name is field 3.
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / TICKS_PER_SECOND)
}
