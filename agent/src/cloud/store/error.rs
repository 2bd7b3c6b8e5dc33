//! ● What can go wrong with a store, and what the operator can do about it. Pure.
//!
//! What S3 or the SDK say is sorted into a [`Refusal`] by [`crate::cloud::aws`]; the hint that only S3 can give is here.

use std::fmt;
use std::io;

pub use crate::cloud::aws::Refusal;
use crate::error::{Class, Classify};

/// What was being done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOperation {
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

impl fmt::Display for StoreOperation {
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
        doing: StoreOperation,
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
        doing: StoreOperation,
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
    /// Whether it goes away by waiting alone: nobody has to give a right, or to make room.
    pub fn passes(&self) -> bool {
        match self {
            Self::S3 { refusal, .. } => refusal.passes(),
            other => other.class() == Class::Transient && !other.is_full(),
        }
    }

    /// Whether it says something about one object, while the store is there and may give others.
    pub fn is_of_one_object(&self) -> bool {
        match self {
            Self::S3 { refusal, .. } => refusal.is_of_one_object(),
            Self::NotFound { .. } | Self::Damaged { .. } | Self::Io { .. } => true,
            Self::Name { .. } | Self::Torn { .. } | Self::TooLarge { .. } => false,
        }
    }

    /// The disk of a directory has no room: waiting alone makes none.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

impl Classify for StoreError {
    fn class(&self) -> Class {
        match self {
            Self::Name { .. } | Self::TooLarge { .. } => Class::Definite,
            Self::S3 { refusal, .. } => refusal.class(),
            // A disk is emptied, a file system mounted or a right given while this runs; what a file system cannot do, it never
            // will.
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::AlreadyExists
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::Unsupported => Class::Definite,
                _ => Class::Transient,
            },
            // Whoever lists again knows what there is.
            Self::NotFound { .. } => Class::Transient,
            Self::Damaged { .. } | Self::Torn { .. } => Class::Transient,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Name { .. } => return None,
            Self::NotFound { .. } => {
                "it was deleted, or never archived here; check the URL of the archive and its retention"
            }
            Self::S3 { refusal, doing, .. } => return Some(hint(*refusal, *doing)),
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

fn hint(refusal: Refusal, doing: StoreOperation) -> String {
    match refusal {
        Refusal::Denied => format!(
            "allow the agent's role {} on the bucket and prefix; it is tried again",
            permission(doing)
        ),
        Refusal::Forbidden => format!(
            "the answer does not say why: the agent's role needs {} on the bucket and prefix, or a proxy or firewall on the \
             way refused it; it is tried again",
            permission(doing)
        ),
        Refusal::Throttled => {
            "it is tried again; if it lasts, another client uses up the bucket".to_owned()
        }
        other => other.hint().to_owned(),
    }
}

fn permission(doing: StoreOperation) -> &'static str {
    match doing {
        StoreOperation::Open | StoreOperation::Write => "s3:PutObject and s3:AbortMultipartUpload",
        // Without s3:ListBucket S3 says "denied" where it would say "not there".
        StoreOperation::Read => {
            "s3:GetObject, and s3:ListBucket to learn that an object does not exist,"
        }
        StoreOperation::List => "s3:ListBucket (on the bucket itself)",
        StoreOperation::Delete => "s3:DeleteObject",
    }
}
