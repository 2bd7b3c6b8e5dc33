//! How many heartbeats a side knows of: a source that was set back knows of fewer than its replica.
//!
//! The row is the source's, and comes to the replica like any other ([`crate::monitor`] writes it). [`super::identity`] judges.

use tokio_postgres::Client;

use super::error::{SetupError, Side};

/// None where there is none yet.
pub(super) async fn beats(client: &Client, side: Side) -> Result<Option<i64>, SetupError> {
    let sql =
        |error: tokio_postgres::Error| SetupError::sql(side, "read the heartbeats")(error.into());
    let is_there: bool = client
        .query_typed_one("SELECT to_regclass('dr_agent.heartbeat') IS NOT NULL", &[])
        .await
        .map_err(sql)?
        .get(0);
    if !is_there {
        return Ok(None);
    }
    let row = client
        .query_typed_opt("SELECT beat FROM dr_agent.heartbeat", &[])
        .await
        .map_err(sql)?;
    Ok(row.map(|row| row.get(0)))
}
