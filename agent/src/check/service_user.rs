//! Whether the user of the service can read and write what root can: a check that root runs says nothing about that by itself.
//!
//! The user is the one of the unit that comes with dr-agent. Only the rights of files are looked at, by mode, owner and group.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::finding::{Finding, FindingPlace};
use crate::config::Config;

/// The user of `ops/systemd/dr-agent.service`.
const NAME: &str = "dr-agent";

/// Of a directory: to enter it. Of a file: to run it.
const ENTER: u32 = 1;
const WRITE: u32 = 2;
const READ: u32 = 4;

/// A user, as the system's files have it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gids: Vec<u32>,
}

/// Looks at everything that the configuration names, where root runs the check and the service's user exists.
pub(super) fn look(at: &FindingPlace, config: &Config) -> Vec<Finding> {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let user = user(&text("/etc/passwd"), &text("/etc/group"));
    let Some(user) = user.filter(|_| is_root) else {
        return Vec::new();
    };
    let mut findings = vec![at.note(
        "service_user",
        format!(
            "this check runs as root: what ~/.pgpass and the environment give it, user {NAME} need not have. Better: sudo -u \
             {NAME} dr-agent check"
        ),
    )];
    let files = [&config.source.conninfo, &config.replica.conninfo];
    let files = files.iter().flat_map(|conninfo| conninfo.files());
    for (path, bits) in files.map(|path| (path, READ)).chain(
        directories(config)
            .into_iter()
            .map(|path| (path, READ | WRITE | ENTER)),
    ) {
        // A relative name is a credential that systemd hands over.
        if path.is_relative() {
            continue;
        }
        findings.extend(refused(&user, &path, bits).map(|what| {
            at.error(
                "service_user",
                format!("user {NAME}, whom the service runs as, {what}"),
            )
            .on(path.display())
            .hint(format!(
                "chown {NAME}: {}, or give its group the right",
                path.display()
            ))
        }));
    }
    findings
}

fn directories(config: &Config) -> Vec<PathBuf> {
    let spool = config
        .archive
        .as_ref()
        .map(|archive| archive.spool_directory.clone());
    let all = [Some(config.limits.spill_directory.clone()), spool];
    all.into_iter()
        .flatten()
        .filter(|path| path.exists())
        .collect()
}

/// The service's user in the texts of `/etc/passwd` and `/etc/group`.
fn user(passwd: &str, group: &str) -> Option<User> {
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let line = passwd.lines().map(fields).find(|line| line[0] == NAME)?;
    let mut gids = vec![line.get(3)?.parse().ok()?];
    for group in group.lines().map(fields) {
        let has = group
            .get(3)
            .is_some_and(|members| members.split(',').any(|member| member == NAME));
        let gid: Option<u32> = group.get(2).and_then(|gid| gid.parse().ok());
        gids.extend(gid.filter(|_| has));
    }
    Some(User {
        uid: line.get(2)?.parse().ok()?,
        gids,
    })
}

/// What keeps the user from a path; nothing where it is not there, which others say.
fn refused(user: &User, path: &Path, bits: u32) -> Option<String> {
    for directory in path.ancestors().skip(1) {
        let there = std::fs::metadata(directory).ok()?;
        if !may(user, (there.mode(), there.uid(), there.gid()), ENTER) {
            return Some(format!("may not enter {}", directory.display()));
        }
    }
    let there = std::fs::metadata(path).ok()?;
    let owned = (there.mode(), there.uid(), there.gid());
    (!may(user, owned, bits)).then(|| {
        match bits & WRITE {
            0 => "may not read it",
            _ => "may not write there",
        }
        .to_owned()
    })
}

/// What the kernel decides by mode, owner and group.
fn may(user: &User, (mode, owner, group): (u32, u32, u32), bits: u32) -> bool {
    let granted = if user.uid == owner {
        mode >> 6
    } else if user.gids.contains(&group) {
        mode >> 3
    } else {
        mode
    };
    granted & bits == bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_class_that_fits_decides() {
        let user = user(
            "root:x:0:0::/:/bin/sh\ndr-agent:x:990:991::/:/bin/false\n",
            "dr-agent:x:991:\nssl-cert:x:110:postgres,dr-agent\n",
        )
        .unwrap();
        assert_eq!(user.gids, [991, 110]);
        let cases = [
            (0o600, 0, 0, false),
            (0o640, 0, 110, true),
            (0o640, 0, 991, true),
            (0o640, 0, 5, false),
            (0o604, 0, 110, false),
            (0o604, 0, 5, true),
            (0o400, 990, 0, true),
            (0o044, 990, 991, false),
        ];
        for (mode, owner, group, expected) in cases {
            assert_eq!(
                may(&user, (mode, owner, group), READ),
                expected,
                "{mode:o} {owner}:{group}"
            );
        }
        assert!(super::user("root:x:0:0::/:/bin/sh\n", "").is_none());
    }
}
