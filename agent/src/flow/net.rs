//! ● Net changes: what a batch does to each row once its changes are folded together.
//!
//! Pure. The replica sink folds a batch's changes into [`Step`]s and turns each into a few statements
//! that carry thousands of rows. Inside a table with a key all changes to one row become one:
//!
//! ```text
//! insert + update = insert             update + update = update of the union of sent columns
//! insert + delete = nothing            update + delete = delete
//! delete + insert = replace            a key change    = delete of the old key and insert of the new
//! ```
//!
//! Of a table without a key equal rows are counted instead: [`Multiset`].
//!
//! # Invariants
//! - Executing the steps in order gives the same rows as executing the changes one by one: a property
//!   test holds it against a serial replay.
//! - Within one stage a row appears once, and rows are sorted by key, so that the replica walks its
//!   indexes in order.
//! - TRUNCATE is a step of its own: nothing is folded across it. The same holds for a table whose
//!   description changes, and for a key change that leaves a TOAST value on the replica.
//! - The values of a table's changes have one form. Sessions of the source differ in it, and a change log holds what
//!   several of them read: where the form changes, the table's changes begin anew, behind those before.
//!
//! # What it does not do
//! It compares keys by their bytes. Two keys that are equal in SQL and differ in bytes (`1.0` and
//! `1.00`) stay two rows here; since deletes go before inserts that is still right. Anything the
//! folding cannot explain (an insert over a row it has just seen inserted) is an error, and the batch
//! takes the slow path, whose verdict counts.

mod multiset;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bytes::Bytes;

pub use multiset::Multiset;
use multiset::Rows;

use crate::flow::transaction::{Change, Relations, SourceRelation};
use crate::pg::pgoutput::{self, DecodeError, Form, Message, OldTuple, Tuple, Value};

/// How the rows of a relation are identified on the replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// The key's columns, as positions in the relation; empty for a table without a key.
    pub columns: Vec<KeyColumn>,
}

/// One column of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyColumn {
    /// Position in the relation.
    pub position: usize,
    /// How values sort.
    pub order: KeyOrder,
}

/// How the values of a key column sort. Only a matter of speed: the order in which a B-tree is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOrder {
    /// `smallint`, `integer`, `bigint`: by number.
    Integer,
    /// By bytes.
    Bytes,
}

/// What has the values of one row.
pub trait RowValues {
    /// In column order.
    fn values(&self) -> impl Iterator<Item = Value<'_>>;

    /// One of them, to outlive the row: the same memory.
    fn share(&self, value: &[u8]) -> Bytes;

    /// What they take together, at least.
    fn bytes(&self) -> usize;
}

impl RowValues for Tuple {
    fn values(&self) -> impl Iterator<Item = Value<'_>> {
        Tuple::values(self)
    }

    fn share(&self, value: &[u8]) -> Bytes {
        Tuple::share(self, value).unwrap_or_else(|| Bytes::copy_from_slice(value))
    }

    fn bytes(&self) -> usize {
        self.wire_bytes()
    }
}

impl RowValues for Row {
    fn values(&self) -> impl Iterator<Item = Value<'_>> {
        Row::values(self)
    }

    fn share(&self, value: &[u8]) -> Bytes {
        let filled = || {
            let mut filled = self.filled.iter();
            filled.find_map(|(_, filled)| pgoutput::share(filled.bytes()?, value))
        };
        let shared = self.tuple.share(value).or_else(filled);
        shared.unwrap_or_else(|| Bytes::copy_from_slice(value))
    }

    fn bytes(&self) -> usize {
        let filled = self.filled.iter();
        let filled = filled.filter_map(|(_, value)| Some(value.bytes()?.len()));
        self.tuple.wire_bytes() + filled.sum::<usize>()
    }
}

/// A value that outlives its place in a row; it keeps the message alive that it came in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OwnedValue {
    /// NULL.
    Null,
    /// Text format.
    Text(Bytes),
    /// Binary format.
    Binary(Bytes),
}

impl OwnedValue {
    fn of(value: Value<'_>, row: &impl RowValues) -> Option<Self> {
        match value {
            Value::Null => Some(Self::Null),
            Value::Text(bytes) => Some(Self::Text(row.share(bytes))),
            Value::Binary(bytes) => Some(Self::Binary(row.share(bytes))),
            Value::UnchangedToast => None,
        }
    }

    fn bytes(&self) -> Option<&Bytes> {
        match self {
            Self::Null => None,
            Self::Text(bytes) | Self::Binary(bytes) => Some(bytes),
        }
    }

    fn borrow(&self) -> Value<'_> {
        match self {
            Self::Null => Value::Null,
            Self::Text(bytes) => Value::Text(bytes),
            Self::Binary(bytes) => Value::Binary(bytes),
        }
    }
}

/// A new row: the last tuple sent, with what earlier ones know of values it left out.
#[derive(Clone, Debug)]
pub struct Row {
    tuple: Tuple,
    /// Values for columns the tuple holds as unchanged TOAST, by position, sorted.
    filled: Vec<(usize, OwnedValue)>,
}

impl Row {
    fn new(tuple: Tuple) -> Self {
        Self {
            tuple,
            filled: Vec::new(),
        }
    }

    /// The values in column order; `UnchangedToast` where the value is only on the replica.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        self.tuple
            .values()
            .enumerate()
            .map(|(position, value)| match value {
                Value::UnchangedToast => self
                    .filled
                    .iter()
                    .find(|(filled, _)| *filled == position)
                    .map_or(Value::UnchangedToast, |(_, value)| value.borrow()),
                sent => sent,
            })
    }

    /// Positions whose value is only on the replica.
    pub fn unsent(&self) -> Vec<usize> {
        if !self.tuple.has_unchanged_toast() {
            return Vec::new();
        }
        self.values()
            .enumerate()
            .filter(|(_, value)| matches!(value, Value::UnchangedToast))
            .map(|(position, _)| position)
            .collect()
    }

    /// Takes values for what this row left out from `earlier`, at the positions `allowed` admits.
    fn fill_from(&mut self, earlier: &impl RowValues, allowed: impl Fn(usize) -> bool) {
        let unsent = self.unsent();
        if unsent.is_empty() {
            return;
        }
        for (position, value) in earlier.values().enumerate() {
            if unsent.binary_search(&position).is_ok() && allowed(position) {
                self.filled
                    .extend(OwnedValue::of(value, earlier).map(|value| (position, value)));
            }
        }
        self.filled.sort_by_key(|(position, _)| *position);
    }
}

/// What a batch does to one row of a table with a key.
#[derive(Clone, Debug)]
pub enum NetChange {
    /// The row is new.
    Insert(Row),
    /// The row stays; these columns get values.
    Update(Row),
    /// The row goes; the tuple holds its key.
    Delete(Tuple),
    /// The row goes and another with the same key comes.
    Replace {
        /// Holds the key.
        old: Tuple,
        /// The row that comes.
        new: Row,
    },
}

/// A key change that leaves a value on the replica, which is carried out by itself.
#[derive(Clone, Debug)]
pub struct KeyChange {
    /// Holds the old key.
    pub old: Tuple,
    /// The new row.
    pub new: Row,
}

/// The key of a row as bytes, among values of one form equal exactly when the key's values are; see [`KeyOrder`] for their
/// order.
pub type RowKey = Box<[u8]>;

/// A part of a table's changes that is carried out before the next one begins.
#[derive(Clone, Debug)]
pub enum Stage {
    /// One net change per key, sorted by key.
    Keyed(Vec<(RowKey, NetChange)>),
    /// One row.
    Move(KeyChange),
    /// Of a table without a key.
    Multiset(Multiset),
}

/// The changes of one table between two barriers, or as far as it is described the same and its values have one form.
#[derive(Clone, Debug)]
pub struct TableChanges {
    /// The table as described when these changes were made.
    pub relation: Arc<SourceRelation>,
    /// To be carried out in order.
    pub stages: Vec<Stage>,
}

/// What is carried out before the next step begins. Tables within a step are independent.
#[derive(Clone, Debug)]
pub enum Step {
    /// Row changes.
    Tables(Vec<TableChanges>),
    /// TRUNCATE of several tables at once.
    Truncate {
        /// The tables; the source has already resolved CASCADE into this list.
        relations: Arc<[Arc<SourceRelation>]>,
        /// RESTART IDENTITY.
        restart_identity: bool,
    },
}

impl Step {
    /// The relations it concerns; one may occur more than once.
    pub fn relations(&self) -> impl Iterator<Item = &Arc<SourceRelation>> {
        let (tables, truncated) = match self {
            Self::Tables(tables) => (tables.as_slice(), None),
            Self::Truncate { relations, .. } => (&[][..], Some(relations)),
        };
        tables
            .iter()
            .map(|table| &table.relation)
            .chain(truncated.into_iter().flat_map(|relations| relations.iter()))
    }
}

/// Why changes could not be folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// A message could not be decoded.
    #[error("decode a change")]
    Decode(#[from] DecodeError),
    /// A change contradicts one before it in the same batch.
    #[error("{what} in {table}")]
    Contradiction {
        /// What was seen.
        what: &'static str,
        /// `schema.table`.
        table: String,
    },
    /// An update or delete does not say which row.
    #[error("{table}: the source sent an update or delete without the old row's identity")]
    NoIdentity {
        /// `schema.table`.
        table: String,
    },
}

/// Folds changes into steps. `key_of` tells how a relation's rows are identified.
pub fn fold<'a>(
    changes: impl IntoIterator<Item = &'a Change>,
    key_of: &impl Fn(&Arc<SourceRelation>) -> Key,
) -> Result<Vec<Step>, FoldError> {
    let mut folding = NetFolding {
        key_of,
        steps: Vec::new(),
        tables: Vec::new(),
        index: HashMap::new(),
    };
    for change in changes {
        folding.take(change)?;
    }
    folding.barrier();
    Ok(folding.steps)
}

/// The same changes without folding: every change is a step. The slow path.
pub fn serial<'a>(
    changes: impl IntoIterator<Item = &'a Change>,
    key_of: &impl Fn(&Arc<SourceRelation>) -> Key,
) -> Result<Vec<Step>, FoldError> {
    let mut steps = Vec::new();
    for change in changes {
        steps.extend(fold([change], key_of)?);
    }
    Ok(steps)
}

/// How many net changes the steps hold.
pub fn count(steps: &[Step]) -> u64 {
    let of_stage = |stage: &Stage| match stage {
        Stage::Keyed(rows) => rows.len() as u64,
        Stage::Move(_) => 1,
        Stage::Multiset(rows) => rows.count(),
    };
    steps
        .iter()
        .map(|step| match step {
            Step::Truncate { .. } => 1,
            Step::Tables(tables) => tables
                .iter()
                .flat_map(|table| &table.stages)
                .map(of_stage)
                .sum::<u64>(),
        })
        .sum()
}

struct NetFolding<'k, K> {
    key_of: &'k K,
    steps: Vec<Step>,
    tables: Vec<FoldedTable>,
    /// Relation id -> position in `tables` of its newest description and form.
    index: HashMap<u32, usize>,
}

struct FoldedTable {
    relation: Arc<SourceRelation>,
    key: Key,
    /// Of the values so far.
    form: Option<Form>,
    /// What is complete.
    stages: Vec<Stage>,
    /// The keyed stage that is being folded, behind the complete ones.
    folding: HashMap<RowKey, NetChange>,
    /// The rows of a table without a key.
    rows: Rows,
}

impl<K: Fn(&Arc<SourceRelation>) -> Key> NetFolding<'_, K> {
    fn take(&mut self, change: &Change) -> Result<(), FoldError> {
        let message = pgoutput::decode(&change.message, false)?;
        match &change.relations {
            Relations::Truncate(relations) => {
                self.barrier();
                let restart_identity = matches!(
                    message,
                    Message::Truncate {
                        restart_identity: true,
                        ..
                    }
                );
                let relations = Arc::clone(relations);
                self.steps.push(Step::Truncate {
                    relations,
                    restart_identity,
                });
                Ok(())
            }
            Relations::Row(relation) => self.table(relation, form_of(&message)).take(message),
        }
    }

    fn table(&mut self, relation: &Arc<SourceRelation>, form: Option<Form>) -> &mut FoldedTable {
        let id = relation.relation.id;
        let known = self.index.get(&id).copied();
        let position = match known {
            Some(position) if self.tables[position].goes_on_with(relation, form) => position,
            _ => {
                self.tables.push(FoldedTable {
                    relation: Arc::clone(relation),
                    key: (self.key_of)(relation),
                    form: None,
                    stages: Vec::new(),
                    folding: HashMap::new(),
                    rows: Rows::default(),
                });
                self.index.insert(id, self.tables.len() - 1);
                self.tables.len() - 1
            }
        };
        let table = &mut self.tables[position];
        table.form = table.form.or(form);
        table
    }

    fn barrier(&mut self) {
        self.index.clear();
        let tables: Vec<TableChanges> = self.tables.drain(..).map(FoldedTable::finish).collect();
        if !tables.is_empty() {
            self.steps.push(Step::Tables(tables));
        }
    }
}

/// In which form the rows of a message are; `None` if they have no values.
fn form_of(message: &Message) -> Option<Form> {
    let of_old = |old: &OldTuple| old.tuple().form();
    match message {
        Message::Insert { new, .. } => new.form(),
        Message::Update { old, new, .. } => old.as_ref().and_then(of_old).max(new.form()),
        Message::Delete { old, .. } => of_old(old),
        _ => None,
    }
}

impl FoldedTable {
    /// Whether a change of this relation, with values of this form, can be folded with those before.
    fn goes_on_with(&self, relation: &Arc<SourceRelation>, form: Option<Form>) -> bool {
        let is_same_form = form.is_none() || self.form.is_none() || form == self.form;
        Arc::ptr_eq(&self.relation, relation) && is_same_form
    }

    fn take(&mut self, message: Message) -> Result<(), FoldError> {
        match message {
            Message::Insert { new, .. } => {
                let new = self.complete(Row::new(self.fits(new)?))?;
                if self.is_keyless() {
                    self.rows.insert(image(&new), new);
                    return Ok(());
                }
                self.insert(new)
            }
            Message::Update { old, new, .. } => {
                let new = self.fits(new)?;
                self.update(old, new)
            }
            Message::Delete { old, .. } => {
                let (OldTuple::Key(old) | OldTuple::Full(old)) = old;
                let old = self.fits(old)?;
                if self.is_keyless() {
                    self.rows.delete((image(&old), old));
                    return Ok(());
                }
                let key = self.key_bytes(old.values())?;
                self.delete(key, old)
            }
            _ => Err(self.contradiction("a message that changes no row")),
        }
    }

    /// A tuple has one value per column of its relation.
    fn fits(&self, tuple: Tuple) -> Result<Tuple, FoldError> {
        if tuple.len() == self.relation.relation.columns.len() {
            Ok(tuple)
        } else {
            Err(self.contradiction("a row with another number of columns"))
        }
    }

    /// A row that is new leaves no value out: it would be written as NULL.
    fn complete(&self, row: Row) -> Result<Row, FoldError> {
        if row.unsent().is_empty() {
            Ok(row)
        } else {
            Err(self.contradiction("a new row that leaves a value out"))
        }
    }

    fn is_keyless(&self) -> bool {
        self.key.columns.is_empty()
    }

    fn insert(&mut self, new: Row) -> Result<(), FoldError> {
        let key = self.key_bytes(new.values())?;
        self.arrive(key, new, "an insert over an existing row")
    }

    /// A complete row comes under a key that must be free.
    fn arrive(&mut self, key: RowKey, new: Row, taken: &'static str) -> Result<(), FoldError> {
        match self.folding.entry(key) {
            Entry::Vacant(free) => {
                free.insert(NetChange::Insert(new));
            }
            Entry::Occupied(mut row) => match row.get() {
                NetChange::Delete(old) => {
                    let old = old.clone();
                    row.insert(NetChange::Replace { old, new });
                }
                _ => return Err(self.contradiction(taken)),
            },
        }
        Ok(())
    }

    fn update(&mut self, old: Option<OldTuple>, new: Tuple) -> Result<(), FoldError> {
        let mut new = Row::new(new);
        if let Some(OldTuple::Key(old) | OldTuple::Full(old)) = &old
            && old.len() != new.tuple.len()
        {
            return Err(self.contradiction("an old row with another number of columns"));
        }
        // What the old row tells of values the new one left out: all of it under REPLICA IDENTITY
        // FULL, otherwise the key's columns.
        match &old {
            Some(OldTuple::Full(old)) => new.fill_from(old, |_| true),
            Some(OldTuple::Key(old)) => {
                let columns = self.key.columns.clone();
                new.fill_from(old, |at| columns.iter().any(|key| key.position == at));
            }
            None => {}
        }
        let old = old.map(|(OldTuple::Key(old) | OldTuple::Full(old))| old);
        if self.is_keyless() {
            let table = self.relation.display_name();
            let old = old.ok_or(FoldError::NoIdentity { table })?;
            let new = self.complete(new)?;
            self.rows.update((image(&old), old), image(&new), new);
            return Ok(());
        }
        let new_key = self.key_bytes(new.values())?;
        if let Some(old) = old {
            let old_key = self.key_bytes(old.values())?;
            if old_key != new_key {
                return self.change_key(old_key, old, new_key, new);
            }
        }
        self.update_in_place(new_key, new)
    }

    fn update_in_place(&mut self, key: RowKey, mut new: Row) -> Result<(), FoldError> {
        match self.folding.entry(key) {
            Entry::Vacant(free) => {
                free.insert(NetChange::Update(new));
            }
            Entry::Occupied(mut row) => match row.get_mut() {
                NetChange::Insert(earlier)
                | NetChange::Update(earlier)
                | NetChange::Replace { new: earlier, .. } => {
                    new.fill_from(earlier, |_| true);
                    *earlier = new;
                }
                NetChange::Delete(_) => {
                    return Err(self.contradiction("an update of a deleted row"));
                }
            },
        }
        Ok(())
    }

    fn change_key(
        &mut self,
        old_key: RowKey,
        old: Tuple,
        new_key: RowKey,
        mut new: Row,
    ) -> Result<(), FoldError> {
        if let Some(
            NetChange::Insert(earlier)
            | NetChange::Update(earlier)
            | NetChange::Replace { new: earlier, .. },
        ) = self.folding.get(&old_key)
        {
            new.fill_from(earlier, |_| true);
        }
        if !new.unsent().is_empty() {
            // A TOAST value is only on the replica: the row there must keep its identity.
            self.close();
            self.stages.push(Stage::Move(KeyChange { old, new }));
            return Ok(());
        }
        self.delete(old_key, old)?;
        self.arrive(new_key, new, "a key change onto an existing row")
    }

    fn delete(&mut self, key: RowKey, old: Tuple) -> Result<(), FoldError> {
        match self.folding.entry(key) {
            Entry::Vacant(free) => {
                free.insert(NetChange::Delete(old));
            }
            Entry::Occupied(mut row) => match row.get() {
                NetChange::Insert(_) => {
                    row.remove();
                }
                NetChange::Update(_) => {
                    row.insert(NetChange::Delete(old));
                }
                NetChange::Replace { old, .. } => {
                    let old = old.clone();
                    row.insert(NetChange::Delete(old));
                }
                NetChange::Delete(_) => {
                    return Err(self.contradiction("a second delete of a row"));
                }
            },
        }
        Ok(())
    }

    /// Closes the stage that is being folded.
    fn close(&mut self) {
        if !self.rows.is_empty() {
            let rows = std::mem::take(&mut self.rows).finish();
            self.stages.push(Stage::Multiset(rows));
        }
        if self.folding.is_empty() {
            return;
        }
        let mut rows: Vec<_> = self.folding.drain().collect();
        rows.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        self.stages.push(Stage::Keyed(rows));
    }

    fn finish(mut self) -> TableChanges {
        self.close();
        TableChanges {
            relation: self.relation,
            stages: self.stages,
        }
    }

    fn contradiction(&self, what: &'static str) -> FoldError {
        FoldError::Contradiction {
            what,
            table: self.relation.display_name(),
        }
    }

    /// The key as bytes that are equal exactly when the key's values are (all of them in one form), and that sort as
    /// the values do where [`KeyOrder::Integer`] says so.
    fn key_bytes<'v>(&self, values: impl Iterator<Item = Value<'v>>) -> Result<RowKey, FoldError> {
        let mut bytes = Vec::with_capacity(self.key.columns.len() * 9);
        let mut columns = self.key.columns.iter().peekable();
        for (position, value) in values.enumerate() {
            let Some(column) = columns.next_if(|column| column.position == position) else {
                continue;
            };
            if !append_key_value(&mut bytes, column.order, value) {
                return Err(FoldError::NoIdentity {
                    table: self.relation.display_name(),
                });
            }
        }
        if columns.next().is_some() {
            return Err(FoldError::NoIdentity {
                table: self.relation.display_name(),
            });
        }
        Ok(bytes.into_boxed_slice())
    }
}

/// The values of a row without a key, in the memory they are in.
fn image(row: &impl RowValues) -> Vec<OwnedValue> {
    row.values()
        .filter_map(|value| OwnedValue::of(value, row))
        .collect()
}

/// Appends one key value; false if the value is not there.
fn append_key_value(bytes: &mut Vec<u8>, order: KeyOrder, value: Value<'_>) -> bool {
    let raw = match value {
        Value::Null => {
            bytes.push(0);
            return true;
        }
        Value::UnchangedToast => return false,
        Value::Text(raw) | Value::Binary(raw) => raw,
    };
    bytes.push(1);
    let integer = match (order, value) {
        (KeyOrder::Integer, Value::Text(text)) => std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse::<i64>().ok()),
        (KeyOrder::Integer, Value::Binary(raw)) => match raw.len() {
            2 => raw
                .try_into()
                .ok()
                .map(|raw| i64::from(i16::from_be_bytes(raw))),
            4 => raw
                .try_into()
                .ok()
                .map(|raw| i64::from(i32::from_be_bytes(raw))),
            8 => raw.try_into().ok().map(i64::from_be_bytes),
            _ => None,
        },
        _ => None,
    };
    if let Some(integer) = integer {
        // Flipping the sign bit makes big-endian two's complement sort as unsigned bytes.
        bytes.extend((integer.cast_unsigned() ^ (1 << 63)).to_be_bytes());
        return true;
    }
    // Zero bytes are escaped and the value is closed with two of them, so that no value is the
    // beginning of another and bytes of the next column never decide before this one has ended.
    for byte in raw {
        bytes.push(*byte);
        if *byte == 0 {
            bytes.push(0xff);
        }
    }
    bytes.extend([0, 0]);
    true
}

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod tests;
