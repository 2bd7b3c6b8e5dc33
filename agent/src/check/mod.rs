//! `dr-agent check`: every finding on both sides, before `run` meets it, each with what to do.
//!
//! ```text
//! host, archive ──────┐
//! source ─▶ server, shape ─▶ settings ●, publication ●, coverage ─┐
//! replica ─▶ server, shape ─▶ settings ● ─────────────────────────┼─▶ Report ─▶ text ● | JSON
//!                  └──────────▶ pair ●: slot ●, compare ● ────────┘
//! ```
//!
//! Asking and judging are apart: `server`, `shape`, `source` and `replica` ask; what is marked ● is pure
//! and judges. Under route `kinesis` there are also the streams (`kinesis`), the source's slot is judged without the replica,
//! and `reach` ● excuses one side that cannot be reached from here.
//!
//! # Invariants
//! - It stops at nothing: what cannot be reached or read is a finding, and the rest is still checked.
//! - It changes nothing: its sessions are read-only, and no user table is opened. In the archive it writes one small
//!   object and deletes it again. Nothing is put into a Kinesis stream.
//! - Nothing can hold it up: connections, statements, locks and the archive have limits.
//!
//! # What it does not do
//! It does not look at rows, at free disk space but the spool's, or at what only `run` can find out by doing it. What `run` decides
//! before it writes is decided here by the same code ([`crate::setup::rehearse`]).

mod archive;
mod compare;
mod finding;
mod host;
mod kinesis;
mod open;
mod pair;
mod publication;
mod reachability;
mod replica;
mod server;
mod service_user;
mod settings;
mod shape;
mod slot;
mod source;
mod startable;
mod text;

use crate::config::{Config, Databases, Route};
use crate::error::{Class, Classify as _, chain};
use crate::pg::PgError;
use crate::setup;
use reachability::Reach;

pub use finding::{CheckReport, Finding, FindingPlace, FindingSide, Severity};
pub use text::{Style, render};

/// How long it may take to look whether a start would be refused.
const REHEARSAL_MAX: std::time::Duration = std::time::Duration::from_secs(30);

/// Checks everything. Never fails: what goes wrong is among the findings.
pub async fn check(config: &Config) -> CheckReport {
    let mut findings = Vec::new();
    let source = Box::pin(source::server(config, &mut findings)).await;
    let replica = Box::pin(replica::server(config, &mut findings)).await;
    let reach = Reach::of(&findings);
    reachability::excuse(config, reach, &mut findings);
    let version = source.as_ref().map(|source| source.server.version_num);
    findings.extend(
        host::look(
            config,
            version,
            replica.as_ref().map(|replica| &replica.server),
        )
        .await,
    );
    reachability::excuse_tools(config, reach, &mut findings);
    if let (Some(source), Some(replica)) = (&source, &replica) {
        findings.extend(pair::servers(config, source, replica));
    }
    let names = databases(config, source.as_ref(), replica.as_ref());
    if let Some(replica) = &replica {
        let at = FindingPlace::server(FindingSide::Replica);
        let lanes = config.replica.lanes;
        findings.extend(startable::connections(
            &at,
            &replica.server,
            names.len(),
            lanes,
        ));
    }
    if let Some(archive) = &config.archive {
        let writes = reach.tails(&config.route);
        findings.extend(Box::pin(archive::look(config, archive, names.len(), writes)).await);
    }
    findings.extend(Box::pin(kinesis::look(config, reach, &names)).await);
    for name in names {
        // The replica first: while it replicates, what it has applied must be compared with where the
        // source's WAL ends afterwards.
        let there = match &replica {
            Some(replica) => {
                Box::pin(replica::database(config, replica, &name, &mut findings)).await
            }
            None => None,
        };
        if config.route != Route::Direct && !reach.source {
            // A database that is there and could not be read may have its copy.
            let to_come = match (&replica, &there) {
                (Some(replica), None) => !replica.databases.iter().any(|one| one.name == name),
                (_, Some(there)) => there.kept.progress.is_none(),
                (None, None) => false,
            };
            findings.extend(to_come.then(|| reachability::first_copy(config, &name)));
        }
        let here = match &source {
            Some(source) => Box::pin(source::database(config, source, &name, &mut findings)).await,
            None => None,
        };
        if let (Some(source), Some(here), Some(replica)) = (&source, &here, &replica) {
            // A replica database that exists and could not be read is no empty one.
            let exists = replica.databases.iter().any(|one| one.name == name);
            if there.is_some() || !exists {
                findings.extend(pair::database(
                    config,
                    &name,
                    (source, here),
                    (replica, there.as_ref()),
                ));
            }
            // What is an error already need not be found a second time.
            if !findings
                .iter()
                .any(|finding| finding.severity == Severity::Error)
            {
                findings.extend(Box::pin(start(config, &name)).await);
            }
        }
    }
    CheckReport::new(findings)
}

/// What a start would be refused for, decided by what decides it there.
async fn start(config: &Config, name: &str) -> Option<Finding> {
    let at = FindingPlace::database(FindingSide::Both, name);
    let rehearsal = tokio::time::timeout(REHEARSAL_MAX, setup::rehearse(config, name)).await;
    let error = match rehearsal {
        Ok(Ok(())) => return Some(at.ok("start", "would not be refused")),
        Ok(Err(error)) => error,
        Err(_) => return Some(at.note("start", "could not be rehearsed in time")),
    };
    let finding = match error.class() {
        // Another agent runs, as a rule.
        Class::Transient => return None,
        Class::Definite | Class::Fenced => {
            at.error("start", format!("would be refused: {}", chain(&error)))
        }
    };
    Some(match error.hint() {
        Some(hint) => finding.hint(hint),
        None => finding,
    })
}

/// The databases to look at. While the source is away the list comes from the configuration, or else
/// from the replica.
fn databases(
    config: &Config,
    source: Option<&source::SourceFacts>,
    replica: Option<&replica::ReplicaFacts>,
) -> Vec<String> {
    match (&config.source.databases, source, replica) {
        (_, Some(source), _) => source.selected.clone(),
        (Databases::List(names), None, _) => names.clone(),
        (Databases::All, None, Some(replica)) => replica
            .databases
            .iter()
            .filter(|one| one.allows_connections && one.may_connect && !one.template)
            .map(|one| one.name.clone())
            .collect(),
        (Databases::All, None, None) => Vec::new(),
    }
}

/// Runs one question; its failure becomes a finding and the check goes on without the answer.
async fn note_failure<T>(
    at: &FindingPlace,
    doing: &str,
    findings: &mut Vec<Finding>,
    question: impl Future<Output = Result<T, PgError>>,
) -> Option<T> {
    match question.await {
        Ok(answer) => Some(answer),
        Err(error) => {
            findings.push(settings::failed(at, doing, &error));
            None
        }
    }
}
