//! Loads a base backup into an empty database: schema, rows, indexes and constraints, sequences.
//!
//! ```text
//! manifest ▶ empty? ▶ schema.dump: pre-data ▶ [rows, in parallel] ▶ post-data ▶ sequences ▶ statistics, views
//! ```
//! Afterwards the database is the source as of the base's LSN, and the change log goes on from there.
//!
//! # Invariants
//! - Nothing is written to a database that holds anything.
//! - Every object is checked against the manifest: the small ones before they are used, those with rows before their
//!   transaction commits.
//! - Nothing in the database disturbs a replay in replica role: triggers and rules that would fire there are
//!   quieted, as on a replica ([`crate::snapshot`]).
//!
//! # What it does not do
//! It creates neither the database nor roles nor schema `dr_agent`: where the caller has made that schema, its
//! in-band tables are filled, otherwise their rows are passed over. Killed, it leaves a database that is not
//! empty; the caller drops it and begins again.

use std::collections::HashSet;

use futures_util::future;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::error::BackupError;
use super::manifest::{DataFile, Manifest, Object};
use super::{object, repository, rows};
use crate::catalog::TableName;
use crate::config::CopySettings;
use crate::failpoint;
use crate::pg::ConnInfo;
use crate::snapshot::dump::{Dump, PRE_DATA};
use crate::snapshot::plan::{Pages, Part};
use crate::snapshot::session::ReplicaSide;
use crate::snapshot::toc::LeftOut;
use crate::snapshot::tools::Tools;
use crate::snapshot::work::{Taken, Work};
use crate::snapshot::{self, CopyObserver, CopyPhase, finish, inventory, quiet};
use crate::store::Store;
use crate::stream::StreamName;

/// One load: of what, to where.
pub struct LoadJob<'a> {
    /// The archive.
    pub store: &'a Store,
    /// What the names of the base's objects begin with; ends with `/`.
    pub base: &'a str,
    /// The new database. Its other sessions of this stream with role `restore` are ended.
    pub target: &'a ConnInfo,
    /// Whose base it is.
    pub stream: &'a StreamName,
    /// `[copy]`
    pub settings: &'a CopySettings,
    /// Only these tables get their rows; the schema is there as a whole. Foreign keys that refer to others
    /// are left out.
    pub only: Option<&'a [TableName]>,
}

/// Loads a base; returns its manifest, whose LSN is where the change log goes on.
///
/// # Errors
/// [`BackupError`]; after any of them the database is to be dropped, unless it is [`BackupError::NotEmpty`].
pub async fn load(
    job: LoadJob<'_>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Manifest, BackupError> {
    let all = Box::pin(load_all(&job, observer));
    match cancel.run_until_cancelled(all).await {
        Some(result) => result,
        None => Err(BackupError::Cancelled),
    }
}

async fn load_all(job: &LoadJob<'_>, observer: &dyn CopyObserver) -> Result<Manifest, BackupError> {
    let manifest = repository::manifest(job.store, job.base).await?;
    let mut chosen = chosen(job, &manifest)?;
    let tools = Tools::find(
        job.settings.pg_bin.as_deref(),
        i32::try_from(manifest.pg_dump).unwrap_or(0) * 10_000,
    )
    .await?;
    let role = job.stream.application_name("restore");
    let (side, client) = ReplicaSide::begin(job.target, role).await?;
    require_empty(&client, job.target.dbname()).await?;

    observer.phase(CopyPhase::PreData);
    inventory::check_extensions(&client, &manifest.extensions).await?;
    let mut dump = Dump::new(tools)?;
    if let Some(problem) = inventory::ownership_problem(&client, &manifest.roles).await? {
        snapshot::leave_out(observer, &format!("owners and privileges: {problem}"));
        dump.leave_out_ownership();
    }
    fetch_schema(job, &manifest, &dump).await?;
    let left_out = left_out(&manifest, &chosen, observer);
    let script = dump
        .script("schema", &left_out, PRE_DATA, side.version_num())
        .await?;
    create_schema(&side, &script).await?;
    quiet::quiet(&client, observer).await?;

    observer.phase(CopyPhase::Data);
    let in_band: Vec<TableName> = chosen
        .iter()
        .map(|(_, data)| data.table.clone())
        .filter(|table| table.schema == "dr_agent")
        .collect();
    let missing = inventory::missing_on(&client, &in_band).await?;
    chosen.retain(|(_, data)| !missing.contains(&data.table));
    fill(job, &side, &chosen, observer).await?;

    observer.phase(CopyPhase::PostData);
    let jobs = job.settings.jobs.max(1);
    dump.build("schema", &left_out, &side, jobs).await?;
    quiet::quiet(&client, observer).await?;
    let sequences = small(job, &manifest, "sequences.sql.zst").await?;
    client
        .batch_execute(&sequences)
        .await
        .map_err(BackupError::target("set the sequences"))?;
    let pairs: Vec<_> = chosen
        .iter()
        .map(|(_, data)| (data.table.clone(), data.root.clone()))
        .collect();
    finish::analyze(&client, &pairs, job.only.is_none()).await?;
    finish::refresh_views(&client, &manifest.materialized_views, observer).await?;
    Ok(manifest)
}

type Chosen<'a> = (&'a Object, &'a DataFile);

/// The objects with the rows that are wanted.
fn chosen<'m>(job: &LoadJob<'_>, manifest: &'m Manifest) -> Result<Vec<Chosen<'m>>, BackupError> {
    let Some(only) = job.only else {
        return Ok(manifest.data().collect());
    };
    for table in only {
        if !manifest.data().any(|(_, data)| data.table == *table) {
            return Err(BackupError::UnknownTable {
                base: job.base.to_owned(),
                table: table.clone(),
            });
        }
    }
    let is_wanted = |(_, data): &Chosen<'_>| only.contains(&data.table);
    Ok(manifest.data().filter(is_wanted).collect())
}

/// Refuses a database that holds anything but schema `dr_agent` and what extensions brought.
async fn require_empty(client: &Client, database: &str) -> Result<(), BackupError> {
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
         ORDER BY 1";
    let rows = client
        .query(SQL, &[])
        .await
        .map_err(BackupError::target("look for what is there"))?;
    if rows.is_empty() {
        return Ok(());
    }
    Err(BackupError::NotEmpty {
        database: database.to_owned(),
        found: rows.iter().map(|row| row.get(0)).collect(),
    })
}

async fn small(job: &LoadJob<'_>, manifest: &Manifest, name: &str) -> Result<String, BackupError> {
    let object = listed(job, manifest, name)?;
    object::get_packed(job.store, job.base, name, &object.sum).await
}

fn listed<'m>(
    job: &LoadJob<'_>,
    manifest: &'m Manifest,
    name: &str,
) -> Result<&'m Object, BackupError> {
    let object = manifest.object(name);
    object.ok_or_else(|| BackupError::damaged(job.base, name, "is not in the manifest"))
}

async fn fetch_schema(
    job: &LoadJob<'_>,
    manifest: &Manifest,
    dump: &Dump,
) -> Result<(), BackupError> {
    const NAME: &str = "schema.dump";
    let object = listed(job, manifest, NAME)?;
    let schema = object::get(job.store, job.base, NAME, &object.sum).await?;
    tokio::fs::write(dump.path("schema"), schema)
        .await
        .map_err(BackupError::local("write the schema for pg_restore"))
}

/// What of the schema is not created.
fn left_out(manifest: &Manifest, chosen: &[Chosen<'_>], observer: &dyn CopyObserver) -> LeftOut {
    let mut left_out = LeftOut::default();
    for entry in &manifest.left_out {
        left_out.entry(entry);
    }
    let filled: HashSet<TableName> = chosen.iter().map(|(_, data)| data.table.clone()).collect();
    for key in &manifest.foreign_keys {
        if let Some(what) = key.cannot_hold(&filled) {
            snapshot::leave_out(observer, &what);
            left_out.entry(&key.entry);
        }
    }
    left_out
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
) -> Result<(), BackupError> {
    let mut tables: Vec<&TableName> = Vec::new();
    // The objects are in the order in which they were best taken: the biggest first.
    let parts: Vec<Part> = chosen
        .iter()
        .map(|(_, data)| {
            let place = tables.iter().position(|table| **table == data.table);
            let table = place.unwrap_or_else(|| {
                tables.push(&data.table);
                tables.len() - 1
            });
            Part {
                table,
                pages: Pages::ALL,
                bytes: data.raw_bytes,
            }
        })
        .collect();
    let total = tables.len();
    let work = Work::new(tables, &parts, total, observer);
    let sessions = usize::from(job.settings.jobs.max(1)).min(parts.len());
    let each = (0..sessions).map(|_| Box::pin(load_parts(job, side, chosen, &work)));
    future::try_join_all(each).await?;
    Ok(())
}

/// One session: loads parts until there are none.
async fn load_parts(
    job: &LoadJob<'_>,
    side: &ReplicaSide<'_>,
    chosen: &[Chosen<'_>],
    work: &Work<'_>,
) -> Result<(), BackupError> {
    let client = side.open().await?;
    while let Some(Taken {
        number,
        part,
        is_whole,
    }) = work.take()
    {
        let (object, data) = chosen[number];
        let source = rows::Source {
            store: job.store,
            base: job.base,
            object,
            data,
        };
        source.load(&client, is_whole, work).await?;
        failpoint::hit("restore:data-loaded");
        if let Some(table) = work.finish(&part, data.rows, data.raw_bytes) {
            work.announce(part.table, table.rows);
        }
    }
    Ok(())
}
