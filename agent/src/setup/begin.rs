//! The first start of a stream, or one that repeats an interrupted first start: everything is copied.
//!
//! # Invariants
//! - The replica's database holds no table that is not ours.
//! - Stream row, then slot, then progress row: see [`super`] for what each crash in between means.
//! - Publication before slot: every transaction that the slot decodes began after the publication
//!   was there.

use std::time::SystemTime;

use super::error::{SetupError, Side};
use super::identity::History;
use super::replica::{self, Progress};
use super::{Setup, setting, table_sync};
use crate::catalog::TableName;
use crate::pg::replication::ReplicationConnection;
use crate::pg::{PgError, PgLsn};

impl Setup<'_> {
    pub(super) async fn begin(
        &mut self,
        walsender: &mut ReplicationConnection,
        source: &History,
        drop_slot: bool,
    ) -> Result<Progress, SetupError> {
        replica::require_empty(&self.replica, self.database).await?;
        let refused = self.source.wanted.refused();
        if !refused.is_empty() {
            return Err(SetupError::Keyless(refused));
        }
        self.source.found.require_listing(&self.source.stream)?;
        self.source.publish().await?;
        let settings = setting::of_source(&self.source.client, self.database).await?;
        self.source
            .warnings
            .extend(setting::apply(&self.replica, &settings).await?);
        let recorded = self.record(source).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the stream"))?;
        if drop_slot {
            walsender
                .drop_slot(self.source.stream.as_str())
                .await
                .map_err(SetupError::sql(
                    Side::Source,
                    "drop the slot of an interrupted set-up",
                ))?;
        }
        // Everything committed before this moment is in the copy: until the first batch, the loss at a
        // promotion is counted from here.
        let asked = self
            .source
            .client
            .query_one("SELECT clock_timestamp()", &[])
            .await;
        let copied_at = asked
            .map_err(|error| SetupError::sql(Side::Source, "ask for the time")(error.into()))?
            .get(0);
        let name = self.source.stream.to_string();
        let slot = self.source.create_slot(walsender, &name, false).await?;
        let recorded = self.record_progress(slot.consistent_point, copied_at).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the progress"))?;
        self.copy(self.source.wanted.published.clone(), &slot, true)
            .await?;
        Ok(Progress {
            term: 1,
            batch: 0,
            end_lsn: slot.consistent_point,
        })
    }

    async fn record(&self, source: &History) -> Result<(), PgError> {
        const SQL: &str = "
            INSERT INTO dr_agent.stream (stream, system_identifier, timeline) VALUES ($1, $2, $3)
                ON CONFLICT (stream) DO UPDATE
               SET system_identifier = EXCLUDED.system_identifier, timeline = EXCLUDED.timeline,
                   created_at = now()";
        self.replica
            .execute(
                SQL,
                &[
                    &self.source.stream.as_str(),
                    &source.system_identifier,
                    &source.timeline,
                ],
            )
            .await?;
        Ok(())
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
