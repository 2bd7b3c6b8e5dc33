//! Goal: what belongs to the server, and what no event trigger tells of, is on the replica as it is on the source: roles, memberships,
//! settings, the database's owner and privileges, event triggers, publications.
//! Method: each of them created, altered and dropped under an agent, and compared; a promotion afterwards, used by the application's
//! own role with its own password.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::client::Client;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for};

use crate::ddl::{expect_same_shapes, replicating};
use crate::drift::wait_for_first_look;

const BEFORE: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v text); INSERT INTO item VALUES (1, 'one');
    CREATE TABLE other (id int PRIMARY KEY);
    CREATE FUNCTION told() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'";

/// `%` is the database.
const CHANGES: &[&str] = &[
    "CREATE ROLE reading NOLOGIN; CREATE ROLE app LOGIN PASSWORD 'secret one' CONNECTION LIMIT 20; GRANT reading TO app",
    "GRANT SELECT ON item TO reading; GRANT INSERT ON item TO app; GRANT UPDATE (v) ON item TO app",
    "ALTER ROLE app SET statement_timeout = '1min'; ALTER ROLE app SET search_path = \"$user\", public, \"Odd, one\"",
    "ALTER ROLE app IN DATABASE % SET work_mem = '9MB'",
    "ALTER DATABASE % SET app.colour = 'it''s 100%'; ALTER DATABASE % SET default_transaction_read_only = off",
    "CREATE ROLE owning LOGIN; ALTER DATABASE % OWNER TO owning; ALTER TABLE other OWNER TO owning",
    "REVOKE CONNECT, TEMPORARY ON DATABASE % FROM PUBLIC; GRANT CONNECT ON DATABASE % TO app, reading",
    "COMMENT ON DATABASE % IS 'what we live on'; COMMENT ON ROLE app IS 'ours'",
    "CREATE EVENT TRIGGER tells ON ddl_command_end WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION told(); ALTER EVENT TRIGGER tells DISABLE",
    "CREATE PUBLICATION others FOR TABLE item, other WITH (publish = 'insert')",
];

const LATER: &[&str] = &[
    "ALTER ROLE app VALID UNTIL '2100-01-01' CONNECTION LIMIT 30 PASSWORD 'secret two'; ALTER ROLE app RESET statement_timeout",
    "REVOKE reading FROM app; GRANT owning TO app WITH ADMIN OPTION",
    "ALTER DATABASE % RESET app.colour; ALTER ROLE app IN DATABASE % RESET ALL",
    "REASSIGN OWNED BY owning TO app; ALTER ROLE owning RENAME TO owned",
    "DROP EVENT TRIGGER tells; ALTER PUBLICATION others DROP TABLE other; ALTER PUBLICATION others RENAME TO theirs",
    "REVOKE ALL ON item FROM reading; REVOKE CONNECT ON DATABASE % FROM reading; DROP ROLE reading",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_the_server_is_followed() {
    let site = Site::own().await;
    let database = site.database("shared").await;
    let source = database.source().await;
    source.run(BEFORE).await;
    let agent = Agent::new(replicating(database.config()));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let replica = database.replica().await;
    wait_for_first_look(&replica).await;
    for statements in CHANGES {
        source
            .run(
                &statements
                    .replace("100%", "100\u{1}")
                    .replace('%', &database.name)
                    .replace('\u{1}', "%"),
            )
            .await;
    }
    expect_same_shapes(&database).await;
    let set = "SELECT setconfig::text FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
                WHERE d.datname = current_database() AND s.setrole = 0";
    let set = replica.value(set).await.unwrap_or_default();
    assert!(
        set.contains("default_transaction_read_only=on") && set.contains("app.colour"),
        "{set}"
    );
    // What the standby alone has is its own affair.
    let standby = database.writable_replica().await;
    standby
        .run(&format!(
            "CREATE ROLE reporting; GRANT SELECT ON item TO reporting; GRANT SELECT (id) ON other TO reporting; GRANT reporting TO app;
             GRANT CONNECT ON DATABASE {0} TO reporting; ALTER DATABASE {0} SET maintenance_work_mem = '7MB'; ALTER ROLE app SET work_mem = '5MB'",
            database.name
        ))
        .await;
    let url = |password: &str| {
        database
            .replica_url()
            .replace("postgres@", &format!("app:{password}@"))
    };
    let verifier = "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'";
    wait_for("the same password on both sides", PATIENCE, async || {
        let (there, here) = (source.value(verifier).await, replica.value(verifier).await);
        match there == here {
            true => Ok(()),
            false => Err("they differ".to_owned()),
        }
    })
    .await;
    for statements in LATER {
        source.run(&statements.replace('%', &database.name)).await;
    }
    wait_for("what came later", PATIENCE, async || {
        let others = "SELECT string_agg(name, ', ') FROM (
            SELECT 'role ' || rolname FROM pg_roles WHERE rolname IN ('reading', 'owning') OR rolname = 'app' AND rolconnlimit <> 30
            UNION ALL SELECT 'setting ' || s.setconfig::text FROM pg_db_role_setting s WHERE s.setconfig::text ~ 'colour|statement_timeout'
            UNION ALL SELECT 'membership' WHERE NOT EXISTS (
                SELECT FROM pg_auth_members WHERE member = to_regrole('app') AND roleid = to_regrole('owned'))
            UNION ALL SELECT 'table ' || tablename FROM pg_tables WHERE tablename = 'other' AND tableowner <> 'app'
            UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
            UNION ALL SELECT 'publication ' || pubname FROM pg_publication WHERE pubname = 'others'
            UNION ALL SELECT 'object ' || identity || ': ' || reason FROM dr_agent.ddl_waiting) AS o (name)";
        match replica.value(others).await {
            None => Ok(()),
            Some(others) => Err(others),
        }
    })
    .await;
    let left = "SELECT concat_ws(' ', has_table_privilege('reporting', 'item', 'SELECT'), has_column_privilege('reporting', 'other', 'id', 'SELECT'),
        pg_has_role('app', 'reporting', 'MEMBER'), has_database_privilege('reporting', current_database(), 'CONNECT'),
        (SELECT count(*) FROM pg_db_role_setting WHERE setconfig::text ~ '7MB|5MB'))";
    assert_eq!(replica.value(left).await.as_deref(), Some("t t t t 2"));
    wait_for("the new password on both sides", PATIENCE, async || {
        let (there, here) = (source.value(verifier).await, replica.value(verifier).await);
        match there == here {
            true => Ok(()),
            false => Err("they differ".to_owned()),
        }
    })
    .await;
    assert!(!running.log().contains("SCRAM"), "no verifier in a log");
    running.stop().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let app = Client::connect(&url("secret two")).await;
    app.run("INSERT INTO item VALUES (2, 'two')").await;
}
