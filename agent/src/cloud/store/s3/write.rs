//! Writes to S3: one request for what fits into a part, an upload of several parts for what does not.
//!
//! # Invariants
//! - In memory are the part that is being gathered and those on their way, 40 MiB for an object below 8 GiB;
//!   for larger ones parts grow, to 160 MiB in all at the end.
//! - An upload is completed only with every part that was sent, under the checksum of the whole; otherwise it is
//!   aborted, in the background where its writer was dropped.
//! - A success is believed only with the ETag and the checksum of what was sent, or when the object is there, whole and by us:
//!   something on the way that says 200 has stored nothing.

use std::mem;

use aws_sdk_s3::operation::RequestId as _;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, ServerSideEncryption,
};
use bytes::{Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::attempts::OnlyS3;
use super::read::is_a_page;
use super::refused::{is_gone, is_missing, is_taken};
use super::{COMPLETE_WITHIN, S3, WRITER, length, patience, time_to_send, written_crc};
use crate::cloud::store::{
    Encryption, ObjectSummary, Put, StoreError, StoreOperation, Version, ended,
};

/// The smallest part; S3 takes none below 5 MiB but the last.
const PART_BYTES: usize = 8 << 20;

/// S3 takes no more parts than these.
const PARTS_MAX: usize = 10_000;

/// After so many parts they grow by [`PART_BYTES`]. Thus 10 000 of them hold 430 GiB instead of 78.
const PARTS_OF_ONE_SIZE: usize = 1000;

/// What may be on its way, but at least one part.
const SENDING_BYTES: usize = 4 * PART_BYTES;

/// The size of a part that has so many before it.
fn part_bytes(before: usize) -> usize {
    PART_BYTES * (1 + before / PARTS_OF_ONE_SIZE)
}

impl S3 {
    /// Writes an object that is not there yet, or `instead` of what was read.
    pub(in crate::cloud::store) async fn put(
        &self,
        name: &str,
        body: Bytes,
        instead: Option<Version>,
    ) -> Result<Put, StoreError> {
        let (none, same) = condition(instead);
        let writer = draw();
        let sent = ObjectSummary {
            bytes: body.len() as u64,
            crc32c: crc32c::crc32c(&body),
        };
        let deadline = patience(time_to_send(body.len()));
        let request = self
            .client
            .put_object()
            .bucket(self.bucket())
            .key(self.key(name))
            .set_if_none_match(none)
            .set_if_match(same)
            .metadata(WRITER, &writer)
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .checksum_crc32_c(written_crc(sent.crc32c))
            .set_server_side_encryption(self.encryption())
            .set_ssekms_key_id(self.kms_key())
            .body(body.into())
            .customize()
            .config_override(deadline);
        // What was sent may arrive, whoever has given up waiting for it.
        let sending = self.place.background.spawn(request.send());
        match ended(sending.await).await {
            Ok(answer) => {
                let receipt = (answer.e_tag(), answer.checksum_crc32_c());
                self.stored(name, &writer, receipt, sent).await
            }
            Err(error) if is_taken(&error) => self.whose(name, &writer).await,
            // What was to be replaced.
            Err(error) if is_missing(&error) => Err(self.gone(name)),
            Err(error) => Err(self.refused(StoreOperation::Write, name, &error)),
        }
    }

    pub(in crate::cloud::store) async fn put_new_in_parts(
        &self,
        name: &str,
        body: Bytes,
    ) -> Result<Put, StoreError> {
        let mut upload = Upload::begin(self, name, None).await?;
        upload.send(body).await?;
        let (put, _) = upload.complete().await?;
        if put == Put::Exists {
            upload.abort().await?;
        }
        Ok(put)
    }

    /// Whether what was said to be stored is: anything on the way can say 200. S3 gives the ETag and the checksum back; where
    /// one does not, the object itself has to tell that it is there, whole and ours.
    async fn stored(
        &self,
        name: &str,
        writer: &str,
        (etag, checksum): (Option<&str>, Option<&str>),
        sent: ObjectSummary,
    ) -> Result<Put, StoreError> {
        if etag.is_some() && checksum == Some(&written_crc(sent.crc32c)) {
            return Ok(Put::Created);
        }
        let head = self.head(name).await?;
        match head
            .is_some_and(|head| is_by(&head, writer) && length(head.content_length()) == sent.bytes)
        {
            true => Ok(Put::Created),
            false => Err(self.foreign(
                StoreOperation::Write,
                name,
                "a success without ETag and checksum, and the object is not there as it was sent",
            )),
        }
    }

    /// There is an object of this name. An earlier attempt of ours may have written it and its answer
    /// been lost.
    async fn whose(&self, name: &str, writer: &str) -> Result<Put, StoreError> {
        match self.head(name).await? {
            Some(head) if is_by(&head, writer) => Ok(Put::Created),
            Some(_) => Ok(Put::Exists),
            // Deleted meanwhile, or never there: then the upload was aborted by somebody else.
            None => Err(self.gone(name)),
        }
    }

    /// What S3 has of an object besides its bytes; none if it is not there.
    async fn head(&self, name: &str) -> Result<Option<HeadObjectOutput>, StoreError> {
        let request = self.client.head_object().bucket(self.bucket());
        match Box::pin(request.key(self.key(name)).send()).await {
            Ok(head) if head.e_tag().is_none() || is_a_page(head.content_type()) => Err(self
                .foreign(
                    StoreOperation::Read,
                    name,
                    "an object without ETag, or a page of HTML",
                )),
            Ok(head) => Ok(Some(head)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(self.refused(StoreOperation::Read, name, &error)),
        }
    }

    fn encryption(&self) -> Option<ServerSideEncryption> {
        match self.place.encryption {
            Encryption::Default => None,
            Encryption::S3 => Some(ServerSideEncryption::Aes256),
            Encryption::Kms { .. } => Some(ServerSideEncryption::AwsKms),
        }
    }

    fn kms_key(&self) -> Option<String> {
        match &self.place.encryption {
            Encryption::Kms { key } => Some(key.clone()),
            Encryption::Default | Encryption::S3 => None,
        }
    }
}

/// `If-None-Match` and `If-Match` of a write.
fn condition(instead: Option<Version>) -> (Option<String>, Option<String>) {
    match instead {
        None => (Some("*".to_owned()), None),
        Some(Version(etag)) => (None, Some(etag)),
    }
}

/// Whether the writer of this number wrote it.
fn is_by(head: &HeadObjectOutput, writer: &str) -> bool {
    let metadata = head.metadata();
    metadata
        .and_then(|metadata| metadata.get(WRITER))
        .is_some_and(|found| found == writer)
}

/// A number that no other writer has.
fn draw() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// An object on its way to S3.
#[derive(Debug)]
pub(in crate::cloud::store) struct S3Writer {
    store: S3,
    name: String,
    instead: Option<Version>,
    gathered: BytesMut,
    /// Begun with the first full part.
    upload: Option<Upload>,
}

impl S3Writer {
    pub(in crate::cloud::store) fn new(store: S3, name: &str, instead: Option<Version>) -> Self {
        Self {
            store,
            name: name.to_owned(),
            instead,
            gathered: BytesMut::new(),
            upload: None,
        }
    }

    pub(in crate::cloud::store) fn url(&self) -> String {
        self.store.url(&self.name)
    }

    pub(in crate::cloud::store) async fn write(
        &mut self,
        mut bytes: Bytes,
    ) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let full = part_bytes(self.upload.as_ref().map_or(0, |upload| upload.parts));
            let room = full - self.gathered.len();
            let piece = bytes.split_to(room.min(bytes.len()));
            self.gathered.extend_from_slice(&piece);
            if self.gathered.len() == full {
                let upload = match &mut self.upload {
                    Some(upload) => upload,
                    none => {
                        let instead = self.instead.clone();
                        none.insert(Upload::begin(&self.store, &self.name, instead).await?)
                    }
                };
                upload.send(self.gathered.split().freeze()).await?;
            }
        }
        Ok(())
    }

    pub(in crate::cloud::store) async fn finish(self) -> Result<(Put, ObjectSummary), StoreError> {
        let body = self.gathered.freeze();
        let Some(mut upload) = self.upload else {
            let summary = ObjectSummary {
                bytes: body.len() as u64,
                crc32c: crc32c::crc32c(&body),
            };
            let put = self.store.put(&self.name, body, self.instead).await?;
            return Ok((put, summary));
        };
        if !body.is_empty() {
            upload.send(body).await?;
        }
        upload.complete().await
    }
}

/// Parts of an object that is not one yet. Dropped before it is over, it is aborted.
#[derive(Debug)]
struct Upload {
    store: S3,
    name: String,
    instead: Option<Version>,
    id: String,
    writer: String,
    /// How many have been sent.
    parts: usize,
    whole: ObjectSummary,
    sending: JoinSet<Result<CompletedPart, StoreError>>,
    stored: Vec<CompletedPart>,
    /// It was completed or aborted.
    over: bool,
}

impl Upload {
    async fn begin(store: &S3, name: &str, instead: Option<Version>) -> Result<Self, StoreError> {
        let writer = draw();
        let request = store
            .client
            .create_multipart_upload()
            .bucket(store.bucket())
            .key(store.key(name))
            .metadata(WRITER, &writer)
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .checksum_type(ChecksumType::FullObject)
            .set_server_side_encryption(store.encryption())
            .set_ssekms_key_id(store.kms_key());
        let begun = Box::pin(request.send())
            .await
            .map_err(|error| store.refused(StoreOperation::Write, name, &error))?;
        let Some(id) = begun.upload_id else {
            return Err(store.foreign(StoreOperation::Write, name, "the answer names no upload"));
        };
        Ok(Self {
            store: store.clone(),
            name: name.to_owned(),
            instead,
            id,
            writer,
            parts: 0,
            whole: ObjectSummary::default(),
            sending: JoinSet::new(),
            stored: Vec::new(),
            over: false,
        })
    }

    /// Sends a part as soon as there is room for it among those on their way.
    async fn send(&mut self, body: Bytes) -> Result<(), StoreError> {
        if self.parts == PARTS_MAX {
            return Err(StoreError::TooLarge {
                object: self.store.url(&self.name),
                bytes: self.whole.bytes,
            });
        }
        while self.sending.len() >= at_once(body.len()) {
            self.wait_for_one().await?;
        }
        let crc = crc32c::crc32c(&body);
        self.whole = ObjectSummary {
            bytes: self.whole.bytes + body.len() as u64,
            crc32c: crc32c::crc32c_combine(self.whole.crc32c, crc, body.len()),
        };
        self.parts += 1;
        let number = i32::try_from(self.parts).expect("it is not above PARTS_MAX");
        let (store, name) = (self.store.clone(), self.name.clone());
        // All of them share one line.
        let deadline = patience(time_to_send(body.len() * at_once(body.len())));
        let request = store
            .client
            .upload_part()
            .bucket(store.bucket())
            .key(store.key(&name))
            .upload_id(&self.id)
            .part_number(number)
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .checksum_crc32_c(written_crc(crc))
            .body(body.into())
            .customize()
            .config_override(deadline);
        self.sending.spawn(async move {
            let stored = request
                .send()
                .await
                .map_err(|error| store.refused(StoreOperation::Write, &name, &error))?;
            // The whole is looked at in the end; a part that was never stored is noticed now, before it is completed.
            // One that does not tell the checksum has to name the request at least: a page has an ETag like any page.
            let other = match stored.checksum_crc32_c() {
                Some(said) => said != written_crc(crc),
                None => stored.request_id().is_none(),
            };
            if stored.e_tag.is_none() || other {
                return Err(store.foreign(
                    StoreOperation::Write,
                    &name,
                    "a part without ETag, or with another checksum",
                ));
            }
            Ok(CompletedPart::builder()
                .part_number(number)
                .set_e_tag(stored.e_tag)
                .checksum_crc32_c(written_crc(crc))
                .build())
        });
        Ok(())
    }

    async fn wait_for_one(&mut self) -> Result<(), StoreError> {
        match self.sending.join_next().await {
            None => {}
            // Only dropping the upload, or the runtime, cancels its tasks.
            Some(stored) => self.stored.push(ended(stored).await?),
        }
        Ok(())
    }

    async fn complete(&mut self) -> Result<(Put, ObjectSummary), StoreError> {
        while !self.sending.is_empty() {
            self.wait_for_one().await?;
        }
        let mut parts = mem::take(&mut self.stored);
        parts.sort_unstable_by_key(CompletedPart::part_number);
        let (none, same) = condition(self.instead.clone());
        let request = self
            .store
            .client
            .complete_multipart_upload()
            .bucket(self.store.bucket())
            .key(self.store.key(&self.name))
            .upload_id(&self.id)
            .set_if_none_match(none)
            .set_if_match(same)
            .checksum_type(ChecksumType::FullObject)
            .checksum_crc32_c(written_crc(self.whole.crc32c))
            .set_mpu_object_size(i64::try_from(self.whole.bytes).ok())
            .multipart_upload(
                CompletedMultipartUpload::builder()
                    .set_parts(Some(parts))
                    .build(),
            )
            .customize()
            .config_override(patience(COMPLETE_WITHIN));
        let put = match Box::pin(request.send()).await {
            Ok(answer) => {
                let receipt = (answer.e_tag(), answer.checksum_crc32_c());
                let stored = self
                    .store
                    .stored(&self.name, &self.writer, receipt, self.whole);
                stored.await?
            }
            // The upload is gone when an attempt whose answer was lost has completed it.
            Err(error) if is_taken(&error) || is_gone(&error) => {
                self.store.whose(&self.name, &self.writer).await?
            }
            // What was to be replaced.
            Err(error) if is_missing(&error) => return Err(self.store.gone(&self.name)),
            Err(error) => {
                return Err(self
                    .store
                    .refused(StoreOperation::Write, &self.name, &error));
            }
        };
        self.over = put == Put::Created;
        Ok((put, self.whole))
    }

    /// Ends it without an object.
    fn abort(&mut self) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        self.over = true;
        let mut sending = mem::take(&mut self.sending);
        let (store, name) = (self.store.clone(), self.name.clone());
        let request = self
            .store
            .client
            .abort_multipart_upload()
            .bucket(self.store.bucket())
            .key(self.store.key(&self.name))
            .upload_id(&self.id)
            .customize()
            .interceptor(OnlyS3);
        async move {
            // A part that arrives after the end of its upload is kept, and paid for.
            sending.shutdown().await;
            match Box::pin(request.send()).await {
                Err(error) if !is_gone(&error) => {
                    Err(store.refused(StoreOperation::Write, &name, &error))
                }
                _ => Ok(()),
            }
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        if self.over {
            return;
        }
        let aborting = self.abort();
        let aborting = async move {
            if let Err(error) = aborting.await {
                tracing::warn!(%error, "unfinished upload not aborted");
            }
        };
        self.store.place.background.spawn_on(aborting, &runtime);
    }
}

/// How many parts of this size may be on their way.
fn at_once(part: usize) -> usize {
    (SENDING_BYTES / part.max(1)).clamp(1, 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_so_that_ten_thousand_hold_hundreds_of_gigabytes() {
        assert_eq!(part_bytes(0), 8 << 20);
        assert_eq!(part_bytes(999), 8 << 20);
        let all: usize = (0..PARTS_MAX).map(part_bytes).sum();
        assert_eq!(all >> 30, 429);
        let most = (0..PARTS_MAX)
            .map(part_bytes)
            .map(|part| part * (1 + at_once(part)));
        assert_eq!(most.max(), Some(160 << 20));
        assert_eq!(at_once(PART_BYTES), 4);
    }
}
