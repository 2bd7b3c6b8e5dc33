//! ● Privileges of an object: what is granted beside what its kind grants by itself, to roles that are there.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Roles;

/// One privilege; nobody stands for PUBLIC.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Privilege {
    pub(super) grantee: Option<String>,
    pub(super) name: String,
    pub(super) grantable: bool,
}

/// What PUBLIC may do where nobody has said otherwise.
fn by_default(kind: &str) -> &'static [&'static str] {
    match kind {
        "function" | "procedure" | "aggregate" => &["EXECUTE"],
        "type" | "domain" | "language" => &["USAGE"],
        "database" => &["CONNECT", "TEMPORARY"],
        _ => &[],
    }
}

/// What others than the owner may do: it has everything anyway, and may be another role here. Ours has what it needs.
pub(super) fn granted(kind: &str, shape: &Value, roles: &Roles) -> BTreeSet<Privilege> {
    let Some(acl) = shape.get("acl").and_then(Value::as_array) else {
        let public = by_default(kind).iter().map(|name| Privilege {
            grantee: None,
            name: (*name).to_owned(),
            grantable: false,
        });
        return public.collect();
    };
    let owner = shape.get("owner").and_then(Value::as_str);
    let each = acl.iter().filter_map(|one| {
        Some(Privilege {
            grantee: one
                .get("grantee")
                .and_then(Value::as_str)
                .map(str::to_owned),
            name: one.get("privilege")?.as_str()?.to_owned(),
            grantable: one.get("grantable")?.as_bool()?,
        })
    });
    each.filter(|one| match one.grantee.as_deref() {
        None => true,
        Some(role) => Some(role) != owner && roles.has(role) && !roles.is_ours(role),
    })
    .collect()
}

/// What is wanted and what there is. What a database lets roles do that the source does not know is the standby's own affair.
pub(super) fn wanted_and_found(
    kind: &str,
    recorded: &Value,
    found: &Value,
    roles: &Roles,
) -> (BTreeSet<Privilege>, BTreeSet<Privilege>) {
    let wanted = granted(kind, recorded, roles);
    let mut has = granted(kind, found, roles);
    // Whoever is to own it is not to lose what he was granted before.
    let owner = recorded.get("owner").and_then(Value::as_str);
    has.retain(|one| one.grantee.is_none() || one.grantee.as_deref() != owner);
    if kind == "database" {
        let known = recorded.get("known_roles").and_then(Value::as_array);
        let is_known = |role: &String| {
            let mut known = known.into_iter().flatten();
            known.any(|one| one.as_str() == Some(role))
        };
        has.retain(|one| one.grantee.as_ref().is_none_or(is_known));
    }
    (wanted, has)
}

/// What is granted on single columns, by their names.
pub(super) fn of_columns(shape: &Value, roles: &Roles) -> BTreeSet<(String, Privilege)> {
    let columns = shape.get("columns").and_then(Value::as_array);
    let columns = columns.map_or(&[][..], Vec::as_slice);
    let owner = shape.get("owner").cloned().unwrap_or_default();
    let mut all = BTreeSet::new();
    for column in columns.iter().filter(|column| column.get("acl").is_some()) {
        let name = column.get("name").and_then(Value::as_str);
        let of_column = serde_json::json!({"owner": owner, "acl": column.get("acl")});
        let granted = granted("table column", &of_column, roles);
        all.extend(
            granted
                .into_iter()
                .filter_map(|one| Some((name?.to_owned(), one))),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_owner_to_be_loses_nothing() {
        let roles = Roles::of(&[("app", true), ("old", true)]);
        let recorded = json!({"owner": "app"});
        let found = json!({"owner": "old", "acl": [{"grantee": "app", "privilege": "SELECT", "grantable": false}]});
        let (wanted, has) = wanted_and_found("table", &recorded, &found, &roles);
        assert!(wanted.is_empty() && has.is_empty());
    }

    #[test]
    fn whom_the_source_does_not_know_a_database_may_let_in() {
        let roles = Roles::of(&[("app", true), ("watch", false)]);
        let connect =
            |role: &str| json!({"grantee": role, "privilege": "CONNECT", "grantable": false});
        let recorded = json!({"known_roles": ["app"], "acl": []});
        let found = json!({"acl": [connect("app"), connect("watch")]});
        let (wanted, has) = wanted_and_found("database", &recorded, &found, &roles);
        assert!(wanted.is_empty());
        let has: Vec<_> = has.into_iter().filter_map(|one| one.grantee).collect();
        assert_eq!(has, ["app"]);
    }

    #[test]
    fn columns_have_privileges_of_their_own() {
        let roles = Roles::of(&[("read", false)]);
        let acl =
            |role: &str| json!([{"grantee": role, "privilege": "SELECT", "grantable": false}]);
        let shape = json!({"owner": "app", "columns": [
            {"name": "a"}, {"name": "b", "acl": acl("read")}, {"name": "c", "acl": acl("app")}, {"name": "d", "acl": acl("gone")}]});
        let found: Vec<String> = of_columns(&shape, &roles)
            .into_iter()
            .map(|(column, _)| column)
            .collect();
        assert_eq!(found, ["b"]);
        assert!(of_columns(&json!({"columns": ["a", "b"]}), &roles).is_empty());
    }

    #[test]
    fn owners_and_roles_that_are_not_there_do_not_count() {
        let roles = Roles::of(&[("app", true), ("read", false)]);
        let shape = json!({"owner": "app", "acl": [
            {"grantee": "app", "privilege": "SELECT", "grantable": false},
            {"grantee": "read", "privilege": "SELECT", "grantable": true},
            {"grantee": "gone", "privilege": "SELECT", "grantable": false},
            {"privilege": "INSERT", "grantable": false}]});
        let found: Vec<(Option<String>, String)> = granted("table", &shape, &roles)
            .into_iter()
            .map(|one| (one.grantee, one.name))
            .collect();
        assert_eq!(
            found,
            [
                (None, "INSERT".to_owned()),
                (Some("read".to_owned()), "SELECT".to_owned())
            ]
        );
        assert!(granted("table", &json!({}), &roles).is_empty());
        assert_eq!(granted("function", &json!({}), &roles).len(), 1);
        assert!(granted("function", &json!({"acl": []}), &roles).is_empty());
    }
}
