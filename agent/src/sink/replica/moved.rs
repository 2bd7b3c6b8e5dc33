//! ● What a barrier has done to the tables that a session knows: renamed, gone, come, set aside.
//!
//! In the sink's memory it is what `dr_agent.table_sync` says behind the same transaction.

use std::collections::HashMap;

use crate::names::TableName;
use crate::schema::listing::{Copied, ListedAs};

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// Has another name, or is in another schema.
    Renamed(TableName, TableName),
    /// Was dropped.
    Gone(TableName),
    /// Was created, empty: all its changes come with the stream.
    Came(TableName, Copied),
    /// Is published otherwise, and nothing of it was missed.
    Relisted(TableName, ListedAs),
    /// Its rows have to be copied again.
    Aside(TableName),
}

/// All of them, in order. Whatever they are, what is known of a table's columns counts no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved(pub(super) Vec<Move>);

impl Moved {
    /// The tables of which changes are applied, behind the barrier. `joined` tells what has been copied beside the stream.
    pub(super) fn apply(
        &self,
        tables: &mut HashMap<TableName, Copied>,
        joined: impl Fn(&TableName) -> Option<Copied>,
    ) {
        for step in &self.0 {
            match step {
                Move::Renamed(from, to) => {
                    if let Some(copied) = tables.remove(from).or_else(|| joined(from)) {
                        tables.insert(to.clone(), copied);
                    }
                }
                Move::Gone(table) | Move::Aside(table) => _ = tables.remove(table),
                Move::Relisted(table, listed_as) => {
                    let known = tables.get(table).cloned().or_else(|| joined(table));
                    if let Some(known) = known {
                        let listed_as = Some(listed_as.clone());
                        tables.insert(table.clone(), Copied { listed_as, ..known });
                    }
                }
                Move::Came(table, copied) => _ = tables.insert(table.clone(), copied.clone()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn name(name: &str) -> TableName {
        TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        }
    }

    fn copied(at: u64) -> Copied {
        Copied {
            snapshot_lsn: Some(lsn(at)),
            listed_as: None,
        }
    }

    #[test]
    fn two_tables_change_places_and_others_come_and_go() {
        let mut tables = HashMap::from([
            (name("a"), copied(1)),
            (name("b"), copied(2)),
            (name("c"), copied(3)),
        ]);
        let renamed = |from, to| Move::Renamed(name(from), name(to));
        Moved(vec![
            renamed("a", "tmp"),
            renamed("b", "a"),
            renamed("tmp", "b"),
            renamed("late", "later"),
            renamed("unknown", "other"),
            Move::Gone(name("c")),
            Move::Came(name("c"), copied(9)),
            Move::Came(name("d"), copied(10)),
            Move::Aside(name("d")),
        ])
        .apply(&mut tables, |table| {
            (table.name == "late").then(|| copied(7))
        });
        let expected = [("a", 2), ("b", 1), ("later", 7), ("c", 9)];
        assert_eq!(
            tables,
            expected.map(|(table, at)| (name(table), copied(at))).into()
        );
    }
}
