//! ● What `psql` needs beside the schema: a script that fills the tables, and the positions of sequences.
//!
//! For the day on which there is no dr-agent: `zstd` and `psql` load a base by themselves. The script
//! is run in the directory that holds the base's objects.
//!
//! # Invariants
//! - An object is loaded as a whole or not at all: whether `zstd` found it whole is known only after its last row.

use std::collections::BTreeMap;

use super::manifest::DataFile;
use crate::copy::finish::SequenceState;
use crate::names::TableName;
use crate::pg::quote::{quote_ident, quote_literal};
use crate::pg::settings::VALUES;

/// Fills the tables from the objects with rows. `takers` are the tables through which rows of others are written. The tables of schema `dr_agent` are not for people.
pub(super) fn load_data<'a>(
    files: impl Iterator<Item = (&'a str, &'a DataFile)>,
    takers: &BTreeMap<TableName, TableName>,
) -> String {
    let mut script = String::from(
        "-- Fills the tables of this base backup. Run by psql in the directory that holds it,\n\
         -- between pre-data.sql and post-data.sql; zstd must be on the PATH.\n\
         \\set ON_ERROR_STOP on\n",
    );
    for (name, value) in VALUES {
        script.push_str(&format!("SET {name} = '{value}';\n"));
    }
    for (name, data) in files.filter(|(_, data)| data.table.schema != "dr_agent") {
        script.push_str(&fill(name, data, takers.get(&data.table)));
    }
    script
}

fn fill(name: &str, data: &DataFile, taker: Option<&TableName>) -> String {
    let columns: Vec<String> = data.columns.iter().map(|name| quote_ident(name)).collect();
    let columns = if columns.is_empty() {
        String::new()
    } else {
        format!(" ({})", columns.join(", "))
    };
    let target = format!("{}{columns}", taker.unwrap_or(&data.table).sql());
    if target.contains(['\n', '\r']) {
        // The command ends with its line.
        return format!(
            "\\warn '{name} is not loaded: a name in its COPY has a line break; see manifest.json'\n"
        );
    }
    format!("BEGIN;\n\\copy {target} FROM PROGRAM 'zstd -dcq {name}'\nCOMMIT;\n")
}

/// Sets the sequences. Their names may have any characters, and `psql` goes by the terminal's.
pub(super) fn set_sequences<'a>(positions: impl Iterator<Item = &'a SequenceState>) -> String {
    let mut script = String::from("SET client_encoding = 'UTF8';\n");
    for at in positions {
        script.push_str(&format!(
            "SELECT pg_catalog.setval({}, {}, {});\n",
            quote_literal(&at.name).trim_start(),
            at.value,
            at.called
        ));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(table: &str, columns: &[&str]) -> DataFile {
        let table = TableName {
            schema: "S".into(),
            name: table.into(),
        };
        DataFile {
            table: table.clone(),
            root: table,
            columns: columns.iter().map(|&name| name.to_owned()).collect(),
            rows: 1,
            raw_bytes: 1,
        }
    }

    #[test]
    fn each_object_is_one_transaction_and_a_name_with_a_line_break_is_said() {
        assert_eq!(
            fill("data/00001.copy.zst", &data("t\"1", &["a", "B c"]), None),
            "BEGIN;\n\\copy \"S\".\"t\"\"1\" (\"a\", \"B c\") FROM PROGRAM 'zstd -dcq data/00001.copy.zst'\nCOMMIT;\n"
        );
        assert_eq!(
            fill("d", &data("t", &[]), None),
            "BEGIN;\n\\copy \"S\".\"t\" FROM PROGRAM 'zstd -dcq d'\nCOMMIT;\n"
        );
        assert!(fill("d", &data("a\nb", &[]), None).starts_with("\\warn"));
    }

    #[test]
    fn sequences_are_set_as_they_stand() {
        let position = SequenceState {
            name: "\"S\".\"it's\"".into(),
            value: -7,
            called: false,
        };
        assert_eq!(
            set_sequences([position].iter()),
            "SET client_encoding = 'UTF8';\nSELECT pg_catalog.setval('\"S\".\"it''s\"', -7, false);\n"
        );
    }
}
