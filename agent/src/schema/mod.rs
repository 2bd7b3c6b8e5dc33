//! The agent's own tables in the databases: one file for each, which alone reads and writes it.
//!
//! ```text
//! source    sending  wanted  heartbeat  sequence_state  listing  coverage  clock  ddl  fingerprint
//!           in-band: published, and so on the replica too
//! replica   progress  stream  table_sync  schema_sync  set_aside  deferred  promotion  large_value  ddl_applied
//!           ddl_waiting  ddl_decided
//! restore   the same as on a replica, and restore
//! ```
//!
//! The statements that create them are in `agent/sql`. Every function is one step in a session that the caller has opened, and
//! in his transaction where he has begun one; it says what the server said ([`PgError`]), and the caller says on which side and
//! what for.
//!
//! # What it does not do
//! It decides nothing, and opens no session.

pub mod clock;
pub mod coverage;
pub mod ddl;
pub mod ddl_applied;
pub mod ddl_decided;
pub mod ddl_waiting;
pub mod deferred;
pub mod fingerprint;
pub mod firing;
pub mod heartbeat;
pub mod large_value;
pub mod listing;
pub mod prepared;
pub mod progress;
pub mod promotion;
pub mod refused;
pub mod restore;
pub mod schema_sync;
pub mod sending;
pub mod sequence_state;
pub mod set_aside;
pub mod stream;
pub mod table_sync;
pub mod wanted;

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use crate::pg::PgError;

/// Whether all of these tables are there.
///
/// # Errors
/// When the server refuses.
pub async fn has(client: &(impl GenericClient + Sync), tables: &[&str]) -> Result<bool, PgError> {
    const SQL: &str = "
        SELECT coalesce(bool_and(pg_catalog.to_regclass(name) IS NOT NULL), true) FROM unnest($1::text[]) AS t (name)";
    let row = client
        .query_typed_one(SQL, &[(&tables, Type::TEXT_ARRAY)])
        .await?;
    Ok(row.get(0))
}
