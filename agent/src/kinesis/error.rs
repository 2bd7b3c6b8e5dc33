//! What can go wrong with Kinesis, and what the operator can do about it. Pure.
//!
//! What Kinesis or the SDK say is sorted into a [`Refusal`] by `refused.rs`; class and hint follow from it here.
//!
//! # Invariants
//! - An error names the stream and the operation; a refused right names the permission. None holds a secret.
//!
//! # What it does not do
//! It does not look at error codes, and it decides about no pause.

use std::fmt;

use crate::error::{Class, Classify};

/// An operation of Kinesis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
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
impl fmt::Display for Operation {
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

/// Why Kinesis did not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The credentials are good and do not allow it.
    Denied,
    /// There is no such stream, or no longer such a shard.
    NoStream,
    /// No region is known, or it is the wrong one.
    Region,
    /// There are no credentials, or AWS does not know them.
    Credentials,
    /// The credentials could not be fetched, or are no longer valid.
    StaleCredentials,
    /// The key of server-side encryption cannot be used.
    Kms,
    /// This machine's clock was wrong when the request was signed: the machine slept, or it is being set.
    Clock,
    /// This machine's clock is wrong, and stays so.
    WrongClock,
    /// Too many requests, or more bytes than the shards take.
    Throttled,
    /// No answer, or one that blames the server.
    Unavailable,
    /// The stream is being created, changed or deleted.
    Busy,
    /// A shard iterator or the token of a listing is too old.
    Expired,
    /// Something this program does not know.
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denied => "access denied",
            Self::NoStream => "no such stream",
            Self::Region => "wrong or unknown region",
            Self::Credentials => "no valid credentials",
            Self::StaleCredentials => "no current credentials",
            Self::Kms => "the KMS key cannot be used",
            Self::Clock | Self::WrongClock => "the clock is wrong",
            Self::Throttled => "throttled",
            Self::Unavailable => "Kinesis cannot be reached or does not work",
            Self::Busy => "the stream is not active",
            Self::Expired => "the place in the stream is too old",
            Self::Unknown => "refused",
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
        operation: Operation,
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
    /// Why Kinesis refused; `None` where it was not asked.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(*refusal),
            Self::Record { .. } => None,
        }
    }
}

impl KinesisError {
    /// The same after it has lasted: what ought to have healed by itself and did not.
    #[must_use]
    pub(super) fn lasting(mut self) -> Self {
        if let Self::Refused { refusal, .. } = &mut self
            && *refusal == Refusal::Clock
        {
            *refusal = Refusal::WrongClock;
        }
        self
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
            } => Some(refusal.hint(*operation)),
            Self::Record { .. } => None,
        }
    }
}

impl Refusal {
    /// What is to be done about it.
    pub(super) fn class(self) -> Class {
        match self {
            // A token that has expired is renewed by whoever issued it, without a restart.
            Self::StaleCredentials
            | Self::Clock
            | Self::Throttled
            | Self::Unavailable
            | Self::Busy
            | Self::Expired => Class::Transient,
            Self::Denied
            | Self::NoStream
            | Self::Region
            | Self::Credentials
            | Self::Kms
            | Self::WrongClock
            | Self::Unknown => Class::Definite,
        }
    }

    fn hint(self, operation: Operation) -> String {
        let hint = match self {
            Self::Denied => {
                return format!("allow the agent's role kinesis:{operation} on the stream");
            }
            Self::NoStream => {
                "create the stream, or mend its name; check AWS_REGION too: a stream belongs to one region"
            }
            Self::Region => "set AWS_REGION to the region of the stream",
            Self::Credentials => {
                "give the agent credentials by the usual means: AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, a profile (credential_process for IAM Roles Anywhere), web identity, \
                 or the role of the instance or container; SSO profiles are not supported"
            }
            Self::StaleCredentials => {
                "check who issues the agent's credentials (instance metadata, STS, credential_process), or \
                 replace a session token that has expired"
            }
            Self::Kms => match operation {
                Operation::PutRecords => {
                    "the key must be enabled, in the stream's region, and allow the agent's role \
                     kms:GenerateDataKey"
                }
                _ => {
                    "the key must be enabled, in the stream's region, and allow the agent's role kms:Decrypt"
                }
            },
            Self::Clock | Self::WrongClock => {
                "set the clock of this machine (NTP): AWS accepts a few minutes of difference"
            }
            Self::Throttled => {
                "it is tried again; if it lasts, the stream needs more shards (or on-demand mode), or another \
                 client uses them up"
            }
            Self::Unavailable => {
                "it is tried again; if it lasts, check DNS, firewall and AWS_ENDPOINT_URL"
            }
            Self::Busy => "it is tried again; wait until the stream is ACTIVE",
            Self::Expired => "it is tried again from the last record that was read",
            Self::Unknown => "the words of Kinesis above say what it does not accept",
        };
        hint.to_owned()
    }
}
