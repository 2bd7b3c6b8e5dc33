//! Goal: what is published is known at every moment: whatever somebody alters by hand, the replica has every change in the end,
//! and the source's own statements never fail for it.
//! Method: a table of what can be done to a publication and to the identity of its tables, one after the other under a running agent;
//! changes in between, which are published in part or not at all; then every table is compared in full.

use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for, wait_until};

const TABLES: &str = "
    CREATE TABLE t (id int PRIMARY KEY, v text, w int);
    CREATE TABLE other (id int PRIMARY KEY, v text);
    CREATE TABLE m (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
    CREATE TABLE m1 PARTITION OF m FOR VALUES IN (1);
    CREATE TABLE m2 PARTITION OF m FOR VALUES IN (2);
    INSERT INTO t SELECT g, 't', g FROM generate_series(1, 50) AS g;
    INSERT INTO other SELECT g, 'other' FROM generate_series(1, 20) AS g;
    INSERT INTO m SELECT g, 1 + g % 2, 'm' FROM generate_series(1, 40) AS g";

/// What is changed while the publication is not as it ought to be.
const CHANGES: &str = "
    UPDATE t SET v = v || 'x', w = w + 1 WHERE id % 3 = 0; DELETE FROM t WHERE id % 10 = 1;
    INSERT INTO t SELECT 1000 + max(id), 'new', -1 FROM t; UPDATE other SET v = v || 'y';
    UPDATE m SET v = v || 'z'; DELETE FROM m WHERE id = (SELECT max(id) FROM m)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_was_narrowed_for_a_moment_leaves_no_difference() {
    let site = Site::shared().await;
    let database = site.database("narrowed").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let (agent, running) = database.replicate().await;
    let p = database.stream();
    let everything = "publish = 'insert, update, delete, truncate'";
    let filters = site.source.major() >= 15;
    let cases = [
        (
            true,
            "SET (publish = 'insert')".to_owned(),
            format!("SET ({everything})"),
        ),
        (
            true,
            "SET (publish_via_partition_root = true)".to_owned(),
            "SET (publish_via_partition_root = false)".to_owned(),
        ),
        (
            true,
            "DROP TABLE ONLY t".to_owned(),
            "ADD TABLE ONLY t".to_owned(),
        ),
        (
            filters,
            "DROP TABLE ONLY t; ALTER PUBLICATION p ADD TABLE t (id, v)".to_owned(),
            "DROP TABLE t; ALTER PUBLICATION p ADD TABLE t".to_owned(),
        ),
        // Left as it is: the agent mends it.
        (
            true,
            "SET (publish = 'update, delete')".to_owned(),
            String::new(),
        ),
        (
            filters,
            "DROP TABLE ONLY t; ALTER PUBLICATION p ADD TABLE t WHERE (id < 5)".to_owned(),
            String::new(),
        ),
    ];
    for (applies, narrow, widen) in cases {
        if !applies {
            continue;
        }
        let alter = |what: &str| {
            let sql = format!("ALTER PUBLICATION p {what}");
            sql.replace("PUBLICATION p ", &format!("PUBLICATION {p} "))
        };
        source.run(&alter(&narrow)).await;
        source.run(CHANGES).await;
        if !widen.is_empty() {
            source.run(&alter(&widen)).await;
        }
        wait_for("the sides to be equal again", PATIENCE * 2, || async {
            database.wait_caught_up().await;
            let count = "SELECT md5(string_agg(t::text, ',' ORDER BY id)) || (SELECT md5(string_agg(o::text, ',' ORDER BY id)) FROM other o)
                || (SELECT md5(string_agg(m::text, ',' ORDER BY id)) FROM m) FROM t";
            // A table that is copied again is emptied meanwhile: a reader of several may be the victim of a deadlock.
            let replica = database.replica().await;
            let (here, there) = (source.rows(count).await, replica.try_rows(count).await?);
            if here == there { Ok(()) } else { Err(format!("{narrow}: not yet")) }
        })
        .await;
    }
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    let checked = agent.command(&["check"]).await.text();
    assert!(!checked.contains("publication_shape"), "{checked}");
    // What a stopped agent misses, check says.
    running.stop().await;
    source.run(&format!("ALTER PUBLICATION {p} SET (publish = 'insert'); {CHANGES}; ALTER PUBLICATION {p} SET ({everything})")).await;
    let checked = agent.command(&["check"]).await.text();
    assert!(checked.contains("published in part"), "{checked}");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    database.expect_equal().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_table_that_loses_its_identity_takes_updates_again_within_seconds() {
    let site = Site::shared().await;
    for keyless in ["full", "exclude"] {
        let database = site.database(&format!("lost_key_{keyless}")).await;
        let source = database.source().await;
        source.run(TABLES).await;
        source
            .run(
                "CREATE UNIQUE INDEX other_v ON other (id, v); ALTER TABLE other ALTER v SET NOT NULL;
                 CREATE TABLE u (id int NOT NULL, v text); CREATE UNIQUE INDEX u_id ON u (id);
                 ALTER TABLE u REPLICA IDENTITY USING INDEX u_id; INSERT INTO u VALUES (1, 'a')",
            )
            .await;
        let agent = dr_agent_tests::agent::Agent::new(
            database.config().set_text("source.keyless", keyless),
        );
        let running = agent.start();
        running.wait_for_streaming(&database.name).await;
        for (lose, statement) in [
            (
                "ALTER TABLE t DROP CONSTRAINT t_pkey",
                "UPDATE t SET v = v || 'a' WHERE id < 9",
            ),
            (
                "ALTER TABLE other REPLICA IDENTITY NOTHING",
                "DELETE FROM other WHERE id = 3",
            ),
            ("DROP INDEX u_id", "UPDATE u SET v = 'b'"),
            (
                "ALTER TABLE m1 REPLICA IDENTITY NOTHING",
                "UPDATE m SET v = 'c' WHERE r = 1",
            ),
        ] {
            source.run(lose).await;
            wait_for(
                &format!("the source to take: {statement}"),
                PATIENCE,
                || source.try_run(statement),
            )
            .await;
        }
        running.wait_for_streaming(&database.name).await;
        if keyless == "full" {
            database.expect_equal().await;
        } else {
            // What is published goes on.
            source.run("UPDATE m SET v = 'd' WHERE r = 2").await;
            database.wait_caught_up().await;
            let replica = database.replica().await;
            let there = "SELECT count(*) = 0 FROM m WHERE r = 2 AND v <> 'd'";
            wait_until("m2", PATIENCE, || replica.holds(there)).await;
        }
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tables_and_a_small_lock_table_leave_room_for_the_application() {
    let options = ServerOptions::source()
        .set("max_locks_per_transaction", "10")
        .set("max_connections", "30");
    let site = Site::with(options, ServerOptions::replica()).await;
    let database = site.database("locks").await;
    let source = database.source().await;
    for chunk in 0..12 {
        let create: String = (0..50)
            .map(|n| format!("CREATE TABLE t_{chunk}_{n} (id int PRIMARY KEY);"))
            .collect();
        // Each a transaction of its own.
        for create in create.split_inclusive(';') {
            source.run(create).await;
        }
    }
    let agent = database.agent();
    let running = agent.start();
    let working = database.source().await;
    let work = tokio::spawn(async move {
        for n in 0..400 {
            let (a, b) = (n % 12, n % 50);
            working
                .run(&format!(
                    "BEGIN; INSERT INTO t_{a}_{b} VALUES ({n}); LOCK TABLE t_{a}_{b}, t_1_1, t_2_2 IN SHARE MODE; COMMIT"
                ))
                .await;
        }
    });
    running.wait_for_streaming(&database.name).await;
    work.await.unwrap();
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}
