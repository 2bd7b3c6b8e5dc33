//! Whether a stream lets itself be read and written, found out by reading one record and writing none.
//!
//! # Invariants
//! - Nothing is put: [`Kinesis::try_putting`] sends a record with a hash key beyond the last one, which belongs to no
//!   shard of any stream. Where something else than Kinesis takes it all the same, that is said.
//! - Of each question one attempt is made.
//!
//! # What it does not do
//! It proves no right to use the KMS key for writing: a record that is refused is not encrypted. That Kinesis looks at
//! rights before it looks at a record is how it answers, and is not promised by its reference: what is refused is
//! refused for sure, and what is let in is so by all that can be seen without writing.

use aws_sdk_kinesis::error::ProvideErrorMetadata as _;
use aws_sdk_kinesis::primitives::Blob;
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, ShardIteratorType};

use super::{Kinesis, KinesisError, KinesisOperation, Refusal};

/// 2^128: hash keys end one before it. As many digits as the last, so that it has the form of one.
const NO_HASH_KEY: &str = "340282366920938463463374607431768211456";

/// What is said of a record that cannot be.
const BAD_RECORD: &str = "InvalidArgumentException";

/// The first shard of a stream, asked for where shards may not be listed.
const FIRST_SHARD: &str = "shardId-000000000000";

impl Kinesis {
    /// Lists the shards and reads a record of one; returns what was refused.
    pub async fn try_reading(&self) -> Vec<KinesisError> {
        let mut refused = Vec::new();
        let shard = match self.list_shards().await {
            Ok(shards) => shards.into_iter().next_back(),
            Err(error) if error.refusal() == Some(Refusal::Denied) => {
                refused.push(error);
                None
            }
            Err(error) => return vec![error],
        };
        let request = self.client.get_shard_iterator();
        let request = request
            .stream_name(self.stream())
            .shard_id(shard.as_deref().unwrap_or(FIRST_SHARD))
            .shard_iterator_type(ShardIteratorType::TrimHorizon);
        let iterator = match Box::pin(request.send()).await {
            Ok(answer) => answer.shard_iterator,
            Err(error) => {
                let error = self.refused(KinesisOperation::GetShardIterator, &error);
                // A shard that is not there was looked for: that is allowed.
                let guessed = shard.is_none() && error.refusal() == Some(Refusal::NoStream);
                if !guessed {
                    refused.extend(is_in_the_way(error));
                }
                None
            }
        };
        if let Some(iterator) = iterator {
            let request = self.client.get_records().shard_iterator(iterator).limit(1);
            if let Err(error) = Box::pin(request.send()).await {
                refused.extend(is_in_the_way(
                    self.refused(KinesisOperation::GetRecords, &error),
                ));
            }
        }
        refused
    }

    /// Puts a record that no shard can take.
    ///
    /// # Errors
    /// Whatever is said of anything but the record.
    pub async fn try_putting(&self) -> Result<(), KinesisError> {
        let record = PutRecordsRequestEntry::builder()
            .partition_key("check")
            .explicit_hash_key(NO_HASH_KEY)
            .data(Blob::new(Vec::new()))
            .build()
            .expect("it has data and a key");
        let request = self.client.put_records().stream_name(self.stream());
        let answer = match Box::pin(request.records(record).send()).await {
            Ok(answer) => answer,
            Err(error) if error.code() == Some(BAD_RECORD) => return Ok(()),
            Err(error) => {
                let error = self.refused(KinesisOperation::PutRecords, &error);
                return is_in_the_way(error).map_or(Ok(()), Err);
            }
        };
        let said = answer.records.first();
        match said.and_then(|said| said.error_code()) {
            Some(BAD_RECORD) => Ok(()),
            Some(code) => {
                let message = said.and_then(|said| said.error_message());
                let error = self.refused_record(code, message.unwrap_or_default());
                is_in_the_way(error).map_or(Ok(()), Err)
            }
            None => Err(KinesisError::Record {
                stream: self.stream().to_owned(),
                reason: "a record with a hash key that no shard has was taken: this is not Kinesis; readers ignore the \
                         record"
                    .to_owned(),
            }),
        }
    }
}

/// Who is told to come back later was let in.
fn is_in_the_way(error: KinesisError) -> Option<KinesisError> {
    (error.refusal() != Some(Refusal::Throttled)).then_some(error)
}
