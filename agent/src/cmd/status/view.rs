//! ● What `dr-agent status` prints, for people and for programs.
//!
//! Pure: what the clock says is an argument.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;

use super::agent::SEND;
use crate::watch::coverage::Coverage;

/// Names of a kind that are shown; the JSON has more.
const NAMES_SHOWN: usize = 5;

/// What `status --json` prints: stable; fields are added, never renamed or removed. `null` is "unknown".
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Overview {
    /// Of the program that printed it.
    pub version: String,
    /// `objectives.rpo`.
    pub rpo_objective_seconds: f64,
    /// Whether every database is known to be within it: on the replica, or, where that is out of reach and an agent sends
    /// from here, in the stream.
    pub within_rpo: bool,
    /// The replica.
    pub replica: Witness,
    /// The running agent.
    pub agent: Witness,
    /// In name order.
    pub databases: Vec<DatabaseOverview>,
}

/// Whether one of the parties answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Witness {
    /// Where it was asked.
    pub address: String,
    /// Whether it answered.
    pub answers: bool,
    /// Why not.
    pub error: Option<String>,
}

/// Whether a database is within the RPO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RpoVerdict {
    /// It is.
    Met,
    /// It is not, or the replica could not be promoted.
    Breached,
    /// Nobody who knows answers.
    Unknown,
    /// It was promoted: nothing replicates it any more.
    Promoted,
}

/// One database.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct DatabaseOverview {
    /// Its name.
    pub database: String,
    /// Its stream.
    pub stream: String,
    /// What part of the way the agent goes that answers for it: `direct`, `send` or `apply`.
    pub leg: Option<String>,
    /// The agent's state of it, `promoted`, `missing`, or `no_agent` where no agent answers for it.
    pub state: String,
    /// Since when the agent is in it.
    pub since: Option<String>,
    /// What a session of the agent waits for, on either server.
    pub waits_for: Option<String>,
    /// Tables that are not protected for now, and why.
    pub set_aside: BTreeMap<String, String>,
    /// Foreign keys and partitions that the replica refuses, and why.
    pub missing_constraints: BTreeMap<String, String>,
    /// Whether it is within the RPO.
    pub rpo: RpoVerdict,
    /// Why it is not, where that is not plain from the lag.
    pub reason: Option<String>,
    /// As the agent measures it; without an agent the age of the last applied commit, an upper bound.
    pub lag_seconds: Option<f64>,
    /// WAL the replica does not have.
    pub lag_bytes: Option<u64>,
    /// WAL the source keeps for us.
    pub slot_retained_bytes: Option<u64>,
    /// Fencing token on the replica.
    pub term: Option<i64>,
    /// Number of the last applied batch.
    pub batch: Option<i64>,
    /// First byte after the last applied transaction.
    pub end_lsn: Option<String>,
    /// Its commit time on the source's clock.
    pub commit_time: Option<String>,
    /// State of the promotion, where one has begun.
    pub promotion: Option<String>,
    /// Tables whose initial copy is not complete.
    pub tables_not_ready: Option<i64>,
    /// What a failover would bring, and what not, as the replica knows it; null where it does not answer.
    pub coverage: Option<Coverage>,
    /// What the agent complains of.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// The archive, where one is configured.
    pub archive: Option<ArchiveStatus>,
    /// Its Kinesis stream, under route `kinesis`.
    pub kinesis: Option<KinesisStatus>,
}

/// The archive of one database; `null` is "unknown".
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct ArchiveStatus {
    /// Base backups; none can be restored from before the first.
    pub bases: Option<usize>,
    /// Base backups that nobody can restore from now: their manifests are damaged, or cannot be read.
    pub unusable_bases: Option<usize>,
    /// Position of the newest base backup.
    pub base_lsn: Option<String>,
    /// What it is as of, on the source's clock.
    pub base_as_of: Option<String>,
    /// Where the log in the store ends.
    pub log_end_lsn: Option<String>,
    /// When the store took that end, on its own clock.
    pub log_written_at: Option<String>,
    /// What is missing from the log behind the oldest base backup.
    pub gaps: Option<Vec<LogGap>>,
    /// Bytes of the log that wait on this machine for the store; unknown where there is no spool.
    pub spool_bytes: Option<u64>,
    /// Why something is unknown.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

/// A stretch of the log that the store does not have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct LogGap {
    /// Where the log breaks off.
    pub from_lsn: String,
    /// Where it goes on. Only a base backup from there on leads further.
    pub to_lsn: String,
}

/// The Kinesis stream of one database; `null` is "unknown".
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct KinesisStatus {
    /// Its name.
    pub stream: String,
    /// It takes records and can be read.
    pub active: Option<bool>,
    /// Shards that take records.
    pub open_shards: Option<u32>,
    /// So long a record can be read.
    pub retention_hours: Option<u64>,
    /// Why something is unknown.
    pub error: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Overview {
    /// The status for programs.
    pub(super) fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self)
            .expect("plain data with text keys always serializes");
        text.push('\n');
        text
    }

    /// The status for people; `now` is this machine's clock.
    pub(super) fn text(&self, now: Timestamp) -> String {
        let mut out = String::new();
        let sent = !self.replica.answers && self.databases.iter().any(DatabaseOverview::is_sent);
        let word = match (self.within_rpo, sent) {
            (true, false) => "met",
            (true, true) => {
                "met as far as the Kinesis stream; ask beside the replica about the rest"
            }
            (false, _) => "NOT met, or not known to be",
        };
        let _ = writeln!(out, "RPO of {} s: {word}", self.rpo_objective_seconds);
        for (name, witness) in [("replica", &self.replica), ("agent", &self.agent)] {
            let answer = match &witness.error {
                None => "answers".to_owned(),
                Some(error) if sent && name == "replica" => {
                    format!("out of reach from here: {error}")
                }
                Some(error) => format!("DOES NOT ANSWER: {error}"),
            };
            let _ = writeln!(out, "{name:<8} {}: {answer}", witness.address);
        }
        if self.databases.is_empty() {
            let _ = writeln!(out, "no database is known to be replicated");
        }
        for status in &self.databases {
            status.write_text(&mut out, now);
        }
        out
    }
}

impl DatabaseOverview {
    /// The agent that answers for it puts it into a Kinesis stream.
    pub(super) fn is_sent(&self) -> bool {
        self.leg.as_deref() == Some(SEND)
    }

    fn write_text(&self, out: &mut String, now: Timestamp) {
        let verdict = match self.rpo {
            RpoVerdict::Met => "RPO met",
            RpoVerdict::Breached => "RPO BREACHED",
            RpoVerdict::Unknown => "RPO UNKNOWN",
            RpoVerdict::Promoted => "PROMOTED",
        };
        let lag = self
            .lag_seconds
            .map_or("unknown".to_owned(), |lag| format!("{lag:.2} s"));
        let bytes = self
            .lag_bytes
            .map_or(String::new(), |bytes| format!(", {bytes} bytes"));
        let way = match self.is_sent() && self.end_lsn.is_none() {
            true => "   (into the stream)",
            false => "",
        };
        let _ = writeln!(
            out,
            "\n{:<20} {verdict}   {}   lag {lag}{bytes}{way}",
            self.database, self.state
        );
        if let (Some(end_lsn), Some(term), Some(batch)) = (&self.end_lsn, self.term, self.batch) {
            let commit = self.commit_time.as_deref().unwrap_or("no transaction yet");
            let _ = writeln!(
                out,
                "  applied up to {end_lsn} ({commit}), batch {batch}, term {term}"
            );
        }
        if let Some(coverage) = &self.coverage {
            let _ = writeln!(out, "  protected: {}", coverage.verdict());
            for one in &coverage.missing {
                let _ = writeln!(out, "    not protected: {}", one.text(NAMES_SHOWN));
            }
            if let Some(text) = coverage.comparison() {
                let _ = writeln!(out, "    {text}");
            }
        }
        if let Some(promotion) = &self.promotion {
            let _ = writeln!(out, "  promotion: {promotion}");
        }
        if let Some(bytes) = self.slot_retained_bytes {
            let _ = writeln!(out, "  the source keeps {bytes} bytes of WAL for it");
        }
        if let Some(since) = &self.since {
            let _ = writeln!(out, "  {} since {since}", self.state);
        }
        for (label, text) in [
            ("", &self.reason),
            ("", &self.waits_for),
            ("error: ", &self.error),
            ("hint: ", &self.hint),
        ] {
            if let Some(text) = text {
                let _ = writeln!(out, "  {label}{text}");
            }
        }
        for (table, reason) in &self.set_aside {
            let _ = writeln!(out, "  set aside, not protected: {table}: {reason}");
        }
        for (what, reason) in &self.missing_constraints {
            let _ = writeln!(
                out,
                "  missing on the replica, tried again: {what}: {reason}"
            );
        }
        if let Some(kinesis) = &self.kinesis {
            kinesis.write_text(out);
        }
        if let Some(archive) = &self.archive {
            archive.write_text(out, now);
        }
    }
}

impl ArchiveStatus {
    fn write_text(&self, out: &mut String, now: Timestamp) {
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  archive: DOES NOT ANSWER: {error}");
        }
        if self.bases == Some(0) {
            let _ = writeln!(
                out,
                "  archive: NO BASE BACKUP: nothing can be restored yet"
            );
        }
        if let Some(unusable) = self.unusable_bases.filter(|unusable| *unusable > 0) {
            let _ = writeln!(
                out,
                "  archive: {unusable} base backups that CANNOT BE USED; `dr-agent backup --list` names them"
            );
        }
        if let (Some(lsn), Some(as_of)) = (&self.base_lsn, &self.base_as_of) {
            let _ = writeln!(out, "  archive: newest base backup as of {as_of} at {lsn}");
        }
        if let Some(end) = &self.log_end_lsn {
            let written = self.log_written_at.as_deref();
            let age = written
                .and_then(|at| at.parse::<Timestamp>().ok())
                .map_or(String::new(), |at| {
                    format!(", written {} s ago", now.duration_since(at).as_secs())
                });
            let _ = writeln!(out, "  archive: the log reaches {end}{age}");
        }
        for gap in self.gaps.iter().flatten() {
            let _ = writeln!(
                out,
                "  archive: GAP in the log from {} to {}: a restore across it needs a base backup taken behind it",
                gap.from_lsn, gap.to_lsn
            );
        }
        match self.spool_bytes {
            Some(bytes) => {
                let bytes = bytesize::ByteSize(bytes).display().iec();
                let _ = writeln!(out, "  archive: {bytes} wait in the spool for the store");
            }
            None => {
                let _ = writeln!(out, "  archive: there is no spool on this machine");
            }
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "  hint: {hint}");
        }
    }
}

impl KinesisStatus {
    fn write_text(&self, out: &mut String) {
        if let (Some(active), Some(shards), Some(hours)) =
            (self.active, self.open_shards, self.retention_hours)
        {
            let _ = writeln!(
                out,
                "  kinesis: stream {} {}, {shards} open {}, keeps records for {hours} h",
                self.stream,
                if active { "is active" } else { "is NOT ACTIVE" },
                if shards == 1 { "shard" } else { "shards" }
            );
        }
        if let Some(error) = &self.error {
            let _ = writeln!(out, "  kinesis: DOES NOT ANSWER: {error}");
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "  hint: {hint}");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:01:00Z".parse().unwrap()
    }

    fn database(rpo: RpoVerdict, state: &str) -> DatabaseOverview {
        DatabaseOverview {
            database: "app".to_owned(),
            stream: "dr_agent_app".to_owned(),
            leg: None,
            state: state.to_owned(),
            since: None,
            waits_for: None,
            set_aside: BTreeMap::new(),
            missing_constraints: BTreeMap::new(),
            rpo,
            reason: None,
            lag_seconds: None,
            lag_bytes: None,
            slot_retained_bytes: None,
            term: None,
            batch: None,
            end_lsn: None,
            commit_time: None,
            promotion: None,
            tables_not_ready: None,
            coverage: None,
            error: None,
            hint: None,
            archive: None,
            kinesis: None,
        }
    }

    fn streaming() -> DatabaseOverview {
        DatabaseOverview {
            leg: Some("direct".to_owned()),
            since: Some("2026-01-01T00:00:00Z".to_owned()),
            lag_seconds: Some(0.125),
            lag_bytes: Some(42),
            slot_retained_bytes: Some(4096),
            term: Some(1),
            batch: Some(7),
            end_lsn: Some("0/3E8".to_owned()),
            commit_time: Some("2026-01-01T00:00:59Z".to_owned()),
            tables_not_ready: Some(0),
            ..database(RpoVerdict::Met, "streaming")
        }
    }

    fn status(
        within_rpo: bool,
        replica: Option<&str>,
        databases: Vec<DatabaseOverview>,
    ) -> Overview {
        let witness = |address: &str, error: Option<&str>| Witness {
            address: address.to_owned(),
            answers: error.is_none(),
            error: error.map(ToOwned::to_owned),
        };
        Overview {
            version: "9.9".to_owned(),
            rpo_objective_seconds: 30.0,
            within_rpo,
            replica: witness("replica:5432", replica),
            agent: witness("127.0.0.1:9187", None),
            databases,
        }
    }

    #[test]
    fn a_database_that_streams_is_shown_with_its_numbers() {
        assert_eq!(
            status(true, None, vec![streaming()]).text(now()),
            "RPO of 30 s: met\nreplica  replica:5432: answers\nagent    127.0.0.1:9187: answers\n\n\
             app                  RPO met   streaming   lag 0.12 s, 42 bytes\n  \
             applied up to 0/3E8 (2026-01-01T00:00:59Z), batch 7, term 1\n  \
             the source keeps 4096 bytes of WAL for it\n  streaming since 2026-01-01T00:00:00Z\n"
        );
    }

    #[test]
    fn what_is_wrong_with_a_database_is_shown_below_it() {
        let wrong = DatabaseOverview {
            set_aside: BTreeMap::from([("public.t".to_owned(), "a view".to_owned())]),
            missing_constraints: BTreeMap::from([("k on t".to_owned(), "a row".to_owned())]),
            reason: Some("nothing replicates it".to_owned()),
            waits_for: Some("a lock".to_owned()),
            error: Some("no".to_owned()),
            hint: Some("do".to_owned()),
            promotion: Some("fenced".to_owned()),
            term: Some(2),
            batch: Some(0),
            end_lsn: Some("0/0".to_owned()),
            ..database(RpoVerdict::Breached, "stopped")
        };
        assert_eq!(
            status(false, Some("refused"), vec![wrong]).text(now()),
            "RPO of 30 s: NOT met, or not known to be\nreplica  replica:5432: DOES NOT ANSWER: refused\n\
             agent    127.0.0.1:9187: answers\n\n\
             app                  RPO BREACHED   stopped   lag unknown\n  \
             applied up to 0/0 (no transaction yet), batch 0, term 2\n  promotion: fenced\n  \
             nothing replicates it\n  a lock\n  error: no\n  hint: do\n  \
             set aside, not protected: public.t: a view\n  \
             missing on the replica, tried again: k on t: a row\n"
        );
    }

    #[test]
    fn beside_the_source_the_verdict_is_about_the_stream() {
        let mut sent = database(RpoVerdict::Met, "streaming");
        sent.leg = Some(SEND.to_owned());
        sent.lag_seconds = Some(1.0);
        sent.kinesis = Some(KinesisStatus {
            stream: "changes".to_owned(),
            active: Some(true),
            open_shards: Some(1),
            retention_hours: Some(24),
            ..KinesisStatus::default()
        });
        assert_eq!(
            status(true, Some("no route"), vec![sent]).text(now()),
            "RPO of 30 s: met as far as the Kinesis stream; ask beside the replica about the rest\n\
             replica  replica:5432: out of reach from here: no route\nagent    127.0.0.1:9187: answers\n\n\
             app                  RPO met   streaming   lag 1.00 s   (into the stream)\n  \
             kinesis: stream changes is active, 1 open shard, keeps records for 24 h\n"
        );
        let away = KinesisStatus {
            stream: "changes".to_owned(),
            error: Some("denied".to_owned()),
            hint: Some("allow it".to_owned()),
            ..KinesisStatus::default()
        };
        let mut text = String::new();
        away.write_text(&mut text);
        assert_eq!(
            text,
            "  kinesis: DOES NOT ANSWER: denied\n  hint: allow it\n"
        );
    }

    #[test]
    fn no_database_is_said_and_is_not_health() {
        assert_eq!(
            status(false, None, vec![]).text(now()),
            "RPO of 30 s: NOT met, or not known to be\nreplica  replica:5432: answers\n\
             agent    127.0.0.1:9187: answers\nno database is known to be replicated\n"
        );
    }

    #[test]
    fn the_json_has_every_key_whatever_is_known() {
        let known = status(true, None, vec![streaming()]);
        let json: Value = serde_json::from_str(&known.json()).unwrap();
        assert_eq!(
            json,
            json!({
                "version": "9.9", "rpo_objective_seconds": 30.0, "within_rpo": true,
                "replica": { "address": "replica:5432", "answers": true, "error": null },
                "agent": { "address": "127.0.0.1:9187", "answers": true, "error": null },
                "databases": [{
                    "database": "app", "stream": "dr_agent_app", "leg": "direct", "state": "streaming",
                    "since": "2026-01-01T00:00:00Z", "waits_for": null, "set_aside": {}, "missing_constraints": {},
                    "rpo": "met", "reason": null, "lag_seconds": 0.125, "lag_bytes": 42, "slot_retained_bytes": 4096,
                    "term": 1, "batch": 7, "end_lsn": "0/3E8", "commit_time": "2026-01-01T00:00:59Z", "promotion": null,
                    "tables_not_ready": 0, "coverage": null, "error": null, "hint": null, "archive": null, "kinesis": null,
                }],
            })
        );
        assert!(known.json().ends_with("}\n"));
        let mut more = database(RpoVerdict::Unknown, "no_agent");
        more.archive = Some(ArchiveStatus::default());
        more.kinesis = Some(KinesisStatus::default());
        let json = serde_json::to_value(&more).unwrap();
        assert_eq!(json["rpo"], "unknown");
        assert_eq!(
            json["archive"],
            json!({
                "bases": null, "unusable_bases": null, "base_lsn": null, "base_as_of": null, "log_end_lsn": null,
                "log_written_at": null, "gaps": null, "spool_bytes": null, "error": null, "hint": null,
            })
        );
        assert_eq!(
            json["kinesis"],
            json!({
                "stream": "", "active": null, "open_shards": null, "retention_hours": null, "error": null, "hint": null,
            })
        );
    }

    #[test]
    fn what_is_unknown_is_said_and_not_taken_for_nothing() {
        let text = |status: &ArchiveStatus| {
            let mut text = String::new();
            status.write_text(&mut text, now());
            text
        };
        let away = ArchiveStatus {
            error: Some("S3 is away".to_owned()),
            ..ArchiveStatus::default()
        };
        let said = text(&away);
        assert!(
            said.contains("DOES NOT ANSWER: S3 is away") && said.contains("no spool"),
            "{said}"
        );
        assert!(
            !said.contains("reaches") && !said.contains("NO BASE"),
            "{said}"
        );
        let there = ArchiveStatus {
            bases: Some(1),
            base_lsn: Some("0/10".to_owned()),
            base_as_of: Some("2026-01-01T00:00:00Z".to_owned()),
            log_end_lsn: Some("0/20".to_owned()),
            log_written_at: Some("2026-01-01T00:00:45Z".to_owned()),
            gaps: Some(vec![LogGap {
                from_lsn: "0/12".to_owned(),
                to_lsn: "0/14".to_owned(),
            }]),
            spool_bytes: Some(2048),
            ..ArchiveStatus::default()
        };
        let said = text(&there);
        for part in [
            "as of 2026-01-01T00:00:00Z at 0/10",
            "reaches 0/20, written 15 s ago",
            "GAP in the log from 0/12 to 0/14",
            "2.0 KiB wait",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}
