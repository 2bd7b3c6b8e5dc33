//! ● Columns: as they stand in CREATE TABLE, and what makes one of another.

use serde_json::Value;

use super::{Case, Plan, comment, is, plain, quote_ident, quote_literal, text};

/// A column as it stands in CREATE TABLE.
pub(super) fn definition(column: &Value) -> String {
    let name = quote_ident(text(column, "name").unwrap_or_default());
    let mut out = format!("{name} {}", text(column, "type").unwrap_or_default());
    if let Some(method) = text(column, "compression") {
        out.push_str(&format!(" COMPRESSION {}", compression(method)));
    }
    if let Some(collation) = text(column, "collation") {
        out.push_str(&format!(" COLLATE {collation}"));
    }
    match (
        text(column, "generated"),
        text(column, "identity"),
        text(column, "default"),
    ) {
        (Some(kind), _, Some(expression)) => {
            let kind = if kind == "v" { "VIRTUAL" } else { "STORED" };
            out.push_str(&format!(" GENERATED ALWAYS AS ({expression}) {kind}"));
        }
        (_, Some(kind), _) => out.push_str(&format!(" {}", identity(kind, column.get("sequence")))),
        (_, _, Some(expression)) => out.push_str(&format!(" DEFAULT {expression}")),
        _ => {}
    }
    if is(column, "notnull") {
        out.push_str(" NOT NULL");
    }
    out
}

fn compression(method: &str) -> &'static str {
    if method == "l" { "lz4" } else { "pglz" }
}

fn identity(kind: &str, sequence: Option<&Value>) -> String {
    let always = if kind == "a" { "ALWAYS" } else { "BY DEFAULT" };
    let mut out = format!("GENERATED {always} AS IDENTITY");
    if let Some(sequence) = sequence {
        let name = |key: &str| quote_ident(text(sequence, key).unwrap_or_default());
        out.push_str(&format!(
            " (SEQUENCE NAME {}.{}{})",
            name("schema"),
            name("name"),
            sequence_options(sequence)
        ));
    }
    out
}

/// START, INCREMENT and so on, each with a space before it.
pub(super) fn sequence_options(sequence: &Value) -> String {
    let mut out = String::new();
    for (key, word) in [
        ("increment", "INCREMENT"),
        ("min", "MINVALUE"),
        ("max", "MAXVALUE"),
        ("start", "START"),
        ("cache", "CACHE"),
    ] {
        if let Some(value) = plain(sequence, key) {
            out.push_str(&format!(" {word} {value}"));
        }
    }
    out.push_str(if is(sequence, "cycle") {
        " CYCLE"
    } else {
        " NO CYCLE"
    });
    out
}

/// What stands in ALTER TABLE for a column's storage and the like, behind its definition.
pub(super) fn details(table: &str, recorded: &Value, found: Option<&Value>, plan: &mut Plan) {
    let name = quote_ident(text(recorded, "name").unwrap_or_default());
    let alter = format!("ALTER TABLE {table} ALTER COLUMN {name}");
    let differs = |key: &str| recorded.get(key) != found.and_then(|found| found.get(key));
    if differs("storage") {
        let storage = match text(recorded, "storage") {
            Some("p") => "PLAIN",
            Some("e") => "EXTERNAL",
            Some("m") => "MAIN",
            Some("x") => "EXTENDED",
            // SET STORAGE DEFAULT is of version 16 and later; these are the types' own.
            _ if is_main_by_default(text(recorded, "type").unwrap_or_default()) => "MAIN",
            _ => "EXTENDED",
        };
        plan.add(format!("{alter} SET STORAGE {storage}"));
    }
    if differs("statistics") {
        let target = plain(recorded, "statistics").unwrap_or_else(|| "-1".to_owned());
        plan.add(format!("{alter} SET STATISTICS {target}"));
    }
    super::alter_options(&alter, recorded, found, plan);
    if differs("comment") {
        plan.add(comment(
            &format!("COLUMN {table}.{name}"),
            text(recorded, "comment"),
        ));
    }
}

/// Types whose values are not compressed at once.
fn is_main_by_default(kind: &str) -> bool {
    ["numeric", "inet", "cidr"]
        .iter()
        .any(|main| kind.starts_with(main))
}

/// What rows have that were there before a column, as a literal of its type; none where that cannot be said. Arrays come as JSON.
fn literal_of(missing: &str, kind: &str) -> Option<String> {
    if !kind.ends_with(']') {
        // A composite comes as JSON, too.
        return (!missing.starts_with('{') || kind.starts_with("json"))
            .then(|| quote_literal(missing));
    }
    fn array(value: &Value) -> Option<String> {
        Some(match value {
            Value::Null => "NULL".to_owned(),
            Value::Array(list) => {
                let parts: Option<Vec<String>> = list.iter().map(array).collect();
                format!("{{{}}}", parts?.join(","))
            }
            Value::String(text) => {
                format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
            }
            Value::Object(_) => return None,
            other => other.to_string(),
        })
    }
    let value: Value = serde_json::from_str(missing).ok()?;
    array(&value).map(|text| quote_literal(&text))
}

/// Adds a column. Rows that are there have what they have on the source (`missing`), or have to be copied again.
pub(super) fn add(table: &str, column: &Value, plan: &mut Plan) {
    let name = quote_ident(text(column, "name").unwrap_or_default());
    let is_computed = text(column, "generated").is_some();
    let default = text(column, "default").filter(|_| !is_computed);
    let kind = text(column, "type").unwrap_or_default();
    let missing = text(column, "missing").map(|missing| literal_of(missing, kind));
    match (missing, default) {
        (Some(Some(missing)), default) => {
            let mut first = column.clone();
            first["default"] = Value::String(format!("{missing}::{kind}"));
            plan.add(format!(
                "ALTER TABLE {table} ADD COLUMN {}",
                definition(&first)
            ));
            plan.add(match default {
                Some(default) => {
                    format!("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}")
                }
                None => format!("ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT"),
            });
        }
        (missing, default) => {
            // Each row has a value of its own, where there are rows.
            plan.copy_again |=
                missing.is_some() || default.is_some() || text(column, "identity").is_some();
            plan.add(format!(
                "ALTER TABLE {table} ADD COLUMN {}",
                definition(column)
            ));
        }
    }
    details(table, column, None, plan);
}

/// A column that comes from a parent: what of it is the child's own.
pub(super) fn of_parent(table: &str, column: &Value, plan: &mut Plan) {
    let name = quote_ident(text(column, "name").unwrap_or_default());
    let alter = format!("ALTER TABLE {table} ALTER COLUMN {name}");
    if text(column, "generated").is_none() && text(column, "identity").is_none() {
        plan.add(default_of(&alter, text(column, "default")));
    }
    if is(column, "notnull") {
        plan.add(format!("{alter} SET NOT NULL"));
    }
}

/// Types between which every cast gives the same anywhere.
const CERTAIN: [&str; 8] = [
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "text",
    "character varying",
    "uuid",
    "boolean",
];

/// Whether values that were cast from one type to the other are the same anywhere, whatever the session's settings.
pub fn is_certain_cast(from: &str, to: &str) -> bool {
    let base = |name: &str| name.split('(').next().unwrap_or_default().trim().to_owned();
    CERTAIN.contains(&base(from).as_str()) && CERTAIN.contains(&base(to).as_str())
}

/// Makes one column of another of the same name.
pub(super) fn alter(table: &str, recorded: &Value, found: &Value, plan: &mut Plan) {
    let name = quote_ident(text(recorded, "name").unwrap_or_default());
    let alter = format!("ALTER TABLE {table} ALTER COLUMN {name}");
    let differs = |key: &str| recorded.get(key) != found.get(key);
    if differs("generated") || text(recorded, "generated").is_some() && differs("default") {
        plan.add(format!("ALTER TABLE {table} DROP COLUMN {name}"));
        plan.copy_again |= text(recorded, "generated").is_none();
        add(table, recorded, plan);
        return;
    }
    let (kind, was) = (
        text(recorded, "type").unwrap_or_default(),
        text(found, "type").unwrap_or_default(),
    );
    if kind != was || differs("collation") {
        if text(found, "default").is_some() {
            plan.add(format!("{alter} DROP DEFAULT"));
        }
        let collate =
            text(recorded, "collation").map_or_else(String::new, |name| format!(" COLLATE {name}"));
        plan.add(format!("{alter} TYPE {kind}{collate} USING {name}::{kind}"));
        plan.copy_again |= kind != was && !is_certain_cast(was, kind);
        if let Some(default) = text(recorded, "default") {
            plan.add(format!("{alter} SET DEFAULT {default}"));
        }
    } else if differs("default") && text(recorded, "identity").is_none() {
        plan.add(default_of(&alter, text(recorded, "default")));
    }
    identity_of(&alter, recorded, found, plan);
    if differs("notnull") {
        plan.add(format!(
            "{alter} {} NOT NULL",
            if is(recorded, "notnull") {
                "SET"
            } else {
                "DROP"
            }
        ));
    }
    if differs("compression") {
        let method = text(recorded, "compression").map_or("default", compression);
        plan.add(format!("{alter} SET COMPRESSION {method}"));
    }
    details(table, recorded, Some(found), plan);
}

fn identity_of(alter: &str, recorded: &Value, found: &Value, plan: &mut Plan) {
    let always = |kind: &str| if kind == "a" { "ALWAYS" } else { "BY DEFAULT" };
    match (text(recorded, "identity"), text(found, "identity")) {
        (Some(kind), None) => plan.add(format!(
            "{alter} ADD {}",
            identity(kind, recorded.get("sequence"))
        )),
        (None, Some(_)) => plan.add(format!("{alter} DROP IDENTITY")),
        (Some(kind), Some(was)) if kind != was => {
            plan.add(format!("{alter} SET GENERATED {}", always(kind)));
        }
        _ => {}
    }
    if let (Some(wanted), Some(is)) = (recorded.get("sequence"), found.get("sequence"))
        && wanted != is
    {
        let name = |of: &Value| quote_ident(text(of, "name").unwrap_or_default());
        let schema = quote_ident(text(is, "schema").unwrap_or_default());
        if text(wanted, "name") != text(is, "name") {
            plan.add(format!(
                "ALTER SEQUENCE {schema}.{} RENAME TO {}",
                name(is),
                name(wanted)
            ));
        }
        plan.add(format!(
            "ALTER SEQUENCE {schema}.{}{}",
            name(wanted),
            sequence_options(wanted)
        ));
    }
}

fn default_of(alter: &str, default: Option<&str>) -> String {
    match default {
        Some(default) => format!("{alter} SET DEFAULT {default}"),
        None => format!("{alter} DROP DEFAULT"),
    }
}

/// One column that a command was about.
pub(super) fn heal(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    match case.found {
        None => add(&case.name(), case.recorded, &mut plan),
        Some(found) => alter(&case.name(), case.recorded, found, &mut plan),
    }
    Ok(plan)
}

/// One default.
pub(super) fn heal_default(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    let alter = format!(
        "ALTER TABLE {} ALTER COLUMN {}",
        case.name(),
        case.last_name()
    );
    plan.add(default_of(&alter, case.wanted("default")));
    Ok(plan)
}
