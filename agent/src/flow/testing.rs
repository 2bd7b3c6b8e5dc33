//! Short ways to say LSNs, tables and changes in unit tests.

use std::sync::Arc;

use crate::flow::transaction::SourceRelation;
use crate::pg::PgLsn;
use crate::pg::pgoutput::{Column, Relation, ReplicaIdentity};

/// An LSN.
pub(crate) fn lsn(n: u64) -> PgLsn {
    PgLsn::from(n)
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
