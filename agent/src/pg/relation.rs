//! What the source last said about each relation.
//!
//! Changes name their relation by OID only; its description came earlier in the same connection. The
//! assembler keeps one cache per connection and attaches the description to every change, so that
//! a batch stays readable after the relation has been described anew.
//!
//! # Invariants
//! - A description is never altered: a new one replaces it, and whoever holds the old one keeps it.
//! - Bounded by the number of relations the source has published since the connection began; a new
//!   connection needs a new cache, since the source describes everything again.

use std::collections::HashMap;
use std::sync::Arc;

use super::pgoutput::Relation;

/// The newest description of every relation, by OID.
#[derive(Debug, Default)]
pub struct RelationCache {
    relations: HashMap<u32, Arc<Relation>>,
}

impl RelationCache {
    /// Keeps a description. Returns whether it says anything new: the source also repeats itself,
    /// and only a difference is worth a look at the replica's table.
    pub fn insert(&mut self, relation: Relation) -> bool {
        if self.relations.get(&relation.id).map(AsRef::as_ref) == Some(&relation) {
            return false;
        }
        self.relations.insert(relation.id, Arc::new(relation));
        true
    }

    /// The newest description of a relation.
    pub fn get(&self, id: u32) -> Option<&Arc<Relation>> {
        self.relations.get(&id)
    }

    /// The number of relations described so far.
    pub fn len(&self) -> usize {
        self.relations.len()
    }

    /// Whether nothing was described yet.
    pub fn is_empty(&self) -> bool {
        self.relations.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::pgoutput::{Column, ReplicaIdentity};

    fn relation(name: &str, columns: &[&str]) -> Relation {
        Relation {
            id: 16_384,
            schema: "public".to_owned(),
            name: name.to_owned(),
            identity: ReplicaIdentity::Default,
            columns: columns
                .iter()
                .map(|name| Column {
                    is_key: *name == "id",
                    name: (*name).to_owned(),
                    type_oid: 23,
                    type_modifier: -1,
                })
                .collect(),
        }
    }

    #[test]
    fn a_repeated_description_is_nothing_new_and_a_different_one_is() {
        let mut cache = RelationCache::default();
        assert!(cache.is_empty());
        assert!(cache.insert(relation("t", &["id"])));
        assert!(!cache.insert(relation("t", &["id"])));
        assert!(cache.insert(relation("t", &["id", "v"])));
        assert!(cache.insert(relation("renamed", &["id", "v"])));
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn whoever_holds_a_description_keeps_it_when_a_new_one_arrives() {
        let mut cache = RelationCache::default();
        cache.insert(relation("t", &["id"]));
        let held = Arc::clone(cache.get(16_384).unwrap());
        cache.insert(relation("t", &["id", "v"]));
        assert_eq!(held.columns.len(), 1);
        assert_eq!(cache.get(16_384).unwrap().columns.len(), 2);
        assert!(cache.get(16_385).is_none());
    }

    #[test]
    fn a_repeated_description_keeps_the_same_allocation() {
        let mut cache = RelationCache::default();
        cache.insert(relation("t", &["id"]));
        let held = Arc::clone(cache.get(16_384).unwrap());
        cache.insert(relation("t", &["id"]));
        assert!(Arc::ptr_eq(&held, cache.get(16_384).unwrap()));
    }
}
