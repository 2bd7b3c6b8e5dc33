//! The shards of the stream, again and again.
//!
//! A task of `read`. A stream is resharded while it is read: what was a shard is closed, and others go on. How a closed
//! shard shows differs, and an open one says nothing about its future; a list says it all.
//!
//! # Invariants
//! - A list is complete: all pages of it, or none.
//! - A new list is asked for every [`EVERY`], and at once when a shard has ended.
//!
//! # What it does not do
//! It does not look at parents and children: all shards are read alike.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use super::read::ReadReport;
use super::retries::Retries;
use super::{Kinesis, KinesisError, KinesisOperation};

/// The watermark of a reader is not newer than its list. (ListShards may be called a thousand times as often.)
const EVERY: Duration = Duration::from_secs(1);

impl Kinesis {
    /// Lists shards until nobody listens, or something needs a person.
    pub(super) async fn keep_listing(
        self,
        reports: mpsc::Sender<ReadReport>,
        ended: Arc<Notify>,
    ) -> Result<(), KinesisError> {
        let mut streak = Retries::default();
        loop {
            let sent = now();
            match self.list_shards().await {
                Ok(shards) => {
                    streak.end();
                    if reports
                        .send(ReadReport::Listed { sent, shards })
                        .await
                        .is_err()
                    {
                        return Ok(());
                    }
                    tokio::select! {
                        () = tokio::time::sleep(EVERY) => {}
                        () = ended.notified() => {}
                    }
                }
                Err(error) => streak.failed(error, None).await?,
            }
        }
    }

    /// The ids of all shards that can be read, closed ones included.
    pub(super) async fn list_shards(&self) -> Result<Vec<String>, KinesisError> {
        let mut shards = Vec::new();
        let mut token: Option<String> = None;
        loop {
            // A token stands for the stream too, and both together are refused.
            let request = match token {
                None => self.client.list_shards().stream_name(self.stream()),
                Some(token) => self.client.list_shards().next_token(token),
            };
            let page = Box::pin(request.send())
                .await
                .map_err(|error| self.refused(KinesisOperation::ListShards, &error))?;
            // A stream has shards; an answer without any is another's.
            let ids = page.shards.filter(|ids| !ids.is_empty());
            let ids = ids.ok_or_else(|| self.incomplete(KinesisOperation::ListShards))?;
            shards.extend(ids.into_iter().map(|shard| shard.shard_id));
            token = page.next_token;
            if token.is_none() {
                return Ok(shards);
            }
        }
    }
}

/// In tests with a paused clock, that clock.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
