//! Goal: a promotion tells the truth about the loss, opens the replica, and may be killed and repeated.
//! Method: promotes under every circumstance and looks at the report, the sequences, the guard and the
//! rows of `dr_agent.progress` and `dr_agent.promotion`.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Row;
use dr_agent_tests::compare::expect_sequences_ahead;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const SCHEMA: &str = "CREATE TABLE t (id serial PRIMARY KEY, v text);
    CREATE TABLE always (id bigint GENERATED ALWAYS AS IDENTITY (INCREMENT 5) PRIMARY KEY);
    CREATE SEQUENCE down INCREMENT -3 MINVALUE -100000 MAXVALUE -1;
    CREATE SEQUENCE \"Odd Name\" MAXVALUE 50 CYCLE; CREATE SEQUENCE unused START 42;
    INSERT INTO t (v) SELECT 'copied' FROM generate_series(1, 10)";

const ADVANCE: &str = "INSERT INTO t (v) SELECT 'streamed' FROM generate_series(1, 500);
    INSERT INTO always SELECT FROM generate_series(1, 200);
    SELECT nextval('down') FROM generate_series(1, 77); SELECT nextval('\"Odd Name\"')";

async fn replicated(
    site: &Site,
    purpose: &str,
) -> (Database, Agent, dr_agent_tests::agent::Running) {
    let database = site.database(purpose).await;
    database.source().await.run(SCHEMA).await;
    let (agent, running) = database.replicate().await;
    (database, agent, running)
}

/// Waits until the replica knows the position of every sequence of the source.
async fn wait_for_sequences(database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    let on_source = source
        .rows("SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL ORDER BY 1")
        .await;
    wait_until("sequence positions to arrive", PATIENCE, || async {
        let arrived = replica
            .rows("SELECT sequence_name, last_value FROM dr_agent.sequence_state WHERE schema_name = 'public' AND is_called ORDER BY 1")
            .await;
        on_source.iter().all(|row| arrived.contains(row))
    })
    .await;
}

#[tokio::test]
async fn the_report_states_the_loss_and_the_replica_is_open() {
    let site = Site::shared().await;
    let (database, agent, mut running) = replicated(&site, "loss").await;
    let (source, replica) = (database.source().await, database.replica().await);
    source.run(ADVANCE).await;
    database.expect_equal().await;
    wait_for_sequences(&database).await;
    let refused = replica
        .try_run("INSERT INTO t (v) VALUES ('guarded')")
        .await
        .unwrap_err();
    assert!(
        refused.starts_with("25006"),
        "the read-only guard: {refused}"
    );

    running.kill();
    for id in 1..=20 {
        source
            .run(&format!("UPDATE t SET v = 'lost' WHERE id = {id}"))
            .await;
    }
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    let report = outcome.json();
    assert_eq!(report["outcome"], "promoted");
    assert_eq!(report["mode"], "failover");
    let stated = &report["databases"][0];
    assert_eq!(stated["database"], database.name.as_str());
    // Heartbeats and sequence positions that the killed agent had written may be lost as well.
    let lost = stated["lost_transactions"].as_u64().unwrap();
    assert!((20..=24).contains(&lost), "{lost} transactions lost");
    assert!(stated["lost_bytes"].as_u64().unwrap() > 0);
    let rpo = report["rpo_seconds"].as_f64().unwrap();
    let rto = report["rto_seconds"].as_f64().unwrap();
    assert!(rpo > 0.0 && rpo < 60.0, "RPO {rpo}");
    assert!(rto > 0.0 && rto < 60.0, "RTO {rto}");
    assert_eq!(report["rto_met"], true);
    assert_eq!(stated["term"], 2);

    // Old and new sessions write, and no sequence gives a value twice.
    let fresh = database.replica().await;
    expect_sequences_ahead(&source, &fresh).await;
    fresh.run(ADVANCE).await;
    assert_eq!(
        fresh
            .number("SELECT count(*) FROM t WHERE v = 'lost'")
            .await,
        0
    );
    let downward = fresh.number("SELECT nextval('down')").await;
    assert!(
        downward < source.number("SELECT last_value FROM down").await,
        "{downward}"
    );
}

#[tokio::test]
async fn a_promotion_without_a_source_says_what_it_cannot_know() {
    let site = Site::own().await;
    let (database, agent, _running) = replicated(&site, "gone").await;
    database.wait_caught_up().await;
    site.source.kill();
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    let report = outcome.json();
    let stated = &report["databases"][0];
    assert!(
        stated["lost_transactions"].is_null() && stated["lost_bytes"].is_null(),
        "{stated}"
    );
    assert!(stated["loss_unknown"].is_string(), "{stated}");
    assert!(report["rpo_seconds"].as_f64().unwrap() < 60.0);
    database
        .replica()
        .await
        .run("INSERT INTO t (v) VALUES ('open')")
        .await;
}

#[tokio::test]
async fn a_promotion_killed_after_every_step_ends_in_the_same_place() {
    let site = Site::shared().await;
    let (database, agent, mut running) = replicated(&site, "killed").await;
    database.source().await.run(ADVANCE).await;
    database.expect_equal().await;
    wait_for_sequences(&database).await;
    running.kill();
    let replica = database.replica().await;
    let before = replica
        .rows("SELECT batch, end_lsn FROM dr_agent.progress")
        .await;
    for state in [
        "fenced",
        "quiet",
        "settled",
        "loss_stated",
        "finished",
        "opened",
        "hooks_run",
    ] {
        let failpoint = format!("promote:{state}");
        let outcome = agent
            .command_with(
                &["promote", "--failover"],
                &[("DR_AGENT_FAILPOINT", &failpoint)],
            )
            .await;
        assert_eq!(outcome.code, None, "died at {state}: {}", outcome.text());
        let stored = replica.value("SELECT state FROM dr_agent.promotion").await;
        assert_eq!(stored.as_deref(), Some(state));
        assert_eq!(
            replica
                .value("SELECT term FROM dr_agent.progress")
                .await
                .as_deref(),
            Some("2")
        );
    }
    let finished = agent.command(&["promote", "--failover", "--json"]).await;
    finished.expect_code(0);
    let repeated = agent.command(&["promote", "--failover", "--json"]).await;
    repeated.expect_code(0);
    assert_eq!(
        finished.json(),
        repeated.json(),
        "a repeat prints the same report"
    );
    assert_eq!(
        replica
            .value("SELECT state FROM dr_agent.promotion")
            .await
            .as_deref(),
        Some("done")
    );
    assert_eq!(
        replica
            .rows("SELECT batch, end_lsn FROM dr_agent.progress")
            .await,
        before
    );
    expect_sequences_ahead(&database.source().await, &replica).await;
    database.replica().await.run(ADVANCE).await;
    agent.command(&["run"]).await.expect_code(3);
}

#[tokio::test]
async fn a_plan_touches_nothing() {
    let site = Site::shared().await;
    let (database, agent, running) = replicated(&site, "plan").await;
    let replica = database.replica().await;
    let touched = async || -> Vec<Row> {
        replica
            .rows(
                "SELECT term, (SELECT count(*) FROM dr_agent.promotion),
                        (SELECT string_agg(array_to_string(setconfig, ','), ';') FROM pg_db_role_setting
                           JOIN pg_database d ON d.oid = setdatabase WHERE datname = current_database()),
                        (SELECT string_agg(s::text, ';' ORDER BY sequencename) FROM pg_sequences AS s)
                 FROM dr_agent.progress",
            )
            .await
    };
    database.wait_caught_up().await;
    let before = touched().await;
    let outcome = agent
        .command(&["promote", "--failover", "--plan", "--json"])
        .await;
    outcome.expect_code(0);
    assert_eq!(outcome.json()["outcome"], "planned");
    agent
        .command(&["promote", "--failover", "--plan"])
        .await
        .expect_code(0)
        .expect_words(&["plan", "nothing"]);
    assert_eq!(touched().await, before);
    // The agent noticed nothing either.
    database.source().await.run(ADVANCE).await;
    database.expect_equal().await;
    running.expect_quiet_log();
    running.stop().await;
}

#[tokio::test]
async fn a_replica_whose_copy_is_not_complete_is_refused() {
    let site = Site::shared().await;
    let (database, agent, running) = replicated(&site, "partial").await;
    running.stop().await;
    // What a copy that was killed leaves behind.
    let replica = database.writable_replica().await;
    replica.run("UPDATE dr_agent.table_sync SET state = 'copying', snapshot_lsn = NULL WHERE table_name = 'always'").await;
    let outcome = agent.command(&["promote", "--failover"]).await;
    outcome.expect_code(4).expect_words(&["public.always"]);
    assert_eq!(
        replica.number("SELECT term FROM dr_agent.progress").await,
        1
    );
    assert_eq!(
        replica
            .number("SELECT count(*) FROM dr_agent.promotion")
            .await,
        0
    );
    let guarded = database.replica().await;
    assert!(
        guarded
            .try_run("INSERT INTO t (v) VALUES ('guarded')")
            .await
            .is_err()
    );

    let outcome = agent
        .command(&["promote", "--failover", "--accept-incomplete", "--json"])
        .await;
    outcome.expect_code(0);
    assert_eq!(outcome.json()["overrides"][0], "--accept-incomplete");
}

#[tokio::test]
async fn hooks_run_in_order_once_the_replica_is_open() {
    let site = Site::shared().await;
    let (database, mut agent, _running) = replicated(&site, "hooks").await;
    let trace = agent.directory().join("trace");
    let hook = |name: &str, script: &str| {
        let script = format!("echo {name} >> {}; {script}", trace.display());
        format!(
            "{{ name = \"{name}\", command = [\"sh\", \"-c\", \"{script}\"], timeout = \"10s\" }}"
        )
    };
    let hooks = [
        hook("first", "true"),
        hook("second", "exit 7"),
        hook("third", "true"),
    ];
    agent.configure("promote.hook", &format!("[{}]", hooks.join(", ")));
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    let report = outcome.json();
    let ran = report["hooks"].as_array().unwrap();
    let oks: Vec<_> = ran
        .iter()
        .map(|hook| hook["ok"].as_bool().unwrap())
        .collect();
    assert_eq!(oks, [true, false, true], "{report}");
    assert_eq!(
        std::fs::read_to_string(&trace).unwrap(),
        "first\nsecond\nthird\n"
    );
    // A hook that failed does not undo the promotion.
    database
        .replica()
        .await
        .run("INSERT INTO t (v) VALUES ('open')")
        .await;
    agent.command(&["promote", "--failover"]).await;
    assert_eq!(
        std::fs::read_to_string(&trace).unwrap(),
        "first\nsecond\nthird\n",
        "hooks ran twice"
    );
}
