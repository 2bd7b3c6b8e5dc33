//! ● Compares one table of the source with the table of the same name on the replica.
//!
//! Pure. Finds what would make a batch fail ("no such column", "violates …") or silently slow before
//! the first batch meets it.
//!
//! # What it does not do
//! - It does not compare what the apply never meets: views, functions, foreign keys (silent under
//!   `session_replication_role = replica`), ordinary indexes, the order of columns.

use super::finding::{Finding, FindingPlace, some_of};
use super::shape::{ColumnShape, TableShape, Unique};
use crate::names::TableName;

/// Everything that differs between the two. Empty when rows of the source fit.
pub(super) fn table(
    at: &FindingPlace,
    name: &TableName,
    source: &TableShape,
    replica: &TableShape,
) -> Vec<Finding> {
    if let Some(finding) = kind(at, replica) {
        return vec![finding.on(name)];
    }
    let mut findings = columns(at, &source.columns, &replica.columns);
    findings.extend(uniques(at, &source.uniques, &replica.uniques));
    findings.extend(checks(at, &source.checks, &replica.checks));
    findings.into_iter().map(|f| f.on(name)).collect()
}

fn kind(at: &FindingPlace, replica: &TableShape) -> Option<Finding> {
    let what = match replica.kind.as_str() {
        "r" | "p" => return None,
        "f" => "a foreign table",
        "v" => "a view",
        "m" => "a materialized view",
        _ => "no table",
    };
    let finding = at.error("table_kind", format!("is {what} on the replica"));
    Some(finding.hint("rename it away on the replica; rows of the source need a table"))
}

const SAME_COLUMNS: &str = "make the same change on the replica that was made on the source; \
     where DDL is captured (ddl_capture) it comes by itself, or dr-agent ddl says why not";

fn columns(at: &FindingPlace, source: &[ColumnShape], replica: &[ColumnShape]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let find = |columns: &[ColumnShape], name: &str| {
        columns.iter().find(|column| column.name == name).cloned()
    };
    for column in source {
        let name = &column.name;
        let Some(other) = find(replica, name) else {
            // A generated column is never sent; that the replica lacks it harms no batch.
            findings.push(if column.generated {
                at.warning(
                    "column_missing",
                    format!("generated column {name} is not on the replica"),
                )
            } else {
                at.error(
                    "column_missing",
                    format!("column {name} {} is not on the replica", column.type_name),
                )
            });
            continue;
        };
        if column.type_name != other.type_name {
            findings.push(at.error(
                "column_type",
                format!(
                    "column {name} is {} on the source, {} on the replica",
                    column.type_name, other.type_name
                ),
            ));
        }
        if column.generated != other.generated {
            let (here, there) = if column.generated {
                ("generated", "an ordinary column")
            } else {
                ("an ordinary column", "generated")
            };
            findings.push(at.error(
                "column_generated",
                format!("column {name} is {here} on the source, {there} on the replica"),
            ));
        }
        if other.not_null && !column.not_null {
            findings.push(at.error(
                "column_not_null",
                format!("column {name} is NOT NULL on the replica only: a NULL would be refused"),
            ));
        }
    }
    for column in replica {
        if find(source, &column.name).is_some() {
            continue;
        }
        let name = &column.name;
        findings.push(if column.not_null && !column.has_default && !column.generated {
            at.error(
                "column_extra",
                format!("column {name} is on the replica only, NOT NULL and without a default: every insert would be refused"),
            )
        } else {
            at.warning("column_extra", format!("column {name} is on the replica only"))
        });
    }
    findings
        .into_iter()
        .map(|finding| finding.hint(SAME_COLUMNS))
        .collect()
}

fn uniques(at: &FindingPlace, source: &[Unique], replica: &[Unique]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(key) = source.iter().find(|unique| unique.primary)
        && !replica.iter().any(|other| other.valid && alike(key, other))
    {
        findings.push(
            at.error(
                "primary_key_missing",
                format!(
                    "the replica has no unique index on the primary key ({})",
                    key.keys.join(", ")
                ),
            )
            .hint(
                "ALTER TABLE … ADD PRIMARY KEY on the replica: without it every UPDATE and DELETE reads \
                 the whole table, and rows can double",
            ),
        );
    }
    let missing: Vec<&str> = source
        .iter()
        .filter(|one| !one.primary && one.valid && !replica.iter().any(|other| alike(one, other)))
        .map(|one| one.name.as_str())
        .collect();
    if !missing.is_empty() {
        findings.push(
            at.warning(
                "unique_missing",
                format!("the replica lacks {}", some_of(&missing)),
            )
            .hint("create the same unique index on the replica: after a promotion nothing else refuses doubles"),
        );
    }
    let extra: Vec<&str> = replica
        .iter()
        .filter(|other| !source.iter().any(|one| alike(one, other)))
        .map(|other| other.name.as_str())
        .collect();
    if !extra.is_empty() {
        findings.push(
            at.warning(
                "unique_extra",
                format!(
                    "{} is on the replica only and may refuse rows",
                    some_of(&extra)
                ),
            )
            .hint("drop the index on the replica, or create it on the source"),
        );
    }
    findings
}

/// Whether two indexes refuse the same rows, whatever they are called.
fn alike(one: &Unique, other: &Unique) -> bool {
    one.keys == other.keys
        && one.predicate == other.predicate
        && one.nulls_equal == other.nulls_equal
}

fn checks(at: &FindingPlace, source: &[String], replica: &[String]) -> Option<Finding> {
    let definition = |text: &str| text.split_once(": ").map(|(_, def)| def.to_owned());
    let extra: Vec<&str> = replica
        .iter()
        .filter(|other| {
            !source
                .iter()
                .any(|one| definition(one) == definition(other))
        })
        .map(String::as_str)
        .collect();
    if extra.is_empty() {
        return None;
    }
    let finding = at.warning(
        "check_extra",
        format!(
            "constraint on the replica only may refuse rows: {}",
            some_of(&extra)
        ),
    );
    Some(finding.hint("drop the constraint on the replica, or create it on the source"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingSide, Severity};
    use super::*;

    fn column(name: &str, type_name: &str) -> ColumnShape {
        ColumnShape {
            name: name.to_owned(),
            type_name: type_name.to_owned(),
            ..ColumnShape::default()
        }
    }

    fn unique(name: &str, keys: &[&str], primary: bool) -> Unique {
        Unique {
            name: name.to_owned(),
            primary,
            valid: true,
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..Unique::default()
        }
    }

    fn shape() -> TableShape {
        TableShape {
            kind: "r".to_owned(),
            columns: vec![column("id", "integer"), column("note", "text")],
            uniques: vec![unique("t_pkey", &["id"], true)],
            ..TableShape::default()
        }
    }

    fn found(source: &TableShape, replica: &TableShape) -> Vec<(Severity, &'static str)> {
        let name = TableName {
            schema: "s".to_owned(),
            name: "t".to_owned(),
        };
        table(
            &FindingPlace::database(FindingSide::Both, "app"),
            &name,
            source,
            replica,
        )
        .iter()
        .inspect(|f| assert!(f.hint.is_some() && f.object.as_deref() == Some("s.t")))
        .map(|f| (f.severity, f.code))
        .collect()
    }

    #[test]
    fn equal_tables_differ_in_nothing_whatever_the_order_of_columns() {
        let mut replica = shape();
        replica.columns.reverse();
        replica.uniques[0].name = "another_name".to_owned();
        assert_eq!(found(&shape(), &replica), []);
    }

    #[test]
    fn every_way_a_column_can_differ_is_told_apart() {
        type Change = fn(&mut TableShape, &mut TableShape);
        let table: [(Change, Severity, &str); 9] = [
            (
                |_, r| drop(r.columns.pop()),
                Severity::Error,
                "column_missing",
            ),
            (
                |s, r| {
                    s.columns[1].generated = true;
                    r.columns.pop();
                },
                Severity::Warning,
                "column_missing",
            ),
            (
                |_, r| r.columns[1].type_name = "character varying(5)".to_owned(),
                Severity::Error,
                "column_type",
            ),
            (
                |s, _| s.columns[1].generated = true,
                Severity::Error,
                "column_generated",
            ),
            (
                |_, r| r.columns[1].generated = true,
                Severity::Error,
                "column_generated",
            ),
            (
                |_, r| r.columns[1].not_null = true,
                Severity::Error,
                "column_not_null",
            ),
            (
                |_, r| {
                    r.columns.push(ColumnShape {
                        not_null: true,
                        ..column("extra", "integer")
                    });
                },
                Severity::Error,
                "column_extra",
            ),
            (
                |_, r| {
                    r.columns.push(ColumnShape {
                        not_null: true,
                        has_default: true,
                        ..column("extra", "integer")
                    });
                },
                Severity::Warning,
                "column_extra",
            ),
            (
                |_, r| r.columns.push(column("extra", "integer")),
                Severity::Warning,
                "column_extra",
            ),
        ];
        for (index, (change, severity, code)) in table.into_iter().enumerate() {
            let (mut source, mut replica) = (shape(), shape());
            change(&mut source, &mut replica);
            assert_eq!(found(&source, &replica), [(severity, code)], "row {index}");
        }
    }

    #[test]
    fn not_null_on_the_source_only_harms_nothing() {
        let mut source = shape();
        source.columns[1].not_null = true;
        assert_eq!(found(&source, &shape()), []);
    }

    #[test]
    fn a_replica_without_the_primary_key_is_an_error() {
        let mut replica = shape();
        replica.uniques.clear();
        assert_eq!(
            found(&shape(), &replica),
            [(Severity::Error, "primary_key_missing")]
        );
        replica.uniques = vec![unique("u", &["id"], false)];
        assert_eq!(
            found(&shape(), &replica),
            [],
            "any unique index on the key serves"
        );
        replica.uniques[0].valid = false;
        assert_eq!(
            found(&shape(), &replica),
            [(Severity::Error, "primary_key_missing")]
        );
    }

    #[test]
    fn unique_indexes_on_one_side_only_are_warnings() {
        let (mut source, mut replica) = (shape(), shape());
        replica.uniques.push(unique("only_here", &["note"], false));
        assert_eq!(
            found(&source, &replica),
            [(Severity::Warning, "unique_extra")]
        );
        source.uniques.push(Unique {
            predicate: "(id > 5)".to_owned(),
            ..unique("partial", &["note"], false)
        });
        assert_eq!(
            found(&source, &replica),
            [
                (Severity::Warning, "unique_missing"),
                (Severity::Warning, "unique_extra")
            ],
            "a partial index refuses other rows than a whole one"
        );
    }

    #[test]
    fn a_view_in_the_place_of_a_table_is_one_error() {
        let replica = TableShape {
            kind: "v".to_owned(),
            ..TableShape::default()
        };
        assert_eq!(found(&shape(), &replica), [(Severity::Error, "table_kind")]);
    }

    #[test]
    fn a_check_constraint_of_the_replica_alone_may_refuse_rows() {
        let mut replica = shape();
        replica.checks = vec!["positive: CHECK ((id > 0))".to_owned()];
        assert_eq!(
            found(&shape(), &replica),
            [(Severity::Warning, "check_extra")]
        );
        let mut source = shape();
        source.checks = vec!["other_name: CHECK ((id > 0))".to_owned()];
        assert_eq!(found(&source, &replica), []);
    }
}
