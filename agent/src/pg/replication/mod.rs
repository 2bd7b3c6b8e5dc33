//! The walsender connection: the half of PostgreSQL's protocol that `tokio-postgres` does not speak.
//!
//! ```text
//! connect ──▶ ReplicationConnection ──START_REPLICATION──▶ ReplicationReader  (WAL data, keepalives)
//!              commands, one at a time                  └▶ StatusSender       (what is durable)
//! ```
//! `startup` authenticates, `command` builds the walsender's own commands, `frames` cuts the byte
//! stream into messages, `copy_both` is the stream after `START_REPLICATION`. PostgreSQL
//! documentation, "Streaming Replication Protocol" and "Logical Streaming Replication Parameters".
//!
//! # Invariants
//! - Every length from the network is checked before memory is reserved for it.
//! - An error message of the server, also in the middle of the stream, becomes [`PgError::Server`].
//!
//! # What it does not do
//! It neither reads pgoutput nor decides what may be acknowledged.

mod command;
mod copy_both;
mod frames;
mod half;
mod startup;

use tokio::io::AsyncWriteExt as _;

use self::frames::{Frame, WalFrames};
use super::conninfo::{ConnInfo, Host};
use super::dial::{Start, dial};
use super::stream::PgStream;
use super::{PgError, PgLsn, Session};

pub use self::copy_both::{ReplicationMessage, ReplicationReader, StatusSender};

/// An idle walsender session: one command at a time.
pub struct ReplicationConnection {
    stream: PgStream,
    frames: WalFrames,
    server_version: i32,
    /// The settings that were sent behind the start-up packet are not answered yet; nobody waited for that.
    unanswered: bool,
}

/// Who the server is; the answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Fixed when the cluster was created and kept by physical standbys and restored backups.
    pub system_identifier: u64,
    /// Raised by every promotion of a physical standby and every point-in-time recovery.
    pub timeline: i32,
    /// The end of the WAL written so far.
    pub xlogpos: PgLsn,
}

/// How a slot is created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotOptions {
    /// Dropped with the session.
    pub temporary: bool,
    /// Kept in step on physical standbys. Servers before 17 have no such thing and are not asked.
    pub failover: bool,
    /// Exports the snapshot at the slot's consistent point. It lives until this session's next
    /// command, or its end.
    pub export_snapshot: bool,
}

/// A new slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// Its name.
    pub name: String,
    /// Transactions that commit from here on are streamed; what committed before is in the snapshot.
    pub consistent_point: PgLsn,
    /// For `SET TRANSACTION SNAPSHOT`, where one was exported.
    pub snapshot_name: Option<String>,
}

impl ReplicationConnection {
    /// Opens a walsender session in the database of `conninfo`. The role needs LOGIN and REPLICATION.
    ///
    /// # Errors
    /// As [`super::connect`].
    pub async fn connect(conninfo: &ConnInfo, session: &Session) -> Result<Self, PgError> {
        dial(conninfo, &WalsenderSession { conninfo, session }).await
    }

    /// The server's version as `server_version_num` has it, `150018` for 15.18.
    pub fn server_version(&self) -> i32 {
        self.server_version
    }

    /// Asks who the server is and where its WAL ends.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, PgError> {
        let row = self.one_row("IDENTIFY_SYSTEM").await?;
        command::system_identity(&row)
    }

    /// The history file of a timeline: where it left those before it. The first timeline has none.
    ///
    /// # Errors
    /// `58P01` when the file is not there.
    pub async fn timeline_history(&mut self, timeline: i32) -> Result<String, PgError> {
        let row = self
            .one_row(&format!("TIMELINE_HISTORY {timeline}"))
            .await?;
        Ok(row.into_iter().nth(1).flatten().unwrap_or_default())
    }

    /// Creates a logical slot for `pgoutput`.
    ///
    /// Waits until every transaction then running has ended, which may take as long as they do.
    ///
    /// # Errors
    /// `42710` when the slot exists, `53400` when no slot is free, `55000` when `wal_level` is below
    /// logical.
    pub async fn create_slot(
        &mut self,
        name: &str,
        options: SlotOptions,
    ) -> Result<CreatedSlot, PgError> {
        let sql = command::create_slot(name, options, self.server_version);
        let row = self.one_row(&sql).await?;
        command::created_slot(&row)
    }

    /// Copies a logical slot; the copy has the session's life. Returns its name.
    ///
    /// # Errors
    /// `42704` when there is none of that name, `53400` when no slot is free.
    pub async fn copy_slot(&mut self, name: &str) -> Result<String, PgError> {
        let row = self.one_row(&command::copy_slot(name)).await?;
        command::copied_slot(&row)
    }

    /// Drops a slot.
    ///
    /// # Errors
    /// `42704` when there is none of that name, `55006` while a session uses it.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), PgError> {
        let sql = command::drop_slot(name);
        self.simple_query(&sql).await.map(|_| ())
    }

    /// Runs a command of the walsender or any SQL, and returns all rows of all its results as text.
    ///
    /// Not cancel-safe: a session whose query was abandoned must be dropped.
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, PgError> {
        self.send_query(sql).await?;
        if std::mem::take(&mut self.unanswered) {
            self.answer().await?;
        }
        self.answer().await
    }

    /// The answer to one query.
    async fn answer(&mut self) -> Result<Vec<Vec<Option<String>>>, PgError> {
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let frame = match self.next_frame().await {
                Ok(frame) => frame,
                // After a FATAL error the connection ends; the error is the reason.
                Err(lost) => return Err(refused.map_or(lost, PgError::Server)),
            };
            match frame {
                Frame::Row(row) => rows.push(row),
                Frame::Error(error) => refused = Some(error),
                Frame::Ready => break,
                Frame::Done => {}
                other => return Err(other.unexpected("the answer to a query")),
            }
        }
        match refused {
            Some(error) => Err(PgError::Server(error)),
            None => Ok(rows),
        }
    }

    /// Starts logical streaming from `start`, or from the slot's confirmed position where that is later.
    ///
    /// `options` go to the output plugin, such as `("proto_version", "2")`.
    ///
    /// # Errors
    /// `42704` when the slot is gone, `55006` while another session uses it, `55000` when it was
    /// invalidated, `42601` or `22023` for an option this server does not know.
    pub async fn start_replication(
        mut self,
        slot: &str,
        start: PgLsn,
        options: &[(&str, &str)],
    ) -> Result<(ReplicationReader, StatusSender), PgError> {
        let sql = command::start_replication(slot, start, options);
        self.send_query(&sql).await?;
        if std::mem::take(&mut self.unanswered) {
            self.answer().await?;
        }
        match self.next_frame().await? {
            Frame::CopyBoth => {}
            Frame::Error(error) => return Err(PgError::Server(error)),
            other => return Err(other.unexpected("the answer to START_REPLICATION")),
        }
        let local = self.stream.is_unix();
        let (read, write) = half::split(self.stream);
        Ok((
            ReplicationReader::new(read, self.frames, local),
            StatusSender::new(write),
        ))
    }

    /// Says goodbye, so that the server logs no broken connection. Best effort.
    pub async fn close(mut self) {
        let mut out = bytes::BytesMut::new();
        postgres_protocol::message::frontend::terminate(&mut out);
        if self.stream.write_all(&out).await.is_ok() {
            // Without an answer to wait for, whether this arrives changes nothing for us.
            let _ = self.stream.shutdown().await;
        }
    }

    async fn one_row(&mut self, sql: &str) -> Result<Vec<Option<String>>, PgError> {
        let mut rows = self.simple_query(sql).await?;
        match rows.pop() {
            Some(row) if rows.is_empty() => Ok(row),
            _ => Err(PgError::Protocol(format!("{sql}: not one row"))),
        }
    }

    async fn send_query(&mut self, sql: &str) -> Result<(), PgError> {
        let mut out = bytes::BytesMut::new();
        postgres_protocol::message::frontend::query(sql, &mut out)
            .map_err(|error| PgError::Protocol(format!("query: {error}")))?;
        self.stream.write_all(&out).await.map_err(PgError::Io)?;
        self.stream.flush().await.map_err(PgError::Io)
    }

    async fn next_frame(&mut self) -> Result<Frame, PgError> {
        self.frames
            .next(&mut self.stream)
            .await?
            .ok_or(PgError::Closed)
    }
}

struct WalsenderSession<'a> {
    conninfo: &'a ConnInfo,
    session: &'a Session,
}

impl Start for WalsenderSession<'_> {
    type Session = ReplicationConnection;

    const REPLICATION: bool = true;

    async fn start(
        &self,
        stream: PgStream,
        host: &Host,
        password: Option<&str>,
    ) -> Result<ReplicationConnection, PgError> {
        let startup = startup::Startup {
            conninfo: self.conninfo,
            session: self.session,
            host,
            password,
        };
        startup.run(stream).await
    }

    async fn ask(&self, session: &mut ReplicationConnection, sql: &str) -> Result<bool, PgError> {
        let row = session.one_row(sql).await?;
        Ok(matches!(row.as_slice(), [Some(answer)] if answer == "t"))
    }
}
