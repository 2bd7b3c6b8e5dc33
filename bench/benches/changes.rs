//! The two inner loops of the agent, alone: decoding pgoutput, and folding a batch into net changes.
//!
//! The messages are those of pgbench's TPC-B-like transaction, built here byte by byte: what the agent's own
//! tests use for that is not part of its library. Run with `cargo bench -p dr-agent-bench`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use criterion::{Criterion, Throughput};
use dr_agent::flow::net::{self, Key, KeyColumn, KeyOrder};
use dr_agent::flow::transaction::{Change, Named, Relations, SourceRelation};
use dr_agent::pg::pgoutput::{self, Message};

/// Transactions of the batch: as many as gather while a replica is busy.
const TRANSACTIONS: u32 = 5_000;

/// Rows of `pgbench_accounts` that they spread over.
const ACCOUNTS: u32 = 2_000_000;

const INT4: u32 = 23;
const BPCHAR: u32 = 1042;
const TIMESTAMP: u32 = 1114;

/// A table of pgbench: its id, name, and columns as name, type and whether it is the key.
struct Table(u32, &'static str, &'static [(&'static str, u32, bool)]);

const TABLES: [Table; 4] = [
    Table(
        1,
        "pgbench_accounts",
        &[
            ("aid", INT4, true),
            ("bid", INT4, false),
            ("abalance", INT4, false),
            ("filler", BPCHAR, false),
        ],
    ),
    Table(
        2,
        "pgbench_tellers",
        &[
            ("tid", INT4, true),
            ("bid", INT4, false),
            ("tbalance", INT4, false),
            ("filler", BPCHAR, false),
        ],
    ),
    Table(
        3,
        "pgbench_branches",
        &[
            ("bid", INT4, true),
            ("bbalance", INT4, false),
            ("filler", BPCHAR, false),
        ],
    ),
    Table(
        4,
        "pgbench_history",
        &[
            ("tid", INT4, false),
            ("bid", INT4, false),
            ("aid", INT4, false),
            ("delta", INT4, false),
            ("mtime", TIMESTAMP, false),
            ("filler", BPCHAR, false),
        ],
    ),
];

/// A value in binary format, or NULL.
enum Field {
    Number(u32),
    Text(&'static [u8]),
    Time(i64),
    Null,
}

fn put_name(out: &mut BytesMut, name: &str) {
    out.put_slice(name.as_bytes());
    out.put_u8(0);
}

fn relation(Table(id, name, columns): &Table) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(b'R');
    out.put_u32(*id);
    put_name(&mut out, "public");
    put_name(&mut out, name);
    out.put_u8(b'd');
    out.put_u16(columns.len() as u16);
    for (name, oid, is_key) in *columns {
        out.put_u8(u8::from(*is_key));
        put_name(&mut out, name);
        out.put_u32(*oid);
        out.put_i32(-1);
    }
    out.freeze()
}

fn row(kind: u8, table: u32, fields: &[Field]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(kind);
    out.put_u32(table);
    out.put_u8(b'N');
    out.put_u16(fields.len() as u16);
    for field in fields {
        let mut binary = |bytes: &[u8]| {
            out.put_u8(b'b');
            out.put_u32(bytes.len() as u32);
            out.put_slice(bytes);
        };
        match field {
            Field::Number(number) => binary(&number.to_be_bytes()),
            Field::Text(text) => binary(text),
            Field::Time(time) => binary(&time.to_be_bytes()),
            Field::Null => out.put_u8(b'n'),
        }
    }
    out.freeze()
}

/// The row changes of all transactions, with the position of their table.
fn messages() -> Vec<(usize, Bytes)> {
    use Field::{Null, Number, Text, Time};
    const FILLER: &[u8] = &[b' '; 84];
    let mut messages = Vec::new();
    // A fixed sequence of numbers that looks random: the constants are Knuth's.
    let mut state = 1_u64;
    let mut next = |below: u32| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % below
    };
    for _ in 0..TRANSACTIONS {
        let (aid, tid, bid, delta) = (next(ACCOUNTS), next(200), next(20), next(10_000));
        let account = [Number(aid), Number(bid), Number(delta), Text(FILLER)];
        let teller = [Number(tid), Number(bid), Number(delta), Null];
        let branch = [Number(bid), Number(delta), Null];
        let history = [
            Number(tid),
            Number(bid),
            Number(aid),
            Number(delta),
            Time(0),
            Null,
        ];
        messages.push((0, row(b'U', 1, &account)));
        messages.push((1, row(b'U', 2, &teller)));
        messages.push((2, row(b'U', 3, &branch)));
        messages.push((3, row(b'I', 4, &history)));
    }
    messages
}

fn relations() -> Vec<Arc<SourceRelation>> {
    let described = TABLES.iter().map(|table| {
        let message = relation(table);
        match pgoutput::decode(&message, false) {
            Ok(Message::Relation(relation)) => Arc::new(SourceRelation {
                relation,
                message,
                types: Named::new(),
            }),
            other => panic!("not a description of a relation: {other:?}"),
        }
    });
    described.collect()
}

fn key_of(relation: &Arc<SourceRelation>) -> Key {
    let columns = relation.relation.columns.iter().enumerate();
    let key = columns.filter(|(_, column)| column.is_key);
    Key {
        columns: key
            .map(|(position, _)| KeyColumn {
                position,
                order: KeyOrder::Integer,
            })
            .collect(),
    }
}

fn decode(criterion: &mut Criterion) {
    let messages = messages();
    let mut group = criterion.benchmark_group("pgoutput");
    group.throughput(Throughput::Elements(messages.len() as u64));
    group.bench_function("decode TPC-B", |bencher| {
        bencher.iter(|| {
            for (_, message) in &messages {
                black_box(pgoutput::decode(message, false)).expect("it is well-formed");
            }
        });
    });
    group.finish();
}

fn fold(criterion: &mut Criterion) {
    let relations = relations();
    let changes: Vec<Change> = messages()
        .into_iter()
        .map(|(table, message)| Change {
            relations: Relations::Row(Arc::clone(&relations[table])),
            message,
        })
        .collect();
    let mut group = criterion.benchmark_group("net");
    group.throughput(Throughput::Elements(changes.len() as u64));
    group.bench_function("fold TPC-B", |bencher| {
        // What it returns is freed outside of the measured time.
        bencher
            .iter_with_large_drop(|| net::fold(&changes, &key_of).expect("the changes make sense"));
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    decode(&mut criterion);
    fold(&mut criterion);
    criterion.final_summary();
}
