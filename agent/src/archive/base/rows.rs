//! Rows between a server and an object: COPY in text format, one part of a table at a time.
//!
//! Text and not binary: it means the same to every version and every architecture, and to `psql`.
//!
//! # Invariants
//! - The rows that are counted are those of the stream; both ends of a load must count the same.
//! - A part whose object is not what the manifest says is never committed.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio_postgres::Client;

use super::error::BackupError;
use super::manifest::{DataFile, Object};
use super::object::{self, Feed, Sum};
use crate::cloud::store::{Put, Store};
use crate::copy::CopyError;
use crate::copy::layout::TableLayout;
use crate::copy::plan::TablePart;
use crate::copy::table::{self, CHUNK_BYTES, RowCounter};
use crate::copy::work::CopyWork;
use crate::names::TableName;
use crate::pg::quote::quote_ident;

/// What one part held.
pub(super) struct Counted {
    pub(super) rows: u64,
    pub(super) raw_bytes: u64,
}

/// Writes one part to an object. Given up in the middle, the session may be asked again at once: what is left of the answer is
/// read past.
pub(super) async fn write(
    source: &Client,
    store: &Store,
    object: String,
    layout: &TableLayout,
    part: &TablePart,
    work: &CopyWork<'_>,
) -> Result<(Put, Sum, Counted), BackupError> {
    let (feed, packing) = object::pack(store, object);
    let reading = read_part(source, layout, part, feed, work);
    let ((rows, raw_bytes), (put, sum)) = tokio::try_join!(reading, packing)?;
    Ok((put, sum, Counted { rows, raw_bytes }))
}

async fn read_part(
    source: &Client,
    layout: &TableLayout,
    part: &TablePart,
    feed: Feed,
    work: &CopyWork<'_>,
) -> Result<(u64, u64), BackupError> {
    let reading = || CopyError::source(format!("read table {}", layout.name));
    let stream = source.copy_out(&table::copy_out(layout, part)).await;
    let mut stream = pin!(stream.map_err(reading())?);
    let mut rows = RowCounter::new(false);
    let (mut rows_told, mut bytes) = (0, 0);
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    loop {
        let message = stream.next().await.transpose().map_err(reading())?;
        let is_end = message.is_none();
        if let Some(message) = message {
            rows.see(&message);
            chunk.extend_from_slice(&message);
        }
        if chunk.len() >= CHUNK_BYTES || (is_end && !chunk.is_empty()) {
            let sent = chunk.len() as u64;
            feed.send(chunk.split().freeze()).await;
            work.observer().copied(rows.rows - rows_told, sent);
            (rows_told, bytes) = (rows.rows, bytes + sent);
        }
        if is_end {
            return Ok((rows.rows, bytes));
        }
    }
}

/// An object with rows, and where it comes from.
pub(super) struct RowSource<'a> {
    pub(super) store: &'a Store,
    pub(super) base: &'a str,
    pub(super) object: &'a Object,
    pub(super) data: &'a DataFile,
    /// Through which its rows are written, where not into itself: all of that is empty.
    pub(super) top: Option<&'a TableName>,
}

impl RowSource<'_> {
    /// Loads the object in one transaction. A table that has no other part is emptied first, in that transaction: then
    /// its rows are written frozen and, with `wal_level = minimal`, without WAL.
    pub(super) async fn load(
        &self,
        target: &Client,
        is_whole: bool,
        work: &CopyWork<'_>,
    ) -> Result<(), BackupError> {
        table::begin(target).await?;
        let freeze =
            is_whole && self.top.is_none() && table::empty(target, &self.data.table).await?;
        self.copy(target, freeze, work).await?;
        Ok(table::commit(target).await?)
    }

    async fn copy(
        &self,
        target: &Client,
        freeze: bool,
        work: &CopyWork<'_>,
    ) -> Result<(), BackupError> {
        let Self { object, data, .. } = self;
        let writing = || BackupError::target(format!("write table {}", data.table));
        let columns: Vec<String> = data.columns.iter().map(|name| quote_ident(name)).collect();
        let taker = self.top.unwrap_or(&data.table);
        let statement = table::copy_in(taker, &columns.join(", "), false, freeze);
        let sink = target.copy_in::<_, Bytes>(&statement).await;
        let mut sink = pin!(sink.map_err(writing())?);
        let (mut pieces, unpacking) =
            object::unpack(self.store, self.base, &object.name, object.sum.clone());
        let taking = async {
            while let Some(piece) = pieces.recv().await {
                let length = piece.len() as u64;
                sink.send(piece).await.map_err(writing())?;
                work.observer().copied(0, length);
            }
            Ok(())
        };
        // Both must have succeeded before the rows are kept; dropped here, COPY fails on the server.
        tokio::try_join!(taking, unpacking)?;
        let stored = sink.finish().await.map_err(writing())?;
        if stored != data.rows {
            return Err(BackupError::RowCount {
                table: data.table.clone(),
                object: object.name.clone(),
                expected: data.rows,
                stored,
            });
        }
        work.observer().copied(stored, 0);
        Ok(())
    }
}
