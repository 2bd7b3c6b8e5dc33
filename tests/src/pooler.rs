//! A stand-in for a pooler: passes sessions through, and drops the start-up parameter `options`, as PgBouncer with
//! `ignore_startup_parameters` does.
//!
//! # What it does not do
//! It pools nothing and speaks no TLS.

use tokio::io::{self, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What a client that wants TLS asks first.
const SSL_REQUEST: u32 = 80_877_103;

/// A running one; ends when it is dropped.
pub struct Pooler {
    port: u16,
    task: JoinHandle<()>,
}

impl Pooler {
    /// Listens in front of a server on this machine.
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A session that breaks is the client's to complain about.
                tokio::spawn(async move { pass(client, server).await.ok() });
            }
        });
        Self { port, task }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut client: TcpStream, server: u16) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    loop {
        let length = client.read_u32().await?;
        let mut packet = vec![0; length.saturating_sub(4) as usize];
        client.read_exact(&mut packet).await?;
        if packet[..4] == SSL_REQUEST.to_be_bytes() {
            client.write_all(b"N").await?;
            continue;
        }
        let packet = without_options(&packet);
        server.write_u32(packet.len() as u32 + 4).await?;
        server.write_all(&packet).await?;
        return io::copy_bidirectional(&mut client, &mut server)
            .await
            .map(|_| ());
    }
}

/// A start-up packet (protocol version, then names and values, each ended by a zero byte) without that parameter.
fn without_options(packet: &[u8]) -> Vec<u8> {
    let (version, parameters) = packet.split_at(4.min(packet.len()));
    let mut kept = version.to_vec();
    let texts: Vec<&[u8]> = parameters.split(|byte| *byte == 0).collect();
    for pair in texts.chunks_exact(2) {
        if pair[0] == b"options" || pair[0].is_empty() {
            continue;
        }
        for text in pair {
            kept.extend_from_slice(text);
            kept.push(0);
        }
    }
    kept.push(0);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_options_are_dropped() {
        let packet = b"\0\x03\0\0user\0dr\0options\0-c x=1\0database\0app\0\0";
        let expected = b"\0\x03\0\0user\0dr\0database\0app\0\0";
        assert_eq!(without_options(packet), expected);
        assert_eq!(without_options(expected), expected);
    }
}
