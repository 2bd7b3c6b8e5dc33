//! What the settings of a connection string mean, by libpq's rules.
//!
//! [`super::syntax`] has taken the text apart into a list, later settings winning; [`build`] gives them
//! their meaning and fills in the defaults. PostgreSQL documentation, "Parameter Key Words".
//!
//! # What it does not do
//! Nothing is connected to or opened, except that without `user` the name of the operating-system
//! user is looked up.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::syntax::{self, Settings};
use super::{
    ChannelBinding, ConnInfo, ConnInfoError, Host, Keepalive, SslMode, TargetSessionAttrs,
};

/// Long enough for a distant site over a bad line, short enough that the next host gets its turn
/// within the recovery time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn parse(url: &str) -> Result<ConnInfo, ConnInfoError> {
    let rest = url
        .strip_prefix("postgres://")
        .or_else(|| url.strip_prefix("postgresql://"));
    let settings = match rest {
        Some(rest) => syntax::url(rest)?,
        None if url.contains('=') => syntax::keywords(url)?,
        None => {
            return Err(ConnInfoError(
                "neither a postgres:// URL nor key=value settings".to_owned(),
            ));
        }
    };
    build(settings)
}

/// Gives the settings their meaning and fills in libpq's defaults.
fn build(settings: Settings) -> Result<ConnInfo, ConnInfoError> {
    let (mut host, mut hostaddr, mut port) = (None, None, None);
    let (mut user, mut dbname, mut ssl_mode) = (None, None, None);
    let mut info = ConnInfo {
        hosts: Vec::new(),
        user: String::new(),
        dbname: String::new(),
        password: None,
        password_file: None,
        passfile: None,
        ssl_mode: SslMode::Prefer,
        ssl_direct: false,
        ssl_root_cert: None,
        ssl_cert: None,
        ssl_key: None,
        channel_binding: ChannelBinding::Prefer,
        connect_timeout: Some(CONNECT_TIMEOUT),
        target_session_attrs: TargetSessionAttrs::Any,
        keepalive: Keepalive::default(),
        options: None,
        bandwidth: None,
    };
    for (name, value) in settings {
        let seconds = || number::<u32>(&name, &value).map(|s| Duration::from_secs(s.into()));
        let file = || Some(PathBuf::from(&value)).filter(|_| !value.is_empty());
        match name.as_str() {
            "host" => host = Some(value),
            "hostaddr" => hostaddr = Some(value),
            "port" => port = Some(value),
            "user" => user = Some(value),
            "password" => info.password = Some(value).filter(|p| !p.is_empty()),
            "dbname" => dbname = Some(value),
            "passfile" => info.passfile = file(),
            "sslmode" => ssl_mode = Some(word(&name, &value, SSL_MODES)?),
            // JDBC's spelling, which libpq understands as well.
            "ssl" => ssl_mode = word(&name, &value, &[("true", Some(SslMode::Require))])?,
            "sslnegotiation" => {
                info.ssl_direct = word(&name, &value, &[("postgres", false), ("direct", true)])?;
            }
            "sslrootcert" => info.ssl_root_cert = file(),
            "sslcert" => info.ssl_cert = file(),
            "sslkey" => info.ssl_key = file(),
            "channel_binding" => info.channel_binding = word(&name, &value, CHANNEL_BINDINGS)?,
            "connect_timeout" => {
                // Zero means no limit.
                info.connect_timeout = Some(seconds()?).filter(|limit| !limit.is_zero());
            }
            "target_session_attrs" => {
                info.target_session_attrs = word(&name, &value, SESSION_ATTRS)?;
            }
            "keepalives" => info.keepalive.enabled = number::<u32>(&name, &value)? != 0,
            "keepalives_idle" => info.keepalive.idle = seconds()?,
            "keepalives_interval" => info.keepalive.interval = seconds()?,
            "keepalives_count" => info.keepalive.count = number(&name, &value)?,
            "tcp_user_timeout" => {
                let millis = number::<u32>(&name, &value)?;
                info.keepalive.user_timeout = Duration::from_millis(millis.into());
            }
            "options" => info.options = Some(value).filter(|o| !o.is_empty()),
            // Every session of ours has a name of its own.
            "application_name" | "fallback_application_name" => {}
            // We speak no GSSAPI and try the hosts in order: only values that agree are taken.
            "gssencmode" => word(&name, &value, &[("disable", ()), ("prefer", ())])?,
            "load_balance_hosts" => word(&name, &value, &[("disable", ())])?,
            _ => {
                return Err(ConnInfoError(format!(
                    "unknown connection parameter `{name}`"
                )));
            }
        }
    }

    info.user = match user.filter(|user| !user.is_empty()) {
        Some(user) => user,
        None => operating_system_user().ok_or_else(|| {
            ConnInfoError("user: none is named and the system does not name us either".to_owned())
        })?,
    };
    info.dbname = dbname
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| info.user.clone());
    info.hosts = hosts(host.as_deref(), hostaddr.as_deref(), port.as_deref())?;

    let system_roots = info.ssl_root_cert.as_deref() == Some(Path::new("system"));
    // With public roots anybody may hold a valid certificate, so the name must be checked: libpq's rule.
    let default_mode = if system_roots {
        SslMode::VerifyFull
    } else {
        SslMode::Prefer
    };
    info.ssl_mode = ssl_mode.unwrap_or(default_mode);
    if system_roots && info.ssl_mode != SslMode::VerifyFull {
        return Err(ConnInfoError(
            "sslrootcert=system goes with sslmode=verify-full only".to_owned(),
        ));
    }
    if info.ssl_direct && info.ssl_mode < SslMode::Require {
        return Err(ConnInfoError(
            "sslnegotiation=direct needs sslmode=require or stronger".to_owned(),
        ));
    }
    Ok(info)
}

const SSL_MODES: &[(&str, SslMode)] = &[
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

const CHANNEL_BINDINGS: &[(&str, ChannelBinding)] = &[
    ("disable", ChannelBinding::Disable),
    ("prefer", ChannelBinding::Prefer),
    ("require", ChannelBinding::Require),
];

const SESSION_ATTRS: &[(&str, TargetSessionAttrs)] = &[
    ("any", TargetSessionAttrs::Any),
    ("read-write", TargetSessionAttrs::ReadWrite),
    ("read-only", TargetSessionAttrs::ReadOnly),
    ("primary", TargetSessionAttrs::Primary),
    ("standby", TargetSessionAttrs::Standby),
    ("prefer-standby", TargetSessionAttrs::PreferStandby),
];

fn word<T: Copy>(name: &str, value: &str, known: &[(&str, T)]) -> Result<T, ConnInfoError> {
    known
        .iter()
        .find(|(word, _)| *word == value)
        .map(|(_, meaning)| *meaning)
        .ok_or_else(|| {
            let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
            ConnInfoError(format!("{name}: `{value}` is none of {}", words.join(", ")))
        })
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, ConnInfoError> {
    value
        .trim()
        .parse()
        .map_err(|_| ConnInfoError(format!("{name}: `{value}` is not a number in its range")))
}

/// Pairs host names, addresses and ports; one port serves all hosts.
fn hosts(
    host: Option<&str>,
    hostaddr: Option<&str>,
    port: Option<&str>,
) -> Result<Vec<Host>, ConnInfoError> {
    let split = |list: Option<&str>| -> Vec<String> {
        list.filter(|list| !list.is_empty())
            .map(|list| list.split(',').map(|item| item.trim().to_owned()).collect())
            .unwrap_or_default()
    };
    let (names, addresses, ports) = (split(host), split(hostaddr), split(port));
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err(ConnInfoError(format!(
            "hostaddr: {} addresses for {} hosts",
            addresses.len(),
            names.len()
        )));
    }
    let count = names.len().max(addresses.len()).max(1);
    if ports.len() > 1 && ports.len() != count {
        return Err(ConnInfoError(format!(
            "port: {} ports for {count} hosts",
            ports.len()
        )));
    }
    (0..count)
        .map(|index| {
            let addr = match addresses.get(index).filter(|a| !a.is_empty()) {
                Some(text) => Some(text.parse().map_err(|_| {
                    ConnInfoError(format!("hostaddr: `{text}` is not a network address"))
                })?),
                None => None,
            };
            let name = match (names.get(index).filter(|n| !n.is_empty()), addr) {
                (Some(name), _) => name.clone(),
                (None, Some(_)) => addresses[index].clone(),
                (None, None) => default_socket_directory(),
            };
            let port = ports.get(index).or(ports.first());
            let port = match port.filter(|p| !p.is_empty()) {
                Some(text) => number("port", text)?,
                None => 5432,
            };
            if port == 0 {
                return Err(ConnInfoError(
                    "port: `0` is not a number in its range".to_owned(),
                ));
            }
            Ok(Host { name, addr, port })
        })
        .collect()
}

/// Where Debian, Red Hat and most packagers put the socket; elsewhere PostgreSQL's own default.
fn default_socket_directory() -> String {
    let packaged = "/var/run/postgresql";
    let directory = if Path::new(packaged).is_dir() {
        packaged
    } else {
        "/tmp"
    };
    directory.to_owned()
}

/// The name of the user this process runs as. Users that only a directory service knows are
/// found through `USER`.
fn operating_system_user() -> Option<String> {
    let uid = std::fs::metadata("/proc/self").ok()?.uid().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let local = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    local.or_else(|| std::env::var("USER").ok().filter(|name| !name.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> ConnInfo {
        parse(url).unwrap_or_else(|e| panic!("{url}: {e}"))
    }

    #[test]
    fn urls_mean_what_libpq_says_they_mean() {
        let table = [
            // (URL, hosts, user, dbname)
            ("postgres://u@h/d", "h:5432", "u", "d"),
            ("postgresql://u@h:6000/d", "h:6000", "u", "d"),
            ("postgres://u@h", "h:5432", "u", "u"),
            ("postgres://u:p@h1:1,h2:2/d", "h1:1,h2:2", "u", "d"),
            ("postgres://u@h1,h2/d?port=7", "h1:7,h2:7", "u", "d"),
            ("postgres://u@[::1]:6000/d", "[::1]:6000", "u", "d"),
            (
                "postgres://u@[2001:db8::1]/d",
                "[2001:db8::1]:5432",
                "u",
                "d",
            ),
            ("postgres://u@%2Frun%2Fpg:6000/d", "/run/pg:6000", "u", "d"),
            (
                "postgres:///d?host=/run/pg&user=u",
                "/run/pg:5432",
                "u",
                "d",
            ),
            ("postgres://u%40corp@h/d%20b", "h:5432", "u@corp", "d b"),
            ("host=h port=6 user=u dbname=d", "h:6", "u", "d"),
            (
                r"host = h user='u \'x\\' dbname=a\ b",
                "h:5432",
                r"u 'x\",
                "a b",
            ),
            (
                "hostaddr=10.0.0.1 user=u dbname=d",
                "10.0.0.1:5432",
                "u",
                "d",
            ),
            (
                "host=a,b hostaddr=10.0.0.1,::1 user=u",
                "a:5432,b:5432",
                "u",
                "u",
            ),
        ];
        for (url, hosts, user, dbname) in table {
            let info = read(url);
            assert_eq!(info.to_string(), format!("{hosts}/{dbname}"), "{url}");
            assert_eq!(info.user(), user, "{url}");
            assert_eq!(info.dbname(), dbname, "{url}");
        }
    }

    #[test]
    fn settings_reach_their_fields() {
        let info = read(
            "postgres://u:p%3Aw@h/d?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c.pem&\
             sslkey=/k.pem&channel_binding=require&connect_timeout=3&target_session_attrs=primary&\
             keepalives=0&keepalives_idle=5&keepalives_interval=6&keepalives_count=7&\
             tcp_user_timeout=800&application_name=x&options=-c%20work_mem=1MB&passfile=/pp",
        );
        assert_eq!(info.password.as_deref(), Some("p:w"));
        assert_eq!(info.ssl_mode, SslMode::VerifyFull);
        assert_eq!(info.ssl_root_cert.as_deref(), Some(Path::new("/ca.pem")));
        assert_eq!(info.channel_binding, ChannelBinding::Require);
        assert_eq!(info.connect_timeout, Some(Duration::from_secs(3)));
        assert_eq!(info.target_session_attrs, TargetSessionAttrs::Primary);
        assert_eq!(
            info.keepalive,
            Keepalive {
                enabled: false,
                idle: Duration::from_secs(5),
                interval: Duration::from_secs(6),
                count: 7,
                user_timeout: Duration::from_millis(800),
            }
        );
        assert_eq!(info.options.as_deref(), Some("-c work_mem=1MB"));
        assert_eq!(info.passfile.as_deref(), Some(Path::new("/pp")));
    }

    #[test]
    fn defaults_are_those_of_libpq() {
        let info = read("postgres://");
        assert!(info.hosts()[0].is_unix());
        assert_eq!(info.hosts()[0].port, 5432);
        assert_eq!(info.dbname(), info.user());
        assert_eq!(info.ssl_mode, SslMode::Prefer);
        assert_eq!(
            read("postgres://h?sslrootcert=system").ssl_mode,
            SslMode::VerifyFull
        );
        assert_eq!(read("postgres://h?connect_timeout=0").connect_timeout, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let table = [
            ("h", "neither"),
            ("http://h/d=1", "unknown connection parameter `http://h/d`"),
            (
                "postgres://h?sslmod=require",
                "unknown connection parameter `sslmod`",
            ),
            (
                "postgres://h?sslmode=on",
                "sslmode: `on` is none of disable, allow",
            ),
            ("postgres://h:70000", "port: `70000`"),
            ("postgres://h:0", "port: `0`"),
            ("postgres://h1,h2,h3?port=1,2", "port: 2 ports for 3 hosts"),
            ("postgres://[::1", "bracket is not closed"),
            ("postgres://[::1]5432", "only `:port`"),
            ("postgres://u:%zz@h", "password: a `%`"),
            ("postgres://u:%ff@h", "password: not UTF-8"),
            ("postgres://u:%é@h", "password: a `%`"),
            ("postgres://u:%0@h", "password: a `%`"),
            ("postgres://h?sslmode", "`sslmode` has no value"),
            ("host='h", "host: the quote is not closed"),
            ("host h=", "lacks its `=`"),
            ("postgres://h?hostaddr=x", "hostaddr: `x`"),
            (
                "postgres://h?sslmode=require&sslrootcert=system",
                "verify-full only",
            ),
            ("postgres://h?sslnegotiation=direct", "sslmode=require"),
            ("postgres://h?gssencmode=require", "gssencmode"),
        ];
        for (url, expected) in table {
            let error = parse(url).expect_err(url).to_string();
            assert!(error.contains(expected), "{url}: {error}");
        }
    }

    #[test]
    fn no_text_shows_the_password() {
        let info = read("postgres://u:s3cret@h/d");
        assert!(!format!("{info} {info:?}").contains("s3cret"));
        let error = parse("host=h password=s3 cret user=u")
            .expect_err("space")
            .to_string();
        assert!(!error.contains("cret"), "{error}");
    }
}
