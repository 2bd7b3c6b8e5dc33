//! Ordinary sessions: `tokio-postgres` on a stream of ours.
//!
//! Hosts, TLS and passwords are [`super::dial`]'s; what this file adds is the start-up packet and the
//! task that drives the connection.
//!
//! # Invariants
//! - Settings of a [`Session`] hold from its first statement: they travel in the start-up packet.
//! - The connection's task ends when the client is dropped or the connection breaks, never earlier.

use std::future::{Ready, poll_fn, ready};
use std::io;

use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client, Connection};

use super::conninfo::{self, ConnInfo, Host};
use super::dial::{Start, dial};
use super::stream::PgStream;
use super::{PgError, tls};

/// What a session is for: its `application_name` and the settings it starts with.
#[derive(Clone, Debug)]
pub struct Session {
    /// `application_name`, see [`crate::stream::StreamName::application_name`].
    pub application_name: String,
    /// Settings sent with the start-up packet, as `-c name=value`.
    pub settings: Vec<(&'static str, String)>,
}

impl Session {
    /// A session without settings of its own.
    pub fn new(application_name: impl Into<String>) -> Self {
        Self {
            application_name: application_name.into(),
            settings: Vec::new(),
        }
    }

    /// Adds a setting.
    #[must_use]
    pub fn set(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.settings.push((name, value.into()));
        self
    }

    /// The `options` of the start-up packet: those of the URL, then ours, which win.
    pub(super) fn options(&self, conninfo: &ConnInfo) -> Option<String> {
        let mut options: Vec<String> = conninfo.options.iter().cloned().collect();
        for (name, value) in &self.settings {
            options.push(format!("-c {name}={}", escape_option(value)));
        }
        Some(options.join(" ")).filter(|options| !options.is_empty())
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
    dial(conninfo, &Ordinary { conninfo, session }).await
}

struct Ordinary<'a> {
    conninfo: &'a ConnInfo,
    session: &'a Session,
}

impl Start for Ordinary<'_> {
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
        if let Some(options) = self.session.options(self.conninfo) {
            config.options(options);
        }
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
        tokio::spawn(drive(connection, host.to_string()));
        Ok(client)
    }

    async fn ask(&self, session: &mut Client, sql: &str) -> Result<bool, PgError> {
        Ok(session.query_one(sql, &[]).await?.try_get(0)?)
    }
}

impl Ordinary<'_> {
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

/// Drives the connection until the client is dropped. An error reaches the caller through the
/// statement it interrupts, so here it is only worth a line for the curious.
async fn drive(mut connection: Connection<PgStream, PgStream>, server: String) {
    loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
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
        let session = Session::new("x")
            .set("DateStyle", "ISO, MDY")
            .set("search_path", r#""a\b""#);
        assert_eq!(
            session.options(&conninfo).as_deref(),
            Some(r#"-c geqo=off -c DateStyle=ISO,\ MDY -c search_path="a\\b""#)
        );
        let bare = ConnInfo::parse("postgres://u@h", None).unwrap();
        assert_eq!(Session::new("x").options(&bare), None);
    }
}
