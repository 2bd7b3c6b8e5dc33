//! ● Plans: a batch's net changes spread over lanes.
//!
//! Pure. With several lanes each applies its share on a connection of its own, at the same time as the
//! others and in any interleaving with them. That gives the same rows as one lane only if no change of
//! one lane depends on a change of another, and that is what this file decides:
//!
//! ```text
//! net::fold ─▶ steps ─▶ Planner ─┬▶ lane 0 ─┐ in any order
//!                                ├▶ lane 1 ─┼──────────────▶ the same rows
//!                                └▶ lane 2 ─┘
//! ```
//!
//! # Invariants
//! - All net changes of one row are on one lane, over all parts of a batch.
//! - A table whose rows can depend on one another is on one lane as a whole: one with a second unique or
//!   an exclusion constraint, one without a key, one whose key has values that are equal without being
//!   the same bytes, one whose description, or the form of whose values, changes within the batch, one with a
//!   change that has to be carried out by itself.
//! - What cannot be spread at all (TRUNCATE waits for every other user of the table) is
//!   [`Unplannable`], and the batch takes one lane.
//!
//! A batch in one part is cut into ranges of keys: neighbours share pages, and a lane that has a page to itself
//! neither waits for it nor cleans it up once more after another. Of a batch in many parts the keys to come are
//! not known, and where they ascend all would go to the last lane: those are dealt out by a hash of the key.
//!
//! # What it does not do
//! It does not decide whether spreading is worth it, and knows no connection.

use std::collections::HashMap;
use std::sync::Arc;

use crate::flow::net::{RowKey, Stage, Step, TableChanges};
use crate::flow::transaction::SourceRelation;
use crate::pg::pgoutput::Relation;

/// How the rows of a table may be spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// By key.
    Keys,
    /// Not at all.
    Table,
}

/// What is planned at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of a batch.
    Whole,
    /// A segment of a large one.
    OneOfMany,
}

/// The batch has to go through one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the batch cannot be spread over lanes")]
pub struct Unplannable;

/// Spreads the parts of one batch over lanes.
#[derive(Debug)]
pub struct Planner {
    lanes: usize,
    /// How each table was spread so far, under which description.
    tables: HashMap<(String, String), (Relation, Spread)>,
}

impl Planner {
    /// A planner for one batch.
    ///
    /// # Panics
    /// Without lanes.
    pub fn new(lanes: usize) -> Self {
        assert!(lanes > 0, "a batch is applied by a lane");
        Self {
            lanes,
            tables: HashMap::new(),
        }
    }

    /// Each lane's share of the next part of the batch, in the order of lanes. `spread_of` tells how a
    /// relation may be spread. A [`Part::Whole`] is the first and the last.
    ///
    /// # Errors
    /// [`Unplannable`]; what was planned before of the same batch must then not be committed either.
    pub fn plan(
        &mut self,
        steps: Vec<Step>,
        part: Part,
        spread_of: impl Fn(&Arc<SourceRelation>) -> Spread,
    ) -> Result<Vec<Vec<Step>>, Unplannable> {
        let mut shares: Vec<Vec<TableChanges>> = Vec::new();
        shares.resize_with(self.lanes, Vec::new);
        for step in steps {
            let Step::Tables(tables) = step else {
                return Err(Unplannable);
            };
            let described = descriptions(&tables);
            for table in tables {
                let name = name_of(&table);
                let keyed = table
                    .stages
                    .iter()
                    .all(|stage| matches!(stage, Stage::Keyed(_)));
                let spread = match spread_of(&table.relation) {
                    Spread::Keys if keyed && described[&name] == 1 => Spread::Keys,
                    Spread::Keys | Spread::Table => Spread::Table,
                };
                let spread = self.settle(&name, &table.relation.relation, spread)?;
                match spread {
                    Spread::Table => {
                        let lane = self.lane(format!("{}.{}", name.0, name.1).as_bytes());
                        shares[lane].push(table);
                    }
                    Spread::Keys => self.by_key(table, part, &mut shares),
                }
            }
        }
        Ok(shares
            .into_iter()
            .map(|tables| match tables.is_empty() {
                true => Vec::new(),
                false => vec![Step::Tables(tables)],
            })
            .collect())
    }

    /// Holds what is decided now against the parts before: a table that stays whole now must have been
    /// whole all along, and one that was spread must still be described the same.
    fn settle(
        &mut self,
        name: &(String, String),
        relation: &Relation,
        spread: Spread,
    ) -> Result<Spread, Unplannable> {
        let Some((before, earlier)) = self.tables.get(name) else {
            self.tables.insert(name.clone(), (relation.clone(), spread));
            return Ok(spread);
        };
        match (earlier, spread) {
            (Spread::Table, _) => Ok(Spread::Table),
            (Spread::Keys, Spread::Keys) if before == relation => Ok(Spread::Keys),
            (Spread::Keys, _) => Err(Unplannable),
        }
    }

    fn by_key(&self, table: TableChanges, part: Part, shares: &mut [Vec<TableChanges>]) {
        let bounds = match part {
            Part::Whole => self.ranges(&table.stages),
            Part::OneOfMany => None,
        };
        let relation = table.relation;
        for stage in table.stages {
            let Stage::Keyed(rows) = stage else {
                unreachable!("only tables without ordered changes are spread by key");
            };
            let mut parts: Vec<Vec<_>> = Vec::new();
            parts.resize_with(self.lanes, || {
                Vec::with_capacity(rows.len() / self.lanes + 1)
            });
            for row in rows {
                let lane = match &bounds {
                    Some(bounds) => bounds.partition_point(|bound| *bound <= row.0),
                    None => self.lane(&row.0),
                };
                parts[lane].push(row);
            }
            for (share, part) in shares.iter_mut().zip(parts) {
                if part.is_empty() {
                    continue;
                }
                match share.last_mut() {
                    Some(last) if Arc::ptr_eq(&last.relation, &relation) => {
                        last.stages.push(Stage::Keyed(part));
                    }
                    _ => share.push(TableChanges {
                        relation: Arc::clone(&relation),
                        stages: vec![Stage::Keyed(part)],
                    }),
                }
            }
        }
    }

    /// Where the ranges of all lanes but the first begin, equally many keys of the largest stage in each.
    fn ranges(&self, stages: &[Stage]) -> Option<Vec<RowKey>> {
        let keys = stages.iter().filter_map(|stage| match stage {
            Stage::Keyed(rows) => Some(rows),
            Stage::Move(_) | Stage::Multiset(_) => None,
        });
        let keys = keys.max_by_key(|rows| rows.len())?;
        let bound = |lane: usize| keys[keys.len() * lane / self.lanes].0.clone();
        (keys.len() >= self.lanes).then(|| (1..self.lanes).map(bound).collect())
    }

    fn lane(&self, bytes: &[u8]) -> usize {
        crc32c::crc32c(bytes) as usize % self.lanes
    }
}

fn name_of(table: &TableChanges) -> (String, String) {
    (
        table.relation.schema().to_owned(),
        table.relation.relation.name.clone(),
    )
}

/// How often each table occurs, that is, under how many descriptions and in how many forms.
fn descriptions(tables: &[TableChanges]) -> HashMap<(String, String), usize> {
    let mut count = HashMap::new();
    for table in tables {
        *count.entry(name_of(table)).or_default() += 1;
    }
    count
}

#[cfg(test)]
mod tests;
