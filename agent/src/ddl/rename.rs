//! ● The statements that give an object its new name, where no command has told of it: the old one is known by its oid.

use crate::names::object::ObjectAddress;
use crate::pg::quote::quote_ident;

/// What an object was called before, under what it belongs to now; and the statements that rename it, in order. None where it has no
/// name of its own.
pub(super) fn renaming(
    address: &ObjectAddress,
    was: &[String],
) -> Option<(ObjectAddress, Vec<String>)> {
    let kind = word(&address.kind)?;
    let before = |names: &[String]| ObjectAddress {
        names: names.to_vec(),
        ..address.clone()
    };
    let renamed = |object: String, to: &str| format!("ALTER {kind} {object} RENAME TO {to}");
    match (was, address.names.as_slice()) {
        // A type is addressed as SQL has it.
        ([old], [new]) if matches!(kind, "TYPE" | "DOMAIN") => {
            let ((old_schema, old_name), (schema, name)) = (split(old)?, split(new)?);
            let moved = format!("ALTER {kind} {old} SET SCHEMA {schema}");
            let renamed = renamed(format!("{schema}.{old_name}"), name);
            let parts = [(old_schema != schema, moved), (old_name != name, renamed)];
            Some((before(was), changed(parts)))
        }
        ([old], [new]) => Some((
            before(was),
            vec![renamed(quote_ident(old), &quote_ident(new))],
        )),
        ([old_schema, old], [schema, name]) => {
            let args = match kind {
                "FUNCTION" | "PROCEDURE" | "AGGREGATE" => format!("({})", address.args.join(", ")),
                _ => String::new(),
            };
            let called =
                |schema: &str| format!("{}.{}{args}", quote_ident(schema), quote_ident(old));
            let moved = format!(
                "ALTER {kind} {} SET SCHEMA {}",
                called(old_schema),
                quote_ident(schema)
            );
            let renamed = renamed(called(schema), &quote_ident(name));
            let parts = [(old_schema != schema, moved), (old != name, renamed)];
            Some((before(was), changed(parts)))
        }
        // The table has its new name by now.
        ([_, _, old], [schema, table, name]) if matches!(kind, "TRIGGER" | "POLICY" | "RULE") => {
            let of = format!("{}.{}", quote_ident(schema), quote_ident(table));
            let statement = format!(
                "ALTER {kind} {} ON {of} RENAME TO {}",
                quote_ident(old),
                quote_ident(name)
            );
            let names = [schema.clone(), table.clone(), old.clone()];
            Some((before(&names), changed([(old != name, statement)])))
        }
        _ => None,
    }
}

fn changed<const N: usize>(parts: [(bool, String); N]) -> Vec<String> {
    let wanted = parts.into_iter().filter(|(wanted, _)| *wanted);
    wanted.map(|(_, statement)| statement).collect()
}

/// What ALTER calls it.
fn word(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "table" => "TABLE",
        "view" => "VIEW",
        "materialized view" => "MATERIALIZED VIEW",
        "sequence" => "SEQUENCE",
        "index" => "INDEX",
        "foreign table" => "FOREIGN TABLE",
        "collation" => "COLLATION",
        "type" | "composite type" => "TYPE",
        "domain" => "DOMAIN",
        "function" => "FUNCTION",
        "procedure" => "PROCEDURE",
        "aggregate" => "AGGREGATE",
        "statistics object" => "STATISTICS",
        "text search configuration" => "TEXT SEARCH CONFIGURATION",
        "text search dictionary" => "TEXT SEARCH DICTIONARY",
        "schema" => "SCHEMA",
        "role" => "ROLE",
        "event trigger" => "EVENT TRIGGER",
        "publication" => "PUBLICATION",
        "server" => "SERVER",
        "foreign-data wrapper" => "FOREIGN DATA WRAPPER",
        "trigger" => "TRIGGER",
        "policy" => "POLICY",
        "rule" => "RULE",
        _ => return None,
    })
}

/// `public."A.b"` in its two parts.
fn split(name: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    let dot = name.char_indices().find(|(_, c)| {
        quoted ^= *c == '"';
        *c == '.' && !quoted
    });
    let (at, _) = dot?;
    Some((&name[..at], &name[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_name_is_changed_part_by_part() {
        type Case<'a> = (
            &'a str,
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
        );
        let table: [Case<'_>; 9] = [
            (
                "table",
                &["a", "t"],
                &["a", "U"],
                &[],
                &["ALTER TABLE \"a\".\"t\" RENAME TO \"U\""],
            ),
            (
                "view",
                &["a", "v"],
                &["b", "w"],
                &[],
                &[
                    "ALTER VIEW \"a\".\"v\" SET SCHEMA \"b\"",
                    "ALTER VIEW \"b\".\"v\" RENAME TO \"w\"",
                ],
            ),
            (
                "schema",
                &["a"],
                &["b"],
                &[],
                &["ALTER SCHEMA \"a\" RENAME TO \"b\""],
            ),
            (
                "type",
                &["a.\"x.y\""],
                &["b.z"],
                &[],
                &[
                    "ALTER TYPE a.\"x.y\" SET SCHEMA b",
                    "ALTER TYPE b.\"x.y\" RENAME TO z",
                ],
            ),
            (
                "domain",
                &["a.d"],
                &["a.e"],
                &[],
                &["ALTER DOMAIN a.d RENAME TO e"],
            ),
            (
                "function",
                &["a", "f"],
                &["a", "g"],
                &["integer", "text"],
                &["ALTER FUNCTION \"a\".\"f\"(integer, text) RENAME TO \"g\""],
            ),
            (
                "policy",
                &["a", "old", "p"],
                &["a", "new", "q"],
                &[],
                &["ALTER POLICY \"p\" ON \"a\".\"new\" RENAME TO \"q\""],
            ),
            ("trigger", &["a", "old", "g"], &["a", "new", "g"], &[], &[]),
            (
                "index",
                &["a", "i"],
                &["a", "j"],
                &[],
                &["ALTER INDEX \"a\".\"i\" RENAME TO \"j\""],
            ),
        ];
        for (kind, was, is, args, expected) in table {
            let address = ObjectAddress {
                kind: kind.to_owned(),
                names: texts(is),
                args: texts(args),
            };
            let (_, statements) = renaming(&address, &texts(was)).unwrap();
            assert_eq!(statements, expected, "{kind}");
        }
        let cast = ObjectAddress {
            kind: "cast".to_owned(),
            names: texts(&["a"]),
            args: Vec::new(),
        };
        assert_eq!(renaming(&cast, &texts(&["b"])), None);
    }
}
