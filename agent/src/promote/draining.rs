//! The edge `settled` → `drained`: what the Kinesis stream and the archive still hold for the replica is applied, or left out by
//! decision.
//!
//! ```text
//! ┌▶ end sessions ▶ read the progress row ▶ settle by it ─┬─ --skip-drain ───────────┐
//! │                                                       └▶ Drain ── to its tip ────┴▶ behind every copy? ─▶ drained
//! └── store: this table is left out ◀── a table that was never copied, or that a change cannot be applied to ──┘
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
use super::observe::{self, DATABASES_AT_ONCE, ObservedReplica};
use super::plan::{self, PromotionPlan, PromotionRefusal};
use super::steps::{self, DatabaseRecord};
use super::{ACCEPT_INCOMPLETE, Doing as _, PromoteError, SKIP_DRAIN, fence};
use crate::error::Class;
use crate::names::TableName;
use crate::schema;
use crate::schema::set_aside::{self, Aside};

/// What is between the source and the replica, as far as a promotion knows it: a Kinesis stream, an archive.
pub trait Drain: Sync {
    /// What it is, as in "what … still holds".
    fn what(&self) -> &'static str;

    /// Looks whether this database could be drained from here, and touches nothing; says what is there, and in which directory large
    /// transactions would wait.
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
    /// Transactions of the Kinesis stream that were applied; none where there is no stream.
    pub streamed: Option<u64>,
    /// Transactions of the archive that were applied; none where there is no archive, or it was not reached.
    pub archived: Option<u64>,
    /// Where it ended.
    pub end: DrainEnd,
}

/// Where it ended.
#[derive(Clone, Debug)]
pub enum DrainEnd {
    /// At the tip.
    Tip {
        /// What could not be applied, in words.
        warnings: Vec<String>,
    },
    /// Before a change of a table that the replica does not have.
    Uncopied(TableName),
    /// Before a change that cannot be applied to its table; without it the rest can go on.
    Troubled {
        /// The table.
        table: TableName,
        /// Why.
        reason: String,
    },
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
    pub(super) refusals: Vec<PromotionRefusal>,
    /// By database, what is there, in words.
    pub(super) found: BTreeMap<String, String>,
}

/// Looks whether the databases could be drained whose term is not raised yet: the others go on, or say where they are stuck.
pub(super) async fn look(
    route: &dyn Drain,
    observed: &ObservedReplica,
    plan: &PromotionPlan,
) -> Looked {
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
            Ok(said) => {
                found.found.insert(database, said);
            }
            Err(DrainError { message, hint, .. }) => {
                found.refusals.push(PromotionRefusal::NotDrainable {
                    database,
                    reason: [Some(message), hint]
                        .into_iter()
                        .flatten()
                        .collect::<Vec<_>>()
                        .join("; "),
                });
            }
        }
    }
    found
}

/// Walks the edge; returns what to note.
pub(super) async fn drain(
    begun: &Begun<'_>,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<String, PromoteError> {
    let Some(route) = begun.route else {
        return Ok(
            "route direct, and no archive: there is nothing between the two sides".to_owned(),
        );
    };
    settle_anew(client, record).await?;
    let (fenced, found) = (&record.detail.fenced_lsn, &record.detail.database.end_lsn);
    let earlier = match fenced == found {
        true => String::new(),
        false => format!(", after an earlier attempt at it had come from {fenced} to {found}"),
    };
    if begun.options.skip_drain {
        let said = format!(
            "what {} still held behind {found} was left out ({SKIP_DRAIN})",
            route.what()
        );
        require_one_moment(client, record).await?;
        record.accept(SKIP_DRAIN, format!("{}: {said}", record.name));
        return Ok(said + &earlier);
    }
    let (streamed, archived) = up_to_the_tip(route, client, record).await?;
    require_one_moment(client, record).await?;
    Ok(match (streamed, archived) {
        (Some(streamed), Some(archived @ 1..)) => format!(
            "{streamed} transactions of the Kinesis stream were applied, and {archived} of the archive's change log{earlier}"
        ),
        (Some(streamed), _) => {
            format!("{streamed} transactions of the Kinesis stream were applied{earlier}")
        }
        (None, archived) => format!(
            "{} transactions of the archive's change log were applied{earlier}",
            archived.unwrap_or_default()
        ),
    })
}

/// Ends what is left of an earlier drain, and takes over where the replica is then.
async fn settle_anew(client: &Client, record: &mut DatabaseRecord) -> Result<(), PromoteError> {
    fence::end_sessions(client, &record.stream).await?;
    steps::read_progress(client, record).await?;
    steps::settle_prepared(client, record).await?;
    // Also for whoever looks at it while the drain goes on.
    record.store(client, record.state).await
}

/// Drains, leaving out what was never copied; returns how many transactions of the stream and of the archive were applied.
async fn up_to_the_tip(
    route: &dyn Drain,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(Option<u64>, Option<u64>), PromoteError> {
    leave_out_what_is_not_ready(route, client, record).await?;
    let (mut streamed, mut archived) = (None, None);
    let add = |sum: &mut Option<u64>, more: Option<u64>| {
        *sum = more.map(|more| sum.unwrap_or_default() + more).or(*sum);
    };
    loop {
        let asked = Asked {
            database: &record.name,
            left_out: &record.detail.left_out,
            lock: client,
        };
        let drained = route.drain(asked).await;
        let settled = settle_anew(client, record).await;
        let what = route.what();
        let drained = drained.map_err(|source| PromoteError::Drain { what, source })?;
        settled?;
        add(&mut streamed, drained.streamed);
        add(&mut archived, drained.archived);
        match drained.end {
            DrainEnd::Tip { warnings } => {
                for warning in warnings {
                    record.warn(warning);
                }
                return Ok((streamed, archived));
            }
            DrainEnd::Uncopied(table) => {
                record.warn(format!(
                    "table {table} was never copied: its changes in {} were left out",
                    route.what()
                ));
                record.detail.left_out.push(table);
                record.store(client, record.state).await?;
            }
            DrainEnd::Troubled { table, reason } => {
                let from = &record.detail.database.end_lsn;
                record.warn(format!(
                    "table {table} is not complete: its changes in {} behind {from} were left out, because one could not be \
                     applied: {reason}",
                    route.what()
                ));
                note_aside(client, record, &table, &reason).await?;
                record.detail.left_out.push(table);
                record.store(client, record.state).await?;
            }
        }
    }
}

/// It counts as not protected from here on. Killed before it is stored that the table is left out, the next one meets it again.
async fn note_aside(
    client: &Client,
    record: &DatabaseRecord,
    table: &TableName,
    reason: &str,
) -> Result<(), PromoteError> {
    let doing = "note which table is set aside";
    if !schema::has(client, &[set_aside::TABLE])
        .await
        .doing(doing)?
    {
        // Of an earlier version; the warning says it.
        return Ok(());
    }
    let aside = Aside {
        table: table.clone(),
        reason: reason.to_owned(),
    };
    set_aside::take_out(client, &record.stream, aside)
        .await
        .doing(doing)
}

/// Tables whose copy the operator does not wait for: the stream would be read once more for each of them.
async fn leave_out_what_is_not_ready(
    route: &dyn Drain,
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
    let left_out = &record.detail.left_out;
    let mut more = observe::not_ready(client, &record.stream).await?;
    more.retain(|table| !left_out.contains(table));
    if more.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = more.iter().map(TableName::to_string).collect();
    record.warn(format!(
        "the copy was not complete of {}: their changes in {} were left out",
        names.join(", "),
        route.what()
    ));
    record.detail.left_out.extend(more);
    record.store(client, record.state).await
}

/// Tables that were copied at different moments are of one moment only behind the last of them.
async fn require_one_moment(
    client: &Client,
    record: &mut DatabaseRecord,
) -> Result<(), PromoteError> {
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
