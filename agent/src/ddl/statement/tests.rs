//! Cases: what was sent, in which way, and what is found.

use super::*;
use crate::names::object::ObjectAddress;
use crate::schema::ddl::{EventKind, EventObject};

const OWN: &str = "PL/pgSQL function dr_agent.on_ddl_end() line 6 at GET DIAGNOSTICS";

fn event(tag: &str, query: &str, inner: &str, ordinal: i32, names: &[&str]) -> DdlEvent {
    let object = |name: &&str| EventObject {
        address: ObjectAddress {
            kind: "table".into(),
            names: vec!["public".into(), (*name).to_owned()],
            args: Vec::new(),
        },
        identity: format!("public.{name}"),
        tag: None,
        original: true,
        reason: None,
        created: false,
        listed_as: None,
        oid: None,
        was: None,
        as_of: None,
        shape: None,
    };
    let kind = match tag.starts_with("DROP ") {
        true => EventKind::Drop,
        false => EventKind::Command,
    };
    DdlEvent {
        id: 1,
        version: Some(150_000),
        kind,
        tag: tag.into(),
        role: "app".into(),
        search_path: "app, public".into(),
        query: Some(query.into()),
        context: Some(format!("{OWN}{inner}")),
        ordinal: Some(ordinal),
        objects: names.iter().map(object).collect(),
    }
}

fn said(event: &DdlEvent) -> String {
    match of(event) {
        Statement::Exact(text) => format!("= {text}"),
        Statement::Shape(why) => format!("shape {why:?}"),
    }
}

/// A client's only statement: whether it may be run again. `=`: as it is.
#[test]
fn what_may_be_run_again() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "CREATE TABLE AS",
            "CREATE TABLE t (a, b) AS (VALUES (1, 2))",
            "shape Query",
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t AS TABLE u WITH NO DATA",
            "=",
        ),
        (
            "SELECT INTO",
            "WITH x AS (SELECT 1 AS a) SELECT a INTO t FROM x",
            "shape Query",
        ),
        (
            "CREATE VIEW",
            "CREATE OR REPLACE TEMP RECURSIVE VIEW t (a) AS SELECT 1",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE ONLY t RENAME a TO concurrently_done",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a ADD GENERATED ALWAYS AS IDENTITY",
            "=",
        ),
        (
            "COMMENT",
            "COMMENT ON TABLE t IS 'TABLESPACE CONCURRENTLY'",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a numeric(10, 2) DEFAULT -1.50 NOT NULL",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text DEFAULT 'x' || now()",
            "shape Session",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (id serial PRIMARY KEY, a int DEFAULT f() CHECK (g(a)))",
            "=",
        ),
        ("CREATE TABLE", "CREATE UNLOGGED TABLE t (a int)", "="),
        (
            "CREATE TABLE",
            "CREATE TABLE t (LIKE u INCLUDING ALL, b text COLLATE \"C\")",
            "=",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (a timestamptz DEFAULT now())",
            "=",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (a timestamptz DEFAULT 'now')",
            "shape Session",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (a int) TABLESPACE fast",
            "shape Tablespace",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (a int PRIMARY KEY USING INDEX TABLESPACE fast)",
            "shape Tablespace",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
            "=",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (MINVALUE) TO ('2024-01-01')",
            "=",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE p1 PARTITION OF p FOR VALUES IN (f(1))",
            "shape UserCode",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE p1 PARTITION OF p FOR VALUES IN (current_date)",
            "shape Session",
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE p1 PARTITION OF p DEFAULT",
            "=",
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t AS SELECT 1",
            "shape Query",
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t AS SELECT * FROM u WITH NO DATA",
            "=",
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t AS EXECUTE q",
            "shape Query",
        ),
        ("SELECT INTO", "SELECT a INTO t FROM u", "shape Query"),
        ("ALTER TABLE", "ALTER TABLE t ADD a int", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD COLUMN IF NOT EXISTS a varchar(10) DEFAULT 'x' NOT NULL",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a jsonb NOT NULL DEFAULT '{}'::jsonb",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text[] DEFAULT ARRAY[]::text[]",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a timestamp with time zone",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE t ADD a mood DEFAULT 'sad'", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a timestamptz DEFAULT now()",
            "shape Session",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a timestamptz DEFAULT CURRENT_TIMESTAMP, ADD b int",
            "shape Session",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text DEFAULT current_user",
            "shape Session",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a date DEFAULT 'today'",
            "shape Session",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a float DEFAULT random()",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a uuid DEFAULT gen_random_uuid()",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int DEFAULT nextval('s')",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int DEFAULT app.lower('X')",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text DEFAULT pg_catalog.lower('X')",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int DEFAULT (SELECT 1)",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a bigserial",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int GENERATED BY DEFAULT AS IDENTITY",
            "shape RowByRow",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int GENERATED ALWAYS AS (b * 2) STORED",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int GENERATED ALWAYS AS (f(b)) STORED",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE t ADD a int CHECK (a > 0)", "="),
        ("ALTER TABLE", "ALTER TABLE t ADD a int CHECK (f(a))", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (lower(a) = a)",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (a IN ('x', 'y') AND b BETWEEN 1 AND 2 OR c IS NULL)",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (valid(a))",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (a OPERATOR(app.=) 1)",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD CONSTRAINT c CHECK (valid(a)) NOT VALID",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE t VALIDATE CONSTRAINT c", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES u DEFERRABLE INITIALLY DEFERRED",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD EXCLUDE USING gist (a WITH &&)",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE t ADD UNIQUE USING INDEX i", "="),
        ("ALTER TABLE", "ALTER TABLE t ALTER a TYPE bigint", "="),
        ("ALTER TABLE", "ALTER TABLE t ALTER a TYPE text", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a TYPE int USING a::int",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a TYPE int USING f(a)",
            "shape UserCode",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a TYPE timestamptz USING now()",
            "shape Session",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a TYPE mood USING a::mood",
            "shape UserCode",
        ),
        ("ALTER TABLE", "ALTER TABLE t ALTER a SET DEFAULT f()", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t ALTER a DROP NOT NULL, ALTER b SET STATISTICS 10, SET (fillfactor = 70)",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE t RENAME a TO b", "="),
        ("ALTER TABLE", "ALTER TABLE t DROP COLUMN a CASCADE", "="),
        ("ALTER TABLE", "ALTER TABLE t SET LOGGED", "="),
        ("ALTER TABLE", "ALTER TABLE t SET UNLOGGED", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE t SET TABLESPACE fast",
            "shape Tablespace",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t OWNER TO SESSION_USER",
            "shape Session",
        ),
        ("ALTER TABLE", "ALTER TABLE t OWNER TO CURRENT_USER", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE p ATTACH PARTITION t FOR VALUES FROM (1) TO (2)",
            "=",
        ),
        ("ALTER TABLE", "ALTER TABLE p DETACH PARTITION t", "="),
        (
            "ALTER TABLE",
            "ALTER TABLE p DETACH PARTITION t CONCURRENTLY",
            "shape Concurrently",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE p DETACH PARTITION t FINALIZE",
            "shape Concurrently",
        ),
        (
            "CREATE INDEX",
            "CREATE UNIQUE INDEX ON t (lower(a), f(b)) WHERE c > 0",
            "=",
        ),
        (
            "CREATE INDEX",
            "CREATE INDEX CONCURRENTLY i ON t (a)",
            "shape Concurrently",
        ),
        (
            "DROP INDEX",
            "DROP INDEX CONCURRENTLY t",
            "shape Concurrently",
        ),
        ("DROP TABLE", "DROP TABLE IF EXISTS t, u CASCADE", "="),
        ("DROP OWNED", "DROP OWNED BY r", "="),
        (
            "CREATE VIEW",
            "CREATE OR REPLACE VIEW t AS SELECT now(), f(1)",
            "=",
        ),
        (
            "CREATE MATERIALIZED VIEW",
            "CREATE MATERIALIZED VIEW t AS SELECT 1",
            "shape MaterializedView",
        ),
        (
            "CREATE MATERIALIZED VIEW",
            "CREATE MATERIALIZED VIEW t AS SELECT 1 WITH NO DATA",
            "=",
        ),
        (
            "REFRESH MATERIALIZED VIEW",
            "REFRESH MATERIALIZED VIEW t",
            "shape MaterializedView",
        ),
        (
            "CREATE FUNCTION",
            "CREATE FUNCTION t() RETURNS text LANGUAGE sql AS $x$ SELECT 'now;'; SELECT 'today' $x$",
            "=",
        ),
        (
            "CREATE FUNCTION",
            "CREATE FUNCTION t() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT 2; END",
            "=",
        ),
        (
            "CREATE FUNCTION",
            "CREATE FUNCTION t() RETURNS int LANGUAGE sql SET work_mem FROM CURRENT AS 'SELECT 1'",
            "shape Session",
        ),
        (
            "CREATE SCHEMA",
            "CREATE SCHEMA t CREATE TABLE x (a int) CREATE VIEW v AS SELECT 1",
            "=",
        ),
        ("CREATE TYPE", "CREATE TYPE t AS ENUM ('a', 'b')", "="),
        (
            "ALTER TYPE",
            "ALTER TYPE t ADD VALUE IF NOT EXISTS 'c' BEFORE 'b'",
            "=",
        ),
        ("ALTER DOMAIN", "ALTER DOMAIN t ADD CHECK (f(VALUE))", "="),
        ("ALTER DOMAIN", "ALTER DOMAIN t ADD CHECK (VALUE > 0)", "="),
        (
            "CREATE TRIGGER",
            "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON u FOR EACH ROW EXECUTE FUNCTION f()",
            "=",
        ),
        ("CREATE POLICY", "CREATE POLICY t ON u USING (f(a))", "="),
        (
            "CREATE RULE",
            "CREATE RULE t AS ON INSERT TO u DO ALSO (DELETE FROM a; DELETE FROM b)",
            "=",
        ),
        ("CREATE SEQUENCE", "CREATE SEQUENCE t OWNED BY u.a", "="),
        ("COMMENT", "COMMENT ON COLUMN u.t IS 'now; and then'", "="),
        (
            "GRANT",
            "GRANT SELECT (a), UPDATE ON t TO PUBLIC WITH GRANT OPTION",
            "=",
        ),
        (
            "ALTER DEFAULT PRIVILEGES",
            "ALTER DEFAULT PRIVILEGES IN SCHEMA x GRANT SELECT ON TABLES TO r",
            "=",
        ),
        (
            "CREATE EXTENSION",
            "CREATE EXTENSION IF NOT EXISTS pg_trgm",
            "=",
        ),
        ("ALTER EXTENSION", "ALTER EXTENSION t UPDATE TO '2'", "="),
        ("ALTER EXTENSION", "ALTER EXTENSION t SET SCHEMA x", "="),
        (
            "CREATE USER MAPPING",
            "CREATE USER MAPPING FOR r SERVER t OPTIONS (password 'x')",
            "=",
        ),
        ("ALTER SERVER", "ALTER SERVER t OPTIONS (SET host 'x')", "="),
        ("REINDEX", "REINDEX TABLE t", "shape Storage"),
        (
            "ALTER TABLE",
            "ALTER TABLE U&\"d\\0061t\" ADD \"a;b\" text DEFAULT E'\\';'",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text DEFAULT 'a\\'",
            "shape Backslash",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a text CHECK (a ~ '^\\d+$')",
            "=",
        ),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a nonsense nonsense",
            "shape Unparsed",
        ),
    ];
    let mut wrong = Vec::new();
    for (tag, text, expected) in cases {
        let found = said(&event(tag, &format!(" {text} ; "), "", 1, &["t"]));
        let expected = match *expected {
            "=" => format!("= {text}"),
            other => other.to_owned(),
        };
        if found != expected {
            wrong.push(format!("{found} for {text}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Several statements in one string.
#[test]
fn which_one_of_a_string() {
    let twice = "ALTER TABLE t ADD a int; ALTER TABLE t ADD b int";
    let named = "INSERT INTO l VALUES (f()); ALTER TABLE t ADD a int; ALTER TABLE u ADD b int";
    let taken_back =
        "BEGIN; SAVEPOINT s; CREATE TABLE t (a int); ROLLBACK TO s; CREATE TABLE t (b int)";
    let quiet = "BEGIN; SET search_path TO x; CREATE ROLE r; GRANT r TO s; COMMENT ON ROLE r IS 'x'; \
        CREATE TABLE IF NOT EXISTS u (a int); COMMENT ON TABLE t IS '1'; COMMENT ON TABLE t IS '2'; COMMIT";
    let nasty = "/* ; /* ; */ */ SELECT $a$;$b$;$a$; -- ;\nCREATE FUNCTION t() RETURNS int LANGUAGE sql BEGIN ATOMIC \
        SELECT CASE WHEN true THEN 1 END; SELECT 2; END; CREATE FUNCTION u() RETURNS int LANGUAGE sql AS ';'";
    let schema =
        "CREATE SCHEMA s CREATE TABLE x (a int); GRANT ALL ON x TO r; CREATE TABLE t (a int)";
    let drops = "CREATE TABLE x (a int); DROP TABLE t; DROP TABLE u, v";
    let maybe = "DROP TABLE IF EXISTS a; DROP TABLE t; DROP TABLE u";
    let extension = "CREATE EXTENSION x; CREATE TABLE t (a int); CREATE TABLE u (a int)";
    let switched = "SET event_triggers = off; ALTER TABLE t ADD a int; SET event_triggers = on; ALTER TABLE t ADD b int";
    let cases: &[(&str, &str, i32, &[&str], &str)] = &[
        ("ALTER TABLE", twice, 1, &["t"], "= ALTER TABLE t ADD a int"),
        ("ALTER TABLE", twice, 2, &["t"], "= ALTER TABLE t ADD b int"),
        ("ALTER TABLE", twice, 3, &["t"], "shape Ambiguous"),
        (
            "ALTER TABLE",
            twice,
            1,
            &["other"],
            "= ALTER TABLE t ADD a int",
        ),
        ("ALTER TABLE", named, 5, &["u"], "= ALTER TABLE u ADD b int"),
        ("ALTER TABLE", named, 5, &["x"], "shape Ambiguous"),
        ("CREATE TABLE", taken_back, 1, &["t"], "shape Ambiguous"),
        ("COMMENT", quiet, 3, &["t"], "= COMMENT ON TABLE t IS '2'"),
        ("COMMENT", quiet, 2, &["t"], "= COMMENT ON TABLE t IS '1'"),
        ("COMMENT", quiet, 1, &["t"], "shape Ambiguous"),
        (
            "CREATE FUNCTION",
            nasty,
            2,
            &["u"],
            "= CREATE FUNCTION u() RETURNS int LANGUAGE sql AS ';'",
        ),
        ("DROP TABLE", drops, 1, &["t"], "= DROP TABLE t"),
        ("DROP TABLE", drops, 2, &["v", "u"], "= DROP TABLE u, v"),
        ("DROP TABLE", maybe, 1, &["u"], "= DROP TABLE u"),
        (
            "CREATE TABLE",
            extension,
            99,
            &["u"],
            "= CREATE TABLE u (a int)",
        ),
        (
            "CREATE SCHEMA",
            schema,
            1,
            &["s"],
            "= CREATE SCHEMA s CREATE TABLE x (a int)",
        ),
        (
            "CREATE TABLE",
            schema,
            3,
            &["t"],
            "= CREATE TABLE t (a int)",
        ),
        ("ALTER TABLE", switched, 1, &["t"], "shape Ambiguous"),
        ("CREATE VIEW", twice, 1, &["t"], "shape NotFound"),
        (
            "ALTER TABLE",
            "ALTER TABLE t ADD a int; SELEKT",
            1,
            &["t"],
            "shape Unparsed",
        ),
    ];
    let mut wrong = Vec::new();
    for (tag, text, ordinal, names, expected) in cases {
        let found = said(&event(tag, text, "", *ordinal, names));
        if found != *expected {
            wrong.push(format!("{found} for {ordinal} of {text}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What ran inside functions, DO blocks and other event triggers: as PostgreSQL 15 and 18 write it.
#[test]
fn which_one_within_a_function() {
    let behind = "\nPL/pgSQL function inline_code_block line 1 at SQL statement";
    let sql = |text: &str| format!("\nSQL statement \"{text}\"{behind}");
    let quote = "COMMENT ON TABLE t IS 'foo\"\nPL/pgSQL function f() line 1 at EXECUTE'";
    let comment = "ALTER TABLE t ADD a int -- \"\n, ADD b int";
    let cases = [
        (sql("ALTER TABLE t ADD a int"), "= ALTER TABLE t ADD a int"),
        (sql("ALTER TABLE t\n  ADD \"a\"\n text"), "= ALTER TABLE t\n  ADD \"a\"\n text"),
        (sql("ALTER TABLE t ADD \"i''x\" text DEFAULT 'it\"s'"), "= ALTER TABLE t ADD \"i''x\" text DEFAULT 'it\"s'"),
        (sql("ALTER TABLE t ADD a int; ALTER TABLE t ADD b int"), "shape Ambiguous"),
        (sql("ALTER TABLE t ADD a int; COMMENT ON TABLE t IS 'x'"), "= ALTER TABLE t ADD a int"),
        (sql(comment), "shape Ambiguous"),
        (sql("SELECT g()"), "shape Unparsed"),
        ("\nSQL statement \"ALTER TABLE t ADD a int\"".to_owned(), "= ALTER TABLE t ADD a int"),
        ("\nSQL function \"f1\" statement 2\nSQL statement \"SELECT f1()\"\nPL/pgSQL function f2() line 1 at PERFORM".to_owned(), "shape SqlFunction"),
        ("\nSQL-Funktion »f1« Anweisung 2".to_owned(), "shape NoText"),
        ("\nSQL-Anweisung »ALTER TABLE t ADD a int«\nPL/pgSQL-Funktion x() Zeile 1 bei SQL-Anweisung".to_owned(), "= ALTER TABLE t ADD a int"),
        ("\ninstruction SQL « ALTER TABLE t ADD a int »\nfonction PL/pgSQL f(), ligne 1 à EXECUTE".to_owned(), "= ALTER TABLE t ADD a int"),
        ("\nSQL文 \"ALTER TABLE t ADD a int\"\nPL/pgSQL関数f()の1行目 - EXECUTE".to_owned(), "= ALTER TABLE t ADD a int"),
        ("\nPL/Python function \"x\"".to_owned(), "shape NoText"),
    ];
    let mut wrong = Vec::new();
    for (inner, expected) in cases {
        let query = "ALTER TABLE t ADD wrong int";
        let found = said(&event("ALTER TABLE", query, &inner, 1, &["t"]));
        if found != expected {
            wrong.push(format!("{found} for {inner}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let found = said(&event("COMMENT", "SELECT f()", &sql(quote), 1, &["t"]));
    assert_eq!(found, format!("= {quote}"));
}

#[test]
fn what_drops_by_the_way_what_is_hidden_and_what_is_too_deep() {
    let mut drop = event("ALTER TABLE", "ALTER TABLE t DROP a", "", 1, &["t"]);
    drop.kind = EventKind::Drop;
    assert_eq!(said(&drop), "= ALTER TABLE t DROP a");
    drop.context = None;
    assert_eq!(said(&drop), "shape NoText");

    let sum = "ALTER TABLE t ADD a int DEFAULT 1 + 1";
    let mut hidden = event("ALTER TABLE", sum, "", 1, &["t"]);
    assert_eq!(said(&hidden), format!("= {sum}"));
    hidden.search_path = "app, pg_catalog".into();
    assert_eq!(said(&hidden), "shape RowByRow");

    let (open, close) = ("(".repeat(50_000), ")".repeat(50_000));
    let deep = format!("CREATE VIEW t AS SELECT {open}1{close}");
    assert_eq!(
        said(&event("CREATE VIEW", &deep, "", 1, &["t"])),
        "shape Unparsed"
    );
    let long = format!("CREATE VIEW t AS SELECT 1{}", " + 1".repeat(5_000));
    assert_eq!(
        said(&event("CREATE VIEW", &long, "", 1, &["t"])),
        format!("= {long}")
    );
}

#[test]
fn a_table_that_takes_anothers_place_in_one_string() {
    let text = "CREATE TABLE line_new (LIKE line INCLUDING ALL);
        INSERT INTO line_new SELECT * FROM line;
        ALTER TABLE line RENAME TO line_old;
        ALTER TABLE line_new RENAME TO line;
        ALTER TABLE line ADD CONSTRAINT k FOREIGN KEY (o) REFERENCES u (id) DEFERRABLE INITIALLY DEFERRED;
        DROP TABLE line_old;";
    let cases = [
        (2, "line_old", "ALTER TABLE line RENAME TO line_old"),
        (3, "line", "ALTER TABLE line_new RENAME TO line"),
        (
            4,
            "line",
            "ALTER TABLE line ADD CONSTRAINT k FOREIGN KEY (o) REFERENCES u (id) DEFERRABLE INITIALLY DEFERRED",
        ),
    ];
    for (ordinal, name, expected) in cases {
        let found = of(&event("ALTER TABLE", text, "", ordinal, &["public", name]));
        assert_eq!(found, Statement::Exact(expected.to_owned()), "{ordinal}");
    }
}
