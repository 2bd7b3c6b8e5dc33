//! Kinesis streams as an operator makes and changes them, on either stand-in: by plain requests, without the SDK.
//!
//! # Invariants
//! - Every function returns when the stream is ACTIVE again.
//! - A stand-in that refuses fails the test with its words.
//!
//! # What it does not do
//! It reads and writes no records; the agent does.

use serde_json::{Value, json};

use crate::http;
use crate::wait::{PATIENCE, wait_for, wait_until};

/// A shard of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// `shardId-000000000000`
    pub id: String,
    /// Its first hash key.
    pub start: u128,
    /// Its last hash key.
    pub end: u128,
    /// It takes records.
    pub open: bool,
}

/// Creates a stream.
pub async fn create(port: u16, stream: &str, shards: u32) {
    ask(
        port,
        "CreateStream",
        &json!({"StreamName": stream, "ShardCount": shards}),
    )
    .await;
    active(port, stream).await;
}

/// Deletes a stream, with all of its records.
pub async fn delete(port: u16, stream: &str) {
    ask(port, "DeleteStream", &json!({"StreamName": stream})).await;
    wait_until("the stream to be gone", PATIENCE, || async {
        let answer = ask(port, "ListStreams", &json!({})).await;
        !answer["StreamNames"]
            .to_string()
            .contains(&format!("\"{stream}\""))
    })
    .await;
}

/// All shards, in the order of their making.
pub async fn shards(port: u16, stream: &str) -> Vec<Shard> {
    let answer = ask(port, "ListShards", &json!({"StreamName": stream})).await;
    let text = |value: &Value| value.as_str().expect("it is text").to_owned();
    let key = |value: &Value| text(value).parse().expect("a hash key is a number");
    let shards = answer["Shards"].as_array().expect("it is a list");
    shards
        .iter()
        .map(|shard| Shard {
            id: text(&shard["ShardId"]),
            start: key(&shard["HashKeyRange"]["StartingHashKey"]),
            end: key(&shard["HashKeyRange"]["EndingHashKey"]),
            open: shard["SequenceNumberRange"]["EndingSequenceNumber"].is_null(),
        })
        .collect()
}

/// Splits a shard in the middle.
pub async fn split(port: u16, stream: &str, shard: &Shard) {
    let middle = shard.start + (shard.end - shard.start) / 2;
    let request = json!({
        "StreamName": stream,
        "ShardToSplit": shard.id,
        "NewStartingHashKey": middle.to_string(),
    });
    ask(port, "SplitShard", &request).await;
    active(port, stream).await;
}

/// Makes one shard of two neighbours, the one with lower hash keys first.
pub async fn merge(port: u16, stream: &str, lower: &Shard, upper: &Shard) {
    assert_eq!(lower.end + 1, upper.start, "they are no neighbours");
    let request = json!({
        "StreamName": stream,
        "ShardToMerge": lower.id,
        "AdjacentShardToMerge": upper.id,
    });
    ask(port, "MergeShards", &request).await;
    active(port, stream).await;
}

/// Keeps records for so many hours, more than before.
pub async fn keep(port: u16, stream: &str, hours: u32) {
    let request = json!({"StreamName": stream, "RetentionPeriodHours": hours});
    ask(port, "IncreaseStreamRetentionPeriod", &request).await;
    active(port, stream).await;
}

/// Encrypts what comes from now on. Only moto knows that.
pub async fn encrypt(port: u16, stream: &str, key: &str) {
    let request = json!({"StreamName": stream, "EncryptionType": "KMS", "KeyId": key});
    ask(port, "StartStreamEncryption", &request).await;
    active(port, stream).await;
}

/// The open shards, by their hash keys: neighbours stand together.
pub async fn open_shards(port: u16, stream: &str) -> Vec<Shard> {
    let mut open = shards(port, stream).await;
    open.retain(|shard| shard.open);
    open.sort_unstable_by_key(|shard| shard.start);
    open
}

async fn active(port: u16, stream: &str) {
    wait_for("the stream to be ACTIVE", PATIENCE, || async {
        let request = json!({"StreamName": stream});
        let answer = ask(port, "DescribeStreamSummary", &request).await;
        let status = &answer["StreamDescriptionSummary"]["StreamStatus"];
        if status == "ACTIVE" {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
}

/// One request; the answer is `null` where there is nothing to say.
async fn ask(port: u16, operation: &str, body: &Value) -> Value {
    let target = format!("Kinesis_20131202.{operation}");
    let answer = http::send(
        port,
        "POST",
        "/",
        &[
            ("Content-Type", "application/x-amz-json-1.1"),
            ("X-Amz-Target", &target),
            ("X-Amz-Date", "20260101T000000Z"),
            // Nobody looks at the signature; moto takes the region from here.
            (
                "Authorization",
                "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/kinesis/aws4_request, \
                 SignedHeaders=host, Signature=0",
            ),
        ],
        &body.to_string(),
    )
    .await
    .expect("the stand-in answers");
    assert_eq!(answer.status, 200, "{operation}: {answer:?}");
    if answer.body.is_empty() {
        return Value::Null;
    }
    serde_json::from_str(&answer.body).expect("an answer is JSON")
}
