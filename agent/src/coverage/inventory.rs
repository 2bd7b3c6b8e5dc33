//! What a database has, by kind and name: on the source as told in-band, on the replica as it is.
//!
//! The source's monitor brings `dr_agent.coverage` up to date; it is published, so the rows stand in the stream where the
//! source was so, and are on the replica when the source is gone.
//!
//! ```text
//! source    catalogs ─▶ dr_agent.coverage (protected: what should be on both sides; not protected: what is not)
//! replica   dr_agent.coverage, catalogs ─▶ [super::kept]
//! ```
//!
//! # Invariants
//! - Catalogs only, and no OID is resolved by a function that fails when it is gone.
//! - A row is bounded: beyond [`NAMES_BYTES_MAX`] there is a number and no names.
//!
//! # What it does not do
//! It compares names, not definitions.

use tokio_postgres::Client;

use super::Unprotected;
use super::kept::Told;
use crate::pg::PgError;
use crate::stream::StreamName;

/// Every kind of object whose names are compared. A table comes before what belongs to it.
pub(super) const KINDS: [&str; 17] = [
    "schema",
    "extension",
    "type",
    "function",
    "table",
    "partitioned_table",
    "foreign_table",
    "view",
    "materialized_view",
    "sequence",
    "column",
    "constraint",
    "index",
    "trigger",
    "rule",
    "policy",
    "event_trigger",
];

/// Names of one kind, all together.
const NAMES_BYTES_MAX: usize = 100_000;

/// `kind, name` of everything that is the users' own. What belongs to a table is named after it.
const OBJECTS: &str = "
    WITH own AS (
        SELECT oid, nspname::text AS schema FROM pg_catalog.pg_namespace
         WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'dr_agent')),
    extension AS (
        SELECT classid, objid FROM pg_catalog.pg_depend
         WHERE deptype = 'e' AND refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass),
    relation AS (
        SELECT c.oid, c.relkind, own.schema || '.' || c.relname AS name
          FROM pg_catalog.pg_class c JOIN own ON own.oid = c.relnamespace
         WHERE c.relpersistence <> 't'
           AND NOT EXISTS (SELECT FROM extension e
                            WHERE (e.classid, e.objid) = ('pg_catalog.pg_class'::pg_catalog.regclass, c.oid)))
    SELECT CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned_table' WHEN 'f' THEN 'foreign_table'
                        WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized_view' ELSE 'sequence' END, name
      FROM relation WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
    UNION ALL
    SELECT 'column', r.name || '.' || a.attname FROM relation r
      JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
     WHERE r.relkind IN ('r', 'p', 'f') AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'constraint', r.name || '.' || c.conname FROM relation r
      JOIN pg_catalog.pg_constraint c ON c.conrelid = r.oid
     WHERE c.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT 'index', r.name || '.' || i.relname FROM relation r
      JOIN pg_catalog.pg_index x ON x.indrelid = r.oid
      JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    UNION ALL
    SELECT 'trigger', r.name || '.' || t.tgname FROM relation r
      JOIN pg_catalog.pg_trigger t ON t.tgrelid = r.oid WHERE NOT t.tgisinternal
    UNION ALL
    SELECT 'rule', r.name || '.' || w.rulename FROM relation r
      JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.oid WHERE w.rulename <> '_RETURN'
    UNION ALL
    SELECT 'policy', r.name || '.' || p.polname FROM relation r
      JOIN pg_catalog.pg_policy p ON p.polrelid = r.oid
    UNION ALL
    SELECT 'function', own.schema || '.' || p.proname || '(' || pg_catalog.oidvectortypes(p.proargtypes) || ')'
      FROM pg_catalog.pg_proc p JOIN own ON own.oid = p.pronamespace
     WHERE NOT EXISTS (SELECT FROM extension e
                        WHERE (e.classid, e.objid) = ('pg_catalog.pg_proc'::pg_catalog.regclass, p.oid))
       -- A range type brings its constructors along, one more of them in later versions.
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                        WHERE (d.classid, d.objid, d.deptype) = ('pg_catalog.pg_proc'::pg_catalog.regclass, p.oid, 'i'))
    UNION ALL
    SELECT 'type', own.schema || '.' || t.typname
      FROM pg_catalog.pg_type t JOIN own ON own.oid = t.typnamespace
     WHERE (t.typtype IN ('e', 'd', 'r')
            OR t.typtype = 'c' AND EXISTS (SELECT FROM relation r WHERE r.oid = t.typrelid AND r.relkind = 'c'))
       AND NOT EXISTS (SELECT FROM extension e
                        WHERE (e.classid, e.objid) = ('pg_catalog.pg_type'::pg_catalog.regclass, t.oid))
    UNION ALL
    SELECT 'schema', own.schema FROM own
     WHERE NOT EXISTS (SELECT FROM extension e
                        WHERE (e.classid, e.objid) = ('pg_catalog.pg_namespace'::pg_catalog.regclass, own.oid))
    UNION ALL
    SELECT 'extension', extname FROM pg_catalog.pg_extension
    UNION ALL
    SELECT 'event_trigger', t.evtname FROM pg_catalog.pg_event_trigger t
     WHERE NOT EXISTS (SELECT FROM extension e
                        WHERE (e.classid, e.objid) = ('pg_catalog.pg_event_trigger'::pg_catalog.regclass, t.oid))";

/// A JSON list of names, or nothing where they are too long together.
fn by_kind() -> String {
    format!(
        "SELECT k.kind, count(o.name)::bigint,
                CASE WHEN coalesce(sum(length(o.name)), 0) <= {NAMES_BYTES_MAX}
                     THEN coalesce(json_agg(o.name ORDER BY o.name COLLATE \"C\") FILTER (WHERE o.name IS NOT NULL), '[]')::text
                     ELSE '' END
           FROM unnest($1::text[]) AS k (kind) LEFT JOIN ({OBJECTS}) AS o (kind, name) USING (kind)
          GROUP BY k.kind"
    )
}

/// Brings the source's rows of `dr_agent.coverage` up to date; what is as it was is not written.
pub async fn tell(
    client: &Client,
    stream: &StreamName,
    unprotected: &[Unprotected],
) -> Result<(), PgError> {
    const CHANGED: &str = "
        ON CONFLICT (stream, kind, protected) DO UPDATE SET objects = EXCLUDED.objects, names = EXCLUDED.names
         WHERE (c.objects, c.names) IS DISTINCT FROM (EXCLUDED.objects, EXCLUDED.names)";
    let has = format!(
        "INSERT INTO dr_agent.coverage AS c (stream, kind, protected, objects, names)
         SELECT $2, b.kind, true, b.objects, b.names FROM ({}) AS b (kind, objects, names) {CHANGED}",
        by_kind()
    );
    client
        .execute(&has, &[&KINDS.as_slice(), &stream.as_str()])
        .await?;
    let kinds: Vec<&str> = unprotected.iter().map(|one| one.kind).collect();
    let counts: Vec<i64> = unprotected
        .iter()
        .map(|one| i64::try_from(one.count).unwrap_or(i64::MAX))
        .collect();
    let names: Vec<String> = unprotected
        .iter()
        .map(|one| serde_json::Value::from(one.examples.clone()).to_string())
        .collect();
    let lacks = format!(
        "INSERT INTO dr_agent.coverage AS c (stream, kind, protected, objects, names)
         SELECT $1, u.kind, false, u.objects, u.names
           FROM unnest($2::text[], $3::bigint[], $4::text[]) AS u (kind, objects, names) {CHANGED}"
    );
    client
        .execute(&lacks, &[&stream.as_str(), &kinds, &counts, &names])
        .await?;
    Ok(())
}

/// What the source told last, as far as it has arrived; nothing of an agent that did not tell.
pub(super) async fn told(client: &Client, stream: &StreamName) -> Result<Vec<Told>, PgError> {
    let there = client
        .query_one(
            "SELECT pg_catalog.to_regclass('dr_agent.coverage') IS NOT NULL",
            &[],
        )
        .await?;
    if !there.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = client
        .query(
            "SELECT kind, objects, names, protected FROM dr_agent.coverage WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await?;
    Ok(rows.iter().map(|row| told_by(row, row.get(3))).collect())
}

/// What the database has that this client is connected to.
pub(super) async fn here(client: &Client) -> Result<Vec<Told>, PgError> {
    let rows = client.query(&by_kind(), &[&KINDS.as_slice()]).await?;
    Ok(rows.iter().map(|row| told_by(row, true)).collect())
}

fn told_by(row: &tokio_postgres::Row, protected: bool) -> Told {
    Told {
        kind: row.get(0),
        protected,
        objects: row.get::<_, i64>(1).unsigned_abs(),
        names: serde_json::from_str(row.get(2)).ok(),
    }
}
