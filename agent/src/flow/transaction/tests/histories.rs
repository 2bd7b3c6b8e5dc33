//! Random histories: whatever the source does and whenever the walsender streams, what comes out is the
//! committed transactions in commit order, with the changes that survived and nothing else.
//!
//! [`Source`] runs transactions with savepoints and ALTER TABLE under PostgreSQL's locking rules;
//! [`Walsender`] keeps the books of pgoutput and its reorder buffer: which descriptions it has sent to
//! whom, which subtransactions it has streamed, when it must describe again.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::{described, stream_abort, stream_commit};
use crate::flow::spill::{SpillSpace, Spills};
use crate::flow::testing::lsn;
use crate::flow::transaction::{Assembler, Change, Ended};
use crate::pg::pgoutput::{Value, encode};

const TABLES: usize = 3;
const SESSIONS: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    Insert {
        table: usize,
        bytes: usize,
    },
    Truncate {
        table: usize,
    },
    Alter {
        table: usize,
    },
    Savepoint,
    Release,
    RollbackTo,
    Commit,
    Rollback,
    /// The reorder buffer's memory is full, and this is the largest transaction.
    Stream,
    /// Something about the table's publication changes.
    Invalidate {
        table: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let table = 0..TABLES;
    prop_oneof![
        12 => (table.clone(), 0..300_usize).prop_map(|(table, bytes)| Op::Insert { table, bytes }),
        1 => table.clone().prop_map(|table| Op::Truncate { table }),
        2 => table.clone().prop_map(|table| Op::Alter { table }),
        4 => Just(Op::Savepoint),
        2 => Just(Op::Release),
        3 => Just(Op::RollbackTo),
        3 => Just(Op::Commit),
        1 => Just(Op::Rollback),
        5 => Just(Op::Stream),
        1 => table.prop_map(|table| Op::Invalidate { table }),
    ]
}

/// A change as the replica should see it: the table's version and the message.
type Seen = (u32, Bytes);

#[derive(Debug)]
enum Decoded {
    Change {
        maker: u32,
        table: usize,
        seen: Seen,
    },
    /// ALTER TABLE was here.
    Altered { maker: u32, table: usize },
}

impl Decoded {
    fn maker(&self) -> u32 {
        match self {
            Self::Change { maker, .. } | Self::Altered { maker, .. } => *maker,
        }
    }
}

/// A transaction that is running on the source.
struct Running {
    xid: u32,
    /// Open subtransactions, the innermost last, each with the versions to go back to.
    savepoints: Vec<(u32, HashMap<usize, u32>)>,
    /// Subtransaction and the one it was made in.
    parents: Vec<(u32, u32)>,
    versions: HashMap<usize, u32>,
    touched: HashSet<usize>,
    altered: HashSet<usize>,
    undelivered: Vec<Decoded>,
    /// What it has done and not rolled back.
    done: Vec<(u32, Seen)>,
    /// Makers of what was streamed; none as long as nothing was.
    streamed: HashSet<u32>,
}

impl Running {
    fn new(xid: u32) -> Self {
        Self {
            xid,
            savepoints: Vec::new(),
            parents: Vec::new(),
            versions: HashMap::new(),
            touched: HashSet::new(),
            altered: HashSet::new(),
            undelivered: Vec::new(),
            done: Vec::new(),
            streamed: HashSet::new(),
        }
    }

    fn maker(&self) -> u32 {
        self.savepoints.last().map_or(self.xid, |(xid, _)| *xid)
    }

    /// A subtransaction and everything that was made in it, in the order of the abort record.
    fn family(&self, xid: u32) -> Vec<u32> {
        let mut family = vec![xid];
        for (child, parent) in &self.parents {
            if family.contains(parent) {
                family.push(*child);
            }
        }
        family.rotate_left(1);
        family
    }
}

/// pgoutput's and the reorder buffer's books.
#[derive(Default)]
struct Walsender {
    messages: Vec<Bytes>,
    schema_sent: HashSet<usize>,
    schema_streamed: HashSet<(usize, u32)>,
}

impl Walsender {
    fn invalidate(&mut self, table: usize) {
        self.schema_sent.remove(&table);
        self.schema_streamed.retain(|(of, _)| *of != table);
    }

    fn describe(&mut self, table: usize, version: u32) -> Bytes {
        let column = format!("v{version}");
        described(u32::try_from(table).unwrap(), &["id", &column])
    }

    fn send(&mut self, decoded: Decoded, streaming: Option<u32>) {
        let (maker, table, (version, message)) = match decoded {
            Decoded::Altered { table, .. } => return self.invalidate(table),
            Decoded::Change { maker, table, seen } => (maker, table, seen),
        };
        let first = match streaming {
            Some(top) => self.schema_streamed.insert((table, top)),
            None => self.schema_sent.insert(table),
        };
        let mut messages = Vec::new();
        if first {
            messages.push(self.describe(table, version));
        }
        messages.push(message);
        for message in messages {
            self.messages.push(match streaming {
                Some(_) => encode::streamed(maker, &message),
                None => message,
            });
        }
    }

    fn stream(&mut self, running: &mut Running) {
        let first = running.streamed.is_empty();
        self.messages.push(encode::stream_start(running.xid, first));
        running.streamed.insert(running.xid);
        for decoded in running.undelivered.drain(..) {
            if matches!(decoded, Decoded::Change { .. }) {
                running.streamed.insert(decoded.maker());
            }
            self.send(decoded, Some(running.xid));
        }
        self.messages.push(encode::stream_stop());
        // The next block sees the catalog anew.
        for table in &running.altered {
            self.invalidate(*table);
        }
    }

    fn abort(&mut self, running: &mut Running, subxid: u32) {
        for xid in running.family(subxid) {
            if running.streamed.remove(&xid) {
                self.messages.push(stream_abort(running.xid, xid));
            }
        }
        if subxid == running.xid {
            self.schema_streamed.retain(|(_, xid)| *xid != subxid);
        }
        for table in &running.altered {
            self.invalidate(*table);
        }
    }

    fn commit(&mut self, mut running: Running, end: u64) {
        let xid = running.xid;
        if running.streamed.is_empty() {
            self.messages.push(encode::begin(lsn(end - 1), 0, xid));
            for decoded in std::mem::take(&mut running.undelivered) {
                self.send(decoded, None);
            }
            self.messages
                .push(encode::commit(lsn(end - 1), lsn(end), 0));
        } else {
            self.stream(&mut running);
            self.messages.push(stream_commit(xid, end - 1, end));
            let (ours, others): (HashSet<_>, HashSet<_>) =
                self.schema_streamed.drain().partition(|(_, of)| *of == xid);
            self.schema_streamed = others;
            self.schema_sent
                .extend(ours.into_iter().map(|(table, _)| table));
        }
        for table in running.altered {
            self.invalidate(table);
        }
    }
}

#[derive(Default)]
struct Source {
    sessions: [Option<Running>; SESSIONS],
    versions: HashMap<usize, u32>,
    serial: u32,
    walsender: Walsender,
    committed: Vec<(u32, Vec<Seen>)>,
}

impl Source {
    fn next(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }

    fn run(&mut self, session: usize, op: Op) {
        let mut running = self.sessions[session].take().unwrap_or_else(|| {
            let xid = self.next() + 1000;
            Running::new(xid)
        });
        let free = |table: usize, of: fn(&Running) -> &HashSet<usize>| {
            let others = self.sessions.iter().flatten();
            !others.into_iter().any(|other| of(other).contains(&table))
        };
        match op {
            Op::Insert { table, .. } | Op::Truncate { table }
                if free(table, |other| &other.altered) =>
            {
                let id = u32::try_from(table).unwrap();
                let message = match op {
                    Op::Insert { bytes, .. } => {
                        let value = self.next().to_string();
                        let filler = "x".repeat(bytes);
                        let row = [value.as_bytes(), filler.as_bytes()].map(Value::Text);
                        encode::insert(id, &row)
                    }
                    _ => encode::truncate(&[id], false, false),
                };
                let maker = running.maker();
                let known = running.versions.get(&table).or(self.versions.get(&table));
                let seen = (known.copied().unwrap_or(0), message);
                running.touched.insert(table);
                running.done.push((maker, seen.clone()));
                running
                    .undelivered
                    .push(Decoded::Change { maker, table, seen });
            }
            Op::Alter { table } if free(table, |other| &other.touched) => {
                let version = self.next();
                running.versions.insert(table, version);
                running.touched.insert(table);
                running.altered.insert(table);
                let maker = running.maker();
                running.undelivered.push(Decoded::Altered { maker, table });
            }
            Op::Savepoint => {
                let xid = self.next() + 1000;
                running.parents.push((xid, running.maker()));
                let versions = running.versions.clone();
                running.savepoints.push((xid, versions));
            }
            Op::Release => {
                running.savepoints.pop();
            }
            Op::RollbackTo => {
                if let Some((subxid, versions)) = running.savepoints.pop() {
                    let family = running.family(subxid);
                    running.versions = versions;
                    running
                        .undelivered
                        .retain(|decoded| !family.contains(&decoded.maker()));
                    running.done.retain(|(maker, _)| !family.contains(maker));
                    self.walsender.abort(&mut running, subxid);
                }
            }
            Op::Stream if !running.undelivered.is_empty() => self.walsender.stream(&mut running),
            Op::Commit => {
                let seen = running.done.drain(..).map(|(_, seen)| seen).collect();
                self.committed.push((running.xid, seen));
                self.versions.extend(running.versions.drain());
                let end = self.next();
                self.walsender.commit(running, u64::from(end));
                return;
            }
            Op::Rollback => {
                let xid = running.xid;
                self.walsender.abort(&mut running, xid);
                return;
            }
            Op::Invalidate { table } => self.walsender.invalidate(table),
            // Somebody else has the table locked, or there is nothing to stream.
            Op::Insert { .. } | Op::Truncate { .. } | Op::Alter { .. } | Op::Stream => {}
        }
        self.sessions[session] = Some(running);
    }
}

fn seen(change: &Change) -> Seen {
    let column = &change.relations()[0].relation.columns[1].name;
    (column[1..].parse().unwrap(), change.message.clone())
}

/// The source task in small.
fn assemble(messages: Vec<Bytes>, limit: u64, spills: &mut Spills) -> Vec<(u32, Vec<Seen>)> {
    let mut assembler = Assembler::new(lsn(0));
    let mut transactions = Vec::new();
    for message in messages {
        match assembler.push(message).unwrap() {
            Some(Ended::Committed(complete)) => {
                let (transaction, aborted) = complete.into_transaction();
                let mut changes = Vec::new();
                let spilled = spills.finish(transaction.xid, aborted).unwrap();
                if let Some(file) = &spilled {
                    let mut reader = file.reader().unwrap();
                    while let Some(part) = reader.next_changes().unwrap() {
                        changes.extend(part);
                    }
                }
                let in_memory: u64 = transaction.changes.iter().map(Change::bytes).sum();
                assert_eq!(transaction.bytes, in_memory);
                changes.extend(transaction.changes);
                let mut counts = crate::flow::counts::ChangeCounts::default();
                changes
                    .iter()
                    .for_each(|change| counts.count(&change.message));
                assert_eq!(transaction.counts, counts);
                transactions.push((transaction.xid, changes.iter().map(seen).collect()));
            }
            Some(Ended::Aborted { xid }) => spills.discard(xid),
            None => {}
        }
        while assembler.pending_bytes() > limit {
            let xid = assembler.largest_open().unwrap();
            spills.append(xid, &assembler.take_pending(xid)).unwrap();
        }
    }
    transactions
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_comes_out_is_what_was_committed(
        ops in proptest::collection::vec((0..SESSIONS, op()), 0..150),
        limit in prop_oneof![Just(0), Just(700), Just(u64::MAX)],
    ) {
        let mut source = Source::default();
        for (session, op) in ops {
            source.run(session, op);
        }
        let home = tempfile::tempdir().unwrap();
        let space = SpillSpace::open(home.path().join("s"), 1 << 30).unwrap();
        let mut spills = Spills::new(space);
        let transactions = assemble(source.walsender.messages, limit, &mut spills);
        prop_assert_eq!(transactions, source.committed);
        // Files are left of open transactions only.
        drop(spills);
        let left = std::fs::read_dir(home.path().join("s")).map_or(0, Iterator::count);
        prop_assert_eq!(left, 0);
    }
}
