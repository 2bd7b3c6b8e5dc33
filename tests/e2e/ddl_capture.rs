//! Goal: writing the source's commands down never makes one fail, whatever the session, and whatever has become of what writes; it
//! is written down wherever that is possible, and in the same words whatever the session has set.
//! Method: a table of sessions and of things that are broken, on a source whose event triggers are installed and whose agent is
//! away. Each creates a table, which must be there, and must be written down or not.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;

use crate::ddl::replicating;

/// A session that creates table `made_…`, written down.
const SESSIONS: &[(&str, &str)] = &[
    ("plain", ""),
    ("replica", "SET session_replication_role = replica"),
    ("no_path", "SET search_path = ''"),
    ("catalog_last", "SET search_path = evil, public, pg_catalog"),
    ("strict", "SET plpgsql.extra_errors = 'all'; SET plpgsql.extra_warnings = 'all'"),
    ("substitute", "SET plpgsql.variable_conflict = 'use_column'"),
    ("serializable", "SET default_transaction_isolation = 'serializable'"),
    ("repeatable", "SET default_transaction_isolation = 'repeatable read'"),
    (
        "rendering",
        "SET DateStyle = 'German, DMY'; SET IntervalStyle = 'iso_8601'; SET extra_float_digits = -15; SET bytea_output = 'escape';
         SET xmloption = 'document'; SET TimeZone = 'Asia/Kathmandu'",
    ),
    (
        "strings",
        "SET standard_conforming_strings = off; SET backslash_quote = off; SET quote_all_identifiers = on; SET array_nulls = off;
         SET transform_null_equals = on",
    ),
    (
        "planner",
        "SET enable_seqscan = off; SET enable_nestloop = off; SET enable_hashagg = off; SET row_security = off; SET work_mem = '64kB'",
    ),
    ("shadowed", "CREATE TEMP TABLE pg_class (x int); CREATE TEMP TABLE pg_namespace (x int)"),
    ("as_another", "SET ROLE capture_app"),
    ("in_a_savepoint", "BEGIN; SAVEPOINT a"),
    ("numbers_taken", "INSERT INTO dr_agent.ddl
        SELECT last_value + n, now(), 'command', 'SELECT', '', '', '', NULL, NULL, NULL, '[]' FROM dr_agent.ddl_id, generate_series(1, 5) AS n"),
    (
        "numbers_taken_unseen",
        "SET default_transaction_isolation = 'repeatable read'; BEGIN; SELECT 1",
    ),
];

/// What is broken, how it is mended, and what the session says first: nothing is written down.
const BROKEN: &[(&str, &str, &str, &str)] = &[
    (
        "locked",
        "BEGIN; LOCK TABLE dr_agent.ddl IN ACCESS EXCLUSIVE MODE",
        "ROLLBACK",
        "SET lock_timeout = '200ms'",
    ),
    (
        "refused",
        "ALTER TABLE dr_agent.ddl ADD CONSTRAINT never CHECK (false) NOT VALID",
        "ALTER TABLE dr_agent.ddl DROP CONSTRAINT never",
        "",
    ),
    (
        "no_column",
        "ALTER TABLE dr_agent.ddl RENAME COLUMN objects TO gone",
        "ALTER TABLE dr_agent.ddl RENAME COLUMN gone TO objects",
        "",
    ),
    (
        "no_table",
        "ALTER TABLE dr_agent.ddl RENAME TO gone",
        "ALTER TABLE dr_agent.gone RENAME TO ddl",
        "",
    ),
    (
        "no_function",
        "ALTER FUNCTION dr_agent.objects_of_command(boolean) RENAME TO gone",
        "ALTER FUNCTION dr_agent.gone(boolean) RENAME TO objects_of_command",
        "",
    ),
    (
        "no_writer",
        "ALTER FUNCTION dr_agent.capture(text, text, text, text, text) RENAME TO gone",
        "ALTER FUNCTION dr_agent.gone(text, text, text, text, text) RENAME TO capture",
        "",
    ),
    (
        "without_rights",
        "ALTER FUNCTION dr_agent.capture(text, text, text, text, text) SECURITY INVOKER",
        "ALTER FUNCTION dr_agent.capture(text, text, text, text, text) SECURITY DEFINER",
        "",
    ),
    (
        "no_schema",
        "REVOKE USAGE ON SCHEMA dr_agent FROM PUBLIC",
        "GRANT USAGE ON SCHEMA dr_agent TO PUBLIC",
        "SET ROLE capture_app",
    ),
];

/// What is written otherwise under other settings.
const COLUMNS: &str = "id int PRIMARY KEY, d date DEFAULT '2025-04-03', t timestamptz DEFAULT '2025-04-03 02:01:00+00',
    i interval DEFAULT '1 day 02:00:00', f float8 DEFAULT 0.1::float8 / 3, e float8 DEFAULT '0.30000000000000004', b bytea DEFAULT decode('ff', 'hex'),
    c bytea DEFAULT E'\\\\xff', m money DEFAULT '1234.5', \"order\" text DEFAULT 'x',
    CONSTRAINT c CHECK (d > '2025-01-02' AND t < '2030-01-02 00:00:00+00' AND \"order\" <> 'y')";

async fn written_down(source: &Client, table: &str) -> i64 {
    let of = format!(
        "SELECT count(*) FROM dr_agent.ddl d, json_array_elements(d.objects) AS o WHERE o ->> 'identity' = 'public.{table}'"
    );
    source.number(&of).await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_command_fails_because_it_is_written_down() {
    let site = Site::own().await;
    let database = site.database("ddl_capture").await;
    let source = database.source().await;
    source
        .run("CREATE SCHEMA evil; CREATE FUNCTION evil.jsonb_agg(jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
              CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'evil'; END $$;
              CREATE ROLE capture_app; GRANT CREATE ON SCHEMA public TO capture_app")
        .await;
    let agent = Agent::new(replicating(database.config()));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;
    let mut plain: Option<String> = None;
    for (name, says) in SESSIONS {
        let session = database.source().await;
        session.run(says).await;
        if *name == "numbers_taken_unseen" {
            let taken = SESSIONS.iter().find(|(name, _)| *name == "numbers_taken");
            source.run(taken.expect("it is listed").1).await;
        }
        let create = format!("CREATE TABLE public.made_{name} ({COLUMNS})");
        session.run(&create).await;
        if says.contains("BEGIN") {
            session.run("COMMIT").await;
        }
        let count = written_down(&source, &format!("made_{name}")).await;
        assert_eq!(count, 1, "{name}: a table and its key are one object");
        let described = format!(
            "SELECT concat(o -> 'shape' ->> 'columns', o -> 'shape' -> 'constraints' ->> 'c')
               FROM dr_agent.ddl d, json_array_elements(d.objects) AS o WHERE o ->> 'identity' = 'public.made_{name}'"
        );
        let described = source.value(&described).await.expect("it has a shape");
        let first = plain.get_or_insert_with(|| described.clone());
        assert_eq!(described, *first, "{name}");
    }
    for (name, breaks, mends, says) in BROKEN {
        let (breaker, session) = (database.source().await, database.source().await);
        breaker.run(breaks).await;
        session.run(says).await;
        let table = format!("made_{name}");
        for command in [
            format!("CREATE TABLE public.{table} (id int PRIMARY KEY)"),
            format!("ALTER TABLE public.{table} ADD COLUMN v serial"),
            format!("ALTER TABLE public.{table} ALTER id TYPE bigint"),
            format!("ALTER TABLE public.{table} DROP COLUMN v"),
        ] {
            session.run(&command).await;
        }
        breaker.run(mends).await;
        assert_eq!(written_down(&source, &table).await, 0, "{name}");
        let mended = format!("mended_{name}");
        source
            .run(&format!("CREATE TABLE {mended} (id int PRIMARY KEY)"))
            .await;
        assert_eq!(written_down(&source, &mended).await, 1, "{name}");
    }
}
