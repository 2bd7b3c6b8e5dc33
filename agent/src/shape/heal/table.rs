//! ● Tables: created from nothing, or altered.

use serde_json::{Map, Value};

use super::{Case, Plan, column, comment, option_list, quote_ident, quote_literal, text, texts};
use crate::shape::words;

/// Plans a table.
pub(super) fn heal(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    match case.found {
        None => create(case, &mut plan),
        Some(found) => alter(case, found, &mut plan)?,
    }
    common(case, &mut plan);
    Ok(plan)
}

fn columns(value: &Value) -> Vec<&Value> {
    let list = value.get("columns").and_then(Value::as_array);
    list.map_or(&[][..], Vec::as_slice).iter().collect()
}

fn constraints(value: &Value) -> Map<String, Value> {
    let map = value.get("constraints").and_then(Value::as_object);
    map.cloned().unwrap_or_default()
}

fn create(case: &Case<'_>, plan: &mut Plan) {
    let (table, recorded) = (case.name(), case.recorded);
    let foreign = text(recorded, "kind") == Some("f");
    let bound = text(recorded, "bound");
    let parents = texts(recorded, "parents");
    // What comes from a parent by inheritance is not written again, or it would be the child's own.
    let inherits = bound.is_none() && !parents.is_empty();
    let is_own = |value: &Value| !inherits || value.get("local") != Some(&Value::Bool(false));
    let own = columns(recorded)
        .into_iter()
        .filter(|column| is_own(column));
    let mut parts: Vec<String> = own.map(column::definition).collect();
    let mut all = constraints(recorded);
    all.retain(|_, constraint| is_own(constraint));
    let is_foreign_key = |constraint: &Value| text(constraint, "type") == Some("f");
    for (name, constraint) in all
        .iter()
        .filter(|(_, constraint)| !is_foreign_key(constraint))
    {
        let definition = text(constraint, "definition").unwrap_or_default();
        parts.push(format!("CONSTRAINT {} {definition}", quote_ident(name)));
    }
    let word = match (foreign, text(recorded, "persistence")) {
        (true, _) => "FOREIGN TABLE",
        (false, Some("u")) => "UNLOGGED TABLE",
        _ => "TABLE",
    };
    let mut create = format!("CREATE {word} {table} ({})", parts.join(", "));
    if inherits {
        create.push_str(&format!(" INHERITS ({})", parents.join(", ")));
    }
    if let Some(key) = text(recorded, "partition_key") {
        create.push_str(&format!(" PARTITION BY {key}"));
    }
    let options = texts(recorded, "options");
    if !options.is_empty() {
        create.push_str(&format!(" WITH ({})", option_list(&options, "=")));
    }
    if let Some(server) = text(recorded, "server") {
        create.push_str(&format!(" SERVER {}", quote_ident(server)));
        let options = texts(recorded, "table_options");
        if !options.is_empty() {
            create.push_str(&format!(" OPTIONS ({})", option_list(&options, " ")));
        }
    }
    plan.add(create);
    if let (Some(bound), Some(parent)) = (bound, parents.first()) {
        plan.add(format!(
            "ALTER TABLE {parent} ATTACH PARTITION {table} {bound}"
        ));
    }
    for (name, constraint) in all
        .iter()
        .filter(|(_, constraint)| is_foreign_key(constraint))
    {
        add_constraint(&table, name, constraint, plan);
    }
    for (name, constraint) in &all {
        comment_constraint(&table, name, constraint, None, plan);
    }
    for column in columns(recorded)
        .into_iter()
        .filter(|column| !is_own(column))
    {
        column::of_parent(&table, column, plan);
    }
    for column in columns(recorded) {
        column::details(&table, column, None, plan);
    }
}

fn add_constraint(table: &str, name: &str, constraint: &Value, plan: &mut Plan) {
    plan.add(adding_constraint(table, name, constraint));
}

fn adding_constraint(table: &str, name: &str, constraint: &Value) -> String {
    let definition = text(constraint, "definition").unwrap_or_default();
    let name = quote_ident(name);
    format!("ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")
}

/// A partition that was detached keeps what it had of the whole, under the same name.
fn add_unless_kept(table: &str, name: &str, constraint: &Value, plan: &mut Plan) {
    let exists = format!(
        "SELECT FROM pg_catalog.pg_constraint WHERE conrelid = {}::pg_catalog.regclass AND conname = {}",
        quote_literal(table),
        quote_literal(name)
    );
    let add = adding_constraint(table, name, constraint);
    let body = format!("BEGIN IF NOT EXISTS ({exists}) THEN {add}; END IF; END");
    plan.add(format!("DO {}", quote_literal(&body)));
}

fn comment_constraint(
    table: &str,
    name: &str,
    constraint: &Value,
    found: Option<&Value>,
    plan: &mut Plan,
) {
    if constraint.get("comment") != found.and_then(|found| found.get("comment")) {
        let what = format!("CONSTRAINT {} ON {table}", quote_ident(name));
        plan.add(comment(&what, text(constraint, "comment")));
    }
}

fn alter(case: &Case<'_>, found: &Value, plan: &mut Plan) -> Result<(), String> {
    let (table, recorded) = (case.name(), case.recorded);
    if text(recorded, "kind") != text(found, "kind")
        || recorded.get("partition_key") != found.get("partition_key")
    {
        return Err("it is another kind of table".to_owned());
    }
    let (wanted, has) = (constraints(recorded), constraints(found));
    let is_other = |name: &String, constraint: &Value| {
        let is = has.get(name);
        is.is_some_and(|is| !is_same_but_for_validity(is, constraint))
    };
    // What is gone, or another one, goes before columns change.
    for name in has.keys() {
        let gone = wanted
            .get(name)
            .is_none_or(|constraint| is_other(name, constraint));
        let is_inherited =
            has.get(name).and_then(|one| one.get("local")) == Some(&Value::Bool(false));
        if gone && !is_inherited {
            plan.add(format!(
                "ALTER TABLE {table} DROP CONSTRAINT {}",
                quote_ident(name)
            ));
        }
    }
    parents(case, found, plan);
    alter_columns(&table, recorded, found, plan);
    if case.differs("persistence") {
        let logged = text(recorded, "persistence") != Some("u");
        plan.add(format!(
            "ALTER TABLE {table} SET {}",
            if logged { "LOGGED" } else { "UNLOGGED" }
        ));
        plan.copy_again |= logged;
    }
    let detached = text(found, "bound").is_some() && text(recorded, "bound").is_none();
    for (name, constraint) in &wanted {
        if !has.contains_key(name) && detached {
            add_unless_kept(&table, name, constraint, plan);
        } else if !has.contains_key(name) || is_other(name, constraint) {
            add_constraint(&table, name, constraint, plan);
        } else if is_not_valid_here(has.get(name), constraint) {
            plan.add(format!(
                "ALTER TABLE {table} VALIDATE CONSTRAINT {}",
                quote_ident(name)
            ));
        }
        comment_constraint(&table, name, constraint, has.get(name), plan);
    }
    super::alter_options(&format!("ALTER TABLE {table}"), recorded, Some(found), plan);
    if case.differs("table_options") {
        let (wanted, has) = (
            texts(recorded, "table_options"),
            texts(found, "table_options"),
        );
        plan.add(format!(
            "ALTER FOREIGN TABLE {table} OPTIONS ({})",
            super::option_changes(&wanted, &has)
        ));
    }
    Ok(())
}

/// A definition ends with NOT VALID where nobody has looked at the rows.
fn is_same_but_for_validity(one: &Value, other: &Value) -> bool {
    let bare = |value: &Value| {
        text(value, "definition")
            .unwrap_or_default()
            .trim_end_matches(" NOT VALID")
            .to_owned()
    };
    words::are_the_same(&bare(one), &bare(other))
}

fn is_not_valid_here(found: Option<&Value>, recorded: &Value) -> bool {
    let invalid = |value: &Value| value.get("valid") == Some(&Value::Bool(false));
    found.is_some_and(invalid) && !invalid(recorded)
}

fn alter_columns(table: &str, recorded: &Value, found: &Value, plan: &mut Plan) {
    let (wanted, has) = (columns(recorded), columns(found));
    let name = |column: &Value| text(column, "name").unwrap_or_default().to_owned();
    let find = |list: &[&Value], of: &str| {
        list.iter()
            .find(|column| name(column) == of)
            .map(|column| (*column).clone())
    };
    let mut gone: Vec<&Value> = has
        .iter()
        .copied()
        .filter(|column| find(&wanted, &name(column)).is_none())
        .collect();
    let mut new: Vec<&Value> = wanted
        .iter()
        .copied()
        .filter(|column| find(&has, &name(column)).is_none())
        .collect();
    // One that has gone and one that has come at the same place, of the same type: it has another name.
    let place =
        |list: &[&Value], column: &Value| list.iter().position(|one| name(one) == name(column));
    if let ([old], [renamed]) = (gone.as_slice(), new.as_slice())
        && text(old, "type") == text(renamed, "type")
        && place(&has, old) == place(&wanted, renamed)
        && has.len() == wanted.len()
    {
        let (from, to) = (name(old), name(renamed));
        plan.add(format!(
            "ALTER TABLE {table} RENAME COLUMN {} TO {}",
            quote_ident(&from),
            quote_ident(&to)
        ));
        let mut old = (*old).clone();
        old["name"] = Value::String(to);
        column::alter(table, renamed, &old, plan);
        (gone, new) = (Vec::new(), Vec::new());
    }
    for column in gone {
        plan.add(format!(
            "ALTER TABLE {table} DROP COLUMN {}",
            quote_ident(&name(column))
        ));
    }
    for column in &wanted {
        if let Some(found) = find(&has, &name(column)) {
            column::alter(table, column, &found, plan);
        }
    }
    for column in new {
        column::add(table, column, plan);
    }
}

fn parents(case: &Case<'_>, found: &Value, plan: &mut Plan) {
    let (table, recorded) = (case.name(), case.recorded);
    let (wanted, has) = (texts(recorded, "parents"), texts(found, "parents"));
    let (bound, was) = (text(recorded, "bound"), text(found, "bound"));
    if (&wanted, bound) == (&has, was) {
        return;
    }
    for parent in &has {
        match was {
            Some(_) => plan.add(format!("ALTER TABLE {parent} DETACH PARTITION {table}")),
            None if !wanted.contains(parent) => {
                plan.add(format!("ALTER TABLE {table} NO INHERIT {parent}"));
            }
            None => {}
        }
    }
    for parent in &wanted {
        match bound {
            Some(bound) => plan.add(format!(
                "ALTER TABLE {parent} ATTACH PARTITION {table} {bound}"
            )),
            None if !has.contains(parent) => {
                plan.add(format!("ALTER TABLE {table} INHERIT {parent}"));
            }
            None => {}
        }
    }
}

/// Row security, replica identity, comment.
fn common(case: &Case<'_>, plan: &mut Plan) {
    let table = case.name();
    for (key, on, off) in [
        (
            "rls",
            "ENABLE ROW LEVEL SECURITY",
            "DISABLE ROW LEVEL SECURITY",
        ),
        (
            "force_rls",
            "FORCE ROW LEVEL SECURITY",
            "NO FORCE ROW LEVEL SECURITY",
        ),
    ] {
        if case.differs(key) {
            plan.add(format!(
                "ALTER TABLE {table} {}",
                if case.is_wanted(key) { on } else { off }
            ));
        }
    }
    if case.differs("replica_identity") && case.wanted("kind") != Some("f") {
        let identity = match case.wanted("replica_identity") {
            None => "DEFAULT".to_owned(),
            Some("f") => "FULL".to_owned(),
            Some("n") => "NOTHING".to_owned(),
            Some(index) => format!("USING INDEX {}", index.rsplit('.').next().unwrap_or(index)),
        };
        plan.add(format!("ALTER TABLE {table} REPLICA IDENTITY {identity}"));
    }
    let word = if case.wanted("kind") == Some("f") {
        "FOREIGN TABLE"
    } else {
        "TABLE"
    };
    case.comment(&format!("{word} {table}"), plan);
}

/// One constraint that a command was about.
pub(super) fn heal_constraint(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    let (table, name) = (
        case.name(),
        case.address.names.last().map_or("", String::as_str),
    );
    if let Some(found) = case.found
        && text(found, "definition") != case.wanted("definition")
    {
        plan.add(format!(
            "ALTER TABLE {table} DROP CONSTRAINT {}",
            quote_ident(name)
        ));
    }
    if case.differs("definition") {
        add_constraint(&table, name, case.recorded, &mut plan);
    }
    comment_constraint(&table, name, case.recorded, case.found, &mut plan);
    Ok(plan)
}
