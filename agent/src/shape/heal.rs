//! ● The statements that bring an object from what it is to what was recorded of it.
//!
//! All names in full, valid under an empty search_path. Never CASCADE: what goes with something else on the source is recorded there.
//!
//! # What it does not do
//! It does not know whether a statement will be taken; whoever runs them compares afterwards.

mod column;
mod others;
mod privileges;
mod shared;
mod table;
mod types;

pub use column::is_certain_cast;
use serde_json::Value;

use super::Roles;
use crate::names::object::ObjectAddress;
use crate::pg::quote::{quote_ident, quote_literal};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Healing {
    /// These statements, in order.
    Statements {
        /// What is tried first.
        statements: Vec<String>,
        /// What is tried where the server refuses that.
        otherwise: Vec<String>,
        /// Rows of the table are not what they are on the source: they have to be copied again.
        copy_again: bool,
    },
    /// It cannot be done from the shape alone, and why.
    Refused(String),
}

/// What is wanted, and what there is.
#[derive(Clone, Copy)]
struct Case<'a> {
    address: &'a ObjectAddress,
    identity: &'a str,
    recorded: &'a Value,
    found: Option<&'a Value>,
    roles: &'a Roles,
}

/// Statements so far.
#[derive(Default)]
struct Plan {
    statements: Vec<String>,
    otherwise: Vec<String>,
    copy_again: bool,
}

impl Plan {
    fn add(&mut self, statement: impl Into<String>) {
        self.statements.push(statement.into());
    }
}

/// Plans it.
pub fn heal(
    address: &ObjectAddress,
    identity: &str,
    recorded: &Value,
    found: Option<&Value>,
    roles: &Roles,
) -> Healing {
    let case = Case {
        address,
        identity,
        recorded,
        found,
        roles,
    };
    let planned = match address.kind.as_str() {
        "table" | "foreign table" | "partitioned table" => table::heal(&case),
        "table column" | "foreign table column" => column::heal(&case),
        "table constraint" => table::heal_constraint(&case),
        "default value" => column::heal_default(&case),
        "type" | "domain" | "composite type" => types::heal(&case),
        _ => others::heal(&case),
    };
    match planned {
        Err(reason) => Healing::Refused(reason),
        Ok(mut plan) => {
            privileges::heal(&case, &mut plan);
            if address.kind == "database" {
                plan.statements = shared::of_this_database(plan.statements, &case.last_name());
            }
            Healing::Statements {
                statements: plan.statements,
                otherwise: plan.otherwise,
                copy_again: plan.copy_again,
            }
        }
    }
}

impl<'a> Case<'a> {
    /// A text of what is wanted.
    fn wanted(&self, key: &str) -> Option<&'a str> {
        text(self.recorded, key)
    }

    /// A text of what is there.
    fn has(&self, key: &str) -> Option<&'a str> {
        text(self.found?, key)
    }

    fn is_wanted(&self, key: &str) -> bool {
        is(self.recorded, key)
    }

    /// Whether something is not as it should be; of an object that is not there, whether there is something.
    fn differs(&self, key: &str) -> bool {
        self.recorded.get(key) != self.found.and_then(|found| found.get(key))
    }

    /// The object's name as SQL takes it where two parts are its schema and its name.
    fn name(&self) -> String {
        let names = self.address.names.iter().take(2);
        names
            .map(|name| quote_ident(name))
            .collect::<Vec<_>>()
            .join(".")
    }

    /// The same where one part is the whole name, or the third is of something in a table.
    fn last_name(&self) -> String {
        quote_ident(self.address.names.last().map_or("", String::as_str))
    }

    /// COMMENT ON, where the comment is another one.
    fn comment(&self, what: &str, plan: &mut Plan) {
        if self.differs("comment") {
            plan.add(comment(what, self.wanted("comment")));
        }
    }
}

fn comment(what: &str, text: Option<&str>) -> String {
    let text = text.map_or_else(|| "NULL".to_owned(), quote_literal);
    format!("COMMENT ON {what} IS {text}")
}

fn text<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.get(key)?.as_str()
}

fn is(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn texts<'v>(value: &'v Value, key: &str) -> Vec<&'v str> {
    let list = value.get(key).and_then(Value::as_array);
    list.map_or(&[][..], Vec::as_slice)
        .iter()
        .filter_map(Value::as_str)
        .collect()
}

/// A number or anything else that is written as it is.
fn plain(value: &Value, key: &str) -> Option<String> {
    match value.get(key)? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// Options as `name=value`, for WITH and OPTIONS.
fn option_list(options: &[&str], separator: &str) -> String {
    let one = |option: &&str| {
        let (name, value) = option.split_once('=').unwrap_or((option, "true"));
        match separator {
            " " => format!("{} {}", quote_ident(name), quote_literal(value)),
            _ => format!("{name}={}", quote_literal(value)),
        }
    };
    options.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// ADD, SET and DROP of options that differ. One that may be a password is in neither list, and stays as it is.
fn option_changes(wanted: &[&str], has: &[&str]) -> String {
    let split = |option: &str| {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        (name.to_owned(), value.to_owned())
    };
    let mut changes = Vec::new();
    for option in wanted.iter().filter(|option| !has.contains(option)) {
        let (name, value) = split(option);
        let verb = match has.iter().any(|other| split(other).0 == name) {
            true => "SET",
            false => "ADD",
        };
        changes.push(format!(
            "{verb} {} {}",
            quote_ident(&name),
            quote_literal(&value)
        ));
    }
    for option in has {
        let (name, _) = split(option);
        if !wanted.iter().any(|other| split(other).0 == name) {
            changes.push(format!("DROP {}", quote_ident(&name)));
        }
    }
    changes.join(", ")
}

/// SET and RESET of options that differ.
fn alter_options(head: &str, case_recorded: &Value, found: Option<&Value>, plan: &mut Plan) {
    let wanted = texts(case_recorded, "options");
    let has = found.map_or_else(Vec::new, |found| texts(found, "options"));
    let name = |option: &str| option.split('=').next().unwrap_or_default().to_owned();
    let gone: Vec<String> = has
        .iter()
        .map(|option| name(option))
        .filter(|gone| !wanted.iter().any(|option| name(option) == *gone))
        .collect();
    let set: Vec<&str> = wanted
        .iter()
        .copied()
        .filter(|option| !has.contains(option))
        .collect();
    if !gone.is_empty() {
        plan.add(format!("{head} RESET ({})", gone.join(", ")));
    }
    if !set.is_empty() {
        plan.add(format!("{head} SET ({})", option_list(&set, "=")));
    }
}

#[cfg(test)]
mod tests;
