//! ● Types of the users' own: enums, composites, ranges, domains.

use serde_json::{Map, Value};

use super::{Case, Plan, plain, quote_ident, quote_literal, text, texts};

/// Plans a type. Its name is one text, as the server writes it.
pub(super) fn heal(case: &Case<'_>) -> Result<Plan, String> {
    let mut plan = Plan::default();
    let name = match case.address.names.as_slice() {
        [schema, name] => format!("{}.{}", quote_ident(schema), quote_ident(name)),
        [name] => name.clone(),
        _ => return Err("its name is not understood".to_owned()),
    };
    match case.wanted("typtype") {
        Some("e") => labels(case, &name, &mut plan)?,
        Some("c") => attributes(case, &name, &mut plan),
        Some("r") => range(case, &name, &mut plan)?,
        Some("d") => domain(case, &name, &mut plan)?,
        _ => return Err("a type of this sort is not made from its shape".to_owned()),
    }
    let word = if case.wanted("typtype") == Some("d") {
        "DOMAIN"
    } else {
        "TYPE"
    };
    case.comment(&format!("{word} {name}"), &mut plan);
    Ok(plan)
}

fn labels(case: &Case<'_>, name: &str, plan: &mut Plan) -> Result<(), String> {
    let wanted = texts(case.recorded, "labels");
    let Some(found) = case.found else {
        let labels: Vec<String> = wanted.iter().map(|label| quote_literal(label)).collect();
        plan.add(format!(
            "CREATE TYPE {name} AS ENUM ({})",
            labels.join(", ")
        ));
        return Ok(());
    };
    let mut has = texts(found, "labels");
    if has.len() == wanted.len() {
        let renamed: Vec<(&str, &str)> = has
            .iter()
            .copied()
            .zip(wanted.iter().copied())
            .filter(|(a, b)| a != b)
            .collect();
        if renamed.iter().all(|(_, to)| !has.contains(to)) {
            for (from, to) in renamed {
                plan.add(format!(
                    "ALTER TYPE {name} RENAME VALUE {} TO {}",
                    quote_literal(from),
                    quote_literal(to)
                ));
            }
            return Ok(());
        }
    }
    if has.iter().any(|label| !wanted.contains(label)) {
        return Err("labels have gone that are here".to_owned());
    }
    for (place, label) in wanted.iter().enumerate() {
        if has.contains(label) {
            continue;
        }
        let at = match place.checked_sub(1).and_then(|before| wanted.get(before)) {
            Some(before) => format!("AFTER {}", quote_literal(before)),
            None => has.first().map_or_else(String::new, |first| {
                format!("BEFORE {}", quote_literal(first))
            }),
        };
        plan.add(format!(
            "ALTER TYPE {name} ADD VALUE {} {at}",
            quote_literal(label)
        ));
        has.insert(place.min(has.len()), label);
    }
    Ok(())
}

fn list<'v>(value: &'v Value, key: &str) -> Vec<&'v Value> {
    let list = value.get(key).and_then(Value::as_array);
    list.map_or(&[][..], Vec::as_slice).iter().collect()
}

fn attribute(value: &Value) -> String {
    let collate =
        text(value, "collation").map_or_else(String::new, |name| format!(" COLLATE {name}"));
    let (name, kind) = (
        text(value, "name").unwrap_or_default(),
        text(value, "type").unwrap_or_default(),
    );
    format!("{} {kind}{collate}", quote_ident(name))
}

fn attributes(case: &Case<'_>, name: &str, plan: &mut Plan) {
    let wanted = list(case.recorded, "attributes");
    let Some(found) = case.found else {
        let all: Vec<String> = wanted.iter().map(|one| attribute(one)).collect();
        plan.add(format!("CREATE TYPE {name} AS ({})", all.join(", ")));
        for one in wanted.iter().filter(|one| text(one, "comment").is_some()) {
            let column = quote_ident(text(one, "name").unwrap_or_default());
            plan.add(super::comment(
                &format!("COLUMN {name}.{column}"),
                text(one, "comment"),
            ));
        }
        return;
    };
    let has = list(found, "attributes");
    let of = |value: &Value| text(value, "name").unwrap_or_default().to_owned();
    for gone in has
        .iter()
        .filter(|one| !wanted.iter().any(|other| of(other) == of(one)))
    {
        plan.add(format!(
            "ALTER TYPE {name} DROP ATTRIBUTE {}",
            quote_ident(&of(gone))
        ));
    }
    for one in wanted {
        match has.iter().find(|other| of(other) == of(one)) {
            None => plan.add(format!(
                "ALTER TYPE {name} ADD ATTRIBUTE {}",
                attribute(one)
            )),
            Some(other) if text(other, "type") != text(one, "type") => {
                let kind = text(one, "type").unwrap_or_default();
                plan.add(format!(
                    "ALTER TYPE {name} ALTER ATTRIBUTE {} TYPE {kind}",
                    quote_ident(&of(one))
                ));
            }
            Some(_) => {}
        }
    }
    for one in list(case.recorded, "attributes") {
        let was = has
            .iter()
            .find(|other| of(other) == of(one))
            .and_then(|other| text(other, "comment"));
        if text(one, "comment") != was {
            let what = format!("COLUMN {name}.{}", quote_ident(&of(one)));
            plan.add(super::comment(&what, text(one, "comment")));
        }
    }
}

fn range(case: &Case<'_>, name: &str, plan: &mut Plan) -> Result<(), String> {
    if case.found.is_some() {
        return match case.differs("range") {
            true => Err("a range is not altered".to_owned()),
            false => Ok(()),
        };
    }
    let range = case.recorded.get("range").cloned().unwrap_or_default();
    let mut parts = Vec::new();
    for (key, word) in [
        ("subtype", "SUBTYPE"),
        ("opclass", "SUBTYPE_OPCLASS"),
        ("collation", "COLLATION"),
        ("canonical", "CANONICAL"),
        ("diff", "SUBTYPE_DIFF"),
        ("multirange", "MULTIRANGE_TYPE_NAME"),
    ] {
        parts.extend(text(&range, key).map(|value| format!("{word} = {value}")));
    }
    plan.add(format!(
        "CREATE TYPE {name} AS RANGE ({})",
        parts.join(", ")
    ));
    Ok(())
}

fn domain(case: &Case<'_>, name: &str, plan: &mut Plan) -> Result<(), String> {
    let none = Map::new();
    let conditions = |value: &Value| {
        value
            .get("constraints")
            .and_then(Value::as_object)
            .unwrap_or(&none)
            .clone()
    };
    let wanted = conditions(case.recorded);
    let Some(found) = case.found else {
        let mut create = format!(
            "CREATE DOMAIN {name} AS {}",
            case.wanted("base").unwrap_or_default()
        );
        if let Some(collation) = case.wanted("collation") {
            create.push_str(&format!(" COLLATE {collation}"));
        }
        if let Some(default) = plain(case.recorded, "default") {
            create.push_str(&format!(" DEFAULT {default}"));
        }
        if case.is_wanted("notnull") {
            create.push_str(" NOT NULL");
        }
        for (key, condition) in &wanted {
            let definition = text(condition, "definition").unwrap_or_default();
            create.push_str(&format!(" CONSTRAINT {} {definition}", quote_ident(key)));
        }
        plan.add(create);
        return Ok(());
    };
    if case.differs("base") || case.differs("collation") {
        return Err("a domain's type is not altered".to_owned());
    }
    if case.differs("default") {
        plan.add(match plain(case.recorded, "default") {
            Some(default) => format!("ALTER DOMAIN {name} SET DEFAULT {default}"),
            None => format!("ALTER DOMAIN {name} DROP DEFAULT"),
        });
    }
    if case.differs("notnull") {
        let verb = if case.is_wanted("notnull") {
            "SET"
        } else {
            "DROP"
        };
        plan.add(format!("ALTER DOMAIN {name} {verb} NOT NULL"));
    }
    let has = conditions(found);
    let is_other = |key: &String| {
        let (a, b) = (wanted.get(key), has.get(key));
        a.and_then(|one| text(one, "definition")) != b.and_then(|one| text(one, "definition"))
    };
    for key in has.keys().filter(|key| is_other(key)) {
        plan.add(format!(
            "ALTER DOMAIN {name} DROP CONSTRAINT {}",
            quote_ident(key)
        ));
    }
    for (key, condition) in wanted.iter().filter(|(key, _)| is_other(key)) {
        let definition = text(condition, "definition").unwrap_or_default();
        plan.add(format!(
            "ALTER DOMAIN {name} ADD CONSTRAINT {} {definition}",
            quote_ident(key)
        ));
    }
    Ok(())
}
