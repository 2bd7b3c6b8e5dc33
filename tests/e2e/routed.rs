//! Goal: rows of partitions whose place each server computes for itself (the hash of an enum is that of an OID) arrive whatever
//! partition they belong to on the other side.
//! Method: several such tables, on servers whose enums have other OIDs; copied, streamed, truncated as a whole and in part,
//! added late, by route `kinesis`, and restored; the partitioned tables are compared, and that partitions differ.

use dr_agent_tests::archive::{position, protected_with, restore, wait_archived};
use dr_agent_tests::client::Client;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// With a key, without one, below a range, by a name of the catalog, and with a part missing.
const TABLES: &str = "
    CREATE TABLE burns_oids (a int, b int); DROP TABLE burns_oids;
    CREATE TYPE colour AS ENUM ('red', 'green', 'blue', 'white', 'black', 'grey', 'pink', 'brown');
    CREATE TABLE paint (id int, c colour, note text, PRIMARY KEY (id, c)) PARTITION BY HASH (c);
    CREATE TABLE paint_0 PARTITION OF paint FOR VALUES WITH (MODULUS 3, REMAINDER 0);
    CREATE TABLE paint_1 PARTITION OF paint FOR VALUES WITH (MODULUS 3, REMAINDER 1);
    CREATE TABLE paint_2 PARTITION OF paint FOR VALUES WITH (MODULUS 3, REMAINDER 2);
    CREATE TABLE loose (id int, c colour, note text) PARTITION BY HASH (c);
    CREATE TABLE loose_0 PARTITION OF loose FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE loose_1 PARTITION OF loose FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    ALTER TABLE loose_0 REPLICA IDENTITY FULL; ALTER TABLE loose_1 REPLICA IDENTITY FULL;
    CREATE TABLE deep (id int, c colour, PRIMARY KEY (id, c)) PARTITION BY RANGE (id);
    CREATE TABLE deep_a PARTITION OF deep FOR VALUES FROM (0) TO (100) PARTITION BY HASH (c);
    CREATE TABLE deep_a0 PARTITION OF deep_a FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE deep_a1 PARTITION OF deep_a FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE deep_b PARTITION OF deep FOR VALUES FROM (100) TO (200);
    CREATE TABLE named (r regclass PRIMARY KEY, n int) PARTITION BY HASH (r);
    CREATE TABLE named_0 PARTITION OF named FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE named_1 PARTITION OF named FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE TABLE gappy (id int, c colour, PRIMARY KEY (id, c)) PARTITION BY HASH (c);
    CREATE TABLE gappy_0 PARTITION OF gappy FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE gappy_1 PARTITION OF gappy FOR VALUES WITH (MODULUS 2, REMAINDER 1) PARTITION BY RANGE (id);
    CREATE TABLE gappy_1a PARTITION OF gappy_1 FOR VALUES FROM (0) TO (1000);
    INSERT INTO paint SELECT g, (enum_range(NULL::colour))[1 + g % 8], 'copied' FROM generate_series(1, 800) AS g;
    INSERT INTO loose SELECT g % 50, (enum_range(NULL::colour))[1 + g % 8], 'twin' FROM generate_series(1, 400) AS g;
    INSERT INTO deep SELECT g, (enum_range(NULL::colour))[1 + g % 8] FROM generate_series(1, 199) AS g;
    INSERT INTO named SELECT oid, 1 FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p');
    INSERT INTO gappy SELECT g, (enum_range(NULL::colour))[1 + g % 8] FROM generate_series(1, 100) AS g;";

/// Rows move between partitions, on either side or on both.
const CHANGES: [&str; 4] = [
    "UPDATE paint SET c = (enum_range(NULL::colour))[1 + (id + 3) % 8], note = 'moved' WHERE id % 3 = 0; DELETE FROM paint WHERE id % 7 = 0;
     UPDATE paint SET note = 'streamed' WHERE id % 5 = 0; INSERT INTO paint SELECT g, 'pink', 'streamed' FROM generate_series(801, 900) AS g",
    "DELETE FROM loose WHERE ctid IN (SELECT min(ctid) FROM loose WHERE id < 20 GROUP BY tableoid, id, c);
     UPDATE loose SET c = 'red' WHERE c IN ('blue', 'grey') AND id % 4 = 1; UPDATE loose SET note = 'one' WHERE id = 30;
     INSERT INTO loose SELECT 99, 'brown', NULL FROM generate_series(1, 20)",
    "UPDATE deep SET c = 'black' WHERE id % 9 = 0; UPDATE deep SET id = id + 90 WHERE id BETWEEN 1 AND 5; DELETE FROM deep WHERE id % 8 = 0;
     UPDATE named SET n = 2; DELETE FROM named WHERE r = 'paint_0'::regclass; INSERT INTO gappy SELECT 500, unnest(enum_range(NULL::colour))",
    // Large enough to go over lanes.
    "INSERT INTO paint SELECT g, (enum_range(NULL::colour))[1 + g % 8], 'many' FROM generate_series(10000, 12000) AS g",
];

const ROOTS: [&str; 5] = ["paint", "loose", "deep", "named", "gappy"];

async fn rows(client: &Client, table: &str) -> Option<String> {
    let all = format!(
        "SELECT md5(string_agg(t::text, ',' ORDER BY t::text COLLATE \"C\")) || count(*) FROM {table} AS t"
    );
    client.value(&all).await
}

async fn expect_same(source: &Client, replica: &Client, tables: &[&str]) {
    for table in tables {
        assert_eq!(
            rows(source, table).await,
            rows(replica, table).await,
            "{table}"
        );
    }
}

async fn arrive(database: &Database, tables: &[&str]) {
    let (source, replica) = (database.source().await, database.replica().await);
    for table in tables {
        wait_until("the same rows", PATIENCE, || async {
            let held = replica
                .try_rows(&format!("SELECT FROM {table} LIMIT 1"))
                .await
                .is_ok();
            held && rows(&source, table).await == rows(&replica, table).await
        })
        .await;
    }
    database.wait_caught_up().await;
    expect_same(&source, &replica, tables).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_each_server_places_for_itself_arrive_and_are_restored() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected_with(&site, "routed", TABLES).await;
    running.stop().await;
    agent.configure("limits.spread_changes", "500");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    arrive(&database, &ROOTS).await;
    let (source, replica) = (database.source().await, database.replica().await);
    assert_ne!(
        rows(&source, "paint_0").await,
        rows(&replica, "paint_0").await
    );
    for change in CHANGES {
        source.run(change).await;
    }
    arrive(&database, &ROOTS).await;

    // All that is below one hash, which the replica can tell.
    source
        .run("TRUNCATE loose; INSERT INTO loose VALUES (1, 'red', 'new'); TRUNCATE deep_a; INSERT INTO deep VALUES (7, 'pink')")
        .await;
    arrive(&database, &ROOTS).await;
    running.expect_quiet_log();
    let moment = position(&source).await;
    let mut then = Vec::new();
    for table in ROOTS {
        then.push(rows(&source, table).await);
    }

    // One partition: which rows that are it cannot tell.
    source
        .run("TRUNCATE paint_1; INSERT INTO paint VALUES (1, 'red', 'behind') ON CONFLICT DO NOTHING")
        .await;
    arrive(&database, &ROOTS).await;
    source.run("UPDATE paint SET note = 'once more'").await;
    arrive(&database, &ROOTS).await;
    let behind = position(&source).await;

    // A partition that comes late, beside those that are there, and a whole table.
    source
        .run(
            "CREATE TABLE gappy_1b PARTITION OF gappy_1 FOR VALUES FROM (1000) TO (2000); INSERT INTO gappy SELECT 1000, unnest(enum_range(NULL::colour));
             CREATE TYPE taste AS ENUM ('sweet', 'sour', 'salt', 'bitter');
             CREATE TABLE dish (id int, t taste, PRIMARY KEY (t, id)) PARTITION BY HASH (t);
             CREATE TABLE dish_0 PARTITION OF dish FOR VALUES WITH (MODULUS 2, REMAINDER 0);
             CREATE TABLE dish_1 PARTITION OF dish FOR VALUES WITH (MODULUS 2, REMAINDER 1);
             INSERT INTO dish SELECT g, (enum_range(NULL::taste))[1 + g % 4] FROM generate_series(1, 100) AS g",
        )
        .await;
    arrive(&database, &["gappy", "dish"]).await;
    source
        .run("UPDATE dish SET t = 'sweet' WHERE id % 2 = 0; DELETE FROM gappy WHERE id % 3 = 0; INSERT INTO gappy SELECT 1500, unnest(enum_range(NULL::colour))")
        .await;
    arrive(&database, &["gappy", "dish"]).await;
    arrive(&database, &ROOTS).await;
    assert!(!running.log().contains(" ERROR "), "{}", running.log());
    wait_archived(&database, &archive).await;
    running.stop().await;

    let arguments = ["--to-lsn", &moment];
    restore(&database, &agent, "routed_restored", &arguments)
        .await
        .expect_code(0);
    let restored = site.replica.client("routed_restored").await;
    for (table, then) in ROOTS.iter().zip(then) {
        assert_eq!(rows(&restored, table).await, then, "{table}");
    }
    restore(&database, &agent, "routed_behind", &["--to-lsn", &behind])
        .await
        .expect_code(1)
        .expect_words(&["was truncated on the source", "other partitions"]);
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    expect_same(&source, &replica, &ROOTS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_each_server_places_for_itself_arrive_through_kinesis() {
    let site = Site::shared().await;
    let database = site.database("routed_kinesis").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let route = Route::new(database, kinesalite.port(), None);
    let (running, applying) = route.start().await;
    for change in CHANGES {
        source.run(change).await;
    }
    source
        .run("TRUNCATE loose; INSERT INTO loose VALUES (1, 'red', 'new'); TRUNCATE paint_1; INSERT INTO paint VALUES (20000, 'red', 'behind')")
        .await;
    arrive(&route.database, &ROOTS).await;
    assert!(!applying.log().contains(" ERROR "), "{}", applying.log());
    running.stop().await;
    applying.stop().await;
}
