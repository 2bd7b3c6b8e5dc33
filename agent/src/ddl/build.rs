//! Indexes of large tables, which are built beside the stream: the lag must not grow for as long as that takes.
//!
//! The object waits in `dr_agent.ddl_waiting`; whoever tries what waits builds it with CREATE INDEX CONCURRENTLY. A command of the
//! source on the same table goes first: it would wait for the lock of the build, and the stream behind it.
//!
//! # Invariants
//! - A unique index is never put off: it may be what rows are told apart by.
//! - What a killed build has left, an index that is not valid, is dropped before the next one begins.

use tokio_postgres::Client;

use super::apply::table_of;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::quote::quote_ident;
use crate::pg::{PgError, Session};
use crate::schema::ddl::EventObject;
use crate::schema::ddl_waiting::WaitingObject;
use crate::shape;

/// Why such an index is not there yet.
pub(super) const LATER: &str = "is being built beside the stream, because its table is large";

/// The role of a session that builds, in its `application_name`.
pub const ROLE: &str = "index";

/// A session that builds indexes.
pub fn session(stream: &StreamName) -> Session {
    Session::new(stream.application_name(ROLE)).silent()
}

/// Whether an index is better built later.
pub(super) async fn is_for_later(
    client: &Client,
    object: &EventObject,
    index_bytes: u64,
) -> Result<bool, PgError> {
    const SIZE: &str =
        "SELECT coalesce(pg_catalog.pg_relation_size(pg_catalog.to_regclass($1::text)), 0)";
    let is = |key: &str| {
        let value = object.shape.as_ref().and_then(|shape| shape.get(key));
        value.and_then(serde_json::Value::as_bool).unwrap_or(false)
    };
    let is_index = object.address.kind == "index" && object.created;
    if !is_index || is("unique") || is("constraint") || definition(object.shape.as_ref()).is_none()
    {
        return Ok(false);
    }
    let Some(table) = table_of(object) else {
        return Ok(false);
    };
    let size: i64 = client.query_one(SIZE, &[&table.sql()]).await?.get(0);
    Ok(u64::try_from(size).is_ok_and(|size| size > index_bytes))
}

/// Whether this one waits for nothing else than to be built.
pub(super) fn is_waiting(object: &WaitingObject) -> bool {
    object.address.kind == "index" && object.shape.is_some() && object.reason.starts_with(LATER)
}

/// The statement that builds it, and the index's name.
fn definition(shape: Option<&serde_json::Value>) -> Option<String> {
    let definition = shape?.get("definition")?.as_str()?;
    let rest = definition.strip_prefix("CREATE INDEX ")?;
    // One of a partitioned table is no one's to build concurrently.
    (!rest.contains(" ON ONLY ")).then(|| format!("CREATE INDEX CONCURRENTLY {rest}"))
}

/// Builds it; why not, where that is not possible. No transaction is open.
pub(super) async fn build(
    client: &Client,
    object: &WaitingObject,
) -> Result<Result<(), String>, PgError> {
    let name = object.address.names.iter().map(|name| quote_ident(name));
    let name = name.collect::<Vec<_>>().join(".");
    let is_valid =
        |shape: &serde_json::Value| shape.get("valid") != Some(&serde_json::Value::Bool(false));
    match shape::read(client, &object.address).await? {
        Some(found) if is_valid(&found) => return Ok(Ok(())),
        Some(_) => {
            let drop = format!("DROP INDEX CONCURRENTLY {name}");
            client.batch_execute(&drop).await?;
        }
        None => {}
    }
    let Some(statement) = definition(object.shape.as_ref()) else {
        return Ok(Err("its definition is not known".to_owned()));
    };
    match client
        .batch_execute(&statement)
        .await
        .map_err(PgError::from)
    {
        Ok(()) => Ok(Ok(())),
        Err(error @ PgError::Server(_)) => Ok(Err(format!("{LATER}; the last attempt: {error}"))),
        Err(error) => Err(error),
    }
}

/// Ends what builds an index on one of these tables: a command of the source is about to need them.
///
/// # Errors
/// When the server refuses.
pub async fn yield_indexes(
    client: &Client,
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    const CANCEL: &str = "
        SELECT pg_catalog.pg_cancel_backend(p.pid)
          FROM pg_catalog.pg_stat_progress_create_index p
          JOIN pg_catalog.pg_stat_activity a ON a.pid = p.pid
         WHERE a.application_name = $1::text AND p.datname = pg_catalog.current_database()
           AND p.relid = ANY (SELECT pg_catalog.to_regclass(t)::oid FROM unnest($2::text[]) AS t)";
    if tables.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = tables.iter().map(TableName::sql).collect();
    client
        .query(CANCEL, &[&stream.application_name(ROLE), &names])
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_an_ordinary_index_is_built_concurrently() {
        let of = |text: &str| definition(Some(&json!({ "definition": text })));
        assert_eq!(
            of("CREATE INDEX i ON s.t USING btree (a)").as_deref(),
            Some("CREATE INDEX CONCURRENTLY i ON s.t USING btree (a)")
        );
        assert_eq!(of("CREATE UNIQUE INDEX i ON s.t USING btree (a)"), None);
        assert_eq!(of("CREATE INDEX i ON ONLY s.t USING btree (a)"), None);
        assert_eq!(definition(None), None);
    }
}
