//! Rows: COPY out of the source, passed through without parsing into COPY on the replica.
//!
//! Several connections pairs take parts from one queue ([`super::plan`]). A table of one part is
//! emptied, filled and entered into the ledger in one transaction, so that it can be written frozen
//! and, with `wal_level = minimal`, without WAL. A table of several parts is emptied first; each
//! part is a transaction of its own, and the ledger follows the last one.
//!
//! # Invariants
//! - A table is `copied` only if both servers counted the same rows and the stream had its end.
//! - At most [`CHUNK_BYTES`] and one message are held per connection pair; a slow replica slows the
//!   source down.
//! - Dropping the future at any point leaves at most a `copying` table, which is emptied again.

use std::collections::{BTreeSet, HashSet};
use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _, future};
use tokio_postgres::Client;

use super::error::CopyError;
use super::layout::TableLayout;
use super::ledger::CopyLedger;
use super::plan::TablePart;
use super::progress::CopyObserver;
use super::work::{CopyWork, TakenWork};
use super::{Sessions, refused};
use crate::catalog::routing;
use crate::failpoint;
use crate::names::TableName;

/// Rows are handed to the replica in pieces of this size: one write and one message for hundreds of
/// rows. Larger gains nothing, smaller costs system calls.
pub(crate) const CHUNK_BYTES: usize = 64 * 1024;

/// What is shared by the connection pairs of one copy.
struct CopySides<'a> {
    layouts: &'a [TableLayout],
    ledger: CopyLedger<'a>,
    work: CopyWork<'a>,
    /// Tables on the replica that cannot be truncated by themselves.
    referred_to: HashSet<TableName>,
}

/// Copies the rows of all `layouts`, whose `parts` are in the order in which they are taken.
/// `tables_total` includes tables that hold their rows already.
pub(super) async fn copy_all(
    sessions: &Sessions<'_>,
    ledger: CopyLedger<'_>,
    layouts: &[TableLayout],
    parts: &[TablePart],
    observer: &dyn CopyObserver,
    tables_total: usize,
) -> Result<(), CopyError> {
    let pairs = usize::from(sessions.jobs()).min(parts.len());
    let names = layouts.iter().map(|layout| &layout.name).collect();
    let work = CopyWork::new(names, parts, tables_total, observer);
    let several = work.split_tables();
    let mut referred_to = HashSet::new();
    if !parts.is_empty() {
        let replica = sessions.replica.open().await?;
        let several: Vec<&TableLayout> = several.into_iter().map(|table| &layouts[table]).collect();
        empty_first(&replica, ledger, &several).await?;
        referred_to = all_referred_to(&replica).await?;
    }
    let shared = CopySides {
        referred_to,
        layouts,
        ledger,
        work,
    };
    // All pairs run on this task: they only wait for sockets, whose protocol work is done by the
    // connections' own tasks. The first error drops the others, and with them their transactions.
    let pairs = (0..pairs).map(|_| Box::pin(work_through(sessions, &shared)));
    future::try_join_all(pairs).await?;
    Ok(())
}

/// Empties tables that are filled by several transactions, and makes that visible in the ledger.
async fn empty_first(
    replica: &Client,
    ledger: CopyLedger<'_>,
    layouts: &[&TableLayout],
) -> Result<(), CopyError> {
    for layout in layouts {
        begin(replica).await?;
        ledger.claim(replica, &layout.name).await?;
        empty(replica, &layout.name).await?;
        commit(replica).await?;
    }
    Ok(())
}

/// One connection pair: takes parts until there are none.
async fn work_through(sessions: &Sessions<'_>, shared: &CopySides<'_>) -> Result<(), CopyError> {
    let source = sessions.source.at_snapshot().await?;
    let mut replica = sessions.replica.open().await?;
    while let Some(TakenWork { part, is_whole, .. }) = shared.work.take() {
        let layout = &shared.layouts[part.table];
        let mut in_vain = false;
        let (rows, bytes) = loop {
            let copied = if is_whole {
                copy_whole(&source, &replica, shared, layout, &part).await
            } else {
                copy_part(&source, &replica, shared, layout, &part).await
            };
            let error = match copied {
                Ok(copied) => break copied,
                Err(error) => error,
            };
            let (table, observer) = (&layout.name, shared.work.observer());
            match refused::set_aside(&mut replica, shared.ledger, table, &error, observer).await? {
                // Another connection may have set it aside while this one wrote: once more.
                Some(0) if !in_vain => in_vain = true,
                None | Some(0) => return Err(error),
                Some(_) => in_vain = false,
            }
        };
        if let Some(whole) = shared.work.finish(&part, rows, bytes) {
            if !is_whole {
                let ledger = shared.ledger;
                ledger
                    .copied(&replica, &layout.name, whole.rows, whole.bytes)
                    .await?;
            }
            shared.work.announce(part.table, whole.rows);
        }
    }
    Ok(())
}

async fn copy_whole(
    source: &Client,
    replica: &Client,
    shared: &CopySides<'_>,
    layout: &TableLayout,
    part: &TablePart,
) -> Result<(u64, u64), CopyError> {
    let (ledger, table) = (shared.ledger, &layout.name);
    let may_freeze = layout.top.is_none() && !shared.referred_to.contains(table);
    // What is placed by the table above was emptied with it.
    let emptied = async {
        match layout.top {
            None => empty_with(replica, table, !may_freeze).await,
            Some(_) => Ok(()),
        }
    };
    // Sent together: the replica may be far away. What of it is not ours to do ends with the transaction, which nobody commits.
    // The claim is outside of it, so that others see which tables are on their way.
    let (claimed, begun, held, emptied) = future::join4(
        ledger.claim(replica, table),
        begin(replica),
        ledger.hold(replica, table),
        emptied,
    )
    .await;
    claimed?;
    begun?;
    held?;
    emptied?;
    let observer = shared.work.observer();
    let (rows, bytes) = pass_through(source, replica, observer, layout, part, may_freeze).await?;
    failpoint::hit("copy:rows-written");
    // The row is held since the transaction began: it cannot have become another's.
    let copied = ledger.copied(replica, table, rows, bytes);
    let (copied, committed) = future::join(copied, commit(replica)).await;
    copied?;
    committed?;
    Ok((rows, bytes))
}

async fn copy_part(
    source: &Client,
    replica: &Client,
    shared: &CopySides<'_>,
    layout: &TableLayout,
    part: &TablePart,
) -> Result<(u64, u64), CopyError> {
    let hold = shared.ledger.hold(replica, &layout.name);
    let (begun, held) = future::join(begin(replica), hold).await;
    begun?;
    held?;
    let counted =
        pass_through(source, replica, shared.work.observer(), layout, part, false).await?;
    commit(replica).await?;
    Ok(counted)
}

/// Empties the tables that rows of these partitions are written through. Where one of their partitions holds its rows already, a
/// copy was killed: what is missing goes in beside them, since a partition is copied by one transaction.
pub(super) async fn empty_tops(
    replica: &Client,
    layouts: &[TableLayout],
    held: &HashSet<TableName>,
) -> Result<(), CopyError> {
    let asking = || CopyError::replica("look for partitions that hold their rows");
    let tops = routing::tops(replica, held).await.map_err(asking())?;
    let filled: HashSet<&TableName> = tops.values().collect();
    let wanted = layouts.iter().filter_map(|layout| layout.top.as_ref());
    let wanted: BTreeSet<&TableName> = wanted.filter(|top| !filled.contains(top)).collect();
    for top in wanted {
        let empty = routing::empty(replica, top).await;
        empty.map_err(CopyError::replica(format!("empty table {top}")))?;
    }
    Ok(())
}

pub(crate) async fn begin(replica: &Client) -> Result<(), CopyError> {
    replica
        .batch_execute("BEGIN")
        .await
        .map_err(CopyError::replica("begin"))
}

pub(crate) async fn commit(replica: &Client) -> Result<(), CopyError> {
    replica
        .batch_execute("COMMIT")
        .await
        .map_err(CopyError::replica("commit rows"))
}

/// Empties the replica's table; returns whether it was truncated, which lets COPY write frozen rows.
///
/// A table that a foreign key refers to cannot be truncated without those that refer to it, whatever
/// session_replication_role says; it is there only if the schema was put there by hand.
pub(crate) async fn empty(replica: &Client, table: &TableName) -> Result<bool, CopyError> {
    const REFERRED_TO: &str = "
        SELECT EXISTS (SELECT 1 FROM pg_constraint
                        WHERE contype = 'f' AND confrelid = $1::text::regclass
                          AND conrelid <> confrelid)";
    let row = replica
        .query_one(REFERRED_TO, &[&table.sql()])
        .await
        .map_err(CopyError::replica("look for foreign keys"))?;
    let referred_to: bool = row.get(0);
    empty_with(replica, table, referred_to).await?;
    Ok(!referred_to)
}

async fn empty_with(
    replica: &Client,
    table: &TableName,
    referred_to: bool,
) -> Result<(), CopyError> {
    let sql = table.sql();
    let statement = if referred_to {
        format!("DELETE FROM ONLY {sql}")
    } else {
        format!("TRUNCATE ONLY {sql}")
    };
    replica
        .batch_execute(&statement)
        .await
        .map_err(CopyError::replica(format!("empty table {table}")))
}

/// The tables that a foreign key of another one refers to: [`empty`] for all of them at once.
async fn all_referred_to(replica: &Client) -> Result<HashSet<TableName>, CopyError> {
    const REFERRED_TO: &str = "
        SELECT DISTINCT n.nspname::text, c.relname::text
          FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.confrelid
          JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE k.contype = 'f' AND k.conrelid <> k.confrelid";
    let rows = replica
        .query_typed(REFERRED_TO, &[])
        .await
        .map_err(CopyError::replica("look for foreign keys"))?;
    let name = |row: &tokio_postgres::Row| TableName::of(row);
    Ok(rows.iter().map(name).collect())
}

/// COPY of a part out of the source.
pub(crate) fn copy_out(layout: &TableLayout, part: &TablePart) -> String {
    format!(
        "COPY (SELECT {} FROM ONLY {}{}) TO STDOUT (FORMAT {})",
        layout.column_list(),
        layout.name.sql(),
        part.pages.condition(),
        format_of(layout.binary)
    )
}

/// COPY of these columns into a table.
pub(crate) fn copy_in(table: &TableName, column_list: &str, binary: bool, freeze: bool) -> String {
    // COPY knows no empty column list; without one it takes the columns that are not generated.
    let columns = if column_list.is_empty() {
        String::new()
    } else {
        format!(" ({column_list})")
    };
    let freeze = if freeze { ", FREEZE" } else { "" };
    format!(
        "COPY {}{columns} FROM STDIN (FORMAT {}{freeze})",
        table.sql(),
        format_of(binary)
    )
}

fn format_of(binary: bool) -> &'static str {
    if binary { "binary" } else { "text" }
}

async fn pass_through(
    source: &Client,
    replica: &Client,
    observer: &dyn CopyObserver,
    layout: &TableLayout,
    part: &TablePart,
    freeze: bool,
) -> Result<(u64, u64), CopyError> {
    let out = copy_out(layout, part);
    let into = copy_in(layout.taker(), &layout.column_list(), layout.binary, freeze);
    let reading = || CopyError::source(format!("read table {}", layout.name));
    let writing = || CopyError::replica(format!("write table {}", layout.name));
    let stream = source.copy_out(&out).await.map_err(reading())?;
    let sink = replica
        .copy_in::<_, Bytes>(&into)
        .await
        .map_err(writing())?;
    let (mut stream, mut sink) = (pin!(stream), pin!(sink));

    let mut rows = RowCounter::new(layout.binary);
    let mut bytes = 0;
    let mut rows_told = 0;
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    while let Some(message) = stream.next().await {
        let mut message = message.map_err(reading())?;
        rows.see(&message);
        // A large row is not copied: it goes on in pieces of the message, behind what has gathered.
        let large = message.len() >= CHUNK_BYTES;
        if !large {
            chunk.extend_from_slice(&message);
        }
        if large || chunk.len() >= CHUNK_BYTES {
            let sent = (chunk.len() + if large { message.len() } else { 0 }) as u64;
            sink.send(chunk.split().freeze()).await.map_err(writing())?;
            while large && !message.is_empty() {
                let piece = message.split_to(message.len().min(CHUNK_BYTES));
                sink.send(piece).await.map_err(writing())?;
            }
            observer.copied(rows.rows - rows_told, sent);
            (rows_told, bytes) = (rows.rows, bytes + sent);
        }
    }
    let sent = chunk.len() as u64;
    if sent > 0 {
        sink.send(chunk.freeze()).await.map_err(writing())?;
    }
    // finish() reports what the replica had to say about any of the rows.
    let stored = sink.finish().await.map_err(writing())?;
    if stored != rows.rows || !rows.ended() {
        return Err(CopyError::RowCount {
            table: layout.name.clone(),
            sent: rows.rows,
            stored,
        });
    }
    observer.copied(rows.rows - rows_told, sent);
    Ok((rows.rows, bytes + sent))
}

/// Counts the rows the source sends. The driver does not pass the COPY tag on, but the backend sends
/// each row as a message of its own (PostgreSQL documentation, "Frontend/Backend Protocol", COPY
/// Operations). In binary the header precedes the first row in its message, and a trailer ends the stream.
pub(crate) struct RowCounter {
    binary: bool,
    header_seen: bool,
    trailer_seen: bool,
    /// Rows so far.
    pub(crate) rows: u64,
}

/// PostgreSQL documentation, COPY, "Binary Format": signature, flags, length of the extension.
const HEADER_BYTES: usize = 19;
const TRAILER: [u8; 2] = [0xff, 0xff];

impl RowCounter {
    /// For a stream in binary or text format.
    pub(crate) fn new(binary: bool) -> Self {
        Self {
            binary,
            header_seen: false,
            trailer_seen: false,
            rows: 0,
        }
    }

    /// Looks at one message.
    pub(crate) fn see(&mut self, message: &[u8]) {
        let mut rest = message;
        if self.binary {
            if !self.header_seen {
                self.header_seen = true;
                rest = rest.get(HEADER_BYTES..).unwrap_or_default();
            }
            if rest == TRAILER {
                self.trailer_seen = true;
                return;
            }
            if rest.is_empty() {
                return;
            }
        }
        self.rows += 1;
    }

    /// Whether the stream had its end. Text has no trailer; there the protocol's CopyDone is all.
    fn ended(&self) -> bool {
        !self.binary || self.trailer_seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::plan::Pages;

    const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

    #[test]
    fn header_and_trailer_are_not_rows() {
        let mut counter = RowCounter::new(true);
        counter.see(&[HEADER, &[0, 1, 0, 0, 0, 1, 7]].concat());
        counter.see(&[0, 1, 0xff, 0xff, 0xff, 0xff]);
        assert!(!counter.ended());
        counter.see(&TRAILER);
        assert_eq!((counter.rows, counter.ended()), (2, true));

        let mut empty = RowCounter::new(true);
        empty.see(&[HEADER, &TRAILER].concat());
        assert_eq!((empty.rows, empty.ended()), (0, true));
    }

    #[test]
    fn rows_without_columns_are_rows() {
        let mut counter = RowCounter::new(true);
        counter.see(&[HEADER, &[0, 0]].concat());
        counter.see(&[0, 0]);
        counter.see(&TRAILER);
        assert_eq!(counter.rows, 2);
        let mut counter = RowCounter::new(false);
        counter.see(b"\n");
        assert_eq!((counter.rows, counter.ended()), (1, true));
    }

    #[test]
    fn statements_name_the_columns_and_a_table_without_any_gets_no_list() {
        let mut layout = TableLayout {
            name: TableName {
                schema: "s".into(),
                name: "t".into(),
            },
            pages: 9,
            bytes: 9,
            is_heap: true,
            top: None,
            columns: vec![
                ("a".into(), "integer".into()),
                ("B c".into(), "text".into()),
            ],
            binary: true,
        };
        let part = TablePart {
            table: 0,
            pages: Pages {
                from: Some(3),
                to: None,
            },
            bytes: 1,
        };
        assert_eq!(
            copy_out(&layout, &part),
            "COPY (SELECT \"a\", \"B c\" FROM ONLY \"s\".\"t\" WHERE ctid >= '(3,0)'::tid) \
             TO STDOUT (FORMAT binary)"
        );
        assert_eq!(
            copy_in(&layout.name, &layout.column_list(), true, false),
            "COPY \"s\".\"t\" (\"a\", \"B c\") FROM STDIN (FORMAT binary)"
        );
        layout.columns.clear();
        layout.binary = false;
        assert_eq!(
            copy_in(&layout.name, &layout.column_list(), false, true),
            "COPY \"s\".\"t\" FROM STDIN (FORMAT text, FREEZE)"
        );
    }
}
