//! `pg_dump` and `pg_restore`: where they are, whether they are new enough, and running them.
//!
//! `pg_dump` refuses a server of a newer major version, so the tools must be at least as new as the
//! source. Both are taken from one directory, because an archive is read by the version that wrote it.
//!
//! # Invariants
//! - Connection settings and passwords travel in the environment, never on the command line.
//! - A tool dies with the future that runs it.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::error::CopyError;
use super::said;
use crate::pg::{ConnInfo, Session};

/// A version of PostgreSQL's programs or server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// 16 of 16.4.
    pub(crate) major: u32,
    /// 16.4, 17beta1.
    pub(crate) text: String,
}

impl Version {
    /// Reads the answer to `--version`: `pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
    fn of_program(answer: &str) -> Option<Self> {
        let (_, rest) = answer.split_once("(PostgreSQL) ")?;
        let text = rest.split_whitespace().next()?;
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        Some(Self {
            major: text[..digits].parse().ok()?,
            text: text.to_owned(),
        })
    }

    /// From `server_version_num`, for example 160004.
    pub(super) fn of_server(version_num: i32) -> Self {
        let (major, minor) = (version_num / 10_000, version_num % 10_000);
        Self {
            major: u32::try_from(major).unwrap_or(0),
            text: format!("{major}.{minor}"),
        }
    }
}

/// A pair of tools that can dump the source.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    directory: PathBuf,
    /// Their version.
    pub(crate) version: Version,
}

impl fmt::Display for Tools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.version.text, self.directory.display())
    }
}

/// Where to look: the configured directory alone, or `PATH` and then the directories where
/// distributions keep every installed version, newest first.
///
/// Debian's `/usr/bin/pg_dump` is a script that chooses a version by the environment; what it answers
/// to `--version` need not be what it runs later, so it is passed over.
fn directories(pg_bin: Option<&Path>, path: Option<&OsStr>) -> Vec<PathBuf> {
    if let Some(directory) = pg_bin {
        return vec![directory.to_owned()];
    }
    let is_wrapper = |directory: &Path| {
        directory
            .join("pg_dump")
            .canonicalize()
            .is_ok_and(|real| real.file_name() == Some(OsStr::new("pg_wrapper")))
    };
    let mut found: Vec<PathBuf> = path
        .map(|path| std::env::split_paths(path).collect())
        .unwrap_or_default();
    found.retain(|directory: &PathBuf| !is_wrapper(directory));
    let mut installed: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        installed.extend(entries.filter_map(|entry| {
            let name = entry.file_name();
            let major = name.to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((major, entry.path().join("bin")))
        }));
    }
    installed.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    found.extend(installed.into_iter().map(|(_, directory)| directory));
    found
}

impl Tools {
    /// Finds tools that can dump a source of this `server_version_num`.
    pub(crate) async fn find(
        pg_bin: Option<&Path>,
        source_version_num: i32,
    ) -> Result<Self, CopyError> {
        let path = std::env::var_os("PATH");
        let mut candidates = Vec::new();
        for directory in directories(pg_bin, path.as_deref()) {
            candidates.push(ToolCandidate {
                dump: version_of(&directory.join("pg_dump")).await?,
                restore: version_of(&directory.join("pg_restore")).await?,
                directory,
            });
        }
        choose(candidates, &Version::of_server(source_version_num))
    }

    /// Runs `pg_dump` against `server`.
    pub(super) async fn dump(
        &self,
        server: &ToolEnvironment,
        doing: &'static str,
        arguments: &[String],
    ) -> Result<(), CopyError> {
        self.run("pg_dump", Some(server), doing, arguments).await?;
        Ok(())
    }

    /// Runs `pg_restore`, against `server` or without one (`--list`, `--file=-`); returns its
    /// standard output.
    pub(super) async fn restore(
        &self,
        server: Option<&ToolEnvironment>,
        doing: &'static str,
        arguments: &[String],
    ) -> Result<String, CopyError> {
        self.run("pg_restore", server, doing, arguments).await
    }

    /// Runs `pg_dumpall` for the roles alone, without their passwords; returns the SQL.
    pub(crate) async fn roles(
        &self,
        server: &ToolEnvironment,
        database: &str,
    ) -> Result<String, CopyError> {
        let mut arguments = ["--roles-only", "--no-role-passwords", "--no-password"]
            .map(str::to_owned)
            .to_vec();
        // Without it the database "postgres" is asked, where we may have no business. Such a name
        // would be read as a connection string.
        if !database.contains('=') && !database.starts_with("postgres") {
            arguments.push(format!("--database={database}"));
        }
        self.run("pg_dumpall", Some(server), "dump the roles", &arguments)
            .await
    }

    async fn run(
        &self,
        program: &'static str,
        server: Option<&ToolEnvironment>,
        doing: &'static str,
        arguments: &[String],
    ) -> Result<String, CopyError> {
        let path = self.directory.join(program);
        let mut command = Command::new(&path);
        command.args(arguments);
        // Whatever of libpq's the agent was started with belongs to the agent.
        for name in ["PGSERVICE", "PGHOSTADDR", "PGOPTIONS", "PGDATABASE"] {
            command.env_remove(name);
        }
        // Messages are looked at: in English, please.
        command.env("LC_ALL", "C");
        if let Some(ToolEnvironment(variables)) = server {
            command.envs(variables.iter().map(|(name, value)| (name, value)));
        }
        let output = command
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|source| CopyError::ToolStart {
                program: path.display().to_string(),
                source,
            })?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            if said::is_lost_snapshot(&stderr) {
                return Err(CopyError::SnapshotLost);
            }
            return Err(CopyError::ToolFailed {
                program,
                doing,
                stderr: match said::essence(&stderr) {
                    said if said.is_empty() => output.status.to_string(),
                    said => said,
                },
            });
        }
        if !stderr.trim().is_empty() {
            tracing::debug!(program, said = said::essence(&stderr), "tool succeeded");
        }
        String::from_utf8(output.stdout).map_err(|_| CopyError::ToolFailed {
            program,
            doing,
            stderr: "its output is not UTF-8".to_owned(),
        })
    }
}

/// What one directory holds.
struct ToolCandidate {
    directory: PathBuf,
    dump: Option<Version>,
    restore: Option<Version>,
}

/// The first pair that is new enough; otherwise the error that says what there is.
fn choose(candidates: Vec<ToolCandidate>, source: &Version) -> Result<Tools, CopyError> {
    let mut too_old: Option<Tools> = None;
    let mut program = "pg_dump";
    for candidate in candidates {
        let Some(version) = candidate.dump else {
            continue;
        };
        if candidate.restore.as_ref() != Some(&version) {
            program = "pg_restore";
            continue;
        }
        let directory = candidate.directory;
        let tools = Tools { directory, version };
        if tools.version.major >= source.major {
            return Ok(tools);
        }
        if too_old
            .as_ref()
            .is_none_or(|old| old.version.major < tools.version.major)
        {
            too_old = Some(tools);
        }
    }
    let source_version = source.text.clone();
    Err(match too_old {
        Some(tools) => CopyError::ToolTooOld {
            program: "pg_dump",
            needed: source.major,
            source_version,
            found: tools.version.text,
            path: tools.directory.join("pg_dump"),
        },
        None => CopyError::ToolMissing {
            program,
            needed: source.major,
            source_version,
        },
    })
}

/// The environment a tool needs to reach one server.
#[derive(Clone)]
pub(crate) struct ToolEnvironment(Vec<(String, String)>);

impl ToolEnvironment {
    /// For sessions like this one with a server of this `server_version_num`.
    pub(super) fn new(conninfo: &ConnInfo, session: &Session, version_num: i32) -> Self {
        let own = session.libpq_environment(conninfo, version_num);
        let mut variables = conninfo.libpq_environment();
        variables.retain(|(name, _)| own.iter().all(|(ours, _)| ours != name));
        variables.extend(own);
        Self(variables)
    }
}

async fn version_of(program: &Path) -> Result<Option<Version>, CopyError> {
    if !program.is_file() {
        return Ok(None);
    }
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| CopyError::ToolStart {
            program: program.display().to_string(),
            source,
        })?;
    Ok(Version::of_program(&String::from_utf8_lossy(
        &output.stdout,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases_packages_and_betas() {
        let cases = [
            (
                "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n",
                15,
                "15.18",
            ),
            ("pg_restore (PostgreSQL) 17beta1\n", 17, "17beta1"),
            ("pg_dump (PostgreSQL) 18\n", 18, "18"),
        ];
        for (answer, major, text) in cases {
            let version = Version::of_program(answer).unwrap();
            assert_eq!((version.major, version.text.as_str()), (major, text));
        }
        assert_eq!(Version::of_program("pg_dump: not found"), None);
        assert_eq!(Version::of_server(160_004).text, "16.4");
    }

    fn candidate(directory: &str, dump: &str, restore: Option<&str>) -> ToolCandidate {
        let version = |text: &str| Version::of_program(&format!("x (PostgreSQL) {text}"));
        ToolCandidate {
            directory: PathBuf::from(directory),
            dump: version(dump),
            restore: restore.and_then(version),
        }
    }

    #[test]
    fn the_first_pair_new_enough_is_taken_and_otherwise_the_newest_is_named() {
        let source = Version::of_server(160_004);
        let old = || candidate("/old", "15.18 (Debian)", Some("15.18 (Debian)"));
        let older = || candidate("/older", "14.1", Some("14.1"));
        let new = candidate("/new", "17.2", Some("17.2"));
        let found = choose(vec![older(), old(), new], &source).unwrap();
        assert_eq!(found.directory, Path::new("/new"));
        let error = choose(vec![older(), old()], &source).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pg_dump 16 or newer needed: source is 16.4, found 15.18 at /old/pg_dump"
        );
        let half = candidate("/half", "17.2", None);
        let error = choose(vec![half], &source).unwrap_err();
        assert!(
            error.to_string().starts_with("pg_restore 16 or newer"),
            "{error}"
        );
        assert!(matches!(
            choose(vec![], &source),
            Err(CopyError::ToolMissing {
                program: "pg_dump",
                ..
            })
        ));
    }

    #[test]
    fn only_the_configured_directory_counts_when_there_is_one() {
        let configured = Path::new("/opt/pg/bin");
        assert_eq!(
            directories(Some(configured), Some(OsStr::new("/usr/bin"))),
            [configured]
        );
    }
}
