//! ● The text of every statement the replica sink runs.
//!
//! Pure. Statements take one array per column ([`super::array`]) and, last, the number of rows they
//! must touch. Every name is quoted, every function and operator qualified: apply sessions have an
//! empty `search_path`, as PostgreSQL's own apply workers do.

use std::fmt::Write as _;
use std::time::SystemTime;

use super::array::ArrayForm;
use super::target::Target;
use crate::pg::PgLsn;
use crate::pg::quote::quote_literal;

/// A column that a statement takes as a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sent {
    /// Position in the relation.
    pub(super) position: usize,
    /// In which form.
    pub(super) form: ArrayForm,
}

/// `SELECT dr_agent.advance(…)`: the compare-and-set that begins every apply transaction.
pub(super) fn advance(
    stream: &str,
    term: i64,
    previous: PgLsn,
    batch: i64,
    end: PgLsn,
    committed: SystemTime,
) -> String {
    let micros = committed
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_micros();
    format!(
        "SELECT dr_agent.advance({}, {term}, '{previous}', {batch}, '{end}', \
         pg_catalog.to_timestamp(0) + interval '1 microsecond' * {micros})",
        quote_literal(stream),
    )
}

/// `SELECT dr_agent.hold(…)`: what begins a lane's transaction beside the one of lane 0.
pub(super) fn hold(stream: &str, term: i64) -> String {
    format!("SELECT dr_agent.hold({}, {term})", quote_literal(stream))
}

/// Inserts rows.
pub(super) fn insert(target: &Target, sent: &[Sent]) -> String {
    let table = target.taker();
    let doing = if sent.is_empty() {
        // A table without columns still has rows.
        format!("INSERT INTO {table} SELECT FROM pg_catalog.generate_series(1, $1::bigint)")
    } else {
        let names = list(
            sent.iter()
                .map(|sent| target.columns[sent.position].name.clone()),
        );
        let values = list(
            sent.iter()
                .enumerate()
                .map(|(i, sent)| value(target, *sent, "d", i)),
        );
        let from = unnest(target, sent, 0, "d");
        format!("INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {from}")
    };
    expecting(
        &format!("{doing} RETURNING 1"),
        target,
        "insert",
        sent.len(),
    )
}

/// Updates one row per key. `sent` holds the key's columns and those that get values.
pub(super) fn update(target: &Target, sent: &[Sent]) -> String {
    let matches = conjunction(
        sent.iter()
            .enumerate()
            .filter(|(_, sent)| target.is_key(sent.position))
            .map(|(i, sent)| equals(target, *sent, "t", "d", i)),
    );
    let from = unnest(target, sent, 0, "d");
    let stays = conjunction(
        sent.iter()
            .enumerate()
            .filter(|(_, sent)| target.is_fixed(sent.position))
            .map(|(i, sent)| equals(target, *sent, "t", "d", i)),
    );
    let setting = |matches: &str| {
        let sets = assignments(target, sent, "d", |sent| !target.is_key(sent.position));
        setting(target, &sets, &from, matches)
    };
    if stays.is_empty() {
        return expecting(&setting(&matches), target, "update", sent.len());
    }
    let same = setting(&format!("{matches} AND {stays}"));
    let moved = replacing(target, sent, &from, &format!("{matches} AND NOT ({stays})"));
    let doing =
        format!("{same}), {moved}, done AS (SELECT 1 FROM same UNION ALL SELECT 1 FROM came");
    expecting_of("same", &doing, target, "update", sent.len())
}

/// UPDATE; where nothing but what a row is found by was sent, a look whether the row is there.
fn setting(target: &Target, sets: &str, from: &str, matches: &str) -> String {
    let holder = target.holder();
    match sets.is_empty() {
        true => format!("SELECT 1 FROM {holder} AS t, {from} WHERE {matches}"),
        false => {
            format!("UPDATE {holder} AS t SET {sets} FROM {from} WHERE {matches} RETURNING 1")
        }
    }
}

/// Two terms, `gone` and `came`, that put a new row in the place of an old one. An identity column that is GENERATED ALWAYS
/// can be given a value in no other way. What was not sent, and what is only here, is taken over from the old row.
fn replacing(target: &Target, sent: &[Sent], from: &str, matches: &str) -> String {
    let written: Vec<(usize, &Sent)> = sent
        .iter()
        .enumerate()
        .filter(|(_, sent)| !target.columns[sent.position].is_generated)
        .collect();
    let is_sent = |position: &usize| sent.iter().any(|sent| sent.position == *position);
    let unsent = target.written().filter(|position| !is_sent(position));
    let kept: Vec<&String> = unsent
        .map(|position| &target.columns[position].name)
        .chain(&target.only_here)
        .collect();
    let kept_as = |i: usize| format!("k{i}");
    let (holder, taker) = (target.holder(), target.taker());
    let returned = list(
        written.iter().map(|(i, _)| format!("d.c{i}")).chain(
            kept.iter()
                .enumerate()
                .map(|(i, name)| format!("t.{name} AS {}", kept_as(i))),
        ),
    );
    let names = list(
        written
            .iter()
            .map(|(_, sent)| target.columns[sent.position].name.clone())
            .chain(kept.iter().map(|name| (*name).clone())),
    );
    let values = list(
        written
            .iter()
            .map(|(i, sent)| value(target, **sent, "gone", *i))
            .chain((0..kept.len()).map(kept_as)),
    );
    format!(
        "gone AS (DELETE FROM {holder} AS t USING {from} WHERE {matches} RETURNING {returned}), \
         came AS (INSERT INTO {taker} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM gone RETURNING 1)"
    )
}

/// Deletes one row per key.
pub(super) fn delete(target: &Target, key: &[Sent]) -> String {
    let matches = conjunction(
        key.iter()
            .enumerate()
            .map(|(i, sent)| equals(target, *sent, "t", "d", i)),
    );
    let doing = format!(
        "DELETE FROM {} AS t USING {} WHERE {matches} RETURNING 1",
        target.holder(),
        unnest(target, key, 0, "d")
    );
    expecting(&doing, target, "delete", key.len())
}

/// Updates one row, found by its old key, to another key: for what leaves a value on the replica. `is_replaced`: an identity
/// column gets another value, or may.
pub(super) fn move_one(target: &Target, old: &[Sent], new: &[Sent], is_replaced: bool) -> String {
    let matches = conjunction(
        old.iter()
            .enumerate()
            .map(|(i, sent)| equals(target, *sent, "t", "o", i)),
    );
    let from = list(
        [(old, 0, "o"), (new, old.len(), "d")]
            .into_iter()
            .filter(|(sent, ..)| !sent.is_empty())
            .map(|(sent, offset, alias)| unnest(target, sent, offset, alias)),
    );
    let parameters = old.len() + new.len();
    if is_replaced {
        let doing = replacing(target, new, &from, &matches);
        let doing = doing.strip_prefix("gone AS (").unwrap_or(&doing);
        let doing = format!("{doing}, done AS (SELECT 1 FROM came");
        return expecting_of("gone", &doing, target, "update", parameters);
    }
    let sets = assignments(target, new, "d", |_| true);
    expecting(
        &setting(target, &sets, &from, &matches),
        target,
        "update",
        parameters,
    )
}

/// Whether the values of a column are such as the replica's type takes; of the rows of the array, for whom it fails.
pub(super) fn probe(target: &Target, sent: Sent) -> String {
    format!(
        "SELECT pg_catalog.count({}::{}) FROM {}",
        value(target, sent, "d", 0),
        target.columns[sent.position].full_type_sql,
        unnest(target, &[sent], 0, "d")
    )
}

/// TRUNCATE. `ONLY`, and without CASCADE: the source has resolved both into the list. A function of the replica's,
/// because what refers to these tables there is for its catalog to say at that moment.
pub(super) fn truncate<'t>(
    targets: impl Iterator<Item = &'t Target>,
    restart_identity: bool,
) -> String {
    let tables = list(targets.map(|target| quote_literal(&target.table.sql())));
    format!("SELECT dr_agent.truncate(ARRAY[{tables}]::pg_catalog.regclass[], {restart_identity})")
}

/// Wraps a data-modifying statement so that it fails unless it touches `$n` rows.
fn expecting(doing: &str, target: &Target, verb: &str, parameters: usize) -> String {
    expecting_of("done", doing, target, verb, parameters)
}

/// The same of a statement whose first term is called so; the last is `done`.
pub(super) fn expecting_of(
    first: &str,
    doing: &str,
    target: &Target,
    verb: &str,
    parameters: usize,
) -> String {
    format!(
        "WITH {first} AS ({doing}) \
         SELECT dr_agent.expect(pg_catalog.count(*), ${}::bigint, {}, '{verb}') FROM done",
        parameters + 1,
        quote_literal(&target.table.to_string()),
    )
}

/// The rows that the arrays hold. In a target list, not in FROM: there a function's rows are first stored, in a file
/// beyond `work_mem`, and inserting 500 000 rows took a quarter longer (0.65 s against 0.52 s; COPY 0.55 s).
fn unnest(target: &Target, sent: &[Sent], offset: usize, alias: &str) -> String {
    let columns = list(sent.iter().enumerate().map(|(i, sent)| {
        let array = array_of(target, *sent, offset + i);
        format!("pg_catalog.unnest({array}) AS c{i}")
    }));
    format!("(SELECT {columns}) AS {alias}")
}

/// The parameter behind so many others, as an array.
pub(super) fn array_of(target: &Target, sent: Sent, before: usize) -> String {
    let array = match (sent.form, &target.columns[sent.position].native) {
        (ArrayForm::Native, Some(native)) => native.array_sql.as_str(),
        (ArrayForm::Ahead(_), _) => "pg_catalog.int8[]",
        _ => "pg_catalog.text[]",
    };
    format!("${}::{array}", before + 1)
}

pub(super) fn value(target: &Target, sent: Sent, alias: &str, i: usize) -> String {
    match sent.form {
        ArrayForm::Native => match &target.columns[sent.position] {
            column if column.native.as_ref().is_some_and(|native| native.is_boxed) => {
                format!("{alias}.c{i}::{}", column.type_sql)
            }
            _ => format!("{alias}.c{i}"),
        },
        ArrayForm::Text => format!("{alias}.c{i}::{}", target.columns[sent.position].type_sql),
        ArrayForm::Ahead(reading) => reading.sql(
            &format!("{alias}.c{i}"),
            &target.columns[sent.position].type_sql,
        ),
    }
}

pub(super) fn equals(target: &Target, sent: Sent, row: &str, alias: &str, i: usize) -> String {
    let column = &target.columns[sent.position];
    let schema = column.equality_schema.as_deref().unwrap_or("pg_catalog");
    format!(
        "{row}.{} OPERATOR({schema}.=) {}",
        column.name,
        value(target, sent, alias, i)
    )
}

fn assignments(
    target: &Target,
    sent: &[Sent],
    alias: &str,
    wanted: impl Fn(&Sent) -> bool,
) -> String {
    list(
        sent.iter()
            .enumerate()
            .filter(|(_, sent)| wanted(sent) && !target.columns[sent.position].is_identity_always)
            .map(|(i, sent)| {
                let name = &target.columns[sent.position].name;
                format!("{name} = {}", value(target, *sent, alias, i))
            }),
    )
}

pub(super) fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

pub(super) fn conjunction(items: impl Iterator<Item = String>) -> String {
    let mut text = String::new();
    for (i, item) in items.enumerate() {
        let _ = write!(text, "{}{item}", if i == 0 { "" } else { " AND " });
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::flow::lanes::Spread;
    use crate::flow::net::{Key, KeyColumn, KeyOrder};
    use crate::names::TableName;
    use crate::sink::replica::target::{Native, TargetColumn};

    pub(in crate::sink::replica) fn target(keyed: bool) -> Target {
        let column = |name: &str, type_sql: &str, native: bool| TargetColumn {
            name: format!("\"{name}\""),
            type_sql: type_sql.to_owned(),
            full_type_sql: type_sql.to_owned(),
            native: native.then(|| Native {
                array_sql: format!("{type_sql}[]"),
                element_oid: 23,
                is_boxed: false,
            }),
            is_enum: false,
            is_generated: false,
            is_identity_always: false,
            equality_schema: Some("\"pg_catalog\"".to_owned()),
        };
        let columns = if keyed {
            vec![KeyColumn {
                position: 0,
                order: KeyOrder::Integer,
            }]
        } else {
            Vec::new()
        };
        Target {
            table: TableName {
                schema: "public".to_owned(),
                name: "t".to_owned(),
            },
            columns: vec![
                column("id", "integer", true),
                column("note", "public.mood", false),
            ],
            key: Key { columns },
            top: None,
            spread: Spread::Table,
            only_here: Vec::new(),
            unfit: None,
        }
    }

    pub(in crate::sink::replica) const SENT: [Sent; 2] = [
        Sent {
            position: 0,
            form: ArrayForm::Native,
        },
        Sent {
            position: 1,
            form: ArrayForm::Text,
        },
    ];

    #[test]
    fn native_values_go_in_as_they_are_and_text_is_cast() {
        assert_eq!(
            insert(&target(true), &SENT),
            "WITH done AS (INSERT INTO \"public\".\"t\" (\"id\", \"note\") OVERRIDING SYSTEM VALUE \
             SELECT d.c0, d.c1::public.mood FROM (SELECT pg_catalog.unnest($1::integer[]) AS c0, \
             pg_catalog.unnest($2::pg_catalog.text[]) AS c1) AS d RETURNING 1) \
             SELECT dr_agent.expect(pg_catalog.count(*), $3::bigint, 'public.t', 'insert') FROM done"
        );
    }

    #[test]
    fn an_update_sets_all_but_the_key_and_counts_its_rows() {
        let sql = update(&target(true), &SENT);
        assert!(
            sql.contains("SET \"note\" = d.c1::public.mood FROM"),
            "{sql}"
        );
        assert!(
            sql.contains("WHERE t.\"id\" OPERATOR(\"pg_catalog\".=) d.c0 RETURNING"),
            "{sql}"
        );
        assert!(sql.contains("$3::bigint, 'public.t', 'update'"), "{sql}");
        let key_only = update(&target(true), &SENT[..1]);
        assert!(key_only.contains("(SELECT 1 FROM ONLY"), "{key_only}");
    }

    #[test]
    fn an_identity_column_that_is_always_generated_gets_its_value_by_a_new_row() {
        let mut target = target(true);
        target.columns[1].is_identity_always = true;
        target.only_here = vec!["\"mine\"".to_owned()];
        let sql = update(&target, &SENT);
        let stays = "t.\"note\" OPERATOR(\"pg_catalog\".=) d.c1::public.mood";
        assert!(sql.contains(&format!("AND {stays})")), "{sql}");
        assert!(
            sql.contains(&format!(
                "AND NOT ({stays}) RETURNING d.c0, d.c1, t.\"mine\" AS k0)"
            )),
            "{sql}"
        );
        assert!(
            sql.contains("(\"id\", \"note\", \"mine\") OVERRIDING SYSTEM VALUE SELECT gone.c0, gone.c1::public.mood, k0"),
            "{sql}"
        );
    }

    #[test]
    fn a_key_column_that_is_generated_finds_the_row_and_is_never_set() {
        let mut target = target(true);
        target.columns[0].is_generated = true;
        let sql = update(&target, &SENT);
        assert!(sql.contains("SET \"note\" ="), "{sql}");
        assert!(sql.contains("WHERE t.\"id\" OPERATOR"), "{sql}");
    }
}
