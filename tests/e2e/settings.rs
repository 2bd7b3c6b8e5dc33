//! Goal: no setting of a server, a database or a role changes what is replicated, or ends or blocks a session of ours.
//! Method: every setting that could, as hostile as it can be, at every level and on both sides at once; tables of the types
//! whose text or names depend on one, through the copy, the stream, lanes and a promotion, and once more through records, the
//! archive, a restore and a promotion that drains; compares by full content.

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::archive::{archive, first_base, position, restore_at, wait_archived_to};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::server::PgServer;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;

/// Name, a hostile value, and what the test's own sessions have instead where it would be in their way.
const HOSTILE: &[(&str, &str, Option<&str>)] = &[
    ("search_path", "hostile, pg_catalog, public", None),
    ("client_encoding", "LATIN1", None),
    ("DateStyle", "German, DMY", None),
    ("IntervalStyle", "sql_standard", None),
    ("TimeZone", "Pacific/Chatham", None),
    ("extra_float_digits", "-15", None),
    ("bytea_output", "escape", None),
    ("xmloption", "document", Some("content")),
    ("xmlbinary", "hex", None),
    ("array_nulls", "off", Some("on")),
    ("standard_conforming_strings", "off", Some("on")),
    ("backslash_quote", "off", None),
    ("transform_null_equals", "on", None),
    ("quote_all_identifiers", "on", None),
    ("row_security", "on", None),
    ("gin_fuzzy_search_limit", "1", None),
    (
        "default_transaction_isolation",
        "serializable",
        Some("read committed"),
    ),
    ("default_transaction_deferrable", "on", None),
    ("default_transaction_read_only", "on", Some("off")),
    ("statement_timeout", "400ms", Some("0")),
    ("lock_timeout", "10ms", Some("0")),
    ("idle_in_transaction_session_timeout", "100ms", Some("0")),
    ("idle_session_timeout", "150ms", Some("0")),
    ("exit_on_error", "on", Some("off")),
    ("plan_cache_mode", "force_custom_plan", None),
    ("tcp_user_timeout", "100ms", None),
    ("synchronous_commit", "off", Some("on")),
    ("client_min_messages", "error", None),
    ("plpgsql.variable_conflict", "use_column", None),
    ("plpgsql.extra_errors", "all", None),
    ("lo_compat_privileges", "on", None),
    ("work_mem", "64kB", None),
    ("temp_buffers", "800kB", None),
];

/// What later versions have.
const SINCE_17: &[(&str, &str, Option<&str>)] = &[("transaction_timeout", "400ms", Some("0"))];

/// Objects that a name without its schema would find first.
const SCHEMA: &str = "
    CREATE SCHEMA hostile;
    CREATE FUNCTION hostile.lower(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1';
    CREATE FUNCTION hostile.version() RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''x''';
    CREATE DOMAIN hostile.money AS text;
    CREATE TABLE hostile.pg_class (relname name, oid oid);
    CREATE TYPE public.colour AS ENUM ('red', 'Größe');
    CREATE FUNCTION public.slow(i int) RETURNS boolean LANGUAGE sql AS 'SELECT pg_catalog.pg_sleep($1 / 10.0) IS NOT NULL';
    CREATE TABLE public.waits (id int PRIMARY KEY, tenths int CHECK (public.slow(tenths)));
    CREATE TABLE public.keyed (
        id int PRIMARY KEY, r regclass, p regprocedure, f regproc, y regtype, n regnamespace, a text[], d date, t timestamptz,
        i interval, g float8, e float4, b bytea, x public.document, m pg_catalog.money, c public.colour, w tstzrange, z timestamptz[], j jsonb,
        o regclass[]);
    CREATE TABLE public.keyless (LIKE public.keyed);
    CREATE TABLE public.by_value (d timestamptz, b bytea, g float8, i interval, v text, PRIMARY KEY (d, b, g, i));
    CREATE TABLE public.many (id int PRIMARY KEY, v text);
    CREATE TABLE public.secret (id int PRIMARY KEY, v text);
    ALTER TABLE public.secret ENABLE ROW LEVEL SECURITY;
    CREATE VIEW public.shown AS SELECT id, v = NULL AS never, 'a\\b'::text AS text FROM public.many;";

fn rows(from: i32) -> String {
    let mut sql = String::from("SET search_path = ''; SET array_nulls = on;");
    for table in ["keyed", "keyless"] {
        sql.push_str(&format!(
            "INSERT INTO public.{table} SELECT k, c, f.f, p, y, n, a, d::date, t::timestamptz, i::interval, g, g, b, x::public.document,
                    m::numeric::money, 'Größe', tstzrange(t::timestamptz, NULL), ARRAY[t::timestamptz, NULL], jsonb_build_object('t', t::timestamptz),
                    ARRAY[c, NULL, 'hostile.pg_class']
               FROM generate_series({from}, {from} + 2) AS k,
                    LATERAL (SELECT (ARRAY['public.keyed', 'pg_catalog.pg_class', 'hostile.pg_class'])[1 + k % 3]::regclass AS c,
                       (ARRAY['hostile.lower(text)', 'pg_catalog.lower(text)', 'public.slow(int)'])[1 + k % 3]::regprocedure AS f,
                       (ARRAY['hostile.version', 'pg_catalog.version', 'public.slow'])[1 + k % 3]::regproc AS p,
                       (ARRAY['hostile.money', 'pg_catalog.money', 'public.colour'])[1 + k % 3]::regtype AS y,
                       'hostile'::regnamespace AS n, ARRAY['p', NULL, 'NULL', '', 'ä\\b'] AS a,
                       '2024-02-03' AS d, '2024-07-08 09:10:11.123456+00' AS t, '-1 year 2 days -03:04:05.6' AS i,
                       0.1::float8 + 0.2::float8 + k AS g, '\\x00ff5c27'::bytea AS b, '<a/>text<b/>' AS x, '-1234.56' AS m) AS f;"
        ));
    }
    sql.push_str(&format!(
        "INSERT INTO public.by_value SELECT timestamptz '2024-03-31 00:30+00' + k * interval '1 hour', decode(lpad(to_hex(k), 4, '0'), 'hex'),
                k + 0.1::float8 + 0.2::float8, make_interval(months => k, secs => -k), 'v' FROM generate_series({from}, {from} + 9) AS k;
         INSERT INTO public.secret SELECT k, 's' FROM generate_series({from}, {from} + 9) AS k;"
    ));
    sql
}

/// Makes a server as hostile as its version can be, at every level.
async fn make_hostile(server: &PgServer, database: &str) {
    let client = server.client("postgres").await;
    client.run("SET ROLE NONE; LOAD 'plpgsql'").await;
    let later = if server.major() >= 17 { SINCE_17 } else { &[] };
    let mut own = String::new();
    for (name, value, of_test) in HOSTILE.iter().chain(later) {
        if let Some(value) = of_test {
            own.push_str(&format!("ALTER ROLE postgres SET {name} = '{value}';"));
        }
        let value = if *name == "search_path" {
            (*value).to_owned()
        } else {
            format!("'{value}'")
        };
        client
            .run(&format!("ALTER SYSTEM SET {name} = {value}"))
            .await;
        own.push_str(&format!("ALTER ROLE agent SET {name} = {value}; ALTER ROLE agent IN DATABASE {database} SET {name} = {value};"));
        // What the replica's guard has there it keeps.
        if *name != "default_transaction_read_only" {
            own.push_str(&format!("ALTER DATABASE {database} SET {name} = {value};"));
        }
    }
    own.push_str("ALTER ROLE agent SET role = 'nobody'; ALTER DATABASE postgres SET role = 'nobody'; SELECT pg_reload_conf()");
    client.run("SET default_transaction_read_only = off").await;
    client.run(&own).await;
}

async fn make_agent(server: &PgServer) {
    let client = server.client("postgres").await;
    client
        .run("CREATE ROLE agent SUPERUSER LOGIN; CREATE ROLE nobody; GRANT nobody TO agent")
        .await;
}

async fn change(source: &Client, from: i32) {
    source.run(&rows(from)).await;
    source
        .run(&format!(
            "UPDATE public.keyed SET a = a || ARRAY[NULL, 'x'], r = 'public.many' WHERE id % 2 = 0;
             UPDATE public.keyless SET g = g / 3, y = 'public.colour' WHERE id = {from};
             DELETE FROM public.keyless WHERE id = {from} + 1;
             UPDATE public.by_value SET v = 'w' WHERE extract(hour FROM d) = 2; DELETE FROM public.by_value WHERE g > {from} + 8;
             UPDATE public.by_value SET i = i * 2 WHERE g < {from} + 3"
        ))
        .await;
    // Large enough to go over lanes.
    source
        .run(&format!(
            "INSERT INTO public.many SELECT k, 'v' FROM generate_series({from} * 1000, {from} * 1000 + 999) AS k"
        ))
        .await;
    // Longer than every timeout, each statement and all of it.
    source
        .run(&format!("INSERT INTO public.waits VALUES ({from}, 6); INSERT INTO public.waits VALUES ({from} + 1, 6)"))
        .await;
}

/// Two servers as hostile as can be, and a database whose rows were there before.
async fn hostile(site: &Site) -> Database {
    let database = site.database("hostile").await;
    for server in [&site.source, &site.replica] {
        make_agent(server).await;
    }
    let source = database.source().await;
    // A server may be built without it.
    let has_xml = source.try_run("SELECT '<a/>'::xml").await.is_ok();
    let document = if has_xml { "xml" } else { "text" };
    source
        .run(&format!("CREATE DOMAIN public.document AS {document}"))
        .await;
    source.run(SCHEMA).await;
    change(&source, 1).await;
    drop(source);
    make_hostile(&site.source, &database.name).await;
    // The replica's own, before the first copy; its database has the source's from then on.
    site.replica.create_database(&database.name).await;
    make_hostile(&site.replica, &database.name).await;
    database
}

/// Takes away what a promotion refuses for good reason: its users could not write.
async fn allow_promotion(server: &PgServer, database: &str) {
    let admin = server.client("postgres").await;
    admin.run("SET ROLE NONE").await;
    admin
        .run("ALTER SYSTEM RESET default_transaction_read_only")
        .await;
    admin
        .run(&format!(
            "ALTER ROLE agent RESET default_transaction_read_only;
             ALTER ROLE agent IN DATABASE {database} RESET default_transaction_read_only; SELECT pg_reload_conf()"
        ))
        .await;
}

/// As the role that the settings are hostile to.
fn as_agent(url: &str) -> String {
    url.replace("postgres@", "agent@")
}

fn config(site: &Site, database: &Database) -> AgentConfig {
    database
        .config()
        .set_text("source.url", &as_agent(&site.source.url("postgres")))
        .set_text("replica.url", &as_agent(&site.replica.url("postgres")))
        .set_text("source.keyless", "full")
        .set("replica.lanes", "3")
        .set("limits.spread_changes", "100")
}

#[tokio::test]
async fn no_setting_of_a_server_a_database_or_a_role_changes_what_is_replicated() {
    let site = Site::own().await;
    let database = hostile(&site).await;
    let name = &database.name;
    let agent = Agent::new(config(&site, &database));
    let running = agent.start();
    running.wait_for_streaming(name).await;
    let source = database.source().await;
    database.expect_equal().await;
    change(&source, 50).await;
    database.expect_equal().await;
    let spread = running
        .metrics()
        .await
        .value("dr_agent_spread_batches_total", &[("database", name)]);
    assert!(spread.is_some_and(|batches| batches >= 1.0), "{spread:?}");
    running
        .wait_for_log(&["the source is read-only for its users", "set by"])
        .await;
    running.expect_untroubled();
    running.stop().await;

    allow_promotion(&site.replica, name).await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    expect_same_content(&source, &database.replica().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_setting_changes_what_goes_through_records_or_comes_out_of_an_archive() {
    let site = Site::own().await;
    let target = "hostile_restored";
    site.replica.create_database(target).await;
    let database = hostile(&site).await;
    let name = &database.name;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let archive = archive();
    let spool = archive.with_file_name("spool").display().to_string();
    let route = Route::with_configuration(database.clone(), kinesalite.port(), || {
        config(&site, &database)
            .set_text("objectives.rpo", "1s")
            .set_text("archive.url", &format!("file://{}", archive.display()))
            .set_text("archive.spool_directory", &spool)
    });
    let (running, applying) = route.start().await;
    first_base(&running, &database).await;
    let source = database.source().await;
    change(&source, 50).await;
    database.expect_equal().await;
    let end = position(&source).await.parse().expect("it is an LSN");
    // Heartbeats come behind it.
    wait_archived_to(end, &archive).await;
    running.expect_untroubled();
    applying.expect_untroubled();
    running.stop().await;
    applying.stop().await;

    make_hostile(&site.replica, target).await;
    let admin = site.replica.client("postgres").await;
    admin.run("SET ROLE NONE").await;
    admin
        .run(&format!(
            "ALTER DATABASE {target} SET default_transaction_read_only = on"
        ))
        .await;
    restore_at(&route.sender, &as_agent(&site.replica.url(target)), &[])
        .await
        .expect_code(0);
    expect_same_content(&source, &site.replica.client(target).await).await;

    // Sent, and not applied.
    let running = route.run(&[]);
    running.wait_for_streaming(name).await;
    change(&source, 90).await;
    route.wait_sent().await;
    running.stop().await;
    allow_promotion(&site.replica, name).await;
    let promote = ["promote", "--failover"];
    let outcome = route.applier.command_with(&promote, &route.with(&[])).await;
    outcome.expect_code(0);
    expect_same_content(&source, &database.replica().await).await;
}

/// A log of DDL, filled as many do it; the rows of the source's DDL are replicated like any others.
const DDL_LOG: &str = "
    CREATE TABLE ddl_log (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
    CREATE FUNCTION log_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO public.ddl_log (what) VALUES (tg_event || tg_tag); END';
    CREATE EVENT TRIGGER on_end ON ddl_command_end EXECUTE FUNCTION log_ddl();
    CREATE EVENT TRIGGER on_drop ON sql_drop EXECUTE FUNCTION log_ddl();
    CREATE EVENT TRIGGER always ON ddl_command_end EXECUTE FUNCTION log_ddl();
    ALTER EVENT TRIGGER always ENABLE ALWAYS;
    CREATE FUNCTION refuse_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
        'BEGIN IF current_setting(''server.is_replica'', true) = ''yes'' THEN RAISE ''no DDL here''; END IF; END';
    CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse_ddl();";

/// Rows of catalogs that an alteration of schema `dr_agent` would write anew.
const UNALTERED: &str = "
    SELECT string_agg(x, ' ' ORDER BY x) FROM (
        SELECT xmin::text || ' ' || proname AS x FROM pg_proc WHERE pronamespace = 'dr_agent'::regnamespace
        UNION ALL SELECT xmin::text || ' ' || relname FROM pg_class WHERE relnamespace = 'dr_agent'::regnamespace AND relkind = 'r'
        UNION ALL SELECT xmin::text || ' ' || nspname FROM pg_namespace WHERE nspname = 'dr_agent') AS t";

#[tokio::test]
async fn no_session_on_the_replica_fires_event_triggers_and_a_start_alters_nothing() {
    let site = Site::shared().await;
    let database = site.database("ddl_log").await;
    let source = database.source().await;
    source.run(DDL_LOG).await;
    let (agent, running) = database.replicate().await;
    database.expect_equal().await;
    running.stop().await;

    // From here on every DDL of a session that fires triggers fails.
    let name = &database.name;
    let replica = database.writable_replica().await;
    replica
        .run(&format!(
            "ALTER DATABASE \"{name}\" SET server.is_replica = 'yes'"
        ))
        .await;
    let before = replica.value(UNALTERED).await;
    let running = agent.start();
    running.wait_for_streaming(name).await;
    database.expect_equal().await;
    assert_eq!(replica.value(UNALTERED).await, before);
    running.stop().await;

    // What an older agent left is renewed, and nobody sees that either.
    replica
        .run("SET session_replication_role = replica; DROP FUNCTION dr_agent.hold; COMMENT ON SCHEMA dr_agent IS 'older'")
        .await;
    source
        .run("CREATE TABLE later (id int PRIMARY KEY); INSERT INTO later VALUES (1)")
        .await;
    let running = agent.start();
    running.wait_for_streaming(name).await;
    database.expect_equal().await;
    assert_eq!(
        replica
            .number("SELECT count(*) FROM pg_proc WHERE proname = 'hold'")
            .await,
        1
    );
    running.stop().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    assert_eq!(
        source.value("SELECT count(*) FROM ddl_log").await,
        replica.value("SELECT count(*) FROM ddl_log").await
    );
}
