//! Triggers and rules that would act on replicated changes wait for the promotion, and whoever watches the copy is told.

use tokio_postgres::Client;

use super::error::CopyError;
use super::progress::CopyObserver;
use crate::names::stream::StreamName;
use crate::schema::{self, deferred, firing};

/// Quiets the replica's triggers, rules and event triggers.
pub(crate) async fn quiet(
    replica: &Client,
    stream: &StreamName,
    observer: &dyn CopyObserver,
) -> Result<(), CopyError> {
    // A base backup may be loaded where nothing is replicated.
    let keeps = schema::has(replica, &[deferred::TABLE]).await;
    let keeps = keeps.map_err(CopyError::replica("look for schema dr_agent"))?;
    let quieted = firing::quiet(replica, keeps.then_some(stream)).await;
    for what in quieted.map_err(CopyError::replica("quiet a trigger"))? {
        super::leave_out(observer, &what);
    }
    Ok(())
}
