//! Tables that appear while the stream runs: what there is to do on both sides, in single steps.
//!
//! The pipeline's task for late tables takes the steps ([`look`], [`catch_up_from_nothing`], [`super::make_room`], the
//! copy, [`joined`]); nothing here waits for the stream, and the stream waits for nothing here.
//!
//! # Invariants
//! - A table is `ready` only once its rows are as of a position that the stream has not passed.
//! - What is begun here and not finished is begun anew, and the progress of what catches up gives it away: a `copied` table may be
//!   half caught up with, and the stream has passed it by.

use std::collections::BTreeMap;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::aside::Aside;
use super::error::{SetupError, Side};
use super::source_side::SourceSide;
use super::{Published, replica, slot, table_sync};
use crate::catalog::Table;
use crate::catalog::routing;
use crate::config::Config;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError, PgLsn, leftover};
use crate::schema::listing::Listed;

/// What a look at the source has found.
#[derive(Debug)]
pub struct Found {
    /// Published, and not ready on the replica.
    pub tables: Vec<Table>,
    /// The same, where they cannot be copied from here.
    pub elsewhere: Vec<Aside>,
    /// Why nothing can be copied from here, if that is so.
    pub out_of_reach: Option<String>,
    /// What they are listed as, read before any snapshot of them.
    pub listed: Listed,
    /// What is not as it should be.
    pub warnings: Vec<String>,
}

/// Publishes what is new, mends what makes the source's own statements fail, and returns what is to be copied.
///
/// # Errors
/// [`SetupError`]
pub async fn look(
    config: &Config,
    database: &str,
    cancel: &CancellationToken,
) -> Result<Found, SetupError> {
    let mut source = SourceSide::open(config, database, cancel).await?;
    source.found.require_unaltered(&source.stream)?;
    source.leave_out_what_cannot_be_published();
    source.publish(false).await?;
    if source.found.forgets_publication_changes() {
        let mut walsender = source.walsender().await?;
        slot::make_the_list_known(&source, &mut walsender).await?;
    }
    let client = open(config, database, &source.stream).await?;
    let rows = table_sync::rows(&client, &source.stream).await?;
    let is_ready = |name: &TableName| rows.iter().any(|row| row.ready && row.table == *name);
    let tables = source.wanted.published;
    let tops = routing::tops(&source.client, tables.iter().map(|table| &table.name)).await;
    let tops = tops.map_err(|error| {
        SetupError::sql(Side::Source, "read the partitioned tables")(error.into())
    })?;
    let tables = missing(tables, &tops, is_ready)?;
    Ok(Found {
        tables,
        elsewhere: Vec::new(),
        out_of_reach: None,
        listed: source.found.listed,
        warnings: source.warnings,
    })
}

/// Splits tables into those that are there and the others. Partitions whose rows cannot be told from one another on the replica
/// are copied together: below one of the `tops` there may not be some of either.
pub(super) fn missing(
    tables: Vec<Table>,
    tops: &BTreeMap<TableName, TableName>,
    is_ready: impl Fn(&TableName) -> bool,
) -> Result<Vec<Table>, SetupError> {
    let mut together = routing::copied_together(tops, |name| !is_ready(name));
    match together.find(|name| is_ready(name)) {
        Some(table) => Err(SetupError::CopiedTogether(table.clone())),
        None => Ok(tables
            .into_iter()
            .filter(|table| !is_ready(&table.name))
            .collect()),
    }
}

/// The copied tables of which the source says that they are not those any more.
pub(super) fn listed_anew<'p>(
    published: &'p Published,
    rows: &[table_sync::Row],
) -> impl Iterator<Item = &'p TableName> {
    let is_anew = |table: &&Table| {
        let row = rows.iter().find(|row| row.ready && row.table == table.name);
        row.is_some_and(|row| {
            let now = published.listed.get(&table.name);
            !row.copied.is_of(table.oid) || !row.copied.is_listed_as(now)
        })
    };
    let anew = published.tables.iter().filter(is_anew);
    anew.map(|table| &table.name)
}

async fn open(config: &Config, database: &str, stream: &StreamName) -> Result<Client, SetupError> {
    replica::open(&config.replica.conninfo.with_dbname(database), stream).await
}

fn sql(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> SetupError {
    move |error| SetupError::sql(Side::Replica, doing)(PgError::from(error))
}

/// Ends what earlier attempts have left waiting on the source: it holds WAL.
///
/// # Errors
/// [`SetupError`]
pub async fn end_late_sessions(source: &ConnInfo, stream: &StreamName) -> Result<(), SetupError> {
    let client = super::source::open(source, stream).await?;
    leftover::end_sessions(&client, &stream.application_name("late"))
        .await
        .map(drop)
        .map_err(SetupError::sql(
            Side::Source,
            "end sessions of an earlier attempt",
        ))
}

/// Sets a table aside that was replicated so far, with those that are copied together with it. Their rows stay as they are until
/// they are copied again.
pub(super) async fn leave_out(
    client: &mut Client,
    stream: &StreamName,
    table: &TableName,
    reason: &str,
) -> Result<(), SetupError> {
    const PENDING: &str = "
        UPDATE dr_agent.table_sync SET state = 'pending', replica_oid = NULL, updated_at = now()
         WHERE stream = $1 AND table_schema = $2 AND table_name = $3 AND state = 'ready'";
    const NOTE: &str = "
        INSERT INTO dr_agent.set_aside AS a (stream, table_schema, table_name, reason) VALUES ($1, $2, $3, $4)
            ON CONFLICT (stream, table_schema, table_name) DO UPDATE SET reason = excluded.reason";
    let doing = sql("set a table aside");
    let transaction = client.transaction().await.map_err(&doing)?;
    let stream = stream.as_str();
    for TableName { schema, name } in &routing::beside(&transaction, table).await.map_err(&doing)? {
        transaction
            .execute(PENDING, &[&stream, schema, name])
            .await
            .map_err(&doing)?;
        transaction
            .execute(NOTE, &[&stream, schema, name, &reason])
            .await
            .map_err(&doing)?;
    }
    transaction.commit().await.map_err(&doing)
}

/// Begins the progress of what catches up, under this term.
///
/// # Errors
/// [`SetupError`]; DR001 after a promotion.
pub async fn catch_up_from_nothing(
    replica: &ConnInfo,
    stream: &StreamName,
    term: i64,
) -> Result<(), SetupError> {
    let doing = sql("begin to catch up with a copied table");
    let mut client = replica::open(replica, stream).await?;
    let transaction = client.transaction().await.map_err(&doing)?;
    hold(&transaction, stream, term).await.map_err(&doing)?;
    let late = stream.late();
    transaction
        .execute(
            "DELETE FROM dr_agent.progress WHERE stream = $1",
            &[&late.as_str()],
        )
        .await
        .map_err(&doing)?;
    transaction
        .execute(
            "INSERT INTO dr_agent.progress (stream, term, batch, end_lsn, applied_at) VALUES ($1, $2, 0, '0/0', now())",
            &[&late.as_str(), &term],
        )
        .await
        .map_err(&doing)?;
    transaction.commit().await.map_err(&doing)
}

/// The row is locked: a promotion waits, or comes first.
async fn hold(
    transaction: &tokio_postgres::Transaction<'_>,
    stream: &StreamName,
    term: i64,
) -> Result<(), tokio_postgres::Error> {
    transaction
        .execute(
            "SELECT dr_agent.hold($1, $2) FROM (SELECT 1 FROM dr_agent.progress WHERE stream = $1 FOR SHARE) AS row",
            &[&stream.as_str(), &term],
        )
        .await?;
    Ok(())
}

/// The tables hold everything that committed before `end_lsn`, which the stream has not passed: it brings the rest. Constraints
/// that wait for the snapshot of their copy wait for this position.
///
/// # Errors
/// [`SetupError`]; DR001 after a promotion.
pub async fn joined(
    replica: &ConnInfo,
    stream: &StreamName,
    term: i64,
    tables: &[TableName],
    (snapshot_lsn, end_lsn): (PgLsn, PgLsn),
) -> Result<(), SetupError> {
    const READY: &str = "
        UPDATE dr_agent.table_sync AS t SET state = 'ready', snapshot_lsn = $4, updated_at = now(),
               replica_oid = to_regclass(format('%I.%I', t.table_schema, t.table_name))
          FROM unnest($2::text[], $3::text[]) AS wanted (s, n)
         WHERE t.stream = $1 AND t.table_schema = s AND t.table_name = n AND t.state = 'copied'";
    const NOT_ASIDE: &str = "
        DELETE FROM dr_agent.set_aside AS a USING unnest($2::text[], $3::text[]) AS wanted (s, n)
         WHERE a.stream = $1 AND a.table_schema = s AND a.table_name = n";
    let doing = sql("take in copied tables");
    let mut client = replica::open(replica, stream).await?;
    let transaction = client.transaction().await.map_err(&doing)?;
    hold(&transaction, stream, term).await.map_err(&doing)?;
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .iter()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip();
    transaction
        .execute(READY, &[&stream.as_str(), &schemas, &names, &end_lsn])
        .await
        .map_err(&doing)?;
    transaction
        .execute(
            "UPDATE dr_agent.deferred SET after_lsn = $3 WHERE stream = $1 AND after_lsn = $2",
            &[&stream.as_str(), &snapshot_lsn, &end_lsn],
        )
        .await
        .map_err(&doing)?;
    transaction
        .execute(
            "DELETE FROM dr_agent.progress WHERE stream = $1",
            &[&stream.late().as_str()],
        )
        .await
        .map_err(&doing)?;
    transaction
        .execute(NOT_ASIDE, &[&stream.as_str(), &schemas, &names])
        .await
        .map_err(&doing)?;
    transaction.commit().await.map_err(&doing)
}
