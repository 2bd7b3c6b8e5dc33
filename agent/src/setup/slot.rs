//! The slot of a stream, and the snapshots that tables are copied at.
//!
//! ```text
//! note that a history begins ▶ create the slot ▶ touch the publication ▶ temporary slot: a snapshot ▶ move the slot there
//!                            ▶ note where it begins
//! ```
//!
//! A slot does not begin where it is created, because PostgreSQL (14 to 18, all minor releases up to now) decodes the first
//! transactions of a new slot by a catalog that may lack what was committed while the slot was being built: rows of a table
//! that was truncated then cannot be mapped to it (`could not map filenode … to relation OID`), and rows of one that was altered
//! are decoded by its old columns, without an error. Source: pgsql-hackers, "Fix logical decoding not track transaction during
//! SNAPBUILD_BUILDING_SNAPSHOT", 2025-11-22. The wrong catalog is replaced when a transaction that alters the catalog commits,
//! for every transaction that begins afterwards. Touching the publication is such a transaction; the second slot is built when
//! all those have ended that began before; and the first one goes on from there.
//!
//! # Invariants
//! - What is decoded from [`create`]'s slot began when its catalog was right.
//! - Killed in between, the slot is there and nothing says yet that it may be gone on with: the next start drops it. Killed
//!   behind the note, the next start begins with it.
//! - A history begins before its slot is there, so no slot is taken for one of a history before.

use super::error::{SetupError, Side};
use super::source_side::SourceSide;
use super::{source, source_side};
use crate::catalog::publication;
use crate::copy::export;
use crate::names::history::Cluster;
use crate::names::history::History;
use crate::pg::replication::{CreatedSlot, ReplicationConnection, SlotOptions};
use crate::pg::slot;
use crate::schema::stream::Recorded;
use crate::schema::{listing, sending};

/// Writing `dr_agent.sending`.
const NOTE: &str = "note what becomes of the slot";

/// Begins a history: from here on, no slot that is there may be gone on with.
pub(super) async fn begin(
    source: &SourceSide<'_>,
    cluster: &Cluster,
) -> Result<History, SetupError> {
    let began = sending::begin(&source.client, &source.stream, cluster)
        .await
        .map_err(SetupError::sql(Side::Source, NOTE))?;
    let cluster = *cluster;
    Ok(Recorded { cluster, began }.history())
}

/// Creates the stream's slot; it begins at the snapshot that is returned, which lives until the session's next command.
pub(super) async fn create(
    source: &SourceSide<'_>,
    walsender: &mut ReplicationConnection,
    drop_slot: bool,
) -> Result<CreatedSlot, SetupError> {
    let name = source.stream.as_str();
    if drop_slot {
        drop(walsender, name, "drop the slot of an interrupted set-up").await?;
    }
    if !source.found.owns_publication {
        return Err(source.found.publication_is_not_ours(&source.stream));
    }
    let options = SlotOptions {
        temporary: false,
        failover: true,
        export_snapshot: false,
    };
    while_wanted(source, walsender.create_slot(name, options)).await?;
    touch(source).await?;
    let snapshot = snapshot(source, walsender).await?;
    slot::advance(&source.client, name, snapshot.consistent_point)
        .await
        .map_err(SetupError::sql(Side::Source, "move the replication slot"))?;
    sending::created(&source.client, &source.stream, snapshot.consistent_point)
        .await
        .map_err(SetupError::sql(Side::Source, NOTE))?;
    Ok(snapshot)
}

/// Exports the snapshot of a temporary slot, which has the session's life.
pub(super) async fn snapshot(
    source: &SourceSide<'_>,
    walsender: &mut ReplicationConnection,
) -> Result<CreatedSlot, SetupError> {
    while_wanted(source, export::snapshot(walsender, &source.stream)).await
}

/// Makes sure that what is decoded from now on goes by the list of tables as it is, also if it was altered by a start that
/// died before.
pub(super) async fn make_the_list_known(
    source: &SourceSide<'_>,
    walsender: &mut ReplicationConnection,
) -> Result<(), SetupError> {
    if !source.found.forgets_publication_changes()
        || !source_side::is_listing(&source.client, &source.stream).await?
    {
        return Ok(());
    }
    // Every transaction that began before the tables were listed has ended once a slot could be built; what is decoded
    // after the next alteration looks the publication up anew.
    let name = snapshot(source, walsender).await?.name;
    drop(walsender, &name, "drop a temporary slot").await?;
    touch(source).await?;
    sending::list_is_known(&source.client, &source.stream)
        .await
        .map_err(SetupError::sql(Side::Source, NOTE))
}

async fn drop(
    walsender: &mut ReplicationConnection,
    name: &str,
    doing: &str,
) -> Result<(), SetupError> {
    let dropped = walsender.drop_slot(name).await;
    dropped.map_err(SetupError::sql(Side::Source, doing))
}

async fn touch(source: &SourceSide<'_>) -> Result<(), SetupError> {
    let stream = &source.stream;
    // What somebody else altered before counts; this alteration does not.
    let touch = format!(
        "BEGIN;\n{};\n{};\n{};\nCOMMIT",
        listing::note(stream),
        publication::touch(stream, source.found.version),
        listing::acknowledge(stream)
    );
    source::execute(&source.client, Side::Source, &[touch]).await
}

/// Creating a slot waits for the transactions then running, as long as nobody stops the agent.
async fn while_wanted(
    source: &SourceSide<'_>,
    creating: impl Future<Output = Result<CreatedSlot, crate::pg::PgError>>,
) -> Result<CreatedSlot, SetupError> {
    source
        .cancel
        .run_until_cancelled(creating)
        .await
        .ok_or(SetupError::Stopped)?
        .map_err(SetupError::sql(Side::Source, "create a replication slot"))
}
