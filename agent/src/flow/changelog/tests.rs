use std::collections::HashSet;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::flow::batch::Batch;
use crate::flow::counts::ChangeCounts;
use crate::flow::ledger::BatchNumber;
use crate::flow::spill::SpillSpace;
use crate::flow::testing::{lsn, relation, table};
use crate::flow::transaction::{Assembler, Change, Ended, Relations, SourceRelation, Transaction};
use crate::names::history::History;
use crate::pg::pgoutput::{Value, encode};

fn author() -> Author {
    Author {
        stream: "dr_agent_app".to_owned(),
        history: History {
            system_identifier: 7_301_234_567_890_123_456,
            began: 850_000_000_000_000,
        },
        term: 3,
        writer: 42,
    }
}

fn insert(relation: &Arc<SourceRelation>, value: &str) -> Change {
    Change {
        relations: Relations::Row(Arc::clone(relation)),
        message: encode::insert(relation.relation.id, &[Value::Text(value.as_bytes())]),
    }
}

fn truncate(relations: &[&Arc<SourceRelation>]) -> Change {
    let ids: Vec<u32> = relations.iter().map(|r| r.relation.id).collect();
    Change {
        relations: Relations::Truncate(relations.iter().map(|r| Arc::clone(r)).collect()),
        message: encode::truncate(&ids, false, true),
    }
}

/// Transactions end at 110, 120, ….
fn batch(changes: Vec<Vec<Change>>) -> Batch {
    let transactions = changes.into_iter().enumerate().map(|(i, changes)| {
        let n = i as u64;
        let mut counts = ChangeCounts::default();
        changes
            .iter()
            .for_each(|change| counts.count(&change.message));
        Transaction {
            xid: 700 + i as u32,
            commit_lsn: lsn(105 + 10 * n),
            end_lsn: lsn(110 + 10 * n),
            commit_time: 1_000_000 + i as i64,
            spilled: None,
            bytes: changes.iter().map(Change::bytes).sum(),
            changes,
            counts,
            has_barrier: false,
        }
    });
    Batch {
        number: BatchNumber(9),
        previous: lsn(100),
        transactions: transactions.collect(),
    }
}

fn parts(batch: &Batch, after: u64, part_bytes: usize, compression: Compression) -> Vec<Part> {
    let author = author();
    let mut packing = Packing::new(&author, batch, lsn(after), part_bytes, compression);
    std::iter::from_fn(|| packing.next_part().unwrap()).collect()
}

/// What a receiver makes of parts.
fn transactions(parts: &[Part]) -> Vec<Transaction> {
    let mut messages = Vec::new();
    let mut unpacker = Unpacker::default();
    for (i, part) in parts.iter().enumerate() {
        let ended = unpacker
            .push(part, |message| messages.push(message))
            .unwrap();
        assert_eq!(ended, i + 1 == parts.len());
    }
    assert!(!unpacker.is_inside_a_batch());
    let mut assembler = Assembler::new(lsn(0));
    let ended = messages
        .into_iter()
        .filter_map(|message| assembler.push(message).unwrap());
    ended
        .map(|ended| match ended {
            Ended::Committed(complete) => complete.into_transaction().0,
            Ended::Aborted { .. } => panic!("nothing was rolled back"),
        })
        .collect()
}

fn expect_same(sent: &[Transaction], received: &[Transaction]) {
    assert_eq!(sent.len(), received.len());
    for (sent, received) in sent.iter().zip(received) {
        assert_eq!(sent.xid, received.xid);
        assert_eq!(sent.commit_lsn, received.commit_lsn);
        assert_eq!(sent.end_lsn, received.end_lsn);
        assert_eq!(sent.commit_time, received.commit_time);
        assert_eq!(sent.counts.0, received.counts.0);
        assert_eq!(sent.changes.len(), received.changes.len());
        for (sent, received) in sent.changes.iter().zip(&received.changes) {
            assert_eq!(sent.message, received.message);
            let described = |change: &Change| -> Vec<_> {
                let relations = change.relations().iter();
                relations
                    .map(|relation| relation.relation.clone())
                    .collect()
            };
            assert_eq!(described(sent), described(received));
        }
    }
}

/// Tables, one of which is described anew in between, and a truncate of both.
fn some_changes() -> Vec<Vec<Change>> {
    let (t, u) = (
        relation(table(1, "t", &["a"])),
        relation(table(2, "u", &["x"])),
    );
    let altered = relation(table(1, "t", &["b"]));
    vec![
        vec![insert(&t, "1"), insert(&u, "two"), insert(&t, "")],
        vec![
            insert(&altered, &"wide".repeat(50)),
            truncate(&[&altered, &u]),
        ],
        vec![insert(&t, "back"), insert(&u, "3")],
    ]
}

proptest! {
    #[test]
    fn whatever_the_cut_the_same_transactions_come_out(
        part_bytes in 1usize..2000,
        zstd: bool,
        sizes in prop::collection::vec(prop::collection::vec(0usize..300, 1..5), 1..5),
    ) {
        let t = relation(table(1, "t", &["a"]));
        let changes = sizes.into_iter().map(|sizes| {
            sizes.into_iter().map(|size| insert(&t, &"x".repeat(size))).collect()
        });
        let mut all = some_changes();
        all.extend(changes);
        let sent = batch(all);
        let compression = if zstd { Compression::Zstd } else { Compression::None };
        let parts = parts(&sent, 0, part_bytes, compression);
        for part in &parts {
            prop_assert!(part.raw_bytes <= part_bytes as u64);
            prop_assert_eq!(part.previous_end_lsn, 100);
            prop_assert_eq!(part.end_lsn, u64::from(sent.end_lsn()));
        }
        expect_same(&sent.transactions, &transactions(&parts));
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut frames = Frames::default();
        frames.push(&bytes);
        while let Ok(Some(part)) = frames.next_part() {
            let _ = Unpacker::default().push(&part, |_| {});
        }
    }
}

#[test]
fn what_the_reader_has_is_left_out() {
    let sent = batch(some_changes());
    let rest = parts(&sent, 110, 1 << 20, Compression::Zstd);
    assert_eq!(rest[0].previous_end_lsn, 110);
    expect_same(&sent.transactions[1..], &transactions(&rest));
    assert!(parts(&sent, 130, 1 << 20, Compression::Zstd).is_empty());
}

#[test]
fn a_spilled_transaction_is_read_from_its_file() {
    let home = tempfile::tempdir().unwrap();
    let mut space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
    let t = relation(table(1, "t", &["a"]));
    let spilled = [insert(&t, "first"), insert(&t, &"x".repeat(3 << 20))];
    let mut writer = space.create().unwrap();
    writer
        .append(
            &spilled
                .iter()
                .cloned()
                .map(|change| (700, change))
                .collect(),
        )
        .unwrap();
    let mut sent = batch(vec![vec![insert(&t, "last")]]);
    sent.transactions[0].spilled = Some(writer.finish(HashSet::new()).unwrap());
    let parts = parts(&sent, 0, 1 << 20, Compression::Zstd);
    assert_eq!(parts.len(), 4);
    let received = transactions(&parts);
    let expected = spilled.iter().map(|change| &change.message);
    let got = received[0].changes.iter().map(|change| &change.message);
    assert!(got.eq(expected.chain([&sent.transactions[0].changes[0].message])));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let sent = batch(some_changes());
    for compression in [Compression::None, Compression::Zstd] {
        let [part] = &parts(&sent, 0, 1 << 20, compression)[..] else {
            panic!("it fits into one part");
        };
        for bit in 0..part.messages.len() * 8 {
            let mut bytes = part.messages.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut damaged = part.clone();
            damaged.messages = Bytes::from(bytes);
            let mut messages = Vec::new();
            let result = Unpacker::default().push(&damaged, |message| messages.push(message));
            // zstd ignores a few bits; what comes out is then what went in.
            match result {
                Err(_) => assert!(messages.is_empty()),
                Ok(_) => expect_same(&sent.transactions, &transactions(&[damaged])),
            }
        }
    }
}

/// The whole record, as it lies in a stream or in a segment.
#[test]
fn nothing_a_record_says_of_itself_can_change_unnoticed() {
    let [part] = &parts(&batch(some_changes()), 0, 1 << 20, Compression::None)[..] else {
        panic!("it fits into one part");
    };
    let encoded = part.encode_to_vec();
    assert_eq!(decode(encoded.clone().into()).unwrap(), *part);
    for bit in 0..encoded.len() * 8 {
        let mut bytes = encoded.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(read) = decode(bytes.into()) else {
            continue;
        };
        let result = Unpacker::default().push(&read, |_| {});
        // Of version 1 nobody has summed the header.
        assert!(result.is_err() || read.version == 1, "bit {bit}: {read:?}");
    }
}

#[test]
fn parts_out_of_order_are_refused() {
    let parts = parts(&batch(some_changes()), 0, 100, Compression::None);
    let mut unpacker = Unpacker::default();
    unpacker.push(&parts[0], |_| {}).unwrap();
    assert!(unpacker.is_inside_a_batch());
    let mut foreign = parts[1].clone();
    foreign.writer += 1;
    for wrong in [&parts[0], &parts[2], &foreign] {
        let error = unpacker.push(wrong, |_| {}).unwrap_err();
        assert!(
            matches!(error, UnpackError::OutOfOrder { due: 1, .. }),
            "{error}"
        );
    }
    let mut newer = parts[1].clone();
    newer.version = VERSION + 1;
    let error = unpacker.push(&newer, |_| {}).unwrap_err();
    assert!(matches!(error, UnpackError::Version { .. }), "{error}");
    unpacker.push(&parts[1], |_| {}).unwrap();
}

#[test]
fn frames_come_back_however_the_bytes_arrive() {
    let sent = parts(&batch(some_changes()), 0, 50, Compression::None);
    let mut file = BytesMut::new();
    for part in &sent {
        put_frame(part, &mut file);
    }
    for step in [1, 7, file.len()] {
        let mut frames = Frames::default();
        let mut received = Vec::new();
        for bytes in file.chunks(step) {
            frames.push(bytes);
            while let Some(part) = frames.next_part().unwrap() {
                received.push(part);
            }
        }
        frames.finish().unwrap();
        assert_eq!(received, sent);
        assert_eq!(frames.taken(), file.len() as u64);
    }
    let mut cut = Frames::default();
    cut.push(&file[..file.len() - 1]);
    while cut.next_part().unwrap().is_some() {}
    assert!(matches!(cut.finish(), Err(FramesError::Cut)));
}

/// What version 2 wrote on its first day.
#[test]
fn the_golden_file_of_version_2_is_read() {
    const GOLDEN: &[u8] = include_bytes!("golden/v2.parts");
    let read = golden(GOLDEN);
    assert!(read.iter().all(|part| part.version == 2));
    assert!(read.iter().all(|part| history_of(part) == author().history));
}

/// What version 1 wrote on its first day. Never written anew: a reader that does not read it any more has lost
/// somebody's archive.
#[test]
fn the_golden_file_of_version_1_is_read() {
    const GOLDEN: &[u8] = include_bytes!("golden/v1.parts");
    let read = golden(GOLDEN);
    // They came later.
    let later = |part: &Part| (part.began, part.header_crc32c);
    assert!(
        read.iter()
            .all(|part| part.version == 1 && later(part) == (0, 0))
    );
}

fn golden(file: &[u8]) -> Vec<Part> {
    let mut frames = Frames::default();
    frames.push(file);
    let mut read = Vec::new();
    while let Some(part) = frames.next_part().unwrap() {
        read.push(part);
    }
    frames.finish().unwrap();
    let (zstd, plain): (Vec<_>, Vec<_>) = read
        .iter()
        .cloned()
        .partition(|part| part.compression() == Compression::Zstd);
    let expected = batch(some_changes());
    for parts in [&zstd, &plain] {
        assert!(parts.len() > 2);
        let [first, ..] = &parts[..] else {
            panic!("it is empty")
        };
        assert_eq!(first.stream, author().stream);
        let Author { history, .. } = author();
        assert_eq!(first.system_identifier, history.system_identifier);
        assert_eq!((first.term, first.writer, first.batch), (3, 42, 9));
        assert_eq!((first.previous_end_lsn, first.end_lsn), (100, 130));
        assert_eq!(first.commit_time, 1_000_002);
        expect_same(&expected.transactions, &transactions(parts));
    }
    read
}
