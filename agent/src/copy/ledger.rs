//! The copy's steps in `dr_agent.table_sync`: one that is not ours to take any more ends the copy.

use std::collections::HashSet;

use tokio_postgres::{Client, GenericClient};

use super::CopyJob;
use super::error::CopyError;
use crate::names::TableName;
use crate::pg::PgError;
use crate::schema::table_sync::{Copy, IsOurs, TABLE};

/// The ledger of one stream, for one copy.
#[derive(Clone, Copy)]
pub(super) struct CopyLedger<'a>(pub(super) Copy<'a>);

impl<'a> CopyLedger<'a> {
    pub(super) fn new(job: &CopyJob<'a>) -> Self {
        Self(Copy {
            stream: job.stream,
            snapshot_lsn: job.snapshot_lsn,
        })
    }

    /// See [`Copy::begin`].
    pub(super) async fn begin(
        self,
        replica: &Client,
        tables: &[TableName],
        job: &CopyJob<'_>,
    ) -> Result<HashSet<TableName>, CopyError> {
        self.0
            .begin(replica, tables, job.listed, job.whole_schema)
            .await
            .map_err(CopyError::replica(format!("enter the tables into {TABLE}")))
    }

    /// See [`Copy::claim`].
    pub(super) async fn claim(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
    ) -> Result<(), CopyError> {
        taken(self.0.claim(replica, table).await, table)
    }

    /// See [`Copy::hold`].
    pub(super) async fn hold(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
    ) -> Result<(), CopyError> {
        taken(self.0.hold(replica, table).await, table)
    }

    /// See [`Copy::copied`].
    pub(super) async fn copied(
        self,
        replica: &(impl GenericClient + Sync),
        table: &TableName,
        rows: u64,
        bytes: u64,
    ) -> Result<(), CopyError> {
        taken(self.0.copied(replica, table, rows, bytes).await, table)
    }

    /// See [`Copy::analyzed_since_copied`].
    pub(super) async fn analyzed_since_copied(
        self,
        replica: &Client,
    ) -> Result<HashSet<TableName>, CopyError> {
        let analyzed = self.0.analyzed_since_copied(replica).await;
        analyzed.map_err(CopyError::replica("look up what was analyzed"))
    }

    /// See [`Copy::ready`].
    pub(super) async fn ready(
        self,
        replica: &Client,
        tables: &[TableName],
    ) -> Result<(), CopyError> {
        match tables.first() {
            Some(table) => taken(self.0.ready(replica, tables).await, table),
            None => Ok(()),
        }
    }
}

fn taken(step: Result<IsOurs, PgError>, table: &TableName) -> Result<(), CopyError> {
    match step.map_err(CopyError::replica(format!("update {TABLE}")))? {
        true => Ok(()),
        false => Err(CopyError::Superseded {
            table: table.clone(),
        }),
    }
}
