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
use tokio_postgres::{Client, Transaction};

use super::error::{SetupError, Side};
use super::replica;
use crate::catalog::Table;
use crate::failpoint;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError, PgLsn};
use crate::schema::set_aside::{self, Aside, BEING_COPIED, Noted};
use crate::schema::{deferred, progress, promotion, table_sync};

/// A lock that somebody holds on a table of ours is not waited for without an end.
const BOUNDED: &str = "SET LOCAL lock_timeout = '10s'";

fn failed(doing: &'static str) -> impl FnOnce(PgError) -> SetupError {
    SetupError::sql(Side::Replica, doing)
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
    let mut client = replica::open(replica, stream).await?;
    let out = take_out(&mut client, stream, tables, (reason, of_a_right)).await;
    let out = out.map_err(failed("set a table aside"))?;
    failpoint::hit("aside:noted");
    Ok(out)
}

async fn take_out(
    client: &mut Client,
    stream: &StreamName,
    tables: &[TableName],
    (reason, of_a_right): (&str, bool),
) -> Result<Vec<TableName>, PgError> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(BOUNDED).await?;
    let may_go = takes_writes(&transaction, stream).await?
        && (!of_a_right || table_sync::may_write_to_others(&transaction, stream, tables).await?);
    if !may_go {
        return Ok(Vec::new());
    }
    let out = table_sync::take_out(&transaction, stream, tables).await?;
    let noted: Vec<Aside> = out
        .iter()
        .map(|table| Aside {
            table: table.clone(),
            reason: reason.to_owned(),
        })
        .collect();
    set_aside::note(&transaction, stream, &noted, Noted::Beside).await?;
    transaction.commit().await?;
    Ok(out)
}

/// Whether the stream is applied here, and this database was not promoted. The progress row stays locked.
async fn takes_writes(transaction: &Transaction<'_>, stream: &StreamName) -> Result<bool, PgError> {
    if !progress::lock(transaction, stream).await? {
        return Ok(false);
    }
    Ok(promotion::read(transaction, stream).await?.is_none())
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
    let client = replica::open(replica, stream).await?;
    set_aside::note(&client, stream, aside, noted)
        .await
        .map_err(SetupError::sql(
            Side::Replica,
            "note which tables are set aside",
        ))?;
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
    let mut aside = set_aside::read(client, stream)
        .await
        .map_err(SetupError::sql(
            Side::Replica,
            "read which tables are set aside",
        ))?;
    aside.retain(|one| one.reason != BEING_COPIED);
    Ok(aside)
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
    let mut client = replica::open(replica, stream).await?;
    let rows = replica::synced_tables(&client, stream).await?;
    let is_another = |table: &Table| {
        let row = rows.iter().find(|row| row.table == table.name);
        row.is_some_and(|row| row.another || !row.copied.is_of(table.oid))
    };
    let names = |of: &dyn Fn(&Table) -> bool| -> Vec<TableName> {
        let tables = tables.iter().filter(|table| of(table));
        tables.map(|table| table.name.clone()).collect()
    };
    let dropped = names(&|table| is_rebuilt(&table.name) || is_another(table));
    enter(
        &mut client,
        stream,
        &names(&|_| true),
        &dropped,
        snapshot_lsn,
    )
    .await
    .map_err(failed("make room for tables that are copied again"))
}

async fn enter(
    client: &mut Client,
    stream: &StreamName,
    tables: &[TableName],
    dropped: &[TableName],
    snapshot_lsn: PgLsn,
) -> Result<(), PgError> {
    let mut transaction = client.transaction().await?;
    transaction.batch_execute(BOUNDED).await?;
    for table in dropped {
        drop_table(&mut transaction, stream, table, snapshot_lsn).await?;
    }
    table_sync::enter(&transaction, stream, tables).await?;
    Ok(transaction.commit().await?)
}

/// Drops one, if nothing but foreign keys depends on it.
async fn drop_table(
    transaction: &mut Transaction<'_>,
    stream: &StreamName,
    table: &TableName,
    snapshot_lsn: PgLsn,
) -> Result<(), PgError> {
    const KEYS: &str = "
        SELECT format('foreign key %s of %s.%s', f.conname, n.nspname, c.relname),
               format('ALTER TABLE %I.%I DROP CONSTRAINT %I', n.nspname, c.relname, f.conname),
               format('ALTER TABLE %I.%I ADD CONSTRAINT %I %s', n.nspname, c.relname, f.conname, pg_get_constraintdef(f.oid))
          FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE f.contype = 'f' AND f.confrelid = to_regclass($1) AND f.conrelid <> f.confrelid AND f.conparentid = 0";
    let attempt = transaction.savepoint("drop_table").await?;
    let dropping = async {
        for key in attempt.query(KEYS, &[&table.sql()]).await? {
            let (what, remove, add): (&str, &str, &str) = (key.get(0), key.get(1), key.get(2));
            attempt.batch_execute(remove).await?;
            deferred::keep(&attempt, stream, (what, add), snapshot_lsn).await?;
        }
        let drop = format!("DROP TABLE IF EXISTS {}", table.sql());
        attempt.batch_execute(&drop).await.map_err(PgError::from)
    };
    match dropping.await {
        Ok(()) => Ok(attempt.commit().await?),
        // It stays; the copy says what of it is not as on the source.
        Err(error) if stays(&error) => Ok(attempt.rollback().await?),
        Err(error) => Err(error),
    }
}

/// What keeps a table of the replica from being dropped, beside foreign keys: views, functions and other tables, at most five.
///
/// # Errors
/// [`SetupError`]
pub async fn held_by(
    replica: &ConnInfo,
    stream: &StreamName,
    table: &TableName,
) -> Result<Vec<String>, SetupError> {
    const HOLDERS: &str = "
        WITH t (oid, type, types) AS (
            SELECT c.oid, c.reltype, y.typarray FROM pg_class c JOIN pg_type y ON y.oid = c.reltype WHERE c.oid = to_regclass($1))
        SELECT DISTINCT CASE WHEN v.oid IS NULL THEN pg_describe_object(d.classid, d.objid, 0)
                             ELSE CASE v.relkind WHEN 'm' THEN 'materialized view ' ELSE 'view ' END
                                  || quote_ident(n.nspname) || '.' || quote_ident(v.relname) END
          FROM t
          JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
                              OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.type, t.types)
          LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
          LEFT JOIN pg_class v ON v.oid = r.ev_class
          LEFT JOIN pg_namespace n ON n.oid = v.relnamespace
         WHERE d.deptype = 'n' AND d.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass, 'pg_class'::regclass)
           AND d.objid <> t.oid AND v.oid IS DISTINCT FROM t.oid
         ORDER BY 1 LIMIT 5";
    let client = replica::open(replica, stream).await?;
    let rows = client.query(HOLDERS, &[&table.sql()]).await;
    let looking = "look up what depends on a table";
    let rows = rows.map_err(|error| SetupError::sql(Side::Replica, looking)(error.into()))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Whether the server will not have a table dropped: others depend on it, it is somebody else's, it is no table.
fn stays(error: &PgError) -> bool {
    let refusals = [
        SqlState::DEPENDENT_OBJECTS_STILL_EXIST,
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::WRONG_OBJECT_TYPE,
        SqlState::FOREIGN_KEY_VIOLATION,
        SqlState::UNDEFINED_TABLE,
    ];
    let is = |state| refusals.iter().any(|refusal| refusal.code() == state);
    error.sqlstate().is_some_and(is)
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
    let mut client = replica::open(replica, stream).await?;
    let removed = drop_half_made(&mut client, stream, tables).await;
    removed.map_err(failed("remove a table whose copy was not finished"))
}

async fn drop_half_made(
    client: &mut Client,
    stream: &StreamName,
    tables: &[TableName],
) -> Result<(), PgError> {
    let mut transaction = client.transaction().await?;
    transaction.batch_execute(BOUNDED).await?;
    for table in table_sync::half_made(&transaction, stream, tables).await? {
        let attempt = transaction.savepoint("half_made").await?;
        let drop = format!("DROP TABLE {}", table.sql());
        match attempt.batch_execute(&drop).await.map_err(PgError::from) {
            Ok(()) => attempt.commit().await?,
            Err(error) if stays(&error) => attempt.rollback().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(transaction.commit().await?)
}
