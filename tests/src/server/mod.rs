//! A throw-away PostgreSQL server, started, stopped, crashed, frozen and removed by a test.
//!
//! The first source and the first replica of a run initialise a template data directory each; every
//! server starts from a copy of one. All sources are one cluster to PostgreSQL, and so are all replicas. Servers listen on a free port of 127.0.0.1 and on a Unix socket, run with `fsync = off`, and
//! as an unprivileged user where the tests run as root.
//!
//! # Invariants
//! - `Drop` ends the server and removes its files, also when a test panics; then the end of the
//!   server's log is printed first. [`crate::rundir`] does the same for a test process that dies.
//! - [`PgServer::kill`] and [`PgServer::pause`] reach every process of the server, not only the
//!   postmaster: otherwise its backends would go on.

mod options;
mod template;

use std::fs::{self, OpenOptions};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::binaries::Binaries;
use crate::client::Client;
use crate::rundir::{children_of, directory_for, is_alive, signal, tail};

pub use options::ServerOptions;
use template::copy_template;
pub(crate) use template::{give_away, server_command};

/// How long a server may take to start or stop before the test fails.
const START_STOP_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
enum Stop {
    Fast,
    Immediate,
}

/// A running, or for the moment stopped, server.
pub struct PgServer {
    name: &'static str,
    binaries: Binaries,
    settings: Mutex<Vec<(String, String)>>,
    directory: PathBuf,
    data: PathBuf,
    port: u16,
    process: Mutex<Option<Child>>,
}

impl PgServer {
    async fn start(options: ServerOptions) -> Self {
        let directory = directory_for(options.name);
        let data = options
            .data_below
            .as_deref()
            .unwrap_or(&directory)
            .join("data");
        match &options.data_from {
            Some(present) => fs::rename(present, &data).expect("both are in the run directory"),
            None => copy_template(&options.binaries, options.template, &data),
        }
        let mut server = Self {
            name: options.name,
            binaries: options.binaries,
            settings: Mutex::new(options.settings),
            directory,
            data,
            port: 0,
            process: Mutex::new(None),
        };
        server.make_socket_directory();
        server.write_hba(&options.hba);
        for (name, contents) in &options.files {
            server.write_file(name, contents);
        }
        // A free port may be taken by somebody else before the server binds it.
        for _ in 0..5 {
            server.port = free_port();
            if server.spawn_and_wait().await {
                return server;
            }
        }
        panic!(
            "the {} server does not start; its log ends with:\n{}",
            server.name,
            server.log_tail(30)
        );
    }

    /// Connects as the superuser `postgres`.
    pub async fn client(&self, database: &str) -> Client {
        Client::connect(&self.url(database)).await
    }

    /// The URL of a database, over TCP.
    pub fn url(&self, database: &str) -> String {
        self.url_through(self.port, database)
    }

    /// The URL of a database through another port of this machine, a proxy's for instance.
    pub fn url_through(&self, port: u16, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/{}", encode(database))
    }

    /// The URL of a database, over the Unix socket.
    pub fn socket_url(&self, database: &str) -> String {
        let directory = encode(&self.socket_directory().display().to_string());
        let database = encode(database);
        format!("postgres://postgres@{directory}:{}/{database}", self.port)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The major version: 15 for 15.4.
    pub fn major(&self) -> u32 {
        self.binaries.major
    }

    /// The data directory.
    pub fn data_directory(&self) -> &Path {
        &self.data
    }

    /// The path of one of this server's programs, `pg_controldata` for instance.
    pub fn program(&self, name: &str) -> PathBuf {
        self.binaries.program(name)
    }

    /// Options for another server of the same version and parameters.
    pub(crate) fn same_options(&self) -> ServerOptions {
        let mut options = ServerOptions::new(self.name, self.binaries.clone());
        options.settings.clone_from(&lock(&self.settings));
        options
    }

    /// Creates an empty database.
    pub async fn create_database(&self, name: &str) {
        let quoted = name.replace('"', "\"\"");
        let client = self.client("postgres").await;
        client
            .run(&format!("CREATE DATABASE \"{quoted}\" TEMPLATE template0"))
            .await;
    }

    /// Runs statements in a database.
    pub async fn run(&self, database: &str, sql: &str) {
        self.client(database).await.run(sql).await;
    }

    /// Changes a parameter for the next start.
    pub fn set(&self, name: &str, value: &str) {
        let mut settings = lock(&self.settings);
        settings.retain(|(present, _)| present != name);
        settings.push((name.to_owned(), value.to_owned()));
    }

    /// Shuts down, ending sessions first.
    pub async fn stop(&self) {
        self.shut_down(Stop::Fast).await;
    }

    /// Stops without a checkpoint; the next start recovers.
    pub async fn stop_immediately(&self) {
        self.shut_down(Stop::Immediate).await;
    }

    /// Kills every process of the server at once, as the loss of the machine would.
    pub fn kill(&self) {
        let Some(mut child) = lock(&self.process).take() else {
            return;
        };
        // First the postmaster stands still, so that it starts no further process; dead, it would leave its
        // children to somebody else, and they could not be told from others.
        signal("STOP", &[child.id()]);
        let mut family = children_of(child.id());
        family.push(child.id());
        signal("KILL", &family);
        child.wait().expect("the postmaster is our child");
        family.retain(|pid| *pid != child.id());
        let gone = wait_blocking(START_STOP_MAX, || !family.iter().any(|pid| is_alive(*pid)));
        assert!(
            gone,
            "processes of the {} server survive SIGKILL",
            self.name
        );
    }

    /// Kills the postmaster alone: its processes notice in their own time, and may still commit until then.
    pub fn kill_postmaster(&self) {
        if let Some(mut child) = lock(&self.process).take() {
            signal("KILL", &[child.id()]);
            child.wait().expect("the postmaster is our child");
        }
    }

    /// Starts again after [`PgServer::stop`] or [`PgServer::kill`], on the same port.
    pub async fn start_again(&self) {
        let deadline = Instant::now() + START_STOP_MAX;
        while !self.spawn_and_wait().await {
            assert!(
                Instant::now() < deadline,
                "the {} server does not start again; its log ends with:\n{}",
                self.name,
                self.log_tail(30)
            );
            // Processes of a postmaster that was killed may still be there.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops and starts.
    pub async fn restart(&self) {
        self.stop().await;
        self.start_again().await;
    }

    /// Freezes every process of the server, as a dead network or disk would.
    pub fn pause(&self) {
        let postmaster = self.pid();
        signal("STOP", &[postmaster]);
        signal("STOP", &children_of(postmaster));
    }

    /// Ends [`PgServer::pause`].
    pub fn resume(&self) {
        let postmaster = self.pid();
        signal("CONT", &children_of(postmaster));
        signal("CONT", &[postmaster]);
    }

    /// Whether the server has been started and not stopped or killed by the test.
    pub fn is_running(&self) -> bool {
        lock(&self.process).is_some()
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The last lines of the server's log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log_path(), lines)
    }

    fn pid(&self) -> u32 {
        lock(&self.process)
            .as_ref()
            .expect("the server has been started")
            .id()
    }

    fn socket_directory(&self) -> PathBuf {
        self.directory.join("s")
    }

    fn make_socket_directory(&self) {
        let path = self.socket_directory();
        fs::create_dir(&path).expect("the server's directory is ours");
        give_away(&path);
    }

    fn write_hba(&self, lines: &[String]) {
        let mut text = lines.join("\n");
        text.push_str("\nlocal all all trust\nhost all all 127.0.0.1/32 trust\n");
        text.push_str("local replication all trust\nhost replication all 127.0.0.1/32 trust\n");
        self.write_file("pg_hba.conf", text.as_bytes());
    }

    fn write_file(&self, name: &str, contents: &[u8]) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.data.join(name);
        fs::write(&path, contents).expect("the data directory is ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("the file is ours");
        give_away(&path);
    }

    /// Starts the postmaster; `false` when it gave up.
    async fn spawn_and_wait(&self) -> bool {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("the server's directory is ours");
        let mut command = server_command(&self.binaries.program("postgres"));
        command
            .arg("-D")
            .arg(&self.data)
            .arg("-k")
            .arg(self.socket_directory())
            .args(["-p", &self.port.to_string()])
            .args(["-c", "listen_addresses=127.0.0.1"]);
        for (name, value) in lock(&self.settings).iter() {
            command.args(["-c", &format!("{name}={value}")]);
        }
        let log_too = log.try_clone().expect("a file can be cloned");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_too)
            .spawn()
            .expect("the server program can be started");
        let deadline = Instant::now() + START_STOP_MAX;
        while Instant::now() < deadline {
            if child.try_wait().expect("it is our child").is_some() {
                return false;
            }
            if self.says_ready(child.id()) {
                *lock(&self.process) = Some(child);
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        false
    }

    /// The postmaster writes its state into the eighth line of its PID file.
    fn says_ready(&self, pid: u32) -> bool {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).unwrap_or_default();
        let mut lines = text.lines();
        lines.next() == Some(pid.to_string().as_str())
            && matches!(lines.nth(6).map(str::trim), Some("ready" | "standby"))
    }

    async fn shut_down(&self, how: Stop) {
        let Some((mut child, family)) = self.begin_to_stop(how) else {
            return;
        };
        // Not blocking: a proxy in this test may have to pass on what the walsender still sends.
        let deadline = Instant::now() + START_STOP_MAX;
        while child.try_wait().expect("it is our child").is_none() {
            if Instant::now() > deadline {
                kill_family(&mut child, &family);
                panic!(
                    "the {} server does not stop within {START_STOP_MAX:?}",
                    self.name
                );
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn begin_to_stop(&self, how: Stop) -> Option<(Child, Vec<u32>)> {
        let child = lock(&self.process).take()?;
        let family = children_of(child.id());
        // A frozen server must be thawed first, or it would hear nothing.
        signal("CONT", &family);
        signal("CONT", &[child.id()]);
        let name = match how {
            Stop::Fast => "INT",
            Stop::Immediate => "QUIT",
        };
        signal(name, &[child.id()]);
        Some((child, family))
    }
}

fn kill_family(child: &mut Child, family: &[u32]) {
    signal("KILL", &[child.id()]);
    signal("KILL", family);
    child.wait().expect("it is our child");
}

impl Drop for PgServer {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- end of the log of the {} server (port {}) ---\n{}\n---",
                self.name,
                self.port,
                self.log_tail(25)
            );
        }
        if let Some((mut child, family)) = self.begin_to_stop(Stop::Immediate) {
            let ended = wait_blocking(Duration::from_secs(10), || {
                child.try_wait().is_ok_and(|status| status.is_some())
            });
            if !ended {
                kill_family(&mut child, &family);
            }
        }
        // What cannot be removed now the reaper removes at the end of the run.
        let _ = fs::remove_dir_all(&self.data);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A port nobody listens on; not given out twice by this process. A server is restarted on the same one, so it lies
/// below those that Linux gives to whoever connects or asks for any (`net.ipv4.ip_local_port_range`).
pub fn free_port() -> u16 {
    static GIVEN_OUT: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given_out = lock(&GIVEN_OUT);
    loop {
        let port = rand::random_range(10_000..32_768);
        if !given_out.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            given_out.push(port);
            return port;
        }
    }
}

/// A mutex is only poisoned by a test that failed already.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_blocking(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if started.elapsed() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Percent-encodes what may not stand in a URL as it is.
pub(crate) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
