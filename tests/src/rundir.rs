//! The directory of one test run, and the process that removes it whatever happens.
//!
//! Every server, agent and socket of a run lives below one directory under the temporary
//! directory. A small shell, the reaper, holds the reading end of a pipe from the test process:
//! when the test process ends, even by SIGKILL, the pipe closes, and the reaper ends everything whose
//! command line names the directory, unmounts what was mounted there and removes it.
//!
//! # Invariants
//! - Nothing of a run survives the run by more than a few seconds; no later run has to clean up.
//! - The reaper touches only processes that name this run's directory.
//!
//! # What it does not do
//! It does not end servers between tests; each server's `Drop` does.

use std::fs::{self, DirBuilder, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What the reaper does; the directory comes as the first line of its standard input, so that its
/// own command line does not name it.
const REAPER: &str = r#"
trap '' INT TERM HUP
IFS= read -r dir || exit 0
case $dir in */dr-agent-e2e.*) ;; *) exit 1 ;; esac
cat >/dev/null
victims() {
    for p in /proc/[0-9]*; do
        tr '\0' '\n' <"$p/cmdline" 2>/dev/null | grep -qF -- "$dir" && echo "${p#/proc/}"
    done
}
for pid in $(victims); do kill -QUIT "$pid"; kill -CONT "$pid"; done 2>/dev/null
tries=0
while [ -n "$(victims)" ] && [ "$tries" -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
for pid in $(victims); do kill -KILL "$pid"; done 2>/dev/null
awk -v d="$dir/" 'index($2, d) == 1 { print $2 }' /proc/mounts | while read -r m; do umount -l "$m"; done
rm -rf -- "$dir"
"#;

struct RunDirectory {
    path: PathBuf,
    // Its standard input is the pipe; dropping it (at the end of the process) starts the reaping.
    _reaper: Child,
}

/// The directory of this run; made, together with its reaper, by the first caller.
pub fn run_directory() -> &'static Path {
    static RUN: OnceLock<RunDirectory> = OnceLock::new();
    &RUN.get_or_init(|| {
        let path = tempfile::Builder::new()
            .prefix("dr-agent-e2e.")
            .tempdir()
            .expect("a directory can be made in the temporary directory")
            .keep();
        // Servers run as another user and must be able to pass through.
        fs::set_permissions(&path, Permissions::from_mode(0o711)).expect("the directory is ours");
        let mut reaper = Command::new("sh")
            .args(["-c", REAPER])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("a shell can be started");
        let pipe = reaper.stdin.as_mut().expect("standard input is a pipe");
        writeln!(pipe, "{}", path.display()).expect("the reaper reads its first line");
        RunDirectory {
            path,
            _reaper: reaper,
        }
    })
    .path
}

/// Makes a directory of its own for one server or agent, named `<name>-<number>`.
pub fn directory_for(name: &str) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = run_directory().join(format!("{name}-{number}"));
    DirBuilder::new()
        .create(&path)
        .expect("the run directory is ours");
    path
}

/// The user that servers run as: `None` where we are not root and simply stay who we are.
#[derive(Clone, Copy, Debug)]
pub struct Unprivileged {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// PostgreSQL refuses to run as root; then `postgres` or `nobody` is used. No user is created.
pub fn unprivileged() -> Option<Unprivileged> {
    let we_are_root = fs::metadata("/proc/self").is_ok_and(|status| status.uid() == 0);
    if !we_are_root {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("/etc/passwd can be read");
    let found = ["postgres", "nobody"].iter().find_map(|name| {
        let line = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(Unprivileged {
            uid: fields.next()?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
        })
    });
    Some(found.expect("running as root needs a user \"postgres\" or \"nobody\" for the servers"))
}

/// Sends a signal (`"KILL"`, `"STOP"`, …) to processes that may already be gone.
pub fn signal(name: &str, pids: &[u32]) {
    // The shell's built-in kill: the program of that name is missing on small systems.
    let script = format!("kill -{name} \"$@\" 2>/dev/null || true");
    let status = Command::new("sh")
        .args(["-c", &script, "sh"])
        .args(pids.iter().map(u32::to_string))
        .status()
        .expect("a shell can be started");
    assert!(status.success(), "cannot send SIG{name} to {pids:?}");
}

/// The processes whose parent is `pid`.
pub fn children_of(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|child| parent_of(*child) == Some(pid))
        .collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    // "pid (name) state ppid …"; the name may hold spaces and parentheses.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

/// Whether the process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    })
}

/// The last `count` lines of a file, for messages of failed tests.
pub fn tail(path: &Path, count: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let (earlier, last) = lines.split_at(lines.len().saturating_sub(count));
    // A panic's backtrace is longer than that.
    let panics = earlier
        .windows(2)
        .filter(|two| two[0].contains("panicked at"));
    let panics: Vec<&str> = panics.flatten().copied().collect();
    [panics.as_slice(), last].concat().join("\n")
}
