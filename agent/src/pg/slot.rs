//! Slots through SQL: is one in use, how far is it confirmed, does its WAL still exist; and moving one that nobody
//! streams from.
//!
//! # What it does not do
//! Slots are created and dropped by [`super::replication`].

use tokio_postgres::Client;

use super::{PgError, PgLsn};

/// One row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Whether a walsender uses it now.
    pub active: bool,
    /// That walsender.
    pub active_pid: Option<i32>,
    /// The output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// The database; `None` for a physical slot.
    pub database: Option<String>,
    /// What we last acknowledged; streaming starts here at the earliest.
    pub confirmed_flush_lsn: Option<PgLsn>,
    /// The oldest WAL kept for this slot; `None` once it is lost.
    pub restart_lsn: Option<PgLsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Bytes that may still be written before the slot is in danger; `None` without a limit.
    pub safe_wal_size: Option<i64>,
    /// Why the server made it unusable, where its version (16 and later) tells.
    pub invalidation_reason: Option<String>,
    /// A standby keeps it in step with its primary's, or did until it was promoted (17 and later), and it is no temporary one.
    pub synced: bool,
}

impl SlotState {
    /// Whether changes are gone that we never received. Such a slot never works again.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost") || self.invalidation_reason.is_some()
    }
}

/// Reads the state of a slot; `None` when there is none of that name.
pub async fn slot_state(client: &Client, name: &str) -> Result<Option<SlotState>, PgError> {
    // Columns that not every version has are read through jsonb, where a missing one is NULL:
    // `conflicting` came with 16, `invalidation_reason` with 17.
    let row = client
        .query_opt(
            "SELECT active, active_pid, plugin::text, database::text,
                    confirmed_flush_lsn, restart_lsn, wal_status, safe_wal_size,
                    coalesce(to_jsonb(s) ->> 'invalidation_reason',
                             CASE WHEN to_jsonb(s) ->> 'conflicting' = 'true'
                                  THEN 'conflicting with recovery' END),
                    coalesce((to_jsonb(s) ->> 'synced')::boolean AND (to_jsonb(s) ->> 'failover')::boolean, false)
                    AND NOT temporary
             FROM pg_catalog.pg_replication_slots AS s WHERE slot_name = $1",
            &[&name],
        )
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    Ok(Some(SlotState {
        active: row.try_get(0)?,
        active_pid: row.try_get(1)?,
        plugin: row.try_get(2)?,
        database: row.try_get(3)?,
        confirmed_flush_lsn: row.try_get(4)?,
        restart_lsn: row.try_get(5)?,
        wal_status: row.try_get(6)?,
        safe_wal_size: row.try_get(7)?,
        invalidation_reason: row.try_get(8)?,
        synced: row.try_get(9)?,
    }))
}

/// Moves a slot forward. The source reads the WAL in between, without decoding it.
pub async fn advance(client: &Client, slot: &str, to: PgLsn) -> Result<(), PgError> {
    client
        .execute(
            "SELECT pg_catalog.pg_replication_slot_advance($1::text::name, $2::pg_lsn)",
            &[&slot, &to],
        )
        .await?;
    Ok(())
}

/// Bytes of WAL the source keeps because of a slot; `None` without the slot, or once it is lost.
pub async fn retained_bytes(client: &Client, name: &str) -> Result<Option<u64>, PgError> {
    let row = client
        .query_opt(
            "SELECT greatest(0, pg_catalog.pg_wal_lsn_diff(
                        CASE WHEN pg_catalog.pg_is_in_recovery()
                             THEN pg_catalog.pg_last_wal_replay_lsn()
                             ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn))::bigint
             FROM pg_catalog.pg_replication_slots
             WHERE slot_name = $1 AND restart_lsn IS NOT NULL",
            &[&name],
        )
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let bytes: Option<i64> = row.try_get(0)?;
    Ok(bytes.and_then(|bytes| u64::try_from(bytes).ok()))
}
