//! ● What is not protected, as the replica knows it by itself: what the source told in-band, compared with what is here.
//!
//! Pure but for [`of`], which reads.
//!
//! # Invariants
//! - Nothing told is "not known", never "nothing is missing".
//! - What belongs to a missing table is not named once more.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::definitions::{DEFINITION, PRIVILEGE, ROLE_ATTRIBUTE, ROLE_PASSWORD};
use super::inventory::{self, EXTENSION_VERSION, KINDS};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::schema::coverage::Told;
use crate::schema::ddl_waiting::{self, WaitingObject};
use crate::schema::{fingerprint, set_aside, table_sync};

/// Objects of one kind that a failover would not bring, or not as they are on the source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotProtected {
    /// `keyless_table` and so on as in `dr_agent_unprotected_objects`, `table_not_copied`, or `missing_table`,
    /// `missing_sequence` and so on: on the source, and not here.
    pub kind: String,
    /// How many.
    pub count: u64,
    /// The first few names, where they are known.
    pub names: Vec<String>,
}

/// What a failover would bring, and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Coverage {
    /// The source told what it has; otherwise nobody knows here what is missing.
    pub known: bool,
    /// Tables of the users on the source, partitions included.
    pub tables: Option<u64>,
    /// Of these, those whose rows are all here.
    pub protected: Option<u64>,
    /// What is not protected, by kind.
    pub missing: Vec<NotProtected>,
    /// Tables that are set aside, and why.
    pub set_aside: BTreeMap<String, String>,
    /// Objects that a command of the source could not bring to what they are there, and why.
    pub waiting: BTreeMap<String, String>,
    /// Of these, those that differ although no command has told of it, by kind ([`DRIFT_KINDS`]).
    pub drift: BTreeMap<String, u64>,
    /// How many seconds ago everything that the source has was compared with what is here.
    pub compared_seconds_ago: Option<u64>,
    /// The source tells what it has, object by object, so that it can be compared.
    pub compares: bool,
}

/// Kinds of objects that are counted one by one where they drift; the last one is all others.
pub const DRIFT_KINDS: [&str; 12] = [
    "table",
    "index",
    "view",
    "materialized view",
    "sequence",
    "function",
    "trigger",
    "policy",
    "type",
    "schema",
    "extension",
    "other",
];

/// Which of them it is.
fn drift_kind(kind: &str) -> &'static str {
    let (other, known) = DRIFT_KINDS.split_last().unwrap_or((&"other", &[]));
    known.iter().find(|one| **one == kind).unwrap_or(other)
}

/// What was compared longer ago than this is not known to be the same.
const COMPARED_LATELY: u64 = 900;

/// Objects that a command of the source could not bring to what they are there.
const DDL_WAITING: &str = "ddl_waiting";

/// Tables whose copy is not complete, for no other reason than that.
pub const NOT_COPIED: &str = "table_not_copied";

/// Tables whose changes are kept out.
pub const SET_ASIDE: &str = "table_set_aside";

/// Names of a kind that are kept.
const NAMES_MAX: usize = 20;

/// Reads and compares, on the replica.
///
/// # Errors
/// When the replica refuses.
pub async fn of(client: &Client, stream: &StreamName) -> Result<Coverage, PgError> {
    let not_ready = table_sync::not_ready(client, stream).await?;
    let not_ready = not_ready
        .iter()
        .filter(|table| table.schema != "dr_agent")
        .map(TableName::to_string);
    let not_ready = not_ready.collect();
    let set_aside = set_aside::read(client, stream).await?;
    let set_aside = set_aside
        .into_iter()
        .map(|aside| (aside.table.to_string(), aside.reason))
        .collect();
    let (told, here) = inventory::told_and_here(client, stream).await?;
    let waiting = ddl_waiting::read(client, stream).await?;
    let waiting = waiting.into_iter().filter(|one| one.accepted.is_none());
    let waiting: Vec<WaitingObject> = waiting.collect();
    let mut drift = BTreeMap::new();
    for one in waiting.iter().filter(|one| one.drift) {
        *drift
            .entry(drift_kind(&one.address.kind).to_owned())
            .or_default() += 1;
    }
    let waiting = waiting
        .into_iter()
        .map(|one| (format!("{} {}", one.address.kind, one.identity), one.reason));
    let coverage = compare(&told, &here, not_ready, set_aside);
    let compared = fingerprint::compared(client).await?;
    Ok(Coverage {
        drift,
        compares: compared.is_some(),
        compared_seconds_ago: compared.flatten(),
        ..with_waiting(coverage, waiting.collect())
    })
}

/// With the objects that wait.
fn with_waiting(mut coverage: Coverage, waiting: BTreeMap<String, String>) -> Coverage {
    if !waiting.is_empty() {
        let (count, names) = (waiting.len() as u64, waiting.keys().cloned().collect());
        let kind = DDL_WAITING.to_owned();
        coverage
            .missing
            .push(not_protected(kind, count, Some(names)));
        coverage.missing.sort_by(|a, b| a.kind.cmp(&b.kind));
    }
    Coverage {
        waiting,
        ..coverage
    }
}

/// `not_ready`: tables of the users whose copy is not complete, whether they are set aside or not.
fn compare(
    told: &[Told],
    here: &[Told],
    not_ready: Vec<String>,
    set_aside: BTreeMap<String, String>,
) -> Coverage {
    let mut missing: Vec<NotProtected> = told
        .iter()
        .filter(|told| !told.protected && told.objects > 0)
        .map(|told| not_protected(told.kind.clone(), told.objects, told.names.clone()))
        .collect();
    let has = |kind: &str| told.iter().find(|told| told.protected && told.kind == kind);
    let mut absent = Absent::default();
    for kind in KINDS {
        let is = here.iter().find(|here| here.kind == kind);
        if let (Some(has), Some(is)) = (has(kind), is) {
            missing.extend(lacking(has, is, &mut absent));
        }
    }
    let aside: Vec<String> = set_aside.keys().cloned().collect();
    let mut not_copied = not_ready;
    not_copied.retain(|table| !set_aside.contains_key(table));
    for (kind, tables) in [(NOT_COPIED, &not_copied), (SET_ASIDE, &aside)] {
        if !tables.is_empty() {
            let count = tables.len() as u64;
            missing.push(not_protected(kind.to_owned(), count, Some(tables.clone())));
        }
    }
    missing.sort_by(|a, b| a.kind.cmp(&b.kind));
    let tables = has("table").map(|has| has.objects);
    let without_rows: Vec<String> = not_copied.into_iter().chain(aside).collect();
    let unprotected = unprotected_tables(told, &absent.tables, &without_rows, &missing);
    Coverage {
        known: tables.is_some(),
        tables,
        protected: tables.map(|tables| tables.saturating_sub(unprotected)),
        missing,
        set_aside,
        ..Coverage::default()
    }
}

fn not_protected(kind: String, count: u64, names: Option<Vec<String>>) -> NotProtected {
    let mut names = names.unwrap_or_default();
    names.truncate(NAMES_MAX);
    NotProtected { kind, count, names }
}

/// What is not here at all: nothing else is said of it.
#[derive(Debug, Default)]
struct Absent {
    tables: BTreeSet<String>,
    /// Objects of all kinds, tables among them.
    objects: BTreeSet<String>,
}

impl Absent {
    /// Whether something belongs to a table that is not here.
    fn has_table_of(&self, name: &str) -> bool {
        is_of(name, &self.tables)
    }

    /// Whether a privilege or a definition is of something that is not here.
    fn has_object_of(&self, name: &str) -> bool {
        let sort = OF_SORT.iter().find_map(|sort| name.strip_prefix(sort));
        is_of(sort.unwrap_or(name), &self.objects)
    }
}

/// What stands before the names of what has no schema.
const OF_SORT: [&str; 5] = ["schema ", "server ", "wrapper ", "language ", "default of "];

/// Whether it is one of these objects, or begins with the name of one.
fn is_of(name: &str, objects: &BTreeSet<String>) -> bool {
    let mut parts = name
        .match_indices(['.', ' ', ':'])
        .map(|(at, _)| &name[..at]);
    objects.contains(name) || parts.any(|part| objects.contains(part))
}

/// What the source has of a kind and is not here; notes it.
fn lacking(has: &Told, is: &Told, absent: &mut Absent) -> Option<NotProtected> {
    let kind = format!("missing_{}", has.kind);
    let (Some(names), Some(here)) = (&has.names, &is.names) else {
        let count = has.objects.saturating_sub(is.objects);
        return (count > 0).then(|| not_protected(kind, count, None));
    };
    let here: BTreeSet<&String> = here.iter().collect();
    let is_beside_a_name = BESIDE_NAMES.contains(&has.kind.as_str());
    let of_absent = |name: &str| match is_beside_a_name {
        true => absent.has_object_of(name),
        false => absent.has_table_of(name),
    };
    let is_newer = |name: &str| has.kind == EXTENSION_VERSION && !is_older_here(name, &here);
    let lacking: Vec<String> = names
        .iter()
        .filter(|name| !here.contains(name) && !of_absent(name) && !is_newer(name))
        .cloned()
        .collect();
    if ["table", "partitioned_table", "foreign_table"].contains(&has.kind.as_str()) {
        absent.tables.extend(lacking.iter().cloned());
    }
    if !is_beside_a_name {
        absent.objects.extend(lacking.iter().cloned());
    }
    let count = lacking.len() as u64;
    let names = (!has.hashed).then(|| lacking.iter().map(|name| shown(&has.kind, name)).collect());
    (count > 0).then(|| not_protected(kind, count, names))
}

/// Kinds that say something about an object that has been compared by its name before.
const BESIDE_NAMES: [&str; 4] = [PRIVILEGE, DEFINITION, ROLE_ATTRIBUTE, ROLE_PASSWORD];

/// A name as people read it: without the hash of a definition.
fn shown(kind: &str, name: &str) -> String {
    let name = match kind {
        DEFINITION => name.rsplit_once(' ').map_or(name, |(name, _)| name),
        _ => name,
    };
    name.to_owned()
}

/// Whether an extension (`name version`) is here in an older version only. One that is not here at all is named by itself.
fn is_older_here(name: &str, here: &BTreeSet<&String>) -> bool {
    fn parts(version: &str) -> Vec<u64> {
        let numbers = version.split(|c: char| !c.is_ascii_digit());
        numbers.filter_map(|number| number.parse().ok()).collect()
    }
    let Some((extension, version)) = name.rsplit_once(' ') else {
        return false;
    };
    let mut found = here.iter().filter_map(|here| {
        let (named, version) = here.rsplit_once(' ')?;
        (named == extension).then_some(version)
    });
    found.any(|found| parts(found) < parts(version))
}

/// Tables of the users that are not wholly here; each once, whatever the reasons.
fn unprotected_tables(
    told: &[Told],
    absent: &BTreeSet<String>,
    not_copied: &[String],
    missing: &[NotProtected],
) -> u64 {
    let mut names: BTreeSet<&String> = not_copied.iter().chain(absent).collect();
    let mut unnamed = 0;
    for told in told.iter().filter(|told| !told.protected) {
        if !told.kind.ends_with("_table") || NOT_TABLES.contains(&told.kind.as_str()) {
            continue;
        }
        let known = told.names.as_deref().unwrap_or_default();
        names.extend(known);
        unnamed += told.objects.saturating_sub(known.len() as u64);
    }
    let uncounted = missing
        .iter()
        .filter(|one| one.kind == "missing_table" && one.names.is_empty());
    let uncounted: u64 = uncounted.map(|one| one.count).sum();
    names.len() as u64 + unnamed + uncounted
}

/// Kinds that end like tables and are none of the users' own.
const NOT_TABLES: [&str; 2] = ["extension_table", "foreign_table"];

impl Coverage {
    /// Whether the replica has everything the source had.
    pub fn is_whole(&self) -> bool {
        self.known && self.missing.is_empty()
    }

    /// Tables that are to be replicated and whose rows are not here, or not as they were on the source.
    pub fn not_copied(&self) -> u64 {
        let without_rows = self
            .missing
            .iter()
            .filter(|one| [NOT_COPIED, SET_ASIDE].contains(&one.kind.as_str()));
        without_rows.map(|one| one.count).sum()
    }

    /// What is to be said of the comparison of both sides, where there is something.
    pub fn comparison(&self) -> Option<String> {
        match self.compared_seconds_ago {
            _ if !self.compares => None,
            Some(ago) if ago <= COMPARED_LATELY => None,
            Some(ago) => Some(format!(
                "the definitions of both sides were last compared {} minutes ago: since then a difference has not been noticed",
                ago / 60
            )),
            None => Some("the definitions of both sides have not been compared yet".to_owned()),
        }
    }

    /// `41 of 43 tables`, or that it is not known.
    pub fn verdict(&self) -> String {
        match (self.protected, self.tables) {
            (Some(protected), Some(tables)) => format!("{protected} of {tables} tables"),
            _ => "not known: the source's agent has not told what there is".to_owned(),
        }
    }
}

impl NotProtected {
    /// `keyless table: 2 (public.a, public.b)`, with at most so many names.
    pub fn text(&self, names_max: usize) -> String {
        let shown = self.names.len().min(names_max);
        let mut names = self.names[..shown].to_vec();
        if self.count > shown as u64 && shown > 0 {
            names.push("…".to_owned());
        }
        let names = match names.is_empty() {
            true => String::new(),
            false => format!(" ({})", names.join(", ")),
        };
        format!("{}: {}{names}", self.kind.replace('_', " "), self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(kind: &str, protected: bool, names: &[&str]) -> Told {
        Told {
            kind: kind.to_owned(),
            protected,
            hashed: false,
            objects: names.len() as u64,
            names: Some(names.iter().map(|name| (*name).to_owned()).collect()),
        }
    }

    fn compared(told: &[Told], here: &[Told], not_ready: &[&str]) -> Coverage {
        let not_ready = not_ready.iter().map(|table| (*table).to_owned());
        compare(told, here, not_ready.collect(), BTreeMap::new())
    }

    fn missing(coverage: &Coverage) -> Vec<(&str, u64)> {
        let missing = coverage.missing.iter();
        missing.map(|one| (one.kind.as_str(), one.count)).collect()
    }

    #[test]
    fn what_nobody_told_is_not_known() {
        let coverage = compared(&[], &[], &["s.a"]);
        assert!(!coverage.known && !coverage.is_whole());
        assert_eq!((coverage.tables, coverage.not_copied()), (None, 1));
        assert!(coverage.verdict().contains("not known"));
    }

    #[test]
    fn every_kind_that_is_lacking_is_named() {
        for kind in KINDS.into_iter().filter(|kind| *kind != EXTENSION_VERSION) {
            // A definition is behind its name.
            let suffix = if kind == DEFINITION { " 0123abcd" } else { "" };
            let (a, b) = (format!("s.a{suffix}"), format!("s.b{suffix}"));
            let source = [told("table", true, &["s.a"]), told(kind, true, &[&a, &b])];
            let source = if kind == "table" {
                &source[1..]
            } else {
                &source[..]
            };
            let here = [told("table", true, &["s.a"]), told(kind, true, &[&a])];
            let here = if kind == "table" {
                &here[1..]
            } else {
                &here[..]
            };
            let coverage = compared(source, here, &[]);
            let expected = format!("missing_{kind}");
            assert_eq!(missing(&coverage), [(expected.as_str(), 1)], "{kind}");
            assert_eq!(coverage.missing[0].names, ["s.b"]);
            assert!(!coverage.is_whole());
        }
    }

    #[test]
    fn an_extension_is_lacking_in_an_older_version_and_not_in_a_newer_one() {
        let lacks = |here: &[&str]| {
            let source = [
                told("table", true, &[]),
                told(EXTENSION_VERSION, true, &["postgis 3.10.1"]),
            ];
            let here = [
                told("table", true, &[]),
                told(EXTENSION_VERSION, true, here),
            ];
            missing(&compared(&source, &here, &[])).len()
        };
        assert_eq!(lacks(&["postgis 3.10.1"]), 0);
        assert_eq!(lacks(&["postgis 3.11", "postgis_raster 1.0"]), 0);
        assert_eq!(lacks(&["postgis 3.9.4"]), 1);
        assert_eq!(lacks(&["postgis 3.10"]), 1);
        // The kind `extension` names it.
        assert_eq!(lacks(&["hstore 1.8"]), 0);
    }

    #[test]
    fn a_table_counts_once_whatever_the_reasons_and_hides_what_belongs_to_it() {
        let source = [
            told("table", true, &["s.a", "s.b", "s.c", "s.d", "s.e"]),
            told("column", true, &["s.a.x", "s.c.x", "s.e.x"]),
            told("index", true, &["s.c.c_pkey", "s.a.late"]),
            told("inheritance", true, &["s.c of s.a"]),
            told("comment", true, &["s.c", "s.c.x"]),
            told("keyless_table", false, &["s.b"]),
            told("excluded_table", false, &[]),
            told("foreign_table", false, &["s.f"]),
            told("unpublished_table", false, &["s.c"]),
        ];
        let here = [
            told("table", true, &["s.a", "s.b", "s.d", "s.e"]),
            told("column", true, &["s.a.x", "s.e.x"]),
            told("index", true, &[]),
            told("inheritance", true, &[]),
            told("comment", true, &[]),
        ];
        let coverage = compared(&source, &here, &["s.d"]);
        assert_eq!((coverage.tables, coverage.protected), (Some(5), Some(2)));
        assert_eq!(coverage.verdict(), "2 of 5 tables");
        assert_eq!(
            missing(&coverage),
            [
                ("foreign_table", 1),
                ("keyless_table", 1),
                ("missing_index", 1),
                ("missing_table", 1),
                (NOT_COPIED, 1),
                ("unpublished_table", 1)
            ]
        );
    }

    #[test]
    fn a_table_that_is_set_aside_is_not_protected_whatever_the_ledger_of_copies_says() {
        let tables = [told("table", true, &["s.a", "s.b", "s.c"])];
        let aside = |names: &[&str]| -> BTreeMap<String, String> {
            let why = |name: &&str| ((*name).to_owned(), "why".to_owned());
            names.iter().map(why).collect()
        };
        let not_ready = vec!["s.a".to_owned(), "s.b".to_owned()];
        for (names, missing_here) in [
            (&["s.a"][..], &[(NOT_COPIED, 1), (SET_ASIDE, 1)][..]),
            (&["s.a", "s.b"], &[(SET_ASIDE, 2)]),
            (&["s.a", "s.b", "s.c"], &[(SET_ASIDE, 3)]),
        ] {
            let coverage = compare(&tables, &tables, not_ready.clone(), aside(names));
            assert_eq!(missing(&coverage), missing_here);
            let count: u64 = missing_here.iter().map(|(_, count)| count).sum();
            assert_eq!(coverage.not_copied(), count);
            assert_eq!(coverage.protected, Some(3 - count));
            assert_eq!(coverage.set_aside.len(), names.len());
        }
    }

    #[test]
    fn too_many_to_be_named_are_still_counted() {
        let many = |objects| Told {
            hashed: false,
            kind: "table".to_owned(),
            protected: true,
            objects,
            names: None,
        };
        let coverage = compared(&[many(5000)], &[many(4990)], &[]);
        assert_eq!(
            (coverage.tables, coverage.protected),
            (Some(5000), Some(4990))
        );
        assert_eq!(coverage.missing[0].text(5), "missing table: 10");
        let whole = compared(&[many(5000)], &[many(5000)], &[]);
        assert!(whole.is_whole());
    }

    #[test]
    fn hashes_are_counted_and_not_shown() {
        let hashes = |names: &[&str]| Told {
            hashed: true,
            ..told(PRIVILEGE, true, names)
        };
        let source = [told("table", true, &["s.a"]), hashes(&["01", "02", "03"])];
        let here = [told("table", true, &["s.a"]), hashes(&["01", "04"])];
        let coverage = compared(&source, &here, &[]);
        assert_eq!(missing(&coverage), [("missing_privilege", 2)]);
        assert!(coverage.missing[0].names.is_empty());
    }

    #[test]
    fn what_is_not_here_at_all_has_no_privileges_and_no_definition() {
        let source = [
            told("role", true, &["app"]),
            told("schema", true, &["room"]),
            told("function", true, &["s.f(integer, text)"]),
            told("table", true, &["s.a", "s.b"]),
            told("index", true, &["s.a.i"]),
            told("default_privileges", true, &["app in room on tables"]),
            told(
                PRIVILEGE,
                true,
                &[
                    "s.b: app=SELECT",
                    "s.b.x: app=SELECT",
                    "s.f(integer, text): app=EXECUTE",
                    "schema room: app=USAGE",
                    "default of app in room on tables: x=SELECT",
                    "s.a: app=SELECT",
                ],
            ),
            told(
                DEFINITION,
                true,
                &["s.a.i 01", "s.b.y 02", "s.f(integer, text) 03", "s.a.z 04"],
            ),
            told(
                ROLE_ATTRIBUTE,
                true,
                &["app: LOGIN", "app: member of others", "others: LOGIN"],
            ),
        ];
        let here: Vec<Told> = source
            .iter()
            .map(|told| Told {
                names: Some(Vec::new()),
                ..told.clone()
            })
            .collect();
        let here: Vec<Told> = here
            .into_iter()
            .map(|here| match here.kind.as_str() {
                "table" => told("table", true, &["s.a"]),
                _ => here,
            })
            .collect();
        let coverage = compared(&source, &here, &[]);
        let beside = |kind: &str| {
            let found = coverage
                .missing
                .iter()
                .find(|one| one.kind == format!("missing_{kind}"));
            found.map(|one| one.names.clone()).unwrap_or_default()
        };
        assert_eq!(beside(PRIVILEGE), ["s.a: app=SELECT"]);
        assert_eq!(beside(DEFINITION), ["s.a.z"]);
        assert_eq!(beside(ROLE_ATTRIBUTE), ["others: LOGIN"]);
    }
}
