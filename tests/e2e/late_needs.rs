//! Goal: a late table comes with what it needs, whatever that is and wherever it stands; and what of it the replica refuses costs
//! that alone.
//! Method: a table of cases under one running agent, each a table and what it needs; then constraints that cannot be added.

use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// What a table needs, the table, and what has to work on the replica once it is promoted.
const CASES: [(&str, &str, &str); 12] = [
    (
        "CREATE SEQUENCE app.free START 500",
        "CREATE TABLE by_default (id bigint PRIMARY KEY DEFAULT nextval('app.free'), v text); INSERT INTO by_default (v) VALUES ('a'), ('b')",
        "INSERT INTO by_default (v) VALUES ('new')",
    ),
    (
        "CREATE SCHEMA far; CREATE SEQUENCE far.seq",
        "CREATE TABLE far_default (id int PRIMARY KEY, n bigint DEFAULT nextval('far.seq')); INSERT INTO far_default VALUES (1)",
        "INSERT INTO far_default VALUES (2)",
    ),
    (
        "CREATE SEQUENCE hidden; CREATE FUNCTION next_hidden() RETURNS bigint LANGUAGE sql AS 'SELECT nextval(''public.hidden'')'",
        "CREATE TABLE by_function (id bigint PRIMARY KEY DEFAULT next_hidden()); INSERT INTO by_function DEFAULT VALUES",
        "INSERT INTO by_function DEFAULT VALUES",
    ),
    (
        "CREATE TABLE kept_out (id serial PRIMARY KEY)",
        "CREATE TABLE by_others (id int PRIMARY KEY DEFAULT nextval('kept_out_id_seq')); INSERT INTO by_others DEFAULT VALUES",
        "INSERT INTO by_others DEFAULT VALUES",
    ),
    (
        "",
        "CREATE TABLE by_serial (id bigserial PRIMARY KEY, v int); INSERT INTO by_serial (v) VALUES (1), (2)",
        "INSERT INTO by_serial (v) VALUES (3)",
    ),
    (
        "",
        "CREATE TABLE by_identity (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int); INSERT INTO by_identity (v) VALUES (1), (2)",
        "INSERT INTO by_identity (v) VALUES (3)",
    ),
    (
        "CREATE FUNCTION app.is_fine(int) RETURNS bool LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1 > 0; END'",
        "CREATE TABLE checked (id int PRIMARY KEY CHECK (app.is_fine(id))); INSERT INTO checked VALUES (1)",
        "INSERT INTO checked VALUES (2)",
    ),
    (
        "CREATE DOMAIN app.positive AS int CHECK (VALUE > 0); CREATE DOMAIN app.even AS app.positive CHECK (VALUE % 2 = 0)",
        "CREATE TABLE of_domains (id app.even PRIMARY KEY, many app.even[]); INSERT INTO of_domains VALUES (2, '{2,4}')",
        "INSERT INTO of_domains VALUES (4, '{6}')",
    ),
    (
        "CREATE FUNCTION app.half(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 / 2'",
        "CREATE TABLE computed (id int PRIMARY KEY, h int GENERATED ALWAYS AS (app.half(id)) STORED); INSERT INTO computed VALUES (10)",
        "INSERT INTO computed VALUES (12)",
    ),
    (
        "CREATE TEXT SEARCH CONFIGURATION app.plain (COPY = simple)",
        "CREATE TABLE searched (id int PRIMARY KEY, body text, words tsvector GENERATED ALWAYS AS (to_tsvector('app.plain', body)) STORED);
         INSERT INTO searched VALUES (1, 'one two')",
        "INSERT INTO searched VALUES (2, 'three')",
    ),
    (
        "CREATE TYPE app.pair AS (a int, b text); CREATE TYPE app.span AS RANGE (subtype = numeric); CREATE TYPE app.mood AS ENUM ('ok')",
        "CREATE TABLE of_types (id int PRIMARY KEY, p app.pair, s app.span, m app.mood[]); INSERT INTO of_types VALUES (1, '(1,x)', '[1,2)', '{ok}')",
        "INSERT INTO of_types VALUES (2, '(2,y)', '[2,3)', '{ok,ok}')",
    ),
    (
        "CREATE COLLATION app.bytes (provider = libc, locale = 'C')",
        "CREATE TABLE collated (id text COLLATE app.bytes PRIMARY KEY); INSERT INTO collated VALUES ('a')",
        "INSERT INTO collated VALUES ('B')",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_table_comes_with_what_it_needs() {
    let site = Site::shared().await;
    let database = site.database("late_needs").await;
    let source = database.source().await;
    source
        .run("CREATE SCHEMA app; CREATE TABLE base (id int PRIMARY KEY)")
        .await;
    let agent = dr_agent_tests::agent::Agent::new(
        database
            .config()
            .set("source.exclude", "[\"public.kept_out\"]"),
    );
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    for (needs, table, _) in CASES {
        source.run(needs).await;
        source.run(table).await;
    }
    let replica = database.replica().await;
    let joined = "SELECT count(*) FROM dr_agent.table_sync WHERE state = 'ready' AND table_schema = 'public'";
    wait_until("every table to join", PATIENCE, || async {
        replica.number(joined).await == i64::try_from(CASES.len()).unwrap() + 1
    })
    .await;
    // The stream knows what it brings: no session ends for it.
    source
        .run("INSERT INTO of_domains VALUES (8, '{}'); INSERT INTO of_types (id) VALUES (8); INSERT INTO computed VALUES (8)")
        .await;
    database.wait_caught_up().await;
    let log = running.log();
    let ended = |line: &&str| line.contains("starting again") && !line.contains("as text");
    assert_eq!(log.lines().find(ended), None, "a session was ended for it");
    running.stop().await;

    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let promoted = database.replica().await;
    for (_, _, works) in CASES {
        let written = promoted.try_run(works).await;
        assert_eq!(written, Ok(()), "{works}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_constraint_that_the_replica_refuses_costs_itself() {
    let site = Site::shared().await;
    let database = site.database("late_keys").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE base (id int PRIMARY KEY, other int UNIQUE); INSERT INTO base VALUES (1, 1)")
        .await;
    let (agent, running) = database.replicate().await;
    // What the foreign key needs is not there.
    let by_hand = database.writable_replica().await;
    by_hand
        .run("ALTER TABLE base DROP CONSTRAINT base_other_key")
        .await;
    source
        .run(
            "CREATE TABLE child (id int PRIMARY KEY, other int REFERENCES base (other)); INSERT INTO child VALUES (1, 1);
             CREATE TABLE fine (id int PRIMARY KEY, base int REFERENCES base (id)); INSERT INTO fine VALUES (1, 1)",
        )
        .await;
    running
        .wait_for_log(&[
            "foreign key child_other_fkey of public.child",
            "missing on the replica",
            "tried again",
        ])
        .await;
    source
        .run("INSERT INTO base VALUES (2, 2); INSERT INTO child VALUES (2, 2); INSERT INTO fine VALUES (2, 2)")
        .await;
    database.expect_equal().await;
    let keys =
        "SELECT string_agg(conrelid::regclass::text, ' ') FROM pg_constraint WHERE contype = 'f'";
    let replica = database.replica().await;
    wait_until("the other key", PATIENCE, || async {
        replica.value(keys).await.as_deref() == Some("fine")
    })
    .await;
    let status = agent.command(&["status"]).await.text();
    assert!(
        status.contains(
            "missing on the replica, tried again: foreign key child_other_fkey of public.child"
        ),
        "{status}"
    );
    running.stop().await;
    // The next start tries it again, and goes on where it cannot.
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;
    by_hand
        .run("ALTER TABLE base ADD CONSTRAINT base_other_key UNIQUE (other)")
        .await;
    let running = agent.start();
    running
        .wait_for_log(&["foreign key child_other_fkey of public.child", "added"])
        .await;
    running.stop().await;
    by_hand
        .run(
            "ALTER TABLE child DROP CONSTRAINT child_other_fkey; ALTER TABLE base DROP CONSTRAINT base_other_key;
             INSERT INTO dr_agent.deferred (stream, what, statement, after_lsn)
             SELECT stream, 'foreign key k of public.child', 'ALTER TABLE public.child ADD CONSTRAINT k FOREIGN KEY (other) REFERENCES public.base (other)', '0/0'
               FROM dr_agent.progress",
        )
        .await;
    let promoted = agent.command(&["promote", "--failover"]).await;
    let text = promoted.text();
    promoted.expect_code(0);
    assert!(
        text.contains("foreign key k of public.child is not on the replica"),
        "{text}"
    );
}
