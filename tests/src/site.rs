//! A source and a replica, ready for a test.
//!
//! Tests that only need databases share one pair of servers and take a database each
//! ([`Site::shared`]); tests that stop, crash or reconfigure a server have a pair of their own
//! ([`Site::own`]).
//!
//! # Invariants
//! - The shared pair lives as long as some test uses it; the next test after that starts a new one.
//! - Nobody leaves a transaction or a prepared transaction open on the shared pair: creating a slot waits for
//!   every transaction of the server.

use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use tokio::sync::Mutex;

use crate::agent::{Agent, AgentConfig, Running};
use crate::client::Client;
use crate::compare;
use crate::server::{PgServer, ServerOptions};
use crate::wait::{PATIENCE, wait_for};

/// Two servers.
pub struct Site {
    /// The source.
    pub source: Arc<PgServer>,
    /// The replica.
    pub replica: Arc<PgServer>,
}

struct Pair {
    source: Weak<PgServer>,
    replica: Weak<PgServer>,
}

impl Site {
    /// Servers of the test's own.
    pub async fn own() -> Self {
        Self::with(ServerOptions::source(), ServerOptions::replica()).await
    }

    /// Servers of the test's own with certain options.
    pub async fn with(source: ServerOptions, replica: ServerOptions) -> Self {
        let (source, replica) = tokio::join!(source.start(), replica.start());
        Self {
            source: Arc::new(source),
            replica: Arc::new(replica),
        }
    }

    /// The pair of servers that all undemanding tests share.
    pub async fn shared() -> Self {
        static SHARED: Mutex<Pair> = Mutex::const_new(Pair {
            source: Weak::new(),
            replica: Weak::new(),
        });
        let mut pair = SHARED.lock().await;
        if let (Some(source), Some(replica)) = (pair.source.upgrade(), pair.replica.upgrade()) {
            return Self { source, replica };
        }
        let site = Self::own().await;
        pair.source = Arc::downgrade(&site.source);
        pair.replica = Arc::downgrade(&site.replica);
        site
    }

    /// Creates a database on the source, with a name nobody else has.
    pub async fn database(&self, purpose: &str) -> Database {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{purpose}_{number}");
        self.source.create_database(&name).await;
        Database {
            source: Arc::clone(&self.source),
            replica: Arc::clone(&self.replica),
            slot: format!("dr{number}"),
            name,
        }
    }

    /// Creates a database that is called here what another one is called elsewhere, and is replicated under the same name.
    pub async fn twin_of(&self, other: &Database) -> Database {
        self.source.create_database(&other.name).await;
        Database {
            source: Arc::clone(&self.source),
            replica: Arc::clone(&self.replica),
            slot: other.slot.clone(),
            name: other.name.clone(),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A server of the test's own prints its log when it is dropped; a shared one goes on.
        for (name, server) in [("source", &self.source), ("replica", &self.replica)] {
            if thread::panicking() && Arc::strong_count(server) > 1 {
                eprintln!(
                    "--- end of the log of the {name} server ---\n{}\n---",
                    server.log_tail(25)
                );
            }
        }
    }
}

/// One database of a site, and the agent configuration that replicates it.
#[derive(Clone)]
pub struct Database {
    source: Arc<PgServer>,
    replica: Arc<PgServer>,
    slot: String,
    /// Its name, the same on both servers.
    pub name: String,
}

impl Database {
    /// A configuration that replicates this database alone.
    pub fn config(&self) -> AgentConfig {
        AgentConfig::new(&self.source.url("postgres"), &self.replica.url("postgres"))
            .databases(&[&self.name])
            .slot(&self.slot)
    }

    /// An agent with that configuration.
    pub fn agent(&self) -> Agent {
        Agent::new(self.config())
    }

    /// Starts an agent with that configuration and waits until it is streaming.
    pub async fn replicate(&self) -> (Agent, Running) {
        let agent = self.agent();
        let running = agent.start();
        running.wait_for_streaming(&self.name).await;
        (agent, running)
    }

    /// The replica's server.
    pub fn replica_server(&self) -> &PgServer {
        &self.replica
    }

    /// A session on the source.
    pub async fn source(&self) -> Client {
        self.source.client(&self.name).await
    }

    /// A session on the replica; the database must be there already.
    pub async fn replica(&self) -> Client {
        self.replica.client(&self.name).await
    }

    /// A session on the replica to which the read-only guard does not apply, as an administrator has it.
    pub async fn writable_replica(&self) -> Client {
        let client = self.replica().await;
        client.run("SET default_transaction_read_only = off").await;
        client
    }

    /// The URL of the database on the source.
    pub fn source_url(&self) -> String {
        self.source.url(&self.name)
    }

    /// The URL of the database on the replica.
    pub fn replica_url(&self) -> String {
        self.replica.url(&self.name)
    }

    /// The slot, publication and progress row.
    pub fn stream(&self) -> dr_agent::names::stream::StreamName {
        dr_agent::names::stream::StreamName::new(&self.slot, &self.name)
    }

    /// Drops the slot. A walsender notices in its own time that nobody listens any more.
    pub async fn drop_slot(&self) {
        let source = self.source().await;
        let drop = format!("SELECT pg_drop_replication_slot('{}')", self.stream());
        wait_for("the slot to be dropped", PATIENCE, || source.try_run(&drop)).await;
    }

    /// Waits until the replica has everything, then compares every table in full.
    pub async fn expect_equal(&self) {
        let (source, replica) = tokio::join!(self.source(), self.replica());
        compare::expect_equal_when_caught_up(&source, &replica, &self.stream()).await;
    }

    /// Waits until the replica has everything committed on the source by now.
    pub async fn wait_caught_up(&self) {
        let (source, replica) = tokio::join!(self.source(), self.replica());
        compare::wait_caught_up(&source, &replica, &self.stream()).await;
    }
}
