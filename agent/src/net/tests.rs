//! Folding against the plain truth: a serial replay of the same changes on a map.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::pg::pgoutput::encode;
use crate::testing::{relation, table};

const KEY_COLUMNS: [KeyColumn; 1] = [KeyColumn {
    position: 0,
    order: KeyOrder::Integer,
}];

fn keyed(_: &Arc<SourceRelation>) -> Key {
    Key {
        columns: KEY_COLUMNS.to_vec(),
    }
}

fn keyless(_: &Arc<SourceRelation>) -> Key {
    Key::default()
}

/// A row of the model: key, a small value, a large one that an update may leave unsent.
type ModelRow = (i64, i64, i64);

/// What a source transaction may do to one table.
#[derive(Clone, Debug)]
enum Operation {
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
}

/// The source: rows by key. Carries out what is possible and says it as pgoutput would.
struct Source {
    relation: Arc<SourceRelation>,
    rows: BTreeMap<i64, ModelRow>,
    changes: Vec<Change>,
}

impl Source {
    fn new(rows: &BTreeMap<i64, ModelRow>) -> Self {
        Self {
            relation: described(),
            rows: rows.clone(),
            changes: Vec::new(),
        }
    }

    fn say(&mut self, message: Bytes) {
        let relations = Relations::Row(Arc::clone(&self.relation));
        self.changes.push(Change { relations, message });
    }

    fn perform(&mut self, operation: &Operation) {
        match *operation {
            Operation::Insert(row) if !self.rows.contains_key(&row.0) => {
                self.rows.insert(row.0, row);
                let texts = texts(row);
                self.say(encode::insert(1, &values(&texts, true)));
            }
            Operation::Update { key, value, large } => {
                let Some(row) = self.rows.get_mut(&key) else {
                    return;
                };
                row.1 = value;
                row.2 = large.unwrap_or(row.2);
                let texts = texts(*row);
                self.say(encode::update(1, None, &values(&texts, large.is_some())));
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
                let (old, texts) = (key.to_string(), texts(new));
                let old = [Value::Text(old.as_bytes()), Value::Null, Value::Null];
                let new = values(&texts, large.is_some());
                self.say(encode::update(1, Some((b'K', &old)), &new));
            }
            Operation::Delete { key } => {
                if self.rows.remove(&key).is_none() {
                    return;
                }
                let old = key.to_string();
                let old = [Value::Text(old.as_bytes()), Value::Null, Value::Null];
                self.say(encode::delete(1, (b'K', &old)));
            }
            Operation::Truncate => {
                self.rows.clear();
                let relations = Relations::Truncate([Arc::clone(&self.relation)].into());
                let message = encode::truncate(&[1], false, false);
                self.changes.push(Change { relations, message });
            }
            Operation::Describe => self.relation = described(),
            Operation::Insert(_) => {}
        }
    }
}

fn described() -> Arc<SourceRelation> {
    relation(table(1, "t", &["key", "value", "large"]))
}

fn texts(row: ModelRow) -> [String; 3] {
    [row.0.to_string(), row.1.to_string(), row.2.to_string()]
}

fn values(texts: &[String; 3], large_sent: bool) -> [Value<'_>; 3] {
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

fn number(value: Value<'_>) -> Option<i64> {
    match value {
        Value::Text(text) => Some(std::str::from_utf8(text).unwrap().parse().unwrap()),
        _ => None,
    }
}

/// The replica: carries out steps with the checks the real one makes.
fn execute(rows: &mut BTreeMap<i64, ModelRow>, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Truncate { .. } => rows.clear(),
            Step::Tables(tables) => {
                for stage in tables.iter().flat_map(|table| &table.stages) {
                    match stage {
                        Stage::Keyed(net) => execute_keyed(rows, net),
                        Stage::Ordered(changes) => {
                            for change in changes {
                                execute_one(rows, change);
                            }
                        }
                    }
                }
            }
        }
    }
}

fn execute_keyed(rows: &mut BTreeMap<i64, ModelRow>, net: &BTreeMap<Box<[u8]>, NetChange>) {
    let mut keys = Vec::new();
    for change in net.values() {
        if let NetChange::Delete(old) | NetChange::Replace { old, .. } = change {
            let key = number(old.values().next().unwrap()).unwrap();
            assert!(
                rows.remove(&key).is_some(),
                "deletes a row that is not there"
            );
        }
    }
    for change in net.values() {
        if let NetChange::Update(row) = change {
            let key = number(row.values().next().unwrap()).unwrap();
            let stored = rows.get_mut(&key).expect("updates a row that is not there");
            assign(stored, row);
        }
    }
    for change in net.values() {
        if let NetChange::Insert(row) | NetChange::Replace { new: row, .. } = change {
            let all: Vec<i64> = row.values().map(|value| number(value).unwrap()).collect();
            let before = rows.insert(all[0], (all[0], all[1], all[2]));
            assert!(before.is_none(), "inserts over a row");
            keys.push(all[0]);
        }
    }
    assert!(keys.is_sorted(), "rows are not in the order of their keys");
}

fn execute_one(rows: &mut BTreeMap<i64, ModelRow>, change: &RowChange) {
    let RowChange::Update { old, new } = change else {
        panic!("with a key only key changes go one by one")
    };
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

fn operation() -> impl Strategy<Value = Operation> {
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
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Folded or one by one, the replica ends with the rows the source has, never touching a row that
    /// is not there and never inserting over one that is.
    #[test]
    fn net_changes_do_what_the_changes_do(
        before in proptest::collection::btree_map(-3i64..5, (0i64..1000, 0i64..1000), 0..6),
        operations in proptest::collection::vec(operation(), 0..60),
    ) {
        let before: BTreeMap<i64, ModelRow> =
            before.into_iter().map(|(key, (value, large))| (key, (key, value, large))).collect();
        let mut source = Source::new(&before);
        for operation in &operations {
            source.perform(operation);
        }
        let mut folded = before.clone();
        execute(&mut folded, &fold(&source.changes, &keyed).unwrap());
        prop_assert_eq!(&folded, &source.rows);
        let mut one_by_one = before;
        execute(&mut one_by_one, &serial(&source.changes, &keyed).unwrap());
        prop_assert_eq!(&one_by_one, &source.rows);
    }

    /// Key bytes are equal exactly when values are, and integers sort as numbers.
    #[test]
    fn key_bytes_sort_as_integers(a in any::<i64>(), b in any::<i64>()) {
        let bytes = |value: i64| {
            let mut bytes = Vec::new();
            assert!(append_key_value(
                &mut bytes, KeyOrder::Integer, Value::Text(value.to_string().as_bytes()),
            ));
            bytes
        };
        prop_assert_eq!(bytes(a).cmp(&bytes(b)), a.cmp(&b));
        let mut binary = Vec::new();
        append_key_value(&mut binary, KeyOrder::Integer, Value::Binary(&a.to_be_bytes()));
        prop_assert_eq!(binary, bytes(a));
    }

    /// Keys of several columns do not run into one another.
    #[test]
    fn composite_keys_are_equal_only_column_by_column(
        a in (".*", ".*"), b in (".*", ".*"),
    ) {
        let bytes = |(first, second): &(String, String)| {
            let mut bytes = Vec::new();
            for value in [first, second] {
                append_key_value(&mut bytes, KeyOrder::Bytes, Value::Text(value.as_bytes()));
            }
            bytes
        };
        prop_assert_eq!(bytes(&a) == bytes(&b), a == b);
    }
}

#[test]
fn a_table_without_a_key_is_carried_out_in_order() {
    let mut source = Source::new(&BTreeMap::new());
    let row = texts((1, 2, 3));
    let row = values(&row, true);
    source.say(encode::insert(1, &row));
    source.say(encode::insert(1, &row));
    source.say(encode::delete(1, (b'O', &row)));
    source.say(encode::update(1, Some((b'O', &row)), &row));
    let steps = fold(&source.changes, &keyless).unwrap();
    assert_eq!(count(&steps), 4);
    let [Step::Tables(tables)] = steps.as_slice() else {
        panic!("one step")
    };
    let [Stage::Ordered(changes)] = tables[0].stages.as_slice() else {
        panic!("one stage")
    };
    assert!(matches!(
        changes.as_slice(),
        [
            RowChange::Insert(_),
            RowChange::Insert(_),
            RowChange::Delete { .. },
            RowChange::Update { .. }
        ]
    ));
}

#[test]
fn under_full_identity_a_value_left_out_is_in_the_old_row() {
    let mut source = Source::new(&BTreeMap::new());
    let (old, new) = (texts((1, 2, 3)), texts((1, 9, 0)));
    source.say(encode::update(
        1,
        Some((b'O', &values(&old, true))),
        &values(&new, false),
    ));
    let steps = fold(&source.changes, &keyed).unwrap();
    let [Step::Tables(tables)] = steps.as_slice() else {
        panic!("one step")
    };
    let [Stage::Keyed(rows)] = tables[0].stages.as_slice() else {
        panic!("one stage")
    };
    let Some(NetChange::Update(row)) = rows.values().next() else {
        panic!("an update")
    };
    assert_eq!(
        row.values().map(number).collect::<Vec<_>>(),
        [Some(1), Some(9), Some(3)]
    );
}

#[test]
fn what_cannot_be_is_an_error_and_not_a_guess() {
    let row = texts((1, 2, 3));
    let row = values(&row, true);
    let left_out = [row[0], row[1], Value::UnchangedToast];
    let twice = [encode::insert(1, &row), encode::insert(1, &row)];
    let after_delete = [
        encode::delete(1, (b'K', &row)),
        encode::update(1, None, &row),
    ];
    let incomplete = [encode::insert(1, &left_out)];
    let short = [encode::insert(1, &row[..2])];
    let unidentified = [encode::update(
        1,
        None,
        &[Value::UnchangedToast, row[1], row[2]],
    )];
    for messages in [
        &twice[..],
        &after_delete,
        &incomplete,
        &short,
        &unidentified,
    ] {
        let mut source = Source::new(&BTreeMap::new());
        for message in messages {
            source.say(message.clone());
        }
        assert!(fold(&source.changes, &keyed).is_err());
    }
}
