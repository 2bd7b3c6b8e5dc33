//! Goal: under route `kinesis` the replica equals the source as of one commit, whatever dies, comes twice, or comes late.
//! Method: `run` beside the source and `apply` beside the replica, each a process of its own, with a stream of a stand-in
//! between them; both are killed at every edge of durability, the replica is away, shards split and merge under load, and what
//! the stream does not have any more comes out of the archive.

use std::path::PathBuf;

use dr_agent_tests::agent::{Agent, Running};
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::moto::{Moto, SECRET};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::site::{Database, Site};
use dr_agent_tests::streams;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{Workload, seed};

const STREAM: &str = "dr-agent";

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) AS g";

/// What leads an agent to a stand-in.
fn environment(port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_REGION", "eu-central-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
    ]
}

/// Both sides of the route.
struct Route {
    database: Database,
    sender: Agent,
    applier: Agent,
    environment: Vec<(&'static str, String)>,
}

impl Route {
    /// With a stream behind that port. `archive`: both sides know it.
    fn new(database: Database, port: u16, archive: Option<PathBuf>) -> Self {
        let config = || {
            let config = database
                .config()
                .databases(&[&database.name])
                .set_text("route.kind", "kinesis")
                .set_text("route.stream", STREAM);
            match &archive {
                None => config,
                Some(archive) => config
                    .set_text("objectives.rpo", "1s")
                    .set_text("archive.url", &format!("file://{}", archive.display()))
                    .set_text(
                        "archive.spool_directory",
                        &archive.with_file_name("spool").display().to_string(),
                    ),
            }
        };
        Self {
            sender: Agent::new(config()),
            applier: Agent::new(config()),
            environment: environment(port),
            database,
        }
    }

    fn run(&self, more: &[(&str, &str)]) -> Running {
        self.sender.start_with(&self.with(more))
    }

    fn apply(&self, more: &[(&str, &str)]) -> Running {
        self.applier.spawn(&["apply"], &self.with(more))
    }

    fn with<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let environment = self.environment.iter();
        environment
            .map(|(name, value)| (*name, value.as_str()))
            .chain(more.iter().copied())
            .collect()
    }

    /// Starts both sides and waits for them.
    async fn start(&self) -> (Running, Running) {
        let running = self.run(&[]);
        running.wait_for_streaming(&self.database.name).await;
        let applying = self.apply(&[]);
        applying.wait_for_streaming(&self.database.name).await;
        (running, applying)
    }
}

async fn write(database: &Database, n: u32) {
    let sql =
        format!("INSERT INTO t VALUES ({n}000, 'streamed'); UPDATE t SET v = '{n}' WHERE id <= 50");
    database.source().await.run(&sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_workload_arrives_through_either_stand_in() {
    let site = Site::shared().await;
    let (moto, kinesalite) = (Moto::start().await, Kinesalite::start().await);
    for (purpose, port) in [("moto", moto.port()), ("kinesalite", kinesalite.port())] {
        streams::create(port, STREAM, 3).await;
        let database = site.database(purpose).await;
        Workload::create_tables(&database.source().await).await;
        let route = Route::new(database, port, None);
        let (running, applying) = route.start().await;
        let database = &route.database;
        let workload = Workload::start(&database.source_url(), seed(), 3);
        wait_until("enough transactions", PATIENCE, || async {
            workload.committed() > 300
        })
        .await;
        workload.stop().await;
        database.expect_equal().await;
        applying.expect_quiet_log();
        running.expect_quiet_log();
        let metrics = applying.metrics().await;
        let labels = [("database", database.name.as_str()), ("direction", "read")];
        assert!(metrics.value("dr_agent_stream_records_total", &labels) > Some(0.0));
        assert!(!running.log().contains(SECRET) && !applying.log().contains(SECRET));
        running.stop().await;
        applying.stop().await;
    }
}
