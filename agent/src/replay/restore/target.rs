//! The database that is built: what it must be, and what it remembers of a restore that was killed.
//!
//! While a restore runs the database has schema `dr_agent`, as a replica has: the progress row makes every batch
//! count once, and a restore that is started again goes on from it. At the end the schema goes.
//!
//! ```text
//! empty ─begin─▶ half loaded ─loaded─▶ interrupted ─finish─▶ the users'
//!                     └──── wiped, begun anew
//! ```
//!
//! # Invariants
//! - Nothing is written to a database that holds anything of unknown origin. Ours is what has our note in
//!   `dr_agent.restore`, which was written when the database was empty.
//! - What a killed restore left prepared is committed or rolled back before the progress row is read.
//! - The progress row comes after all of the base backup, in the transaction that records its tables. Without it
//!   there is nothing to go on from.
//! - The source's event triggers, which are in the database by then, see nothing of this.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::{Client, GenericClient};

use super::RestoreError;
use super::closing_notes::ClosingNotes;
use crate::archive::base;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, PgLsn, Session, leftover};
use crate::schema::listing::{self, Copied, ListedAs};
use crate::schema::restore::Restore;
use crate::schema::{prepared, progress, restore, schema_sync, table_sync};
use crate::setup::replica_schema;
use crate::time::{Micros, pg_micros};

/// What a restore keeps beside what a replica has.
const SCHEMA_SQL: &str = include_str!("../../../sql/restore.sql");

/// What a target is found to be.
#[derive(Clone, Debug)]
pub(super) enum TargetFound {
    /// Nothing is in it.
    Empty,
    /// It holds these objects, which no restore has made.
    Foreign(Vec<String>),
    /// A restore was interrupted in it.
    Begun {
        /// Under which name it worked, and the history that its LSNs are of.
        by: Vec<(String, String)>,
        /// How far it is; none where it was interrupted within its base backup.
        position: Option<TargetPosition>,
    },
}

/// Tables, and what they were listed as where that is known.
pub(super) type Tables = BTreeMap<TableName, Option<ListedAs>>;

/// How far a target is.
#[derive(Clone, Debug)]
pub(super) struct TargetPosition {
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
    /// The tables of the base backup that were restored, by every name that the log may call them.
    pub(super) tables: Tables,
    /// What is to be told at the end.
    pub(super) kept: ClosingNotes,
}

/// The term of a restore's progress row: there is nobody to fence.
pub(super) const TERM: i64 = 1;

/// Whose restore it is, and of what.
#[derive(Clone, Copy)]
pub(super) struct RestoreOwner<'a> {
    /// Under which name it works.
    pub(super) stream: &'a StreamName,
    /// What the LSNs are of.
    pub(super) history: History,
}

/// Opens a session on the target.
///
/// # Errors
/// When it cannot be reached.
pub(super) async fn open(conninfo: &ConnInfo, stream: &StreamName) -> Result<Client, RestoreError> {
    let session = Session::new(stream.application_name("restoring"))
        .silent()
        .set("client_min_messages", "warning");
    pg::connect(conninfo, &session)
        .await
        .map_err(RestoreError::target("connect"))
}

fn sql(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> RestoreError {
    move |error| RestoreError::target(doing)(error.into())
}

/// Takes the right to work on the target, for as long as the session lasts.
///
/// # Errors
/// [`RestoreError::Busy`]
pub(super) async fn lock(client: &Client) -> Result<(), RestoreError> {
    const LOCK: &str = "SELECT pg_try_advisory_lock(hashtextextended('dr_agent:restore', 0))";
    let locked: bool = client
        .query_one(LOCK, &[])
        .await
        .map_err(sql("lock the target"))?
        .get(0);
    match locked {
        true => Ok(()),
        false => Err(RestoreError::Busy),
    }
}

/// Looks what is there, and changes nothing. `stream`: whose position is read, where a restore has begun.
///
/// # Errors
/// When the target refuses.
pub(super) async fn look(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<TargetFound, RestoreError> {
    look_at(client, stream)
        .await
        .map_err(RestoreError::target("look at the target"))
}

async fn look_at(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<TargetFound, PgError> {
    if !restore::is_there(client).await? {
        let objects = objects(client).await?;
        return Ok(match objects.is_empty() {
            true => TargetFound::Empty,
            false => TargetFound::Foreign(objects),
        });
    }
    let noted = restore::read(client).await?;
    let ours = noted.iter().find(|row| row.stream == stream.as_str());
    let position = match ours {
        Some(ours) => position(client, stream, ours).await?,
        None => None,
    };
    Ok(TargetFound::Begun {
        by: noted
            .into_iter()
            .map(|row| (row.stream, row.history))
            .collect(),
        position,
    })
}

/// How far a restore is; none where it was interrupted within its base backup.
async fn position(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    noted: &Restore,
) -> Result<Option<TargetPosition>, PgError> {
    let Some(progress) = progress::read(client, stream).await? else {
        return Ok(None);
    };
    let tables = table_sync::read(client, stream).await?;
    Ok(Some(TargetPosition {
        end_lsn: progress.end_lsn,
        batch: progress.batch,
        base: noted.base,
        commit_time: progress.commit_time.map(pg_micros),
        whole: schema_sync::is_noted(client, stream).await?,
        // What a newer version has written is read as far as it is known.
        kept: serde_json::from_str(&noted.detail).unwrap_or_default(),
        tables: tables
            .into_iter()
            .map(|row| (row.table, row.copied.listed_as))
            .collect(),
    }))
}

/// What a database holds that is not empty, extensions and schema `dr_agent` included.
async fn objects(client: &(impl GenericClient + Sync)) -> Result<Vec<String>, PgError> {
    const BESIDE: &str = "
        SELECT 'extension ' || extname FROM pg_extension WHERE extname <> 'plpgsql'
        UNION ALL SELECT 'schema dr_agent' FROM pg_namespace WHERE nspname = 'dr_agent'
         ORDER BY 1";
    let mut objects = base::found_in(client).await?;
    let beside = client.query(BESIDE, &[]).await?;
    objects.extend(beside.iter().map(|row| row.get::<_, String>(0)));
    Ok(objects)
}

/// Settles what a killed restore left behind its base backup.
///
/// # Errors
/// When the target refuses.
pub(super) async fn settle(client: &Client, stream: &StreamName) -> Result<(), RestoreError> {
    leftover::end_sessions(client, &stream.application_name("apply"))
        .await
        .map_err(RestoreError::target(
            "end the sessions of an earlier restore",
        ))?;
    let progress = progress::read(client, stream)
        .await
        .map_err(RestoreError::target("read the progress row"))?;
    if let Some(progress) = progress {
        prepared::settle(client, stream, progress.batch)
            .await
            .map_err(RestoreError::target("settle prepared transactions"))?;
    }
    Ok(())
}

/// Notes that a restore begins, and creates schema `dr_agent` for its time: in an empty database, or in one that it empties of
/// what an interrupted load left (`wipes`).
///
/// # Errors
/// When the role may not, or somebody has put something there meanwhile.
pub(super) async fn begin(
    client: &mut Client,
    owner: RestoreOwner<'_>,
    base: PgLsn,
    wipes: bool,
) -> Result<(), RestoreError> {
    let doing = sql("create schema dr_agent");
    if wipes {
        // A `pg_restore` outlives an agent that was killed.
        leftover::end_sessions(client, &owner.stream.application_name("restore"))
            .await
            .map_err(RestoreError::target(
                "end the sessions of an earlier restore",
            ))?;
        base::wipe(client).await.map_err(RestoreError::target(
            "remove what an interrupted restore left",
        ))?;
    }
    let transaction = client.transaction().await.map_err(&doing)?;
    if wipes {
        transaction
            .batch_execute("DROP SCHEMA dr_agent CASCADE")
            .await
            .map_err(&doing)?;
    }
    match look(&transaction, owner.stream).await? {
        TargetFound::Empty => {}
        TargetFound::Foreign(objects) => return Err(RestoreError::NotEmpty { objects }),
        // The lock keeps them away.
        TargetFound::Begun { .. } => return Err(RestoreError::Busy),
    }
    for statements in [replica_schema(), SCHEMA_SQL.to_owned()] {
        transaction
            .batch_execute(&statements)
            .await
            .map_err(&doing)?;
    }
    restore::begin(&transaction, owner.stream, owner.history, base)
        .await
        .map_err(RestoreError::target("create schema dr_agent"))?;
    transaction.commit().await.map_err(&doing)
}

/// What was loaded.
pub(super) struct Loaded {
    /// Where the base backup stands.
    pub(super) base: PgLsn,
    /// Its tables that are there, by every name that the log may call them.
    pub(super) tables: Tables,
    /// Whether these are all.
    pub(super) whole: bool,
    /// What is to be told at the end.
    pub(super) kept: ClosingNotes,
}

/// Records that the base backup is there.
///
/// # Errors
/// When the target refuses.
pub(super) async fn loaded(
    client: &mut Client,
    owner: &StreamName,
    loaded: Loaded,
) -> Result<TargetPosition, RestoreError> {
    record(client, owner, &loaded)
        .await
        .map_err(RestoreError::target("record the base backup"))?;
    let Loaded {
        base,
        tables,
        whole,
        kept,
    } = loaded;
    Ok(TargetPosition {
        base,
        end_lsn: base,
        commit_time: None,
        batch: 0,
        whole,
        tables,
        kept,
    })
}

async fn record(client: &mut Client, stream: &StreamName, loaded: &Loaded) -> Result<(), PgError> {
    let base = loaded.base;
    let listed = loaded.tables.iter();
    let listed = listed.map(|(table, listed_as)| (table, listed_as.as_ref()));
    let transaction = client.transaction().await?;
    table_sync::add_ready(&transaction, stream, listed, base).await?;
    progress::begin(&transaction, stream, TERM, (base, None)).await?;
    if loaded.whole {
        schema_sync::note(&transaction, stream).await?;
    }
    restore::keep(&transaction, stream, &json(&loaded.kept)).await?;
    Ok(transaction.commit().await?)
}

fn json(kept: &ClosingNotes) -> String {
    serde_json::to_string(kept).expect("it is plain data")
}

/// Keeps what is to be told at the end.
///
/// # Errors
/// When the target refuses.
pub(super) async fn keep(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    kept: &ClosingNotes,
) -> Result<(), RestoreError> {
    restore::keep(client, stream, &json(kept))
        .await
        .map_err(RestoreError::target("record what is left out"))?;
    Ok(())
}

/// The tables that were published at the base backup and not any more at the moment.
///
/// # Errors
/// When the target refuses.
pub(super) async fn unlisted(
    client: &Client,
    of: &StreamName,
    position: &TargetPosition,
) -> Result<Vec<TableName>, RestoreError> {
    let listed = listing::noted(client, of).await;
    let listed = listed.map_err(RestoreError::target("read what is listed"))?;
    let were = position
        .tables
        .iter()
        .filter(|(_, listed_as)| listed_as.is_some());
    let gone = were.filter(|(table, _)| position.whole && !listed.contains_key(*table));
    Ok(gone.map(|(table, _)| table.clone()).collect())
}

/// Removes what only the restore needed; returns what of the users' goes with it.
///
/// # Errors
/// When the target refuses.
pub(super) async fn finish(client: &Client) -> Result<Vec<String>, RestoreError> {
    let doing = sql("remove schema dr_agent");
    // A view's rule is what depends; what depends on the view goes as well.
    const GOING: &str = "
        WITH RECURSIVE going (classid, objid) AS (
            SELECT 'pg_class'::regclass::oid, oid FROM pg_class WHERE relnamespace = 'dr_agent'::regnamespace
            UNION ALL
            SELECT 'pg_proc'::regclass::oid, oid FROM pg_proc WHERE pronamespace = 'dr_agent'::regnamespace
            UNION
            SELECT CASE WHEN r.oid IS NULL THEN d.classid ELSE 'pg_class'::regclass::oid END,
                   coalesce(r.ev_class, d.objid)
              FROM going JOIN pg_depend d ON d.refclassid = going.classid AND d.refobjid = going.objid
              LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid)
        SELECT DISTINCT o.type || ' ' || o.identity
          FROM going CROSS JOIN LATERAL pg_identify_object(classid, objid, 0) AS o
         WHERE o.type IN ('view', 'materialized view', 'table', 'foreign table', 'sequence', 'function', 'procedure',
                          'aggregate', 'table constraint', 'domain constraint', 'default value', 'policy', 'trigger')
           AND o.identity !~ '(^| )dr_agent\\.'
         ORDER BY 1";
    let going = client.query(GOING, &[]).await.map_err(&doing)?;
    client
        .batch_execute("DROP SCHEMA dr_agent CASCADE")
        .await
        .map_err(|error: tokio_postgres::Error| {
            RestoreError::target("remove schema dr_agent")(PgError::from(error))
        })?;
    Ok(going.iter().map(|row| row.get(0)).collect())
}

/// The tables as the replica sink wants them: changes before the base backup are in it.
pub(super) fn synced(position: &TargetPosition) -> HashMap<TableName, Copied> {
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
