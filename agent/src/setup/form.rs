//! Whether the stream may carry values in binary form.
//!
//! Binary spares both servers the conversion to text and back. But arrays and composite values carry
//! type OIDs of the source's catalog in it, `regclass` and its like are nothing but such OIDs, and the
//! binary input of `tsquery` refuses the empty query that its output writes. pgoutput offers binary for
//! all columns or none, so one column of such a type anywhere in the publication means text for the
//! whole stream.

use tokio_postgres::Client;

use crate::pg::PgError;
use crate::stream::StreamName;

/// Whether every published column is of a type whose binary form means the same on another server:
/// PostgreSQL's own base types and ranges, enums (a label), and domains over them.
pub(super) async fn binary_travels(client: &Client, stream: &StreamName) -> Result<bool, PgError> {
    const SQL: &str = "
        WITH RECURSIVE used(type) AS (
            SELECT DISTINCT a.atttypid
              FROM pg_publication_tables p
              JOIN pg_namespace n ON n.nspname = p.schemaname
              JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
             WHERE p.pubname = $1
            UNION
            SELECT y.typbasetype FROM used JOIN pg_type y ON y.oid = used.type
             WHERE y.typtype = 'd'
        )
        SELECT NOT EXISTS (
            SELECT 1 FROM used JOIN pg_type y ON y.oid = used.type
             WHERE y.typtype <> 'd'
               AND NOT (y.typtype = 'e'
                        OR y.typtype IN ('b', 'r', 'm') AND y.typcategory <> 'A' AND y.oid < 10000
                           AND y.typname <> 'tsquery' AND y.typname NOT LIKE 'reg%'))";
    Ok(client.query_one(SQL, &[&stream.as_str()]).await?.get(0))
}
