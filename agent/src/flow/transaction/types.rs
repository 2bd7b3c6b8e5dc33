//! ● What the source calls the types that are not PostgreSQL's own.
//!
//! Pure. Above a certain number an OID means another type on every server, or none. pgoutput therefore names such a type
//! in a Type message before the Relation message whose columns are of it; of a domain it tells the name of the type it is
//! made of.
//!
//! # What it does not do
//! A log that was written before these messages were kept has no names. Then nothing is known of such a type.

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

    /// The Type message, as outside a streamed block.
    fn message(&self, oid: u32) -> Bytes {
        let mut out = BytesMut::with_capacity(7 + self.schema.len() + self.name.len());
        out.put_u8(b'Y');
        out.put_u32(oid);
        if self.schema != "pg_catalog" {
            out.put_slice(self.schema.as_bytes());
        }
        out.put_u8(0);
        out.put_slice(self.name.as_bytes());
        out.put_u8(0);
        out.freeze()
    }
}

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// The names of the types of one relation's columns, by OID.
pub type Named = BTreeMap<u32, TypeName>;

/// The messages that tell of these names.
pub(super) fn messages(named: &Named) -> impl Iterator<Item = Bytes> {
    named.iter().map(|(oid, name)| name.message(*oid))
}

/// The names told so far.
#[derive(Debug, Default)]
pub struct TypeNames(HashMap<u32, TypeName>);

impl TypeNames {
    /// Takes a Type message in.
    pub fn tell(&mut self, oid: u32, schema: String, name: String) {
        self.0.insert(oid, TypeName::sent(schema, name));
    }

    /// The names of the types of a relation's columns, as far as they were told.
    pub fn of(&self, relation: &Relation) -> Named {
        let columns = relation.columns.iter().map(|column| column.type_oid);
        columns
            .filter(|oid| *oid >= FIRST_NAMED_OID)
            .filter_map(|oid| Some((oid, self.0.get(&oid)?.clone())))
            .collect()
    }
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
        let mut relation = table(1, "t", &["a", "b", "c", "d"]);
        relation.columns[1].type_oid = 20_002;
        relation.columns[2].type_oid = 20_001;
        relation.columns[3].type_oid = 20_009;
        let named = names.of(&relation);
        assert_eq!(named.keys().copied().collect::<Vec<_>>(), [20_001, 20_002]);
        assert_eq!(named[&20_002].to_string(), "pg_catalog.numeric");
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
