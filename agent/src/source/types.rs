//! What the types of a described relation are made of: asked of the source when the stream first needs it.
//!
//! A type's definition does not change once a column is of it; what changes a column gives it another type, with another OID. So
//! what the catalog says later holds for the place in the stream as well, for as long as the type is there.
//!
//! # Invariants
//! - A type that is not there was dropped since; or its transaction is sent while it still runs, and its end shows that it is to be
//!   read once more ([`SourceError::NewType`]); or it has committed and is not seen yet, which is waited for: the walsender sends what
//!   is in the WAL, and a commit is there before other sessions see it.
//!
//! # What it does not do
//! It asks nothing about what is known from the start of the session, which is every type that a table had then.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::types::Type;

use super::SourceError;
use crate::pg::made_of::made_of;
use crate::pg::{self, ConnInfo, PgError, Session};

/// What is known, by OID.
pub type MadeOf = Arc<HashMap<u32, String>>;

/// Types that a running transaction may have created.
#[derive(Debug, Default)]
pub(super) struct Types {
    known: MadeOf,
    unseen: Vec<(u32, u32)>,
}

impl Types {
    pub(super) fn new(known: MadeOf) -> Self {
        Self {
            known,
            unseen: Vec::new(),
        }
    }

    /// What a type is made of, where that is known.
    pub(super) fn get(&self, oid: u32) -> Option<&String> {
        self.known.get(&oid)
    }

    pub(super) fn know(&mut self, found: HashMap<u32, String>) {
        Arc::make_mut(&mut self.known).extend(found);
    }

    /// Notes that the source has no such type; within a block of that transaction.
    pub(super) fn not_seen(&mut self, xid: Option<u32>, oid: u32) {
        self.unseen.extend(xid.map(|xid| (xid, oid)));
    }

    /// Those that were not seen within this transaction, which has ended.
    pub(super) fn take_unseen(&mut self, xid: u32) -> Vec<u32> {
        let of_it = self.unseen.extract_if(.., |(of, _)| *of == xid);
        of_it.map(|(_, oid)| oid).collect()
    }

    /// All transactions without an end come again.
    pub(super) fn restart(&mut self) {
        self.unseen.clear();
    }
}

/// How long a commit may stay unseen: it may wait for a synchronous standby, which may be waiting for us.
const SEEN_WITHIN: Duration = Duration::from_secs(3);

/// Whether everybody sees the transaction `$1`, in the 32 bits in which it travels: of the number nearest to the next one.
const SEEN: &str = "
    SELECT pg_catalog.pg_visible_in_snapshot(
               (next.xid + (($1::bigint - next.xid + 2147483648) & 4294967295) - 2147483648)::text::xid8,
               pg_catalog.pg_current_snapshot())
      FROM (SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint) AS next (xid)";

/// Asks the source; what it does not have is not in the answer. `committed`: the transaction that may have created them, if it has
/// committed.
pub(super) async fn ask(
    conninfo: &ConnInfo,
    session: &Session,
    oids: &[u32],
    committed: Option<u32>,
) -> Result<HashMap<u32, String>, SourceError> {
    let sql = format!(
        "SELECT asked.oid, {} FROM pg_catalog.unnest($1::oid[]) AS asked (oid)",
        made_of("asked.oid")
    );
    let client = pg::connect(conninfo, session).await?;
    let until = Instant::now() + SEEN_WITHIN;
    loop {
        // Before the question: what it finds then is all there is.
        let seen = match committed {
            Some(xid) => {
                let xid = i64::from(xid);
                let row = client.query_typed_one(SEEN, &[(&xid, Type::INT8)]).await;
                row.map_err(PgError::from)?.get(0)
            }
            None => true,
        };
        let rows = client.query_typed(&sql, &[(&oids, Type::OID_ARRAY)]).await;
        let found: HashMap<u32, String> = rows
            .map_err(PgError::from)?
            .iter()
            .filter_map(|row| Some((row.get(0), row.get::<_, Option<String>>(1)?)))
            .collect();
        if seen || found.len() == oids.len() || Instant::now() > until {
            return Ok(found);
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_seen_belongs_to_its_transaction() {
        let mut types = Types::default();
        for (xid, oid) in [
            (Some(5), 20_001),
            (None, 20_002),
            (Some(6), 20_003),
            (Some(5), 20_004),
        ] {
            types.not_seen(xid, oid);
        }
        assert_eq!(types.take_unseen(5), [20_001, 20_004]);
        assert!(types.take_unseen(5).is_empty());
        types.restart();
        assert!(types.take_unseen(6).is_empty());
    }
}
