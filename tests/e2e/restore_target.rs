//! Goal: a restore refuses a target, or itself, before it has written anything; what it has begun, the same command ends.
//! Method: targets that hold something or lack something; restores that are killed within the base backup, or find it damaged.

use std::fs;
use std::path::Path;

use dr_agent_tests::agent::{Agent, Outcome};
use dr_agent_tests::archive::{
    Moment, TABLES, agent, archive, expect_state, files_below, first_base, note, protected,
    protected_with, restore, restore_at,
};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::site::{Database, Site};

/// What an empty database does not have: relations, functions, types, schemas.
const OBJECTS: &str = "
    SELECT (SELECT count(*) FROM pg_class WHERE oid >= 16384) + (SELECT count(*) FROM pg_proc WHERE oid >= 16384)
         + (SELECT count(*) FROM pg_type WHERE oid >= 16384) + (SELECT count(*) FROM pg_namespace WHERE oid >= 16384)";

async fn expect_empty(client: &Client) {
    assert_eq!(client.number(OBJECTS).await, 0);
}

/// An archive with a base backup and a moment that it reaches; nobody writes it any more.
async fn archived(site: &Site, name: &str, more: &str) -> (Database, Agent, Moment) {
    let (database, _, agent, running) =
        protected_with(site, name, &format!("{TABLES};{more}")).await;
    let source = database.source().await;
    source.run("INSERT INTO bag VALUES ('logged')").await;
    let moment = note(&source).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    (database, agent, moment)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_holds_anything_is_refused_and_left_as_it_is() {
    let site = Site::shared().await;
    let (database, agent, moment) = archived(&site, "holding", "").await;
    let server = database.replica_server();
    let things = [
        ("CREATE TABLE t (id int)", "table public.t"),
        (
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "function public.f",
        ),
        ("CREATE TYPE mood AS ENUM ('so')", "type public.mood"),
        ("CREATE SCHEMA other", "schema other"),
        ("CREATE EXTENSION pg_trgm", "extension pg_trgm"),
        // A replica, or what somebody made of one; a restore did not begin there.
        (
            "CREATE SCHEMA dr_agent; CREATE TABLE dr_agent.progress ()",
            "schema dr_agent",
        ),
    ];
    for (number, (statement, name)) in things.into_iter().enumerate() {
        let target = format!("not_empty_{number}");
        server.create_database(&target).await;
        let client = server.client(&target).await;
        client.run(statement).await;
        let before = client.number(OBJECTS).await;
        for arguments in [&["--plan"][..], &["--to-lsn", &moment.lsn]] {
            let refused = restore_at(&agent, &server.url(&target), arguments).await;
            refused.expect_code(1).expect_words(&["not empty", name]);
            assert!(!refused.text().contains("DROP DATABASE"));
        }
        assert_eq!(client.number(OBJECTS).await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_succeed_is_refused_before_anything_is_written() {
    let site = Site::shared().await;
    let (database, mut agent, _) =
        archived(&site, "refused", "CREATE EXTENSION IF NOT EXISTS pg_trgm").await;
    let server = database.replica_server();
    server.create_database("refused_target").await;
    let (url, client) = (
        server.url("refused_target"),
        server.client("refused_target").await,
    );
    let plan = restore_at(&agent, &url, &["--plan", "--json"]).await;
    let plan = plan.expect_code(0).json();
    assert_eq!(plan["target"], "empty", "{plan}");
    assert!(plan["base_bytes"].as_u64().unwrap() > 0, "{plan}");
    expect_empty(&client).await;

    let unknown = restore_at(&agent, &url, &["--table", "public.nobody"]).await;
    unknown.expect_code(1).expect_words(&["public.nobody"]);
    let admin = server.client("postgres").await;
    admin
        .run("CREATE DATABASE refused_latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
        .await;
    let latin = restore_at(&agent, &server.url("refused_latin"), &[]).await;
    latin
        .expect_code(1)
        .expect_words(&["encoding is LATIN1", "UTF8"])
        .expect_words(&["hint", "ENCODING 'UTF8'", "C.UTF-8"]);
    expect_empty(&server.client("refused_latin").await).await;
    let nowhere = restore_at(&agent, &server.url("refused_nowhere"), &[]).await;
    nowhere
        .expect_code(1)
        .expect_words(&["hint", "create the database"]);
    // Tools that are not there.
    let empty = agent.directory().join("spill");
    agent.configure("copy.pg_bin", &format!("\"{}\"", empty.display()));
    let tools = restore_at(&agent, &url, &[]).await;
    tools.expect_code(1).expect_words(&["pg_dump", "needed"]);
    expect_empty(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_command_line_is_told_from_a_restore_that_failed() {
    let site = Site::shared().await;
    let (database, mut agent, moment) = archived(&site, "usage", "").await;
    let url = database.replica_server().url("usage_target");
    let wrong: [&[&str]; 5] = [
        &["--table", "account"],
        &["--table", "public.\"account"],
        &["--to-lsn", "twelve"],
        &["--to-time", "yesterday"],
        &["--to-time", "2026-01-01T00:00:00Z", "--to-lsn", "0/1"],
    ];
    for arguments in wrong {
        restore_at(&agent, &url, arguments).await.expect_code(2);
    }
    restore_at(&agent, "postgres://host:port/x", &[])
        .await
        .expect_code(2);
    let json = restore_at(&agent, &url, &["--table", "account", "--json"]).await;
    assert_eq!(json.expect_code(2).json()["outcome"], "failed");

    // With two databases it has to be said which.
    let names = format!("[\"{}\", \"somebody_else\"]", database.name);
    agent.configure("source.databases", &names);
    restore_at(&agent, &url, &[])
        .await
        .expect_code(2)
        .expect_words(&["several databases", &database.name, "somebody_else"]);
    restore(
        &database,
        &agent,
        "usage_other",
        &["--database", "somebody_else"],
    )
    .await
    .expect_code(1)
    .expect_words(&["no base backup of database \"somebody_else\""]);
    let named = ["--database", &database.name, "--to-lsn", &moment.lsn];
    restore(&database, &agent, "usage_named", &named)
        .await
        .expect_code(0);
    expect_state(&database, "usage_named", &moment).await;
}

/// Everything that a load may leave which is in no table: the next one must not stumble over it.
const ODDS: &str = "
    CREATE SCHEMA other; CREATE TYPE other.mood AS ENUM ('so'); CREATE EXTENSION pg_trgm SCHEMA other;
    CREATE EXTENSION postgres_fdw; CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw;
    CREATE USER MAPPING FOR postgres SERVER far; CREATE FOREIGN TABLE other.far (id int) SERVER far;
    CREATE CAST (text AS point) WITH INOUT; CREATE AGGREGATE other.total (int) (SFUNC = int4pl, STYPE = int);
    CREATE FUNCTION other.guard() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'nothing is dropped here'; END $$;
    CREATE EVENT TRIGGER guard ON sql_drop EXECUTE FUNCTION other.guard();
    CREATE EVENT TRIGGER guard_always ON sql_drop EXECUTE FUNCTION other.guard(); ALTER EVENT TRIGGER guard_always ENABLE ALWAYS";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_was_killed_is_begun_anew_by_the_same_command() {
    // A server of its own: its event triggers are the database's, and refuse what others would do.
    let site = Site::own().await;
    let (database, agent, moment) = archived(&site, "anew", ODDS).await;
    let server = database.replica_server();
    server.create_database("anew_target").await;
    let url = server.url("anew_target");
    let arguments = ["restore", "--target", &url, "--to-lsn", &moment.lsn];
    for point in [
        "restore:data-loaded",
        "restore:data-loaded@2",
        "restore:base-loaded",
    ] {
        let killed = agent
            .command_with(&arguments, &[("DR_AGENT_FAILPOINT", point)])
            .await;
        assert_eq!(killed.code, None, "{point}: {}", killed.text());
        let plan = restore_at(&agent, &url, &["--plan", "--json"]).await;
        assert_eq!(plan.expect_code(0).json()["target"], "begun_anew");
    }
    // A restore of something else is not wiped.
    let other = site.database("anew_other").await;
    let other_archive = archive();
    let other_agent = self::agent(&other, &other_archive);
    other.source().await.run(TABLES).await;
    let running = other_agent.start();
    running.wait_for_streaming(&other.name).await;
    first_base(&running, &other).await;
    running.stop().await;
    restore_at(&other_agent, &url, &[])
        .await
        .expect_code(1)
        .expect_words(&["of another database or source"]);
    agent.command(&arguments).await.expect_code(0);
    expect_state(&database, "anew_target", &moment).await;
    let client = server.client("anew_target").await;
    let guards = "SELECT count(*) FROM pg_event_trigger WHERE evtenabled = 'O'";
    assert_eq!(client.number(guards).await, 2);
    let refused = client.try_run("DROP TABLE bag").await.unwrap_err();
    assert!(refused.contains("nothing is dropped here"), "{refused}");
    // Now it is the users'.
    agent
        .command(&arguments)
        .await
        .expect_code(1)
        .expect_words(&["not empty"]);
}

/// The object of an archive's only base with the rows of a table.
fn object_of(archive: &Path, table: &str) -> std::path::PathBuf {
    let files = files_below(archive);
    let manifest = files.iter().find(|path| path.ends_with("manifest.json"));
    let manifest = manifest.unwrap();
    let json: serde_json::Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    let objects = json["objects"].as_array().unwrap();
    let object = objects
        .iter()
        .find(|object| object["data"]["table"]["name"] == table);
    let name = object.unwrap()["name"].as_str().unwrap();
    manifest.parent().unwrap().join(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_base_is_named_and_leaves_a_target_that_the_next_restore_uses() {
    let site = Site::shared().await;
    let (database, archive, agent, running) = protected(&site, "flawed").await;
    let source = database.source().await;
    source.run("INSERT INTO bag VALUES ('logged')").await;
    let moment = note(&source).await;
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    let victim = object_of(&archive, "account");
    let name = victim.file_name().unwrap().to_str().unwrap();
    let good = fs::read(&victim).unwrap();
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 8;
    let server = database.replica_server();
    server.create_database("flawed_target").await;
    let url = server.url("flawed_target");
    let client = server.client("flawed_target").await;
    let whole = ["--to-lsn", moment.lsn.as_str()];
    let damages = [
        (Some(good[..good.len() / 2].to_vec()), true),
        (None, true),
        (Some(flipped), false),
    ];
    for (number, (damage, is_seen_beforehand)) in damages.into_iter().enumerate() {
        match damage {
            Some(bytes) => fs::write(&victim, bytes).unwrap(),
            None => fs::remove_file(&victim).unwrap(),
        }
        let failed = restore_at(&agent, &url, &whole).await;
        failed.expect_code(1).expect_words(&["damaged", name]);
        if is_seen_beforehand {
            expect_empty(&client).await;
        }
        // Of a table whose rows are sound there is nothing to refuse.
        restore(
            &database,
            &agent,
            &format!("flawed_bag_{number}"),
            &["--to-lsn", &moment.lsn, "--table", "public.bag"],
        )
        .await
        .expect_code(0);
    }
    fs::write(&victim, &good).unwrap();
    restore_at(&agent, &url, &whole).await.expect_code(0);
    expect_state(&database, "flawed_target", &moment).await;
}

const OF_ROLES: &str = "
    CREATE ROLE app; CREATE ROLE \"the reader\"; CREATE ROLE bystander;
    GRANT CREATE ON SCHEMA public TO app;
    SET ROLE app;
    CREATE TABLE account (id int PRIMARY KEY, mine boolean);
    INSERT INTO account SELECT g, g % 2 = 0 FROM generate_series(1, 10) AS g;
    GRANT SELECT ON account TO \"the reader\";
    ALTER TABLE account ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON account TO \"the reader\" USING (mine);
    CREATE POLICY everybody ON account FOR INSERT WITH CHECK (true);
    RESET ROLE;
    REVOKE CREATE ON SCHEMA public FROM app";

const OWNER: &str = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'account'";
const POLICIES: &str = "SELECT polname FROM pg_policy ORDER BY 1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_matters_is_asked_for_beforehand_and_no_other() {
    let site = Site::own().await;
    let (_, _, agent, running) = protected_with(&site, "roles", OF_ROLES).await;
    running.stop().await;
    // The role that owns the system, and so the publication, has another name there.
    let elsewhere = ServerOptions::replica().start().await;
    elsewhere
        .run("postgres", "CREATE ROLE boss LOGIN SUPERUSER")
        .await;
    let boss = Client::connect(&url_of(&elsewhere, "postgres")).await;
    boss.run("ALTER ROLE postgres RENAME TO somebody").await;
    let restored = async |name: &str, arguments: &[&str]| -> (Outcome, Client) {
        boss.run(&format!("CREATE DATABASE {name} TEMPLATE template0"))
            .await;
        let url = url_of(&elsewhere, name);
        let outcome = restore_at(&agent, &url, arguments).await;
        (outcome, Client::connect(&url).await)
    };
    let (refused, client) = restored("roles_refused", &[]).await;
    refused
        .expect_code(1)
        .expect_words(&["there is no role app, the reader"])
        .expect_words(&["hint", "roles.sql.zst", "--no-owner"]);
    expect_empty(&client).await;
    let (refused, _) = restored("roles_half", &["--no-owner"]).await;
    refused
        .expect_code(1)
        .expect_words(&["there is no role the reader"]);
    let (without, client) = restored(
        "roles_without",
        &["--no-owner", "--no-privileges", "--json"],
    )
    .await;
    let report = without.expect_code(0).json();
    let warnings = report["warnings"].to_string();
    assert!(
        warnings.contains("POLICY public account own") && warnings.contains("the reader"),
        "{warnings}"
    );
    assert_eq!(client.value(OWNER).await.unwrap(), "boss");
    assert_eq!(client.column(POLICIES).await, ["everybody"]);
    assert_eq!(client.number("SELECT count(*) FROM account").await, 10);

    boss.run("CREATE ROLE app; CREATE ROLE \"the reader\"")
        .await;
    let (with, client) = restored("roles_with", &["--json"]).await;
    assert_eq!(
        with.expect_code(0).json()["warnings"],
        serde_json::json!([])
    );
    assert_eq!(client.value(OWNER).await.unwrap(), "app");
    assert_eq!(client.column(POLICIES).await, ["everybody", "own"]);
    let may = "SELECT has_table_privilege('the reader', 'account', 'select')";
    assert!(client.holds(may).await);
}

fn url_of(server: &PgServer, database: &str) -> String {
    format!("postgres://boss@127.0.0.1:{}/{database}", server.port())
}
