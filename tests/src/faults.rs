//! An HTTP proxy that spoils chosen requests, as a network or a busy S3 would.
//!
//! It reads a request whole, asks the server over a connection of its own, and passes the answer on;
//! between the two it does what the test has planned. [`crate::proxy`] knows bytes, this one knows requests.
//!
//! # Invariants
//! - Every connection carries one request: what is planned for a request happens to that one alone.
//! - A fault is used once, by the first request that matches it.
//! - The server does one request at a time: moto looks whether an object is there and writes it in two steps, where S3 does
//!   it in one.
//!
//! # What it does not do
//! No TLS, no chunked requests, and nothing streams: requests and answers are held in memory. The server must
//! end its connection after an answer when it is asked to.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is reset; the server never hears of it.
    Cut,
    /// The server does it, and the connection is reset instead of an answer.
    LoseAnswer,
    /// The server never hears of it; the answer is this status with this error code of S3.
    Answer(u16, &'static str),
    /// The connection ends after so many bytes of the answer's body.
    BreakAfter(usize),
    /// One bit of the answer's body is wrong.
    Damage,
    /// The bodies of request and answer pass at so many bytes per second.
    Slow(usize),
    /// The server does not see this header, written in lower case: as one that does not know it.
    Forget(&'static str),
    /// The server never hears of it; the answer is 200 and a page of HTML, as of a portal, with these header lines besides.
    Page(&'static str),
    /// The answer lacks this header, written in lower case.
    Strip(&'static str),
    /// The answer's body ends after so many bytes, and its length says the same.
    Shorten(usize),
    /// The answer says that it is of this date.
    Dated(&'static str),
}

/// A slow body passes so often in a second.
const SIPS: usize = 20;

/// Where requests go.
struct Server {
    address: SocketAddr,
    /// Held while it does a request.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Plan {
    /// A fault, and what the first line of its request contains.
    faults: Vec<(&'static str, Fault)>,
    /// For every such request.
    always: Vec<(String, Fault)>,
    /// The heads of all requests so far.
    heads: Vec<String>,
}

/// A proxy; ends with its value.
pub struct FaultyProxy {
    port: u16,
    plan: Arc<Mutex<Plan>>,
    accepting: JoinHandle<()>,
}

impl FaultyProxy {
    /// Listens on a free port and passes everything to `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("the loopback interface is up");
        let own_port = listener.local_addr().expect("it is bound").port();
        let server = Arc::new(Server {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            turn: tokio::sync::Mutex::new(()),
        });
        let plan = Arc::new(Mutex::new(Plan::default()));
        let shared = Arc::clone(&plan);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (plan, server) = (Arc::clone(&shared), Arc::clone(&server));
                // A connection that breaks is none of our business: the client notices.
                tokio::spawn(async move {
                    let _ = carry(client, &server, &plan).await;
                });
            }
        });
        Self {
            port: own_port,
            plan,
            accepting,
        }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Spoils the next request whose first line contains `line`, `"PUT /bucket/name"` for instance.
    pub fn spoil(&self, line: &'static str, fault: Fault) {
        lock(&self.plan).faults.push((line, fault));
    }

    /// Spoils every request whose first line contains `line` from now on, or none any more.
    pub fn spoil_every(&self, line: &str, fault: Option<Fault>) {
        let mut plan = lock(&self.plan);
        plan.always.retain(|(part, _)| part != line);
        plan.always
            .extend(fault.map(|fault| (line.to_owned(), fault)));
    }

    /// The faults that no request has met yet.
    pub fn unused(&self) -> usize {
        lock(&self.plan).faults.len()
    }

    /// First lines and headers of all requests so far, in lower case.
    pub fn heads(&self) -> Vec<String> {
        lock(&self.plan).heads.clone()
    }
}

impl Drop for FaultyProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn lock(plan: &Mutex<Plan>) -> MutexGuard<'_, Plan> {
    plan.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn carry(mut client: TcpStream, server: &Server, plan: &Mutex<Plan>) -> std::io::Result<()> {
    let Some((head, mut request)) = read_head(&mut client).await? else {
        return Ok(());
    };
    let fault = {
        let mut plan = lock(plan);
        let line = head.lines().next().unwrap_or_default();
        let found = plan.faults.iter().position(|(part, _)| line.contains(part));
        plan.heads.push(head.to_ascii_lowercase());
        let always = plan.always.iter().find(|(part, _)| line.contains(part));
        let always = always.map(|(_, fault)| *fault);
        found.map(|at| plan.faults.remove(at).1).or(always)
    };
    let rate = match fault {
        Some(Fault::Slow(rate)) => Some(rate),
        _ => None,
    };
    if !read_body(&mut client, &head, &mut request, rate).await? {
        return Ok(());
    }
    match fault {
        None => client.write_all(&ask(server, &request).await?).await?,
        Some(Fault::Cut) => return client.set_zero_linger(),
        Some(Fault::LoseAnswer) => {
            ask(server, &request).await?;
            return client.set_zero_linger();
        }
        Some(Fault::Answer(status, code)) => {
            let body = format!("<Error><Code>{code}</Code><Message>as planned</Message></Error>");
            let head = format!(
                "HTTP/1.1 {status} Planned\r\nContent-Type: application/xml\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n",
                body.len()
            );
            client.write_all((head + &body).as_bytes()).await?;
        }
        Some(Fault::BreakAfter(bytes)) => {
            let answer = ask(server, &request).await?;
            let kept = (body_of(&answer) + bytes).min(answer.len());
            // No reset: it would overtake what has not been read yet.
            client.write_all(&answer[..kept]).await?;
        }
        Some(Fault::Damage) => {
            let mut answer = ask(server, &request).await?;
            let body = body_of(&answer);
            answer[body] ^= 1;
            client.write_all(&answer).await?;
        }
        Some(Fault::Slow(rate)) => {
            for sip in ask(server, &request).await?.chunks(sip(rate)) {
                client.write_all(sip).await?;
                sleep(Duration::from_secs(1) / SIPS as u32).await;
            }
        }
        Some(Fault::Forget(header)) => {
            let request = without(header, &request);
            client.write_all(&ask(server, &request).await?).await?;
        }
        Some(Fault::Page(headers)) => {
            let body = "<html><body>Please log in</body></html>";
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
                body.len()
            );
            client.write_all((head + body).as_bytes()).await?;
        }
        Some(Fault::Strip(header)) => {
            let answer = ask(server, &request).await?;
            client.write_all(&without(header, &answer)).await?;
        }
        Some(Fault::Dated(date)) => {
            let answer = without("date", &ask(server, &request).await?);
            let line = answer.windows(2).position(|bytes| bytes == b"\r\n");
            let (line, rest) = answer.split_at(line.map_or(0, |end| end + 2));
            let date = format!("Date: {date}\r\n");
            client
                .write_all(&[line, date.as_bytes(), rest].concat())
                .await?;
        }
        Some(Fault::Shorten(bytes)) => {
            let mut answer = without("content-length", &ask(server, &request).await?);
            let length = format!("Content-Length: {bytes}\r\n");
            answer.truncate(body_of(&answer) + bytes);
            let line = answer
                .windows(2)
                .position(|bytes| bytes == b"\r\n")
                .unwrap_or(0)
                + 2;
            answer.splice(line..line, length.into_bytes());
            client.write_all(&answer).await?;
        }
    }
    client.shutdown().await
}

/// The message without a header.
fn without(header: &str, message: &[u8]) -> Vec<u8> {
    let (head, body) = message.split_at(body_of(message));
    let head = String::from_utf8_lossy(head);
    let is_it = |line: &str| {
        let name = line.split_once(':').map(|(name, _)| name);
        name.is_some_and(|name| name.eq_ignore_ascii_case(header))
    };
    let kept: Vec<&str> = head.lines().filter(|line| !is_it(line)).collect();
    [(kept.join("\r\n") + "\r\n").as_bytes(), body].concat()
}

/// What passes at once.
fn sip(rate: usize) -> usize {
    (rate / SIPS).max(1)
}

/// The head as text, and all of the request; `None` when the client has nothing to ask.
pub(crate) async fn read_request(
    client: &mut TcpStream,
) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let Some((head, mut request)) = read_head(client).await? else {
        return Ok(None);
    };
    let whole = read_body(client, &head, &mut request, None).await?;
    Ok(whole.then_some((head, request)))
}

/// The head as text, and as much of the request as came with it; `None` when the client has nothing to ask.
async fn read_head(client: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut request = Vec::new();
    let body = loop {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(None);
        }
        if request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            break body_of(&request);
        }
    };
    let head = String::from_utf8_lossy(&request[..body]).into_owned();
    Ok(Some((head, request)))
}

/// Reads the rest of the request, at a rate if there is one; whether it came.
async fn read_body(
    client: &mut TcpStream,
    head: &str,
    request: &mut Vec<u8>,
    rate: Option<usize>,
) -> std::io::Result<bool> {
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    let whole = head.len() + length.unwrap_or(0);
    while request.len() < whole {
        let read = match rate {
            None => client.read_buf(request).await?,
            Some(rate) => {
                sleep(Duration::from_secs(1) / SIPS as u32).await;
                client.take(sip(rate) as u64).read_buf(request).await?
            }
        };
        if read == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The same, one request at a time where that is wanted.
async fn ask(server: &Server, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let _turn = server.turn.lock().await;
    forward(server.address, request).await
}

/// The whole answer of the server, which is asked to end its connection behind it.
pub(crate) async fn forward(target: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(target).await?;
    let line = request.windows(2).position(|bytes| bytes == b"\r\n");
    let (line, rest) = request.split_at(line.map_or(0, |end| end + 2));
    let request = [line, b"Connection: close\r\n", rest].concat();
    server.write_all(&request).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Where the body begins.
pub(crate) fn body_of(message: &[u8]) -> usize {
    let end = message.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    end.map_or(message.len(), |end| end + 4)
}
