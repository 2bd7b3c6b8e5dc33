//! A TCP connection that the runtime can be made to forget for a while.
//!
//! tokio learns of arriving data edge by edge: as long as a connection is registered, every packet wakes a
//! thread of the runtime, whether anybody wants to read or not. For a reader that lets data gather that would
//! be the very cost it wants to save: measured on a backlog of small transactions, four fifths of its CPU.
//! [`Socket::rest`] takes the connection out of the runtime's sight; the next read or write puts it back.
//!
//! # Invariants
//! - Nothing arrives unnoticed: a connection that is put back reports at once what has come meanwhile.

use std::io;
use std::net;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A TCP connection, watched by the runtime or resting.
pub(super) struct Socket(SocketState);

enum SocketState {
    Watched(TcpStream),
    Resting(net::TcpStream),
    /// It could not be put back, or not taken out.
    Lost,
}

impl Socket {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Self(SocketState::Watched(tcp))
    }

    /// Until the next read or write nobody is woken for what arrives. Whoever waits for the connection now
    /// must not go on waiting.
    pub(super) fn rest(&mut self) {
        self.0 = match std::mem::replace(&mut self.0, SocketState::Lost) {
            SocketState::Watched(tcp) => tcp
                .into_std()
                .map_or(SocketState::Lost, SocketState::Resting),
            other => other,
        };
    }

    fn watched(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.0 = match std::mem::replace(&mut self.0, SocketState::Lost) {
            SocketState::Resting(tcp) => SocketState::Watched(TcpStream::from_std(tcp)?),
            other => other,
        };
        match &mut self.0 {
            SocketState::Watched(tcp) => Ok(Pin::new(tcp)),
            SocketState::Resting(_) | SocketState::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.watched() {
            Ok(tcp) => tcp.poll_read(cx, buf),
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.watched() {
            Ok(tcp) => tcp.poll_write(cx, buf),
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.watched() {
            Ok(tcp) => tcp.poll_flush(cx),
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.watched() {
            Ok(tcp) => tcp.poll_shutdown(cx),
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_arrives_at_rest_is_read_afterwards_and_writing_ends_the_rest() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut socket, mut server) = (Socket::new(client.unwrap()), server.unwrap().0);
        let mut read = [0; 3];
        for _ in 0..3 {
            socket.rest();
            // Twice is once.
            socket.rest();
            server.write_all(b"abc").await.unwrap();
            socket.read_exact(&mut read).await.unwrap();
            assert_eq!(&read, b"abc");
        }
        socket.rest();
        socket.write_all(b"xyz").await.unwrap();
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"xyz");
        // The end of the connection is noticed as well.
        socket.rest();
        drop(server);
        assert_eq!(socket.read(&mut read).await.unwrap(), 0);
    }
}
