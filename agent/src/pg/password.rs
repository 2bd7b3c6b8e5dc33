//! Where a session's password comes from.
//!
//! Looked up for every new session, so that a changed password needs no restart. In order: the URL,
//! `password_file`, `PGPASSWORD`, then libpq's password file (`passfile`, `PGPASSFILE`, `~/.pgpass`).
//! PostgreSQL documentation, "The Password File".
//!
//! # Invariants
//! - A `password_file` that is configured and cannot be read is an error, never "no password".
//! - No password is part of an error or a log line.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::conninfo::Host;
use super::{ConnInfo, PgError};

/// Larger than any password; keeps us from reading a device or the wrong file into memory.
const PASSWORD_BYTES_MAX: u64 = 64 * 1024;

/// Finds the password for one host; `None` where there is none, which trust, peer and certificate
/// authentication are content with.
pub(super) fn find(
    conninfo: &ConnInfo,
    host: &Host,
    replication: bool,
) -> Result<Option<String>, PgError> {
    let configured = configured(conninfo).map_err(|reason| PgError::Password {
        user: conninfo.user.clone(),
        server: host.to_string(),
        reason,
    })?;
    if configured.is_some() {
        return Ok(configured);
    }
    if let Some(password) = std::env::var("PGPASSWORD").ok().filter(|p| !p.is_empty()) {
        return Ok(Some(password));
    }
    Ok(passfile(conninfo).and_then(|path| from_passfile(&path, conninfo, host, replication)))
}

/// The password of the URL or of `password_file`; an error says what is wrong with the file.
pub(super) fn configured(conninfo: &ConnInfo) -> Result<Option<String>, String> {
    if conninfo.password.is_some() {
        return Ok(conninfo.password.clone());
    }
    match &conninfo.password_file {
        Some(file) => {
            let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
            from_password_file(&credential_path(file, credentials.as_deref())).map(Some)
        }
        None => Ok(None),
    }
}

/// A relative name is one of systemd's credentials (`LoadCredential=`), where the unit has any.
fn credential_path(file: &Path, credentials: Option<&Path>) -> PathBuf {
    match credentials {
        Some(directory) if file.is_relative() => directory.join(file),
        _ => file.to_owned(),
    }
}

fn from_password_file(path: &Path) -> Result<String, String> {
    let unusable = |what: &str| format!("password_file {}: {what}", path.display());
    let length = fs::metadata(path)
        .map_err(|e| unusable(&e.to_string()))?
        .len();
    if length > PASSWORD_BYTES_MAX {
        return Err(unusable("too large for a password"));
    }
    let text = fs::read_to_string(path).map_err(|e| unusable(&e.to_string()))?;
    // Editors and `echo` end the file with a line break that is not part of the password.
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        return Err(unusable("the file is empty"));
    }
    Ok(password.to_owned())
}

fn passfile(conninfo: &ConnInfo) -> Option<PathBuf> {
    let named = conninfo.passfile.clone();
    named
        .or_else(|| {
            std::env::var_os("PGPASSFILE")
                .filter(|p| !p.is_empty())
                .map(PathBuf::from)
        })
        .or_else(|| std::env::home_dir().map(|home| home.join(".pgpass")))
}

fn from_passfile(
    path: &Path,
    conninfo: &ConnInfo,
    host: &Host,
    replication: bool,
) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    // /dev/null and the like are a usual way to say "no password file".
    if !metadata.is_file() {
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            file = %path.display(),
            "password file is ignored: it is open to the group or the world; chmod 0600"
        );
        return None;
    }
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "password file cannot be read");
            return None;
        }
    };
    let wanted = WantedPassword {
        // A socket in the default place is `localhost` in a password file.
        host: match host.name.as_str() {
            "/var/run/postgresql" | "/run/postgresql" | "/tmp" => "localhost",
            name => name,
        },
        port: &host.port.to_string(),
        dbname: &conninfo.dbname,
        user: &conninfo.user,
        replication,
    };
    wanted.search(&text)
}

/// What a line of the password file must match.
struct WantedPassword<'a> {
    host: &'a str,
    port: &'a str,
    dbname: &'a str,
    user: &'a str,
    /// A walsender session matches the word `replication` in place of its database, too.
    replication: bool,
}

impl WantedPassword<'_> {
    fn search(&self, text: &str) -> Option<String> {
        text.lines().find_map(|line| {
            if line.starts_with('#') {
                return None;
            }
            let [host, port, dbname, user, password] = fields(line)?;
            let is = |field: &Field, value: &str| field.any || field.text == value;
            let matches = is(&host, self.host)
                && is(&port, self.port)
                && (is(&dbname, self.dbname) || self.replication && dbname.text == "replication")
                && is(&user, self.user)
                && !password.text.is_empty();
            matches.then_some(password.text)
        })
    }
}

struct Field {
    text: String,
    /// An unescaped `*` alone.
    any: bool,
}

/// `host:port:database:user:password`; a backslash protects the character behind it. In the
/// password a colon needs no protection.
fn fields(line: &str) -> Option<[Field; 5]> {
    let mut chars = line.chars();
    let mut field = |is_last: bool| {
        let (mut text, mut escaped) = (String::new(), false);
        loop {
            match chars.next() {
                Some(':') if !is_last => break,
                Some('\\') => {
                    escaped = true;
                    text.extend(chars.next());
                }
                Some(c) => text.push(c),
                None if is_last => break,
                None => return None,
            }
        }
        let any = text == "*" && !escaped;
        Some(Field { text, any })
    };
    Some([
        field(false)?,
        field(false)?,
        field(false)?,
        field(false)?,
        field(true)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(text: &str, replication: bool) -> Option<String> {
        WantedPassword {
            host: "db",
            port: "5432",
            dbname: "app",
            user: "me",
            replication,
        }
        .search(text)
    }

    #[test]
    fn the_first_matching_line_of_the_password_file_wins() {
        let table = [
            ("db:5432:app:me:one", Some("one")),
            ("*:*:*:*:any", Some("any")),
            (
                "# db:5432:app:me:no\n\nother:*:*:*:no\ndb:*:*:me:yes\n*:*:*:*:late",
                Some("yes"),
            ),
            ("db:5432:app:me:with:colon", Some("with:colon")),
            (r"db:5432:app:me:back\\slash\:x", Some(r"back\slash:x")),
            (r"\*:*:*:*:literal star", None),
            ("db:5432:app:you:no", None),
            ("db:5432:app:me", None),
            ("db:5432:app:me:", None),
            ("db:5432:replication:me:walsender only", None),
        ];
        for (text, expected) in table {
            assert_eq!(search(text, false).as_deref(), expected, "{text}");
        }
        assert_eq!(
            search("db:5432:replication:me:r", true).as_deref(),
            Some("r")
        );
        assert_eq!(search("db:5432:app:me:r", true).as_deref(), Some("r"));
    }

    #[test]
    fn a_password_file_loses_its_line_break_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pw");
        for (text, expected) in [
            ("a b ", "a b "),
            ("x\n", "x"),
            ("x\r\n", "x"),
            ("x\n\n", "x\n"),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(from_password_file(&path).unwrap(), expected);
        }
        fs::write(&path, "\n").unwrap();
        assert!(from_password_file(&path).unwrap_err().contains("empty"));
    }

    #[test]
    fn a_missing_password_file_is_an_error_that_names_it() {
        let info = ConnInfo::parse("postgres://u@h/d", Some("/no/such/file".into())).unwrap();
        let error = find(&info, &info.hosts[0], false).unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }

    #[test]
    fn a_relative_password_file_is_a_systemd_credential() {
        let directory = Some(Path::new("/run/credentials/x"));
        let path = |file: &str, directory| credential_path(Path::new(file), directory);
        assert_eq!(path("pw", directory), Path::new("/run/credentials/x/pw"));
        assert_eq!(path("/etc/pw", directory), Path::new("/etc/pw"));
        assert_eq!(path("pw", None), Path::new("pw"));
    }

    #[test]
    fn a_password_file_open_to_others_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pgpass");
        fs::write(&path, "*:*:*:*:pw\n").unwrap();
        let info = ConnInfo::parse("postgres://u@h/d", None).unwrap();
        for (mode, expected) in [(0o644, None), (0o640, None), (0o600, Some("pw"))] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let found = from_passfile(&path, &info, &info.hosts[0], false);
            assert_eq!(found.as_deref(), expected, "{mode:o}");
        }
    }
}
