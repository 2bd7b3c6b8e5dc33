//! Random concurrent transactions: what an application does to a database, and worse.
//!
//! Several sessions run transactions of random statements over tables chosen for what is hard to
//! replicate: savepoints and partial rollbacks, aborts, key changes, unique values handed from row to row, deletes
//! followed by inserts, unchanged TOAST, moves between partitions, duplicates without a key, TRUNCATE, COPY and
//! two-phase commit. Errors (deadlocks, unique violations) are part of it: the transaction is rolled back.
//!
//! # Invariants
//! - Every committed transaction, and no other, leaves one row in `ledger`; [`Tally::committed`] counts them.
//! - The balances of `account` and `savings` together are zero after every transaction.
//! - No prepared transaction is left behind by [`Workload::stop`], the server being there.
//! - Where the server may die ([`Workload::start_surviving`]), a session connects again and ends what it had prepared; what became of
//!   a COMMIT that was under way it does not know, and the tally counts it as rolled back.
//!
//! # What it does not do
//! The seed decides what each session tries, not how sessions interleave: a failure is
//! repeatable in kind, not step by step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::wait::{PATIENCE, wait_for, wait_until};

/// The tables, and the rows that always exist.
const SCHEMA: &str = "
    CREATE TABLE ledger (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        session int NOT NULL, xid bigint NOT NULL DEFAULT txid_current());
    CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
    CREATE TABLE savings (id text PRIMARY KEY, balance bigint NOT NULL);
    CREATE TABLE item (a int, b int, value numeric, PRIMARY KEY (b, a));
    CREATE TABLE bag (a int, b text);
    ALTER TABLE bag REPLICA IDENTITY FULL;
    CREATE TABLE place (id int PRIMARY KEY, rank int NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE nick (id int PRIMARY KEY, nick text UNIQUE);
    CREATE TABLE document (id int PRIMARY KEY, title text, body text);
    ALTER TABLE document ALTER COLUMN body SET STORAGE EXTERNAL;
    CREATE TABLE event (id int, region int, payload text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
    CREATE TABLE event_0 PARTITION OF event FOR VALUES IN (0);
    CREATE TABLE event_1 PARTITION OF event FOR VALUES IN (1);
    CREATE TABLE event_rest PARTITION OF event DEFAULT;
    CREATE TABLE parent (id serial PRIMARY KEY, name text);
    CREATE TABLE child (id serial PRIMARY KEY, parent int NOT NULL REFERENCES parent);
    INSERT INTO account SELECT g, 0 FROM generate_series(1, 40) AS g;
    INSERT INTO savings SELECT 's' || g, 0 FROM generate_series(1, 40) AS g;
    INSERT INTO place SELECT g, g FROM generate_series(0, 19) AS g;
    INSERT INTO nick SELECT g, 'n' || g FROM generate_series(1, 20) AS g;
    INSERT INTO document SELECT g, 'first', repeat(md5(g::text), 640) FROM generate_series(1, 20) AS g;
    INSERT INTO event SELECT g, g % 4, 'first' FROM generate_series(1, 100) AS g;
    INSERT INTO item SELECT g, g % 5, g FROM generate_series(1, 100) AS g;
    INSERT INTO bag (a, b) SELECT g % 7, 'first' FROM generate_series(1, 40) AS g";

/// What must hold on either side at any commit.
pub const BALANCED: &str =
    "SELECT (SELECT sum(balance) FROM account) + (SELECT sum(balance) FROM savings) = 0";

/// What the sessions did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Transactions whose COMMIT or COMMIT PREPARED succeeded: as many rows are in `ledger`.
    pub committed: u64,
    /// Rolled back on purpose or after an error.
    pub rolled_back: u64,
}

/// Sessions at work; ends with [`Workload::stop`].
pub struct Workload {
    over: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    sessions: Vec<JoinHandle<Tally>>,
}

/// The seed of this run: `DR_AGENT_TEST_SEED`, or a new one. Printed, and shown when the test fails.
pub fn seed() -> u64 {
    let seed = match std::env::var("DR_AGENT_TEST_SEED") {
        Ok(text) => text.parse().expect("DR_AGENT_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    eprintln!("DR_AGENT_TEST_SEED={seed}");
    seed
}

impl Workload {
    /// Creates the tables and their first rows.
    pub async fn create_tables(source: &Client) {
        source.run(SCHEMA).await;
    }

    /// Lets `sessions` sessions loose on the database.
    pub fn start(url: &str, seed: u64, sessions: u32) -> Self {
        Self::start_with(url, seed, sessions, false)
    }

    /// The same, on a server that dies and comes back.
    pub fn start_surviving(url: &str, seed: u64, sessions: u32) -> Self {
        Self::start_with(url, seed, sessions, true)
    }

    fn start_with(url: &str, seed: u64, sessions: u32, survives: bool) -> Self {
        static WORKLOADS: AtomicU32 = AtomicU32::new(0);
        let workload = WORKLOADS.fetch_add(1, Ordering::Relaxed);
        let over = Arc::new(AtomicBool::new(false));
        let committed = Arc::new(AtomicU64::new(0));
        let sessions = (0..sessions)
            .map(|number| {
                let session = Session {
                    url: url.to_owned(),
                    workload,
                    number,
                    rng: StdRng::seed_from_u64(seed ^ (u64::from(number) << 32)),
                    over: Arc::clone(&over),
                    committed: Arc::clone(&committed),
                    survives,
                };
                tokio::spawn(session.work())
            })
            .collect();
        Self {
            over,
            committed,
            sessions,
        }
    }

    /// Transactions committed so far.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// Waits until so many have committed: a slow machine takes its time.
    pub async fn wait_for_committed(&self, least: u64) {
        wait_until("the workload to get that far", 5 * PATIENCE, || async {
            self.committed() >= least
        })
        .await;
    }

    /// Lets every session finish its transaction, and adds up.
    pub async fn stop(self) -> Tally {
        self.over.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for session in self.sessions {
            let tally = session.await.expect("a session of the workload has failed");
            sum.committed += tally.committed;
            sum.rolled_back += tally.rolled_back;
        }
        sum
    }
}

struct Session {
    url: String,
    /// Names of prepared transactions hold for a whole server.
    workload: u32,
    number: u32,
    rng: StdRng,
    over: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    survives: bool,
}

/// Whether an error says that the session is gone, and not that a statement failed.
fn is_loss(error: &str) -> bool {
    let signs = [
        "57P0",
        "connection ",
        "error connecting",
        "error communicating",
    ];
    signs.iter().any(|sign| error.starts_with(sign))
}

impl Session {
    async fn connect(&self) -> Result<Client, String> {
        let client = Client::try_connect(&self.url).await?;
        // Deadlocks are wanted, waiting for them is not.
        client
            .try_run("SET deadlock_timeout = '30ms'; SET lock_timeout = '2s'")
            .await?;
        Ok(client)
    }

    /// Once the server is there again; what was prepared when it went is ended.
    async fn connect_again(&self) -> Client {
        let (workload, session) = (self.workload, self.number);
        let left = format!(
            "SELECT gid FROM pg_prepared_xacts
              WHERE database = current_database() AND gid LIKE 'workload-{workload}-{session}-%'"
        );
        wait_for("the server to be there again", PATIENCE, || async {
            let client = self.connect().await?;
            for row in client.try_rows(&left).await? {
                let gid = row[0].as_deref().unwrap_or_default();
                client.try_run(&format!("COMMIT PREPARED '{gid}'")).await?;
            }
            Ok(client)
        })
        .await
    }

    async fn work(mut self) -> Tally {
        let mut client = match self.survives {
            true => self.connect_again().await,
            false => self.connect().await.expect("the server is there"),
        };
        let mut tally = Tally::default();
        for transaction in 0_u64.. {
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            match self.transaction(&client, transaction).await {
                Ok(true) => {
                    tally.committed += 1;
                    self.committed.fetch_add(1, Ordering::Relaxed);
                }
                Ok(false) => tally.rolled_back += 1,
                Err(error) if self.survives && is_loss(&error) => {
                    client = self.connect_again().await;
                    tally.rolled_back += 1;
                }
                Err(error) => {
                    // Class 08 or no class: the server is gone, and with it the test's premise.
                    let expected = ["23", "40", "55", "57014", "25P02"];
                    assert!(
                        expected.iter().any(|class| error.starts_with(class)),
                        "a session of the workload failed: {error}"
                    );
                    // Outside a transaction (after a failed COMMIT) this is only a warning.
                    if client.try_run("ROLLBACK").await.is_err() {
                        assert!(self.survives, "the server is gone");
                        client = self.connect_again().await;
                    }
                    tally.rolled_back += 1;
                }
            }
        }
        tally
    }

    /// `true` when committed.
    async fn transaction(&mut self, client: &Client, number: u64) -> Result<bool, String> {
        client.try_run("BEGIN").await?;
        for _ in 0..self.rng.random_range(1..=5) {
            self.step(client, 0).await?;
        }
        let (workload, session) = (self.workload, self.number);
        let ledger = format!("INSERT INTO ledger (session) VALUES ({session})");
        client.try_run(&ledger).await?;
        match self.rng.random_range(0..100) {
            0..10 => client.try_run("ROLLBACK").await.map(|()| false),
            10..20 => {
                let name = format!("workload-{workload}-{session}-{number}");
                client
                    .try_run(&format!("PREPARE TRANSACTION '{name}'"))
                    .await?;
                let commit = self.rng.random_bool(0.7);
                let end = if commit { "COMMIT" } else { "ROLLBACK" };
                client.try_run(&format!("{end} PREPARED '{name}'")).await?;
                Ok(commit)
            }
            _ => client.try_run("COMMIT").await.map(|()| true),
        }
    }

    /// One statement, or several below a savepoint, which may be rolled back.
    async fn step(&mut self, client: &Client, depth: u32) -> Result<(), String> {
        if depth < 3 && self.rng.random_bool(0.25) {
            client.try_run(&format!("SAVEPOINT s{depth}")).await?;
            let mut outcome = Ok(());
            for _ in 0..self.rng.random_range(1..=3) {
                outcome = Box::pin(self.step(client, depth + 1)).await;
                if outcome.is_err() {
                    break;
                }
            }
            // After an error the rest of the transaction can still be saved.
            let undo = outcome.is_err() || self.rng.random_bool(0.4);
            let end = if undo { "ROLLBACK TO" } else { "RELEASE" };
            return client.try_run(&format!("{end} s{depth}")).await;
        }
        let statement = self.statement();
        client.try_run(&statement).await
    }

    fn statement(&mut self) -> String {
        let rng = &mut self.rng;
        let (i, j) = (rng.random_range(1..=40), rng.random_range(1..=40));
        let (small, other) = (rng.random_range(0..20), rng.random_range(0..20));
        let amount = rng.random_range(1..1000);
        let body = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 640))";
        match rng.random_range(0..1000) {
            0..150 => format!(
                "UPDATE account SET balance = balance - {amount} WHERE id = {i};
                 UPDATE savings SET balance = balance + {amount} WHERE id = 's{j}'"
            ),
            150..230 => format!(
                "INSERT INTO item VALUES ({i}, {small}, {amount}.5)
                 ON CONFLICT (b, a) DO UPDATE SET value = excluded.value"
            ),
            230..270 => format!(
                "INSERT INTO item SELECT g, {small}, g / 3.0 FROM generate_series({i}, {i} + 20) AS g
                 ON CONFLICT DO NOTHING"
            ),
            270..300 => format!("DELETE FROM item WHERE a = {i}"),
            300..340 => format!("UPDATE item SET a = a + 50, value = NULL WHERE a = {i} AND b = {small}"),
            340..370 => format!(
                "DELETE FROM item WHERE a = {i} AND b = {small};
                 INSERT INTO item VALUES ({i}, {small}, 'NaN')"
            ),
            370..430 => format!(
                "INSERT INTO bag (a, b) VALUES ({small}, 'x'), ({small}, 'x'), ({small}, NULL), (NULL, 'x')"
            ),
            430..470 => format!(
                "UPDATE bag SET b = 'y{other}' WHERE ctid = (SELECT ctid FROM bag WHERE a = {small} LIMIT 1)"
            ),
            470..500 => format!("UPDATE bag SET a = a + 1 WHERE a = {small}"),
            500..530 => format!(
                "DELETE FROM bag WHERE ctid = (SELECT ctid FROM bag WHERE a = {small} OR b IS NULL LIMIT 1)"
            ),
            530..550 => format!("DELETE FROM bag WHERE a = {small}"),
            550..600 => format!(
                "UPDATE place SET rank = (SELECT p.rank FROM place AS p
                     WHERE p.id = CASE place.id WHEN {small} THEN {other} ELSE {small} END)
                 WHERE id IN ({small}, {other})"
            ),
            600..610 => "UPDATE place SET rank = (rank + 1) % 20".to_owned(),
            610..650 => format!(
                "UPDATE nick SET nick = NULL WHERE nick = 'n{small}';
                 UPDATE nick SET nick = 'n{small}' WHERE id = {other}"
            ),
            650..680 => format!(
                "DELETE FROM nick WHERE nick = 'n{small}';
                 INSERT INTO nick VALUES ({other}, 'n{small}')
                 ON CONFLICT (id) DO UPDATE SET nick = excluded.nick"
            ),
            680..730 => format!("UPDATE document SET title = 't{amount}' WHERE id = {i}"),
            730..750 => format!("UPDATE document SET body = {body} WHERE id = {i}"),
            750..770 => format!("UPDATE document SET id = {j} WHERE id = {i}"),
            770..790 => format!("INSERT INTO document VALUES ({i}, 'new', {body}) ON CONFLICT DO NOTHING"),
            790..800 => format!("DELETE FROM document WHERE id = {i}"),
            800..840 => format!(
                "INSERT INTO event VALUES ({amount}, {amount} % 5, 'p{small}') ON CONFLICT DO NOTHING"
            ),
            840..880 => format!("UPDATE event SET region = (region + 1) % 5 WHERE id = {amount} % 100"),
            880..900 => format!("UPDATE event SET payload = 'q{small}' WHERE id % 50 = {i}"),
            900..920 => format!("DELETE FROM event WHERE id = {amount}"),
            920..960 => format!(
                "WITH p AS (INSERT INTO parent (name) VALUES ('{amount}') RETURNING id)
                 INSERT INTO child (parent) SELECT id FROM p"
            ),
            960..980 => format!(
                "COPY bag (a, b) FROM PROGRAM
                     $p$awk 'BEGIN {{ for (i = 0; i < {amount} % 200; i++) print i % 9 \"\\tcopied\" }}'$p$"
            ),
            980..985 => "TRUNCATE parent RESTART IDENTITY CASCADE".to_owned(),
            985..990 => "TRUNCATE bag, item".to_owned(),
            990..993 => "TRUNCATE event_0; TRUNCATE bag; INSERT INTO bag (a, b) VALUES (1, 'after')".to_owned(),
            993..995 => "TRUNCATE event".to_owned(),
            _ => format!("UPDATE document SET id = {j}, title = 'moved' WHERE id = {i}"),
        }
    }
}
