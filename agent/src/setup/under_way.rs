//! Commands of the source that the replica has not reached yet: until then a name means different things on the two sides.
//!
//! A table that the source has and the replica has not may be new to the stream, which brings it at its place; one that is another
//! under the same name may have been dropped and created. So nothing is concluded from a comparison of the two sides before
//! everything that is known of the source's commands has arrived.

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use crate::error::chain;
use crate::schema::ddl::{self, EventsSeen};
use crate::schema::fingerprint;

/// The commands that the source knows of, and what no event trigger has told of.
pub(super) async fn of_source(source: &Client) -> Result<EventsSeen, SetupError> {
    if let Err(error) = fingerprint::look_once_more(source).await {
        // It is looked again beside the stream.
        tracing::debug!(error = %chain(&error), "no look at what the source's objects are");
    }
    let seen = ddl::seen(source).await;
    seen.map_err(SetupError::sql(
        Side::Source,
        "look which commands there were",
    ))
}

/// Whether some of them have not arrived.
pub(super) async fn any(source: &Client, replica: &Client) -> Result<bool, SetupError> {
    let there = of_source(source).await?;
    Ok(!have_arrived(&there, replica).await?)
}

/// Whether all of these have arrived, and nothing behind them.
pub(super) async fn have_arrived(there: &EventsSeen, replica: &Client) -> Result<bool, SetupError> {
    let here = ddl::seen(replica).await;
    let here = here.map_err(SetupError::sql(
        Side::Replica,
        "look which commands have arrived",
    ))?;
    Ok(*there == here)
}
