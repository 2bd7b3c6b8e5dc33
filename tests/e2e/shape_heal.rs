//! Goal: what was recorded of an object is enough to make it, and to make one of another.
//! Method: objects of every kind in one database; another one on the other server is brought to the same from shapes alone, until
//! nothing changes any more. Then the first is altered in every way, and the second brought there again. Both times the shapes and
//! what `pg_dump` says are compared.

use std::collections::BTreeMap;

use dr_agent::names::object::ObjectAddress;
use dr_agent::shape::{self, Healing, Roles};
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;
use serde_json::Value;

use crate::ddl::dumped;

const SHAPES: &str = include_str!("../../agent/sql/shape.sql");

const CREATED: &[&str] = &[
    "CREATE SCHEMA s; CREATE SCHEMA \"Ünder Score\"; COMMENT ON SCHEMA s IS 'it''s'",
    "CREATE TYPE s.mood AS ENUM ('sad', 'ok'); CREATE TYPE s.pair AS (x int, y text); COMMENT ON COLUMN s.pair.x IS 'left'",
    "CREATE DOMAIN s.positive AS int DEFAULT 5 NOT NULL CONSTRAINT over CHECK (VALUE > 0); CREATE TYPE s.floats AS RANGE (subtype = float8)",
    "CREATE COLLATION s.plain (locale = 'C'); CREATE SEQUENCE s.counter AS int INCREMENT 5 MAXVALUE 1000 CYCLE",
    "CREATE FUNCTION s.twice(a int, b int DEFAULT 2) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a * b'",
    "CREATE FUNCTION s.touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$; CREATE PROCEDURE s.work() LANGUAGE plpgsql AS $$ BEGIN NULL; END $$",
    "CREATE AGGREGATE s.total(int) (SFUNC = int4pl, STYPE = int, INITCOND = '0'); COMMENT ON AGGREGATE s.total(int) IS 'sum'",
    "CREATE TABLE s.item (id int GENERATED ALWAYS AS IDENTITY (START 7) PRIMARY KEY, n s.positive, m s.mood DEFAULT 'ok', p s.pair,
        label text COLLATE s.plain DEFAULT 'x' NOT NULL, double int GENERATED ALWAYS AS (id * 2) STORED, c int DEFAULT nextval('s.counter'),
        ser serial, tags text[], amount numeric(10, 2), UNIQUE (label, n), CONSTRAINT big CHECK (c > 0) NOT VALID)",
    "INSERT INTO s.item (n) VALUES (1); ALTER TABLE s.item ADD since timestamptz DEFAULT now(), ADD list int[] DEFAULT '{1,2}', ADD j jsonb DEFAULT '{\"a\": 1}'",
    "COMMENT ON TABLE s.item IS 'what is sold'; COMMENT ON COLUMN s.item.n IS 'how many'; COMMENT ON CONSTRAINT big ON s.item IS 'large'",
    "ALTER TABLE s.item ALTER label SET STORAGE EXTERNAL, ALTER n SET STATISTICS 50, ALTER c SET (n_distinct = 5), SET (fillfactor = 80)",
    "CREATE TABLE s.line (item int REFERENCES s.item ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED, n int, EXCLUDE USING btree (n WITH =))",
    "CREATE TABLE s.parent (a int NOT NULL, b text CHECK (b <> '')); CREATE TABLE s.child (c int) INHERITS (s.parent)",
    "CREATE TABLE s.event (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at); CREATE INDEX by_at ON s.event (at)",
    "CREATE TABLE s.event_1 PARTITION OF s.event FOR VALUES FROM ('2025-01-01') TO ('2026-01-01'); CREATE TABLE s.event_rest PARTITION OF s.event DEFAULT",
    "CREATE UNLOGGED TABLE s.scratch (a int); CREATE TABLE s.keyless (a int, b int); ALTER TABLE s.keyless REPLICA IDENTITY FULL",
    "CREATE INDEX by_label ON s.item (lower(label)) INCLUDE (n) WHERE n > 3; COMMENT ON INDEX s.by_label IS 'for finding'",
    "CREATE UNIQUE INDEX only_one ON s.line (n) NULLS NOT DISTINCT",
    "CREATE VIEW s.cheap WITH (security_barrier) AS SELECT id, label FROM s.item WHERE n < 5; COMMENT ON COLUMN s.cheap.id IS 'which'",
    "CREATE MATERIALIZED VIEW s.counts AS SELECT count(*) AS n FROM s.item; CREATE INDEX ON s.counts (n)",
    "CREATE TRIGGER touched BEFORE UPDATE ON s.item FOR EACH ROW WHEN (OLD.n > 1) EXECUTE FUNCTION s.touch(); ALTER TABLE s.item DISABLE TRIGGER touched",
    "CREATE RULE nothing AS ON DELETE TO s.cheap DO INSTEAD NOTHING",
    "ALTER TABLE s.item ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; CREATE POLICY own ON s.item AS RESTRICTIVE FOR UPDATE USING (n > 0) WITH CHECK (n > 1)",
    "CREATE STATISTICS s.both (dependencies) ON n, label FROM s.item; ALTER STATISTICS s.both SET STATISTICS 10",
    "GRANT SELECT, UPDATE ON s.item TO PUBLIC; REVOKE EXECUTE ON FUNCTION s.twice FROM PUBLIC; GRANT USAGE ON SCHEMA s TO PUBLIC",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA s GRANT SELECT ON TABLES TO PUBLIC",
    "CREATE CAST (s.pair AS text) WITH INOUT AS ASSIGNMENT",
    "CREATE FUNCTION s.same(s.pair, s.pair) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true'; CREATE OPERATOR s.=== (LEFTARG = s.pair, RIGHTARG = s.pair, FUNCTION = s.same, COMMUTATOR = OPERATOR(s.===))",
    "CREATE FOREIGN DATA WRAPPER w OPTIONS (debug 'true'); CREATE SERVER srv VERSION '1' FOREIGN DATA WRAPPER w OPTIONS (host 'h', port '1')",
    "CREATE FOREIGN TABLE s.far (a int, b text NOT NULL) SERVER srv OPTIONS (path '/x'); COMMENT ON FOREIGN TABLE s.far IS 'elsewhere'",
    "CREATE TABLE \"Ünder Score\".\"T\"\"able\" (\"Key!\" int PRIMARY KEY, \"a b\" text DEFAULT E'\\\\''')",
];

const ALTERED: &[&str] = &[
    "ALTER TYPE s.mood ADD VALUE 'happy'; ALTER TYPE s.mood ADD VALUE 'flat' BEFORE 'ok'; ALTER TYPE s.pair ADD ATTRIBUTE z date; COMMENT ON COLUMN s.pair.x IS NULL",
    "ALTER DOMAIN s.positive DROP NOT NULL; ALTER DOMAIN s.positive SET DEFAULT 9; ALTER DOMAIN s.positive DROP CONSTRAINT over; ALTER DOMAIN s.positive ADD CONSTRAINT under CHECK (VALUE < 100)",
    "ALTER SEQUENCE s.counter INCREMENT 2 NO CYCLE; COMMENT ON SEQUENCE s.counter IS 'counts'",
    "CREATE OR REPLACE FUNCTION s.touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.n := 1; RETURN NEW; END $$",
    "ALTER TABLE s.item ALTER ser TYPE bigint, ALTER label DROP NOT NULL, ALTER label SET DEFAULT 'y', DROP amount, ADD price numeric(12, 2) DEFAULT 1.5",
    "ALTER TABLE s.item ALTER label SET STORAGE EXTENDED, ALTER n SET STATISTICS -1, ALTER c RESET (n_distinct), RESET (fillfactor), SET (autovacuum_enabled = false)",
    "ALTER TABLE s.item RENAME tags TO words; ALTER TABLE s.item ALTER id SET GENERATED BY DEFAULT; ALTER TABLE s.item ALTER id SET INCREMENT 3",
    "ALTER TABLE s.item VALIDATE CONSTRAINT big; ALTER TABLE s.item ADD CONSTRAINT small CHECK (c < 100000), NO FORCE ROW LEVEL SECURITY; COMMENT ON TABLE s.item IS NULL",
    "ALTER TABLE s.line DROP CONSTRAINT line_item_fkey, ADD CONSTRAINT line_item_fkey FOREIGN KEY (item) REFERENCES s.item",
    "ALTER TABLE s.child NO INHERIT s.parent; ALTER TABLE s.event DETACH PARTITION s.event_1; ALTER TABLE s.scratch SET LOGGED; ALTER TABLE s.keyless REPLICA IDENTITY NOTHING",
    "ALTER INDEX s.by_label ALTER COLUMN 1 SET STATISTICS 77; COMMENT ON INDEX s.by_label IS NULL; DROP INDEX s.only_one; CREATE INDEX only_one ON s.line (item, n)",
    "COMMENT ON COLUMN s.cheap.id IS NULL; ALTER VIEW s.cheap RESET (security_barrier); CREATE OR REPLACE VIEW s.cheap AS SELECT id, label, n AS added FROM s.item",
    "ALTER TABLE s.item ENABLE ALWAYS TRIGGER touched; DROP POLICY own ON s.item; CREATE POLICY own ON s.item FOR SELECT USING (true)",
    "REVOKE UPDATE ON s.item FROM PUBLIC; GRANT EXECUTE ON FUNCTION s.twice TO PUBLIC; ALTER DEFAULT PRIVILEGES IN SCHEMA s GRANT UPDATE ON TABLES TO PUBLIC",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA s GRANT INSERT ON TABLES TO pg_monitor WITH GRANT OPTION",
    "ALTER SERVER srv VERSION '2' OPTIONS (SET host 'i', DROP port, ADD dbname 'd'); ALTER FOREIGN TABLE s.far OPTIONS (SET path '/y'); ALTER FOREIGN DATA WRAPPER w OPTIONS (DROP debug)",
    "ALTER STATISTICS s.both SET STATISTICS -1; COMMENT ON STATISTICS s.both IS 'x'; COMMENT ON COLUMN s.item.n IS 'changed'",
];

/// Every object, with its identity and its shape.
async fn objects(client: &Client) -> BTreeMap<ObjectAddress, (String, Value)> {
    let driver = client.driver();
    let sql = "SELECT kind, names, args, identity, dr_agent.shape(kind, names, args)::text FROM dr_agent.shapes()";
    let rows = driver.query(sql, &[]).await.expect("shapes can be read");
    let each = rows.iter().map(|row| {
        let address = ObjectAddress {
            kind: row.get(0),
            names: row.get(1),
            args: row.get(2),
        };
        let shape: &str = row.get(4);
        let shape = serde_json::from_str(shape).expect("a shape is JSON");
        (address, (row.get(3), shape))
    });
    each.collect()
}

/// One round: heals what differs, and returns what does, and why.
async fn round(there: &Client, here: &Client) -> Vec<String> {
    let roles = Roles::read(here.driver()).await.expect("roles can be read");
    let mut left = Vec::new();
    for (address, (identity, recorded)) in objects(there).await {
        let driver = here.driver();
        let read = async || {
            shape::read(driver, &address)
                .await
                .expect("a shape can be read")
        };
        let differences = |found: Option<&Value>| match found {
            None => vec!["is not there".to_owned()],
            Some(found) => shape::differences(&address, &recorded, found, &roles, false),
        };
        let found = read().await;
        if differences(found.as_ref()).is_empty() {
            continue;
        }
        let healing = shape::heal(&address, &identity, &recorded, found.as_ref(), &roles);
        let Healing::Statements {
            statements,
            otherwise,
            ..
        } = healing
        else {
            left.push(format!("{} {identity}: {healing:?}", address.kind));
            continue;
        };
        let all = |statements: &[String]| format!("BEGIN; {}; COMMIT", statements.join("; "));
        let mut refused = here.try_run(&all(&statements)).await.err();
        if refused.is_some() {
            here.run("ROLLBACK").await;
            if !otherwise.is_empty() {
                refused = here.try_run(&all(&otherwise)).await.err();
                if refused.is_some() {
                    here.run("ROLLBACK").await;
                }
            }
        }
        let after = read().await;
        let differs = differences(after.as_ref());
        if !differs.is_empty() {
            left.push(format!(
                "{} {identity}: {differs:?} after {statements:?} {refused:?}",
                address.kind
            ));
        }
    }
    left
}

/// Rounds until nothing more changes.
async fn healed(there: &Client, here: &Client) {
    let mut before = usize::MAX;
    loop {
        let left = round(there, here).await;
        if left.is_empty() {
            return;
        }
        assert!(left.len() < before, "{left:#?}");
        before = left.len();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_object_is_made_and_altered_from_its_shape_alone() {
    let site = Site::shared().await;
    let database = site.database("shape_heal").await;
    let (source, server) = (database.source().await, database.replica_server());
    server.create_database("shape_healed").await;
    let here = server.client("shape_healed").await;
    for client in [&source, &here] {
        client.run("CREATE SCHEMA dr_agent").await;
        client.run(SHAPES).await;
        client
            .run("SET search_path = ''; SET check_function_bodies = off")
            .await;
    }
    let url = server.url("shape_healed");
    let major = source
        .number("SELECT current_setting('server_version_num')::int / 10000")
        .await;
    for part in [CREATED, ALTERED] {
        for statements in part {
            // NULLS NOT DISTINCT is of version 15.
            if major < 15 && statements.contains("NULLS NOT DISTINCT") {
                continue;
            }
            source.run(statements).await;
        }
        healed(&source, &here).await;
    }
    let (there, healed) = (dumped(&database.source_url()), dumped(&url));
    let lines = |text: &str| {
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.trim_end_matches(',').to_owned())
            .collect();
        lines.sort();
        lines
    };
    // Columns may stand in another order.
    assert_eq!(lines(&there), lines(&healed));
}
