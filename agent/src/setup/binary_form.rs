//! Whether the stream may carry values in binary form.
//!
//! pgoutput offers binary for all columns or none, so one column of a type whose binary form does not travel
//! ([`crate::pg::binary`]) anywhere in the publication means text for the whole stream.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::names::stream::StreamName;
use crate::pg::{PgError, binary};

/// Whether every published column is of a type whose binary form means the same on another server, or a domain over one.
pub(super) async fn binary_travels(client: &Client, stream: &StreamName) -> Result<bool, PgError> {
    let sql = format!(
        "WITH RECURSIVE used(type) AS (
            SELECT DISTINCT a.atttypid
              FROM pg_catalog.pg_publication_tables p
              JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
              JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
              JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
             WHERE p.pubname = $1
            UNION
            SELECT y.typbasetype FROM used JOIN pg_catalog.pg_type y ON y.oid = used.type
             WHERE y.typtype = 'd'
        )
        SELECT NOT EXISTS (
            SELECT 1 FROM used JOIN pg_catalog.pg_type y ON y.oid = used.type
             WHERE y.typtype <> 'd' AND NOT {})",
        binary::travels("y")
    );
    let row = client
        .query_typed_one(&sql, &[(&stream.as_str(), Type::TEXT)])
        .await?;
    Ok(row.get(0))
}
