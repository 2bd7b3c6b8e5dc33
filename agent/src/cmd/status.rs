//! `dr-agent status`: is the RPO met, at a glance.
//!
//! Three witnesses, each of which may be dead: the replica knows what is applied, the running agent
//! knows the lag as it measures it, and the source is asked for the bytes only where the agent
//! does not answer. `judge` makes one verdict per database out of them, purely. Where there is an archive its store
//! is asked, too, and under route `kinesis` the stream; that is shown and has no part in the verdict.
//!
//! Under route `kinesis` the sites need not see one another. Beside the replica the verdict is the same as ever. Beside the
//! source, where the replica cannot be reached, it is about the way into the stream, and says so: what becomes of it
//! then is known on the other side.
//!
//! # Invariants
//! - Silence is not health: what is not known to be within the RPO does not exit with 0. Only a sending agent that answers
//!   makes up for a replica that does not.
//! - Touches nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;

use super::agent_status::{self, AgentDatabase};
use super::archive_status::{self, ArchiveStatus};
use super::kinesis_status::{self, KinesisStatus};
use crate::config::{Config, Databases, Route};
use crate::error::chain;
use crate::promote::loss::{self, Answer};
use crate::promote::observe::{self, Database, Observed};
use crate::watch::coverage::Coverage;

/// For all databases together, under route `kinesis`.
const REPLICA_WITHIN: Duration = Duration::from_secs(15);

/// Names of a kind that are shown; the JSON has more.
const NAMES_SHOWN: usize = 5;

/// The leg of an agent that puts changes into a Kinesis stream.
pub(super) const SEND: &str = "send";

/// Flags of `status`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(
    after_help = "With [archive] it also says how far the archive leads, its gaps, and what waits in the spool.\n\
    Under route kinesis it also shows the stream. Where an agent sends and the replica cannot be reached, the verdict is \
    about the way into the stream: ask beside the replica about the rest.\n\
    Exit codes: 0 every database is within the RPO; 1 one is not, or it is not known. Archive and stream have no part \
    in that."
)]
pub struct Args {
    /// Print the status as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What `status --json` prints: stable; fields are added, never renamed or removed. `null` is "unknown".
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
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
    pub databases: Vec<DatabaseStatus>,
}

/// Whether one of the parties answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Witness {
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
pub enum Verdict {
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
pub struct DatabaseStatus {
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
    pub rpo: Verdict,
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

/// Asks everybody and prints.
pub async fn run(config: Config, args: Args) -> ExitCode {
    let status = Box::pin(gather(&config)).await;
    let text = if args.json {
        let mut text = serde_json::to_string_pretty(&status)
            .expect("plain data with text keys always serializes");
        text.push('\n');
        text
    } else {
        status.text()
    };
    // A closed pipe is no reason to fail.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::from(u8::from(!status.within_rpo))
}

async fn gather(config: &Config) -> Status {
    let (replica, agent) = tokio::join!(
        observe_replica(config),
        agent_status::ask(config.http_listen)
    );
    let witness = |address: String, error: Option<String>| Witness {
        address,
        answers: error.is_none(),
        error,
    };
    let replica_witness = witness(
        config.replica.conninfo.to_string(),
        replica.as_ref().err().cloned(),
    );
    let agent_witness = witness(
        config.http_listen.to_string(),
        agent.as_ref().err().cloned(),
    );
    let observed = replica.unwrap_or_default();
    let reports: BTreeMap<String, AgentDatabase> = agent
        .unwrap_or_default()
        .databases
        .into_iter()
        .map(|report| (report.database.clone(), report))
        .collect();

    // Where nobody who knows a database can be asked it is still to be protected.
    let listed = match (&config.route, &config.source.databases) {
        (Route::Kinesis { .. }, Databases::List(names)) => names.as_slice(),
        _ => &[],
    };
    let names: BTreeSet<&String> = observed
        .databases
        .iter()
        .map(|database| &database.name)
        .chain(&observed.missing)
        .chain(observed.unreachable.iter().map(|one| &one.name))
        .chain(reports.keys())
        .chain(listed)
        .collect();
    let mut databases = Vec::new();
    for name in names {
        let here = observed
            .databases
            .iter()
            .find(|database| database.name == *name);
        let answer = match (here, reports.get(name)) {
            (Some(here), None) if here.promotion.is_none() => Some(ask_source(config, here).await),
            _ => None,
        };
        let stream = config.stream(name).to_string();
        let mut status = judge(&Facts {
            rpo_seconds: config.objectives.rpo.as_secs_f64(),
            here,
            missing: observed.missing.contains(name),
            report: reports.get(name),
            answer: answer.as_ref(),
        });
        status.database.clone_from(name);
        status.stream = stream;
        databases.push(status);
    }
    if let Some(archive) = &config.archive {
        let names: Vec<String> = databases
            .iter()
            .map(|status| status.database.clone())
            .collect();
        let archives = Box::pin(archive_status::ask(config, archive, &names)).await;
        for (status, archive) in databases.iter_mut().zip(archives) {
            status.archive = Some(archive);
        }
    }
    Box::pin(kinesis_status::add(config, &mut databases)).await;
    let sends = !databases.is_empty() && databases.iter().all(DatabaseStatus::is_sent);
    let within = !databases.is_empty() && databases.iter().all(|status| status.rpo == Verdict::Met);
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        rpo_objective_seconds: config.objectives.rpo.as_secs_f64(),
        within_rpo: within && (replica_witness.answers || sends),
        replica: replica_witness,
        agent: agent_witness,
        databases,
    }
}

/// Looks at the replica; an error is a sentence for the operator.
async fn observe_replica(config: &Config) -> Result<Observed, String> {
    let looking = Box::pin(observe::observe(config, "status"));
    let looked = match config.route {
        Route::Direct => looking.await,
        // Another site's firewall may say nothing at all.
        Route::Kinesis { .. } => match timeout(REPLICA_WITHIN, looking).await {
            Ok(looked) => looked,
            Err(_) => return Err(format!("no answer within {REPLICA_WITHIN:?}")),
        },
    };
    looked.map_err(|error| chain(&error))
}

async fn ask_source(config: &Config, database: &Database) -> Answer {
    let conninfo = config.source.conninfo.with_dbname(&database.name);
    let mut answer = loss::ask(&loss::Question {
        conninfo: &conninfo,
        stream: &database.stream,
        end_lsn: database.progress.end_lsn,
        system_identifier: None,
        count: false,
    })
    .await;
    if config.route != Route::Direct && !answer.alive {
        // Beside the replica that is how it is.
        answer.unknown = None;
    }
    answer
}

/// What the witnesses say of one database.
struct Facts<'a> {
    rpo_seconds: f64,
    here: Option<&'a Database>,
    missing: bool,
    report: Option<&'a AgentDatabase>,
    answer: Option<&'a Answer>,
}

fn judge(facts: &Facts<'_>) -> DatabaseStatus {
    let Facts { here, report, .. } = *facts;
    let promotion = here.and_then(|here| here.promotion.as_ref());
    let age = |here: &Database| here.progress.age_seconds();
    let lag_seconds = match (report, here) {
        // It knows how far the stream is, and the replica how far it is itself.
        (Some(report), Some(here)) if report.sends() => report
            .lag_seconds
            .zip(age(here))
            .map(|(sent, applied)| sent.max(applied)),
        (Some(report), _) => report.lag_seconds,
        (None, here) => here.and_then(age),
    };
    let not_ready = here.map(|here| here.table_sync.not_ready);
    let behind_snapshot = here.is_some_and(|here| {
        here.table_sync
            .newest_snapshot
            .is_some_and(|snapshot| here.progress.end_lsn < snapshot)
    });

    let (state, rpo, reason) = if promotion.is_some() {
        (
            "promoted",
            Verdict::Promoted,
            Some("nothing replicates it any more".to_owned()),
        )
    } else {
        let state = match report {
            Some(report) => report.state.as_str(),
            None if facts.missing => "missing",
            None => "no_agent",
        };
        let (rpo, reason) = if facts.missing {
            (
                Verdict::Breached,
                Some("the replica does not have it".to_owned()),
            )
        } else if not_ready.is_some_and(|count| count > 0) || behind_snapshot {
            (
                Verdict::Breached,
                Some("the initial copy is not complete: it cannot be promoted".to_owned()),
            )
        } else if report.is_some_and(AgentDatabase::stands) {
            (
                Verdict::Breached,
                Some("nothing replicates it until a person sees to it".to_owned()),
            )
        } else if report.is_some_and(|report| report.rpo_breached == Some(true)) {
            (Verdict::Breached, None)
        } else {
            match lag_seconds {
                Some(lag) if lag <= facts.rpo_seconds => (Verdict::Met, None),
                Some(_) => (Verdict::Breached, None),
                None => (
                    Verdict::Unknown,
                    Some("nobody knows the lag yet".to_owned()),
                ),
            }
        };
        (state, rpo, reason)
    };
    let progress = here.map(|here| &here.progress);
    DatabaseStatus {
        database: String::new(),
        stream: String::new(),
        leg: report.and_then(|report| report.leg.clone()),
        state: state.to_owned(),
        since: report.and_then(|report| report.since.clone()),
        waits_for: report.and_then(|report| report.waits_for.clone()),
        set_aside: report
            .map(|report| report.set_aside.clone())
            .unwrap_or_default(),
        missing_constraints: report
            .map(|report| report.missing_constraints.clone())
            .unwrap_or_default(),
        rpo,
        reason,
        lag_seconds,
        lag_bytes: match report {
            Some(report) => report.lag_bytes,
            None => facts.answer.and_then(|answer| answer.bytes),
        },
        slot_retained_bytes: report.and_then(|report| report.slot_retained_bytes),
        term: progress.map(|progress| progress.term),
        batch: progress.map(|progress| progress.batch),
        end_lsn: progress.map(|progress| progress.end_lsn.to_string()),
        commit_time: progress.and_then(|progress| progress.commit_time.clone()),
        promotion: promotion.map(|stored| stored.state.to_string()),
        tables_not_ready: not_ready,
        coverage: here.map(|here| here.coverage.clone()),
        error: report
            .and_then(|report| report.error.clone())
            .or_else(|| facts.answer.and_then(|answer| answer.unknown.clone())),
        hint: report.and_then(|report| report.hint.clone()),
        archive: None,
        kinesis: None,
    }
}

impl Status {
    /// The status for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let sent = !self.replica.answers && self.databases.iter().any(DatabaseStatus::is_sent);
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
            status.write_text(&mut out);
        }
        out
    }
}

impl DatabaseStatus {
    /// The agent that answers for it puts it into a Kinesis stream.
    fn is_sent(&self) -> bool {
        self.leg.as_deref() == Some(SEND)
    }

    fn write_text(&self, out: &mut String) {
        let verdict = match self.rpo {
            Verdict::Met => "RPO met",
            Verdict::Breached => "RPO BREACHED",
            Verdict::Unknown => "RPO UNKNOWN",
            Verdict::Promoted => "PROMOTED",
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
            archive.write_text(out, jiff::Timestamp::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::stream::StreamName;
    use crate::pg::PgLsn;
    use crate::promote::Detail;
    use crate::promote::observe::{Progress, Stored, TableSync};
    use crate::promote::state::State;

    fn applied(age: Option<f64>) -> Database {
        Database {
            name: "app".to_owned(),
            stream: StreamName::new("dr_agent", "app"),
            progress: Progress {
                term: 1,
                batch: 7,
                end_lsn: PgLsn::from(1000),
                commit_time: None,
                commit_age_seconds: age,
                applied_age_seconds: 0.0,
                replica_ahead_seconds: None,
            },
            table_sync: TableSync {
                total: 3,
                ..TableSync::default()
            },
            promotion: None,
            sequences: 0,
            agent_sessions: 0,
            prepared: 0,
            coverage: Coverage::default(),
        }
    }

    #[test]
    fn what_needs_a_person_is_breached_whatever_its_lag() {
        let here = applied(Some(0.0));
        for (state, verdict) in [
            ("initializing", Verdict::Met),
            ("copying", Verdict::Met),
            ("streaming", Verdict::Met),
            ("retrying", Verdict::Met),
            ("stopped", Verdict::Breached),
            ("fenced", Verdict::Breached),
            ("promoted", Verdict::Breached),
        ] {
            let mut report = streaming(Some(0.0));
            report.state = state.to_owned();
            assert_eq!(judged(Some(&here), Some(&report)).1, verdict, "{state}");
        }
    }

    #[test]
    fn a_replica_whose_clock_is_behind_does_not_make_the_last_commit_younger() {
        let mut here = applied(Some(-500.0));
        here.progress.applied_age_seconds = 100.0;
        assert_eq!(judged(Some(&here), None).1, Verdict::Breached);
        here.progress.applied_age_seconds = -1.0;
        assert_eq!(judged(Some(&here), None).1, Verdict::Unknown);
    }

    fn streaming(lag: Option<f64>) -> AgentDatabase {
        AgentDatabase {
            database: "app".to_owned(),
            state: "streaming".to_owned(),
            lag_seconds: lag,
            ..AgentDatabase::default()
        }
    }

    fn judged(here: Option<&Database>, report: Option<&AgentDatabase>) -> (String, Verdict) {
        let status = judge(&Facts {
            rpo_seconds: 30.0,
            here,
            missing: false,
            report,
            answer: None,
        });
        (status.state, status.rpo)
    }

    #[test]
    fn the_agents_lag_counts_where_it_answers_and_the_last_commits_age_where_it_does_not() {
        let old = applied(Some(300.0));
        assert_eq!(
            judged(Some(&old), Some(&streaming(Some(0.1)))),
            ("streaming".into(), Verdict::Met)
        );
        assert_eq!(
            judged(Some(&old), None),
            ("no_agent".into(), Verdict::Breached)
        );
        assert_eq!(
            judged(Some(&applied(Some(1.0))), None),
            ("no_agent".into(), Verdict::Met)
        );
    }

    #[test]
    fn what_is_in_the_stream_is_not_on_the_replica_where_that_can_be_seen() {
        let mut sending = streaming(Some(0.1));
        sending.leg = Some(SEND.to_owned());
        assert_eq!(judged(None, Some(&sending)).1, Verdict::Met);
        assert_eq!(
            judged(Some(&applied(Some(1.0))), Some(&sending)).1,
            Verdict::Met
        );
        assert_eq!(
            judged(Some(&applied(Some(300.0))), Some(&sending)).1,
            Verdict::Breached
        );
        assert_eq!(
            judged(Some(&applied(None)), Some(&sending)).1,
            Verdict::Unknown
        );
    }

    #[test]
    fn a_lag_above_the_objective_or_the_agents_own_alarm_breaches() {
        let here = applied(Some(1.0));
        assert_eq!(
            judged(Some(&here), Some(&streaming(Some(30.1)))).1,
            Verdict::Breached
        );
        let mut alarmed = streaming(Some(0.0));
        alarmed.rpo_breached = Some(true);
        assert_eq!(judged(Some(&here), Some(&alarmed)).1, Verdict::Breached);
    }

    #[test]
    fn what_cannot_be_promoted_does_not_meet_the_rpo_however_small_its_lag() {
        let mut copying = applied(Some(0.0));
        copying.table_sync.not_ready = 1;
        assert_eq!(
            judged(Some(&copying), Some(&streaming(Some(0.0)))).1,
            Verdict::Breached
        );
        let mut behind = applied(Some(0.0));
        behind.table_sync.newest_snapshot = Some(PgLsn::from(1001));
        assert_eq!(judged(Some(&behind), None).1, Verdict::Breached);
    }

    #[test]
    fn an_unknown_lag_is_not_taken_for_none() {
        assert_eq!(judged(Some(&applied(None)), None).1, Verdict::Unknown);
        assert_eq!(judged(None, Some(&streaming(None))).1, Verdict::Unknown);
    }

    #[test]
    fn a_promoted_database_says_so_whatever_an_old_agent_claims() {
        let mut promoted = applied(Some(0.0));
        promoted.promotion = Some(Stored {
            state: State::Done,
            term: 2,
            detail: Detail::default(),
        });
        assert_eq!(
            judged(Some(&promoted), Some(&streaming(Some(0.0)))),
            ("promoted".into(), Verdict::Promoted)
        );
    }
}
