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

use super::error::{SetupError, Side};
use super::source_side::SourceSide;
use super::{Published, replica, slot, under_way};
use crate::catalog::Table;
use crate::catalog::routing;
use crate::config::Config;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError, PgLsn, leftover};
use crate::schema::listing::Listed;
use crate::schema::set_aside::{self, Aside, Noted};
use crate::schema::table_sync::TableSync;
use crate::schema::{deferred, progress, table_sync};

/// What a look at the source has found.
#[derive(Debug)]
pub struct Found {
    /// Published, and not ready on the replica.
    pub tables: Vec<Table>,
    /// The stream has not reached every command of the source: tables that it may bring are not among them.
    pub under_way: bool,
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
    let rows = replica::synced_tables(&client, &source.stream).await?;
    let is_ready = |name: &TableName| rows.iter().any(|row| row.ready && row.table == *name);
    let tables = source.wanted.published;
    let tops = routing::tops(&source.client, tables.iter().map(|table| &table.name)).await;
    let tops = tops.map_err(|error| {
        SetupError::sql(Side::Source, "read the partitioned tables")(error.into())
    })?;
    let mut tables = missing(tables, &tops, is_ready)?;
    let under_way = under_way::any(&source.client, &client).await?;
    if under_way {
        tables.retain(|table| rows.iter().any(|row| row.table == table.name));
    }
    Ok(Found {
        tables,
        under_way,
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
    rows: &[TableSync],
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
    let out = take_out(client, stream, table, reason).await;
    out.map_err(SetupError::sql(Side::Replica, "set a table aside"))
}

async fn take_out(
    client: &mut Client,
    stream: &StreamName,
    table: &TableName,
    reason: &str,
) -> Result<(), PgError> {
    let transaction = client.transaction().await?;
    let tables = routing::beside(&transaction, table).await?;
    table_sync::leave_out(&transaction, stream, &tables).await?;
    let aside: Vec<Aside> = tables
        .into_iter()
        .map(|table| Aside {
            table,
            reason: reason.to_owned(),
        })
        .collect();
    set_aside::note(&transaction, stream, &aside, Noted::Beside).await?;
    Ok(transaction.commit().await?)
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
    let mut client = replica::open(replica, stream).await?;
    let begun = begin_to_catch_up(&mut client, stream, term).await;
    begun.map_err(SetupError::sql(
        Side::Replica,
        "begin to catch up with a copied table",
    ))
}

async fn begin_to_catch_up(
    client: &mut Client,
    stream: &StreamName,
    term: i64,
) -> Result<(), PgError> {
    let transaction = client.transaction().await?;
    // A promotion waits, or comes first.
    progress::hold(&transaction, stream, term).await?;
    let late = stream.late();
    progress::end(&transaction, &late).await?;
    progress::begin(&transaction, &late, term, (PgLsn::from(0), None)).await?;
    Ok(transaction.commit().await?)
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
    let mut client = replica::open(replica, stream).await?;
    let joined = take_in(&mut client, stream, term, tables, (snapshot_lsn, end_lsn)).await;
    joined.map_err(SetupError::sql(Side::Replica, "take in copied tables"))
}

async fn take_in(
    client: &mut Client,
    stream: &StreamName,
    term: i64,
    tables: &[TableName],
    (snapshot_lsn, end_lsn): (PgLsn, PgLsn),
) -> Result<(), PgError> {
    let transaction = client.transaction().await?;
    progress::hold(&transaction, stream, term).await?;
    table_sync::join(&transaction, stream, tables, end_lsn).await?;
    deferred::put_off(&transaction, stream, (snapshot_lsn, end_lsn)).await?;
    progress::end(&transaction, &stream.late()).await?;
    set_aside::forget(&transaction, stream, tables).await?;
    Ok(transaction.commit().await?)
}
