//! The few rules that can be broken silently: who may know whom, what is pure, what is documented.
//!
//! Reads the sources and the manual as text. A rule that holds by construction (visibility, types)
//! is not repeated here, and nothing here judges size or style.

use std::fs;
use std::path::{Path, PathBuf};

use dr_agent::metrics;

const README: &str = include_str!("../../README.md");
const EXAMPLE: &str = include_str!("../../ops/dr-agent.toml");

/// Files and directories below `agent/src` that have neither tokio nor I/O nor a clock; time is an
/// argument.
const PURE: &[&str] = &[
    "backoff.rs",
    "archive/unzstd.rs",
    "archive/way.rs",
    "archive/chain.rs",
    "aws/refusal.rs",
    "archive/layout.rs",
    "backup/manifest.rs",
    "backup/retention.rs",
    "backup/script.rs",
    "changelog/frames.rs",
    "changelog/gather.rs",
    "changelog/unpack.rs",
    "kinesis/calls.rs",
    "kinesis/error.rs",
    "kinesis/pace.rs",
    "kinesis/progress.rs",
    "restore/choose.rs",
    "restore/moment.rs",
    "snapshot/owners.rs",
    "snapshot/roles.rs",
    "store/error.rs",
    "store/name.rs",
    "store/url.rs",
    "batch.rs",
    "clock.rs",
    "config.rs",
    "error.rs",
    "history.rs",
    "lag.rs",
    "ledger.rs",
    "net.rs",
    "net",
    "pg/pgoutput",
    "pg/redact.rs",
    "pg/settings.rs",
    "plan.rs",
    "plan",
    "remedy.rs",
    "pipeline/trouble.rs",
    "setup/identity.rs",
    "setup/mismatch.rs",
    "setup/timeline.rs",
    "promote/plan.rs",
    "promote/report.rs",
    "promote/sequences.rs",
    "promote/state.rs",
    "sink/replica/cost.rs",
    "source/pace.rs",
    "status/judge.rs",
    "stream.rs",
    "txn.rs",
    "txn/assembler.rs",
    "txn/descriptions.rs",
    "txn/open.rs",
    "txn/types.rs",
];

/// What a part may not name, and why it would be wrong.
const STRANGERS: &[(&str, &[&str])] = &[
    // What PostgreSQL says knows nothing of ours.
    (
        "pg",
        &[
            "batch", "cmd", "ledger", "net", "pipeline", "promote", "setup", "sink", "snapshot",
            "source", "txn",
        ],
    ),
    // Transactions and batches know nothing of sinks.
    ("txn.rs", &["sink", "pipeline"]),
    ("txn", &["sink", "pipeline"]),
    ("batch.rs", &["sink", "pipeline"]),
    ("net.rs", &["sink", "pipeline"]),
    ("plan.rs", &["sink", "pipeline"]),
    // Sinks know nothing of the source.
    ("sink", &["source", "pipeline", "setup", "snapshot"]),
    // The object store knows nothing of what is kept in it.
    (
        "store",
        &[
            "batch", "cmd", "config", "ledger", "net", "pg", "pipeline", "promote", "setup",
            "sink", "snapshot", "source", "txn",
        ],
    ),
    // Kinesis knows nothing of what is sent through it.
    (
        "kinesis",
        &[
            "batch",
            "changelog",
            "cmd",
            "config",
            "ledger",
            "net",
            "pg",
            "pipeline",
            "promote",
            "setup",
            "sink",
            "snapshot",
            "source",
            "txn",
        ],
    ),
    // Clients of AWS have their beginnings in common, and nothing else.
    ("aws.rs", &["store", "kinesis", "config", "cmd"]),
    ("aws", &["store", "kinesis", "config", "cmd"]),
    // A base backup and its load have nothing to do with streaming.
    ("backup", &["pipeline", "sink", "promote", "cmd"]),
    // A promotion shares nothing with a running agent but the replica.
    (
        "promote",
        &["pipeline", "source", "sink", "kinesis", "drain"],
    ),
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

#[test]
fn pure_files_know_no_runtime_no_files_and_no_clock() {
    for part in PURE {
        for path in files(part) {
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
}

#[test]
fn parts_name_only_whom_they_may_know() {
    for (part, strangers) in STRANGERS {
        for path in files(part) {
            let text = program(&path);
            for stranger in *strangers {
                for form in [
                    format!("crate::{stranger}::"),
                    format!("crate::{stranger};"),
                ] {
                    assert!(
                        !text.contains(&form),
                        "{} may not know {stranger}",
                        path.display()
                    );
                }
            }
        }
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
                "snapshot/tools.rs",
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
