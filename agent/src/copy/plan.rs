//! ● How the data of many tables is spread over the copy's connections.
//!
//! Sits between the catalog (sizes) and the connections (COPY): [`split`] cuts one table into parts
//! by ctid range, [`order`] puts all parts into the order in which free connections take them.
//!
//! # Invariants
//! - The ranges of a table's parts touch without gap or overlap; the first has no lower and the last
//!   no upper end, so that every row visible to the snapshot is in exactly one part, whatever the
//!   size that was measured.
//!
//! # What it does not do
//! It does not know whether a table may be split: only heap tables have ctids that mean pages.

/// Pages of a part; `None` where the range is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    /// First page.
    pub(crate) from: Option<u32>,
    /// First page of the next part.
    pub(crate) to: Option<u32>,
}

impl Pages {
    /// The whole table.
    pub(crate) const ALL: Self = Self {
        from: None,
        to: None,
    };

    /// The condition on ctid, with its WHERE; empty for the whole table. PostgreSQL 14 and later
    /// read only the pages in the range (TID range scan).
    pub(crate) fn condition(self) -> String {
        match (self.from, self.to) {
            (None, None) => String::new(),
            (None, Some(to)) => format!(" WHERE ctid < '({to},0)'::tid"),
            (Some(from), None) => format!(" WHERE ctid >= '({from},0)'::tid"),
            (Some(from), Some(to)) => {
                format!(" WHERE ctid >= '({from},0)'::tid AND ctid < '({to},0)'::tid")
            }
        }
    }
}

/// Most parts of one table: each costs one transaction, and the estimate of the page number need not
/// be finer than that.
const PARTS_MAX: u64 = 1024;

/// Cuts a table of `pages` heap pages and `bytes` bytes (its TOAST included) into ranges of about
/// `split_bytes`. One part where it is not larger than that.
pub(super) fn split(pages: u32, bytes: u64, split_bytes: u64) -> Vec<Pages> {
    let wanted = bytes
        .div_ceil(split_bytes.max(1))
        .min(PARTS_MAX)
        .min(u64::from(pages));
    if bytes <= split_bytes || wanted <= 1 {
        return vec![Pages::ALL];
    }
    let bound = |part: u64| -> u32 {
        let page = u64::from(pages) * part / wanted;
        u32::try_from(page).expect("not above pages, which is u32")
    };
    (0..wanted)
        .map(|part| Pages {
            from: (part > 0).then(|| bound(part)),
            to: (part + 1 < wanted).then(|| bound(part + 1)),
        })
        .collect()
}

/// One piece of work: a table, or a range of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePart {
    /// Index of the table in the caller's list.
    pub(crate) table: usize,
    /// Which pages.
    pub(crate) pages: Pages,
    /// Estimate of its size, in bytes on the source's disk.
    pub(crate) bytes: u64,
}

/// All parts of all tables, biggest first: the last piece of work is then a small one, and the
/// connections finish together. `tables` holds heap pages, bytes, and whether it may be split.
pub(crate) fn order(tables: &[(u32, u64, bool)], split_bytes: u64) -> Vec<TablePart> {
    let mut parts: Vec<TablePart> = tables
        .iter()
        .enumerate()
        .flat_map(|(table, &(pages, bytes, may_split))| {
            let ranges = if may_split {
                split(pages, bytes, split_bytes)
            } else {
                vec![Pages::ALL]
            };
            let share = bytes / ranges.len() as u64;
            ranges.into_iter().map(move |pages| TablePart {
                table,
                pages,
                bytes: share,
            })
        })
        .collect();
    // Stable: the parts of one table stay in page order, which the source's read-ahead likes.
    parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
    parts
}

/// How many bytes the whole copy will have sent, refined as parts finish.
///
/// Sizes on disk (bloat, alignment, compression) and sizes in a COPY stream differ by a factor that
/// is about the same for all tables of a database; the finished parts tell which.
#[derive(Debug)]
pub(crate) struct Estimate {
    planned: u64,
    planned_finished: u64,
    sent_finished: u64,
}

impl Estimate {
    /// Nothing sent yet of `planned` bytes on disk.
    pub(super) fn new(planned: u64) -> Self {
        Self {
            planned,
            planned_finished: 0,
            sent_finished: 0,
        }
    }

    /// A part of `planned` bytes on disk is finished and took `sent` bytes; returns the new estimate
    /// of the whole.
    pub(super) fn finished(&mut self, planned: u64, sent: u64) -> u64 {
        self.planned_finished = (self.planned_finished + planned).min(self.planned);
        self.sent_finished += sent;
        let rest = self.planned - self.planned_finished;
        if self.planned_finished == 0 {
            return self.sent_finished + rest;
        }
        let scaled =
            u128::from(rest) * u128::from(self.sent_finished) / u128::from(self.planned_finished);
        self.sent_finished + u64::try_from(scaled).unwrap_or(u64::MAX / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_in_exactly_one_part(
            pages in 0u32..5_000, bytes in 0u64..50_000_000, split_bytes in 1u64..10_000_000,
            probe in 0u32..6_000,
        ) {
            let parts = split(pages, bytes, split_bytes);
            let holding = parts.iter().filter(|part| {
                part.from.is_none_or(|from| probe >= from) && part.to.is_none_or(|to| probe < to)
            }).count();
            prop_assert_eq!(holding, 1);
            prop_assert!(parts.len() as u64 <= bytes.div_ceil(split_bytes).max(1));
        }
    }

    #[test]
    fn a_table_at_the_limit_stays_whole_and_one_above_is_split() {
        assert_eq!(split(100, 1000, 1000), [Pages::ALL]);
        let parts = split(100, 1001, 1000);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].condition(), " WHERE ctid < '(50,0)'::tid");
        assert_eq!(parts[1].condition(), " WHERE ctid >= '(50,0)'::tid");
    }

    #[test]
    fn a_table_whose_bytes_are_in_toast_is_split_by_its_few_pages() {
        assert_eq!(split(3, 1 << 40, 1 << 20).len(), 3);
        assert_eq!(split(0, 1 << 40, 1 << 20), [Pages::ALL]);
    }

    #[test]
    fn biggest_parts_come_first_and_unsplittable_tables_stay_whole() {
        let parts = order(&[(10, 50, true), (100, 1000, true), (100, 900, false)], 500);
        let shape: Vec<_> = parts.iter().map(|part| (part.table, part.bytes)).collect();
        assert_eq!(shape, [(2, 900), (1, 500), (1, 500), (0, 50)]);
    }

    #[test]
    fn the_estimate_ends_at_what_was_sent() {
        let mut estimate = Estimate::new(1000);
        assert_eq!(estimate.finished(500, 250), 500);
        assert_eq!(estimate.finished(500, 350), 600);
        assert_eq!(Estimate::new(0).finished(0, 7), 7);
    }
}
