//! Loads a base backup into an empty database: schema, rows, indexes and constraints, sequences.
//!
//! ```text
//! examined ▶ empty? ▶ pre-data ▶ [rows, in parallel] ▶ post-data ▶ sequences ▶ statistics, views
//! ```
//! Afterwards the database is the source as of the base's LSN, and the change log goes on from there.
//!
//! # Invariants
//! - Nothing is written to a database that holds anything.
//! - Every object is checked against the manifest: the small ones before they are used, those with rows before their
//!   transaction commits.
//! - Nothing in the database disturbs a replay in replica role: triggers and rules that would fire there are
//!   quieted, as on a replica ([`crate::copy`]).
//!
//! # What it does not do
//! It creates neither the database nor roles nor schema `dr_agent`: where the caller has made that schema, its
//! in-band tables are filled, otherwise their rows are passed over. Killed, it leaves a database that is not
//! empty; the caller removes that ([`super::wipe()`]) and begins again.

use std::collections::{BTreeMap, HashSet};

use futures_util::future;
use tokio_postgres::{Client, GenericClient};
use tokio_util::sync::CancellationToken;

use super::error::BackupError;
use super::examine::Examined;
use super::manifest::{DataFile, Manifest, Object};
use super::{object, rows};
use crate::catalog::routing;
use crate::cloud::store::Store;
use crate::config::CopySettings;
use crate::copy::deferred::{self, DeferredStatement};
use crate::copy::dump::{Dump, PRE_DATA};
use crate::copy::inventory::ForeignKey;
use crate::copy::plan::{Pages, TablePart};
use crate::copy::session::ReplicaSide;
use crate::copy::toc::LeftOut;
use crate::copy::work::{self, CopyWork};
use crate::copy::{self, CopyObserver, CopyPhase, finish, inventory, silence_triggers};
use crate::failpoint;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::ConnInfo;
use crate::schema::refused::{self, Taken};
use crate::schema::{self, deferred as kept};

/// The schema, as `pg_dump` wrote it.
pub(super) const SCHEMA: &str = "schema.dump";

/// Where sequences stood.
pub(super) const SEQUENCES: &str = "sequences.sql.zst";

/// One load: of what, to where.
pub struct LoadJob<'a> {
    /// The archive.
    pub store: &'a Store,
    /// What the names of the base's objects begin with; ends with `/`.
    pub base: &'a str,
    /// Its manifest.
    pub manifest: &'a Manifest,
    /// The new database. Its other sessions of this stream with role `restore` are ended.
    pub target: &'a ConnInfo,
    /// Whose base it is.
    pub stream: &'a StreamName,
    /// `[copy]`
    pub settings: &'a CopySettings,
    /// Only these tables get their rows; the schema is there as a whole. Foreign keys that refer to others
    /// are left out.
    pub only: Option<&'a [TableName]>,
    /// What becomes of owners and privileges.
    pub ownership: Ownership,
    /// Whether materialized views are filled at once, or by somebody later ([`refresh_views`]).
    pub views: bool,
}

/// What becomes of owners and privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// They are as they were, or left out if the server lacks a role they name.
    IfPossible,
    /// They are as they were, but for what is left out; a role that is lacking then is an error.
    Without {
        /// Everything belongs to our role.
        owners: bool,
        /// Nobody else may use anything. Without owners either, policies and user mappings of roles that are lacking are
        /// left out, too.
        privileges: bool,
    },
}

/// Loads a base, whose LSN is where the change log goes on.
///
/// # Errors
/// [`BackupError`]; after any of them what is there is to be removed, unless it is [`BackupError::NotEmpty`].
pub async fn load(
    job: LoadJob<'_>,
    examined: Examined,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<(), BackupError> {
    let all = Box::pin(load_all(&job, examined, observer));
    match cancel.run_until_cancelled(all).await {
        Some(result) => result,
        None => Err(BackupError::Cancelled),
    }
}

async fn load_all(
    job: &LoadJob<'_>,
    examined: Examined,
    observer: &dyn CopyObserver,
) -> Result<(), BackupError> {
    let Examined {
        dump,
        left_out,
        without,
    } = examined;
    let manifest = job.manifest;
    let mut chosen = chosen(job)?;
    let role = job.stream.application_name("restore");
    let (side, client) = ReplicaSide::begin(job.target, role).await?;
    require_empty(&client, job.target.dbname()).await?;

    observer.phase(CopyPhase::PreData);
    for what in without {
        copy::leave_out(observer, &what);
    }
    let script = dump
        .script("schema", &left_out, PRE_DATA, side.version_num())
        .await?;
    create_schema(&side, &script).await?;
    silence_triggers::quiet(&client, job.stream, observer).await?;

    observer.phase(CopyPhase::Data);
    let in_band: Vec<TableName> = chosen
        .iter()
        .map(|(_, data)| data.table.clone())
        .filter(|table| table.schema == "dr_agent")
        .collect();
    let missing = inventory::missing_on(&client, &in_band).await?;
    chosen.retain(|(_, data)| !missing.contains(&data.table));
    let constraints = fill(job, &side, &chosen, observer).await?;

    observer.phase(CopyPhase::PostData);
    build(job, &dump, &left_out, &side, &client, observer).await?;
    bring_back(job, &client, &constraints, observer).await?;
    silence_triggers::quiet(&client, job.stream, observer).await?;
    let sequences = small(job, SEQUENCES).await?;
    client
        .batch_execute(&sequences)
        .await
        .map_err(BackupError::target("set the sequences"))?;
    let pairs: Vec<_> = chosen
        .iter()
        .map(|(_, data)| (data.table.clone(), data.root.clone()))
        .collect();
    finish::analyze(&client, &pairs, job.only.is_none(), &HashSet::new()).await?;
    if job.views {
        finish::refresh_views(&client, &manifest.materialized_views, observer).await?;
    }
    Ok(())
}

/// Keeps the constraints that have refused rows until the database is opened; where nobody replays a log into it, that is now.
async fn bring_back(
    job: &LoadJob<'_>,
    client: &Client,
    constraints: &[Taken],
    observer: &dyn CopyObserver,
) -> Result<(), BackupError> {
    let replays = schema::has(client, &[kept::TABLE]).await;
    let replays = replays.map_err(BackupError::target("look for schema dr_agent"))?;
    for taken in constraints {
        let Taken { what, add } = taken;
        let done = match replays {
            true => {
                let opened = kept::when_opened();
                kept::keep(client, job.stream, (what, add), opened).await
            }
            false => client.batch_execute(add).await.map_err(Into::into),
        };
        done.map_err(BackupError::target(format!("add {what}")))?;
        copy::leave_out(observer, &taken.told());
    }
    Ok(())
}

/// Builds indexes, then constraints. Rows may violate a foreign key, as they did on the source.
async fn build(
    job: &LoadJob<'_>,
    dump: &Dump,
    left_out: &LeftOut,
    side: &ReplicaSide<'_>,
    client: &Client,
    observer: &dyn CopyObserver,
) -> Result<(), BackupError> {
    const KEYS: [&str; 1] = ["FK CONSTRAINT"];
    let jobs = job.settings.jobs.max(1);
    let others = left_out.without(&KEYS);
    dump.build("schema", &others, side, jobs).await?;
    match dump
        .build("schema", &left_out.only(&KEYS), side, jobs)
        .await
    {
        Err(error) if error.may_be_missing_reference() => {}
        built => {
            built?;
            return Ok(dump.comment("schema", left_out, side).await?);
        }
    }
    let there = inventory::foreign_keys(client).await?;
    let is_there = |key: &ForeignKey| {
        let same = |other: &ForeignKey| (&other.table, &other.name) == (&key.table, &key.name);
        there.iter().any(same)
    };
    let keys = job.manifest.foreign_keys.iter();
    let lacking = keys.filter(|key| !left_out.has(&key.entry) && !is_there(key));
    let statements = DeferredStatement::foreign_keys(lacking);
    deferred::add_keys(client, &statements, observer).await?;
    Ok(dump.comment("schema", left_out, side).await?)
}

/// Fills materialized views that are empty, each behind those that it reads; what cannot be filled is told.
///
/// # Errors
/// [`BackupError`]
pub async fn refresh_views(
    target: &ConnInfo,
    stream: &StreamName,
    views: &[TableName],
    observer: &dyn CopyObserver,
) -> Result<(), BackupError> {
    if views.is_empty() {
        return Ok(());
    }
    let role = stream.application_name("restore");
    let (_, client) = ReplicaSide::begin(target, role).await?;
    Ok(finish::refresh_views(&client, views, observer).await?)
}

pub(super) type Chosen<'a> = (&'a Object, &'a DataFile);

/// The objects with the rows that are wanted.
pub(super) fn chosen<'m>(job: &LoadJob<'m>) -> Result<Vec<Chosen<'m>>, BackupError> {
    let Some(only) = job.only else {
        return Ok(job.manifest.data().collect());
    };
    for table in only {
        if !job.manifest.data().any(|(_, data)| data.table == *table) {
            return Err(BackupError::UnknownTable {
                base: job.base.to_owned(),
                table: table.clone(),
            });
        }
    }
    let is_wanted = |(_, data): &Chosen<'_>| only.contains(&data.table);
    Ok(job.manifest.data().filter(is_wanted).collect())
}

/// Refuses a database that holds anything but schema `dr_agent` and what extensions brought.
async fn require_empty(client: &Client, database: &str) -> Result<(), BackupError> {
    let found = found_in(client)
        .await
        .map_err(BackupError::target("look for what is there"))?;
    if found.is_empty() {
        return Ok(());
    }
    Err(BackupError::NotEmpty {
        database: database.to_owned(),
        found,
    })
}

/// Kind and name of what a database holds beside schema `dr_agent` and what extensions brought.
pub async fn found_in(
    client: &(impl GenericClient + Sync),
) -> Result<Vec<String>, tokio_postgres::Error> {
    const SQL: &str = "
        WITH ours AS (
            SELECT oid, nspname FROM pg_namespace
             WHERE nspname NOT LIKE 'pg\\_%' AND nspname NOT IN ('information_schema', 'dr_agent')),
        extensions AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e')
        SELECT 'schema ' || nspname FROM ours
         WHERE nspname <> 'public' AND ('pg_namespace'::regclass, oid) NOT IN (SELECT * FROM extensions)
        UNION ALL
        SELECT CASE relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view ' WHEN 'S' THEN 'sequence '
                            WHEN 'f' THEN 'foreign table ' WHEN 'c' THEN 'type ' ELSE 'table ' END
               || nspname || '.' || relname
          FROM pg_class c JOIN ours n ON n.oid = relnamespace
         WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S', 'c')
           AND ('pg_class'::regclass, c.oid) NOT IN (SELECT * FROM extensions)
        UNION ALL
        SELECT 'function ' || nspname || '.' || proname FROM pg_proc p JOIN ours n ON n.oid = pronamespace
         WHERE ('pg_proc'::regclass, p.oid) NOT IN (SELECT * FROM extensions)
        UNION ALL
        SELECT 'type ' || nspname || '.' || typname FROM pg_type t JOIN ours n ON n.oid = typnamespace
         WHERE typtype IN ('e', 'd', 'r') AND ('pg_type'::regclass, t.oid) NOT IN (SELECT * FROM extensions)
        UNION ALL
        SELECT 'event trigger ' || evtname FROM pg_event_trigger e
         WHERE ('pg_event_trigger'::regclass, e.oid) NOT IN (SELECT * FROM extensions)
        UNION ALL
        SELECT 'foreign data wrapper ' || fdwname FROM pg_foreign_data_wrapper w
         WHERE ('pg_foreign_data_wrapper'::regclass, w.oid) NOT IN (SELECT * FROM extensions)
         ORDER BY 1";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn small(job: &LoadJob<'_>, name: &str) -> Result<String, BackupError> {
    let object = listed(job, name)?;
    object::get_packed(job.store, job.base, name, &object.sum).await
}

pub(super) fn listed<'m>(job: &LoadJob<'m>, name: &str) -> Result<&'m Object, BackupError> {
    let object = job.manifest.object(name);
    object.ok_or_else(|| BackupError::damaged(job.base, name, "is not in the manifest"))
}

/// Everything that rows need, or nothing.
async fn create_schema(side: &ReplicaSide<'_>, script: &str) -> Result<(), BackupError> {
    // A session of its own: the script changes settings.
    let mut client = side.open().await?;
    let doing = || BackupError::target("create the schema");
    let transaction = client.transaction().await.map_err(doing())?;
    transaction.batch_execute(script).await.map_err(doing())?;
    transaction.commit().await.map_err(doing())
}

async fn fill(
    job: &LoadJob<'_>,
    side: &ReplicaSide<'_>,
    chosen: &[Chosen<'_>],
    observer: &dyn CopyObserver,
) -> Result<Vec<Taken>, BackupError> {
    let mut tables: Vec<&TableName> = Vec::new();
    // The objects are in the order in which they were best taken: the biggest first.
    let parts: Vec<TablePart> = chosen
        .iter()
        .map(|(_, data)| {
            let place = tables.iter().position(|table| **table == data.table);
            let table = place.unwrap_or_else(|| {
                tables.push(&data.table);
                tables.len() - 1
            });
            TablePart {
                table,
                pages: Pages::ALL,
                bytes: data.raw_bytes,
            }
        })
        .collect();
    let tops = routing::tops(&side.open().await?, tables.iter().copied()).await;
    let tops = tops.map_err(BackupError::target("read the partitioned tables"))?;
    let total = tables.len();
    let work = CopyWork::new(tables, &parts, total, observer);
    let sessions = usize::from(job.settings.jobs.max(1)).min(parts.len());
    let each = (0..sessions).map(|_| Box::pin(load_parts(job, side, (chosen, &tops), &work)));
    let taken = future::try_join_all(each).await?;
    Ok(taken.into_iter().flatten().collect())
}

/// One session: loads parts until there are none, and returns the constraints that were in the way.
async fn load_parts(
    job: &LoadJob<'_>,
    side: &ReplicaSide<'_>,
    (chosen, tops): (&[Chosen<'_>], &BTreeMap<TableName, TableName>),
    work: &CopyWork<'_>,
) -> Result<Vec<Taken>, BackupError> {
    let mut client = side.open().await?;
    let mut taken = Vec::new();
    while let Some(work::TakenWork {
        number,
        part,
        is_whole,
    }) = work.take()
    {
        let (object, data) = chosen[number];
        let source = rows::RowSource {
            store: job.store,
            base: job.base,
            object,
            data,
            top: tops.get(&data.table),
        };
        let mut in_vain = false;
        while let Err(error) = source.load(&client, is_whole, work).await {
            match take_away(&mut client, &error, &data.table).await? {
                // Another session may have taken it away while this one wrote: once more.
                Some(some) if !some.is_empty() || !in_vain => {
                    in_vain = some.is_empty();
                    taken.extend(some);
                }
                _ => return Err(error),
            }
        }
        failpoint::hit("restore:data-loaded");
        if let Some(table) = work.finish(&part, data.rows, data.raw_bytes) {
            work.announce(part.table, table.rows);
        }
    }
    Ok(taken)
}

/// Takes away what has refused rows that the source had; a load that is killed begins again from nothing.
async fn take_away(
    client: &mut Client,
    error: &BackupError,
    table: &TableName,
) -> Result<Option<Vec<Taken>>, BackupError> {
    let BackupError::Target { source, .. } = error else {
        return Ok(None);
    };
    let doing = || BackupError::target(format!("take a constraint of table {table} away"));
    client.batch_execute("ROLLBACK").await.map_err(doing())?;
    let transaction = client.transaction().await.map_err(doing())?;
    let taken = refused::take_away(&transaction, source, table).await;
    let taken = taken.map_err(doing())?;
    transaction.commit().await.map_err(doing())?;
    Ok(taken)
}
