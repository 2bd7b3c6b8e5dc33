//! Where a server is and how to reach it: the connection settings, read once, used for every session.
//!
//! The configuration holds libpq-style URLs ([`parse`] reads them); [`super::dial`] tries the hosts,
//! [`super::tls`] and [`super::password`] take their part from here, and the programs we start
//! (`pg_dump`, `pg_restore`) get the same settings through [`ConnInfo::libpq_environment`].
//!
//! # Invariants
//! - The meaning of every setting is libpq's; a setting we do not know is an error that names it.
//! - No password leaves through `Display` or `Debug`.
//!
//! # What it does not do
//! It reads no `PGHOST`-like environment variables and no service file: the configuration says where
//! the servers are. Passwords are looked up when a session starts, not here, so that they may change.

mod environment;
mod parse;
mod syntax;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::throttle::Bandwidth;

/// Why a connection URL cannot be used. The text never quotes a password.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConnInfoError(pub String);

/// How much TLS is asked for; libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

/// Whether authentication must be bound to the TLS session; libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

impl ChannelBinding {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
        }
    }
}

/// What kind of server will do; libpq's `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetSessionAttrs {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

impl TargetSessionAttrs {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::PreferStandby => "prefer-standby",
        }
    }
}

/// How a dead peer is noticed on TCP.
///
/// The kernel's own defaults need two hours for an idle connection and about fifteen minutes for
/// one with unsent data. The recovery point is counted in seconds, so ours are a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalive {
    pub(super) enabled: bool,
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    /// How long a peer may acknowledge nothing of what was sent; zero leaves it to the kernel.
    pub(super) user_timeout: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: Duration::from_secs(60),
        }
    }
}

/// One host of the URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A host name, an address, or the directory of a Unix socket (begins with `/` or `@`).
    pub name: String,
    /// `hostaddr`: where to connect without asking the name service; `name` is still what the
    /// server's certificate is compared with.
    pub(super) addr: Option<IpAddr>,
    /// TCP port, or the number in the socket's file name.
    pub port: u16,
}

impl Host {
    /// Whether this is the directory of a Unix socket.
    pub fn is_unix(&self) -> bool {
        self.addr.is_none() && (self.name.starts_with('/') || self.name.starts_with('@'))
    }

    /// The socket's file (or, beginning with `@`, its abstract name).
    pub(super) fn socket_path(&self) -> String {
        format!("{}/.s.PGSQL.{}", self.name.trim_end_matches('/'), self.port)
    }
}

impl fmt::Display for Host {
    /// `host:port`, `[address]:port`, or `/directory:port` for a Unix socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') && !self.is_unix() {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

/// How to reach a server.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) dbname: String,
    pub(super) password: Option<String>,
    pub(super) password_file: Option<PathBuf>,
    /// `passfile`: another place for `~/.pgpass`.
    pub(super) passfile: Option<PathBuf>,
    pub(super) ssl_mode: SslMode,
    /// TLS from the first byte instead of asking first (`sslnegotiation=direct`, servers from 17 on).
    pub(super) ssl_direct: bool,
    /// A file, or the word `system`.
    pub(super) ssl_root_cert: Option<PathBuf>,
    pub(super) ssl_cert: Option<PathBuf>,
    pub(super) ssl_key: Option<PathBuf>,
    pub(super) channel_binding: ChannelBinding,
    /// For each address of each host, from the first packet to the end of authentication.
    pub(super) connect_timeout: Option<Duration>,
    pub(super) target_session_attrs: TargetSessionAttrs,
    pub(super) keepalive: Keepalive,
    pub(super) options: Option<String>,
    /// What all sessions opened with this, or with a copy of it, may send together.
    pub(super) bandwidth: Option<Bandwidth>,
}

impl ConnInfo {
    /// Limits what all sessions opened with this, or with a copy of it, send together, in bytes per second.
    #[must_use]
    pub fn with_bandwidth(mut self, bytes_per_second: u64) -> Self {
        self.bandwidth = Some(Bandwidth::new(bytes_per_second));
        self
    }

    /// What [`Self::with_bandwidth`] was given.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.bandwidth.as_ref().map(Bandwidth::bytes_per_second)
    }

    /// Shares the limit of another one's sessions, or has none where that has none.
    #[must_use]
    pub fn bound_like(mut self, other: &Self) -> Self {
        self.bandwidth.clone_from(&other.bandwidth);
        self
    }

    /// Whether both lead to the same place in the same way, whatever may be sent there.
    pub fn is_same_place(&self, other: &Self) -> bool {
        *self == other.clone().bound_like(self)
    }

    /// Reads a libpq-style URL (`postgres://…`, `postgresql://…`) or a `key=value` string.
    ///
    /// `password_file` holds nothing but the password; a relative name is looked for among
    /// systemd's credentials first. Nothing is opened here.
    ///
    /// # Errors
    /// An unknown setting, a value outside its range, or combinations libpq refuses; the text
    /// names the setting.
    pub fn parse(url: &str, password_file: Option<PathBuf>) -> Result<Self, ConnInfoError> {
        let mut conninfo = parse::parse(url)?;
        conninfo.password_file = password_file;
        Ok(conninfo)
    }

    /// The hosts in the order in which they are tried.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The files that it names, which whoever connects must be able to read.
    pub fn files(&self) -> Vec<PathBuf> {
        let roots = self
            .ssl_root_cert
            .as_ref()
            .filter(|word| word.as_path() != Path::new("system"));
        let all = [
            self.password_file.as_ref(),
            self.passfile.as_ref(),
            roots,
            self.ssl_cert.as_ref(),
            self.ssl_key.as_ref(),
        ];
        all.into_iter().flatten().cloned().collect()
    }

    /// The role we connect as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database named in the URL; the user's name where it names none.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// The same server, another database.
    #[must_use]
    pub fn with_dbname(&self, dbname: &str) -> Self {
        let mut other = self.clone();
        dbname.clone_into(&mut other.dbname);
        other
    }
}

impl fmt::Display for ConnInfo {
    /// `host:port/dbname` with all hosts, never with a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, host) in self.hosts.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            write!(f, "{host}")?;
        }
        write!(f, "/{}", self.dbname)
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnInfo")
            .field("server", &self.to_string())
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("password_file", &self.password_file)
            .field("ssl_mode", &self.ssl_mode)
            .field("ssl_root_cert", &self.ssl_root_cert)
            .field("ssl_cert", &self.ssl_cert)
            .field("channel_binding", &self.channel_binding)
            .field("connect_timeout", &self.connect_timeout)
            .field("target_session_attrs", &self.target_session_attrs)
            .finish_non_exhaustive()
    }
}
