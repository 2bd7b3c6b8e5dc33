//! ● What the source has told about its relations, and when.
//!
//! Pure. The connection has one set of descriptions, and every streamed transaction a set of its own:
//! what it describes may be of a table it has altered and may yet roll back. At its commit the set
//! becomes the connection's, at its abort it is forgotten (pgoutput keeps the same books, in
//! `cleanup_rel_sync_cache`).
//!
//! # Invariants
//! - Of two descriptions the one that arrived later holds. A long transaction may have described a table
//!   before somebody else did again; its commit must not bring the older description back.
//! - Equal descriptions are one allocation: who compares by pointer sees a change only where there is one.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Named, SourceRelation};
use crate::pg::pgoutput::Relation;

/// The newest description of each relation, by its id.
#[derive(Debug, Default)]
pub(super) struct Descriptions(HashMap<u32, Described>);

#[derive(Debug)]
struct Described {
    relation: Arc<SourceRelation>,
    /// Position among all descriptions of the connection.
    arrival: u64,
}

impl Descriptions {
    /// Takes a description in.
    pub(super) fn describe(&mut self, relation: Arc<SourceRelation>, arrival: u64) {
        let id = relation.relation.id;
        self.0.insert(id, Described { relation, arrival });
    }

    /// The newest description of a relation.
    pub(super) fn get(&self, id: u32) -> Option<Arc<SourceRelation>> {
        self.0.get(&id).map(|known| Arc::clone(&known.relation))
    }

    /// The description known for this id, if it says the same.
    pub(super) fn same(&self, relation: &Relation, types: &Named) -> Option<Arc<SourceRelation>> {
        self.get(relation.id)
            .filter(|known| known.relation == *relation && known.types == *types)
    }

    /// Takes over what a committed transaction described, where it is newer.
    pub(super) fn adopt(&mut self, committed: Self) {
        for (id, theirs) in committed.0 {
            if self
                .0
                .get(&id)
                .is_none_or(|ours| ours.arrival < theirs.arrival)
            {
                self.0.insert(id, theirs);
            }
        }
    }
}
