//! The session that exports a snapshot: a walsender that creates a temporary slot and then stays idle.
//!
//! Used by the set-up and by base backups. The slot goes with the session.

use crate::names::stream::StreamName;
use crate::pg::replication::{CreatedSlot, ReplicationConnection, SlotOptions};
use crate::pg::{ConnInfo, PgError, Session};

/// Opens it. The snapshot lives until the session's next command, or its end.
pub(crate) async fn session(
    conninfo: &ConnInfo,
    application_name: String,
) -> Result<ReplicationConnection, PgError> {
    let session = Session::new(application_name);
    ReplicationConnection::connect(conninfo, &session).await
}

/// Creates a temporary slot and exports its snapshot; waits for the transactions then running.
pub(crate) async fn snapshot(
    exporter: &mut ReplicationConnection,
    stream: &StreamName,
) -> Result<CreatedSlot, PgError> {
    let options = SlotOptions {
        temporary: true,
        failover: false,
        export_snapshot: true,
    };
    exporter.create_slot(&temporary_slot(stream), options).await
}

/// A name nobody has used: a session that died may still hold its temporary slot for a while.
fn temporary_slot(stream: &StreamName) -> String {
    const STREAM_BYTES_MAX: usize = 63 - 9;
    let stream = stream.as_str();
    let stream = &stream[..stream.len().min(STREAM_BYTES_MAX)];
    format!("{stream}_{:08x}", rand::random::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_slots_have_names_that_fit_and_differ() {
        let stream = StreamName::new("dr_agent", &"x".repeat(60));
        let (a, b) = (temporary_slot(&stream), temporary_slot(&stream));
        assert!(a.len() <= 63 && a != b);
    }
}
