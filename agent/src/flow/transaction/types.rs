//! ● What the source calls the types that are not PostgreSQL's own, and what they are made of.
//!
//! Pure. Above a certain number an OID means another type on every server, or none. pgoutput therefore names such a type
//! in a Type message before the Relation message whose columns are of it; of a domain it tells the name of the type it is
//! made of. What it is made of altogether, with lengths and precisions, whoever reads the source asks it ([`crate::pg::made_of`])
//! and puts a message of our own before that: a Type message of OID 0, which pgoutput never sends, with the type's OID in the place
//! of the schema. So it goes wherever the description goes: spill files, the change log, records. Older versions pass it over.
//!
//! # What it does not do
//! A log that was written before these messages were kept has no names, or only names. Then nothing more is known of such a type.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::pg::pgoutput::Relation;

/// OIDs below this mean the same on every server (`FirstGenbkiObjectId` in `src/include/access/transam.h`); of those
/// from here on pgoutput tells the name.
pub const FIRST_NAMED_OID: u32 = 10_000;

/// A type's name, unquoted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TypeName {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
}

impl TypeName {
    /// As pgoutput sends it: an empty schema is `pg_catalog`.
    pub fn sent(schema: String, name: String) -> Self {
        let schema = match schema.is_empty() {
            true => "pg_catalog".to_owned(),
            false => schema,
        };
        Self { schema, name }
    }

    fn message(&self, oid: u32) -> Bytes {
        let schema = match self.schema.as_str() {
            "pg_catalog" => "",
            schema => schema,
        };
        type_message(oid, schema, &self.name)
    }
}

/// A Type message, as outside a streamed block.
fn type_message(oid: u32, schema: &str, name: &str) -> Bytes {
    let mut out = BytesMut::with_capacity(7 + schema.len() + name.len());
    out.put_u8(b'Y');
    out.put_u32(oid);
    out.put_slice(schema.as_bytes());
    out.put_u8(0);
    out.put_slice(name.as_bytes());
    out.put_u8(0);
    out.freeze()
}

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// What was told of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentType {
    /// What pgoutput calls it.
    pub name: TypeName,
    /// What it is made of, in the words of [`crate::pg::made_of`]; empty where the source was asked and had no such type any
    /// more, `None` where nobody asked.
    pub made_of: Option<String>,
}

/// The types of one relation's columns, by OID.
pub type Named = BTreeMap<u32, SentType>;

/// In the place of an OID: what a type is made of.
const MADE_OF: u32 = 0;

/// The messages that tell of these types.
pub(super) fn messages(named: &Named) -> impl Iterator<Item = Bytes> {
    named.iter().flat_map(|(oid, sent)| {
        let made_of = sent.made_of.as_ref();
        let made_of = made_of.map(|text| type_message(MADE_OF, &oid.to_string(), text));
        made_of.into_iter().chain([sent.name.message(*oid)])
    })
}

/// What was told of types so far.
#[derive(Debug, Default)]
pub struct TypeNames {
    names: HashMap<u32, TypeName>,
    made_of: HashMap<u32, String>,
}

impl TypeNames {
    /// Takes a Type message in.
    pub fn tell(&mut self, oid: u32, schema: String, name: String) {
        if oid == MADE_OF {
            // One that names no OID is of no version that we know, and says nothing.
            if let Ok(oid) = schema.parse() {
                self.tell_made_of(oid, name);
            }
            return;
        }
        self.names.insert(oid, TypeName::sent(schema, name));
    }

    /// Takes in what a type is made of.
    pub fn tell_made_of(&mut self, oid: u32, made_of: String) {
        self.made_of.insert(oid, made_of);
    }

    /// The types of a relation's columns, as far as they were told.
    pub fn of(&self, relation: &Relation) -> Named {
        let sent = |oid: u32| {
            let name = self.names.get(&oid)?.clone();
            let made_of = self.made_of.get(&oid).cloned();
            Some((oid, SentType { name, made_of }))
        };
        named_oids(relation).filter_map(sent).collect()
    }

    /// Those of which it is not known what they are made of.
    pub fn unknown_of(&self, relation: &Relation) -> Vec<u32> {
        let is_unknown = |oid: &u32| self.made_of.get(oid).is_none_or(String::is_empty);
        named_oids(relation).filter(is_unknown).collect()
    }
}

fn named_oids(relation: &Relation) -> impl Iterator<Item = u32> {
    let columns = relation.columns.iter().map(|column| column.type_oid);
    columns.filter(|oid| *oid >= FIRST_NAMED_OID)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::table;
    use crate::pg::pgoutput::{Message, decode};

    #[test]
    fn names_come_back_from_their_messages_and_only_those_a_relation_needs() {
        let mut names = TypeNames::default();
        names.tell(20_001, "public".to_owned(), "mood".to_owned());
        names.tell(20_002, String::new(), "numeric".to_owned());
        names.tell(20_003, "public".to_owned(), "unused".to_owned());
        names.tell_made_of(20_002, "public.price over numeric(8,1)".to_owned());
        names.tell(0, "odd".to_owned(), "x".to_owned());
        let mut relation = table(1, "t", &["a", "b", "c", "d"]);
        relation.columns[1].type_oid = 20_002;
        relation.columns[2].type_oid = 20_001;
        relation.columns[3].type_oid = 20_009;
        let named = names.of(&relation);
        assert_eq!(named.keys().copied().collect::<Vec<_>>(), [20_001, 20_002]);
        assert_eq!(named[&20_002].name.to_string(), "pg_catalog.numeric");
        assert_eq!(names.unknown_of(&relation), [20_001, 20_009]);
        let mut again = TypeNames::default();
        for message in messages(&named) {
            match decode(&message, false) {
                Ok(Message::Type {
                    oid,
                    schema,
                    name,
                    xid: None,
                }) => again.tell(oid, schema, name),
                other => panic!("not a Type message: {other:?}"),
            }
        }
        assert_eq!(again.of(&relation), named);
    }
}
