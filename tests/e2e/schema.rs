//! Goal: what a real schema holds and does arrives intact, whatever way the rows went.
//! Method: one database per subject on shared servers; statements before the copy and through the stream;
//! then every table is compared by full content.

use dr_agent_tests::site::{Database, Site};

/// Runs `before`, starts the agent, runs `during` (one transaction per element), compares, stops.
async fn carries(purpose: &str, before: &str, during: &[&str]) -> (Site, Database) {
    let site = Site::shared().await;
    let database = site.database(purpose).await;
    let source = database.source().await;
    source.run(before).await;
    let (_agent, running) = database.replicate().await;
    for statements in during {
        source.run(statements).await;
    }
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
    (site, database)
}

#[tokio::test]
async fn rows_move_between_partitions() {
    let (_site, database) = carries(
        "partitions",
        "CREATE TABLE event (id int, region text, day date, body text, PRIMARY KEY (id, region, day)) PARTITION BY LIST (region);
         CREATE TABLE event_eu PARTITION OF event FOR VALUES IN ('de', 'fr') PARTITION BY RANGE (day);
         CREATE TABLE event_eu_2023 PARTITION OF event_eu FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
         CREATE TABLE event_eu_2024 PARTITION OF event_eu FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
         CREATE TABLE event_rest PARTITION OF event DEFAULT;
         INSERT INTO event SELECT g, CASE g % 3 WHEN 0 THEN 'de' WHEN 1 THEN 'fr' ELSE 'us' END,
             '2023-06-01'::date + g, 'copied' FROM generate_series(1, 300) AS g",
        &[
            "UPDATE event SET region = 'us' WHERE id <= 50",
            "UPDATE event SET region = 'fr' WHERE region = 'us' AND id > 250",
            "UPDATE event SET day = day + 200 WHERE region = 'de' AND day < '2023-09-01'",
            "INSERT INTO event SELECT g, 'de', '2024-05-05', 'streamed' FROM generate_series(1000, 1100) AS g",
            "DELETE FROM event WHERE id % 7 = 0",
            "TRUNCATE event_eu_2023; UPDATE event SET body = 'after'",
        ],
    )
    .await;
    let replica = database.replica().await;
    let moved = "SELECT count(*) > 0 FROM event_eu_2024 WHERE body = 'after'";
    assert!(replica.holds(moved).await);
}

#[tokio::test]
async fn duplicates_without_a_key_stay_as_many_as_they_are() {
    carries(
        "keyless",
        "CREATE TABLE bag (a int, b text, c json, d point, e float8);
         ALTER TABLE bag REPLICA IDENTITY FULL;
         INSERT INTO bag SELECT g % 3, 'x', '{\"a\": 1}', '(1,2)', 'NaN' FROM generate_series(1, 30) AS g;
         INSERT INTO bag SELECT NULL, NULL, NULL, NULL, NULL FROM generate_series(1, 5)",
        &[
            "DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag WHERE a = 1 LIMIT 3)",
            "DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag WHERE a IS NULL LIMIT 2)",
            "UPDATE bag SET b = 'y' WHERE ctid IN (SELECT ctid FROM bag WHERE a = 2 LIMIT 4)",
            "UPDATE bag SET a = 2, b = 'y' WHERE ctid IN (SELECT ctid FROM bag WHERE a = 0 LIMIT 1)",
            "INSERT INTO bag SELECT 2, 'y', '{\"a\":1}', '(1,2)', 'NaN' FROM generate_series(1, 3)",
            "UPDATE bag SET c = '{\"a\":  1}' WHERE a = 2 AND b = 'y'; DELETE FROM bag WHERE ctid = (SELECT max(ctid) FROM bag WHERE a = 2)",
        ],
    )
    .await;
}

/// `=` of box compares areas, and an area that is no number does not even equal itself. A composite
/// value whose fields are all NULL is not NULL, and yet `IS NULL` says so.
#[tokio::test]
async fn a_row_with_a_value_that_does_not_equal_itself_is_found_without_a_key() {
    carries(
        "unequal",
        "CREATE TABLE bag (id int, f box, e float4); ALTER TABLE bag REPLICA IDENTITY FULL;
         INSERT INTO bag VALUES (1, '(Infinity,Infinity),(Infinity,0)', 'NaN'), (2, '(1,1),(0,0)', '-0');
         CREATE TYPE pair AS (a int, b int);
         CREATE TABLE pairs (p pair); ALTER TABLE pairs REPLICA IDENTITY FULL;
         INSERT INTO pairs VALUES (ROW(NULL, NULL)), (NULL)",
        &[
            "UPDATE bag SET id = id + 10",
            "UPDATE bag SET f = '(Infinity,Infinity),(Infinity,1)', e = 0 WHERE id = 12",
            "DELETE FROM bag WHERE id = 11",
            "DELETE FROM pairs WHERE p::text IS NULL",
        ],
    )
    .await;
}

#[tokio::test]
async fn unique_values_are_swapped_and_handed_over() {
    carries(
        "unique",
        "CREATE TABLE place (id int PRIMARY KEY, rank int UNIQUE DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE nick (id int PRIMARY KEY, nick text UNIQUE, other text, UNIQUE (other, nick));
         CREATE TABLE key (id int PRIMARY KEY DEFERRABLE, v text); ALTER TABLE key REPLICA IDENTITY FULL;
         CREATE TABLE booking (room int, during int4range, EXCLUDE USING gist (during WITH &&), PRIMARY KEY (during));
         INSERT INTO place SELECT g, g FROM generate_series(1, 100) AS g;
         INSERT INTO nick SELECT g, 'n' || g FROM generate_series(1, 10) AS g;
         INSERT INTO key SELECT g, 'k' || g FROM generate_series(1, 10) AS g;
         INSERT INTO booking VALUES (1, '[1,5)'), (2, '[5,9)')",
        &[
            "UPDATE place SET rank = 101 - rank",
            "UPDATE place SET rank = rank % 100 + 1",
            "UPDATE nick SET nick = NULL WHERE id = 1; UPDATE nick SET nick = 'n1' WHERE id = 2; UPDATE nick SET nick = 'n2' WHERE id = 1",
            "DELETE FROM nick WHERE id = 3; INSERT INTO nick VALUES (30, 'n3')",
            "UPDATE nick SET nick = 'free' WHERE id = 4; INSERT INTO nick VALUES (40, 'n4'); UPDATE nick SET nick = 'n4b' WHERE id = 40; UPDATE nick SET nick = 'n4' WHERE id = 4",
            "UPDATE key SET id = id + 1",
            "UPDATE key SET id = 12 - id",
            "DELETE FROM booking WHERE room = 1; INSERT INTO booking VALUES (3, '[2,4)'); UPDATE booking SET during = '[4,6)' WHERE room = 2; UPDATE booking SET during = '[6,7)' WHERE room = 3",
        ],
    )
    .await;
}

#[tokio::test]
async fn keys_change_in_every_way_within_one_transaction() {
    carries(
        "keys",
        "CREATE TABLE one (id int PRIMARY KEY, v text);
         CREATE TABLE two (a text, b int, v text, PRIMARY KEY (b, a));
         INSERT INTO one SELECT g, 'v' || g FROM generate_series(1, 50) AS g;
         INSERT INTO two SELECT 'a' || g % 5, g, 'v' FROM generate_series(1, 50) AS g",
        &[
            "UPDATE one SET id = id + 100 WHERE id <= 10",
            // A chain: 20 becomes 200, then 201; 21 takes the free 20.
            "UPDATE one SET id = 200 WHERE id = 20; UPDATE one SET id = 201, v = 'twice' WHERE id = 200; UPDATE one SET id = 20 WHERE id = 21",
            // A swap through a third value.
            "UPDATE one SET id = -1 WHERE id = 30; UPDATE one SET id = 30 WHERE id = 31; UPDATE one SET id = 31 WHERE id = -1",
            // There and back; deleted and made again; made and deleted.
            "UPDATE one SET id = 500 WHERE id = 40; UPDATE one SET id = 40 WHERE id = 500",
            "DELETE FROM one WHERE id = 41; INSERT INTO one VALUES (41, 'again'); UPDATE one SET id = 42000 WHERE id = 41",
            "INSERT INTO one VALUES (900, 'short'); UPDATE one SET id = 901 WHERE id = 900; DELETE FROM one WHERE id = 901",
            "UPDATE two SET b = b + 50; UPDATE two SET a = upper(a), v = NULL WHERE b % 2 = 0",
            "UPDATE two SET b = b + 1 WHERE b = (SELECT max(b) FROM two); DELETE FROM two WHERE a = 'A4'",
        ],
    )
    .await;
}

#[tokio::test]
async fn unchanged_toast_keeps_its_value() {
    const BIG: &str =
        "(SELECT string_agg(md5(g::text || random()::text), '') FROM generate_series(1, 700) AS g)";
    let (_site, database) = carries(
        "toast",
        &format!(
            "CREATE TABLE document (id int PRIMARY KEY, title text, body text, extra jsonb);
             CREATE TABLE full_document (id int, title text, body text); ALTER TABLE full_document REPLICA IDENTITY FULL;
             ALTER TABLE document ALTER COLUMN body SET STORAGE EXTERNAL;
             ALTER TABLE full_document ALTER COLUMN body SET STORAGE EXTERNAL;
             INSERT INTO document SELECT g, 'copied', {BIG}, jsonb_build_object('x', {BIG}) FROM generate_series(1, 20) AS g;
             INSERT INTO full_document SELECT g, 'copied', {BIG} FROM generate_series(1, 5) AS g"
        ),
        &[
            "UPDATE document SET title = 'unchanged body'",
            "UPDATE document SET id = id + 100 WHERE id <= 5",
            "UPDATE document SET id = id + 100, title = 'both' WHERE id BETWEEN 6 AND 8",
            // The value is on the replica only, under a key that changes twice.
            "UPDATE document SET id = 300 WHERE id = 9; UPDATE document SET title = 'then' WHERE id = 300; UPDATE document SET id = 301 WHERE id = 300",
            // New here, unchanged in what follows.
            &format!("UPDATE document SET body = {BIG} WHERE id = 10; UPDATE document SET title = 'after' WHERE id = 10; UPDATE document SET extra = NULL WHERE id = 10"),
            &format!("INSERT INTO document VALUES (400, 'new', {BIG}, NULL); UPDATE document SET title = 'newer' WHERE id = 400; UPDATE document SET id = 401 WHERE id = 400"),
            "DELETE FROM document WHERE id = 11; UPDATE document SET id = 11 WHERE id = 12",
            "UPDATE full_document SET title = 'unchanged body'; UPDATE full_document SET id = id + 1; DELETE FROM full_document WHERE id = 3",
        ],
    )
    .await;
    let replica = database.replica().await;
    assert!(
        replica
            .holds("SELECT bool_and(length(body) = 22400) FROM document")
            .await
    );
}

#[tokio::test]
async fn truncates_keep_their_place_among_other_changes() {
    carries(
        "truncate",
        "CREATE TABLE parent (id serial PRIMARY KEY, v text);
         CREATE TABLE child (id serial PRIMARY KEY, parent int REFERENCES parent);
         CREATE TABLE lone (id int PRIMARY KEY); CREATE TABLE pair (id int PRIMARY KEY);
         CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (100);
         CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (100) TO (1000);
         INSERT INTO parent (v) SELECT 'copied' FROM generate_series(1, 10);
         INSERT INTO child (parent) SELECT g FROM generate_series(1, 10) AS g;
         INSERT INTO parted SELECT g FROM generate_series(50, 150) AS g;
         INSERT INTO lone VALUES (1)",
        &[
            "INSERT INTO lone VALUES (2); TRUNCATE lone, pair; INSERT INTO lone VALUES (2), (3); INSERT INTO pair VALUES (9)",
            "TRUNCATE parent RESTART IDENTITY CASCADE; INSERT INTO parent (v) VALUES ('after'); INSERT INTO child (parent) VALUES (1)",
            "TRUNCATE parted_low; INSERT INTO parted VALUES (1)",
            "BEGIN; SAVEPOINT a; TRUNCATE pair; ROLLBACK TO a; INSERT INTO pair VALUES (10); COMMIT",
            "TRUNCATE parted; INSERT INTO parted VALUES (2), (200); TRUNCATE ONLY lone",
        ],
    )
    .await;
}

#[tokio::test]
async fn only_what_was_committed_arrives_from_transactions_with_savepoints() {
    let (_site, database) = carries(
        "savepoints",
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        &[
            "BEGIN; INSERT INTO t VALUES (1); SAVEPOINT a; INSERT INTO t VALUES (2); SAVEPOINT b; INSERT INTO t VALUES (3);
             ROLLBACK TO b; INSERT INTO t VALUES (4); RELEASE a; COMMIT",
            "BEGIN; INSERT INTO t VALUES (5); SAVEPOINT a; UPDATE t SET v = 'no'; ROLLBACK TO a; UPDATE t SET v = 'yes' WHERE id = 5; COMMIT",
            "BEGIN; DELETE FROM t; ROLLBACK",
            "DO $$ BEGIN FOR i IN 10..200 LOOP BEGIN INSERT INTO t VALUES (i);
               IF i % 2 = 0 THEN RAISE EXCEPTION 'undo'; END IF; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
        ],
    )
    .await;
    let replica = database.replica().await;
    let ids = replica
        .column("SELECT id FROM t WHERE id < 10 ORDER BY id")
        .await;
    assert_eq!(ids, ["1", "2", "4", "5"]);
}

#[tokio::test]
async fn prepared_transactions_arrive_when_they_are_committed() {
    // Servers of its own: a prepared transaction holds up the slots of everybody else.
    let site = Site::own().await;
    let database = site.database("prepared").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        .await;
    let (_agent, running) = database.replicate().await;
    for statement in [
        "BEGIN; INSERT INTO t VALUES (1, 'prepared'); PREPARE TRANSACTION 'one'",
        "BEGIN; INSERT INTO t VALUES (2, 'never'); PREPARE TRANSACTION 'two'",
        "INSERT INTO t VALUES (3, 'between')",
    ] {
        source.run(statement).await;
    }
    database.wait_caught_up().await;
    let replica = database.replica().await;
    assert_eq!(replica.column("SELECT id FROM t").await, ["3"]);
    source.run("COMMIT PREPARED 'one'").await;
    source.run("ROLLBACK PREPARED 'two'").await;
    database.expect_equal().await;
    assert_eq!(replica.number("SELECT count(*) FROM t").await, 2);
    running.stop().await;
}

#[tokio::test]
async fn odd_tables_arrive() {
    carries(
        "odd",
        "CREATE TABLE dropped (a int, gone text, id int PRIMARY KEY, gone_too int, v text);
         INSERT INTO dropped VALUES (1, 'x', 1, 2, 'v'); ALTER TABLE dropped DROP gone, DROP gone_too; ALTER TABLE dropped ADD later int DEFAULT 7;
         CREATE TABLE by_index (id int, code text NOT NULL, v text); CREATE UNIQUE INDEX by_code ON by_index (code);
         ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_code;
         CREATE TABLE two_keys (id int PRIMARY KEY, code text NOT NULL UNIQUE, v text); ALTER TABLE two_keys REPLICA IDENTITY USING INDEX two_keys_code_key;
         CREATE TABLE full_with_key (id int PRIMARY KEY, v text, big text); ALTER TABLE full_with_key REPLICA IDENTITY FULL;
         CREATE TABLE nothing (); ALTER TABLE nothing REPLICA IDENTITY FULL; INSERT INTO nothing DEFAULT VALUES;
         CREATE TABLE keys_only (a int, b int, PRIMARY KEY (a, b));
         CREATE TABLE kin (id int PRIMARY KEY, v text); CREATE TABLE kid (more int, PRIMARY KEY (id)) INHERITS (kin);
         CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
         CREATE TABLE triggered (id int PRIMARY KEY, v text);
         CREATE FUNCTION double() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.v := NEW.v || NEW.v; RETURN NEW; END';
         CREATE TRIGGER doubled BEFORE INSERT OR UPDATE ON triggered FOR EACH ROW EXECUTE FUNCTION double();
         CREATE TABLE secured (id int PRIMARY KEY); ALTER TABLE secured ENABLE ROW LEVEL SECURITY; ALTER TABLE secured FORCE ROW LEVEL SECURITY;
         INSERT INTO by_index VALUES (1, 'a', 'v'), (1, 'b', 'v'); INSERT INTO two_keys VALUES (1, 'a', 'v'), (2, 'b', 'v');
         INSERT INTO full_with_key SELECT g, 'v', repeat('x', 9000) FROM generate_series(1, 9) AS g;
         INSERT INTO kin VALUES (1, 'parent'); INSERT INTO kid VALUES (2, 'child', 3)",
        &[
            "INSERT INTO dropped VALUES (2, 2, 'streamed', 8); UPDATE dropped SET later = NULL WHERE id = 1; DELETE FROM dropped WHERE id = 2",
            "UPDATE by_index SET v = 'w' WHERE code = 'a'; UPDATE by_index SET code = 'c', id = NULL WHERE code = 'b'; DELETE FROM by_index WHERE code = 'a'",
            "UPDATE two_keys SET id = id + 10, v = 'w'; UPDATE two_keys SET code = 'z' WHERE code = 'a'; DELETE FROM two_keys WHERE code = 'b'",
            "UPDATE full_with_key SET v = 'w' WHERE id < 5; UPDATE full_with_key SET id = id + 100 WHERE id > 7; DELETE FROM full_with_key WHERE id = 5",
            "INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES; DELETE FROM nothing WHERE ctid = '(0,1)'",
            "INSERT INTO keys_only SELECT g, g FROM generate_series(1, 5) AS g; UPDATE keys_only SET b = 9 WHERE a = 3; DELETE FROM keys_only WHERE a = 1",
            "UPDATE kin SET v = v || '!'; INSERT INTO kid VALUES (3, 'x', 4); DELETE FROM kin WHERE id = 1",
            "INSERT INTO unlogged VALUES (1); INSERT INTO triggered VALUES (1, 'a'); UPDATE triggered SET v = 'b'; INSERT INTO secured VALUES (1), (2)",
        ],
    )
    .await;
}

#[tokio::test]
async fn columns_are_matched_by_name_when_their_order_differs() {
    let site = Site::shared().await;
    let database = site.database("order").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE t (id int PRIMARY KEY, a text, b int); INSERT INTO t VALUES (1, 'a', 1)")
        .await;
    let (agent, running) = database.replicate().await;
    running.stop().await;
    // As after ALTER TABLE … DROP COLUMN, ADD COLUMN on the replica alone.
    let replica = database.writable_replica().await;
    replica
        .run("CREATE TABLE n (b int, a text, id int PRIMARY KEY); INSERT INTO n SELECT b, a, id FROM t; DROP TABLE t; ALTER TABLE n RENAME TO t")
        .await;
    let running = agent.start();
    source.run("INSERT INTO t VALUES (2, 'b', 2); UPDATE t SET a = 'c' WHERE id = 1; UPDATE t SET id = 5 WHERE id = 2").await;
    database.expect_equal().await;
    running.stop().await;
}
