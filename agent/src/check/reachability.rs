//! ● Route `kinesis`: which sides can be reached from here, and what that means.
//!
//! Pure. Sites need not see one another: a side that cannot be reached says where this is and is no error, unless none
//! can be reached.
//!
//! # Invariants
//! - Only a side that cannot be reached is excused: one that answers and refuses is an error as under route `direct`.

use super::finding::{Finding, FindingPlace, FindingSide, Severity};
use crate::config::{Config, Route};

/// The sides that can be reached from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    pub(super) source: bool,
    pub(super) replica: bool,
}

impl Reach {
    /// What the attempts to connect have found.
    pub(super) fn of(findings: &[Finding]) -> Self {
        let reached = |side| {
            !findings
                .iter()
                .any(|finding| is_out_of_reach(finding, side))
        };
        Self {
            source: reached(FindingSide::Source),
            replica: reached(FindingSide::Replica),
        }
    }

    /// Whether `dr-agent run` may be what this machine is for.
    pub(super) fn tails(self, route: &Route) -> bool {
        *route == Route::Direct || self.source || !self.replica
    }
}

fn is_out_of_reach(finding: &Finding, side: FindingSide) -> bool {
    (finding.side, &finding.database, finding.code) == (side, &None, "connect")
        && finding.severity != Severity::Ok
}

/// Makes a remark of what is no error under route `kinesis`, and says what could not be looked at.
pub(super) fn excuse(config: &Config, reach: Reach, findings: &mut Vec<Finding>) {
    let archive = config.archive.is_some();
    let (away, hint) = match reach {
        _ if config.route == Route::Direct => return,
        Reach {
            source: true,
            replica: true,
        }
        | Reach {
            source: false,
            replica: false,
        } => return,
        Reach { source: false, .. } => (
            FindingSide::Source,
            if archive {
                "right beside the replica: dr-agent apply goes on without, and its first copy comes out of the archive; a \
                 table that is added later is copied from the source, which must be reachable for that. dr-agent run \
                 needs it, on the other side"
            } else {
                "dr-agent apply goes on without, but its first copy and tables that are added later come from the \
                 source: it must be reachable for that, or configure [archive]. dr-agent run needs it, on the other side"
            },
        ),
        Reach { replica: false, .. } => (
            FindingSide::Replica,
            "right beside the source: dr-agent run goes on without. dr-agent apply and promote need it, on the other side",
        ),
    };
    for finding in findings.iter_mut() {
        if is_out_of_reach(finding, away) {
            finding.severity = Severity::Note;
            finding.hint = Some(hint.to_owned());
        }
    }
    findings.push(
        FindingPlace::server(FindingSide::Both)
            .note(
                "not_compared",
                format!(
                    "source and replica were not compared with each other: the {} cannot be reached from here",
                    away.as_str()
                ),
            )
            .hint("dr-agent check on the other side looks at the rest; versions, extensions, locales, roles and tables are compared only where both can be reached"),
    );
    if away == FindingSide::Replica && !archive {
        findings.push(
            FindingPlace::server(FindingSide::Replica)
                .note(
                    "first_copy",
                    "no [archive] is configured: dr-agent apply must reach the source for the first copy",
                )
                .hint("let source.url lead to the source from the replica's side too, or configure [archive] on both sides"),
        );
    }
}

/// Beside the source nothing is dumped but for the archive.
pub(super) fn excuse_tools(config: &Config, reach: Reach, findings: &mut [Finding]) {
    if config.route == Route::Direct || reach.replica || !reach.source || config.archive.is_some() {
        return;
    }
    for finding in findings {
        if finding.code == "pg_tools" && finding.severity == Severity::Error {
            finding.severity = Severity::Note;
            finding.hint = Some("dr-agent apply needs them, beside the replica".to_owned());
        }
    }
}

/// Where the first copy of a database that has none yet will come from. Beside the replica, the source out of reach.
pub(super) fn first_copy(config: &Config, database: &str) -> Finding {
    let at = FindingPlace::database(FindingSide::Replica, database);
    if config.archive.is_some() {
        return at.note(
            "first_copy",
            "is not made yet: it will come out of the archive's newest base backup, the source being out of reach",
        );
    }
    at.error(
        "first_copy",
        "is not made yet, the source cannot be reached from here, and no [archive] is configured",
    )
    .hint("let source.url lead to the source from here as well, or give both sides an [archive] and wait for the first base backup")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(route: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\ndatabases = [\"app\"]\n[replica]\n\
             url = \"postgres://b@localhost/y\"\n{route}"
        );
        Config::parse("f", &text, []).unwrap()
    }

    const KINESIS: &str = "[route]\nkind = \"kinesis\"\nstream = \"s\"\n";

    fn excused(config: &Config, mut findings: Vec<Finding>) -> Vec<(Severity, &'static str)> {
        let reach = Reach::of(&findings);
        excuse(config, reach, &mut findings);
        findings.iter().map(|f| (f.severity, f.code)).collect()
    }

    #[test]
    fn tools_are_needed_where_something_is_copied() {
        let severity = |route: &str, source, replica| {
            let mut found =
                [FindingPlace::server(FindingSide::Agent).error("pg_tools", "not found")];
            excuse_tools(&config(route), Reach { source, replica }, &mut found);
            found[0].severity
        };
        assert_eq!(severity(KINESIS, true, false), Severity::Note);
        assert_eq!(severity(KINESIS, false, true), Severity::Error);
        assert_eq!(severity(KINESIS, true, true), Severity::Error);
        assert_eq!(severity("", true, false), Severity::Error);
        let archive = format!("{KINESIS}[archive]\nurl = \"file:///nowhere/at/all\"\n");
        assert_eq!(severity(&archive, true, false), Severity::Error);
    }

    #[test]
    fn one_side_out_of_reach_is_a_remark_both_are_errors_and_so_is_a_refusal() {
        let away = |side| FindingPlace::server(side).error("connect", "refused");
        let here = |side| FindingPlace::server(side).ok("connect", "answers");
        let split = vec![here(FindingSide::Source), away(FindingSide::Replica)];
        let error = (Severity::Error, "connect");
        assert_eq!(
            excused(&config(KINESIS), split.clone()),
            [
                (Severity::Ok, "connect"),
                (Severity::Note, "connect"),
                (Severity::Note, "not_compared"),
                (Severity::Note, "first_copy"),
            ]
        );
        let beside = vec![away(FindingSide::Source), here(FindingSide::Replica)];
        assert_eq!(
            excused(&config(KINESIS), beside)[0],
            (Severity::Note, "connect")
        );
        assert_eq!(excused(&config(""), split)[1], error);
        let neither = vec![away(FindingSide::Source), away(FindingSide::Replica)];
        assert_eq!(excused(&config(KINESIS), neither), [error, error]);
        let refused = FindingPlace::server(FindingSide::Replica).error("password", "wrong");
        assert_eq!(
            excused(&config(KINESIS), vec![here(FindingSide::Source), refused]),
            [(Severity::Ok, "connect"), (Severity::Error, "password")]
        );
    }
}
