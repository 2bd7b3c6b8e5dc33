//! What the replica is, compared with what the source says it is: finds what no command told of.
//!
//! ```text
//! dr_agent.fingerprint (told in-band) ─┐
//! dr_agent.own_fingerprint             ┴▶ unlike ▶ judged by shape ▶ the same in other words
//!                                                                 └▶ dr_agent.ddl_waiting: named, and healed like what waits
//! ```
//!
//! # Invariants
//! - It compares in one snapshot, and only where nothing is on its way that changes shapes: what is told and what is here are of one
//!   moment. What waits otherwise, or belongs to a table that is not there yet, is no drift.
//! - What is the same has been compared by its hash, or once by its shape.
//!
//! # What it does not do
//! It takes nothing away that only the replica has.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::apply;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::quote_ident;
use crate::schema::ddl_waiting::{self, WaitingObject};
use crate::schema::deferred::{self, Deferred};
use crate::schema::fingerprint::{self, Unlike};
use crate::schema::table_sync;
use crate::shape::{self, Roles};

/// A lock on what a definition is made of is not waited for.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ; SET LOCAL lock_timeout = '200ms'";

/// Compares, and notes what differs. Returns how many objects do, or none where that could not be said now.
///
/// # Errors
/// When the replica refuses.
pub async fn look(
    client: &mut Client,
    stream: &StreamName,
    wholly: bool,
) -> Result<Option<usize>, PgError> {
    client.batch_execute(BEGIN).await?;
    let looked = look_within(client, stream, wholly).await;
    match &looked {
        Ok(_) => client.batch_execute("COMMIT").await?,
        Err(error) if error.sqlstate().is_some() => client.batch_execute("ROLLBACK").await?,
        Err(_) => {}
    }
    looked
}

async fn look_within(
    client: &Client,
    stream: &StreamName,
    wholly: bool,
) -> Result<Option<usize>, PgError> {
    if !fingerprint::refresh(client, wholly).await? {
        return Ok(None);
    }
    let Some(across) = fingerprint::comparable(client).await? else {
        return Ok(None);
    };
    let looking = Looking {
        client,
        stream,
        across,
        roles: super::roles(client).await?,
        kept: deferred::read(client, stream, true).await?,
    };
    let mut drifted = BTreeSet::new();
    let unlike = fingerprint::unlike(client, stream).await?;
    let are_all = unlike.len() < fingerprint::UNLIKE_MAX;
    for object in unlike {
        if looking.has_drifted(&object).await? {
            drifted.insert(object.address);
        }
    }
    // Otherwise the rest is compared next time.
    if are_all {
        ddl_waiting::forget_drift(client, stream, &drifted).await?;
        fingerprint::note_compared(client).await?;
    }
    Ok(Some(drifted.len()))
}

struct Looking<'a> {
    client: &'a Client,
    stream: &'a StreamName,
    /// The source is of another major version.
    across: bool,
    roles: Roles,
    /// Constraints that are kept aside until the replica is opened.
    kept: Vec<Deferred>,
}

impl Looking<'_> {
    /// Whether it differs in what counts; notes it.
    async fn has_drifted(&self, object: &Unlike) -> Result<bool, PgError> {
        if let Some(table) = apply::table_of_shape(&object.address, Some(&object.shape))
            && table_sync::is_unfinished(self.client, self.stream, &table).await?
            // Commands have passed it by: it could not be copied into what it was.
            && !(object.address.kind == "table"
                && table_sync::is_left_as_it_was(self.client, self.stream, &table).await?)
        {
            return Ok(false);
        }
        let differences = self.differences(object).await?;
        if differences.is_empty() {
            fingerprint::note_the_same(self.client, object).await?;
            return Ok(false);
        }
        let waiting = WaitingObject {
            address: object.address.clone(),
            identity: object.identity.clone(),
            shape: Some(object.shape.clone()),
            reason: format!("differs from the source: {}", differences.join(", ")),
            ddl: 0,
            across: self.across,
            accepted: None,
            drift: true,
        };
        ddl_waiting::note(self.client, self.stream, &waiting).await?;
        Ok(true)
    }

    async fn differences(&self, object: &Unlike) -> Result<Vec<String>, PgError> {
        let found = shape::read(self.client, &object.address).await?;
        let Some(found) = found else {
            // One that could not be built on the source is nobody's.
            let never =
                object.address.kind == "index" && object.shape.get("valid") == Some(&false.into());
            return Ok(match never {
                true => Vec::new(),
                false => vec!["it is not there".to_owned()],
            });
        };
        let (address, roles) = (&object.address, &self.roles);
        let mut differences =
            shape::differences(address, &object.shape, &found, roles, self.across);
        differences.retain(|line| !self.is_kept_aside(line));
        Ok(differences)
    }

    /// Whether a constraint is missing because its statement waits for the opening.
    fn is_kept_aside(&self, difference: &str) -> bool {
        let name = difference
            .strip_prefix("constraint ")
            .and_then(|rest| rest.strip_suffix(" is missing"));
        name.is_some_and(|name| {
            let name = quote_ident(name);
            self.kept.iter().any(|kept| kept.statement.contains(&name))
        })
    }
}

/// Whether what was noted of an object is still what the source says, and may be brought about now: the caller holds the progress
/// row.
pub(super) async fn still_stands(client: &Client, object: &WaitingObject) -> Result<bool, PgError> {
    Ok(fingerprint::comparable(client).await?.is_some()
        && fingerprint::is_still(client, &object.address, object.shape.as_ref()).await?)
}
