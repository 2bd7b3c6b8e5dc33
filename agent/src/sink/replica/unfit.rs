//! ● Whether rows of the source's table can be rows of the replica's: the types of the columns, and what rows are found by.
//!
//! Pure. A Relation message tells the type of every column that travels, with its modifier (the 8 and the 1 of
//! `numeric(8,1)`), and whoever reads the source adds what a type that is not PostgreSQL's own is made of ([`crate::pg::made_of`]). The
//! replica would cast whatever comes, and round or cut it without a word; so what differs is refused.
//!
//! # What it does not do
//! It judges only what the stream tells: not what a generated column is computed from ([`crate::shape::computed`] compares that), and of
//! a log that an older version wrote not what a type is made of.

use std::fmt;

use crate::flow::transaction::{FIRST_NAMED_OID, Named, TypeName};
use crate::names::TableName;
use crate::pg::made_of::may_cut;
use crate::pg::pgoutput::Column;

/// Why rows of the source's table cannot be applied to the replica's. A person has to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// The table.
    pub table: TableName,
    /// The column.
    pub column: String,
    /// What is wrong with it.
    pub why: Misfit,
}

/// What keeps a column from being applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// Its type, or the length or precision of it, is another one.
    Type {
        /// As the source says.
        source: String,
        /// As the replica has it.
        replica: String,
    },
    /// The source sends a value, and the replica computes one.
    GeneratedHere,
    /// It is generated and part of the key, and the source does not send it: without it a row is not found.
    KeyNotSent,
    /// It is of a key that holds within one partition alone, and on the replica rows are in others ([`crate::catalog::routing`]).
    KeyOfAPartition,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, column, why } = self;
        match why {
            Misfit::Type { source, replica } => write!(
                f,
                "column {column} of {table} is {source} on the source and {replica} on the replica"
            ),
            Misfit::GeneratedHere => write!(
                f,
                "column {column} of {table} is an ordinary column on the source and generated on the replica"
            ),
            Misfit::KeyOfAPartition => write!(
                f,
                "column {column} is of a key that {table} has for itself, and on the replica its rows may be in other partitions"
            ),
            Misfit::KeyNotSent => write!(
                f,
                "generated column {column} is part of the key of {table}, and the source does not send it"
            ),
        }
    }
}

/// The type of a column on the replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReplicaType {
    pub(super) oid: u32,
    /// `atttypmod`; -1 is none.
    pub(super) modifier: i32,
    pub(super) is_domain: bool,
    /// What a domain is made of, otherwise the type itself.
    pub(super) base: TypeName,
    /// The OID of that.
    pub(super) base_oid: u32,
    /// Of an array the type of its elements.
    pub(super) element: Option<String>,
    /// In SQL, with length or precision.
    pub(super) sql: String,
    /// Of a type that is not PostgreSQL's own: what it is made of.
    pub(super) made_of: Option<String>,
}

impl ReplicaType {
    /// How to say it.
    pub(super) fn shown(&self) -> String {
        self.made_of.clone().unwrap_or_else(|| self.sql.clone())
    }
}

/// Whether a column is of another type than the source says.
pub(super) fn differs(sent: &Column, named: &Named, found: &ReplicaType) -> bool {
    if sent.type_modifier != found.modifier {
        return true;
    }
    if sent.type_oid < FIRST_NAMED_OID {
        return sent.type_oid != found.oid;
    }
    if found.oid < FIRST_NAMED_OID {
        return true;
    }
    let Some(told) = named.get(&sent.type_oid) else {
        // A log that was written before names were kept.
        return false;
    };
    match told.made_of.as_deref() {
        // Before that was kept.
        None => !is_same(&told.name, found),
        // The type has been dropped since, and nobody can say what it was made of.
        Some("") => !is_same(&told.name, found) || found.made_of.as_deref().is_some_and(may_cut),
        made_of => made_of != found.made_of.as_deref(),
    }
}

/// Names of arrays are made up, and differ where the first choice was taken: `_t`, `__t`, `_t_1`.
fn is_same(name: &TypeName, found: &ReplicaType) -> bool {
    let is_of_element = |element: &String| {
        let core = name.name.trim_start_matches('_');
        let without_number = core
            .rsplit_once('_')
            .filter(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit()))
            .map(|(core, _)| core);
        let element = element.trim_start_matches('_');
        name.name.starts_with('_') && (core == element || without_number == Some(element))
    };
    let is_array_of_it = found.element.as_ref().is_some_and(is_of_element);
    name.schema == found.base.schema && (name.name == found.base.name || is_array_of_it)
}

/// How to say the source's type, where it is not one of PostgreSQL's own.
pub(super) fn shown(sent: &Column, named: &Named, found: &ReplicaType) -> Option<String> {
    if sent.type_oid < FIRST_NAMED_OID {
        return None;
    }
    let modifier = match sent.type_modifier {
        -1 => String::new(),
        modifier => format!(" with modifier {modifier}"),
    };
    Some(match named.get(&sent.type_oid) {
        None => format!("a type of its own (OID {}){modifier}", sent.type_oid),
        Some(told) => match told.made_of.as_deref() {
            Some("") => format!("a type that was dropped since, of {}{modifier}", told.name),
            Some(made_of) => format!("{made_of}{modifier}"),
            None if told.name.schema == "pg_catalog" && !found.is_domain => {
                format!("a domain over {}{modifier}", told.name.name)
            }
            None => format!("{}{modifier}", told.name),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::transaction::SentType;

    fn sent(type_oid: u32, type_modifier: i32) -> Column {
        Column {
            is_key: false,
            name: "c".to_owned(),
            type_oid,
            type_modifier,
        }
    }

    fn named(oid: u32, schema: &str, name: &str) -> Named {
        let name = TypeName::sent(schema.to_owned(), name.to_owned());
        Named::from([(
            oid,
            SentType {
                name,
                made_of: None,
            },
        )])
    }

    fn made(oid: u32, made_of: &str) -> Named {
        let mut named = named(oid, "", "numeric");
        named.get_mut(&oid).unwrap().made_of = Some(made_of.to_owned());
        named
    }

    fn found(
        oid: u32,
        modifier: i32,
        base: (u32, &str, &str),
        element: Option<&str>,
    ) -> ReplicaType {
        ReplicaType {
            oid,
            modifier,
            is_domain: oid != base.0,
            base: TypeName::sent(base.1.to_owned(), base.2.to_owned()),
            base_oid: base.0,
            element: element.map(str::to_owned),
            sql: "x".to_owned(),
            made_of: None,
        }
    }

    #[test]
    fn a_type_is_the_same_by_oid_where_that_is_postgresqls_and_by_name_where_not() {
        let none = Named::new();
        let int4 = found(23, -1, (23, "", "int4"), None);
        let numeric = found(1700, 524_293, (1700, "", "numeric"), None);
        let mood = found(30_001, -1, (30_001, "public", "mood"), None);
        let moods = found(30_002, -1, (30_002, "public", "_mood"), Some("mood"));
        let other_moods = found(30_002, -1, (30_002, "public", "_mood_1"), Some("mood"));
        let price = found(30_003, -1, (1700, "", "numeric"), None);
        let table: &[(&str, bool, Column, Named, &ReplicaType)] = &[
            ("the same", false, sent(23, -1), none.clone(), &int4),
            ("wider", true, sent(20, -1), none.clone(), &int4),
            (
                "modifier",
                true,
                sent(1700, 524_295),
                none.clone(),
                &numeric,
            ),
            (
                "same modifier",
                false,
                sent(1700, 524_293),
                none.clone(),
                &numeric,
            ),
            ("no modifier", true, sent(1700, -1), none.clone(), &numeric),
            (
                "enum",
                false,
                sent(20_001, -1),
                named(20_001, "public", "mood"),
                &mood,
            ),
            (
                "other schema",
                true,
                sent(20_001, -1),
                named(20_001, "app", "mood"),
                &mood,
            ),
            (
                "other enum",
                true,
                sent(20_001, -1),
                named(20_001, "public", "state"),
                &mood,
            ),
            ("text", true, sent(25, -1), none.clone(), &mood),
            (
                "enum for text",
                true,
                sent(20_001, -1),
                named(20_001, "public", "mood"),
                &int4,
            ),
            (
                "array",
                false,
                sent(20_002, -1),
                named(20_002, "public", "_mood"),
                &moods,
            ),
            (
                "odd array",
                false,
                sent(20_002, -1),
                named(20_002, "public", "__mood"),
                &moods,
            ),
            (
                "odd here",
                false,
                sent(20_002, -1),
                named(20_002, "public", "_mood"),
                &other_moods,
            ),
            (
                "no array",
                true,
                sent(20_002, -1),
                named(20_002, "public", "mood"),
                &moods,
            ),
            (
                "other array",
                true,
                sent(20_002, -1),
                named(20_002, "public", "_state"),
                &moods,
            ),
            (
                "domain",
                false,
                sent(20_003, -1),
                named(20_003, "", "numeric"),
                &price,
            ),
            (
                "domain over another",
                true,
                sent(20_003, -1),
                named(20_003, "", "int4"),
                &price,
            ),
            ("no domain", true, sent(1700, -1), none.clone(), &price),
            (
                "domain for none",
                true,
                sent(20_003, -1),
                named(20_003, "", "int4"),
                &int4,
            ),
            ("an old log", false, sent(20_001, -1), none.clone(), &mood),
        ];
        for (what, expected, sent, named, found) in table {
            assert_eq!(differs(sent, named, found), *expected, "{what}");
        }
    }

    #[test]
    fn a_type_is_the_same_if_it_is_made_of_the_same() {
        let mut price = found(30_003, -1, (1700, "", "numeric"), None);
        price.made_of = Some("public.price over numeric(8,1)".to_owned());
        let mut any = found(30_003, -1, (1700, "", "numeric"), None);
        any.made_of = Some("public.any over numeric".to_owned());
        let int4 = found(23, -1, (23, "", "int4"), None);
        for (expected, there, found) in [
            (false, "public.price over numeric(8,1)", &price),
            (true, "public.price over numeric(8,3)", &price),
            (true, "app.price over numeric(8,1)", &price),
            (true, "public.price over integer", &int4),
            // Dropped since: what could be cut is not taken.
            (true, "", &price),
            (false, "", &any),
        ] {
            let named = made(20_003, there);
            assert_eq!(
                differs(&sent(20_003, -1), &named, found),
                expected,
                "{there}"
            );
        }
        let shown = shown(&sent(20_003, -1), &made(20_003, ""), &price).unwrap();
        assert!(shown.contains("dropped"), "{shown}");
    }
}
