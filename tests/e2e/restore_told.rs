//! Goal: at its end a restore says what is not there, and which transactions an operator looks for.
//! Method: a source with everything that is in no base backup and no log; a restore that is killed and goes on; transactions
//! whose ids and positions are known.

use dr_agent::pg::PgLsn;
use dr_agent_tests::agent::Agent;
use dr_agent_tests::archive::{
    agent, archive, expect_state, first_base, note, position, protected, protected_with, restore,
    restore_at,
};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};
use serde_json::Value;

const LESS: &str = "
    CREATE TABLE account (id int PRIMARY KEY, n int);
    INSERT INTO account SELECT g, 1 FROM generate_series(1, 9) AS g;
    CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
    CREATE TABLE keyless (v text); INSERT INTO keyless VALUES ('x');
    CREATE TABLE scratch (id int PRIMARY KEY);
    CREATE TABLE refers (id int PRIMARY KEY, scratch int REFERENCES scratch);
    CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER always BEFORE INSERT ON account FOR EACH ROW EXECUTE FUNCTION nothing();
    ALTER TABLE account ENABLE ALWAYS TRIGGER always;
    CREATE MATERIALIZED VIEW b_sum AS SELECT sum(n) AS n FROM account;
    CREATE MATERIALIZED VIEW a_twice AS SELECT n * 2 AS n FROM b_sum;
    CREATE MATERIALIZED VIEW untouched AS SELECT 1 AS one WITH NO DATA;
    CREATE FUNCTION fails() RETURNS int LANGUAGE plpgsql AS
        'BEGIN IF current_database() LIKE ''%restored%'' THEN RAISE EXCEPTION ''no''; END IF; RETURN 1; END';
    CREATE MATERIALIZED VIEW fails AS SELECT fails();
    SELECT lo_create(4711)";

/// What the report must name, in any order.
const TOLD: [&str; 8] = [
    "table public.fleeting: it is unlogged",
    "table public.keyless: it has no key",
    "table public.scratch: it is not published",
    "foreign key refers_scratch_fkey of public.refers",
    "ENABLE ALWAYS of trigger always on public.account",
    "1 large objects",
    "materialized view public.fails",
    "view public.beats",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_told_at_the_end_by_whichever_run_that_is() {
    let site = Site::shared().await;
    let database = site.database("told").await;
    let mut agent = agent(&database, &archive());
    agent.configure("source.keyless", "\"exclude\"");
    agent.configure("source.exclude", "[\"public.scratch\"]");
    let source = database.source().await;
    source.run(LESS).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    // Schema dr_agent is there by now.
    source
        .run("CREATE VIEW beats AS SELECT written_at FROM dr_agent.heartbeat")
        .await;
    agent.command(&["backup"]).await.expect_code(0);
    source.run("UPDATE account SET n = 5").await;
    let end = position(&source).await;
    source.run("UPDATE account SET n = 6").await;
    database.wait_caught_up().await;
    running.stop().await;

    let server = database.replica_server();
    server.create_database("told_restored").await;
    let url = server.url("told_restored");
    let arguments = ["restore", "--target", &url, "--to-lsn", &end, "--json"];
    for point in ["restore:replayed", "restore:views-filled"] {
        let killed = agent
            .command_with(&arguments, &[("DR_AGENT_FAILPOINT", point)])
            .await;
        assert_eq!(killed.code, None, "{point}: {}", killed.text());
    }
    let plan = restore_at(&agent, &url, &["--plan", "--to-lsn", &end, "--json"]).await;
    let plan = plan.expect_code(0).json();
    assert_eq!(plan["target"], "resumed", "{plan}");
    assert!(plan["resumes_at"].is_string(), "{plan}");
    assert_eq!(plan["base_bytes"], 0, "{plan}");
    let ended = agent.command(&arguments).await;
    let report = ended.expect_code(0).json();
    let warnings = report["warnings"].as_array().unwrap();
    for told in TOLD {
        let times = warnings
            .iter()
            .filter(|warning| warning.as_str().unwrap().contains(told));
        assert_eq!(times.count(), 1, "{told}: {warnings:#?}");
        // People read it, too.
        ended.expect_words(&["warning", told]);
    }
    assert!(report["last_change"]["xid"].is_u64(), "{report:#}");
    let restored = server.client("told_restored").await;
    assert_eq!(restored.number("SELECT n FROM b_sum").await, 45);
    assert_eq!(restored.number("SELECT n FROM a_twice").await, 90);
    let empty =
        "SELECT relname FROM pg_class WHERE relkind = 'm' AND NOT relispopulated ORDER BY 1";
    assert_eq!(restored.column(empty).await, ["fails", "untouched"]);
    let gone = "SELECT to_regclass('beats') IS NULL AND to_regnamespace('dr_agent') IS NULL";
    assert!(restored.holds(gone).await);
}

/// A restore into a database of its own; its report.
async fn reported(database: &Database, agent: &Agent, name: &str, arguments: &[&str]) -> Value {
    let all = [arguments, &["--json"]].concat();
    let restored = restore(database, agent, name, &all).await;
    restored.expect_code(0).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_stops_exactly_at_a_commit_and_names_what_is_looked_for() {
    let site = Site::shared().await;
    let (database, _, agent, running) = protected(&site, "exact").await;
    let source = database.source().await;
    // Heartbeats come in between.
    let mut xids = Vec::new();
    let mut states = Vec::new();
    let before = position(&source).await;
    for sql in [
        "UPDATE account SET balance = 1",
        "DELETE FROM account WHERE id > 2",
    ] {
        states.push(note(&source).await);
        let beats = "SELECT beat FROM dr_agent.heartbeat";
        let beat = source.number(beats).await;
        wait_until("a heartbeat", PATIENCE, || async {
            source.number(beats).await > beat
        })
        .await;
        source.run("BEGIN").await;
        xids.push(
            source
                .number("SELECT pg_current_xact_id()::text::bigint")
                .await,
        );
        source.run(sql).await;
        source.run("COMMIT").await;
    }
    let after = note(&source).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;

    let first = reported(&database, &agent, "exact_before", &["--to-lsn", &before]).await;
    assert_eq!(first["last_change"], Value::Null, "{first:#}");
    assert_eq!(first["left_out_change"]["xid"], xids[0], "{first:#}");
    // What is left out first is a heartbeat.
    assert_ne!(first["left_out_xid"], xids[0], "{first:#}");
    let update = |key: &str| first["left_out_change"][key].as_str().unwrap().to_owned();
    let (lsn, time) = (update("commit_lsn"), update("commit_time"));
    let at: PgLsn = lsn.parse().unwrap();
    let shifted = |by: i64| PgLsn::from(u64::from(at).strict_add_signed(by)).to_string();

    for (name, lsn, includes) in [
        ("exact_one_before", shifted(-1), false),
        ("exact_at", shifted(0), false),
        ("exact_one_after", shifted(1), true),
    ] {
        let report = reported(&database, &agent, name, &["--to-lsn", &lsn]).await;
        let end: PgLsn = report["end_lsn"].as_str().unwrap().parse().unwrap();
        assert_eq!(end > at, includes, "{report:#}");
        let (last, left_out) = match includes {
            true => (Value::from(xids[0]), xids[1]),
            false => (Value::Null, xids[0]),
        };
        assert_eq!(report["last_change"]["xid"], last, "{report:#}");
        assert_eq!(report["left_out_change"]["xid"], left_out, "{report:#}");
        if !includes {
            assert_eq!(report["left_out_lsn"], at.to_string(), "{report:#}");
            assert_eq!(report["left_out_xid"], xids[0], "{report:#}");
        }
        let state = if includes { &states[1] } else { &states[0] };
        expect_state(&database, name, state).await;
    }
    // By time: what committed at that very microsecond is in.
    let report = reported(&database, &agent, "exact_time", &["--to-time", &time]).await;
    assert_eq!(report["commit_time"], time, "{report:#}");
    assert_eq!(report["last_change"]["xid"], xids[0], "{report:#}");
    expect_state(&database, "exact_time", &states[1]).await;
    let earlier = format!(
        "SELECT to_char(('{time}'::timestamptz - interval '1 us') AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
    );
    let earlier = source.value(&earlier).await.unwrap();
    let report = reported(&database, &agent, "exact_earlier", &["--to-time", &earlier]).await;
    assert_eq!(report["left_out_commit_time"], time, "{report:#}");
    expect_state(&database, "exact_earlier", &states[0]).await;
    let report = reported(&database, &agent, "exact_end", &["--to-lsn", &after.lsn]).await;
    assert_eq!(report["last_change"]["xid"], xids[1], "{report:#}");
    expect_state(&database, "exact_end", &after).await;
}

const NAMED: &str = "
    CREATE SCHEMA \"S p\";
    CREATE TABLE \"S p\".\"a.b\" (id int PRIMARY KEY); INSERT INTO \"S p\".\"a.b\" VALUES (1);
    CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
    CREATE TABLE parted_lowest PARTITION OF parted_low FOR VALUES FROM (0) TO (50);
    CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (100) TO (200);
    INSERT INTO parted SELECT g, repeat(md5(g::text), 40) FROM generate_series(0, 49) AS g;
    CREATE TABLE other (id int PRIMARY KEY, v text);
    INSERT INTO other SELECT g, repeat(md5(g::text), 40) FROM generate_series(0, 4900) AS g";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_the_tables_is_named_as_in_sql_and_the_plan_counts_no_more() {
    let site = Site::shared().await;
    let (database, _, agent, running) = protected_with(&site, "named", NAMED).await;
    let source = database.source().await;
    source
        .run("INSERT INTO parted VALUES (150), (7000 - 6899)")
        .await;
    let early = position(&source).await;
    source.run("INSERT INTO \"S p\".\"a.b\" VALUES (2)").await;
    for round in 0..6 {
        let sql = format!("UPDATE other SET v = v || {round} WHERE id < 700");
        source.run(&sql).await;
        database.wait_caught_up().await;
    }
    let late = position(&source).await;
    source.run("INSERT INTO other VALUES (-1)").await;
    database.wait_caught_up().await;
    running.stop().await;

    let server = database.replica_server();
    server.create_database("named_target").await;
    let url = server.url("named_target");
    let plan = async |arguments: &[&str]| -> Value {
        let all = [arguments, &["--plan", "--json"]].concat();
        restore_at(&agent, &url, &all).await.expect_code(0).json()
    };
    let number = |plan: &Value, key: &str| plan[key].as_u64().unwrap();
    let whole = plan(&["--to-lsn", &late]).await;
    let tables = [
        "--to-lsn",
        &early,
        "--table",
        "\"S p\".\"a.b\"",
        "--table",
        "PUBLIC.Parted",
    ];
    let part = plan(&tables).await;
    assert_eq!(whole["tables"], Value::Null);
    assert_eq!(
        part["tables"],
        serde_json::json!([
            "\"S p\".\"a.b\"",
            "\"public\".\"parted_high\"",
            "\"public\".\"parted_lowest\""
        ])
    );
    assert!(
        number(&part, "base_bytes") < number(&whole, "base_bytes") / 2,
        "{part:#}{whole:#}"
    );
    assert!(
        number(&part, "log_bytes") < number(&whole, "log_bytes"),
        "{part:#}{whole:#}"
    );
    assert!(number(&part, "log_segments") < number(&whole, "log_segments"));
    assert_eq!(part["log_end_lsn"].as_str().unwrap(), early);
    // Nothing of that has touched it.
    assert_eq!(
        server
            .client("named_target")
            .await
            .number("SELECT count(*) FROM pg_class WHERE oid >= 16384")
            .await,
        0
    );
    let report = restore_at(&agent, &url, &[&tables[..], &["--json"]].concat()).await;
    let report = report.expect_code(0).json();
    // Only what is restored counts.
    assert!(report["last_change"]["xid"].is_u64(), "{report:#}");
    let restored = server.client("named_target").await;
    let ids = "SELECT string_agg(id::text, ',' ORDER BY id) FROM";
    assert_eq!(
        restored
            .value(&format!("{ids} \"S p\".\"a.b\""))
            .await
            .unwrap(),
        "1"
    );
    assert_eq!(restored.number("SELECT count(*) FROM parted").await, 52);
    assert_eq!(restored.number("SELECT count(*) FROM other").await, 0);
}
