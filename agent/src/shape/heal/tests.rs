use serde_json::{Value, json};

use super::*;

fn address(kind: &str, names: &[&str]) -> ObjectAddress {
    ObjectAddress {
        kind: kind.to_owned(),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        args: Vec::new(),
    }
}

fn planned(
    kind: &str,
    names: &[&str],
    recorded: &Value,
    found: Option<&Value>,
) -> (Vec<String>, bool) {
    let roles = Roles::of(&[("app", true), ("read", false)]);
    match heal(
        &address(kind, names),
        &names.join("."),
        recorded,
        found,
        &roles,
    ) {
        Healing::Statements {
            statements,
            copy_again,
            ..
        } => (statements, copy_again),
        Healing::Refused(reason) => (vec![format!("refused: {reason}")], false),
    }
}

#[test]
fn a_table_is_created_from_nothing() {
    let recorded = json!({
        "kind": "r", "persistence": "p", "owner": "app", "rls": true, "comment": "it's",
        "options": ["fillfactor=70"],
        "columns": [
            {"name": "id", "type": "integer", "notnull": true, "identity": "a",
             "sequence": {"schema": "s", "name": "t_id_seq", "start": 1, "increment": 1, "min": 1, "max": 9, "cache": 1, "cycle": false}},
            {"name": "My col", "type": "text", "collation": "\"C\"", "default": "'x'::text"},
            {"name": "g", "type": "integer", "generated": "s", "default": "(id * 2)"}],
        "constraints": {
            "t_pkey": {"type": "p", "definition": "PRIMARY KEY (id)"},
            "t_fk": {"type": "f", "definition": "FOREIGN KEY (g) REFERENCES s.u(id)"}},
        "acl": [{"grantee": "read", "privilege": "SELECT", "grantable": false}]
    });
    let (statements, copy_again) = planned("table", &["s", "t"], &recorded, None);
    assert_eq!(
        statements,
        [
            "CREATE TABLE \"s\".\"t\" (\"id\" integer GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME \"s\".\"t_id_seq\" INCREMENT 1 \
             MINVALUE 1 MAXVALUE 9 START 1 CACHE 1 NO CYCLE) NOT NULL, \"My col\" text COLLATE \"C\" DEFAULT 'x'::text, \"g\" integer \
             GENERATED ALWAYS AS ((id * 2)) STORED, CONSTRAINT \"t_pkey\" PRIMARY KEY (id)) WITH (fillfactor='70')",
            "ALTER TABLE \"s\".\"t\" ADD CONSTRAINT \"t_fk\" FOREIGN KEY (g) REFERENCES s.u(id)",
            "ALTER TABLE \"s\".\"t\" ENABLE ROW LEVEL SECURITY",
            "COMMENT ON TABLE \"s\".\"t\" IS 'it''s'",
            "ALTER TABLE \"s\".\"t\" OWNER TO \"app\"",
            "GRANT SELECT ON TABLE \"s\".\"t\" TO \"read\"",
        ]
    );
    assert!(!copy_again);
}

/// Columns wanted, columns there, the statements, and whether rows have to be copied again.
type ColumnsCase = (Value, Value, &'static [&'static str], bool);

#[test]
fn columns_are_altered() {
    let a = || json!({"name": "a", "type": "integer"});
    let table: Vec<ColumnsCase> = vec![
        (json!([a()]), json!([a()]), &[], false),
        (
            json!([a(), {"name": "b", "type": "timestamp with time zone", "default": "now()", "missing": "2026-01-01 00:00:00+00"}]),
            json!([a()]),
            &[
                "ADD COLUMN \"b\" timestamp with time zone DEFAULT '2026-01-01 00:00:00+00'::timestamp with time zone",
                "ALTER COLUMN \"b\" SET DEFAULT now()",
            ],
            false,
        ),
        (
            json!([a(), {"name": "b", "type": "text", "missing": "x"}]),
            json!([a()]),
            &[
                "ADD COLUMN \"b\" text DEFAULT 'x'::text",
                "ALTER COLUMN \"b\" DROP DEFAULT",
            ],
            false,
        ),
        (
            json!([a(), {"name": "b", "type": "uuid", "default": "gen_random_uuid()"}]),
            json!([a()]),
            &["ADD COLUMN \"b\" uuid DEFAULT gen_random_uuid()"],
            true,
        ),
        (
            json!([{"name": "b", "type": "integer"}]),
            json!([a()]),
            &["RENAME COLUMN \"a\" TO \"b\""],
            false,
        ),
        (
            json!([{"name": "b", "type": "text"}]),
            json!([a()]),
            &["DROP COLUMN \"a\"", "ADD COLUMN \"b\" text"],
            false,
        ),
        (
            json!([{"name": "a", "type": "bigint"}]),
            json!([a()]),
            &["ALTER COLUMN \"a\" TYPE bigint USING \"a\"::bigint"],
            false,
        ),
        (
            json!([{"name": "a", "type": "timestamp with time zone", "default": "now()"}]),
            json!([{"name": "a", "type": "text", "default": "'x'"}]),
            &[
                "ALTER COLUMN \"a\" DROP DEFAULT",
                "ALTER COLUMN \"a\" TYPE timestamp with time zone USING \"a\"::timestamp with time zone",
                "ALTER COLUMN \"a\" SET DEFAULT now()",
            ],
            true,
        ),
        (
            json!([{"name": "a", "type": "integer", "notnull": true, "default": "5", "storage": "p", "statistics": 10}]),
            json!([a()]),
            &[
                "ALTER COLUMN \"a\" SET DEFAULT 5",
                "ALTER COLUMN \"a\" SET NOT NULL",
                "ALTER COLUMN \"a\" SET STORAGE PLAIN",
                "ALTER COLUMN \"a\" SET STATISTICS 10",
            ],
            false,
        ),
        (
            json!([{"name": "a", "type": "integer", "generated": "s", "default": "2"}]),
            json!([{"name": "a", "type": "integer", "generated": "s", "default": "1"}]),
            &[
                "DROP COLUMN \"a\"",
                "ADD COLUMN \"a\" integer GENERATED ALWAYS AS (2) STORED",
            ],
            false,
        ),
        (
            json!([{"name": "a", "type": "integer", "identity": "d"}]),
            json!([{"name": "a", "type": "integer", "identity": "a"}]),
            &["ALTER COLUMN \"a\" SET GENERATED BY DEFAULT"],
            false,
        ),
    ];
    for (wanted, has, expected, copy) in table {
        let (wanted, has) = (
            json!({"kind": "r", "columns": wanted}),
            json!({"kind": "r", "columns": has}),
        );
        let (statements, copy_again) = planned("table", &["s", "t"], &wanted, Some(&has));
        let expected: Vec<String> = expected
            .iter()
            .map(|rest| format!("ALTER TABLE \"s\".\"t\" {rest}"))
            .collect();
        assert_eq!((statements, copy_again), (expected, copy), "{wanted}");
    }
}

#[test]
fn constraints_partitions_and_privileges_are_altered() {
    let of = |more: Value| {
        let mut shape = json!({"kind": "r", "columns": []});
        shape
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        shape
    };
    let k =
        |definition: &str| json!({"constraints": {"k": {"type": "c", "definition": definition}}});
    let table: [(Value, Value, &[&str]); 7] = [
        (
            k("CHECK (a > 0)"),
            json!({}),
            &["ALTER TABLE \"s\".\"t\" ADD CONSTRAINT \"k\" CHECK (a > 0)"],
        ),
        (
            json!({}),
            k("CHECK (a > 0)"),
            &["ALTER TABLE \"s\".\"t\" DROP CONSTRAINT \"k\""],
        ),
        (
            k("CHECK (a > 1)"),
            k("CHECK (a > 0)"),
            &[
                "ALTER TABLE \"s\".\"t\" DROP CONSTRAINT \"k\"",
                "ALTER TABLE \"s\".\"t\" ADD CONSTRAINT \"k\" CHECK (a > 1)",
            ],
        ),
        (
            json!({"parents": ["s.p"], "bound": "FOR VALUES IN (1)"}),
            json!({}),
            &["ALTER TABLE s.p ATTACH PARTITION \"s\".\"t\" FOR VALUES IN (1)"],
        ),
        (
            json!({}),
            json!({"parents": ["s.p"], "bound": "DEFAULT"}),
            &["ALTER TABLE s.p DETACH PARTITION \"s\".\"t\""],
        ),
        (
            json!({"parents": ["s.p"]}),
            json!({}),
            &["ALTER TABLE \"s\".\"t\" INHERIT s.p"],
        ),
        (
            json!({}),
            json!({"acl": [{"privilege": "SELECT", "grantable": false}]}),
            &["REVOKE SELECT ON TABLE \"s\".\"t\" FROM PUBLIC"],
        ),
    ];
    for (wanted, has, expected) in table {
        let (statements, _) = planned("table", &["s", "t"], &of(wanted.clone()), Some(&of(has)));
        assert_eq!(statements, expected, "{wanted}");
    }
}

/// Kind, names, what is wanted, what there is, and the statements.
type OtherCase = (
    &'static str,
    &'static [&'static str],
    Value,
    Option<Value>,
    &'static [&'static str],
);

#[test]
fn other_kinds() {
    let view = json!({"definition": " SELECT 1 AS a;", "columns": ["a"], "options": ["security_barrier=true"]});
    let index = json!({"definition": "CREATE INDEX i ON s.t USING btree (a)", "table_schema": "s", "table_name": "t"});
    let of_constraint = json!({"definition": "x", "constraint": true});
    let trigger = json!({"definition": "CREATE TRIGGER g …", "enabled": "A"});
    let policy = json!({"command": "r", "permissive": true, "roles": [null], "using": "(a > 0)"});
    let labels = |labels: Value| json!({"typtype": "e", "labels": labels});
    let table: Vec<OtherCase> = vec![
        (
            "view",
            &["s", "v"],
            view,
            None,
            &[
                "CREATE OR REPLACE VIEW \"s\".\"v\" (\"a\") WITH (security_barrier='true') AS  SELECT 1 AS a",
            ],
        ),
        (
            "materialized view",
            &["s", "m"],
            json!({"definition": "SELECT 1;", "columns": ["x"]}),
            Some(json!({})),
            &[
                "DROP MATERIALIZED VIEW \"s\".\"m\"",
                "CREATE MATERIALIZED VIEW \"s\".\"m\" (\"x\") AS SELECT 1 WITH NO DATA",
            ],
        ),
        (
            "index",
            &["s", "i"],
            index.clone(),
            None,
            &["CREATE INDEX i ON s.t USING btree (a)"],
        ),
        (
            "index",
            &["s", "i"],
            index,
            Some(json!({"definition": "y"})),
            &[
                "DROP INDEX \"s\".\"i\"",
                "CREATE INDEX i ON s.t USING btree (a)",
            ],
        ),
        ("index", &["s", "i"], of_constraint, None, &[]),
        (
            "trigger",
            &["s", "t", "g"],
            trigger,
            None,
            &[
                "CREATE TRIGGER g …",
                "ALTER TABLE \"s\".\"t\" ENABLE ALWAYS TRIGGER \"g\"",
            ],
        ),
        (
            "policy",
            &["s", "t", "p"],
            policy,
            Some(json!({})),
            &[
                "DROP POLICY \"p\" ON \"s\".\"t\"",
                "CREATE POLICY \"p\" ON \"s\".\"t\" AS PERMISSIVE FOR SELECT TO PUBLIC USING ((a > 0))",
            ],
        ),
        (
            "type",
            &["s.e"],
            labels(json!(["a", "b"])),
            None,
            &["CREATE TYPE s.e AS ENUM ('a', 'b')"],
        ),
        (
            "type",
            &["s.e"],
            labels(json!(["z", "a", "b", "c"])),
            Some(labels(json!(["a", "c"]))),
            &[
                "ALTER TYPE s.e ADD VALUE 'z' BEFORE 'a'",
                "ALTER TYPE s.e ADD VALUE 'b' AFTER 'a'",
            ],
        ),
        (
            "type",
            &["s.e"],
            labels(json!(["a", "c"])),
            Some(labels(json!(["a", "b"]))),
            &["ALTER TYPE s.e RENAME VALUE 'b' TO 'c'"],
        ),
        (
            "type",
            &["s.e"],
            labels(json!(["a"])),
            Some(labels(json!(["a", "b"]))),
            &["refused: labels have gone that are here"],
        ),
        (
            "schema",
            &["s"],
            json!({"owner": "gone"}),
            None,
            &["CREATE SCHEMA \"s\""],
        ),
        (
            "sequence",
            &["s", "q"],
            json!({"type": "integer", "start": 3}),
            None,
            &["CREATE SEQUENCE \"s\".\"q\" AS integer START 3 NO CYCLE"],
        ),
        (
            "text search parser",
            &["s", "p"],
            json!({}),
            None,
            &["refused: a text search parser is not made from its shape"],
        ),
    ];
    for (kind, names, recorded, found, expected) in table {
        let (statements, _) = planned(kind, names, &recorded, found.as_ref());
        assert_eq!(statements, expected, "{kind} {recorded}");
    }
}
