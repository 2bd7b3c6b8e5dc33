//! What a killed agent left on the replica: sessions in the middle of a batch, and lanes that it prepared.
//!
//! # Invariants
//! - Runs under the stream's advisory lock and after the slot was found free: no other agent streams.
//! - The sessions are ended first. Only then can nobody move the progress row any more, by which every
//!   prepared lane is committed or rolled back ([`crate::schema::prepared`]); and only then is that row read.

use futures_util::future;
use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::lock;
use super::replica;
use crate::config::Config;
use crate::names::stream::StreamName;
use crate::pg::leftover;
use crate::schema::prepared::{self, Settled};
use crate::schema::progress::Progress;

/// Settles what a session of this process has left that ended.
///
/// # Errors
/// When the replica refuses, or another agent works on the stream: the next start settles it.
pub async fn settle_prepared(config: &Config, database: &str) -> Result<(), SetupError> {
    let stream = config.stream(database);
    let conninfo = config.replica.conninfo.with_dbname(database);
    let client = replica::open(&conninfo, &stream).await?;
    lock::take(&client, Side::Replica, &stream).await?;
    settle(&client, &stream).await?;
    Ok(())
}

/// Settles it; returns the progress row as it is from now on.
pub(super) async fn settle(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<Progress>, SetupError> {
    let application = stream.application_name("apply");
    let ended = SetupError::sql(Side::Replica, "end sessions of an earlier agent");
    let left = SetupError::sql(Side::Replica, "list prepared transactions");
    // Together, because nearly always there was no such session. Where there was, the rest is asked again.
    let (others, known, prepared) = future::join3(
        leftover::end_sessions(client, &application),
        replica::known(client, stream),
        prepared::left_behind(client, stream),
    )
    .await;
    let (known, prepared) = match others.map_err(ended)? {
        false => (known?, prepared.map_err(left)?),
        true => (
            replica::known(client, stream).await?,
            prepared::left_behind(client, stream).await.map_err(left)?,
        ),
    };
    let progress = known.progress;
    if let Some(progress) = progress {
        let settled = prepared::settle_these(client, prepared, progress.batch)
            .await
            .map_err(SetupError::sql(
                Side::Replica,
                "settle prepared transactions",
            ))?;
        if settled != Settled::default() {
            tracing::info!(
                %stream, committed = settled.committed, rolled_back = settled.rolled_back,
                "settled the lanes of a batch that was interrupted"
            );
        }
    }
    Ok(progress)
}
