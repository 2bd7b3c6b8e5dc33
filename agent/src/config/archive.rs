//! `[archive]`: where base backups and the change log go.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{ConfigError, bytes, duration, value};
use crate::cloud::store::{Encryption, StoreUrl};

/// The section as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawArchive {
    url: Option<String>,
    encryption: Option<RawEncryption>,
    kms_key: Option<String>,
    base_every: Option<String>,
    retention: Option<String>,
    required: Option<bool>,
    segment_bytes: Option<String>,
    spool_bytes: Option<String>,
    spool_directory: Option<PathBuf>,
}

/// `archive.encryption`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawEncryption {
    SseS3,
    SseKms,
}

/// `[archive]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// The store.
    pub url: StoreUrl,
    /// How S3 encrypts what is written.
    pub encryption: Encryption,
    /// How often a base backup is taken.
    pub base_every: Duration,
    /// How far back every moment can be restored.
    pub retention: Duration,
    /// Whether the slot waits for the archive as well.
    pub required: bool,
    /// A segment of the change log is complete at this many bytes.
    pub segment_bytes: u64,
    /// Change log that waits for the store, in bytes on disk.
    pub spool_bytes: u64,
    /// Where it waits.
    pub spool_directory: PathBuf,
}

impl RawArchive {
    pub(super) fn resolve(self) -> Result<Archive, ConfigError> {
        let url = self.url.ok_or_else(|| {
            value(
                "archive.url",
                "is missing; write s3://bucket/prefix or file:///directory",
            )
        })?;
        let url: StoreUrl = url.parse().map_err(|error| ConfigError::Value {
            key: "archive.url",
            message: format!("{error}"),
        })?;
        let on_s3 = matches!(url, StoreUrl::S3 { .. });
        if !on_s3 && (self.encryption.is_some() || self.kms_key.is_some()) {
            return Err(value(
                "archive.encryption",
                "is for s3://; a directory is encrypted by its disk",
            ));
        }
        let encryption = match (self.encryption, self.kms_key) {
            (None, None) => Encryption::Default,
            (Some(RawEncryption::SseS3), None) => Encryption::S3,
            (Some(RawEncryption::SseKms), Some(key)) => Encryption::Kms { key },
            (Some(RawEncryption::SseKms), None) => {
                return Err(value("archive.kms_key", "is missing; name the KMS key"));
            }
            (_, Some(_)) => {
                return Err(value(
                    "archive.kms_key",
                    "belongs to archive.encryption = \"sse-kms\"",
                ));
            }
        };
        Ok(Archive {
            url,
            encryption,
            base_every: duration("archive.base_every", self.base_every, "24h")?,
            retention: duration("archive.retention", self.retention, "14d")?,
            required: self.required.unwrap_or(false),
            segment_bytes: bytes("archive.segment_bytes", self.segment_bytes, "64MiB")?,
            spool_bytes: bytes("archive.spool_bytes", self.spool_bytes, "20GiB")?,
            spool_directory: self
                .spool_directory
                .unwrap_or_else(|| PathBuf::from("/var/lib/dr-agent/spool")),
        })
    }
}
