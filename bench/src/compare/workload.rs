//! What the source does while a contestant is away: one table entry per workload.
//!
//! Every workload has its tables and first rows, which are copied before the measurement begins, and its
//! load, which becomes the backlog. All sizes are multiplied by the scale.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use dr_agent_tests::client::Client;
use dr_agent_tests::server::PgServer;
use tokio::process::Command;

use crate::load;

/// Clients of pgbench while the backlog is made.
const CLIENTS: u64 = 8;

/// The database of every workload, on every server.
pub(crate) const DATABASE: &str = "bench";

/// One workload.
#[derive(Clone, Copy)]
pub(crate) struct Workload {
    /// As on the command line and in the results.
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) title: &'static str,
    /// pgbench's own tables at this scale, 0 for none.
    pgbench_scale: u32,
    /// Tables and first rows; `{rows}` is the number of first rows, scaled.
    schema: &'static str,
    first_rows: u64,
    load: Load,
    /// Source transactions, before scaling.
    transactions: u64,
    /// Row changes of one transaction.
    changes: u64,
}

#[derive(Clone, Copy)]
enum Load {
    /// pgbench's built-in TPC-B-like script.
    TpcB,
    /// A script for pgbench; `{rows}` is the number of first rows, scaled.
    Script(&'static str),
    /// One statement, one transaction; `{rows}` is the number of rows it changes, scaled.
    Statement(&'static str),
}

/// What came of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Transactions on the source.
    pub(crate) transactions: u64,
    /// Rows inserted, updated or deleted.
    pub(crate) changes: u64,
}

/// All workloads, in the order in which they run.
pub(crate) const ALL: &[Workload] = &[
    Workload {
        name: "tpcb",
        title: "TPC-B, 200k transactions",
        pgbench_scale: 20,
        schema: "",
        first_rows: 0,
        load: Load::TpcB,
        transactions: 200_000,
        changes: 4,
    },
    Workload {
        name: "insert-100",
        title: "2M rows, 100 a transaction",
        pgbench_scale: 0,
        schema: ITEM,
        first_rows: 0,
        load: Load::Script(
            "INSERT INTO item (number, words) SELECT n, md5(n::text) || md5((n + 1)::text) FROM generate_series(1, 100) AS n;",
        ),
        transactions: 20_000,
        changes: 100,
    },
    Workload {
        name: "insert-all",
        title: "2M rows, one transaction",
        pgbench_scale: 0,
        schema: ITEM,
        first_rows: 0,
        load: Load::Statement(
            "INSERT INTO item (number, words) SELECT n, md5(n::text) || md5((n + 1)::text) FROM generate_series(1, {rows}) AS n",
        ),
        transactions: 1,
        changes: 2_000_000,
    },
    Workload {
        name: "hot-keys",
        title: "updates of hot keys",
        pgbench_scale: 0,
        schema: "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, note text NOT NULL);
            INSERT INTO account SELECT n, 0, md5(n::text) FROM generate_series(1, {rows}) AS n",
        first_rows: 100_000,
        // In the order of the keys, or they would deadlock.
        load: Load::Script(
            "\\set x random_zipfian(1, {rows}, 1.2)\n\
             \\set y random_zipfian(1, {rows}, 1.2)\n\
             \\set low least(:x, :y)\n\
             \\set high greatest(:x, :y)\n\
             \\set delta random(-5000, 5000)\n\
             BEGIN;\n\
             UPDATE account SET balance = balance - :delta WHERE id = :low;\n\
             UPDATE account SET balance = balance + :delta WHERE id = :high;\n\
             COMMIT;",
        ),
        transactions: 200_000,
        changes: 2,
    },
    Workload {
        name: "delete",
        title: "800k rows deleted, 100 a transaction",
        pgbench_scale: 0,
        schema: "CREATE TABLE item (id bigint PRIMARY KEY, number int NOT NULL, words text NOT NULL);
            INSERT INTO item SELECT n, n % 1000, md5(n::text) FROM generate_series(1, {rows}) AS n;
            CREATE SEQUENCE hundred",
        first_rows: 1_000_000,
        load: Load::Script(
            "SELECT nextval('hundred') * 100 AS up_to \\gset\n\
             DELETE FROM item WHERE id > :up_to - 100 AND id <= :up_to;",
        ),
        transactions: 8_000,
        changes: 100,
    },
    Workload {
        name: "toast",
        title: "wide rows, TOAST mostly unchanged",
        pgbench_scale: 0,
        schema: "CREATE TABLE document (id int PRIMARY KEY, title text NOT NULL, number int NOT NULL, body text NOT NULL);
            ALTER TABLE document ALTER COLUMN body SET STORAGE EXTERNAL;
            INSERT INTO document SELECT n, 'title ' || n, 0, repeat(md5(n::text), 256) FROM generate_series(1, {rows}) AS n",
        first_rows: 10_000,
        // One in five replaces the body; it is 8 KiB and out of line.
        load: Load::Script(
            "\\set id random(1, {rows})\n\
             \\set replace random(1, 5)\n\
             \\if :replace = 1\n\
             UPDATE document SET body = repeat(md5(number::text || :id), 256) WHERE id = :id;\n\
             \\else\n\
             UPDATE document SET number = number + 1, title = 'title ' || number WHERE id = :id;\n\
             \\endif",
        ),
        transactions: 50_000,
        changes: 1,
    },
    Workload {
        name: "keyless",
        title: "no key, REPLICA IDENTITY FULL",
        pgbench_scale: 0,
        schema: "CREATE TABLE bag (a int NOT NULL, b text NOT NULL);
            ALTER TABLE bag REPLICA IDENTITY FULL;
            INSERT INTO bag SELECT n, md5(n::text) FROM generate_series(1, {rows}) AS n",
        first_rows: 20_000,
        load: Load::Script(
            "\\set a random(1, {rows})\n\
             BEGIN;\n\
             UPDATE bag SET b = md5(b) WHERE a = :a;\n\
             INSERT INTO bag VALUES (:a + {rows}, 'new');\n\
             COMMIT;",
        ),
        transactions: 2_000,
        changes: 2,
    },
];

const ITEM: &str = "CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, number int NOT NULL, words text NOT NULL)";

/// Gets one row before the backlog and one behind it; whoever sees that on the replica has everything.
const MARKER: &str =
    "CREATE TABLE bench_marker (id int PRIMARY KEY, written_at timestamptz NOT NULL);
    INSERT INTO bench_marker VALUES (0, clock_timestamp());
    CREATE TABLE bench_probe (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, written_at timestamptz NOT NULL)";

impl Workload {
    /// Creates the database with its tables, first rows and the publication `bench`.
    pub(crate) async fn set_up(&self, source: &PgServer, scale: f64) -> Result<Client> {
        source.create_database(DATABASE).await;
        let client = source.client(DATABASE).await;
        if self.pgbench_scale > 0 {
            let scale = (f64::from(self.pgbench_scale) * scale).round().max(1.0);
            load::initialise(source, DATABASE, scale as u32).await?;
        }
        client
            .run(&with_rows(self.schema, scaled(self.first_rows, scale)))
            .await;
        client.run(MARKER).await;
        publish(&client).await;
        client.run("VACUUM ANALYZE").await;
        Ok(client)
    }

    /// Makes the backlog.
    pub(crate) async fn run(
        &self,
        source: &PgServer,
        scale: f64,
        directory: &Path,
    ) -> Result<Size> {
        let first_rows = scaled(self.first_rows, scale);
        let script = match self.load {
            Load::Statement(sql) => {
                let changes = scaled(self.changes, scale);
                let client = source.client(DATABASE).await;
                client.run(&with_rows(sql, changes)).await;
                return Ok(Size {
                    transactions: 1,
                    changes,
                });
            }
            Load::TpcB => None,
            Load::Script(text) => {
                let path = directory.join(format!("{}.pgbench", self.name));
                std::fs::write(&path, with_rows(text, first_rows))?;
                Some(path)
            }
        };
        let per_client = (scaled(self.transactions, scale) / CLIENTS).max(1);
        let mut command = Command::new(load::program(source, "pgbench"));
        command
            .args(["--no-vacuum", "-M", "prepared", "-j", "2"])
            .args(["-c", &CLIENTS.to_string(), "-t", &per_client.to_string()]);
        if let Some(path) = &script {
            command.arg("-f").arg(path);
        }
        let output = command
            .arg(source.url(DATABASE))
            // Only how the backlog comes to be; it looks the same in the WAL.
            .env("PGOPTIONS", "-c synchronous_commit=off")
            .stdin(Stdio::null())
            .output()
            .await
            .context("start pgbench")?;
        ensure!(
            output.status.success(),
            "pgbench, workload {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        let transactions = per_client * CLIENTS;
        Ok(Size {
            transactions,
            changes: transactions * self.changes,
        })
    }
}

/// Publishes every table there is, as a subscription needs it.
///
/// Not `FOR ALL TABLES`: the agent's own tables come later, and a subscription would look for them.
async fn publish(client: &Client) {
    let tables = client
        .column("SELECT format('%I', relname) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'")
        .await;
    client
        .run(&format!(
            "CREATE PUBLICATION {DATABASE} FOR TABLE {}",
            tables.join(", ")
        ))
        .await;
}

fn scaled(number: u64, scale: f64) -> u64 {
    if number == 0 {
        return 0;
    }
    ((number as f64 * scale) as u64).max(1)
}

fn with_rows(text: &str, rows: u64) -> String {
    text.replace("{rows}", &rows.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_sizes_scale() {
        for (number, workload) in ALL.iter().enumerate() {
            assert!(
                ALL[..number]
                    .iter()
                    .all(|other| other.name != workload.name)
            );
        }
        assert_eq!(scaled(2_000_000, 0.1), 200_000);
        assert_eq!((scaled(0, 0.1), scaled(3, 0.1)), (0, 1));
        assert_eq!(with_rows("a {rows} b {rows}", 7), "a 7 b 7");
    }
}
