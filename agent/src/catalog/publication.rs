//! ● What the publication must list, and the statements that make it so.
//!
//! Pure: `setup::source` observes and executes. The publication is never `FOR ALL TABLES`, because
//! publishing a table without a key makes the source's own UPDATE and DELETE fail.
//!
//! # Invariants
//! - No table without a replica identity is ever listed, now or by a partition added later: a
//!   partitioned table is listed as a whole only where its own primary key is handed down to every
//!   partition. The partitions of any other are listed one by one.
//! - Of schema `dr_agent` exactly the in-band tables are listed, whatever `source.exclude` says and
//!   whatever else an earlier life as a replica has left there.
//! - `publish_via_partition_root` is off: changes arrive under the name of the table that stores the
//!   row.

use std::collections::BTreeSet;

use crate::catalog::{Protection, Table};
use crate::config::Config;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::quote::quote_ident;

/// What becomes of every table of one database.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// What the publication lists: tables, and roots of partitioned tables.
    pub units: BTreeSet<TableName>,
    /// The tables whose changes will arrive, and which are therefore copied.
    pub published: Vec<Table>,
    /// Tables that need `REPLICA IDENTITY FULL` before they are listed.
    pub identity_full: Vec<TableName>,
    /// Tables that stay unprotected, and why.
    pub unpublished: Vec<(TableName, Protection)>,
}

impl Wanted {
    /// Decides for every table. `keyed_roots` are the partitioned tables with a primary key.
    pub fn of(tables: &[Table], keyed_roots: &BTreeSet<TableName>, config: &Config) -> Self {
        let mut wanted = Self::default();
        for table in tables {
            let protection = table.protection(config);
            match protection {
                Protection::Published => {}
                Protection::KeylessFull => wanted.identity_full.push(table.name.clone()),
                Protection::Excluded
                | Protection::KeylessExcluded
                | Protection::KeylessRefused
                | Protection::Unlogged => {
                    wanted.unpublished.push((table.name.clone(), protection));
                    continue;
                }
            }
            wanted.units.insert(unit(table, keyed_roots).clone());
            wanted.published.push(table.clone());
        }
        // They may not exist yet; they do before the publication is written.
        for name in in_band_tables() {
            wanted.units.insert(name);
        }
        wanted.withhold_wholes_with_a_keyless_part(tables, keyed_roots);
        wanted
    }

    /// A primary key on the root does not keep a partition from `REPLICA IDENTITY NOTHING`. Such a
    /// root cannot be listed as a whole; its other partitions are listed one by one.
    fn withhold_wholes_with_a_keyless_part(
        &mut self,
        tables: &[Table],
        keyed_roots: &BTreeSet<TableName>,
    ) {
        let keyless: BTreeSet<&TableName> = self
            .unpublished
            .iter()
            .filter(|(_, why)| {
                matches!(
                    why,
                    Protection::KeylessExcluded | Protection::KeylessRefused
                )
            })
            .map(|(name, _)| name)
            .collect();
        let broken: BTreeSet<&TableName> = tables
            .iter()
            .filter(|table| keyless.contains(&table.name) && keyed_roots.contains(&table.root))
            .map(|table| &table.root)
            .collect();
        for root in broken {
            self.units.remove(root);
            let parts = self.published.iter().filter(|table| table.root == *root);
            self.units.extend(parts.map(|table| table.name.clone()));
        }
    }

    /// Leaves out tables that could not be given REPLICA IDENTITY FULL: published, their UPDATE and DELETE would fail.
    pub fn without_identity(
        &mut self,
        failed: &BTreeSet<TableName>,
        tables: &[Table],
        keyed_roots: &BTreeSet<TableName>,
    ) {
        self.identity_full.retain(|name| !failed.contains(name));
        self.published.retain(|table| !failed.contains(&table.name));
        self.units.retain(|unit| !failed.contains(unit));
        let failed = failed.iter().cloned();
        self.unpublished
            .extend(failed.map(|name| (name, Protection::KeylessExcluded)));
        self.withhold_wholes_with_a_keyless_part(tables, keyed_roots);
    }

    /// The tables that nobody has decided about.
    pub fn refused(&self) -> Vec<TableName> {
        self.unpublished
            .iter()
            .filter(|(_, why)| *why == Protection::KeylessRefused)
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Leaves out tables that this role may not publish because it does not own them.
    pub fn leave_out(&mut self, units: &BTreeSet<TableName>) -> Vec<TableName> {
        self.units.retain(|unit| !units.contains(unit));
        let left_out = |table: &Table| units.contains(&table.root) || units.contains(&table.name);
        let names: Vec<TableName> = self
            .published
            .iter()
            .filter(|table| left_out(table))
            .map(|table| table.name.clone())
            .collect();
        self.published.retain(|table| !left_out(table));
        self.identity_full.retain(|name| !names.contains(name));
        names
    }
}

/// What the publication lists so that this table is published.
fn unit<'a>(table: &'a Table, keyed_roots: &BTreeSet<TableName>) -> &'a TableName {
    if keyed_roots.contains(&table.root) {
        &table.root
    } else {
        &table.name
    }
}

/// The names of the tables of schema `dr_agent` that travel in the stream.
pub(super) const IN_BAND: [&str; 8] = [
    "heartbeat",
    "sequence_state",
    "listed",
    "coverage",
    "clock",
    "ddl",
    "fingerprint",
    "fingerprint_at",
];

/// The tables themselves.
pub fn in_band_tables() -> [TableName; IN_BAND.len()] {
    IN_BAND.map(|name| TableName {
        schema: "dr_agent".to_owned(),
        name: name.to_owned(),
    })
}

/// A publication as it stands on the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Publication {
    /// `FOR ALL TABLES`.
    pub all_tables: bool,
    /// `FOR TABLES IN SCHEMA` (15 and later).
    pub schemas: bool,
    /// Publishes insert, update, delete and truncate, each under the leaf partition's name.
    pub options_sound: bool,
    /// Leaves stored generated columns out, although the server has an option for them (18 and later).
    pub hides_generated: bool,
    /// What it lists entirely, without row filter or column list.
    pub units: BTreeSet<TableName>,
    /// What it lists with a row filter or a column list (15 and later).
    pub filtered: BTreeSet<TableName>,
}

impl Publication {
    /// Whether all changes of this table are published.
    pub fn publishes(&self, table: &Table) -> bool {
        self.units.contains(&table.name) || self.units.contains(&table.root)
    }

    /// What keeps it from ever being ours.
    pub fn defect(&self) -> Option<&'static str> {
        if self.all_tables {
            Some("it is FOR ALL TABLES")
        } else if self.schemas {
            Some("it publishes whole schemas")
        } else {
            None
        }
    }

    /// What it lists and should not, or lists only in part.
    fn surplus<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a TableName> {
        self.units.difference(&wanted.units).chain(&self.filtered)
    }

    /// What it does not list, or lists only in part.
    pub fn missing<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a TableName> {
        wanted.units.difference(&self.units)
    }
}

/// From 18 on an UPDATE of a table with REPLICA IDENTITY FULL fails on the source unless its stored
/// generated columns are published. The replica leaves them out and computes its own.
fn options(version: i32) -> &'static str {
    if version >= 180_000 {
        "publish = 'insert, update, delete, truncate', publish_via_partition_root = false, \
         publish_generated_columns = stored"
    } else {
        "publish = 'insert, update, delete, truncate', publish_via_partition_root = false"
    }
}

/// One transaction on the way to what is wanted. It locks the tables it names, and no more at a time than the lock table of the
/// server has room for beside everybody else's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Has nothing to do with the publication.
    Statement(String),
    /// Creates or alters the publication, and locks no table of the user's.
    Alter(String),
    /// Gives a keyless table REPLICA IDENTITY FULL, before it is listed.
    Full(TableName),
    /// Lists tables, or takes them off the list.
    List {
        /// `ALTER PUBLICATION … ADD TABLE`
        head: String,
        /// Which.
        tables: Vec<TableName>,
    },
}

impl Piece {
    /// The SQL, with what has to be said in the same transaction where the publication is altered.
    pub fn sql(&self, said: &[String]) -> String {
        let alter = match self {
            Self::Statement(sql) => return sql.clone(),
            Self::Full(table) => {
                return format!("ALTER TABLE {} REPLICA IDENTITY FULL", table.sql());
            }
            Self::Alter(sql) => sql.clone(),
            Self::List { head, tables } => format!("{head} {}", list(tables.iter())),
        };
        let mut all = vec![alter];
        all.extend_from_slice(said);
        format!("BEGIN;\n{};\nCOMMIT", all.join(";\n"))
    }

    /// The tables it is about.
    pub fn tables(&self) -> &[TableName] {
        match self {
            Self::Statement(_) | Self::Alter(_) => &[],
            Self::Full(table) => std::slice::from_ref(table),
            Self::List { tables, .. } => tables,
        }
    }

    /// The same for one table at a time; nothing where it is so already.
    pub fn one_by_one(&self) -> Vec<Self> {
        match self {
            Self::List { head, tables } if tables.len() > 1 => tables
                .iter()
                .map(|table| Self::List {
                    head: head.clone(),
                    tables: vec![table.clone()],
                })
                .collect(),
            _ => Vec::new(),
        }
    }
}

/// What is missing. `at_once` tables are locked at a time.
pub fn pieces(
    stream: &StreamName,
    found: Option<&Publication>,
    wanted: &Wanted,
    version: i32,
    at_once: usize,
) -> Vec<Piece> {
    let options = options(version);
    let name = quote_ident(stream.as_str());
    let mut pieces: Vec<Piece> = wanted
        .identity_full
        .iter()
        .cloned()
        .map(Piece::Full)
        .collect();
    let nothing = Publication::default();
    let found = found.unwrap_or_else(|| {
        let in_band = in_band_tables();
        pieces.push(Piece::Alter(format!(
            "CREATE PUBLICATION {name} FOR TABLE {} WITH ({options})",
            list(in_band.iter())
        )));
        &nothing
    });
    let created = pieces.iter().any(|piece| matches!(piece, Piece::Alter(_)));
    if !created && (!found.options_sound || found.hides_generated) {
        pieces.push(Piece::Alter(format!(
            "ALTER PUBLICATION {name} SET ({options})"
        )));
    }
    let mut some = |verb: &str, tables: Vec<TableName>| {
        pieces.extend(tables.chunks(at_once.max(1)).map(|tables| Piece::List {
            head: format!("ALTER PUBLICATION {name} {verb} TABLE"),
            tables: tables.to_vec(),
        }));
    };
    some("DROP", found.surplus(wanted).cloned().collect());
    let in_band = in_band_tables();
    let missing = found.missing(wanted);
    let missing = missing.filter(|unit| !(created && in_band.contains(unit)));
    some("ADD", missing.cloned().collect());
    pieces
}

/// The statement that changes nothing and makes running walsenders and decoders look again.
pub fn touch(stream: &StreamName, version: i32) -> String {
    let name = quote_ident(stream.as_str());
    format!("ALTER PUBLICATION {name} SET ({})", options(version))
}

/// `ONLY`, because without it every child of a table by inheritance is listed too.
fn list<'a>(names: impl Iterator<Item = &'a TableName>) -> String {
    names
        .map(|name| format!("ONLY {}", name.sql()))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Identity;

    fn config(more: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\n{more}\n\
             [replica]\nurl = \"postgres://b@localhost/y\"\n"
        );
        Config::parse("test", &text, []).unwrap()
    }

    fn name(name: &str) -> TableName {
        TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        }
    }

    fn table(table: &str, root: &str, identity: Identity) -> Table {
        Table {
            virtual_generated: false,
            generated_key: false,
            oid: 7,
            name: name(table),
            root: name(root),
            identity,
            unlogged: false,
            of_extension: false,
        }
    }

    fn units(wanted: &Wanted) -> Vec<&str> {
        let user = wanted.units.iter().filter(|unit| unit.schema == "public");
        user.map(|unit| unit.name.as_str()).collect()
    }

    #[test]
    fn a_partitioned_table_is_listed_whole_only_where_its_key_reaches_new_partitions() {
        let tables = [
            table("k_1", "k", Identity::Key),
            table("k_2", "k", Identity::Key),
            table("own_1", "own", Identity::Key),
            table("own_2", "own", Identity::Missing),
        ];
        let keyed = BTreeSet::from([name("k")]);
        let wanted = Wanted::of(&tables, &keyed, &config("keyless = \"exclude\""));
        assert_eq!(units(&wanted), ["k", "own_1"]);
        assert_eq!(wanted.published.len(), 3);
        assert_eq!(
            wanted.unpublished,
            [(name("own_2"), Protection::KeylessExcluded)]
        );
    }

    #[test]
    fn one_partition_without_identity_splits_the_whole() {
        let tables = [
            table("k_1", "k", Identity::Key),
            table("k_2", "k", Identity::Missing),
        ];
        let keyed = BTreeSet::from([name("k")]);
        let wanted = Wanted::of(&tables, &keyed, &config("keyless = \"exclude\""));
        assert_eq!(units(&wanted), ["k_1"]);
        let wanted = Wanted::of(&tables, &keyed, &config("keyless = \"full\""));
        assert_eq!(units(&wanted), ["k"]);
        assert_eq!(wanted.identity_full, [name("k_2")]);
    }

    #[test]
    fn keyless_tables_are_refused_until_somebody_decides() {
        let tables = [
            table("log", "log", Identity::Missing),
            table("ok", "ok", Identity::Key),
        ];
        let none = BTreeSet::new();
        let wanted = Wanted::of(&tables, &none, &config(""));
        assert_eq!(wanted.refused(), [name("log")]);
        assert_eq!(units(&wanted), ["ok"]);
        let stream = StreamName::new("dr_agent", "app");
        let full = Wanted::of(&tables, &none, &config("keyless = \"full\""));
        let said = ["SELECT 1".to_owned()];
        let all = pieces(&stream, None, &full, 150_000, 1);
        let all: Vec<String> = all.iter().map(|piece| piece.sql(&said)).collect();
        assert_eq!(
            all[0],
            "ALTER TABLE \"public\".\"log\" REPLICA IDENTITY FULL"
        );
        assert!(all[1].starts_with("BEGIN;\nCREATE PUBLICATION \"dr_agent_app\" FOR TABLE ONLY"));
        assert!(all[1].contains("ONLY \"dr_agent\".\"heartbeat\""));
        assert_eq!(
            all[2..],
            ["log", "ok"].map(|table| format!(
                "BEGIN;\nALTER PUBLICATION \"dr_agent_app\" ADD TABLE ONLY \"public\".\"{table}\";\nSELECT 1;\nCOMMIT"
            ))
        );
    }

    #[test]
    fn a_publication_that_is_right_is_left_alone_and_any_other_is_mended() {
        let tables = [
            table("a", "a", Identity::Key),
            table("b", "b", Identity::Key),
        ];
        let wanted = Wanted::of(&tables, &BTreeSet::new(), &config(""));
        let stream = StreamName::new("dr_agent", "app");
        let mut found = Publication {
            options_sound: true,
            units: wanted.units.clone(),
            ..Publication::default()
        };
        let pieces = |found: &Publication| pieces(&stream, Some(found), &wanted, 150_000, 200);
        assert_eq!(pieces(&found), []);
        found.units.remove(&name("a"));
        found.filtered.insert(name("a"));
        found.units.insert(name("gone"));
        assert!(!found.publishes(&tables[0]));
        assert!(found.publishes(&tables[1]));
        let list = |verb: &str, tables: &[&str]| Piece::List {
            head: format!("ALTER PUBLICATION \"dr_agent_app\" {verb} TABLE"),
            tables: tables.iter().map(|table| name(table)).collect(),
        };
        let both = [list("DROP", &["gone", "a"]), list("ADD", &["a"])];
        assert_eq!(pieces(&found), both);
        found.options_sound = false;
        let set = "ALTER PUBLICATION \"dr_agent_app\" SET (publish = 'insert, update, delete, truncate', \
                   publish_via_partition_root = false)";
        assert_eq!(pieces(&found)[0], Piece::Alter(set.to_owned()));
    }

    #[test]
    fn a_table_that_got_no_identity_splits_the_whole_and_stays_out() {
        let tables = [
            table("k_1", "k", Identity::Key),
            table("k_2", "k", Identity::Missing),
            table("log", "log", Identity::Missing),
        ];
        let keyed = BTreeSet::from([name("k")]);
        let mut wanted = Wanted::of(&tables, &keyed, &config("keyless = \"full\""));
        assert_eq!(units(&wanted), ["k", "log"]);
        let failed = BTreeSet::from([name("k_2"), name("log")]);
        wanted.without_identity(&failed, &tables, &keyed);
        assert_eq!(units(&wanted), ["k_1"]);
        assert!(wanted.identity_full.is_empty());
    }

    #[test]
    fn what_this_role_does_not_own_is_left_out_with_its_partitions() {
        let tables = [
            table("k_1", "k", Identity::Key),
            table("a", "a", Identity::Key),
        ];
        let keyed = BTreeSet::from([name("k")]);
        let mut wanted = Wanted::of(&tables, &keyed, &config(""));
        assert_eq!(
            wanted.leave_out(&BTreeSet::from([name("k")])),
            [name("k_1")]
        );
        assert_eq!(units(&wanted), ["a"]);
        assert_eq!(wanted.published.len(), 1);
    }
}
