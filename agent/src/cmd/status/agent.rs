//! Asks the running agent for its `/status`.
//!
//! One HTTP/1.1 GET by hand over a loopback connection to an agent of our own: an HTTP client would
//! be a large dependency for one request.
//!
//! # What it does not do
//! No TLS, no redirects, no chunked bodies: the agent sends none.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The leg of an agent that puts changes into a Kinesis stream.
pub(super) const SEND: &str = "send";

/// How long the agent may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Larger than the status of ten thousand databases.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The agent's `/status`, as far as `dr-agent status` shows it. Unknown fields are left out of account, for the
/// agent may be of a newer version.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(super) struct AgentStatus {
    #[serde(default)]
    pub(super) version: String,
    pub(super) databases: Vec<AgentDatabase>,
}

/// One pipeline.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct AgentDatabase {
    pub(super) database: String,
    pub(super) stream: String,
    /// `None`: of a version that knows only route `direct`.
    pub(super) leg: Option<String>,
    pub(super) state: String,
    pub(super) lag_seconds: Option<f64>,
    pub(super) lag_bytes: Option<u64>,
    pub(super) rpo_breached: Option<bool>,
    pub(super) slot_retained_bytes: Option<u64>,
    pub(super) since: Option<String>,
    pub(super) waits_for: Option<String>,
    pub(super) set_aside: BTreeMap<String, String>,
    pub(super) missing_constraints: BTreeMap<String, String>,
    pub(super) error: Option<String>,
    pub(super) hint: Option<String>,
}

impl AgentDatabase {
    /// It is there and nothing comes of it until a person does something.
    pub(super) fn stands(&self) -> bool {
        ["stopped", "fenced", "promoted"].contains(&self.state.as_str())
    }

    /// What it says of lag and position is the Kinesis stream's and not the replica's.
    pub(super) fn sends(&self) -> bool {
        self.leg.as_deref() == Some(SEND)
    }
}

/// Asks; an error is a sentence for the operator.
pub(super) async fn ask(listen: SocketAddr) -> Result<AgentStatus, String> {
    let body = timeout(ANSWER_WITHIN, get(reachable(listen)))
        .await
        .map_err(|_| format!("no answer within {ANSWER_WITHIN:?}"))?
        .map_err(|error| error.to_string())?;
    parse(&body)
}

/// An agent that listens on every address is asked on loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, listen.port())
}

async fn get(address: SocketAddr) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET /status HTTP/1.1\r\nHost: {address}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut answer)
        .await?;
    Ok(answer)
}

fn parse(answer: &[u8]) -> Result<AgentStatus, String> {
    const END_OF_HEAD: &[u8] = b"\r\n\r\n";
    let head = answer
        .windows(END_OF_HEAD.len())
        .position(|window| window == END_OF_HEAD)
        .ok_or("what answers there is no agent")?;
    let status = answer
        .split(|byte| *byte == b'\r')
        .next()
        .unwrap_or_default();
    if !status.starts_with(b"HTTP/1.1 200") {
        return Err(format!(
            "it answered \"{}\"",
            String::from_utf8_lossy(status)
        ));
    }
    serde_json::from_slice(&answer[head + END_OF_HEAD.len()..])
        .map_err(|error| format!("what answers there is no agent we understand: {error}"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const BODY: &str = r#"{"version":"9.9","objectives":{"rpo_seconds":30.0,"rto_seconds":300.0},
        "databases":[{"database":"app","stream":"dr_agent_app","state":"streaming","term":1,
        "batch":12,"end_lsn":"0/1A2B3C","commit_time":null,"lag_seconds":0.12,"lag_bytes":0,
        "rpo_breached":false,"slot_retained_bytes":123,"error":null,"hint":null,
        "unprotected":{"keyless_table":0},"of_a_newer_version":[]}]}"#;

    #[tokio::test]
    async fn an_agent_on_loopback_is_asked_and_understood() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).await.unwrap();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{BODY}",
                BODY.len()
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
        let status = ask(everywhere).await.unwrap();
        assert!(
            served
                .await
                .unwrap()
                .starts_with("GET /status HTTP/1.1\r\n")
        );
        assert_eq!(status.databases[0].lag_seconds, Some(0.12));
        assert_eq!(status.databases[0].rpo_breached, Some(false));
    }

    #[tokio::test]
    async fn nobody_listening_is_a_sentence_and_not_a_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(ask(address).await.unwrap_err().contains("refused"));
    }

    #[test]
    fn something_else_on_the_port_is_not_taken_for_an_agent() {
        for answer in [
            "",
            "SSH-2.0-OpenSSH_9.2\r\n",
            "HTTP/1.1 404 Not Found\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n<html>",
            "HTTP/1.1 200 OK\r\n\r\n{}",
        ] {
            assert!(parse(answer.as_bytes()).is_err(), "{answer}");
        }
    }
}
