//! One table's trouble, on the replica: which tables are set aside, and what is done before and after they are copied again.
//!
//! ```text
//! refused ─▶ table_sync 'pending', set_aside with the reason ─▶ a snapshot is there ─▶ kept and filled anew, or dropped and created
//!                                                             └─▶ the copy failed ─▶ what it created and did not finish goes
//! ```
//!
//! # Invariants
//! - A table is taken out of what is applied and noted with its reason in one transaction, and not on a promoted replica. Only one
//!   that was applied can be: the same table cannot be set aside twice without having been copied in between.
//! - What the replica has of a table stays until a copy of it is under way.
//! - Only a table that our own copy created and never finished is removed without another one in its place.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Transaction};

use super::error::{SetupError, Side};
use super::{replica, table_sync};
use crate::catalog::Table;
use crate::failpoint;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::quote::quote_ident;
use crate::pg::{ConnInfo, PgError, PgLsn};

/// A table that is not protected for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// Which.
    pub table: TableName,
    /// Why.
    pub reason: String,
}

/// The reason while nothing is wrong.
pub const BEING_COPIED: &str = "is being copied";

/// A lock that somebody holds on a table of ours is not waited for without an end.
const BOUNDED: &str = "SET LOCAL lock_timeout = '10s'";

fn sql(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> SetupError {
    move |error| SetupError::sql(Side::Replica, doing)(PgError::from(error))
}

fn split(tables: &[TableName]) -> (Vec<&str>, Vec<&str>) {
    tables
        .iter()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip()
}

/// Sets tables aside, for a reason, and returns those that were: each was applied until now. None where a right is missing of every
/// other table as well (`of_a_right`), or the replica was promoted.
///
/// # Errors
/// [`SetupError`]
pub async fn set_aside(
    replica: &ConnInfo,
    stream: &StreamName,
    tables: &[TableName],
    reason: &str,
    of_a_right: bool,
) -> Result<Vec<TableName>, SetupError> {
    const PROMOTED: &str = "
        SELECT EXISTS (SELECT 1 FROM dr_agent.promotion WHERE stream = $1)
          FROM (SELECT 1 FROM dr_agent.progress WHERE stream = $1 FOR SHARE) AS row";
    const OTHERS_CAN: &str = "
        SELECT EXISTS (SELECT 1 FROM dr_agent.table_sync AS t
                        WHERE stream = $1 AND state = 'ready' AND table_schema <> 'dr_agent'
                          AND NOT EXISTS (SELECT 1 FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
                                           WHERE s = t.table_schema AND n = t.table_name)
                          AND has_table_privilege(to_regclass(format('%I.%I', table_schema, table_name))::oid, 'INSERT'))";
    const OUT: &str = "
        UPDATE dr_agent.table_sync AS t
           SET state = 'pending', snapshot_lsn = NULL, listed_as = NULL, replica_oid = NULL, rows = 0, bytes = 0, updated_at = now()
          FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
         WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state = 'ready'
        RETURNING t.table_schema, t.table_name";
    const NOTE: &str = "
        INSERT INTO dr_agent.set_aside AS a (stream, table_schema, table_name, reason)
        SELECT $1, s, n, $4 FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET reason = excluded.reason, since = now()";
    let doing = sql("set a table aside");
    let mut client = replica::open(replica, stream).await?;
    let transaction = client.transaction().await.map_err(&doing)?;
    transaction.batch_execute(BOUNDED).await.map_err(&doing)?;
    let promoted = transaction.query_opt(PROMOTED, &[&stream.as_str()]).await;
    let promoted = promoted.map_err(&doing)?;
    if promoted.is_none_or(|row| row.get(0)) {
        return Ok(Vec::new());
    }
    let (schemas, names) = split(tables);
    if of_a_right {
        let row = transaction
            .query_one(OTHERS_CAN, &[&stream.as_str(), &schemas, &names])
            .await
            .map_err(&doing)?;
        if !row.get::<_, bool>(0) {
            return Ok(Vec::new());
        }
    }
    let out: Vec<TableName> = transaction
        .query(OUT, &[&stream.as_str(), &schemas, &names])
        .await
        .map_err(&doing)?
        .iter()
        .map(|row| TableName {
            schema: row.get(0),
            name: row.get(1),
        })
        .collect();
    let (schemas, names) = split(&out);
    transaction
        .execute(NOTE, &[&stream.as_str(), &schemas, &names, &reason])
        .await
        .map_err(&doing)?;
    transaction.commit().await.map_err(&doing)?;
    failpoint::hit("aside:noted");
    Ok(out)
}

/// What becomes of what was noted before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// It goes.
    Alone,
    /// It stays.
    Beside,
}

/// Notes on the replica which tables are not protected for now: a promotion goes on without them.
///
/// # Errors
/// [`SetupError`]
pub async fn note_aside(
    replica: &ConnInfo,
    stream: &StreamName,
    aside: &[Aside],
    noted: Noted,
) -> Result<(), SetupError> {
    const NOTE: &str = "
        WITH wanted (s, n, r) AS (SELECT * FROM unnest($2::text[], $3::text[], $4::text[])),
        gone AS (
            DELETE FROM dr_agent.set_aside AS a WHERE stream = $1 AND $5
               AND NOT EXISTS (SELECT 1 FROM wanted WHERE s = a.table_schema AND n = a.table_name))
        INSERT INTO dr_agent.set_aside AS a (stream, table_schema, table_name, reason)
        SELECT $1, s, n, r FROM wanted
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET reason = excluded.reason
         WHERE a.reason <> excluded.reason";
    let client = replica::open(replica, stream).await?;
    let of = |text: fn(&Aside) -> &str| aside.iter().map(text).collect::<Vec<&str>>();
    let (schemas, names) = (of(|one| &one.table.schema), of(|one| &one.table.name));
    client
        .execute(
            NOTE,
            &[
                &stream.as_str(),
                &schemas,
                &names,
                &of(|one| &one.reason),
                &(noted == Noted::Alone),
            ],
        )
        .await
        .map_err(sql("note which tables are set aside"))?;
    Ok(())
}

/// The tables that something is wrong with, as noted last.
///
/// # Errors
/// [`SetupError`]
pub async fn noted_aside(
    replica: &ConnInfo,
    stream: &StreamName,
) -> Result<Vec<Aside>, SetupError> {
    let client = replica::open(replica, stream).await?;
    noted(&client, stream).await
}

/// The same, in a session that is there.
pub(super) async fn noted(client: &Client, stream: &StreamName) -> Result<Vec<Aside>, SetupError> {
    const SQL: &str = "
        SELECT table_schema, table_name, reason FROM dr_agent.set_aside AS a
         WHERE stream = $1 AND reason <> $2
           AND NOT EXISTS (SELECT 1 FROM dr_agent.table_sync AS t
                            WHERE t.stream = a.stream AND t.table_schema = a.table_schema AND t.table_name = a.table_name
                              AND t.state = 'ready')
         ORDER BY 1, 2";
    let of_stream = (&stream.as_str() as &(dyn ToSql + Sync), Type::TEXT);
    let rows = client
        .query_typed(SQL, &[of_stream, (&BEING_COPIED, Type::TEXT)])
        .await
        .map_err(sql("read which tables are set aside"))?;
    Ok(rows
        .iter()
        .map(|row| Aside {
            table: TableName {
                schema: row.get(0),
                name: row.get(1),
            },
            reason: row.get(2),
        })
        .collect())
}

/// Enters tables that are about to be copied at this snapshot. Those to be created anew, and those that are another than was
/// copied, are dropped, unless something else than a foreign key depends on them; the foreign keys come back behind the copy.
///
/// # Errors
/// [`SetupError`]
pub async fn make_room(
    replica: &ConnInfo,
    stream: &StreamName,
    tables: &[Table],
    is_rebuilt: impl Fn(&TableName) -> bool,
    snapshot_lsn: PgLsn,
) -> Result<(), SetupError> {
    const ENTER: &str = "
        INSERT INTO dr_agent.table_sync AS t (stream, table_schema, table_name, state)
        SELECT $1, s, n, 'pending' FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE
               SET state = 'pending', snapshot_lsn = NULL, listed_as = NULL, replica_oid = NULL, rows = 0, bytes = 0,
                   updated_at = now()";
    let doing = sql("make room for tables that are copied again");
    let mut client = replica::open(replica, stream).await?;
    let rows = table_sync::rows(&client, stream).await?;
    let is_another = |table: &Table| {
        let row = rows.iter().find(|row| row.table == table.name);
        row.is_some_and(|row| row.another || !row.copied.is_of(table.oid))
    };
    let mut transaction = client.transaction().await.map_err(&doing)?;
    transaction.batch_execute(BOUNDED).await.map_err(&doing)?;
    for table in tables {
        if is_rebuilt(&table.name) || is_another(table) {
            drop_table(&mut transaction, stream, &table.name, snapshot_lsn)
                .await
                .map_err(&doing)?;
        }
    }
    let names: Vec<TableName> = tables.iter().map(|table| table.name.clone()).collect();
    let (schemas, names) = split(&names);
    transaction
        .execute(ENTER, &[&stream.as_str(), &schemas, &names])
        .await
        .map_err(&doing)?;
    transaction.commit().await.map_err(&doing)
}

/// Drops one, if nothing but foreign keys depends on it.
async fn drop_table(
    transaction: &mut Transaction<'_>,
    stream: &StreamName,
    table: &TableName,
    snapshot_lsn: PgLsn,
) -> Result<(), tokio_postgres::Error> {
    const KEYS: &str = "
        SELECT format('foreign key %s of %s.%s', f.conname, n.nspname, c.relname),
               format('ALTER TABLE %I.%I DROP CONSTRAINT %I', n.nspname, c.relname, f.conname),
               format('ALTER TABLE %I.%I ADD CONSTRAINT %I %s', n.nspname, c.relname, f.conname, pg_get_constraintdef(f.oid))
          FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE f.contype = 'f' AND f.confrelid = to_regclass($1) AND f.conrelid <> f.confrelid AND f.conparentid = 0";
    const KEEP: &str = "
        INSERT INTO dr_agent.deferred (stream, what, statement, after_lsn) VALUES ($1, $2, $3, $4)
            ON CONFLICT (stream, what) DO UPDATE SET statement = excluded.statement, after_lsn = excluded.after_lsn";
    let attempt = transaction.savepoint("drop_table").await?;
    let dropping = async {
        for key in attempt.query(KEYS, &[&table.sql()]).await? {
            let (what, remove, add): (&str, &str, &str) = (key.get(0), key.get(1), key.get(2));
            attempt.batch_execute(remove).await?;
            attempt
                .execute(KEEP, &[&stream.as_str(), &what, &add, &snapshot_lsn])
                .await?;
        }
        let drop = format!("DROP TABLE IF EXISTS {}", table.sql());
        attempt.batch_execute(&drop).await
    };
    match dropping.await {
        Ok(()) => attempt.commit().await,
        // It stays; the copy says what of it is not as on the source.
        Err(error) if stays(&error) => attempt.rollback().await,
        Err(error) => Err(error),
    }
}

/// Whether the server will not have a table dropped: others depend on it, it is somebody else's, it is no table.
fn stays(error: &tokio_postgres::Error) -> bool {
    let refusals = [
        SqlState::DEPENDENT_OBJECTS_STILL_EXIST,
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::WRONG_OBJECT_TYPE,
        SqlState::FOREIGN_KEY_VIOLATION,
        SqlState::UNDEFINED_TABLE,
    ];
    error.code().is_some_and(|code| refusals.contains(code))
}

/// Removes what a copy created and did not finish: in its place the operator's own table under that name could not be put back.
///
/// # Errors
/// [`SetupError`]
pub async fn remove_half_made(
    replica: &ConnInfo,
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), SetupError> {
    // The copy notes the table in the transaction that creates it.
    const OURS: &str = "
        SELECT n.nspname, c.relname
          FROM dr_agent.table_sync t
          JOIN unnest($2::text[], $3::text[]) AS wanted (s, n) ON s = t.table_schema AND wanted.n = t.table_name
          JOIN pg_class c ON c.oid = t.replica_oid AND c.relname = t.table_name
          JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = t.table_schema
         WHERE t.stream = $1 AND t.state <> 'ready'
           FOR UPDATE OF t";
    let doing = sql("remove a table whose copy was not finished");
    let mut client: Client = replica::open(replica, stream).await?;
    let mut transaction = client.transaction().await.map_err(&doing)?;
    transaction.batch_execute(BOUNDED).await.map_err(&doing)?;
    let (schemas, names) = split(tables);
    let ours = transaction
        .query(OURS, &[&stream.as_str(), &schemas, &names])
        .await
        .map_err(&doing)?;
    for row in &ours {
        let (schema, name): (&str, &str) = (row.get(0), row.get(1));
        let attempt = transaction.savepoint("half_made").await.map_err(&doing)?;
        let drop = format!("DROP TABLE {}.{}", quote_ident(schema), quote_ident(name));
        match attempt.batch_execute(&drop).await {
            Ok(()) => attempt.commit().await.map_err(&doing)?,
            Err(error) if stays(&error) => attempt.rollback().await.map_err(&doing)?,
            Err(error) => return Err(doing(error)),
        }
    }
    transaction.commit().await.map_err(&doing)
}
