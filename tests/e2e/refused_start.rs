//! Goal: a start that is refused, or fails, has changed nothing: not on the server that `replica.url` names by mistake, not on
//! the source, and not on the pair that was right.
//! Method: a table of mistakes; each is tried with every command that could write, and the catalogs of both servers are compared
//! by content before and after, stored settings, roles, slots, publications and replica identities included.

use std::collections::BTreeMap;

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::archive;
use dr_agent_tests::client::Client;
use dr_agent_tests::server::PgServer;
use dr_agent_tests::site::Site;

/// What a start could write outside the tables of a database.
const OF_SERVER: &[(&str, &str)] = &[
    ("databases", "SELECT datname || ' ' || pg_get_userbyid(datdba) || coalesce(datacl::text, '') FROM pg_database"),
    (
        "stored settings",
        "SELECT coalesce(d.datname, '') || ' ' || s.setrole::regrole::text || ' ' || s.setconfig::text
           FROM pg_db_role_setting s LEFT JOIN pg_database d ON d.oid = s.setdatabase",
    ),
    ("roles", "SELECT to_jsonb(r)::text FROM pg_authid r"),
    ("memberships", "SELECT to_jsonb(m)::text FROM pg_auth_members m"),
    ("slots", "SELECT slot_name || ' ' || coalesce(confirmed_flush_lsn::text, '') FROM pg_replication_slots WHERE NOT temporary"),
    ("prepared", "SELECT gid FROM pg_prepared_xacts"),
];

/// What it could write inside.
const OF_DATABASE: &[(&str, &str)] = &[
    ("schemas", "SELECT nspname || ' ' || pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp'"),
    (
        "relations",
        "SELECT oid::text || ' ' || relname || ' ' || relreplident::text || ' ' || relkind::text || ' ' || pg_get_userbyid(relowner)
           FROM pg_class WHERE oid >= 16384",
    ),
    ("functions", "SELECT oid::regprocedure::text FROM pg_proc WHERE oid >= 16384"),
    ("publications", "SELECT to_jsonb(p)::text FROM pg_publication p"),
    ("published", "SELECT to_jsonb(p)::text FROM pg_publication_tables p"),
];

type State = BTreeMap<String, Vec<String>>;

async fn state(server: &PgServer) -> State {
    let mut state = State::new();
    let postgres = server.client("postgres").await;
    for (what, sql) in OF_SERVER {
        let rows = postgres.column(&format!("{sql} ORDER BY 1")).await;
        state.insert((*what).to_owned(), rows);
    }
    let databases = "SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1";
    for database in postgres.column(databases).await {
        if database == "template1" {
            continue;
        }
        let client = server.client(&database).await;
        for (what, sql) in OF_DATABASE {
            let rows = client.column(&format!("{sql} ORDER BY 1")).await;
            state.insert(format!("{what} of {database}"), rows);
        }
        // Rows of ours: a heartbeat or a note would be a write as well.
        let ours = "SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = to_regnamespace('dr_agent') AND relkind = 'r'";
        for table in client.column(ours).await {
            let rows = client
                .column(&format!("SELECT t::text FROM {table} t ORDER BY 1"))
                .await;
            state.insert(format!("{table} of {database}"), rows);
        }
    }
    state
}

fn expect_same(before: &State, after: &State, case: &str) {
    for (what, rows) in before {
        assert_eq!(after.get(what), Some(rows), "{case}: {what}");
    }
    assert_eq!(before.len(), after.len(), "{case}: {:?}", after.keys());
}

/// Both servers of a case, and what is started on them.
struct Case<'a> {
    name: &'a str,
    config: AgentConfig,
    /// Of what is said.
    words: &'a [&'a str],
    /// `init` is refused as well.
    init: bool,
}

impl Case<'_> {
    async fn expect_nothing_changed(&self, servers: &[&PgServer]) {
        let mut before = Vec::new();
        for server in servers {
            before.push(state(server).await);
        }
        let agent = Agent::new(self.config.clone());
        let mut commands = vec![&["run"][..]];
        if self.init {
            commands.push(&["init"]);
        } else {
            commands.push(&["init", "--plan"]);
        }
        for arguments in commands {
            let what = format!("{}: {arguments:?}", self.name);
            let said = if arguments == ["run"] {
                let running = agent.start();
                running.wait_for_log(&["stopped", "hint"]).await;
                let said = running.log();
                running.stop().await;
                said
            } else {
                let outcome = agent.command(arguments).await;
                if self.init {
                    outcome.expect_code(1);
                }
                outcome.text()
            };
            if self.init || arguments == ["run"] {
                let said = said.to_lowercase();
                for word in self.words {
                    assert!(said.contains(word), "{what}: {word:?} in {said}");
                }
                assert!(!said.contains("drop database"), "{what}: {said}");
            }
            for (server, before) in servers.iter().zip(&before) {
                expect_same(before, &state(server).await, &what);
            }
        }
    }
}

/// A source with a role and a keyless table of its own, so that there is something to write for every step.
async fn prepare_source(source: &Client) {
    source
        .run(
            "DO $$ BEGIN CREATE ROLE refused_app; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
             CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE log (line text); ALTER TABLE t OWNER TO refused_app",
        )
        .await;
}

#[tokio::test]
async fn a_refused_start_has_changed_nothing_anywhere() {
    let site = Site::own().await;
    let right = site.database("refused").await;
    let name = right.name.clone();
    prepare_source(&right.source().await).await;
    let servers = [&*site.source, &*site.replica];
    let config = |source: &str, replica: &str| {
        AgentConfig::new(source, replica)
            .databases(&[&name])
            .slot("refused")
            .set_text("source.keyless", "full")
    };
    let (of_source, of_replica) = (site.source.url("postgres"), site.replica.url("postgres"));
    let case = |case: &'static str, words: &'static [&'static str]| Case {
        name: case,
        config: config(&of_source, &of_replica),
        words,
        init: true,
    };

    let mut same = case("one server under both URLs", &["same server"]);
    same.config = config(&of_source, &of_source);
    same.expect_nothing_changed(&servers).await;

    let mut keyless = case("nobody has decided about keyless tables", &["keyless"]);
    keyless.config = keyless.config.set_text("source.keyless", "refuse");
    keyless.expect_nothing_changed(&servers).await;

    right
        .source()
        .await
        .run("CREATE PUBLICATION refused_x FOR ALL TABLES")
        .await;
    let mut all = case(
        "a publication of our name for all tables",
        &["for all tables"],
    );
    all.config = all.config.slot("refused_x");
    let stream = all.config.stream(&name);
    right
        .source()
        .await
        .run(&format!(
            "ALTER PUBLICATION refused_x RENAME TO \"{stream}\""
        ))
        .await;
    all.expect_nothing_changed(&servers).await;

    let stream = case("", &[]).config.stream(&name);
    let slot = format!("SELECT pg_create_logical_replication_slot('{stream}', 'pgoutput')");
    right.source().await.rows(&slot).await;
    case("a slot of our name that is somebody's", &["exists already"])
        .expect_nothing_changed(&servers)
        .await;
    let drop = format!("SELECT pg_drop_replication_slot('{stream}')");
    right.source().await.rows(&drop).await;

    // From here on the replica's server has a database of that name: somebody's production.
    site.replica.create_database(&name).await;
    let foreign = site.replica.client(&name).await;
    for (what, create, drop) in [
        (
            "tables",
            "CREATE TABLE account (id int)",
            "DROP TABLE account",
        ),
        (
            "functions only",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "DROP FUNCTION f()",
        ),
        ("a sequence only", "CREATE SEQUENCE s", "DROP SEQUENCE s"),
        (
            "large objects only",
            "SELECT lo_create(7)",
            "SELECT lo_unlink(7)",
        ),
    ] {
        foreign.run(create).await;
        let mut case = case("", &["not empty", "nothing was written"]);
        case.name = what;
        case.expect_nothing_changed(&servers).await;
        foreign.run(drop).await;
    }

    // Rights that are missing on either side.
    site.replica
        .run(
            "postgres",
            "CREATE ROLE weak LOGIN; CREATE ROLE strong LOGIN CREATEDB",
        )
        .await;
    let as_role = |role: &str| of_replica.replace("postgres@", &format!("{role}@"));
    let mut owner = case(
        "the replica's database is another role's",
        &["ownership of database"],
    );
    owner.config = config(&of_source, &as_role("weak"));
    owner.init = false;
    owner.expect_nothing_changed(&servers).await;
    site.replica
        .run(&name, &format!("ALTER DATABASE \"{name}\" OWNER TO weak"))
        .await;
    // Before 15 no privilege, but an attribute is missing.
    let lacking: &'static [&'static str] = match site.replica.major() {
        ..15 => &["attribute superuser"],
        _ => &["session_replication_role"],
    };
    let mut parameter = case("triggers cannot be silenced", lacking);
    parameter.config = config(&of_source, &as_role("weak"));
    parameter.init = false;
    parameter.expect_nothing_changed(&servers).await;
    site.source
        .run(
            "postgres",
            "CREATE ROLE reader LOGIN REPLICATION IN ROLE pg_read_all_data",
        )
        .await;
    let mut publish = case(
        "the source's role may not publish",
        &["create schema dr_agent"],
    );
    publish.config = config(&of_source.replace("postgres@", "reader@"), &of_replica);
    publish.init = false;
    publish.expect_nothing_changed(&servers).await;
}

#[tokio::test]
async fn swapped_urls_and_a_renamed_stream_are_called_by_their_names() {
    let site = Site::with(
        dr_agent_tests::server::ServerOptions::source(),
        dr_agent_tests::server::ServerOptions::replica()
            .of_another_cluster()
            .set("wal_level", "logical"),
    )
    .await;
    let right = site.database("swapped").await;
    let name = right.name.clone();
    prepare_source(&right.source().await).await;
    let (of_source, of_replica) = (site.source.url("postgres"), site.replica.url("postgres"));
    let config = |source: &str, replica: &str, slot: &str| {
        AgentConfig::new(source, replica)
            .databases(&[&name])
            .slot(slot)
            .set_text("source.keyless", "full")
    };
    let agent = Agent::new(config(&of_source, &of_replica, "swap"));
    let running = agent.start();
    running.wait_for_streaming(&name).await;
    running.stop().await;
    let servers = [&*site.source, &*site.replica];
    let cases = [
        (
            "swapped",
            config(&of_replica, &of_source, "swap"),
            &["is itself", "swapped"][..],
        ),
        (
            "source.slot was changed",
            config(&of_source, &of_replica, "other"),
            &["is the replica of", "source.slot"][..],
        ),
    ];
    for (name, config, words) in cases {
        let case = Case {
            name,
            config,
            words,
            init: true,
        };
        case.expect_nothing_changed(&servers).await;
    }

    // The progress row alone is gone: no promotion, and no empty database either.
    let replica = site.replica.client(&name).await;
    replica.run("SET default_transaction_read_only = off").await;
    replica.run("DELETE FROM dr_agent.progress").await;
    let slot = format!(
        "SELECT pg_drop_replication_slot('{}')",
        agent.config().stream(&name)
    );
    right.source().await.rows(&slot).await;
    let case = Case {
        name: "the progress row is gone",
        config: agent.config().clone(),
        words: &["progress row", "no promotion has happened"],
        init: true,
    };
    let agent = Agent::new(case.config.clone());
    let before = state(&site.replica).await;
    for arguments in [&["init"][..], &["init", "--plan"]] {
        let outcome = agent.command(arguments).await;
        outcome.expect_code(1);
        for word in case.words {
            outcome.expect_words(&[word]);
        }
        expect_same(&before, &state(&site.replica).await, case.name);
    }
}

#[tokio::test]
async fn a_start_that_fails_takes_back_what_it_has_written() {
    let site = Site::own().await;
    let right = site.database("failed").await;
    let source = right.source().await;
    prepare_source(&source).await;
    let servers = [&*site.source, &*site.replica];
    let mut before = Vec::new();
    for server in servers {
        before.push(state(server).await);
    }
    // A transaction that has written keeps the slot from being created; then the agent is told to stop.
    source.run("BEGIN; INSERT INTO t VALUES (1)").await;
    let config = right.config().set_text("source.keyless", "full");
    let agent = Agent::new(config);
    let running = agent.start();
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'walsender' AND wait_event_type = 'Lock'";
    let watching = site.source.client("postgres").await;
    dr_agent_tests::wait::wait_until(
        "the slot is waited for",
        dr_agent_tests::wait::PATIENCE,
        || watching.holds(waits),
    )
    .await;
    running.stop().await;
    source.run("ROLLBACK").await;
    for (server, before) in servers.iter().zip(&before) {
        expect_same(
            before,
            &state(server).await,
            "stopped before the slot was there",
        );
    }
    // And the same start succeeds afterwards.
    let running = agent.start();
    running.wait_for_streaming(&right.name).await;
    running.stop().await;
}

#[tokio::test]
async fn a_restore_onto_somebody_elses_database_changes_nothing() {
    let site = Site::shared().await;
    let (database, _archive, agent, running) = archive::protected(&site, "refused_restore").await;
    running.stop().await;
    let target = format!("{}_target", database.name);
    site.replica.create_database(&target).await;
    let client = site.replica.client(&target).await;
    client
        .run("CREATE TABLE account (id int); INSERT INTO account VALUES (1)")
        .await;
    let catalogs = async || {
        let mut rows = Vec::new();
        for (_, sql) in OF_DATABASE {
            rows.extend(client.column(&format!("{sql} ORDER BY 1")).await);
        }
        rows
    };
    let before = catalogs().await;
    for url in [
        site.replica.url(&target),
        site.replica.url(&database.name),
        site.source.url(&database.name),
    ] {
        let outcome = archive::restore_at(&agent, &url, &[]).await;
        outcome.expect_code(1).expect_words(&["empty"]);
    }
    assert_eq!(before, catalogs().await);
}
