//! The database that is built: what it must be, and what it remembers of a restore that was killed.
//!
//! While a restore runs the database has schema `dr_agent`, as a replica has: the progress row makes every batch
//! count once, and a restore that is started again goes on from it. At the end the schema goes.
//!
//! # Invariants
//! - Nothing is written to a database that holds anything of unknown origin.
//! - What a killed restore left prepared is committed or rolled back before the progress row is read.
//! - The progress row comes after all of the base backup, in the transaction that records its tables. Without it
//!   there is nothing to go on from.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use tokio_postgres::Client;

use super::RestoreError;
use crate::catalog::TableName;
use crate::history::History;
use crate::lag::{Micros, pg_micros, system_time};
use crate::listed::{Copied, ListedAs};
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session, leftover};
use crate::prepared;
use crate::setup::replica_schema;
use crate::stream::StreamName;

/// What a target is found to be.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing is in it.
    Empty,
    /// A restore that was interrupted behind its base backup.
    Interrupted(Position),
}

/// Tables, and what they were listed as where that is known.
pub(super) type Tables = BTreeMap<TableName, Option<ListedAs>>;

/// How far a target is.
#[derive(Clone, Debug)]
pub(super) struct Position {
    /// Where its base backup stands.
    pub(super) base: PgLsn,
    /// The end of the last transaction in it.
    pub(super) end_lsn: PgLsn,
    /// When that committed on the source; none if nothing came after the base backup yet.
    pub(super) commit_time: Option<Micros>,
    /// Number of the last batch.
    pub(super) batch: i64,
    /// Whether all tables were asked for.
    pub(super) whole: bool,
    /// The tables of the base backup that were restored, and what they were listed as.
    pub(super) tables: Tables,
}

/// The term of a restore's progress row: there is nobody to fence.
pub(super) const TERM: i64 = 1;

/// Opens a session on the target.
///
/// # Errors
/// When it cannot be reached.
pub(super) async fn open(conninfo: &ConnInfo, stream: &StreamName) -> Result<Client, RestoreError> {
    let session = Session::new(stream.application_name("restoring"))
        .set("statement_timeout", "0")
        .set("default_transaction_read_only", "off")
        .set("client_min_messages", "warning");
    pg::connect(conninfo, &session)
        .await
        .map_err(RestoreError::target("connect"))
}

/// Looks what is there; refuses what this stream's restore has not made.
///
/// # Errors
/// [`RestoreError::NotEmpty`], [`RestoreError::HalfLoaded`], [`RestoreError::Busy`]
pub(super) async fn find(
    client: &Client,
    database: &str,
    stream: &StreamName,
    history: History,
) -> Result<Found, RestoreError> {
    let sql =
        |error: tokio_postgres::Error| RestoreError::target("look at the target")(error.into());
    // One restore at a time; the lock is the session's.
    let locked: bool = client
        .query_one(
            "SELECT pg_try_advisory_lock(hashtextextended('dr_agent:' || $1::text, 0))",
            &[&stream.as_str()],
        )
        .await
        .map_err(sql)?
        .get(0);
    if !locked {
        return Err(RestoreError::Busy);
    }
    const OBJECTS: &str = "
        SELECT n.nspname || '.' || c.relname
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
           AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
           AND NOT EXISTS (SELECT 1 FROM pg_depend d
                            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                              AND d.deptype = 'e')
         ORDER BY 1 LIMIT 10";
    let objects: Vec<String> = client
        .query(OBJECTS, &[])
        .await
        .map_err(sql)?
        .iter()
        .map(|row| row.get(0))
        .collect();
    if objects.is_empty() {
        return Ok(Found::Empty);
    }
    const IS_OURS: &str = "SELECT to_regclass('dr_agent.progress') IS NOT NULL
                              AND to_regclass('dr_agent.table_sync') IS NOT NULL";
    let ours: bool = client.query_one(IS_OURS, &[]).await.map_err(sql)?.get(0);
    if !ours {
        return Err(RestoreError::NotEmpty { objects });
    }
    settle(client, stream).await?;
    const POSITION: &str = "
        SELECT p.end_lsn, p.batch, r.snapshot_lsn, p.commit_time,
               EXISTS (SELECT 1 FROM dr_agent.schema_sync y WHERE y.stream = p.stream)
          FROM dr_agent.progress p
          JOIN dr_agent.stream s USING (stream)
          JOIN LATERAL (SELECT snapshot_lsn FROM dr_agent.table_sync t WHERE t.stream = p.stream LIMIT 1) r ON true
         WHERE p.stream = $1 AND s.system_identifier = $2 AND s.began = $3";
    let row = client
        .query_opt(
            POSITION,
            &[
                &stream.as_str(),
                &history.system_identifier.to_string(),
                &system_time(history.began),
            ],
        )
        .await
        .map_err(sql)?;
    let Some(row) = row else {
        // A replica names its stream before its first table is copied; here the base backup comes first.
        const NOBODYS: &str = "SELECT NOT EXISTS (SELECT 1 FROM dr_agent.stream)
                                  AND NOT EXISTS (SELECT 1 FROM dr_agent.table_sync)";
        let nobodys: bool = client.query_one(NOBODYS, &[]).await.map_err(sql)?.get(0);
        return Err(match nobodys {
            true => RestoreError::HalfLoaded {
                database: database.to_owned(),
            },
            false => RestoreError::NotEmpty { objects },
        });
    };
    let tables = client
        .query(
            "SELECT table_schema, table_name, listed_as FROM dr_agent.table_sync WHERE stream = $1",
            &[&stream.as_str()],
        )
        .await
        .map_err(sql)?;
    Ok(Found::Interrupted(Position {
        end_lsn: row.get(0),
        batch: row.get(1),
        base: row.get(2),
        commit_time: row.get::<_, Option<SystemTime>>(3).map(pg_micros),
        whole: row.get(4),
        tables: tables
            .iter()
            .map(|row| {
                let table = TableName {
                    schema: row.get(0),
                    name: row.get(1),
                };
                (table, row.get::<_, Option<String>>(2).map(ListedAs::new))
            })
            .collect(),
    }))
}

/// Ends the sessions that a killed restore left, and settles its lanes, as a start of the agent does.
async fn settle(client: &Client, stream: &StreamName) -> Result<(), RestoreError> {
    leftover::end_sessions(client, &stream.application_name("apply"))
        .await
        .map_err(RestoreError::target(
            "end the sessions of an earlier restore",
        ))?;
    const BATCH: &str = "SELECT batch FROM dr_agent.progress WHERE stream = $1";
    let batch = client
        .query_opt(BATCH, &[&stream.as_str()])
        .await
        .map_err(|error| RestoreError::target("read the progress row")(error.into()))?;
    if let Some(batch) = batch {
        prepared::settle(client, stream, batch.get(0))
            .await
            .map_err(RestoreError::target("settle prepared transactions"))?;
    }
    Ok(())
}

/// Creates schema `dr_agent`, for the time of the restore.
///
/// # Errors
/// When the role may not.
pub(super) async fn prepare(client: &Client) -> Result<(), RestoreError> {
    client
        .batch_execute(replica_schema())
        .await
        .map_err(|error| RestoreError::target("create schema dr_agent")(error.into()))
}

/// Records that the base backup is there.
///
/// # Errors
/// When the target refuses.
pub(super) async fn loaded(
    client: &mut Client,
    stream: &StreamName,
    history: History,
    base: PgLsn,
    tables: Tables,
    whole: bool,
) -> Result<Position, RestoreError> {
    let sql =
        |error: tokio_postgres::Error| RestoreError::target("record the base backup")(error.into());
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .keys()
        .map(|table| (table.schema.as_str(), table.name.as_str()))
        .unzip();
    let listed_as: Vec<Option<&str>> = tables
        .values()
        .map(|listed_as| listed_as.as_ref().map(ListedAs::as_str))
        .collect();
    let transaction = client.transaction().await.map_err(sql)?;
    transaction
        .execute(
            "INSERT INTO dr_agent.stream (stream, system_identifier, timeline, began) VALUES ($1, $2, 0, $3)",
            &[
                &stream.as_str(),
                &history.system_identifier.to_string(),
                &system_time(history.began),
            ],
        )
        .await
        .map_err(sql)?;
    transaction
        .execute(
            "INSERT INTO dr_agent.table_sync (stream, table_schema, table_name, state, snapshot_lsn, listed_as)
             SELECT $1, t.s, t.n, 'ready', $5, t.l FROM unnest($2::text[], $3::text[], $4::text[]) AS t(s, n, l)",
            &[&stream.as_str(), &schemas, &names, &listed_as, &base],
        )
        .await
        .map_err(sql)?;
    transaction
        .execute(
            "INSERT INTO dr_agent.progress (stream, term, batch, end_lsn, applied_at) VALUES ($1, $2, 0, $3, now())",
            &[&stream.as_str(), &TERM, &base],
        )
        .await
        .map_err(sql)?;
    if whole {
        transaction
            .execute(
                "INSERT INTO dr_agent.schema_sync (stream) VALUES ($1)",
                &[&stream.as_str()],
            )
            .await
            .map_err(sql)?;
    }
    transaction.commit().await.map_err(sql)?;
    Ok(Position {
        base,
        end_lsn: base,
        commit_time: None,
        batch: 0,
        whole,
        tables,
    })
}

/// Removes what only the restore needed.
///
/// # Errors
/// When the target refuses.
pub(super) async fn finish(client: &Client) -> Result<(), RestoreError> {
    client
        .batch_execute("DROP SCHEMA dr_agent CASCADE")
        .await
        .map_err(|error: tokio_postgres::Error| {
            RestoreError::target("remove schema dr_agent")(PgError::from(error))
        })
}

/// The tables as the replica sink wants them: changes before the base backup are in it.
pub(super) fn synced(position: &Position) -> HashMap<TableName, Copied> {
    let snapshot_lsn = Some(position.base);
    let tables = position.tables.clone().into_iter();
    let copied = tables.map(|(table, listed_as)| {
        let copied = Copied {
            snapshot_lsn,
            listed_as,
        };
        (table, copied)
    });
    copied.collect()
}
