//! A lane: one session with the replica that applies its share of a batch.
//!
//! # What it does not do
//! It does not know about other lanes, nor what its share belongs to.

use std::sync::Arc;

use tokio_postgres::Client;

use super::SinkError;
use super::chain::Chain;
use super::execute::{Execution, Statements};
use super::target::Targets;
use crate::flow::net::Step;
use crate::pg::{self, ConnInfo, Session};

/// One session with the replica.
#[derive(Debug)]
pub(super) struct Lane {
    client: Arc<Client>,
    statements: Statements,
}

impl Lane {
    pub(super) async fn connect(replica: &ConnInfo, session: &Session) -> Result<Self, SinkError> {
        let client = pg::connect(replica, session).await?;
        Ok(Self {
            client: Arc::new(client),
            statements: Statements::default(),
        })
    }

    /// Sends SQL behind what the chain already holds.
    pub(super) async fn sql(&self, sql: String, chain: &mut Chain) {
        let client = Arc::clone(&self.client);
        chain
            .send(async move { client.batch_execute(&sql).await })
            .await;
    }

    /// Prepares the statements of `steps`; waits for the replica where one is new.
    pub(super) async fn prepare(
        &mut self,
        steps: &[Step],
        targets: &Targets,
    ) -> Result<Execution, SinkError> {
        Execution::prepare(&self.client, &mut self.statements, targets, steps).await
    }

    /// Sends prepared statements behind what the chain already holds.
    pub(super) async fn send(&self, execution: Execution, chain: &mut Chain) {
        execution.send(&self.client, chain).await;
    }

    /// Tables are others from here on: what was prepared for them counts no more.
    pub(super) fn forget(&mut self) {
        self.statements = Statements::default();
    }

    /// For what is neither prepared nor chained.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Runs SQL and waits for its answer.
    pub(super) async fn run(&self, sql: &str) -> Result<(), SinkError> {
        Ok(self.client.batch_execute(sql).await?)
    }
}
