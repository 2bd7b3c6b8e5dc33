//! Are two databases equal? By the full content of every table, not by counts.
//!
//! Both servers fold each table into a count and the sum of 128-bit hashes of its rows as text, which
//! no order of rows disturbs and no duplicate escapes. Where a table differs, its rows are fetched and
//! the difference is shown.
//!
//! # Invariants
//! - Both sides render values under the same settings; columns are matched by name, because the
//!   order of columns may differ.
//! - A table that exists on one side only is a difference.
//!
//! # What it does not do
//! Sequences are compared by [`expect_sequences_ahead`] only: a replica's may be ahead. Unlogged tables, foreign
//! tables and the schema `dr_agent` are not user data and left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use dr_agent::names::stream::StreamName;
use dr_agent::pg::quote::{quote_ident, quote_literal};

use crate::client::Client;
use crate::wait::{PATIENCE, wait_for};

/// Rows of a differing table that a message shows, per side.
const SHOWN_MAX: usize = 10;

// One snapshot for all tables of a side, and settings that end with the transaction.
const SAME_RENDERING: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ;
    SET LOCAL extra_float_digits = 3; SET LOCAL datestyle = 'ISO, MDY';
    SET LOCAL intervalstyle = 'postgres'; SET LOCAL timezone = 'UTC';
    SET LOCAL bytea_output = 'hex'; SET LOCAL lc_monetary = 'C';
    SET LOCAL xmloption = 'content'; SET LOCAL search_path = ''";

const TABLES: &str = "SELECT n.nspname, c.relname,
        (SELECT string_agg(a.attname, E'\\n' ORDER BY a.attname COLLATE \"C\") FROM pg_catalog.pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_'
      AND n.nspname NOT IN ('information_schema', 'dr_agent')";

/// A table and the names of its columns, sorted.
type Tables = BTreeMap<(String, String), Vec<String>>;

/// Fails the test, showing rows, unless every user table is equal on both sides.
pub async fn expect_same_content(source: &Client, replica: &Client) {
    expect_same_content_without(source, replica, &[]).await;
}

/// The same, leaving out tables named `schema.table`.
pub async fn expect_same_content_without(source: &Client, replica: &Client, without: &[&str]) {
    let differences = differences(source, replica, without).await;
    assert!(
        differences.is_empty(),
        "source and replica differ:\n{differences}"
    );
}

/// Describes how the user tables differ; empty when they do not.
pub async fn differences(source: &Client, replica: &Client, without: &[&str]) -> String {
    source.run(SAME_RENDERING).await;
    replica.run(SAME_RENDERING).await;
    let on_source = tables(source, without).await;
    let on_replica = tables(replica, without).await;
    let mut text = String::new();
    for (name, columns) in &on_source {
        let (schema, table) = name;
        match on_replica.get(name) {
            None => writeln!(text, "{schema}.{table} is on the source only"),
            Some(other) if other != columns => {
                writeln!(
                    text,
                    "{schema}.{table} has columns {columns:?} and {other:?}"
                )
            }
            Some(_) => write!(text, "{}", difference(source, replica, name, columns).await),
        }
        .expect("a string can be written to");
    }
    for (schema, table) in on_replica
        .keys()
        .filter(|name| !on_source.contains_key(name))
    {
        writeln!(text, "{schema}.{table} is on the replica only").expect("it is a string");
    }
    source.run("COMMIT").await;
    replica.run("COMMIT").await;
    text
}

/// Begins a transaction that reads one snapshot and renders values alike on all servers; the caller ends it.
pub async fn begin(client: &Client) {
    client.run(SAME_RENDERING).await;
}

/// Rows and a digest of each user table, within [`begin`].
pub async fn digests(client: &Client) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (name, columns) in tables(client, &[]).await {
        let digest = client.rows(&digest(&rows(&name, &columns))).await;
        let digest: Vec<String> = digest.into_iter().flatten().flatten().collect();
        found.insert(format!("{}.{}", name.0, name.1), digest.join(" "));
    }
    found
}

/// The rows of a table as text, for a FROM.
fn rows((schema, table): &(String, String), columns: &[String]) -> String {
    let columns: Vec<String> = columns.iter().map(|name| quote_ident(name)).collect();
    // ONLY: a partition or child is a table of its own.
    format!(
        "(SELECT ROW({})::text AS t FROM ONLY {}.{}) AS rows",
        columns.join(", "),
        quote_ident(schema),
        quote_ident(table)
    )
}

fn digest(rows: &str) -> String {
    format!(
        "SELECT count(*), sum(('x' || left(h, 16))::bit(64)::bigint::numeric),
                sum(('x' || right(h, 16))::bit(64)::bigint::numeric)
         FROM (SELECT md5(t) AS h FROM {rows}) AS hashes"
    )
}

async fn tables(client: &Client, without: &[&str]) -> Tables {
    let rows = client.rows(TABLES).await;
    rows.into_iter()
        .filter_map(|row| {
            let [schema, table, columns] = row.try_into().ok()?;
            let (schema, table) = (schema?, table?);
            if without.contains(&format!("{schema}.{table}").as_str()) {
                return None;
            }
            let columns = columns.unwrap_or_default();
            let columns = columns.lines().map(str::to_owned).collect();
            Some(((schema, table), columns))
        })
        .collect()
}

async fn difference(
    source: &Client,
    replica: &Client,
    name: &(String, String),
    columns: &[String],
) -> String {
    let (schema, table) = name;
    let rows = rows(name, columns);
    let digest = digest(&rows);
    let (on_source, on_replica) = tokio::join!(source.rows(&digest), replica.rows(&digest));
    if on_source == on_replica {
        return String::new();
    }
    let count = |digest: &[Vec<Option<String>>]| digest[0][0].clone().unwrap_or_default();
    let mut text = format!(
        "{schema}.{table}: {} rows on the source, {} on the replica\n",
        count(&on_source),
        count(&on_replica)
    );
    let grouped = format!("SELECT t, count(*) FROM {rows} GROUP BY t");
    let (ours, theirs) = tokio::join!(source.rows(&grouped), replica.rows(&grouped));
    for (side, mine, other) in [("source", &ours, &theirs), ("replica", &theirs, &ours)] {
        let other: std::collections::HashSet<_> = other.iter().collect();
        for row in mine
            .iter()
            .filter(|row| !other.contains(row))
            .take(SHOWN_MAX)
        {
            let rendered = row[0].clone().unwrap_or_default();
            let shown: String = rendered.chars().take(300).collect();
            let times = row[1].clone().unwrap_or_default();
            writeln!(text, "  {side} only, {times} times: {shown}").expect("it is a string");
        }
    }
    text
}

/// Waits until the replica has applied everything that is committed on the source by now.
///
/// Needs a running agent: its heartbeat gives a quiet source the later commit that proves it.
pub async fn wait_caught_up(source: &Client, replica: &Client, stream: &StreamName) {
    wait_caught_up_within(PATIENCE, source, replica, stream).await;
}

/// The same, with another deadline.
pub async fn wait_caught_up_within(
    deadline: Duration,
    source: &Client,
    replica: &Client,
    stream: &StreamName,
) {
    let lsn = source
        .value("SELECT pg_current_wal_insert_lsn()")
        .await
        .expect("the source has a position");
    let what = format!("the replica to apply everything before {lsn}");
    // With several lanes the progress row shows a moment before what the others have prepared.
    let query = format!(
        "SELECT end_lsn, end_lsn >= '{lsn}' AND NOT EXISTS (
                    SELECT FROM pg_prepared_xacts WHERE database = current_database() AND gid LIKE 'dr\\_agent:%')
           FROM dr_agent.progress WHERE stream = {}",
        quote_literal(stream.as_str())
    );
    wait_for(&what, deadline, || async {
        let rows = replica.try_rows(&query).await?;
        let Some([end_lsn, reached]) = rows.first().and_then(|row| row.first_chunk()) else {
            return Err("no progress row".to_owned());
        };
        if reached.as_deref() == Some("t") {
            Ok(())
        } else {
            Err(format!("end_lsn {end_lsn:?}"))
        }
    })
    .await;
}

/// Waits until the replica has caught up, then compares everything.
pub async fn expect_equal_when_caught_up(source: &Client, replica: &Client, stream: &StreamName) {
    wait_caught_up(source, replica, stream).await;
    expect_same_content(source, replica).await;
}

/// Fails the test unless every sequence of the source exists on the replica, and the next value the replica
/// would give is not one the source has given.
pub async fn expect_sequences_ahead(source: &Client, replica: &Client) {
    const POSITIONS: &str = "SELECT format('%I.%I', schemaname, sequencename),
               increment_by, coalesce(last_value, start_value - increment_by)
        FROM pg_catalog.pg_sequences WHERE schemaname NOT IN ('dr_agent')";
    let positions = |rows: Vec<Vec<Option<String>>>| -> BTreeMap<String, (i128, i128)> {
        rows.into_iter()
            .map(|row| {
                let number = |at: usize| -> i128 {
                    let text = row[at].as_deref().expect("it is not NULL");
                    text.parse().expect("it is a number")
                };
                let name = row[0].clone().expect("it is not NULL");
                (name, (number(1), number(2)))
            })
            .collect()
    };
    let on_source = positions(source.rows(POSITIONS).await);
    let on_replica = positions(replica.rows(POSITIONS).await);
    for (name, (step, last)) in on_source {
        let Some((_, other)) = on_replica.get(&name) else {
            panic!("sequence {name} is missing on the replica");
        };
        let ahead = if step > 0 {
            *other >= last
        } else {
            *other <= last
        };
        assert!(
            ahead,
            "sequence {name}: {last} given on the source, {other} on the replica"
        );
    }
}
