//! Goal: a value of any type arrives as it was, as data, as a key, and without a key.
//! Method: three tables per type (value and array; primary key; keyless with FULL identity), filled before
//! the copy and by random changes through the stream; then compares every table by full content.

use std::fmt::Write as _;

use dr_agent_tests::client::Client;
use dr_agent_tests::compare::{differences, wait_caught_up};
use dr_agent_tests::site::{Database, Site};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::values::{Kind, TYPES, array_with_null, arrays_of, extension_kinds, kinds, value_of};

/// Rounds of random changes.
const ROUNDS: u32 = 8;
/// Changes of each type in one round, which is one transaction.
const CHANGES: usize = 3;

/// A random change of the tables of one kind.
#[derive(Clone, Debug)]
struct Change {
    id: i32,
    action: u8,
    value: Option<String>,
    array: Option<String>,
}

#[test]
fn a_value_of_any_type_arrives_as_it_was() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (site, database, kinds) = runtime.block_on(tables_of_every_type());
    let running = runtime.block_on(async {
        let (_agent, running) = database.replicate().await;
        database.expect_equal().await;
        // What the copy carried, the stream must carry too.
        let source = database.source().await;
        for Kind { name, .. } in &kinds {
            source
                .run(&format!(
                    "INSERT INTO v_{name} SELECT id + 1000, v, a FROM v_{name}"
                ))
                .await;
        }
        database.expect_equal().await;
        running
    });

    let one_of_each: Vec<_> = kinds
        .iter()
        .map(|kind| prop::collection::vec(change_of(kind), CHANGES))
        .collect();
    let config = Config {
        cases: ROUNDS,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..Config::default()
    };
    let (source, replica) =
        runtime.block_on(async { (database.source().await, database.replica().await) });
    let outcome = TestRunner::new(config).run(&one_of_each, |round| {
        let sql = statements(&kinds, &round);
        let found = runtime.block_on(async {
            source.run(&sql).await;
            wait_caught_up(&source, &replica, &database.stream()).await;
            differences(&source, &replica, &[]).await
        });
        prop_assert!(found.is_empty(), "source and replica differ:\n{}", found);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    running.expect_quiet_log();
    runtime.block_on(running.stop());
    drop(site);
}

pub(crate) async fn tables_of_every_type() -> (Site, Database, Vec<Kind>) {
    let site = Site::shared().await;
    let database = site.database("types").await;
    let source = database.source().await;
    source.run(TYPES).await;
    let mut kinds = kinds();
    // Two things a server may lack: it is said which, and the rest is tested.
    if source.try_run("SELECT '<a/>'::xml").await.is_err() {
        eprintln!("this server is built without XML");
        kinds.retain(|kind| kind.name != "xml");
    }
    for (extension, kind) in extension_kinds() {
        match source
            .try_run(&format!("CREATE EXTENSION {extension}"))
            .await
        {
            Ok(()) => kinds.push(kind),
            Err(error) => eprintln!("this server is without {extension}: {error}"),
        }
    }
    for kind in &kinds {
        create_tables(&source, kind).await;
    }
    (site, database, kinds)
}

async fn create_tables(source: &Client, kind: &Kind) {
    let Kind { name, sql, .. } = kind;
    source
        .run(&format!(
            "CREATE TABLE v_{name} (id int PRIMARY KEY, v {sql}, a {sql}[]);
             CREATE TABLE f_{name} (n int, v {sql});
             ALTER TABLE f_{name} REPLICA IDENTITY FULL;
             CREATE TABLE k_{name} (n int, v {sql})"
        ))
        .await;
    let keyed = source
        .try_run(&format!("ALTER TABLE k_{name} ADD PRIMARY KEY (v)"))
        .await;
    if keyed.is_err() {
        // A type without an order, such as json, cannot be a key.
        source
            .run(&format!("ALTER TABLE k_{name} REPLICA IDENTITY FULL"))
            .await;
    }
    let mut rows = String::new();
    for (id, edge) in kind.edges.iter().enumerate() {
        let value = literal(kind, &Some((*edge).to_owned()));
        let array = quoted(&Some(array_with_null(kind, edge))).unwrap();
        write!(
            rows,
            "INSERT INTO v_{name} VALUES ({id}, {value}, {array}::{sql}[]);
             INSERT INTO f_{name} VALUES ({id}, {value}), ({id}, {value});
             INSERT INTO k_{name} VALUES ({id}, {value}) ON CONFLICT DO NOTHING;"
        )
        .unwrap();
    }
    write!(
        rows,
        "INSERT INTO v_{name} VALUES (999); INSERT INTO f_{name} VALUES (999)"
    )
    .unwrap();
    source.run(&rows).await;
}

fn change_of(kind: &Kind) -> impl Strategy<Value = Change> + use<> {
    (0..20_i32, 0..10_u8, value_of(kind), arrays_of(kind)).prop_map(|(id, action, value, array)| {
        Change {
            id,
            action,
            value,
            array,
        }
    })
}

fn statements(kinds: &[Kind], round: &[Vec<Change>]) -> String {
    let mut sql = String::new();
    for (kind, changes) in kinds.iter().zip(round) {
        for change in changes {
            sql.push_str(&statement(kind, change));
        }
    }
    sql
}

fn statement(kind: &Kind, change: &Change) -> String {
    let Kind { name, sql, .. } = kind;
    let Change { id, action, .. } = change;
    let value = literal(kind, &change.value);
    let array = quoted(&change.array).map_or("NULL".to_owned(), |text| format!("{text}::{sql}[]"));
    let data = match action {
        0 => format!("DELETE FROM v_{name} WHERE id = {id};"),
        1 => format!("UPDATE v_{name} SET a = {array} WHERE id = {id};"),
        2 => format!(
            "UPDATE v_{name} SET id = id + 50, v = {value} WHERE id = {id} AND NOT EXISTS (SELECT FROM v_{name} WHERE id = {id} + 50);"
        ),
        _ => format!(
            "INSERT INTO v_{name} VALUES ({id}, {value}, {array})
             ON CONFLICT (id) DO UPDATE SET v = excluded.v, a = excluded.a;"
        ),
    };
    let keyless = match action {
        0..2 => format!(
            "DELETE FROM f_{name} WHERE ctid = (SELECT max(ctid) FROM f_{name} WHERE n = {id});"
        ),
        2..5 => format!(
            "UPDATE f_{name} SET v = {value} WHERE ctid = (SELECT min(ctid) FROM f_{name} WHERE n = {id});"
        ),
        _ => format!("INSERT INTO f_{name} VALUES ({id}, {value}), ({id}, {value});"),
    };
    let key = match action {
        0..2 => format!("DELETE FROM k_{name} WHERE n = {id};"),
        2..6 => format!("UPDATE k_{name} SET v = {value} WHERE n = {id};"),
        _ => format!("INSERT INTO k_{name} VALUES ({id}, {value}) ON CONFLICT DO NOTHING;"),
    };
    // NULL, a present key, or a value too long for an index: then the key stays as it is.
    let key = format!(
        "DO $do$ BEGIN {key} EXCEPTION
             WHEN unique_violation OR not_null_violation OR program_limit_exceeded THEN NULL; END $do$;"
    );
    format!("{data}{keyless}{key}")
}

fn literal(kind: &Kind, value: &Option<String>) -> String {
    quoted(value).map_or("NULL".to_owned(), |text| format!("{text}::{}", kind.sql))
}

fn quoted(value: &Option<String>) -> Option<String> {
    value
        .as_ref()
        .map(|text| format!("'{}'", text.replace('\'', "''")))
}

#[tokio::test]
async fn generated_and_identity_columns_arrive() {
    let site = Site::shared().await;
    let database = site.database("generated").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a int,
                twice int GENERATED ALWAYS AS (a * 2) STORED, b text DEFAULT 'x');
             CREATE TABLE by_default (id int GENERATED BY DEFAULT AS IDENTITY, a int PRIMARY KEY);
             CREATE TABLE whole (a int, upper text GENERATED ALWAYS AS (upper(b)) STORED, b text);
             ALTER TABLE whole REPLICA IDENTITY FULL;
             INSERT INTO always (a) SELECT g FROM generate_series(1, 5) AS g;
             INSERT INTO whole (a, b) SELECT 1, 'copied' FROM generate_series(1, 3);",
        )
        .await;
    let (_agent, running) = database.replicate().await;
    source
        .run(
            "INSERT INTO always (a) SELECT g FROM generate_series(6, 9) AS g;
             INSERT INTO always OVERRIDING SYSTEM VALUE VALUES (1000, NULL, DEFAULT, NULL);
             UPDATE always SET a = a + 10 WHERE id < 4;
             UPDATE always SET id = DEFAULT WHERE id = 5;
             INSERT INTO by_default VALUES (DEFAULT, 1), (77, 2);
             UPDATE by_default SET id = 78 WHERE a = 2;
             INSERT INTO whole (a, b) VALUES (1, 'streamed'), (2, NULL);
             UPDATE whole SET b = 'changed' WHERE ctid = (SELECT min(ctid) FROM whole);
             DELETE FROM whole WHERE ctid = (SELECT ctid FROM whole WHERE b = 'copied' LIMIT 1)",
        )
        .await;
    database.expect_equal().await;
    let replica = database.replica().await;
    assert_eq!(
        replica
            .number("SELECT count(*) FROM always WHERE twice = a * 2")
            .await,
        9
    );
    assert_eq!(
        replica
            .value("SELECT upper FROM whole WHERE b = 'changed'")
            .await
            .as_deref(),
        Some("CHANGED")
    );
    running.stop().await;
}

#[tokio::test]
async fn names_of_any_script_and_case_arrive() {
    let site = Site::shared().await;
    let database = site.database("Größe und-Maß \"q\" ").await;
    let source = database.source().await;
    source
        .run(
            r#"CREATE SCHEMA "Schöne Daten"; CREATE SCHEMA "a.b";
            CREATE TYPE "Schöne Daten"."Art" AS ENUM ('A''B', 'ç');
            CREATE TABLE "Schöne Daten"."Größen" ("Schlüssel ""1""" int PRIMARY KEY, "select" "Schöne Daten"."Art", "MiXed" text, "$1" int, " " int);
            CREATE TABLE "a.b"."c.d" ("e.f" text, "日本" int, PRIMARY KEY ("e.f", "日本"));
            CREATE TABLE "user" ("table" text PRIMARY KEY, "end" text);
            CREATE TABLE "a\b'c" (id int); ALTER TABLE "a\b'c" REPLICA IDENTITY FULL;
            INSERT INTO "Schöne Daten"."Größen" VALUES (1, 'ç', 'copied', 1, 1);"#,
        )
        .await;
    let (_agent, running) = database.replicate().await;
    source
        .run(
            r#"INSERT INTO "Schöne Daten"."Größen" VALUES (2, 'A''B', NULL, 2, 2), (3, NULL, '', 3, 3);
            UPDATE "Schöne Daten"."Größen" SET "select" = 'ç', " " = 9 WHERE "Schlüssel ""1""" = 3;
            INSERT INTO "a.b"."c.d" VALUES ('x', 1), ('y', 2); DELETE FROM "a.b"."c.d" WHERE "日本" = 1;
            UPDATE "a.b"."c.d" SET "e.f" = 'ÿ';
            INSERT INTO "user" VALUES ('a', 'b'); UPDATE "user" SET "end" = 'c';
            INSERT INTO "a\b'c" VALUES (1), (1); DELETE FROM "a\b'c" WHERE ctid = '(0,1)';
            TRUNCATE "a.b"."c.d"; INSERT INTO "a.b"."c.d" VALUES ('again', 3)"#,
        )
        .await;
    database.expect_equal().await;
    running.stop().await;
}
