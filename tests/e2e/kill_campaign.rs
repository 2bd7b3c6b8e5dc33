//! Goal: promises 1, 2, 3 and 8 while it streams and copies: whatever dies, and whenever, the replica comes to equal the source,
//! nothing lost, nothing doubled, and the slot is never told more than the progress row has.
//! Method: lives of several rounds with a seed each. Under a random workload, large transactions and late tables the agent, both
//! postmasters, single backends (the walsender, a lane) and connections die at random moments; at the end of every round all is
//! compared. `DR_AGENT_CAMPAIGN_ROUNDS` says how many rounds, `DR_AGENT_TEST_SEED` the first seed.

use std::time::Duration;

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::{differences, wait_caught_up};
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::rundir::signal;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::wait::{PATIENCE, wait_for, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::sleep;

/// Rounds that one database and its replica live.
const ROUNDS_OF_A_LIFE: u64 = 5;

const LARGE: &str = "
    CREATE TABLE large (id int PRIMARY KEY, v text, n int NOT NULL);
    CREATE TABLE keyless (a int, b text)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_the_replica_comes_to_equal_the_source() {
    let rounds = std::env::var("DR_AGENT_CAMPAIGN_ROUNDS");
    let rounds: u64 = rounds.map_or(5, |text| text.parse().expect("a number of rounds"));
    let first = seed();
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    for life in 0..rounds.div_ceil(ROUNDS_OF_A_LIFE) {
        let seed = first.wrapping_add(life);
        eprintln!("life {life}: DR_AGENT_TEST_SEED={seed}");
        let rounds = ROUNDS_OF_A_LIFE.min(rounds - life * ROUNDS_OF_A_LIFE);
        let mut life = Box::pin(Life::begin(&site, seed)).await;
        for round in 0..rounds {
            Box::pin(life.round(round)).await;
        }
        Box::pin(life.end()).await;
    }
}

/// One database, its agent, and the way between them.
struct Life<'a> {
    rng: StdRng,
    seed: u64,
    site: &'a Site,
    database: Database,
    to_source: Proxy,
    to_replica: Proxy,
    agent: Agent,
    running: Running,
    /// The rows of tables without a key are replicated.
    keyless: bool,
    /// Late tables without a key.
    late: Vec<String>,
}

impl<'a> Life<'a> {
    async fn begin(site: &'a Site, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let database = site.database("kills").await;
        let source = database.source().await;
        Workload::create_tables(&source).await;
        source.run(LARGE).await;
        let to_source = Proxy::start(site.source.port()).await;
        let to_replica = Proxy::start(site.replica.port()).await;
        let url = |server: &PgServer, proxy: &Proxy| server.url_through(proxy.port(), "postgres");
        let config = database
            .config()
            .set_text("source.url", &url(&site.source, &to_source))
            .set_text("replica.url", &url(&site.replica, &to_replica));
        let mut agent = Agent::new(config);
        let keyless = rng.random_bool(0.5);
        let lanes = ["1", "4"][rng.random_range(0..2)];
        eprintln!("  keyless rows {keyless}, lanes {lanes}");
        agent.configure(
            "source.keyless",
            ["\"exclude\"", "\"full\""][usize::from(keyless)],
        );
        agent.configure("replica.lanes", lanes);
        agent.configure("limits.batch_changes", "300");
        agent.configure("limits.spread_changes", "2");
        agent.configure("limits.transaction_bytes", "\"64KiB\"");
        agent.configure("limits.queue_bytes", "\"1MiB\"");
        agent.configure("limits.catch_up_bytes", "\"32KiB\"");
        let running = agent.start();
        Self {
            rng,
            seed,
            site,
            database,
            to_source,
            to_replica,
            agent,
            running,
            keyless,
            late: Vec::new(),
        }
    }

    async fn round(&mut self, round: u64) {
        eprintln!("  round {round}");
        let seed = self.seed.wrapping_mul(1_000).wrapping_add(round);
        let workload = Workload::start_surviving(&self.database.source_url(), seed, 3);
        for _ in 0..self.rng.random_range(2..5) {
            sleep(Duration::from_millis(self.rng.random_range(0..500))).await;
            Box::pin(self.something_happens()).await;
        }
        let tally = workload.stop().await;
        // The first copy of a life can be a while.
        let name = self.database.name.clone();
        self.running.wait_for_streaming(&name).await;
        self.expect_equal(tally.committed).await;
    }

    async fn something_happens(&mut self) {
        let what = self.rng.random_range(0..13);
        match what {
            0 | 1 => {
                eprintln!("    the agent dies");
                self.running.kill_alive();
                sleep(Duration::from_millis(self.rng.random_range(0..300))).await;
                self.running = self.agent.start();
            }
            2 => {
                eprintln!("    the replica dies");
                self.site.replica.kill();
                self.site.replica.start_again().await;
            }
            3 => {
                eprintln!("    the replica's postmaster dies");
                self.site.replica.kill_postmaster();
                self.site.replica.start_again().await;
            }
            4 => {
                eprintln!("    the source dies");
                self.site.source.kill();
                self.site.source.start_again().await;
            }
            5 => {
                eprintln!("    the source's postmaster dies, the agent as well");
                self.site.source.kill_postmaster();
                self.running.kill_alive();
                self.site.source.start_again().await;
                self.running = self.agent.start();
            }
            6 => {
                let pid = "SELECT active_pid FROM pg_replication_slots
                            WHERE database = current_database() AND active_pid IS NOT NULL";
                Box::pin(self.a_backend_dies("the walsender", &self.site.source, pid)).await;
            }
            7 => {
                let pid = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                              AND application_name LIKE 'dr%' ORDER BY random() LIMIT 1";
                Box::pin(self.a_backend_dies("a session", &self.site.replica, pid)).await;
            }
            8 | 9 => Box::pin(self.the_network_fails()).await,
            10 => {
                let milliseconds = self.rng.random_range(50..400);
                eprintln!("    the agent stands still for {milliseconds} ms");
                self.running.pause();
                sleep(Duration::from_millis(milliseconds)).await;
                self.running.resume();
            }
            11 => {
                eprintln!("    a large transaction");
                let large = self.large();
                let _ = self.on_source(&large).await;
            }
            _ => Box::pin(self.a_late_table()).await,
        }
    }

    /// A session of a server that may be starting.
    async fn session(&self, server: &PgServer) -> Client {
        wait_for("the server to accept sessions", PATIENCE, || async {
            Client::try_connect(&server.url(&self.database.name)).await
        })
        .await
    }

    /// Not what is promised, but what an application would do: it may fail because the server dies.
    async fn on_source(&self, sql: &str) -> Result<(), String> {
        self.session(&self.site.source).await.try_run(sql).await
    }

    fn large(&mut self) -> String {
        let rng = &mut self.rng;
        let (rows, cut) = (rng.random_range(3_000..12_000), rng.random_range(1..5));
        format!(
            "BEGIN;
             INSERT INTO large SELECT g, md5(g::text), 0 FROM generate_series(1, {rows}) AS g
                 ON CONFLICT (id) DO UPDATE SET n = large.n + 1;
             INSERT INTO keyless SELECT g % 7, 'x' FROM generate_series(1, 300) AS g;
             SAVEPOINT s; DELETE FROM large WHERE id % 3 = 0; ROLLBACK TO s;
             DELETE FROM large WHERE id % 5 = {cut};
             UPDATE large SET n = n + 1, v = v || '.' WHERE id % 2 = 0;
             COMMIT"
        )
    }

    async fn a_late_table(&mut self) {
        let name = format!("late_{}", self.rng.random_range(0..1_000_000_000_u64));
        let keyed = self.rng.random_bool(0.6);
        eprintln!("    a late table, with a key: {keyed}");
        let key = if keyed { "PRIMARY KEY" } else { "" };
        let create = format!(
            "CREATE TABLE {name} (id int {key}, v text);
             INSERT INTO {name} SELECT g, 'copied' FROM generate_series(1, 2000) AS g"
        );
        if self.on_source(&create).await.is_ok() {
            if !keyed {
                self.late.push(format!("public.{name}"));
            }
            // The copy has begun or has not.
            sleep(Duration::from_millis(self.rng.random_range(0..700))).await;
            let grow = format!(
                "INSERT INTO {name} SELECT g, 'late' FROM generate_series(2001, 3000) AS g"
            );
            let _ = self.on_source(&grow).await;
        }
    }

    async fn a_backend_dies(&self, which: &str, server: &PgServer, pid: &str) {
        let found = match Client::try_connect(&server.url(&self.database.name)).await {
            Ok(client) => client.try_rows(pid).await.unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        let pid = found.first().and_then(|row| row[0].as_ref()?.parse().ok());
        eprintln!("    {which} dies: {pid:?}");
        if let Some(pid) = pid {
            // The server ends every other session and recovers; a session that begins before it has noticed ends with them.
            signal("KILL", &[pid]);
            let process = format!("/proc/{pid}");
            wait_until("the postmaster to notice", PATIENCE, || async {
                !std::path::Path::new(&process).exists()
            })
            .await;
        }
    }

    async fn the_network_fails(&mut self) {
        let (proxy, which) = match self.rng.random_bool(0.5) {
            true => (&self.to_source, "source"),
            false => (&self.to_replica, "replica"),
        };
        let silent = self.rng.random_bool(0.4);
        let milliseconds = self.rng.random_range(20..400);
        eprintln!("    the way to the {which} fails for {milliseconds} ms, silently: {silent}");
        match silent {
            true => proxy.black_hole(),
            false => proxy.cut(),
        }
        sleep(Duration::from_millis(milliseconds)).await;
        proxy.cut();
        proxy.heal();
    }

    async fn expect_equal(&self, committed: u64) {
        let (source, replica) = tokio::join!(
            self.session(&self.site.source),
            self.session(&self.site.replica)
        );
        let stream = self.database.stream();
        wait_caught_up(&source, &replica, &stream).await;
        let mut without = vec!["public.keyless"];
        without.extend(self.late.iter().map(String::as_str));
        let without = match self.keyless {
            true => &[][..],
            false => &without,
        };
        // A late table is copied beside the stream.
        wait_for("source and replica to be equal", PATIENCE, || async {
            let found = differences(&source, &replica, without).await;
            if found.is_empty() { Ok(()) } else { Err(found) }
        })
        .await;
        let ledger = source.number("SELECT count(*) FROM ledger").await;
        assert!(
            ledger.unsigned_abs() >= committed,
            "the source lost a commit"
        );
        assert!(replica.holds(BALANCED).await);
        let confirmed = format!(
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{stream}'"
        );
        let confirmed = source.value(&confirmed).await.expect("the slot is there");
        // A late table that is being copied has a row of its own.
        let told = format!(
            "SELECT stream, end_lsn, end_lsn >= '{confirmed}' FROM dr_agent.progress WHERE stream = '{stream}'"
        );
        let told = replica.rows(&told).await;
        assert!(
            told.len() == 1 && told[0][2].as_deref() == Some("t"),
            "the slot confirmed {confirmed}, the progress row has {told:?}"
        );
    }

    async fn end(mut self) {
        self.running.kill_alive();
        let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'dr\\_agent:%'";
        let replica = self.site.replica.client("postgres").await;
        // A batch of the heartbeat may be under way: it is settled by the next start, here by hand.
        eprintln!("  prepared at the end: {}", replica.number(prepared).await);
        self.running = self.agent.start();
        let name = self.database.name.clone();
        self.running.wait_for_streaming(&name).await;
        self.running.stop().await;
        assert_eq!(replica.number(prepared).await, 0);
        self.database.drop_slot().await;
        let drop = format!("DROP DATABASE {name} WITH (FORCE)");
        replica.run(&drop).await;
        self.site.source.run("postgres", &drop).await;
    }
}
