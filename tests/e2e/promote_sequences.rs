//! Goal: after a promotion no sequence gives a value again that the source gave out, and every one that may is named; nor does
//! their number keep a promotion from ending.
//! Method: sequences of every kind go on after the agent's last look, with a source that answers afterwards and with one that is
//! gone; thousands of them with a promotion that is killed between two pieces.

use std::collections::BTreeMap;

use dr_agent_tests::client::Client;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const SCHEMA: &str = "
    CREATE TABLE t (id serial PRIMARY KEY, v text);
    CREATE TABLE left_out (id bigserial PRIMARY KEY);
    CREATE TABLE narrow (id int2 PRIMARY KEY); CREATE SEQUENCE narrow_id; ALTER TABLE narrow ALTER id SET DEFAULT nextval('narrow_id');
    CREATE SEQUENCE burst; CREATE SEQUENCE unused START 42; CREATE SEQUENCE \"Odd.Name\" CACHE 30;
    CREATE SEQUENCE down INCREMENT -3 MINVALUE -100000000 MAXVALUE -1;
    CREATE SEQUENCE restarted; SELECT setval('restarted', 5000);
    CREATE SEQUENCE restarted_far; SELECT setval('restarted_far', 5000);
    CREATE SEQUENCE small AS smallint; CREATE SEQUENCE at_end MAXVALUE 5; SELECT nextval('at_end') FROM generate_series(1, 5);
    CREATE SEQUENCE ring MAXVALUE 50 CYCLE; CREATE SEQUENCE dropped;
    SELECT nextval('burst') FROM generate_series(1, 601); SELECT nextval('small') FROM generate_series(1, 300)";

/// What nobody hears of: the agent is dead.
const UNSEEN: &str = "
    SELECT nextval('unused') FROM generate_series(1, 50); SELECT nextval('\"Odd.Name\"') FROM generate_series(1, 1000);
    SELECT nextval('down') FROM generate_series(1, 30000); SELECT nextval('small') FROM generate_series(1, 4000);
    SELECT nextval('narrow_id') FROM generate_series(1, 4000); SELECT nextval('left_out_id_seq');
    SELECT nextval('t_id_seq') FROM generate_series(1, 20000); SELECT nextval('restarted') FROM generate_series(1, 500);
    SELECT nextval('restarted_far'); SELECT nextval('later') FROM generate_series(1, 500)";

async fn numbers(client: &Client) -> BTreeMap<String, (i64, i64)> {
    const POSITIONS: &str = "SELECT sequencename, increment_by, last_value FROM pg_sequences
         WHERE schemaname = 'public' AND last_value IS NOT NULL";
    let rows = client.rows(POSITIONS).await.into_iter();
    rows.map(|row| {
        let number = |at: usize| row[at].as_deref().and_then(|text| text.parse().ok());
        let (step, value) = number(1).zip(number(2)).expect("two numbers");
        (row[0].clone().expect("a name"), (step, value))
    })
    .collect()
}

/// Waits until the replica has a look that began after now.
async fn wait_for_a_look(database: &Database) {
    let looked = "SELECT last_value FROM dr_agent.sequence_state WHERE schema_name = 'dr_agent' AND sequence_name = 'looked at'";
    let (source, replica) = (database.source().await, database.replica().await);
    let now = source
        .number("SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint")
        .await;
    wait_until("a look at the sequences", PATIENCE, || async {
        let at = replica.value(looked).await;
        at.and_then(|at| at.parse().ok()).unwrap_or(0) > now
    })
    .await;
}

/// Promotes, and fails the test where a sequence would give again what the source gave; returns the report.
async fn expect_no_repeats(
    database: &Database,
    agent: &dr_agent_tests::agent::Agent,
    given: &BTreeMap<String, (i64, i64)>,
) -> serde_json::Value {
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    let report = outcome.json();
    let primary = database.replica().await;
    let there = numbers(&primary).await;
    let absent = ["later", "ring", "at_end"];
    for (name, (step, last)) in given {
        if absent.contains(&name.as_str()) {
            continue;
        }
        let (_, ahead) = there[name];
        let next = primary
            .number(&format!("SELECT nextval('\"{name}\"')"))
            .await;
        assert!(
            (next - last) * step.signum() > 0,
            "{name} gives {next}, the source gave {last}"
        );
        assert_eq!(
            (next - last) % step,
            0,
            "{name}: {next} after {last}, ahead at {ahead}"
        );
    }
    let stated = &report["databases"][0];
    let warnings = stated["warnings"].to_string();
    for named in [
        "public.later: the source has it",
        "public.at_end: only 0 values",
        "public.ring: it cycles",
    ] {
        assert!(warnings.contains(named), "{named}: {warnings}");
    }
    report
}

#[tokio::test]
async fn no_sequence_repeats_whether_the_source_answers_or_not() {
    // What is committed there is not flushed soon, and counts as lost all the same.
    let source = ServerOptions::source()
        .set("synchronous_commit", "off")
        .set("wal_writer_delay", "10s")
        .set("wal_writer_flush_after", "0");
    let site = Site::with(source, ServerOptions::replica()).await;
    let mut ready = Vec::new();
    for purpose in ["answers", "gone"] {
        let database = site.database(purpose).await;
        let source = database.source().await;
        source.run(SCHEMA).await;
        let mut agent = database.agent();
        agent.configure("source.exclude", "[\"public.left_out\"]");
        agent.configure("source.sequences", "\"500ms\"");
        let mut running = agent.start();
        running.wait_for_streaming(&database.name).await;
        source
            .run(
                "CREATE SEQUENCE later; SELECT nextval('later'); DROP SEQUENCE dropped;
                  ALTER SEQUENCE restarted RESTART; ALTER SEQUENCE restarted_far RESTART WITH 9000;
                  SELECT nextval('restarted'); SELECT nextval('ring') FROM generate_series(1, 70)",
            )
            .await;
        wait_for_a_look(&database).await;
        running.kill();
        source.run(UNSEEN).await;
        source
            .run("SELECT count(nextval('burst')) FROM generate_series(1, 25500)")
            .await;
        ready.push((database, agent));
    }
    let (gone, agent_of_gone) = ready.pop().unwrap();
    let (answers, agent) = ready.pop().unwrap();

    // Asked, it says what no margin would cover; and a flood of transactions that are not flushed is counted.
    let source = answers.source().await;
    source
        .run("SELECT count(nextval('burst')) FROM generate_series(1, 1500000)")
        .await;
    for _ in 0..100 {
        source.run("INSERT INTO t (v) VALUES ('lost')").await;
    }
    let given = numbers(&source).await;
    let report = expect_no_repeats(&answers, &agent, &given).await;
    let lost = report["databases"][0]["lost_transactions"]
        .as_u64()
        .unwrap();
    assert!((100..=106).contains(&lost), "{lost} transactions lost");
    let replica = answers.replica().await;
    let burst = replica.number("SELECT last_value FROM burst").await;
    assert!(
        burst <= given["burst"].1 + 11_000,
        "set by what the source said: {burst}"
    );

    let given = numbers(&gone.source().await).await;
    site.source.kill();
    let report = expect_no_repeats(&gone, &agent_of_gone, &given).await;
    let steps = report["databases"][0]["steps"].to_string();
    assert!(steps.contains("since the last look"), "{steps}");
}

/// More than fit into one statement, and into many.
const MANY: u32 = 1_200;

#[tokio::test]
async fn thousands_of_sequences_are_set_in_pieces_that_a_killed_promotion_keeps() {
    let site = Site::shared().await;
    let database = site.database("many").await;
    let source = database.source().await;
    source.run("CREATE TABLE t (id serial PRIMARY KEY)").await;
    let (agent, mut running) = database.replicate().await;
    running.kill();
    // As if they had been copied: what counts is how many there are when it is promoted.
    let replica = database.writable_replica().await;
    let many: u32 =
        std::env::var("DR_AGENT_TEST_SEQUENCES").map_or(MANY, |text| text.parse().unwrap());
    for some in 0..many.div_ceil(200) {
        replica
            .run(&format!(
                "DO $$ BEGIN FOR n IN 1..200 LOOP
                     EXECUTE format('CREATE TABLE many_{some}_%s (id serial PRIMARY KEY)', n);
                 END LOOP; END $$"
            ))
            .await;
    }
    replica
        .run("INSERT INTO dr_agent.sequence_state SELECT schemaname, sequencename, 70, true FROM pg_sequences
                  WHERE sequencename LIKE 'many%'; INSERT INTO many_0_7 SELECT 6000000; INSERT INTO many_0_8 SELECT 2147483647")
        .await;
    let all = i64::from(many.div_ceil(200) * 200 + 1);
    let done = "SELECT (detail->'database'->>'sequences_set')::int FROM dr_agent.promotion";
    for kill in 1..=2 {
        let outcome = agent
            .command_with(
                &["promote", "--failover"],
                &[("DR_AGENT_FAILPOINT", "promote:sequences")],
            )
            .await;
        assert_eq!(outcome.code, None, "{}", outcome.text());
        assert_eq!(
            replica.number(done).await,
            kill * 200,
            "each kill keeps a piece"
        );
    }
    let outcome = agent.command(&["promote", "--failover", "--json"]).await;
    outcome.expect_code(0);
    let report = outcome.json();
    let stated = &report["databases"][0];
    assert_eq!(stated["sequences_set"], all, "{stated}");
    eprintln!("{}", stated["steps"]);
    let primary = database.replica().await;
    let behind = "SELECT count(*) FROM pg_sequences WHERE sequencename LIKE 'many%' AND coalesce(last_value, 0) <= 70";
    assert_eq!(primary.number(behind).await, 0);
    assert!(
        primary
            .holds("SELECT last_value > 6000000 FROM many_0_7_id_seq")
            .await
    );
    assert!(
        primary
            .holds("SELECT last_value < 2000000000 FROM many_0_8_id_seq")
            .await
    );
    assert!(
        stated["warnings"].to_string().contains("many_0_8_id_seq"),
        "{stated}"
    );
}
