//! A TCP proxy on the loopback interface: the network, as bad as a test wants it.
//!
//! # Invariants
//! - [`Proxy::cut`] ends every connection with a reset, not with an orderly end, and refuses new
//!   ones until [`Proxy::heal`].
//! - While [`Network::BlackHole`] lasts nothing passes and nothing ends: what a dead router does.
//!
//! # What it does not do
//! It knows no PostgreSQL; TLS passes through untouched.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the network does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Everything passes, each piece this much later.
    Up(Duration),
    /// Nothing passes; connections stay open.
    BlackHole,
    /// Connections are reset; new ones too.
    Cut,
}

/// A proxy; ends with its value.
pub struct Proxy {
    port: u16,
    network: watch::Sender<Network>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port and passes everything to `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("the loopback interface is up");
        let own_port = listener.local_addr().expect("it is bound").port();
        let (network, state) = watch::channel(Network::Up(Duration::ZERO));
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target, state.clone()));
            }
        });
        Self {
            port: own_port,
            network,
            accepting,
        }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Resets every connection and refuses new ones.
    pub fn cut(&self) {
        self.network.send_replace(Network::Cut);
    }

    /// Swallows everything, silently.
    pub fn black_hole(&self) {
        self.network.send_replace(Network::BlackHole);
    }

    /// Delays everything in both directions.
    pub fn delay(&self, by: Duration) {
        self.network.send_replace(Network::Up(by));
    }

    /// Lets everything pass again.
    pub fn heal(&self) {
        self.network.send_replace(Network::Up(Duration::ZERO));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.accepting.abort();
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr, mut network: watch::Receiver<Network>) {
    if *network.borrow() == Network::Cut {
        let _ = client.set_zero_linger();
        return;
    }
    let Ok(mut server) = TcpStream::connect(target).await else {
        return;
    };
    for stream in [&client, &server] {
        // Dropped in whatever state, a connection ends with a reset.
        let _ = stream.set_zero_linger();
        let _ = stream.set_nodelay(true);
    }
    // Borrowed halves: owned ones would send an orderly end when they are dropped.
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let upstream = pass(from_client, to_server, network.clone());
    let downstream = pass(from_server, to_client, network.clone());
    tokio::select! {
        _ = async { tokio::join!(upstream, downstream) } => {}
        _ = network.wait_for(|state| *state == Network::Cut) => {}
    }
}

/// Copies until the end of the stream, which it passes on.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut network: watch::Receiver<Network>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(length @ 1..) = from.read(&mut buffer).await else {
            let _ = to.shutdown().await;
            return;
        };
        let Ok(state) = network
            .wait_for(|state| *state != Network::BlackHole)
            .await
            .map(|state| *state)
        else {
            return;
        };
        if let Network::Up(delay) = state
            && !delay.is_zero()
        {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo_server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        port
    }

    fn is_reset(error: &std::io::Error) -> bool {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
        matches!(error.kind(), BrokenPipe | ConnectionReset)
    }

    async fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.map(|_| ())
    }

    #[tokio::test]
    async fn a_cut_resets_and_healing_lets_new_connections_through() {
        let proxy = Proxy::start(echo_server().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
        proxy.cut();
        let error = ping(&mut stream).await.unwrap_err();
        assert!(is_reset(&error), "{error:?}");
        proxy.heal();
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
    }

    #[tokio::test]
    async fn a_black_hole_swallows_without_an_end() {
        let proxy = Proxy::start(echo_server().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
        proxy.black_hole();
        let waited = tokio::time::timeout(Duration::from_millis(200), ping(&mut stream)).await;
        assert!(waited.is_err(), "something came through");
        proxy.heal();
        let mut rest = [0; 4];
        stream.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"ping");
    }
}
