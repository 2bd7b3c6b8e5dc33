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
use crate::names::object::ObjectAddress;
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
    const IS_LARGE: &str = "
        SELECT pg_catalog.to_regclass($1::text) IS NULL
               AND coalesce(pg_catalog.pg_relation_size(pg_catalog.to_regclass($2::text)), 0) > $3";
    if !object.created || definition(&object.address, object.shape.as_ref()).is_none() {
        return Ok(false);
    }
    let Some(table) = table_of(object) else {
        return Ok(false);
    };
    let most = i64::try_from(index_bytes).unwrap_or(i64::MAX);
    let row = client
        .query_one(IS_LARGE, &[&name(&object.address), &table.sql(), &most])
        .await?;
    Ok(row.get(0))
}

/// Whether this one can be built beside the stream, whatever it waits for.
pub(super) fn is_waiting(object: &WaitingObject) -> bool {
    definition(&object.address, object.shape.as_ref()).is_some()
}

fn name(index: &ObjectAddress) -> String {
    let parts = index.names.iter().map(|name| quote_ident(name));
    parts.collect::<Vec<_>>().join(".")
}

/// The statement that builds an index concurrently: not of one that tells rows apart, or belongs to a constraint.
fn definition(address: &ObjectAddress, shape: Option<&serde_json::Value>) -> Option<String> {
    let shape = shape.filter(|_| address.kind == "index")?;
    let is = |key: &str| shape.get(key).and_then(serde_json::Value::as_bool);
    let definition = shape.get("definition")?.as_str()?;
    if is("constraint") == Some(true) {
        return None;
    }
    let rest = definition.strip_prefix("CREATE INDEX ")?;
    // One of a partitioned table is no one's to build concurrently.
    (!rest.contains(" ON ONLY ")).then(|| format!("CREATE INDEX CONCURRENTLY {rest}"))
}

/// Builds it; why not, where that is not possible. No transaction is open.
pub(super) async fn build(
    client: &Client,
    object: &WaitingObject,
) -> Result<Result<(), String>, PgError> {
    let name = name(&object.address);
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
    let Some(statement) = definition(&object.address, object.shape.as_ref()) else {
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
        let address = |kind: &str| ObjectAddress {
            kind: kind.to_owned(),
            names: vec!["s".to_owned(), "i".to_owned()],
            args: Vec::new(),
        };
        let of = |text: &str| definition(&address("index"), Some(&json!({ "definition": text })));
        assert_eq!(
            of("CREATE INDEX i ON s.t USING btree (a)").as_deref(),
            Some("CREATE INDEX CONCURRENTLY i ON s.t USING btree (a)")
        );
        assert_eq!(of("CREATE UNIQUE INDEX i ON s.t USING btree (a)"), None);
        assert_eq!(of("CREATE INDEX i ON ONLY s.t USING btree (a)"), None);
        let plain = "CREATE INDEX i ON s.t USING gist (a)";
        let excluding = json!({ "definition": plain, "constraint": true });
        assert_eq!(definition(&address("index"), Some(&excluding)), None);
        let other = json!({ "definition": plain });
        assert_eq!(definition(&address("view"), Some(&other)), None);
        assert_eq!(definition(&address("index"), None), None);
    }
}
