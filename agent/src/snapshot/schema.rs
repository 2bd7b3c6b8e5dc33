//! The schema: `pg_dump` of the source, restored on the replica before and after the rows.
//!
//! Before the rows, what rows need (`pre-data`) goes through a session of our own in one transaction,
//! with a mark in `dr_agent.schema_sync`: it is there as a whole or not at all, and a restart knows
//! which. After the rows, `pg_restore` builds indexes and constraints in parallel, each in its own
//! transaction; what is there already is left out of its list, so a restart builds the rest.
//!
//! New tables of a database that is replicated already are dumped by name. A new partition is
//! attached last, when its indexes exist: attaching first would give it the parent's indexes under
//! other names, and then a second set of its own.
//!
//! # Invariants
//! - Objects of schema `dr_agent`, publications and subscriptions of the source stay there.
//! - The source's event triggers never see the restore: its sessions are in replica role.
//!
//! # What it does not do
//! Tablespaces belong to a server's disks and are not carried over. Roles are not created.

use std::collections::HashSet;
use std::path::PathBuf;

use tokio_postgres::Client;

use super::CopyJob;
use super::deferred::{self, Statement};
use super::error::CopyError;
use super::inventory;
use super::progress::CopyObserver;
use super::session::Sessions;
use super::toc::{LeftOut, server_script, table_pattern};
use super::tools::Tools;
use crate::catalog::{TableName, quote_ident};

/// Newest replica that does not know `transaction_timeout`, and oldest `pg_restore` that sets it.
const TRANSACTION_TIMEOUT_SINCE: u32 = 17;

/// The schema of one copy.
pub(super) struct Schema<'a> {
    job: &'a CopyJob<'a>,
    sessions: &'a Sessions<'a>,
    tools: Tools,
    observer: &'a dyn CopyObserver,
    /// Holds the archives and lists; removed when dropped.
    directory: tempfile::TempDir,
    /// Tables of the job and the partitioned tables above them, without those of `dr_agent`.
    tables: Vec<TableName>,
    /// Options of every restore.
    ownership: Vec<&'static str>,
}

impl<'a> Schema<'a> {
    /// Finds the tools, dumps the schema at the snapshot, and decides about owners.
    pub(super) async fn dump(
        job: &'a CopyJob<'a>,
        sessions: &'a Sessions<'a>,
        source: &Client,
        replica: &Client,
        observer: &'a dyn CopyObserver,
    ) -> Result<Self, CopyError> {
        let tools = Tools::find(
            job.settings.pg_bin.as_deref(),
            sessions.source_version_num(),
        )
        .await?;
        let directory = tempfile::tempdir().map_err(|source| CopyError::ToolStart {
            program: "pg_dump (a directory for its archive)".to_owned(),
            source,
        })?;
        let own: Vec<TableName> = job
            .tables
            .iter()
            .map(|table| table.name.clone())
            .filter(|name| name.schema != "dr_agent")
            .collect();
        let ownership = match inventory::ownership_problem(source, replica).await? {
            None => Vec::new(),
            Some(problem) => {
                super::leave_out(observer, &format!("owners and privileges: {problem}"));
                vec!["--no-owner", "--no-privileges"]
            }
        };
        let schema = Self {
            job,
            sessions,
            tools,
            observer,
            directory,
            tables: inventory::with_ancestors(source, own).await?,
            ownership,
        };
        if job.whole_schema {
            schema.dump_to("schema", &[]).await?;
        } else if !schema.tables.is_empty() {
            schema.dump_to("schema", &schema.tables).await?;
        }
        Ok(schema)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Dumps `tables`, or everything where there are none.
    async fn dump_to(&self, archive: &str, tables: &[TableName]) -> Result<(), CopyError> {
        let mut arguments: Vec<String> = [
            "--format=custom",
            "--schema-only",
            "--no-password",
            "--no-publications",
            "--no-subscriptions",
            "--no-tablespaces",
            "--encoding=UTF8",
            "--lock-wait-timeout=60s",
            "--exclude-schema=dr_agent",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!("--snapshot={}", self.job.snapshot));
        arguments.push(format!("--file={}", self.path(archive).display()));
        if !tables.is_empty() {
            arguments.push("--strict-names".to_owned());
            arguments.extend(
                tables
                    .iter()
                    .map(|table| format!("--table={}", table_pattern(table))),
            );
        }
        let source = self.sessions.source_environment();
        self.tools
            .dump(&source, "dump the source's schema", &arguments)
            .await
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
            inventory::check_extensions(source, replica).await?;
            let script = self
                .script("schema", &LeftOut::default(), "--section=pre-data")
                .await?;
            return self.execute_pre_data(&script).await;
        }
        if by_hand && self.job.whole_schema {
            return self.execute_pre_data("").await;
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.dump_to("missing", &missing).await?;
        let mut left_out = LeftOut::default();
        left_out.kind("TABLE ATTACH");
        let script = self
            .script("missing", &left_out, "--section=pre-data")
            .await?;
        let schemas: HashSet<&str> = missing.iter().map(|table| table.schema.as_str()).collect();
        let create: String = schemas
            .into_iter()
            .map(|name| format!("CREATE SCHEMA IF NOT EXISTS {};\n", quote_ident(name)))
            .collect();
        self.execute_pre_data(&(create + &script)).await
    }

    async fn is_marked(&self, replica: &Client) -> Result<bool, CopyError> {
        let rows = replica
            .query(
                "SELECT 1 FROM dr_agent.schema_sync WHERE stream = $1",
                &[&self.job.stream.as_str()],
            )
            .await
            .map_err(CopyError::replica("read dr_agent.schema_sync"))?;
        Ok(!rows.is_empty())
    }

    async fn execute_pre_data(&self, script: &str) -> Result<(), CopyError> {
        // A session of its own: the script changes settings.
        let mut client = self.sessions.replica().await?;
        let doing = || CopyError::replica("create the source's schema");
        let transaction = client.transaction().await.map_err(doing())?;
        transaction.batch_execute(script).await.map_err(doing())?;
        if self.job.whole_schema {
            transaction
                .execute(
                    "INSERT INTO dr_agent.schema_sync (stream) VALUES ($1)
                         ON CONFLICT (stream) DO NOTHING",
                    &[&self.job.stream.as_str()],
                )
                .await
                .map_err(doing())?;
        }
        transaction.commit().await.map_err(doing())
    }

    /// The SQL that `pg_restore` would send for a section.
    async fn script(
        &self,
        archive: &str,
        left_out: &LeftOut,
        section: &str,
    ) -> Result<String, CopyError> {
        let Some(list) = self.list(archive, left_out, section).await? else {
            return Ok(String::new());
        };
        let mut arguments = vec![
            "--file=-".to_owned(),
            section.to_owned(),
            format!("--use-list={}", list.display()),
        ];
        arguments.extend(self.ownership.iter().map(|&option| option.to_owned()));
        arguments.push(self.path(archive).display().to_string());
        let script = self
            .tools
            .restore(None, "write the schema as SQL", &arguments)
            .await?;
        Ok(server_script(&script, self.sessions.replica_version_num()))
    }

    /// Writes the list of a section without what is left out; `None` where nothing remains.
    async fn list(
        &self,
        archive: &str,
        left_out: &LeftOut,
        section: &str,
    ) -> Result<Option<PathBuf>, CopyError> {
        let arguments = [
            "--list".to_owned(),
            section.to_owned(),
            self.path(archive).display().to_string(),
        ];
        let listing = self
            .tools
            .restore(None, "list the schema", &arguments)
            .await?;
        let (list, remains) = left_out.filter(&listing);
        if !remains {
            return Ok(None);
        }
        let path = self.path("list");
        tokio::fs::write(&path, list)
            .await
            .map_err(|source| CopyError::ToolStart {
                program: "pg_restore (its list)".to_owned(),
                source,
            })?;
        Ok(Some(path))
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
        if !self.path("schema").exists() {
            return Ok(());
        }
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
        let mut later: Vec<Statement> = attachments.iter().map(Statement::attachment).collect();
        for key in inventory::foreign_keys(source).await? {
            let concerns_us = self.job.whole_schema || ours.contains(&key.table);
            if !concerns_us || present.contains(&key.entry) {
                continue;
            }
            if let Some(other) = key
                .refers_to
                .iter()
                .find(|table| !replicated.contains(table))
            {
                // It would find no rows: those it had, and those a promoted replica gets.
                let what = format!(
                    "foreign key {} of {}: {other}, which it refers to, is not replicated",
                    key.name, key.table
                );
                super::leave_out(self.observer, &what);
                left_out.entry(&key.entry);
            } else if !one_snapshot {
                left_out.entry(&key.entry);
                later.push(Statement::foreign_key(&key));
            }
        }
        self.build(&left_out).await?;
        deferred::run_or_defer(replica, self.job, &later).await
    }

    async fn build(&self, left_out: &LeftOut) -> Result<(), CopyError> {
        const SECTION: &str = "--section=post-data";
        let refuses_settings = self.tools.version.major >= TRANSACTION_TIMEOUT_SINCE
            && self.sessions.replica_version_num() / 10_000 < TRANSACTION_TIMEOUT_SINCE as i32;
        if refuses_settings {
            // Its sessions begin with a setting the replica does not know. One session of ours
            // leaves that out; slower, since it is one.
            let script = self.script("schema", left_out, SECTION).await?;
            let client = self.sessions.replica().await?;
            return client
                .batch_execute(&script)
                .await
                .map_err(CopyError::replica("build indexes and constraints"));
        }
        let Some(list) = self.list("schema", left_out, SECTION).await? else {
            return Ok(());
        };
        let mut arguments = vec![
            // PGDATABASE names the database; given here it would be read as a connection string.
            "--dbname=".to_owned(),
            "--no-password".to_owned(),
            "--exit-on-error".to_owned(),
            SECTION.to_owned(),
            format!("--jobs={}", self.sessions.jobs()),
            format!("--use-list={}", list.display()),
        ];
        arguments.extend(self.ownership.iter().map(|&option| option.to_owned()));
        arguments.push(self.path("schema").display().to_string());
        let replica = self.sessions.replica_environment();
        self.tools
            .restore(Some(&replica), "build indexes and constraints", &arguments)
            .await?;
        Ok(())
    }
}
