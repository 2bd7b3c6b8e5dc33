//! ● Roles and the database, which are the server's, and event triggers and publications: what no event trigger tells of.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Case, Plan, is, plain, quote_ident, quote_literal, text, texts};

/// Settings that are lists of names are stored as the text that `set_config` takes, not as what SET takes.
const LISTS: [&str; 2] = ["search_path", "temp_tablespaces"];

/// Attributes of a role, by their names in a shape.
const ATTRIBUTES: [(&str, &str, &str); 7] = [
    ("superuser", "SUPERUSER", "NOSUPERUSER"),
    ("noinherit", "NOINHERIT", "INHERIT"),
    ("createrole", "CREATEROLE", "NOCREATEROLE"),
    ("createdb", "CREATEDB", "NOCREATEDB"),
    ("login", "LOGIN", "NOLOGIN"),
    ("replication", "REPLICATION", "NOREPLICATION"),
    ("bypassrls", "BYPASSRLS", "NOBYPASSRLS"),
];

pub(super) fn role(case: &Case<'_>, plan: &mut Plan) {
    let role = case.last_name();
    let mut attributes: Vec<String> = Vec::new();
    for (key, with, without) in ATTRIBUTES {
        if case.differs(key) {
            attributes.push(if case.is_wanted(key) { with } else { without }.to_owned());
        }
    }
    if case.differs("limit") {
        let limit = plain(case.recorded, "limit").unwrap_or_else(|| "-1".to_owned());
        attributes.push(format!("CONNECTION LIMIT {limit}"));
    }
    if case.differs("until") {
        let until = case.wanted("until").unwrap_or("infinity");
        attributes.push(format!("VALID UNTIL {}", quote_literal(until)));
    }
    let attributes = attributes.join(" ");
    match case.found {
        None => {
            plan.add(format!("CREATE ROLE {role} {attributes}"));
            // Who may not act as it can give it nothing.
            plan.add(if_allowed(&format!("GRANT {role} TO CURRENT_USER")));
        }
        Some(_) if attributes.is_empty() => {}
        Some(_) => plan.add(format!("ALTER ROLE {role} {attributes}")),
    }
    let (wanted, has) = (
        groups(case.recorded),
        case.found.map(groups).unwrap_or_default(),
    );
    for (group, admin) in &wanted {
        if has.get(group) == Some(admin) || !case.roles.has(group) {
            continue;
        }
        let group = quote_ident(group);
        if has.contains_key(&group) && !admin {
            plan.add(if_allowed(&format!(
                "REVOKE ADMIN OPTION FOR {group} FROM {role}"
            )));
        } else {
            let option = if *admin { " WITH ADMIN OPTION" } else { "" };
            plan.add(if_allowed(&format!("GRANT {group} TO {role}{option}")));
        }
    }
    let gone = has.keys().filter(|group| !wanted.contains_key(*group));
    for group in gone.filter(|group| case.roles.is_known(group)) {
        let group = quote_ident(group);
        plan.add(if_allowed(&format!("REVOKE {group} FROM {role}")));
    }
    settings(case, "settings", &format!("ROLE {role}"), plan);
    let here = format!("ROLE {role} IN DATABASE %DATABASE%");
    settings(case, "settings_here", &here, plan);
    case.comment(&format!("ROLE {role}"), plan);
}

pub(super) fn database(case: &Case<'_>, plan: &mut Plan) {
    let database = case.last_name();
    settings(case, "settings", &format!("DATABASE {database}"), plan);
    case.comment(&format!("DATABASE {database}"), plan);
}

/// Groups of a role, each with or without ADMIN OPTION.
fn groups(shape: &Value) -> BTreeMap<String, bool> {
    let groups = shape.get("member_of").and_then(Value::as_object);
    let each = groups.into_iter().flatten();
    each.map(|(name, how)| (name.clone(), is(how, "admin")))
        .collect()
}

/// One that is refused leaves the rest to be done: what is missing is seen by comparing.
fn if_allowed(statement: &str) -> String {
    let body = format!("BEGIN {statement}; EXCEPTION WHEN insufficient_privilege THEN NULL; END");
    format!("DO {}", quote_literal(&body))
}

/// Statements about a database are about the one that the session is in: a restored one may have another name.
pub(super) fn of_this_database(statements: Vec<String>, database: &str) -> Vec<String> {
    let named = format!("DATABASE {database}");
    let each = statements.into_iter();
    each.map(|statement| in_this_database(statement, &named))
        .collect()
}

/// With the session's database where a statement has this.
fn in_this_database(statement: String, named: &str) -> String {
    if !statement.contains(named) {
        return statement;
    }
    let this = match named.strip_prefix("DATABASE ") {
        Some(_) => "DATABASE %I",
        None => "%I",
    };
    let parts: Vec<String> = statement
        .splitn(2, named)
        .map(|part| part.replace('%', "%%"))
        .collect();
    let format = quote_literal(&parts.join(this));
    let body =
        format!("BEGIN EXECUTE pg_catalog.format({format}, pg_catalog.current_database()); END");
    format!("DO {}", quote_literal(&body))
}

/// SET and RESET of what differs. `%DATABASE%` is the one that the session is in.
fn settings(case: &Case<'_>, key: &str, target: &str, plan: &mut Plan) {
    let wanted = texts(case.recorded, key);
    let has = case.found.map_or_else(Vec::new, |found| texts(found, key));
    let name = |setting: &str| setting.split('=').next().unwrap_or_default().to_owned();
    let sql = |name: &str| {
        let parts: Vec<String> = name.split('.').map(quote_ident).collect();
        parts.join(".")
    };
    let mut add = |statement: String| plan.add(in_this_database(statement, "%DATABASE%"));
    // What the standby alone has is its own affair.
    for gone in texts(case.recorded, &format!("{key}_reset")) {
        if has.iter().any(|setting| name(setting) == gone) {
            add(format!("ALTER {target} RESET {}", sql(gone)));
        }
    }
    for setting in wanted.iter().filter(|setting| !has.contains(setting)) {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        let value = quote_literal(value);
        if LISTS.iter().any(|list| name.eq_ignore_ascii_case(list)) {
            // Set in this transaction only, and put back.
            add(format!(
                "SELECT pg_catalog.set_config({}, {value}, true)",
                quote_literal(name)
            ));
            add(format!("ALTER {target} SET {} FROM CURRENT", sql(name)));
            add(format!(
                "SELECT pg_catalog.set_config({}, '', true)",
                quote_literal(name)
            ));
        } else {
            add(format!("ALTER {target} SET {} TO {value}", sql(name)));
        }
    }
}

pub(super) fn event_trigger(case: &Case<'_>, plan: &mut Plan) {
    let trigger = case.last_name();
    if case.differs("event") || case.differs("tags") || case.differs("function") {
        if case.found.is_some() {
            plan.add(format!("DROP EVENT TRIGGER {trigger}"));
        }
        let tags = texts(case.recorded, "tags");
        let tags: Vec<String> = tags.into_iter().map(quote_literal).collect();
        let when = match tags.is_empty() {
            true => String::new(),
            false => format!(" WHEN TAG IN ({})", tags.join(", ")),
        };
        plan.add(format!(
            "CREATE EVENT TRIGGER {trigger} ON {}{when} EXECUTE FUNCTION {}()",
            case.wanted("event").unwrap_or_default(),
            case.wanted("function").unwrap_or_default()
        ));
    }
    if case.differs("enabled") {
        // What fires ALWAYS would see what is applied.
        let enabled = match case.wanted("enabled") {
            Some("D" | "R") => "DISABLE",
            _ => "ENABLE",
        };
        plan.add(format!("ALTER EVENT TRIGGER {trigger} {enabled}"));
    }
    case.comment(&format!("EVENT TRIGGER {trigger}"), plan);
}

pub(super) fn publication(case: &Case<'_>, plan: &mut Plan) {
    let publication = case.last_name();
    let what = ["all_tables", "tables", "schemas", "publish", "via_root"];
    if what.iter().any(|key| case.differs(key)) {
        if case.found.is_some() {
            plan.add(format!("DROP PUBLICATION {publication}"));
        }
        let tables = texts(case.recorded, "tables");
        let schemas = texts(case.recorded, "schemas");
        let mut of: Vec<String> = Vec::new();
        if case.is_wanted("all_tables") {
            of.push("ALL TABLES".to_owned());
        }
        if !tables.is_empty() {
            of.push(format!("TABLE {}", tables.join(", ")));
        }
        if !schemas.is_empty() {
            of.push(format!("TABLES IN SCHEMA {}", schemas.join(", ")));
        }
        let of = match of.is_empty() {
            true => String::new(),
            false => format!(" FOR {}", of.join(", ")),
        };
        let publish = quote_literal(text(case.recorded, "publish").unwrap_or_default());
        let via = case.is_wanted("via_root");
        plan.add(format!(
            "CREATE PUBLICATION {publication}{of} WITH (publish = {publish}, publish_via_partition_root = {via})"
        ));
    }
    case.comment(&format!("PUBLICATION {publication}"), plan);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::names::object::ObjectAddress;
    use crate::shape::{Healing, Roles, heal};

    fn statements(kind: &str, recorded: &Value, found: Option<&Value>) -> Vec<String> {
        let address = ObjectAddress {
            kind: kind.to_owned(),
            names: vec!["a".to_owned()],
            args: Vec::new(),
        };
        let roles = Roles::of(&[("g", true), ("app", true), ("a", false)]);
        match heal(&address, "a", recorded, found, &roles) {
            Healing::Statements { statements, .. } => statements,
            Healing::Refused(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn what_the_server_has_is_brought_to_what_was_recorded() {
        type Case<'a> = (&'a str, Value, Option<Value>, &'a [&'a str]);
        let table: [Case<'_>; 6] = [
            (
                "role",
                json!({"login": true, "limit": 3, "member_of": {"g": {"admin": true}, "gone": {}}}),
                None,
                &[
                    "CREATE ROLE \"a\" LOGIN CONNECTION LIMIT 3",
                    "DO 'BEGIN GRANT \"a\" TO CURRENT_USER; EXCEPTION WHEN insufficient_privilege THEN NULL; END'",
                    "DO 'BEGIN GRANT \"g\" TO \"a\" WITH ADMIN OPTION; EXCEPTION WHEN insufficient_privilege THEN NULL; END'",
                ],
            ),
            (
                "role",
                json!({"settings": ["work_mem=1MB"], "settings_reset": ["jit", "geqo"], "settings_here": ["app.x=1%"]}),
                Some(
                    json!({"login": true, "until": "2030-01-01 00:00:00+00", "member_of": {"g": {}}, "settings": ["jit=off"]}),
                ),
                &[
                    "ALTER ROLE \"a\" NOLOGIN VALID UNTIL 'infinity'",
                    "DO 'BEGIN REVOKE \"g\" FROM \"a\"; EXCEPTION WHEN insufficient_privilege THEN NULL; END'",
                    "ALTER ROLE \"a\" RESET \"jit\"",
                    "ALTER ROLE \"a\" SET \"work_mem\" TO '1MB'",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''ALTER ROLE \"a\" IN DATABASE %I SET \"app\".\"x\" TO ''''1%%'''''', \
                     pg_catalog.current_database()); END'",
                ],
            ),
            (
                "database",
                json!({"owner": "app", "settings": ["search_path=\"$user\", x"], "acl": [{"grantee": "g", "privilege": "CONNECT", "grantable": false}]}),
                Some(json!({"owner": "b"})),
                &[
                    "SELECT pg_catalog.set_config('search_path', '\"$user\", x', true)",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''ALTER DATABASE %I SET \"search_path\" FROM CURRENT'', pg_catalog.current_database()); END'",
                    "SELECT pg_catalog.set_config('search_path', '', true)",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''ALTER DATABASE %I OWNER TO \"app\"'', pg_catalog.current_database()); END'",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''GRANT CONNECT ON DATABASE %I TO CURRENT_USER'', pg_catalog.current_database()); END'",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''REVOKE CONNECT ON DATABASE %I FROM PUBLIC'', pg_catalog.current_database()); END'",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC'', pg_catalog.current_database()); END'",
                    "DO 'BEGIN EXECUTE pg_catalog.format(''GRANT CONNECT ON DATABASE %I TO \"g\"'', pg_catalog.current_database()); END'",
                ],
            ),
            (
                "event trigger",
                json!({"event": "ddl_command_end", "tags": ["DROP TABLE"], "function": "s.f", "enabled": "A"}),
                None,
                &[
                    "CREATE EVENT TRIGGER \"a\" ON ddl_command_end WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION s.f()",
                    "ALTER EVENT TRIGGER \"a\" ENABLE",
                ],
            ),
            (
                "publication",
                json!({"publish": "insert", "tables": ["s.t (a)", "s.u"], "comment": "x"}),
                Some(json!({"publish": "insert", "all_tables": true})),
                &[
                    "DROP PUBLICATION \"a\"",
                    "CREATE PUBLICATION \"a\" FOR TABLE s.t (a), s.u WITH (publish = 'insert', publish_via_partition_root = false)",
                    "COMMENT ON PUBLICATION \"a\" IS 'x'",
                ],
            ),
            (
                "publication",
                json!({"publish": "insert"}),
                Some(json!({"publish": "insert"})),
                &[],
            ),
        ];
        for (kind, recorded, found, expected) in table {
            assert_eq!(
                statements(kind, &recorded, found.as_ref()),
                expected,
                "{kind} {recorded}"
            );
        }
    }
}
