//! A source that is read-only for maintenance: `default_transaction_read_only = on` for the server, the database or our role.
//!
//! That is a default, which sessions of ours set for themselves like every other setting: heartbeats go on, and so the lag stays
//! true. It is said, because whoever set it may want to know that something still writes. A source that takes no write at all, a
//! standby for a moment, is no reason either to end a stream that works.

use tokio_postgres::Client;

use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, Session};

/// Whether the source takes writes, as last seen.
#[derive(Debug, Default)]
pub(super) struct Writable {
    refused: bool,
    read_only: bool,
}

impl Writable {
    /// Takes the outcome of a write to an in-band table, and says whether it was written: one that the source refuses as
    /// read-only is said once and left out.
    pub(super) fn after(
        &mut self,
        stream: &StreamName,
        outcome: Result<(), PgError>,
    ) -> Result<bool, PgError> {
        match outcome {
            Err(error) if error.sqlstate() == Some("25006") => {
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::warn!(
                        %stream, %error,
                        "the source takes no heartbeat; changes are replicated, and the lag is unknown until it does"
                    );
                }
                Ok(false)
            }
            Ok(()) => {
                if std::mem::take(&mut self.refused) {
                    tracing::info!(%stream, "the source takes heartbeats again");
                }
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// Looks what a session finds that does not say for itself whether it writes.
    pub(super) async fn look(&mut self, conninfo: &ConnInfo, stream: &StreamName) {
        let session = Session::new(stream.application_name("monitor"))
            .as_found("default_transaction_read_only");
        // A source that has no session left for this is no reason to end one that works.
        let Ok(client) = pg::connect(conninfo, &session).await else {
            return;
        };
        match set_by(&client).await {
            Ok(Some(by)) if !std::mem::replace(&mut self.read_only, true) => tracing::warn!(
                %stream,
                "the source is read-only for its users (default_transaction_read_only = on, set by {by}); heartbeats are still \
                 written, and replication goes on"
            ),
            Ok(None) if std::mem::take(&mut self.read_only) => {
                tracing::info!(%stream, "the source is not read-only any more");
            }
            Ok(_) | Err(_) => {}
        }
    }
}

/// Where `default_transaction_read_only = on` comes from.
async fn set_by(client: &Client) -> Result<Option<String>, PgError> {
    const SQL: &str = "
        SELECT source FROM pg_catalog.pg_settings WHERE name = 'default_transaction_read_only' AND setting = 'on'";
    let row = client.query_typed_opt(SQL, &[]).await?;
    Ok(row.map(|row| row.get(0)))
}
