//! ● The plain truth for property tests: a source that says what it does as pgoutput would, and a replica that
//! is a map and carries out statements with the checks the real one makes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::{Key, KeyChange, KeyColumn, KeyOrder, NetChange, Row, RowKey, Stage, Step};
use crate::flow::testing::{relation, table};
use crate::flow::transaction::{Change, Relations, SourceRelation};
use crate::pg::pgoutput::{Form, Value, encode};

const KEY_COLUMNS: [KeyColumn; 1] = [KeyColumn {
    position: 0,
    order: KeyOrder::Integer,
}];

pub(crate) fn keyed(_: &Arc<SourceRelation>) -> Key {
    Key {
        columns: KEY_COLUMNS.to_vec(),
    }
}

/// A row of the model: key, a small value, a large one that an update may leave unsent.
pub(crate) type ModelRow = (i64, i64, i64);

/// What a source transaction may do to one table.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Insert(ModelRow),
    Update {
        key: i64,
        value: i64,
        large: Option<i64>,
    },
    ChangeKey {
        key: i64,
        to: i64,
        value: i64,
        large: Option<i64>,
    },
    Delete {
        key: i64,
    },
    Truncate,
    Describe,
    /// Another session goes on, which sends values in the other form.
    OtherForm,
}

/// The source: rows by key. Carries out what is possible and says it as pgoutput would.
pub(crate) struct ModelSource {
    relation: Arc<SourceRelation>,
    form: Form,
    pub(crate) rows: BTreeMap<i64, ModelRow>,
    pub(crate) changes: Vec<Change>,
}

impl ModelSource {
    pub(crate) fn new(rows: &BTreeMap<i64, ModelRow>) -> Self {
        Self {
            relation: described(),
            form: Form::Text,
            rows: rows.clone(),
            changes: Vec::new(),
        }
    }

    pub(crate) fn say(&mut self, message: Bytes) {
        let relations = Relations::Row(Arc::clone(&self.relation));
        self.changes.push(Change { relations, message });
    }

    pub(crate) fn perform(&mut self, operation: &Operation) {
        match *operation {
            Operation::Insert(row) if !self.rows.contains_key(&row.0) => {
                self.rows.insert(row.0, row);
                let sent = self.sent(row);
                self.say(encode::insert(1, &self.values(&sent, true)));
            }
            Operation::Update { key, value, large } => {
                let Some(row) = self.rows.get_mut(&key) else {
                    return;
                };
                row.1 = value;
                row.2 = large.unwrap_or(row.2);
                let row = *row;
                let sent = self.sent(row);
                self.say(encode::update(
                    1,
                    None,
                    &self.values(&sent, large.is_some()),
                ));
            }
            Operation::ChangeKey {
                key,
                to,
                value,
                large,
            } => {
                if self.rows.contains_key(&to) {
                    return;
                }
                let Some(row) = self.rows.remove(&key) else {
                    return;
                };
                let new = (to, value, large.unwrap_or(row.2));
                self.rows.insert(to, new);
                let (old, sent) = (self.sent((key, 0, 0)), self.sent(new));
                let old = [self.value(&old[0]), Value::Null, Value::Null];
                let new = self.values(&sent, large.is_some());
                self.say(encode::update(1, Some((b'K', &old)), &new));
            }
            Operation::Delete { key } => {
                if self.rows.remove(&key).is_none() {
                    return;
                }
                let old = self.sent((key, 0, 0));
                let old = [self.value(&old[0]), Value::Null, Value::Null];
                self.say(encode::delete(1, (b'K', &old)));
            }
            Operation::Truncate => {
                self.rows.clear();
                let relations = Relations::Truncate([Arc::clone(&self.relation)].into());
                let message = encode::truncate(&[1], false, false);
                self.changes.push(Change { relations, message });
            }
            Operation::Describe => self.relation = described(),
            Operation::OtherForm => {
                self.form = match self.form {
                    Form::Text => Form::Binary,
                    Form::Binary => Form::Text,
                };
            }
            Operation::Insert(_) => {}
        }
    }

    fn sent(&self, row: ModelRow) -> [Vec<u8>; 3] {
        [row.0, row.1, row.2].map(|number| match self.form {
            Form::Text => number.to_string().into_bytes(),
            Form::Binary => number.to_be_bytes().to_vec(),
        })
    }

    fn value<'v>(&self, sent: &'v [u8]) -> Value<'v> {
        match self.form {
            Form::Text => Value::Text(sent),
            Form::Binary => Value::Binary(sent),
        }
    }

    fn values<'v>(&self, sent: &'v [Vec<u8>; 3], large_sent: bool) -> [Value<'v>; 3] {
        let large = if large_sent {
            self.value(&sent[2])
        } else {
            Value::UnchangedToast
        };
        [self.value(&sent[0]), self.value(&sent[1]), large]
    }
}

fn described() -> Arc<SourceRelation> {
    relation(table(1, "t", &["key", "value", "large"]))
}

pub(crate) fn texts(row: ModelRow) -> [String; 3] {
    [row.0.to_string(), row.1.to_string(), row.2.to_string()]
}

pub(crate) fn values(texts: &[String; 3], large_sent: bool) -> [Value<'_>; 3] {
    let large = if large_sent {
        Value::Text(texts[2].as_bytes())
    } else {
        Value::UnchangedToast
    };
    [
        Value::Text(texts[0].as_bytes()),
        Value::Text(texts[1].as_bytes()),
        large,
    ]
}

pub(crate) fn number(value: Value<'_>) -> Option<i64> {
    match value {
        Value::Text(text) => Some(std::str::from_utf8(text).unwrap().parse().unwrap()),
        Value::Binary(bytes) => Some(i64::from_be_bytes(bytes.try_into().unwrap())),
        Value::Null | Value::UnchangedToast => None,
    }
}

/// One statement of the replica sink, as far as the model goes.
#[derive(Debug)]
pub(crate) enum ModelStatement<'s> {
    Deletes(Vec<i64>),
    Updates(Vec<&'s Row>),
    Inserts(Vec<&'s Row>),
    Move(&'s KeyChange),
    Truncate,
}

/// The statements of these steps, in the order in which the replica sink sends them.
pub(crate) fn statements(steps: &[Step]) -> Vec<ModelStatement<'_>> {
    let mut statements = Vec::new();
    for step in steps {
        match step {
            Step::Truncate { .. } => statements.push(ModelStatement::Truncate),
            Step::Tables(tables) => {
                for stage in tables.iter().flat_map(|table| &table.stages) {
                    match stage {
                        Stage::Keyed(net) => keyed_statements(net, &mut statements),
                        Stage::Move(change) => statements.push(ModelStatement::Move(change)),
                        Stage::Multiset(_) => panic!("the model's table has a key"),
                    }
                }
            }
        }
    }
    statements
}

fn keyed_statements<'s>(net: &'s [(RowKey, NetChange)], statements: &mut Vec<ModelStatement<'s>>) {
    let (mut deletes, mut updates, mut inserts) = (Vec::new(), Vec::new(), Vec::new());
    for (_, change) in net {
        match change {
            NetChange::Delete(old) => deletes.push(key_of(old.values())),
            NetChange::Update(row) => updates.push(row),
            NetChange::Insert(row) => inserts.push(row),
            NetChange::Replace { old, new } => {
                deletes.push(key_of(old.values()));
                inserts.push(new);
            }
        }
    }
    for rows in [&updates, &inserts] {
        expect_one_form(rows);
        assert!(
            rows.iter().map(|row| key_of(row.values())).is_sorted(),
            "rows are not in the order of their keys"
        );
    }
    statements.extend([
        ModelStatement::Deletes(deletes),
        ModelStatement::Updates(updates),
        ModelStatement::Inserts(inserts),
    ]);
}

/// A statement takes each column as one array, whose values have one form.
fn expect_one_form(rows: &[&Row]) {
    let is_binary = |value: Value<'_>| match value {
        Value::Text(_) => Some(false),
        Value::Binary(_) => Some(true),
        Value::Null | Value::UnchangedToast => None,
    };
    let mut forms = rows
        .iter()
        .flat_map(|row| row.values().filter_map(is_binary));
    let first = forms.next();
    assert!(
        forms.all(|form| Some(form) == first),
        "one statement has values of both forms"
    );
}

fn key_of<'v>(mut values: impl Iterator<Item = Value<'v>>) -> i64 {
    number(values.next().unwrap()).unwrap()
}

/// The replica: carries out a statement with the checks the real one makes.
pub(crate) fn carry_out(rows: &mut BTreeMap<i64, ModelRow>, statement: &ModelStatement<'_>) {
    match statement {
        ModelStatement::Truncate => rows.clear(),
        ModelStatement::Move(change) => execute_one(rows, change),
        ModelStatement::Deletes(keys) => {
            for key in keys {
                assert!(
                    rows.remove(key).is_some(),
                    "deletes a row that is not there"
                );
            }
        }
        ModelStatement::Updates(updates) => {
            for row in updates {
                let stored = rows
                    .get_mut(&key_of(row.values()))
                    .expect("updates a row that is not there");
                assign(stored, row);
            }
        }
        ModelStatement::Inserts(inserts) => {
            for row in inserts {
                let all: Vec<i64> = row.values().map(|value| number(value).unwrap()).collect();
                let before = rows.insert(all[0], (all[0], all[1], all[2]));
                assert!(before.is_none(), "inserts over a row");
            }
        }
    }
}

fn execute_one(rows: &mut BTreeMap<i64, ModelRow>, KeyChange { old, new }: &KeyChange) {
    let key = number(old.values().next().unwrap()).unwrap();
    let mut row = rows.remove(&key).expect("updates a row that is not there");
    assign(&mut row, new);
    assert!(rows.insert(row.0, row).is_none(), "moves onto a row");
}

fn assign(stored: &mut ModelRow, row: &Row) {
    let sent: Vec<Option<i64>> = row.values().map(number).collect();
    stored.0 = sent[0].unwrap_or(stored.0);
    stored.1 = sent[1].unwrap_or(stored.1);
    stored.2 = sent[2].unwrap_or(stored.2);
}

pub(crate) fn operation() -> impl Strategy<Value = Operation> {
    // Few keys, negative ones among them, so that changes meet.
    let key = -3i64..5;
    let value = 0i64..1000;
    let large = proptest::option::of(0i64..1000);
    prop_oneof![
        4 => (key.clone(), value.clone(), value.clone()).prop_map(Operation::Insert),
        4 => (key.clone(), value.clone(), large.clone())
            .prop_map(|(key, value, large)| Operation::Update { key, value, large }),
        4 => (key.clone(), key.clone(), value, large)
            .prop_map(|(key, to, value, large)| Operation::ChangeKey { key, to, value, large }),
        4 => key.prop_map(|key| Operation::Delete { key }),
        1 => Just(Operation::Truncate),
        1 => Just(Operation::Describe),
        1 => Just(Operation::OtherForm),
    ]
}
