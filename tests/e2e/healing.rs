//! Goal: a server that lets nobody in for a moment, for whatever reason, is waited for: `retrying`, with its reason, and back by
//! itself.
//! Method: one pair of servers and one agent; on each side each reason is made and taken away again, with the server's own means:
//! pg_hba.conf, a role without LOGIN, no session left, a standby for a while, no process left.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use dr_agent_tests::agent::Running;
use dr_agent_tests::client::Client;
use dr_agent_tests::rundir::unprivileged;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_for};

/// What keeps the agent out.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// `pg_hba.conf` rejects it.
    Rejected,
    /// Its role may not log in.
    NoLogin,
    /// Its database takes no connections.
    Closed,
    /// All sessions are taken.
    Exhausted,
    /// The server is in recovery.
    Standby,
    /// The server may start no process.
    NoProcess,
}

const ALL: [Trouble; 6] = [
    Trouble::Rejected,
    Trouble::NoLogin,
    Trouble::Closed,
    Trouble::Exhausted,
    Trouble::Standby,
    Trouble::NoProcess,
];

impl Trouble {
    /// What is said of it.
    fn words(self) -> &'static str {
        match self {
            Self::Rejected => "pg_hba.conf rejects",
            Self::NoLogin => "not permitted to log in",
            Self::Closed => "not currently accepting connections",
            Self::Exhausted => "53300",
            Self::Standby => "still recovering",
            // It says so, and closes before it has read what we sent: that may be all that is seen.
            Self::NoProcess => "connect to",
        }
    }
}

/// A server in trouble, and what has to live until it is over.
struct Scene<'a> {
    server: &'a PgServer,
    admin: Client,
    database: &'a str,
    sound_hba: String,
    taken: Vec<Client>,
}

impl<'a> Scene<'a> {
    async fn new(server: &'a PgServer, database: &'a str) -> Self {
        let hba = server.data_directory().join("pg_hba.conf");
        Self {
            server,
            admin: server.client("postgres").await,
            database,
            sound_hba: fs::read_to_string(hba).unwrap(),
            taken: Vec::new(),
        }
    }

    async fn end_sessions(&self) {
        self.admin
            .run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'agent'")
            .await;
    }

    async fn write_hba(&self, text: &str) {
        // Keeps owner and mode.
        fs::write(self.server.data_directory().join("pg_hba.conf"), text).unwrap();
        self.admin.run("SELECT pg_reload_conf()").await;
    }

    fn postmaster(&self) -> String {
        let file = self.server.data_directory().join("postmaster.pid");
        let text = fs::read_to_string(file).unwrap();
        text.lines().next().unwrap().to_owned()
    }

    /// Lets the server start no further process, or as many as it may.
    fn limit_processes(&self, limited: bool) {
        let postmaster = self.postmaster();
        let limits = fs::read_to_string(format!("/proc/{postmaster}/limits")).unwrap();
        let most = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max processes"))
            .and_then(|line| line.split_whitespace().nth(1))
            .unwrap();
        let soft = if limited { "1" } else { most };
        let mut command = Command::new("prlimit");
        command.args(["--pid", &postmaster, &format!("--nproc={soft}:{most}")]);
        if let Some(user) = unprivileged() {
            command.uid(user.uid).gid(user.gid);
        }
        assert!(command.status().unwrap().success());
    }

    async fn begin(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::Rejected => {
                let rejecting = format!("host all agent all reject\n{}", self.sound_hba);
                self.write_hba(&rejecting).await;
            }
            Trouble::NoLogin => self.admin.run("ALTER ROLE agent NOLOGIN").await,
            Trouble::Closed => self.allow_connections(false).await,
            Trouble::Exhausted => self.take_all_sessions().await,
            Trouble::Standby => return self.restart_as_standby(true).await,
            Trouble::NoProcess => self.limit_processes(true),
        }
        self.end_sessions().await;
        if matches!(trouble, Trouble::Exhausted) {
            self.take_sessions_until_the_agent_has_none().await;
        }
    }

    /// The agent may be faster at taking a session that it had than this is.
    async fn take_sessions_until_the_agent_has_none(&mut self) {
        let agents = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'agent'";
        loop {
            self.take_all_sessions().await;
            if self.admin.number(agents).await == 0 {
                return;
            }
            self.end_sessions().await;
        }
    }

    async fn end(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::Rejected => self.write_hba(&self.sound_hba).await,
            Trouble::NoLogin => self.admin.run("ALTER ROLE agent LOGIN").await,
            Trouble::Closed => self.allow_connections(true).await,
            Trouble::Exhausted => self.taken.clear(),
            Trouble::Standby => self.restart_as_standby(false).await,
            Trouble::NoProcess => self.limit_processes(false),
        }
    }

    async fn allow_connections(&self, yes: bool) {
        let database = self.database;
        self.admin
            .run(&format!(
                "ALTER DATABASE \"{database}\" ALLOW_CONNECTIONS {yes}"
            ))
            .await;
    }

    async fn take_all_sessions(&mut self) {
        while let Ok(client) = Client::try_connect(&self.server.url("postgres")).await {
            self.taken.push(client);
        }
    }

    async fn restart_as_standby(&mut self, standby: bool) {
        let signal = self.server.data_directory().join("standby.signal");
        self.server.stop().await;
        match standby {
            true => fs::write(&signal, "").unwrap(),
            false => fs::remove_file(&signal).unwrap(),
        }
        self.server.start_again().await;
        self.admin = self.server.client("postgres").await;
    }
}

/// The reason is shown while it lasts.
async fn expect_reason(running: &Running, words: &str) {
    wait_for(&format!("\"{words}\" to be shown"), PATIENCE, || async {
        let database = running.status().await["databases"][0].clone();
        let error = database["error"].to_string();
        match database["state"] == "retrying" && error.contains(words) {
            true => Ok(()),
            false => Err(database.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lets_nobody_in_for_a_moment_is_waited_for() {
    let with = |options: ServerOptions| options.set("max_connections", "40");
    let (source, replica) = (ServerOptions::source(), ServerOptions::replica());
    let site = Site::with(with(source), with(replica)).await;
    let database = site.database("heals").await;
    for server in [&site.source, &site.replica] {
        server
            .run("postgres", "CREATE ROLE agent SUPERUSER LOGIN")
            .await;
    }
    let of = |server: &PgServer| {
        let url = server.url("postgres").replace("postgres@", "agent@");
        format!("\"{url}\"")
    };
    let mut agent = database.agent();
    agent.configure("source.url", &of(&site.source));
    agent.configure("replica.url", &of(&site.replica));
    let create = "CREATE TABLE t (id serial PRIMARY KEY, v text)";
    database.source().await.run(create).await;
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    for server in [&site.source, &site.replica] {
        let mut scene = Scene::new(server, &database.name).await;
        for trouble in ALL {
            scene.begin(trouble).await;
            expect_reason(&running, trouble.words()).await;
            scene.end(trouble).await;
            running.wait_for_streaming(&database.name).await;
            let insert = format!("INSERT INTO t (v) VALUES ('{trouble:?}')");
            database.source().await.run(&insert).await;
            database.wait_caught_up().await;
        }
    }
    database.expect_equal().await;
    assert!(!running.log().contains(" ERROR "), "{}", running.log());
    running.stop().await;
}
