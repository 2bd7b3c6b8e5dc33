//! ● The way through a change log, whatever turns out to be wrong with some of its segments. Pure.
//!
//! A name promises a stretch, and only reading shows whether it is there: an object that is damaged, of somebody else or kept back
//! costs what no other segment holds, and no more.
//!
//! # Invariants
//! - What is given up is not met again; what others hold of its stretch is read from them.

use std::collections::VecDeque;

use super::{LogChain, Span};
use crate::pg::PgLsn;

/// Which segment is next.
#[derive(Clone, Debug)]
pub struct Way {
    /// Every segment that may still be of use.
    all: Vec<Span>,
    ahead: VecDeque<Span>,
    chain: LogChain,
}

impl Way {
    /// From a position on, over these segments.
    pub fn new(from: PgLsn, all: Vec<Span>) -> Self {
        let chain = LogChain::from(from, &all);
        Self {
            all,
            ahead: chain.spans.iter().copied().collect(),
            chain,
        }
    }

    /// The next segments, in order.
    pub fn ahead(&self) -> impl Iterator<Item = Span> {
        self.ahead.iter().copied()
    }

    /// The next segment; it counts as read until it is given up.
    pub fn pop(&mut self) -> Option<Span> {
        self.ahead.pop_front()
    }

    /// How far it leads, and what comes behind that.
    pub fn chain(&self) -> &LogChain {
        &self.chain
    }

    /// What could not be read beyond `position` is not tried again. Whether others lead on from there.
    pub fn give_up(&mut self, span: Span, position: PgLsn) -> bool {
        self.all.retain(|other| *other != span);
        self.chain = LogChain::from(position, &self.all);
        self.ahead = self.chain.spans.iter().copied().collect();
        !self.ahead.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn span(start: u64, end: u64) -> Span {
        Span {
            start: lsn(start),
            end: lsn(end),
        }
    }

    #[test]
    fn a_name_that_promises_everything_costs_one_look() {
        let wide = span(1, 999);
        let all = vec![wide, span(10, 20), span(20, 30), span(30, 40)];
        let mut way = Way::new(lsn(10), all);
        assert_eq!(way.pop(), Some(wide));
        assert!(way.give_up(wide, lsn(10)));
        assert_eq!(way.chain().end, lsn(40));
        assert_eq!(way.pop(), Some(span(10, 20)));
        assert_eq!(way.pop(), Some(span(20, 30)));
        // Half of it was read.
        assert!(!way.give_up(span(20, 30), lsn(25)));
        assert_eq!(way.pop(), None);
        assert_eq!(
            (way.chain().end, way.chain().resumes),
            (lsn(25), Some(lsn(30)))
        );
    }

    #[test]
    fn what_another_segment_holds_is_read_from_that() {
        let mut way = Way::new(lsn(10), vec![span(10, 30), span(15, 25), span(25, 50)]);
        assert_eq!(way.pop(), Some(span(10, 30)));
        assert!(way.give_up(span(10, 30), lsn(18)));
        assert_eq!(
            way.ahead().collect::<Vec<_>>(),
            [span(15, 25), span(25, 50)]
        );
        assert_eq!(way.chain().end, lsn(50));
    }
}
