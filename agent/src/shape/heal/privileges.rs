//! ● Who owns an object, and who may do what with it, as far as those roles are on the replica.

use std::collections::BTreeSet;

use super::{Case, Plan, is, quote_ident};
use crate::shape::acl::{self, Privilege};

/// What an object is called in ALTER and GRANT: for those that have owners and privileges.
fn word(kind: &str) -> Option<(&'static str, &'static str)> {
    Some(match kind {
        "table" | "partitioned table" => ("TABLE", "TABLE"),
        "foreign table" => ("FOREIGN TABLE", "TABLE"),
        "view" => ("VIEW", "TABLE"),
        "materialized view" => ("MATERIALIZED VIEW", "TABLE"),
        "sequence" => ("SEQUENCE", "SEQUENCE"),
        "function" | "aggregate" => ("FUNCTION", "FUNCTION"),
        "procedure" => ("PROCEDURE", "PROCEDURE"),
        "type" | "composite type" => ("TYPE", "TYPE"),
        "domain" => ("DOMAIN", "DOMAIN"),
        "schema" => ("SCHEMA", "SCHEMA"),
        "language" => ("LANGUAGE", "LANGUAGE"),
        "server" => ("SERVER", "FOREIGN SERVER"),
        "foreign-data wrapper" => ("FOREIGN DATA WRAPPER", "FOREIGN DATA WRAPPER"),
        "statistics object" => ("STATISTICS", ""),
        "collation" => ("COLLATION", ""),
        "database" => ("DATABASE", "DATABASE"),
        "event trigger" => ("EVENT TRIGGER", ""),
        "publication" => ("PUBLICATION", ""),
        _ => return None,
    })
}

/// The object's name in such a statement.
fn name(case: &Case<'_>) -> String {
    match case.address.kind.as_str() {
        "function" | "procedure" | "aggregate" | "type" | "domain" => case.identity.to_owned(),
        "schema"
        | "language"
        | "server"
        | "foreign-data wrapper"
        | "database"
        | "event trigger"
        | "publication" => case.last_name(),
        _ => case.name(),
    }
}

/// Adds what gives an object its owner and its privileges.
pub(super) fn heal(case: &Case<'_>, plan: &mut Plan) {
    let Some((alter, grant)) = word(&case.address.kind) else {
        return;
    };
    // A domain is called a type where it is altered by name alone.
    let is_domain = case.wanted("typtype") == Some("d");
    let alter = if is_domain { "DOMAIN" } else { alter };
    let object = name(case);
    // The sequence of an identity column belongs to whom its table belongs to.
    let is_own = is(case.recorded, "identity");
    let owner = case
        .wanted("owner")
        .filter(|owner| case.roles.acts_as(owner) && !is_own);
    if let Some(owner) = owner.filter(|owner| case.has("owner") != Some(owner)) {
        plan.add(format!(
            "ALTER {alter} {object} OWNER TO {}",
            quote_ident(owner)
        ));
    }
    if grant.is_empty() {
        return;
    }
    let on = format!("{grant} {object}");
    grants(case, &case.address.kind, "", &on, plan);
    let none = serde_json::Value::Null;
    let found = case.found.unwrap_or(&none);
    let (wanted, has) = acl::of_columns_wanted_and_found(case.recorded, found, case.roles);
    change(&wanted, &has, "", &on, plan);
}

/// REVOKE and GRANT of what differs, behind `head`, for an object of which PUBLIC has what is usual for this kind.
pub(super) fn grants(case: &Case<'_>, kind: &str, head: &str, on: &str, plan: &mut Plan) {
    let none = serde_json::Value::Null;
    let found = case.found.unwrap_or(&none);
    let (wanted, has) = acl::wanted_and_found(kind, case.recorded, found, case.roles);
    let is_closed = has.difference(&wanted).any(|one| one.grantee.is_none());
    if kind == "database" && is_closed && !case.roles.superuser() {
        // Nobody may be kept out who applies what the source sends.
        plan.add(format!("GRANT CONNECT ON {on} TO CURRENT_USER"));
    }
    change(&wanted, &has, head, on, plan);
}

fn change(
    wanted: &BTreeSet<Privilege>,
    has: &BTreeSet<Privilege>,
    head: &str,
    on: &str,
    plan: &mut Plan,
) {
    for privilege in has.difference(wanted) {
        let (name, from) = (&privilege.name, grantee(privilege));
        plan.add(format!("{head}REVOKE {name} ON {on} FROM {from}"));
    }
    for privilege in wanted.difference(has) {
        let option = if privilege.grantable {
            " WITH GRANT OPTION"
        } else {
            ""
        };
        let (name, to) = (&privilege.name, grantee(privilege));
        plan.add(format!("{head}GRANT {name} ON {on} TO {to}{option}"));
    }
}

fn grantee(privilege: &Privilege) -> String {
    privilege
        .grantee
        .as_deref()
        .map_or_else(|| "PUBLIC".to_owned(), quote_ident)
}
