//! Goal: a TRUNCATE that the source could do is done on the replica and by a restore, although tables that refer to the
//! truncated ones are not replicated, or are partitioned and not named in the stream.
//! Method: such tables, truncated in every combination through a running agent; the same log restored, as a whole and by
//! single tables.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::archive::{agent, archive, first_base, position, restore};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::expect_same_content_without;
use dr_agent_tests::site::Site;

/// `note` and `remark` have no key and are left out; `part` is partitioned, over two levels.
const TABLES: &str = "
    CREATE TABLE parent (id serial PRIMARY KEY, v text);
    CREATE TABLE note (parent int REFERENCES parent);
    CREATE TABLE grand (id int PRIMARY KEY);
    CREATE TABLE middle (id int PRIMARY KEY, grand int REFERENCES grand);
    CREATE TABLE remark (middle int REFERENCES middle);
    CREATE TABLE root (id int PRIMARY KEY);
    CREATE TABLE part (id int PRIMARY KEY, root int REFERENCES root) PARTITION BY RANGE (id);
    CREATE TABLE part_low PARTITION OF part FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
    CREATE TABLE part_low_1 PARTITION OF part_low FOR VALUES FROM (0) TO (50);
    CREATE TABLE part_low_2 PARTITION OF part_low FOR VALUES FROM (50) TO (100);
    CREATE TABLE part_high PARTITION OF part FOR VALUES FROM (100) TO (200);
    CREATE TABLE self (id int PRIMARY KEY, self int REFERENCES self);
    INSERT INTO parent (v) SELECT 'copied' FROM generate_series(1, 5); INSERT INTO note VALUES (1), (2);
    INSERT INTO grand VALUES (1), (2); INSERT INTO middle VALUES (1, 1), (2, 2); INSERT INTO remark VALUES (1);
    INSERT INTO root SELECT generate_series(1, 9); INSERT INTO part SELECT g * 20, g FROM generate_series(1, 9) AS g;
    INSERT INTO self VALUES (1, 1), (2, 1)";

const TRUNCATES: [&str; 6] = [
    "INSERT INTO parent (v) VALUES ('gone'); TRUNCATE parent RESTART IDENTITY CASCADE; INSERT INTO parent (v) VALUES ('after')",
    "TRUNCATE grand CASCADE; INSERT INTO grand VALUES (3); INSERT INTO middle VALUES (3, 3)",
    "TRUNCATE root CASCADE; INSERT INTO root VALUES (1); INSERT INTO part VALUES (60, 1), (150, 1)",
    "TRUNCATE part_low, self; INSERT INTO part VALUES (7, 1)",
    "BEGIN; TRUNCATE root, part, parent, note; INSERT INTO root VALUES (5); INSERT INTO part VALUES (20, 5); COMMIT",
    "TRUNCATE part; INSERT INTO part VALUES (199, 5)",
];

const LEFT_OUT: [&str; 2] = ["public.note", "public.remark"];

fn without_keyless(mut agent: Agent) -> Agent {
    agent.configure("source.keyless", "\"exclude\"");
    agent
}

async fn expect_valid(client: &Client) {
    let invalid = "SELECT conname FROM pg_constraint WHERE NOT convalidated";
    assert_eq!(client.column(invalid).await, Vec::<String>::new());
    // Whoever writes now finds every foreign key at work.
    for orphan in [
        "INSERT INTO part VALUES (1, 77)",
        "INSERT INTO note VALUES (77)",
    ] {
        let refused = client.try_run(orphan).await.unwrap_err();
        assert!(refused.contains("foreign key"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_tables_refer_to_that_are_not_in_the_stream_is_emptied_all_the_same() {
    let site = Site::shared().await;
    let database = site.database("emptied").await;
    let archive = archive();
    let agent = without_keyless(agent(&database, &archive));
    let source = database.source().await;
    source.run(TABLES).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    for truncate in TRUNCATES {
        source.run(truncate).await;
        database.wait_caught_up().await;
        let replica = database.replica().await;
        expect_same_content_without(&source, &replica, &LEFT_OUT).await;
    }
    let end = position(&source).await;
    source.run("INSERT INTO self VALUES (9, 9)").await;
    database.wait_caught_up().await;
    running.expect_quiet_log();
    expect_valid(&database.writable_replica().await).await;
    running.stop().await;
    source.run("DELETE FROM self WHERE id = 9").await;

    restore(
        &database,
        &agent,
        "emptied_whole",
        &["--to-lsn", &end, "--json"],
    )
    .await
    .expect_code(0);
    let whole = database.replica_server().client("emptied_whole").await;
    expect_same_content_without(&source, &whole, &LEFT_OUT).await;
    expect_valid(&whole).await;

    // Of a parent alone, the tables that refer to it have no rows.
    let only = [
        "--to-lsn",
        &end,
        "--table",
        "public.root",
        "--table",
        "public.parent",
    ];
    restore(&database, &agent, "emptied_parents", &only)
        .await
        .expect_code(0);
    let parents = database.replica_server().client("emptied_parents").await;
    assert_eq!(parents.column("SELECT id FROM root").await, ["5"]);
    assert_eq!(parents.number("SELECT count(*) FROM parent").await, 0);
    assert_eq!(parents.number("SELECT count(*) FROM part").await, 0);
}
