//! The first start of a stream, or one that repeats an interrupted first start: everything is copied.
//!
//! # Invariants
//! - The replica's database holds no table that is not ours.
//! - The source's note that a history begins, then stream row, slot, progress row: see [`super`] for what each crash in
//!   between means.
//! - Publication before slot: every transaction that the slot decodes began after the publication
//!   was there.

use std::time::SystemTime;

use super::error::{SetupError, Side};
use super::identity::{Cluster, Recorded};
use super::replica::{self, Progress};
use super::{Setup, setting, slot, table_sync};
use crate::catalog::TableName;
use crate::history::History;
use crate::pg::replication::{CreatedSlot, ReplicationConnection};
use crate::pg::{PgError, PgLsn};

impl Setup<'_> {
    pub(super) async fn begin(
        &mut self,
        walsender: &mut ReplicationConnection,
        source: &Cluster,
        drop_slot: bool,
    ) -> Result<(Progress, History), SetupError> {
        replica::require_empty(&self.replica, self.database).await?;
        let refused = self.source.wanted.refused();
        if !refused.is_empty() {
            return Err(SetupError::Keyless(refused));
        }
        self.source.found.require_listing(&self.source.stream)?;
        let tables = self.source.wanted.published.len();
        self.source.found.require_room_to_copy(tables)?;
        self.source.publish(true).await?;
        let history = slot::begin(&self.source, source).await?;
        self.take_over(source, &history).await?;
        let copied_at = self.source_time().await?;
        let snapshot = slot::create(&self.source, walsender, drop_slot).await?;
        let progress = self.first_copy(&snapshot, copied_at).await?;
        Ok((progress, history))
    }

    /// Takes the database's settings over, and records whose replica this is.
    pub(super) async fn take_over(
        &mut self,
        source: &Cluster,
        history: &History,
    ) -> Result<(), SetupError> {
        let (settings, left) = setting::of_source(&self.source.client, self.database).await?;
        let refused = setting::apply(&self.replica, &settings).await?;
        self.source.warnings.extend(left.into_iter().chain(refused));
        let recorded = Recorded {
            cluster: *source,
            began: history.began,
        };
        let recorded = replica::record(&self.replica, &self.source.stream, &recorded).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the stream"))
    }

    /// What the source's clock says. Everything committed by then is in the snapshot of a slot that is created afterwards.
    pub(super) async fn source_time(&self) -> Result<SystemTime, SetupError> {
        let asked = self
            .source
            .client
            .query_one("SELECT clock_timestamp()", &[])
            .await;
        asked
            .map(|row| row.get(0))
            .map_err(|error| SetupError::sql(Side::Source, "ask for the time")(error.into()))
    }

    /// Copies everything at a snapshot. Until the first batch, the loss at a promotion is counted from `copied_at`.
    pub(super) async fn first_copy(
        &mut self,
        snapshot: &CreatedSlot,
        copied_at: SystemTime,
    ) -> Result<Progress, SetupError> {
        let consistent_point = snapshot.consistent_point;
        let recorded = self.record_progress(consistent_point, copied_at).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the progress"))?;
        self.copy(self.source.wanted.published.clone(), snapshot, true)
            .await?;
        Ok(Progress {
            term: 1,
            batch: 0,
            end_lsn: consistent_point,
            commit_time: Some(copied_at),
            applied_at: None,
        })
    }

    async fn record_progress(
        &mut self,
        consistent_point: PgLsn,
        copied_at: SystemTime,
    ) -> Result<(), PgError> {
        const SQL: &str = "
            INSERT INTO dr_agent.progress (stream, term, batch, end_lsn, commit_time, applied_at)
            VALUES ($1, 1, 0, $2, $3, now())";
        let tables: Vec<TableName> = self
            .source
            .wanted
            .published
            .iter()
            .map(|table| table.name.clone())
            .collect();
        let transaction = self.replica.transaction().await?;
        transaction
            .execute(
                SQL,
                &[&self.source.stream.as_str(), &consistent_point, &copied_at],
            )
            .await?;
        table_sync::add(&transaction, &self.source.stream, &tables).await?;
        transaction.commit().await?;
        Ok(())
    }
}
