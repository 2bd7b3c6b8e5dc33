//! One finding of `dr-agent check`, and the report they add up to.
//!
//! Every part of the check returns findings; [`CheckReport`] puts them in order and counts them; `text`
//! lays them out for people and serde for programs.
//!
//! # Invariants
//! - An *error* means that `run` (under route `kinesis`: what this machine is for, `run` or `apply`) will not work or that a
//!   promise is broken; only errors change the exit code.
//! - `code` is stable: programs compare it, messages may be reworded.
//! - No message carries a row value or a password.
//!
//! # The JSON object
//! ```json
//! {
//!   "findings": [
//!     {
//!       "severity": "error",          // "error" | "warning" | "note" | "ok"
//!       "side": "source",             // "agent" | "source" | "replica" | "both"
//!       "database": "app",            // null: the whole server, or the agent's machine
//!       "object": "public.log",       // null: no single object is meant
//!       "code": "keyless_table",
//!       "message": "has no primary key and no replica identity",
//!       "hint": "what to type"        // null where there is nothing to do
//!     }
//!   ],
//!   "errors": 1,
//!   "warnings": 0
//! }
//! ```

use serde::Serialize;

/// How bad a finding is; the worst sorts first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// `run` will not work, or a promise is broken.
    Error,
    /// It works, and somebody should look.
    Warning,
    /// Good to know on the bad day.
    Note,
    /// Looked at and found right.
    Ok,
}

impl Severity {
    /// The word in the report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Warning => "warning",
            Self::Note => "note",
            Self::Ok => "ok",
        }
    }
}

/// Where something was found, in the order of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingSide {
    /// The machine the agent runs on.
    Agent,
    /// The PostgreSQL we tail.
    Source,
    /// The PostgreSQL we keep ready.
    Replica,
    /// The two compared with each other.
    Both,
}

impl FindingSide {
    /// The word in the report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Source => "source",
            Self::Replica => "replica",
            Self::Both => "both",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// On which side.
    pub side: FindingSide,
    /// In which database; `None` is the whole server.
    pub database: Option<String>,
    /// Which object, where one is meant.
    pub object: Option<String>,
    /// Stable name of this kind of finding.
    pub code: &'static str,
    /// What is so, for people. Does not repeat the object.
    pub message: String,
    /// What to type or to decide. Does not name the object, so that many alike share one line.
    pub hint: Option<String>,
}

impl Finding {
    /// Names the object that is meant.
    #[must_use]
    pub fn on(mut self, object: impl ToString) -> Self {
        self.object = Some(object.to_string());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A side, and perhaps a database on it: where the findings of one function belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FindingPlace {
    side: FindingSide,
    database: Option<String>,
}

impl FindingPlace {
    /// A whole server, or the agent's machine.
    pub fn server(side: FindingSide) -> Self {
        Self {
            side,
            database: None,
        }
    }

    /// One database.
    pub fn database(side: FindingSide, database: &str) -> Self {
        Self {
            side,
            database: Some(database.to_owned()),
        }
    }

    /// A finding of this place.
    pub fn finding(
        &self,
        severity: Severity,
        code: &'static str,
        message: impl Into<String>,
    ) -> Finding {
        Finding {
            severity,
            side: self.side,
            database: self.database.clone(),
            object: None,
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// An error of this place.
    pub fn error(&self, code: &'static str, message: impl Into<String>) -> Finding {
        self.finding(Severity::Error, code, message)
    }

    /// A warning of this place.
    pub fn warning(&self, code: &'static str, message: impl Into<String>) -> Finding {
        self.finding(Severity::Warning, code, message)
    }

    /// A note of this place.
    pub fn note(&self, code: &'static str, message: impl Into<String>) -> Finding {
        self.finding(Severity::Note, code, message)
    }

    /// Something found right at this place.
    pub fn ok(&self, code: &'static str, message: impl Into<String>) -> Finding {
        self.finding(Severity::Ok, code, message)
    }
}

/// All findings, in the order in which they are shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// By side, then server before databases, then database, then the worst first.
    pub findings: Vec<Finding>,
    /// How many are errors.
    pub errors: usize,
    /// How many are warnings.
    pub warnings: usize,
}

impl CheckReport {
    /// Orders and counts; within one code the order of arrival stays.
    pub fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by(|a, b| {
            (a.side, &a.database, a.severity).cmp(&(b.side, &b.database, b.severity))
        });
        let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
        Self {
            errors: count(Severity::Error),
            warnings: count(Severity::Warning),
            findings,
        }
    }

    /// How many findings have this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .count()
    }
}

/// "a, b, c and 12 more": names for a message, bounded.
pub(super) fn some_of<T: ToString>(names: &[T]) -> String {
    const SHOWN_MAX: usize = 5;
    let shown: Vec<String> = names
        .iter()
        .take(SHOWN_MAX)
        .map(ToString::to_string)
        .collect();
    let shown = shown.join(", ");
    match names.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// "1 table", "2 tables": a count with its noun.
pub(super) fn counted(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first_and_only_within_its_place() {
        let source = FindingPlace::server(FindingSide::Source);
        let app = FindingPlace::database(FindingSide::Source, "app");
        let report = CheckReport::new(vec![
            FindingPlace::server(FindingSide::Replica).error("connect", "x"),
            app.error("keyless_table", "x"),
            source.ok("wal_level", "x"),
            source.warning("wal_sender_timeout", "x"),
        ]);
        let codes: Vec<&str> = report.findings.iter().map(|f| f.code).collect();
        assert_eq!(
            codes,
            [
                "wal_sender_timeout",
                "wal_level",
                "keyless_table",
                "connect"
            ]
        );
        assert_eq!((report.errors, report.warnings), (2, 1));
    }

    #[test]
    fn the_json_object_is_the_documented_one() {
        let finding = FindingPlace::database(FindingSide::Source, "app")
            .error("keyless_table", "has no key")
            .on("public.log")
            .hint("add one");
        let json = serde_json::to_value(CheckReport::new(vec![finding])).unwrap();
        let expected = serde_json::json!({
            "findings": [{
                "severity": "error", "side": "source", "database": "app", "object": "public.log",
                "code": "keyless_table", "message": "has no key", "hint": "add one"
            }],
            "errors": 1,
            "warnings": 0
        });
        assert_eq!(json, expected);
        let bare = serde_json::to_value(
            FindingPlace::server(FindingSide::Agent).ok("spill_directory", "writable"),
        );
        assert_eq!(bare.unwrap()["hint"], serde_json::Value::Null);
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        assert_eq!(some_of(&["a", "b"]), "a, b");
        assert_eq!(some_of(&[1, 2, 3, 4, 5, 6, 7]), "1, 2, 3, 4, 5 and 2 more");
        assert_eq!(counted(1, "table"), "1 table");
        assert_eq!(counted(0, "table"), "0 tables");
    }
}
