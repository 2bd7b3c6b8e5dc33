//! The source task: from the slot to transactions to a bounded queue.
//!
//! ```text
//! walsender ───messages──┐
//!   or, far behind,      ├─▶ Intake ─transaction─▶ [limits.queue_bytes] ─▶ pipeline
//! windows of the backlog ┘     └─ too large ─▶ spill files
//!     ▲
//!     └── Feedback ◀── FlushLsn (watch)
//! ```
//!
//! Only one of the two reads at a time ([`Reader`] says which); where one ends, at the end of a transaction,
//! the other begins.
//!
//! # Invariants
//! - The source is told a [`FlushLsn`] and nothing else (`feedback`).
//! - What is read begins where the last transaction ended. PostgreSQL begins where the slot is confirmed if that is later, and
//!   says nothing: so whoever reads looks where the slot stands, once nobody else can move it.
//! - Received and not yet applied transactions hold at most `limits.queue_bytes`; beyond it nothing is
//!   read (`intake`). WAL then gathers on the source, where the metrics show it.
//!
//! # What it does not do
//! It does not reconnect: its error ends the session, and the pipeline starts the next one from the
//! progress row.

mod backlog;
mod catch_up;
mod feedback;
mod from_archive;
mod intake;
mod kinesis;
mod log;
mod overflow;
mod pace;
mod subtransactions;
mod types;
mod walsender;

use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use self::backlog::BacklogWatch;
use self::intake::Intake;
pub use self::intake::IntakeLimits;
pub use self::kinesis::{StreamSettings, Tip, Until, receive};
pub use self::log::LogIntake;
pub use self::types::MadeOf;
use crate::archive::log::ArchiveError;
use crate::cloud::kinesis::KinesisError;
use crate::error::remedy;
use crate::error::{Class, Classify};
use crate::failpoint;
use crate::flow::batch;
use crate::flow::changelog::{Gap, UnpackError};
use crate::flow::ledger::FlushLsn;
use crate::flow::spill::{SpillError, SpillSpace};
use crate::flow::transaction::AssembleError;
use crate::names::history::{History, WentBack};
use crate::names::stream::StreamName;
use crate::observe::reader::Reader;
use crate::pg::pgoutput::DecodeError;
use crate::pg::{ConnInfo, PgError, PgLsn};

/// Which slot is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// The stream's own, which is told how far everything is durable.
    Own,
    /// A copy of it that goes with the session: somebody else may be reading the stream's own.
    Copy,
    /// Such a copy, from wherever the stream's own stands: whoever reads it has nothing yet.
    Late,
}

/// What the source task needs to know.
#[derive(Clone, Debug)]
pub struct SourceSettings {
    /// How to reach the source, with the database.
    pub conninfo: ConnInfo,
    /// Slot and publication.
    pub stream: StreamName,
    /// Whether the slot itself is read.
    pub slot: SlotUse,
    /// Where to begin: the end of the last applied transaction.
    pub start: PgLsn,
    /// Whether values may come in binary form.
    pub binary: bool,
    /// What may be held at a time.
    pub limits: IntakeLimits,
    /// `limits.catch_up_bytes`
    pub catch_up_bytes: u64,
    /// What types are made of, as far as the source was asked.
    pub types: MadeOf,
}

/// Why the stream ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The connection failed, or the server refused.
    #[error("replicate from the source")]
    Pg(#[from] PgError),
    /// The messages make no sense.
    #[error("read the change stream")]
    Assemble(#[from] AssembleError),
    /// A large transaction could not be put on disk.
    #[error("keep a large transaction")]
    Spill(#[from] SpillError),
    /// A large transaction has created the type that its rows are of, and could not be judged while it ran.
    #[error("a transaction is read once more, with the types it has created")]
    NewType,
    /// The source does not know whether a subtransaction was rolled back.
    #[error("the source does not know what became of subtransaction {subxid}")]
    UnknownFate {
        /// Its transaction id on the source.
        subxid: i64,
    },
    /// The server that was asked has not seen the transaction's commit.
    #[error("the server that answers ordinary sessions has not come to {end_lsn} yet")]
    Behind {
        /// Where the transaction's commit ends.
        end_lsn: String,
    },
    /// Somebody has moved the slot: what lies in between would not come.
    #[error(
        "replication slot \"{slot}\" stands at {confirmed}, beyond {start} from where it is to be read"
    )]
    Overtaken {
        /// The slot.
        slot: StreamName,
        /// What it is confirmed up to.
        confirmed: PgLsn,
        /// Where the next transaction begins.
        start: PgLsn,
    },
    /// A message of a change log makes no sense.
    #[error("read the change log")]
    Decode(#[from] DecodeError),
    /// The Kinesis stream does not give its records.
    #[error(transparent)]
    Kinesis(#[from] KinesisError),
    /// A record of the Kinesis stream is not what an agent wrote.
    #[error("read a record of the Kinesis stream")]
    Record(#[from] UnpackError),
    /// A record of the Kinesis stream contradicts others.
    #[error("batch {batch} of the Kinesis stream: {reason}")]
    Contradiction {
        /// Its number.
        batch: i64,
        /// In which way.
        reason: String,
    },
    /// Too many records wait for one that is missing.
    #[error(
        "records that wait for an earlier one need more than what they may take of the {limit} bytes of limits.spill_bytes"
    )]
    TooMuchWaits {
        /// The limit, in bytes.
        limit: u64,
    },
    /// The Kinesis stream gives no sign of life.
    #[error("the Kinesis stream {stream} cannot be read")]
    Silent {
        /// Its name.
        stream: String,
    },
    /// A stretch of the source's history is in neither the Kinesis stream nor the archive.
    #[error("the changes from {} to {} are not in the Kinesis stream {stream}, and {archive}", gap.from, gap.to)]
    Gap {
        /// Which stretch.
        gap: Gap,
        /// The Kinesis stream.
        stream: String,
        /// What the archive has of it.
        archive: String,
    },
    /// The source gives LSNs out a second time.
    #[error(transparent)]
    WentBack(#[from] WentBack),
    /// The stream goes on from another slot.
    #[error(
        "stream {stream} was started over on the source: it is of history {successor} now, this replica of {ours}"
    )]
    BegunAnew {
        /// The stream.
        stream: StreamName,
        /// What was received.
        ours: History,
        /// What comes now.
        successor: History,
    },
    /// The archive, which was to fill a gap of the Kinesis stream.
    #[error("fill a gap of the Kinesis stream from the archive")]
    Archive(#[from] ArchiveError),
    /// The server ended the stream; it does so when it shuts down.
    #[error("the source ended the stream")]
    Ended,
}

impl Classify for SourceError {
    fn class(&self) -> Class {
        match self {
            Self::Pg(error) => error.class(),
            Self::Assemble(error) => error.class(),
            Self::Spill(error) => error.class(),
            Self::Kinesis(error) => error.class(),
            Self::Record(error) => error.class(),
            Self::Archive(error) => error.class(),
            Self::UnknownFate { .. }
            | Self::Decode(_)
            | Self::Contradiction { .. }
            | Self::TooMuchWaits { .. }
            | Self::WentBack(_)
            | Self::BegunAnew { .. }
            | Self::Gap { .. } => Class::Definite,
            // What the next start finds says whether somebody is wanted.
            Self::Overtaken { .. }
            | Self::Behind { .. }
            | Self::Ended
            | Self::NewType
            | Self::Silent { .. } => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Pg(error) => error.hint(),
            Self::Assemble(error) => error.hint(),
            Self::Spill(error) => error.hint(),
            Self::UnknownFate { .. } => Some(format!(
                "nothing of the transaction was applied; report this with the source's version. {}",
                remedy::start_over(remedy::SLOT_TOO)
            )),
            Self::Behind { .. } => Some(
                "source.url must lead every session to the same server".to_owned(),
            ),
            Self::Overtaken { .. } => Some(
                "another agent reads the same slot, or somebody has moved it: only one may run per stream".to_owned(),
            ),
            Self::Kinesis(error) => error.hint(),
            Self::Record(error) => error.hint(),
            Self::Archive(error) => error.hint(),
            Self::TooMuchWaits { .. } => Some(
                "raise limits.spill_bytes (and give the disk that room), then send SIGHUP to `dr-agent apply`".to_owned(),
            ),
            Self::BegunAnew { .. } => Some(format!(
                "everything that the stream had before is applied. {}",
                remedy::start_over_with(None, "`dr-agent apply`, which copies anew")
            )),
            Self::WentBack(_) => Some(WentBack::hint()),
            Self::Gap { .. } => Some(format!(
                "if the archive gets it later (its spool may still be uploading), start `dr-agent apply` again; if this is the \
                 bad day, `dr-agent promote --skip-drain`. {}",
                remedy::start_over_with(
                    None,
                    "`dr-agent apply`, which copies anew, from the source or from a base backup taken since"
                )
            )),
            Self::Decode(_) | Self::Contradiction { .. } => Some(
                "the record is not what dr-agent wrote; report it with the versions of both agents".to_owned(),
            ),
            Self::Silent { .. } => Some(
                "look at the warnings above: the network, the endpoint and the credentials".to_owned(),
            ),
            Self::Ended | Self::NewType => None,
        }
    }
}

/// Transactions in the queue at most. Their bytes are bounded by `limits.queue_bytes`; this only bounds how many tiny ones.
const QUEUE_TRANSACTIONS: usize = 16_384;

/// A transaction in the queue, with its share of `limits.queue_bytes`.
pub type Received = batch::Received<OwnedSemaphorePermit>;

/// The queue between whoever reads transactions and whoever applies them.
pub fn queue() -> (mpsc::Sender<Received>, mpsc::Receiver<Received>) {
    mpsc::channel(QUEUE_TRANSACTIONS)
}

/// What the source task tells of its position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourcePosition {
    /// The end of the source's WAL as far as the walsender has told.
    pub wal_end: Option<PgLsn>,
    /// Bytes of pgoutput messages received in this session.
    pub bytes: u64,
    /// How the source is read now.
    pub reader: Reader,
}

/// What comes after a way of reading has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The walsender, because the other way is not worth it.
    Walsender,
    /// The walsender, because the other way did not work.
    OnlyWalsender,
    /// Windows of the backlog.
    CatchUp,
    /// Nobody wants transactions any more.
    End,
}

/// Streams until an error, or until nobody wants transactions any more.
pub async fn run(
    settings: SourceSettings,
    space: SpillSpace,
    queue: mpsc::Sender<Received>,
    flush: watch::Receiver<FlushLsn>,
    position: watch::Sender<SourcePosition>,
) -> Result<(), SourceError> {
    let mut intake = Intake::new(&settings, space, queue, position);
    let mut backlog = BacklogWatch::new(&settings);
    let mut next = match settings.slot {
        SlotUse::Own => Next::CatchUp,
        SlotUse::Copy | SlotUse::Late => Next::OnlyWalsender,
    };
    failpoint::hit("source:before-slot");
    loop {
        // Whoever reads begins behind the last whole transaction.
        intake.restart();
        next = match next {
            Next::CatchUp => catch_up::read(&settings, &mut intake, flush.clone()).await?,
            Next::Walsender | Next::OnlyWalsender => {
                backlog.rest(next == Next::OnlyWalsender);
                walsender::read(&settings, &mut intake, flush.clone(), &mut backlog).await?
            }
            Next::End => return Ok(()),
        };
    }
}

/// Whether everything behind `start` comes from a slot, or a copy of it, that is confirmed up to there.
fn begins_at(settings: &SourceSettings, confirmed: PgLsn, start: PgLsn) -> Result<(), SourceError> {
    if confirmed <= start {
        return Ok(());
    }
    Err(SourceError::Overtaken {
        slot: settings.stream.clone(),
        confirmed,
        start,
    })
}
