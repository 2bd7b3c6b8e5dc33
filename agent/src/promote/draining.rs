//! The edge `settled` → `drained`: what route `kinesis` still holds for the replica is applied, or left out by decision.
//!
//! ```text
//! ┌▶ end sessions ▶ read the progress row ▶ settle by it ─┬─ --skip-drain ───────────┐
//! │                                                       └▶ Drain ── to its tip ────┴▶ behind every copy? ─▶ drained
//! └── store: this table is left out ◀── a table that was never copied ──┘
//! ```
//!
//! # Invariants
//! - A drain applies as an agent does, at the promotion's own term. So one that was killed is met as a killed agent is: its
//!   sessions are ended, and then its lanes are settled by the progress row as it is then. Nothing is opened before
//!   that, whether drained or not.
//! - Whatever became of a drain, the report says where the replica is afterwards.
//! - That a table is left out is stored before anything is applied without it.
//!
//! # What it does not do
//! It knows nothing of streams: whoever promotes gives it a [`Drain`].

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use tokio_postgres::Client;

use super::execute::Begun;
use super::observe::{self, DATABASES_AT_ONCE, Observed};
use super::plan::{self, Plan, Refusal};
use super::steps::{self, Record};
use super::{ACCEPT_INCOMPLETE, PromoteError, SKIP_DRAIN, fence};
use crate::catalog::TableName;
use crate::error::Class;

/// What is between the source and the replica under route `kinesis`, as far as a promotion knows it.
pub trait Drain: Sync {
    /// Looks whether this database could be drained from here, and touches nothing; says in which directory large transactions
    /// would wait.
    fn look<'a>(&'a self, database: &'a str) -> BoxFuture<'a, Result<String, DrainError>>;

    /// Applies to a database everything that was there when it was called. The term is raised already, nothing is left prepared,
    /// and nobody else applies.
    fn drain<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<Drained, DrainError>>;
}

/// What is drained.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The database.
    pub database: &'a str,
    /// Tables whose changes are left out.
    pub left_out: &'a [TableName],
    /// The session that holds the promotion's lock: without it another promotion may be at work.
    pub lock: &'a Client,
}

/// What draining did.
#[derive(Clone, Debug)]
pub struct Drained {
    /// Transactions applied.
    pub transactions: u64,
    /// Where it ended.
    pub end: End,
}

/// Where it ended.
#[derive(Clone, Debug)]
pub enum End {
    /// At the tip.
    Tip {
        /// What could not be applied, in words.
        warnings: Vec<String>,
    },
    /// Before a change of a table that the replica does not have.
    Uncopied(TableName),
}

/// Why it could not be drained.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct DrainError {
    /// What happened.
    pub message: String,
    /// Whether it may go away.
    pub class: Class,
    /// What to do.
    pub hint: Option<String>,
}

/// What a look at the route found, before anybody is fenced.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Databases that could not be drained.
    pub(super) refusals: Vec<Refusal>,
    /// By database, where large transactions would wait.
    pub(super) directories: BTreeMap<String, String>,
}

/// Looks whether the databases could be drained whose term is not raised yet: the others go on, or say where they are stuck.
pub(super) async fn look(route: &dyn Drain, observed: &Observed, plan: &Plan) -> Looked {
    let ahead = observed.databases.iter().filter(|database| {
        !database.state().is_fenced() && plan.refusal_of(&database.name).is_none()
    });
    let looks = ahead.map(|database| async move {
        let looked = route.look(&database.name).await;
        (database.name.clone(), looked)
    });
    let looks: Vec<_> = stream::iter(looks)
        .buffered(DATABASES_AT_ONCE)
        .collect()
        .await;
    let mut found = Looked::default();
    for (database, looked) in looks {
        match looked {
            Ok(directory) => {
                found.directories.insert(database, directory);
            }
            Err(DrainError { message, hint, .. }) => found.refusals.push(Refusal::NotDrainable {
                database,
                reason: [Some(message), hint]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join("; "),
            }),
        }
    }
    found
}

/// Walks the edge; returns what to note.
pub(super) async fn drain(
    begun: &Begun<'_>,
    client: &Client,
    record: &mut Record,
) -> Result<String, PromoteError> {
    let Some(route) = begun.route else {
        return Ok("route direct: there is nothing between the two sides".to_owned());
    };
    settle_anew(client, record).await?;
    let (fenced, found) = (&record.detail.fenced_lsn, &record.detail.database.end_lsn);
    let earlier = match fenced == found {
        true => String::new(),
        false => format!(", after an earlier attempt at it had come from {fenced} to {found}"),
    };
    if begun.options.skip_drain {
        let said = format!(
            "what the Kinesis stream still held behind {found} was left out ({SKIP_DRAIN})"
        );
        require_one_moment(client, record).await?;
        record.accept(SKIP_DRAIN, format!("{}: {said}", record.name));
        return Ok(said + &earlier);
    }
    let transactions = up_to_the_tip(route, client, record).await?;
    require_one_moment(client, record).await?;
    Ok(format!(
        "{transactions} transactions of the Kinesis stream were applied{earlier}"
    ))
}

/// Ends what is left of an earlier drain, and takes over where the replica is then.
async fn settle_anew(client: &Client, record: &mut Record) -> Result<(), PromoteError> {
    fence::end_sessions(client, &record.stream).await?;
    steps::read_progress(client, record).await?;
    steps::settle_prepared(client, record).await?;
    // Also for whoever looks at it while the drain goes on.
    record.store(client, record.state).await
}

/// Drains, leaving out what was never copied; returns how many transactions were applied.
async fn up_to_the_tip(
    route: &dyn Drain,
    client: &Client,
    record: &mut Record,
) -> Result<u64, PromoteError> {
    leave_out_what_is_not_ready(client, record).await?;
    let mut transactions = 0;
    loop {
        let asked = Asked {
            database: &record.name,
            left_out: &record.detail.left_out,
            lock: client,
        };
        let drained = route.drain(asked).await;
        let settled = settle_anew(client, record).await;
        let drained = drained.map_err(PromoteError::Drain)?;
        settled?;
        transactions += drained.transactions;
        match drained.end {
            End::Tip { warnings } => {
                for warning in warnings {
                    record.warn(warning);
                }
                return Ok(transactions);
            }
            End::Uncopied(table) => {
                record.warn(format!(
                    "table {table} was never copied: its changes in the Kinesis stream were left out"
                ));
                record.detail.left_out.push(table);
                record.store(client, record.state).await?;
            }
        }
    }
}

/// Tables whose copy the operator does not wait for: the stream would be read once more for each of them.
async fn leave_out_what_is_not_ready(
    client: &Client,
    record: &mut Record,
) -> Result<(), PromoteError> {
    let left_out = &record.detail.left_out;
    let mut more = observe::not_ready(client, &record.stream).await?;
    more.retain(|table| !left_out.contains(table));
    if more.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = more.iter().map(TableName::to_string).collect();
    record.warn(format!(
        "the copy was not complete of {}: their changes in the Kinesis stream were left out",
        names.join(", ")
    ));
    record.detail.left_out.extend(more);
    record.store(client, record.state).await
}

/// Tables that were copied at different moments are of one moment only behind the last of them.
async fn require_one_moment(client: &Client, record: &mut Record) -> Result<(), PromoteError> {
    let table_sync = observe::table_sync(client, &record.stream).await?;
    match plan::before_snapshot(&record.name, record.end_lsn()?, &table_sync) {
        None => Ok(()),
        Some(refusal) if record.detail.accept_incomplete => {
            record.accept(ACCEPT_INCOMPLETE, refusal.to_string());
            Ok(())
        }
        Some(refusal) => Err(PromoteError::NotOneMoment(refusal)),
    }
}
