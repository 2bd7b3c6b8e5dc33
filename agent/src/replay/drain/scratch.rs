//! Where a drain puts what does not fit into memory: a directory of its own, which goes with it.
//!
//! Not the agent's spill directory of the same stream: that one may still run, and its files are its own. And not only below
//! `limits.spill_directory`, which the packaged unit keeps for user dr-agent: a person who promotes has to be member of the
//! group, and no more.
//!
//! # Invariants
//! - Nobody else can look into it.
//! - What a drain that was killed left below `limits.spill_directory` is removed by the next one.
//!
//! # What it does not do
//! It does not look after other temporary directories: what a killed drain leaves there goes as everything does there.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::config::Limits;
use crate::flow::spill::SpillError;
use crate::names::stream::StreamName;

/// Where `TMPDIR` names nothing else. Unlike /tmp it is on a disk everywhere: there may be `limits.spill_bytes` of it.
const TEMPORARY: &str = "/var/tmp";

/// Makes it: below `limits.spill_directory` where that can be written, else in the directory for temporary files.
///
/// # Errors
/// [`SpillError::Io`] where neither can be written.
pub(super) fn make(limits: &Limits, stream: &StreamName) -> Result<TempDir, SpillError> {
    let temporary = std::env::var_os("TMPDIR").map_or_else(|| TEMPORARY.into(), PathBuf::from);
    make_in(&limits.spill_directory, stream)
        .or_else(|_| make_in(&temporary, stream))
        .map_err(|source| SpillError::Io {
            doing: "create",
            path: temporary.join(prefix(stream)),
            source,
        })
}

fn make_in(directory: &Path, stream: &StreamName) -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix(&prefix(stream))
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(directory)
}

/// Removes what a killed drain of this stream has left. Nobody else may be draining it.
pub(super) fn remove_old(limits: &Limits, stream: &StreamName) {
    let Ok(entries) = fs::read_dir(&limits.spill_directory) else {
        return;
    };
    let prefix = prefix(stream);
    for entry in entries.filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(&prefix)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "left by an earlier promotion and not removed");
        }
    }
}

/// A stream's name has no period: it is no beginning of another's.
fn prefix(stream: &StreamName) -> String {
    format!("{stream}.promotion-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits(directory: &Path) -> Limits {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\n[replica]\nurl = \"postgres://b@localhost/y\"\n\
             [limits]\nspill_directory = \"{}\"\n",
            directory.display()
        );
        Config::parse("f", &text, []).unwrap().limits
    }

    #[test]
    fn it_is_private_and_what_a_killed_drain_left_goes() {
        let home = tempfile::tempdir().unwrap();
        let limits = limits(home.path());
        let [app, app2] = ["app", "app2"].map(|name| StreamName::new("dr_agent", name));
        let left = make(&limits, &app).unwrap().keep();
        fs::write(left.join("1.spill"), b"old").unwrap();
        let other = make(&limits, &app2).unwrap();
        assert_eq!(left.parent(), Some(home.path()));
        let mode = fs::metadata(&left).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::create_dir(home.path().join(app.as_str())).unwrap();
        remove_old(&limits, &app);
        assert!(!left.exists());
        assert!(other.path().exists() && home.path().join(app.as_str()).exists());
    }
}
