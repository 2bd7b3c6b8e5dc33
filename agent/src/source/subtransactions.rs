//! Asks the source which subtransactions of a committed transaction were rolled back.
//!
//! pgoutput is meant to say so itself (Stream Abort), and PostgreSQL does not always: when its reorder buffer
//! had to write a subtransaction to disk after all (a row with TOASTed values was half decoded when
//! `logical_decoding_work_mem` ran out), streams it from there and finds it rolled back later, it forgets that
//! it has sent any of it. Observed on 15.18: 1392 rows of a rolled back savepoint, and no Stream Abort.
//! Applied, they would be rows that the source never had.
//!
//! # Invariants
//! - Only a server that has come past the transaction's commit is believed: there the fate of each
//!   subtransaction is settled, because its rollback precedes that commit in the WAL.
//! - An answer that is no answer is an error, never a guess.
//!
//! # What it does not do
//! It asks nothing for transactions without subtransactions, nor for those that came in one piece:
//! what was rolled back is never part of these.

use crate::pg::{self, ConnInfo, PgError, PgLsn, Session};

use super::SourceError;

/// So many subtransactions are asked about at a time.
const CHUNK: usize = 10_000;

/// `$1`: subtransactions as the 32 bits they travel in; `$2`: end of their transaction's commit.
///
/// The 32 bits are of the number nearest to the next one to be given out. `aborted` is also what a
/// transaction shows that a crash ended; `in progress` is one whose backend waits, after its commit record,
/// for a synchronous standby: then it has committed.
const ASK: &str = "
    WITH next AS (
        SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint AS xid
    ), asked AS (
        SELECT sub,
               pg_catalog.pg_xact_status(
                   (next.xid + ((sub - next.xid + 2147483648) & 4294967295) - 2147483648)::text::xid8
               ) AS status
          FROM next, pg_catalog.unnest($1::bigint[]) AS sub
    )
    SELECT sub, status FROM asked WHERE status IS NULL OR status NOT IN ('committed', 'in progress')";

const PAST: &str = "
    SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                ELSE pg_catalog.pg_current_wal_flush_lsn() END >= $1::text::pg_lsn";

/// Those of `subtransactions` that were rolled back; their transaction's commit ends at `end_lsn`.
pub(super) async fn rolled_back(
    conninfo: &ConnInfo,
    session: &Session,
    subtransactions: &[u32],
    end_lsn: PgLsn,
) -> Result<Vec<u32>, SourceError> {
    let client = pg::connect(conninfo, session).await?;
    let end_lsn = end_lsn.to_string();
    let row = client
        .query_one(PAST, &[&end_lsn])
        .await
        .map_err(PgError::from)?;
    if !row.get::<_, Option<bool>>(0).unwrap_or(false) {
        return Err(SourceError::Behind { end_lsn });
    }
    let mut rolled_back = Vec::new();
    for chunk in subtransactions.chunks(CHUNK) {
        let asked: Vec<i64> = chunk.iter().copied().map(i64::from).collect();
        for row in client.query(ASK, &[&asked]).await.map_err(PgError::from)? {
            let subxid = row.get::<_, i64>(0);
            if row.get::<_, Option<&str>>(1) != Some("aborted") {
                return Err(SourceError::UnknownFate { subxid });
            }
            rolled_back.extend(u32::try_from(subxid));
        }
    }
    Ok(rolled_back)
}
