//! The real `dr-agent` binary: run to its end, or running in the background, killed and frozen.
//!
//! One [`Agent`] is one configuration file in a directory of its own; any number of commands and
//! of consecutive (or competing) `run` processes use it.
//!
//! # Invariants
//! - A missing binary, or one older than the sources, fails the test with instructions: a test never
//!   passes against yesterday's program.
//! - `Drop` ends the process; when a test panics the end of the agent's log is printed first.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::agent_config::AgentConfig;
use crate::http::{self, Metrics};
use crate::rundir::{directory_for, is_alive, signal, tail};
use crate::server::free_port;
use crate::wait::{PATIENCE, wait_for, wait_until};

/// A command that does not end within this time has hung.
const COMMAND_MAX: Duration = Duration::from_secs(90);

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Fails the test unless the command ended with this code.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.code,
            Some(code),
            "exit code\n--- standard output\n{}\n--- standard error\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails the test unless some line of the output has all these words, in any case.
    #[track_caller]
    pub fn expect_words(&self, words: &[&str]) -> &Self {
        assert!(
            line_with(&self.text(), words).is_some(),
            "no line has all of {words:?}\n--- standard output\n{}\n--- standard error\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| {
            panic!(
                "standard output is not JSON ({error}):\n{}\n--- standard error\n{}",
                self.stdout, self.stderr
            )
        })
    }

    /// Both outputs.
    pub fn text(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }
}

/// The first line that has all these words, in any case.
pub fn line_with<'a>(text: &'a str, words: &[&str]) -> Option<&'a str> {
    text.lines().find(|line| {
        let line = line.to_lowercase();
        words.iter().all(|word| line.contains(&word.to_lowercase()))
    })
}

/// One configuration and what runs with it.
pub struct Agent {
    directory: PathBuf,
    config: AgentConfig,
    http_port: u16,
}

impl Agent {
    /// Writes the configuration into a directory of its own.
    pub fn new(config: AgentConfig) -> Self {
        let directory = directory_for("agent");
        fs::create_dir(directory.join("spill")).expect("the agent's directory is ours");
        let agent = Self {
            directory,
            config,
            http_port: free_port(),
        };
        agent.write_config();
        agent
    }

    /// Changes a key (`"limits.batch_changes"`) and writes the file again. The value is TOML.
    pub fn configure(&mut self, key: &str, value: &str) {
        self.config = self.config.clone().set(key, value);
        self.write_config();
    }

    fn write_config(&self) {
        let spill = self.directory.join("spill");
        let text = self.config.to_toml(self.http_port, &spill);
        fs::write(self.config_path(), text).expect("the agent's directory is ours");
    }

    /// The configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("dr-agent.toml")
    }

    /// The directory of the configuration, logs and spill files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The configuration in use.
    pub fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// The port of `/metrics` and `/status`.
    pub fn http_port(&self) -> u16 {
        self.http_port
    }

    /// Runs a command to its end: `agent.command(&["promote", "--failover"])`.
    pub async fn command(&self, arguments: &[&str]) -> Outcome {
        self.command_with(arguments, &[]).await
    }

    /// Runs a command to its end with environment variables.
    pub async fn command_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
        let mut running = self.spawn_to("command", arguments, environment);
        let status = running.wait_for_exit(COMMAND_MAX).await;
        Outcome {
            code: status.code(),
            stdout: running.stdout(),
            stderr: running.log(),
        }
    }

    /// Starts `dr-agent run`.
    pub fn start(&self) -> Running {
        self.start_with(&[])
    }

    /// Starts `dr-agent run` with environment variables.
    pub fn start_with(&self, environment: &[(&str, &str)]) -> Running {
        self.spawn_to("run", &["run"], environment)
    }

    /// Starts any command in the background.
    pub fn spawn(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Running {
        self.spawn_to("spawned", arguments, environment)
    }

    fn spawn_to(&self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Running {
        let stem = free_stem(&self.directory, name);
        let (out, log) = (stem.with_extension("out"), stem.with_extension("log"));
        let mut command = Command::new(binary());
        command
            .args(arguments)
            .arg("--config")
            .arg(self.config_path())
            // Nothing of the developer's environment decides what a test does.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", &self.directory)
            .env("RUST_BACKTRACE", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(create(&out))
            .stderr(create(&log));
        if let Some(filter) = std::env::var_os("DR_AGENT_TEST_LOG") {
            command.env("RUST_LOG", filter);
        }
        let child = command.spawn().expect("the binary can be started");
        Running {
            child,
            out,
            log,
            http_port: self.http_port,
            what: arguments.join(" "),
        }
    }
}

fn create(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("the agent's directory is ours")
}

fn free_stem(directory: &Path, name: &str) -> PathBuf {
    (1..)
        .map(|number| directory.join(format!("{name}-{number}")))
        .find(|stem| !stem.with_extension("log").exists())
        .expect("numbers do not run out")
}

/// A `dr-agent` process in the background.
pub struct Running {
    child: Child,
    out: PathBuf,
    log: PathBuf,
    http_port: u16,
    what: String,
}

impl Running {
    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // An error means that it ended already, which is what we want.
        let _ = self.child.kill();
        self.child.wait().expect("it is our child");
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        signal("STOP", &[self.pid()]);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        signal("CONT", &[self.pid()]);
    }

    /// SIGTERM, without waiting.
    pub fn ask_to_stop(&self) {
        signal("TERM", &[self.pid()]);
    }

    /// SIGTERM; it must drain and end with code 0.
    pub async fn stop(mut self) {
        self.ask_to_stop();
        let status = self.wait_for_exit(PATIENCE).await;
        assert_eq!(
            status.code(),
            Some(0),
            "SIGTERM drains and ends with code 0"
        );
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    /// Waits for the end.
    pub async fn wait_for_exit(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("the end of dr-agent {}", self.what);
        let child = std::cell::RefCell::new(&mut self.child);
        let log = self.log.clone();
        wait_for(&what, deadline, || {
            let status = child.borrow_mut().try_wait().expect("it is our child");
            let reason = tail(&log, 5);
            async move { status.ok_or(reason) }
        })
        .await
    }

    /// Waits for the end, which must have this exit code.
    pub async fn expect_exit(&mut self, code: i32) {
        let status = self.wait_for_exit(PATIENCE).await;
        assert_eq!(
            status.code(),
            Some(code),
            "exit code of dr-agent {}",
            self.what
        );
    }

    /// Everything on standard error: the log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Everything on standard output.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// Waits until some line of the log has all these words, in any case, and returns the line.
    pub async fn wait_for_log(&self, words: &[&str]) -> String {
        let what = format!("a line of the agent's log with {words:?}");
        wait_for(&what, PATIENCE, || async {
            line_with(&self.log(), words)
                .map(str::to_owned)
                .ok_or_else(|| tail(&self.log, 3))
        })
        .await
    }

    /// Fails the test if the log has an error, or a panic.
    #[track_caller]
    pub fn expect_quiet_log(&self) {
        let log = self.log();
        for sign in [" ERROR ", "\"level\":\"ERROR\"", "panicked at"] {
            if let Some(line) = log.lines().find(|line| line.contains(sign)) {
                panic!("the agent's log has: {line}");
            }
        }
    }

    /// A page of the HTTP listener.
    pub async fn get(&self, path: &str) -> Result<http::Answer, String> {
        http::get(self.http_port, path).await
    }

    /// `/metrics`, once it is served.
    pub async fn metrics(&self) -> Metrics {
        let answer = self.served("/metrics").await;
        assert_eq!(answer.status, 200, "GET /metrics: {}", answer.body);
        Metrics::parse(&answer.body)
    }

    /// `/status`, once it is served.
    pub async fn status(&self) -> serde_json::Value {
        let answer = self.served("/status").await;
        serde_json::from_str(&answer.body)
            .unwrap_or_else(|error| panic!("/status is not JSON ({error}): {}", answer.body))
    }

    async fn served(&self, path: &str) -> http::Answer {
        wait_for(&format!("an answer to GET {path}"), PATIENCE, || {
            self.get(path)
        })
        .await
    }

    /// Waits until a metric fulfils a condition.
    pub async fn wait_for_metric(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        condition: impl Fn(f64) -> bool,
    ) -> f64 {
        let what = format!("a certain value of {name} {labels:?}");
        wait_for(&what, PATIENCE, || async {
            let answer = self.get("/metrics").await?;
            let value = Metrics::parse(&answer.body).value(name, labels);
            value
                .filter(|value| condition(*value))
                .ok_or_else(|| format!("{value:?}"))
        })
        .await
    }

    /// Waits until a database's `dr_agent_state` is this one.
    pub async fn wait_for_state(&self, database: &str, state: &str) {
        let labels = [("database", database), ("state", state)];
        self.wait_for_metric("dr_agent_state", &labels, |value| value == 1.0)
            .await;
    }

    /// Waits until a database is streaming.
    pub async fn wait_for_streaming(&self, database: &str) {
        self.wait_for_state(database, "streaming").await;
    }

    /// Peak resident memory so far, in bytes.
    pub fn peak_resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("the agent is running");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("Linux tells the peak");
        let kib: u64 = line
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .expect("the peak is a number of kB");
        kib * 1024
    }

    /// Waits until the process has ended, however.
    pub async fn wait_until_gone(&self) {
        let pid = self.pid();
        wait_until("the end of the agent", PATIENCE, || async move {
            !is_alive(pid)
        })
        .await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- end of the log of dr-agent {} ---\n{}\n---",
                self.what,
                tail(&self.log, 40)
            );
        }
        self.kill();
    }
}

/// The binary under test: `DR_AGENT_BIN`, or the one next to this test's own directory.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("DR_AGENT_BIN") {
            return PathBuf::from(path);
        }
        // target/<profile>/deps/e2e-… → target/<profile>/dr-agent
        let own = std::env::current_exe().expect("Linux tells a process its program");
        let mut profile = own.parent().expect("a program is in a directory");
        // A program such as the measurements is one level higher than a test.
        if profile.ends_with("deps") {
            profile = profile.parent().expect("cargo puts tests two levels deep");
        }
        let path = profile.join("dr-agent");
        let built = modified(&path).unwrap_or_else(|| {
            panic!(
                "{} is missing: run `cargo build -p dr-agent` first, or set DR_AGENT_BIN",
                path.display()
            )
        });
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent");
        if let Some(newer) = newest(&agent, built) {
            panic!(
                "{} is older than {}: run `cargo build -p dr-agent` first, or set DR_AGENT_BIN",
                path.display(),
                newer.display()
            );
        }
        path
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// A source file below `directory` that changed after `built`.
fn newest(directory: &Path, built: SystemTime) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.filter_map(Result::ok);
    for path in entries.map(|entry| entry.path()) {
        if path.is_dir() {
            if let Some(found) = newest(&path, built) {
                return Some(found);
            }
            continue;
        }
        let extension = path.extension().map(OsString::from).unwrap_or_default();
        if (extension == "rs" || extension == "sql") && modified(&path) > Some(built) {
            return Some(path);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_looked_for_on_one_line_in_any_case() {
        let text = "one Two\nthree four";
        assert_eq!(line_with(text, &["two", "ONE"]), Some("one Two"));
        assert_eq!(line_with(text, &["two", "three"]), None);
    }
}
