use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::spool::Appended;
use super::*;
use crate::error::{Class, Classify as _};
use crate::flow::batch::Batch;
use crate::flow::changelog::{Author, Frames, Unpacker};
use crate::flow::counts::ChangeCounts;
use crate::flow::ledger::BatchNumber;
pub(super) use crate::flow::testing::lsn;
use crate::flow::testing::{relation, table};
use crate::flow::transaction::{Assembler, Change, Ended, Relations, Transaction};
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::pgoutput::{Value, encode};
use crate::time::{pg_micros, wall_clock};

const LIMITS: SpoolLimits = SpoolLimits {
    bytes: 1 << 20,
    segment_bytes: 1 << 10,
};

pub(super) const HISTORY: History = History {
    system_identifier: 7_301,
    began: 123_456,
};

pub(super) fn author() -> Author {
    Author {
        stream: "s".to_owned(),
        history: HISTORY,
        term: 1,
        writer: 1,
    }
}

/// One transaction from `previous` to `end` that inserts so many bytes.
pub(super) fn batch(previous: u64, end: u64, bytes: usize) -> Batch {
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
            has_barrier: false,
        }],
    }
}

/// Where the transactions of a segment end.
fn ends(segment: &SpoolSegment) -> Vec<u64> {
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
    let layout = Layout::new(&StreamName::new("dr_agent", "app"), HISTORY);
    let spans = [
        span(9, 16),
        span(16, 0xB374_D848),
        span(0xB374_D848, 1 << 36),
    ];
    let names = spans.map(|span| layout.segment(span));
    assert_eq!(
        names[1],
        "dr_agent_app/7301-20000101T000000.123456Z/log/0000000000000010-00000000B374D848.zst"
    );
    assert!(names.is_sorted());
    for (span, name) in spans.iter().zip(&names) {
        assert_eq!(layout.parse_segment(name), Some(*span));
    }
    for wrong in [
        "dr_agent_app/7301-20000101T000000.123456Z/log/0000000000000010-000000000000001.zst",
        "dr_agent_app/7301-20000101T000000.123456Z/log/0000000000000020-0000000000000010.zst",
        "dr_agent_app/7301-20000101T000000.123456Z/log/000000000000001g-0000000000000020.zst",
        "dr_agent_app/7301-20000101T000000.123456Z/log/0000000000000010-0000000000000020",
        "dr_agent_app/7302-20000101T000000.123456Z/log/0000000000000010-0000000000000020.zst",
    ] {
        assert_eq!(layout.parse_segment(wrong), None, "{wrong}");
    }
    assert_eq!(
        layout.base(lsn(255)),
        "dr_agent_app/7301-20000101T000000.123456Z/base/00000000000000FF/"
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
    let chain = LogChain::from(lsn(10), &all);
    assert_eq!(chain.spans, [span(10, 20), span(15, 40), span(40, 50)]);
    assert_eq!((chain.end, chain.resumes), (lsn(50), Some(lsn(60))));
    let chain = LogChain::from(lsn(45), &all);
    assert_eq!(chain.spans, [span(40, 50)]);
    let chain = LogChain::from(lsn(55), &all);
    assert_eq!(
        (chain.spans.len(), chain.end, chain.resumes),
        (0, lsn(55), Some(lsn(60)))
    );
    let chain = LogChain::from(lsn(60), &all);
    assert_eq!((chain.end, chain.resumes), (lsn(70), None));
    assert_eq!(LogChain::gaps(lsn(10), &all), (vec![span(50, 60)], lsn(70)));
    assert_eq!(LogChain::gaps(lsn(60), &all), (vec![], lsn(70)));
    assert_eq!(LogChain::gaps(lsn(80), &all), (vec![], lsn(80)));
}

proptest! {
    /// Whatever was lost or written twice: what a chain says it covers is covered, and nothing leads further.
    #[test]
    fn a_chain_covers_exactly_what_it_says(
        pairs in prop::collection::vec((0u64..60, 1u64..20), 0..20),
        start in 0u64..60,
    ) {
        let all: Vec<Span> = pairs.iter().map(|(start, length)| span(*start, start + length)).collect();
        let chain = LogChain::from(lsn(start), &all);
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

/// An empty spool, or what is left of one.
fn open(directory: &Path) -> (Spool, Vec<SpoolSegment>) {
    let opened = Spool::open(directory, LIMITS, lsn(10)).unwrap();
    (opened.spool, opened.waiting)
}

#[test]
fn segments_hold_whole_batches_and_wait_for_the_store() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, waiting) = open(home.path());
    assert!(waiting.is_empty());
    let mut append = |previous, end, bytes| {
        let appended = spool.append(&author(), &batch(previous, end, bytes));
        assert_eq!(appended.unwrap(), Appended::Now);
        spool.is_full()
    };
    assert!(!append(10, 20, 600));
    assert!(append(20, 30, 600));
    let first = spool.close().unwrap().unwrap();
    assert_eq!((first.span, ends(&first)), (span(10, 30), vec![20, 30]));
    assert!(spool.close().unwrap().is_none());
    spool.append(&author(), &batch(30, 40, 1)).unwrap();
    // What begins behind the end is not taken, and harms nothing.
    let ahead = spool.append(&author(), &batch(41, 50, 1)).unwrap();
    assert_eq!((ahead, spool.position()), (Appended::Ahead, lsn(40)));
    let used = spool.used();
    drop(spool);
    // The next agent finds what the store does not have yet.
    let (spool, waiting) = open(home.path());
    assert_eq!((spool.used(), spool.position()), (used, lsn(40)));
    let spans: Vec<Span> = waiting.iter().map(|segment| segment.span).collect();
    assert_eq!(spans, [span(10, 30), span(30, 40)]);
    assert_eq!(ends(&waiting[1]), [40]);
    for segment in waiting {
        segment.taken("file:///a").unwrap();
    }
    assert_eq!((spool.used(), Spool::waiting(home.path())), (0, Some(0)));
    drop(spool);
    // And where the log goes on, although nothing waits any more.
    let opened = Spool::open(home.path(), LIMITS, lsn(10)).unwrap();
    assert_eq!(opened.spool.position(), lsn(40));
    assert_eq!(
        opened.taken.as_ref().map(|taken| taken.span),
        Some(span(30, 40))
    );
    drop(opened);
    Spool::forget(home.path()).unwrap();
    assert!(!home.path().exists());
}

#[test]
fn a_gap_that_is_left_on_purpose_lies_between_segments() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    spool.append(&author(), &batch(10, 20, 1)).unwrap();
    let before = spool.close().unwrap().unwrap();
    spool.go_on_at(lsn(50)).unwrap();
    let known = spool.append(&author(), &batch(20, 45, 1)).unwrap();
    assert_eq!(known, Appended::Known);
    spool.append(&author(), &batch(45, 60, 1)).unwrap();
    let after = spool.close().unwrap().unwrap();
    assert_eq!((before.span, after.span), (span(10, 20), span(50, 60)));
}

/// A replica that dies with every batch makes each session receive the same again.
#[test]
fn what_is_in_the_log_is_not_written_again() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    spool.append(&author(), &batch(10, 20, 1)).unwrap();
    spool.append(&author(), &batch(20, 30, 1)).unwrap();
    let used = spool.used();
    for _ in 0..3 {
        drop(spool);
        let waiting;
        (spool, waiting) = open(home.path());
        let spans: Vec<Span> = waiting.iter().map(|segment| segment.span).collect();
        assert_eq!(spans, [span(10, 30)]);
        let again = spool.append(&author(), &batch(10, 20, 1)).unwrap();
        assert_eq!(again, Appended::Known);
        assert!(spool.close().unwrap().is_none());
        assert_eq!(spool.used(), used);
    }
    // Cut otherwise this time: only what is new is added.
    let mut two = batch(20, 30, 1);
    two.transactions.extend(batch(30, 40, 1).transactions);
    assert_eq!(spool.append(&author(), &two).unwrap(), Appended::Now);
    spool.append(&author(), &batch(40, 50, 1)).unwrap();
    let segment = spool.close().unwrap().unwrap();
    assert_eq!((segment.span, ends(&segment)), (span(30, 50), vec![40, 50]));
}

/// Three batches in a file that an agent was writing; their ends in it.
fn three_batches() -> (Vec<u8>, [u64; 3]) {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    let ends = [(10, 20), (20, 30), (30, 40)].map(|(previous, end)| {
        spool.append(&author(), &batch(previous, end, 30)).unwrap();
        spool.used()
    });
    drop(spool);
    let written = fs::read(home.path().join(WRITTEN)).unwrap();
    assert_eq!(written.len() as u64, ends[2]);
    (written, ends)
}

const WRITTEN: &str = "000000000000000A.open";

fn found(directory: &Path) -> Vec<(Span, Vec<u64>)> {
    let (spool, waiting) = open(directory);
    let bytes = waiting.iter().map(SpoolSegment::bytes).sum::<u64>();
    assert_eq!(spool.used(), bytes);
    waiting.iter().map(|s| (s.span, ends(s))).collect()
}

#[test]
fn wherever_writing_was_cut_off_whole_batches_are_left() {
    let (written, [first, second, all]) = three_batches();
    for length in 0..=written.len() {
        let directory = tempfile::tempdir().unwrap();
        // What a power loss leaves behind the end may be anything.
        let mut left = written[..length].to_vec();
        left.extend(vec![0xA5; if length % 2 == 0 { 0 } else { 100 }]);
        fs::write(directory.path().join(WRITTEN), left).unwrap();
        let expected = match length as u64 {
            length if length < first => vec![],
            length if length < second => vec![(span(10, 20), vec![20])],
            length if length < all => vec![(span(10, 30), vec![20, 30])],
            _ => vec![(span(10, 40), vec![20, 30, 40])],
        };
        assert_eq!(found(directory.path()), expected, "{length} of {all} bytes");
        assert!(!kept_aside(directory.path()), "{length} of {all} bytes");
    }
}

fn kept_aside(directory: &Path) -> bool {
    directory.join("000000000000000A.damaged").exists()
}

#[test]
fn what_a_disk_has_spoilt_is_told_from_what_a_crash_has_cut_off() {
    let (written, [first, second, _]) = three_batches();
    for at in 0..written.len() {
        let directory = tempfile::tempdir().unwrap();
        let mut left = written.clone();
        left[at] ^= 0xFF;
        fs::write(directory.path().join(WRITTEN), &left).unwrap();
        // A number that still can be read is for whoever reads the segment.
        let Ok(opened) = Spool::open(directory.path(), LIMITS, lsn(10)) else {
            continue;
        };
        let position = opened.spool.position();
        drop(opened);
        let in_batch = [first, second]
            .iter()
            .filter(|end| at as u64 >= **end)
            .count();
        if in_batch < 2 && position < lsn(40) {
            assert!(
                kept_aside(directory.path()),
                "byte {at}, position {position}"
            );
            assert!(position <= lsn(10 + 10 * in_batch as u64), "byte {at}");
        }
        if in_batch == 2 {
            assert!(!kept_aside(directory.path()), "byte {at}");
        }
    }
}

/// A source that was set back to a snapshot of its storage gives LSNs out a second time, later.
#[test]
fn what_comes_again_must_have_committed_when_it_did_also_after_the_store_has_taken_it() {
    const SECOND: i64 = 1_000_000;
    let now = pg_micros(wall_clock());
    let committed_at = |seconds: i64, previous, end| {
        let mut batch = batch(previous, end, 1);
        batch.transactions[0].commit_time = now + seconds * SECOND;
        batch
    };
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    for (seconds, end) in [(-20, 20), (-10, 30)] {
        let new = committed_at(seconds, end - 10, end);
        spool.append(&author(), &new).unwrap();
    }
    // What the source has of another node bears that one's time.
    let mut late = committed_at(0, 30, 40);
    late.transactions
        .extend(committed_at(-7_200, 40, 50).transactions);
    spool.append(&author(), &late).unwrap();
    for opened in ["the one that wrote it", "waiting", "taken"] {
        match opened {
            "waiting" => {
                drop(spool);
                (spool, _) = open(home.path());
            }
            "taken" => {
                drop(spool);
                let waiting;
                (spool, waiting) = open(home.path());
                waiting
                    .into_iter()
                    .for_each(|segment| segment.taken("file:///a").unwrap());
                drop(spool);
                (spool, _) = open(home.path());
            }
            _ => {}
        }
        assert_eq!(spool.position(), lsn(50));
        // As another agent cut it, and by a clock that was set back a little since.
        for seconds in [-7_200, -10, 0, 59] {
            let again = spool.append(&author(), &committed_at(seconds, 10, 30));
            assert_eq!(again.unwrap(), Appended::Known, "{opened}");
        }
        let error = spool
            .append(&author(), &committed_at(600, 10, 30))
            .unwrap_err();
        assert!(matches!(error, SpoolError::WentBack(_)), "{error}");
        assert_eq!(error.class(), Class::Definite);
        assert!(error.to_string().contains("went back in time"), "{error}");
    }
}

/// Three segments of two batches each wait, and a disk spoils some byte of the second.
#[test]
fn what_a_disk_has_spoilt_of_a_complete_segment_is_read_again_whatever_is_killed_meanwhile() {
    let size = {
        let home = tempfile::tempdir().unwrap();
        let (mut spool, _) = open(home.path());
        spool.append(&author(), &batch(30, 40, 1)).unwrap();
        spool.append(&author(), &batch(40, 50, 1)).unwrap();
        spool.used() as usize
    };
    for spoilt in 0..size {
        let home = tempfile::tempdir().unwrap();
        let (mut spool, _) = open(home.path());
        for previous in [10, 30, 50] {
            for previous in [previous, previous + 10] {
                let new = batch(previous, previous + 10, 1);
                spool.append(&author(), &new).unwrap();
            }
            spool.close().unwrap().unwrap();
        }
        drop(spool);
        let victim = home.path().join(format!("{}.log", span(30, 50).name()));
        let mut bytes = fs::read(&victim).unwrap();
        bytes[spoilt] ^= 0x10;
        fs::write(&victim, bytes).unwrap();
        // A version of the future is for whoever wrote it.
        let Ok(opened) = Spool::open(home.path(), LIMITS, lsn(10)) else {
            continue;
        };
        let (mut spool, mut waiting) = (opened.spool, opened.waiting);
        let from = u64::from(spool.position());
        assert!(from == 30 || from == 40, "byte {spoilt}: {from}");
        assert_eq!(spool.resumes_at(), Some(lsn(50)));
        let whole: Vec<Vec<u64>> = waiting.iter().map(ends).collect();
        let left = if from == 40 { vec![vec![40]] } else { vec![] };
        assert_eq!(
            whole,
            [vec![vec![20, 30]], left, vec![vec![60, 70]]].concat()
        );
        // The store takes all of that, before anything is read again and the agent is killed.
        if spoilt % 2 == 0 {
            waiting
                .drain(..)
                .for_each(|segment| segment.taken("file:///a").unwrap());
        }
        drop(spool);
        (spool, _) = open(home.path());
        let again = u64::from(spool.position());
        assert!((30..=from).contains(&again), "byte {spoilt}: {again}");
        for previous in (again..70).step_by(10) {
            assert!(spool.resumes_at().is_some() || previous >= 50);
            let new = batch(previous, previous + 10, 1);
            assert_eq!(spool.append(&author(), &new).unwrap(), Appended::Now);
            if previous == 30 {
                drop(spool);
                (spool, _) = open(home.path());
                assert_eq!(spool.position(), lsn(40));
            }
        }
        drop(spool);
        let (spool, waiting) = open(home.path());
        assert_eq!((spool.position(), spool.resumes_at()), (lsn(70), None));
        let spans: Vec<Span> = waiting.iter().map(|segment| segment.span).collect();
        assert_eq!(LogChain::from(lsn(again), &spans).end, lsn(70), "{spans:?}");
    }
}

#[test]
fn a_segment_kept_aside_is_not_replaced_by_what_a_crash_has_left_of_it() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    for previous in [10, 20] {
        let new = batch(previous, previous + 10, 1);
        spool.append(&author(), &new).unwrap();
    }
    let victim = spool.close().unwrap().unwrap();
    drop(spool);
    let mut spoilt = fs::read(victim.path()).unwrap();
    *spoilt.last_mut().unwrap() ^= 1;
    fs::write(victim.path(), &spoilt).unwrap();
    let (spool, waiting) = open(home.path());
    drop(spool);
    // Cut off already, and not renamed yet.
    fs::rename(waiting[0].path(), victim.path()).unwrap();
    let (spool, _) = open(home.path());
    assert_eq!(
        (spool.position(), spool.resumes_at()),
        (lsn(20), Some(lsn(30)))
    );
    let aside = victim.path().with_extension("damaged");
    assert!(fs::read(aside).unwrap() == spoilt);
}

#[test]
fn what_was_read_again_and_taken_is_not_wanted_a_third_time() {
    let home = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(home.path());
    for previous in [10, 20, 30] {
        let new = batch(previous, previous + 10, 1);
        spool.append(&author(), &new).unwrap();
    }
    let victim = spool.close().unwrap().unwrap();
    spool.append(&author(), &batch(40, 50, 1)).unwrap();
    drop(spool);
    fs::write(victim.path(), "spoilt").unwrap();
    let (mut spool, waiting) = open(home.path());
    assert_eq!(
        (spool.position(), spool.resumes_at()),
        (lsn(10), Some(lsn(40)))
    );
    waiting
        .into_iter()
        .for_each(|segment| segment.taken("file:///a").unwrap());
    // A crash behind each segment; the source may have forgotten what is in them.
    for end in [20, 30, 40] {
        let again = batch(end - 10, end, 1);
        assert_eq!(spool.append(&author(), &again).unwrap(), Appended::Now);
        let segment = spool.close().unwrap().unwrap();
        segment.taken("file:///a").unwrap();
        drop(spool);
        (spool, _) = open(home.path());
        let (position, left) = match end {
            40 => (50, None),
            _ => (end, Some(lsn(40))),
        };
        assert_eq!(
            (spool.position(), spool.resumes_at()),
            (lsn(position), left)
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
    let mut spool = Spool::open(home.path(), limits, lsn(20)).unwrap().spool;
    spool.append(&author(), &batch(20, 30, 600)).unwrap();
    let error = spool.append(&author(), &batch(30, 40, 1_000)).unwrap_err();
    assert!(error.to_string().contains("archive.spool_bytes"), "{error}");
    assert_eq!(error.class(), Class::Transient);
    assert_eq!(spool.position(), lsn(30));
    spool.append(&author(), &batch(30, 50, 100)).unwrap();
    let segment = spool.close().unwrap().unwrap();
    assert_eq!((segment.span, ends(&segment)), (span(20, 50), vec![30, 50]));
    assert_eq!(spool.used(), fs::metadata(segment.path()).unwrap().len());
    segment.taken("file:///a").unwrap();
    // What is larger than the spool has to go somewhere, and does so alone.
    spool.append(&author(), &batch(50, 60, 2_000)).unwrap();
    spool.append(&author(), &batch(60, 70, 1)).unwrap_err();
}

#[test]
fn one_agent_at_a_time() {
    let home = tempfile::tempdir().unwrap();
    let (spool, _) = open(home.path());
    let error = Spool::open(home.path(), LIMITS, lsn(10)).unwrap_err();
    assert!(matches!(error, SpoolError::InUse { .. }), "{error}");
    drop(spool);
    open(home.path());
}

#[test]
fn what_cannot_be_read_back_keeps_its_class_and_hint() {
    use crate::error::{Because, chain};
    use crate::flow::changelog::UnpackError;
    use crate::flow::spill::SpillError;

    let full = || SpillError::Full { limit: 1 };
    let newer = || UnpackError::Version { version: 9 };
    let of_newer = Because::new("read what waits in spool /s/1", newer());
    for (error, class, hint, begins) in [
        (
            SpoolError::from(full()),
            full().class(),
            full().hint(),
            "read a large transaction for the spool: ",
        ),
        (
            SpoolError::Because(of_newer),
            newer().class(),
            newer().hint(),
            "read what waits in spool /s/1: ",
        ),
    ] {
        assert_eq!((error.class(), error.hint()), (class, hint), "{begins}");
        assert!(chain(&error).starts_with(begins), "{}", chain(&error));
    }
}
