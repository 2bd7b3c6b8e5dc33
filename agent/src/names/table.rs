//! ● The name of a table, as it is compared, shown, configured and written into SQL.

use std::fmt;

use serde::{Deserialize, Serialize};
use tokio_postgres::Row;

use crate::pg::quote::{identifier, quote_ident};

/// A table's name as PostgreSQL holds it, unquoted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TableName {
    /// Schema.
    pub schema: String,
    /// Table.
    pub name: String,
}

impl TableName {
    /// `"schema"."table"`, quoted for SQL.
    pub fn sql(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    /// The table that a row names in its first two columns.
    pub fn of(row: &Row) -> Self {
        Self {
            schema: row.get(0),
            name: row.get(1),
        }
    }

    /// Schemas and names apart, as parameters of a statement.
    pub fn arrays<'t>(tables: impl IntoIterator<Item = &'t Self>) -> (Vec<&'t str>, Vec<&'t str>) {
        tables
            .into_iter()
            .map(|table| (table.schema.as_str(), table.name.as_str()))
            .unzip()
    }

    /// Reads what a person writes: `schema.table` as in SQL, in double quotes where SQL needs them.
    pub fn parse(text: &str) -> Option<Self> {
        let (schema, rest) = identifier(text)?;
        let (name, rest) = identifier(rest.strip_prefix('.')?)?;
        rest.is_empty().then_some(Self { schema, name })
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_named_as_in_sql() {
        let parsed = |text| TableName::parse(text).map(|table| (table.schema, table.name));
        let named = |schema: &str, name: &str| Some((schema.to_owned(), name.to_owned()));
        assert_eq!(parsed("public.Account"), named("public", "account"));
        assert_eq!(parsed("\"S p\".\"T \"\"1\"\"\""), named("S p", "T \"1\""));
        assert_eq!(parsed("a.\"b.c\""), named("a", "b.c"));
        assert_eq!(parsed("größe._x$1"), named("größe", "_x$1"));
        for wrong in [
            "a", "a.", ".b", "a.b.c", "a.1", "a.\"b", "a b.c", "a.\"\"", "",
        ] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
        let odd = TableName {
            schema: "S".to_owned(),
            name: "a\"b.c".to_owned(),
        };
        assert_eq!(TableName::parse(&odd.sql()), Some(odd));
    }
}
