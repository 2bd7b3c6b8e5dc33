//! Which changes are applied, and where: the relations of one session.
//!
//! A table's changes committed before its copy's snapshot are in the copy already; applying them again
//! would double them.
//!
//! # Invariants
//! - A table that is not on the list is named by an error before a change of it that may count is left out. Only who names it
//!   to be left out gets on without it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;

use super::SinkError;
use super::target::{Targets, address};
use crate::catalog::TableName;
use crate::pg::PgLsn;
use crate::txn::{Change, Relations as ChangeRelations, SourceRelation};

/// What the sink must know of the initial copy to leave out what is already in it.
#[derive(Clone, Debug)]
pub struct Synced {
    /// Tables whose copy is complete; changes committed before the LSN are in it.
    pub tables: HashMap<TableName, Option<PgLsn>>,
    /// Where the source's WAL stood when this list was made.
    pub as_of: PgLsn,
    /// Tables that are not on the list, and whose changes are left out all the same.
    pub left_out: HashSet<TableName>,
}

/// What is known of one description of a relation.
#[derive(Debug)]
enum Standing {
    /// Changes from this commit LSN on are applied; `None`: all of them.
    Copied(Option<PgLsn>),
    /// Not on the list.
    Unknown(TableName),
    /// Not on the list, and to be left out.
    LeftOut,
}

/// The relations of one session.
#[derive(Debug)]
pub(super) struct Relations {
    synced: Synced,
    standing: HashMap<usize, (Arc<SourceRelation>, Standing)>,
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
            wanted.push(change);
        }
        if !unknown.is_empty() {
            self.targets.load(client, &unknown).await?;
        }
        Ok(wanted)
    }

    fn applied<'c>(
        &mut self,
        commit_lsn: PgLsn,
        change: &'c Change,
    ) -> Result<Option<Cow<'c, Change>>, SinkError> {
        match &change.relations {
            ChangeRelations::Row(relation) => {
                let applies = self.applies(relation, commit_lsn)?;
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
                Some(snapshot_lsn) => Standing::Copied(*snapshot_lsn),
                None if self.synced.left_out.contains(&table) => Standing::LeftOut,
                None => Standing::Unknown(table),
            };
            (Arc::clone(relation), standing)
        });
        match standing {
            Standing::Copied(snapshot_lsn) => {
                Ok(snapshot_lsn.is_none_or(|snapshot| commit_lsn >= snapshot))
            }
            Standing::LeftOut => Ok(false),
            Standing::Unknown(_) if commit_lsn < self.synced.as_of => Ok(false),
            Standing::Unknown(table) => Err(SinkError::TableNotCopied {
                table: table.clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{lsn, relation, table};

    #[test]
    fn what_the_copy_holds_is_left_out_and_what_is_newer_than_the_list_stops() {
        let name = |name: &str| TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        };
        let tables = HashMap::from([(name("old"), None), (name("new"), Some(lsn(50)))]);
        let mut relations = Relations::new(Synced {
            tables,
            as_of: lsn(100),
            left_out: HashSet::from([name("left_out")]),
        });
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
}
