//! Goal: what cannot be on the replica as it is on the source stops there where one table is not to be set aside
//! (`replica.set_aside = "never"`; `set_aside` has what happens otherwise), is named in full, and costs nothing that came
//! before; and what looks as if it could not, can.
//! Method: tables of cases. The source is altered alone, or the replica has something of its own; then the words of the
//! error, the place where it stands, and a full comparison once it is mended.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::site::{Database, Site};

use crate::bad_input::expect_stopped;

/// A column of one type, what it becomes on the source alone, a value of that, and both types as the error says them.
pub(crate) const ALTERED: &[(&str, &str, &str, &str)] = &[
    (
        "date",
        "timestamp",
        "'2026-03-01 12:34:56'",
        "is timestamp without time zone on the source and date on the replica",
    ),
    (
        "numeric(8,1)",
        "numeric(8,3)",
        "1.234",
        "is numeric(8,3) on the source and numeric(8,1) on the replica",
    ),
    (
        "timestamp(0)",
        "timestamp(6)",
        "'2026-03-01 12:34:56.789'",
        "timestamp(0) without time zone on the replica",
    ),
    (
        "varchar(9)",
        "varchar(90)",
        "'short'",
        "is character varying(90) on the source",
    ),
    (
        "int",
        "bigint",
        "7",
        "is bigint on the source and integer on the replica",
    ),
    (
        "varchar(9)",
        "text",
        "'short'",
        "is text on the source and character varying(9) on the replica",
    ),
    (
        "mood",
        "text",
        "'ok'",
        "is text on the source and public.mood on the replica",
    ),
    (
        "mood",
        "state",
        "'ok'",
        "is public.state on the source and public.mood on the replica",
    ),
    (
        "numeric(8,1)[]",
        "numeric(8,3)[]",
        "'{1.234}'",
        "is numeric(8,3)[] on the source and numeric(8,1)[] on the replica",
    ),
    (
        "mood[]",
        "state[]",
        "'{ok}'",
        "is public.state[] on the source and public.mood[] on the replica",
    ),
    (
        "int",
        "positive",
        "7",
        "is public.positive over integer on the source and integer on the replica",
    ),
    (
        "positive",
        "int",
        "7",
        "is integer on the source and public.positive over integer on the replica",
    ),
    (
        "json",
        "jsonb",
        "'{}'",
        "is jsonb on the source and json on the replica",
    ),
];

pub(crate) const TYPES: &str = "
    CREATE TYPE mood AS ENUM ('ok', 'sad');
    CREATE TYPE state AS ENUM ('ok', 'sad');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0)";

pub(crate) fn alter(case: usize) -> String {
    let (_, to, ..) = ALTERED[case];
    format!("ALTER TABLE t{case} ALTER c TYPE {to} USING c::text::{to}")
}

/// An agent that stops for one table.
pub(crate) async fn strict(database: &Database) -> (Agent, Running) {
    let mut agent = database.agent();
    agent.configure("replica.set_aside", "\"never\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    (agent, running)
}

/// The agent has stopped; it is killed, and the same one started again streams.
async fn again(agent: &Agent, database: &Database, mut stopped: Running) -> Running {
    stopped.kill();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running
}

#[tokio::test]
async fn a_column_that_is_altered_on_the_source_alone_stops_right_before_its_first_change() {
    let site = Site::shared().await;
    let database = site.database("altered").await;
    let source = database.source().await;
    source.run(TYPES).await;
    for (case, (from, ..)) in ALTERED.iter().enumerate() {
        source
            .run(&format!("CREATE TABLE t{case} (id int PRIMARY KEY, c {from}); INSERT INTO t{case} VALUES (1)"))
            .await;
    }
    let (agent, mut running) = strict(&database).await;
    let replica = database.writable_replica().await;
    for (case, (.., value, words)) in ALTERED.iter().enumerate() {
        // What comes before it is applied, also where it is of the same batch and the same table.
        source.run(&format!("INSERT INTO t{case} VALUES (2)")).await;
        source.run(&alter(case)).await;
        source
            .run(&format!("INSERT INTO t{case} VALUES (3, {value})"))
            .await;
        let table = format!("public.t{case}");
        expect_stopped(
            &mut running,
            &database.name,
            &[&table, "column c", words, "committed at"],
        )
        .await;
        assert_eq!(
            replica
                .number(&format!("SELECT count(*) FROM t{case}"))
                .await,
            2,
            "{words}"
        );
        // Starting it again changes nothing.
        if case == 0 {
            running.kill();
            running = agent.start();
            expect_stopped(&mut running, &database.name, &[&table, "column c", words]).await;
        }
        replica.run(&alter(case)).await;
        running = again(&agent, &database, running).await;
    }
    // Before and behind it in one transaction: the replica can only have the one or the other.
    source
        .run("BEGIN; INSERT INTO t0 VALUES (8, '2026-01-01'); ALTER TABLE t0 ALTER c TYPE timestamptz;
              INSERT INTO t0 VALUES (9, '2026-01-02'); COMMIT")
        .await;
    expect_stopped(
        &mut running,
        &database.name,
        &["public.t0", "timestamp with time zone"],
    )
    .await;
    replica
        .run("SET TimeZone = 'UTC'; ALTER TABLE t0 ALTER c TYPE timestamptz")
        .await;
    running = again(&agent, &database, running).await;
    database.wait_caught_up().await;
    assert_eq!(replica.number("SELECT count(*) FROM t0").await, 5);
    running.stop().await;
}

#[tokio::test]
async fn an_insert_that_touches_no_row_is_never_committed() {
    let site = Site::shared().await;
    let database = site.database("swallowed").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE bag (v text); CREATE TABLE large (id int PRIMARY KEY)")
        .await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    agent.configure("replica.set_aside", "\"never\"");
    agent.configure("replica.lanes", "3");
    agent.configure("limits.spread_changes", "200");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.writable_replica().await;
    replica
        .run("CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        .await;
    for (table, insert) in [
        (
            "t",
            "INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES (2, 'b')",
        ),
        ("bag", "INSERT INTO bag VALUES ('a'), ('a')"),
        ("large", "INSERT INTO large SELECT generate_series(1, 600)"),
    ] {
        replica
            .run(&format!(
                "CREATE TRIGGER swallow BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION swallow();
                 ALTER TABLE {table} ENABLE ALWAYS TRIGGER swallow"
            ))
            .await;
        source.run(insert).await;
        let words = [&*format!("public.{table}"), "did not take"];
        // The second start meets the same.
        expect_stopped(&mut running, &database.name, &words).await;
        running.kill();
        running = agent.start();
        expect_stopped(&mut running, &database.name, &words).await;
        assert_eq!(
            replica
                .number(&format!("SELECT count(*) FROM {table}"))
                .await,
            0
        );
        replica
            .run(&format!("DROP TRIGGER swallow ON {table}"))
            .await;
        running = again(&agent, &database, running).await;
        database.expect_equal().await;
    }
    running.stop().await;
}

#[tokio::test]
async fn an_identity_column_that_is_always_generated_may_change() {
    let site = Site::shared().await;
    let database = site.database("identity").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE keyless (no bigint GENERATED ALWAYS AS IDENTITY, body text);
             CREATE TABLE keyed (no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text, large text);
             ALTER TABLE keyed ALTER large SET STORAGE EXTERNAL;
             CREATE TABLE beside (id int PRIMARY KEY, no bigint GENERATED ALWAYS AS IDENTITY UNIQUE, body text, large text);
             ALTER TABLE beside ALTER large SET STORAGE EXTERNAL;
             INSERT INTO keyless (body) SELECT 'b' || g % 3 FROM generate_series(1, 9) AS g;
             INSERT INTO keyed (body, large) SELECT 'b' || g, repeat(g::text, 9000) FROM generate_series(1, 9) AS g;
             INSERT INTO beside (id, body, large) SELECT g, 'b' || g, repeat(g::text, 9000) FROM generate_series(1, 9) AS g",
        )
        .await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.writable_replica().await;
    // What only the replica has stays, also where a row has to go and come again.
    replica
        .run("ALTER TABLE beside ADD mine int DEFAULT 0; UPDATE beside SET mine = id")
        .await;
    for change in [
        "UPDATE keyless SET no = DEFAULT WHERE no = 2",
        "UPDATE keyless SET no = DEFAULT, body = 'other' WHERE no IN (3, 4); UPDATE keyless SET body = 'x' WHERE no = 5",
        "UPDATE keyed SET no = DEFAULT WHERE no = 2",
        "UPDATE keyed SET no = DEFAULT, body = 'other' WHERE no IN (3, 4)",
        "UPDATE beside SET no = DEFAULT WHERE id = 2",
        "UPDATE beside SET no = DEFAULT, body = 'other' WHERE id IN (3, 4); UPDATE beside SET body = 'x' WHERE id > 3",
        "UPDATE beside SET no = DEFAULT, id = id + 100 WHERE id = 5",
        "UPDATE beside SET body = 'y'",
    ] {
        source.run(change).await;
        database.wait_caught_up().await;
    }
    running.expect_quiet_log();
    let mine = "SELECT count(*) FROM beside WHERE mine <> id % 100";
    assert_eq!(replica.number(mine).await, 0);
    replica.run("ALTER TABLE beside DROP mine").await;
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test]
async fn a_key_that_does_not_travel_whole_is_no_key() {
    let site = Site::shared().await;
    let database = site.database("keys").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE half (item int, at date, y int GENERATED ALWAYS AS (extract(year FROM at)) STORED, v text,
                                PRIMARY KEY (item, y));
             CREATE TABLE whole (at int, y int GENERATED ALWAYS AS (at * 2) STORED PRIMARY KEY, v text);
             CREATE TABLE chosen (at int NOT NULL, y int GENERATED ALWAYS AS (at * 2) STORED NOT NULL, v text, UNIQUE (y));
             ALTER TABLE chosen REPLICA IDENTITY USING INDEX chosen_y_key;
             CREATE TABLE parts (item int, y int GENERATED ALWAYS AS (item * 2) STORED, v text, PRIMARY KEY (item, y))
                    PARTITION BY RANGE (item);
             CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
             CREATE TABLE included (id int, more text, v text, PRIMARY KEY (id) INCLUDE (v));
             ALTER TABLE included REPLICA IDENTITY FULL;
             INSERT INTO half (item, at, v) SELECT 1, make_date(2000 + g, 1, 1), 'v' FROM generate_series(1, 9) AS g;
             INSERT INTO whole (at, v) SELECT g, 'v' FROM generate_series(1, 9) AS g;
             INSERT INTO chosen (at, v) SELECT g, 'v' FROM generate_series(1, 9) AS g;
             INSERT INTO parts (item, v) SELECT g, 'v' FROM generate_series(1, 9) AS g;
             INSERT INTO included SELECT g, 'm', nullif('v' || g, 'v5') FROM generate_series(1, 9) AS g",
        )
        .await;
    let travels = source
        .number("SELECT current_setting('server_version_num')")
        .await
        >= 180_000;
    let mut agent = database.agent();
    if !travels {
        let outcome = agent.command(&["check"]).await;
        outcome
            .expect_code(1)
            .expect_words(&["public.half", "generated"]);
        outcome.expect_words(&["public.whole", "generated"]);
    }
    agent.configure("source.keyless", "\"full\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    for table in ["half", "whole", "chosen", "parts"] {
        let full = format!(
            "SELECT count(*) FROM pg_class WHERE relname = '{table}' AND relkind = 'r' AND relreplident = 'f'"
        );
        if table != "parts" {
            assert_eq!(source.number(&full).await, i64::from(!travels), "{table}");
        }
        source
            .run(&format!(
                "UPDATE {table} SET v = 'one' WHERE y IN (SELECT y FROM {table} ORDER BY y LIMIT 1);
                 BEGIN; UPDATE {table} SET v = 'w' || y; UPDATE {table} SET v = v || 'x' WHERE y % 2 = 0; COMMIT;
                 DELETE FROM {table} WHERE y IN (SELECT y FROM {table} ORDER BY y LIMIT 2)"
            ))
            .await;
        database.wait_caught_up().await;
    }
    source
        .run(
            "UPDATE half SET at = at + 3650 WHERE y = 2005;
             UPDATE whole SET at = at + 100 WHERE at = 6;
             UPDATE included SET more = 'n' WHERE id > 4; UPDATE included SET v = NULL WHERE id = 8;
             UPDATE included SET v = 'back' WHERE id = 8; DELETE FROM included WHERE id = 5",
        )
        .await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test]
async fn a_value_that_is_refused_is_named_by_everything_but_itself() {
    let site = Site::shared().await;
    let database = site.database("values").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TYPE mood AS ENUM ('ok', 'sad');
             CREATE TABLE feels (id int PRIMARY KEY, a text, m mood, ms mood[]);
             CREATE TABLE bag (m mood)",
        )
        .await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    agent.configure("replica.set_aside", "\"never\"");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.writable_replica().await;
    source.run("ALTER TYPE mood ADD VALUE 'secret'").await;
    source.run("ALTER TYPE mood ADD VALUE 'secret 2'").await;
    let cases = [
        (
            "INSERT INTO feels SELECT g, 'x', 'ok' FROM generate_series(1, 500) AS g;
             INSERT INTO feels VALUES (1001, 'y', 'secret')",
            "ALTER TYPE mood ADD VALUE IF NOT EXISTS 'secret'",
            [
                "public.feels",
                "column \"m\"",
                "public.mood",
                "invalid input value for enum",
                "22P02",
            ],
        ),
        (
            "INSERT INTO feels VALUES (1002, 'z', NULL, '{ok,secret 2}')",
            "ALTER TYPE mood ADD VALUE IF NOT EXISTS 'secret 2'",
            [
                "public.feels",
                "column \"ms\"",
                "public.mood",
                "invalid input value for enum",
                "22P02",
            ],
        ),
    ];
    for (change, mending, words) in cases {
        source.run(change).await;
        expect_stopped(&mut running, &database.name, &words).await;
        let log = running.log();
        let line = dr_agent_tests::agent::line_with(&log, &words).unwrap_or_default();
        assert!(
            line.contains("committed at") && line.contains(&database.name),
            "{line}"
        );
        assert!(
            !line.contains("secret") && !line.contains("987654321"),
            "{line}"
        );
        replica.run(mending).await;
        running = again(&agent, &database, running).await;
        database.expect_equal().await;
    }
    running.stop().await;
}

/// Rows that are often equal, of types with and without an equality, and many NULLs.
const BAG: &str = "
    CREATE TABLE bag (a int, t text, n numeric, j json, p point, x int[], e text);
    CREATE TABLE only_json (j json);
    CREATE TABLE bare ();
    CREATE TABLE handed (id int PRIMARY KEY, slot int UNIQUE);
    INSERT INTO bag SELECT nullif(g % 5, 0), nullif('t' || g % 3, 't0'), CASE g % 2 WHEN 0 THEN 1.0 ELSE 1.00 END,
                           ('{\"g\":' || g % 4 || '}')::json, point(g % 2, 0), nullif(ARRAY[g % 3], '{0}'), NULL
                      FROM generate_series(1, 3000) AS g;
    INSERT INTO only_json SELECT nullif(g % 7, 0)::text::json FROM generate_series(1, 2000) AS g;
    INSERT INTO bare SELECT FROM generate_series(1, 20);
    INSERT INTO handed SELECT g, g FROM generate_series(1, 30000) AS g";

#[tokio::test]
async fn equal_rows_without_a_key_change_by_the_thousand() {
    let site = Site::shared().await;
    let database = site.database("bags").await;
    let source = database.source().await;
    source.run(BAG).await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    for change in [
        "UPDATE bag SET n = 1.000 WHERE ctid IN (SELECT ctid FROM bag ORDER BY ctid LIMIT 700)",
        "DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag ORDER BY ctid DESC LIMIT 500)",
        "BEGIN; UPDATE bag SET a = 9, e = 'e'; UPDATE bag SET a = NULL WHERE t IS NULL; DELETE FROM bag WHERE t = 't1'; COMMIT",
        "UPDATE only_json SET j = '7' WHERE j IS NULL; DELETE FROM only_json WHERE j::text = '3'",
        "DELETE FROM bare WHERE ctid IN (SELECT ctid FROM bare LIMIT 5); INSERT INTO bare DEFAULT VALUES",
        "TRUNCATE only_json; INSERT INTO only_json VALUES ('1'), ('1'), ('2')",
    ] {
        source.run(change).await;
        database.wait_caught_up().await;
    }
    running.expect_quiet_log();
    database.expect_equal().await;

    // One value handed from row to row among thousands that are not: not a round trip for each of them.
    source
        .run(
            "BEGIN; UPDATE handed SET slot = slot + 100000 WHERE id <= 10000; UPDATE handed SET slot = -1 WHERE id = 20000;
             UPDATE handed SET slot = 20000 WHERE id = 20001; UPDATE handed SET slot = 20001 WHERE id = 20000;
             UPDATE handed SET slot = slot + 100000 WHERE id BETWEEN 10001 AND 19000; COMMIT",
        )
        .await;
    database.expect_equal().await;
    let slow = running
        .metrics()
        .await
        .value("dr_agent_slow_path_total", &[("database", &database.name)]);
    assert!(slow.unwrap_or_default() >= 1.0, "the batch was not refused");
    running.stop().await;
}

#[tokio::test]
async fn what_the_stream_does_not_tell_of_a_column_is_compared_and_stops() {
    let site = Site::shared().await;
    let database = site.database("computed").await;
    let source = database.source().await;
    source
        .run(
            "CREATE DOMAIN price AS numeric(8,1); CREATE DOMAIN fine AS numeric(8,3);
             CREATE TABLE computed (id int PRIMARY KEY, a int, g int GENERATED ALWAYS AS (a * 2) STORED);
             CREATE TABLE priced (id int PRIMARY KEY, p price);
             CREATE TABLE plain (id int PRIMARY KEY, a int, g int GENERATED ALWAYS AS (a * 2) STORED);
             INSERT INTO computed SELECT g, g FROM generate_series(1, 9) AS g;
             INSERT INTO plain SELECT g, g FROM generate_series(1, 9) AS g;
             INSERT INTO priced SELECT g, g FROM generate_series(1, 9) AS g",
        )
        .await;
    let (agent, mut running) = strict(&database).await;
    let replica = database.writable_replica().await;
    // One domain for another: at its place in the stream, also where the domain is newer than the session.
    source.run("CREATE DOMAIN finer AS numeric(8,4)").await;
    replica.run("CREATE DOMAIN finer AS numeric(8,4)").await;
    for (id, (domain, value)) in [("fine", "1.234"), ("finer", "1.2345")]
        .into_iter()
        .enumerate()
    {
        let priced = format!("ALTER TABLE priced ALTER p TYPE {domain} USING p::numeric::{domain}");
        source
            .run(&format!("INSERT INTO priced VALUES ({id} + 20, 1)"))
            .await;
        source.run(&priced).await;
        source
            .run(&format!("INSERT INTO priced VALUES ({id} + 30, {value})"))
            .await;
        let there = format!(
            "is public.{domain} over numeric(8,{}) on the source",
            value.len() - 2
        );
        expect_stopped(
            &mut running,
            &database.name,
            &["public.priced", "column p", &there],
        )
        .await;
        replica.run(&priced).await;
        running = again(&agent, &database, running).await;
        database.expect_equal().await;
    }
    let computed = "ALTER TABLE computed DROP g, ADD g int GENERATED ALWAYS AS (a * 3) STORED";
    source.run(computed).await;
    let words = [
        "public.computed",
        "column g",
        "(a * 3)",
        "(a * 2)",
        "on the replica",
    ];
    expect_stopped(&mut running, &database.name, &words).await;
    // It is seen before anything else is applied.
    running.kill();
    running = agent.start();
    expect_stopped(&mut running, &database.name, &words).await;
    replica.run(computed).await;
    running = again(&agent, &database, running).await;
    source.run("UPDATE computed SET a = a + 1").await;
    database.expect_equal().await;

    let plain = "ALTER TABLE plain ALTER g DROP EXPRESSION";
    for statement in [
        "INSERT INTO plain VALUES (10, 1)",
        plain,
        "INSERT INTO plain VALUES (11, 1, 1)",
    ] {
        source.run(statement).await;
    }
    expect_stopped(
        &mut running,
        &database.name,
        &["public.plain", "column g", "ordinary column on the source"],
    )
    .await;
    replica.run(plain).await;
    if source
        .number("SELECT current_setting('server_version_num')::int")
        .await
        >= 180_000
    {
        // There the column is sent before and behind it, and nothing in the stream tells the two apart: what came until it was
        // noticed is computed, and the hint says to copy the table again.
        replica
            .run("DELETE FROM dr_agent.table_sync WHERE table_name = 'plain'; TRUNCATE plain")
            .await;
    }
    running = again(&agent, &database, running).await;
    database.expect_equal().await;
    running.stop().await;
}
