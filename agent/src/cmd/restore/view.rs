//! ● A restore's plan, report and failure, as text and as JSON.
//!
//! Pure.

use serde_json::{Value, json};

use crate::error::{Classify as _, chain};
use crate::names::TableName;
use crate::replay::restore::{
    Committed, Preview, RestoreError, RestoreOptions, RestorePlan, RestoreReport, TargetStart,
};
use crate::time::{Micros, system_time};

/// As everywhere: RFC 3339, with microseconds.
pub(super) fn time(micros: Micros) -> String {
    humantime::format_rfc3339_micros(system_time(micros)).to_string()
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// The plan for people; without a line's end behind it, like all of these.
pub(super) fn plan_text(plan: &RestorePlan, options: &RestoreOptions) -> String {
    let base = format!(
        "base backup of {} at {}: {}{}",
        plan.base.as_of,
        plan.base.lsn,
        size(plan.base_bytes),
        plan.tables
            .as_ref()
            .map_or_else(String::new, |tables| format!(" of {} tables", tables.len())),
    );
    let first = match plan.start() {
        TargetStart::Empty => base,
        TargetStart::Anew => {
            format!("what an interrupted restore left in the target is removed\n  {base}")
        }
        TargetStart::Resumed(lsn) => {
            format!(
                "the target is at {lsn}, where a restore was interrupted: it continues from there"
            )
        }
    };
    format!(
        "restores {} to {}\n  {first}\n  change log from there: at most {} in {} segments, up to {}",
        options.database,
        options.moment,
        size(plan.log_bytes),
        plan.log_segments,
        plan.log_end,
    )
}

/// What `--plan` prints.
pub(super) fn preview_text(preview: &Preview, options: &RestoreOptions) -> String {
    let mut text = plan_text(&preview.plan, options);
    for warning in &preview.warnings {
        text.push_str("\n  warning: ");
        text.push_str(warning);
    }
    text
}

/// What `--plan --json` prints: stable; fields are added, never renamed or removed.
pub(super) fn preview_json(preview: &Preview, options: &RestoreOptions) -> Value {
    let Preview { plan, warnings } = preview;
    let (target, resumes_at) = match plan.start() {
        TargetStart::Empty => ("empty", None),
        TargetStart::Anew => ("begun_anew", None),
        TargetStart::Resumed(lsn) => ("resumed", Some(lsn.to_string())),
    };
    let names = |tables: &Vec<TableName>| tables.iter().map(TableName::sql).collect::<Vec<_>>();
    json!({
        "database": options.database,
        "moment": options.moment.to_string(),
        "target": target,
        "resumes_at": resumes_at,
        "tables": plan.tables.as_ref().map(names),
        "base_lsn": plan.base.lsn.to_string(),
        "base_time": plan.base.as_of.to_string(),
        "base_bytes": plan.base_bytes,
        "log_bytes": plan.log_bytes,
        "log_segments": plan.log_segments,
        "log_end_lsn": plan.log_end.to_string(),
        "warnings": warnings,
    })
}

fn committed(transaction: &Committed) -> String {
    format!(
        "{}, committed at {} ({})",
        transaction.xid,
        time(transaction.commit_time),
        transaction.commit_lsn
    )
}

/// The report for people.
pub(super) fn report_text(report: &RestoreReport) -> String {
    let mut lines = vec![format!(
        "restored from the base backup at {}, up to {}",
        report.base, report.end_lsn
    )];
    lines.push(match report.commit_time {
        Some(at) => format!("the last transaction committed at {}", time(at)),
        None => "nothing was committed after the base backup".to_owned(),
    });
    let transactions = [
        ("the last one that changed a table", &report.last_change),
        ("the first one that was left out", &report.beyond),
        (
            "the first one that was left out and changed a table",
            &report.change_beyond,
        ),
    ];
    for (which, transaction) in transactions {
        if let Some(transaction) = transaction {
            lines.push(format!("{which}: {}", committed(transaction)));
        }
    }
    lines.push(format!(
        "{} transactions replayed, {} sequences set ahead",
        report.transactions, report.sequences
    ));
    match report.warnings.len() {
        0 => {}
        1 => {
            lines.push("one thing is missing or needs attention: see the warning above".to_owned());
        }
        n => lines.push(format!(
            "{n} things are missing or need attention: see the warnings above"
        )),
    }
    lines.join("\n  ")
}

fn committed_json(transaction: &Committed) -> Value {
    json!({
        "xid": transaction.xid,
        "commit_lsn": transaction.commit_lsn.to_string(),
        "commit_time": time(transaction.commit_time),
    })
}

/// The report for programs: stable as [`preview_json`] is.
pub(super) fn report_json(report: &RestoreReport) -> Value {
    let beyond = report.beyond.as_ref();
    json!({
        "outcome": "restored",
        "base_lsn": report.base.to_string(),
        "end_lsn": report.end_lsn.to_string(),
        "commit_time": report.commit_time.map(time),
        "last_change": report.last_change.as_ref().map(committed_json),
        "left_out_lsn": beyond.map(|beyond| beyond.commit_lsn.to_string()),
        "left_out_commit_time": beyond.map(|beyond| time(beyond.commit_time)),
        "left_out_xid": beyond.map(|beyond| beyond.xid),
        "left_out_change": report.change_beyond.as_ref().map(committed_json),
        "transactions": report.transactions,
        "sequences": report.sequences,
        "warnings": report.warnings,
    })
}

/// What is printed as JSON where there is no report.
pub(super) fn failure_json(error: &RestoreError) -> Value {
    json!({ "outcome": "failed", "error": chain(error), "hint": error.hint() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::PgLsn;
    use crate::replay::restore::{RestoreMoment, example_options, example_plan};

    fn preview(start: TargetStart) -> Preview {
        Preview {
            plan: example_plan(start),
            warnings: vec!["large objects".to_owned()],
        }
    }

    #[test]
    fn a_plan_says_what_becomes_of_the_target() {
        let options = example_options(RestoreMoment::End);
        let base = "base backup of 2000-01-01T00:00:00.00003Z at 0/12C: 213 B";
        let log = "change log from there: at most 300 B in 2 segments, up to 0/1F4";
        let cases = [
            (TargetStart::Empty, format!("{base}\n  {log}")),
            (
                TargetStart::Anew,
                format!(
                    "what an interrupted restore left in the target is removed\n  {base}\n  {log}"
                ),
            ),
            (
                TargetStart::Resumed(PgLsn::from(400)),
                "the target is at 0/190, where a restore was interrupted: it continues from there\n  \
                 change log from there: at most 150 B in 1 segments, up to 0/1F4"
                    .to_owned(),
            ),
        ];
        for (start, expected) in cases {
            assert_eq!(
                preview_text(&preview(start), &options),
                format!(
                    "restores app to the end of the archive\n  {expected}\n  warning: large objects"
                )
            );
        }
    }

    #[test]
    fn the_json_of_a_plan_keeps_its_shape() {
        let options = example_options(RestoreMoment::Lsn(PgLsn::from(450)));
        assert_eq!(
            preview_json(&preview(TargetStart::Resumed(PgLsn::from(400))), &options),
            json!({
                "database": "app", "moment": "0/1C2", "target": "resumed", "resumes_at": "0/190", "tables": null,
                "base_lsn": "0/12C", "base_time": "2000-01-01T00:00:00.00003Z", "base_bytes": 0,
                "log_bytes": 150, "log_segments": 1, "log_end_lsn": "0/1F4", "warnings": ["large objects"],
            })
        );
        for (start, word) in [
            (TargetStart::Empty, "empty"),
            (TargetStart::Anew, "begun_anew"),
        ] {
            let json = preview_json(&preview(start), &options);
            assert_eq!(
                (&json["target"], &json["resumes_at"]),
                (&json!(word), &Value::Null)
            );
        }
        let mut part = preview(TargetStart::Empty);
        part.plan.tables = Some(vec![TableName {
            schema: "public".to_owned(),
            name: "T".to_owned(),
        }]);
        assert_eq!(
            preview_json(&part, &options)["tables"],
            json!(["\"public\".\"T\""])
        );
        assert!(preview_text(&part, &options).contains("213 B of 1 tables\n"));
    }

    fn committed(xid: u32) -> Committed {
        Committed {
            xid,
            commit_lsn: PgLsn::from(u64::from(xid) * 16),
            commit_time: Micros::from(xid),
        }
    }

    fn report() -> RestoreReport {
        RestoreReport {
            base: PgLsn::from(256),
            end_lsn: PgLsn::from(512),
            commit_time: Some(2),
            last_change: Some(committed(1)),
            beyond: Some(committed(3)),
            change_beyond: Some(committed(4)),
            transactions: 5,
            sequences: 6,
            warnings: vec!["a view".to_owned()],
        }
    }

    #[test]
    fn a_report_names_the_last_transaction_and_the_first_that_is_left_out() {
        assert_eq!(
            report_text(&report()),
            "restored from the base backup at 0/100, up to 0/200\n  \
             the last transaction committed at 2000-01-01T00:00:00.000002Z\n  \
             the last one that changed a table: 1, committed at 2000-01-01T00:00:00.000001Z (0/10)\n  \
             the first one that was left out: 3, committed at 2000-01-01T00:00:00.000003Z (0/30)\n  \
             the first one that was left out and changed a table: 4, committed at 2000-01-01T00:00:00.000004Z (0/40)\n  \
             5 transactions replayed, 6 sequences set ahead\n  \
             one thing is missing or needs attention: see the warning above"
        );
        assert_eq!(
            report_json(&report()),
            json!({
                "outcome": "restored", "base_lsn": "0/100", "end_lsn": "0/200",
                "commit_time": "2000-01-01T00:00:00.000002Z",
                "last_change": { "xid": 1, "commit_lsn": "0/10", "commit_time": "2000-01-01T00:00:00.000001Z" },
                "left_out_lsn": "0/30", "left_out_commit_time": "2000-01-01T00:00:00.000003Z", "left_out_xid": 3,
                "left_out_change": { "xid": 4, "commit_lsn": "0/40", "commit_time": "2000-01-01T00:00:00.000004Z" },
                "transactions": 5, "sequences": 6, "warnings": ["a view"],
            })
        );
        let quiet = RestoreReport {
            commit_time: None,
            last_change: None,
            beyond: None,
            change_beyond: None,
            transactions: 0,
            warnings: Vec::new(),
            ..report()
        };
        assert_eq!(
            report_text(&quiet),
            "restored from the base backup at 0/100, up to 0/200\n  nothing was committed after the base backup\n  \
             0 transactions replayed, 6 sequences set ahead"
        );
        let json = report_json(&quiet);
        for key in [
            "commit_time",
            "last_change",
            "left_out_lsn",
            "left_out_xid",
            "left_out_change",
        ] {
            assert_eq!(json.get(key), Some(&Value::Null), "{key}");
        }
    }

    #[test]
    fn a_failure_says_what_to_do() {
        assert_eq!(
            failure_json(&RestoreError::NoArchive),
            json!({
                "outcome": "failed", "error": "there is no [archive] in the configuration",
                "hint": "write [archive] with its url",
            })
        );
    }
}
