//! Which changes are applied, and where: the relations of one session.
//!
//! A table's changes committed before its copy's snapshot are in the copy already; applying them again
//! would double them.
//!
//! # Invariants
//! - A change of a table that does not fit the replica's (`super::unfit`) is named by an error, too. Only where the same
//!   transaction goes on to describe the table anew does what was described before not count: the replica has long had the
//!   ALTER TABLE between the two, or will get it for the sake of the later one.
//! - A table that is not on the list is named by an error before a change of it that may count is left out; so is one that
//!   is not the one that was copied any more. Only who names it to be left out gets on without it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;

use super::moved::{Move, Moved};
use super::target::{Targets, Top, address};
use super::{Beside, SinkError};
use crate::flow::net::FoldError;
use crate::flow::transaction::{Change, Relations as ChangeRelations, SourceRelation};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::schema::listing::{Copied, Marker, marker};

/// What the sink must know of the initial copy to leave out what is already in it.
#[derive(Clone, Debug)]
pub struct Synced {
    /// Tables whose copy is complete.
    pub tables: HashMap<TableName, Copied>,
    /// Whose rows of `dr_agent.listed` say what they are.
    pub listed_by: StreamName,
    /// Where the source's WAL stood when this list was made.
    pub as_of: PgLsn,
    /// Tables that are on no list are copied beside the stream, and their changes are left out until they join it. Without it
    /// they are an error.
    pub beside: Option<Beside>,
    /// Tables that are not on the list, and whose changes are left out all the same.
    pub left_out: HashSet<TableName>,
    /// Whether a column that comes may be a generated one of the source's.
    pub sends_generated: bool,
}

/// The schema of the agent's own tables.
pub(super) const OURS: &str = "dr_agent";

/// What is known of one description of a relation.
#[derive(Debug)]
enum TableStanding {
    /// Changes from this commit LSN on are applied; `None`: all of them.
    Copied(Option<PgLsn>),
    /// Was copied, and is another one. What is committed before the copy is none of its.
    Replaced(TableName, Option<PgLsn>),
    /// Not on the list.
    Unknown(TableName),
    /// Not on the list, and to be left out.
    LeftOut,
}

/// What becomes of a table's changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// They are applied.
    Applied,
    /// Its copy was taken later.
    InTheCopy,
    /// It is not replicated, or not yet.
    LeftOut,
}

/// The relations of one session.
#[derive(Debug)]
pub(super) struct Relations {
    synced: Synced,
    standing: HashMap<usize, (Arc<SourceRelation>, TableStanding)>,
    pub(super) targets: Targets,
}

impl Relations {
    pub(super) fn new(synced: Synced) -> Self {
        Self {
            synced,
            standing: HashMap::new(),
            targets: Targets::default(),
        }
    }

    /// Forgets old descriptions if there are too many; true if it did.
    pub(super) fn trim(&mut self) -> bool {
        let trimmed = self.targets.trim();
        if trimmed {
            self.standing.clear();
        }
        trimmed
    }

    /// The tables are others from here on, and what was known of any counts no more.
    pub(super) fn renew(&mut self, moved: &Moved) {
        let Synced { tables, beside, .. } = &mut self.synced;
        let joined = |table: &TableName| beside.as_ref()?.get(table);
        moved.apply(tables, joined);
        for step in &moved.0 {
            if let (
                Move::Renamed(table, _) | Move::Gone(table) | Move::Aside(table),
                Some(beside),
            ) = (step, &self.synced.beside)
            {
                beside.part(table);
            }
            match (step, &self.synced.beside) {
                (Move::Aside(table), Some(beside)) => beside.leave_out(table),
                // There is nobody who could copy it.
                (Move::Aside(table), None) => _ = self.synced.left_out.insert(table.clone()),
                _ => {}
            }
        }
        self.standing.clear();
        self.targets = Targets::default();
    }

    /// What becomes of a table's changes of this commit, as far as that is decided by where it was copied.
    pub(super) fn standing(&self, table: &TableName, commit_lsn: PgLsn) -> Standing {
        if self.synced.left_out.contains(table) {
            return Standing::LeftOut;
        }
        let joined = || self.synced.beside.as_ref()?.get(table);
        match self.synced.tables.get(table).cloned().or_else(joined) {
            None => Standing::LeftOut,
            Some(copied) if copied.snapshot_lsn.is_some_and(|at| commit_lsn < at) => {
                Standing::InTheCopy
            }
            Some(_) => Standing::Applied,
        }
    }

    /// The changes that are to be applied, of a TRUNCATE only those tables it applies to. Afterwards the target of
    /// each of their relations is known.
    pub(super) async fn wanted<'c>(
        &mut self,
        client: &Client,
        changes: impl Iterator<Item = (PgLsn, &'c Change)>,
    ) -> Result<Vec<Cow<'c, Change>>, SinkError> {
        let mut wanted = Vec::new();
        let mut unknown: Vec<Arc<SourceRelation>> = Vec::new();
        for (commit_lsn, change) in changes {
            let Some(change) = self.applied(commit_lsn, change)? else {
                continue;
            };
            for relation in change.relations() {
                let seen = || unknown.iter().any(|other| Arc::ptr_eq(other, relation));
                if !self.targets.has(relation) && !seen() {
                    unknown.push(Arc::clone(relation));
                }
            }
            wanted.push((commit_lsn, change));
        }
        if !unknown.is_empty() {
            self.targets.load(client, &unknown, &self.synced).await?;
        }
        self.fitting(&wanted)?;
        self.whole(&wanted)?;
        Ok(wanted.into_iter().map(|(_, change)| change).collect())
    }

    /// Refuses to empty some of the partitions whose rows the replica has placed for itself.
    fn whole(&self, wanted: &[(PgLsn, Cow<'_, Change>)]) -> Result<(), SinkError> {
        for (_, change) in wanted {
            let ChangeRelations::Truncate(relations) = &change.relations else {
                continue;
            };
            let targets = relations.iter().map(|relation| self.targets.of(relation));
            let mut emptied: HashMap<&TableName, (usize, &Top, &TableName)> = HashMap::new();
            for target in targets {
                if let Some(top) = &target.top {
                    emptied
                        .entry(&top.table)
                        .or_insert((0, top, &target.table))
                        .0 += 1;
                }
            }
            let in_part = emptied
                .values()
                .find(|(count, top, _)| *count != top.leaves);
            if let Some((_, top, table)) = in_part {
                return Err(SinkError::TruncatedInPart {
                    table: (*table).clone(),
                    top: top.table.clone(),
                });
            }
        }
        Ok(())
    }

    /// Refuses what does not fit.
    fn fitting(&self, wanted: &[(PgLsn, Cow<'_, Change>)]) -> Result<(), SinkError> {
        if !self.targets.any_unfit() {
            return Ok(());
        }
        let mut last: HashMap<(u64, u32), usize> = HashMap::new();
        for (at, change) in wanted {
            for relation in change.relations() {
                last.insert((u64::from(*at), relation.relation.id), address(relation));
            }
        }
        for (at, change) in wanted {
            for relation in change.relations() {
                let is_last = last[&(u64::from(*at), relation.relation.id)] == address(relation);
                let unfit = &self.targets.of(relation).unfit;
                if let Some(unfit) = unfit.as_ref().filter(|_| is_last) {
                    return Err(SinkError::Unfit(Box::new(unfit.clone())));
                }
            }
        }
        Ok(())
    }

    fn applied<'c>(
        &mut self,
        commit_lsn: PgLsn,
        change: &'c Change,
    ) -> Result<Option<Cow<'c, Change>>, SinkError> {
        match &change.relations {
            ChangeRelations::Row(relation) => {
                let applies = self.applies(relation, commit_lsn)?;
                if let Some(marker) = marker(change).map_err(FoldError::from)? {
                    self.heed(marker, commit_lsn)?;
                }
                Ok(applies.then_some(Cow::Borrowed(change)))
            }
            ChangeRelations::Truncate(relations) => {
                let mut kept = Vec::new();
                for relation in relations.iter() {
                    if self.applies(relation, commit_lsn)? {
                        kept.push(Arc::clone(relation));
                    }
                }
                if kept.is_empty() {
                    return Ok(None);
                }
                Ok(Some(Cow::Owned(Change {
                    relations: ChangeRelations::Truncate(kept.into()),
                    message: change.message.clone(),
                })))
            }
        }
    }

    /// A table that is listed as something else from here on may have had changes that did not come.
    fn heed(&self, marker: Marker, commit_lsn: PgLsn) -> Result<(), SinkError> {
        let Marker {
            stream,
            table,
            listed_as,
        } = marker;
        let joined = || self.synced.beside.as_ref()?.get(&table);
        let Some(copied) = self.synced.tables.get(&table).cloned().or_else(joined) else {
            // Its first change tells.
            return Ok(());
        };
        let is_in_the_copy = copied
            .snapshot_lsn
            .is_some_and(|snapshot| commit_lsn < snapshot);
        let is_the_same = copied
            .listed_as
            .as_ref()
            .is_none_or(|was| *was == listed_as);
        let counts =
            stream == self.synced.listed_by.as_str() && !self.synced.left_out.contains(&table);
        if !counts || is_in_the_copy || is_the_same {
            return Ok(());
        }
        Err(SinkError::TableNotCopied { table })
    }

    /// A table that is not on the list appeared after it was made, and the list must be made again; or
    /// it had already gone by then (dropped, or taken out of the publication), and its old changes
    /// concern nothing that exists.
    fn applies(
        &mut self,
        relation: &Arc<SourceRelation>,
        commit_lsn: PgLsn,
    ) -> Result<bool, SinkError> {
        let (_, standing) = self.standing.entry(address(relation)).or_insert_with(|| {
            let table = TableName {
                schema: relation.schema().to_owned(),
                name: relation.relation.name.clone(),
            };
            let standing = match self.synced.tables.get(&table) {
                _ if self.synced.left_out.contains(&table) => TableStanding::LeftOut,
                Some(copied) if copied.is_of(relation.relation.id) => {
                    TableStanding::Copied(copied.snapshot_lsn)
                }
                Some(copied) => TableStanding::Replaced(table, copied.snapshot_lsn),
                None => TableStanding::Unknown(table),
            };
            (Arc::clone(relation), standing)
        });
        let is_in_the_copy =
            |snapshot: &Option<PgLsn>| snapshot.is_some_and(|snapshot| commit_lsn < snapshot);
        match standing {
            TableStanding::LeftOut => Ok(false),
            TableStanding::Copied(snapshot_lsn) => Ok(!is_in_the_copy(snapshot_lsn)),
            TableStanding::Replaced(_, snapshot_lsn) if is_in_the_copy(snapshot_lsn) => Ok(false),
            TableStanding::Unknown(table) if self.synced.beside.is_some() => {
                let joined = self.synced.beside.as_ref();
                match joined.and_then(|beside| beside.get(table)) {
                    None => {
                        // One that was gone before the list was made concerns nobody.
                        if let Some(beside) = joined.filter(|_| commit_lsn >= self.synced.as_of) {
                            beside.leave_out(table);
                        }
                        Ok(false)
                    }
                    Some(copied) if is_in_the_copy(&copied.snapshot_lsn) => Ok(false),
                    Some(copied) if copied.is_of(relation.relation.id) => Ok(true),
                    Some(_) => Err(SinkError::TableNotCopied {
                        table: table.clone(),
                    }),
                }
            }
            TableStanding::Unknown(_) if commit_lsn < self.synced.as_of => Ok(false),
            // A base backup of an earlier version lacks some of ours, whose rows nobody needs there.
            TableStanding::Unknown(table) if table.schema == OURS => Ok(false),
            TableStanding::Replaced(table, _) | TableStanding::Unknown(table) => {
                Err(SinkError::TableNotCopied {
                    table: table.clone(),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::{lsn, relation, table};
    use crate::schema::listing::ListedAs;

    /// What is on the list: its name, where it was copied, and as what it was listed.
    fn relations(tables: &[(&str, Option<u64>, Option<&str>)]) -> Relations {
        let name = |name: &str| TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        };
        let copied = |(table, at, as_what): &(&str, Option<u64>, Option<&str>)| {
            let listed_as = as_what.map(|text| ListedAs::new(text.to_owned()));
            let snapshot_lsn = at.map(lsn);
            let copied = Copied {
                snapshot_lsn,
                listed_as,
            };
            (name(table), copied)
        };
        Relations::new(Synced {
            tables: tables.iter().map(copied).collect(),
            listed_by: StreamName::new("dr_agent", "app"),
            as_of: lsn(100),
            beside: None,
            left_out: HashSet::from([name("left_out")]),
            sends_generated: false,
        })
    }

    fn stops<T: std::fmt::Debug>(result: &Result<T, SinkError>) -> bool {
        matches!(result, Err(SinkError::TableNotCopied { .. }))
    }

    #[test]
    fn what_the_copy_holds_is_left_out_and_what_is_newer_than_the_list_stops() {
        let mut relations = relations(&[("old", None, None), ("new", Some(50), None)]);
        let [old, new, gone, left_out] = [(1, "old"), (2, "new"), (3, "gone"), (4, "left_out")]
            .map(|(id, name)| relation(table(id, name, &["a"])));
        assert!(relations.applies(&old, lsn(1)).unwrap());
        assert!(!relations.applies(&new, lsn(49)).unwrap());
        assert!(relations.applies(&new, lsn(50)).unwrap());
        assert!(!relations.applies(&gone, lsn(99)).unwrap());
        assert!(matches!(
            relations.applies(&gone, lsn(100)),
            Err(SinkError::TableNotCopied { .. })
        ));
        // One that is to be left out says nothing about another.
        assert!(!relations.applies(&left_out, lsn(100)).unwrap());
        assert!(relations.applies(&gone, lsn(101)).is_err());
    }

    #[test]
    fn a_table_that_is_copied_beside_the_stream_is_left_out_until_it_joins() {
        let beside = Beside::default();
        let mut relations = relations(&[]);
        relations.synced.beside = Some(beside.clone());
        let [late, other] =
            [(7, "late"), (8, "late")].map(|(id, name)| relation(table(id, name, &["a"])));
        assert!(!relations.applies(&late, lsn(99)).unwrap());
        assert!(beside.left_out().is_empty());
        assert!(!relations.applies(&late, lsn(200)).unwrap());
        assert_eq!(beside.left_out().len(), 1);
        let copied = Copied {
            snapshot_lsn: Some(lsn(300)),
            listed_as: Some(ListedAs::new("7:70".to_owned())),
        };
        let name = TableName {
            schema: "public".to_owned(),
            name: "late".to_owned(),
        };
        beside.join(name, copied);
        assert!(beside.left_out().is_empty());
        assert!(!relations.applies(&late, lsn(299)).unwrap());
        assert!(relations.applies(&late, lsn(300)).unwrap());
        assert!(!relations.applies(&other, lsn(299)).unwrap());
        assert!(stops(&relations.applies(&other, lsn(300))));
    }

    #[test]
    fn another_table_under_the_name_of_one_that_was_copied_stops_unless_the_copy_is_behind_it() {
        let mut relations = relations(&[
            ("t", Some(50), Some("7:70")),
            ("left_out", Some(50), Some("7:70")),
        ]);
        let [same, other, left_out] = [(7, "t"), (8, "t"), (8, "left_out")]
            .map(|(id, name)| relation(table(id, name, &["a"])));
        assert!(relations.applies(&same, lsn(50)).unwrap());
        assert!(!relations.applies(&other, lsn(49)).unwrap());
        assert!(stops(&relations.applies(&other, lsn(50))));
        assert!(!relations.applies(&left_out, lsn(50)).unwrap());
    }

    #[test]
    fn a_table_that_is_listed_anew_stops_unless_the_copy_is_behind_it_or_of_it() {
        let relations = relations(&[
            ("t", Some(50), Some("7:70")),
            ("unrecorded", Some(50), None),
            ("left_out", Some(50), Some("7:70")),
        ]);
        let heed = |stream: &str, table: &str, listed_as: &str, at| {
            let marker = Marker {
                stream: stream.to_owned(),
                table: TableName {
                    schema: "public".to_owned(),
                    name: table.to_owned(),
                },
                listed_as: ListedAs::new(listed_as.to_owned()),
            };
            relations.heed(marker, lsn(at))
        };
        assert!(stops(&heed("dr_agent_app", "t", "7:71", 50)));
        assert!(heed("dr_agent_app", "t", "7:71", 49).is_ok());
        assert!(heed("dr_agent_app", "t", "7:70", 50).is_ok());
        assert!(heed("another", "t", "7:71", 50).is_ok());
        for other in ["new", "unrecorded", "left_out"] {
            assert!(heed("dr_agent_app", other, "7:71", 50).is_ok());
        }
    }
}
