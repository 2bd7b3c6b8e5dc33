//! The byte stream under a session: a Unix socket, TCP, or TLS over TCP.
//!
//! [`super::dial`] decides which host and whether TLS; this file opens it. Ordinary sessions and
//! walsender sessions run on the same type.
//!
//! # Invariants
//! - A TCP stream has `TCP_NODELAY` and the keepalive settings before the first byte is sent.
//! - A peer whose machine is gone is noticed within a minute, one that is only busy is left in peace ([`super::silence`]).
//! - What a server says before it speaks the protocol, because it cannot start a process for us, is an error of the network.
//! - Nothing that arrived before the TLS handshake is read as part of the session
//!   (CVE-2021-23222: bytes injected behind the server's answer).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use super::PgError;
use super::conninfo::{ConnInfo, Host, Keepalive};
use super::silence::Silence;
use super::socket::Socket;
use super::throttle::Throttle;
use super::tls::Tls;

/// An open connection on which the start-up packet may be sent.
pub(super) struct PgStream {
    transport: Transport,
    throttle: Option<Throttle>,
    silence: Option<Silence>,
    /// The peer has said something.
    heard: bool,
}

enum Transport {
    Unix(UnixStream),
    Tcp(Socket),
    Tls(Box<TlsStream<Socket>>),
}

/// Where to connect: one address of one host.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Unix(String),
    Tcp(SocketAddr),
}

impl PgStream {
    /// Opens the transport; what is sent over it from then on is within the bandwidth.
    pub(super) async fn open(
        host: &Host,
        address: &Address,
        conninfo: &ConnInfo,
        tls: Option<(&Tls, bool)>,
    ) -> Result<Self, PgError> {
        let (transport, silence) = Transport::open(host, address, conninfo.keepalive, tls).await?;
        Ok(Self {
            transport,
            throttle: conninfo.bandwidth.clone().map(Throttle::new),
            silence,
            heard: false,
        })
    }

    /// What binds authentication to this TLS session (RFC 5929, `tls-server-end-point`).
    pub(super) fn channel_binding(&self) -> Option<Vec<u8>> {
        match &self.transport {
            Transport::Tls(stream) => {
                let certificate = stream.get_ref().1.peer_certificates()?.first()?;
                super::tls::server_end_point(certificate)
            }
            Transport::Unix(_) | Transport::Tcp(_) => None,
        }
    }

    /// Nobody is woken for what arrives until the next read or write. On a Unix socket this does nothing.
    pub(super) fn rest(&mut self) {
        match &mut self.transport {
            Transport::Unix(_) => {}
            Transport::Tcp(socket) => socket.rest(),
            Transport::Tls(stream) => stream.get_mut().0.rest(),
        }
    }

    pub(super) fn is_unix(&self) -> bool {
        matches!(self.transport, Transport::Unix(_))
    }

    pub(super) fn is_tls(&self) -> bool {
        matches!(self.transport, Transport::Tls(_))
    }
}

impl Transport {
    /// Connects and, with `tls`, makes the handshake. Without TLS on the server's side a handshake
    /// that is not `required` leaves a plain stream.
    async fn open(
        host: &Host,
        address: &Address,
        keepalive: Keepalive,
        tls: Option<(&Tls, bool)>,
    ) -> Result<(Self, Option<Silence>), PgError> {
        let lost = |source: io::Error| connect_error(host, source);
        let mut tcp = match address {
            Address::Unix(path) => {
                return Ok((Self::Unix(unix(path).await.map_err(lost)?), None));
            }
            Address::Tcp(address) => TcpStream::connect(address).await.map_err(lost)?,
        };
        let silence = prepare(&tcp, keepalive).map_err(lost)?;
        let Some((tls, required)) = tls else {
            return Ok((Self::Tcp(Socket::new(tcp)), silence));
        };
        if !tls.is_direct() {
            let mut request = bytes::BytesMut::new();
            postgres_protocol::message::frontend::ssl_request(&mut request);
            tcp.write_all(&request).await.map_err(lost)?;
            // One byte exactly: what lies behind it belongs to the handshake.
            match tcp.read_u8().await.map_err(lost)? {
                b'S' => {}
                b'N' if required => {
                    return Err(PgError::Tls {
                        server: host.to_string(),
                        reason: "the server offers no TLS, but sslmode requires it".to_owned(),
                    });
                }
                b'N' => return Ok((Self::Tcp(Socket::new(tcp)), silence)),
                b'E' => {
                    let mut said = Vec::new();
                    tcp.take(REFUSAL_BYTES_MAX)
                        .read_to_end(&mut said)
                        .await
                        .map_err(lost)?;
                    return Err(lost(io::Error::other(first_line(&said))));
                }
                _ => {
                    return Err(PgError::Protocol(format!(
                        "{host} does not answer as PostgreSQL does"
                    )));
                }
            }
        }
        let stream = tls.handshake(host, Socket::new(tcp)).await?;
        Ok((Self::Tls(Box::new(stream)), silence))
    }
}

/// An error of the network that names the server it was met with.
pub(super) fn connect_error(host: &Host, source: io::Error) -> PgError {
    PgError::Connect {
        server: host.to_string(),
        source,
    }
}

async fn unix(path: &str) -> io::Result<UnixStream> {
    if let Some(name) = path.strip_prefix('@') {
        use std::os::linux::net::SocketAddrExt as _;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
        stream.set_nonblocking(true)?;
        return UnixStream::from_std(stream);
    }
    UnixStream::connect(path).await
}

/// The longest text that a server says before it speaks the protocol (`MAX_ERRLEN` of libpq).
const REFUSAL_BYTES_MAX: u64 = 30_000;

/// What a postmaster says that cannot start a process for us: text of the protocol of long ago, which has no length.
fn refusal(first: &[u8]) -> Option<String> {
    let (kind, rest) = first.split_first()?;
    let length = u32::from_be_bytes(*rest.first_chunk()?);
    (*kind == b'E' && u64::from(length) > REFUSAL_BYTES_MAX).then(|| first_line(rest))
}

fn first_line(said: &[u8]) -> String {
    let end = said.iter().position(|byte| matches!(byte, 0 | b'\n'));
    String::from_utf8_lossy(&said[..end.unwrap_or(said.len())]).into_owned()
}

/// Sets the socket up, and says how it is watched for silence.
fn prepare(tcp: &TcpStream, keepalive: Keepalive) -> io::Result<Option<Silence>> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    if keepalive.enabled {
        let mut settings = TcpKeepalive::new();
        // Zero is libpq's "as the system has it".
        if !keepalive.idle.is_zero() {
            settings = settings.with_time(keepalive.idle);
        }
        if !keepalive.interval.is_zero() {
            settings = settings.with_interval(keepalive.interval);
        }
        if keepalive.count > 0 {
            settings = settings.with_retries(keepalive.count);
        }
        socket.set_tcp_keepalive(&settings)?;
    }
    if keepalive.user_timeout.is_zero() {
        return Ok(None);
    }
    let inode = rustix::fs::fstat(tcp)?.st_ino;
    Ok(Some(Silence::new(inode, keepalive.user_timeout)))
}

/// Delegates to the stream inside, whichever it is.
macro_rules! inner {
    ($transport:expr, $stream:ident => $call:expr) => {
        match $transport {
            Transport::Unix($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Transport::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Transport::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for PgStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = inner!(&mut this.transport, stream => stream.poll_read(cx, buf));
        match (read, &mut this.silence) {
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(silence)) => return silence.poll(cx).map(Err),
            (Poll::Ready(read), silence) => {
                read?;
                if let Some(silence) = silence {
                    silence.heard();
                }
            }
        }
        let first = !std::mem::replace(&mut this.heard, true);
        match refusal(&buf.filled()[before..]).filter(|_| first) {
            Some(text) => Poll::Ready(Err(io::Error::other(text))),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for PgStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let granted = match &mut this.throttle {
            Some(throttle) => ready!(throttle.poll_grant(cx, buf.len())),
            None => buf.len(),
        };
        let buf = &buf[..granted];
        let sent = ready!(inner!(&mut this.transport, stream => stream.poll_write(cx, buf)))?;
        if let Some(throttle) = &mut this.throttle {
            throttle.sent(sent);
        }
        if let Some(silence) = &mut this.silence {
            silence.sent();
        }
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(&mut self.get_mut().transport, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        inner!(&mut self.get_mut().transport, stream => stream.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_dead_peer_is_noticed_within_a_minute() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        prepare(&tcp, Keepalive::default()).unwrap();
        let socket = SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap());
        let idle = socket.tcp_keepalive_time().unwrap();
        let probes =
            socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
        assert_eq!(idle + probes, Duration::from_secs(60));
        assert!(tcp.nodelay().unwrap());
    }

    /// A stream to a peer, and the peer.
    async fn pair(silent_max: Duration) -> (PgStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tcp, peer) = tokio::join!(TcpStream::connect(address), listener.accept());
        let tcp = tcp.unwrap();
        let keepalive = Keepalive {
            user_timeout: silent_max,
            ..Keepalive::default()
        };
        let silence = prepare(&tcp, keepalive).unwrap();
        let stream = PgStream {
            transport: Transport::Tcp(Socket::new(tcp)),
            throttle: None,
            silence,
            heard: false,
        };
        (stream, peer.unwrap().0)
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_more_for_a_while_is_not_given_up() {
        let (stream, mut peer) = pair(Duration::from_millis(120)).await;
        let (mut read, mut write) = tokio::io::split(stream);
        let sent = vec![7; 20_000_000];
        let busy = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let mut taken = vec![0; sent.len()];
            peer.read_exact(&mut taken).await.unwrap();
            peer.write_all(b"done").await.unwrap();
        };
        let mut answer = [0; 4];
        let (written, answered, ()) =
            tokio::join!(write.write_all(&sent), read.read_exact(&mut answer), busy);
        written.unwrap();
        answered.unwrap();
        assert_eq!(&answer, b"done");
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_a_process_is_an_error_of_the_network() {
        const SAID: &[u8] =
            b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0";
        let (mut stream, mut peer) = pair(Duration::from_secs(60)).await;
        peer.write_all(SAID).await.unwrap();
        let error = stream.read(&mut [0; 100]).await.unwrap_err();
        assert!(error.to_string().starts_with("could not fork"), "{error}");
        assert!(error.to_string().ends_with("unavailable"), "{error}");
        // An error of today's protocol has a length.
        let (mut stream, mut peer) = pair(Duration::from_secs(60)).await;
        peer.write_all(b"E\0\0\0\x20SFATAL").await.unwrap();
        assert_eq!(stream.read(&mut [0; 100]).await.unwrap(), 11);
    }

    #[tokio::test]
    async fn a_url_may_leave_keepalives_to_the_kernel() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let keepalive = Keepalive {
            enabled: false,
            user_timeout: Duration::ZERO,
            ..Keepalive::default()
        };
        assert!(prepare(&tcp, keepalive).unwrap().is_none());
        assert!(!SockRef::from(&tcp).keepalive().unwrap());
        assert_eq!(SockRef::from(&tcp).tcp_user_timeout().unwrap(), None);
    }
}
