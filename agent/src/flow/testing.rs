//! Short ways to say LSNs, tables and changes in unit tests.

use std::sync::Arc;

use crate::flow::counts::ChangeCounts;
use crate::flow::transaction::{SourceRelation, Transaction};
use crate::pg::PgLsn;
use crate::pg::pgoutput::{Column, Relation, ReplicaIdentity};

/// An LSN.
pub(crate) fn lsn(n: u64) -> PgLsn {
    PgLsn::from(n)
}

/// A transaction of one insert that ends there, committed in the microsecond of that number.
pub(crate) fn transaction(end: u64) -> Transaction {
    Transaction {
        xid: 1,
        commit_lsn: lsn(end - 1),
        end_lsn: lsn(end),
        commit_time: i64::try_from(end).expect("a small number"),
        spilled: None,
        changes: Vec::new(),
        counts: ChangeCounts([1, 0, 0, 0]),
        bytes: 1,
        has_barrier: false,
    }
}

/// `public.name` with text columns, the first of which is the key.
pub(crate) fn table(id: u32, name: &str, columns: &[&str]) -> Relation {
    Relation {
        id,
        schema: "public".to_owned(),
        name: name.to_owned(),
        identity: ReplicaIdentity::Default,
        columns: columns
            .iter()
            .enumerate()
            .map(|(i, column)| Column {
                is_key: i == 0,
                name: (*column).to_owned(),
                type_oid: 25,
                type_modifier: -1,
            })
            .collect(),
    }
}

/// The relation with the message that describes it.
pub(crate) fn relation(relation: Relation) -> Arc<SourceRelation> {
    let message = crate::pg::pgoutput::encode::relation(&relation);
    Arc::new(SourceRelation {
        relation,
        message,
        types: crate::flow::transaction::Named::new(),
    })
}
