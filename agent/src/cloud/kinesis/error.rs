//! ● What can go wrong with Kinesis, and what the operator can do about it. Pure.
//!
//! What Kinesis or the SDK say is sorted into a [`Refusal`] by [`crate::cloud::aws`]; the hint that only Kinesis can give is here.
//!
//! # Invariants
//! - An error names the stream and the operation; a refused right names the permission. None holds a secret.
//!
//! # What it does not do
//! It does not look at error codes, and it decides about no pause.

use std::fmt;

pub use crate::cloud::aws::Refusal;
use crate::error::{Class, Classify};

/// An operation of Kinesis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KinesisOperation {
    /// None yet: a client is made.
    Open,
    /// Asks for the stream's state.
    DescribeStreamSummary,
    /// Asks for the shards.
    ListShards,
    /// Asks for a place in a shard.
    GetShardIterator,
    /// Reads records of a shard.
    GetRecords,
    /// Puts records.
    PutRecords,
}

/// As AWS writes it, also in IAM behind `kinesis:`.
impl fmt::Display for KinesisOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::DescribeStreamSummary => "DescribeStreamSummary",
            Self::ListShards => "ListShards",
            Self::GetShardIterator => "GetShardIterator",
            Self::GetRecords => "GetRecords",
            Self::PutRecords => "PutRecords",
        })
    }
}

/// What can go wrong with Kinesis.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KinesisError {
    /// Kinesis refused or did not answer.
    #[error("{operation} of Kinesis stream {stream}: {refusal}: {said}")]
    Refused {
        /// What was asked.
        operation: KinesisOperation,
        /// The stream's name.
        stream: String,
        /// Why.
        refusal: Refusal,
        /// The words of Kinesis or of the SDK.
        said: String,
    },
    /// A record that no stream takes. A mistake of this program, not of the operator.
    #[error("PutRecords of Kinesis stream {stream}: {reason}")]
    Record {
        /// The stream's name.
        stream: String,
        /// What is wrong with the record.
        reason: String,
    },
}

impl KinesisError {
    /// Whether it goes away by waiting alone, so that a call is worth repeating.
    pub fn passes(&self) -> bool {
        self.refusal().is_some_and(Refusal::passes)
    }

    /// Why Kinesis refused; `None` where it was not asked.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(*refusal),
            Self::Record { .. } => None,
        }
    }
}

impl Classify for KinesisError {
    fn class(&self) -> Class {
        match self {
            Self::Refused { refusal, .. } => refusal.class(),
            Self::Record { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Refused {
                refusal, operation, ..
            } => Some(hint(*refusal, *operation)),
            Self::Record { .. } => None,
        }
    }
}

fn hint(refusal: Refusal, operation: KinesisOperation) -> String {
    match refusal {
        Refusal::Denied => {
            format!("allow the agent's role kinesis:{operation} on the stream; it is tried again")
        }
        Refusal::Forbidden => format!(
            "the answer does not say why: the agent's role needs kinesis:{operation} on the stream, or a proxy or firewall on \
             the way refused it; it is tried again"
        ),
        Refusal::Kms => {
            let right = match operation {
                KinesisOperation::PutRecords => "kms:GenerateDataKey",
                _ => "kms:Decrypt",
            };
            format!(
                "the key must be enabled, in the stream's region, and allow the agent's role {right}; it is tried again"
            )
        }
        Refusal::Throttled => {
            "it is tried again; if it lasts, the stream needs more shards (or on-demand mode), or another client uses them up"
                .to_owned()
        }
        other => other.hint().to_owned(),
    }
}
