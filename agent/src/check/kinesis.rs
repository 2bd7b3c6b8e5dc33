//! Route `kinesis`: whether the streams are there, can be written and read, and keep records for long enough.
//!
//! # Invariants
//! - Nothing is put into a stream: see [`Kinesis::try_putting`].
//! - A right is an error only where nothing but its command can run: `run` puts, `apply` and `promote` read, and each side's
//!   role may have only what its own command needs.
//!
//! # What it does not do
//! It does not try the KMS key for writing. It does not measure how much the streams carry.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};

use super::finding::{Finding, FindingPlace, FindingSide, Severity, counted, some_of};
use super::reachability::Reach;
use crate::cloud::kinesis::{Kinesis, KinesisError, Refusal, StreamSummary};
use crate::config::Config;
use crate::error::{Classify as _, chain};

/// For all that is asked of one stream. The SDK alone would try longer.
const STREAM_WITHIN: Duration = Duration::from_secs(30);

/// Streams that are asked for at the same time; AWS allows few descriptions in a second.
const AT_A_TIME: usize = 4;

/// From Friday evening to Monday morning, and some hours to mend things.
const WEEKEND: Duration = Duration::from_secs(72 * HOUR);

/// What every stream keeps at least. Source: developer guide, "Changing the data retention period".
const RETENTION_MIN: Duration = Duration::from_secs(24 * HOUR);

const HOUR: u64 = 3600;

/// Looks at the stream of every database.
pub(super) async fn look(config: &Config, reach: Reach, databases: &[String]) -> Vec<Finding> {
    let mut streams: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for database in databases {
        if let Some(stream) = config.route.kinesis_stream(database) {
            streams.entry(stream).or_default().push(database);
        }
    }
    let looks = streams.iter().map(|(stream, databases)| async move {
        let look = Box::pin(one(config, reach, stream, databases));
        let found = tokio::time::timeout(STREAM_WITHIN, look).await;
        found.unwrap_or_else(|_| {
            let text = format!("no answer within {STREAM_WITHIN:?}");
            let finding = at().error("kinesis_stream", text).on(stream);
            vec![finding.hint("check DNS, firewall and AWS_ENDPOINT_URL")]
        })
    });
    let found: Vec<Vec<Finding>> = stream::iter(looks).buffered(AT_A_TIME).collect().await;
    found.concat()
}

fn at() -> FindingPlace {
    FindingPlace::server(FindingSide::Agent)
}

async fn one(config: &Config, reach: Reach, stream: &str, databases: &[&String]) -> Vec<Finding> {
    let kinesis = match Kinesis::open(stream).await {
        Ok(kinesis) => kinesis,
        Err(error) => return vec![failed("kinesis_stream", Severity::Error, &error).on(stream)],
    };
    let mut findings = match kinesis.describe().await {
        Ok(summary) => judge(config, stream, databases, summary),
        // Only `check` and `status` ask this.
        Err(error) if error.refusal() == Some(Refusal::Denied) => {
            vec![failed("kinesis_stream", Severity::Warning, &error)]
        }
        Err(error) => return vec![failed("kinesis_stream", Severity::Error, &error).on(stream)],
    };
    let written = kinesis.try_putting().await;
    let read = kinesis.try_reading().await;
    findings.extend(rights(reach, written.err().as_ref(), &read));
    findings.into_iter().map(|found| found.on(stream)).collect()
}

fn failed(code: &'static str, severity: Severity, error: &KinesisError) -> Finding {
    let finding = at().finding(severity, code, chain(error));
    match error.hint() {
        Some(hint) => finding.hint(hint),
        None => finding,
    }
}

/// What the stream is like.
fn judge(
    config: &Config,
    stream: &str,
    databases: &[&String],
    summary: StreamSummary,
) -> Vec<Finding> {
    let state = if summary.active {
        at().ok("kinesis_stream", "is active")
    } else {
        at().error("kinesis_stream", "is being created or deleted")
            .hint("wait until it is ACTIVE; a stream that was deleted must be created again")
    };
    vec![
        state,
        retention(config, stream, summary.retention),
        shards(databases, summary.open_shards),
        encryption(stream, summary.encrypted),
    ]
}

/// What is older than that is gone from the stream.
fn retention(config: &Config, stream: &str, kept: Duration) -> Finding {
    let hours = kept.as_secs() / HOUR;
    let code = "kinesis_retention";
    let archive = config.archive.is_some();
    let text = format!(
        "records are kept for {hours} h: the replica or dr-agent apply may be away for so long, then {}",
        if archive {
            "the archive must fill in what is gone"
        } else {
            "changes are lost, and every table has to be copied again"
        }
    );
    let needed = WEEKEND.max(config.objectives.rpo);
    let finding = match () {
        () if kept >= needed => return at().ok(code, text),
        () if archive && kept >= RETENTION_MIN => at().note(code, text),
        () => at().warning(code, text),
    };
    finding.hint(format!(
        "for a weekend: aws kinesis increase-stream-retention-period --stream-name {stream} \
         --retention-period-hours {}",
        needed
            .as_secs()
            .div_ceil(HOUR)
            .max(WEEKEND.as_secs() / HOUR)
    ))
}

/// What they carry. However many databases share them, a process reads each four times a second, where Kinesis allows five.
fn shards(databases: &[&String], open: u32) -> Finding {
    let text = format!(
        "{} take {open} MB/s and give {} MB/s",
        counted(open as usize, "open shard"),
        u64::from(open) * 2
    );
    at().ok(
        "kinesis_shards",
        match databases {
            [_] => text,
            _ => format!(
                "{text}; {} share them and one reader in apply ({})",
                counted(databases.len(), "database"),
                some_of(databases)
            ),
        },
    )
}

fn encryption(stream: &str, encrypted: bool) -> Finding {
    let code = "kinesis_encryption";
    if encrypted {
        return at().ok(
            code,
            "SSE-KMS; the key was not tried for writing: dr-agent run needs kms:GenerateDataKey",
        );
    }
    at().note(code, "Kinesis does not encrypt what it keeps")
        .hint(format!(
            "aws kinesis start-stream-encryption --stream-name {stream} --encryption-type KMS --key-id …; then \
             dr-agent run needs kms:GenerateDataKey, dr-agent apply and promote kms:Decrypt"
        ))
}

/// What was refused, as badly as it is from here.
fn rights(reach: Reach, written: Option<&KinesisError>, read: &[KinesisError]) -> Vec<Finding> {
    let (writes, reads) = (written.is_none(), read.is_empty());
    let mut findings = Vec::new();
    match written {
        None => findings.push(at().ok(
            "kinesis_write",
            "PutRecords is allowed: a record that no shard can take was refused for that alone",
        )),
        // It was put.
        Some(error) if error.refusal().is_none() => {
            findings.push(failed("kinesis_write", Severity::Warning, error));
        }
        Some(error) => {
            let severity = severity(error, reach.source, reach.replica && reads);
            findings.push(of(
                "kinesis_write",
                severity,
                error,
                "dr-agent run, beside the source,",
            ));
        }
    }
    for error in read {
        let severity = severity(error, reach.replica, reach.source && writes);
        findings.push(of(
            "kinesis_read",
            severity,
            error,
            "dr-agent apply and promote, beside the replica,",
        ));
    }
    if reads {
        findings.push(at().ok("kinesis_read", "shards can be listed and read"));
    }
    findings
}

/// `here`: the database of the command that needs it can be reached; `other`: so can the other's, and its command works.
fn severity(error: &KinesisError, here: bool, other: bool) -> Severity {
    let is_a_right = error.refusal().is_some_and(Refusal::is_a_right);
    match (is_a_right, here, other) {
        (false, ..) | (true, true, false) => Severity::Error,
        (true, true, true) => Severity::Warning,
        // Where no database can be reached nobody knows where this is.
        (true, false, false) => Severity::Error,
        (true, false, true) => Severity::Note,
    }
}

fn of(code: &'static str, severity: Severity, error: &KinesisError, who: &str) -> Finding {
    let finding = failed(code, severity, error);
    let why = match severity {
        Severity::Error => return finding,
        Severity::Warning => format!("; {who} cannot work with these credentials"),
        _ => format!("; {who} needs it: not here, it seems"),
    };
    let message = format!("{}{why}", finding.message);
    Finding { message, ..finding }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::kinesis::KinesisOperation;

    fn config(more: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\ndatabases = [\"app\", \"shop\"]\n[replica]\n\
             url = \"postgres://b@localhost/y\"\n[route]\nkind = \"kinesis\"\nstream = \"s\"\n{more}"
        );
        Config::parse("f", &text, []).unwrap()
    }

    const ARCHIVE: &str = "[archive]\nurl = \"file:///nowhere/at/all\"\n";

    fn summary(hours: u64) -> StreamSummary {
        StreamSummary {
            open_shards: 3,
            retention: Duration::from_secs(hours * HOUR),
            active: true,
            encrypted: true,
        }
    }

    fn refused(operation: KinesisOperation, refusal: Refusal) -> KinesisError {
        KinesisError::Refused {
            operation,
            stream: "s".to_owned(),
            refusal,
            said: "as planned".to_owned(),
        }
    }

    #[test]
    fn a_retention_shorter_than_a_weekend_is_worse_without_an_archive() {
        let found = |more: &str, hours| {
            let config = config(more);
            let finding = retention(&config, "s", summary(hours).retention);
            assert!(finding.message.contains(&format!("{hours} h")));
            (finding.severity, finding.hint)
        };
        let (severity, hint) = found("", 24);
        assert_eq!(severity, Severity::Warning);
        assert!(hint.unwrap().contains("--retention-period-hours 72"));
        assert_eq!(found(ARCHIVE, 24).0, Severity::Note);
        assert_eq!(found(ARCHIVE, 23).0, Severity::Warning);
        assert_eq!(found("", 72), (Severity::Ok, None));
        let (severity, hint) = found("[objectives]\nrpo = \"100h\"\n", 72);
        assert_eq!(severity, Severity::Warning);
        assert!(hint.unwrap().contains("hours 100"));
    }

    #[test]
    fn databases_that_share_a_stream_are_named() {
        let (app, shop) = ("app".to_owned(), "shop".to_owned());
        assert!(!shards(&[&app], 3).message.contains("share"));
        let finding = shards(&[&app, &shop], 3);
        assert_eq!(finding.severity, Severity::Ok);
        assert!(
            finding.message.contains("2 databases share them"),
            "{}",
            finding.message
        );
    }

    #[test]
    fn a_stream_that_is_not_active_is_an_error_and_one_in_the_clear_a_note() {
        let app = "app".to_owned();
        let mut said = summary(72);
        (said.active, said.encrypted) = (false, false);
        let found = judge(&config(""), "s", &[&app], said);
        let found: Vec<_> = found.iter().map(|f| (f.severity, f.code)).collect();
        assert_eq!(found[0], (Severity::Error, "kinesis_stream"));
        assert_eq!(found[3], (Severity::Note, "kinesis_encryption"));
    }

    #[test]
    fn a_right_is_an_error_where_only_its_command_can_run() {
        let put = refused(KinesisOperation::PutRecords, Refusal::Denied);
        let get = refused(KinesisOperation::GetRecords, Refusal::Denied);
        let found = |source, replica, written: Option<&KinesisError>, read: &[KinesisError]| {
            let found = rights(Reach { source, replica }, written, read);
            found.iter().map(|f| f.severity).collect::<Vec<_>>()
        };
        use Severity::{Error, Note, Ok, Warning};
        assert_eq!(found(true, true, None, &[]), [Ok, Ok]);
        // Beside the source, beside the replica, and where both are seen.
        assert_eq!(found(true, false, Some(&put), &[]), [Error, Ok]);
        assert_eq!(found(false, true, Some(&put), &[]), [Note, Ok]);
        assert_eq!(found(true, true, Some(&put), &[]), [Warning, Ok]);
        let get = [get];
        assert_eq!(found(false, true, None, &get), [Ok, Error]);
        assert_eq!(found(true, false, None, &get), [Ok, Note]);
        assert_eq!(found(true, true, Some(&put), &get), [Error, Error]);
        let away = refused(KinesisOperation::PutRecords, Refusal::Unavailable);
        assert_eq!(found(false, true, Some(&away), &[]), [Error, Ok]);
    }
}
