//! The schema: `pg_dump` of the source, restored on the replica before and after the rows.
//!
//! Before the rows, what rows need (`pre-data`) goes through a session of our own in one transaction,
//! with a mark in `dr_agent.schema_sync`: it is there as a whole or not at all, and a restart knows
//! which. After the rows, several sessions build indexes and constraints ([`super::build`]), each in its own
//! transaction; what is there already is left out, so a restart builds the rest.
//!
//! New tables of a database that is replicated already are dumped by name. A new partition is
//! attached last, when its indexes exist: attaching first would give it the parent's indexes under
//! other names, and then a second set of its own.
//!
//! Dumping takes longer than looking, so it is done when something is to be restored of it: a copy that is killed again and
//! again while its rows are copied does not begin with a dump each time.
//!
//! # Invariants
//! - The source's event triggers never see the restore: its sessions are in replica role.
//!
//! # What it does not do
//! Tablespaces belong to a server's disks and are not carried over. Roles are not created.

use std::collections::HashSet;

use tokio::sync::OnceCell;
use tokio_postgres::Client;

use super::deferred::{self, DeferredStatement};
use super::dump::{Dump, PRE_DATA};
use super::error::CopyError;
use super::inventory;
use super::ledger::CopyLedger;
use super::progress::CopyObserver;
use super::toc::LeftOut;
use super::tools::Tools;
use super::{CopyJob, Sessions};
use crate::catalog::routing;
use crate::names::TableName;
use crate::pg::quote::quote_ident;
use crate::schema::schema_sync;

/// The schema of one copy.
pub(super) struct Schema<'a> {
    job: &'a CopyJob<'a>,
    sessions: &'a Sessions<'a>,
    dump: OnceCell<Dump>,
    observer: &'a dyn CopyObserver,
    /// Tables of the job and the partitioned tables above them, without those of `dr_agent`.
    tables: Vec<TableName>,
}

impl<'a> Schema<'a> {
    /// Nothing is dumped yet.
    pub(super) async fn new(
        job: &'a CopyJob<'a>,
        sessions: &'a Sessions<'a>,
        source: &Client,
        observer: &'a dyn CopyObserver,
    ) -> Result<Self, CopyError> {
        let own: Vec<TableName> = job
            .tables
            .iter()
            .map(|table| table.name.clone())
            .filter(|name| name.schema != "dr_agent")
            .collect();
        Ok(Self {
            job,
            sessions,
            dump: OnceCell::new(),
            observer,
            tables: inventory::with_ancestors(source, own).await?,
        })
    }

    /// Whether there is anything to dump.
    fn is_nothing(&self) -> bool {
        !self.job.whole_schema && self.tables.is_empty()
    }

    /// The dump of the schema, taken when it is first asked for.
    async fn dump(&self, source: &Client, replica: &Client) -> Result<&Dump, CopyError> {
        let taking = || self.take_dump(source, replica);
        self.dump.get_or_try_init(taking).await
    }

    /// Finds the tools, dumps the schema at the snapshot, and decides about owners.
    async fn take_dump(&self, source: &Client, replica: &Client) -> Result<Dump, CopyError> {
        let from = &self.sessions.source;
        let pg_bin = self.job.settings.pg_bin.as_deref();
        let tools = Tools::find(pg_bin, from.version_num()).await?;
        let roles = inventory::roles(source).await?;
        let mut dump = Dump::new(tools)?;
        dump.extensions_of(inventory::extension_owners(source).await?);
        let tables: &[TableName] = match self.job.whole_schema {
            true => &[],
            false => &self.tables,
        };
        dump.take(from, "schema", tables).await?;
        let lacking = inventory::lacking_roles(replica, &roles).await?;
        let everything = LeftOut::default();
        let without = dump.leave_out_roles("schema", &everything, &lacking);
        for what in without.await? {
            super::leave_out(self.observer, &what);
        }
        Ok(dump)
    }

    /// Makes sure that every table exists on the replica, empty or not.
    pub(super) async fn restore_pre_data(
        &self,
        source: &Client,
        replica: &Client,
    ) -> Result<(), CopyError> {
        let missing = inventory::missing_on(replica, &self.tables).await?;
        let marked = self.is_marked(replica).await?;
        // A schema put there by hand has all tables; one without tables has only its mark.
        let by_hand = !marked && !self.tables.is_empty() && missing.is_empty();
        if self.job.whole_schema && !marked && !by_hand {
            let extensions = inventory::extensions(source).await?;
            inventory::check_extensions(replica, &extensions).await?;
            inventory::check_untrusted(replica, &extensions).await?;
            let dump = self.dump(source, replica).await?;
            let script = self.script(dump, "schema", &LeftOut::default()).await?;
            return self.execute_pre_data(&script, &[]).await;
        }
        if by_hand && self.job.whole_schema {
            return self.execute_pre_data("", &[]).await;
        }
        if missing.is_empty() {
            // An earlier copy may have been killed between creating and attaching them.
            return self
                .attach_what_is_routed(source, replica, &self.tables)
                .await;
        }
        let dump = self.dump(source, replica).await?;
        self.bring_along(dump, source, replica).await?;
        let mut missing = missing;
        missing.extend(inventory::lacking_sequences(source, replica, &missing).await?);
        dump.take(&self.sessions.source, "missing", &missing)
            .await?;
        let mut left_out = LeftOut::default();
        left_out.kind("TABLE ATTACH");
        let script = self.script(dump, "missing", &left_out).await?;
        let schemas: HashSet<&str> = missing.iter().map(|table| table.schema.as_str()).collect();
        let create: String = schemas
            .into_iter()
            .map(|name| format!("CREATE SCHEMA IF NOT EXISTS {};\n", quote_ident(name)))
            .collect();
        self.execute_pre_data(&(create + &script), &missing).await?;
        self.attach_what_is_routed(source, replica, &missing).await
    }

    /// Rows that are placed by the table above need their partition in its place before they come. The others are attached
    /// last.
    async fn attach_what_is_routed(
        &self,
        source: &Client,
        replica: &Client,
        missing: &[TableName],
    ) -> Result<(), CopyError> {
        let tops = routing::tops(source, missing).await;
        let tops = tops.map_err(CopyError::source("read the partitioned tables"))?;
        if tops.is_empty() {
            return Ok(());
        }
        let mut attachments = inventory::unattached(source, replica, missing).await?;
        attachments.retain(|attachment| tops.contains_key(&attachment.child));
        let statements: Vec<DeferredStatement> = attachments
            .iter()
            .map(DeferredStatement::attachment)
            .collect();
        deferred::run_or_defer(replica, self.job, &statements).await
    }

    /// Creates what a late table may need and the replica has not: schemas, types, functions, extensions. One that cannot be
    /// created is missing afterwards as it was before; whether the table needs it, its own creation shows.
    async fn bring_along(
        &self,
        dump: &Dump,
        source: &Client,
        replica: &Client,
    ) -> Result<(), CopyError> {
        let mut left_out = LeftOut::default();
        for entry in inventory::present_pre_data(source, replica).await? {
            left_out.entry(&entry);
        }
        dump.take_without_tables(&self.sessions.source, "needed")
            .await?;
        dump.create_what_can_be("needed", &left_out, &self.sessions.replica)
            .await
    }

    async fn is_marked(&self, replica: &Client) -> Result<bool, CopyError> {
        schema_sync::is_noted(replica, self.job.stream)
            .await
            .map_err(CopyError::replica("look whether the schema is there"))
    }

    /// Executes the script, which creates these tables of a database that is replicated already.
    async fn execute_pre_data(&self, script: &str, created: &[TableName]) -> Result<(), CopyError> {
        // A session of its own: the script changes settings.
        let mut client = self.sessions.replica.open().await?;
        let doing = || CopyError::replica("create the source's schema");
        let transaction = client.transaction().await.map_err(doing())?;
        transaction.batch_execute(script).await.map_err(doing())?;
        if self.job.whole_schema {
            schema_sync::note(&transaction, self.job.stream)
                .await
                .map_err(CopyError::replica("create the source's schema"))?;
        }
        let ledger = CopyLedger::new(self.job);
        let noted = ledger.0.created(&transaction, created).await;
        noted.map_err(CopyError::replica("create the source's schema"))?;
        transaction.commit().await.map_err(doing())
    }

    async fn script(
        &self,
        dump: &Dump,
        archive: &str,
        left_out: &LeftOut,
    ) -> Result<String, CopyError> {
        let version_num = self.sessions.replica.version_num();
        dump.script(archive, left_out, PRE_DATA, version_num).await
    }

    /// Builds indexes, constraints, triggers and rules, then attaches new partitions.
    ///
    /// `replicated` are all tables whose rows the replica has; `one_snapshot` says whether all of
    /// them have rows as of the same snapshot. If not, a foreign key may find its row missing until
    /// the stream has brought it, and is deferred ([`super::deferred`]).
    pub(super) async fn restore_post_data(
        &self,
        source: &Client,
        replica: &Client,
        replicated: &HashSet<TableName>,
        one_snapshot: bool,
    ) -> Result<(), CopyError> {
        if self.is_nothing() {
            return Ok(());
        }
        let dump = self.dump(source, replica).await?;
        let attachments = inventory::unattached(source, replica, &self.tables).await?;
        let mut left_out = LeftOut::default();
        let present = inventory::present_post_data(source, replica).await?;
        for entry in &present {
            left_out.entry(entry);
        }
        for entry in inventory::own_event_triggers(source).await? {
            left_out.entry(&entry);
        }
        for entry in inventory::index_attachments(source, &attachments).await? {
            // Attaching the table attaches its indexes.
            left_out.entry(&entry);
        }
        let ours: HashSet<&TableName> = self.tables.iter().collect();
        // Partitions first: a foreign key may refer to rows in one.
        let mut later: Vec<DeferredStatement> = attachments
            .iter()
            .map(DeferredStatement::attachment)
            .collect();
        for key in inventory::foreign_keys(source).await? {
            let concerns_us = self.job.whole_schema || ours.contains(&key.table);
            if !concerns_us || present.contains(&key.entry) {
                continue;
            }
            if let Some(what) = key.cannot_hold(replicated) {
                super::leave_out(self.observer, &what);
                left_out.entry(&key.entry);
            } else if !one_snapshot {
                left_out.entry(&key.entry);
                later.extend(DeferredStatement::foreign_keys([&key]));
            }
        }
        match self.build(dump, &left_out).await {
            Err(error) if error.may_be_missing_reference() => {
                let both = (source, replica);
                self.build_without_keys(dump, both, left_out.clone())
                    .await?;
            }
            built => built?,
        }
        deferred::run_or_defer(replica, self.job, &later).await?;
        dump.comment("schema", &left_out, &self.sessions.replica)
            .await
    }

    async fn build(&self, dump: &Dump, left_out: &LeftOut) -> Result<(), CopyError> {
        let (replica, jobs) = (&self.sessions.replica, self.sessions.jobs());
        dump.build("schema", left_out, replica, jobs).await
    }

    /// Rows of the source violate one of its own foreign keys: what was written in replica role, or with triggers disabled.
    /// Everything else is built as before, and each key by itself.
    async fn build_without_keys(
        &self,
        dump: &Dump,
        (source, replica): (&Client, &Client),
        mut left_out: LeftOut,
    ) -> Result<(), CopyError> {
        let present = inventory::present_post_data(source, replica).await?;
        present.iter().for_each(|entry| left_out.entry(entry));
        let mut keys = Vec::new();
        for key in inventory::foreign_keys(source).await? {
            let concerns_us = self.job.whole_schema || self.tables.contains(&key.table);
            if concerns_us && !left_out.has(&key.entry) {
                left_out.entry(&key.entry);
                keys.extend(DeferredStatement::foreign_keys([&key]));
            }
        }
        self.build(dump, &left_out).await?;
        deferred::add_keys(replica, &keys, self.observer).await
    }
}
