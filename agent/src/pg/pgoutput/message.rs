//! ● The messages of pgoutput as types.
//!
//! # Invariants
//! Field by field what the source sent, under our names: `commit_lsn` is the start of the commit
//! record, `end_lsn` the first byte after it. Times are microseconds since 2000-01-01 UTC by the
//! source's clock.

use std::fmt;

use bytes::Bytes;

use super::tuple::Tuple;
use crate::pg::PgLsn;

/// One pgoutput message.
///
/// `xid` is there in streamed blocks only and names the transaction *or subtransaction* that made the change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins; it has already committed on the source.
    Begin(Begin),
    /// The transaction is complete.
    Commit(Commit),
    /// Describes a relation; sent before its first change and again whenever it changed.
    ///
    /// The xid it carries in a streamed block is dropped: a description belongs to no subtransaction.
    Relation(Relation),
    /// Names a type that is not built in; sent before the relation that uses it.
    Type {
        /// As above.
        xid: Option<u32>,
        /// The type's OID on the source.
        oid: u32,
        /// Empty means `pg_catalog`.
        schema: String,
        /// The type's name.
        name: String,
    },
    /// The transaction was itself replicated to the source, from elsewhere.
    Origin {
        /// Its commit LSN there.
        commit_lsn: PgLsn,
        /// The replication origin's name.
        name: String,
    },
    /// A row was inserted.
    Insert {
        /// As above.
        xid: Option<u32>,
        /// The relation's OID.
        relation: u32,
        /// The row.
        new: Tuple,
    },
    /// A row was updated.
    Update {
        /// As above.
        xid: Option<u32>,
        /// The relation's OID.
        relation: u32,
        /// There with replica identity FULL, or if the key changed (or is TOASTed).
        old: Option<OldTuple>,
        /// The row as it is now; unchanged TOASTed values may be missing.
        new: Tuple,
    },
    /// A row was deleted.
    Delete {
        /// As above.
        xid: Option<u32>,
        /// The relation's OID.
        relation: u32,
        /// Which row.
        old: OldTuple,
    },
    /// Relations were truncated together.
    Truncate {
        /// As above.
        xid: Option<u32>,
        /// OIDs of all of them; what CASCADE reached is listed too, if it is published.
        relations: Vec<u32>,
        /// CASCADE was given.
        cascade: bool,
        /// RESTART IDENTITY was given.
        restart_identity: bool,
    },
    /// `pg_logical_emit_message`.
    Message(LogicalMessage),
    /// A block of a transaction still in progress begins; until the stop, changes carry their xid.
    StreamStart {
        /// The top-level transaction.
        xid: u32,
        /// This is its first block.
        first: bool,
    },
    /// The block ends; others may follow.
    StreamStop,
    /// A streamed transaction committed.
    StreamCommit(StreamCommit),
    /// A streamed transaction or one of its subtransactions was rolled back.
    StreamAbort(StreamAbort),
    /// A prepared transaction begins.
    BeginPrepare(Prepare),
    /// The prepared transaction is complete, though not committed.
    Prepare(Prepare),
    /// COMMIT PREPARED.
    CommitPrepared(CommitPrepared),
    /// ROLLBACK PREPARED.
    RollbackPrepared(RollbackPrepared),
    /// A streamed transaction was prepared.
    StreamPrepare(Prepare),
}

impl Message {
    /// Which message it is.
    pub fn kind(&self) -> MessageKind {
        match self {
            Self::Begin(_) => MessageKind::Begin,
            Self::Commit(_) => MessageKind::Commit,
            Self::Relation(_) => MessageKind::Relation,
            Self::Type { .. } => MessageKind::Type,
            Self::Origin { .. } => MessageKind::Origin,
            Self::Insert { .. } => MessageKind::Insert,
            Self::Update { .. } => MessageKind::Update,
            Self::Delete { .. } => MessageKind::Delete,
            Self::Truncate { .. } => MessageKind::Truncate,
            Self::Message(_) => MessageKind::Message,
            Self::StreamStart { .. } => MessageKind::StreamStart,
            Self::StreamStop => MessageKind::StreamStop,
            Self::StreamCommit(_) => MessageKind::StreamCommit,
            Self::StreamAbort(_) => MessageKind::StreamAbort,
            Self::BeginPrepare(_) => MessageKind::BeginPrepare,
            Self::Prepare(_) => MessageKind::Prepare,
            Self::CommitPrepared(_) => MessageKind::CommitPrepared,
            Self::RollbackPrepared(_) => MessageKind::RollbackPrepared,
            Self::StreamPrepare(_) => MessageKind::StreamPrepare,
        }
    }
}

/// The first byte of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(
    missing_docs,
    reason = "each is described at the variant of Message of the same name"
)]
pub enum MessageKind {
    Begin = b'B',
    Commit = b'C',
    Relation = b'R',
    Type = b'Y',
    Origin = b'O',
    Insert = b'I',
    Update = b'U',
    Delete = b'D',
    Truncate = b'T',
    Message = b'M',
    StreamStart = b'S',
    StreamStop = b'E',
    StreamCommit = b'c',
    StreamAbort = b'A',
    BeginPrepare = b'b',
    Prepare = b'P',
    CommitPrepared = b'K',
    RollbackPrepared = b'r',
    StreamPrepare = b'p',
}

impl MessageKind {
    /// The kind a first byte stands for, or `None` if protocol version 4 has none such.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            b'B' => Self::Begin,
            b'C' => Self::Commit,
            b'R' => Self::Relation,
            b'Y' => Self::Type,
            b'O' => Self::Origin,
            b'I' => Self::Insert,
            b'U' => Self::Update,
            b'D' => Self::Delete,
            b'T' => Self::Truncate,
            b'M' => Self::Message,
            b'S' => Self::StreamStart,
            b'E' => Self::StreamStop,
            b'c' => Self::StreamCommit,
            b'A' => Self::StreamAbort,
            b'b' => Self::BeginPrepare,
            b'P' => Self::Prepare,
            b'K' => Self::CommitPrepared,
            b'r' => Self::RollbackPrepared,
            b'p' => Self::StreamPrepare,
            _ => return None,
        })
    }
}

/// A transaction begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The `commit_lsn` its commit message will repeat.
    pub final_lsn: PgLsn,
    /// When it committed.
    pub commit_time: i64,
    /// Its transaction id.
    pub xid: u32,
}

/// A transaction is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Start of the commit record.
    pub commit_lsn: PgLsn,
    /// First byte after the commit record.
    pub end_lsn: PgLsn,
    /// When it committed.
    pub commit_time: i64,
}

/// What an update or a delete says about the row as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OldTuple {
    /// All columns, but those outside the replica identity are null whatever they held.
    Key(Tuple),
    /// The whole row: replica identity FULL.
    Full(Tuple),
}

impl OldTuple {
    /// The values, whichever it is.
    pub fn tuple(&self) -> &Tuple {
        match self {
            Self::Key(tuple) | Self::Full(tuple) => tuple,
        }
    }
}

/// A relation as the source published it; the columns are those that travel, in the order of their values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The OID on the source.
    pub id: u32,
    /// Empty means `pg_catalog`.
    pub schema: String,
    /// The relation's name.
    pub name: String,
    /// What old rows are identified by.
    pub identity: ReplicaIdentity,
    /// The published columns.
    pub columns: Vec<Column>,
}

/// What a relation's old rows are identified by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key, if there is one.
    Default,
    /// Nothing: the source itself refuses updates and deletes.
    Nothing,
    /// All columns.
    Full,
    /// A chosen unique index.
    Index,
}

/// One published column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Part of the replica identity. With [`ReplicaIdentity::Full`] that is every column, so this
    /// says nothing about a primary key there.
    pub is_key: bool,
    /// The column's name.
    pub name: String,
    /// The type's OID on the source; above 16383 it may mean another type on the replica.
    pub type_oid: u32,
    /// `atttypmod`; -1 is none.
    pub type_modifier: i32,
}

/// What `pg_logical_emit_message` wrote. Any user may call it: content and prefix are not to be trusted.
#[derive(Clone, PartialEq, Eq)]
pub struct LogicalMessage {
    /// As in [`Message`].
    pub xid: Option<u32>,
    /// Part of a transaction; otherwise it arrives at once, outside any transaction.
    pub transactional: bool,
    /// Where it stands in the WAL.
    pub lsn: PgLsn,
    /// Who it is for.
    pub prefix: String,
    /// Anything.
    pub content: Bytes,
}

/// Shows the size of the content only.
impl fmt::Debug for LogicalMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogicalMessage")
            .field("xid", &self.xid)
            .field("transactional", &self.transactional)
            .field("lsn", &self.lsn)
            .field("prefix", &self.prefix)
            .field("content_bytes", &self.content.len())
            .finish()
    }
}

/// A streamed transaction committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamCommit {
    /// The top-level transaction.
    pub xid: u32,
    /// Start of the commit record.
    pub commit_lsn: PgLsn,
    /// First byte after the commit record.
    pub end_lsn: PgLsn,
    /// When it committed.
    pub commit_time: i64,
}

/// A streamed transaction or one of its subtransactions was rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamAbort {
    /// The top-level transaction.
    pub xid: u32,
    /// The subtransaction; equal to `xid` if the whole transaction was rolled back.
    pub subxid: u32,
    /// LSN and time of the abort; only with `streaming 'parallel'` (protocol version 4).
    pub abort: Option<(PgLsn, i64)>,
}

/// A prepared transaction: its begin, its end, or the end of a streamed one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepare {
    /// Start of the prepare record.
    pub prepare_lsn: PgLsn,
    /// First byte after the prepare record.
    pub end_lsn: PgLsn,
    /// When it was prepared.
    pub prepare_time: i64,
    /// Its transaction id.
    pub xid: u32,
    /// The name given by the user.
    pub gid: String,
}

/// COMMIT PREPARED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitPrepared {
    /// Start of the commit-prepared record.
    pub commit_lsn: PgLsn,
    /// First byte after it.
    pub end_lsn: PgLsn,
    /// When it committed.
    pub commit_time: i64,
    /// Its transaction id.
    pub xid: u32,
    /// The name given by the user.
    pub gid: String,
}

/// ROLLBACK PREPARED.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RollbackPrepared {
    /// First byte after the prepare record.
    pub prepare_end_lsn: PgLsn,
    /// First byte after the rollback record.
    pub rollback_end_lsn: PgLsn,
    /// When it was prepared.
    pub prepare_time: i64,
    /// When it was rolled back.
    pub rollback_time: i64,
    /// Its transaction id.
    pub xid: u32,
    /// The name given by the user.
    pub gid: String,
}
