//! `dr_agent.ddl`: what the source's event triggers wrote down of each command, and so on the replica too.
//!
//! A row is a barrier at its place in the stream. It says what was run, by whom and under which search_path, and, for every
//! object concerned, its shape after the command, read in the same transaction (`dr_agent.shape`, `agent/sql/shape.sql`).
//! The triggers write it on the source (`agent/sql/capture.sql`); nobody else does.
//!
//! # What it does not do
//! It decides nothing: which statement it was, and what to do about it, is [`crate::ddl`]'s.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::GenericClient;

use crate::flow::transaction::{BARRIERS, Change, Relations};
use crate::names::TableName;
use crate::names::object::ObjectAddress;
use crate::pg::pgoutput::{DecodeError, Message, Tuple, Value, decode};
use crate::pg::{PgError, PgLsn};

/// The table.
pub const TABLE: &str = "dr_agent.ddl";

/// The same, in parts.
pub fn name() -> TableName {
    let (schema, name) = BARRIERS;
    TableName {
        schema: schema.to_owned(),
        name: name.to_owned(),
    }
}

/// The tag of what no event trigger has written down: the source's agent found it by looking, or was told to look
/// (`dr_agent.ddl_now()`).
pub const FOUND: &str = "FINGERPRINT";

/// Which event trigger wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// `ddl_command_end`: objects were created or altered.
    Command,
    /// `sql_drop`: objects are gone.
    Drop,
    /// `table_rewrite`: rows of a table are about to be written anew, which no WAL carries.
    Rewrite,
}

/// One row of `dr_agent.ddl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DdlEvent {
    /// Of the row; grows on one source.
    pub id: i64,
    /// Which trigger.
    pub kind: EventKind,
    /// `ALTER TABLE`: the command tag.
    pub tag: String,
    /// current_user of the command: what it was allowed to.
    pub role: String,
    /// search_path of the command, as the setting's text.
    pub search_path: String,
    /// The whole string that the client sent: perhaps several statements, a DO block, or a call of a function.
    pub query: Option<String>,
    /// PG_CONTEXT of the trigger function: the innermost statement, where a function or a DO block runs it.
    pub context: Option<String>,
    /// Which event trigger firing of its kind within the client's string this is, from 1 on.
    pub ordinal: Option<i32>,
    /// `server_version_num` of the source.
    pub version: Option<i32>,
    /// The objects concerned, in the order of the server.
    pub objects: Vec<EventObject>,
}

/// An object that a command concerned, by names that another server understands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventObject {
    /// What it is called on any server.
    #[serde(flatten)]
    pub address: ObjectAddress,
    /// As a person reads it: `public.orders`.
    #[serde(default)]
    pub identity: String,
    /// command_tag of `pg_event_trigger_ddl_commands()`; none for drops and rewrites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// A drop: it was named in the command.
    #[serde(default)]
    pub original: bool,
    /// A rewrite: `pg_event_trigger_table_rewrite_reason()`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<i32>,
    /// The command created it: it was not there before.
    #[serde(default)]
    pub created: bool,
    /// A new table: what `dr_agent.listed` says of it, where the trigger has published it. None: it is copied beside the stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed_as: Option<String>,
    /// The oid on the source of a relation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oid: Option<u32>,
    /// What it was called before, where no event trigger has told of its renaming.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub was: Option<Vec<String>>,
    /// What no event trigger has written down: what it is as of ([`AsOf`] as text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub as_of: Option<String>,
    /// The shape after the command; none where the object is gone, or is of a kind that has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<serde_json::Value>,
}

/// Which events a side knows of: the replica has those of the source as far as it is in the stream, and their deletions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventsSeen {
    count: i64,
    /// One that commits late may have a small number.
    sum: String,
}

/// Before what was found by looking was looked for: which events there were, and up to where the source's WAL was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsOf {
    seen: EventsSeen,
    /// What committed behind it was perhaps not seen.
    pub lsn: PgLsn,
}

impl AsOf {
    /// Of an event; none where an event trigger wrote it, and it is as of its own place.
    pub fn of(event: &DdlEvent) -> Option<Self> {
        let text = event.objects.iter().find_map(|one| one.as_of.as_ref())?;
        let mut parts = text.split(' ');
        Some(Self {
            seen: EventsSeen {
                count: parts.next()?.parse().ok()?,
                sum: parts.next()?.to_owned(),
            },
            lsn: parts.next()?.parse().ok()?,
        })
    }

    /// Whether there are others by now.
    pub fn is_overtaken(&self, now: &EventsSeen) -> bool {
        self.seen != *now
    }

    /// Whether these many are all that are new.
    pub fn are_all(&self, new: usize, now: &EventsSeen) -> bool {
        i64::try_from(new).is_ok_and(|new| self.seen.count + new == now.count)
    }
}

/// Reads which there are; none where the table is not there.
///
/// # Errors
/// When the server refuses.
pub async fn seen(client: &(impl GenericClient + Sync)) -> Result<EventsSeen, PgError> {
    let sql = format!("SELECT count(*), coalesce(sum(id), 0)::text FROM {TABLE}");
    // One round trip: every session begins with it.
    match client
        .query_typed_one(&sql, &[])
        .await
        .map_err(PgError::from)
    {
        Ok(row) => Ok(EventsSeen {
            count: row.get(0),
            sum: row.get(1),
        }),
        Err(error) if error.sqlstate() == Some("42P01") => Ok(EventsSeen {
            count: 0,
            sum: "0".to_owned(),
        }),
        Err(error) => Err(error),
    }
}

/// Deletes old events on the source, a few at a time: the replica follows.
///
/// # Errors
/// When the source refuses.
pub async fn prune(source: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    // Of the oldest alone it is asked: that is one look into an index, where there is nothing to do.
    let sql = format!(
        "DELETE FROM {TABLE} WHERE id IN (
            SELECT id FROM (SELECT id, at FROM {TABLE} ORDER BY id LIMIT 500) AS oldest
             WHERE at < pg_catalog.now() - interval '7 days' OR id <= (SELECT max(id) FROM {TABLE}) - 20000)"
    );
    source.execute(&sql, &[]).await?;
    Ok(())
}

/// Why a row of `dr_agent.ddl` says nothing.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The message could not be decoded.
    #[error("decode a change")]
    Decode(#[from] DecodeError),
    /// A column is missing, or holds something else.
    #[error("a row of {TABLE} has no sound \"{0}\"")]
    Column(&'static str),
    /// Its objects cannot be understood.
    #[error("the objects of row {id} of {TABLE}")]
    Objects {
        /// Which row.
        id: i64,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// The event that a change is, if it is one. Rows that are deleted or changed later are none.
///
/// # Errors
/// When a row is not as the triggers write it.
pub fn event(change: &Change) -> Result<Option<DdlEvent>, EventError> {
    let Relations::Row(relation) = &change.relations else {
        return Ok(None);
    };
    if !relation.is_of_barriers() {
        return Ok(None);
    }
    let Message::Insert { new, .. } = decode(&change.message, false)? else {
        return Ok(None);
    };
    let columns = relation.relation.columns.iter();
    read_row(&new, columns.map(|column| column.name.as_str())).map(Some)
}

fn read_row<'n>(
    tuple: &Tuple,
    names: impl Iterator<Item = &'n str>,
) -> Result<DdlEvent, EventError> {
    let values: BTreeMap<&str, Value<'_>> = names.zip(tuple.values()).collect();
    // What text and json are in binary form is the same.
    let maybe = |column: &'static str| match values.get(column) {
        Some(Value::Text(bytes) | Value::Binary(bytes)) => {
            Some(String::from_utf8_lossy(bytes).into_owned())
        }
        _ => None,
    };
    let integer = |column| {
        let number = values.get(column).and_then(number);
        number.and_then(|number| i32::try_from(number).ok())
    };
    let text = |column| maybe(column).ok_or(EventError::Column(column));
    let id = values.get("id").and_then(number);
    let id = id.ok_or(EventError::Column("id"))?;
    let kind = serde_json::Value::String(text("kind")?);
    let objects = serde_json::from_str(&text("objects")?);
    Ok(DdlEvent {
        id,
        kind: serde_json::from_value(kind).map_err(|_| EventError::Column("kind"))?,
        tag: text("tag")?,
        role: text("role_name")?,
        search_path: text("search_path")?,
        query: maybe("query"),
        context: maybe("context"),
        ordinal: integer("ordinal"),
        version: integer("version"),
        objects: objects.map_err(|source| EventError::Objects { id, source })?,
    })
}

/// An integer of any width, in either form.
fn number(value: &Value<'_>) -> Option<i64> {
    match value {
        Value::Text(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
        Value::Binary(bytes) => match bytes.len() {
            4 => Some(i32::from_be_bytes((*bytes).try_into().ok()?).into()),
            8 => Some(i64::from_be_bytes((*bytes).try_into().ok()?)),
            _ => None,
        },
        Value::Null | Value::UnchangedToast => None,
    }
}
