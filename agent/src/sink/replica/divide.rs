//! The slow path: a batch that was refused as a whole goes in part by part, in order, in one transaction.
//!
//! ```text
//! changes ─▶ both halves ─┬▶ folded, goes in
//!                         └▶ refused ─▶ both halves of it ─▶ … ─▶ few changes: one by one
//! ```
//! A unique value that is handed from one row to another is refused where the changes are folded, and goes in where they are
//! not; so only the changes around it are carried out one by one, and the rest by the thousand.
//!
//! # Invariants
//! - Every part is a savepoint: what is refused leaves nothing behind.
//! - What is refused even by itself is an error that says where: table, column, the transaction of the source. Of what
//!   comes before that transaction nothing is lost: it is durable when the error is told. So the replica stands right before
//!   it, whatever a person does next.
//!
//! # What it does not do
//! It does not leave anything out. A constraint of the source's that refuses what the source has accepted does not stand in
//! the way ([`crate::schema::refused`]).

use std::borrow::Cow;
use std::ops::Range;
use std::slice;

use super::chain::{Chain, while_settling};
use super::error::Place;
use super::execute::probes;
use super::fold::{Folder, Path};
use super::lane::Lane;
use super::slice::{Slice, Slices};
use super::{SinkError, SinkSettings, attempt};
use crate::ddl::CommandCounts;
use crate::error::{Class, Classify as _};
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::net;
use crate::flow::transaction::{Change, Transaction};
use crate::names::TableName;
use crate::pg::pgoutput::{self, Message};
use crate::schema::deferred;
use crate::schema::refused::{self, Taken};
use crate::sink::Applied;

/// So many changes are carried out one by one rather than divided again: each attempt is a round trip.
const FEW: usize = 64;

/// A change, and which transaction of the batch it is of.
type Placed<'c> = (usize, Cow<'c, Change>);

/// What stopped it, and at which transaction.
struct Stop {
    transaction: usize,
    error: SinkError,
}

/// Applies a batch part by part on one lane. With an error, what comes before the transaction it names is durable.
pub(super) async fn apply(
    settings: &SinkSettings,
    lane: &mut Lane,
    folder: &mut Folder,
    batch: &Batch,
) -> Result<Applied, SinkError> {
    let mut until = batch.transactions.len();
    let mut stopped: Option<SinkError> = None;
    loop {
        let mut divided = Divided::new(settings, &mut *lane, &mut *folder, batch);
        let Err(stop) = divided.transactions(until).await else {
            let net_changes = divided.net_changes;
            let applied = Applied {
                net_changes,
                slow_path: true,
                spread: false,
                commands: CommandCounts::default(),
            };
            return stopped.map_or(Ok(applied), Err);
        };
        let is_final = stop.error.class() != Class::Definite || stop.transaction == 0;
        if stopped.is_none() || is_final {
            stopped.get_or_insert(stop.error);
        }
        if is_final {
            return Err(stopped.unwrap_or(SinkError::Interrupted));
        }
        lane.run("ROLLBACK").await?;
        until = stop.transaction;
    }
}

/// A transaction on one lane, into which the changes of a batch go part by part.
pub(super) struct Divided<'a> {
    pub(super) settings: &'a SinkSettings,
    pub(super) lane: &'a mut Lane,
    pub(super) folder: &'a mut Folder,
    pub(super) batch: &'a Batch,
    pub(super) net_changes: u64,
    /// Constraints that are taken away with the transaction.
    taken: Vec<Taken>,
}

impl<'a> Divided<'a> {
    pub(super) fn new(
        settings: &'a SinkSettings,
        lane: &'a mut Lane,
        folder: &'a mut Folder,
        batch: &'a Batch,
    ) -> Self {
        Self {
            settings,
            lane,
            folder,
            batch,
            net_changes: 0,
            taken: Vec::new(),
        }
    }

    /// The first so many transactions, all of them or nothing.
    async fn transactions(&mut self, until: usize) -> Result<(), Stop> {
        let transactions = &self.batch.transactions[..until];
        let begin = attempt::begin(self.settings, self.batch, &transactions[until - 1]);
        let begin = format!("{begin}; SET CONSTRAINTS ALL DEFERRED");
        let at = |transaction| move |error| Stop { transaction, error };
        self.lane.run(&begin).await.map_err(at(0))?;
        self.folder.trim();
        let mut gathered: Vec<Placed<'a>> = Vec::new();
        for (number, transaction) in transactions.iter().enumerate() {
            if transaction.spilled.is_none() {
                let changes = transaction.changes.iter();
                let changes = changes.map(|change| (transaction.commit_lsn, change));
                let wanted = self.folder.wanted(self.lane.client(), changes).await;
                let wanted = wanted.map_err(|error| self.unfit(number, error))?;
                gathered.extend(wanted.into_iter().map(|change| (number, change)));
                continue;
            }
            self.divide(&std::mem::take(&mut gathered)).await?;
            self.spilled(number, transaction).await?;
        }
        self.divide(&gathered).await?;
        self.commit().await.map_err(at(0))
    }

    /// Ends the transaction.
    pub(super) async fn commit(&mut self) -> Result<(), SinkError> {
        failpoint::hit("apply:before-commit");
        self.lane.run("COMMIT").await?;
        failpoint::hit("apply:after-commit");
        for taken in self.taken.drain(..) {
            tracing::warn!(stream = %self.settings.stream, "{}", taken.told());
        }
        Ok(())
    }

    /// Changes of the batch's first transaction, which are wanted: as a whole, and where they are refused, by parts.
    pub(super) async fn rows(&mut self, changes: Vec<Cow<'_, Change>>) -> Result<(), SinkError> {
        let placed: Vec<Placed<'_>> = changes.into_iter().map(|change| (0, change)).collect();
        if placed.len() > FEW {
            match self.part(&placed, Path::Fast).await {
                Err(error) if error.is_for_the_slow_path() => {}
                done => return done,
            }
        }
        self.divide(&placed).await.map_err(|stop| stop.error)
    }

    async fn spilled(&mut self, number: usize, transaction: &Transaction) -> Result<(), Stop> {
        let at = |error| Stop {
            transaction: number,
            error,
        };
        let mut segments = Slices::new(slice::from_ref(transaction), self.folder.limits());
        while let Some(segment) = segments.next().map_err(|error| at(error.into()))? {
            self.segment(number, &segment).await?;
        }
        Ok(())
    }

    async fn segment(&mut self, number: usize, segment: &Slice<'_>) -> Result<(), Stop> {
        let wanted = self
            .folder
            .wanted(self.lane.client(), segment.changes())
            .await;
        let wanted = wanted.map_err(|error| self.unfit(number, error))?;
        let placed: Vec<_> = wanted.into_iter().map(|change| (number, change)).collect();
        self.divide(&placed).await
    }

    /// A table that the changes of a transaction do not fit.
    fn unfit(&self, transaction: usize, error: SinkError) -> Stop {
        let error = self.placed(transaction, error);
        Stop { transaction, error }
    }

    /// The same, and at which table of which transaction.
    pub(super) fn placed(&self, transaction: usize, error: SinkError) -> SinkError {
        let table = match &error {
            SinkError::Unfit(unfit) => Some(unfit.table.clone()),
            SinkError::TableMissing { table } | SinkError::ColumnMissing { table, .. } => {
                Some(table.clone())
            }
            _ => None,
        };
        match table {
            Some(table) => error.at(Place {
                table,
                column: None,
                commit_lsn: self.batch.transactions[transaction].commit_lsn,
            }),
            None => error,
        }
    }

    /// Halves until what is left goes in, or is one change.
    async fn divide(&mut self, changes: &[Placed<'_>]) -> Result<(), Stop> {
        let all = 0..changes.len();
        let mut ranges = match changes.len() > FEW {
            // As a whole it was refused already.
            true => halves(&all),
            false => Vec::from([all]),
        };
        while let Some(range) = ranges.pop() {
            let Some((transaction, _)) = changes.get(range.start) else {
                continue;
            };
            let part = &changes[range.clone()];
            let path = match part.len() > FEW {
                true => Path::Fast,
                false => Path::Slow,
            };
            match self.part(part, path).await {
                Ok(()) => {}
                Err(error) if !error.is_for_the_slow_path() => {
                    return Err(Stop {
                        transaction: *transaction,
                        error,
                    });
                }
                Err(error) if part.len() == 1 => {
                    let at = |error| Stop {
                        transaction: *transaction,
                        error,
                    };
                    if !self.without(&part[0], &error).await.map_err(at)? {
                        return Err(self.refused(&part[0], error).await);
                    }
                }
                Err(_) if part.len() > FEW => ranges.extend(halves(&range)),
                Err(_) => ranges.extend(range.rev().map(|one| one..one + 1)),
            }
        }
        Ok(())
    }

    /// One part, or nothing of it.
    async fn part(&mut self, changes: &[Placed<'_>], path: Path) -> Result<(), SinkError> {
        let (steps, targets) = self
            .folder
            .steps(changes.iter().map(|(_, change)| &**change), path)?;
        let mut chain = Chain::default();
        self.lane.sql("SAVEPOINT part".to_owned(), &mut chain).await;
        let preparing = self.lane.prepare(&steps, &targets);
        let result = match while_settling(std::iter::once(&mut chain), preparing).await {
            Ok(execution) => {
                self.lane.send(execution, &mut chain).await;
                self.lane.sql("RELEASE part".to_owned(), &mut chain).await;
                chain.finish().await
            }
            Err(error) => chain.finish().await.and(Err(error)),
        };
        match &result {
            Ok(()) => self.net_changes += net::count(&steps),
            Err(error) if error.is_for_the_slow_path() => {
                self.lane.run("ROLLBACK TO part; RELEASE part").await?;
            }
            Err(_) => {}
        }
        result
    }

    /// Takes constraints away that refuse what the source has accepted, if the change goes in without them.
    async fn without(&mut self, placed: &Placed<'_>, error: &SinkError) -> Result<bool, SinkError> {
        const BACK: &str = "ROLLBACK TO constraints; RELEASE constraints";
        let relation = placed.1.relations().first();
        let (Some(relation), Some(refused)) = (relation, error.of_server()) else {
            return Ok(false);
        };
        let table = TableName {
            schema: relation.schema().to_owned(),
            name: relation.relation.name.clone(),
        };
        self.lane.run("SAVEPOINT constraints").await?;
        let taken = refused::take_away(self.lane.client(), refused, &table).await;
        let taken = match taken {
            Ok(taken) => taken.unwrap_or_default(),
            // They belong to somebody else, or cannot be altered now.
            Err(error) if error.as_db_error().is_some() => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let goes_in = match taken.is_empty() {
            true => Ok(false),
            false => self
                .part(slice::from_ref(placed), Path::Slow)
                .await
                .map(|()| true),
        };
        match goes_in {
            Ok(true) => {}
            Err(error) if !error.is_for_the_slow_path() => return Err(error),
            Ok(false) | Err(_) => {
                self.lane.run(BACK).await?;
                return Ok(false);
            }
        }
        for Taken { what, add } in &taken {
            let (stream, opened) = (&self.settings.stream, deferred::when_opened());
            deferred::keep(self.lane.client(), stream, (what, add), opened).await?;
        }
        self.lane.run("RELEASE constraints").await?;
        self.taken.extend(taken);
        Ok(true)
    }

    /// A change that is refused by itself: where it is, and which value it is, if it is one.
    async fn refused(&self, (transaction, change): &Placed<'_>, error: SinkError) -> Stop {
        let transaction = *transaction;
        let Some(relation) = change.relations().first() else {
            return Stop { transaction, error };
        };
        if let (true, Some(top)) = (
            error.is_of_no_partition(),
            &self.folder.target(relation).top,
        ) {
            let error = SinkError::PartitionMissing {
                table: TableName {
                    schema: relation.schema().to_owned(),
                    name: relation.relation.name.clone(),
                },
                top: top.table.clone(),
            };
            return Stop { transaction, error };
        }
        let column = match error.is_of_a_value() {
            true => self.column(change).await,
            false => None,
        };
        let place = Place {
            table: TableName {
                schema: relation.schema().to_owned(),
                name: relation.relation.name.clone(),
            },
            column,
            commit_lsn: self.batch.transactions[transaction].commit_lsn,
        };
        Stop {
            transaction,
            error: error.at(place),
        }
    }

    /// The column whose value the replica does not take, and its type.
    async fn column(&self, change: &Change) -> Option<(String, String)> {
        let (Ok(Message::Insert { new, .. }) | Ok(Message::Update { new, .. })) =
            pgoutput::decode(&change.message, false)
        else {
            return None;
        };
        let target = self.folder.target(change.relations().first()?);
        for (at, sql, array) in probes(&target, &new).ok()? {
            if self.folder.refuses(&sql, &array).await {
                let column = &target.columns[at];
                return Some((column.name.clone(), column.full_type_sql.clone()));
            }
        }
        None
    }
}

/// The first half last: it is taken from the end.
fn halves(range: &Range<usize>) -> Vec<Range<usize>> {
    let middle = range.start + range.len() / 2;
    vec![middle..range.end, range.start..middle]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_taken_in_order_and_leave_nothing_out() {
        let mut ranges = halves(&(0..FEW * 5 + 3));
        let mut taken = Vec::new();
        while let Some(range) = ranges.pop() {
            match range.len() > FEW {
                true => ranges.extend(halves(&range)),
                false => taken.extend(range),
            }
        }
        assert!(taken.into_iter().eq(0..FEW * 5 + 3));
    }
}
