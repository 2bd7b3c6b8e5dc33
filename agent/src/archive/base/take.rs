//! Takes a base backup: a temporary slot exports the snapshot, everything is read at it and goes to the store.
//!
//! ```text
//! slot, snapshot ▶ sessions that see it ▶ pg_dump ▶ slot gone ▶ [rows, in parallel] ▶ every object there? ▶ manifest
//!                                                    └──────────── each through `writing` ────────────┘
//! ```
//! Replication goes on meanwhile; it has nothing to do with this slot.
//!
//! # Invariants
//! - Every session sees the same snapshot, and its LSN is the slot's consistent point.
//! - The slot, which holds back WAL and the vacuum of catalogs, is gone before the first row is read: once the sessions
//!   have imported the snapshot, they need its exporter no more.
//! - The manifest is written when the store lists every object with its size.
//! - A part that the store did not take is read again from the same session, at the same snapshot; one that fails in the end, or
//!   was told to stop, leaves nothing there ([`super::writing`]).
//! - No object is larger than a store takes.
//!
//! # What it does not do
//! It waits for transactions that ran when it began, as every slot does, and holds back vacuum while it reads.

use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::{self, BoxFuture};
use jiff::Timestamp;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::error::BackupError;
use super::manifest::{self, DataFile, ListedTable, Manifest, Object};
use super::object::Sum;
use super::writing::{Patience, Remains, Writing};
use super::{repository, rows, script};
use crate::catalog::{self, Identity, Table};
use crate::cloud::store::Store;
use crate::config::CopySettings;
use crate::copy::dump::{Dump, POST_DATA, PRE_DATA};
use crate::copy::export;
use crate::copy::layout::{self, TableLayout};
use crate::copy::locale;
use crate::copy::session::CopySource;
use crate::copy::toc::LeftOut;
use crate::copy::tools::Tools;
use crate::copy::work::{CopyWork, TakenWork};
use crate::copy::{self, CopyObserver, CopyPhase, finish, inventory};
use crate::error::Because;
use crate::failpoint;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::replication::{CreatedSlot, ReplicationConnection, SystemIdentity};
use crate::pg::{ConnInfo, PgError};
use crate::schema::listing::{Listed, ListedAs};
use crate::time::{system_time, timestamp};

/// The dump of the schema, in the format of `pg_restore`. The first object of a base.
const SCHEMA: &str = "schema.dump";

/// Tables are read in parts of at most so much on the source's disk, whatever `copy.split_bytes` says. As text a part may be
/// several times as large, and S3 takes 429 GiB in one object as it is written to here.
const PART_BYTES_MAX: u64 = 64 << 30;

/// One backup: of what, to where.
pub struct TakeJob<'a> {
    /// The source, with the database's name.
    pub source: &'a ConnInfo,
    /// Whose backup it is.
    pub stream: &'a StreamName,
    /// What the source's LSNs are of.
    pub history: History,
    /// The tables of the publication.
    pub tables: &'a [Table],
    /// What they are listed as, read before.
    pub listed: &'a Listed,
    /// The archive.
    pub store: &'a Store,
    /// What the names of all bases of this stream and source begin with; ends with `/`.
    pub bases: &'a str,
    /// `[copy]`
    pub settings: &'a CopySettings,
    /// With the archive.
    pub patience: &'a Patience,
}

/// Takes a base backup; returns its manifest, which is in the store by then.
///
/// # Errors
/// [`BackupError`]; after a transient one another attempt begins anew. [`BackupError::Cancelled`] soon
/// after `cancel` was cancelled. What was written by then is deleted before this returns.
pub async fn take(
    job: TakeJob<'_>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Manifest, BackupError> {
    let remains = Remains::default();
    // May be dropped at any point: sessions end, tools are killed, objects under way are not there.
    let all = Box::pin(Taking::run(&job, observer, &remains));
    let taken = match cancel.run_until_cancelled(all).await {
        Some(result) => result,
        None => Err(BackupError::Cancelled),
    };
    if taken.is_err() {
        remains.discard(job.store, job.patience, cancel).await;
    }
    taken
}

fn source(doing: &'static str) -> impl FnOnce(PgError) -> BackupError {
    move |error| BackupError::Because(Because::new(format!("{doing} on the source"), error))
}

/// One backup on its way.
struct Taking<'a> {
    job: &'a TakeJob<'a>,
    observer: &'a dyn CopyObserver,
    base: Writing<'a>,
    objects: Vec<Object>,
    warnings: Vec<String>,
}

impl<'a> Taking<'a> {
    async fn run(
        job: &'a TakeJob<'a>,
        observer: &'a dyn CopyObserver,
        remains: &'a Remains,
    ) -> Result<Manifest, BackupError> {
        let started_at = timestamp();
        let (exporter, identity, slot) = export_snapshot(job).await?;
        let History {
            system_identifier,
            began,
        } = job.history;
        if identity.system_identifier != system_identifier {
            let error = PgError::Protocol(format!(
                "its system identifier was {system_identifier} a moment ago and is {}",
                identity.system_identifier
            ));
            return Err(source("identify the system")(error));
        }
        let began = of_server(system_time(began)).map_err(source("read when its history began"))?;
        let snapshot = slot.snapshot_name.as_deref().ok_or_else(|| {
            let error = PgError::Protocol("the slot exported no snapshot".to_owned());
            source("create a temporary slot")(error)
        })?;
        let role = job.stream.application_name("backup");
        let (side, client) = CopySource::begin(job.source, role, snapshot).await?;
        let names: Vec<TableName> = job.tables.iter().map(|table| table.name.clone()).collect();
        layout::lock(&client, &names).await?;
        let as_of = source_time(&client).await?;

        observer.phase(CopyPhase::PreData);
        let mut layouts = layout::read(&client, &names).await?;
        for layout in &mut layouts {
            layout.binary = false;
        }
        let parts = copy::parts(&layouts, job.settings.split_bytes.min(PART_BYTES_MAX));
        let jobs = usize::from(job.settings.jobs.max(1)).min(parts.len());
        let sessions = future::try_join_all((0..jobs).map(|_| side.at_snapshot())).await?;
        let tools = Tools::find(job.settings.pg_bin.as_deref(), side.version_num()).await?;
        let dump = Dump::new(tools)?;
        dump.take(&side, "schema", &[]).await?;
        drop(exporter);

        let dumped = tokio::fs::read(dump.path("schema"))
            .await
            .map_err(BackupError::local("read the schema that pg_dump wrote"))?;
        let base = repository::base(job.bases, slot.consistent_point);
        let first = (SCHEMA, dumped.into());
        let (base, sum) = Writing::claim(job.store, job.patience, remains, base, first).await?;
        let mut taking = Self {
            job,
            observer,
            base,
            objects: Vec::new(),
            warnings: Vec::new(),
        };
        taking.add(SCHEMA, sum, None);
        let foreign_keys = inventory::foreign_keys(&client).await?;
        let mut left_out = inventory::own_event_triggers(&client).await?;
        let filled = names.iter().cloned().collect();
        for key in &foreign_keys {
            if let Some(what) = key.cannot_hold(&filled) {
                taking.leave_out(what);
                left_out.push(key.entry.clone());
            }
        }
        taking.schema(&dump, &left_out).await?;
        taking.roles(&dump, &side).await?;
        taking.sequences(&client).await?;

        observer.phase(CopyPhase::Data);
        let work = CopyWork::new(names.iter().collect(), &parts, names.len(), observer);
        taking.rows(&sessions, &layouts, &work).await?;

        observer.phase(CopyPhase::PostData);
        for what in unpublished(&client, &names).await? {
            taking.leave_out(what);
        }
        for what in finish::left_behind(&client).await? {
            taking.leave_out(what);
        }
        let files = taking.objects.iter();
        let files = files.filter_map(|object| Some((object.name.as_str(), object.data.as_ref()?)));
        let takers = layouts.iter();
        let takers = takers.filter_map(|layout| Some((layout.name.clone(), layout.top.clone()?)));
        let load = script::load_data(files, &takers.collect());
        taking.put("load.sql", load.into()).await?;
        let read_locale = locale::locale(&client, side.version_num()).await;
        let manifest = Manifest {
            format: manifest::FORMAT,
            dr_agent: crate::VERSION.to_owned(),
            stream: job.stream.to_string(),
            database: job.source.dbname().to_owned(),
            system_identifier,
            began,
            timeline: identity.timeline,
            server_version: side.version_num(),
            locale: read_locale.map_err(source("read the locale"))?,
            lsn: slot.consistent_point,
            as_of,
            started_at,
            finished_at: timestamp(),
            pg_dump: dump.tools().version.major,
            extensions: inventory::extensions(&client).await?,
            roles: inventory::roles(&client).await?,
            listed: job.listed.iter().map(listed_table).collect(),
            materialized_views: finish::filled_views(&client).await?,
            left_out,
            foreign_keys,
            warnings: taking.warnings,
            objects: taking.objects,
        };
        taking.base.seal(&manifest).await?;
        Ok(manifest)
    }

    fn leave_out(&mut self, what: String) {
        copy::leave_out(self.observer, &what);
        self.warnings.push(what);
    }

    fn add(&mut self, name: &str, sum: Sum, data: Option<DataFile>) {
        self.objects.push(Object {
            name: name.to_owned(),
            sum,
            data,
        });
    }

    async fn put(&mut self, name: &str, body: Bytes) -> Result<(), BackupError> {
        let sum = self.base.put(name, body).await?;
        self.add(name, sum, None);
        Ok(())
    }

    async fn put_packed(&mut self, name: &str, body: String) -> Result<(), BackupError> {
        let sum = self.base.put_packed(name, body).await?;
        self.add(name, sum, None);
        Ok(())
    }

    async fn schema(
        &mut self,
        dump: &Dump,
        entries: &[copy::toc::Entry],
    ) -> Result<(), BackupError> {
        let mut left_out = LeftOut::default();
        for entry in entries {
            left_out.entry(entry);
        }
        for (name, section) in [
            ("pre-data.sql.zst", PRE_DATA),
            ("post-data.sql.zst", POST_DATA),
        ] {
            let sql = dump.script("schema", &left_out, section, 0).await?;
            self.put_packed(name, sql).await?;
        }
        Ok(())
    }

    /// Roles belong to the whole server; not every role may read them, and no row needs them.
    async fn roles(&mut self, dump: &Dump, side: &CopySource<'_>) -> Result<(), BackupError> {
        let database = self.job.source.dbname();
        match dump.tools().roles(&side.environment(), database).await {
            Ok(sql) => self.put_packed("roles.sql.zst", sql).await,
            Err(error) => {
                self.leave_out(format!("the roles: {error}"));
                Ok(())
            }
        }
    }

    async fn sequences(&mut self, client: &Client) -> Result<(), BackupError> {
        let positions = finish::sequences(client, None).await?;
        let sql = script::set_sequences(positions.iter().flatten());
        self.put_packed("sequences.sql.zst", sql).await
    }

    async fn rows(
        &mut self,
        sessions: &[Client],
        layouts: &[TableLayout],
        work: &CopyWork<'_>,
    ) -> Result<(), BackupError> {
        let roots: Vec<&TableName> = self.job.tables.iter().map(|table| &table.root).collect();
        let (store, base) = (self.job.store, &self.base);
        let each = sessions
            .iter()
            .map(|session| Box::pin(write_parts(session, store, base, layouts, &roots, work)));
        let mut written: Vec<Object> = future::try_join_all(each)
            .await?
            .into_iter()
            .flatten()
            .collect();
        written.sort_by(|one, other| one.name.cmp(&other.name));
        self.objects.append(&mut written);
        Ok(())
    }
}

fn listed_table((table, listed_as): (&TableName, &ListedAs)) -> ListedTable {
    ListedTable {
        table: table.clone(),
        listed_as: listed_as.clone(),
    }
}

/// One session: writes parts until there are none.
async fn write_parts(
    session: &Client,
    store: &Store,
    base: &Writing<'_>,
    layouts: &[TableLayout],
    roots: &[&TableName],
    work: &CopyWork<'_>,
) -> Result<Vec<Object>, BackupError> {
    let mut objects = Vec::new();
    while let Some(TakenWork { number, part, .. }) = work.take() {
        let layout = &layouts[part.table];
        let name = format!("data/{:05}.copy.zst", number + 1);
        let write = |object| -> BoxFuture<'_, _> {
            Box::pin(rows::write(session, store, object, layout, &part, work))
        };
        let (sum, written) = base.write(&name, write).await?;
        failpoint::hit("backup:data-written");
        objects.push(Object {
            name,
            sum,
            data: Some(DataFile {
                table: layout.name.clone(),
                root: roots[part.table].clone(),
                columns: layout
                    .columns
                    .iter()
                    .map(|(name, _)| name.clone())
                    .collect(),
                rows: written.rows,
                raw_bytes: written.raw_bytes,
            }),
        });
        if let Some(table) = work.finish(&part, written.rows, written.raw_bytes) {
            work.announce(part.table, table.rows);
        }
    }
    Ok(objects)
}

async fn export_snapshot(
    job: &TakeJob<'_>,
) -> Result<(ReplicationConnection, SystemIdentity, CreatedSlot), BackupError> {
    let mut exporter = export::session(job.source, job.stream.application_name("backup"))
        .await
        .map_err(source("open a replication connection"))?;
    let identity = exporter
        .identify_system()
        .await
        .map_err(source("identify the system"))?;
    let slot = export::snapshot(&mut exporter, job.stream)
        .await
        .map_err(source("create a temporary slot"))?;
    Ok((exporter, identity, slot))
}

/// The tables that are not in the publication: their rows are in no base and no log.
async fn unpublished(client: &Client, published: &[TableName]) -> Result<Vec<String>, BackupError> {
    let tables = catalog::tables(client)
        .await
        .map_err(source("list the tables"))?;
    let rest = tables
        .iter()
        .filter(|table| !published.contains(&table.name));
    let words = rest.map(|table| {
        let reason = match (table.unlogged, table.identity) {
            (true, _) => "it is unlogged",
            (false, Identity::Missing) => "it has no key, and is not published",
            (false, _) => "it is not published: source.exclude names it, or it is new",
        };
        format!("the rows of table {}: {reason}", table.name)
    });
    Ok(words.collect())
}

/// The source's clock, which is the one that commits are stamped by.
async fn source_time(client: &Client) -> Result<Timestamp, BackupError> {
    let asked = client.query_one("SELECT clock_timestamp()", &[]).await;
    let row = asked.map_err(|error| source("ask for the time")(error.into()))?;
    of_server(row.get(0)).map_err(source("ask for the time"))
}

fn of_server(time: SystemTime) -> Result<Timestamp, PgError> {
    Timestamp::try_from(time)
        .map_err(|_| PgError::Protocol("a time outside of all calendars".to_owned()))
}
