//! A `dr-agent` process in the background: its log, its pages, its end.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::Duration;

use super::line_with;
use crate::http::{self, Metrics};
use crate::rundir::{is_alive, signal, tail};
use crate::wait::{PATIENCE, wait_for, wait_until};

/// A `dr-agent` process in the background.
pub struct Running {
    pub(super) child: Child,
    pub(super) out: PathBuf,
    pub(super) log: PathBuf,
    pub(super) http_port: u16,
    pub(super) what: String,
}

impl Running {
    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // An error means that it ended already, which is what we want.
        let _ = self.child.kill();
        self.child.wait().expect("it is our child");
    }

    /// SIGKILL to a process that runs until then.
    pub fn kill_alive(&mut self) {
        self.kill();
        let status = self.exit_status().expect("it was waited for");
        assert_eq!(
            status.signal(),
            Some(9),
            "dr-agent {} had ended by itself",
            self.what
        );
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

    /// SIGHUP.
    pub fn hang_up(&self) {
        signal("HUP", &[self.pid()]);
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

    /// Waits until a database has stopped by an error that needs a person, and ends the process, which goes on saying so.
    pub async fn expect_stopped(&mut self, database: &str) {
        self.wait_for_state(database, "stopped").await;
        self.ask_to_stop();
        self.expect_exit(0).await;
    }

    /// Waits for the end, which must be by a signal: a fail point aborts, and nothing else may have been quicker.
    pub async fn expect_death_by_signal(&mut self) {
        let status = self.wait_for_exit(PATIENCE).await;
        assert!(
            status.signal().is_some(),
            "dr-agent {} ended with {status} and not by a signal",
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

    /// The same; nor may anything have had to be tried again.
    #[track_caller]
    pub fn expect_untroubled(&self) {
        self.expect_quiet_log();
        let log = self.log();
        let again = log.lines().find(|line| line.contains("will retry"));
        assert!(again.is_none(), "the agent's log has: {again:?}");
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
            assert!(is_alive(self.pid()), "the agent ended; waited for {what}");
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
        self.peak_if_alive().expect("the agent is running")
    }

    /// The same, of a process that may have ended.
    pub fn peak_if_alive(&self) -> Option<u64> {
        self.memory("VmHWM:")
    }

    /// Resident memory now, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:").expect("the agent is running")
    }

    /// From here on the peak is counted anew.
    pub fn forget_peak(&self) {
        let path = format!("/proc/{}/clear_refs", self.pid());
        fs::write(path, "5").expect("the agent is ours and running");
    }

    fn memory(&self, which: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(which))?;
        let kib: u64 = line
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .expect("memory is a number of kB");
        Some(kib * 1024)
    }

    /// Waits until the process stands still: stopped by a signal, or by a fail point.
    pub async fn wait_until_stopped(&self) {
        let pid = self.pid();
        wait_until("the agent to stand still", PATIENCE, || async move {
            fs::read_to_string(format!("/proc/{pid}/stat"))
                .ok()
                .and_then(|stat| Some(stat.rsplit_once(") ")?.1.starts_with('T')))
                .unwrap_or(false)
        })
        .await;
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
