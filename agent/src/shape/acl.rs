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
fn by_default(kind: &str) -> Option<&'static str> {
    match kind {
        "function" | "procedure" | "aggregate" => Some("EXECUTE"),
        "type" | "domain" | "language" => Some("USAGE"),
        _ => None,
    }
}

/// What others than the owner may do: it has everything anyway, and may be another role here.
pub(super) fn granted(kind: &str, shape: &Value, roles: &Roles) -> BTreeSet<Privilege> {
    let Some(acl) = shape.get("acl").and_then(Value::as_array) else {
        let public = by_default(kind).map(|name| Privilege {
            grantee: None,
            name: name.to_owned(),
            grantable: false,
        });
        return public.into_iter().collect();
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
        Some(role) => Some(role) != owner && roles.has(role),
    })
    .collect()
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
