//! Which table is published under a name, and since which listing: how a replica or an archive notices that it missed some of
//! a table's changes.
//!
//! A name tells neither: a table may be dropped and another created under its name, two may be renamed into one another's
//! place, one may be taken out of the publication and put back, or be published in part for a while. Its changes in the stream
//! look the same before and after. So a table is *listed as* something: its oid, the rows of `pg_publication_rel` and
//! `pg_inherits` by which it is published, none of which comes back once it is gone (a row filter or a column list is another
//! row), and how often somebody altered the publication itself (`publish`, `publish_via_partition_root`), where that ever happened. `dr_agent.listed` on the source has this for every published table; it is published
//! itself and written in the transaction that alters the publication. A change of it is a marker, which stands in the stream
//! where the changes that are missing would have stood.
//!
//! ```text
//! source      catalog ─▶ dr_agent.listed ─▶ stream, change log
//! replica     dr_agent.table_sync.listed_as   what was copied; another one in a marker: copy it again
//! archive     Manifest::listed                what a base backup has; another one in a marker: no restore goes on behind it
//! ```
//!
//! # Invariants
//! - What a copy is recorded as was read before its snapshot was taken: a table that is listed anew in between is copied once
//!   more than it had to be, and never once less.
//! - The oid in a change's description counts, too: of a table that was renamed into the place of another, nothing is listed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::GenericClient;

use crate::flow::transaction::{Change, Relations};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::pgoutput::{DecodeError, Message, Tuple, Value, decode};
use crate::pg::quote::quote_literal;
use crate::pg::{PgError, PgLsn};

/// What a table is listed as: its oid, a colon, and how it is listed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ListedAs(String);

impl ListedAs {
    /// As it stands in a table of ours.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The same, as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a relation of this oid may be the table.
    pub fn is_of(&self, oid: u32) -> bool {
        let own = self.0.split(':').next().and_then(|oid| oid.parse().ok());
        own.is_none_or(|own: u32| own == oid)
    }
}

/// The copy of a table: what it holds already, and of what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Changes committed before it are in the copy; none where all are to be applied.
    pub snapshot_lsn: Option<PgLsn>,
    /// What the table was listed as; none where that was not recorded.
    pub listed_as: Option<ListedAs>,
}

impl Copied {
    /// Whether a relation of this oid may be the table that was copied.
    pub fn is_of(&self, oid: u32) -> bool {
        self.listed_as
            .as_ref()
            .is_none_or(|listed| listed.is_of(oid))
    }

    /// Whether that is what the table is listed as now, as far as both are known.
    pub fn is_listed_as(&self, now: Option<&ListedAs>) -> bool {
        let both = self.listed_as.as_ref().zip(now);
        both.is_none_or(|(was, is)| was == is)
    }
}

/// Every published table with storage of its own.
pub type Listed = BTreeMap<TableName, ListedAs>;

/// The table.
pub const TABLE: &str = "dr_agent.listed";

/// Its columns, in order.
const COLUMNS: [&str; 4] = ["stream", "schema_name", "table_name", "listed_as"];

/// How often somebody has altered what the publication publishes, so far: the row of `pg_publication` is another one.
fn altered(stream: &StreamName) -> String {
    format!(
        "SELECT s.altered + (s.publication_xmin <> p.xmin::text)::int
           FROM dr_agent.sending s, pg_publication p
          WHERE s.stream = {name} AND p.pubname = {name} AND s.publication_xmin IS NOT NULL",
        name = quote_literal(stream.as_str())
    )
}

/// What the catalog says: schema, name, listed as; with the number of alterations that `altered` asks for.
fn current(stream: &StreamName, altered: &str) -> String {
    format!(
        "WITH RECURSIVE part (oid, way) AS (
             SELECT r.prrelid, r.oid::text FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
              WHERE p.pubname = {publication}
              UNION ALL
             SELECT i.inhrelid, part.way || '>' || i.inhparent || '.' || i.xmin
               FROM part JOIN pg_class c ON c.oid = part.oid AND c.relkind = 'p'
               JOIN pg_inherits i ON i.inhparent = part.oid),
         altered (suffix) AS (SELECT coalesce('@' || nullif(({altered}), 0), ''))
         SELECT n.nspname::text, c.relname::text,
                c.oid || ':' || string_agg(part.way, ',' ORDER BY part.way COLLATE \"C\") || (SELECT suffix FROM altered)
           FROM part JOIN pg_class c ON c.oid = part.oid AND c.relkind = 'r'
           JOIN pg_namespace n ON n.oid = c.relnamespace
          GROUP BY n.nspname, c.relname, c.oid",
        publication = quote_literal(stream.as_str())
    )
}

/// Takes the publication as it is now for one that publishes what is wanted: it was altered by us, in the same transaction, and
/// nothing was missed.
pub fn acknowledge(stream: &StreamName) -> String {
    format!(
        "UPDATE dr_agent.sending SET publication_xmin = (SELECT xmin::text FROM pg_publication WHERE pubname = {name})
          WHERE stream = {name}",
        name = quote_literal(stream.as_str())
    )
}

/// Brings the stream's rows of `dr_agent.listed` to what the catalog says. Repeatable.
pub fn note(stream: &StreamName) -> String {
    // All parts of a statement see what was there before it.
    format!(
        "WITH current (schema_name, table_name, listed_as) AS ({current}),
     gone AS (
         DELETE FROM dr_agent.listed AS l WHERE stream = {name}
            AND NOT EXISTS (SELECT 1 FROM current AS c
                             WHERE (c.schema_name, c.table_name) = (l.schema_name, l.table_name))),
     seen AS (
         UPDATE dr_agent.sending AS s SET publication_xmin = p.xmin::text,
                altered = s.altered + coalesce((s.publication_xmin <> p.xmin::text)::int, 0)
           FROM pg_publication p
          WHERE s.stream = {name} AND p.pubname = {name} AND s.publication_xmin IS DISTINCT FROM p.xmin::text)
INSERT INTO dr_agent.listed AS l (stream, schema_name, table_name, listed_as)
SELECT {name}, * FROM current
    ON CONFLICT (stream, schema_name, table_name) DO UPDATE SET listed_as = EXCLUDED.listed_as
 WHERE l.listed_as <> EXCLUDED.listed_as",
        current = current(stream, &altered(stream)),
        name = quote_literal(stream.as_str())
    )
}

/// What the catalog says.
///
/// # Errors
/// When the source refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Listed, PgError> {
    const COUNTS: &str = "
        SELECT EXISTS (SELECT 1 FROM pg_attribute
                        WHERE attrelid = to_regclass('dr_agent.sending') AND attname = 'altered')";
    let counts: bool = client.query_one(COUNTS, &[]).await?.get(0);
    let altered = match counts {
        true => altered(stream),
        // Before the set-up, or before that of this version.
        false => "0".to_owned(),
    };
    rows(client, &current(stream, &altered)).await
}

/// What was noted last; nothing before the table is there.
///
/// # Errors
/// When the server refuses.
pub async fn noted(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Listed, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Listed::new());
    }
    let noted = format!(
        "SELECT schema_name, table_name, listed_as FROM dr_agent.listed WHERE stream = {}",
        quote_literal(stream.as_str())
    );
    rows(client, &noted).await
}

async fn rows(client: &(impl GenericClient + Sync), sql: &str) -> Result<Listed, PgError> {
    let rows = client.query(sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| (TableName::of(row), ListedAs::new(row.get(2))))
        .collect())
}

/// A change of `dr_agent.listed` that says as what a table is listed from here on.
#[derive(Debug, PartialEq, Eq)]
pub struct Marker {
    /// By which stream's publication.
    pub stream: String,
    /// Which table.
    pub table: TableName,
    /// As what.
    pub listed_as: ListedAs,
}

/// Reads a change, if it is a marker. A table that is not listed any more has none: nothing of it comes.
///
/// # Errors
/// When the change cannot be decoded.
pub fn marker(change: &Change) -> Result<Option<Marker>, DecodeError> {
    let Relations::Row(relation) = &change.relations else {
        return Ok(None);
    };
    if TABLE.split_once('.') != Some((relation.schema(), relation.relation.name.as_str())) {
        return Ok(None);
    }
    let (Message::Insert { new, .. } | Message::Update { new, .. }) =
        decode(&change.message, false)?
    else {
        return Ok(None);
    };
    let names = relation
        .relation
        .columns
        .iter()
        .map(|column| column.name.as_str());
    Ok(
        read_row(&new, names).map(|[stream, schema, name, listed_as]| Marker {
            stream,
            table: TableName { schema, name },
            listed_as: ListedAs::new(listed_as),
        }),
    )
}

/// The values of our columns; none where one is missing.
fn read_row<'n>(tuple: &Tuple, names: impl Iterator<Item = &'n str>) -> Option<[String; 4]> {
    let values: BTreeMap<&str, Value<'_>> = names.zip(tuple.values()).collect();
    // What text is in binary form is the same.
    let text = |column: &str| match values.get(column)? {
        Value::Text(bytes) | Value::Binary(bytes) => String::from_utf8(bytes.to_vec()).ok(),
        Value::Null | Value::UnchangedToast => None,
    };
    let [stream, schema, name, listed_as] = COLUMNS.map(text);
    Some([stream?, schema?, name?, listed_as?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::{relation, table};
    use crate::pg::pgoutput::{Relation, encode};

    fn name(schema: &str, name: &str) -> TableName {
        TableName {
            schema: schema.to_owned(),
            name: name.to_owned(),
        }
    }

    fn ours() -> Relation {
        Relation {
            schema: "dr_agent".to_owned(),
            ..table(9, "listed", &COLUMNS)
        }
    }

    fn change(of: Relation, message: bytes::Bytes) -> Change {
        Change {
            relations: Relations::Row(relation(of)),
            message,
        }
    }

    const ROW: [Value<'static>; 4] = [
        Value::Text(b"dr_agent_app"),
        Value::Text(b"public"),
        Value::Binary(b"t"),
        Value::Text(b"7:70"),
    ];

    #[test]
    fn a_row_that_is_written_says_what_a_table_is_from_here_on() {
        let expected = Marker {
            stream: "dr_agent_app".to_owned(),
            table: name("public", "t"),
            listed_as: ListedAs::new("7:70".to_owned()),
        };
        let read = |change: &Change| marker(change).unwrap();
        let inserted = change(ours(), encode::insert(9, &ROW));
        assert_eq!(read(&inserted), Some(expected));
        let of_the_users = change(table(9, "listed", &COLUMNS), encode::insert(9, &ROW));
        assert_eq!(read(&of_the_users), None);
        // A later version may have more columns, and none may be missing.
        let fewer = Relation {
            schema: "dr_agent".to_owned(),
            ..table(9, "listed", &COLUMNS[..3])
        };
        assert_eq!(read(&change(fewer, encode::insert(9, &ROW[..3]))), None);
    }

    #[test]
    fn a_relation_is_the_table_if_its_oid_is() {
        let listed_as = ListedAs::new("16402:16510>16390.745".to_owned());
        assert!(listed_as.is_of(16402));
        assert!(!listed_as.is_of(16510));
        // Written by a later version: nothing can be said.
        assert!(ListedAs::new("t-16402".to_owned()).is_of(1));
    }
}
