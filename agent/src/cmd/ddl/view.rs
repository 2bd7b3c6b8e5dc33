//! ● What `dr-agent ddl` prints, for people and as JSON.

use std::fmt::Write as _;

use serde_json::json;

use super::Tried;
use crate::schema::ddl_applied::AppliedCommand;
use crate::schema::ddl_waiting::WaitingObject;
use crate::time::rfc3339;

/// One database.
#[derive(Clone, Debug)]
pub(super) struct DatabaseCommands {
    pub(super) database: String,
    /// By outcome.
    pub(super) counts: Vec<(String, i64)>,
    pub(super) newest: Vec<AppliedCommand>,
    pub(super) waiting: Vec<WaitingObject>,
}

impl DatabaseCommands {
    /// Whether nothing waits.
    pub(super) fn is_settled(&self) -> bool {
        self.waiting.iter().all(|one| one.accepted.is_some())
    }
}

/// For people.
pub(super) fn text(databases: &[DatabaseCommands]) -> String {
    let mut out = String::new();
    for database in databases {
        let waits = database.waiting.iter().filter(|one| one.accepted.is_none());
        let counts: Vec<String> = database
            .counts
            .iter()
            .map(|(outcome, count)| format!("{count} {outcome}"))
            .collect();
        let counts = match counts.is_empty() {
            true => "no command of the source yet".to_owned(),
            false => counts.join(", "),
        };
        let _ = writeln!(
            out,
            "{}: {counts}; {} waiting",
            database.database,
            waits.count()
        );
        for one in &database.waiting {
            let object = format!("{} {}", one.address.kind, one.identity);
            match &one.accepted {
                Some(reason) => {
                    let _ = writeln!(out, "  accepted  {object}: {reason}");
                }
                None => {
                    let _ = writeln!(
                        out,
                        "  WAITING   {object} (command {}): {}",
                        one.ddl, one.reason
                    );
                }
            }
        }
        for command in &database.newest {
            let tag = command.tag.as_deref().unwrap_or("(no longer recorded)");
            let _ = writeln!(
                out,
                "  {}  {:<9} {tag} {} (command {}, at {})",
                rfc3339(command.applied_at),
                command.outcome,
                command.objects,
                command.id,
                command.commit_lsn
            );
        }
    }
    if databases.iter().any(|database| !database.is_settled()) {
        out.push_str(
            "Ways out: mend what is missing on the replica, and `dr-agent ddl retry`; `dr-agent ddl accept` where it is right as it \
             is there; `dr-agent ddl resync` where a table's rows are in doubt.\n",
        );
    }
    out
}

/// For programs.
pub(super) fn json(databases: &[DatabaseCommands]) -> String {
    let databases: Vec<serde_json::Value> = databases
        .iter()
        .map(|database| {
            let counts: serde_json::Map<String, serde_json::Value> =
                database.counts.iter().map(|(outcome, count)| (outcome.clone(), json!(count))).collect();
            let waiting: Vec<serde_json::Value> = database
                .waiting
                .iter()
                .map(|one| {
                    json!({
                        "kind": one.address.kind, "object": one.identity, "reason": one.reason, "command": one.ddl,
                        "accepted": one.accepted,
                    })
                })
                .collect();
            let newest: Vec<serde_json::Value> = database
                .newest
                .iter()
                .map(|one| {
                    json!({
                        "command": one.id, "tag": one.tag, "objects": one.objects, "outcome": one.outcome,
                        "detail": one.detail, "commit_lsn": one.commit_lsn.to_string(), "applied_at": rfc3339(one.applied_at),
                    })
                })
                .collect();
            json!({ "database": database.database, "counts": counts, "waiting": waiting, "newest": newest })
        })
        .collect();
    format!("{:#}\n", json!({ "databases": databases }))
}

/// What has become of what waited.
pub(super) fn tried(database: &str, tried: &[Tried]) -> String {
    let mut out = String::new();
    if tried.is_empty() {
        let _ = writeln!(out, "{database}: nothing waits");
    }
    for one in tried {
        match (&one.waits, &one.copy_again) {
            (Some(reason), _) => {
                let _ = writeln!(out, "{database}: {} still waits: {reason}", one.identity);
            }
            (None, None) => {
                let _ = writeln!(out, "{database}: {} is as on the source now", one.identity);
            }
            (None, Some(_)) => {
                let _ = writeln!(
                    out,
                    "{database}: {} is as on the source now, and its rows are copied again",
                    one.identity
                );
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;
    use crate::names::object::ObjectAddress;

    fn database(accepted: Option<&str>) -> DatabaseCommands {
        DatabaseCommands {
            database: "app".to_owned(),
            counts: vec![("shape".to_owned(), 1), ("waits".to_owned(), 1)],
            newest: vec![AppliedCommand {
                id: 7,
                tag: Some("CREATE VIEW".to_owned()),
                objects: "public.v".to_owned(),
                outcome: "waits".to_owned(),
                detail: String::new(),
                commit_lsn: lsn(0x16_0000_0001),
                applied_at: std::time::SystemTime::UNIX_EPOCH,
            }],
            waiting: vec![WaitingObject {
                address: ObjectAddress {
                    kind: "view".to_owned(),
                    names: vec!["public".to_owned(), "v".to_owned()],
                    args: Vec::new(),
                },
                identity: "public.v".to_owned(),
                shape: None,
                reason: "no function f".to_owned(),
                ddl: 7,
                across: false,
                accepted: accepted.map(str::to_owned),
                drift: false,
            }],
        }
    }

    #[test]
    fn people_see_what_waits_first_and_what_they_can_do() {
        let shown = text(&[database(None)]);
        assert_eq!(
            shown.lines().take(3).collect::<Vec<_>>(),
            [
                "app: 1 shape, 1 waits; 1 waiting",
                "  WAITING   view public.v (command 7): no function f",
                "  1970-01-01T00:00:00.000000Z  waits     CREATE VIEW public.v (command 7, at 16/1)",
            ]
        );
        assert!(shown.contains("dr-agent ddl retry"));
        let accepted = text(&[database(Some("it is not used"))]);
        assert!(
            accepted.contains("  accepted  view public.v: it is not used")
                && !accepted.contains("Ways out")
        );
    }

    #[test]
    fn programs_see_the_same() {
        let value: serde_json::Value = serde_json::from_str(&json(&[database(None)])).unwrap();
        let one = &value["databases"][0];
        assert_eq!(one["counts"]["waits"], 1);
        assert_eq!(one["waiting"][0]["object"], "public.v");
        assert_eq!(one["newest"][0]["commit_lsn"], "16/1");
    }
}
