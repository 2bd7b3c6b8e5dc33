//! ● The table of contents of a `pg_dump` archive: what is restored now, later, or not at all.
//!
//! `pg_restore --list` prints one line per object, `--use-list` takes the lines back; between the two
//! this file leaves lines out. Objects are recognised by their whole line, built from the catalog,
//! because names may hold blanks and the lines cannot be taken apart.
//!
//! # Invariants
//! - A line that is not recognised stays: the tool then does it or fails loudly.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// One object as the archive names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// `INDEX`, `FK CONSTRAINT`, `TRIGGER`, …
    pub(super) kind: String,
    /// Schema; `None` for objects without one.
    pub(super) schema: Option<String>,
    /// Name; for what belongs to a table, the table's name, a blank, and the name.
    pub(super) tag: String,
    /// Owner.
    pub(super) owner: String,
}

impl Entry {
    /// What identifies the object on either server; owners may differ.
    pub(super) fn key(&self) -> (&str, Option<&str>, &str) {
        (&self.kind, self.schema.as_deref(), &self.tag)
    }

    /// The end of its line, after the numbers. Line breaks in names are blanks there.
    fn line(&self) -> String {
        let schema = self.schema.as_deref().unwrap_or("-");
        let line = format!("{} {schema} {} {}", self.kind, self.tag, self.owner);
        line.replace(['\n', '\r'], " ").trim_end().to_owned()
    }
}

/// What is left out of a listing.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeftOut {
    lines: HashSet<String>,
    kinds: Vec<&'static str>,
    /// Everything but objects of these kinds, if there are any.
    only_kinds: Vec<&'static str>,
    /// Everything but this.
    only: Option<String>,
}

impl LeftOut {
    /// Leaves one object out.
    pub(crate) fn entry(&mut self, entry: &Entry) {
        self.lines.insert(entry.line());
    }

    /// Whether this object is left out by itself.
    pub(crate) fn has(&self, entry: &Entry) -> bool {
        self.lines.contains(&entry.line())
    }

    /// Leaves one object out, as the listing has it.
    pub(super) fn object(&mut self, object: &str) {
        self.lines.insert(object.trim_end().to_owned());
    }

    /// Leaves everything out but one object, as the listing has it.
    pub(super) fn all_but(&mut self, object: &str) {
        self.only = Some(object.to_owned());
    }

    /// Leaves every object of a kind out.
    pub(super) fn kind(&mut self, kind: &'static str) {
        self.kinds.push(kind);
    }

    /// Leaves these kinds out, too.
    pub(crate) fn without(&self, kinds: &[&'static str]) -> Self {
        let mut all = self.clone();
        all.kinds.extend(kinds);
        all
    }

    /// Leaves everything out but these kinds, and what of them is left out already.
    pub(crate) fn only(&self, kinds: &[&'static str]) -> Self {
        Self {
            only_kinds: kinds.to_vec(),
            ..self.clone()
        }
    }

    /// Leaves everything out but these kinds.
    pub(super) fn all_but_kinds(kinds: &[&'static str]) -> Self {
        Self {
            only_kinds: kinds.to_vec(),
            ..Self::default()
        }
    }

    fn holds(&self, object: &str) -> bool {
        let is_one_of = |kinds: &[&'static str]| kinds.iter().any(|kind| is_of(object, kind));
        self.only.as_ref().is_some_and(|only| only != object)
            || (!self.only_kinds.is_empty() && !is_one_of(&self.only_kinds))
            || is_one_of(&self.kinds)
            || self.lines.contains(object.trim_end())
    }

    /// The listing without what is left out, and whether anything but comments remains.
    pub(super) fn filter(&self, listing: &str) -> (String, bool) {
        let mut kept = String::with_capacity(listing.len());
        let mut remains = false;
        for line in listing.lines() {
            match object_of(line) {
                Some(object) if self.holds(object) => continue,
                Some(_) => remains = true,
                None => {}
            }
            kept.push_str(line);
            kept.push('\n');
        }
        (kept, remains)
    }
}

/// Whether an object is of this kind.
fn is_of(object: &str, kind: &str) -> bool {
    object
        .strip_prefix(kind)
        .is_some_and(|rest| rest.starts_with(' '))
}

/// The objects of these kinds in a listing.
pub(super) fn objects_of(listing: &str, kinds: &[&str]) -> Vec<String> {
    let objects = listing.lines().filter_map(object_of);
    let wanted = objects.filter(|object| kinds.iter().any(|kind| is_of(object, kind)));
    wanted.map(str::to_owned).collect()
}

/// What follows `id; catalog-oid object-oid ` in a line of the listing; `None` for comments.
fn object_of(line: &str) -> Option<&str> {
    let (id, rest) = line.split_once("; ")?;
    id.parse::<u32>().ok()?;
    let (_catalog, rest) = rest.split_once(' ')?;
    let (_oid, object) = rest.split_once(' ')?;
    Some(object)
}

/// A table as a pattern for `pg_dump --table`: in double quotes every character stands for itself.
pub(super) fn table_pattern(table: &crate::names::TableName) -> String {
    table.sql()
}

/// Removes from a script what only `psql` understands, and settings an older server does not know.
///
/// `pg_restore` of current minor releases begins a script with `\restrict KEY` and ends it with
/// `\unrestrict KEY`; from 17 on it sets `transaction_timeout`, which servers before 17 refuse.
pub(super) fn server_script(script: &str, replica_version_num: i32) -> String {
    let key = script
        .lines()
        .find_map(|line| line.strip_prefix("\\restrict "));
    let is_ours = |line: &str| {
        key.is_some_and(|key| {
            line.strip_prefix("\\restrict ") == Some(key)
                || line.strip_prefix("\\unrestrict ") == Some(key)
        }) || (replica_version_num < 170_000 && line == "SET transaction_timeout = 0;")
    };
    script
        .split_inclusive('\n')
        .filter(|line| !is_ours(line.trim_end_matches(['\n', '\r'])))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::TableName;

    const LISTING: &str = "\
;
; Archive created at 2026-01-01
;     TOC Entries: 5
;
3201; 2606 16400 CONSTRAINT public orders orders_pkey app
3202; 1259 16402 INDEX public my index app
3203; 1259 16403 INDEX public my app
3204; 0 0 INDEX ATTACH public leaf_idx 
3205; 2606 16404 FK CONSTRAINT public orders orders_fk app
";

    fn entry(kind: &str, tag: &str) -> Entry {
        Entry {
            kind: kind.to_owned(),
            schema: Some("public".to_owned()),
            tag: tag.to_owned(),
            owner: "app".to_owned(),
        }
    }

    #[test]
    fn only_the_object_meant_is_left_out_even_if_another_name_begins_alike() {
        let mut left_out = LeftOut::default();
        left_out.entry(&entry("INDEX", "my"));
        let (kept, remains) = left_out.filter(LISTING);
        assert!(remains);
        assert!(kept.contains("INDEX public my index app"));
        assert!(!kept.contains("INDEX public my app"));
    }

    #[test]
    fn a_kind_is_left_out_without_the_kinds_that_begin_alike() {
        let mut left_out = LeftOut::default();
        left_out.kind("INDEX ATTACH");
        left_out.kind("CONSTRAINT");
        let (kept, _) = left_out.filter(LISTING);
        assert!(!kept.contains("leaf_idx") && !kept.contains("orders_pkey"));
        assert!(kept.contains("orders_fk") && kept.contains("3203;"));
    }

    #[test]
    fn an_entry_without_owner_matches_the_line_with_its_trailing_blank() {
        let mut left_out = LeftOut::default();
        left_out.entry(&Entry {
            owner: String::new(),
            ..entry("INDEX ATTACH", "leaf_idx")
        });
        assert!(!left_out.filter(LISTING).0.contains("leaf_idx"));
    }

    #[test]
    fn some_kinds_and_all_others_are_the_whole() {
        let kinds = ["FK CONSTRAINT", "INDEX ATTACH"];
        let without = LeftOut::default().without(&kinds).filter(LISTING).0;
        let only = LeftOut::all_but_kinds(&kinds).filter(LISTING).0;
        let objects = |listing: &str| {
            let lines = listing.lines().filter_map(object_of).map(str::to_owned);
            lines.collect::<HashSet<String>>()
        };
        assert_eq!(objects(&without).len(), 3);
        assert_eq!(objects(&only).len(), 2);
        assert_eq!(&objects(&without) | &objects(&only), objects(LISTING));
    }

    #[test]
    fn nothing_remains_when_only_comments_do() {
        let mut left_out = LeftOut::default();
        for kind in ["CONSTRAINT", "INDEX", "FK CONSTRAINT"] {
            left_out.kind(kind);
        }
        assert!(!left_out.filter(LISTING).1);
    }

    #[test]
    fn patterns_quote_names_so_that_nothing_in_them_is_special() {
        let table = TableName {
            schema: "Säle".to_owned(),
            name: "a.b*\"c$".to_owned(),
        };
        assert_eq!(table_pattern(&table), "\"Säle\".\"a.b*\"\"c$\"");
    }

    #[test]
    fn a_script_loses_what_only_psql_or_a_newer_server_understands() {
        let script = "\\restrict k1\nSET transaction_timeout = 0;\nSELECT '\n\\restrict other\n';\n\\unrestrict k1\n";
        assert_eq!(
            server_script(script, 150_000),
            "SELECT '\n\\restrict other\n';\n"
        );
        assert!(server_script(script, 170_000).starts_with("SET transaction_timeout"));
    }
}
