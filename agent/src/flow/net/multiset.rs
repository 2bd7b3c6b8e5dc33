//! ● Net changes of a table without a key: rows that are equal in every column are one as good as the other, so only how many
//! of each there are counts.
//!
//! Pure. A change names its old row by all of its values. Where that is a row the same batch made, the two fold; otherwise it
//! is one the replica has.
//!
//! ```text
//! insert a, delete a       = nothing          update a to b, update b to c = update a to c
//! insert a, update a to b  = insert b         update a to b, delete b      = delete a
//! ```
//!
//! # Invariants
//! - Every old row of the outcome is one the replica has before the batch, as often as it is named. So the three kinds can
//!   be carried out one after another, each in one statement.

use std::collections::HashMap;

use super::{OwnedValue, Row};
use crate::pg::pgoutput::Tuple;

/// What a batch does to the rows of a table without a key.
#[derive(Clone, Debug, Default)]
pub struct Multiset {
    /// Rows that go, and how many of each.
    pub deletes: Vec<(Tuple, u64)>,
    /// Rows that change: of how many equal ones each of these becomes another.
    pub updates: Vec<(Tuple, Vec<Row>)>,
    /// Rows that come.
    pub inserts: Vec<Row>,
}

impl Multiset {
    /// How many rows it touches.
    pub fn count(&self) -> u64 {
        let deletes: u64 = self.deletes.iter().map(|(_, copies)| copies).sum();
        let updates: usize = self.updates.iter().map(|(_, rows)| rows.len()).sum();
        deletes + (updates + self.inserts.len()) as u64
    }
}

/// All values of a row.
type Image = Vec<OwnedValue>;

/// Where a row that is there after the changes so far was before them.
#[derive(Debug)]
enum RowOrigin {
    /// Nowhere.
    Inserted,
    /// It was this one, by all its values.
    Was(Image, Tuple),
}

/// Rows while they are folded.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// Rows that came or changed, in the order in which they did; `None` once they changed again or went.
    made: Vec<Option<(RowOrigin, Row)>>,
    /// Those of them that are equal, by all their values.
    by_image: HashMap<Image, Vec<usize>>,
    /// In the order in which they went.
    gone: Vec<(Image, Tuple)>,
}

impl Rows {
    pub(super) fn is_empty(&self) -> bool {
        self.made.is_empty() && self.gone.is_empty()
    }

    pub(super) fn insert(&mut self, image: Image, row: Row) {
        self.make(image, RowOrigin::Inserted, row);
    }

    pub(super) fn update(&mut self, old: (Image, Tuple), image: Image, row: Row) {
        let origin = self.take(old);
        self.make(image, origin, row);
    }

    pub(super) fn delete(&mut self, old: (Image, Tuple)) {
        if let RowOrigin::Was(image, tuple) = self.take(old) {
            self.gone.push((image, tuple));
        }
    }

    fn make(&mut self, image: Image, origin: RowOrigin, row: Row) {
        self.by_image
            .entry(image)
            .or_default()
            .push(self.made.len());
        self.made.push(Some((origin, row)));
    }

    /// Takes away one row that is equal to this one, of the batch's own first.
    fn take(&mut self, (image, tuple): (Image, Tuple)) -> RowOrigin {
        let own = self.by_image.get_mut(&image).and_then(Vec::pop);
        match own.and_then(|place| self.made[place].take()) {
            Some((origin, _)) => origin,
            None => RowOrigin::Was(image, tuple),
        }
    }

    /// What is left to be done.
    pub(super) fn finish(self) -> Multiset {
        let mut outcome = Multiset::default();
        let mut deletes: HashMap<Image, usize> = HashMap::new();
        for (image, tuple) in self.gone {
            let place = *deletes.entry(image).or_insert(outcome.deletes.len());
            match outcome.deletes.get_mut(place) {
                Some((_, copies)) => *copies += 1,
                None => outcome.deletes.push((tuple, 1)),
            }
        }
        let mut updates: HashMap<Image, usize> = HashMap::new();
        for (origin, row) in self.made.into_iter().flatten() {
            let RowOrigin::Was(image, tuple) = origin else {
                outcome.inserts.push(row);
                continue;
            };
            let place = *updates.entry(image).or_insert(outcome.updates.len());
            match outcome.updates.get_mut(place) {
                Some((_, rows)) => rows.push(row),
                None => outcome.updates.push((tuple, vec![row])),
            }
        }
        outcome
    }
}
