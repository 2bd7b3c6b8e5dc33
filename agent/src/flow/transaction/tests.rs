//! The assembler against hand-written streams; [`histories`] has the random ones.

mod histories;

use std::slice;

use bytes::Bytes;

use super::*;
use crate::flow::testing::{lsn, table};
use crate::pg::pgoutput::{StreamAbort, StreamCommit, Value, encode};

const ROW: [Value<'static>; 1] = [Value::Text(b"1")];

fn at(start: u64) -> Assembler {
    Assembler::new(lsn(start))
}

/// Pushes messages none of which ends a transaction.
fn feed(assembler: &mut Assembler, messages: impl IntoIterator<Item = Bytes>) {
    for message in messages {
        assert!(assembler.push(message).unwrap().is_none());
    }
}

/// Pushes a message that commits a transaction.
fn committed(assembler: &mut Assembler, message: Bytes) -> Transaction {
    match assembler.push(message).unwrap() {
        Some(Ended::Committed(complete)) => complete.into_transaction().0,
        other => panic!("no commit but {other:?}"),
    }
}

fn described(id: u32, columns: &[&str]) -> Bytes {
    encode::relation(&table(id, "t", columns))
}

fn stream_commit(xid: u32, commit: u64, end: u64) -> Bytes {
    encode::stream_commit(&StreamCommit {
        xid,
        commit_lsn: lsn(commit),
        end_lsn: lsn(end),
        commit_time: 0,
    })
}

fn stream_abort(xid: u32, subxid: u32) -> Bytes {
    encode::stream_abort(&StreamAbort {
        xid,
        subxid,
        abort: None,
    })
}

/// One block of `top` with one row by each of `makers`, described first.
fn block(top: u32, first: bool, columns: &[&str], makers: &[u32]) -> Vec<Bytes> {
    let values: Vec<Value<'_>> = columns.iter().map(|_| ROW[0]).collect();
    let mut messages = vec![
        encode::stream_start(top, first),
        encode::streamed(top, &described(1, columns)),
    ];
    for maker in makers {
        messages.push(encode::streamed(*maker, &encode::insert(1, &values)));
    }
    messages.push(encode::stream_stop());
    messages
}

fn columns(transaction: &Transaction) -> Vec<usize> {
    let changes = transaction.changes.iter();
    changes
        .map(|change| change.relations()[0].relation.columns.len())
        .collect()
}

#[test]
fn a_transaction_comes_out_at_its_commit_with_the_relation_of_its_time() {
    let mut assembler = at(5);
    feed(
        &mut assembler,
        [
            encode::begin(lsn(10), 77, 3),
            described(1, &["id"]),
            encode::insert(1, &ROW),
            described(1, &["id", "note"]),
            encode::insert(1, &[ROW[0], ROW[0]]),
        ],
    );
    let transaction = committed(&mut assembler, encode::commit(lsn(10), lsn(12), 77));
    assert_eq!(transaction.counts.total(), 2);
    assert_eq!(columns(&transaction), [1, 2]);
}

#[test]
fn equality_of_end_and_next_commit_is_the_normal_case_and_going_back_is_not() {
    let mut assembler = at(10);
    feed(&mut assembler, [encode::begin(lsn(10), 0, 3)]);
    committed(&mut assembler, encode::commit(lsn(10), lsn(12), 0));
    feed(&mut assembler, block(4, true, &["id"], &[4]));
    committed(&mut assembler, stream_commit(4, 12, 14));
    feed(&mut assembler, [encode::begin(lsn(13), 0, 5)]);
    let error = assembler
        .push(encode::commit(lsn(13), lsn(15), 0))
        .unwrap_err();
    assert!(
        matches!(error, AssembleError::OutOfOrder { xid: 5, .. }),
        "{error}"
    );
}

#[test]
fn changes_outside_a_transaction_or_of_unknown_relations_are_errors() {
    let mut assembler = at(1);
    let row = [Value::Null];
    let unknown = assembler.push(encode::insert(9, &row)).unwrap_err();
    assert!(matches!(unknown, AssembleError::UnknownRelation(9)));
    feed(&mut assembler, [described(9, &["id"])]);
    let outside = assembler.push(encode::insert(9, &row)).unwrap_err();
    assert!(matches!(outside, AssembleError::OutOfPlace { .. }));
}

#[test]
fn what_is_taken_out_of_an_open_transaction_still_counts_as_its_changes() {
    let mut assembler = at(1);
    feed(
        &mut assembler,
        [
            encode::begin(lsn(10), 0, 3),
            described(1, &["id"]),
            encode::insert(1, &ROW),
        ],
    );
    assert!(assembler.pending_bytes() > 0);
    assert_eq!(assembler.largest_open(), Some(3));
    assert_eq!(assembler.take_pending(3).iter().count(), 1);
    assert_eq!(assembler.pending_bytes(), 0);
    let transaction = committed(&mut assembler, encode::commit(lsn(10), lsn(12), 0));
    assert_eq!(
        (transaction.counts.total(), transaction.changes.len()),
        (1, 0)
    );
}

#[test]
fn a_streamed_transaction_looks_like_one_that_came_whole() {
    let mut assembler = at(1);
    feed(&mut assembler, block(5, true, &["id"], &[5, 6]));
    feed(
        &mut assembler,
        [
            encode::begin(lsn(10), 0, 7),
            described(1, &["id"]),
            encode::insert(1, &ROW),
        ],
    );
    let small = committed(&mut assembler, encode::commit(lsn(10), lsn(12), 0));
    assert_eq!((small.xid, small.changes.len()), (7, 1));
    feed(&mut assembler, block(5, false, &["id"], &[5]));
    let large = committed(&mut assembler, stream_commit(5, 12, 14));
    assert_eq!((large.xid, large.counts.total()), (5, 3));
    for change in &large.changes {
        assert_eq!(change.message, encode::insert(1, &ROW));
        // One allocation per description, whoever repeats it.
        let theirs = &small.changes[0].relations()[0];
        assert!(Arc::ptr_eq(&change.relations()[0], theirs));
    }
    assert_eq!(assembler.pending_bytes(), 0);
}

#[test]
fn rolled_back_subtransactions_and_transactions_are_dropped() {
    let mut assembler = at(1);
    feed(&mut assembler, block(5, true, &["id"], &[5, 6, 7, 6]));
    feed(&mut assembler, block(8, true, &["id"], &[8]));
    let taken = assembler.take_pending(5);
    assert_eq!(taken.iter().count(), 4);
    feed(&mut assembler, block(5, false, &["id"], &[6, 7]));
    feed(
        &mut assembler,
        [stream_abort(5, 7), stream_abort(5, 6), stream_abort(5, 99)],
    );
    let ended = assembler.push(stream_abort(8, 8)).unwrap();
    assert!(matches!(ended, Some(Ended::Aborted { xid: 8 })));
    feed(&mut assembler, block(5, false, &["id"], &[5]));
    let Some(Ended::Committed(complete)) = assembler.push(stream_commit(5, 12, 14)).unwrap() else {
        panic!("not committed");
    };
    let (transaction, aborted) = complete.into_transaction();
    assert_eq!(transaction.counts.total(), 2);
    assert_eq!(transaction.changes.len(), 1);
    assert_eq!(transaction.bytes, transaction.changes[0].bytes());
    assert_eq!(aborted, [6, 7].into());
    assert_eq!(assembler.pending_bytes(), 0);
}

#[test]
fn a_description_is_the_streamed_transactions_own_until_it_commits() {
    let row = || encode::insert(1, &ROW);
    let whole = |assembler: &mut Assembler, n: u64| {
        feed(assembler, [encode::begin(lsn(n), 0, 3), row()]);
        columns(&committed(assembler, encode::commit(lsn(n), lsn(n + 1), 0)))
    };
    let mut assembler = at(1);
    feed(&mut assembler, [described(1, &["id"])]);
    feed(&mut assembler, block(5, true, &["id", "note"], &[5]));
    feed(&mut assembler, block(6, true, &["id", "a", "b"], &[6]));
    assert_eq!(whole(&mut assembler, 10), [1]);
    assembler.push(stream_abort(6, 6)).unwrap();
    assert_eq!(whole(&mut assembler, 20), [1]);
    let streamed = committed(&mut assembler, stream_commit(5, 30, 31));
    assert_eq!(columns(&streamed), [2]);
    assert_eq!(whole(&mut assembler, 40), [2]);
}

#[test]
fn a_commit_does_not_bring_back_an_older_description() {
    let mut assembler = at(1);
    feed(&mut assembler, block(5, true, &["id"], &[5]));
    feed(&mut assembler, [described(1, &["id", "note"])]);
    committed(&mut assembler, stream_commit(5, 10, 11));
    feed(
        &mut assembler,
        [
            encode::begin(lsn(12), 0, 6),
            encode::insert(1, &[ROW[0], ROW[0]]),
        ],
    );
    let transaction = committed(&mut assembler, encode::commit(lsn(12), lsn(13), 0));
    assert_eq!(columns(&transaction), [2]);
}

#[test]
fn blocks_and_transactions_that_do_not_nest_are_errors() {
    let refused = |before: &[Bytes], message: Bytes| {
        let mut assembler = at(1);
        feed(&mut assembler, before.iter().cloned());
        let error = assembler.push(message).unwrap_err();
        assert!(
            matches!(
                error,
                AssembleError::OutOfPlace { .. } | AssembleError::WrongTransaction { .. }
            ),
            "{error}"
        );
    };
    let begin = encode::begin(lsn(10), 0, 3);
    let start = encode::stream_start(5, true);
    let stop = encode::stream_stop();
    refused(slice::from_ref(&begin), begin.clone());
    refused(slice::from_ref(&begin), start.clone());
    refused(slice::from_ref(&start), begin.clone());
    refused(slice::from_ref(&start), start.clone());
    refused(&[start.clone(), stop.clone()], start.clone());
    refused(slice::from_ref(&start), stream_commit(5, 10, 11));
    refused(&[start], stream_abort(5, 5));
    refused(&[begin], stream_abort(5, 5));
    refused(&[], stop);
    refused(&[], encode::stream_start(5, false));
    refused(&[], stream_commit(5, 10, 11));
}

#[test]
fn an_abort_of_what_was_never_sent_is_nothing() {
    let mut assembler = at(1);
    feed(&mut assembler, [stream_abort(5, 6), stream_abort(5, 5)]);
}
