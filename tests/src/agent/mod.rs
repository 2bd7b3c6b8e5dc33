//! The real `dr-agent` binary: run to its end, or running in the background, killed and frozen.
//!
//! One [`Agent`] is one configuration file in a directory of its own; any number of commands and
//! of consecutive (or competing) `run` processes use it.
//!
//! # Invariants
//! - A missing binary, or one older than the sources, fails the test with instructions: a test never
//!   passes against yesterday's program.
//! - `Drop` ends the process; when a test panics the end of the agent's log is printed first.

mod binary;
mod config;
mod running;

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::rundir::directory_for;
use crate::server::free_port;

pub use binary::binary;
pub use config::AgentConfig;
pub use running::Running;

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
    environment: Vec<(String, String)>,
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
            environment: Vec::new(),
        };
        agent.write_config();
        agent
    }

    /// Changes a key (`"limits.batch_changes"`) and writes the file again. The value is TOML.
    pub fn configure(&mut self, key: &str, value: &str) {
        self.config = self.config.clone().set(key, value);
        self.write_config();
    }

    /// Gives everything that it starts from now on these environment variables.
    pub fn surround(&mut self, environment: &[(&str, &str)]) {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.environment = environment.iter().map(owned).collect();
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
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
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
