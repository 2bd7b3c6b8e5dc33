//! ● The statement that drops an object, from its address alone.
//!
//! Never CASCADE: what the source has dropped with it is recorded, and goes by itself.

use crate::names::object::ObjectAddress;
use crate::pg::quote::{quote_ident, quote_literal};

/// The statement; none for what is only dropped with something else.
pub(super) fn statement(address: &ObjectAddress, identity: &str) -> Option<String> {
    let part = |at: usize| address.names.get(at).map(|name| quote_ident(name));
    let relation = || Some(format!("{}.{}", part(0)?, part(1)?));
    let kind = address.kind.as_str();
    let statement = match kind {
        "table column" | "foreign table column" => {
            let table = if kind == "table column" {
                "TABLE"
            } else {
                "FOREIGN TABLE"
            };
            format!("ALTER {table} {} DROP COLUMN {}", relation()?, part(2)?)
        }
        "table constraint" => format!("ALTER TABLE {} DROP CONSTRAINT {}", relation()?, part(2)?),
        "domain constraint" => format!(
            "ALTER DOMAIN {} DROP CONSTRAINT {}",
            // The domain is its first argument's, the name its own.
            address.names.first()?,
            quote_ident(address.args.first()?)
        ),
        "default value" => format!(
            "ALTER TABLE {} ALTER COLUMN {} DROP DEFAULT",
            relation()?,
            part(2)?
        ),
        "trigger" | "policy" | "rule" => {
            let word = kind.to_uppercase();
            format!("DROP {word} {} ON {}", part(2)?, relation()?)
        }
        "composite type column" => {
            format!("ALTER TYPE {} DROP ATTRIBUTE {}", relation()?, part(2)?)
        }
        "table"
        | "view"
        | "materialized view"
        | "sequence"
        | "index"
        | "foreign table"
        | "collation"
        | "conversion"
        | "statistics object"
        | "text search configuration"
        | "text search dictionary"
        | "text search parser"
        | "text search template" => {
            let word = match kind {
                "statistics object" => "STATISTICS".to_owned(),
                other => other.to_uppercase(),
            };
            format!("DROP {word} {}", relation()?)
        }
        "schema"
        | "extension"
        | "language"
        | "foreign-data wrapper"
        | "server"
        | "access method"
        | "event trigger"
        | "publication" => {
            let word = kind.replace('-', " ").to_uppercase();
            format!("DROP {word} {}", part(0)?)
        }
        "role" => {
            // What it may do with the database would keep it, and the source has taken that away before.
            let role = part(0)?;
            let revoke = quote_literal(&format!(
                "REVOKE ALL ON DATABASE %I FROM {}",
                role.replace('%', "%%")
            ));
            let body = format!(
                "BEGIN EXECUTE pg_catalog.format({revoke}, pg_catalog.current_database()); DROP ROLE {role}; END"
            );
            format!("DO {}", quote_literal(&body))
        }
        // Their identities are what the command takes: public.f(integer), pg_catalog.=(a,b), (a AS b).
        "function" | "procedure" | "aggregate" | "type" | "domain" | "cast" | "operator" => {
            format!("DROP {} {identity}", kind.to_uppercase())
        }
        "operator class" | "operator family" => {
            format!(
                "DROP {} {}.{} USING {}",
                kind.to_uppercase(),
                part(1)?,
                part(2)?,
                part(0)?
            )
        }
        "user mapping" => format!(
            "DROP USER MAPPING FOR {} SERVER {}",
            match address.names.first()?.as_str() {
                "public" => "PUBLIC".to_owned(),
                name => quote_ident(name),
            },
            quote_ident(address.args.first()?)
        ),
        _ => return None,
    };
    Some(statement)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kind, names, arguments, identity, and what is expected.
    type Case<'a> = (
        &'a str,
        &'a [&'a str],
        &'a [&'a str],
        &'a str,
        Option<&'a str>,
    );

    #[test]
    fn each_kind_has_its_words() {
        let table: [Case<'_>; 15] = [
            (
                "role",
                &["a%"],
                &[],
                "",
                Some(
                    "DO 'BEGIN EXECUTE pg_catalog.format(''REVOKE ALL ON DATABASE %I FROM \"a%%\"'', pg_catalog.current_database()); \
                     DROP ROLE \"a%\"; END'",
                ),
            ),
            (
                "table",
                &["public", "My T"],
                &[],
                "",
                Some("DROP TABLE \"public\".\"My T\""),
            ),
            (
                "materialized view",
                &["s", "v"],
                &[],
                "",
                Some("DROP MATERIALIZED VIEW \"s\".\"v\""),
            ),
            (
                "index",
                &["s", "i"],
                &[],
                "",
                Some("DROP INDEX \"s\".\"i\""),
            ),
            (
                "table column",
                &["s", "t", "a b"],
                &[],
                "",
                Some("ALTER TABLE \"s\".\"t\" DROP COLUMN \"a b\""),
            ),
            (
                "table constraint",
                &["s", "t", "k"],
                &[],
                "",
                Some("ALTER TABLE \"s\".\"t\" DROP CONSTRAINT \"k\""),
            ),
            (
                "domain constraint",
                &["s.d"],
                &["k"],
                "",
                Some("ALTER DOMAIN s.d DROP CONSTRAINT \"k\""),
            ),
            (
                "default value",
                &["s", "t", "c"],
                &[],
                "",
                Some("ALTER TABLE \"s\".\"t\" ALTER COLUMN \"c\" DROP DEFAULT"),
            ),
            (
                "trigger",
                &["s", "t", "g"],
                &[],
                "",
                Some("DROP TRIGGER \"g\" ON \"s\".\"t\""),
            ),
            ("schema", &["My S"], &[], "", Some("DROP SCHEMA \"My S\"")),
            (
                "function",
                &["s", "f"],
                &["integer"],
                "s.f(integer)",
                Some("DROP FUNCTION s.f(integer)"),
            ),
            (
                "foreign-data wrapper",
                &["w"],
                &[],
                "",
                Some("DROP FOREIGN DATA WRAPPER \"w\""),
            ),
            (
                "statistics object",
                &["s", "x"],
                &[],
                "",
                Some("DROP STATISTICS \"s\".\"x\""),
            ),
            (
                "user mapping",
                &["public"],
                &["srv"],
                "",
                Some("DROP USER MAPPING FOR PUBLIC SERVER \"srv\""),
            ),
            ("toast table", &["pg_toast", "x"], &[], "", None),
        ];
        for (kind, names, args, identity, expected) in table {
            let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let address = ObjectAddress {
                kind: kind.to_owned(),
                names: owned(names),
                args: owned(args),
            };
            assert_eq!(statement(&address, identity).as_deref(), expected, "{kind}");
        }
    }
}
