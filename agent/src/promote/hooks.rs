//! Runs the configured commands that lead the users to the new primary.
//!
//! Called once, when every database is open that can be opened. A hook learns what happened from its environment
//! ([`environment`]) and from the report, a JSON file that exists while the hooks run.
//!
//! # Invariants
//! - Hooks run one after the other in the order of the configuration.
//! - Every hook ends: after its timeout its whole process group is told to stop and, two seconds
//!   later, killed.
//! - At least once: a promotion killed between a hook and the storing of its result runs the hooks again.
//!   A hook must bear being repeated.
//!
//! # What it does not do
//! A failed hook does not undo the promotion: the replica is open and stays so.

use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use super::report::{HookReport, PromotionReport};
use crate::config::{Config, Hook, OnFailure};

/// The last of a hook's output that the report keeps.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;
/// Between SIGTERM and SIGKILL.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// How long output may still come after the hook itself has ended, from processes it left behind.
const OUTPUT_WITHIN: Duration = Duration::from_secs(1);

/// What a hook finds in its environment besides ours:
///
/// - `DR_AGENT_TERM`: the highest term of the databases
/// - `DR_AGENT_DATABASES`: names of those that are open, separated by commas: users may be led there
/// - `DR_AGENT_DATABASES_NOT_OPEN`: names of the others; empty where all are open
/// - `DR_AGENT_REPLICA`: `host:port/database` of the new primary
/// - `DR_AGENT_REPLICA_HOST`, `DR_AGENT_REPLICA_PORT`: the same apart, where the URL names them
/// - `DR_AGENT_REPORT`: path of the report as JSON
pub fn environment(
    config: &Config,
    report: &PromotionReport,
    path: &std::path::Path,
) -> Vec<(String, String)> {
    let term = report
        .databases
        .iter()
        .map(|database| database.term)
        .max()
        .unwrap_or_default();
    let names = |open: bool| -> String {
        let those = report.databases.iter().filter(|one| one.is_open() == open);
        let names: Vec<&str> = those.map(|one| one.database.as_str()).collect();
        names.join(",")
    };
    let mut variables = vec![
        ("DR_AGENT_TERM".to_owned(), term.to_string()),
        ("DR_AGENT_DATABASES".to_owned(), names(true)),
        ("DR_AGENT_DATABASES_NOT_OPEN".to_owned(), names(false)),
        ("DR_AGENT_REPLICA".to_owned(), report.replica.clone()),
        ("DR_AGENT_REPORT".to_owned(), path.display().to_string()),
    ];
    for (name, value) in config.replica.conninfo.libpq_environment() {
        if name == "PGHOST" || name == "PGPORT" {
            variables.push((name.replace("PG", "DR_AGENT_REPLICA_"), value));
        }
    }
    variables
}

/// Runs all hooks; one that fails with `on_failure = "abort"` keeps the rest from running.
pub async fn run(hooks: &[Hook], environment: &[(String, String)]) -> Vec<HookReport> {
    let mut reports = Vec::new();
    let mut aborted_by: Option<&str> = None;
    for hook in hooks {
        let report = match aborted_by {
            Some(name) => HookReport {
                name: hook.name.clone(),
                ok: false,
                outcome: format!("not run: {name} failed and has on_failure = \"abort\""),
                seconds: 0.0,
                output: String::new(),
            },
            None => run_one(hook, environment).await,
        };
        if report.ok {
            tracing::info!(hook = hook.name, outcome = report.outcome, "hook");
        } else {
            tracing::error!(hook = hook.name, outcome = report.outcome, "hook failed");
            if hook.on_failure == OnFailure::Abort && aborted_by.is_none() {
                aborted_by = Some(&hook.name);
            }
        }
        reports.push(report);
    }
    reports
}

async fn run_one(hook: &Hook, environment: &[(String, String)]) -> HookReport {
    let begun = Instant::now();
    let output = Arc::new(Mutex::new(Vec::new()));
    let (ok, outcome) = match start(hook, environment) {
        Err(error) => (false, format!("not started: {error}")),
        Ok(mut child) => {
            let stdout = child
                .stdout
                .take()
                .map(|pipe| tokio::spawn(keep(pipe, Arc::clone(&output))));
            let stderr = child
                .stderr
                .take()
                .map(|pipe| tokio::spawn(keep(pipe, Arc::clone(&output))));
            let ended = wait(&mut child, hook.timeout).await;
            let deadline = Instant::now() + OUTPUT_WITHIN;
            for mut reader in [stdout, stderr].into_iter().flatten() {
                if tokio::time::timeout_at(deadline, &mut reader)
                    .await
                    .is_err()
                {
                    reader.abort();
                }
            }
            ended
        }
    };
    let output = output.lock().unwrap_or_else(PoisonError::into_inner);
    HookReport {
        name: hook.name.clone(),
        ok,
        outcome,
        seconds: super::loss::seconds_lost(begun.elapsed().as_secs_f64()),
        // PostgreSQL's jsonb cannot hold the character 0.
        output: String::from_utf8_lossy(&output).replace('\0', ""),
    }
}

fn start(hook: &Hook, environment: &[(String, String)]) -> std::io::Result<Child> {
    let (program, arguments) = hook
        .command
        .split_first()
        .expect("the configuration refuses a hook without a command");
    Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .env("DR_AGENT_HOOK", &hook.name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that what it starts can be stopped with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

async fn wait(child: &mut Child, limit: Duration) -> (bool, String) {
    let group = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    match timeout(limit, child.wait()).await {
        Ok(Ok(status)) => (status.success(), describe(status)),
        Ok(Err(error)) => (false, format!("lost: {error}")),
        Err(_) => {
            // Failing means that the group is gone already.
            let signal = |signal| group.map(|group| kill_process_group(group, signal));
            signal(Signal::TERM);
            let _ = timeout(STOP_WITHIN, child.wait()).await;
            signal(Signal::KILL);
            let _ = timeout(STOP_WITHIN, child.wait()).await;
            (false, format!("timed out after {limit:?} and was killed"))
        }
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Keeps the last [`OUTPUT_BYTES_MAX`] bytes of a pipe.
async fn keep(mut pipe: impl AsyncRead + Unpin, output: Arc<Mutex<Vec<u8>>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
        output.extend_from_slice(&buffer[..count]);
        let excess = output.len().saturating_sub(OUTPUT_BYTES_MAX);
        output.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(name: &str, script: &str, timeout: Duration, on_failure: OnFailure) -> Hook {
        Hook {
            name: name.to_owned(),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout,
            on_failure,
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_hook_sees_its_environment_and_both_outputs_are_kept() {
        let script = "echo term $DR_AGENT_TERM of $DR_AGENT_HOOK; echo trouble >&2";
        let hooks = [hook("dns", script, LONG, OnFailure::Continue)];
        let reports = run(&hooks, &[("DR_AGENT_TERM".to_owned(), "2".to_owned())]).await;
        assert!(reports[0].ok);
        assert_eq!(reports[0].outcome, "exited 0");
        assert!(reports[0].output.contains("term 2 of dns"));
        assert!(reports[0].output.contains("trouble"));
    }

    #[tokio::test]
    async fn a_failure_goes_on_or_aborts_as_configured() {
        let hooks = [
            hook("first", "exit 7", LONG, OnFailure::Continue),
            hook("second", "exit 8", LONG, OnFailure::Abort),
            hook("third", "exit 0", LONG, OnFailure::Continue),
        ];
        let reports = run(&hooks, &[]).await;
        let outcomes: Vec<&str> = reports
            .iter()
            .map(|report| report.outcome.as_str())
            .collect();
        assert_eq!(outcomes[..2], ["exited 7", "exited 8"]);
        assert!(outcomes[2].starts_with("not run: second failed"));
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_with_everything_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        // The grandchild ignores SIGTERM and would outlive a kill of the shell alone.
        let script = format!(
            "sh -c 'trap \"\" TERM; echo $$ > {0}.new; mv {0}.new {0}; while :; do sleep 1; done' & wait",
            pid_file.display()
        );
        let hooks = [hook(
            "slow",
            &script,
            Duration::from_secs(1),
            OnFailure::Continue,
        )];
        let reports = run(&hooks, &[]).await;
        assert!(!reports[0].ok);
        assert!(
            reports[0].outcome.starts_with("timed out after 1s"),
            "{}",
            reports[0].outcome
        );
        let pid: i32 = std::fs::read_to_string(&pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        let deadline = Instant::now() + LONG;
        while !gone() {
            assert!(Instant::now() < deadline, "process {pid} outlived its hook");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_reported_and_long_output_is_cut() {
        let missing = Hook {
            command: vec!["/nonexistent/hook".to_owned()],
            ..hook("missing", "", LONG, OnFailure::Continue)
        };
        let chatty = hook(
            "chatty",
            "yes | head -c 100000; echo end",
            LONG,
            OnFailure::Continue,
        );
        let reports = run(&[missing, chatty], &[]).await;
        assert!(reports[0].outcome.starts_with("not started: "));
        assert_eq!(reports[1].output.len(), OUTPUT_BYTES_MAX);
        assert!(reports[1].output.ends_with("end\n"));
    }
}
