//! Goal: what the source's commands (DDL) have left there is on the replica, at its place among the rows, on every route.
//! Method: a list of commands of all kinds with changes of rows between them, sent as a migration would. Afterwards every row, the
//! shape of every object, and what `pg_dump` says of both sides are compared.

use std::process::Command;

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::archive;
use dr_agent_tests::binaries::Binaries;
use dr_agent_tests::client::Client;
use dr_agent_tests::compare;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_for};

/// What is there before the agent.
const BEFORE: &str = "
    CREATE SCHEMA sales;
    CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL, mail varchar(40));
    INSERT INTO customer SELECT n, 'customer ' || n, n || '@example.org' FROM generate_series(1, 500) AS n;
    CREATE TABLE sales.ordered (id bigint PRIMARY KEY, customer bigint REFERENCES customer, at timestamptz DEFAULT now());
    INSERT INTO sales.ordered SELECT n, n FROM generate_series(1, 200) AS n;
    CREATE VIEW known AS SELECT id, name FROM customer";

/// A migration: each is one string of the client.
pub(crate) const MIGRATION: &[&str] = &[
    // Tables and columns.
    "CREATE TABLE item (id int PRIMARY KEY, label text); INSERT INTO item VALUES (1, 'one'), (2, 'two')",
    "ALTER TABLE item ADD COLUMN price numeric(10, 2) DEFAULT 1.50 NOT NULL",
    "INSERT INTO item VALUES (3, 'three', 3.33)",
    "BEGIN; ALTER TABLE item ADD COLUMN a int; UPDATE item SET a = id * 2; ALTER TABLE item ALTER a SET NOT NULL; COMMIT",
    "ALTER TABLE item RENAME COLUMN a TO doubled",
    "UPDATE item SET doubled = doubled + 1 WHERE id = 2",
    "ALTER TABLE item ALTER doubled TYPE bigint",
    "INSERT INTO item VALUES (4, 'four', 4, 5000000000)",
    "ALTER TABLE item DROP COLUMN label, ADD COLUMN title varchar(20) DEFAULT 'none'",
    "INSERT INTO item (id, price, doubled, title) VALUES (5, 5, 5, 'five')",
    "ALTER TABLE customer ADD COLUMN seen timestamptz DEFAULT now()",
    "UPDATE customer SET name = 'renamed' WHERE id < 10",
    "ALTER TABLE customer ADD CONSTRAINT named CHECK (name <> '') NOT VALID",
    "ALTER TABLE customer VALIDATE CONSTRAINT named",
    "ALTER TABLE customer ALTER mail TYPE text, ALTER mail SET DEFAULT 'nobody'",
    "ALTER TABLE customer RENAME TO client",
    "INSERT INTO client (id, name) VALUES (1001, 'after the renaming')",
    "CREATE TABLE customer (id bigint PRIMARY KEY, note text)",
    "INSERT INTO customer VALUES (1, 'another table')",
    // Two tables change places.
    "BEGIN; ALTER TABLE item RENAME TO swap; ALTER TABLE customer RENAME TO item; ALTER TABLE swap RENAME TO customer; COMMIT",
    "INSERT INTO item VALUES (2, 'was customer'); INSERT INTO customer (id, price, doubled) VALUES (6, 6, 6)",
    "CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1)",
    "DROP TABLE gone; CREATE TABLE gone (id int PRIMARY KEY, other text); INSERT INTO gone VALUES (1, 'again')",
    // In functions, DO, several at once.
    "DO $$ BEGIN CREATE TABLE made (id int PRIMARY KEY); EXECUTE 'ALTER TABLE made ADD COLUMN v text'; INSERT INTO made VALUES (1, 'x'); END $$",
    "CREATE FUNCTION make(n int) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
         EXECUTE format('CREATE TABLE %I (id int PRIMARY KEY, v text)', 'made_' || n); END $$;
     SELECT make(7); SELECT make(8); INSERT INTO made_7 VALUES (1, 'seven')",
    "BEGIN; SAVEPOINT a; CREATE TABLE never (id int PRIMARY KEY); ROLLBACK TO a; CREATE TABLE kept (id int PRIMARY KEY); COMMIT",
    "SET search_path = sales, public; CREATE TABLE unqualified (id int PRIMARY KEY); INSERT INTO unqualified VALUES (1);
     ALTER TABLE ordered ADD COLUMN note text; RESET search_path",
    // Indexes.
    "CREATE INDEX by_name ON client (name)",
    "CREATE INDEX CONCURRENTLY by_mail ON client (lower(mail))",
    "DROP INDEX CONCURRENTLY by_name",
    "ALTER INDEX by_mail RENAME TO by_lower_mail",
    // Sequences, identity, defaults.
    "CREATE SEQUENCE counter INCREMENT 5; CREATE TABLE counted (id int DEFAULT nextval('counter') PRIMARY KEY, v text);
     INSERT INTO counted (v) VALUES ('a'), ('b')",
    "CREATE TABLE ident (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, w int GENERATED ALWAYS AS (length(v)) STORED);
     INSERT INTO ident (v) VALUES ('abc')",
    // Types.
    "CREATE TYPE mood AS ENUM ('sad', 'ok')",
    "ALTER TABLE client ADD COLUMN mood mood DEFAULT 'ok'",
    "ALTER TYPE mood ADD VALUE 'happy' AFTER 'ok'",
    "UPDATE client SET mood = 'happy' WHERE id = 1",
    "CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE TYPE pair AS (a int, b positive);
     CREATE TABLE typed (id int PRIMARY KEY, d positive); INSERT INTO typed VALUES (1, 3)",
    "ALTER DOMAIN positive ADD CONSTRAINT small CHECK (VALUE < 1000)",
    // Views, functions, triggers, rules, policies.
    "CREATE OR REPLACE VIEW known AS SELECT id, name, mail FROM client",
    "CREATE VIEW sales.amounts AS SELECT count(*) AS orders FROM sales.ordered",
    "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := NEW.v || '!'; RETURN NEW; END $$;
     CREATE TRIGGER stamped BEFORE INSERT ON counted FOR EACH ROW EXECUTE FUNCTION stamp();
     INSERT INTO counted (v) VALUES ('c')",
    "ALTER TABLE counted ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON counted USING (v <> 'hidden')",
    "CREATE OR REPLACE FUNCTION make(n int) RETURNS void LANGUAGE sql AS 'SELECT'",
    // Partitions.
    "CREATE TABLE event (id int, at date NOT NULL, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
     CREATE TABLE event_2025 PARTITION OF event FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
     INSERT INTO event VALUES (1, '2025-05-05')",
    "CREATE TABLE event_2026 (id int, at date NOT NULL, PRIMARY KEY (id, at)); INSERT INTO event_2026 VALUES (2, '2026-02-02');
     ALTER TABLE event ATTACH PARTITION event_2026 FOR VALUES FROM ('2026-01-01') TO ('2027-01-01'); INSERT INTO event VALUES (3, '2026-03-03')",
    "ALTER TABLE event DETACH PARTITION event_2025; INSERT INTO event_2025 VALUES (4, '2025-06-06')",
    // Comments, privileges, schemas.
    "COMMENT ON TABLE client IS 'who buys'; COMMENT ON COLUMN client.name IS 'as they say it'",
    "GRANT SELECT ON client TO PUBLIC; GRANT USAGE ON SCHEMA sales TO PUBLIC",
    "ALTER SCHEMA sales RENAME TO trade; INSERT INTO trade.ordered (id, customer) VALUES (1000, 1)",
    "ALTER TABLE made SET SCHEMA trade; INSERT INTO trade.made VALUES (2, 'y')",
    "ALTER TABLE trade.ordered DROP CONSTRAINT ordered_customer_fkey",
    "DROP VIEW known; DROP FUNCTION make(int)",
    "DROP TABLE typed; DROP TYPE pair; CREATE TABLE typed (id int PRIMARY KEY); INSERT INTO typed VALUES (9)",
    "CREATE TABLE \"Ünder Score\" (\"Key!\" int PRIMARY KEY, \"a\"\"b\" text); INSERT INTO \"Ünder Score\" VALUES (1, 'x')",
    // Rows that no change carries.
    "CREATE TABLE selected AS SELECT id, name FROM client WHERE id < 50",
    "ALTER TABLE selected ADD PRIMARY KEY (id)",
    "ALTER TABLE client ADD COLUMN token uuid DEFAULT gen_random_uuid()",
    "UPDATE client SET name = 'behind the rewriting' WHERE id = 20",
    "CREATE MATERIALIZED VIEW summed AS SELECT count(*) FROM client",
];

/// Everything but what is ours, and what the two sides differ in on purpose.
const DUMPED: [&str; 6] = [
    "--schema-only",
    "--exclude-schema=dr_agent",
    "--no-publications",
    "--no-subscriptions",
    "--no-tablespaces",
    "--no-security-labels",
];

/// What `pg_dump` says of a database, without comments and event triggers of ours.
pub(crate) fn dumped(url: &str) -> String {
    let program = Binaries::newest_of_both().program("pg_dump");
    let output = Command::new(program).args(DUMPED).arg(url).output();
    let output = output.expect("pg_dump runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let statements = text
        .split(";\n")
        .filter(|statement| !statement.contains("EVENT TRIGGER dr_agent_"));
    let lines = statements.flat_map(str::lines);
    let kept =
        lines.filter(|line| !line.starts_with("--") && !line.is_empty() && !line.starts_with("\\"));
    kept.collect::<Vec<_>>().join("\n")
}

/// The shapes of all objects.
pub(crate) async fn shapes(client: &Client) -> Vec<String> {
    let shapes = client
        .column("SELECT concat_ws(' ', kind, names, args, hash) FROM dr_agent.shapes() ORDER BY 1")
        .await;
    assert!(!shapes.is_empty());
    shapes
}

fn without(ours: Vec<String>, theirs: &[String]) -> Vec<String> {
    ours.into_iter()
        .filter(|one| !theirs.contains(one))
        .collect()
}

/// Waits until the shapes of both sides are the same.
pub(crate) async fn expect_same_shapes(database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    wait_for("the same shapes on both sides", PATIENCE, async || {
        let (there, here) = (shapes(&source).await, shapes(&replica).await);
        let (lacks, has) = (without(there.clone(), &here), without(here, &there));
        match lacks.is_empty() && has.is_empty() {
            true => Ok(()),
            false => {
                let waiting = replica.column("SELECT identity || ': ' || reason FROM dr_agent.ddl_waiting").await;
                let outcomes = replica
                    .column(
                        "SELECT concat_ws(' ', id, outcome, tag, detail, query) FROM dr_agent.ddl_applied JOIN dr_agent.ddl USING (id)
                          ORDER BY id",
                    )
                    .await;
                let of = "SELECT identity || ' ' || dr_agent.shape(kind, names, args) FROM dr_agent.shapes() ORDER BY 1";
                let (there, here) = (source.column(of).await, replica.column(of).await);
                let (lacks, has) = (without(there.clone(), &here), without(here, &there));
                Err(format!("only on the source {lacks:#?}, only on the replica {has:#?}, waiting {waiting:#?}, {outcomes:#?}"))
            }
        }
    })
    .await;
}

/// Waits until every table of the source is replicated: those whose rows no change has carried are copied beside the stream.
pub(crate) async fn wait_for_all_tables(database: &Database) {
    let (source, replica) = (database.source().await, database.replica().await);
    let tables = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'dr_agent')";
    let ready = "SELECT count(*) FROM dr_agent.table_sync WHERE state = 'ready' AND table_schema <> 'dr_agent'";
    wait_for("every table to be replicated", PATIENCE, async || {
        let (there, here) = (source.number(tables).await, replica.number(ready).await);
        match there == here {
            true => Ok(()),
            false => {
                let aside = replica
                    .column("SELECT table_name || ': ' || reason FROM dr_agent.set_aside")
                    .await;
                let seen = "SELECT count(*) || ' ' || coalesce(sum(id), 0) FROM dr_agent.ddl";
                let commands = (source.value(seen).await, replica.value(seen).await);
                Err(format!(
                    "{here} of {there}; set aside: {aside:?}; commands there and here: {commands:?}"
                ))
            }
        }
    })
    .await;
}

pub(crate) fn replicating(config: AgentConfig) -> AgentConfig {
    config.set_text("source.ddl", "replicate")
}

/// Sends all of it, as fast as it goes.
async fn migrate(source: &Client) {
    for statements in MIGRATION {
        source.run(statements).await;
    }
}

/// Both sides are the same, in every respect.
async fn expect_the_same(database: &Database) {
    database.wait_caught_up().await;
    expect_same_shapes(database).await;
    wait_for_all_tables(database).await;
    database.expect_equal().await;
    assert_eq!(
        dumped(&database.source_url()),
        dumped(&database.replica_url())
    );
}

/// A database with what is there before, replicated under this configuration.
async fn begun(site: &Site, purpose: &str) -> (Database, Agent) {
    let database = site.database(purpose).await;
    database.source().await.run(BEFORE).await;
    let agent = Agent::new(replicating(database.config()));
    (database, agent)
}

/// Whether a record, or a log, has everything of it.
fn is_carried(statements: &&&str) -> bool {
    !statements.contains("selected") && !statements.contains("gen_random")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_migration_does_arrives_at_its_place() {
    let site = Site::shared().await;
    let (database, agent) = begun(&site, "ddl").await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    migrate(&database.source().await).await;
    expect_the_same(&database).await;
    agent.command(&["ddl"]).await.expect_code(0);
    // A table that was created empty was replicated from its first row on: nothing was copied for it.
    let replica = database.replica().await;
    let came = "SELECT snapshot_lsn IS NULL FROM dr_agent.table_sync WHERE table_name = 'made_7'";
    assert_eq!(replica.value(came).await.as_deref(), Some("t"));
    running.stop().await;
}

/// The agent is away while everything happens, and dies again and again on the way.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_on_the_way_ends_in_the_same_place() {
    const POINTS: [&str; 4] = [
        "barrier:applied",
        "apply:before-commit",
        "apply:after-commit",
        "barrier:committed",
    ];
    let site = Site::shared().await;
    let (database, agent) = begun(&site, "ddl_killed").await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.stop().await;
    let source = database.source().await;
    let parts = MIGRATION.chunks(MIGRATION.len().div_ceil(8));
    for (number, part) in parts.enumerate() {
        for statements in part {
            source.run(statements).await;
        }
        let point = format!("{}@{}", POINTS[number % POINTS.len()], 1 + number / 2);
        let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", &point)]);
        armed.expect_death_by_signal().await;
    }
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    expect_the_same(&database).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_records_and_a_promotion_that_drains_them() {
    let site = Site::shared().await;
    let database = site.database("ddl_records").await;
    let source = database.source().await;
    source.run(BEFORE).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 1).await;
    let route = Route::with_configuration(database.clone(), kinesalite.port(), || {
        replicating(database.config())
    });
    let (running, applying) = route.start().await;
    let (first, second) = MIGRATION.split_at(MIGRATION.len() / 2);
    for statements in first {
        source.run(statements).await;
    }
    database.wait_caught_up().await;
    wait_for_all_tables(&database).await;
    applying.stop().await;
    // The other half the promotion finds in the stream.
    for statements in second.iter().filter(is_carried) {
        source.run(statements).await;
    }
    route.wait_sent().await;
    running.stop().await;
    let promoted = ["promote", "--failover", "--json"];
    let promoted = route
        .applier
        .command_with(&promoted, &route.with(&[]))
        .await;
    promoted.expect_code(0);
    expect_same_shapes(&database).await;
    let replica = database.replica().await;
    compare::expect_same_content(&source, &replica).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_restores_it() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) =
        archive::protected_with(&site, "ddl_archive", BEFORE).await;
    running.stop().await;
    agent.configure("source.ddl", "\"replicate\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let source = database.source().await;
    for statements in MIGRATION.iter().filter(is_carried) {
        source.run(statements).await;
    }
    archive::wait_archived(&database, &archive).await;
    let restored = archive::restore(&database, &agent, "ddl_restored", &[]).await;
    restored.expect_code(0);
    let there = database.replica_server().client("ddl_restored").await;
    compare::expect_same_content(&source, &there).await;
    let url = database.replica_server().url("ddl_restored");
    assert_eq!(dumped(&database.source_url()), dumped(&url));
    running.stop().await;
}

/// The application is no superuser, and neither is the agent, on either side (14 demands one on the replica).
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_rights_of_a_superuser_follows_an_application_without_any() {
    let site = Site::own().await;
    let database = site.database("ddl_roles").await;
    let name = &database.name;
    let admin = database.source().await;
    admin
        .run(&format!(
            "CREATE ROLE ddl_app LOGIN; CREATE ROLE ddl_reader; ALTER DATABASE {name} OWNER TO ddl_app"
        ))
        .await;
    let source = Client::connect(&database.source_url().replace("postgres@", "ddl_app@")).await;
    source.run(BEFORE).await;
    source.run("GRANT SELECT ON customer TO ddl_reader").await;
    let as_agent = |url: String| url.replace("postgres@", "dr@");
    let config = replicating(database.config())
        .set_text("source.url", &as_agent(site.source.url("postgres")))
        .set_text("replica.url", &as_agent(site.replica.url("postgres")));
    let agent = Agent::new(config);
    let (there, here) = (site.source.url("postgres"), site.replica.url("postgres"));
    let init = ["init", "--source-url", &there, "--replica-url", &here];
    agent.command(&init).await.expect_code(0);
    let checked = agent.command(&["check"]).await;
    checked
        .expect_code(0)
        .expect_words(&["ddl_capture", "event triggers"]);
    let running = agent.start();
    running.wait_for_streaming(name).await;
    migrate(&source).await;
    source
        .run("GRANT SELECT ON client TO ddl_reader; GRANT UPDATE (note) ON item TO ddl_reader")
        .await;
    expect_the_same(&database).await;
    running.stop().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let promoted = Client::connect(&database.replica_url().replace("postgres@", "ddl_app@")).await;
    promoted
        .run("ALTER TABLE client ADD COLUMN later int; DROP TABLE made_7")
        .await;
}

/// What cannot be done on the replica waits, is named everywhere, and is done once a person has mended what it lacks.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_waits_and_is_named_until_it_is_mended() {
    let site = Site::shared().await;
    let (database, agent) = begun(&site, "ddl_waits").await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let (source, replica) = (database.source().await, database.writable_replica().await);
    // A function that is not on the replica, and what is built upon it.
    replica
        .run("CREATE VIEW in_the_way AS SELECT id, name FROM customer")
        .await;
    source
        .run("DROP VIEW known; ALTER TABLE customer ALTER name TYPE varchar(60)")
        .await;
    source
        .run("CREATE TABLE after (id int PRIMARY KEY); INSERT INTO after VALUES (1)")
        .await;
    wait_for("the command to wait", PATIENCE, async || {
        let waiting = replica
            .number("SELECT count(*) FROM dr_agent.ddl_waiting")
            .await;
        match waiting {
            0 => Err("nothing waits".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    // The rest goes on.
    wait_for("the table behind it", PATIENCE, async || {
        replica
            .try_rows("SELECT 1 FROM after")
            .await
            .and_then(|rows| match rows.len() {
                1 => Ok(()),
                other => Err(format!("{other} rows")),
            })
    })
    .await;
    let shown = agent.command(&["ddl"]).await;
    shown
        .expect_code(1)
        .expect_words(&["WAITING", "public.customer", "used by a view"]);
    let labels = [("database", database.name.as_str())];
    running
        .wait_for_metric("dr_agent_ddl_pending", &labels, |count| count >= 1.0)
        .await;
    let planned = agent.command(&["promote", "--failover", "--plan"]).await;
    planned.expect_words(&["NOT as on the source", "customer"]);
    replica.run("DROP VIEW in_the_way").await;
    let retried = agent
        .command(&["ddl", "retry", "--reason", "the view is gone"])
        .await;
    retried.expect_code(0);
    agent.command(&["ddl"]).await.expect_code(0);
    let kept = "SELECT count(*) FROM dr_agent.ddl_decided WHERE reason = 'the view is gone'";
    assert_eq!(replica.number(kept).await, 1);
    expect_the_same(&database).await;
    running.stop().await;
}
