//! ● The statements of tables without a key: many rows at once, found by all of their values.
//!
//! Pure. Of several equal rows one is as good as another, so each wanted row says of how many it is wanted, and what is found
//! is numbered:
//!
//! ```text
//! wanted  one row per distinct old row: its values, its number, how many
//! found   the table's rows that are equal to one of them, numbered within each
//! done    the first so many of each
//! ```
//! What is equal says `*=`, which compares the stored bytes: 1.0 and 1.00 are different rows here, and types without an
//! equality have one. It can neither be hashed nor looked up, so other comparisons go before it, which it implies: the
//! type's own `=` where the values are not NULL, which an index may serve; otherwise the hash of the value's text.

use super::sql::{Sent, array_of, conjunction, equals, expecting_of, list, value};
use super::target::Target;

/// Which of the wanted rows have NULL in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Nulls {
    /// None.
    None,
    /// Some.
    Some,
    /// All.
    All,
}

/// Deletes rows. After their columns come, for each, its number and how many of it go.
pub(super) fn delete(target: &Target, old: &[Sent], nulls: &[Nulls]) -> String {
    let n = old.len();
    let (holder, same_place) = (target.holder(), same_place(target));
    let wanted = wanted(target, old, ["kind", "copies"]);
    let found = found(target, old, nulls, "d.copies", "true");
    let doing = format!(
        "{wanted}), {found}, done AS (DELETE FROM {holder} AS t USING found AS f \
         WHERE {same_place} AND f.copy OPERATOR(pg_catalog.<=) f.copies \
         RETURNING 1"
    );
    expecting_of("wanted", &doing, target, "delete", n + 2)
}

/// Updates rows. After their old and their new columns come, for each, the number of its old row, and which of those that
/// have this number it is, counted from one.
pub(super) fn update(target: &Target, old: &[Sent], nulls: &[Nulls], new: &[Sent]) -> String {
    let all: Vec<Sent> = old.iter().chain(new).copied().collect();
    let (holder, same_place) = (target.holder(), same_place(target));
    let wanted = wanted(target, &all, ["kind", "copy"]);
    let first = "d.copy OPERATOR(pg_catalog.=) 1";
    let found = found(target, old, nulls, "1 AS one", first);
    let sets = list(new.iter().zip(old.len()..).filter_map(|(sent, i)| {
        let column = &target.columns[sent.position];
        // It is the same in the old row.
        let is_set = !column.is_identity_always;
        is_set.then(|| format!("{} = {}", column.name, value(target, *sent, "d", i)))
    }));
    let (verb, rest) = match sets.is_empty() {
        true => (format!("SELECT 1 FROM {holder} AS t, "), ""),
        false => (
            format!("UPDATE {holder} AS t SET {sets} FROM "),
            " RETURNING 1",
        ),
    };
    let doing = format!(
        "{wanted}), {found}, done AS ({verb}found AS f, wanted AS d \
         WHERE {same_place} AND f.kind OPERATOR(pg_catalog.=) d.kind \
         AND f.copy OPERATOR(pg_catalog.=) d.copy{rest}"
    );
    expecting_of("wanted", &doing, target, "update", all.len() + 2)
}

/// Where a row is.
fn same_place(target: &Target) -> &'static str {
    match target.top {
        Some(_) => {
            "t.ctid OPERATOR(pg_catalog.=) f.place AND t.tableoid OPERATOR(pg_catalog.=) f.partition"
        }
        None => "t.ctid OPERATOR(pg_catalog.=) f.place",
    }
}

/// The rows that the arrays hold, and two numbers for each.
fn wanted(target: &Target, sent: &[Sent], numbers: [&str; 2]) -> String {
    let columns = sent
        .iter()
        .enumerate()
        .map(|(i, sent)| format!("pg_catalog.unnest({}) AS c{i}", array_of(target, *sent, i)));
    let numbers = numbers.iter().zip(sent.len() + 1..);
    let numbers = numbers
        .map(|(name, number)| format!("pg_catalog.unnest(${number}::pg_catalog.int8[]) AS {name}"));
    format!("SELECT {}", list(columns.chain(numbers)))
}

/// The table's rows that are equal to a wanted one, numbered within each.
fn found(target: &Target, old: &[Sent], nulls: &[Nulls], more: &str, which: &str) -> String {
    let mut conditions = vec![which.to_owned()];
    conditions.extend(
        old.iter()
            .zip(nulls)
            .enumerate()
            .map(|(i, (sent, nulls))| looks_equal(target, *sent, *nulls, i)),
    );
    if !old.is_empty() {
        let stored = old
            .iter()
            .map(|sent| format!("s.{}", target.columns[sent.position].name));
        let meant = old
            .iter()
            .enumerate()
            .map(|(i, sent)| typed(target, *sent, i));
        // As records: two bare rows would be compared column by column.
        conditions.push(format!(
            "ROW({})::record OPERATOR(pg_catalog.*=) ROW({})::record",
            list(stored),
            list(meant)
        ));
    }
    format!(
        "found AS (SELECT s.ctid AS place{}, d.kind, {more}, \
         pg_catalog.row_number() OVER (PARTITION BY d.kind) AS copy \
         FROM wanted AS d, {} AS s WHERE {})",
        match target.top {
            Some(_) => ", s.tableoid AS partition",
            None => "",
        },
        target.holder(),
        conjunction(conditions.into_iter())
    )
}

fn typed(target: &Target, sent: Sent, i: usize) -> String {
    let column = &target.columns[sent.position];
    format!("{}::{}", value(target, sent, "d", i), column.type_sql)
}

/// Holds for every two values that are the same, and for few others.
fn looks_equal(target: &Target, sent: Sent, nulls: Nulls, i: usize) -> String {
    let column = &target.columns[sent.position];
    match nulls {
        // Not IS NULL: that also holds for a composite value whose fields are all NULL.
        Nulls::All => format!("s.{} IS NOT DISTINCT FROM NULL", column.name),
        Nulls::None if column.equality_schema.is_some() => equals(target, sent, "s", "d", i),
        Nulls::None | Nulls::Some => {
            let hash = |value: &str| {
                format!(
                    "COALESCE(pg_catalog.hashtextextended(({value})::pg_catalog.text COLLATE \
                     pg_catalog.\"C\", 0), 0)"
                )
            };
            format!(
                "{} OPERATOR(pg_catalog.=) {}",
                hash(&format!("s.{}", column.name)),
                hash(&typed(target, sent, i))
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sql::tests::{SENT, target};
    use super::*;

    #[test]
    fn equal_rows_are_numbered_and_found_by_what_can_be_hashed_and_by_their_stored_bytes() {
        let target = target(false);
        let sql = delete(&target, &SENT, &[Nulls::None, Nulls::Some]);
        for part in [
            "s.\"id\" OPERATOR(\"pg_catalog\".=) d.c0",
            "hashtextextended((s.\"note\")::pg_catalog.text",
            "ROW(s.\"id\", s.\"note\")::record OPERATOR(pg_catalog.*=) \
             ROW(d.c0::integer, d.c1::public.mood::public.mood)::record",
            "pg_catalog.row_number() OVER (PARTITION BY d.kind)",
            "f.copy OPERATOR(pg_catalog.<=) f.copies",
            "pg_catalog.unnest($4::pg_catalog.int8[]) AS copies",
            "$5::bigint, 'public.t', 'delete'",
        ] {
            assert!(sql.contains(part), "{part} in {sql}");
        }
        let sql = update(&target, &SENT, &[Nulls::None, Nulls::All], &SENT[1..]);
        for part in [
            "s.\"note\" IS NOT DISTINCT FROM NULL",
            "SET \"note\" = d.c2::public.mood FROM found",
            "pg_catalog.unnest($5::pg_catalog.int8[]) AS copy",
            "$6::bigint, 'public.t', 'update'",
        ] {
            assert!(sql.contains(part), "{part} in {sql}");
        }
    }
}
