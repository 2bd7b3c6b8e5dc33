//! Tables whose rows are not those that belong there: emptied, or dropped, and set back to be copied again.
//!
//! # Invariants
//! - A table is emptied in the same transaction that sets its row of `dr_agent.table_sync` back to `pending`.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::error::{SetupError, Side};
use crate::catalog::routing;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::schema::{progress, table_sync};

/// Why the rows that are there are not those that belong there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    /// Changes of the table were not published.
    Changes,
    /// It is another table.
    All,
}

/// Sets tables whose changes were missed back to `pending`, and empties them. One that is another table goes as a whole, so that
/// the copy creates it as it is now; unless something else on the replica depends on it. What was catching up with tables beside
/// the stream ends in the same moment: a session that an agent has left behind writes to them no more.
pub(super) async fn reset(
    client: &mut Client,
    stream: &StreamName,
    tables: &BTreeMap<TableName, Missed>,
) -> Result<(), SetupError> {
    set_back(client, stream, tables)
        .await
        .map_err(SetupError::sql(
            Side::Replica,
            "empty tables that have to be copied again",
        ))
}

async fn set_back(
    client: &mut Client,
    stream: &StreamName,
    tables: &BTreeMap<TableName, Missed>,
) -> Result<(), PgError> {
    // TRUNCATE refuses tables that others refer to, whatever session_replication_role says.
    const EXISTS_AND_IS_REFERRED_TO: &str = "
        SELECT to_regclass($1::text) IS NOT NULL,
               EXISTS (SELECT 1 FROM pg_constraint
                        WHERE contype = 'f' AND confrelid = to_regclass($1::text)
                          AND conrelid <> confrelid)";
    let mut transaction = client.transaction().await?;
    progress::end(&transaction, &stream.late()).await?;
    let replaced = tables.iter().filter(|(_, missed)| **missed == Missed::All);
    // Ours are not in a dump.
    let replaced = replaced.filter(|(table, _)| table.schema != "dr_agent");
    let replaced: Vec<String> = replaced.map(|(table, _)| table.sql()).collect();
    drop_tables(&mut transaction, &replaced).await?;
    let tops = routing::tops(&transaction, tables.keys()).await?;
    for top in tops.values().collect::<BTreeSet<_>>() {
        routing::empty(&transaction, top).await?;
        table_sync::set_back_below(&transaction, stream, top).await?;
    }
    for table in tables.keys().filter(|table| !tops.contains_key(table)) {
        let sql = table.sql();
        let found = transaction
            .query_one(EXISTS_AND_IS_REFERRED_TO, &[&sql])
            .await?;
        // Where it does not exist, the copy creates it.
        let empty = match (found.get(0), found.get(1)) {
            (false, _) => None,
            (true, true) => Some(format!("DELETE FROM ONLY {sql}")),
            (true, false) => Some(format!("TRUNCATE ONLY {sql}")),
        };
        if let Some(empty) = empty {
            transaction.batch_execute(&empty).await?;
        }
        table_sync::set_back(&transaction, stream, std::slice::from_ref(table)).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// Drops those of the tables that nothing else depends on: all at once, because they may refer to one another, or one by one.
async fn drop_tables(transaction: &mut Transaction<'_>, tables: &[String]) -> Result<(), PgError> {
    let together = (!tables.is_empty()).then(|| tables.join(", "));
    for tables in together.iter().chain(tables) {
        let attempt = transaction.savepoint("drop_tables").await?;
        match attempt
            .batch_execute(&format!("DROP TABLE IF EXISTS {tables}"))
            .await
        {
            Ok(()) => attempt.commit().await?,
            Err(error) if error.code() == Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST) => {
                attempt.rollback().await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
