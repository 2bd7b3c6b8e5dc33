//! Two servers and an agent, set up as an installation would be.
//!
//! The harness of the end-to-end tests makes everything quick; here its settings are put back to the
//! agent's defaults, so that what is measured is what is shipped.

use std::time::Duration;

use dr_agent_tests::agent::{Agent, AgentConfig, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare;
use dr_agent_tests::http::Metrics;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::wait_for;
use tokio::time::{Instant, sleep};

/// Nothing that works takes longer, also on two busy cores.
pub(crate) const CATCH_UP_MAX: Duration = Duration::from_secs(900);

/// A source and a replica of their own.
pub(crate) async fn site(fsync: bool) -> Site {
    Site::with(
        tuned(ServerOptions::source(), fsync),
        tuned(ServerOptions::replica(), fsync),
    )
    .await
}

/// The settings every measured server has.
pub(crate) fn tuned(options: ServerOptions, fsync: bool) -> ServerOptions {
    let fsync = if fsync { "on" } else { "off" };
    options
        .set("fsync", fsync)
        .set("full_page_writes", fsync)
        .set("shared_buffers", "256MB")
        .set("max_wal_size", "4GB")
}

/// An agent with the defaults of the product for everything the harness makes quicker.
pub(crate) fn agent(database: &Database) -> Agent {
    Agent::new(as_shipped(database.config()))
}

/// Puts back to the defaults of the product what the harness makes quicker.
pub(crate) fn as_shipped(config: AgentConfig) -> AgentConfig {
    config
        .set("source.keyless", "\"full\"")
        .set("source.ddl", "\"replicate\"")
        .set("source.heartbeat", "\"1s\"")
        .set("source.sequences", "\"5s\"")
        .set("limits.retry_max", "\"30s\"")
}

/// Waits until the replica has everything the source has committed by now.
pub(crate) async fn catch_up(database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    reach(&source, &replica, database.stream().as_str()).await;
}

/// Waits until the agent's own position on the replica is the source's present one.
pub(crate) async fn reach(source: &Client, replica: &Client, stream: &str) {
    let lsn = source
        .value("SELECT pg_current_wal_insert_lsn()")
        .await
        .expect("a server has a WAL position");
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

/// Waits until the initial copy is over; that may take longer than the harness's patience.
pub(crate) async fn wait_for_streaming(agent: &mut Running, database: &str) -> Result<(), String> {
    let started = Instant::now();
    while started.elapsed() < CATCH_UP_MAX {
        if is_streaming(agent, database).await {
            return Ok(());
        }
        if let Some(status) = agent.exit_status() {
            return Err(format!(
                "the agent ended with {status}: {}",
                last_line(&agent.log())
            ));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Err(format!(
        "the agent is not streaming; its log:\n{}",
        agent.log()
    ))
}

async fn is_streaming(agent: &Running, database: &str) -> bool {
    let labels = [("database", database), ("state", "streaming")];
    agent.get("/metrics").await.is_ok_and(|answer| {
        Metrics::parse(&answer.body).value("dr_agent_state", &labels) == Some(1.0)
    })
}

/// The last line of a log, which says why a program has ended.
pub(crate) fn last_line(log: &str) -> &str {
    log.trim_end().lines().next_back().unwrap_or_default()
}

/// Compares every table by full content; panics and shows the difference where there is one.
pub(crate) async fn expect_equal(source: &Client, replica: &Client) {
    compare::expect_same_content(source, replica).await;
}
