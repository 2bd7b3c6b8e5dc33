//! ● What a restore reads: the base backup to begin with, and the change log from there.
//!
//! Pure. A restore that was interrupted goes on with the log from where it stands.

use super::RestoreError;
use super::moment::RestoreMoment;
use crate::archive::log::{ArchiveError, LogChain, Span};
use crate::pg::PgLsn;
use crate::time::Micros;

/// A base backup, as far as choosing one is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DatedBase {
    /// The position whose state it holds.
    pub(super) lsn: PgLsn,
    /// When that was, on the source's clock.
    pub(super) time: Micros,
}

/// Which of these is the newest base backup before the moment.
///
/// # Errors
/// [`RestoreError::NoBase`]
pub(super) fn choose(bases: &[DatedBase], moment: RestoreMoment) -> Result<usize, RestoreError> {
    let usable =
        (0..bases.len()).filter(|at| moment.is_at_or_after(bases[*at].lsn, bases[*at].time));
    usable
        .max_by_key(|at| bases[*at].lsn)
        .ok_or_else(|| RestoreError::NoBase {
            moment,
            oldest: bases.iter().map(|base| base.time).min(),
        })
}

/// The segments that lead from a position to the moment.
///
/// # Errors
/// As [`falls_short`], where that can be told without reading them: a base backup may take hours to load.
pub(super) fn log(
    from: PgLsn,
    spans: &[Span],
    moment: RestoreMoment,
) -> Result<LogChain, RestoreError> {
    let chain = LogChain::from(from, spans);
    match moment {
        // Which position that was, only the log knows.
        RestoreMoment::Time(_) => Ok(chain),
        RestoreMoment::Lsn(_) | RestoreMoment::End => {
            falls_short(&chain, moment).map_or(Ok(chain), Err)
        }
    }
}

/// Why a chain in which nothing lies behind the moment does not lead there; none if it does.
pub(super) fn falls_short(chain: &LogChain, moment: RestoreMoment) -> Option<RestoreError> {
    let from = chain.end;
    match (moment, chain.resumes) {
        (RestoreMoment::Lsn(lsn), _) if lsn <= from => None,
        // Behind a gap there may be anything.
        (_, next @ Some(_)) => Some(ArchiveError::Missing { from, next }.into()),
        (RestoreMoment::End, None) => None,
        (_, None) => Some(RestoreError::LogEnds { end: from, moment }),
    }
}

/// What of a chain is read at most, as far as that is known without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Needed {
    /// The segments.
    pub(super) spans: Vec<Span>,
    /// Where they lead.
    pub(super) end: PgLsn,
}

/// Cuts a chain where a moment lies at the latest: a base backup that is of a later time lies behind it.
pub(super) fn needed(chain: &LogChain, bases: &[DatedBase], moment: RestoreMoment) -> Needed {
    let latest = match moment {
        RestoreMoment::End => None,
        RestoreMoment::Lsn(lsn) => Some(lsn),
        RestoreMoment::Time(time) => {
            let later = bases.iter().filter(|base| base.time > time);
            later.map(|base| base.lsn).min()
        }
    };
    let end = latest.map_or(chain.end, |latest| latest.min(chain.end));
    let spans = chain.spans.iter().filter(|span| span.start < end);
    Needed {
        spans: spans.copied().collect(),
        end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn base(position: u64, time: Micros) -> DatedBase {
        DatedBase {
            lsn: lsn(position),
            time,
        }
    }

    fn span(start: u64, end: u64) -> Span {
        Span {
            start: lsn(start),
            end: lsn(end),
        }
    }

    #[test]
    fn the_newest_base_before_the_moment_is_taken() {
        let bases = [base(100, 1_000), base(300, 3_000), base(200, 2_000)];
        let chosen = |moment| {
            let chosen = choose(&bases, moment).ok();
            chosen.map(|at| u64::from(bases[at].lsn))
        };
        assert_eq!(chosen(RestoreMoment::End), Some(300));
        assert_eq!(chosen(RestoreMoment::Time(2_999)), Some(200));
        assert_eq!(chosen(RestoreMoment::Time(3_000)), Some(300));
        assert_eq!(chosen(RestoreMoment::Lsn(lsn(199))), Some(100));
        assert_eq!(chosen(RestoreMoment::Lsn(lsn(99))), None);
        let error = choose(&bases, RestoreMoment::Time(999)).unwrap_err();
        assert!(
            matches!(
                error,
                RestoreError::NoBase {
                    oldest: Some(1_000),
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn what_lies_behind_the_moment_is_not_counted() {
        let spans = [span(100, 200), span(200, 300), span(300, 400)];
        let chain = LogChain::from(lsn(100), &spans);
        let bases = [base(100, 1_000), base(250, 2_000)];
        let cut = |moment| {
            let needed = needed(&chain, &bases, moment);
            (needed.spans.len(), u64::from(needed.end))
        };
        assert_eq!(cut(RestoreMoment::End), (3, 400));
        assert_eq!(cut(RestoreMoment::Lsn(lsn(200))), (1, 200));
        assert_eq!(cut(RestoreMoment::Lsn(lsn(201))), (2, 201));
        assert_eq!(cut(RestoreMoment::Time(1_500)), (2, 250));
        assert_eq!(cut(RestoreMoment::Time(2_500)), (3, 400));
    }

    #[test]
    fn a_log_that_ends_before_the_position_is_refused_before_anything_is_read() {
        let spans = [span(100, 200), span(200, 300)];
        assert_eq!(
            log(lsn(100), &spans, RestoreMoment::Lsn(lsn(300)))
                .unwrap()
                .spans,
            spans
        );
        assert!(log(lsn(100), &spans, RestoreMoment::Lsn(lsn(301))).is_err());
        assert!(log(lsn(100), &spans, RestoreMoment::Time(i64::MAX)).is_ok());
        assert!(log(lsn(100), &spans, RestoreMoment::End).is_ok());
    }

    #[test]
    fn so_is_one_with_a_gap_before_the_moment() {
        let spans = [span(100, 200), span(250, 300)];
        let reached = |moment| log(lsn(100), &spans, moment);
        assert!(reached(RestoreMoment::Lsn(lsn(200))).is_ok());
        for moment in [
            RestoreMoment::Lsn(lsn(201)),
            RestoreMoment::Lsn(lsn(300)),
            RestoreMoment::End,
        ] {
            let error = reached(moment).unwrap_err();
            assert!(
                matches!(error, RestoreError::Archive(ArchiveError::Missing { .. })),
                "{error}"
            );
        }
        // It may lie before the gap.
        assert!(reached(RestoreMoment::Time(i64::MAX)).is_ok());
    }
}
