//! `dr_agent.table_sync` on the replica: which tables of a stream hold their rows, and since when their changes are applied.
//!
//! ```text
//! pending ─▶ copying ─▶ copied ─▶ ready
//!    ▲                             │ changes were missed, or one could not be applied
//!    └─────────────────────────────┘
//! ```
//!
//! A table is `copied` once its rows are committed and `ready` once indexes and constraints are there too; only then may it be
//! streamed and promoted. A row keeps the position before which changes are in the copy, what the table was listed as then, and which
//! table of the replica holds the rows.
//!
//! # Invariants
//! - A `ready` row is never deleted, but where the stream itself says that the table was dropped: changes of a dropped or unlisted table
//!   may still be on their way, and a table that is listed again must be known to have missed some.

mod copying;

pub use copying::{Copy, IsOurs};
use tokio_postgres::GenericClient;
use tokio_postgres::types::{ToSql, Type};

use super::listing::{Copied, ListedAs};
use super::set_aside;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.table_sync";

/// What a table that has to be copied again is set back to.
const PENDING: &str = "state = 'pending', snapshot_lsn = NULL, listed_as = NULL, replica_oid = NULL, rows = 0, bytes = 0, updated_at = now()";

/// Which table has the row's name now: `t` is the row's table.
const HAS_THE_NAME: &str = "to_regclass(format('%I.%I', t.table_schema, t.table_name))";

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSync {
    /// Which table.
    pub table: TableName,
    /// Rows, indexes and constraints are there.
    pub ready: bool,
    /// At least the rows are there (`copied` or `ready`).
    pub held: bool,
    /// What the copy holds.
    pub copied: Copied,
    /// The table on the replica is not the one that was copied: it is gone, or another one has its name.
    pub another: bool,
    /// Which table was copied is known.
    pub noted: bool,
}

/// Reads the rows of a stream.
///
/// # Errors
/// When the replica refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<TableSync>, PgError> {
    // An earlier version's has no replica_oid.
    let sql = format!(
        "SELECT table_schema, table_name, state = 'ready', state IN ('copied', 'ready'),
                snapshot_lsn, listed_as,
                coalesce((to_jsonb(t) ->> 'replica_oid')::oid IS DISTINCT FROM {HAS_THE_NAME}::oid
                         AND to_jsonb(t) ->> 'replica_oid' IS NOT NULL, false),
                to_jsonb(t) ->> 'replica_oid' IS NOT NULL
           FROM {TABLE} t WHERE stream = $1 ORDER BY 1, 2"
    );
    let rows = client
        .query_typed(&sql, &[(&stream.as_str(), Type::TEXT)])
        .await?;
    let rows = rows.iter().map(|row| TableSync {
        table: TableName::of(row),
        ready: row.get(2),
        held: row.get(3),
        copied: Copied {
            snapshot_lsn: row.get(4),
            listed_as: row.get::<_, Option<String>>(5).map(ListedAs::new),
        },
        another: row.get(6),
        noted: row.get(7),
    });
    Ok(rows.collect())
}

/// How far the copy of a stream's tables is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Tables known.
    pub total: i64,
    /// Tables not `ready`; one that is set aside is named as such, and does not count.
    pub not_ready: i64,
    /// The first few of them, as `schema.table (state)`.
    pub examples: Vec<String>,
    /// The newest snapshot: before it, tables are of different moments.
    pub newest_snapshot: Option<PgLsn>,
}

/// Counts the rows of a stream.
///
/// # Errors
/// When the replica refuses.
pub async fn summary(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Summary, PgError> {
    let not_ready = match super::has(client, &[set_aside::TABLE]).await? {
        true => format!(
            "state <> 'ready' AND NOT EXISTS (
                 SELECT 1 FROM {} a WHERE a.stream = t.stream
                    AND a.table_schema = t.table_schema AND a.table_name = t.table_name)",
            set_aside::TABLE
        ),
        false => "state <> 'ready'".to_owned(),
    };
    let sql = format!(
        "SELECT count(*), count(*) FILTER (WHERE {not_ready}), max(snapshot_lsn) FILTER (WHERE state = 'ready' OR {not_ready}),
                (array_agg(table_schema || '.' || table_name || ' (' || state || ')'
                           ORDER BY table_schema, table_name)
                 FILTER (WHERE {not_ready}))[1:5]
           FROM {TABLE} t WHERE stream = $1"
    );
    let row = client.query_one(&sql, &[&stream.as_str()]).await?;
    Ok(Summary {
        total: row.get(0),
        not_ready: row.get(1),
        newest_snapshot: row.get(2),
        examples: row.get::<_, Option<Vec<String>>>(3).unwrap_or_default(),
    })
}

/// The tables whose copy is not complete, in the order of their names.
///
/// # Errors
/// When the replica refuses.
pub async fn not_ready(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<TableName>, PgError> {
    let sql = format!(
        "SELECT table_schema, table_name FROM {TABLE} WHERE stream = $1 AND state <> 'ready' ORDER BY 1, 2"
    );
    let rows = client
        .query_typed(&sql, &[(&stream.as_str(), Type::TEXT)])
        .await?;
    Ok(rows.iter().map(TableName::of).collect())
}

/// Whether tables were recorded for a stream, as they are together with its progress row.
///
/// # Errors
/// When the replica refuses.
pub async fn any(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<bool, PgError> {
    let sql = format!("SELECT EXISTS (SELECT FROM {TABLE} WHERE stream = $1)");
    let row = client
        .query_typed_one(&sql, &[(&stream.as_str(), Type::TEXT)])
        .await?;
    Ok(row.get(0))
}

/// Whether this role may write to another `ready` table of the users' than these.
///
/// # Errors
/// When the replica refuses.
pub async fn may_write_to_others(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<bool, PgError> {
    let sql = format!(
        "SELECT EXISTS (SELECT 1 FROM {TABLE} AS t
                         WHERE stream = $1 AND state = 'ready' AND table_schema <> 'dr_agent'
                           AND NOT EXISTS (SELECT 1 FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
                                            WHERE s = t.table_schema AND n = t.table_name)
                           AND has_table_privilege({HAS_THE_NAME}::oid, 'INSERT'))"
    );
    let (schemas, names) = TableName::arrays(tables);
    let row = client
        .query_one(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(row.get(0))
}

/// Notes which tables hold the rows that were copied before that was noted.
///
/// # Errors
/// When the replica refuses.
pub async fn adopt(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS t SET replica_oid = {HAS_THE_NAME}
          WHERE stream = $1 AND state = 'ready' AND replica_oid IS NULL"
    );
    client.execute(&sql, &[&stream.as_str()]).await?;
    Ok(())
}

/// Adds tables that were loaded as of a position, and what each was listed as.
///
/// # Errors
/// When the replica refuses.
pub async fn add_ready(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: impl IntoIterator<Item = (&TableName, Option<&ListedAs>)>,
    lsn: PgLsn,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, table_schema, table_name, state, snapshot_lsn, listed_as)
         SELECT $1, t.s, t.n, 'ready', $5, t.l FROM unnest($2::text[], $3::text[], $4::text[]) AS t(s, n, l)"
    );
    let (tables, listed_as): (Vec<&TableName>, Vec<Option<&str>>) = tables
        .into_iter()
        .map(|(table, listed_as)| (table, listed_as.map(ListedAs::as_str)))
        .unzip();
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(
            &sql,
            &[&stream.as_str(), &schemas, &names, &listed_as, &lsn],
        )
        .await?;
    Ok(())
}

/// Adds tables as `pending`; those that have a row keep it.
///
/// # Errors
/// When the replica refuses.
pub async fn add(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} (stream, table_schema, table_name, state)
         SELECT $1, t.s, t.n, 'pending' FROM unnest($2::text[], $3::text[]) AS t(s, n)
            ON CONFLICT DO NOTHING"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Adds tables as `pending`, and sets those back that have a row.
///
/// # Errors
/// When the replica refuses.
pub async fn enter(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS t (stream, table_schema, table_name, state)
         SELECT $1, s, n, 'pending' FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET {PENDING}"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Sets tables back, whatever they are.
///
/// # Errors
/// When the replica refuses.
pub async fn set_back(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS t SET {PENDING} FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
          WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Sets a partitioned table's partitions back: their rows have gone together.
///
/// # Errors
/// When the replica refuses.
pub async fn set_back_below(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    top: &TableName,
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS s SET {PENDING}
           FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass($2)) AS t
           JOIN pg_catalog.pg_class c ON c.oid = t.relid
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE s.stream = $1 AND s.table_schema = n.nspname AND s.table_name = c.relname"
    );
    let of_stream = stream.as_str();
    let parameters = [
        (&of_stream as &(dyn ToSql + Sync), Type::TEXT),
        (&top.sql(), Type::TEXT),
    ];
    client.query_typed(&sql, &parameters).await?;
    Ok(())
}

/// Sets those of the tables back that were applied until now, and returns them.
///
/// # Errors
/// When the replica refuses.
pub async fn take_out(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<Vec<TableName>, PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS t SET {PENDING} FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
          WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state = 'ready'
         RETURNING t.table_schema, t.table_name"
    );
    let (schemas, names) = TableName::arrays(tables);
    let out = client
        .query(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(out.iter().map(TableName::of).collect())
}

/// The same, of tables that keep their rows and what is known of them.
///
/// # Errors
/// When the replica refuses.
pub async fn leave_out(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS t SET state = 'pending', replica_oid = NULL, updated_at = now()
           FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
          WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state = 'ready'"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// Forgets tables whose copy was never finished and that are not to be copied any more; waiting
/// for them, the replica would never be complete.
///
/// # Errors
/// When the replica refuses.
pub async fn forget(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    if tables.is_empty() {
        return Ok(());
    }
    let sql = format!(
        "DELETE FROM {TABLE} AS r USING unnest($2::text[], $3::text[]) AS t(s, n)
         WHERE r.stream = $1 AND r.table_schema = t.s AND r.table_name = t.n
           AND r.state <> 'ready'"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(())
}

/// A table is called otherwise from here on.
///
/// # Errors
/// When the replica refuses.
pub async fn rename(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    from: &TableName,
    to: &TableName,
) -> Result<(), PgError> {
    let sql = format!(
        "WITH old AS (DELETE FROM {TABLE} WHERE stream = $1 AND table_schema = $2 AND table_name = $3 RETURNING *)
        INSERT INTO {TABLE} AS t (stream, table_schema, table_name, state, snapshot_lsn, listed_as, rows, bytes, replica_oid)
        SELECT stream, $4, $5, state, snapshot_lsn, listed_as, rows, bytes, replica_oid FROM old
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE
               SET state = excluded.state, snapshot_lsn = excluded.snapshot_lsn, listed_as = excluded.listed_as,
                   rows = excluded.rows, bytes = excluded.bytes, replica_oid = excluded.replica_oid, updated_at = now()"
    );
    let of_stream = stream.as_str();
    let names = [&from.schema, &from.name, &to.schema, &to.name];
    let [a, b, c, d] = names;
    client.execute(&sql, &[&of_stream, a, b, c, d]).await?;
    Ok(())
}

/// A table was dropped, at its place in the stream: no change of it can come any more.
///
/// # Errors
/// When the replica refuses.
pub async fn gone(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    table: &TableName,
) -> Result<(), PgError> {
    let sql =
        format!("DELETE FROM {TABLE} WHERE stream = $1 AND table_schema = $2 AND table_name = $3");
    client
        .execute(&sql, &[&stream.as_str(), &table.schema, &table.name])
        .await?;
    Ok(())
}

/// A table was created, empty, at its place in the stream, which brings all its changes.
///
/// # Errors
/// When the replica refuses.
pub async fn came(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    table: &TableName,
    listed_as: &ListedAs,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS t (stream, table_schema, table_name, state, listed_as, replica_oid)
        SELECT $1, $2, $3, 'ready', $4, to_regclass(format('%I.%I', $2::text, $3::text))::oid
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE
               SET state = 'ready', snapshot_lsn = NULL, listed_as = excluded.listed_as, rows = 0, bytes = 0,
                   replica_oid = excluded.replica_oid, updated_at = now()"
    );
    client
        .execute(
            &sql,
            &[
                &stream.as_str(),
                &table.schema,
                &table.name,
                &listed_as.as_str(),
            ],
        )
        .await?;
    Ok(())
}

/// A table is listed as something else from here on, and nothing of it was missed.
///
/// # Errors
/// When the replica refuses.
pub async fn relist(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    table: &TableName,
    listed_as: &ListedAs,
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} SET listed_as = $4
          WHERE stream = $1 AND table_schema = $2 AND table_name = $3 AND state = 'ready'"
    );
    let (of_stream, listed_as) = (stream.as_str(), listed_as.as_str());
    client
        .execute(&sql, &[&of_stream, &table.schema, &table.name, &listed_as])
        .await?;
    Ok(())
}

/// Whether a table is to be copied, or is being copied.
///
/// # Errors
/// When the replica refuses.
pub async fn is_unfinished(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    table: &TableName,
) -> Result<bool, PgError> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {TABLE}
                         WHERE stream = $1 AND table_schema = $2 AND table_name = $3 AND state <> 'ready')"
    );
    let row = client
        .query_one(&sql, &[&stream.as_str(), &table.schema, &table.name])
        .await?;
    Ok(row.get(0))
}

/// Whether a table is to be copied again into the one that is there, and nobody has begun with it.
///
/// # Errors
/// When the replica refuses.
pub async fn is_left_as_it_was(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    table: &TableName,
) -> Result<bool, PgError> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {TABLE} t
                         WHERE stream = $1 AND table_schema = $2 AND table_name = $3 AND state = 'pending' AND replica_oid IS NULL
                           AND {HAS_THE_NAME} IS NOT NULL)"
    );
    let row = client
        .query_one(&sql, &[&stream.as_str(), &table.schema, &table.name])
        .await?;
    Ok(row.get(0))
}

/// Tables that are copied beside the stream hold everything that committed before `end_lsn`: the stream brings the rest.
///
/// # Errors
/// When the replica refuses.
pub async fn join(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
    end_lsn: PgLsn,
) -> Result<(), PgError> {
    let sql = format!(
        "UPDATE {TABLE} AS t SET state = 'ready', snapshot_lsn = $4, updated_at = now(), replica_oid = {HAS_THE_NAME}
           FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
          WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state = 'copied'"
    );
    let (schemas, names) = TableName::arrays(tables);
    client
        .execute(&sql, &[&stream.as_str(), &schemas, &names, &end_lsn])
        .await?;
    Ok(())
}

/// Those of the tables that a copy has created and not finished, and that are still the ones it has created. Their rows stay locked
/// until the transaction ends.
///
/// # Errors
/// When the replica refuses.
pub async fn half_made(
    transaction: &(impl GenericClient + Sync),
    stream: &StreamName,
    tables: &[TableName],
) -> Result<Vec<TableName>, PgError> {
    // The copy notes the table in the transaction that creates it.
    let sql = format!(
        "SELECT n.nspname, c.relname
           FROM {TABLE} t
           JOIN unnest($2::text[], $3::text[]) AS wanted (s, n) ON s = t.table_schema AND wanted.n = t.table_name
           JOIN pg_class c ON c.oid = t.replica_oid AND c.relname = t.table_name
           JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = t.table_schema
          WHERE t.stream = $1 AND t.state <> 'ready'
            FOR UPDATE OF t"
    );
    let (schemas, names) = TableName::arrays(tables);
    let rows = transaction
        .query(&sql, &[&stream.as_str(), &schemas, &names])
        .await?;
    Ok(rows.iter().map(TableName::of).collect())
}
