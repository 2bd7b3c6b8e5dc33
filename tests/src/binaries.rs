//! Which PostgreSQL the servers of a test are.
//!
//! `DR_AGENT_PG_BIN` names the directory of the source's binaries, `DR_AGENT_PG_BIN_REPLICA` the
//! replica's (default: the source's). Without them: `postgres` on `PATH`, then the newest version under
//! `/usr/lib/postgresql`.
//!
//! # Invariants
//! Where no server can be found the tests fail with instructions; they never pass silently.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory of server binaries and the version found there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    /// Holds `postgres`, `initdb`, `pg_dump` and `pg_restore`.
    pub directory: PathBuf,
    /// The major version: 15 for 15.4.
    pub major: u32,
}

impl Binaries {
    /// The source's binaries.
    pub fn of_source() -> Self {
        match env::var_os("DR_AGENT_PG_BIN") {
            Some(directory) => Self::at(Path::new(&directory)),
            None => Self::installed(),
        }
    }

    /// The replica's binaries.
    pub fn of_replica() -> Self {
        match env::var_os("DR_AGENT_PG_BIN_REPLICA") {
            Some(directory) => Self::at(Path::new(&directory)),
            None => Self::of_source(),
        }
    }

    /// The newer of the two: `pg_dump` reads older servers, not newer ones.
    pub fn newest_of_both() -> Self {
        let (source, replica) = (Self::of_source(), Self::of_replica());
        if replica.major > source.major {
            replica
        } else {
            source
        }
    }

    /// The path of one program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn at(directory: &Path) -> Self {
        let major = major_version(directory).unwrap_or_else(|| {
            panic!(
                "{} holds no working PostgreSQL server; set DR_AGENT_PG_BIN to a directory with \
                 postgres, initdb, pg_dump and pg_restore",
                directory.display()
            )
        });
        Self {
            directory: directory.to_path_buf(),
            major,
        }
    }

    fn installed() -> Self {
        let path = env::var_os("PATH").unwrap_or_default();
        // PATH often holds links to a few of the programs; all are where the links lead.
        let on_path = env::split_paths(&path).filter_map(|directory| {
            let program = directory.join("postgres").canonicalize().ok()?;
            Some(program.parent()?.to_path_buf())
        });
        let packaged = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")));
        let mut packaged: Vec<(u32, PathBuf)> = packaged
            .filter_map(|directory| Some((major_version(&directory)?, directory)))
            .collect();
        packaged.sort();
        on_path
            .filter_map(|directory| Some((major_version(&directory)?, directory)))
            .next()
            .or_else(|| packaged.pop())
            .map(|(major, directory)| Self { directory, major })
            .expect(
                "no PostgreSQL server found: install the packages postgresql and \
                 postgresql-contrib, or set DR_AGENT_PG_BIN to a directory with postgres, initdb, \
                 pg_dump and pg_restore",
            )
    }
}

fn major_version(directory: &Path) -> Option<u32> {
    // "postgres (PostgreSQL) 15.4 (Debian …)", "postgres (PostgreSQL) 18beta1".
    let output = Command::new(directory.join("postgres"))
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}
