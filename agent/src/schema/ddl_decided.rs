//! `dr_agent.ddl_decided` on the replica: what people have decided about commands and tables, and why.
//!
//! A table that is to be copied again waits here for the agent, which sets it aside.

use tokio_postgres::GenericClient;

use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.ddl_decided";

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// What waits was tried again.
    Retry,
    /// An object is right as it is.
    Accept,
    /// A table is copied again.
    Resync,
}

impl Action {
    /// As it is written down.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Accept => "accept",
            Self::Resync => "resync",
        }
    }
}

/// Writes a decision down. A table is named as `["schema", "name"]`.
///
/// # Errors
/// When the replica refuses.
pub async fn note(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    action: Action,
    object: &str,
    reason: &str,
) -> Result<(), PgError> {
    let sql =
        format!("INSERT INTO {TABLE} (stream, action, object, reason) VALUES ($1, $2, $3, $4)");
    client
        .execute(
            &sql,
            &[&stream.as_str(), &action.as_str(), &object, &reason],
        )
        .await?;
    Ok(())
}

/// A table as it is written down.
pub fn object_of(table: &TableName) -> String {
    serde_json::json!([table.schema, table.name]).to_string()
}

/// Tables that somebody wants copied again, and why; they are the caller's from here on.
///
/// # Errors
/// When the replica refuses.
pub async fn take_wanted(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<(TableName, String)>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "UPDATE {TABLE} SET done_at = clock_timestamp()
          WHERE stream = $1 AND action = $2 AND done_at IS NULL RETURNING object, reason"
    );
    let rows = client
        .query(&sql, &[&stream.as_str(), &Action::Resync.as_str()])
        .await?;
    let wanted = rows.iter().filter_map(|row| {
        let (schema, name) = serde_json::from_str(row.get(0)).ok()?;
        Some((TableName { schema, name }, row.get(1)))
    });
    Ok(wanted.collect())
}
