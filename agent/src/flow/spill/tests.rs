use bytes::Bytes;

use super::writer::FRAME_BYTES;
use super::*;
use crate::flow::testing::{relation, table};
use crate::flow::transaction::{Change, Pending, Relations, SourceRelation};
use crate::pg::pgoutput::{Value, encode};

const XID: u32 = 7;

fn changes(relation: &Arc<SourceRelation>, values: &[&str]) -> Pending {
    made_by(XID, relation, values)
}

fn made_by(maker: u32, relation: &Arc<SourceRelation>, values: &[&str]) -> Pending {
    let change = |value: &&str| Change {
        relations: Relations::Row(Arc::clone(relation)),
        message: encode::insert(relation.relation.id, &[Value::Text(value.as_bytes())]),
    };
    values.iter().map(|value| (maker, change(value))).collect()
}

fn messages(pending: &Pending) -> Vec<Bytes> {
    let messages = pending.iter().map(|(_, change)| change.message.clone());
    messages.collect()
}

fn read_all(file: &SpillFile) -> Vec<Bytes> {
    let mut reader = file.reader().unwrap();
    let mut messages = Vec::new();
    while let Some(changes) = reader.next_changes().unwrap() {
        messages.extend(changes.into_iter().map(|change| change.message));
    }
    messages
}

#[test]
fn what_is_written_is_read_twice_over_and_then_removed() {
    let home = tempfile::tempdir().unwrap();
    let mut space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
    let before = relation(table(1, "t", &["a"]));
    let after = relation(table(1, "t", &["b"]));
    let mut writer = space.create().unwrap();
    let first = changes(&before, &["1", &"x".repeat(FRAME_BYTES), "2"]);
    let second = changes(&after, &["3"]);
    writer.append(&first).unwrap();
    writer.append(&second).unwrap();
    let file = writer.finish(HashSet::new()).unwrap();
    let expected = [messages(&first), messages(&second)].concat();
    assert_eq!(read_all(&file), expected);
    assert_eq!(read_all(&file), expected);
    let mut reader = file.reader().unwrap();
    let mut last = Vec::new();
    while let Some(changes) = reader.next_changes().unwrap() {
        last = changes;
    }
    assert_eq!(
        last.last().unwrap().relations()[0].relation.columns[0].name,
        "b"
    );
    let path = file.path.clone();
    drop(file);
    assert!(!path.exists());
    assert_eq!(space.room.used.load(Ordering::Relaxed), 0);
}

#[test]
fn the_limit_is_an_error_that_names_the_setting() {
    let home = tempfile::tempdir().unwrap();
    let mut space = SpillSpace::open(home.path().join("s"), 10).unwrap();
    let mut writer = space.create().unwrap();
    writer
        .append(&changes(&relation(table(1, "t", &["a"])), &["some text"]))
        .unwrap();
    let error = writer.finish(HashSet::new()).unwrap_err();
    assert!(error.to_string().contains("limits.spill_bytes"), "{error}");
    assert_eq!(error.class(), Class::Definite);
}

#[test]
fn damage_is_noticed() {
    let home = tempfile::tempdir().unwrap();
    let mut space = SpillSpace::open(home.path().join("s"), 1 << 20).unwrap();
    let mut writer = space.create().unwrap();
    let written = changes(&relation(table(1, "t", &["a"])), &["some text"]);
    writer.append(&written).unwrap();
    let file = writer.finish(HashSet::new()).unwrap();
    let good = fs::read(&file.path).unwrap();
    for position in 0..good.len() {
        let mut bad = good.clone();
        bad[position] ^= 0x10;
        fs::write(&file.path, &bad).unwrap();
        // A zstd header has a bit that decoders ignore; what is read must be what was written.
        if let Ok(read) = file.reader().unwrap().next_changes() {
            let read = read.expect("one frame");
            assert_eq!(read[0].message, messages(&written)[0], "byte {position}");
        }
    }
    for length in 1..good.len() {
        fs::write(&file.path, &good[..length]).unwrap();
        assert!(
            file.reader().unwrap().next_changes().is_err(),
            "cut at {length}"
        );
    }
}

#[test]
fn what_an_earlier_agent_left_is_removed() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("s");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("1.spill"), b"old").unwrap();
    SpillSpace::open(directory.clone(), 1).unwrap();
    assert!(!directory.exists());
}

#[test]
fn changes_of_aborted_subtransactions_are_not_read_back_and_their_descriptions_are() {
    let home = tempfile::tempdir().unwrap();
    let mut space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
    let table = relation(table(1, "t", &["a"]));
    let mut writer = space.create().unwrap();
    let large = "x".repeat(FRAME_BYTES);
    writer.append(&made_by(8, &table, &["1", &large])).unwrap();
    writer.append(&made_by(XID, &table, &["2"])).unwrap();
    writer.append(&made_by(9, &table, &["3"])).unwrap();
    let file = writer.finish(HashSet::from([8, 9])).unwrap();
    let kept = made_by(XID, &table, &["2"]);
    assert_eq!(read_all(&file), messages(&kept));
    let reader = &mut file.reader().unwrap();
    assert_eq!(reader.next_changes().unwrap().unwrap().len(), 0);
    assert_eq!(reader.next_changes().unwrap().unwrap().len(), 1);
    assert!(reader.next_changes().unwrap().is_none());
}

#[test]
fn many_open_transactions_gather_few_frames_and_an_aborted_one_gives_its_space_back() {
    let home = tempfile::tempdir().unwrap();
    let space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
    let used = Arc::clone(&space.room.used);
    let mut spills = Spills::new(space);
    let table = relation(table(1, "t", &["a"]));
    for round in 0..3 {
        for xid in 1..=50 {
            let value = format!("{round} of {xid}");
            spills
                .append(xid, &made_by(xid, &table, &[&value]))
                .unwrap();
            assert!(spills.gathering() <= 4);
        }
    }
    for xid in 1..=49 {
        assert!(spills.holds(xid));
        spills.discard(xid);
    }
    let file = spills.finish(50, HashSet::new()).unwrap().unwrap();
    let expected = made_by(50, &table, &["0 of 50", "1 of 50", "2 of 50"]);
    assert_eq!(read_all(&file), messages(&expected));
    assert_eq!(used.load(Ordering::Relaxed), file.bytes);
    drop(file);
    assert_eq!(used.load(Ordering::Relaxed), 0);
    assert_eq!(fs::read_dir(home.path().join("s")).unwrap().count(), 0);
    assert!(spills.finish(50, HashSet::new()).unwrap().is_none());
}
