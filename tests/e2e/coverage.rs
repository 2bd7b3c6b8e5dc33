//! Goal: what is not protected is known on the replica when the source is gone.
//! Method: a database with one object of every kind, of which some are left out and some come later; the source is stopped,
//! and `status`, `promote --plan` and the report must name all of it and nothing else.

use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for};
use serde_json::Value;

const SCHEMA: &str = "
    CREATE SCHEMA extra;
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TYPE pair AS (a int, b text);
    CREATE TYPE span AS RANGE (subtype = int4);
    CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * n';
    CREATE PROCEDURE nothing() LANGUAGE sql AS '';
    CREATE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int);
    CREATE TABLE t (id serial PRIMARY KEY, m mood, p positive, CONSTRAINT small CHECK (p < 100));
    CREATE TABLE child (id int PRIMARY KEY, of int REFERENCES t, v pair, EXCLUDE USING gist (int4range(of, of) WITH &&));
    CREATE INDEX lower_m ON t (twice(id));
    CREATE TABLE parted (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    CREATE VIEW v AS SELECT id FROM t;
    CREATE RULE no_delete AS ON DELETE TO v DO INSTEAD NOTHING;
    CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM t;
    CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER touch BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION touched();
    ALTER TABLE t ENABLE ROW LEVEL SECURITY;
    CREATE POLICY everybody ON t USING (true);
    CREATE SEQUENCE extra.numbers;
    CREATE TABLE extra.keyless (message text)";

/// What comes later: DDL is not replicated.
const LATER: &str = "
    CREATE SEQUENCE late_numbers; CREATE VIEW late_view AS SELECT 1 AS one; CREATE SCHEMA late;
    CREATE FUNCTION late_function() RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE INDEX late_index ON t (p); CREATE TYPE late_type AS ENUM ('x');
    ALTER TABLE child ADD COLUMN late_column int; CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY)";

fn kinds(coverage: &Value) -> Vec<String> {
    let missing = coverage["missing"].as_array().unwrap();
    let text = |one: &Value| format!("{} {}", one["kind"].as_str().unwrap(), one["count"]);
    missing.iter().map(text).collect()
}

#[tokio::test]
async fn what_is_missing_is_named_on_the_replica_once_the_source_is_gone() {
    let site = Site::own().await;
    let database = site.database("coverage").await;
    let source = database.source().await;
    source.run(SCHEMA).await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"exclude\"");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let coverage = async || {
        let outcome = agent.command(&["status", "--json"]).await;
        outcome.json()["databases"][0]["coverage"].clone()
    };
    let told = async |kinds_are: &[&str]| {
        wait_for("the coverage", PATIENCE, || async {
            let coverage = coverage().await;
            if kinds(&coverage) == kinds_are {
                Ok(coverage)
            } else {
                Err(coverage.to_string())
            }
        })
        .await
    };
    // Nothing that the copy takes along is missed, and what is left out is said.
    let shown = told(&["keyless_table 1", "materialized_view 1"]).await;
    assert_eq!(
        (&shown["tables"], &shown["protected"]),
        (&4.into(), &3.into())
    );
    let text = agent.command(&["status"]).await;
    text.expect_words(&["protected: 3 of 4 tables"]);
    text.expect_words(&["not protected", "keyless table: 1", "extra.keyless"]);

    running.kill();
    source.run(LATER).await;
    let mut running = agent.start();
    let expected = [
        "keyless_table 1",
        "materialized_view 1",
        "missing_column 1",
        "missing_function 1",
        "missing_index 1",
        "missing_schema 1",
        "missing_sequence 1",
        "missing_table 1",
        "missing_type 1",
        "missing_view 1",
        "unlogged_table 1",
    ];
    told(&expected).await;
    running.kill();
    site.source.stop().await;

    let plan = agent
        .command(&["promote", "--failover", "--plan", "--json"])
        .await
        .json();
    assert_eq!(kinds(&plan["databases"][0]["coverage"]), expected);
    let outcome = agent.command(&["promote", "--failover"]).await;
    outcome.expect_code(0);
    assert!(
        !outcome.text().contains("equals the source"),
        "{}",
        outcome.text()
    );
    outcome.expect_words(&["protected", "3 of 5 tables"]);
    outcome.expect_words(&[
        "NOT as on the source",
        "missing sequence",
        "public.late_numbers",
    ]);
    outcome.expect_words(&["missing column", "public.child.late_column"]);
}

#[tokio::test]
async fn tables_that_were_never_copied_are_not_nothing() {
    let site = Site::own().await;
    let database = site.database("pending").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)")
        .await;
    let (agent, mut running) = database.replicate().await;
    database.wait_caught_up().await;
    running.kill();
    let replica = database.writable_replica().await;
    replica
        .run("UPDATE dr_agent.table_sync SET state = 'pending', snapshot_lsn = NULL")
        .await;
    let outcome = agent
        .command(&["promote", "--failover", "--accept-incomplete"])
        .await;
    outcome.expect_code(0);
    outcome.expect_words(&["lost", "everything in 1 table that was never copied"]);
    outcome.expect_words(&["RPO", "MISSED"]);
    // Asked again, it tells the same.
    let again = agent.command(&["promote", "--failover", "--json"]).await;
    let report = again.expect_code(0).json();
    assert_eq!(
        (&report["rpo_met"], &report["rpo_seconds"]),
        (&false.into(), &Value::Null)
    );
}
