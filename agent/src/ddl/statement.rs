//! ● Which statement a command was, and whether it may be run as it is.
//!
//! ```text
//! context  SQL statement "…"   what a function or a DO block has run: the innermost one
//! query    a; b; c             what the client has sent: split, and the one whose command tag it is
//! ```
//! A client's string may hold several statements, and PostgreSQL does not say which one an event is of. Where that is not certain,
//! there is no statement, and the recorded shapes alone count. They count anyway: whatever is run here is compared with them.
//!
//! # What it does not do
//! It does not know the tables: what becomes of rows is decided in [`super::apply`].

mod split;

use self::split::{Words, split};
use crate::schema::ddl::{DdlEvent, EventKind};

/// What a command was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// It may be run as it is, by whoever ran it, in a transaction.
    Exact(String),
    /// Only the shapes tell what to do, and why.
    Shape(&'static str),
}

/// Finds the statement of an event.
pub fn of(event: &DdlEvent) -> Statement {
    match text(event) {
        None => Statement::Shape("its text is not certain"),
        Some(text) => match only_by_shape(&Words::of(&text)) {
            None => Statement::Exact(text),
            Some(why) => Statement::Shape(why),
        },
    }
}

/// The text of the one statement.
fn text(event: &DdlEvent) -> Option<String> {
    let context = event.context.as_deref()?;
    // The first frame is the event trigger's own.
    match context.split_once('\n') {
        None => of_client(event),
        Some((_, frames)) => {
            let text = innermost(frames)?;
            let statements = split(text);
            let [one] = statements.as_slice() else {
                return None;
            };
            is_tagged(&Words::of(one), &event.tag).then(|| (*one).to_owned())
        }
    }
}

/// The statement of the innermost frame, in English; in any other language, and of an SQL function, there is none.
fn innermost(frames: &str) -> Option<&str> {
    const BEGIN: &str = "SQL statement \"";
    const ENDS: [&str; 3] = [
        "\"\nPL/pgSQL function ",
        "\"\nSQL function ",
        "\"\nSQL statement ",
    ];
    let rest = frames.strip_prefix(BEGIN)?;
    let end = ENDS.iter().filter_map(|end| rest.find(end)).min();
    match end {
        Some(end) => rest.get(..end),
        None => rest.strip_suffix('"'),
    }
}

/// The statement of a string that the client has sent.
fn of_client(event: &DdlEvent) -> Option<String> {
    let statements = split(event.query.as_deref()?);
    let tagged: Vec<&str> = statements
        .iter()
        .copied()
        .filter(|text| is_tagged(&Words::of(text), &event.tag))
        .collect();
    if let [one] = tagged.as_slice() {
        return Some((*one).to_owned());
    }
    // Each statement that defines something fires the trigger of commands once; a function may fire it, too, and nobody knows how
    // often.
    let is_certain = event.kind == EventKind::Command
        && !statements.iter().any(|text| may_call(&Words::of(text)));
    let nth = usize::try_from(event.ordinal?).ok()?.checked_sub(1)?;
    let mut firing = statements.iter().filter(|text| fires(&Words::of(text)));
    let one = firing.nth(nth).filter(|_| is_certain)?;
    is_tagged(&Words::of(one), &event.tag).then(|| (*one).to_owned())
}

/// Words that say how, and not what, behind the first one.
const NOISE: [&str; 13] = [
    "OR",
    "REPLACE",
    "TEMP",
    "TEMPORARY",
    "UNLOGGED",
    "GLOBAL",
    "LOCAL",
    "UNIQUE",
    "RECURSIVE",
    "CONSTRAINT",
    "DEFAULT",
    "TRUSTED",
    "PROCEDURAL",
];

/// Whether a statement has this command tag.
fn is_tagged(words: &Words<'_>, tag: &str) -> bool {
    let mut wanted: Vec<&str> = tag.split(' ').collect();
    let is_as = tag == "CREATE TABLE AS";
    if is_as {
        wanted.pop();
    }
    if tag == "SELECT INTO" {
        return words.first_is(&["SELECT", "WITH"]) && words.has("INTO");
    }
    let is_kept = |word: &&str| tag.contains("DEFAULT") || !NOISE.contains(word);
    let keywords: Vec<String> = words.leading(8).map(str::to_uppercase).collect();
    let (first, rest) = match keywords.split_first() {
        Some((first, rest)) => (first.as_str(), rest.iter().map(String::as_str)),
        None => return false,
    };
    let mut found = std::iter::once(first).chain(rest.filter(is_kept));
    let is_prefix = wanted.iter().all(|word| found.next() == Some(*word));
    is_prefix && (is_as == is_create_as(words) || wanted != ["CREATE", "TABLE"])
}

/// CREATE TABLE … AS.
fn is_create_as(words: &Words<'_>) -> bool {
    const QUERIES: [&str; 5] = ["SELECT", "WITH", "VALUES", "EXECUTE", "TABLE"];
    let leading = words.leading(6).map(str::to_uppercase);
    let mut kept = leading.filter(|word| !NOISE.contains(&word.as_str()));
    let is_table =
        kept.next().as_deref() == Some("CREATE") && kept.next().as_deref() == Some("TABLE");
    is_table && words.outside_has_pair("AS", &QUERIES)
}

/// Whether a statement fires the trigger of commands.
fn fires(words: &Words<'_>) -> bool {
    // Objects of the whole server have no event triggers.
    const SHARED: [&str; 7] = [
        "ROLE",
        "USER",
        "GROUP",
        "DATABASE",
        "TABLESPACE",
        "SYSTEM",
        "EVENT",
    ];
    let mut leading = words.leading(3).map(str::to_uppercase);
    let (first, second) = (
        leading.next().unwrap_or_default(),
        leading.next().unwrap_or_default(),
    );
    let third = leading.next().unwrap_or_default();
    match first.as_str() {
        "CREATE" | "ALTER" | "DROP" => {
            !SHARED.contains(&second.as_str()) || second == "USER" && third == "MAPPING"
        }
        "COMMENT" => !SHARED.contains(&third.as_str()),
        "GRANT" | "REVOKE" => words.has("ON"),
        "SECURITY" | "IMPORT" | "REFRESH" => true,
        "SELECT" | "WITH" => words.has("INTO"),
        _ => false,
    }
}

/// Whether a statement may run functions that define something.
fn may_call(words: &Words<'_>) -> bool {
    words.first_is(&["SELECT", "WITH", "CALL", "DO", "EXECUTE", "VALUES", "TABLE"])
}

/// Why a statement may not be run as it is.
fn only_by_shape(words: &Words<'_>) -> Option<&'static str> {
    if words.has("CONCURRENTLY") {
        return Some("it cannot run in a transaction");
    }
    if words.has("TABLESPACE") {
        return Some("the replica need not have the tablespace");
    }
    if is_create_as(words) || words.first_is(&["SELECT", "WITH"]) {
        return Some("it makes rows, which come with the table's copy");
    }
    let leading: Vec<String> = words.leading(3).map(str::to_uppercase).collect();
    let starts =
        |with: &[&str]| leading.iter().zip(with).filter(|(a, b)| *a == *b).count() == with.len();
    if starts(&["CREATE", "MATERIALIZED"]) || starts(&["REFRESH"]) {
        return Some("a materialized view is filled after a promotion");
    }
    if starts(&["IMPORT"]) {
        return Some("it asks another server");
    }
    if starts(&["ALTER", "TABLE"]) && words.adds_computed_column() {
        return Some("the values of the new column are those of the moment it was added");
    }
    if starts(&["ALTER", "TABLE"]) && words.has("USING") && words.has("TYPE") {
        return Some("its USING may give other values here");
    }
    None
}

#[cfg(test)]
mod tests;
