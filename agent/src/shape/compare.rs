//! ● Whether an object is what was recorded of it, and where not, in words.
//!
//! # What does not count
//! - The order of columns, what a column's rows had before it was there (`missing`: that is about rows), security labels.
//! - An owner that is not there, or may not own things here; privileges of roles that are not there.
//! - How a trigger fires that is made to wait for the opening ([`crate::schema`]'s `firing`), and whether a constraint was validated
//!   here.
//! - Where a definition that was loaded from a dump has its casts and parentheses (`words`). Between two major versions: texts that
//!   the server writes in its own words.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{Roles, acl, words};
use crate::names::object::ObjectAddress;

/// Of the server's own words.
const TEXTS: [&str; 8] = [
    "definition",
    "default",
    "using",
    "check",
    "bound",
    "partition_key",
    "column_defaults",
    "range",
];

/// Never compared as they are.
const PASSED_OVER: [&str; 8] = [
    "owner",
    "acl",
    "missing",
    "security_labels",
    "access_method",
    "clustered",
    "settings_reset",
    "settings_here_reset",
];

/// What differs, one line for each.
pub fn differences(
    address: &ObjectAddress,
    recorded: &Value,
    found: &Value,
    roles: &Roles,
    across: bool,
) -> Vec<String> {
    // An index that could not be built on the source is nobody's.
    if address.kind == "index" && recorded.get("valid") == Some(&Value::Bool(false)) {
        return Vec::new();
    }
    let comparing = Comparing { across };
    let mut differences = Vec::new();
    let (recorded, found) = (as_known(recorded, roles), as_known(found, roles));
    comparing.maps("", &recorded, &found, &mut differences);
    let (recorded, found) = (&*recorded, &*found);
    let owner = recorded.get("owner").and_then(Value::as_str);
    if let Some(owner) = owner.filter(|owner| roles.acts_as(owner))
        && found.get("owner").and_then(Value::as_str) != Some(owner)
    {
        differences.push(format!("it should belong to {owner}"));
    }
    let (wanted, has) = acl::wanted_and_found(&address.kind, recorded, found, roles);
    if wanted != has {
        differences.push("its privileges are others".to_owned());
    }
    let (wanted, has) = acl::of_columns_wanted_and_found(recorded, found, roles);
    if wanted != has {
        differences.push("the privileges of its columns are others".to_owned());
    }
    differences
}

/// Without membership in groups that this server does not have because it is of another version, or that the source does not know.
fn as_known<'v>(shape: &'v Value, roles: &Roles) -> Cow<'v, Value> {
    if shape.get("member_of").is_none() {
        return Cow::Borrowed(shape);
    }
    let mut shape = shape.clone();
    let groups = shape.get_mut("member_of").and_then(Value::as_object_mut);
    if let Some(groups) = groups {
        groups.retain(|group, _| match group.starts_with("pg_") {
            true => roles.has(group),
            false => roles.is_known(group),
        });
        if groups.is_empty()
            && let Some(shape) = shape.as_object_mut()
        {
            shape.remove("member_of");
        }
    }
    Cow::Owned(shape)
}

/// Settings that are not there, are others, or are still there. What the standby alone has is its own affair.
fn settings(
    within: &str,
    (wanted, is): (Option<&Value>, Option<&Value>),
    reset: Option<&Value>,
    differences: &mut Vec<String>,
) {
    let list = |value: Option<&Value>| -> Vec<String> {
        let list = value.and_then(Value::as_array).into_iter().flatten();
        list.filter_map(|one| Some(one.as_str()?.to_owned()))
            .collect()
    };
    let name = |setting: &String| setting.split('=').next().unwrap_or_default().to_owned();
    let is = list(is);
    for setting in list(wanted).iter().filter(|setting| !is.contains(setting)) {
        differences.push(said(
            within,
            &format!("setting {} is another one", name(setting)),
        ));
    }
    for gone in list(reset) {
        if is.iter().any(|setting| name(setting) == gone) {
            differences.push(said(within, &format!("setting {gone} should not be there")));
        }
    }
}

struct Comparing {
    across: bool,
}

impl Comparing {
    fn counts(&self, key: &str) -> bool {
        !(PASSED_OVER.contains(&key) || self.across && TEXTS.contains(&key))
    }

    /// Two objects of JSON; `within` says of what.
    fn maps(&self, within: &str, recorded: &Value, found: &Value, differences: &mut Vec<String>) {
        let none = Map::new();
        let recorded = recorded.as_object().unwrap_or(&none);
        let found = found.as_object().unwrap_or(&none);
        let keys: BTreeSet<&String> = recorded.keys().chain(found.keys()).collect();
        for key in keys {
            if !self.counts(key) {
                continue;
            }
            let (wanted, is) = (recorded.get(key), found.get(key));
            match key.as_str() {
                "columns" | "attributes" if is_named(wanted) || is_named(is) => {
                    self.named(within, &key[..key.len() - 1], wanted, is, differences);
                }
                "constraints" | "column_comments" | "member_of" => {
                    self.by_name(within, key, wanted, is, differences);
                }
                "settings" | "settings_here" => {
                    let reset = recorded.get(&format!("{key}_reset"));
                    settings(within, (wanted, is), reset, differences);
                }
                "sequence" => self.maps(
                    &said(within, "its sequence"),
                    &or_null(wanted),
                    &or_null(is),
                    differences,
                ),
                "enabled" if is_quieted(wanted, is) => {}
                "valid" => {}
                _ if wanted == is => {}
                key if TEXTS.contains(&key) && says_the_same(wanted, is) => {}
                _ => differences.push(said(
                    within,
                    &format!("{key} is {}, should be {}", shown(is), shown(wanted)),
                )),
            }
        }
    }

    /// Lists of things with names.
    fn named(
        &self,
        within: &str,
        word: &str,
        wanted: Option<&Value>,
        is: Option<&Value>,
        differences: &mut Vec<String>,
    ) {
        let (wanted, is) = (by_its_name(wanted), by_its_name(is));
        let names: BTreeSet<&str> = wanted.iter().chain(&is).map(|(name, _)| *name).collect();
        let find = |list: &[(&str, &Value)], name: &str| {
            list.iter()
                .find(|(one, _)| *one == name)
                .map(|(_, value)| (*value).clone())
        };
        for name in names {
            match (find(&wanted, name), find(&is, name)) {
                (Some(wanted), Some(is)) => self.maps(
                    &said(within, &format!("{word} {name}")),
                    &wanted,
                    &is,
                    differences,
                ),
                (Some(_), None) => {
                    differences.push(said(within, &format!("{word} {name} is missing")));
                }
                (None, _) => {
                    differences.push(said(within, &format!("{word} {name} should not be there")));
                }
            }
        }
    }

    /// Maps from names to things.
    fn by_name(
        &self,
        within: &str,
        key: &str,
        wanted: Option<&Value>,
        is: Option<&Value>,
        differences: &mut Vec<String>,
    ) {
        let none = Map::new();
        let map = |value: Option<&Value>| value.and_then(Value::as_object).unwrap_or(&none).clone();
        let (wanted, is) = (map(wanted), map(is));
        let word = key.trim_end_matches('s').replace('_', " ");
        let names: BTreeSet<&String> = wanted.keys().chain(is.keys()).collect();
        for name in names {
            let place = said(within, &format!("{word} {name}"));
            match (wanted.get(name), is.get(name)) {
                (Some(wanted), Some(is)) if wanted.is_object() => {
                    self.maps(&place, wanted, is, differences);
                }
                (Some(wanted), Some(is)) if wanted == is => {}
                (Some(_), Some(_)) => differences.push(format!("{place} is another one")),
                (Some(_), None) => differences.push(format!("{place} is missing")),
                (None, _) => differences.push(format!("{place} should not be there")),
            }
        }
    }
}

/// Two texts of the server's that differ in words alone.
fn says_the_same(wanted: Option<&Value>, is: Option<&Value>) -> bool {
    let text = |value: Option<&'_ Value>| value.and_then(Value::as_str).map(str::to_owned);
    match (text(wanted), text(is)) {
        (Some(wanted), Some(is)) => words::are_the_same(&wanted, &is),
        _ => false,
    }
}

fn or_null(value: Option<&Value>) -> Value {
    value.cloned().unwrap_or(Value::Null)
}

fn said(within: &str, what: &str) -> String {
    match within {
        "" => what.to_owned(),
        within => format!("{within}: {what}"),
    }
}

/// Definitions are too long to be shown.
fn shown(value: Option<&Value>) -> String {
    const LONGEST: usize = 60;
    match value {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::String(text)) if text.len() > LONGEST => "another one".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => {
            let text = value.to_string();
            if text.len() > LONGEST {
                "another one".to_owned()
            } else {
                text
            }
        }
    }
}

fn is_named(value: Option<&Value>) -> bool {
    let first = value
        .and_then(Value::as_array)
        .and_then(|list| list.first());
    first.is_some_and(Value::is_object)
}

fn by_its_name(value: Option<&Value>) -> Vec<(&str, &Value)> {
    let list = value
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let named = list
        .iter()
        .filter_map(|one| Some((one.get("name")?.as_str()?, one)));
    named.collect()
}

/// ALWAYS and REPLICA wait for the opening.
fn is_quieted(wanted: Option<&Value>, is: Option<&Value>) -> bool {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    matches!(
        (text(wanted).as_str(), text(is).as_str()),
        ("A", "O") | ("R", "D")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(kind: &str, recorded: &Value, found: &Value, across: bool) -> Vec<String> {
        let address = ObjectAddress {
            kind: kind.to_owned(),
            names: vec!["s".to_owned(), "t".to_owned()],
            args: Vec::new(),
        };
        differences(
            &address,
            recorded,
            found,
            &Roles::of(&[("app", true), ("read", true)]),
            across,
        )
    }

    #[test]
    fn differences_read_well() {
        let table = [
            (
                json!({"columns": [{"name": "a", "type": "text"}, {"name": "b", "type": "integer"}]}),
                json!({"columns": [{"name": "b", "type": "bigint"}, {"name": "c", "type": "text"}]}),
                vec![
                    "column a is missing",
                    "column b: type is bigint, should be integer",
                    "column c should not be there",
                ],
            ),
            (
                json!({"constraints": {"k": {"definition": "CHECK (a > 0)"}}}),
                json!({"constraints": {"k": {"definition": "CHECK (a > 1)", "valid": false}, "l": {"definition": "x"}}}),
                vec![
                    "constraint k: definition is CHECK (a > 1), should be CHECK (a > 0)",
                    "constraint l should not be there",
                ],
            ),
            (
                json!({"owner": "app"}),
                json!({"owner": "dr"}),
                vec!["it should belong to app"],
            ),
            (json!({"owner": "gone"}), json!({"owner": "dr"}), vec![]),
            (
                json!({"acl": [{"grantee": "read", "privilege": "SELECT", "grantable": false}]}),
                json!({}),
                vec!["its privileges are others"],
            ),
            (
                json!({"columns": [{"name": "a", "acl": [{"grantee": "read", "privilege": "SELECT", "grantable": false}]}]}),
                json!({"columns": [{"name": "a"}]}),
                vec!["the privileges of its columns are others"],
            ),
            (
                json!({"constraints": {"k": {"definition": "CHECK (((a)::text = ANY ((ARRAY['x'::character varying])::text[])))"}},
                       "columns": [{"name": "a", "default": "('x'::text)"}]}),
                json!({"constraints": {"k": {"definition": "CHECK (((a)::text = ANY (ARRAY[('x'::character varying)::text])))"}},
                       "columns": [{"name": "a", "default": "'x'::text"}]}),
                vec![],
            ),
            (
                json!({"settings": ["a=1", "b=2"], "settings_reset": ["c", "d"]}),
                json!({"settings": ["a=2", "c=3", "ours=4"]}),
                vec![
                    "setting a is another one",
                    "setting b is another one",
                    "setting c should not be there",
                ],
            ),
            (
                json!({"member_of": {"read": {}, "pg_of_later": {}, "gone": {}}}),
                json!({"member_of": {"read": {"admin": true}}}),
                vec![
                    "member of gone is missing",
                    "member of read: admin is true, should be none",
                ],
            ),
            (
                json!({"labels": ["a", "b"]}),
                json!({"labels": ["a"]}),
                vec!["labels is [\"a\"], should be [\"a\",\"b\"]"],
            ),
            (
                json!({"rls": true}),
                json!({}),
                vec!["rls is none, should be true"],
            ),
        ];
        for (recorded, found, expected) in table {
            assert_eq!(
                of("table", &recorded, &found, false),
                expected,
                "{recorded} {found}"
            );
        }
    }

    #[test]
    fn what_waits_for_the_opening_and_words_of_another_version_do_not_count() {
        let always = (
            json!({"enabled": "A", "definition": "x"}),
            json!({"enabled": "O", "definition": "x"}),
        );
        assert!(of("trigger", &always.0, &always.1, false).is_empty());
        let other = (
            json!({"definition": "SELECT a.b"}),
            json!({"definition": "SELECT b"}),
        );
        assert_eq!(of("view", &other.0, &other.1, false).len(), 1);
        assert!(of("view", &other.0, &other.1, true).is_empty());
        let invalid = (json!({"valid": false, "definition": "x"}), json!({}));
        assert!(of("index", &invalid.0, &invalid.1, false).is_empty());
    }
}
