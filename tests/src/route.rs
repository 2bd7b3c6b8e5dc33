//! Both sides of route `kinesis`: `run` beside the source, `apply` beside the replica, a stand-in's stream between them.
//!
//! # What it does not do
//! It makes no stream: [`crate::streams`] does.

use std::path::PathBuf;

use crate::agent::{Agent, AgentConfig, Running};
use crate::moto::environment;
use crate::site::Database;
use crate::wait::{PATIENCE, wait_until};

/// The Kinesis stream's name.
pub const STREAM: &str = "dr-agent";

/// Both sides of the route.
pub struct Route {
    /// What is replicated.
    pub database: Database,
    /// Beside the source.
    pub sender: Agent,
    /// Beside the replica.
    pub applier: Agent,
    endpoint: String,
}

impl Route {
    /// With a stream behind that port. `archive`: both sides know it.
    pub fn new(database: Database, port: u16, archive: Option<PathBuf>) -> Self {
        let config = || {
            let config = database.config();
            match &archive {
                None => config,
                Some(archive) => config
                    .set_text("objectives.rpo", "1s")
                    .set_text("archive.url", &format!("file://{}", archive.display()))
                    .set_text(
                        "archive.spool_directory",
                        &archive.with_file_name("spool").display().to_string(),
                    ),
            }
        };
        Self::with_configuration(database.clone(), port, config)
    }

    /// With a configuration for both sides, to which the route is added.
    pub fn with_configuration(
        database: Database,
        port: u16,
        config: impl Fn() -> AgentConfig,
    ) -> Self {
        let config = || {
            config()
                .databases(&[&database.name])
                .set_text("route.kind", "kinesis")
                .set_text("route.stream", STREAM)
        };
        Self {
            sender: Agent::new(config()),
            applier: Agent::new(config()),
            endpoint: format!("http://127.0.0.1:{port}"),
            database,
        }
    }

    /// Starts `dr-agent run`, with more environment.
    pub fn run(&self, more: &[(&str, &str)]) -> Running {
        self.sender.start_with(&self.with(more))
    }

    /// Starts `dr-agent apply`, with more environment.
    pub fn apply(&self, more: &[(&str, &str)]) -> Running {
        self.applier.spawn(&["apply"], &self.with(more))
    }

    /// What leads a command to the stream, and more.
    pub fn with<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        environment(&self.endpoint)
            .into_iter()
            .chain(more.iter().copied())
            .collect()
    }

    /// Waits until the slot is confirmed up to where the source is now.
    pub async fn wait_sent(&self) {
        let source = self.database.source().await;
        let here = source.value("SELECT pg_current_wal_lsn()").await;
        let here = here.expect("a server has a position");
        let sent = self.slot(&format!("confirmed_flush_lsn >= '{here}'"));
        wait_until("the slot to be confirmed", PATIENCE, || async {
            source.value(&sent).await.as_deref() == Some("t")
        })
        .await;
    }

    /// A query on the source for something of the slot.
    pub fn slot(&self, column: &str) -> String {
        let stream = self.database.stream();
        format!("SELECT {column} FROM pg_replication_slots WHERE slot_name = '{stream}'")
    }

    /// Starts both sides and waits for them.
    pub async fn start(&self) -> (Running, Running) {
        let running = self.run(&[]);
        running.wait_for_streaming(&self.database.name).await;
        let applying = self.apply(&[]);
        applying.wait_for_streaming(&self.database.name).await;
        (running, applying)
    }
}
