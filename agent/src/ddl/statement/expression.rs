//! ● What evaluating an expression means: the same on any server, the moment's, or perhaps the user's own code.
//!
//! Only what is listed here is known. Names are taken for PostgreSQL's own where no schema stands before them and
//! search_path does not put another schema first.

use squawk_syntax::{SyntaxKind as K, SyntaxNode};

use super::script::words;

/// What comes out of an expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// The same everywhere.
    Same,
    /// It hangs on the moment or the session, and is the same for all rows.
    Session,
    /// Another value for each row, or code that nobody here knows.
    Unknown,
}

const TYPES: &str = " smallint int2 integer int int4 bigint int8 decimal numeric real float4 float float8 double boolean bool \
    text varchar character char bpchar name bytea uuid json jsonb date time timetz timestamp timestamptz interval bit varbit \
    inet cidr macaddr macaddr8 point line lseg box path polygon circle tsvector tsquery xml money oid \
    int4range int8range numrange tsrange tstzrange daterange int4multirange int8multirange nummultirange ";

const IMMUTABLE: &str = " abs array_length bit_length btrim cardinality ceil ceiling char_length character_length coalesce \
    daterange floor greatest int4range int8range isempty jsonb_array_length jsonb_typeof least left length lower ltrim md5 mod \
    nullif num_nonnulls num_nulls numrange octet_length position power regexp_replace repeat replace right round rtrim \
    split_part sqrt starts_with strpos substr substring trim trunc tsrange upper ";

const STABLE: &str = " now transaction_timestamp statement_timestamp current_database current_schema current_setting \
    txid_current pg_current_xact_id version to_char to_timestamp to_date date_trunc date_part extract concat timezone age ";

const OPERATORS: &[&str] = &[
    "=", "<>", "!=", "<", ">", "<=", ">=", "+", "-", "*", "/", "%", "^", "||", "~", "~*", "!~",
    "!~*", "->", "->>", "#>", "#>>", "@>", "<@", "&&", "?",
];

fn lists(list: &str, name: &str) -> bool {
    !name.is_empty() && list.contains(&format!(" {name} "))
}

/// A name of PostgreSQL's own, without its schema; none if it has another one, or is quoted.
fn own(node: &SyntaxNode) -> Option<String> {
    let parts: Vec<String> = words(node).collect();
    match &parts[..] {
        [name] => Some(name.to_lowercase()),
        [schema, dot, name] if schema == "PG_CATALOG" && dot == "." => Some(name.to_lowercase()),
        _ => None,
    }
}

/// The name of a type of PostgreSQL's own, arrays included; none for what may be a domain, an enum or a type of an extension.
fn own_type(node: &SyntaxNode) -> Option<String> {
    let path = node.descendants().find(|n| n.kind() == K::PATH_REF);
    let Some(path) = path else {
        // `character varying(10)`, `timestamp with time zone`: words of the grammar.
        return words(node).next().map(|word| word.to_lowercase());
    };
    own(&path).filter(|name| lists(TYPES, name))
}

/// Whether the unqualified names of PostgreSQL's own may mean something else.
pub(super) fn is_hidden(search_path: &str) -> bool {
    let names = search_path
        .split(',')
        .map(|name| name.trim().trim_matches('"'));
    names.skip(1).any(|name| name == "pg_catalog")
}

/// What comes out of the expressions below a node.
pub(super) fn outcome(node: &SyntaxNode) -> Outcome {
    node.descendants()
        .map(|part| one(&part))
        .max()
        .unwrap_or(Outcome::Same)
}

fn one(part: &SyntaxNode) -> Outcome {
    match part.kind() {
        K::CALL_EXPR => {
            // EXTRACT and the like are words of the grammar, not names.
            let name = part.children().next().and_then(|callee| own(&callee));
            match name {
                Some(name) if lists(IMMUTABLE, &name) => Outcome::Same,
                Some(name) if lists(STABLE, &name) => Outcome::Session,
                _ => Outcome::Unknown,
            }
        }
        K::CAST_EXPR => {
            let types = part.children().filter(|n| is_type(n.kind()));
            match types.last().as_ref().and_then(own_type) {
                Some(_) => Outcome::Same,
                None => Outcome::Unknown,
            }
        }
        K::NAME_REF => match words(part).next().unwrap_or_default().as_str() {
            "CURRENT_CATALOG" | "CURRENT_DATE" | "CURRENT_ROLE" | "CURRENT_SCHEMA"
            | "CURRENT_TIME" | "CURRENT_TIMESTAMP" | "CURRENT_USER" | "LOCALTIME"
            | "LOCALTIMESTAMP" | "SESSION_USER" | "SYSTEM_USER" | "USER" => Outcome::Session,
            _ => Outcome::Same,
        },
        K::LITERAL if is_moment(part) => Outcome::Session,
        K::CUSTOM_OP if !OPERATORS.contains(&part.text().to_string().as_str()) => Outcome::Unknown,
        K::OPERATOR_CALL | K::SELECT | K::PAREN_SELECT | K::COMPOUND_SELECT => Outcome::Unknown,
        _ => Outcome::Same,
    }
}

fn is_type(kind: K) -> bool {
    let name = format!("{kind:?}");
    name.ends_with("_TYPE")
}

/// `'now'` and the like, which become a value when they are read.
fn is_moment(literal: &SyntaxNode) -> bool {
    let text = literal.text().to_string().to_lowercase();
    let text = text
        .trim_start_matches(['e', 'n'])
        .trim_matches('\'')
        .trim();
    let moments = ["now", "today", "tomorrow", "yesterday"];
    moments.iter().any(|moment| text.starts_with(moment))
}

/// Whether a literal below a node is a moment.
pub(super) fn names_a_moment(node: &SyntaxNode) -> bool {
    node.descendants()
        .any(|part| part.kind() == K::LITERAL && is_moment(&part))
}
