//! How much memory a transaction of two million rows takes, and how long it needs to arrive.
//!
//! The agent is streaming and idle. Then one transaction inserts the rows, a second one updates every
//! one of them. After each: the seconds from the source's COMMIT until the replica has everything, and the
//! agent's peak resident memory (VmHWM, which the kernel keeps) since its start.

use clap::Args;
use dr_agent_tests::agent::Running;
use dr_agent_tests::site::Database;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::servers;

#[derive(Args)]
pub(crate) struct Options {
    /// Rows of the transaction.
    #[arg(long, default_value_t = 2_000_000)]
    rows: u64,
}

pub(crate) async fn measure(options: &Options, fsync: bool) -> anyhow::Result<Value> {
    let site = servers::site(fsync).await;
    let database = site.database("bench").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE large (id bigint PRIMARY KEY, number int NOT NULL, words text NOT NULL)")
        .await;
    let agent = servers::agent(&database).start();
    agent.wait_for_streaming(&database.name).await;
    servers::catch_up(&database).await;
    let idle = agent.peak_resident_bytes();
    eprintln!("peak before: {} MiB", idle >> 20);

    let rows = options.rows;
    let insert = format!(
        "INSERT INTO large SELECT n, n % 1000, repeat(md5(n::text), 2) FROM generate_series(1, {rows}) n"
    );
    let insert = pass_through(&database, &agent, "insert", &insert).await;
    let update = pass_through(
        &database,
        &agent,
        "update",
        "UPDATE large SET number = number + 1",
    )
    .await;
    servers::expect_equal(&source, &database.replica().await).await;
    let peak = agent.peak_resident_bytes();
    eprintln!("peak: {} MiB", peak >> 20);
    agent.stop().await;
    Ok(json!({
        "rows": rows,
        "peak_resident_bytes_idle": idle,
        "peak_resident_bytes": peak,
        "transactions": [insert, update],
        "compared_equal": true,
    }))
}

async fn pass_through(database: &Database, agent: &Running, name: &str, sql: &str) -> Value {
    let source = database.source().await;
    let begun = Instant::now();
    source.run(sql).await;
    let on_source = begun.elapsed().as_secs_f64();
    let committed = Instant::now();
    servers::catch_up(database).await;
    let arrived = committed.elapsed().as_secs_f64();
    let peak = agent.peak_resident_bytes();
    eprintln!(
        "{name}: {on_source:.1} s on the source, on the replica {arrived:.1} s after its commit; peak {} MiB",
        peak >> 20
    );
    json!({
        "statement": name,
        "seconds_on_source": on_source,
        "seconds_from_commit_to_replica": arrived,
        "peak_resident_bytes": peak,
    })
}
