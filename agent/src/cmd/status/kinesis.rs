//! What `dr-agent status` says of the Kinesis stream: whether it is active, and how long it keeps records.
//!
//! # Invariants
//! - One description of each stream, which reads no record and takes nothing from those who read.
//! - What was not learnt is `None`, with the error beside it.
//!
//! # What it does not do
//! It does not say how much of the stream waits to be applied: to know that it would have to be read. The agent beside the
//! replica reads it, and its lag says so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::time::timeout;

use super::view::{DatabaseOverview, KinesisStatus};
use crate::cloud::kinesis::{Kinesis, KinesisError, StreamSummary};
use crate::config::Config;
use crate::error::{Classify as _, chain};

/// For one stream.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Streams that are asked for at the same time; AWS allows few descriptions in a second.
const AT_A_TIME: usize = 4;

/// Asks for the streams of these databases; under route `direct` there are none.
pub(super) async fn add(config: &Config, databases: &mut [DatabaseOverview]) {
    let name = |status: &DatabaseOverview| config.route.kinesis_stream(&status.database);
    let names: BTreeSet<String> = databases.iter().filter_map(name).collect();
    let asked: BTreeMap<String, KinesisStatus> = stream::iter(names)
        .map(|stream| async move {
            let status = ask(&stream).await;
            (stream, status)
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    for status in databases {
        status.kinesis = name(status).and_then(|stream| asked.get(&stream).cloned());
    }
}

async fn ask(stream: &str) -> KinesisStatus {
    let mut status = KinesisStatus {
        stream: stream.to_owned(),
        ..KinesisStatus::default()
    };
    match timeout(ANSWER_WITHIN, Box::pin(describe(stream))).await {
        Ok(Ok(summary)) => {
            status.active = Some(summary.active);
            status.open_shards = Some(summary.open_shards);
            status.retention_hours = Some(summary.retention.as_secs() / 3600);
        }
        Ok(Err(error)) => {
            status.error = Some(chain(&error));
            status.hint = error.hint();
        }
        Err(_) => status.error = Some(format!("no answer within {ANSWER_WITHIN:?}")),
    }
    status
}

async fn describe(stream: &str) -> Result<StreamSummary, KinesisError> {
    Kinesis::open(stream).await?.describe().await
}
