//! Sessions that a killed agent left behind on a server.
//!
//! A backend notices the end of its client only when it next reads or writes: until then it goes on with
//! what it was sent, and holds its locks. Who begins anew ends it first.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::PgError;

/// A backend that does not end within this long is stuck in the kernel.
const DEADLINE: Duration = Duration::from_secs(30);

/// Ends other sessions of this name and of the same role in this database and waits until they are gone. Says whether there were
/// any.
///
/// # Errors
/// [`PgError::Timeout`] where they do not end.
pub async fn end_sessions(client: &Client, application_name: &str) -> Result<bool, PgError> {
    const OTHERS: &str = "
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE application_name = $1 AND datname = current_database()
           AND usename = current_user AND pid <> pg_backend_pid()";
    let ended = async {
        let mut any = false;
        loop {
            let asked = client
                .query_typed_one(OTHERS, &[(&application_name, Type::TEXT)])
                .await?;
            let left: i64 = asked.get(0);
            if left == 0 {
                return Ok(any);
            }
            any = true;
            tracing::debug!(
                left,
                application_name,
                "ending sessions of an earlier agent"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    match tokio::time::timeout(DEADLINE, ended).await {
        Ok(result) => result,
        Err(_) => Err(PgError::Timeout {
            doing: "end the sessions of an earlier agent",
            after: DEADLINE,
        }),
    }
}
