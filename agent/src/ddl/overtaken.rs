//! ● What was found by looking, and has changed again before that was told: another command committed in between.
//!
//! A look takes as long as it takes, and its row stands in the stream where it commits. What it says of an object that a newer command
//! is about is older than what is here by then; of all others it is as true as before.

use std::collections::BTreeSet;

use super::apply;
use crate::names::TableName;
use crate::names::object::ObjectAddress;
use crate::schema::ddl::EventObject;

/// What newer commands are about.
#[derive(Debug, Default)]
pub struct Newer {
    objects: BTreeSet<ObjectAddress>,
    tables: BTreeSet<TableName>,
}

impl Newer {
    /// Of these commands' objects.
    pub fn of(commands: &[Vec<EventObject>]) -> Self {
        let objects = || commands.iter().flatten();
        Self {
            objects: objects().map(|object| object.address.clone()).collect(),
            tables: objects().filter_map(apply::table_of).collect(),
        }
    }

    /// Whether one of them is about this object, or about the table it belongs to.
    pub fn is_about(&self, object: &EventObject) -> bool {
        let of_table = apply::table_of(object);
        self.objects.contains(&object.address)
            || of_table.is_some_and(|table| self.tables.contains(&table))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(kind: &str, names: &[&str], shape: serde_json::Value) -> EventObject {
        let object = json!({"type": kind, "names": names, "shape": shape});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn what_belongs_to_a_table_is_as_old_as_the_table() {
        let index = |table: &str| {
            let shape = json!({"table_schema": "s", "table_name": table});
            object("index", &["s", "i"], shape)
        };
        let table = |name: &str| object("table", &["s", name], json!({}));
        let view = object("view", &["s", "t"], json!({}));
        let newer = Newer::of(&[vec![table("t")], vec![object("role", &["r"], json!({}))]]);
        assert!(newer.is_about(&table("t")) && newer.is_about(&index("t")));
        assert!(newer.is_about(&object("role", &["r"], json!({}))));
        for other in [
            table("u"),
            index("u"),
            view,
            object("role", &["q"], json!({})),
        ] {
            assert!(!newer.is_about(&other), "{other:?}");
        }
        assert!(!Newer::of(&[]).is_about(&table("t")));
        assert!(Newer::of(&[vec![index("t")]]).is_about(&table("t")));
    }
}
