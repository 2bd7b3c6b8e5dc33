use super::split::{Words, split};
use super::*;

fn event(kind: EventKind, tag: &str, query: &str, context: &str, ordinal: i32) -> DdlEvent {
    DdlEvent {
        id: 1,
        kind,
        tag: tag.to_owned(),
        role: "app".to_owned(),
        search_path: "public".to_owned(),
        query: Some(query.to_owned()),
        context: Some(context.to_owned()),
        ordinal: Some(ordinal),
        version: None,
        objects: Vec::new(),
    }
}

const TOP: &str = "PL/pgSQL function dr_agent.on_command() line 5 at GET DIAGNOSTICS";

/// The text that is found for a command at the top.
fn top(tag: &str, query: &str, ordinal: i32) -> Option<String> {
    text(&event(EventKind::Command, tag, query, TOP, ordinal))
}

#[test]
fn strings_are_split_as_psql_does() {
    let table: &[(&str, &[&str])] = &[
        ("", &[]),
        (" ;; -- nothing\n ;", &[]),
        ("a", &["a"]),
        ("a; b ;c;", &["a", "b", "c"]),
        (
            "CREATE TABLE t (a text DEFAULT ';'); x",
            &["CREATE TABLE t (a text DEFAULT ';')", "x"],
        ),
        ("SELECT E'a\\';b'; x", &["SELECT E'a\\';b'", "x"]),
        ("SELECT U&'\\003B;'; x", &["SELECT U&'\\003B;'", "x"]),
        ("SELECT 'it''s;'; x", &["SELECT 'it''s;'", "x"]),
        (
            "CREATE TABLE \"a;b\" (c int); x",
            &["CREATE TABLE \"a;b\" (c int)", "x"],
        ),
        (
            "DO $$ BEGIN a; b; END $$; x",
            &["DO $$ BEGIN a; b; END $$", "x"],
        ),
        ("DO $q$ $$;$$ $q$; x", &["DO $q$ $$;$$ $q$", "x"]),
        (
            "a /* ; /* ; */ ; */ b; c -- ;\n; d",
            &["a /* ; /* ; */ ; */ b", "c", "d"],
        ),
        (
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 1 END; END; x",
            &[
                "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 1 END; END",
                "x",
            ],
        ),
        (
            "CREATE RULE r AS ON INSERT TO t DO (INSERT INTO a VALUES (1); INSERT INTO b VALUES (2)); x",
            &[
                "CREATE RULE r AS ON INSERT TO t DO (INSERT INTO a VALUES (1); INSERT INTO b VALUES (2))",
                "x",
            ],
        ),
        (
            "BEGIN; CREATE TABLE t (); END; x",
            &["BEGIN", "CREATE TABLE t ()", "END", "x"],
        ),
        (
            "SELECT 1 AS \"é;\"; CREATE TABLE ü ()",
            &["SELECT 1 AS \"é;\"", "CREATE TABLE ü ()"],
        ),
    ];
    for (text, expected) in table {
        assert_eq!(split(text), *expected, "{text}");
    }
}

#[test]
fn a_command_tag_is_known_by_its_words() {
    let table = [
        ("CREATE TABLE", "create table t (a int)", true),
        (
            "CREATE TABLE",
            "CREATE UNLOGGED TABLE IF NOT EXISTS t (a int)",
            true,
        ),
        ("CREATE TABLE", "CREATE TABLE t AS SELECT 1", false),
        ("CREATE TABLE AS", "CREATE TABLE t AS SELECT 1", true),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t (a, b) AS (VALUES (1, 2))",
            true,
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t AS TABLE u WITH NO DATA",
            true,
        ),
        (
            "CREATE TABLE AS",
            "CREATE TABLE t (a int GENERATED ALWAYS AS (b) STORED)",
            false,
        ),
        (
            "CREATE TABLE",
            "CREATE TABLE t (a int GENERATED ALWAYS AS (b) STORED)",
            true,
        ),
        ("SELECT INTO", "SELECT 1 AS a INTO t", true),
        ("CREATE INDEX", "CREATE UNIQUE INDEX ON t (a)", true),
        (
            "CREATE VIEW",
            "CREATE OR REPLACE TEMP RECURSIVE VIEW v AS SELECT 1",
            true,
        ),
        (
            "CREATE FUNCTION",
            "/* x */ CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS ''",
            true,
        ),
        (
            "CREATE TRIGGER",
            "CREATE CONSTRAINT TRIGGER g AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()",
            true,
        ),
        (
            "CREATE MATERIALIZED VIEW",
            "CREATE MATERIALIZED VIEW v AS SELECT 1",
            true,
        ),
        ("ALTER TABLE", "ALTER TABLE ONLY t ADD a int", true),
        ("ALTER TABLE", "ALTER INDEX i RENAME TO j", false),
        (
            "ALTER DEFAULT PRIVILEGES",
            "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO x",
            true,
        ),
        ("DROP TABLE", "DROP TABLE IF EXISTS a, b CASCADE", true),
        ("DROP TABLE", "DROP VIEW a", false),
        ("GRANT", "GRANT SELECT ON t TO x", true),
        ("COMMENT", "COMMENT ON TABLE t IS 'x'", true),
        (
            "CREATE LANGUAGE",
            "CREATE TRUSTED PROCEDURAL LANGUAGE l",
            true,
        ),
    ];
    for (tag, statement, expected) in table {
        assert_eq!(
            is_tagged(&Words::of(statement), tag),
            expected,
            "{tag}: {statement}"
        );
    }
}

#[test]
fn one_of_several_is_found_by_its_tag_or_its_place() {
    let several = "BEGIN; CREATE TABLE a (); SET x = 1; CREATE TABLE b (); INSERT INTO b DEFAULT VALUES; ALTER TABLE a ADD c int; COMMIT";
    assert_eq!(
        top("CREATE TABLE", several, 1).as_deref(),
        Some("CREATE TABLE a ()")
    );
    assert_eq!(
        top("CREATE TABLE", several, 2).as_deref(),
        Some("CREATE TABLE b ()")
    );
    assert_eq!(
        top("ALTER TABLE", several, 3).as_deref(),
        Some("ALTER TABLE a ADD c int")
    );
    assert_eq!(top("CREATE TABLE", several, 3), None);
    // One that fires nothing does not count, and one that fires without objects does.
    let shared = "CREATE ROLE r; COMMENT ON ROLE r IS 'x'; GRANT r TO q; CREATE TABLE IF NOT EXISTS a (); CREATE TABLE b ()";
    assert_eq!(
        top("CREATE TABLE", shared, 2).as_deref(),
        Some("CREATE TABLE b ()")
    );
    // A function may have fired it any number of times.
    let called = "SELECT make(); CREATE TABLE a (); CREATE TABLE b ()";
    assert_eq!(top("CREATE TABLE", called, 2), None);
    let one = "SELECT make(); CREATE TABLE a (); DO 'x'";
    assert_eq!(
        top("CREATE TABLE", one, 5).as_deref(),
        Some("CREATE TABLE a ()")
    );
    assert_eq!(top("CREATE VIEW", several, 1), None);
    // A drop fires only where something is dropped.
    let drops = event(
        EventKind::Drop,
        "DROP TABLE",
        "DROP TABLE IF EXISTS x; DROP TABLE a",
        TOP,
        1,
    );
    assert_eq!(text(&drops), None);
    let drop = event(
        EventKind::Drop,
        "DROP TABLE",
        "CREATE TABLE b (); DROP TABLE a",
        TOP,
        1,
    );
    assert_eq!(text(&drop).as_deref(), Some("DROP TABLE a"));
}

#[test]
fn what_a_function_has_run_is_told_by_the_innermost_frame() {
    let inside = |frames: &str, tag: &str| {
        text(&event(
            EventKind::Command,
            tag,
            "SELECT f()",
            &format!("{TOP}\n{frames}"),
            1,
        ))
    };
    let table = [
        (
            "SQL statement \"CREATE TABLE a (b text DEFAULT \"x\")\"\nPL/pgSQL function f() line 1 at SQL statement",
            "CREATE TABLE",
            Some("CREATE TABLE a (b text DEFAULT \"x\")"),
        ),
        (
            "SQL statement \"CREATE TABLE a (\n  b int)\"\nPL/pgSQL function g() line 3 at EXECUTE\nSQL statement \"SELECT g()\"\nPL/pgSQL function f() line 1 at PERFORM",
            "CREATE TABLE",
            Some("CREATE TABLE a (\n  b int)"),
        ),
        (
            "SQL statement \"ALTER TABLE \"a;b\" ADD c int;\"\nPL/pgSQL function inline_code_block line 1 at EXECUTE",
            "ALTER TABLE",
            Some("ALTER TABLE \"a;b\" ADD c int"),
        ),
        (
            "SQL statement \"CREATE TABLE a (); CREATE TABLE b ()\"\nPL/pgSQL function f() line 1 at EXECUTE",
            "CREATE TABLE",
            None,
        ),
        (
            "SQL statement \"CREATE TABLE a ()\"\nPL/pgSQL function f() line 1 at EXECUTE",
            "CREATE VIEW",
            None,
        ),
        (
            "SQL function \"g\" statement 1\nSQL statement \"SELECT g()\"",
            "CREATE TABLE",
            None,
        ),
        (
            "SQL-Anweisung »CREATE TABLE a ()«\nPL/pgSQL-Funktion f() Zeile 1 bei EXECUTE",
            "CREATE TABLE",
            None,
        ),
    ];
    for (frames, tag, expected) in table {
        assert_eq!(inside(frames, tag).as_deref(), expected, "{frames}");
    }
    let mut unknown = event(
        EventKind::Command,
        "CREATE TABLE",
        "CREATE TABLE a ()",
        TOP,
        1,
    );
    unknown.context = None;
    assert_eq!(text(&unknown), None);
}

#[test]
fn what_would_give_other_rows_here_is_not_run() {
    let table = [
        ("CREATE INDEX CONCURRENTLY ON t (a)", false),
        ("CREATE INDEX ON t (a)", true),
        (
            "CREATE TABLE t (a timestamptz DEFAULT now(), b serial)",
            true,
        ),
        ("CREATE TABLE t AS SELECT 1", false),
        ("CREATE TABLE t (a int) TABLESPACE x", false),
        ("CREATE MATERIALIZED VIEW v AS SELECT 1", false),
        ("CREATE VIEW v AS SELECT now()", true),
        ("ALTER TABLE t ADD a int", true),
        ("ALTER TABLE t ADD COLUMN a int DEFAULT 5 NOT NULL", true),
        (
            "ALTER TABLE t ADD COLUMN a numeric(10, 2) DEFAULT -1.50 NOT NULL",
            true,
        ),
        ("ALTER TABLE t ADD a text DEFAULT 'x'::varchar(20)", true),
        (
            "ALTER TABLE t ADD a jsonb DEFAULT '{}'::jsonb NOT NULL, ADD b bool DEFAULT true",
            true,
        ),
        ("ALTER TABLE t ADD a int[] DEFAULT ARRAY[]::int[]", true),
        (
            "ALTER TABLE t ADD a int DEFAULT 5 CHECK (length(b) > a)",
            true,
        ),
        ("ALTER TABLE t ADD a timestamptz DEFAULT now()", false),
        (
            "ALTER TABLE t ADD a timestamptz DEFAULT CURRENT_TIMESTAMP NOT NULL",
            false,
        ),
        ("ALTER TABLE t ADD a text DEFAULT current_user", false),
        ("ALTER TABLE t ADD a text DEFAULT 'x' || now()", false),
        ("ALTER TABLE t ADD a text DEFAULT lower('X')", false),
        (
            "ALTER TABLE t DROP b, ADD a uuid DEFAULT gen_random_uuid()",
            false,
        ),
        ("ALTER TABLE t ADD a serial", false),
        (
            "ALTER TABLE t ADD COLUMN a int GENERATED BY DEFAULT AS IDENTITY",
            false,
        ),
        (
            "ALTER TABLE t ALTER COLUMN a ADD GENERATED ALWAYS AS IDENTITY",
            true,
        ),
        ("ALTER TABLE t ALTER a SET DEFAULT now()", true),
        ("ALTER TABLE t ADD CONSTRAINT k CHECK (a > 0)", true),
        (
            "ALTER TABLE t ADD a int GENERATED ALWAYS AS (b * 2) STORED",
            true,
        ),
        ("ALTER TABLE t ALTER a TYPE bigint", true),
        ("ALTER TABLE t ALTER a TYPE int USING a::int", false),
        ("ALTER TABLE t RENAME a TO concurrently_done", true),
        ("COMMENT ON TABLE t IS 'TABLESPACE CONCURRENTLY'", true),
    ];
    for (statement, exact) in table {
        let is_exact = only_by_shape(&Words::of(statement)).is_none();
        assert_eq!(is_exact, exact, "{statement}");
    }
}
