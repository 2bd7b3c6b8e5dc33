//! ● Everything that is neither a table nor a type.

use std::collections::BTreeSet;

use super::column::sequence_options;
use super::{
    Case, Plan, comment, is, option_list, plain, privileges, quote_ident, shared, text, texts,
};

/// Plans an object.
pub(super) fn heal(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    match case.address.kind.as_str() {
        "view" => view(case, &mut plan),
        "materialized view" => materialized_view(case, &mut plan),
        "index" => index(case, &mut plan),
        "sequence" => sequence(case, &mut plan),
        "function" | "procedure" => function(case, &mut plan),
        "aggregate" => replace(case, "AGGREGATE", case.identity, &mut plan),
        "trigger" => trigger(case, &mut plan),
        "rule" => rule(case, &mut plan),
        "policy" => policy(case, &mut plan),
        "schema" => schema(case, &mut plan),
        "extension" => extension(case, &mut plan),
        "statistics object" => replace(case, "STATISTICS", &case.name(), &mut plan),
        "default acl" => default_privileges(case, &mut plan)?,
        "foreign-data wrapper" => wrapper(case, &mut plan),
        "server" => server(case, &mut plan)?,
        "user mapping" => mapping(case, &mut plan),
        "cast" => cast(case, &mut plan)?,
        "operator" => operator(case, &mut plan)?,
        "collation" => collation(case, &mut plan)?,
        "role" => shared::role(case, &mut plan),
        "database" => shared::database(case, &mut plan),
        "event trigger" => shared::event_trigger(case, &mut plan),
        "publication" => shared::publication(case, &mut plan),
        "view column" | "materialized view column" => {
            let what = format!("COLUMN {}.{}", case.name(), case.last_name());
            case.comment(&what, &mut plan);
        }
        other => return Err(format!("a {other} is not made from its shape")),
    }
    Ok(plan)
}

/// Without the semicolon with which the server ends a view's query.
fn definition<'a>(case: &Case<'a>) -> &'a str {
    case.wanted("definition")
        .unwrap_or_default()
        .trim_end_matches(';')
}

/// Dropped and created anew, from a definition that is a whole statement.
fn replace(case: &Case<'_>, word: &str, name: &str, plan: &mut Plan) {
    if case.differs("definition") {
        if case.found.is_some() {
            plan.add(format!("DROP {word} {name}"));
        }
        plan.add(definition(case));
    }
    if case.differs("target") && word == "STATISTICS" {
        let target = plain(case.recorded, "target").unwrap_or_else(|| "-1".to_owned());
        plan.add(format!("ALTER STATISTICS {name} SET STATISTICS {target}"));
    }
    case.comment(&format!("{word} {name}"), plan);
}

fn view(case: &Case<'_>, plan: &mut Plan) {
    let view = case.name();
    if case.differs("definition") || case.differs("columns") || case.differs("options") {
        let body = format!("VIEW {view} {}", body_of_view(case));
        plan.add(format!("CREATE OR REPLACE {body}"));
        if case.found.is_some() {
            plan.otherwise = vec![format!("DROP VIEW {view}"), format!("CREATE {body}")];
            plan.otherwise.extend(comments_of_view(case, &view));
        }
    }
    for statement in comments_of_view(case, &view) {
        plan.add(statement);
    }
}

/// What stands behind a view's name: columns, options, query.
fn body_of_view(case: &Case<'_>) -> String {
    let columns = texts(case.recorded, "columns");
    let columns: Vec<String> = columns.into_iter().map(quote_ident).collect();
    let options = texts(case.recorded, "options");
    let with = match options.is_empty() {
        true => String::new(),
        false => format!(" WITH ({})", option_list(&options, "=")),
    };
    format!("({}){with} AS {}", columns.join(", "), definition(case))
}

fn comments_of_view(case: &Case<'_>, view: &str) -> Vec<String> {
    let mut out = Vec::new();
    if case.differs("comment") {
        out.push(comment(&format!("VIEW {view}"), case.wanted("comment")));
    }
    out.extend(of_columns(case, view));
    out
}

/// Comments and defaults of a view's columns.
fn of_columns(case: &Case<'_>, view: &str) -> Vec<String> {
    let mut out = Vec::new();
    let map = |value: &serde_json::Value, key: &str| {
        value
            .get(key)
            .and_then(serde_json::Value::as_object)
            .cloned()
            .unwrap_or_default()
    };
    for key in ["column_comments", "column_defaults"] {
        let wanted = map(case.recorded, key);
        let has = case.found.map(|found| map(found, key)).unwrap_or_default();
        let names: BTreeSet<&String> = wanted.keys().chain(has.keys()).collect();
        for column in names
            .into_iter()
            .filter(|column| wanted.get(*column) != has.get(*column))
        {
            let text = wanted.get(column).and_then(serde_json::Value::as_str);
            let name = quote_ident(column);
            out.push(match (key, text) {
                ("column_comments", text) => comment(&format!("COLUMN {view}.{name}"), text),
                (_, Some(default)) => {
                    format!("ALTER VIEW {view} ALTER COLUMN {name} SET DEFAULT {default}")
                }
                (_, None) => format!("ALTER VIEW {view} ALTER COLUMN {name} DROP DEFAULT"),
            });
        }
    }
    out
}

/// Its rows are computed after a promotion.
fn materialized_view(case: &Case<'_>, plan: &mut Plan) {
    let view = case.name();
    if case.differs("definition") || case.differs("columns") {
        if case.found.is_some() {
            plan.add(format!("DROP MATERIALIZED VIEW {view}"));
        }
        plan.add(format!(
            "CREATE MATERIALIZED VIEW {view} {} WITH NO DATA",
            body_of_view(case)
        ));
    } else {
        super::alter_options(
            &format!("ALTER MATERIALIZED VIEW {view}"),
            case.recorded,
            case.found,
            plan,
        );
    }
    case.comment(&format!("MATERIALIZED VIEW {view}"), plan);
    for statement in of_columns(case, &view) {
        plan.add(statement);
    }
}

fn index(case: &Case<'_>, plan: &mut Plan) {
    let index = case.name();
    let is_invalid_here = case
        .found
        .is_some_and(|found| found.get("valid") == Some(&serde_json::Value::Bool(false)));
    // One of a constraint comes with its table, and one of a partition with that of the whole.
    let comes_along = case.is_wanted("constraint") || case.is_wanted("inherited");
    if (case.differs("definition") || is_invalid_here) && !comes_along {
        if case.found.is_some() {
            plan.add(format!("DROP INDEX {index}"));
        }
        plan.add(definition(case).replacen(" ON ONLY ", " ON ", 1));
    }
    if case.differs("statistics") {
        let targets = |value: &serde_json::Value| {
            value
                .get("statistics")
                .and_then(serde_json::Value::as_object)
                .cloned()
        };
        let wanted = targets(case.recorded).unwrap_or_default();
        let has = case.found.and_then(targets).unwrap_or_default();
        for (column, target) in &wanted {
            plan.add(format!(
                "ALTER INDEX {index} ALTER COLUMN {column} SET STATISTICS {target}"
            ));
        }
        for column in has.keys().filter(|column| !wanted.contains_key(*column)) {
            plan.add(format!(
                "ALTER INDEX {index} ALTER COLUMN {column} SET STATISTICS -1"
            ));
        }
    }
    case.comment(&format!("INDEX {index}"), plan);
}

fn sequence(case: &Case<'_>, plan: &mut Plan) {
    let sequence = case.name();
    // The one of an identity column comes with its table.
    if case.is_wanted("identity") {
        return;
    }
    let kind = case.wanted("type").unwrap_or("bigint");
    match case.found {
        None => {
            let unlogged = if case.wanted("persistence") == Some("u") {
                "UNLOGGED "
            } else {
                ""
            };
            plan.add(format!(
                "CREATE {unlogged}SEQUENCE {sequence} AS {kind}{}",
                sequence_options(case.recorded)
            ));
        }
        Some(_) => {
            let keys = ["type", "start", "increment", "min", "max", "cache", "cycle"];
            if keys.iter().any(|key| case.differs(key)) {
                plan.add(format!(
                    "ALTER SEQUENCE {sequence} AS {kind}{}",
                    sequence_options(case.recorded)
                ));
            }
        }
    }
    // Its table may come later in the same command: nothing is said of it before the sequence is there.
    if case.found.is_some() && case.differs("owned_by") {
        let owner = texts(case.recorded, "owned_by");
        let owner = match owner.as_slice() {
            [schema, table, column] => format!(
                "{}.{}.{}",
                quote_ident(schema),
                quote_ident(table),
                quote_ident(column)
            ),
            _ => "NONE".to_owned(),
        };
        plan.add(format!("ALTER SEQUENCE {sequence} OWNED BY {owner}"));
    }
    case.comment(&format!("SEQUENCE {sequence}"), plan);
}

fn function(case: &Case<'_>, plan: &mut Plan) {
    let word = if case.address.kind == "procedure" {
        "PROCEDURE"
    } else {
        "FUNCTION"
    };
    if case.differs("definition") {
        plan.add(definition(case));
        if case.found.is_some() {
            plan.otherwise = vec![
                format!("DROP {word} {}", case.identity),
                definition(case).to_owned(),
            ];
        }
    }
    case.comment(&format!("{word} {}", case.identity), plan);
}

fn trigger(case: &Case<'_>, plan: &mut Plan) {
    let (name, table) = (case.last_name(), case.name());
    if case.differs("definition") {
        if case.found.is_some() {
            plan.add(format!("DROP TRIGGER {name} ON {table}"));
        }
        plan.add(definition(case));
    }
    if case.differs("enabled") || case.differs("definition") {
        fires(case, "TRIGGER", plan);
    }
    case.comment(&format!("TRIGGER {name} ON {table}"), plan);
}

fn fires(case: &Case<'_>, word: &str, plan: &mut Plan) {
    let mode = match case.wanted("enabled") {
        Some("D") => "DISABLE",
        Some("A") => "ENABLE ALWAYS",
        Some("R") => "ENABLE REPLICA",
        _ if case.found.is_some() => "ENABLE",
        _ => return,
    };
    plan.add(format!(
        "ALTER TABLE {} {mode} {word} {}",
        case.name(),
        case.last_name()
    ));
}

fn rule(case: &Case<'_>, plan: &mut Plan) {
    if case.differs("definition") {
        plan.add(definition(case).replacen("CREATE RULE", "CREATE OR REPLACE RULE", 1));
    }
    if case.differs("enabled") {
        fires(case, "RULE", plan);
    }
    case.comment(
        &format!("RULE {} ON {}", case.last_name(), case.name()),
        plan,
    );
}

fn policy(case: &Case<'_>, plan: &mut Plan) {
    let (name, table) = (case.last_name(), case.name());
    let keys = ["command", "permissive", "roles", "using", "check"];
    if keys.iter().any(|key| case.differs(key)) {
        if case.found.is_some() {
            plan.add(format!("DROP POLICY {name} ON {table}"));
        }
        let sort = if is(case.recorded, "permissive") {
            "PERMISSIVE"
        } else {
            "RESTRICTIVE"
        };
        let command = match case.wanted("command") {
            Some("r") => "SELECT",
            Some("a") => "INSERT",
            Some("w") => "UPDATE",
            Some("d") => "DELETE",
            _ => "ALL",
        };
        let roles: Vec<String> = texts(case.recorded, "roles")
            .into_iter()
            .map(quote_ident)
            .collect();
        let to = if roles.is_empty() {
            "PUBLIC".to_owned()
        } else {
            roles.join(", ")
        };
        let mut create = format!("CREATE POLICY {name} ON {table} AS {sort} FOR {command} TO {to}");
        for (key, word) in [("using", "USING"), ("check", "WITH CHECK")] {
            if let Some(condition) = case.wanted(key) {
                create.push_str(&format!(" {word} ({condition})"));
            }
        }
        plan.add(create);
    }
    case.comment(&format!("POLICY {name} ON {table}"), plan);
}

fn schema(case: &Case<'_>, plan: &mut Plan) {
    if case.found.is_none() {
        plan.add(format!("CREATE SCHEMA {}", case.last_name()));
    }
    case.comment(&format!("SCHEMA {}", case.last_name()), plan);
}

fn extension(case: &Case<'_>, plan: &mut Plan) {
    let (name, version) = (case.last_name(), case.wanted("version").unwrap_or_default());
    match case.found {
        None => {
            let schema = case.wanted("schema").unwrap_or("public");
            let create = format!("CREATE EXTENSION {name} SCHEMA {schema}");
            plan.add(format!("{create} VERSION {}", quote_ident(version)));
            // Another version is there; the difference stays named.
            plan.otherwise = vec![create];
        }
        Some(_) if case.differs("version") => {
            plan.add(format!(
                "ALTER EXTENSION {name} UPDATE TO {}",
                quote_ident(version)
            ));
        }
        Some(_) => {
            let schema = case.wanted("schema").unwrap_or("public");
            plan.add(format!("ALTER EXTENSION {name} SET SCHEMA {schema}"));
        }
    }
}

fn default_privileges(case: &Case<'_>, plan: &mut Plan) -> Result<(), String> {
    let Some(role) = case.wanted("role").filter(|role| case.roles.acts_as(role)) else {
        return Err(
            "the role whose privileges they are is not to be had on the replica".to_owned(),
        );
    };
    let objects = match case.wanted("objects") {
        Some("r") => "TABLES",
        Some("S") => "SEQUENCES",
        Some("f") => "FUNCTIONS",
        Some("T") => "TYPES",
        Some("n") => "SCHEMAS",
        _ => return Err("default privileges of another sort".to_owned()),
    };
    let within = case
        .wanted("schema")
        .map_or_else(String::new, |schema| format!(" IN SCHEMA {schema}"));
    let head = format!(
        "ALTER DEFAULT PRIVILEGES FOR ROLE {}{within} ",
        quote_ident(role)
    );
    let kind = match objects {
        "FUNCTIONS" if within.is_empty() => "function",
        "TYPES" if within.is_empty() => "type",
        _ => "table",
    };
    privileges::grants(case, kind, &head, objects, plan);
    Ok(())
}

fn options_of(case: &Case<'_>) -> String {
    let options = texts(case.recorded, "options");
    match options.is_empty() {
        true => String::new(),
        false => format!(" OPTIONS ({})", option_list(&options, " ")),
    }
}

fn wrapper(case: &Case<'_>, plan: &mut Plan) {
    let name = case.last_name();
    let functions = [("handler", "HANDLER"), ("validator", "VALIDATOR")];
    if case.found.is_some() {
        for (key, word) in functions.into_iter().filter(|(key, _)| case.differs(key)) {
            let function = case.wanted(key).map_or_else(
                || format!("NO {word}"),
                |function| format!("{word} {function}"),
            );
            plan.add(format!("ALTER FOREIGN DATA WRAPPER {name} {function}"));
        }
        alter_options_of(case, &format!("FOREIGN DATA WRAPPER {name}"), plan);
        return;
    }
    let mut create = format!("CREATE FOREIGN DATA WRAPPER {name}");
    for (key, word) in functions {
        if let Some(function) = case.wanted(key) {
            create.push_str(&format!(" {word} {function}"));
        }
    }
    plan.add(create + &options_of(case));
}

fn alter_options_of(case: &Case<'_>, what: &str, plan: &mut Plan) {
    if case.differs("options") {
        let has = case
            .found
            .map_or_else(Vec::new, |found| texts(found, "options"));
        let changes = super::option_changes(&texts(case.recorded, "options"), &has);
        plan.add(format!("ALTER {what} OPTIONS ({changes})"));
    }
}

fn server(case: &Case<'_>, plan: &mut Plan) -> Result<(), String> {
    let name = case.last_name();
    if case.found.is_some() {
        if case.differs("wrapper") || case.differs("type") {
            return Err("a server's wrapper and type are not altered".to_owned());
        }
        if case.differs("version") {
            let version = case
                .wanted("version")
                .map_or_else(|| "NULL".to_owned(), super::quote_literal);
            plan.add(format!("ALTER SERVER {name} VERSION {version}"));
        }
        alter_options_of(case, &format!("SERVER {name}"), plan);
        return Ok(());
    }
    let mut create = format!("CREATE SERVER {name}");
    for (key, word) in [("type", "TYPE"), ("version", "VERSION")] {
        if let Some(value) = case.wanted(key) {
            create.push_str(&format!(" {word} {}", super::quote_literal(value)));
        }
    }
    let wrapper = quote_ident(case.wanted("wrapper").unwrap_or_default());
    plan.add(format!(
        "{create} FOREIGN DATA WRAPPER {wrapper}{}",
        options_of(case)
    ));
    Ok(())
}

/// Without its password, which nobody has sent: one that is there stays.
fn mapping(case: &Case<'_>, plan: &mut Plan) {
    let user = match case.wanted("user") {
        None | Some("public") => "PUBLIC".to_owned(),
        Some(name) => quote_ident(name),
    };
    let server = quote_ident(case.wanted("server").unwrap_or_default());
    let mapping = format!("USER MAPPING FOR {user} SERVER {server}");
    match case.found {
        Some(_) => alter_options_of(case, &mapping, plan),
        None => plan.add(format!("CREATE {mapping}{}", options_of(case))),
    }
}

fn cast(case: &Case<'_>, plan: &mut Plan) -> Result<(), String> {
    let part = |key: &str| {
        case.wanted(key)
            .ok_or_else(|| "its types are not known".to_owned())
    };
    let (source, target) = (part("source")?, part("target")?);
    if case.found.is_some() {
        plan.add(format!("DROP CAST ({source} AS {target})"));
    }
    let how = match (case.wanted("method"), case.wanted("function")) {
        (Some("i"), _) => "WITH INOUT".to_owned(),
        (_, Some(function)) => format!("WITH FUNCTION {function}"),
        _ => "WITHOUT FUNCTION".to_owned(),
    };
    let context = match case.wanted("context") {
        Some("a") => " AS ASSIGNMENT",
        Some("i") => " AS IMPLICIT",
        _ => "",
    };
    plan.add(format!("CREATE CAST ({source} AS {target}) {how}{context}"));
    Ok(())
}

fn operator(case: &Case<'_>, plan: &mut Plan) -> Result<(), String> {
    if case.found.is_some() {
        return Err("an operator is not altered from its shape".to_owned());
    }
    let (schema, name) = (
        case.wanted("schema").unwrap_or_default(),
        case.wanted("name").unwrap_or_default(),
    );
    let mut parts = vec![format!(
        "FUNCTION = {}",
        case.wanted("function").unwrap_or_default()
    )];
    for (key, word) in [
        ("left", "LEFTARG"),
        ("right", "RIGHTARG"),
        ("restrict", "RESTRICT"),
        ("join", "JOIN"),
    ] {
        parts.extend(text(case.recorded, key).map(|value| format!("{word} = {value}")));
    }
    // As the server writes it: schema.name(left,right).
    for (key, word) in [("commutator", "COMMUTATOR"), ("negator", "NEGATOR")] {
        let other = text(case.recorded, key).and_then(|text| text.split('(').next());
        parts.extend(other.map(|name| format!("{word} = OPERATOR({name})")));
    }
    for (key, word) in [("merges", "MERGES"), ("hashes", "HASHES")] {
        parts.extend(is(case.recorded, key).then(|| word.to_owned()));
    }
    plan.add(format!(
        "CREATE OPERATOR {schema}.{name} ({})",
        parts.join(", ")
    ));
    Ok(())
}

fn collation(case: &Case<'_>, plan: &mut Plan) -> Result<(), String> {
    if case.found.is_some() {
        return Err("a collation is not altered from its shape".to_owned());
    }
    let provider = match case.wanted("collprovider") {
        Some("i") => "icu",
        Some("b") => "builtin",
        _ => "libc",
    };
    let mut parts = vec![format!("PROVIDER = {provider}")];
    let locale = case
        .wanted("colllocale")
        .or_else(|| case.wanted("colliculocale"));
    match (locale, case.wanted("collcollate"), case.wanted("collctype")) {
        (Some(locale), ..) => parts.push(format!("LOCALE = {}", super::quote_literal(locale))),
        (None, Some(collate), ctype) => {
            parts.push(format!("LC_COLLATE = {}", super::quote_literal(collate)));
            parts.push(format!(
                "LC_CTYPE = {}",
                super::quote_literal(ctype.unwrap_or(collate))
            ));
        }
        _ => return Err("its locale is not known".to_owned()),
    }
    parts.extend(
        case.wanted("collicurules")
            .map(|rules| format!("RULES = {}", super::quote_literal(rules))),
    );
    if case.recorded.get("collisdeterministic") == Some(&serde_json::Value::Bool(false)) {
        parts.push("DETERMINISTIC = false".to_owned());
    }
    plan.add(format!(
        "CREATE COLLATION {} ({})",
        case.name(),
        parts.join(", ")
    ));
    Ok(())
}
