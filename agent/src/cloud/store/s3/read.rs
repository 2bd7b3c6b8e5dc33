//! Reads from S3, as a stream that goes on where it broke.
//!
//! S3 ends connections that are read slowly, and whoever reads an archive restores into a database that has
//! to do its own work in between. The SDK repeats requests but not the transfer that follows, so that
//! is done here.
//!
//! # Invariants
//! - All bytes of one object, once and in order: what continues a read has the ETag of its beginning, and begins where it broke.
//! - What is not from S3, a portal's page for instance, is no object, whatever its status.
//! - The end is reported only when as many bytes came as S3 announced, and their CRC-32C is the object's,
//!   where S3 keeps one of the whole.

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ChecksumMode;
use bytes::Bytes;

use super::{S3, length, read_crc};
use crate::cloud::store::{StoreError, StoreOperation, Version};
use crate::error::chain;

/// A transfer may break so often without a single byte in between.
const BREAKS_MAX: u32 = 4;

/// An object on its way from S3.
#[derive(Debug)]
pub(in crate::cloud::store) struct S3Reader {
    store: S3,
    name: String,
    etag: Option<String>,
    length: u64,
    expected: Option<u32>,
    body: ByteStream,
    offset: u64,
    crc: u32,
    breaks: u32,
}

impl S3 {
    pub(in crate::cloud::store) async fn read(&self, name: &str) -> Result<S3Reader, StoreError> {
        let begun = self.request(name, 0, None).await?;
        Ok(S3Reader {
            store: self.clone(),
            name: name.to_owned(),
            length: length(begun.content_length()),
            expected: begun.checksum_crc32_c().and_then(read_crc),
            etag: begun.e_tag,
            body: begun.body,
            offset: 0,
            crc: 0,
            breaks: 0,
        })
    }

    async fn request(
        &self,
        name: &str,
        from: u64,
        etag: Option<String>,
    ) -> Result<GetObjectOutput, StoreError> {
        let request = self
            .client
            .get_object()
            .bucket(self.bucket())
            .key(self.key(name))
            .checksum_mode(ChecksumMode::Enabled)
            .set_range((from > 0).then(|| format!("bytes={from}-")))
            .set_if_match(etag);
        let answer = Box::pin(request.send())
            .await
            .map_err(|error| self.refused(StoreOperation::Read, name, &error))?;
        match flaw(&answer, from) {
            None => Ok(answer),
            Some(flaw) => Err(self.foreign(StoreOperation::Read, name, flaw)),
        }
    }
}

/// Nothing of that kind is ever written here.
pub(super) fn is_a_page(content_type: Option<&str>) -> bool {
    content_type.is_some_and(|kind| kind.starts_with("text/html"))
}

/// Why an answer is none of S3 to a request from there on.
fn flaw(answer: &GetObjectOutput, from: u64) -> Option<&'static str> {
    let range = answer.content_range().unwrap_or_default();
    if answer.e_tag().is_none() || answer.content_length().is_none() {
        Some("an answer without ETag or length")
    } else if is_a_page(answer.content_type()) {
        Some("a page of HTML")
    } else if from > 0 && !range.starts_with(&format!("bytes {from}-")) {
        Some("another part of the object than was asked for")
    } else {
        None
    }
}

impl S3Reader {
    pub(in crate::cloud::store) fn version(&self) -> Version {
        // An answer without one is none of S3.
        Version(self.etag.clone().unwrap_or_default())
    }

    pub(in crate::cloud::store) async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            let broke = match self.body.next().await {
                Some(Ok(piece)) if piece.is_empty() => continue,
                Some(Ok(piece)) => {
                    self.offset += piece.len() as u64;
                    self.crc = crc32c::crc32c_append(self.crc, &piece);
                    self.breaks = 0;
                    return Ok(Some(piece));
                }
                None if self.offset == self.length => return self.verify().map(|()| None),
                None => "the answer ended early".to_owned(),
                // Behind the last byte the SDK compares checksums, and nothing else can fail.
                Some(Err(error)) if self.offset == self.length => {
                    return Err(self.damaged(chain(&error)));
                }
                Some(Err(error)) => chain(&error),
            };
            if self.offset > self.length {
                return Err(self.damaged(format!("it has more than {} bytes", self.length)));
            }
            self.breaks += 1;
            if self.breaks > BREAKS_MAX {
                return Err(self.store.broken(StoreOperation::Read, &self.name, broke));
            }
            tracing::debug!(
                object = self.store.url(&self.name),
                offset = self.offset,
                reason = broke,
                "read continued"
            );
            let rest = self
                .store
                .request(&self.name, self.offset, self.etag.clone())
                .await?;
            self.body = rest.body;
        }
    }

    fn verify(&self) -> Result<(), StoreError> {
        match self.expected {
            Some(expected) if expected != self.crc => {
                Err(self.damaged("its checksum is not the one S3 keeps".to_owned()))
            }
            _ => Ok(()),
        }
    }

    fn damaged(&self, reason: String) -> StoreError {
        StoreError::Damaged {
            object: self.store.url(&self.name),
            reason,
        }
    }
}
