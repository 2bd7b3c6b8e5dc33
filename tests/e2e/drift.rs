//! Goal: the replica is what the source is, also where no event trigger has told of a change, or somebody has changed the replica.
//! Method: event triggers that are disabled, a source that has none, and statements run on the replica by hand; afterwards the shapes
//! of all objects, `pg_dump` and all rows of both sides are compared.

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_for};

use crate::ddl::{dumped, expect_same_shapes, replicating, wait_for_all_tables};

/// What is there before the agent.
const BEFORE: &str = "
    CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL DEFAULT 'nobody', mail varchar(40) UNIQUE);
    INSERT INTO customer SELECT n, 'customer ' || n, n || '@example.org' FROM generate_series(1, 500) AS n;
    CREATE TABLE ordered (id bigint PRIMARY KEY, customer bigint CONSTRAINT of_customer REFERENCES customer, note text);
    INSERT INTO ordered SELECT n, n FROM generate_series(1, 200) AS n;
    CREATE TABLE quiet (id int PRIMARY KEY, v text DEFAULT 'x');
    INSERT INTO quiet SELECT n FROM generate_series(1, 100) AS n;
    CREATE INDEX by_note ON ordered (note);
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE SEQUENCE counter INCREMENT 5;
    CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n';
    CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
    CREATE TRIGGER stamped BEFORE INSERT ON ordered FOR EACH ROW EXECUTE FUNCTION stamp();
    CREATE POLICY own ON ordered USING (note <> 'hidden');
    CREATE VIEW known AS SELECT id, name FROM customer;
    COMMENT ON TABLE customer IS 'who buys'; COMMENT ON COLUMN customer.name IS 'as they say it';
    CREATE SCHEMA sales; CREATE TABLE sales.amount (id int PRIMARY KEY, n numeric(10, 2) CONSTRAINT small CHECK (n < 10)); INSERT INTO sales.amount VALUES (1, 2.5);";

/// Definitions that are written otherwise once they were loaded from a dump.
const WORDED: &str = "
    CREATE TABLE worded (id int PRIMARY KEY, status varchar(10) DEFAULT 'new'
        CONSTRAINT known_status CHECK (status IN ('new', 'paid')), at date CHECK (at BETWEEN '2000-01-01' AND '2100-01-01'));
    INSERT INTO worded VALUES (1, 'new'), (2, 'paid');
    CREATE VIEW open AS SELECT id FROM worded WHERE status NOT IN ('paid', 'gone');
    CREATE INDEX of_new ON worded (id) WHERE status IN ('new', 'old')";

/// What is done on the source while nothing writes it down.
const UNSEEN: &[&str] = &[
    "ALTER TABLE customer ADD COLUMN age int DEFAULT 7",
    "INSERT INTO customer (id, name, mail) VALUES (1001, 'unseen', 'u@example.org')",
    "ALTER TABLE quiet RENAME TO still",
    "ALTER TABLE ordered DROP CONSTRAINT of_customer",
    "ALTER TABLE ordered DROP COLUMN note CASCADE",
    "ALTER TYPE mood ADD VALUE 'happy'",
    "ALTER TYPE mood RENAME TO humour",
    "ALTER SEQUENCE counter INCREMENT 7",
    "ALTER SEQUENCE counter RENAME TO tally",
    "ALTER FUNCTION twice(int) RENAME TO doubled",
    "CREATE OR REPLACE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN OLD; END $$",
    "ALTER TRIGGER stamped ON ordered RENAME TO stamps",
    "ALTER VIEW known RENAME TO acquainted",
    "COMMENT ON TABLE customer IS NULL; COMMENT ON COLUMN customer.name IS NULL",
    "GRANT SELECT ON customer TO PUBLIC; GRANT UPDATE (name) ON customer TO PUBLIC",
    "ALTER SCHEMA sales RENAME TO trade",
    "CREATE TABLE late (id int PRIMARY KEY, v text); INSERT INTO late SELECT n, 'late' FROM generate_series(1, 50) AS n",
    "CREATE TABLE never (id int PRIMARY KEY); DROP TABLE never",
    "ALTER TABLE trade.amount ALTER n SET NOT NULL, DROP CONSTRAINT small, ADD CONSTRAINT small CHECK (n < 1000) NOT VALID",
    "CREATE MATERIALIZED VIEW summed AS SELECT count(*) FROM customer",
];

/// A database with this in it, that is replicated.
async fn begun(site: &Site, purpose: &str, before: &str) -> (Database, Agent, Running) {
    let database = site.database(purpose).await;
    database.source().await.run(before).await;
    let agent = Agent::new(replicating(database.config()));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    (database, agent, running)
}

/// Waits until the source has told what its objects are: from then on it tells what changes.
pub(crate) async fn wait_for_first_look(replica: &Client) {
    wait_for("the first look", PATIENCE, async || {
        match replica
            .number("SELECT count(*) FROM dr_agent.fingerprint_at")
            .await
        {
            0 => Err("nothing was told".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
}

/// Waits until everything was compared, and nothing differs or waits.
async fn wait_for_no_drift(replica: &Client) {
    wait_for("nothing to differ", PATIENCE, async || {
        let waiting = replica
            .column("SELECT kind || ' ' || identity || ': ' || reason FROM dr_agent.ddl_waiting")
            .await;
        let judged = "SELECT f.kind || ' ' || f.identity FROM dr_agent.fingerprint f LEFT JOIN dr_agent.own_fingerprint o USING (kind, names, args)
                       WHERE o.hash IS NULL OR o.hash <> f.hash AND o.same_as IS DISTINCT FROM f.hash || ' ' || o.hash";
        let unlike = replica.column(judged).await;
        let told = replica.number("SELECT count(*) FROM dr_agent.fingerprint").await;
        match waiting.is_empty() && unlike.is_empty() && told > 0 {
            true => Ok(()),
            false => Err(format!("of {told} not compared: {unlike:?}; waiting {waiting:#?}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_event_trigger_has_seen_arrives_all_the_same() {
    let site = Site::own().await;
    let (database, agent, running) = begun(&site, "drift_unseen", BEFORE).await;
    let source = database.source().await;
    let replica = database.replica().await;
    wait_for_first_look(&replica).await;
    for trigger in ["command", "drop", "rewrite"] {
        source
            .run(&format!("ALTER EVENT TRIGGER dr_agent_{trigger} DISABLE"))
            .await;
    }
    let written = "SELECT count(*) FROM dr_agent.ddl WHERE tag <> 'FINGERPRINT'";
    let before = source.number(written).await;
    for statements in UNSEEN {
        source.run(statements).await;
    }
    assert_eq!(source.number(written).await, before);
    expect_same_shapes(&database).await;
    wait_for_all_tables(&database).await;
    database.wait_caught_up().await;
    database.expect_equal().await;
    wait_for_no_drift(&replica).await;
    // A table that has another name was not copied for that.
    let copied =
        "SELECT count(*) FROM dr_agent.table_sync WHERE table_name = 'still' AND state = 'ready'";
    assert_eq!(replica.number(copied).await, 1);
    agent.command(&["ddl"]).await.expect_code(0);
    running.stop().await;
}

/// A command commits while it is looked what has changed: the look brings about what it alone has found, and takes nothing back.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_is_overtaken_by_a_command_neither_undoes_it_nor_loses_what_it_found() {
    let site = Site::own().await;
    let (database, agent, running) = begun(&site, "drift_overtaken", BEFORE).await;
    let (source, replica) = (database.source().await, database.replica().await);
    wait_for_first_look(&replica).await;
    let looking = database.source().await;
    // The agent may not look meanwhile.
    looking
        .run("SELECT pg_advisory_lock(7258163, hashtext('fingerprint'))")
        .await;
    source
        .run("ALTER EVENT TRIGGER dr_agent_command DISABLE; ALTER EVENT TRIGGER dr_agent_drop DISABLE;
              ALTER TABLE quiet RENAME TO still; DROP FUNCTION twice(int); ALTER VIEW known RENAME TO acquainted;
              GRANT SELECT ON ordered TO PUBLIC;
              ALTER EVENT TRIGGER dr_agent_command ENABLE ALWAYS; ALTER EVENT TRIGGER dr_agent_drop ENABLE ALWAYS")
        .await;
    looking.run("BEGIN; SELECT dr_agent.look()").await;
    source
        .run("ALTER TABLE ordered ADD COLUMN fresh int DEFAULT 5; UPDATE ordered SET fresh = 6 WHERE id < 9")
        .await;
    looking.run("COMMIT; SELECT pg_advisory_unlock_all()").await;
    database.wait_caught_up().await;
    // The table's privileges had changed unseen, so its command's statement alone does not lead there.
    let outcomes = "SELECT tag || ' ' || outcome FROM dr_agent.ddl_applied JOIN dr_agent.ddl USING (id) ORDER BY commit_lsn, id";
    let expected = [
        "ALTER TABLE shape",
        "FINGERPRINT shape",
        "FINGERPRINT shape",
    ];
    assert_eq!(replica.column(outcomes).await, expected);
    let there = "SELECT concat_ws(' ', to_regclass('still'), to_regclass('quiet'), to_regclass('acquainted'), to_regproc('twice'))";
    assert_eq!(
        replica.value(there).await.as_deref(),
        Some("still acquainted")
    );
    let aside = "SELECT count(*) FROM dr_agent.set_aside";
    assert_eq!(replica.number(aside).await, 0);
    wait_for_no_drift(&replica).await;
    database.expect_equal().await;
    agent.command(&["ddl"]).await.expect_code(0);
    running.stop().await;
}

/// Where nobody may create event triggers, a migration says when it is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_on_a_server_without_event_triggers_says_when_it_is_done() {
    let site = Site::own().await;
    let database = site.database("drift_managed").await;
    let (admin, name) = (database.source().await, &database.name);
    admin
        .run(&format!(
            "CREATE ROLE owning LOGIN REPLICATION; ALTER DATABASE {name} OWNER TO owning"
        ))
        .await;
    site.replica
        .client("postgres")
        .await
        .run("CREATE ROLE owning LOGIN")
        .await;
    let source = Client::connect(&database.source_url().replace("postgres@", "owning@")).await;
    source.run(BEFORE).await;
    let config = replicating(database.config()).set_text(
        "source.url",
        &site.source.url("postgres").replace("postgres@", "owning@"),
    );
    let agent = Agent::new(config);
    let running = agent.start();
    running.wait_for_streaming(name).await;
    running
        .wait_for_log(&["event triggers are not installed", "ddl_now()"])
        .await;
    let replica = database.replica().await;
    wait_for_first_look(&replica).await;
    // In its transaction, with a session that has settings of its own: the rows behind it find the columns.
    source
        .run("SET DateStyle = 'SQL, DMY'; SET quote_all_identifiers = on; SET search_path = sales, public;
              BEGIN; ALTER TABLE customer ADD COLUMN born date DEFAULT '01/02/2003'; ALTER TABLE quiet RENAME TO still;
              SELECT dr_agent.ddl_now(); UPDATE customer SET born = '03/04/2005' WHERE id < 5;
              INSERT INTO still VALUES (1000, 'behind'); COMMIT; RESET ALL")
        .await;
    database.wait_caught_up().await;
    let outcomes = "SELECT outcome FROM dr_agent.ddl_applied JOIN dr_agent.ddl USING (id) WHERE tag = 'FINGERPRINT' ORDER BY id";
    assert_eq!(replica.column(outcomes).await, ["shape"]);
    let aside = "SELECT count(*) FROM dr_agent.set_aside";
    assert_eq!(replica.number(aside).await, 0);
    // Rolled back, it has said nothing.
    source
        .run("BEGIN; DROP TABLE still; SELECT dr_agent.ddl_now(); ROLLBACK")
        .await;
    // And without being told, within seconds.
    source
        .run("CREATE VIEW later AS SELECT id FROM still; DROP VIEW known")
        .await;
    database.wait_caught_up().await;
    wait_for("the view", PATIENCE, async || {
        let views =
            "SELECT string_agg(viewname, ' ') FROM pg_views WHERE viewname IN ('later', 'known')";
        match replica.value(views).await.as_deref() {
            Some("later") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    wait_for_no_drift(&replica).await;
    database.expect_equal().await;
    assert_eq!(
        dumped(&database.source_url()),
        dumped(&database.replica_url())
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_changes_on_the_replica_is_as_on_the_source_again() {
    const BY_HAND: [&str; 8] = [
        "DROP INDEX by_note",
        "CREATE OR REPLACE FUNCTION twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 3 * n'",
        "ALTER TABLE customer ALTER name DROP DEFAULT, DROP CONSTRAINT customer_mail_key",
        "DROP VIEW known",
        "COMMENT ON TABLE customer IS 'another one'",
        "DROP TABLE quiet",
        "GRANT SELECT ON ordered TO PUBLIC; GRANT UPDATE (note) ON ordered TO PUBLIC",
        "ALTER TRIGGER stamped ON ordered RENAME TO other",
    ];
    let site = Site::own().await;
    let (database, agent, running) = begun(&site, "drift_replica", BEFORE).await;
    let replica = database.writable_replica().await;
    wait_for_no_drift(&replica).await;
    for statement in BY_HAND {
        replica.run(statement).await;
    }
    // It stays what only the replica has.
    replica
        .run("DROP TRIGGER other ON ordered; CREATE VIEW our_own AS SELECT count(*) FROM customer")
        .await;
    let agent_told = agent
        .command(&["ddl", "retry", "--reason", "changed by hand"])
        .await;
    agent_told.expect_code(0);
    wait_for("the replica to be mended", PATIENCE, async || {
        let lacks = "SELECT count(*) FROM pg_class WHERE relname IN ('by_note', 'known', 'quiet', 'customer_mail_key')";
        match replica.number(lacks).await {
            4 => Ok(()),
            other => Err(format!("{other} of 4 are there")),
        }
    })
    .await;
    wait_for_no_drift(&replica).await;
    replica.run("DROP VIEW our_own").await;
    wait_for_all_tables(&database).await;
    database.expect_equal().await;
    assert_eq!(
        dumped(&database.source_url()),
        dumped(&database.replica_url())
    );
    running.stop().await;
}

/// A command on a table whose definitions were loaded from a dump is what it was on the source.
#[tokio::test(flavor = "multi_thread")]
async fn definitions_in_other_words_are_the_same() {
    let site = Site::shared().await;
    let (database, _agent, running) = begun(&site, "drift_words", WORDED).await;
    let source = database.source().await;
    let replica = database.replica().await;
    let words =
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'known_status'";
    assert_ne!(source.value(words).await, replica.value(words).await);
    wait_for_no_drift(&replica).await;
    source
        .run("ALTER TABLE worded ADD COLUMN more int; COMMENT ON VIEW open IS 'not paid'; COMMENT ON INDEX of_new IS 'x'")
        .await;
    source
        .run("ALTER TABLE worded RENAME CONSTRAINT known_status TO status_known")
        .await;
    database.wait_caught_up().await;
    let outcomes = "SELECT DISTINCT outcome FROM dr_agent.ddl_applied";
    assert_eq!(replica.column(outcomes).await, ["statement"]);
    wait_for_no_drift(&replica).await;
    database.expect_equal().await;
    running.stop().await;
}

/// What an agent of the version before has left there is brought up to date, without a copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_the_version_before_goes_on_and_is_compared() {
    let site = Site::shared().await;
    let (database, agent, running) = begun(&site, "drift_upgrade", BEFORE).await;
    let source = database.source().await;
    running.stop().await;
    source
        .run("DROP TABLE dr_agent.fingerprint, dr_agent.fingerprint_at; DROP FUNCTION dr_agent.look, dr_agent.ddl_now, dr_agent.write_down,
                  dr_agent.take_fingerprint, dr_agent.objects CASCADE;
              DELETE FROM dr_agent.listed WHERE table_name LIKE 'fingerprint%'")
        .await;
    let replica = database.writable_replica().await;
    replica
        .run("DROP TABLE dr_agent.fingerprint, dr_agent.fingerprint_at, dr_agent.own_fingerprint, dr_agent.own_fingerprint_at;
              DROP FUNCTION dr_agent.take_fingerprint, dr_agent.objects CASCADE; ALTER TABLE dr_agent.ddl_waiting DROP COLUMN drift;
              DELETE FROM dr_agent.table_sync WHERE table_name LIKE 'fingerprint%'; COMMENT ON SCHEMA dr_agent IS 'an earlier one'")
        .await;
    source
        .run("INSERT INTO quiet VALUES (5000, 'meanwhile'); ALTER TABLE quiet ADD COLUMN more int")
        .await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    wait_for_no_drift(&replica).await;
    database.expect_equal().await;
    let copied = "SELECT count(*) FROM dr_agent.table_sync WHERE table_name = 'customer' AND state = 'ready'";
    assert_eq!(replica.number(copied).await, 1);
    running.stop().await;
}
