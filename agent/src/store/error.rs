//! What can go wrong with a store, and what the operator can do about it. Pure.
//!
//! What S3 or the SDK say is sorted into a [`Refusal`] by `s3/refused.rs`; class and hint follow from it here.

use std::fmt;
use std::io;

use crate::error::{Class, Classify};

/// What was being done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Opening the store.
    Open,
    /// Writing an object.
    Write,
    /// Reading an object, or asking who wrote it.
    Read,
    /// Listing.
    List,
    /// Deleting an object.
    Delete,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Write => "write",
            Self::Read => "read",
            Self::List => "list",
            Self::Delete => "delete",
        })
    }
}

/// Why S3 did not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The credentials are good and do not allow it.
    Denied,
    /// There is no such bucket.
    NoBucket,
    /// The bucket is in another region, or no region is known.
    Region,
    /// There are no credentials, or S3 does not know them.
    Credentials,
    /// The credentials could not be fetched, or are no longer valid.
    StaleCredentials,
    /// The key of SSE-KMS cannot be used.
    Kms,
    /// This machine's clock is wrong.
    Clock,
    /// Too many requests.
    Throttled,
    /// No answer, or one that blames the server.
    Unavailable,
    /// Somebody else writes or deletes the same object at this moment.
    Conflict,
    /// Something this program does not know.
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denied => "access denied",
            Self::NoBucket => "no such bucket",
            Self::Region => "wrong or unknown region",
            Self::Credentials => "no valid credentials",
            Self::StaleCredentials => "no current credentials",
            Self::Kms => "the KMS key cannot be used",
            Self::Clock => "the clock is wrong",
            Self::Throttled => "too many requests",
            Self::Unavailable => "S3 cannot be reached or does not work",
            Self::Conflict => "another request for the same object is under way",
            Self::Unknown => "refused",
        })
    }
}

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A name that no object can have. A mistake of this program, not of the operator.
    #[error("{name:?} cannot be the name of an object: {reason}")]
    Name {
        /// The name, or the beginning of one.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no such object.
    #[error("{object} does not exist")]
    NotFound {
        /// Which, as a URL.
        object: String,
    },
    /// S3 refused or did not answer.
    #[error("{doing} {object}: {refusal}: {said}")]
    S3 {
        /// Verb.
        doing: Doing,
        /// Which object or prefix, as a URL.
        object: String,
        /// Why.
        refusal: Refusal,
        /// The words of S3 or of the SDK.
        said: String,
    },
    /// The file system refused.
    #[error("{doing} {object}")]
    Io {
        /// Verb.
        doing: Doing,
        /// Which object or prefix, as a URL.
        object: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was read is not what was written.
    #[error("read {object}: {reason}")]
    Damaged {
        /// Which, as a URL.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An earlier write of the same object failed or was given up.
    #[error("write {object}: part of it is missing after a write that did not end well")]
    Torn {
        /// Which, as a URL.
        object: String,
    },
    /// S3 takes no object of this size.
    #[error("write {object}: it is larger than S3 takes in 10000 parts ({bytes} bytes so far)")]
    TooLarge {
        /// Which, as a URL.
        object: String,
        /// What had been written.
        bytes: u64,
    },
}

impl StoreError {
    /// The disk of a directory has no room: waiting alone makes none.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

impl Classify for StoreError {
    fn class(&self) -> Class {
        match self {
            Self::Name { .. } | Self::NotFound { .. } | Self::TooLarge { .. } => Class::Definite,
            Self::S3 { refusal, .. } => match refusal {
                // A token that has expired is renewed by whoever issued it, without a restart.
                Refusal::StaleCredentials
                | Refusal::Throttled
                | Refusal::Unavailable
                | Refusal::Conflict => Class::Transient,
                Refusal::Denied
                | Refusal::NoBucket
                | Refusal::Region
                | Refusal::Credentials
                | Refusal::Kms
                | Refusal::Clock
                | Refusal::Unknown => Class::Definite,
            },
            // A full disk heals; a missing right does not.
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::AlreadyExists
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::Unsupported => Class::Definite,
                _ => Class::Transient,
            },
            Self::Damaged { .. } | Self::Torn { .. } => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Name { .. } => return None,
            Self::NotFound { .. } => {
                "it was deleted, or never archived here; check the URL of the archive and its retention"
            }
            Self::S3 { refusal, doing, .. } => return Some(refusal.hint(*doing)),
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "make room on the disk of the archive, or shorten its retention; it goes on by itself"
                }
                io::ErrorKind::PermissionDenied => {
                    "the agent's user must be able to read and write the directory of the archive, on a \
                     file system with hard links"
                }
                io::ErrorKind::AlreadyExists
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory => {
                    "a file is where a directory must be, or the other way round; nothing but dr-agent may \
                     write there"
                }
                io::ErrorKind::CrossesDevices => {
                    "the directory of the archive must be one file system, without mounts below it"
                }
                _ => {
                    "the directory of the archive must be on a file system that works, with hard links"
                }
            },
            Self::Damaged { .. } => {
                "read it again; if it repeats, this object is lost: restore from another base backup, \
                 and check memory, disk and network"
            }
            Self::Torn { .. } => "write it again from its beginning",
            Self::TooLarge { .. } => "split it: no object can be larger than about 430 GiB",
        };
        Some(hint.to_owned())
    }
}

impl Refusal {
    fn hint(self, doing: Doing) -> String {
        let hint = match self {
            Self::Denied => {
                let permission = match doing {
                    Doing::Open | Doing::Write => "s3:PutObject and s3:AbortMultipartUpload",
                    // Without s3:ListBucket S3 says "denied" where it would say "not there".
                    Doing::Read => {
                        "s3:GetObject, and s3:ListBucket to learn that an object does not exist,"
                    }
                    Doing::List => "s3:ListBucket (on the bucket itself)",
                    Doing::Delete => "s3:DeleteObject",
                };
                return format!("allow the agent's role {permission} on the bucket and prefix");
            }
            Self::NoBucket => "create the bucket, or mend the URL of the archive",
            Self::Region => "set AWS_REGION to the region of the bucket",
            Self::Credentials => {
                "give the agent credentials by the usual means: AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, a profile (credential_process for IAM Roles Anywhere), web identity, \
                 or the role of the instance or container; SSO profiles are not supported"
            }
            Self::StaleCredentials => {
                "check who issues the agent's credentials (instance metadata, STS, credential_process), or \
                 replace a session token that has expired"
            }
            Self::Kms => {
                "the key must be enabled, in the bucket's region, and allow the agent's role \
                 kms:GenerateDataKey and kms:Decrypt"
            }
            Self::Clock => {
                "set the clock of this machine (NTP): S3 accepts 15 minutes of difference"
            }
            Self::Throttled => "it is tried again; if it lasts, another client uses up the bucket",
            Self::Unavailable => {
                "it is tried again; if it lasts, check DNS, firewall and AWS_ENDPOINT_URL"
            }
            Self::Conflict => "it is tried again",
            Self::Unknown => "the words of S3 above say what it does not accept",
        };
        hint.to_owned()
    }
}
