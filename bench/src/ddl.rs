//! What it costs the source that its commands are written down, and that it is looked what its objects are.
//!
//! A database of many wide tables, an agent that has copied it. Each command is timed in turn with the event triggers on and off, in
//! a session that has run it before and in one that has not; then a look where a temporary table has come and gone, and a whole one.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::wait::wait_for;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::sample::Samples;
use crate::servers;

/// The copy of thousands of tables, and the first look at them.
const READY_WITHIN: Duration = Duration::from_secs(1800);

#[derive(Args)]
pub(crate) struct Options {
    /// Tables of the database.
    #[arg(long, default_value_t = 5000)]
    tables: u32,
    /// Columns of each.
    #[arg(long, default_value_t = 50)]
    columns: u32,
    /// How often each command is timed.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
}

/// Name and command; `%` is the number of the round.
const COMMANDS: [(&str, &str); 7] = [
    ("alter_table", "ALTER TABLE t1 ADD COLUMN new_% int"),
    (
        "create_table",
        "CREATE TABLE new_% (id int PRIMARY KEY, v text)",
    ),
    ("create_index", "CREATE INDEX ON t2 (c1)"),
    ("comment", "COMMENT ON TABLE t3 IS 'round %'"),
    ("grant", "GRANT SELECT ON t4 TO PUBLIC"),
    ("grant_on_column", "GRANT UPDATE (c1) ON t5 TO PUBLIC"),
    ("drop_table", "DROP TABLE new_%"),
];

pub(crate) async fn measure(options: &Options, fsync: bool) -> Result<Value> {
    let site = servers::site(fsync).await;
    let database = site.database("bench").await;
    let source = database.source().await;
    let columns: Vec<String> = (1..options.columns).map(|n| format!("c{n} text")).collect();
    let create = format!(
        "DO $do$ BEGIN FOR n IN 1..{} LOOP
            EXECUTE format('CREATE TABLE t%s (id bigint PRIMARY KEY, {})', n);
            IF n % 200 = 0 THEN COMMIT; END IF;
         END LOOP; END $do$",
        options.tables,
        columns.join(", ")
    );
    source.run(&create).await;
    let agent = Agent::new(servers::as_shipped(database.config()));
    let running = agent.start();
    wait_for("the first look", READY_WITHIN, async || {
        let told = "SELECT count(*) FROM dr_agent.fingerprint_at";
        let rows = source.try_rows(told).await?;
        match rows.first().and_then(|row| row[0].clone()).as_deref() {
            Some("1") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let mut costs = Map::new();
    let (mut on, mut off, mut first) = (Timed::default(), Timed::default(), Timed::default());
    for round in 0..options.rounds {
        for (writes_down, timed) in [(true, &mut on), (false, &mut off)] {
            let state = if writes_down {
                "ENABLE ALWAYS"
            } else {
                "DISABLE"
            };
            for trigger in ["command", "drop", "rewrite"] {
                source
                    .run(&format!("ALTER EVENT TRIGGER dr_agent_{trigger} {state}"))
                    .await;
            }
            let number = 2 * round + u32::from(writes_down);
            if writes_down {
                first
                    .round(&database.source().await, number + 100_000)
                    .await;
            }
            timed.round(&source, number).await;
        }
    }
    for (at, (name, _)) in COMMANDS.iter().enumerate() {
        let median = |timed: &Timed| timed.0[at].percentile(50.0).unwrap_or(f64::NAN);
        let (with, without, new) = (median(&on), median(&off), median(&first));
        eprintln!(
            "{name}: {with:.2} ms written down, {without:.2} ms otherwise; {new:.2} ms in a new session"
        );
        costs.insert(
            (*name).to_owned(),
            json!({"on": with, "off": without, "new_session": new}),
        );
    }
    let mut looks = Samples::default();
    for _ in 0..options.rounds {
        source
            .run("CREATE TEMPORARY TABLE here (a int); DROP TABLE here")
            .await;
        looks.push(milliseconds(&source, "SELECT dr_agent.look()").await);
    }
    let whole = milliseconds(&source, "SELECT dr_agent.look(true)").await;
    let look = looks.percentile(50.0).unwrap_or(f64::NAN);
    eprintln!("a look: {look:.0} ms; a whole one: {whole:.0} ms");
    running.stop().await;
    Ok(json!({
        "tables": options.tables, "columns": options.columns, "command_milliseconds": costs,
        "look_milliseconds": looks.to_json(), "whole_look_milliseconds": whole,
    }))
}

#[derive(Default)]
struct Timed([Samples; COMMANDS.len()]);

impl Timed {
    async fn round(&mut self, client: &Client, number: u32) {
        for ((_, command), samples) in COMMANDS.iter().zip(&mut self.0) {
            let command = command.replace('%', &number.to_string());
            samples.push(milliseconds(client, &command).await);
        }
    }
}

async fn milliseconds(client: &Client, sql: &str) -> f64 {
    let began = Instant::now();
    client.run(sql).await;
    began.elapsed().as_secs_f64() * 1e3
}
