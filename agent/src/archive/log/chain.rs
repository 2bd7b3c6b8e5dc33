//! ● Which segments lead from one position to another.
//!
//! Pure. Segments overlap where an agent was restarted, and leave a gap where the log was not written for a while.

use super::Span;
use crate::pg::PgLsn;

/// The segments to read from a position on, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogChain {
    /// Each begins at or before the end of the one before it.
    pub spans: Vec<Span>,
    /// How far they lead without a gap.
    pub end: PgLsn,
    /// Where the log goes on behind a gap.
    pub resumes: Option<PgLsn>,
}

impl LogChain {
    /// As few segments as lead from `start` as far as possible.
    pub fn from(start: PgLsn, all: &[Span]) -> Self {
        let mut sorted = all.to_vec();
        sorted.sort();
        let mut spans = Vec::new();
        let mut end = start;
        let mut waiting = sorted.into_iter().peekable();
        let mut furthest: Option<Span> = None;
        loop {
            while let Some(span) = waiting.next_if(|span| span.start <= end) {
                furthest = furthest.filter(|far| far.end >= span.end).or(Some(span));
            }
            match furthest {
                Some(far) if far.end > end => {
                    spans.push(far);
                    end = far.end;
                }
                _ => break,
            }
        }
        Self {
            spans,
            end,
            resumes: waiting.next().map(|span| span.start),
        }
    }

    /// The stretches from `start` on that are in no segment although some go on behind them, in order; and where the last
    /// segment ends.
    pub fn gaps(start: PgLsn, all: &[Span]) -> (Vec<Span>, PgLsn) {
        let mut gaps = Vec::new();
        let mut chain = Self::from(start, all);
        while let Some(next) = chain.resumes {
            gaps.push(Span {
                start: chain.end,
                end: next,
            });
            chain = Self::from(next, all);
        }
        (gaps, chain.end)
    }
}
