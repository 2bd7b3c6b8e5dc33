//! Folding against the plain truth: a serial replay of the same changes on a map.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::model::{
    ModelRow, ModelSource, carry_out, keyed, number, operation, statements, texts, values,
};
use super::*;
use crate::pg::pgoutput::encode;

fn keyless(_: &Arc<SourceRelation>) -> Key {
    Key::default()
}

fn execute(rows: &mut BTreeMap<i64, ModelRow>, steps: &[Step]) {
    for statement in statements(steps) {
        carry_out(rows, &statement);
    }
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
        let mut source = ModelSource::new(&before);
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

/// What is left of the changes of a table without a key.
fn multiset(source: &ModelSource) -> Multiset {
    let steps = fold(&source.changes, &keyless).unwrap();
    match steps.as_slice() {
        [] => Multiset::default(),
        [Step::Tables(tables)] => match tables[0].stages.as_slice() {
            [Stage::Multiset(rows)] => rows.clone(),
            stages => panic!("one stage: {stages:?}"),
        },
        steps => panic!("one step: {steps:?}"),
    }
}

fn row_of<'v>(values: impl Iterator<Item = Value<'v>>) -> i64 {
    number(values.into_iter().next().unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Without a key, whatever is done to rows that are often equal: carried out in three statements on the rows there were
    /// before, the outcome is what the changes one by one come to.
    #[test]
    fn rows_without_a_key_are_counted(
        before in proptest::collection::vec(0i64..4, 0..8),
        operations in proptest::collection::vec((0u8..3, 0i64..5, 0i64..5), 0..40),
    ) {
        let mut truth = before.clone();
        let mut source = ModelSource::new(&BTreeMap::new());
        for (what, a, b) in operations {
            let (old, new) = (texts((a, 0, 0)), texts((b, 0, 0)));
            let (old, new) = (values(&old, true), values(&new, true));
            let place = truth.iter().position(|row| *row == a);
            match (what, place) {
                (0, _) => {
                    truth.push(b);
                    source.say(encode::insert(1, &new));
                }
                (1, Some(place)) => {
                    truth[place] = b;
                    source.say(encode::update(1, Some((b'O', &old)), &new));
                }
                (2, Some(place)) => {
                    truth.remove(place);
                    source.say(encode::delete(1, (b'O', &old)));
                }
                _ => {}
            }
        }
        let outcome = multiset(&source);
        let mut rows = before;
        let take = |rows: &mut Vec<i64>, row: i64| {
            let place = rows.iter().position(|there| *there == row);
            rows.remove(place.expect("a row that was there before"));
        };
        for (old, copies) in &outcome.deletes {
            (0..*copies).for_each(|_| take(&mut rows, row_of(old.values())));
        }
        let mut came = Vec::new();
        for (old, news) in &outcome.updates {
            for new in news {
                take(&mut rows, row_of(old.values()));
                came.push(row_of(new.values()));
            }
        }
        rows.extend(came);
        rows.extend(outcome.inserts.iter().map(|row| row_of(row.values())));
        rows.sort_unstable();
        truth.sort_unstable();
        prop_assert_eq!(rows, truth);
    }
}

#[test]
fn of_a_table_without_a_key_rows_of_the_batch_fold_and_equal_ones_go_together() {
    let [a, b, c] = [1, 2, 3].map(|n| texts((n, 0, 0)));
    let [a, b, c] = [&a, &b, &c].map(|row| values(row, true));
    let mut source = ModelSource::new(&BTreeMap::new());
    source.say(encode::insert(1, &a));
    source.say(encode::delete(1, (b'O', &a)));
    source.say(encode::delete(1, (b'O', &a)));
    source.say(encode::delete(1, (b'O', &a)));
    source.say(encode::update(1, Some((b'O', &b)), &c));
    source.say(encode::update(1, Some((b'O', &b)), &c));
    source.say(encode::update(1, Some((b'O', &c)), &a));
    let outcome = multiset(&source);
    let [(gone, 2)] = outcome.deletes.as_slice() else {
        panic!("two copies go: {outcome:?}")
    };
    assert_eq!(row_of(gone.values()), 1);
    let [(old, news)] = outcome.updates.as_slice() else {
        panic!("equal rows change together: {outcome:?}")
    };
    assert_eq!(row_of(old.values()), 2);
    let mut news: Vec<i64> = news.iter().map(|new| row_of(new.values())).collect();
    news.sort_unstable();
    assert_eq!(news, [1, 3]);
    assert!(outcome.inserts.is_empty());
    assert_eq!(outcome.count(), 4);
}

#[test]
fn under_full_identity_a_value_left_out_is_in_the_old_row() {
    let mut source = ModelSource::new(&BTreeMap::new());
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
    let Some((_, NetChange::Update(row))) = rows.first() else {
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
        let mut source = ModelSource::new(&BTreeMap::new());
        for message in messages {
            source.say(message.clone());
        }
        assert!(fold(&source.changes, &keyed).is_err());
    }
}

#[test]
fn one_row_in_two_forms_is_changed_in_order_and_each_statement_has_one_form() {
    let by_bytes = |_: &Arc<SourceRelation>| Key {
        columns: vec![KeyColumn {
            position: 0,
            order: KeyOrder::Bytes,
        }],
    };
    let (text, binary) = (Value::Text(b"0a0b"), Value::Binary(b"\x0a\x0b"));
    let large = Value::Binary(b"large");
    let unsent = Value::UnchangedToast;
    let mut source = ModelSource::new(&BTreeMap::new());
    source.say(encode::insert(1, &[binary, Value::Binary(b"1"), large]));
    source.say(encode::update(1, None, &[text, Value::Text(b"2"), unsent]));
    source.say(encode::update(1, None, &[text, Value::Text(b"3"), unsent]));
    source.say(encode::delete(
        1,
        (b'K', &[binary, Value::Null, Value::Null]),
    ));
    let steps = fold(&source.changes, &by_bytes).unwrap();
    let [Step::Tables(tables)] = steps.as_slice() else {
        panic!("one step")
    };
    let stages: Vec<&Stage> = tables.iter().flat_map(|table| &table.stages).collect();
    let [
        Stage::Keyed(first),
        Stage::Keyed(second),
        Stage::Keyed(third),
    ] = stages.as_slice()
    else {
        panic!("three stages: {stages:?}")
    };
    assert!(matches!(first.as_slice(), [(_, NetChange::Insert(_))]));
    let [(_, NetChange::Update(row))] = second.as_slice() else {
        panic!("one update: {second:?}")
    };
    assert_eq!(row.values().nth(1), Some(Value::Text(b"3")));
    // Its large value is on the replica by then.
    assert_eq!(row.unsent(), [2]);
    assert!(matches!(third.as_slice(), [(_, NetChange::Delete(_))]));
}

#[test]
fn without_a_key_rows_of_two_forms_are_in_order_too() {
    let row = |value| [Value::Null, value, Value::Null];
    let mut source = ModelSource::new(&BTreeMap::new());
    for value in [Value::Binary(b"1"), Value::Null, Value::Text(b"2")] {
        source.say(encode::insert(1, &row(value)));
    }
    let steps = fold(&source.changes, &keyless).unwrap();
    let [Step::Tables(tables)] = steps.as_slice() else {
        panic!("one step")
    };
    let inserts = |table: &TableChanges| match table.stages.as_slice() {
        [Stage::Multiset(rows)] => rows.inserts.len(),
        stages => panic!("one stage: {stages:?}"),
    };
    assert_eq!(tables.iter().map(inserts).collect::<Vec<_>>(), [2, 1]);
}
