//! Which host, and with or without TLS: tries them in libpq's order until a session stands.
//!
//! [`super::connect`] and [`super::replication`] each say through [`Start`] how their kind of session
//! begins on an open stream; everything around it is the same and is here.
//!
//! # Invariants
//! - The next host is tried when a host cannot be reached, is starting or shutting down, or is not the
//!   kind of server asked for. A refused password or certificate ends the search: that server answered.
//! - `sslmode` of `require` and above never leads to a plain session over TCP.
//! - Each address gets `connect_timeout` from the first packet to the end of authentication.

use std::io;
use std::time::Duration;

use super::conninfo::{ChannelBinding, ConnInfo, Host, SslMode, TargetSessionAttrs};
use super::stream::{Address, PgStream, connect_error};
use super::tls::Tls;
use super::{PgError, password, tls};

/// How one kind of session begins on an open stream.
pub(super) trait Start {
    /// The session.
    type Session;

    /// Whether the session is a walsender's.
    const REPLICATION: bool;

    /// Sends the start-up packet and authenticates.
    fn start(
        &self,
        stream: PgStream,
        host: &Host,
        password: Option<&str>,
    ) -> impl Future<Output = Result<Self::Session, PgError>> + Send;

    /// Asks for one boolean.
    fn ask(
        &self,
        session: &mut Self::Session,
        sql: &str,
    ) -> impl Future<Output = Result<bool, PgError>> + Send;
}

/// Opens a session on the first host that will do.
pub(super) async fn dial<S: Start + Sync>(
    conninfo: &ConnInfo,
    kind: &S,
) -> Result<S::Session, PgError>
where
    S::Session: Send,
{
    let wanted = conninfo.target_session_attrs;
    match Box::pin(try_hosts(conninfo, kind, wanted)).await {
        // No standby anywhere: a second round takes any server.
        Err(error) if wanted == TargetSessionAttrs::PreferStandby && leads_to_next_host(&error) => {
            Box::pin(try_hosts(conninfo, kind, TargetSessionAttrs::Any)).await
        }
        outcome => outcome,
    }
}

async fn try_hosts<S: Start + Sync>(
    conninfo: &ConnInfo,
    kind: &S,
    wanted: TargetSessionAttrs,
) -> Result<S::Session, PgError>
where
    S::Session: Send,
{
    let mut last = PgError::Closed;
    for host in &conninfo.hosts {
        let password = password::find(conninfo, host, S::REPLICATION)?;
        let addresses = match limit(conninfo, host, resolve(host)).await {
            Ok(addresses) => addresses,
            Err(error) => {
                last = error;
                continue;
            }
        };
        for address in addresses {
            let attempt = DialAttempt {
                conninfo,
                host,
                address,
                password: password.as_deref(),
            };
            let error = match attempt.run(kind, wanted).await {
                Ok(session) => return Ok(session),
                Err(error) => error,
            };
            if !leads_to_next_host(&error) {
                return Err(error);
            }
            if conninfo.hosts.len() > 1 {
                tracing::debug!(server = %host, error = %crate::error::chain(&error), "next host");
            }
            last = error;
        }
    }
    Err(last)
}

async fn resolve(host: &Host) -> Result<Vec<Address>, PgError> {
    if host.is_unix() {
        return Ok(vec![Address::Unix(host.socket_path())]);
    }
    if let Some(addr) = host.addr {
        return Ok(vec![Address::Tcp((addr, host.port).into())]);
    }
    let found: Vec<Address> = tokio::net::lookup_host((host.name.as_str(), host.port))
        .await
        .map_err(|source| connect_error(host, source))?
        .map(Address::Tcp)
        .collect();
    if found.is_empty() {
        let source = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        return Err(connect_error(host, source));
    }
    Ok(found)
}

/// The server was reached or not, but another may be what we look for.
fn leads_to_next_host(error: &PgError) -> bool {
    match error {
        PgError::Connect { .. } | PgError::Closed | PgError::Io(_) | PgError::Timeout { .. } => {
            true
        }
        // cannot_connect_now: starting up, shutting down, in recovery without hot_standby.
        PgError::Server(error) => error.sqlstate == "57P03",
        PgError::Tls { .. }
        | PgError::Password { .. }
        | PgError::OptionsDropped { .. }
        | PgError::Protocol(_) => false,
    }
}

/// One address of one host.
struct DialAttempt<'a> {
    conninfo: &'a ConnInfo,
    host: &'a Host,
    address: Address,
    password: Option<&'a str>,
}

/// Plain, or TLS and whether it must be TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encryption {
    Plain,
    Tls { required: bool },
}

/// What `sslmode` lets us try, in order. A Unix socket needs no encryption and knows none.
fn encryptions(mode: SslMode, unix: bool) -> &'static [Encryption] {
    use Encryption::{Plain, Tls};
    match mode {
        _ if unix => &[Plain],
        SslMode::Disable => &[Plain],
        SslMode::Allow => &[Plain, Tls { required: true }],
        SslMode::Prefer => &[Tls { required: false }, Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Tls { required: true }],
    }
}

impl DialAttempt<'_> {
    async fn run<S: Start + Sync>(
        &self,
        kind: &S,
        wanted: TargetSessionAttrs,
    ) -> Result<S::Session, PgError>
    where
        S::Session: Send,
    {
        let encryptions = encryptions(self.conninfo.ssl_mode, self.host.is_unix());
        // Before anything is tried: a certificate file that cannot be used is an error also where
        // `sslmode` would be content without TLS.
        let tls = match encryptions {
            [Encryption::Plain] => None,
            _ => Some(Tls::new(self.conninfo, self.host)?),
        };
        let mut refused: Option<PgError> = None;
        for &encryption in encryptions {
            let tls = match encryption {
                Encryption::Plain => None,
                Encryption::Tls { required } => tls.as_ref().map(|tls| (tls, required)),
            };
            let session = Box::pin(self.start(kind, wanted, tls));
            let error = match limit(self.conninfo, self.host, session).await {
                Ok(session) => return Ok(session),
                Err(error) => error,
            };
            // pg_hba.conf may let us in with TLS only, or without only; and a handshake may fail.
            let other_may_do = match &error {
                PgError::Tls { .. } => true,
                PgError::Server(error) => error.sqlstate == "28000",
                _ => false,
            };
            if refused.is_none() && other_may_do && encryptions.len() > 1 {
                tracing::debug!(
                    server = %self.host,
                    sslmode = self.conninfo.ssl_mode.as_str(),
                    error = %crate::error::chain(&error),
                    "trying the other kind of encryption"
                );
                refused = Some(error);
                continue;
            }
            // The first refusal is of what `sslmode` wished for; that is the one to tell.
            return Err(refused.unwrap_or(error));
        }
        Err(refused.unwrap_or(PgError::Closed))
    }

    async fn start<S: Start + Sync>(
        &self,
        kind: &S,
        wanted: TargetSessionAttrs,
        tls: Option<(&Tls, bool)>,
    ) -> Result<S::Session, PgError>
    where
        S::Session: Send,
    {
        let stream = PgStream::open(self.host, &self.address, self.conninfo, tls).await?;
        if self.conninfo.channel_binding == ChannelBinding::Require && !stream.is_tls() {
            return Err(PgError::Tls {
                server: self.host.to_string(),
                reason: "channel_binding=require, but the session is not encrypted".to_owned(),
            });
        }
        let mut session = kind
            .start(stream, self.host, self.password)
            .await
            .map_err(|error| name_server(self.host, error))?;
        let Some((sql, expected)) = condition(wanted) else {
            return Ok(session);
        };
        if kind.ask(&mut session, sql).await? == expected {
            return Ok(session);
        }
        Err(connect_error(
            self.host,
            io::Error::other(format!(
                "the server is not what target_session_attrs={} asks for",
                wanted.as_str()
            )),
        ))
    }
}

/// During start-up a broken connection is a server that cannot be reached.
fn name_server(host: &Host, error: PgError) -> PgError {
    match error {
        PgError::Closed => connect_error(
            host,
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection during start-up",
            ),
        ),
        PgError::Io(source) => {
            tls::refusal(host, &source).unwrap_or_else(|| connect_error(host, source))
        }
        other => other,
    }
}

/// The question to the server and the answer that will do.
fn condition(wanted: TargetSessionAttrs) -> Option<(&'static str, bool)> {
    const RECOVERY: &str = "SELECT pg_catalog.pg_is_in_recovery()";
    match wanted {
        TargetSessionAttrs::Any => None,
        // Every session of ours says itself whether it writes: what is left of this is hot standby.
        TargetSessionAttrs::ReadWrite | TargetSessionAttrs::Primary => Some((RECOVERY, false)),
        TargetSessionAttrs::ReadOnly
        | TargetSessionAttrs::Standby
        | TargetSessionAttrs::PreferStandby => Some((RECOVERY, true)),
    }
}

async fn limit<T>(
    conninfo: &ConnInfo,
    host: &Host,
    work: impl Future<Output = Result<T, PgError>>,
) -> Result<T, PgError> {
    let Some(after) = conninfo.connect_timeout else {
        return work.await;
    };
    match tokio::time::timeout(after, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(connect_error(host, timed_out(after))),
    }
}

fn timed_out(after: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no answer within {} s (connect_timeout)", after.as_secs()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_weak_modes_ever_try_a_plain_connection() {
        let plain = |mode| encryptions(mode, false).contains(&Encryption::Plain);
        assert!(plain(SslMode::Disable) && plain(SslMode::Allow) && plain(SslMode::Prefer));
        for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
            assert_eq!(
                encryptions(mode, false),
                [Encryption::Tls { required: true }]
            );
            assert_eq!(encryptions(mode, true), [Encryption::Plain]);
        }
        assert_eq!(encryptions(SslMode::Allow, false)[0], Encryption::Plain);
    }

    #[test]
    fn a_server_that_refuses_us_ends_the_search_and_a_silent_one_does_not() {
        let server = |sqlstate: &str| {
            PgError::Server(Box::new(crate::pg::ServerError {
                sqlstate: sqlstate.to_owned(),
                ..Default::default()
            }))
        };
        assert!(leads_to_next_host(&PgError::Closed));
        assert!(leads_to_next_host(&server("57P03")));
        assert!(!leads_to_next_host(&server("28P01")));
        assert!(!leads_to_next_host(&server("53300")));
    }
}
