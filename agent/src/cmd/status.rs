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

mod agent;
mod archive;
mod judge;
mod kinesis;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::timeout;

use crate::config::{Config, Databases, Route};
use crate::error::chain;
use crate::promote::loss::{self, SourceAnswer};
use crate::promote::observe::{self, Database, ObservedReplica};
use crate::time::timestamp;
use agent::AgentDatabase;
use judge::{WitnessFacts, judge};
use view::{DatabaseOverview, Overview, RpoVerdict, Witness};

/// For all databases together, under route `kinesis`.
const REPLICA_WITHIN: Duration = Duration::from_secs(15);

/// Flags of `status`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(
    after_help = "With [archive] it also shows how far the archive reaches, its gaps, and what waits in the spool.\n\
    Under route kinesis it also shows the stream. Where an agent sends and the replica cannot be reached, the verdict \
    covers only the way into the stream: run status beside the replica for the rest.\n\
    Exit codes: 0 every database is within the RPO; 1 one is not, or it is not known. Archive and stream do not \
    affect it."
)]
pub struct StatusArgs {
    /// Print the status as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Asks everybody and prints.
pub async fn run(config: Config, args: StatusArgs) -> ExitCode {
    let status = Box::pin(gather(&config)).await;
    let text = match args.json {
        true => status.json(),
        false => status.text(timestamp()),
    };
    // A closed pipe is no reason to fail.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::from(u8::from(!status.within_rpo))
}

async fn gather(config: &Config) -> Overview {
    let (replica, agent) = tokio::join!(observe_replica(config), agent::ask(config.http_listen));
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
        let mut status = judge(&WitnessFacts {
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
        let archives = Box::pin(archive::ask(config, archive, &names)).await;
        for (status, archive) in databases.iter_mut().zip(archives) {
            status.archive = Some(archive);
        }
    }
    Box::pin(kinesis::add(config, &mut databases)).await;
    let sends = !databases.is_empty() && databases.iter().all(DatabaseOverview::is_sent);
    let within =
        !databases.is_empty() && databases.iter().all(|status| status.rpo == RpoVerdict::Met);
    Overview {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        rpo_objective_seconds: config.objectives.rpo.as_secs_f64(),
        within_rpo: within && (replica_witness.answers || sends),
        replica: replica_witness,
        agent: agent_witness,
        databases,
    }
}

/// Looks at the replica; an error is a sentence for the operator.
async fn observe_replica(config: &Config) -> Result<ObservedReplica, String> {
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

async fn ask_source(config: &Config, database: &Database) -> SourceAnswer {
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
