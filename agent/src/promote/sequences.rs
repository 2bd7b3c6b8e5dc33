//! ● Where a sequence must stand when the replica opens: arithmetic only.
//!
//! Logical decoding does not carry sequences; their positions travel in the in-band table
//! `sequence_state`, polled every `source.sequences`. Between the last look and the crash the source
//! gave out values we never heard of. A value given out twice is a key collision, or two invoices
//! with one number, so each sequence is set ahead by a margin and beyond the columns it feeds.
//!
//! Pure: `super::ahead` reads the facts and calls `setval`.
//!
//! # Invariants
//! - A sequence never moves against its direction and never leaves its bounds, nor those of the columns it feeds.
//! - It stays on its own steps: a sequence that gives odd numbers gives odd numbers afterwards.
//! - A sequence of known position that had values left has values left afterwards.
//! - Where the margin does not fit, that is said.
//! - Computed again from the same facts after `setval`, the result is the same.
//!
//! # What it does not do
//! A cycling sequence is not moved beyond its columns: after its first round the largest value in a
//! column says nothing about where it stands.

/// Calls of `nextval` that are always allowed for, also where the source itself said where the sequence stands: it may go on
/// until somebody stops it. Rows that did arrive are covered whatever this number is.
pub const MARGIN_CALLS: i128 = 10_000;

/// Sessions on the source that may each fetch a fresh block of `CACHE` values between two looks.
pub const MARGIN_CACHES: i128 = 100;

/// A burst of which no look tells, and what a sequence that was quiet so far may give out per second.
const BURST_CALLS: i128 = 1_000_000;
const QUIET_CALLS_PER_SECOND: f64 = 1_000.0;

/// Such guesses cost at most this share of the range: a sequence for six digits is no good if it begins beyond them.
const RANGE_SHARE: i128 = 1_000;

/// By how much more than at the highest rate that was seen it may have gone.
const RATE_FACTOR: f64 = 2.0;

/// What is known about one sequence.
#[derive(Clone, Copy, Debug)]
pub struct SequenceFacts {
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
    /// The furthest value, in its direction, that fits into every column it feeds.
    pub fits: Option<i64>,
    /// Where it stood on the source at the last look, out of `sequence_state`.
    pub known: Option<SequencePosition>,
    /// Last value on the replica itself, `None` where it never gave one.
    pub here: Option<i64>,
    /// The value furthest in the sequence's direction in the columns it feeds.
    pub column: Option<i64>,
    /// The highest rate between two looks.
    pub calls_per_second: f64,
    /// What may have happened since the last look.
    pub since: Since,
}

/// A position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequencePosition {
    /// `last_value`.
    pub value: i64,
    /// `is_called`: without it, `value` is the first that will be given.
    pub called: bool,
}

/// What may have happened since the last look at the source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Since {
    /// Nothing: the source was asked after the replica was fenced.
    Asked,
    /// Whatever happens in so many seconds.
    Seconds(f64),
}

/// What to do with one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceTarget {
    /// Where it shall stand; `None` leaves it alone.
    pub position: Option<SequencePosition>,
    /// Why the operator should look at it, if he should.
    pub warning: Option<String>,
}

/// How many calls a sequence is set ahead, if there is room.
pub fn margin(facts: &SequenceFacts) -> i128 {
    let unseen = match facts.since {
        Since::Asked => 0,
        Since::Seconds(seconds) => {
            let whole = i128::from(facts.max) - i128::from(facts.min);
            let fits = facts.fits.map_or(whole, |fits| i128::from(fits).abs());
            let range = whole.min(fits) / step(facts).abs();
            let guess = BURST_CALLS + calls(QUIET_CALLS_PER_SECOND * seconds);
            // A second more: a look takes its time, and a rate is an average.
            let by_rate = calls(RATE_FACTOR * facts.calls_per_second * (seconds + 1.0));
            by_rate.max(guess.min(range / RANGE_SHARE))
        }
    };
    let caches = MARGIN_CACHES * i128::from(facts.cache.max(1));
    MARGIN_CALLS.max(unseen) + caches
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a cast saturates, and 2^62 calls are more than any sequence has left"
)]
fn calls(number: f64) -> i128 {
    i128::from(number.clamp(0.0, 4e18).ceil() as i64)
}

fn step(facts: &SequenceFacts) -> i128 {
    i128::from(facts.increment)
}

/// Where the sequence must stand.
pub fn target(facts: &SequenceFacts) -> SequenceTarget {
    let Some(anchor) = anchor(facts) else {
        return SequenceTarget {
            position: None,
            warning: Some(
                "its position on the source is unknown; it stays where it is on the replica"
                    .to_owned(),
            ),
        };
    };
    match facts.cycle {
        true => on_a_ring(facts, anchor),
        false => on_a_line(facts, anchor),
    }
}

/// The last value it is known to have given; one step before its first where it gave none.
fn anchor(facts: &SequenceFacts) -> Option<i128> {
    if let Some(known) = facts.known {
        let value = i128::from(known.value);
        return Some(if known.called {
            value
        } else {
            value - step(facts)
        });
    }
    // The replica's own position is no anchor: after `setval` it holds a margin already.
    let guess = facts.column.filter(|_| !facts.cycle);
    guess.map(|_| i128::from(facts.start))
}

/// Beyond half of a ring, further ahead means closer behind.
fn on_a_ring(facts: &SequenceFacts, anchor: i128) -> SequenceTarget {
    let margin = margin(facts);
    let length = (i128::from(facts.max) - i128::from(facts.min)) / step(facts).abs() + 1;
    let ahead = margin.min(length / 2);
    let warning = (ahead < margin).then(|| {
        format!(
            "it cycles after {length} values, so they come again; set ahead by {ahead} of them instead of {margin}"
        )
    });
    SequenceTarget {
        position: Some(SequencePosition {
            value: clamped(wrapped(anchor + ahead * step(facts), facts)),
            called: true,
        }),
        warning,
    }
}

fn on_a_line(facts: &SequenceFacts, anchor: i128) -> SequenceTarget {
    let (increment, margin) = (step(facts), margin(facts));
    let room = steps_left(anchor, facts);
    let mut base = 0;
    let mut warning = None;
    if let Some(column) = facts.column {
        let steps = steps_up_to(anchor, i128::from(column), increment);
        // Rows that arrived after the last look lie within the margin. What lies further was written by
        // hand; such a row, 2147483647 for "none", must not leave the sequence without values on the
        // day it counts. The source lived with it too.
        let plausible = facts.known.is_none() || steps <= margin || steps <= room / 2;
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
            "only {} values are left up to its bound, or its column's; set ahead by {ahead} instead of {margin}: a value may \
             come again",
            room - base
        ));
    }
    let mut steps = base + ahead;
    if let Some(here) = facts.here {
        // Never backwards, and the same result when computed again.
        let bound = steps_within(anchor, facts.increment, outer(facts));
        steps = steps.max(steps_up_to(anchor, i128::from(here), increment).min(bound));
    }
    let position = match (steps.max(0), facts.known) {
        // Nothing is left to be ahead by: it stands where it stood.
        (0, Some(known)) => known,
        (steps, _) => SequencePosition {
            value: clamped((anchor + steps * increment).clamp(facts.min.into(), facts.max.into())),
            called: true,
        },
    };
    SequenceTarget {
        position: Some(position),
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

/// Steps the sequence can still make inside its bounds, and those of its columns where it is inside them.
fn steps_left(from: i128, facts: &SequenceFacts) -> i128 {
    let outer = outer(facts);
    let inner = facts.fits.map(i128::from).filter(|fits| {
        // A column that is full already, or wider, bounds nothing.
        steps_within(from, facts.increment, *fits) > 0
    });
    let inner = inner.unwrap_or(outer);
    steps_within(from, facts.increment, inner).min(steps_within(from, facts.increment, outer))
}

fn outer(facts: &SequenceFacts) -> i128 {
    let bound = if facts.increment > 0 {
        facts.max
    } else {
        facts.min
    };
    bound.into()
}

fn steps_within(from: i128, increment: i64, bound: i128) -> i128 {
    ((bound - from) / i128::from(increment)).max(0)
}

/// A cycling sequence begins again at its other bound.
fn wrapped(value: i128, facts: &SequenceFacts) -> i128 {
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

    const SERIAL: SequenceFacts = SequenceFacts {
        increment: 1,
        min: 1,
        max: i64::MAX,
        start: 1,
        cache: 1,
        cycle: false,
        fits: None,
        known: None,
        here: None,
        column: None,
        calls_per_second: 0.0,
        since: Since::Asked,
    };
    const MARGIN: i64 = 10_100;

    fn at(value: i64) -> Option<SequencePosition> {
        let called = true;
        Some(SequencePosition { value, called })
    }

    fn value(facts: SequenceFacts) -> i64 {
        target(&facts).position.unwrap().value
    }

    #[test]
    fn the_margin_goes_on_top_of_whichever_is_further_the_known_value_or_the_column() {
        assert_eq!(
            value(SequenceFacts {
                known: at(500),
                ..SERIAL
            }),
            500 + MARGIN
        );
        assert_eq!(
            value(SequenceFacts {
                known: at(500),
                column: Some(40_000),
                ..SERIAL
            }),
            40_000 + MARGIN
        );
        assert_eq!(
            value(SequenceFacts {
                known: at(500),
                column: Some(3),
                ..SERIAL
            }),
            500 + MARGIN
        );
        assert_eq!(
            value(SequenceFacts {
                column: Some(7),
                ..SERIAL
            }),
            7 + MARGIN
        );
    }

    #[test]
    fn descending_sequences_move_down() {
        let down = SequenceFacts {
            increment: -1,
            min: i64::MIN,
            max: -1,
            start: -1,
            ..SERIAL
        };
        assert_eq!(
            value(SequenceFacts {
                known: at(-500),
                ..down
            }),
            -500 - MARGIN
        );
        assert_eq!(
            value(SequenceFacts {
                known: at(-500),
                column: Some(-900),
                ..down
            }),
            -900 - MARGIN
        );
        assert_eq!(
            value(SequenceFacts {
                known: at(-500),
                column: Some(-3),
                ..down
            }),
            -500 - MARGIN
        );
    }

    #[test]
    fn odd_numbers_stay_odd_even_when_a_column_holds_an_even_one() {
        let odd = SequenceFacts {
            increment: 2,
            known: at(11),
            column: Some(100),
            ..SERIAL
        };
        let set = value(odd);
        assert!(set > 100 && set % 2 == 1, "{set}");
    }

    #[test]
    fn a_nearly_exhausted_sequence_keeps_half_of_what_is_left() {
        let small = SequenceFacts {
            max: 32_767,
            known: at(32_000),
            ..SERIAL
        };
        let result = target(&small);
        assert_eq!(result.position, at(32_000 + 383));
        assert!(result.warning.unwrap().contains("767 values are left"));
        let empty = target(&SequenceFacts {
            max: 100,
            known: at(100),
            ..SERIAL
        });
        assert_eq!(empty.position, at(100));
        assert!(empty.warning.is_some());
    }

    #[test]
    fn a_row_with_an_impossible_value_does_not_exhaust_the_sequence() {
        let result = target(&SequenceFacts {
            max: 1_000_000,
            known: at(500),
            column: Some(i64::MAX),
            ..SERIAL
        });
        assert_eq!(result.position, at(500 + MARGIN));
        assert!(result.warning.unwrap().contains("left out of account"));
    }

    #[test]
    fn a_row_at_the_very_end_does_not_exhaust_it_either_but_the_next_few_rows_count() {
        let int4 = SequenceFacts {
            max: 2_147_483_647,
            known: at(9),
            column: Some(2_147_483_647),
            ..SERIAL
        };
        let result = target(&int4);
        assert_eq!(result.position, at(9 + MARGIN));
        assert!(result.warning.is_some());
        let near_the_end = SequenceFacts {
            max: 32_767,
            known: at(32_000),
            column: Some(32_700),
            ..SERIAL
        };
        assert_eq!(value(near_the_end), 32_700 + 33);
    }

    #[test]
    fn a_large_cache_widens_the_margin() {
        let cached = SequenceFacts {
            cache: 1000,
            known: at(0),
            ..SERIAL
        };
        assert_eq!(value(cached), 110_000);
        let by_ten = SequenceFacts {
            increment: 10,
            known: at(0),
            ..SERIAL
        };
        assert_eq!(value(by_ten), 10 * MARGIN);
    }

    #[test]
    fn cycling_sequences_wrap_inside_their_bounds() {
        let ring = SequenceFacts {
            max: 1_000,
            cycle: true,
            known: at(990),
            ..SERIAL
        };
        assert_eq!(value(ring), 490, "half the ring ahead");
        let down = SequenceFacts {
            increment: -1,
            start: 1_000,
            ..ring
        };
        assert!((1..=1_000).contains(&value(down)));
        assert_eq!(
            value(SequenceFacts {
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
            for (increment, known) in [(1, at(5)), (-3, at(-7)), (7, None), (1, at(9_999_990))] {
                let (min, max) = if increment > 0 {
                    (1, 10_000_000)
                } else {
                    (-10_000_000, -1)
                };
                let facts = SequenceFacts {
                    increment,
                    min,
                    max,
                    start: if increment > 0 { min } else { max },
                    cycle,
                    known,
                    column: Some(if increment > 0 { 77 } else { -77 }),
                    ..SERIAL
                };
                let Some(SequencePosition { value: once, .. }) = target(&facts).position else {
                    assert!(cycle && facts.known.is_none(), "{facts:?}");
                    continue;
                };
                assert!((min..=max).contains(&once));
                let here = Some(once);
                assert_eq!(value(SequenceFacts { here, ..facts }), once, "{facts:?}");
            }
        }
    }

    #[test]
    fn a_sequence_nothing_is_known_of_is_left_alone_and_named() {
        let result = target(&SERIAL);
        assert_eq!(result.position, None);
        assert!(result.warning.is_some());
    }

    #[test]
    fn without_a_known_position_the_column_alone_decides_and_a_repeat_adds_nothing() {
        let blind = SequenceFacts {
            column: Some(77),
            ..SERIAL
        };
        let once = value(blind);
        assert_eq!(once, 77 + MARGIN);
        assert_eq!(
            value(SequenceFacts {
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
            known_at in 0.0f64..=1.0,
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
            let (known, column) = (point(known_at), point(column_at));
            let facts = SequenceFacts {
                increment, min, max, start: min, cache,
                known: at(known), column: Some(column), ..SERIAL
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
            proptest::prop_assert_eq!(value(SequenceFacts { here: Some(set), ..facts }), set);
        }
    }

    #[test]
    fn the_ends_of_the_64_bit_range_do_not_overflow() {
        let up = SequenceFacts {
            known: at(i64::MAX),
            ..SERIAL
        };
        assert_eq!(value(up), i64::MAX);
        let step = SequenceFacts {
            increment: i64::MAX,
            known: at(1),
            ..SERIAL
        };
        assert!(value(step) >= 1);
        let down = SequenceFacts {
            increment: i64::MIN + 1,
            min: i64::MIN,
            max: -1,
            start: -1,
            known: at(-1),
            ..SERIAL
        };
        assert!(value(down) <= -1);
    }

    /// What it is ahead by of a source that has not answered.
    fn ahead(facts: SequenceFacts) -> i64 {
        let anchor = anchor(&facts).unwrap();
        clamped(i128::from(value(facts)) - anchor)
    }

    #[test]
    fn the_margin_grows_with_the_rate_and_the_age_of_the_last_look() {
        let int4 = SequenceFacts {
            max: 2_147_483_647,
            known: at(600),
            since: Since::Seconds(5.0),
            ..SERIAL
        };
        // A burst that no look tells of, on a sequence that was quiet so far.
        assert_eq!(ahead(int4), 1_005_100);
        // 5,000 a second, and the last look an hour ago.
        let busy = SequenceFacts {
            calls_per_second: 5_000.0,
            since: Since::Seconds(3600.0),
            ..int4
        };
        assert_eq!(ahead(busy), 2 * 5_000 * 3601 + 100);
        let huge = SequenceFacts {
            calls_per_second: f64::INFINITY,
            ..busy
        };
        assert!(target(&huge).warning.is_some());
        // Six digits.
        let small = SequenceFacts {
            max: 999_999,
            ..int4
        };
        assert_eq!(ahead(small), MARGIN);
        let asked = SequenceFacts {
            since: Since::Asked,
            ..busy
        };
        assert_eq!(ahead(asked), MARGIN);
    }

    #[test]
    fn one_that_was_never_called_is_ahead_of_its_first_value() {
        let unused = SequenceFacts {
            start: 42,
            known: Some(SequencePosition {
                value: 42,
                called: false,
            }),
            ..SERIAL
        };
        assert_eq!(value(unused), 41 + MARGIN);
        // Restarted on the source, after the replica was copied further on: never backwards.
        let here = Some(100_000);
        assert_eq!(value(SequenceFacts { here, ..unused }), 100_000);
        // A single value: it is not used up by being careful.
        let one = SequenceFacts {
            min: 42,
            max: 42,
            ..unused
        };
        assert_eq!(target(&one).position, one.known);
        let down = SequenceFacts {
            increment: -1,
            min: -10,
            max: -1,
            start: -1,
            known: Some(SequencePosition {
                value: -1,
                called: false,
            }),
            ..SERIAL
        };
        let result = target(&down);
        assert_eq!(result.position, at(-5));
        assert!(result.warning.is_some());
    }

    #[test]
    fn a_column_that_is_narrower_bounds_it() {
        let wide = SequenceFacts {
            known: at(2_147_480_000),
            fits: Some(2_147_483_647),
            ..SERIAL
        };
        let result = target(&wide);
        assert_eq!(result.position, at(2_147_480_000 + 3647 / 2));
        assert!(result.warning.unwrap().contains("3647 values are left"));
        // Beyond what the column holds already: the column is somebody else's trouble.
        let beyond = SequenceFacts {
            known: at(3_000_000_000),
            ..wide
        };
        assert_eq!(value(beyond), 3_000_000_000 + MARGIN);
    }

    #[test]
    fn a_ring_that_is_too_small_for_the_margin_is_named() {
        let ring = SequenceFacts {
            max: 1_000,
            cycle: true,
            known: at(990),
            ..SERIAL
        };
        assert!(target(&ring).warning.unwrap().contains("cycles"));
        let large = SequenceFacts {
            max: 1_000_000,
            ..ring
        };
        assert_eq!(target(&large).warning, None);
    }
}
