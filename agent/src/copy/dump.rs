//! One `pg_dump` file in a directory of its own: written from the source, read back as SQL or restored.
//!
//! Used by the schema of the initial copy and by base backups. What of the file is used is the caller's
//! to say ([`LeftOut`]), what of it exists where is not known here.
//!
//! # Invariants
//! - Objects of schema `dr_agent`, publications and subscriptions of the source stay there.
//! - The directory goes when the value is dropped.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::build;
use super::error::CopyError;
use super::owners;
use super::roles::LackingRoles;
use super::session::{CopySource, ReplicaSide, SOURCE_LOCK_TIMEOUT};
use super::toc::{self, LeftOut, server_script, table_pattern};
use super::tools::Tools;
use crate::names::TableName;

/// What rows need: tables, types, functions.
pub(crate) const PRE_DATA: &str = "--section=pre-data";

/// What needs rows: indexes, constraints, triggers.
pub(crate) const POST_DATA: &str = "--section=post-data";

/// What no other role may create.
const OF_SUPERUSERS: [&str; 2] = ["EVENT TRIGGER", "FOREIGN DATA WRAPPER"];

/// Comes last, and only to what is there.
const COMMENT: &str = "COMMENT";

/// What tables may need that is none of them.
const NEEDED_BY_TABLES: [&str; 12] = [
    "SCHEMA",
    "EXTENSION",
    "COLLATION",
    "SHELL TYPE",
    "TYPE",
    "DOMAIN",
    "FUNCTION",
    "PROCEDURE",
    "AGGREGATE",
    "OPERATOR",
    "CAST",
    "TEXT SEARCH",
];

/// A directory for `pg_dump` files and the lists made of them.
pub(crate) struct Dump {
    tools: Tools,
    directory: tempfile::TempDir,
    /// Options of every restore.
    ownership: Vec<&'static str>,
    /// What cannot be without a role that is lacking, or without a superuser.
    roleless: LeftOut,
    /// For whom owners and privileges are written one by one.
    role: Option<LackingRoles>,
    /// The owners of the source's extensions.
    extensions: BTreeMap<String, String>,
}

impl Dump {
    /// An empty directory.
    pub(crate) fn new(tools: Tools) -> Result<Self, CopyError> {
        let directory = tempfile::tempdir().map_err(|source| CopyError::ToolStart {
            program: "pg_dump (a directory for its archive)".to_owned(),
            source,
        })?;
        Ok(Self {
            tools,
            directory,
            ownership: Vec::new(),
            roleless: LeftOut::default(),
            role: None,
            extensions: BTreeMap::new(),
        })
    }

    /// Creates these extensions in the name of their owners.
    pub(crate) fn extensions_of(&mut self, owners: BTreeMap<String, String>) {
        self.extensions = owners;
    }

    /// Leaves owners out of what is restored, or privileges, or both.
    pub(crate) fn leave_out_ownership(&mut self, owners: bool, privileges: bool) {
        self.ownership.clear();
        self.ownership.extend(owners.then_some("--no-owner"));
        self.ownership
            .extend(privileges.then_some("--no-privileges"));
    }

    /// Those of the roles that what is restored of this file needs.
    pub(crate) async fn roles_needed(
        &self,
        name: &str,
        left_out: &LeftOut,
        lacking: &LackingRoles,
    ) -> Result<LackingRoles, CopyError> {
        if lacking.is_empty() {
            return Ok(LackingRoles::default());
        }
        let mut sql = self.script(name, left_out, PRE_DATA, 0).await?;
        sql.push_str(&self.script(name, left_out, POST_DATA, 0).await?);
        Ok(lacking.needed_by(&sql))
    }

    /// Leaves out of what is restored what needs one of the lacking roles: its ownership and privileges, and each policy
    /// or user mapping that names one; and what only a superuser creates, where ours is none. Says what that is.
    pub(crate) async fn leave_out_roles(
        &mut self,
        name: &str,
        left_out: &LeftOut,
        lacking: &LackingRoles,
    ) -> Result<Vec<String>, CopyError> {
        let mut said = Vec::new();
        if lacking.restricted {
            let listing = self.listing(name, None).await?;
            for object in toc::objects_of(&listing, &OF_SUPERUSERS) {
                said.push(format!(
                    "{}: only a superuser creates it",
                    object.trim_end()
                ));
                self.roleless.object(&object);
            }
        }
        let needed = self.roles_needed(name, left_out, lacking).await?;
        if lacking.restricted || !needed.is_empty() {
            self.role = Some(lacking.clone());
        }
        if needed.is_empty() {
            return Ok(said);
        }
        said.push(format!("owners and privileges: {}", needed.problem()));
        let needed = self.roles_needed(name, left_out, lacking).await?;
        if needed.is_empty() {
            return Ok(said);
        }
        for object in self.objects_with_roles(name).await? {
            let mut only = LeftOut::default();
            only.all_but(&object);
            let named = self.roles_needed(name, &only, lacking).await?;
            if !named.is_empty() {
                said.push(format!("{}: {}", object.trim_end(), named.problem()));
                self.roleless.object(&object);
            }
        }
        Ok(said)
    }

    /// The objects of the file that name roles and are neither owners nor privileges.
    async fn objects_with_roles(&self, name: &str) -> Result<Vec<String>, CopyError> {
        let listing = self.listing(name, None).await?;
        Ok(toc::objects_of(&listing, &["POLICY", "USER MAPPING"]))
    }

    /// The programs.
    pub(crate) fn tools(&self) -> &Tools {
        &self.tools
    }

    /// Where a file of this name is, or would be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Dumps what the schema has beside tables, and locks none of them.
    pub(crate) async fn take_without_tables(
        &self,
        source: &CopySource<'_>,
        name: &str,
    ) -> Result<(), CopyError> {
        self.take_with(source, name, vec!["--exclude-table=*.*".to_owned()])
            .await
    }

    /// Creates objects that tables need, each by itself; what is refused stays away.
    pub(crate) async fn create_what_can_be(
        &self,
        name: &str,
        left_out: &LeftOut,
        replica: &ReplicaSide<'_>,
    ) -> Result<(), CopyError> {
        let needed = LeftOut::all_but_kinds(&NEEDED_BY_TABLES);
        let (what, doing) = ([left_out, &needed], "create types and functions");
        self.restore_what_can_be(name, &what, PRE_DATA, doing, replica)
            .await
    }

    /// Each object by itself; what is refused stays away.
    async fn restore_what_can_be(
        &self,
        name: &str,
        left_out: &[&LeftOut],
        section: &str,
        doing: &'static str,
        replica: &ReplicaSide<'_>,
    ) -> Result<(), CopyError> {
        let Some(list) = self.list(name, left_out, section).await? else {
            return Ok(());
        };
        let mut arguments = vec![
            "--dbname=".to_owned(),
            "--no-password".to_owned(),
            section.to_owned(),
            format!("--use-list={}", list.display()),
        ];
        arguments.extend(self.ownership.iter().map(|&option| option.to_owned()));
        arguments.push(self.path(name).display().to_string());
        let environment = replica.environment();
        match self
            .tools
            .restore(Some(&environment), doing, &arguments)
            .await
        {
            Err(CopyError::ToolFailed { stderr, .. }) => {
                tracing::debug!(doing, stderr, "not everything could be done");
                Ok(())
            }
            created => created.map(|_| ()),
        }
    }

    /// Dumps the schema of `tables`, or of the whole database where there are none.
    pub(crate) async fn take(
        &self,
        source: &CopySource<'_>,
        name: &str,
        tables: &[TableName],
    ) -> Result<(), CopyError> {
        let mut which = Vec::new();
        if !tables.is_empty() {
            which.push("--strict-names".to_owned());
            let patterns = tables.iter().map(table_pattern);
            which.extend(patterns.map(|table| format!("--table={table}")));
        }
        self.take_with(source, name, which).await
    }

    async fn take_with(
        &self,
        source: &CopySource<'_>,
        name: &str,
        which: Vec<String>,
    ) -> Result<(), CopyError> {
        let mut arguments: Vec<String> = [
            "--format=custom",
            "--schema-only",
            "--no-password",
            "--no-publications",
            "--no-subscriptions",
            "--no-tablespaces",
            "--encoding=UTF8",
            "--exclude-schema=dr_agent",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!("--lock-wait-timeout={SOURCE_LOCK_TIMEOUT}"));
        arguments.push(format!("--snapshot={}", source.snapshot()));
        arguments.push(format!("--file={}", self.path(name).display()));
        arguments.extend(which);
        let environment = source.environment();
        self.tools
            .dump(&environment, "dump the source's schema", &arguments)
            .await
    }

    /// The SQL of a section, as a server of this version understands it; 0 means every version.
    pub(crate) async fn script(
        &self,
        name: &str,
        left_out: &LeftOut,
        section: &str,
        version_num: i32,
    ) -> Result<String, CopyError> {
        let Some(list) = self.list(name, &[left_out], section).await? else {
            return Ok(String::new());
        };
        let mut arguments = vec![
            "--file=-".to_owned(),
            section.to_owned(),
            format!("--use-list={}", list.display()),
        ];
        arguments.extend(self.owning(section));
        arguments.push(self.path(name).display().to_string());
        let script = self
            .tools
            .restore(None, "write the schema as SQL", &arguments)
            .await?;
        let script = server_script(&script, version_num);
        let nobody = LackingRoles::default();
        Ok(match (&self.role, section == PRE_DATA) {
            (Some(role), true) => owners::as_role(&script, role, &self.extensions),
            (None, true) if !self.extensions.is_empty() => {
                owners::as_role(&script, &nobody, &self.extensions)
            }
            _ => script,
        })
    }

    /// The options about owners and privileges. Behind the rows come hardly any, and nobody writes those one by one.
    fn owning(&self, section: &str) -> Vec<String> {
        let neither: &[&str] = match (&self.role, section == POST_DATA) {
            (Some(_), true) => &["--no-owner", "--no-privileges"],
            _ => &self.ownership,
        };
        neither.iter().map(|&option| option.to_owned()).collect()
    }

    /// Writes the list of a section without what is left out; `None` where nothing remains.
    async fn list(
        &self,
        name: &str,
        left_out: &[&LeftOut],
        section: &str,
    ) -> Result<Option<PathBuf>, CopyError> {
        let listing = self.listing(name, Some(section)).await?;
        let (mut list, mut remains) = self.roleless.filter(&listing);
        for left_out in left_out {
            (list, remains) = left_out.filter(&list);
        }
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

    async fn listing(&self, name: &str, section: Option<&str>) -> Result<String, CopyError> {
        let mut arguments = vec!["--list".to_owned()];
        arguments.extend(section.map(str::to_owned));
        arguments.push(self.path(name).display().to_string());
        self.tools
            .restore(None, "list the schema", &arguments)
            .await
    }

    /// Builds indexes, constraints, triggers and rules, on `jobs` sessions.
    pub(crate) async fn build(
        &self,
        name: &str,
        left_out: &LeftOut,
        replica: &ReplicaSide<'_>,
        jobs: u16,
    ) -> Result<(), CopyError> {
        let version_num = replica.version_num();
        let left_out = left_out.without(&[COMMENT]);
        let script = self.script(name, &left_out, POST_DATA, version_num).await?;
        build::run(&script, replica, jobs).await
    }

    /// Comments on indexes, constraints and triggers, but for those that are not there.
    pub(crate) async fn comment(
        &self,
        name: &str,
        left_out: &LeftOut,
        replica: &ReplicaSide<'_>,
    ) -> Result<(), CopyError> {
        let version_num = replica.version_num();
        let comments = left_out.only(&[COMMENT]);
        let script = self.script(name, &comments, POST_DATA, version_num).await?;
        build::run_what_can_be(&script, replica).await
    }
}
