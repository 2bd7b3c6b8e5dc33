//! Opens the sessions of the check: read-only, bounded in time, named after their purpose.
//!
//! # Invariants
//! - `check` changes nothing: its sessions are read-only.
//! - No server can hold it up: connecting, every statement and every lock have a limit.

use std::time::Duration;

use tokio_postgres::Client;

use super::finding::{Finding, FindingPlace};
use super::settings::unreachable;
use crate::pg::{self, ConnInfo, PgError, Session};

/// Longer than a distant server's TLS and password exchange, shorter than a person's patience.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(15);

/// Opens a session, or says why that is not possible.
pub(super) async fn session(
    at: &FindingPlace,
    conninfo: &ConnInfo,
    name: &str,
) -> Result<Client, Finding> {
    let session = Session::new(name)
        .set("statement_timeout", "30s")
        .set("lock_timeout", "5s");
    let opening = async {
        let client = pg::connect_silently(conninfo, session).await?;
        // Not in the start-up packet: a server would then not be what target_session_attrs=read-write asks for.
        client
            .batch_execute("SET default_transaction_read_only = on")
            .await?;
        Ok(client)
    };
    within(opening)
        .await
        .map_err(|error| unreachable(at, &error))
}

/// Ends an attempt to connect that takes too long.
pub(super) async fn within<T>(
    attempt: impl Future<Output = Result<T, PgError>>,
) -> Result<T, PgError> {
    let timeout = tokio::time::timeout(CONNECT_TIME_MAX, attempt);
    match Box::pin(timeout).await {
        Ok(result) => result,
        Err(_) => Err(PgError::Timeout {
            doing: "connect",
            after: CONNECT_TIME_MAX,
        }),
    }
}
