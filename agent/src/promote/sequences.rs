//! Where a sequence must stand when the replica opens: arithmetic only.
//!
//! Logical decoding does not carry sequences; their positions travel in the in-band table
//! `sequence_state`, polled every `source.sequences`. Between the last poll and the crash the source
//! gave out values we never heard of. A value given out twice is a key collision, or two invoices
//! with one number, so each sequence is set ahead by a margin and beyond the columns it feeds.
//!
//! Pure: [`super::execute`] reads the facts and calls `setval`.
//!
//! # Invariants
//! - A sequence never moves against its direction and never leaves its bounds.
//! - It stays on its own steps: a sequence that gives odd numbers gives odd numbers afterwards.
//! - A sequence of known position that had values left has values left afterwards.
//! - Computed again from the same facts after `setval`, the result is the same.
//!
//! # What it does not do
//! A cycling sequence is not moved beyond its columns: after its first round the largest value in a
//! column says nothing about where it stands.

/// Calls of `nextval` a source may make between the last poll and its death, per sequence.
///
/// 10 000 calls in the default five seconds between two polls are 2 000 per second on one sequence.
/// Too small and a busy sequence repeats values that were given out and lost; too large and a
/// `smallint` key loses part of its range. Rows that did arrive are covered whatever this number is.
pub const MARGIN_CALLS: i128 = 10_000;

/// Sessions on the source that may each fetch a fresh block of `CACHE` values between two polls.
pub const MARGIN_CACHES: i128 = 100;

/// What is known about one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// `INCREMENT`; negative for a descending one, never 0.
    pub increment: i64,
    /// `MINVALUE`.
    pub min: i64,
    /// `MAXVALUE`.
    pub max: i64,
    /// `START`.
    pub start: i64,
    /// `CACHE`.
    pub cache: i64,
    /// `CYCLE`.
    pub cycle: bool,
    /// Last value known from the source, out of `sequence_state`.
    pub known: Option<i64>,
    /// Last value on the replica itself, `None` where it never gave one.
    pub here: Option<i64>,
    /// The value furthest in the sequence's direction in the columns it feeds.
    pub column: Option<i64>,
}

/// What to do with one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The last value it shall have given, for `setval(…, value, true)`; `None` leaves it alone.
    pub value: Option<i64>,
    /// Why the operator should look at it, if he should.
    pub warning: Option<String>,
}

/// Where the sequence must stand.
pub fn target(facts: &Facts) -> Target {
    let Facts {
        known,
        here,
        column,
        ..
    } = *facts;
    // The replica's own position is no anchor: after `setval` it holds a margin already.
    let guess = if facts.cycle {
        None
    } else {
        column.map(|_| facts.start)
    };
    let Some(anchor) = known.or(guess) else {
        return Target {
            value: None,
            warning: Some(
                "its position on the source is unknown; it stays where it is on the replica"
                    .to_owned(),
            ),
        };
    };
    let increment = i128::from(facts.increment);
    let margin = MARGIN_CALLS + MARGIN_CACHES * i128::from(facts.cache.max(1));
    let anchor = i128::from(anchor);
    if facts.cycle {
        // Beyond half of a ring, further ahead means closer behind.
        let length = (i128::from(facts.max) - i128::from(facts.min)) / increment.abs() + 1;
        let ahead = margin.min(length / 2);
        return Target {
            value: Some(clamped(wrapped(anchor + ahead * increment, facts))),
            warning: None,
        };
    }

    let room = steps_left(anchor, facts);
    let mut base = 0;
    let mut warning = None;
    if let Some(column) = column {
        let steps = steps_up_to(anchor, i128::from(column), increment);
        // Rows that arrived after the last poll lie within the margin. What lies further was written by
        // hand; such a row, 2147483647 for "none", must not leave the sequence without values on the
        // day it counts. The source lived with it too.
        let plausible = known.is_none() || steps <= margin || steps <= room / 2;
        if plausible {
            base = steps.clamp(0, room);
        } else {
            warning = Some(format!(
                "a column holds {column}, far beyond {anchor}; left out of account"
            ));
        }
    }
    let ahead = margin.min((room - base) / 2);
    if ahead < margin && warning.is_none() {
        warning = Some(format!(
            "only {} values are left up to its bound; set ahead by {ahead} instead of {margin}",
            room - base
        ));
    }
    let mut steps = base + ahead;
    if let Some(here) = here {
        // Never backwards, and the same result when computed again.
        steps = steps.max(steps_up_to(anchor, i128::from(here), increment).min(room));
    }
    let value = anchor + steps.max(0) * increment;
    Target {
        value: Some(clamped(value.clamp(facts.min.into(), facts.max.into()))),
        warning,
    }
}

/// Steps of `increment` from `from` until `to` is reached or passed; negative or 0 where it lies behind.
fn steps_up_to(from: i128, to: i128, increment: i128) -> i128 {
    let distance = to - from;
    let steps = distance / increment;
    // Division rounds towards zero; a positive remainder of the way needs one more step.
    if steps >= 0 && distance % increment != 0 && (distance > 0) == (increment > 0) {
        steps + 1
    } else {
        steps
    }
}

/// Steps the sequence can still make inside its bounds.
fn steps_left(from: i128, facts: &Facts) -> i128 {
    let bound = if facts.increment > 0 {
        facts.max
    } else {
        facts.min
    };
    ((i128::from(bound) - from) / i128::from(facts.increment)).max(0)
}

/// A cycling sequence begins again at its other bound.
fn wrapped(value: i128, facts: &Facts) -> i128 {
    let (min, max) = (i128::from(facts.min), i128::from(facts.max));
    if (min..=max).contains(&value) {
        return value;
    }
    let increment = i128::from(facts.increment);
    let (first, length) = if increment > 0 {
        (min, (max - min) / increment + 1)
    } else {
        (max, (min - max) / increment + 1)
    };
    let beyond = steps_up_to(if increment > 0 { max } else { min }, value, increment) - 1;
    first + beyond.rem_euclid(length) * increment
}

fn clamped(value: i128) -> i64 {
    i64::try_from(value)
        .expect("bounds of a sequence are 64-bit and the value was kept inside them")
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy as _;

    use super::*;

    const SERIAL: Facts = Facts {
        increment: 1,
        min: 1,
        max: i64::MAX,
        start: 1,
        cache: 1,
        cycle: false,
        known: None,
        here: None,
        column: None,
    };
    const MARGIN: i64 = 10_100;

    fn value(facts: Facts) -> i64 {
        target(&facts).value.unwrap()
    }

    #[test]
    fn the_margin_goes_on_top_of_whichever_is_further_the_known_value_or_the_column() {
        assert_eq!(
            value(Facts {
                known: Some(500),
                ..SERIAL
            }),
            500 + MARGIN
        );
        assert_eq!(
            value(Facts {
                known: Some(500),
                column: Some(40_000),
                ..SERIAL
            }),
            40_000 + MARGIN
        );
        assert_eq!(
            value(Facts {
                known: Some(500),
                column: Some(3),
                ..SERIAL
            }),
            500 + MARGIN
        );
        assert_eq!(
            value(Facts {
                column: Some(7),
                ..SERIAL
            }),
            7 + MARGIN
        );
    }

    #[test]
    fn descending_sequences_move_down() {
        let down = Facts {
            increment: -1,
            min: i64::MIN,
            max: -1,
            start: -1,
            ..SERIAL
        };
        assert_eq!(
            value(Facts {
                known: Some(-500),
                ..down
            }),
            -500 - MARGIN
        );
        assert_eq!(
            value(Facts {
                known: Some(-500),
                column: Some(-900),
                ..down
            }),
            -900 - MARGIN
        );
        assert_eq!(
            value(Facts {
                known: Some(-500),
                column: Some(-3),
                ..down
            }),
            -500 - MARGIN
        );
    }

    #[test]
    fn odd_numbers_stay_odd_even_when_a_column_holds_an_even_one() {
        let odd = Facts {
            increment: 2,
            known: Some(11),
            column: Some(100),
            ..SERIAL
        };
        let set = value(odd);
        assert!(set > 100 && set % 2 == 1, "{set}");
    }

    #[test]
    fn a_nearly_exhausted_sequence_keeps_half_of_what_is_left() {
        let small = Facts {
            max: 32_767,
            known: Some(32_000),
            ..SERIAL
        };
        let result = target(&small);
        assert_eq!(result.value, Some(32_000 + 383));
        assert!(result.warning.unwrap().contains("767 values are left"));
        let empty = target(&Facts {
            max: 100,
            known: Some(100),
            ..SERIAL
        });
        assert_eq!(empty.value, Some(100));
        assert!(empty.warning.is_some());
    }

    #[test]
    fn a_row_with_an_impossible_value_does_not_exhaust_the_sequence() {
        let result = target(&Facts {
            max: 1_000_000,
            known: Some(500),
            column: Some(i64::MAX),
            ..SERIAL
        });
        assert_eq!(result.value, Some(500 + MARGIN));
        assert!(result.warning.unwrap().contains("left out of account"));
    }

    #[test]
    fn a_row_at_the_very_end_does_not_exhaust_it_either_but_the_next_few_rows_count() {
        let int4 = Facts {
            max: 2_147_483_647,
            known: Some(9),
            column: Some(2_147_483_647),
            ..SERIAL
        };
        let result = target(&int4);
        assert_eq!(result.value, Some(9 + MARGIN));
        assert!(result.warning.is_some());
        let near_the_end = Facts {
            max: 32_767,
            known: Some(32_000),
            column: Some(32_700),
            ..SERIAL
        };
        assert_eq!(value(near_the_end), 32_700 + 33);
    }

    #[test]
    fn a_large_cache_widens_the_margin() {
        let cached = Facts {
            cache: 1000,
            known: Some(0),
            ..SERIAL
        };
        assert_eq!(value(cached), 110_000);
        let by_ten = Facts {
            increment: 10,
            known: Some(0),
            ..SERIAL
        };
        assert_eq!(value(by_ten), 10 * MARGIN);
    }

    #[test]
    fn cycling_sequences_wrap_inside_their_bounds() {
        let ring = Facts {
            max: 1_000,
            cycle: true,
            known: Some(990),
            ..SERIAL
        };
        assert_eq!(value(ring), 490, "half the ring ahead");
        let down = Facts {
            increment: -1,
            start: 1_000,
            ..ring
        };
        assert!((1..=1_000).contains(&value(down)));
        assert_eq!(
            value(Facts {
                max: 100_000,
                ..ring
            }),
            990 + MARGIN
        );
    }

    #[test]
    fn computed_again_after_setval_the_result_is_the_same() {
        let rings = [false, true];
        for cycle in rings {
            for (increment, known) in [
                (1, Some(5)),
                (-3, Some(-7)),
                (7, None),
                (1, Some(9_999_990)),
            ] {
                let (min, max) = if increment > 0 {
                    (1, 10_000_000)
                } else {
                    (-10_000_000, -1)
                };
                let facts = Facts {
                    increment,
                    min,
                    max,
                    start: if increment > 0 { min } else { max },
                    cycle,
                    known,
                    column: Some(if increment > 0 { 77 } else { -77 }),
                    ..SERIAL
                };
                let Some(once) = target(&facts).value else {
                    assert!(cycle && facts.known.is_none(), "{facts:?}");
                    continue;
                };
                assert!((min..=max).contains(&once));
                let here = Some(once);
                assert_eq!(value(Facts { here, ..facts }), once, "{facts:?}");
            }
        }
    }

    #[test]
    fn a_sequence_nothing_is_known_of_is_left_alone_and_named() {
        let result = target(&SERIAL);
        assert_eq!(result.value, None);
        assert!(result.warning.is_some());
    }

    #[test]
    fn without_a_known_position_the_column_alone_decides_and_a_repeat_adds_nothing() {
        let blind = Facts {
            column: Some(77),
            ..SERIAL
        };
        let once = value(blind);
        assert_eq!(once, 77 + MARGIN);
        assert_eq!(
            value(Facts {
                here: Some(once),
                ..blind
            }),
            once
        );
    }

    proptest::proptest! {
        #[test]
        fn any_sequence_stays_inside_its_bounds_and_beyond_what_was_given_out(
            increment in (-1000i64..=1000).prop_filter("never 0", |i| *i != 0),
            bounds in (proptest::prelude::any::<i64>(), proptest::prelude::any::<i64>()),
            at in 0.0f64..=1.0,
            column_at in 0.0f64..=1.0,
            cache in 1i64..=5000,
        ) {
            let (min, max) = (bounds.0.min(bounds.1), bounds.0.max(bounds.1));
            let span = i128::from(max) - i128::from(min);
            #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss,
                     reason = "any value between the bounds will do")]
            let point = |share: f64| {
                (i128::from(min) + ((span as f64 * share) as i128).min(span)) as i64
            };
            let (known, column) = (point(at), point(column_at));
            let facts = Facts {
                increment, min, max, start: min, cache, cycle: false,
                known: Some(known), here: None, column: Some(column),
            };
            let set = value(facts);
            proptest::prop_assert!((min..=max).contains(&set));
            proptest::prop_assert_eq!((i128::from(set) - i128::from(known)) % i128::from(increment), 0);
            let ahead = if increment > 0 { set >= known } else { set <= known };
            proptest::prop_assert!(ahead);
            let left = |from: i64| {
                let bound = if increment > 0 { max } else { min };
                (i128::from(bound) - i128::from(from)) / i128::from(increment)
            };
            let followed = if increment > 0 { set >= column } else { set <= column };
            // Beyond the column, or values are left and the operator is told.
            proptest::prop_assert!(
                followed || target(&facts).warning.is_some(),
                "{:?} set to {}", facts, set
            );
            if !followed {
                proptest::prop_assert!(left(set) > 0 || left(known) == 0 || left(column) <= 0);
            }
            proptest::prop_assert_eq!(value(Facts { here: Some(set), ..facts }), set);
        }
    }

    #[test]
    fn the_ends_of_the_64_bit_range_do_not_overflow() {
        let up = Facts {
            known: Some(i64::MAX),
            ..SERIAL
        };
        assert_eq!(value(up), i64::MAX);
        let step = Facts {
            increment: i64::MAX,
            known: Some(1),
            ..SERIAL
        };
        assert!(value(step) >= 1);
        let down = Facts {
            increment: i64::MIN + 1,
            min: i64::MIN,
            max: -1,
            start: -1,
            known: Some(-1),
            ..SERIAL
        };
        assert!(value(down) <= -1);
    }
}
