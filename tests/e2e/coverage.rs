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

/// One of every other kind, with a suffix for those that come later.
const OTHERS: &str = "
    CREATE ROLE cov_owner_N; CREATE ROLE cov_login_N LOGIN IN ROLE cov_owner_N;
    CREATE SCHEMA others_N AUTHORIZATION cov_owner_N;
    SET search_path = others_N;
    CREATE TYPE both_N AS (a int);
    CREATE FUNCTION sum_N(int, text) RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE FUNCTION text_N(both_N) RETURNS text LANGUAGE sql AS 'SELECT 1::text';
    CREATE OPERATOR <<<>>> (LEFTARG = int, RIGHTARG = text, FUNCTION = sum_N);
    CREATE OPERATOR FAMILY family_N USING btree;
    CREATE OPERATOR CLASS class_N FOR TYPE int USING btree FAMILY family_N AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =,
        OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 btint4cmp(int, int);
    CREATE CAST (both_N AS text) WITH FUNCTION text_N(both_N);
    CREATE COLLATION collation_N (locale = 'C');
    CREATE CONVERSION conversion_N FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8;
    CREATE TEXT SEARCH DICTIONARY dictionary_N (TEMPLATE = simple);
    CREATE TEXT SEARCH CONFIGURATION configuration_N (COPY = simple);
    CREATE ACCESS METHOD method_N TYPE TABLE HANDLER heap_tableam_handler;
    CREATE FOREIGN DATA WRAPPER wrapper_N;
    CREATE SERVER server_N FOREIGN DATA WRAPPER wrapper_N;
    CREATE USER MAPPING FOR cov_owner_N SERVER server_N;
    CREATE FUNCTION event_N() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE EVENT TRIGGER event_N ON ddl_command_end EXECUTE FUNCTION event_N();
    CREATE PUBLICATION publication_N;
    ALTER DEFAULT PRIVILEGES FOR ROLE cov_owner_N IN SCHEMA others_N GRANT SELECT ON TABLES TO cov_login_N;
    COMMENT ON TYPE both_N IS 'x'";

/// Of what is there from the beginning.
const WITH_TABLES: &str = "
    CREATE TABLE of_all (id int PRIMARY KEY, v int, w int);
    CREATE TABLE heir (PRIMARY KEY (id)) INHERITS (of_all)";

/// And what of it comes later.
const LATER_OF_TABLES: &str = "
    CREATE STATISTICS extra.late_statistics ON v, w FROM public.of_all;
    ALTER TABLE public.of_all ALTER COLUMN v SET DEFAULT 7;
    ALTER TABLE public.of_all ENABLE ROW LEVEL SECURITY;
    CREATE POLICY late_policy ON public.of_all USING (true);
    CREATE RULE late_rule AS ON DELETE TO public.v DO INSTEAD NOTHING;
    CREATE TRIGGER late_trigger BEFORE UPDATE ON public.of_all FOR EACH ROW EXECUTE FUNCTION public.touched();
    ALTER TABLE public.of_all ADD CONSTRAINT late_check CHECK (v > 0)";

#[tokio::test]
async fn no_kind_of_object_is_missing_unnoticed() {
    let site = Site::own().await;
    let database = site.database("kinds").await;
    let source = database.source().await;
    source.run(SCHEMA).await;
    source.run(WITH_TABLES).await;
    source.run(&OTHERS.replace("_N", "_early")).await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let told = async |expected: &[&str]| {
        wait_for("the coverage", PATIENCE, || async {
            let outcome = agent.command(&["status", "--json"]).await;
            let coverage = outcome.json()["databases"][0]["coverage"].clone();
            if kinds(&coverage) == expected {
                Ok(())
            } else {
                Err(coverage.to_string())
            }
        })
        .await;
    };
    // The copy takes everything along but what another subscriber of the source needs.
    told(&["materialized_view 1", "missing_publication 1"]).await;
    running.kill();
    source.run("SET search_path = public").await;
    source.run(LATER_OF_TABLES).await;
    source.run(&OTHERS.replace("_N", "_late")).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    // A start brings the roles that the database depends on; nobody brings them back.
    site.replica
        .run("postgres", "DROP ROLE cov_login_late, cov_owner_late")
        .await;
    told(&[
        "materialized_view 1",
        "missing_access_method 1",
        "missing_cast 1",
        "missing_collation 1",
        "missing_comment 1",
        "missing_constraint 2",
        "missing_conversion 1",
        "missing_default 2",
        "missing_default_privileges 1",
        "missing_event_trigger 1",
        "missing_foreign_data_wrapper 1",
        "missing_foreign_server 1",
        "missing_function 3",
        "missing_operator 1",
        "missing_operator_class 1",
        "missing_operator_family 1",
        "missing_policy 1",
        "missing_publication 2",
        "missing_role 2",
        "missing_row_security 1",
        "missing_rule 1",
        "missing_schema 1",
        "missing_statistics 1",
        "missing_text_search_configuration 1",
        "missing_text_search_dictionary 1",
        "missing_trigger 1",
        "missing_type 1",
        "missing_user_mapping 1",
    ])
    .await;
    running.stop().await;
}

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

/// What the copy takes along, with definitions that a server writes otherwise once they were loaded.
const DEFINED: &str = "
    CREATE ROLE def_app LOGIN PASSWORD 'x'; CREATE ROLE def_group NOLOGIN; CREATE ROLE def_late LOGIN;
    CREATE TABLE item (id int PRIMARY KEY, kind varchar(10) CHECK (kind IN ('a', 'b')), price numeric(8,2) DEFAULT 1.5,
        at timestamptz DEFAULT now(), CONSTRAINT low CHECK (price::text || '!' <> 'x' AND (id > 0 OR price BETWEEN 1 AND 2)));
    CREATE TABLE part (id int PRIMARY KEY, item int REFERENCES item, n serial) PARTITION BY RANGE (id);
    CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (1000);
    CREATE INDEX item_kind ON item (lower(kind), price DESC) WHERE kind IN ('a', 'b');
    CREATE VIEW dear AS SELECT id, kind::text AS k FROM item WHERE price > 3 AND kind IN ('a', 'b') ORDER BY 1;
    CREATE FUNCTION twice(n int DEFAULT 2) RETURNS int LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT n * 2; END;
    CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER stamped BEFORE UPDATE ON item FOR EACH ROW WHEN (OLD.kind IN ('a', 'b')) EXECUTE FUNCTION stamp();
    CREATE POLICY mine ON item FOR SELECT USING (kind IN ('a', 'b'));
    CREATE RULE kept AS ON DELETE TO dear DO INSTEAD NOTHING;
    CREATE TYPE mood AS ENUM ('low', 'high'); CREATE DOMAIN few AS int DEFAULT 1 CHECK (VALUE IN (1, 2));
    CREATE TYPE pair AS (a int, b varchar(3)); CREATE SEQUENCE steps INCREMENT 2;
    CREATE SCHEMA room; GRANT USAGE ON SCHEMA room TO def_app;
    GRANT SELECT, INSERT ON item TO def_app WITH GRANT OPTION; GRANT SELECT (id) ON part TO def_app;
    GRANT USAGE ON SEQUENCE steps TO def_app; REVOKE EXECUTE ON FUNCTION twice(int) FROM PUBLIC;
    GRANT USAGE ON TYPE mood TO def_group; GRANT def_group TO def_app; GRANT SELECT ON dear TO PUBLIC;
    ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO def_app";

/// Each changes what one object is.
const REDEFINED: [&str; 14] = [
    "CREATE OR REPLACE VIEW dear AS SELECT id, kind::text AS k FROM item WHERE price > 4",
    "CREATE OR REPLACE FUNCTION twice(n int DEFAULT 2) RETURNS int LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT n * 3; END",
    "CREATE OR REPLACE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END'",
    "CREATE OR REPLACE TRIGGER stamped BEFORE UPDATE ON item FOR EACH ROW WHEN (OLD.kind = 'a') EXECUTE FUNCTION stamp()",
    "ALTER POLICY mine ON item USING (kind IN ('a', 'c'))",
    "CREATE OR REPLACE RULE kept AS ON DELETE TO dear DO INSTEAD DELETE FROM item WHERE id = OLD.id",
    "DROP INDEX item_kind; CREATE INDEX item_kind ON item (lower(kind))",
    "ALTER TABLE item DROP CONSTRAINT low, ADD CONSTRAINT low CHECK (id > 1)",
    "ALTER TABLE item ALTER price SET DEFAULT 2.5",
    "ALTER TYPE mood ADD VALUE 'middle'",
    "ALTER DOMAIN few SET DEFAULT 2",
    "ALTER TYPE pair ALTER ATTRIBUTE b TYPE varchar(4)",
    "ALTER SEQUENCE steps INCREMENT 3",
    "ALTER TABLE item ALTER at SET DEFAULT '2000-01-01'",
];

/// Each changes who may do what with one object.
const GRANTED: [&str; 10] = [
    "GRANT UPDATE ON item TO def_app",
    "GRANT SELECT (n) ON part TO def_app",
    "REVOKE SELECT ON dear FROM PUBLIC",
    "GRANT CREATE ON SCHEMA room TO def_group",
    "GRANT EXECUTE ON FUNCTION twice(int) TO def_group",
    "REVOKE EXECUTE ON FUNCTION stamp() FROM PUBLIC",
    "GRANT SELECT ON SEQUENCE steps TO def_app",
    "REVOKE USAGE ON TYPE mood FROM def_group",
    "ALTER DEFAULT PRIVILEGES GRANT INSERT ON TABLES TO def_app",
    "GRANT TEMPORARY ON DATABASE :database TO def_group",
];

/// Each changes what one role is.
const ROLES: [&str; 4] = [
    "ALTER ROLE def_app CREATEDB",
    "ALTER ROLE def_group CONNECTION LIMIT 5",
    "GRANT def_group TO def_late",
    "ALTER ROLE def_late PASSWORD 'y'",
];

#[tokio::test]
async fn what_an_object_is_and_who_may_use_it_are_compared() {
    let site = Site::own().await;
    let database = site.database("defined").await;
    let source = database.source().await;
    source.run(DEFINED).await;
    // Somebody uses it: a role that the database does not depend on is none of its.
    source.run("GRANT SELECT ON item TO def_late").await;
    let agent = database.agent();
    let mut running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let told = async |expected: &[&str]| {
        wait_for("the coverage", PATIENCE, || async {
            let outcome = agent.command(&["status", "--json"]).await;
            let coverage = outcome.json()["databases"][0]["coverage"].clone();
            if kinds(&coverage) == expected {
                Ok(coverage)
            } else {
                Err(coverage.to_string())
            }
        })
        .await
    };
    // What was copied is the same, however a server writes it.
    told(&[]).await;
    running.kill();
    for statement in REDEFINED.iter().chain(&GRANTED).chain(&ROLES) {
        let statement = statement.replace(":database", &database.name);
        source.run(&statement).await;
    }
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let expected = [
        "missing_definition 14",
        "missing_privilege 10",
        "missing_role_attribute 3",
        "missing_role_password 1",
    ];
    // Each major version writes definitions in its own way.
    let skipped = usize::from(site.source.major() != site.replica.major());
    let coverage = told(&expected[skipped..]).await;
    let defined = ["public.dear", "public.item.low", "public.item.item_kind"];
    for name in defined.into_iter().filter(|_| skipped == 0).chain([
        "public.item: def_app=INSERT* def_app=SELECT* def_app=UPDATE def_late=SELECT",
        "def_app: LOGIN CREATEDB",
    ]) {
        assert!(
            coverage.to_string().contains(&format!("\"{name}\"")),
            "{name} in {coverage}"
        );
    }
    running.stop().await;
}
