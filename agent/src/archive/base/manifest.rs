//! ● What a base backup is: the manifest, written last, as JSON.
//!
//! The last line before the closing brace is the SHA-256 of everything above it, so that a manifest that was
//! changed or cut off is noticed although nothing else knows its sum.
//!
//! # Invariants
//! - A manifest is read by every later version; keys may be added, and unknown ones are passed over. What an
//!   older version cannot load has a higher `format`.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::object::{Sum, sha256};
use crate::copy::inventory::ForeignKey;
use crate::copy::locale::Locale;
use crate::copy::toc::Entry;
use crate::names::TableName;
use crate::names::history::History;
use crate::pg::PgLsn;
use crate::schema::listing::{Listed, ListedAs};
use crate::time::pg_micros;

/// The manifest's name in its base.
pub(super) const NAME: &str = "manifest.json";

/// The `format` this version writes, and the newest it reads.
pub(super) const FORMAT: u32 = 1;

/// What comes before the checksum.
const SEAL: &str = ",\n  \"sha256\": \"";

/// One base backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    pub(super) format: u32,
    /// The version of dr-agent that wrote it.
    pub dr_agent: String,
    /// The stream.
    pub stream: String,
    /// The source's database.
    pub database: String,
    /// The source's system identifier.
    #[serde(with = "text")]
    pub system_identifier: u64,
    /// When the history began that its LSN is of: when the slot was created, by the source's clock.
    #[serde(with = "text")]
    pub began: Timestamp,
    /// The source's timeline.
    pub timeline: i32,
    /// The source's `server_version_num`.
    pub server_version: i32,
    /// Encoding and collation of the database.
    pub locale: Locale,
    /// What committed before it is in the base; what commits from it on is in the change log.
    #[serde(with = "text")]
    pub lsn: PgLsn,
    /// When the rows were like this, by the source's clock: read just after the snapshot was taken.
    #[serde(with = "text")]
    pub as_of: Timestamp,
    /// By the agent's clock.
    #[serde(with = "text")]
    pub started_at: Timestamp,
    /// By the agent's clock.
    #[serde(with = "text")]
    pub finished_at: Timestamp,
    /// Major version of the `pg_dump` that wrote `schema.dump`; `pg_restore` must not be older.
    pub pg_dump: u32,
    /// What of the database is not in the base, in words.
    pub warnings: Vec<String>,
    /// Extensions the database used.
    pub extensions: Vec<String>,
    /// Roles that own something or have rights.
    pub roles: Vec<String>,
    /// What every table was listed as: a marker in the change log that says otherwise ends what can be restored from here.
    #[serde(default)]
    pub(super) listed: Vec<ListedTable>,
    /// Materialized views that were filled.
    pub materialized_views: Vec<TableName>,
    /// What is in `schema.dump` and is not to be restored.
    pub(super) left_out: Vec<Entry>,
    /// Foreign keys, for those who restore a part of the tables.
    pub(super) foreign_keys: Vec<ForeignKey>,
    /// Every object of the base but this one.
    pub objects: Vec<Object>,
}

/// One object.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Object {
    /// Its name, without the base's prefix.
    pub name: String,
    /// Size and checksum of what is stored.
    #[serde(flatten)]
    pub sum: Sum,
    /// What it holds, where these are rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataFile>,
}

/// A published table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ListedTable {
    #[serde(flatten)]
    pub(super) table: TableName,
    pub(super) listed_as: ListedAs,
}

/// Rows of one table, or of a range of its pages, as COPY writes them in text format.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DataFile {
    /// The table; a partition goes by its own name.
    pub table: TableName,
    /// The topmost partitioned table above it; itself where it is no partition.
    pub root: TableName,
    /// Its columns, in order.
    pub columns: Vec<String>,
    /// Rows.
    pub rows: u64,
    /// Bytes before compression.
    pub raw_bytes: u64,
}

impl Manifest {
    /// What its LSN is of.
    pub fn history(&self) -> History {
        History {
            system_identifier: self.system_identifier,
            began: pg_micros(self.began.into()),
        }
    }

    /// An object of this name.
    pub(super) fn object(&self, name: &str) -> Option<&Object> {
        self.objects.iter().find(|object| object.name == name)
    }

    /// Whether it is of the stream and history in whose place it was found; what has no such place is not judged.
    pub(super) fn belongs_to(&self, base: &str) -> bool {
        let mut folders = base.split('/');
        let place = folders.next().zip(folders.next());
        place.is_none_or(|(stream, history)| match history.parse::<History>() {
            Ok(history) => self.stream == stream && self.history() == history,
            Err(_) => true,
        })
    }

    /// How long it took, by the agent's clock; none of a clock that went back.
    pub fn took(&self) -> Duration {
        let took = self.finished_at.duration_since(self.started_at);
        took.try_into().unwrap_or_default()
    }

    /// Its size in the archive, without this.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.sum.bytes).sum()
    }

    /// The objects with rows.
    pub fn data(&self) -> impl Iterator<Item = (&Object, &DataFile)> {
        self.objects
            .iter()
            .filter_map(|object| Some((object, object.data.as_ref()?)))
    }

    /// The tables of its own, in name order, that a person means by these names: a partitioned table stands for all of its
    /// partitions. The first name that means none is the error.
    ///
    /// # Errors
    /// That name.
    pub fn meant(&self, names: &[TableName]) -> Result<Vec<TableName>, TableName> {
        let mut meant = BTreeSet::new();
        for name in names {
            let is_meant = |data: &&DataFile| data.table == *name || data.root == *name;
            let mut tables = self.data().map(|(_, data)| data).filter(is_meant);
            let first = tables.next().ok_or_else(|| name.clone())?;
            meant.insert(first.table.clone());
            meant.extend(tables.map(|data| data.table.clone()));
        }
        Ok(meant.into_iter().collect())
    }

    /// The tables whose rows it holds, by every name under which a change may come.
    pub fn tables(&self) -> Vec<TableName> {
        let names = self.data().flat_map(|(_, data)| [&data.table, &data.root]);
        let names: BTreeSet<&TableName> = names.collect();
        names.into_iter().cloned().collect()
    }

    /// What every table was listed as.
    pub fn listed(&self) -> Listed {
        let listed = self.listed.iter();
        let pairs = listed.map(|one| (one.table.clone(), one.listed_as.clone()));
        pairs.collect()
    }

    /// As it is stored, under its checksum.
    ///
    /// # Errors
    /// None that can be expected: it is plain data.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let json = serde_json::to_string_pretty(self)?;
        let above = json.strip_suffix("\n}").unwrap_or(&json);
        Ok(format!("{above}{SEAL}{}\"\n}}\n", sha256(above.as_bytes())))
    }

    /// Reads what is stored; the error says what is wrong with it.
    pub(super) fn from_json(json: &[u8]) -> Result<Self, String> {
        let json = std::str::from_utf8(json).map_err(|_| "it is damaged (no UTF-8)".to_owned())?;
        let sealed = json
            .rsplit_once(SEAL)
            .is_some_and(|(above, seal)| seal == format!("{}\"\n}}\n", sha256(above.as_bytes())));
        if !sealed {
            return Err("it is damaged (its checksum is wrong)".to_owned());
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let of = |error: serde_json::Error| format!("it is no manifest of ours ({error})");
        let Format { format } = serde_json::from_str(json).map_err(of)?;
        if format > FORMAT {
            return Err(format!(
                "it has format {format}, this version of dr-agent knows {FORMAT}"
            ));
        }
        serde_json::from_str(json).map_err(of)
    }
}

/// Values that are written as people write them.
mod text {
    use super::*;

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr, D: Deserializer<'de>>(
        from: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(from)?;
        text.parse()
            .map_err(|_| serde::de::Error::custom("not an LSN or a time"))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::copy::locale::Provider;

    pub(crate) fn example() -> Manifest {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let table = TableName {
            schema: "public".into(),
            name: "t".into(),
        };
        Manifest {
            format: FORMAT,
            dr_agent: "0.1.0".into(),
            stream: "dr_agent_app".into(),
            database: "app".into(),
            system_identifier: 7312,
            began: at("2025-12-31T00:00:00Z"),
            timeline: 1,
            server_version: 150_018,
            locale: Locale {
                encoding: "UTF8".into(),
                provider: Provider::Icu("de".into()),
                collate: "C".into(),
                ctype: "C".into(),
                owner: "app".into(),
                icu_rules: None,
            },
            lsn: PgLsn::from(0x16_B374_D848),
            as_of: at("2026-01-01T00:00:00Z"),
            started_at: at("2026-01-01T00:00:00Z"),
            finished_at: at("2026-01-01T01:00:00Z"),
            pg_dump: 15,
            warnings: vec![],
            extensions: vec!["plpgsql".into()],
            roles: vec!["app".into()],
            listed: vec![],
            materialized_views: vec![],
            left_out: vec![],
            foreign_keys: vec![],
            objects: vec![Object {
                name: "data/00001.copy.zst".into(),
                sum: Sum {
                    bytes: 3,
                    sha256: sha256(b"abc"),
                },
                data: Some(DataFile {
                    table: table.clone(),
                    root: table,
                    columns: vec!["id".into()],
                    rows: 1,
                    raw_bytes: 2,
                }),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_and_no_bit_may_change() {
        let json = example().to_json().unwrap();
        let read = Manifest::from_json(json.as_bytes()).unwrap();
        assert_eq!(read.to_json().unwrap(), json);
        assert_eq!(read.lsn, PgLsn::from(0x16_B374_D848));
        assert!(json.contains("\"lsn\": \"16/B374D848\""), "{json}");
        for at in 0..json.len() {
            let mut flipped = json.clone().into_bytes();
            flipped[at] ^= 1;
            assert!(Manifest::from_json(&flipped).is_err(), "byte {at}");
        }
        for length in 0..json.len() {
            assert!(Manifest::from_json(&json.as_bytes()[..length]).is_err());
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_its_number() {
        let mut newer = example();
        newer.format = FORMAT + 1;
        let error = Manifest::from_json(newer.to_json().unwrap().as_bytes()).unwrap_err();
        assert!(error.contains("format 2"), "{error}");
    }
}
