//! ● What `dr-agent backup` says of a database, for people and for programs.
//!
//! Pure.

use serde_json::{Value, json};

use crate::archive::base::{self, BaseSummary, Pruned, VerifiedArchive};
use crate::archive::log::{LogChain, Span};
use crate::error::{Classify, chain};
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;

/// What is said of one database, or of one history of it, and whether all is well.
#[derive(Clone, Debug)]
pub(super) struct Said {
    /// For people, without the last line's end.
    pub(super) text: String,
    /// For programs.
    pub(super) json: Value,
    /// Whether nothing is wrong.
    pub(super) sound: bool,
}

/// A stream, and its database where that is known.
#[derive(Clone, Debug)]
pub(super) struct NamedStream {
    /// The stream.
    pub(super) stream: StreamName,
    /// Its database.
    pub(super) database: Option<String>,
}

impl NamedStream {
    /// What people know it by.
    pub(super) fn name(&self) -> &str {
        self.database.as_deref().unwrap_or(self.stream.as_str())
    }

    /// One of its histories, by what tells it from the others where there are several.
    pub(super) fn of_history(&self, history: History, histories: usize) -> NamedHistory<'_> {
        NamedHistory {
            named: self,
            history,
            name: match histories {
                1 => self.name().to_owned(),
                _ => format!("{}, history {history}", self.name()),
            },
        }
    }

    /// What every JSON object begins with.
    fn json(&self, mut rest: Value) -> Value {
        rest["database"] = json!(self.database);
        rest["stream"] = json!(self.stream.as_str());
        rest
    }
}

/// One history of a stream.
#[derive(Clone, Debug)]
pub(super) struct NamedHistory<'a> {
    named: &'a NamedStream,
    history: History,
    name: String,
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

fn base_text(base: &BaseSummary) -> String {
    format!(
        "base backup at {}, as of {}: {} tables, {} rows, {}",
        base.lsn,
        base.as_of,
        base.tables,
        base.rows,
        size(base.bytes)
    )
}

/// A base backup was taken; `base` as the archive lists it.
pub(super) fn taken(
    database: &str,
    at: PgLsn,
    base: Option<&BaseSummary>,
    warnings: &[String],
) -> Said {
    Said {
        text: match base {
            Some(base) => format!("{database}: {}", base_text(base)),
            None => format!("{database}: base backup at {at}"),
        },
        json: json!({ "database": database, "base": base, "warnings": warnings }),
        sound: true,
    }
}

/// No base backup was taken.
pub(super) fn not_taken(database: &str, error: &(impl Classify + 'static)) -> Said {
    Said {
        text: format!("{database}: failed"),
        json: json!({ "database": database, "error": chain(error), "hint": error.hint() }),
        sound: false,
    }
}

/// The archive has no base backup of a stream; whether somebody wanted to `verify` them.
pub(super) fn nothing(named: &NamedStream, verify: bool) -> Said {
    let flaws = match verify {
        true => vec!["there is nothing: nothing can be restored"],
        false => Vec::new(),
    };
    Said {
        text: match verify {
            true => format!(
                "{}: nothing is there: NOTHING CAN BE RESTORED",
                named.name()
            ),
            false => format!("{}: no base backup", named.name()),
        },
        json: named.json(json!({ "history": null, "bases": [], "segments": 0, "flaws": flaws })),
        sound: flaws.is_empty(),
    }
}

/// What was deleted, or would be.
pub(super) fn pruned(named: &NamedStream, pruned: &Pruned, dry_run: bool) -> Said {
    let verb = match dry_run {
        true => "would be deleted",
        false => "deleted",
    };
    let mut text = format!(
        "{}: {} base backups, {} leftovers, {} segments of the log and {} histories that have ended {verb}, {}",
        named.name(),
        pruned.bases.len(),
        pruned.leftovers.len(),
        pruned.log.len(),
        pruned.histories.len(),
        size(pruned.bytes)
    );
    // What cannot be undone is shown by name beforehand.
    let names = [
        &pruned.bases,
        &pruned.leftovers,
        &pruned.log,
        &pruned.histories,
    ];
    for name in names.into_iter().flatten().filter(|_| dry_run) {
        text.push_str("\n  ");
        text.push_str(name);
    }
    Said {
        text,
        json: named.json(json!({ "dry_run": dry_run, "deleted": pruned })),
        sound: true,
    }
}

/// What a history has, and how far the change log leads from each base backup.
pub(super) fn listed(of: &NamedHistory<'_>, found: &base::FoundBases, spans: &[Span]) -> Said {
    let name = &of.name;
    let mut lines = Vec::new();
    let mut objects = Vec::new();
    for base in &found.bases {
        let chain = LogChain::from(base.lsn, spans);
        let gap = chain
            .resumes
            .map(|next| format!(", then a gap up to {next}"));
        lines.push(format!(
            "{name}: {}; restorable up to {}{}",
            base_text(base),
            chain.end,
            gap.unwrap_or_default()
        ));
        objects.push(json!({
            "base": base,
            "restorable_to": chain.end.to_string(),
            "log_resumes_at": chain.resumes.map(|lsn| lsn.to_string()),
        }));
    }
    for base::Unusable { lsn, reason, .. } in &found.unusable {
        lines.push(format!(
            "{name}: base backup at {lsn} cannot be used: {reason}"
        ));
    }
    if found.bases.is_empty() {
        lines.push(format!("{name}: no base backup"));
    }
    Said {
        text: lines.join("\n"),
        json: of.named.json(json!({
            "history": of.history.to_string(), "segments": spans.len(), "bases": objects,
            "unusable": found.unusable,
        })),
        sound: found.unusable.is_empty(),
    }
}

/// What reading a history back has come to.
pub(super) fn verified(of: &NamedHistory<'_>, verified: &VerifiedArchive) -> Said {
    let name = &of.name;
    let verdict = match verified.flaws.as_slice() {
        [] if verified.bases == 0 => {
            "it ended before its first base backup: nothing of it can be restored".to_owned()
        }
        [] => "sound".to_owned(),
        flaws => format!("DAMAGED\n  {}", flaws.join("\n  ")),
    };
    let end = verified.end.map(|(lsn, written_at)| {
        let when = written_at.map(|at| format!(", written at {at:.0}"));
        format!(", the log up to {lsn}{}", when.unwrap_or_default())
    });
    Said {
        text: format!(
            "{name}: {} base backups and {} segments read{}: {verdict}",
            verified.bases,
            verified.segments,
            end.unwrap_or_default()
        ),
        json: of.named.json(json!({
            "history": of.history.to_string(), "bases": verified.bases, "segments": verified.segments,
            "end_lsn": verified.end.map(|(lsn, _)| lsn.to_string()),
            "written_at": verified.end.and_then(|(_, at)| at).map(|at| at.to_string()),
            "flaws": verified.flaws,
        })),
        sound: verified.flaws.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::base::{BackupError, FoundBases, Unusable};
    use crate::flow::testing::lsn;

    fn at(text: &str) -> jiff::Timestamp {
        text.parse().unwrap()
    }

    fn base(position: u64) -> BaseSummary {
        BaseSummary {
            base: format!("dr_agent_app/h/base/{position}/"),
            lsn: lsn(position),
            as_of: at("2026-01-01T00:00:00Z"),
            finished_at: at("2026-01-01T01:00:00Z"),
            begun_at: None,
            server_version: 150_018,
            tables: 2,
            rows: 3,
            raw_bytes: 4096,
            bytes: 2048,
        }
    }

    fn base_json(position: &str, folder: u64) -> Value {
        json!({
            "base": format!("dr_agent_app/h/base/{folder}/"), "lsn": position, "as_of": "2026-01-01T00:00:00Z",
            "finished_at": "2026-01-01T01:00:00Z", "server_version": 150_018, "tables": 2, "rows": 3, "raw_bytes": 4096,
            "bytes": 2048,
        })
    }

    fn named() -> NamedStream {
        NamedStream {
            stream: StreamName::new("dr_agent", "app"),
            database: Some("app".to_owned()),
        }
    }

    fn history() -> History {
        History {
            system_identifier: 7,
            began: 0,
        }
    }

    const HISTORY: &str = "7-20000101T000000.000000Z";
    const BASE: &str =
        "base backup at 0/100, as of 2026-01-01T00:00:00Z: 2 tables, 3 rows, 2.0 KiB";

    fn expect(said: &Said, text: &str, json: Value, sound: bool) {
        assert_eq!(said.text, text);
        assert_eq!(said.json, json);
        assert_eq!(said.sound, sound);
    }

    #[test]
    fn a_backup_is_shown_as_the_archive_lists_it() {
        let warnings = ["large objects".to_owned()];
        expect(
            &taken("app", lsn(256), Some(&base(256)), &warnings),
            &format!("app: {BASE}"),
            json!({ "database": "app", "base": base_json("0/100", 256), "warnings": ["large objects"] }),
            true,
        );
        expect(
            &taken("app", lsn(256), None, &[]),
            "app: base backup at 0/100",
            json!({ "database": "app", "base": null, "warnings": [] }),
            true,
        );
        let error = BackupError::Cancelled;
        expect(
            &not_taken("app", &error),
            "app: failed",
            json!({ "database": "app", "error": error.to_string(), "hint": error.hint() }),
            false,
        );
    }

    #[test]
    fn a_list_says_how_far_the_log_leads_from_each_base_backup() {
        let mut found = FoundBases::default();
        found.bases = vec![base(256), base(1024)];
        let span = |start, end| Span {
            start: lsn(start),
            end: lsn(end),
        };
        let spans = [span(240, 512), span(768, 2048)];
        let named = named();
        expect(
            &listed(&named.of_history(history(), 1), &found, &spans),
            &format!(
                "app: {BASE}; restorable up to 0/200, then a gap up to 0/300\n\
                 app: base backup at 0/400, as of 2026-01-01T00:00:00Z: 2 tables, 3 rows, 2.0 KiB; restorable up to 0/800"
            ),
            json!({
                "database": "app", "stream": "dr_agent_app", "history": HISTORY, "segments": 2, "unusable": [],
                "bases": [
                    { "base": base_json("0/100", 256), "restorable_to": "0/200", "log_resumes_at": "0/300" },
                    { "base": base_json("0/400", 1024), "restorable_to": "0/800", "log_resumes_at": null },
                ],
            }),
            true,
        );
        let mut broken = FoundBases::default();
        broken.unusable = vec![Unusable {
            base: "b/".to_owned(),
            lsn: lsn(16),
            reason: "it is damaged".to_owned(),
        }];
        let unnamed = NamedStream {
            database: None,
            ..named
        };
        expect(
            &listed(&unnamed.of_history(history(), 2), &broken, &[]),
            &format!(
                "dr_agent_app, history {HISTORY}: base backup at 0/10 cannot be used: it is damaged\n\
                 dr_agent_app, history {HISTORY}: no base backup"
            ),
            json!({
                "database": null, "stream": "dr_agent_app", "history": HISTORY, "segments": 0, "bases": [],
                "unusable": [{ "base": "b/", "lsn": "0/10", "reason": "it is damaged" }],
            }),
            false,
        );
    }

    #[test]
    fn an_archive_without_anything_is_no_sound_one() {
        let json = |flaws: &[&str]| {
            json!({
                "database": "app", "stream": "dr_agent_app", "history": null, "bases": [], "segments": 0, "flaws": flaws,
            })
        };
        expect(
            &nothing(&named(), false),
            "app: no base backup",
            json(&[]),
            true,
        );
        expect(
            &nothing(&named(), true),
            "app: nothing is there: NOTHING CAN BE RESTORED",
            json(&["there is nothing: nothing can be restored"]),
            false,
        );
    }

    #[test]
    fn what_was_read_back_is_sound_or_its_flaws_are_named() {
        let named = named();
        let of = named.of_history(history(), 1);
        let json = |bases: usize, written_at: Option<&str>, flaws: &[&str]| {
            json!({
                "database": "app", "stream": "dr_agent_app", "history": HISTORY, "bases": bases, "segments": 4,
                "end_lsn": written_at.map(|_| "0/800"), "written_at": written_at, "flaws": flaws,
            })
        };
        let mut read = VerifiedArchive {
            bases: 1,
            segments: 4,
            end: Some((lsn(2048), Some(at("2026-01-01T02:00:00.5Z")))),
            flaws: Vec::new(),
        };
        let end = "the log up to 0/800, written at 2026-01-01T02:00:00Z";
        let written_at = Some("2026-01-01T02:00:00.5Z");
        expect(
            &verified(&of, &read),
            &format!("app: 1 base backups and 4 segments read, {end}: sound"),
            json(1, written_at, &[]),
            true,
        );
        read.flaws = vec!["one".to_owned(), "two".to_owned()];
        expect(
            &verified(&of, &read),
            &format!("app: 1 base backups and 4 segments read, {end}: DAMAGED\n  one\n  two"),
            json(1, written_at, &["one", "two"]),
            false,
        );
        let ended = VerifiedArchive {
            segments: 4,
            ..VerifiedArchive::default()
        };
        expect(
            &verified(&of, &ended),
            "app: 0 base backups and 4 segments read: it ended before its first base backup: nothing of it can be restored",
            json(0, None, &[]),
            true,
        );
    }

    #[test]
    fn what_would_be_deleted_is_shown_by_name_beforehand() {
        let went = Pruned {
            bases: vec!["b1/".to_owned()],
            leftovers: vec![],
            log: vec!["l1".to_owned(), "l2".to_owned()],
            histories: vec![],
            objects: 7,
            bytes: 2048,
        };
        let counts = "app: 1 base backups, 0 leftovers, 2 segments of the log and 0 histories that have ended";
        let json = |dry_run: bool| {
            json!({
                "database": "app", "stream": "dr_agent_app", "dry_run": dry_run,
                "deleted": {
                    "bases": ["b1/"], "leftovers": [], "log": ["l1", "l2"], "histories": [], "objects": 7, "bytes": 2048,
                },
            })
        };
        let beforehand = format!("{counts} would be deleted, 2.0 KiB\n  b1/\n  l1\n  l2");
        expect(
            &pruned(&named(), &went, true),
            &beforehand,
            json(true),
            true,
        );
        let afterwards = format!("{counts} deleted, 2.0 KiB");
        expect(
            &pruned(&named(), &went, false),
            &afterwards,
            json(false),
            true,
        );
    }
}
