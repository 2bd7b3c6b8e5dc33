//! An HTTP proxy that spoils chosen requests, as a network or a busy Kinesis would.
//!
//! Like [`crate::faults`], whose reading and passing on of requests it uses; it knows operations of Kinesis
//! (`X-Amz-Target`) and records, where the other knows paths of S3. Requests and answers are JSON, as the SDK sends them.
//!
//! # Invariants
//! - Every connection carries one request: what is planned for a request happens to that one alone.
//! - A fault is used once, by the first request of its operation, unless it is planned for every one.
//!
//! # What it does not do
//! No TLS, no chunked requests, and nothing streams. It knows no CBOR.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::faults::{body_of, forward, read_request};

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The connection is reset; the server never hears of it.
    Cut,
    /// The server does it, and the connection is reset instead of an answer.
    LoseAnswer,
    /// The server never hears of it; the answer is this status with this error code, and a message.
    Refuse(u16, &'static str),
    /// The server never hears of it; this is the answer.
    Answer(Value),
    /// Of a call of PutRecords the server does not hear of these records; the answer refuses them with this code.
    RefuseRecords(fn(usize) -> bool, &'static str),
    /// The server hears of something else.
    Rewrite(fn(&mut Value)),
    /// The server never hears of it, and nobody answers: something on the way has forgotten the connection.
    Hang,
}

/// Which calls of PutRecords wait, before the server hears of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    Everything,
    /// Those with a record of the batch of this number, whoever wrote it.
    Batch(i64),
}

impl Held {
    fn holds(self, body: &Value) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Batch(number) => {
                let number = number.to_string();
                let records = body["Records"].as_array();
                // writer.batch.part
                records.into_iter().flatten().any(|record| {
                    let key = record["PartitionKey"].as_str().unwrap_or_default();
                    key.split('.').nth(1) == Some(&number)
                })
            }
        }
    }
}

/// A request that has come.
#[derive(Clone, Debug)]
pub struct Call {
    /// `PutRecords`
    pub operation: String,
    /// First line and headers, in lower case.
    pub head: String,
    /// What it asks.
    pub body: Value,
    /// How many requests of its operation were under way when it came, this one included.
    pub at_once: usize,
}

#[derive(Default)]
struct Plan {
    faults: Vec<(&'static str, Fault)>,
    /// For every request of the operation.
    always: Vec<(&'static str, Fault)>,
    /// The most records of a page, where pages are as Kinesis gives them.
    page: Option<usize>,
    /// Records given so far.
    given: usize,
    calls: Vec<Call>,
    under_way: Vec<String>,
}

struct Shared {
    plan: Mutex<Plan>,
    held: watch::Sender<Held>,
    /// GetRecords waits once so many records were given.
    readable: watch::Sender<usize>,
}

/// A proxy; ends with its value.
pub struct KinesisProxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl KinesisProxy {
    /// Listens on a free port and passes everything to `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("the loopback interface is up");
        let own_port = listener.local_addr().expect("it is bound").port();
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let shared = Arc::new(Shared {
            plan: Mutex::default(),
            held: watch::Sender::new(Held::Nothing),
            readable: watch::Sender::new(usize::MAX),
        });
        let proxy = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&proxy);
                // A connection that breaks is none of our business: the client notices.
                tokio::spawn(async move {
                    let _ = carry(client, target, &shared).await;
                });
            }
        });
        Self {
            port: own_port,
            shared,
            accepting,
        }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Spoils the next request of this operation.
    pub fn spoil(&self, operation: &'static str, fault: Fault) {
        self.plan().faults.push((operation, fault));
    }

    /// Spoils every request of this operation from now on, or none any more.
    pub fn spoil_every(&self, operation: &'static str, fault: Option<Fault>) {
        let mut plan = self.plan();
        plan.always.retain(|(of, _)| *of != operation);
        plan.always.extend(fault.map(|fault| (operation, fault)));
    }

    /// The faults that nobody has met yet are none any more.
    pub fn heal(&self) {
        let mut plan = self.plan();
        plan.faults.clear();
        plan.always.clear();
    }

    /// Pages have at most so many records from now on, and say how far behind they are, as those of Kinesis do.
    pub fn cut_pages(&self, records: usize) {
        self.plan().page = Some(records);
    }

    /// Nothing more is read once so many records were given; `None` lets everything be read.
    pub fn hold_reading_after(&self, records: Option<usize>) {
        self.shared
            .readable
            .send_replace(records.unwrap_or(usize::MAX));
    }

    /// Records that were read so far.
    pub fn given(&self) -> usize {
        self.plan().given
    }

    /// The faults that no request has met yet.
    pub fn unused(&self) -> usize {
        self.plan().faults.len()
    }

    /// Requests of PutRecords wait, before the server hears of them, until they may go on.
    pub fn hold_puts(&self, hold: bool) {
        self.shared.held.send_replace(match hold {
            true => Held::Everything,
            false => Held::Nothing,
        });
    }

    /// The same for what has a record of the batch of this number.
    pub fn hold_batch(&self, number: i64) {
        self.shared.held.send_replace(Held::Batch(number));
    }

    /// All requests of this operation so far.
    pub fn calls(&self, operation: &str) -> Vec<Call> {
        let plan = self.plan();
        let of_operation = |call: &&Call| call.operation == operation;
        plan.calls.iter().filter(of_operation).cloned().collect()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        lock(&self.shared)
    }
}

impl Drop for KinesisProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Plan> {
    shared.plan.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that is under way, until it is dropped.
struct UnderWay<'a>(&'a Shared, String);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut plan = lock(self.0);
        if let Some(at) = plan.under_way.iter().position(|one| *one == self.1) {
            plan.under_way.swap_remove(at);
        }
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr, shared: &Shared) -> std::io::Result<()> {
    let Some((head, request)) = read_request(&mut client).await? else {
        return Ok(());
    };
    let operation = header(&head, "x-amz-target").unwrap_or_default();
    let operation = operation.rsplit('.').next().unwrap_or_default().to_owned();
    let body: Value = serde_json::from_slice(&request[body_of(&request)..]).unwrap_or_default();
    let fault = {
        let mut plan = lock(shared);
        plan.under_way.push(operation.clone());
        let at_once = plan.under_way.iter().filter(|one| **one == operation);
        let call = Call {
            at_once: at_once.count(),
            head: head.to_ascii_lowercase(),
            body: body.clone(),
            operation: operation.clone(),
        };
        plan.calls.push(call);
        let found = plan.faults.iter().position(|(of, _)| *of == operation);
        let always = plan.always.iter().find(|(of, _)| *of == operation);
        let always = always.map(|(_, fault)| fault.clone());
        found.map(|at| plan.faults.remove(at).1).or(always)
    };
    let under_way = UnderWay(shared, operation.clone());
    if operation == "PutRecords" {
        let mut held = shared.held.subscribe();
        let _ = held.wait_for(|held| !held.holds(&body)).await;
    }
    let reply = match fault {
        None if operation == "GetRecords" => Some(get(target, &head, body, shared).await?),
        None => Some(forward(target, &request).await?),
        Some(Fault::Cut) => None,
        Some(Fault::Hang) => {
            // Until it is given up.
            while client.read(&mut [0; 64]).await? > 0 {}
            None
        }
        Some(Fault::LoseAnswer) => {
            forward(target, &request).await?;
            None
        }
        Some(Fault::Refuse(status, code)) => {
            let body = json!({"__type": code, "message": "as planned"});
            Some(answer(status, &body))
        }
        Some(Fault::Answer(body)) => Some(answer(200, &body)),
        Some(Fault::RefuseRecords(refuses, code)) => {
            let body = put_some(target, &head, body, refuses, code).await?;
            Some(answer(200, &body))
        }
        Some(Fault::Rewrite(rewrite)) => {
            let mut body = body;
            rewrite(&mut body);
            Some(forward(target, &with_body(&head, &body)).await?)
        }
    };
    // Whoever has the answer may ask again.
    drop(under_way);
    match reply {
        None => client.set_zero_linger(),
        Some(reply) => {
            client.write_all(&reply).await?;
            client.shutdown().await
        }
    }
}

/// Passes on the records that are not refused, and answers for all.
async fn put_some(
    target: SocketAddr,
    head: &str,
    mut body: Value,
    refuses: fn(usize) -> bool,
    code: &str,
) -> std::io::Result<Value> {
    let records = body["Records"].as_array().expect("PutRecords has records");
    let all = records.len();
    let kept: Vec<Value> = (0..all)
        .filter(|at| !refuses(*at))
        .map(|at| records[at].clone())
        .collect();
    let mut taken = Vec::new();
    if !kept.is_empty() {
        body["Records"] = Value::Array(kept);
        let answer = forward(target, &with_body(head, &body)).await?;
        let answer: Value = serde_json::from_slice(&answer[body_of(&answer)..])?;
        taken = answer["Records"].as_array().cloned().unwrap_or_default();
    }
    let mut taken = taken.into_iter();
    let answers: Vec<Value> = (0..all)
        .map(|at| match refuses(at) {
            true => json!({"ErrorCode": code, "ErrorMessage": "as planned"}),
            false => taken.next().expect("the server took the others"),
        })
        .collect();
    let refused = (0..all).filter(|at| refuses(*at)).count();
    Ok(json!({"FailedRecordCount": refused, "Records": answers}))
}

/// Passes on a request for records, in pages as they are planned.
async fn get(
    target: SocketAddr,
    head: &str,
    mut body: Value,
    shared: &Shared,
) -> std::io::Result<Vec<u8>> {
    let mut readable = shared.readable.subscribe();
    let _ = readable.wait_for(|most| lock(shared).given < *most).await;
    let page = lock(shared).page;
    if let Some(page) = page {
        body["Limit"] = json!(page);
    }
    let reply = forward(target, &with_body(head, &body)).await?;
    let Ok(mut said) = serde_json::from_slice::<Value>(&reply[body_of(&reply)..]) else {
        return Ok(reply);
    };
    let records = said["Records"].as_array().map_or(0, Vec::len);
    lock(shared).given += records;
    let Some(page) = page.filter(|_| said["Records"].is_array()) else {
        return Ok(reply);
    };
    // Behind a full page there may be more.
    let behind = match said["Records"].as_array().and_then(|all| all.last()) {
        Some(last) if records >= page => {
            let arrival = last["ApproximateArrivalTimestamp"]
                .as_f64()
                .unwrap_or_default();
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let age = now.expect("it is after 1970").as_secs_f64() - arrival;
            (age * 1000.0).max(1.0) as u64
        }
        _ => 0,
    };
    said["MillisBehindLatest"] = json!(behind);
    Ok(answer(200, &said))
}

/// The same request with another body.
fn with_body(head: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let mut request: String = head
        .lines()
        .filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("content-length"))
        .map(|line| format!("{line}\r\n"))
        .collect();
    request += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
    request.into_bytes()
}

fn answer(status: u16, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status} Planned\r\nContent-Type: application/x-amz-json-1.1\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

fn header<'a>(head: &'a str, wanted: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case(wanted).then_some(value.trim())
    })
}
