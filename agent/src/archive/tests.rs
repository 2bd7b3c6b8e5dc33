use std::fs;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::batch::Batch;
use crate::changelog::{Author, Frames, Unpacker};
use crate::changes::ChangeCounts;
use crate::error::{Class, Classify as _};
use crate::ledger::BatchNumber;
use crate::pg::pgoutput::{Value, encode};
use crate::stream::StreamName;
use crate::testing::{lsn, relation, table};
use crate::txn::{Assembler, Change, Ended, Relations, Transaction};

const LIMITS: SpoolLimits = SpoolLimits {
    bytes: 1 << 20,
    segment_bytes: 1 << 10,
};

fn author() -> Author {
    Author {
        stream: "s".to_owned(),
        system_identifier: 7,
        term: 1,
        writer: 1,
    }
}

/// One transaction from `previous` to `end` that inserts so many bytes.
fn batch(previous: u64, end: u64, bytes: usize) -> Batch {
    let relation = relation(table(1, "t", &["a"]));
    let change = Change {
        message: encode::insert(1, &[Value::Text(&vec![b'x'; bytes])]),
        relations: Relations::Row(Arc::clone(&relation)),
    };
    Batch {
        number: BatchNumber(1),
        previous: lsn(previous),
        transactions: vec![Transaction {
            xid: 1,
            commit_lsn: lsn(end - 1),
            end_lsn: lsn(end),
            commit_time: 0,
            spilled: None,
            bytes: change.bytes(),
            changes: vec![change],
            counts: ChangeCounts::default(),
        }],
    }
}

/// Where the transactions of a segment end.
fn ends(segment: &Segment) -> Vec<u64> {
    let mut frames = Frames::default();
    frames.push(&fs::read(segment.path()).unwrap());
    let mut messages = Vec::new();
    let mut unpacker = Unpacker::default();
    while let Some(part) = frames.next_part().unwrap() {
        unpacker
            .push(&part, |message| messages.push(message))
            .unwrap();
    }
    frames.finish().unwrap();
    assert!(!unpacker.is_inside_a_batch());
    let mut assembler = Assembler::new(segment.span.start);
    let ended = messages
        .into_iter()
        .filter_map(|message| assembler.push(message).unwrap());
    ended
        .map(|ended| match ended {
            Ended::Committed(complete) => complete.end_lsn().into(),
            Ended::Aborted { .. } => panic!("nothing was rolled back"),
        })
        .collect()
}

fn span(start: u64, end: u64) -> Span {
    Span {
        start: lsn(start),
        end: lsn(end),
    }
}

#[test]
fn names_sort_as_positions_do_and_are_read_back() {
    let layout = Layout::new(&StreamName::new("dr_agent", "app"), 7_301);
    let spans = [
        span(9, 16),
        span(16, 0xB374_D848),
        span(0xB374_D848, 1 << 36),
    ];
    let names = spans.map(|span| layout.segment(span));
    assert_eq!(
        names[1],
        "dr_agent_app/7301/log/0000000000000010-00000000B374D848.zst"
    );
    assert!(names.is_sorted());
    for (span, name) in spans.iter().zip(&names) {
        assert_eq!(layout.parse_segment(name), Some(*span));
    }
    for wrong in [
        "dr_agent_app/7301/log/0000000000000010-000000000000001.zst",
        "dr_agent_app/7301/log/0000000000000020-0000000000000010.zst",
        "dr_agent_app/7301/log/000000000000001g-0000000000000020.zst",
        "dr_agent_app/7301/log/0000000000000010-0000000000000020",
        "dr_agent_app/7302/log/0000000000000010-0000000000000020.zst",
    ] {
        assert_eq!(layout.parse_segment(wrong), None, "{wrong}");
    }
    assert_eq!(
        layout.base(lsn(255)),
        "dr_agent_app/7301/base/00000000000000FF/"
    );
}

#[test]
fn a_chain_takes_the_longest_way_and_stops_at_a_gap() {
    let all = [
        span(10, 20),
        span(15, 40),
        span(20, 30),
        span(30, 35),
        span(40, 50),
        span(60, 70),
    ];
    let chain = Chain::from(lsn(10), &all);
    assert_eq!(chain.spans, [span(10, 20), span(15, 40), span(40, 50)]);
    assert_eq!((chain.end, chain.resumes), (lsn(50), Some(lsn(60))));
    let chain = Chain::from(lsn(45), &all);
    assert_eq!(chain.spans, [span(40, 50)]);
    let chain = Chain::from(lsn(55), &all);
    assert_eq!(
        (chain.spans.len(), chain.end, chain.resumes),
        (0, lsn(55), Some(lsn(60)))
    );
    let chain = Chain::from(lsn(60), &all);
    assert_eq!((chain.end, chain.resumes), (lsn(70), None));
    assert_eq!(Chain::gaps(lsn(10), &all), (vec![span(50, 60)], lsn(70)));
    assert_eq!(Chain::gaps(lsn(60), &all), (vec![], lsn(70)));
    assert_eq!(Chain::gaps(lsn(80), &all), (vec![], lsn(80)));
}

proptest! {
    /// Whatever was lost or written twice: what a chain says it covers is covered, and nothing leads further.
    #[test]
    fn a_chain_covers_exactly_what_it_says(
        pairs in prop::collection::vec((0u64..60, 1u64..20), 0..20),
        start in 0u64..60,
    ) {
        let all: Vec<Span> = pairs.iter().map(|(start, length)| span(*start, start + length)).collect();
        let chain = Chain::from(lsn(start), &all);
        let mut end = lsn(start);
        for one in &chain.spans {
            prop_assert!(all.contains(one) && one.start <= end && one.end > end);
            end = one.end;
        }
        prop_assert_eq!(end, chain.end);
        prop_assert!(!all.iter().any(|one| one.start <= end && one.end > end));
        let next = all.iter().map(|one| one.start).filter(|start| *start > end).min();
        prop_assert_eq!(next, chain.resumes);
    }
}

#[test]
fn segments_hold_whole_batches_and_wait_for_the_store() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, waiting) = Spool::open(home.path(), LIMITS).unwrap();
    assert!(waiting.is_empty());
    spool.append(&author(), &batch(10, 20, 600)).unwrap();
    assert!(!spool.is_full());
    spool.append(&author(), &batch(20, 30, 600)).unwrap();
    assert!(spool.is_full());
    let first = spool.close().unwrap().unwrap();
    assert_eq!((first.span, ends(&first)), (span(10, 30), vec![20, 30]));
    assert!(spool.close().unwrap().is_none());
    assert!(!spool.would_leave_a_gap(lsn(99)));
    spool.append(&author(), &batch(30, 40, 1)).unwrap();
    assert!(spool.would_leave_a_gap(lsn(41)));
    let used = spool.used();
    drop(spool);
    // The next agent finds what the store does not have yet.
    let (spool, waiting) = Spool::open(home.path(), LIMITS).unwrap();
    assert_eq!(spool.used(), used);
    let spans: Vec<Span> = waiting.iter().map(|segment| segment.span).collect();
    assert_eq!(spans, [span(10, 30), span(30, 40)]);
    assert_eq!(ends(&waiting[1]), [40]);
    for segment in waiting {
        segment.remove().unwrap();
    }
    assert_eq!(spool.used(), 0);
}

/// A replica that dies with every batch makes each session receive the same again.
#[test]
fn what_waits_is_not_written_again() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = Spool::open(home.path(), LIMITS).unwrap();
    spool.append(&author(), &batch(10, 20, 1)).unwrap();
    spool.append(&author(), &batch(20, 30, 1)).unwrap();
    let used = spool.used();
    for _ in 0..3 {
        drop(spool);
        let waiting;
        (spool, waiting) = Spool::open(home.path(), LIMITS).unwrap();
        let spans: Vec<Span> = waiting.iter().map(|segment| segment.span).collect();
        assert_eq!(spans, [span(10, 30)]);
        spool.append(&author(), &batch(10, 20, 1)).unwrap();
        assert!(spool.close().unwrap().is_none());
        assert_eq!(spool.used(), used);
    }
    // Cut otherwise this time: only what is new is added.
    let mut two = batch(20, 30, 1);
    two.transactions.extend(batch(30, 40, 1).transactions);
    assert!(!spool.would_leave_a_gap(lsn(20)));
    spool.append(&author(), &two).unwrap();
    assert!(!spool.would_leave_a_gap(lsn(40)));
    spool.append(&author(), &batch(40, 50, 1)).unwrap();
    let segment = spool.close().unwrap().unwrap();
    assert_eq!((segment.span, ends(&segment)), (span(30, 50), vec![40, 50]));
}

#[test]
fn wherever_writing_was_cut_off_whole_batches_are_left() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = Spool::open(home.path(), LIMITS).unwrap();
    spool.append(&author(), &batch(10, 20, 30)).unwrap();
    let first = spool.used();
    spool.append(&author(), &batch(20, 30, 30)).unwrap();
    let all = spool.used();
    drop(spool);
    let name = |ending: &str| home.path().join(format!("000000000000000A{ending}"));
    let written = fs::read(name(".open")).unwrap();
    assert_eq!(written.len() as u64, all);
    for length in 0..=written.len() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("000000000000000A.open");
        // What a power loss leaves behind the end may be anything.
        let mut left = written[..length].to_vec();
        left.extend(vec![0xA5; if length % 2 == 0 { 0 } else { 100 }]);
        fs::write(path, left).unwrap();
        let (spool, waiting) = Spool::open(directory.path(), LIMITS).unwrap();
        let found: Vec<(Span, Vec<u64>)> = waiting.iter().map(|s| (s.span, ends(s))).collect();
        let expected = match length as u64 {
            length if length < first => vec![],
            length if length < all => vec![(span(10, 20), vec![20])],
            _ => vec![(span(10, 30), vec![20, 30])],
        };
        assert_eq!(found, expected, "{length} of {all} bytes");
        assert_eq!(
            spool.used(),
            waiting.iter().map(Segment::bytes).sum::<u64>()
        );
    }
}

#[test]
fn a_full_spool_says_so_and_keeps_what_it_has() {
    let home = tempfile::tempdir().unwrap();
    let limits = SpoolLimits {
        bytes: 1_500,
        ..LIMITS
    };
    let (mut spool, _) = Spool::open(home.path(), limits).unwrap();
    let error = spool.append(&author(), &batch(10, 20, 2_000)).unwrap_err();
    assert!(error.to_string().contains("archive.spool_bytes"), "{error}");
    assert_eq!(error.class(), Class::Transient);
    assert_eq!(spool.used(), 0);
    spool.append(&author(), &batch(20, 30, 600)).unwrap();
    spool.append(&author(), &batch(30, 40, 1_000)).unwrap_err();
    spool.append(&author(), &batch(30, 50, 100)).unwrap();
    let segment = spool.close().unwrap().unwrap();
    assert_eq!((segment.span, ends(&segment)), (span(20, 50), vec![30, 50]));
    assert_eq!(spool.used(), fs::metadata(segment.path()).unwrap().len());
    segment.remove().unwrap();
    spool.append(&author(), &batch(50, 60, 1_000)).unwrap();
}

#[test]
fn one_agent_at_a_time() {
    let home = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(home.path(), LIMITS).unwrap();
    let error = Spool::open(home.path(), LIMITS).unwrap_err();
    assert!(matches!(error, SpoolError::InUse { .. }), "{error}");
    drop(spool);
    Spool::open(home.path(), LIMITS).unwrap();
}
