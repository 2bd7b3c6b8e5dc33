//! ● Privileges of an object: what is granted beside what its kind grants by itself, to roles that are there.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Roles;
use crate::pg::quote::quote_ident;

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

/// What is wanted and what there is. What roles may do that the source does not know is the standby's own affair.
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
    has.retain(|one| match one.grantee.as_deref() {
        None => true,
        Some(role) => Some(role) != owner && roles.is_known(role),
    });
    (wanted, has)
}

/// The same of single columns: each privilege's name has the column's with it, as GRANT takes it.
pub(super) fn of_columns_wanted_and_found(
    recorded: &Value,
    found: &Value,
    roles: &Roles,
) -> (BTreeSet<Privilege>, BTreeSet<Privilege>) {
    let (wanted, mut has) = (of_columns(recorded, roles), of_columns(found, roles));
    has.retain(|one| {
        let role = one.grantee.as_deref();
        role.is_none_or(|role| roles.is_known(role))
    });
    (wanted, has)
}

fn of_columns(shape: &Value, roles: &Roles) -> BTreeSet<Privilege> {
    let columns = shape.get("columns").and_then(Value::as_array);
    let columns = columns.map_or(&[][..], Vec::as_slice);
    let owner = shape.get("owner").cloned().unwrap_or_default();
    let mut all = BTreeSet::new();
    for column in columns.iter().filter(|column| column.get("acl").is_some()) {
        let Some(name) = column.get("name").and_then(Value::as_str) else {
            continue;
        };
        let of_column = serde_json::json!({"owner": owner, "acl": column.get("acl")});
        let granted = granted("table column", &of_column, roles);
        all.extend(granted.into_iter().map(|one| Privilege {
            name: format!("{} ({})", one.name, quote_ident(name)),
            ..one
        }));
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
    fn what_roles_may_do_that_the_source_does_not_know_is_left_alone() {
        let known = Some(["app".to_owned()].into());
        let roles = Roles::of(&[("app", true), ("watch", false)]).with_known(known);
        let one = |role: &str| json!({"grantee": role, "privilege": "SELECT", "grantable": false});
        let found = json!({"acl": [one("app"), one("watch")], "columns": [{"name": "a", "acl": [one("watch"), one("app")]}]});
        for kind in ["table", "database"] {
            let (wanted, has) = wanted_and_found(kind, &json!({"acl": []}), &found, &roles);
            assert!(wanted.is_empty());
            let has: Vec<_> = has.into_iter().filter_map(|one| one.grantee).collect();
            assert_eq!(has, ["app"]);
        }
        let (_, has) = of_columns_wanted_and_found(&json!({}), &found, &roles);
        assert_eq!(has.len(), 1);
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
            .map(|one| one.name)
            .collect();
        assert_eq!(found, ["SELECT (\"b\")"]);
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
