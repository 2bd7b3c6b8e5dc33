//! A file system that is soon full.
//!
//! # Invariants
//! - It is gone with its value; [`crate::rundir`] unmounts what a test process leaves that dies.
//!
//! # What it does not do
//! Mounting needs root. Where a test may not have that, `DR_AGENT_TEST_NO_MOUNT` leaves it out, and says so.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::rundir::{directory_for, unprivileged};

const SWITCH: &str = "DR_AGENT_TEST_NO_MOUNT";

/// A file system in memory, of a certain size, that servers may write to.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size (`24m`); `None` where that is left out.
    pub fn mount(size: &str) -> Option<Self> {
        if std::env::var_os(SWITCH).is_some() {
            eprintln!("NOT TESTED: a full disk ({SWITCH} is set)");
            return None;
        }
        let Some(user) = unprivileged() else {
            panic!(
                "this test mounts a small tmpfs: run as root, or set {SWITCH}=1 to leave it out"
            );
        };
        let path = directory_for("disk");
        let owner = format!("mode=0700,uid={},gid={}", user.uid, user.gid);
        mount(&path, &format!("size={size},{owner}"));
        Some(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it larger.
    pub fn grow(&self, size: &str) {
        mount(&self.0, &format!("remount,size={size}"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server may still have files open. The reaper would do it as well.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(path: &Path, options: &str) {
    let output = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "dr-agent-e2e"])
        .arg(path)
        .output()
        .expect("mount can be started");
    assert!(
        output.status.success(),
        "mount: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
