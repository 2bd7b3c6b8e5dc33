//! What the types of a described relation are made of: asked of the source when the stream first needs it.
//!
//! A type's definition does not change once a column is of it; what changes a column gives it another type, with another OID. So
//! what the catalog says later holds for the place in the stream as well, for as long as the type is there.
//!
//! # Invariants
//! - A type that is not there was dropped since, or its transaction, which is sent while it runs, has not committed. In that
//!   case the transaction's end shows it, and it is read once more ([`SourceError::NewType`]).
//!
//! # What it does not do
//! It asks nothing about what is known from the start of the session, which is every type that a table had then.

use std::collections::HashMap;
use std::sync::Arc;

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

/// Asks the source; what it does not have is not in the answer.
pub(super) async fn ask(
    conninfo: &ConnInfo,
    session: &Session,
    oids: &[u32],
) -> Result<HashMap<u32, String>, SourceError> {
    let sql = format!(
        "SELECT asked.oid, {} FROM pg_catalog.unnest($1::oid[]) AS asked (oid)",
        made_of("asked.oid")
    );
    let client = pg::connect(conninfo, session).await?;
    let rows = client.query_typed(&sql, &[(&oids, Type::OID_ARRAY)]).await;
    let rows = rows.map_err(PgError::from)?;
    let found = rows
        .iter()
        .filter_map(|row| Some((row.get(0), row.get::<_, Option<String>>(1)?)));
    Ok(found.collect())
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
