//! Constraints that must wait for the stream.
//!
//! Tables are not always copied at one snapshot: a killed copy keeps its finished tables, and a new
//! table joins others that are as old as the last batch. Then a row may refer to one that is still
//! on its way, and a foreign key, or the attaching of a partition whose parent has one, is refused.
//! The statement is kept on the replica and run again once the stream has passed the newest snapshot;
//! by then the replica equals the source as of one commit, where the constraint holds.
//!
//! # Invariants
//! - A statement and its row in `dr_agent.deferred` change together: run and removed, or neither.
//! - One that the server refuses costs itself: it stays, with the reason, and is tried again.
//! - Replicated changes do not need the constraints: they are applied in replica role and, for
//!   partitions, under the partition's own name.
//!
//! # What it does not do
//! It does not watch the stream: the pipeline calls [`run_deferred`] when it has passed a copy's
//! snapshot, the promotion before it opens the replica.

use tokio_postgres::{Client, Transaction};

use super::CopyJob;
use super::error::CopyError;
use super::inventory::{Attachment, ForeignKey};
use super::progress::CopyObserver;
use crate::error::{Class, Classify as _, chain};
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::{quote_ident, quote_literal};
use crate::schema::deferred;

/// One statement on the replica, and what a person calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeferredStatement {
    what: String,
    sql: String,
}

impl DeferredStatement {
    /// Adds a foreign key.
    pub(crate) fn foreign_key(key: &ForeignKey) -> Self {
        Self {
            what: format!("foreign key {} of {}", key.name, key.table),
            sql: format!(
                "ALTER TABLE {} ADD CONSTRAINT {} {}",
                key.table.sql(),
                quote_ident(&key.name),
                key.definition
            ),
        }
    }

    /// The comment on a foreign key, if it has one and the key is there.
    pub(crate) fn comment(key: &ForeignKey) -> Option<Self> {
        let comment = format!(
            "COMMENT ON CONSTRAINT {} ON {} IS {}",
            quote_ident(&key.name),
            key.table.sql(),
            quote_literal(key.comment.as_ref()?).trim_start()
        );
        let body = format!(
            "BEGIN EXECUTE {}; EXCEPTION WHEN undefined_object THEN NULL; END",
            quote_literal(&comment).trim_start()
        );
        Some(Self {
            what: format!("comment on foreign key {} of {}", key.name, key.table),
            sql: format!("DO {}", quote_literal(&body).trim_start()),
        })
    }

    /// Adds a foreign key, and its comment.
    pub(crate) fn foreign_keys<'k>(keys: impl IntoIterator<Item = &'k ForeignKey>) -> Vec<Self> {
        let both = |key| [Some(Self::foreign_key(key)), Self::comment(key)];
        keys.into_iter().flat_map(both).flatten().collect()
    }

    /// Attaches a partition.
    pub(super) fn attachment(attachment: &Attachment) -> Self {
        Self {
            what: format!("partition {} of {}", attachment.child, attachment.parent),
            sql: format!(
                "ALTER TABLE ONLY {} ATTACH PARTITION {} {}",
                attachment.parent.sql(),
                attachment.child.sql(),
                attachment.bound
            ),
        }
    }
}

/// What became of a foreign key that rows of the source may violate.
pub(super) enum Added {
    /// It is there.
    Valid,
    /// It is there, for what is written from now on.
    NotValid,
    /// It cannot be there: before 18 one of a partitioned table holds for all rows or not at all.
    No,
}

/// Adds a foreign key whose rows are all there, as NOT VALID where some of them violate it on the source as well.
async fn add_key(replica: &Client, sql: &str) -> Result<Added, tokio_postgres::Error> {
    match replica.batch_execute(sql).await {
        Err(error) if is_missing_row(&error) => {}
        other => return other.map(|()| Added::Valid),
    }
    match replica.batch_execute(&format!("{sql} NOT VALID")).await {
        Ok(()) => Ok(Added::NotValid),
        Err(error) if is_of_a_partitioned_table(&error) => Ok(Added::No),
        Err(error) => Err(error),
    }
}

/// Adds foreign keys one by one, because rows of the source violate some of them, and says which.
pub(crate) async fn add_keys(
    replica: &Client,
    keys: &[DeferredStatement],
    observer: &dyn CopyObserver,
) -> Result<(), CopyError> {
    for DeferredStatement { what, sql } in keys {
        let added = add_key(replica, sql).await;
        let added = added.map_err(CopyError::replica(format!("add {what}")))?;
        if let Some(how) = added.problem() {
            super::leave_out(observer, &format!("{what}: {how}"));
        }
    }
    Ok(())
}

impl Added {
    fn problem(&self) -> Option<&'static str> {
        match self {
            Self::Valid => None,
            Self::NotValid => Some("rows of the source violate it; on the replica it is NOT VALID"),
            Self::No => Some("rows of the source violate it; the replica does not have it"),
        }
    }
}

/// Runs each statement, or keeps it for later where a row it refers to is still missing, or the replica refuses it.
pub(super) async fn run_or_defer(
    replica: &Client,
    job: &CopyJob<'_>,
    statements: &[DeferredStatement],
) -> Result<(), CopyError> {
    for DeferredStatement { what, sql } in statements {
        let Err(error) = replica.batch_execute(sql).await else {
            continue;
        };
        if is_missing_row(&error) {
            tracing::info!(what, after_lsn = %job.snapshot_lsn, "waits for the stream");
        } else {
            let reason = refusal(error, what)?;
            tracing::warn!(
                what,
                reason,
                "cannot be added now; it is tried again behind the copy"
            );
        }
        deferred::keep(replica, job.stream, (what, sql), job.snapshot_lsn)
            .await
            .map_err(CopyError::replica("keep a constraint for later"))?;
    }
    Ok(())
}

/// Why the server refuses a statement; an error where it is not the statement that it refuses.
fn refusal(error: tokio_postgres::Error, what: &str) -> Result<String, CopyError> {
    let error = PgError::from(error);
    match error.class() {
        Class::Definite if error.sqlstate().is_some() => Ok(chain(&error)),
        _ => Err(CopyError::Replica {
            doing: format!("add {what}"),
            source: error,
        }),
    }
}

/// foreign_key_violation
fn is_missing_row(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == "23503")
}

/// wrong_object_type: "cannot add NOT VALID foreign key on partitioned table"
fn is_of_a_partitioned_table(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == "42809")
}

/// Runs a statement in a transaction, a foreign key as NOT VALID where rows violate it: here, the replica equals the source, and it
/// is so there as well.
async fn add(
    transaction: &mut Transaction<'_>,
    statement: &str,
) -> Result<Added, tokio_postgres::Error> {
    let attempt = transaction.savepoint("valid").await?;
    match attempt.batch_execute(statement).await {
        Ok(()) => return attempt.commit().await.map(|()| Added::Valid),
        Err(error) if is_missing_row(&error) && statement.contains(" FOREIGN KEY ") => {
            attempt.rollback().await?;
        }
        Err(error) => return Err(error),
    }
    let attempt = transaction.savepoint("not_valid").await?;
    let not_valid = format!("{statement} NOT VALID");
    match attempt.batch_execute(&not_valid).await {
        Ok(()) => attempt.commit().await.map(|()| Added::NotValid),
        Err(error) if is_of_a_partitioned_table(&error) => {
            attempt.rollback().await.map(|()| Added::No)
        }
        Err(error) => Err(error),
    }
}

/// When [`run_deferred`] is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Changes go on coming.
    Streaming,
    /// The last one has come.
    Opening,
}

/// What became of the statements that were kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// How many still wait for the stream.
    pub waiting: usize,
    /// What the replica refuses, and why. It stays, and may be tried again.
    pub refused: Vec<(String, String)>,
}

/// Runs the statements whose moment has come, and says what became of the others.
///
/// Call it when the stream has passed a snapshot, and before a promoted replica is opened; repeatable
/// and cheap when there is nothing to do. `replica` is a session that may write, in replica role,
/// outside a transaction; nothing may be applying a batch meanwhile, since each statement locks its
/// tables until it has looked at every row.
///
/// # Errors
/// [`CopyError::Replica`] where the replica does not answer, or something else than a statement is wrong; all that was not
/// added stays for the next call.
pub async fn run_deferred(
    replica: &mut Client,
    stream: &StreamName,
    moment: Moment,
) -> Result<Ran, CopyError> {
    let is_opening = moment == Moment::Opening;
    let kept = deferred::read(replica, stream, is_opening)
        .await
        .map_err(CopyError::replica("read what waits for the stream"))?;
    let mut ran = Ran::default();
    for one in kept {
        if !one.is_due {
            ran.waiting += 1;
            continue;
        }
        if let Some(reason) = run_one(replica, stream, &one.what, &one.statement).await? {
            ran.refused.push((one.what, reason));
        }
    }
    Ok(ran)
}

/// Runs one statement and forgets it; or keeps why the replica refuses it, and says so.
async fn run_one(
    replica: &mut Client,
    stream: &StreamName,
    what: &str,
    statement: &str,
) -> Result<Option<String>, CopyError> {
    let doing = || CopyError::replica(format!("add {what}"));
    let mut transaction = replica.transaction().await.map_err(doing())?;
    let added = match add(&mut transaction, statement).await {
        Ok(added) => added,
        Err(error) => {
            let reason = refusal(error, what)?;
            transaction.rollback().await.map_err(doing())?;
            note_problem(replica, stream, what, &reason).await?;
            return Ok(Some(reason));
        }
    };
    if let Some(problem) = added.problem() {
        tracing::warn!(what, "{problem}");
    }
    deferred::remove(&transaction, stream, what)
        .await
        .map_err(CopyError::replica("forget a constraint that is there"))?;
    transaction.commit().await.map_err(doing())?;
    tracing::info!(what, "added");
    Ok(None)
}

/// Keeps the reason beside the statement.
async fn note_problem(
    replica: &Client,
    stream: &StreamName,
    what: &str,
    reason: &str,
) -> Result<(), CopyError> {
    let is_new = deferred::note_problem(replica, stream, (what, reason))
        .await
        .map_err(CopyError::replica("note what is missing"))?;
    if is_new {
        tracing::warn!(
            what,
            reason,
            "missing on the replica; the rest goes on, and it is tried again"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::TableName;

    #[test]
    fn statements_quote_every_name() {
        let table = |name: &str| TableName {
            schema: "S".into(),
            name: name.into(),
        };
        let statement = DeferredStatement::attachment(&Attachment {
            parent: table("p"),
            child: table("p\"1"),
            bound: "DEFAULT".into(),
        });
        assert_eq!(
            statement.sql,
            "ALTER TABLE ONLY \"S\".\"p\" ATTACH PARTITION \"S\".\"p\"\"1\" DEFAULT"
        );
        assert_eq!(statement.what, "partition S.p\"1 of S.p");
    }
}
