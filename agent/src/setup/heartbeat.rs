//! How many heartbeats a side knows of: a source that was set back knows of fewer than its replica.
//!
//! The row is the source's, and comes to the replica like any other ([`crate::watch::monitor`] writes it). [`super::identity`] judges.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::error::{SetupError, Side};

/// None where there is none yet.
pub(super) async fn beats(client: &Client, side: Side) -> Result<Option<i64>, SetupError> {
    let sql =
        |error: tokio_postgres::Error| SetupError::sql(side, "read the heartbeats")(error.into());
    let asked = client
        .query_typed_opt("SELECT beat FROM dr_agent.heartbeat", &[])
        .await;
    match asked {
        Ok(row) => Ok(row.map(|row| row.get(0))),
        // undefined_table, invalid_schema_name
        Err(error) if matches!(error.code().map(SqlState::code), Some("42P01" | "3F000")) => {
            Ok(None)
        }
        Err(error) => Err(sql(error)),
    }
}
