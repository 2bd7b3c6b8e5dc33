//! One stream of Amazon Kinesis Data Streams: puts records, reads all shards.
//!
//! Used by whoever sends changes through Kinesis; knows neither what is in a record nor who reads it. `calls` packs
//! records, `pace` knows how long a call may take and `progress` keeps count of shards, all pure; `put`, `read`, `list`, `shard` and `probe` talk to Kinesis.
//!
//! ```text
//! put:   records ▶ calls ▶ several PutRecords at once ▶ what was refused once more
//! read:  list ──shards──▶ read ◀──pages── shard (a task for each) ──records──▶ events
//!                          └───────────────── progress: read up to ──────────▶ events
//! shared: one reading for all databases of a process that follow the stream, once they are near its tip
//! ```
//!
//! # Invariants
//! - What `put` returned for is in the stream; what `read` says it has read up to has been delivered.
//! - A record may be delivered more than once, and put more than once when an answer is lost. None is left out.
//! - Of one shard, records come in the shard's order, apart from repetitions. Nothing is said about the order over
//!   shards.
//! - The class of an error is decided in [`crate::cloud::aws`], and the pause by [`crate::backoff`].
//! - No secret is in an error or in a log line of this module.
//!
//! # What it does not do
//! It creates no stream and changes none. It keeps no checkpoints: a reader begins where its caller says. It knows
//! no enhanced fan-out and no aggregated records.

mod calls;
mod error;
mod list;
mod pace;
mod probe;
mod progress;
mod put;
mod read;
mod refused;
mod retries;
mod shard;
mod shared;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_kinesis::Client;
use aws_sdk_kinesis::types::{EncryptionType, StreamStatus};
use tokio::sync::Semaphore;

pub use self::calls::{RECORD_BYTES_MAX, Record};
pub use self::error::{KinesisError, KinesisOperation, Refusal};
use self::pace::CallPace;
pub use self::put::PutStats;
pub use self::read::{Event, ReadStats, Records, StartAt};
pub use self::shared::{OnRead, Wanted};
use crate::cloud::aws;
pub use crate::cloud::aws::AwsSettings as KinesisSettings;

/// The loops of this module decide about retries; the SDK makes one attempt.
const ATTEMPTS: u32 = 1;

/// Calls of PutRecords under way at the same time, over all users of one [`Kinesis`].
const PUTTING_MAX: usize = 8;

/// The longest pause between two attempts, but for throttling.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A client and the name of a stream. Cheap to clone; clones share the bound on calls under way.
#[derive(Clone)]
pub struct Kinesis {
    client: Client,
    stream: Arc<str>,
    putting: Arc<Semaphore>,
    pace: Arc<CallPace>,
}

/// The client's own representation is long, and holds what is none of a log's business.
impl fmt::Debug for Kinesis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kinesis").field(&self.stream).finish()
    }
}

/// What DescribeStreamSummary says of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSummary {
    /// Shards that take records.
    pub open_shards: u32,
    /// How long a record can be read.
    pub retention: Duration,
    /// It takes records and can be read: it is ACTIVE or UPDATING.
    pub active: bool,
    /// By KMS, on the side of the server.
    pub encrypted: bool,
}

impl Kinesis {
    /// A client for the stream. Region, credentials and endpoint come from the usual AWS environment (variables,
    /// profile, web identity, container, instance); whether they are good shows at the first request.
    ///
    /// # Errors
    /// [`Refusal::Region`] where nothing names a region.
    pub async fn open(stream: &str) -> Result<Self, KinesisError> {
        Self::open_with(stream, &KinesisSettings::default()).await
    }

    /// The same; what `settings` say goes before the environment.
    ///
    /// # Errors
    /// As [`Kinesis::open`].
    pub async fn open_with(stream: &str, settings: &KinesisSettings) -> Result<Self, KinesisError> {
        let environment = Box::pin(aws::environment(settings, "Kinesis", ATTEMPTS)).await;
        let Some(region) = environment.region else {
            return Err(KinesisError::Refused {
                operation: KinesisOperation::Open,
                stream: stream.to_owned(),
                refusal: Refusal::Region,
                said: "the environment names no region".to_owned(),
            });
        };
        let client = aws_sdk_kinesis::config::Builder::from(&environment.config)
            .region(region)
            .build();
        Ok(Self {
            client: Client::from_conf(client),
            stream: stream.into(),
            putting: Arc::new(Semaphore::new(PUTTING_MAX)),
            // All calls may share one line.
            pace: Arc::new(CallPace::new(
                aws::SLOWEST_BYTES_PER_SECOND / PUTTING_MAX as u64,
            )),
        })
    }

    /// The stream's name.
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// Asks for the stream's state.
    ///
    /// # Errors
    /// Whatever Kinesis says; nothing is retried.
    pub async fn describe(&self) -> Result<StreamSummary, KinesisError> {
        let request = self.client.describe_stream_summary();
        let answer = Box::pin(request.stream_name(self.stream()).send())
            .await
            .map_err(|error| self.refused(KinesisOperation::DescribeStreamSummary, &error))?;
        let Some(said) = answer.stream_description_summary else {
            return Err(self.incomplete(KinesisOperation::DescribeStreamSummary));
        };
        let hours = u64::try_from(said.retention_period_hours).unwrap_or_default();
        Ok(StreamSummary {
            open_shards: u32::try_from(said.open_shard_count).unwrap_or_default(),
            retention: Duration::from_secs(hours * 3600),
            active: matches!(
                said.stream_status,
                StreamStatus::Active | StreamStatus::Updating
            ),
            encrypted: said.encryption_type == Some(EncryptionType::Kms),
        })
    }
}
