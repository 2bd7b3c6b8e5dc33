//! Ordinary sessions: `tokio-postgres` on a stream of ours.
//!
//! Hosts, TLS and passwords are [`super::dial`]'s; what this file adds is the start-up packet and the
//! task that drives the connection.
//!
//! # Invariants
//! - Every session has the settings of [`super::settings`]: nobody can make a [`Session`] without.
//! - Settings of a [`Session`] hold from its first statement: they travel in the start-up packet, or right behind it, where
//!   nobody waits for the answer.
//! - The connection's task ends when the client is dropped or the connection breaks, never earlier.

use std::future::{Ready, poll_fn, ready};
use std::io;

use futures_util::TryStreamExt as _;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client, Connection, SimpleQueryStream};

use super::conninfo::{self, ConnInfo, Host};
use super::dial::{Start, dial};
use super::stream::PgStream;
use super::{PgError, settings, tls};

/// What a session is for: its `application_name` and the settings it starts with.
#[derive(Clone, Debug)]
pub struct Session {
    /// `application_name`, see [`crate::names::stream::StreamName::application_name`].
    pub(super) application_name: String,
    /// Settings sent with the start-up packet, as `-c name=value`.
    settings: Vec<(&'static str, String)>,
}

impl Session {
    /// A session with the settings that all of ours have, and none of its own.
    pub fn new(application_name: impl Into<String>) -> Self {
        let all = settings::all().map(|(name, value)| (name, value.to_owned()));
        Self {
            application_name: application_name.into(),
            settings: all.collect(),
        }
    }

    /// A setting of its own, or another value for one that all have.
    #[must_use]
    pub fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self = self.as_found(name);
        self.settings.push((name, value.into()));
        self
    }

    /// Fires no triggers but those that are made to fire always. What writes to a replica is silent.
    #[must_use]
    pub fn silent(self) -> Self {
        let (name, value) = settings::SILENT;
        self.set(name, value)
    }

    /// Leaves one setting as any other session would find it.
    #[must_use]
    pub fn as_found(mut self, name: &'static str) -> Self {
        self.settings.retain(|(other, _)| *other != name);
        self
    }

    /// `PGAPPNAME` and `PGOPTIONS` of a program that connects to a server of this `server_version_num`.
    pub fn libpq_environment(&self, conninfo: &ConnInfo, version: i32) -> [(String, String); 2] {
        let mut session = self.clone();
        for (name, value) in settings::later_options(version) {
            session = session.set(name, *value);
        }
        [
            ("PGAPPNAME".to_owned(), self.application_name.clone()),
            ("PGOPTIONS".to_owned(), session.options(conninfo)),
        ]
    }

    /// The `options` of the start-up packet: those of the URL, then ours, which win.
    pub(super) fn options(&self, conninfo: &ConnInfo) -> String {
        let mut options: Vec<String> = conninfo.options.iter().cloned().collect();
        for (name, value) in &self.settings {
            options.push(format!("-c {name}={}", escape_option(value)));
        }
        options.join(" ")
    }
}

/// The server splits `options` at white space; a backslash protects the next character.
fn escape_option(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if c == '\\' || c.is_ascii_whitespace() || c == '\u{b}' {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Opens an ordinary session; the connection is driven by a task of its own and closes when the
/// client is dropped.
///
/// # Errors
/// [`PgError::Connect`] when no host can be reached, [`PgError::Tls`], [`PgError::Password`], or
/// what the server refused ([`PgError::Server`]).
pub async fn connect(conninfo: &ConnInfo, session: &Session) -> Result<Client, PgError> {
    dial(conninfo, &OrdinarySession { conninfo, session }).await
}

/// The same, [silent](Session::silent) where the role may be. For sessions that have work to do also where it may not.
///
/// # Errors
/// As [`connect`].
pub async fn connect_silently(conninfo: &ConnInfo, session: Session) -> Result<Client, PgError> {
    match connect(conninfo, &session.clone().silent()).await {
        // insufficient_privilege: "permission denied to set parameter".
        Err(error) if error.sqlstate() == Some("42501") => connect(conninfo, &session).await,
        outcome => outcome,
    }
}

struct OrdinarySession<'a> {
    conninfo: &'a ConnInfo,
    session: &'a Session,
}

impl Start for OrdinarySession<'_> {
    type Session = Client;

    const REPLICATION: bool = false;

    async fn start(
        &self,
        stream: PgStream,
        host: &Host,
        password: Option<&str>,
    ) -> Result<Client, PgError> {
        let mut config = tokio_postgres::Config::new();
        config
            .user(&self.conninfo.user)
            .dbname(&self.conninfo.dbname)
            .application_name(&self.session.application_name)
            .channel_binding(match self.conninfo.channel_binding {
                conninfo::ChannelBinding::Disable => {
                    tokio_postgres::config::ChannelBinding::Disable
                }
                conninfo::ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
                conninfo::ChannelBinding::Require => {
                    tokio_postgres::config::ChannelBinding::Require
                }
            });
        if let Some(password) = password {
            config.password(password);
        }
        config.options(self.session.options(self.conninfo));
        // The handshake is behind us. "Direct" makes the driver ask for none and hand the stream
        // straight to `AlreadyOpen`, from which it learns the channel binding.
        if stream.is_tls() {
            config.ssl_mode(SslMode::Require);
            config.ssl_negotiation(SslNegotiation::Direct);
        } else {
            config.ssl_mode(SslMode::Disable);
        }
        let (client, connection) = Box::pin(config.connect_raw(stream, AlreadyOpen))
            .await
            .map_err(|error| self.startup_error(host, error))?;
        if !settings::were_taken(connection.parameter("DateStyle")) {
            return Err(options_dropped(host));
        }
        let version = connection.parameter("server_version");
        let later = match version
            .and_then(settings::version_number)
            .and_then(settings::later)
        {
            // Sent, and not waited for: whatever comes next on this session comes behind it.
            Some(sql) => Some(client.simple_query_raw(sql).await?),
            None => None,
        };
        tokio::spawn(drive(connection, later, host.to_string()));
        Ok(client)
    }

    async fn ask(&self, session: &mut Client, sql: &str) -> Result<bool, PgError> {
        Ok(session.query_one(sql, &[]).await?.try_get(0)?)
    }
}

impl OrdinarySession<'_> {
    /// Gives the driver's start-up errors that concern password and TLS their names.
    fn startup_error(&self, host: &Host, error: tokio_postgres::Error) -> PgError {
        if error.as_db_error().is_some() {
            return error.into();
        }
        let cause = std::error::Error::source(&error);
        let io = cause.and_then(|cause| cause.downcast_ref::<io::Error>());
        if let Some(refusal) = io.and_then(|cause| tls::refusal(host, cause)) {
            return refusal;
        }
        match cause.map(ToString::to_string).as_deref() {
            Some("password missing") => password_missing(self.conninfo, host),
            Some("server did not use channel binding") => no_channel_binding(host),
            _ => error.into(),
        }
    }
}

pub(super) fn password_missing(conninfo: &ConnInfo, host: &Host) -> PgError {
    PgError::Password {
        user: conninfo.user.clone(),
        server: host.to_string(),
        reason: "the server asks for one, and there is none in the URL, password_file, \
                 PGPASSWORD or ~/.pgpass"
            .to_owned(),
    }
}

pub(super) fn no_channel_binding(host: &Host) -> PgError {
    PgError::Tls {
        server: host.to_string(),
        reason: "channel_binding=require, but the server's way of authentication has none"
            .to_owned(),
    }
}

pub(super) fn options_dropped(host: &Host) -> PgError {
    PgError::OptionsDropped {
        server: host.to_string(),
    }
}

/// Drives the connection until the client is dropped. An error reaches the caller through the
/// statement it interrupts, so here it is only worth a line for the curious.
///
/// A session that refuses a setting of ours is ended: its values may mean something else.
async fn drive(
    mut connection: Connection<PgStream, PgStream>,
    later: Option<SimpleQueryStream>,
    server: String,
) {
    let mut later = later.map(|answers| Box::pin(answers.try_for_each(|_| ready(Ok(())))));
    loop {
        let taken = async {
            match &mut later {
                Some(answers) => answers.await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            biased;
            message = poll_fn(|cx| connection.poll_message(cx)) => message,
            taken = taken => {
                later = None;
                if let Err(error) = taken {
                    tracing::warn!(%server, error = %PgError::from(error), "the server refused a setting of our session");
                    return;
                }
                continue;
            }
        };
        match message {
            Some(Ok(AsyncMessage::Notice(notice))) => {
                tracing::debug!(%server, severity = notice.severity(), message = notice.message(), "notice");
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(%server, error = %PgError::from(error), "session ended");
                return;
            }
            None => return,
        }
    }
}

/// Hands over a stream whose handshake is done.
struct AlreadyOpen;

impl TlsConnect<PgStream> for AlreadyOpen {
    type Stream = PgStream;
    type Error = io::Error;
    type Future = Ready<io::Result<PgStream>>;

    fn connect(self, stream: PgStream) -> Self::Future {
        ready(Ok(stream))
    }
}

impl TlsStream for PgStream {
    fn channel_binding(&self) -> ChannelBinding {
        match PgStream::channel_binding(self) {
            Some(end_point) => ChannelBinding::tls_server_end_point(end_point),
            None => ChannelBinding::none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_servers_splitting_of_options() {
        let conninfo = ConnInfo::parse("postgres://u@h?options=-c%20geqo=off", None).unwrap();
        let session = Session::new("x").set("geqo_seed", r#""a\b c""#);
        let options = session.options(&conninfo);
        assert!(options.starts_with("-c geqo=off -c client_encoding=UTF8 -c search_path= -c "));
        assert!(options.contains(r" -c DateStyle=ISO,\ YMD "));
        assert!(options.ends_with(r#" -c geqo_seed="a\\b\ c""#));
    }

    #[test]
    fn a_setting_of_a_sessions_own_replaces_the_common_one() {
        let conninfo = ConnInfo::parse("postgres://u@h", None).unwrap();
        let session = Session::new("x").set("lock_timeout", "5s").silent();
        let options = session.options(&conninfo);
        assert_eq!(options.matches("lock_timeout=").count(), 1);
        assert!(options.contains("lock_timeout=5s -c session_replication_role=replica"));
        let options = session.as_found("role").options(&conninfo);
        assert!(!options.contains("-c role="));
    }

    #[test]
    fn programs_get_the_same_and_what_their_server_knows() {
        let conninfo = ConnInfo::parse("postgres://u@h", None).unwrap();
        let session = Session::new("x");
        let [_, (_, old)] = session.libpq_environment(&conninfo, 160_004);
        assert_eq!(old, session.options(&conninfo));
        let [_, (_, new)] = session.libpq_environment(&conninfo, 170_004);
        assert!(new.ends_with(" -c transaction_timeout=0"));
    }
}
