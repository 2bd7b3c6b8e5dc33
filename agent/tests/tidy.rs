//! The few rules that can be broken silently: who may know whom, what is pure, what is documented.
//!
//! Reads the sources and the manual as text. A rule that holds by construction (visibility, types)
//! is not repeated here, and nothing here judges size or style.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dr_agent::observe::metrics;

const README: &str = include_str!("../../README.md");
const EXAMPLE: &str = include_str!("../../ops/dr-agent.toml");

/// There were so many in November 2026.
const PURE_AT_LEAST: usize = 59;

/// What somebody can keep in mind.
const ROOMS_MAX: usize = 28;

/// Whom each room at the root of `agent/src` may name. No two may reach one another, by whatever way.
const MAY_NAME: &[(&str, &str)] = &[
    (
        "archive",
        "backoff catalog cloud config copy error failpoint flow names observe pg private schema time",
    ),
    ("backoff", "error"),
    ("catalog", "config names pg"),
    (
        "check",
        "catalog cloud config copy error names pg schema setup time watch",
    ),
    ("cli", "cmd config"),
    ("cloud", "backoff error private time"),
    (
        "cmd",
        "archive backoff check cloud config copy ddl error names observe pg pipeline promote replay schema setup sink time watch",
    ),
    ("config", "cloud error names pg"),
    ("copy", "catalog config error failpoint names pg schema"),
    ("ddl", "error names pg schema shape"),
    ("flow", "error names pg time"),
    ("names", "error pg time"),
    ("observe", "cloud config error flow pg time watch"),
    ("pg", "error"),
    (
        "pipeline",
        "archive backoff catalog cloud config copy ddl error failpoint flow names observe pg schema setup shape sink source time watch",
    ),
    (
        "promote",
        "config copy error failpoint names pg schema time watch",
    ),
    (
        "replay",
        "archive backoff catalog cloud config copy error failpoint flow names observe pg promote schema setup sink source time",
    ),
    ("schema", "flow names pg time"),
    (
        "setup",
        "archive catalog cloud config copy error failpoint names pg schema shape sink time",
    ),
    ("shape", "catalog names pg"),
    (
        "sink",
        "catalog cloud config ddl error failpoint flow names observe pg schema time",
    ),
    (
        "source",
        "archive cloud config error failpoint flow names observe pg private time",
    ),
    ("watch", "backoff catalog config error names pg schema time"),
];

fn files(below: &str) -> Vec<PathBuf> {
    fn walk(path: &Path, found: &mut Vec<PathBuf>) {
        if path.is_dir() {
            let entries = fs::read_dir(path).expect("the sources can be read");
            entries
                .flatten()
                .for_each(|entry| walk(&entry.path(), found));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path.to_owned());
        }
    }
    let mut found = Vec::new();
    walk(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src")
            .join(below),
        &mut found,
    );
    assert!(
        !found.is_empty(),
        "agent/src/{below} is gone: mend the rule"
    );
    found
}

/// The program text of a file: without comments, and without the tests at its bottom.
fn program(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("the sources can be read");
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// The first line of a file, where it says of itself that it is pure.
fn is_pure(path: &Path) -> bool {
    let text = fs::read_to_string(path).expect("the sources can be read");
    text.starts_with("//! ●")
}

/// The room at the root of `agent/src` that a file is in.
fn room(path: &Path) -> String {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let within = path.strip_prefix(src).expect("a file of the sources");
    let first = within.components().next().expect("a name");
    let name = first.as_os_str().to_string_lossy();
    name.trim_end_matches(".rs").to_owned()
}

/// The rooms that a program text names.
fn named(text: &str) -> BTreeSet<String> {
    let word = |rest: &str| {
        let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
        rest[..end.unwrap_or(rest.len())].to_owned()
    };
    let mut found = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                found.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => _ = found.insert(word(rest)),
        }
    }
    found.retain(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
    found
}

#[test]
fn pure_files_know_no_runtime_no_files_and_no_clock() {
    let pure: Vec<PathBuf> = files("").into_iter().filter(|path| is_pure(path)).collect();
    assert!(
        pure.len() > PURE_AT_LEAST,
        "only {} say that they are pure",
        pure.len()
    );
    for path in pure {
        let text = program(&path);
        for word in [
            "tokio::",
            "std::fs",
            "std::net::Tcp",
            "SystemTime::now",
            "Instant::now",
        ] {
            assert!(
                !text.contains(word),
                "{} is pure and names {word}",
                path.display()
            );
        }
    }
}

#[test]
fn rooms_name_only_whom_they_may() {
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in files("") {
        let from = room(&path);
        if ["lib", "main"].contains(&from.as_str()) || path.ends_with("tests.rs") {
            continue;
        }
        let mut to = named(&program(&path));
        to.remove(&from);
        let may = MAY_NAME.iter().find(|(name, _)| *name == from);
        let may: Vec<&str> = may.map_or(Vec::new(), |(_, to)| to.split(' ').collect());
        for name in &to {
            assert!(
                may.contains(&name.as_str()),
                "{} may not name {name}: {from} is not above it",
                path.display()
            );
        }
        arrows.entry(from).or_default().extend(to);
    }
    for (from, may) in MAY_NAME {
        for to in may.split(' ') {
            let is_used = arrows.get(*from).is_some_and(|names| names.contains(to));
            assert!(
                is_used,
                "{from} does not name {to} any more: take it off the list"
            );
        }
    }
    assert!(arrows.len() <= ROOMS_MAX, "{} rooms", arrows.len());
}

#[test]
fn no_two_rooms_reach_one_another() {
    // Whoever has nobody left below leaves; a circle stays.
    let mut left: Vec<(&str, Vec<&str>)> = MAY_NAME
        .iter()
        .map(|(from, to)| (*from, to.split(' ').collect()))
        .collect();
    loop {
        let names: Vec<&str> = left.iter().map(|(from, _)| *from).collect();
        left.retain(|(_, to)| to.iter().any(|name| names.contains(name)));
        if left.len() == names.len() {
            break;
        }
    }
    assert!(left.is_empty(), "a circle among {left:?}");
}

/// The names of the agent's own tables.
fn own_tables() -> BTreeSet<String> {
    let sql = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    let mut found = BTreeSet::new();
    for file in fs::read_dir(sql)
        .expect("the statements can be read")
        .flatten()
    {
        let text = fs::read_to_string(file.path()).expect("the statements can be read");
        let made = text.lines().filter(|line| line.starts_with("CREATE "));
        let made = made.filter_map(|line| line.split_once("TABLE ")?.1.split_once("dr_agent."));
        found.extend(made.filter_map(|(_, rest)| Some(rest.split_once(' ')?.0.to_owned())));
    }
    found
}

/// Each of them is read and written in one file of `schema/`; advice to people may name them.
#[test]
fn nobody_else_names_the_agents_own_tables() {
    let tables = own_tables();
    assert!(
        tables.contains("progress") && tables.contains("sending"),
        "{tables:?}"
    );
    for path in files("") {
        if room(&path) == "schema" || path.ends_with("error/remedy.rs") {
            continue;
        }
        for rest in program(&path).split("dr_agent.").skip(1) {
            let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
            let name = &rest[..end.unwrap_or(rest.len())];
            assert!(
                !tables.contains(name),
                "{} names dr_agent.{name}: schema/ has what reads and writes it",
                path.display()
            );
        }
    }
}

/// One that has no bound of its own says why what goes in is bounded.
#[test]
fn no_queue_is_without_a_bound() {
    // Numbers of complete segments, whose bytes the spool counts.
    const BOUNDED_ELSEWHERE: &str = "archive/log/change_log.rs";
    for path in files("") {
        let may = path.ends_with(BOUNDED_ELSEWHERE);
        assert!(
            may || !program(&path).contains("unbounded"),
            "{} has a queue without a bound",
            path.display()
        );
    }
}

/// A session begins with the settings of `pg/settings.rs`, which only these put into a start-up packet.
#[test]
fn no_session_is_opened_without_the_common_settings() {
    let opened_by: [(&str, &[&str]); 4] = [
        ("tokio_postgres::Config", &["pg/connect.rs"]),
        ("tokio_postgres::connect", &[]),
        ("startup_message(", &["pg/replication/startup.rs"]),
        (
            "\"PGOPTIONS\"",
            &[
                "pg/conninfo/environment.rs",
                "pg/connect.rs",
                "copy/tools.rs",
            ],
        ),
    ];
    for path in files("") {
        let text = program(&path);
        for (word, allowed) in opened_by {
            let may = allowed.iter().any(|file| path.ends_with(file));
            assert!(
                may || !text.contains(word),
                "{} names {word}",
                path.display()
            );
        }
    }
}

/// The string literals of a program, without what continues a line.
fn literals(program: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = program;
    while let Some(at) = rest.find('"') {
        // A character that is a quote.
        if rest[..at].ends_with('\'') || rest[..at].ends_with("'\\") {
            rest = &rest[at + 1..];
            continue;
        }
        let mut literal = String::new();
        let mut end = at + 1;
        let mut escaped = false;
        for (offset, c) in rest[at + 1..].char_indices() {
            end = at + 1 + offset + c.len_utf8();
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => break,
                _ => literal.push(c),
            }
        }
        found.push(literal.split_whitespace().collect::<Vec<_>>().join(" "));
        rest = &rest[end..];
    }
    found
}

/// On the bad day the replica is the only copy: what removes something is worded in one place, with its condition first.
#[test]
fn no_hint_destroys_what_may_be_the_only_copy() {
    const REMOVES: &[&str] = &[
        "DROP DATABASE",
        "drop the database",
        "drop this database",
        "the database on the replica",
        "DELETE its row",
        "DELETE FROM dr_agent",
        "TRUNCATE it",
        "drop it and",
        "drop the slot;",
        "delete the row",
        "copy the database anew",
    ];
    /// What says when that loses nothing; or a statement of ours, no advice.
    const HARMLESS: &[&str] = &[
        "nobody needs",
        "IF EXISTS",
        "WHERE stream = ",
        "USING unnest",
    ];
    for path in files("") {
        if path.ends_with("remedy.rs") {
            continue;
        }
        for literal in literals(&program(&path)) {
            let Some(words) = REMOVES.iter().find(|words| literal.contains(**words)) else {
                continue;
            };
            // A statement that is executed says nothing about sides.
            let begins = ["DELETE ", "INSERT ", "UPDATE ", "SELECT ", "WITH "];
            let is_statement = begins.iter().any(|verb| literal.starts_with(verb));
            if is_statement && !literal.contains(" on the ") {
                continue;
            }
            let condition = HARMLESS
                .iter()
                .filter_map(|words| literal.find(words))
                .min();
            assert!(
                condition.is_some(),
                "{}: {words:?} without a condition; see remedy.rs: {literal}",
                path.display()
            );
        }
    }
    let advice = README
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains("DROP DATABASE"));
    for row in advice {
        assert!(
            row.contains("start over") || row.contains("nobody needs"),
            "README: {row}"
        );
    }
}

#[test]
fn the_manual_has_every_metric_and_no_other() {
    let names: Vec<&str> = metrics::ALL.iter().map(|(name, ..)| *name).collect();
    for name in &names {
        let shown = [format!("`{name}`"), format!("`{name}{{")];
        assert!(
            shown.iter().any(|form| README.contains(form)),
            "README.md lacks {name}"
        );
    }
    for piece in README.split("`dr_agent_").skip(1) {
        let end = piece.find(|c: char| !(c.is_ascii_lowercase() || c == '_'));
        let name = format!("dr_agent_{}", &piece[..end.unwrap_or(piece.len())]);
        // The stream of a database called "app" is an example, not a metric.
        if name != "dr_agent_app" {
            assert!(
                names.contains(&name.as_str()),
                "README.md has {name}, the program has not"
            );
        }
    }
}

#[test]
fn the_manual_shows_the_defaults_of_the_example() {
    let mut section = "";
    for line in EXAMPLE
        .lines()
        .map(|line| line.strip_prefix('#').unwrap_or(line))
    {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_matches(|c| c == '[' || c == ']');
        } else if let Some((key, value)) = line.split_once(" = ")
            && !line.starts_with(' ')
            && section != "promote.hook"
        {
            let row = README
                .lines()
                .find(|row| row.starts_with(&format!("| `{section}.{key}` |")));
            let row = row.unwrap_or_else(|| panic!("README.md lacks {section}.{key}"));
            // Keys without a default have no such column to compare.
            let without_default = [
                "url",
                "password_file",
                "pg_bin",
                "bandwidth",
                "encryption",
                "kms_key",
            ]
            .contains(&key);
            assert!(
                without_default || row.contains(&format!("| `{value}` |")),
                "{row} says another default than {value}"
            );
        }
    }
}
