//! Plans against the plain truth: lanes that carry out their shares in any interleaving end with the rows that
//! a serial replay gives.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::flow::net::fold;
use crate::flow::net::model::{ModelRow, ModelSource, carry_out, keyed, operation, statements};

/// What the lanes are to do, part by part; `None` where the batch takes one lane.
fn planned(
    source: &ModelSource,
    lanes: usize,
    part: usize,
    spread: Spread,
) -> Option<Vec<Vec<Vec<Step>>>> {
    let mut planner = Planner::new(lanes);
    let mut parts = Vec::new();
    let size = match source.changes.len() <= part {
        true => Part::Whole,
        false => Part::OneOfMany,
    };
    for changes in source.changes.chunks(part) {
        let steps = fold(changes, &keyed).unwrap();
        parts.push(planner.plan(steps, size, |_| spread).ok()?);
    }
    Some(parts)
}

/// Carries out the lanes' statements: at every step the next one of some lane, as `choices` says.
fn interleave(
    rows: &mut BTreeMap<i64, ModelRow>,
    parts: &[Vec<Vec<Step>>],
    lanes: usize,
    choices: &[usize],
) {
    let mut waiting: Vec<VecDeque<_>> = (0..lanes)
        .map(|lane| {
            parts
                .iter()
                .flat_map(|part| statements(&part[lane]))
                .collect()
        })
        .collect();
    let mut choices = choices.iter().cycle();
    loop {
        let ready: Vec<usize> = (0..lanes)
            .filter(|lane| !waiting[*lane].is_empty())
            .collect();
        if ready.is_empty() {
            return;
        }
        let lane = ready[choices.next().copied().unwrap_or(0) % ready.len()];
        let statement = waiting[lane].pop_front().unwrap();
        carry_out(rows, &statement);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the interleaving, no lane touches a row that another still has to bring, and the rows at
    /// the end are the source's.
    #[test]
    fn lanes_in_any_interleaving_do_what_the_changes_do(
        before in proptest::collection::btree_map(-3i64..5, (0i64..1000, 0i64..1000), 0..6),
        operations in proptest::collection::vec(operation(), 1..60),
        lanes in 1usize..5,
        part in prop_oneof![Just(1000usize), 1usize..20],
        whole in any::<bool>(),
        choices in proptest::collection::vec(any::<usize>(), 1..40),
    ) {
        let before: BTreeMap<i64, ModelRow> =
            before.into_iter().map(|(key, (value, large))| (key, (key, value, large))).collect();
        let mut source = ModelSource::new(&before);
        for operation in &operations {
            source.perform(operation);
        }
        let spread = if whole { Spread::Table } else { Spread::Keys };
        // Unplannable is a decision of its own: then the batch takes one lane.
        if let Some(parts) = planned(&source, lanes, part, spread) {
            let mut rows = before;
            interleave(&mut rows, &parts, lanes, &choices);
            prop_assert_eq!(&rows, &source.rows);
        }
    }
}

fn inserted(keys: std::ops::Range<i64>) -> ModelSource {
    let mut source = ModelSource::new(&BTreeMap::new());
    for key in keys {
        source.perform(&crate::flow::net::model::Operation::Insert((key, 0, 0)));
    }
    source
}

#[test]
fn rows_are_spread_over_all_lanes_and_a_whole_table_takes_one() {
    let source = inserted(0..400);
    let shares = |part, spread| {
        let parts = planned(&source, 4, part, spread).unwrap();
        let share = |lane: usize| {
            parts
                .iter()
                .map(|part| crate::flow::net::count(&part[lane]))
                .sum()
        };
        let mut counts: Vec<u64> = (0..4).map(share).collect();
        counts.sort_unstable();
        counts
    };
    assert_eq!(shares(1000, Spread::Keys), [100, 100, 100, 100]);
    // Keys ascend from part to part.
    let spread = shares(50, Spread::Keys);
    assert!(
        spread.iter().all(|count| (60..=140).contains(count)),
        "{spread:?}"
    );
    assert_eq!(shares(1000, Spread::Table), [0, 0, 0, 400]);
}

#[test]
fn truncate_takes_one_lane() {
    let mut source = inserted(0..4);
    source.perform(&crate::flow::net::model::Operation::Truncate);
    assert!(planned(&source, 4, 1000, Spread::Keys).is_none());
}

#[test]
fn a_description_that_changes_after_rows_were_spread_takes_one_lane() {
    let mut planner = Planner::new(2);
    let mut source = inserted(0..4);
    let first = fold(&source.changes, &keyed).unwrap();
    assert!(
        planner
            .plan(first, Part::OneOfMany, |_| Spread::Keys)
            .is_ok()
    );
    let described = source.changes.len();
    source.perform(&crate::flow::net::model::Operation::Describe);
    source.perform(&crate::flow::net::model::Operation::Delete { key: 1 });
    source.perform(&crate::flow::net::model::Operation::Describe);
    source.perform(&crate::flow::net::model::Operation::Delete { key: 2 });
    let second = fold(&source.changes[described..], &keyed).unwrap();
    assert_eq!(
        planner
            .plan(second, Part::OneOfMany, |_| Spread::Keys)
            .unwrap_err(),
        Unplannable
    );
}

#[test]
fn a_table_whose_values_change_their_form_takes_one_lane() {
    let mut source = inserted(0..40);
    source.perform(&crate::flow::net::model::Operation::OtherForm);
    source.perform(&crate::flow::net::model::Operation::Delete { key: 7 });
    let parts = planned(&source, 4, 1000, Spread::Keys).unwrap();
    let busy = parts[0].iter().filter(|share| !share.is_empty());
    assert_eq!(busy.count(), 1);
}
