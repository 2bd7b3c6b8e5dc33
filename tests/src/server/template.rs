//! Data directories: initialised once per run, copied for every server, given to the user servers run as.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex};

use super::lock;
use crate::binaries::Binaries;
use crate::rundir::{run_directory, tail, unprivileged};

/// A program of PostgreSQL, run as the user the servers run as.
pub(crate) fn server_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some(user) = unprivileged() {
        command.uid(user.uid).gid(user.gid);
    }
    command.current_dir("/").env("LC_ALL", "C").env("TZ", "UTC");
    command
}

/// Gives a file to the user the servers run as.
pub(crate) fn give_away(path: &Path) {
    if let Some(user) = unprivileged() {
        chown(path, Some(user.uid), Some(user.gid)).expect("root may give files away");
    }
}

/// Copies the template data directory of this version and name, initialising it the first time.
pub(super) fn copy_template(binaries: &Binaries, name: &'static str, data: &Path) {
    type Templates = HashMap<(PathBuf, &'static str), PathBuf>;
    static TEMPLATES: LazyLock<Mutex<Templates>> = LazyLock::new(Mutex::default);
    let template = {
        let mut templates = lock(&TEMPLATES);
        templates
            .entry((binaries.directory.clone(), name))
            .or_insert_with(|| initialise_template(binaries, name))
            .clone()
    };
    let output = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(&template)
        .arg(data)
        .output()
        .expect("cp can be started");
    assert!(
        output.status.success(),
        "cannot copy the template data directory: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn initialise_template(binaries: &Binaries, name: &str) -> PathBuf {
    let parent = run_directory().join(format!("template-{name}-{}", binaries.major));
    fs::create_dir_all(&parent).expect("the run directory is ours");
    give_away(&parent);
    let data = parent.join("data");
    let log = File::create(parent.join("initdb.log")).expect("the run directory is ours");
    let status = server_command(&binaries.program("initdb"))
        .args(["--no-sync", "-U", "postgres", "-A", "trust", "-E", "UTF8"])
        .args(["--locale", "C.UTF-8", "-D"])
        .arg(&data)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .status()
        .expect("initdb can be started");
    assert!(
        status.success(),
        "initdb failed:\n{}",
        tail(&parent.join("initdb.log"), 20)
    );
    data
}
