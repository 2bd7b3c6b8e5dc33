//! One command of the source, on the replica, in the transaction of its rows.
//!
//! ```text
//! shapes already as recorded ──────────────────────────────────────────────▶ nothing to do
//! exact statement ▶ savepoint, role, search_path ▶ run ▶ shapes as recorded ▶ done
//!        none, refused, or another shape ▶ back to the savepoint
//! shapes ▶ statements that bring each object to what was recorded ▶ shapes as recorded ▶ done, rows copied again where they differ
//!        not possible ▶ the object waits, with the reason; the rest goes on
//! ```
//!
//! # Invariants
//! - A statement that does not lead to the recorded shapes leaves nothing behind.
//! - A table whose copy was taken later has the shape of that moment, and is not touched.
//! - Only what the server refuses for good counts as refused; what passes ends the session, which begins anew.
//!
//! # What it does not do
//! It begins and ends no transaction, and does not know what a table's rows are.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::build;
use super::outcome::{Done, Outcome};
use super::statement::{self, Statement};
use super::{remove, rename, rewrite};
use crate::error::{Class, Classify as _};
use crate::names::TableName;
use crate::names::object::ObjectAddress;
use crate::pg::PgError;
use crate::schema::ddl::{DdlEvent, EventKind, EventObject};
use crate::schema::ddl_waiting::WaitingObject;
use crate::shape::{self, Healing, Roles};

/// How often an object is brought nearer to its recorded shape before it waits.
const ROUNDS: usize = 2;

const BACK: &str = "ROLLBACK TO ddl; RELEASE ddl";

/// The commands of one transaction.
#[derive(Debug, Default)]
pub struct Replay {
    /// Tables that the source has written anew in this transaction.
    rewritten: BTreeMap<TableName, i32>,
    /// The statement that was run last: a command that drops and alters is told twice.
    ran: Option<String>,
    /// The source is of another major version.
    across: bool,
    /// On a larger table an index is built beside the stream.
    index_bytes: u64,
    roles: Option<Roles>,
}

impl Replay {
    /// Of a transaction; `across` where the two servers are not of one major version.
    pub fn new(across: bool, index_bytes: u64) -> Self {
        Self {
            across,
            index_bytes,
            ..Self::default()
        }
    }

    /// Brings the replica to what the command has left of these of its objects on the source.
    ///
    /// # Errors
    /// Where the server fails otherwise than by refusing a statement.
    pub async fn apply(
        &mut self,
        client: &Client,
        event: &DdlEvent,
        objects: &[&EventObject],
    ) -> Result<Done, PgError> {
        if objects.is_empty() {
            return Ok(Done::of(Outcome::Skipped));
        }
        match event.kind {
            EventKind::Rewrite => {
                for object in objects {
                    if let (Some(table), Some(reason)) = (table_of(object), object.reason) {
                        *self.rewritten.entry(table).or_default() |= reason;
                    }
                }
                Ok(Done::of(Outcome::Nothing))
            }
            EventKind::Command => self.command(client, event, objects).await,
            EventKind::Drop => self.drop(client, event, objects).await,
        }
    }

    async fn command(
        &mut self,
        client: &Client,
        event: &DdlEvent,
        objects: &[&EventObject],
    ) -> Result<Done, PgError> {
        if let [object] = objects
            && build::is_for_later(client, object, self.index_bytes).await?
        {
            return Ok(Done {
                waiting: vec![self.waits(event, object, build::LATER.to_owned())],
                ..Done::of(Outcome::Later)
            });
        }
        let mut copy_again = self.rows_changed(client, objects).await?;
        // What a drop of the same statement has run is not run twice.
        let (exact, ran) = match statement::of(event) {
            Statement::Exact(text) if self.ran.as_ref() == Some(&text) => (None, true),
            Statement::Exact(text) => (Some(text), false),
            Statement::Shape(_) => (None, false),
        };
        let refusal = match exact {
            None => None,
            Some(text) => match self.by_statement(client, event, &text, objects).await? {
                Err(reason) => Some(reason),
                Ok(()) => {
                    self.ran = Some(text);
                    return Ok(Done {
                        settled: addresses(objects),
                        ..Done::with_rows(Outcome::Statement, copy_again)
                    });
                }
            },
        };
        let tells = ran || objects.iter().any(|object| object.shape.is_some());
        if tells && self.differences(client, objects).await?.is_empty() {
            return Ok(Done {
                settled: addresses(objects),
                ..Done::of(Outcome::Nothing)
            });
        }
        let reasons = self.by_shapes(client, objects, &mut copy_again).await?;
        let mut done = Done::with_rows(Outcome::Shape, copy_again);
        for (object, reason) in objects.iter().zip(reasons) {
            let reason = match (reason, &refusal) {
                (None, _) => {
                    done.settled.push(object.address.clone());
                    continue;
                }
                (Some(reason), None) => reason,
                (Some(reason), Some(refusal)) => format!("{reason}; its statement: {refusal}"),
            };
            done.waiting.push(self.waits(event, object, reason));
            done.outcome = Outcome::Waits;
        }
        Ok(done)
    }

    fn waits(&self, event: &DdlEvent, object: &EventObject, reason: String) -> WaitingObject {
        WaitingObject {
            address: object.address.clone(),
            identity: object.identity.clone(),
            shape: object.shape.clone(),
            reason,
            ddl: event.id,
            across: self.across,
            accepted: None,
            drift: false,
        }
    }

    /// Tables that the source has written anew, where that gives other rows here: a new column with a value for each row, or a type
    /// whose values depend on who casts them. Asked before anything is done.
    async fn rows_changed(
        &self,
        client: &Client,
        objects: &[&EventObject],
    ) -> Result<BTreeSet<TableName>, PgError> {
        let mut changed = BTreeSet::new();
        for object in objects
            .iter()
            .filter(|object| object.address.kind == "table")
        {
            let Some(reason) = table_of(object).and_then(|table| self.rewritten.get(&table)) else {
                continue;
            };
            let found = shape::read(client, &object.address).await?;
            if let (Some(recorded), Some(found)) = (&object.shape, &found)
                && rewrite::changes_rows(*reason, recorded, found)
            {
                changed.extend(table_of(object));
            }
        }
        Ok(changed)
    }

    /// Where objects are not as recorded, one line each.
    async fn differences(
        &mut self,
        client: &Client,
        objects: &[&EventObject],
    ) -> Result<Vec<String>, PgError> {
        let mut differences = Vec::new();
        for object in objects {
            differences.extend(self.difference(client, object).await?);
        }
        Ok(differences)
    }

    async fn difference(
        &mut self,
        client: &Client,
        object: &EventObject,
    ) -> Result<Option<String>, PgError> {
        let Some(recorded) = &object.shape else {
            return Ok(None);
        };
        let Some(found) = shape::read(client, &object.address).await? else {
            let never =
                object.address.kind == "index" && recorded.get("valid") == Some(&false.into());
            return Ok((!never).then(|| "is not there".to_owned()));
        };
        let across = self.across;
        let roles = self.roles(client).await?;
        let differences = shape::differences(&object.address, recorded, &found, roles, across);
        Ok((!differences.is_empty()).then(|| differences.join(", ")))
    }

    /// The replica's roles, as of the first command.
    async fn roles(&mut self, client: &Client) -> Result<&Roles, PgError> {
        Ok(match &mut self.roles {
            Some(roles) => roles,
            none => none.insert(super::roles(client).await?),
        })
    }

    /// Runs the statement as whoever ran it; or says why that does not lead to what was recorded.
    async fn by_statement(
        &mut self,
        client: &Client,
        event: &DdlEvent,
        text: &str,
        objects: &[&EventObject],
    ) -> Result<Result<(), String>, PgError> {
        if let Err(refusal) = attempt(client, event, text).await? {
            return Ok(Err(refusal));
        }
        let differences = self.differences(client, objects).await?;
        if differences.is_empty() {
            client.batch_execute("RELEASE ddl").await?;
            return Ok(Ok(()));
        }
        client.batch_execute(BACK).await?;
        Ok(Err(format!(
            "leads to something else: {}",
            differences.join("; ")
        )))
    }

    /// Brings objects to their recorded shapes; says of each why not, where that is not possible. One may need another of them, and
    /// nobody knows the order: so it is tried as long as there is less left.
    async fn by_shapes(
        &mut self,
        client: &Client,
        objects: &[&EventObject],
        copy_again: &mut BTreeSet<TableName>,
    ) -> Result<Vec<Option<String>>, PgError> {
        self.rename(client, objects).await?;
        let mut reasons: Vec<Option<String>> =
            objects.iter().map(|_| Some(String::new())).collect();
        let left = |reasons: &[Option<String>]| reasons.iter().flatten().count();
        loop {
            let before = left(&reasons);
            for (object, reason) in objects.iter().zip(&mut reasons) {
                if reason.is_some() {
                    *reason = self.by_shape(client, object, copy_again).await?;
                    if object.address.kind == "role" {
                        self.roles = None;
                    }
                }
            }
            if left(&reasons) == 0 || left(&reasons) == before {
                break;
            }
        }
        // A second look: what one has brought another may have changed.
        for (object, reason) in objects.iter().zip(&mut reasons) {
            let difference = self.difference(client, object).await?;
            *reason = match (difference, reason.take()) {
                (None, Some(reason)) if object.shape.is_none() => Some(reason),
                (None, _) => None,
                (Some(difference), Some(reason)) if reason.is_empty() => Some(difference),
                (Some(_), Some(reason)) => Some(reason),
                (Some(difference), None) => Some(difference),
            };
        }
        Ok(reasons)
    }

    /// Gives objects their new names that are known under old ones. What that does not do is seen by comparing.
    async fn rename(&mut self, client: &Client, objects: &[&EventObject]) -> Result<(), PgError> {
        for object in objects {
            let renaming = object.was.as_deref();
            let renaming = renaming.and_then(|was| rename::renaming(&object.address, was));
            let Some((before, statements)) = renaming else {
                continue;
            };
            if shape::read(client, &object.address).await?.is_none()
                && shape::read(client, &before).await?.is_some()
            {
                run_all(client, &statements).await?;
                self.roles = None;
            }
        }
        Ok(())
    }

    /// Brings one object to its recorded shape; why not, where that is not possible.
    async fn by_shape(
        &mut self,
        client: &Client,
        object: &EventObject,
        copy_again: &mut BTreeSet<TableName>,
    ) -> Result<Option<String>, PgError> {
        let Some(recorded) = &object.shape else {
            return Ok(Some("its shape is not known".to_owned()));
        };
        let mut left = self.difference(client, object).await?;
        // What is made anew is without the comment and the privileges that did not differ: that takes another round.
        for _ in 0..ROUNDS {
            if left.is_none() {
                return Ok(None);
            }
            if let Err(reason) = self.round(client, object, recorded, copy_again).await? {
                return Ok(Some(reason));
            }
            left = self.difference(client, object).await?;
        }
        Ok(left)
    }

    /// Runs what brings an object nearer to its recorded shape; or says why that is not possible.
    async fn round(
        &mut self,
        client: &Client,
        object: &EventObject,
        recorded: &serde_json::Value,
        copy_again: &mut BTreeSet<TableName>,
    ) -> Result<Result<(), String>, PgError> {
        let found = shape::read(client, &object.address).await?;
        let roles = self.roles(client).await?;
        let (address, identity) = (&object.address, &object.identity);
        let healing = shape::heal(address, identity, recorded, found.as_ref(), roles);
        let (statements, otherwise, copies) = match healing {
            Healing::Statements {
                statements,
                otherwise,
                copy_again,
            } => (statements, otherwise, copy_again),
            Healing::Refused(reason) => return Ok(Err(reason)),
        };
        let mut refusal = run_all(client, &statements).await?;
        if refusal.is_some() && !otherwise.is_empty() {
            refusal = run_all(client, &otherwise).await?;
        }
        if let Some(refusal) = refusal {
            return Ok(Err(refusal));
        }
        if copies && !object.created {
            copy_again.extend(table_of(object));
        }
        Ok(Ok(()))
    }

    async fn drop(
        &mut self,
        client: &Client,
        event: &DdlEvent,
        objects: &[&EventObject],
    ) -> Result<Done, PgError> {
        if self.left(client, objects).await?.is_empty() {
            return Ok(Done {
                settled: addresses(objects),
                ..Done::of(Outcome::Nothing)
            });
        }
        let mut outcome = Outcome::Shape;
        if let Statement::Exact(text) = statement::of(event)
            && attempt(client, event, &text).await?.is_ok()
        {
            client.batch_execute("RELEASE ddl").await?;
            outcome = Outcome::Statement;
            self.ran = Some(text);
        }
        let mut left = self.left(client, objects).await?;
        let mut waiting = Vec::new();
        // What depends on another goes first; nobody knows the order.
        while !left.is_empty() {
            let before = left.len();
            waiting.clear();
            for object in &left {
                if let Err(reason) = remove_one(client, object).await? {
                    waiting.push(self.waits(event, object, reason));
                }
            }
            left = self.left(client, &left).await?;
            if left.len() == before {
                break;
            }
        }
        let is_left = |address: &ObjectAddress| left.iter().any(|it| it.address == *address);
        waiting.retain(|it| is_left(&it.address));
        let mut settled = addresses(objects);
        settled.retain(|address| !is_left(address));
        Ok(Done {
            outcome: match waiting.is_empty() {
                true => outcome,
                false => Outcome::Waits,
            },
            copy_again: BTreeSet::new(),
            waiting,
            settled,
        })
    }

    /// The objects that are still there.
    async fn left<'o>(
        &self,
        client: &Client,
        objects: &[&'o EventObject],
    ) -> Result<Vec<&'o EventObject>, PgError> {
        let mut left = Vec::new();
        for object in objects {
            if shape::read(client, &object.address).await?.is_some() {
                left.push(*object);
            }
        }
        Ok(left)
    }
}

/// Brings one object to what was recorded of it, once more; whether rows have to be copied again, or why it is not possible.
pub(super) async fn once_more(
    client: &Client,
    waiting: &WaitingObject,
) -> Result<Result<bool, String>, PgError> {
    let object = EventObject {
        address: waiting.address.clone(),
        identity: waiting.identity.clone(),
        tag: None,
        original: true,
        reason: None,
        created: false,
        listed_as: None,
        oid: None,
        was: None,
        as_of: None,
        shape: waiting.shape.clone(),
    };
    let mut replay = Replay::new(waiting.across, u64::MAX);
    if object.shape.is_some() {
        let mut copy_again = BTreeSet::new();
        if object.address.kind == "table" && shape::read(client, &object.address).await?.is_none() {
            // Whatever it had is gone.
            copy_again.extend(table_of(&object));
        }
        let reasons = replay
            .by_shapes(client, &[&object], &mut copy_again)
            .await?;
        let reason = reasons.into_iter().flatten().next();
        return Ok(reason.map_or(Ok(!copy_again.is_empty()), Err));
    }
    match shape::read(client, &object.address).await? {
        None => Ok(Ok(false)),
        Some(_) => Ok(remove_one(client, &object).await?.map(|()| false)),
    }
}

/// All of the statements or none; why not, where the server has refused one for good.
async fn run_all(client: &Client, statements: &[String]) -> Result<Option<String>, PgError> {
    client
        .batch_execute("SAVEPOINT ddl; SET LOCAL check_function_bodies = off")
        .await?;
    for statement in statements {
        if let Err(error) = client.batch_execute(statement).await {
            return Ok(Some(refused(client, error.into()).await?));
        }
    }
    client.batch_execute("RELEASE ddl").await?;
    Ok(None)
}

/// Drops one object, or says why not.
async fn remove_one(client: &Client, object: &EventObject) -> Result<Result<(), String>, PgError> {
    let Some(statement) = remove::statement(&object.address, &object.identity) else {
        return Ok(Err(format!(
            "a {} is not dropped by itself",
            object.address.kind
        )));
    };
    let refusal = run_all(client, &[statement]).await?;
    Ok(refusal.map_or(Ok(()), Err))
}

/// Runs a statement as whoever ran it, behind a savepoint that is left to the caller; or is back at it, with the server's words.
async fn attempt(
    client: &Client,
    event: &DdlEvent,
    text: &str,
) -> Result<Result<(), String>, PgError> {
    client.batch_execute("SAVEPOINT ddl").await?;
    match run_as(client, event, text).await {
        Ok(()) => Ok(Ok(())),
        Err(error) => Ok(Err(refused(client, error).await?)),
    }
}

/// Runs a statement under the role and the search_path it was run under; where that role is not to be had, as ourselves.
async fn run_as(client: &Client, event: &DdlEvent, text: &str) -> Result<(), PgError> {
    const AS: &str = "
        SELECT pg_catalog.set_config('search_path', $1::text, true),
               CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles r
                                  WHERE r.rolname = $2::text::name AND pg_catalog.pg_has_role(r.oid, 'MEMBER'))
                    THEN pg_catalog.set_config('role', $2::text, true) END";
    const AS_BEFORE: &str = "
        SELECT pg_catalog.set_config('role', 'none', true), pg_catalog.set_config('search_path', '', true)";
    client.query(AS, &[&event.search_path, &event.role]).await?;
    client.batch_execute(text).await?;
    client.batch_execute(AS_BEFORE).await?;
    Ok(())
}

/// Back to the savepoint, with the server's words, where it has refused for good.
async fn refused(client: &Client, error: PgError) -> Result<String, PgError> {
    if !matches!(error, PgError::Server(_)) || error.class() != Class::Definite {
        return Err(error);
    }
    client.batch_execute(BACK).await?;
    Ok(error.to_string())
}

fn addresses(objects: &[&EventObject]) -> Vec<ObjectAddress> {
    objects
        .iter()
        .map(|object| object.address.clone())
        .collect()
}

/// Whether the source of a command is of another major version than the replica.
///
/// # Errors
/// When the replica refuses.
pub async fn is_across(client: &Client, event: &DdlEvent) -> Result<bool, PgError> {
    const SQL: &str = "SELECT pg_catalog.current_setting('server_version_num')::integer";
    let here: i32 = client.query_typed_one(SQL, &[]).await?.get(0);
    Ok(event
        .version
        .is_some_and(|there| there / 10_000 != here / 10_000))
}

/// The table that an object is, or is a part of.
pub fn table_of(object: &EventObject) -> Option<TableName> {
    table_of_shape(&object.address, object.shape.as_ref())
}

/// The same, of an object of this shape.
pub(super) fn table_of_shape(
    address: &ObjectAddress,
    shape: Option<&serde_json::Value>,
) -> Option<TableName> {
    if let Some(table) = table_of_address(address) {
        return Some(table);
    }
    // An index, and the like, says of which table it is.
    let text = |key: &str| Some(shape?.get(key)?.as_str()?.to_owned());
    Some(TableName {
        schema: text("table_schema")?,
        name: text("table_name")?,
    })
}

/// The same, where the address alone tells.
pub(super) fn table_of_address(address: &ObjectAddress) -> Option<TableName> {
    const OF_TABLES: [&str; 7] = [
        "table",
        "table column",
        "table constraint",
        "default value",
        "trigger",
        "policy",
        "rule",
    ];
    let [schema, name, ..] = address.names.as_slice() else {
        return None;
    };
    let table = || TableName {
        schema: schema.clone(),
        name: name.clone(),
    };
    OF_TABLES.contains(&address.kind.as_str()).then(table)
}
