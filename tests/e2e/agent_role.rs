//! Goal: on the replica the agent is no superuser (but on 14, which demands it), and everything there belongs to whom it belongs to on the source.
//! Method: `init` by a superuser for a role that is none, once as SQL through psql; then copy, stream and promote with that role, and
//! compare the owners and privileges of both sides.

use std::process::Command;

use dr_agent_tests::agent::Agent;
use dr_agent_tests::binaries::Binaries;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;

const OBJECTS: &str = "
    CREATE SCHEMA shop AUTHORIZATION role_app;
    GRANT USAGE ON SCHEMA shop TO role_reader;
    SET ROLE role_app;
    CREATE EXTENSION citext;
    CREATE TYPE shop.color AS ENUM ('red', 'green');
    CREATE TABLE shop.customer (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name public.citext, c shop.color);
    CREATE TABLE shop.purchase (id serial PRIMARY KEY, customer int REFERENCES shop.customer);
    CREATE FUNCTION shop.f() RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE VIEW shop.v AS SELECT name FROM shop.customer;
    GRANT SELECT ON shop.customer TO role_reader;
    RESET ROLE;
    CREATE TABLE public.theirs (id int PRIMARY KEY);
    ALTER TABLE public.theirs OWNER TO role_other;
    CREATE TABLE public.boss (id int PRIMARY KEY);
    GRANT SELECT ON public.boss TO role_reader;
    CREATE EXTENSION pageinspect;
    INSERT INTO shop.customer (name, c) VALUES ('Ann', 'red'), ('Bob', 'green');
    INSERT INTO shop.purchase (customer) VALUES (1), (2);
    INSERT INTO theirs VALUES (1); INSERT INTO boss VALUES (1)";

/// Owners and privileges, without what belongs to the superuser, which the agent has.
const OWNED: &str = "
    SELECT 'relation ' || relname || ' ' || pg_get_userbyid(relowner)
           || coalesce((SELECT string_agg(a.grantee::regrole::text || ':' || a.privilege_type, ',' ORDER BY 1)
                          FROM aclexplode(relacl) a WHERE a.grantee <> relowner), '')
      FROM pg_class WHERE relnamespace IN ('shop'::regnamespace, 'public'::regnamespace)
       AND relkind IN ('r', 'v', 'S') AND relname NOT IN ('boss')
       AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = pg_class.oid AND d.deptype = 'e')
    UNION ALL SELECT 'schema ' || nspname || ' ' || pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'shop'
    UNION ALL SELECT 'function ' || proname || ' ' || pg_get_userbyid(proowner)
      FROM pg_proc WHERE pronamespace = 'shop'::regnamespace
    UNION ALL SELECT 'type ' || typname || ' ' || pg_get_userbyid(typowner) FROM pg_type WHERE typname = 'color'
    UNION ALL SELECT 'extension ' || extname || ' ' || pg_get_userbyid(extowner) FROM pg_extension WHERE extname = 'citext'
    UNION ALL SELECT 'privilege on boss ' || has_table_privilege('role_reader', 'public.boss', 'SELECT')::text
    UNION ALL SELECT 'create in public ' || has_schema_privilege('role_other', 'public', 'CREATE')::text
    UNION ALL SELECT 'database ' || pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()
     ORDER BY 1";

async fn owned(client: &Client) -> Vec<String> {
    client.column(OWNED).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_is_no_superuser_and_everything_keeps_its_owner() {
    let site = Site::own().await;
    let database = site.database("roles").await;
    let source = database.source().await;
    source
        .run("CREATE ROLE role_app LOGIN PASSWORD 'x'; CREATE ROLE role_reader LOGIN; CREATE ROLE role_other")
        .await;
    source
        .run(&format!(
            "ALTER DATABASE \"{}\" OWNER TO role_app",
            database.name
        ))
        .await;
    let contrib =
        "SELECT count(*) = 2 FROM pg_available_extensions WHERE name IN ('citext', 'pageinspect')";
    let objects = match source.holds(contrib).await {
        true => OBJECTS.to_owned(),
        false => OBJECTS
            .replace("CREATE EXTENSION citext;", "")
            .replace("CREATE EXTENSION pageinspect;", "")
            .replace("public.citext", "text"),
    };
    source.run(&objects).await;
    let as_agent = |url: String| url.replace("postgres@", "dr@");
    let config = database
        .config()
        .set_text("source.url", &as_agent(site.source.url("postgres")))
        .set_text("replica.url", &as_agent(site.replica.url("postgres")));
    let agent = Agent::new(config);
    let (source_url, replica_url) = (site.source.url("postgres"), site.replica.url("postgres"));
    let urls = ["--source-url", &source_url, "--replica-url", &replica_url];
    let init = [&["init"][..], &urls].concat();

    // What is printed can be run, and makes no password of a placeholder.
    let plan = agent.command(&[&init[..], &["--plan"]].concat()).await;
    plan.expect_code(0);
    assert!(!plan.stdout.contains(" PASSWORD "), "{}", plan.stdout);
    let psql = Binaries::of_source().program("psql");
    if psql.exists() {
        let script = agent.directory().join("plan.sql");
        std::fs::write(&script, &plan.stdout).unwrap();
        let mut run = Command::new(psql);
        run.args(["-X", "-q", "-d", &source_url, "-f"]).arg(&script);
        let output = tokio::task::spawn_blocking(move || run.output().unwrap())
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}\n{}", plan.stdout);
    }
    agent.command(&init).await.expect_code(0);
    let on_server = site.replica.client("postgres").await;
    // 14 lets nobody else silence triggers.
    let superuser = site.replica.major() < 15;
    let is_one = "SELECT rolsuper FROM pg_roles WHERE rolname = 'dr'";
    assert_eq!(on_server.holds(is_one).await, superuser);

    agent.command(&["check"]).await.expect_code(0);
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    source
        .run(
            "INSERT INTO shop.customer (name, c) SELECT 'n' || g, 'red' FROM generate_series(1, 2000) g;
             UPDATE shop.customer SET c = 'green' WHERE id % 2 = 0; DELETE FROM shop.purchase WHERE id = 1;
             TRUNCATE theirs; INSERT INTO theirs VALUES (7); INSERT INTO boss VALUES (2)",
        )
        .await;
    database.expect_equal().await;
    assert_eq!(owned(&source).await, owned(&database.replica().await).await);
    running.stop().await;
    let promoted = agent.command(&["promote", "--failover"]).await;
    promoted.expect_code(0);
    let as_app = Client::connect(
        &site
            .replica
            .url(&database.name)
            .replace("postgres@", "role_app@"),
    )
    .await;
    as_app
        .run("INSERT INTO shop.customer (name) VALUES ('after')")
        .await;
    as_app
        .run("ALTER TABLE shop.customer ADD COLUMN later int")
        .await;
}
