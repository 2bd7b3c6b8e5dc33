//! What can be known of a load before it writes anything: whether it can succeed, and what it will be without.
//!
//! ```text
//! objects there? ▶ tools ▶ extensions ▶ schema.dump ▶ foreign keys, roles
//! ```
//!
//! # What it does not do
//! It reads no rows: what the store lists with its size may still be damaged, and is found out when it is loaded.

use std::collections::HashSet;

use tokio_postgres::Client;

use super::error::BackupError;
use super::load::{Chosen, LoadJob, Ownership, SCHEMA, SEQUENCES, chosen, listed};
use super::manifest::Manifest;
use super::{object, repository};
use crate::copy::dump::Dump;
use crate::copy::inventory;
use crate::copy::toc::LeftOut;
use crate::copy::tools::Tools;
use crate::names::TableName;

/// What is known of a load before anything is written.
pub struct Examined {
    pub(super) dump: Dump,
    pub(super) left_out: LeftOut,
    /// What will not be there, in words.
    pub(super) without: Vec<String>,
}

impl Examined {
    /// What will not be there, in words.
    pub fn without(&self) -> &[String] {
        &self.without
    }
}

/// Finds out whether a load can succeed, as far as that can be told without writing; `client` is any session on the server
/// of the target.
///
/// # Errors
/// [`BackupError`]
pub async fn examine(job: &LoadJob<'_>, client: &Client) -> Result<Examined, BackupError> {
    let chosen = chosen(job)?;
    expect_objects(job, &chosen).await?;
    let tools = Tools::find(
        job.settings.pg_bin.as_deref(),
        i32::try_from(job.manifest.pg_dump).unwrap_or(0) * 10_000,
    )
    .await?;
    inventory::check_extensions(client, &job.manifest.extensions).await?;
    let mut dump = Dump::new(tools)?;
    fetch_schema(job, &dump).await?;
    let (left_out, mut without) = left_out(job.manifest, &chosen);
    let lacking = inventory::lacking_roles(client, &job.manifest.roles).await?;
    if let Ownership::Without { owners, privileges } = job.ownership {
        dump.leave_out_ownership(owners, privileges);
        let needed = dump.roles_needed("schema", &left_out, &lacking).await?;
        let may_be_left_out = owners && privileges;
        if !may_be_left_out && !needed.is_empty() {
            return Err(BackupError::RolesLacking {
                base: job.base.to_owned(),
                problem: needed.problem(),
            });
        }
    }
    let roleless = dump.leave_out_roles("schema", &left_out, &lacking).await?;
    without.extend(roleless);
    Ok(Examined {
        dump,
        left_out,
        without,
    })
}

/// Refuses a base that by the store's listing lacks, or has cut off, what this load needs.
async fn expect_objects(job: &LoadJob<'_>, chosen: &[Chosen<'_>]) -> Result<(), BackupError> {
    let listed = job.store.list(job.base, None).await?;
    let mut flaws = repository::flaws(job.base, job.manifest, &listed);
    let mut needed: HashSet<&str> = chosen.iter().map(|(object, _)| &*object.name).collect();
    needed.extend([SCHEMA, SEQUENCES]);
    // What is there beside them does no harm.
    flaws.retain(|flaw| {
        needed.contains(&*flaw.object) && job.manifest.object(&flaw.object).is_some()
    });
    if flaws.is_empty() {
        return Ok(());
    }
    Err(BackupError::Damaged {
        base: job.base.to_owned(),
        flaws,
    })
}

async fn fetch_schema(job: &LoadJob<'_>, dump: &Dump) -> Result<(), BackupError> {
    let object = listed(job, SCHEMA)?;
    let schema = object::get(job.store, job.base, SCHEMA, &object.sum).await?;
    tokio::fs::write(dump.path("schema"), schema)
        .await
        .map_err(BackupError::local("write the schema for pg_restore"))
}

/// What of the schema is not created, and what is to be said of that.
fn left_out(manifest: &Manifest, chosen: &[Chosen<'_>]) -> (LeftOut, Vec<String>) {
    let mut left_out = LeftOut::default();
    let mut said = Vec::new();
    for entry in &manifest.left_out {
        left_out.entry(entry);
    }
    let filled: HashSet<TableName> = chosen.iter().map(|(_, data)| data.table.clone()).collect();
    for key in &manifest.foreign_keys {
        if let Some(what) = key.cannot_hold(&filled) {
            said.push(what);
            left_out.entry(&key.entry);
        }
    }
    (left_out, said)
}
